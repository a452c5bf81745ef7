"""The example trains privately, measures the noise scale and finds wrong labels."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import per_sample_gradients as example
from tests.quick import quickly

pytestmark = pytest.mark.compiled_with_care


@pytest.mark.long
def test_short_run_reaches_its_numbers_and_saves_a_picture(capsys):
    numbers = example.main(["--epochs", "8", "--picture", "pictures/gradients.png"])
    assert numbers["private accuracy"] >= 0.85  # with noise 1.0; 8 epochs
    assert numbers["private accuracy"] < numbers["plain accuracy"]
    assert numbers["plain accuracy"] >= 0.97
    assert numbers["last noise scale"] > 2 * numbers["first noise scale"] > 40
    assert numbers["precision"] >= 0.85  # by chance: 0.05
    assert Path("pictures/gradients.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"{numbers['private accuracy']:.1%}" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_numbers_do_not_hang_on_the_seed(seed):
    numbers = example.main(["--seed", str(seed)])
    assert numbers["private accuracy"] >= 0.95
    assert numbers["plain accuracy"] >= 0.97
    assert numbers["last noise scale"] > 2 * numbers["first noise scale"]
    assert numbers["precision"] >= 0.88


def test_per_sample_gradients_are_those_of_a_loop():
    params = example.initial(3)
    images, _, labels, _ = example.load_data()
    some = slice(0, 5)
    gradients = quickly(example.per_sample_gradients)(params, images[some], labels[some])
    single = quickly(jax.grad(example.loss))
    for i in range(5):
        want = single(params, images[i], labels[i])
        for name in params:
            np.testing.assert_allclose(gradients[name][i], want[name], rtol=1e-3, atol=1e-6)
    norms = example.gradient_norms(params, images[some], labels[some])
    flat = np.concatenate([np.asarray(g).reshape(5, -1) for g in gradients.values()], 1)
    np.testing.assert_allclose(norms, np.linalg.norm(flat, axis=1), rtol=1e-5)


def test_five_per_cent_of_the_labels_become_another_class():
    labels = jnp.arange(1347) % 10
    noisy, flipped = example.wrong_labels(labels, 0)
    assert len(flipped) == 67 == len(set(flipped))
    np.testing.assert_array_equal(np.flatnonzero(noisy != labels), np.sort(flipped))
    assert 0 <= int(noisy.min()) and int(noisy.max()) <= 9
