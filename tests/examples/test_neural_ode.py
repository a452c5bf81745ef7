"""The neural ODE fits the spiral; the adjoint's gradient is right, and its memory constant."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import neural_ode as example
from tests.precision import in_float64

ways = pytest.mark.parametrize("way", list(example.SOLVERS))


def growth(table: dict, way: str, fewer: int, more: int) -> float:
    return table["bytes"][way, more] / table["bytes"][way, fewer]


def order(table: dict, fewer: int, more: int) -> float:
    ratio = table["difference"]["adjoint", fewer] / table["difference"]["adjoint", more]
    return np.log(ratio) / np.log(more / fewer)


def check_gradients(numbers: dict, fewer: int, more: int) -> None:
    """Four times the steps: what each way keeps, and how near it is to the exact gradient."""
    assert more == 4 * fewer
    assert 3.5 < growth(numbers, "direct", fewer, more) < 4.5
    assert 1.2 < growth(numbers, "checkpointed", fewer, more) < 2.2
    assert growth(numbers, "adjoint", fewer, more) == pytest.approx(1, abs=0.01)
    assert numbers["bytes"]["adjoint", more] < 0.3 * numbers["bytes"]["checkpointed", more]
    assert numbers["difference"]["checkpointed", more] < 1e-12
    assert order(numbers, fewer, more) == pytest.approx(4, abs=0.3)
    assert numbers["difference"]["adjoint", more] < 1e-5


@pytest.mark.long
def test_a_short_run_fits_the_spiral_and_saves_a_picture(capsys):
    numbers = example.main(
        ["--steps", "600", "--lengths", "64", "256", "--picture", "pictures/ode.png"]
    )
    assert numbers["field"] < 0.25
    check_gradients(numbers, 64, 256)
    assert Path("pictures/ode.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"{numbers['field']:.4f}" in capsys.readouterr().out


@pytest.mark.long
@ways
@pytest.mark.parametrize("seed", [0, 1])
def test_the_full_run_follows_the_whole_trajectory(way, seed):
    numbers = example.main(["--gradient", way, "--seed", str(seed)])
    assert numbers["trajectory"] < 0.2 and numbers["field"] < 0.12
    check_gradients(numbers, 64, 256)
    check_gradients(numbers, 256, 1024)


def exponential(params, x, t):
    return params["rate"] * t * x  # x(t1) = x(t0) exp(rate (t1^2 - t0^2) / 2)


@ways
@pytest.mark.parametrize("steps", [97, 144])  # a prime number of steps has no parts
def test_gradients_by_everything_are_those_of_the_closed_solution(way, steps):
    solve = partial(example.SOLVERS[way], exponential, steps)
    with in_float64():
        rate, x, t0, t1 = 0.7, np.array([1.0, -2.0]), 0.5, 1.5
        value = lambda *args: solve(*args).sum()
        got = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3)))({"rate": rate}, x, t0, t1)
        factor = np.exp(rate * (t1**2 - t0**2) / 2)
        end = (x * factor).sum()
        want = (
            end,
            (
                {"rate": end * (t1**2 - t0**2) / 2},
                np.array([factor, factor]),
                -end * rate * t0,
                end * rate * t1,
            ),
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-8), got, want)


def test_the_solver_is_of_order_4_also_where_the_field_changes_with_time():
    # dx/dt = t - x, x(0) = 0: x(t) = t - 1 + exp(-t).
    with in_float64():
        errors = []
        for steps in (8, 16, 32):
            solve = partial(example.direct, lambda params, x, t: t - x, steps, {})
            errors.append(abs(float(solve(np.zeros(()), 0.0, 2.0)) - (1 + np.exp(-2.0))))
    orders = -np.diff(np.log2(errors))
    np.testing.assert_allclose(orders, 4, atol=0.25)


def test_the_way_back_leads_to_the_start():
    field = lambda params, x, t: t - x
    with in_float64():
        there = example.direct(field, 100, {}, np.array([3.0]), 0.0, 2.0)
        back = example.direct(field, 100, {}, there, 2.0, 0.0)
        np.testing.assert_allclose(back, [3.0], rtol=1e-7)


def test_the_observations_are_on_the_spiral_that_scipy_finds():
    times, states = map(np.asarray, example.observations())
    assert times.shape == (301,) and states.shape == (301, 2)
    found = solve_ivp(
        lambda t, x: example.SPIRAL @ x**3,
        (0, times[-1]),
        example.START,
        t_eval=times.astype(np.float64),
        rtol=1e-9,
        atol=1e-9,
    )
    np.testing.assert_allclose(states, found.y.T, atol=2e-3)


def test_a_batch_of_starts_is_followed_as_each_alone():
    field, params = example.nn.functionalize(example.Field())
    solve = partial(example.direct, field, 5)
    starts = np.array([[1.0, 0.5], [-0.3, 2.0]], np.float32)
    times = np.array([0.0, 0.1, 0.4], np.float32)
    together = example.trajectory(solve, params, starts, times)
    assert together.shape == (3, 2, 2)
    for i, start in enumerate(starts):
        alone = example.trajectory(solve, params, start, times)
        np.testing.assert_allclose(together[:, i], alone, rtol=1e-5, atol=1e-6)
