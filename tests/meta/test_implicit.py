"""Implicit gradients: formulas, unrolled solvers and finite differences are the oracle."""

from __future__ import annotations

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.precision import in_float64
from tests.quick import diagonal, first, quickly

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((12, 3)), jnp.float32)
Y = jnp.asarray(RNG.standard_normal(12), jnp.float32)


def ridge(w, penalty, x, y):
    return 0.5 * ((x @ w - y) ** 2).sum() + 0.5 * (penalty * w**2).sum()


def exact(init, penalty, x, y):
    return jnp.linalg.solve(x.T @ x + jnp.diag(penalty), x.T @ y)


def descended(init, penalty, x, y):
    return nn.meta.adapt(None, init, ridge, (penalty, x, y), lr=0.03, steps=400).params


PENALTY = jnp.array([0.5, 1.0, 2.0])


def eager(f):
    return f


@pytest.mark.parametrize("solver, wrap", diagonal(2, [exact, descended], [eager, jax.jit]))
def test_the_gradient_of_ridge_regression_is_the_formula(solver, wrap):
    fit = nn.meta.implicit_gradient(solver, objective=ridge)
    value = lambda penalty, y: (fit(jnp.zeros(3), penalty, X, y) ** 3).sum()
    formula = lambda penalty, y: (exact(None, penalty, X, y) ** 3).sum()
    found = wrap(jax.grad(value, (0, 1)))(PENALTY, Y)
    for ours, expected in zip(found, jax.grad(formula, (0, 1))(PENALTY, Y), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=1e-4)


def test_forward_mode_and_second_derivatives():
    fit = nn.meta.implicit_gradient(exact, objective=ridge, solve=nn.meta.cg(tol=1e-6))
    value = lambda p: (fit(jnp.zeros(3), p, X, Y) ** 2).sum()
    formula = lambda p: (exact(None, p, X, Y) ** 2).sum()
    forward, second = quickly(lambda p: (jax.jacfwd(value)(p), jax.hessian(value)(p)))(PENALTY)
    slope, hessian = quickly(lambda p: (jax.grad(formula)(p), jax.hessian(formula)(p)))(PENALTY)
    np.testing.assert_allclose(forward, slope, rtol=1e-3)
    np.testing.assert_allclose(second, hessian, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    "solve",
    [
        None,
        nn.meta.cg(),
        nn.meta.gmres(),
        nn.meta.neumann(steps=500, lr=0.03, tol=1e-4),
        lambda matvec, b: jnp.linalg.solve(jax.vmap(matvec)(jnp.eye(3)).T, b),
    ],
    ids=["default", "cg", "gmres", "neumann", "custom"],
)
def test_every_linear_solver_agrees(solve):
    fit = nn.meta.implicit_gradient(exact, objective=ridge, solve=solve)
    found = jax.grad(lambda p: fit(jnp.zeros(3), p, X, Y).sum())(PENALTY)
    expected = jax.grad(lambda p: exact(None, p, X, Y).sum())(PENALTY)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_fixed_point_and_an_optimality_condition():
    # x = tanh(A x + b): not symmetric.
    a = 0.4 * jnp.asarray(RNG.standard_normal((4, 4)), jnp.float32)
    b = jnp.asarray(RNG.standard_normal(4), jnp.float32)
    step = lambda x, a, b: jnp.tanh(a @ x + b)

    def iterate(x, a, b):
        return jax.lax.fori_loop(0, 200, lambda _, x: step(x, a, b), x)

    def unrolled(x, a, b):
        return jax.lax.scan(lambda x, _: (step(x, a, b), None), x, length=60)[0]

    expected = quickly(jax.grad(lambda b: (unrolled(jnp.zeros(4), a, b) ** 2).sum()))(b)
    for conditions in (
        {"fixed_point": step},
        {"fixed_point": step, "solve": nn.meta.neumann(steps=100)},
        {"optimality": lambda x, a, b: step(x, a, b) - x},
    ):
        fit = nn.meta.implicit_gradient(iterate, **conditions)
        found = quickly(jax.grad(lambda b, fit=fit: (fit(jnp.zeros(4), a, b) ** 2).sum()))(b)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_pytrees_and_tasks_in_parallel():
    objective = lambda p, y: ((p["a"] - y) ** 2).sum() + ((p["b"] - 2 * y) ** 2).sum()
    solver = lambda init, y: {"a": y, "b": 2 * y}
    fit = nn.meta.implicit_gradient(solver, objective=objective)
    init = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    value = lambda y: (fit(init, y)["a"] + 3 * fit(init, y)["b"]).sum()
    grads = jax.jit(jax.vmap(jax.grad(value)))(jnp.ones((5, 2)))
    np.testing.assert_allclose(grads, 7.0, rtol=1e-5)


def test_the_start_gets_no_gradient():
    fit = nn.meta.implicit_gradient(descended, objective=ridge)
    grads = jax.grad(lambda init: fit(init, PENALTY, X, Y).sum())(jnp.ones(3))
    np.testing.assert_array_equal(grads, 0.0)


def test_implicit_maml_agrees_with_the_unrolled_solver():
    fn, params = nn.functionalize(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)))
    x, y = jnp.linspace(-1, 1, 8)[:, None], jnp.linspace(0, 1, 8)[:, None] ** 2

    def near(p, start, x, y):
        return ((fn(p, x) - y) ** 2).mean() + sum(((p[n] - start[n]) ** 2).sum() for n in p)

    def solver(init, start, x, y):
        return nn.meta.adapt(None, init, near, (start, x, y), lr=0.2, steps=150).params

    fit = nn.meta.implicit_gradient(solver, objective=near, tolerance=1e-4)
    query = lambda p: ((fn(p, x) + y) ** 2).mean()
    found = quickly(jax.grad(lambda p: query(fit(p, p, x, y))))(params)
    unrolled = quickly(jax.grad(lambda p: query(solver(p, p, x, y))))(params)
    for name in params:
        np.testing.assert_allclose(found[name], unrolled[name], rtol=2e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Bad input


def test_exactly_one_condition():
    for conditions in ({}, {"objective": ridge, "fixed_point": ridge}):
        with pytest.raises(TypeError, match="one condition"):
            nn.meta.implicit_gradient(exact, **conditions)
    with pytest.raises(TypeError, match="linear solver is a function"):
        nn.meta.implicit_gradient(exact, objective=ridge, solve="cg")
    with pytest.raises(ValueError, match="steps must be"):
        nn.meta.cg(steps=0)


def badly_conditioned(solve):
    scales = 10.0 ** jnp.arange(-3.0, 4.0)
    objective = lambda w, b: 0.5 * (scales * w**2).sum() - b @ w
    fit = nn.meta.implicit_gradient(lambda init, b: b / scales, objective=objective, solve=solve)
    return jax.grad(lambda b: (fit(jnp.zeros(7), b) * jnp.arange(1.0, 8.0)).sum()), jnp.ones(7)


WAYS = {
    "eager": lambda f: f,
    "nn.jit": nn.jit,
    "nn.jit around jax.jit": lambda f: nn.jit(jax.jit(f)),
    "compiled ahead": lambda f: lambda b: nn.jit(f).lower(b).compile()(b),
    "jax.vmap": lambda f: lambda b: jax.vmap(f)(b[None]),
    "nn.jit around jax.vmap": lambda f: lambda b: nn.jit(jax.vmap(f))(b[None]),
    "jax.jacfwd": lambda f: jax.jacfwd(f),
    "nn.grad around lax.map": lambda f: nn.grad(lambda b: jax.lax.map(f, b[None]).sum()),
    "nn.meta.loop": lambda f: lambda b: nn.meta.loop(lambda c, _: (c, f(c)), b, length=2),
}


# Under vmap it is found with the names of the tasks, below.
MAPPED = ["jax.vmap", "nn.jit around jax.vmap"]


@pytest.mark.parametrize(
    "way", first(len(WAYS) - 2, [*(w for w in WAYS if w not in MAPPED), *MAPPED])
)
def test_a_linear_solver_that_does_not_converge_is_an_error_of_ours(way):
    gradient, b = badly_conditioned(nn.meta.cg(steps=3))
    message = r"(?s)cg\(steps=3, tol=1e-05\) did not converge.*Why.*tol=None"
    with pytest.raises(nn.ConvergenceError, match=message):
        jax.block_until_ready(WAYS[way](gradient)(b))
        jax.effects_barrier()


def test_a_raw_jit_has_one_class_for_what_goes_wrong_and_our_text():
    gradient, b = badly_conditioned(nn.meta.cg(steps=3))
    with pytest.raises(RuntimeError, match=r"(?s)ConvergenceError.*did not converge.*tol=None"):
        jax.block_until_ready(jax.jit(gradient)(b))
        jax.effects_barrier()


@pytest.mark.parametrize("wrap", [lambda f: f, nn.jit], ids=["eager", "nn.jit"])
def test_the_tasks_whose_solver_did_not_converge_are_named(wrap):
    def gradient(scales):
        objective = lambda w, b: 0.5 * (scales * w**2).sum() - b @ w
        solve = lambda init, b: b / scales
        fit = nn.meta.implicit_gradient(solve, objective=objective, solve=nn.meta.cg(steps=3))
        return jax.grad(lambda b: (fit(jnp.zeros(7), b) * jnp.arange(1.0, 8.0)).sum())(jnp.ones(7))

    good, bad = jnp.ones(7), 10.0 ** jnp.arange(-3.0, 4.0)
    with pytest.raises(nn.ConvergenceError, match="in tasks 1, 3 of 4: residual"):
        wrap(jax.vmap(gradient))(jnp.stack([good, bad, good, bad]))


def test_what_a_failed_program_would_have_written_is_not():
    gradient, b = badly_conditioned(nn.meta.cg(steps=3))
    model = nn.BatchNorm1d(2)

    @nn.jit
    def step(model, b):
        model(jnp.ones((3, 2)))
        return gradient(b)

    with pytest.raises(nn.ConvergenceError):
        step(model, b)
    assert int(model.num_batches_tracked) == 0


@pytest.mark.parametrize("checked", [True, False])
def test_only_results_of_programs_with_checks_are_waited_for(checked, monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda v: waited.append(v) or v)
    gradient, _ = badly_conditioned(nn.meta.cg(steps=50, tol=1e-2) if checked else None)
    step = nn.jit(gradient if checked else lambda b: b * 2)
    for _ in range(3):
        step(jnp.zeros(7))
    assert len(waited) == 3 * checked


def with_hessian(h, solve):
    """The gradient of a solution with a given Hessian: ``solve(h, ones)``."""
    objective = lambda w, b: 0.5 * w @ h @ w - b @ w
    fit = nn.meta.implicit_gradient(
        lambda init, b: jnp.linalg.solve(h, b), objective=objective, solve=solve
    )
    return jax.grad(lambda b: fit(jnp.zeros(len(b)), b).sum())


@pytest.mark.parametrize("wrap, tol", diagonal(2, [eager, nn.jit], [1e-5, None]))
def test_a_matrix_that_is_not_positive_definite_is_an_error_with_or_without_a_tolerance(wrap, tol):
    h = jnp.diag(jnp.array([-1.0, 2.0, 3.0]))
    message = r"(?s)p·Ap <= 0 in step \d.*not positive definite.*damping.*penalty.*more inner steps"
    with pytest.raises(nn.ConvergenceError, match=message):
        wrap(with_hessian(h, nn.meta.cg(2, tol=tol)))(jnp.ones(3))
    damped = with_hessian(h, nn.meta.cg(3, tol=tol, damping=2.0))(jnp.ones(3))
    np.testing.assert_allclose(damped, 1 / np.array([1.0, 4.0, 5.0]), rtol=1e-4)
    saddle = with_hessian(h, nn.meta.gmres(tol=tol))(jnp.ones(3))
    np.testing.assert_allclose(saddle, 1 / np.array([-1.0, 2.0, 3.0]), rtol=1e-4)


@pytest.mark.parametrize("already", first(1, [0.5, 0.0]))
def test_the_damping_that_the_message_names_is_enough(already):
    h = jnp.diag(jnp.array([-31.7, -1.3, 2.0, 80.0]))
    damping = already
    for _ in range(6):  # one direction tells a bound of the lowest eigenvalue only
        try:
            with_hessian(h, nn.meta.cg(damping=damping))(jnp.ones(4))
            break
        except nn.ConvergenceError as error:
            suggested = float(re.search(r"cg\(damping=([0-9.e+]+)\) or more", str(error))[1])
            assert suggested > damping
            damping = suggested
    assert 31.7 < damping <= 100


def test_damping_may_be_traced_and_has_a_derivative():
    h = jnp.diag(jnp.array([1.0, 2.0]))
    solved = lambda damping: nn.meta.cg(damping=damping)(lambda v: h @ v, jnp.ones(2)).sum()
    slope = jax.jit(jax.grad(solved))(1.0)
    np.testing.assert_allclose(slope, -(1 / 2**2 + 1 / 3**2), rtol=1e-5)


def test_steps_beyond_the_solution_are_no_sign_of_an_indefinite_matrix():
    # A direction of pure rounding has a curvature of any sign; singular systems may be solvable, too.
    flat = jnp.diag(jnp.array([0.0, 1.0, 4.0]))
    solve = nn.meta.cg(500, tol=None)
    b = jnp.array([0.0, 1.0, 1.0])
    np.testing.assert_allclose(solve(lambda v: flat @ v, b), [0.0, 1.0, 0.25], rtol=1e-5)
    a = RNG.standard_normal((40, 30))
    h = jnp.asarray(a.T @ a / 40 + np.eye(30), jnp.float32)
    b = jnp.asarray(RNG.standard_normal(30), jnp.float32)
    np.testing.assert_allclose(solve(lambda v: h @ v, b), np.linalg.solve(h, b), rtol=1e-3)


@pytest.mark.parametrize(
    "solve, tol", diagonal(2, [nn.meta.cg, nn.meta.gmres, nn.meta.neumann], [1e-5, None])
)
def test_numbers_that_are_not_finite_are_an_error(solve, tol):
    for matvec, b in (
        (lambda v: v * 2, jnp.array([1.0, jnp.nan])),
        (lambda v: v * jnp.nan, jnp.ones(2)),
    ):
        with pytest.raises(nn.ConvergenceError, match="not finite"):
            solve(tol=tol)(matvec, b)


SOLVERS = {
    "cg": nn.meta.cg(),
    "gmres": nn.meta.gmres(),
    "neumann": nn.meta.neumann(100, lr=0.3, tol=1e-4),
}


@pytest.mark.parametrize("name, wrap", diagonal(2, list(SOLVERS), [eager, jax.jit]))
def test_a_solution_scales_with_its_right_hand_side(name, wrap):
    solve = SOLVERS[name]
    d = np.array([1.0, 2.0, 3.0], np.float32)
    run = wrap(lambda b: solve(lambda v: d * v, b))
    for scale in np.float32([1e-36, 1e-21, 1.0, 1e20, 1e36]):
        np.testing.assert_allclose(run(scale * d) / scale, np.ones(3), rtol=1e-4)
    np.testing.assert_array_equal(run(0 * d), 0 * d)
    lanes = np.float32([1e-25, 0.0, 1e25])[:, None]
    np.testing.assert_allclose(jax.vmap(run)(lanes * d), lanes * np.ones(3), rtol=1e-4)
    # One scale for all arrays; and the derivative is that of a linear map.
    both = {"a": np.float32([1e-21, 3e-25]), "b": np.float32([1e-30])}
    halved = wrap(lambda b: solve(lambda v: jax.tree.map(lambda v: 2 * v, v), b))
    for name, x in halved(both).items():
        np.testing.assert_allclose(x, both[name] / 2, rtol=1e-3)
    np.testing.assert_allclose(jax.jacfwd(run)(1e-21 * d), np.diag(1 / d), rtol=1e-4)


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_a_system_without_equations_has_an_empty_solution(solve):
    assert solve(lambda v: 2 * v, jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("solver", [nn.meta.cg, nn.meta.gmres, nn.meta.neumann])
def test_a_solver_takes_steps_and_a_tolerance_that_is_a_number(solver):
    for steps in (0, -3):
        with pytest.raises(ValueError, match="steps must be a positive integer"):
            solver(steps=steps)
    with pytest.raises(TypeError, match="(?s)traced tol.*Why.*tol=None"):
        jax.jit(lambda tol: solver(tol=tol)(lambda v: 2 * v, jnp.ones(2)))(1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_conjugate_gradients_are_scipy_s(steps):
    from scipy.sparse.linalg import cg

    a = RNG.standard_normal((12, 8))
    h, b = a.T @ a + np.eye(8), RNG.standard_normal(8)
    with in_float64():
        ours = nn.meta.cg(steps, tol=None)(lambda v: jnp.asarray(h) @ v, jnp.asarray(b))
    np.testing.assert_allclose(ours, cg(h, b, rtol=0.0, maxiter=steps)[0], rtol=1e-8)


def test_without_a_tolerance_the_steps_are_taken_as_they_are():
    gradient, b = badly_conditioned(nn.meta.cg(steps=3, tol=None))
    assert jnp.isfinite(gradient(b)).all()
    jax.effects_barrier()


def test_a_solver_that_is_not_at_the_solution_is_an_error():
    fit = nn.meta.implicit_gradient(lambda init, *args: init, objective=ridge, tolerance=1e-3)
    message = r"condition has norm .* above\s+tolerance=0.001"
    for wrap in (lambda f: f, nn.jit, lambda f: jax.grad(lambda w, *args: f(w, *args).sum())):
        with pytest.raises(nn.ConvergenceError, match=message):
            wrap(fit)(jnp.ones(3), PENALTY, X, Y)


def test_a_value_from_a_closure_is_differentiated_as_an_argument_is():
    def value(penalty):
        fit = nn.meta.implicit_gradient(
            lambda init: exact(None, penalty, X, Y),
            objective=lambda w: ridge(w, penalty, X, Y),
        )
        return (fit(jnp.zeros(3)) ** 3).sum()

    formula = lambda penalty: (exact(None, penalty, X, Y) ** 3).sum()
    slope, expected = jax.grad(value), jax.grad(formula)(PENALTY)
    np.testing.assert_allclose(slope(PENALTY), expected, rtol=2e-3, atol=1e-4)
    every = lambda p: (slope(p), jax.jacfwd(value)(p), *jax.vmap(slope)(jnp.stack([p, p])))
    for ours in nn.jit(every)(PENALTY):
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=1e-4)


def until_small(x, scale):
    """Halve in a loop of Python, which looks at values."""
    while float(jnp.abs(x - scale)) > 1e-6:
        x = (x + scale) / 2
    return x


def test_a_solver_that_looks_at_values_runs_in_eager_code():
    fit = nn.meta.implicit_gradient(until_small, fixed_point=lambda x, scale: (x + scale) / 2)
    np.testing.assert_allclose(fit(jnp.zeros(()), jnp.asarray(3.0)), 3.0, rtol=1e-6)
    found = jax.grad(lambda scale: fit(jnp.zeros(()), scale) ** 2)(jnp.asarray(3.0))
    np.testing.assert_allclose(found, 6.0, rtol=1e-5)


def test_one_that_looks_at_values_from_its_closure_is_refused():
    def outer(scale):
        fit = nn.meta.implicit_gradient(
            lambda x: until_small(x, scale), fixed_point=lambda x: (x + scale) / 2
        )
        return fit(jnp.zeros(()))

    with pytest.raises(nn.TraceLeakError, match=r"(?s)from a closure.*fit\(init, value\)"):
        jax.grad(outer)(jnp.asarray(3.0))


def test_an_error_that_is_raised_is_not_logged_as_well(caplog):
    with pytest.raises(nn.ConvergenceError):
        jax.jvp(lambda c: nn.meta.cg()(lambda v: -c * v, jnp.ones(2)), (1.0,), (1.0,))
    assert not caplog.records

    def fail(_):
        raise ZeroDivisionError

    with contextlib.suppress(RuntimeError, ZeroDivisionError):
        jax.jvp(lambda x: (jax.debug.callback(fail, x), x)[1], (1.0,), (1.0,))
        jax.effects_barrier()
    assert [r.exc_info[0] for r in caplog.records] == [ZeroDivisionError]
