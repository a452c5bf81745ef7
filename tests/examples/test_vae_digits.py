"""The variational autoencoder knows more of new digits than the means of their pixels."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
import vae_digits as example


def test_its_bound_beats_independent_pixels(capsys):
    nats = example.main(["--epochs", "20", "--picture", "pictures/vae.png"])
    assert nats["VAE"] < nats["independent pixels"] - 1
    assert Path("pictures/vae.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"{nats['VAE']:.2f} nats" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_that_does_not_hang_on_the_seed(seed):
    nats = example.main(["--seed", str(seed)])
    assert nats["VAE"] < nats["independent pixels"] - 2


def test_the_bound_lies_below_the_likelihood_of_a_decoder_that_ignores_the_code():
    """Its likelihood is a product over pixels; the bound misses it by the divergence, in closed form."""
    model = example.VAE()
    last = model.decoder[-1]
    for p in (*model.encoder.parameters(), *model.decoder.parameters()):
        p.value = jnp.zeros(p.shape)
    last.bias.value = jnp.linspace(-1, 1, 64)
    mean, logvar = np.array([0.5, -1.0]), np.array([0.2, -0.7])
    model.encoder[-1].bias.value = jnp.asarray(np.concatenate([mean, logvar]), jnp.float32)
    images = np.random.default_rng(0).random((5, 64)).astype(np.float32)
    p = 1 / (1 + np.exp(-np.linspace(-1, 1, 64)))
    ink = -(images * np.log(p) + (1 - images) * np.log(1 - p)).sum(1).mean()
    divergence = 0.5 * (np.exp(logvar) + mean**2 - 1 - logvar).sum()
    assert float(example.negative_bound(model, images)) == pytest.approx(ink + divergence, rel=1e-5)


def test_each_step_draws_other_noise():
    model, images = example.VAE(), np.zeros((2, 64), np.float32)
    step = nn.jit(model)
    first, second = step(images)[0], step(images)[0]
    assert isinstance(first, jax.Array) and not (first == second).any()
