"""What the rows cannot say of the adaptive softmax: all classes, the best one, and compiled code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.parity.oracle import Case, array, close, pair, to_jax, to_torch

NAME = "AdaptiveLogSoftmaxWithLoss"
X = array(40, 16) * 3


@pytest.mark.parametrize("options", [{}, {"div_value": 2.0, "head_bias": True}], ids=str)
@pytest.mark.parametrize("cutoffs", [[4, 10], [1], [19]], ids=str)
def test_all_log_probabilities_and_the_best_class_agree(cutoffs: list, options: dict) -> None:
    theirs, ours = pair(Case(NAME, (16, 20, cutoffs), options))
    # Weights that are large enough to make each class win somewhere.
    ours.load_state_dict({k: v * 4 for k, v in ours.state_dict().items()})
    theirs.load_state_dict({k: v * 4 for k, v in theirs.state_dict().items()})
    close(ours.log_prob(to_jax(X)), theirs.log_prob(to_torch(X)), "log_prob", 2e-5)
    best = ours.predict(to_jax(X))
    np.testing.assert_array_equal(best, theirs.predict(to_torch(X)).numpy())
    assert len(set(best.tolist())) > 2
    np.testing.assert_array_equal(ours.predict(to_jax(X[:0])), np.zeros(0))


def test_the_output_has_torchs_fields() -> None:
    theirs, ours = pair(Case(NAME, (16, 20, [4, 10])))
    target = np.arange(40) % 20
    out, wanted = ours(to_jax(X), to_jax(target)), theirs(to_torch(X), to_torch(target))
    assert out._fields == wanted._fields
    assert type(out).__name__ == type(wanted).__name__.strip("_")
    close(out.output, wanted.output, "output", 1e-5)
    close(out.loss, wanted.loss, "loss", 1e-5)


def test_a_wrong_target_in_compiled_code_gives_nan() -> None:
    layer = nn.AdaptiveLogSoftmaxWithLoss(16, 20, [4, 10])
    out = nn.jit(layer)(to_jax(X[:3]), jnp.array([0, 20, -1]))
    assert np.isnan(out.output).tolist() == [False, True, True]
    assert np.isnan(out.loss)


def test_other_targets_do_not_compile_again() -> None:
    layer = nn.AdaptiveLogSoftmaxWithLoss(16, 20, [4, 10])
    traces = []

    @jax.jit
    def run(layer, x, y):
        traces.append(1)
        return layer(x, y).loss

    for low in (0, 5, 15):
        run(layer, to_jax(X[:4]), jnp.arange(low, low + 4))
    assert len(traces) == 1
