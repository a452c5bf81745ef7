"""The diffusion model draws digits, and the averaged weights are the average."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optax
import pytest

import diffusion_digits as example
import statefulnn as nn


@pytest.mark.long
def test_it_draws_digits_that_are_read_as_what_was_asked_for(capsys):
    argv = ["--steps", "200", "--batch-size", "64", "--drawn", "200"]
    results = example.main([*argv, "--picture", "pictures/digits.png"])
    *_, new, _ = example.load_data()
    noise = np.random.default_rng(0).normal(size=new.shape)
    read, distance = results["averaged weights"]
    assert read > 0.5  # one in ten by chance
    assert distance < example.frechet(noise, new) / 10
    assert Path("pictures/digits.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "averaged weights" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_at_full_length_averaged_weights_draw_better_digits(seed):
    results = example.main(["--seed", str(seed)])
    assert results["averaged weights"][0] > 0.95
    assert results["averaged weights"][1] < results["last weights"][1]


def test_the_distance_is_that_of_normal_distributions():
    """Of x and s x + m: the squared length of the change of the mean, and (s - 1)^2 of each variance."""
    x = np.random.default_rng(0).normal(size=(500, 64))
    shift = 1.5 * x.mean(0) - x.mean(0) + 0.1
    expected = (shift**2).sum() + 0.25 * x.var(0, ddof=1).sum()
    assert example.frechet(x, 1.5 * x + 0.1) == pytest.approx(expected, rel=1e-6)
    assert example.frechet(x, x) == pytest.approx(0, abs=1e-6)


def test_the_average_follows_by_its_formula():
    nn.manual_seed(0)
    model = example.Denoiser(hidden=4, blocks=1)
    average = nn.AveragedModel(model, avg_fn=example.moving)
    opt = nn.Optimizer(model, optax.sgd(0.1))
    images, digits, *_ = example.load_data()
    expected: dict[str, np.ndarray] = {}
    for n in range(3):
        example.train_step(model, average, opt, images[:8], digits[:8])
        decay = min(example.DECAY, (1 + n) / (10 + n)) if n else 0.0  # the first is taken over
        for name, p in model.named_parameters():
            before = expected.get(name, 0.0)
            expected[name] = decay * before + (1 - decay) * np.asarray(p.value)
    for name, p in average.module.named_parameters():
        np.testing.assert_allclose(p.value, expected[name], rtol=1e-5, atol=1e-7)


def test_sampling_with_the_true_noise_of_one_image_leads_to_it():
    """For data at one point the noise is known: what is left of an image without the data's share."""
    image = np.linspace(-0.9, 0.9, 64, dtype=np.float32)

    class Known(nn.Module):
        def forward(self, images, times, digits):
            signal, share = (nn.Parameter(a).value for a in (example.SIGNAL, example.NOISE))
            return (images - signal[times, None] * image) / share[times, None]

    noise = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    drawn = example.sample(Known(), noise, np.arange(3))
    np.testing.assert_allclose(drawn, [image] * 3, atol=1e-4)
