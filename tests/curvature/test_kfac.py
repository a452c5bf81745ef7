"""The inverse by Kronecker factors beside dense matrices of torch and numpy; preconditioned solves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature
from statefulnn.core.conjugate_gradients import Solver, conjugate_gradients
from tests.curvature.test_laplace_structures import kronecker_blocks, networks
from tests.precision import in_float64


def in_order(model, blocks):
    return np.asarray(
        jax.scipy.linalg.block_diag(*(blocks[name] for name, _ in model.named_parameters()))
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_product_and_inverse_are_those_of_the_dense_blocks(kind):
    with in_float64():
        ours, theirs, x, y = networks(kind)
        want = in_order(ours, kronecker_blocks(theirs, x)) / len(x)
        data = [(x[:3], y[:3]), (x[3:], y[3:])]
        K = curvature.kfac(ours, F.cross_entropy, data)
        columns = np.random.default_rng(0).normal(size=(len(want), 2))
        np.testing.assert_allclose(K @ columns, want @ columns, rtol=1e-8, atol=1e-10)
        solution = np.linalg.solve(want + 0.1 * np.eye(len(want)), columns)
        inverse = K.damped(0.1).inverse()
        np.testing.assert_allclose(inverse @ columns, solution, rtol=1e-8, atol=1e-10)
        tree = jax.jit(lambda A, v: A @ v)(inverse, K.unflatten(columns[:, 0]))
        np.testing.assert_allclose(K.flatten(tree), solution[:, 0], rtol=1e-8, atol=1e-10)


def test_for_one_position_and_one_example_it_is_the_generalised_gauss_newton_matrix():
    with in_float64():
        model = nn.Linear(3, 2, bias=False, dtype=jnp.float64)
        x, y = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3))), jnp.zeros((1, 2))
        for reduction in ("mean", "sum"):
            loss = lambda out, y, how=reduction: F.mse_loss(out, y, reduction=how)
            K = curvature.kfac(model, loss, (x, y), reduction=reduction)
            # Of the square of W x: 2 x xᵀ for each output, and half of it for their mean.
            factor = 1.0 if reduction == "mean" else 2.0
            want = np.kron(np.eye(2), factor * np.outer(x[0], x[0]))
            np.testing.assert_allclose(K.to_dense(), want, rtol=1e-10, atol=1e-12)


def badly_scaled():
    """A layer of inputs of many sizes, and data."""
    nn.manual_seed(0)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(60, 10)) * 10.0 ** np.linspace(-1, 1, 10))
    return nn.Linear(10, 3, dtype=jnp.float64), x, jnp.asarray(rng.integers(0, 3, 60))


@pytest.mark.long
def test_a_preconditioner_takes_fewer_steps_to_the_same_solution():
    with in_float64():
        model, *data = badly_scaled()
        A = curvature.ggn(model, F.cross_entropy, tuple(data)).damped(1e-3)
        M = curvature.kfac(model, F.cross_entropy, tuple(data)).damped(1e-3).inverse()
        b = jnp.asarray(np.random.default_rng(1).normal(size=A.shape[0]))
        matrix, near = A.to_dense(), M.to_dense()
        words = Solver("cg", "more", "damping", 1.0)
        solve = lambda precondition: conjugate_gradients(
            lambda v: matrix @ v, b, words, tol=1e-8, steps=500, precondition=precondition
        )
        (plain, many), (quick, few) = solve(None), solve(lambda r: near @ r)
        assert 3 * int(few) < 2 * int(many), (few, many)
        want = np.linalg.solve(matrix, b)
        for found in (plain, quick):
            np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
        # So many steps are enough with it, and not without.
        inverse = A.inverse(tol=1e-8, max_steps=int(few), preconditioner=M)
        np.testing.assert_allclose(inverse @ b, want, rtol=1e-5, atol=1e-6)
        with pytest.raises(nn.ConvergenceError, match=f"after {int(few)} steps"):
            A.inverse(tol=1e-8, max_steps=int(few)) @ b
        by_b = jax.grad(lambda b: b @ (inverse @ b))(b)
        np.testing.assert_allclose(by_b, 2 * want, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    model, data = nn.Linear(3, 2), (jnp.ones((4, 3)), jnp.zeros((4, 2)))
    K = curvature.kfac(model, F.mse_loss, data)
    for way in (lambda: K.inverse(), nn.jit(lambda: K.inverse() @ jnp.ones(8))):
        with pytest.raises(nn.ConvergenceError, match=r"(?s)eigenvalue .*damping"):
            way()
    A = curvature.ggn(model, F.mse_loss, data).damped(1.0)
    with pytest.raises(nn.ConvergenceError, match=r"r·Mr not above 0"):
        A.inverse(preconditioner=-1.0 * A) @ jnp.ones(8)
    with pytest.raises(TypeError, match="not known to be symmetric"):
        A.inverse(preconditioner=curvature.jacobian(model, data[0]))
    with pytest.raises(nn.ShapeError, match="the preconditioner"):
        A.inverse(preconditioner=curvature.kfac(model, F.mse_loss, data, subset="weight"))
    with pytest.raises(TypeError, match="a function does not show"):
        curvature.kfac(nn.functionalize(model), F.mse_loss, data)
