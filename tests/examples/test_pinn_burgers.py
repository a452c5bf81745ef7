"""The network solves Burgers' equation, whose residual and solution are those of formulas."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pinn_burgers as example
import statefulnn as nn


@pytest.mark.long
def test_it_solves_the_equation_better_than_the_wave_that_stands_still(capsys):
    error = example.main(["--steps", "1000", "--points", "300", "--picture", "pictures/pinn.png"])
    x = np.linspace(-1, 1, 201)
    truth = np.stack([example.exact(np.full_like(x, t), x) for t in (0.25, 0.5, 0.75, 1.0)])
    standing = np.linalg.norm(-np.sin(np.pi * x) - truth) / np.linalg.norm(truth)
    assert error < standing / 2
    assert Path("pictures/pinn.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"{error:.4f}" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_at_full_length_it_is_right_to_a_few_per_cent(seed):
    assert example.main(["--seed", str(seed)]) < 0.05


def test_the_exact_solution_solves_the_equation_by_finite_differences():
    x, h = np.linspace(-0.9, 0.9, 19), 1e-3
    u = lambda t, x: example.exact(np.full_like(x, t), x)
    u_t = (u(0.3 + h, x) - u(0.3 - h, x)) / (2 * h)
    u_x = (u(0.3, x + h) - u(0.3, x - h)) / (2 * h)
    u_xx = (u(0.3, x + h) - 2 * u(0.3, x) + u(0.3, x - h)) / h**2
    np.testing.assert_allclose(u_t + u(0.3, x) * u_x, example.NU * u_xx, atol=1e-3)
    np.testing.assert_allclose(u(1e-6, x), -np.sin(np.pi * x), atol=1e-4)


def test_the_residual_is_that_of_the_derivatives_by_hand():
    class Wave(nn.Module):
        def forward(self, t, x):
            return jnp.exp(-t) * x**3

    t, x = np.float32(0.3), np.float32(0.7)
    decay = np.exp(-0.3)
    by_hand = -decay * 0.7**3 + decay**2 * 3 * 0.7**5 - example.NU * decay * 6 * 0.7
    assert float(example.residual(Wave(), t, x)) == pytest.approx(by_hand, rel=1e-5)


def test_initial_and_boundary_values_are_built_in():
    model = example.Solution()
    x = jnp.linspace(-1, 1, 9)
    at_start = jax.vmap(lambda x: model(0.0, x))(x)
    np.testing.assert_allclose(at_start, -np.sin(np.pi * np.linspace(-1, 1, 9)), atol=1e-6)
    assert [abs(float(model(0.5, edge))) < 1e-6 for edge in (-1.0, 1.0)] == [True, True]
