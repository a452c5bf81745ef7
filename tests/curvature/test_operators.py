"""Curvature matrices as linear operators against dense ones of jax.hessian, torch and formulas."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.flatten_util import ravel_pytree

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature
from statefulnn.core.errors import DtypeError, MissingRngError, ShapeError, UnknownNameError
from statefulnn.curvature import LinearOperator
from tests.devices import run_on_devices
from tests.precision import in_float64
from tests.quick import diagonal, first, quickly

MATRICES = ["hessian", "ggn", "empirical_fisher"]


def net(library=nn, **options):
    return library.Sequential(
        library.Linear(3, 5, **options), library.Tanh(), library.Linear(5, 4, **options)
    )


@functools.cache
def problem(n=7):
    """A model in double precision, its arrays by name in its own order, and data of n examples."""
    with in_float64():
        nn.manual_seed(0)
        model = net(dtype=jnp.float64)
        rng = np.random.default_rng(0)
        x, y = jnp.asarray(rng.normal(size=(n, 3))), jnp.asarray(rng.integers(0, 4, n))
        return model, {name: p.value for name, p in model.named_parameters()}, x, y


def flat_function(model):
    """The model as a function of one flat vector, in the order of named_parameters; and that vector."""
    fn, params = nn.functionalize(model)
    names = [name for name, _ in model.named_parameters()]
    flat, unravel = ravel_pytree([params[n] for n in names])
    return lambda flat, *x: fn(dict(zip(names, unravel(flat), strict=True)), *x), flat


def cross_entropy(out, y):
    """The mean cross-entropy, by its formula."""
    picked = jnp.take_along_axis(out, y[:, None], 1)[:, 0]
    return jnp.mean(jnp.log(jnp.sum(jnp.exp(out), 1)) - picked)


def dense(name, model, x, y):
    """The matrices by whole Jacobians and Hessians."""
    f, flat = flat_function(model)
    if name == "hessian":
        return quickly(jax.hessian(lambda p: cross_entropy(f(p, x), y)))(flat)
    if name == "empirical_fisher":
        losses = lambda p: jax.vmap(lambda o, y: cross_entropy(o[None], y[None]))(f(p, x), y)
        rows = quickly(jax.jacrev(losses))(flat)
        return rows.T @ rows / len(x)
    j = quickly(jax.jacrev(lambda p: f(p, x)))(flat)
    p = jax.nn.softmax(f(flat, x))
    h = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    return jnp.einsum("nap,nab,nbq->pq", j, h, j) / len(x)


@pytest.mark.parametrize("name, batch_size", diagonal(3, MATRICES, [None, 7, 3]))
def test_matrix_is_that_of_whole_derivatives(name, batch_size):
    with in_float64():
        model, params, x, y = problem()
        want = dense(name, model, x, y)
        make = getattr(curvature, name)
        A = make(model, F.cross_entropy, (x, y), batch_size=batch_size)
        assert A.symmetric and A.T is A and A.shape == want.shape == (44, 44)
        np.testing.assert_allclose(A.to_dense(), want, rtol=1e-9, atol=1e-12)
        v = np.random.default_rng(1).normal(size=44)
        np.testing.assert_allclose(A @ v, want @ v, rtol=1e-9, atol=1e-12)
        product = A @ params
        flat = np.concatenate([params[n].ravel() for n in params])
        got = np.concatenate([product[n].ravel() for n in params])
        np.testing.assert_allclose(got, want @ flat, rtol=1e-9, atol=1e-12)
        total = make(
            model, functools.partial(F.cross_entropy, reduction="sum"), (x, y), reduction="sum"
        )
        np.testing.assert_allclose(total.to_dense(), 7 * want, rtol=1e-9, atol=1e-12)


def torch_net(model):
    theirs = net(torch.nn, dtype=torch.float64)
    theirs.load_state_dict({n: torch.tensor(np.asarray(v)) for n, v in model.state_dict().items()})
    params = {n: p.detach() for n, p in theirs.named_parameters()}

    def call(flat, x):
        sizes = [p.numel() for p in params.values()]
        parts = [v.view_as(p) for v, p in zip(flat.split(sizes), params.values(), strict=True)]
        return torch.func.functional_call(theirs, dict(zip(params, parts, strict=True)), (x,))

    return call, torch.cat([p.flatten() for p in params.values()])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_hessian_fisher_and_jacobian_are_those_of_torch():
    with in_float64():
        model, _, x, y = problem()
        call, flat = torch_net(model)
        tx, ty = torch.tensor(np.asarray(x)), torch.tensor(np.asarray(y))
        loss = lambda p: torch.nn.functional.cross_entropy(call(p, tx), ty)
        want = torch.autograd.functional.hessian(loss, flat)
        got = curvature.hessian(model, F.cross_entropy, (x, y)).to_dense()
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
        one = lambda p, x, y: torch.nn.functional.cross_entropy(call(p, x[None]), y[None])
        rows = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(flat, tx, ty)
        got = curvature.empirical_fisher(model, F.cross_entropy, (x, y)).to_dense()
        np.testing.assert_allclose(got, rows.T @ rows / 7, rtol=1e-9, atol=1e-12)
        want = torch.func.jacrev(lambda p: call(p, tx))(flat).reshape(28, -1)
        J = curvature.jacobian(model, x)
        np.testing.assert_allclose(J.to_dense(), want, rtol=1e-9, atol=1e-12)


COVARIANCES = {
    "categorical": lambda o: (
        jnp.diag(jax.nn.softmax(o)) - jnp.outer(jax.nn.softmax(o), jax.nn.softmax(o))
    ),
    "bernoulli": lambda o: jnp.diag(1 / (1 + jnp.exp(-o)) / (1 + jnp.exp(o))),
    "gaussian": lambda o: jnp.eye(o.size),
    "poisson": lambda o: jnp.diag(jnp.exp(o)),
}


@pytest.mark.parametrize("likelihood", COVARIANCES)
def test_exact_fisher_is_the_covariance_of_the_targets_between_jacobians(likelihood):
    with in_float64():
        model, _, x, _ = problem()
        f, flat = flat_function(model)
        j, out = quickly(jax.jacrev(lambda p: f(p, x)))(flat), f(flat, x)
        h = jax.vmap(COVARIANCES[likelihood])(out)
        want = jnp.einsum("nap,nab,nbq->pq", j, h, j)
        A = curvature.fisher(model, x, likelihood=likelihood, batch_size=3, reduction="sum")
        np.testing.assert_allclose(A.to_dense(), want, rtol=1e-9, atol=1e-12)
        mean = curvature.fisher(model, x, likelihood=likelihood)
        np.testing.assert_allclose(7 * (mean @ flat), want @ flat, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("likelihood", COVARIANCES)
def test_sampled_fisher_is_that_of_its_draws_which_have_the_right_mean_and_covariance(likelihood):
    """With 20,000 draws for each output a mean is off by five standard errors once in 10⁶."""
    with in_float64():
        samples = 20000
        key = jax.random.key(0)
        fn = lambda p, x: x * p
        eta = jnp.array([[0.3, -0.7], [1.1, 0.2]])
        params = jnp.array([1.0, 1.0])
        A = curvature.fisher(
            (fn, params), eta, likelihood=likelihood, samples=samples, rng=key, batch_size=1
        )
        drawn = jnp.concatenate([t.reshape(-1, samples, 2) for _, t in A.operands[2]])  # (2, S, 2)
        mean = {
            "categorical": jax.nn.softmax(eta),
            "bernoulli": jax.nn.sigmoid(eta),
            "gaussian": eta,
            "poisson": jnp.exp(eta),
        }[likelihood]
        variance = jnp.stack([jnp.diag(COVARIANCES[likelihood](o)) for o in eta])
        assert (jnp.abs(drawn.mean(1) - mean) < 5 * jnp.sqrt(variance / samples)).all()
        g = (mean[:, None] - drawn) * eta[:, None]  # gradients by params
        want = jnp.einsum("nsp,nsq->pq", g, g) / (2 * samples)
        np.testing.assert_allclose(A.to_dense(), want, rtol=1e-9, atol=1e-12)
        again = curvature.fisher((fn, params), eta, likelihood=likelihood, samples=3, rng=key)
        same = curvature.fisher((fn, params), eta, likelihood=likelihood, samples=3, rng=key)
        jax.tree.map(np.testing.assert_array_equal, again.operands[2], same.operands[2])


def test_sampled_fisher_draws_from_the_generator_in_force():
    model, x = nn.Linear(3, 4), jnp.ones((2, 3))
    nn.manual_seed(3)
    first = curvature.fisher(model, x, samples=2).to_dense()
    second = curvature.fisher(model, x, samples=2).to_dense()
    nn.manual_seed(3)
    np.testing.assert_array_equal(curvature.fisher(model, x, samples=2).to_dense(), first)
    assert not np.array_equal(first, second)
    fn, params = nn.functionalize(model)
    with pytest.raises(MissingRngError):
        jax.jit(lambda p: curvature.fisher((fn, p), x, samples=2).to_dense())(params)


def test_jacobian_and_its_transpose_are_adjoint_and_the_kernel_is_their_product():
    with in_float64():
        model, params, x, _ = problem()
        J = curvature.jacobian(model, x, batch_size=3)
        f, flat = flat_function(model)
        want = quickly(jax.jacrev(lambda p: f(p, x)))(flat)  # (7, 4, P)
        np.testing.assert_allclose(J @ params, want @ flat, rtol=1e-9)
        cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(7, 4)))
        back = J.T @ cotangent
        got = np.concatenate([back[n].ravel() for n in params])
        np.testing.assert_allclose(got, jnp.einsum("nap,na->p", want, cotangent), rtol=1e-9)
        np.testing.assert_allclose(J.T.T @ flat, (want @ flat).ravel(), rtol=1e-9)
        kernel = curvature.tangent_kernel(model, x, batch_size=3)
        whole = curvature.empirical_ntk(model, x).transpose(0, 2, 1, 3).reshape(28, 28)
        np.testing.assert_allclose(kernel.to_dense(), whole, rtol=1e-9, atol=1e-12)
        assert kernel.symmetric and (J.T @ J).symmetric and not (J @ (2 * J.T)).symmetric
        np.testing.assert_allclose((J.T @ J).to_dense(), J.to_dense().T @ J.to_dense(), rtol=1e-9)


@pytest.mark.parametrize("name", first(1, ["ggn", "hessian", "empirical_fisher"]))
def test_batches_in_any_form_give_the_same_matrix(name):
    with in_float64():
        model, params, x, y = problem()
        make = functools.partial(getattr(curvature, name), model, F.cross_entropy)
        want = make((x, y)).to_dense()
        cuts = [(0, 2), (2, 4), (4, 5), (5, 7)]
        forms = {
            "a list": [(x[a:b], y[a:b]) for a, b in cuts],
            "an iterator of lists": ([x[a:b], y[a:b]] for a, b in cuts),
            "numpy": [(np.asarray(x), np.asarray(y))],
            "a tuple of inputs": [((x[a:b],), y[a:b]) for a, b in cuts],
        }
        for form, data in forms.items():
            A = make(data)
            np.testing.assert_allclose(A.to_dense(), want, rtol=1e-9, atol=1e-12, err_msg=form)
        rows = curvature.jacobian(model, [x[a:b] for a, b in cuts])
        np.testing.assert_allclose(rows.to_dense(), curvature.jacobian(model, x).to_dense())


def test_equal_batches_run_in_one_loop():
    model, x, y = net(), jnp.ones((12, 3)), jnp.zeros(12, int)
    pair = nn.functionalize(model)
    sizes = []
    for count in (2, 12):
        data = [(x[:1], y[:1])] * count
        A = curvature.ggn(pair, F.cross_entropy, data)
        sizes.append(str(jax.make_jaxpr(lambda A, v: A @ v)(A, jnp.ones(44))).count("\n"))
    assert sizes[0] == sizes[1]


def matrix_operator(matrix, symmetric=False):
    return LinearOperator.of(
        lambda m, v: m @ v, jnp.zeros(matrix.shape[1]), matrix, symmetric=symmetric
    )


def some_matrix(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def test_algebra_is_that_of_matrices():
    with in_float64():
        m, k, square = some_matrix(3, 5), some_matrix(3, 5, seed=1), some_matrix(5, 5)
        A, B, S = map(matrix_operator, (m, k, square))
        c = jnp.float32(0.5)
        for got, want in {
            A + B: m + k,
            A - B: m - k,
            -A: -m,
            2 * A: 2 * m,
            A * c: 0.5 * m,
            np.float64(3) * A: 3 * m,
            jnp.asarray(3) * A: 3 * m,
            A.T: m.T,
            (A + 2 * B).T: (m + 2 * k).T,
            A @ S: m @ square,
            (A @ S).T: (m @ square).T,
            S.damped(0.3): square + 0.3 * np.eye(5),
            A.T @ A: m.T @ m,
        }.items():
            assert got.shape == want.shape
            np.testing.assert_allclose(got.to_dense(), want, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(A @ square, m @ square, rtol=1e-12)
        np.testing.assert_allclose(A.matmat(square[:, :2]), m @ square[:, :2], rtol=1e-12)
        assert repr(A + B) == "<Sum 3 x 5>" and (A.T @ A).symmetric and not A.T.symmetric


def test_many_vectors_are_columns_or_trees_with_one_more_axis():
    with in_float64():
        model, params, x, y = problem()
        A = curvature.ggn(model, F.cross_entropy, (x, y))
        two = {n: jnp.stack([p, 2 * p]) for n, p in params.items()}
        got, want = A.matmat(two), A @ params
        for n in params:
            np.testing.assert_allclose(got[n], jnp.stack([want[n], 2 * want[n]]), rtol=1e-9)
        columns = jax.vmap(A.flatten, out_axes=1)(two)
        np.testing.assert_allclose(A @ columns, jax.vmap(A.flatten, out_axes=1)(got), rtol=1e-9)
        np.testing.assert_array_equal(A.unflatten(A.flatten(params))["2.bias"], params["2.bias"])
        assert list(A.flatten(params)[:2]) == list(params["0.weight"][0, :2])  # the model's order


def test_inverse_solves_and_is_differentiable():
    with in_float64():
        model, params, x, y = problem()
        A = curvature.ggn(model, F.cross_entropy, (x, y))
        matrix = A.to_dense() + 0.1 * np.eye(44)
        inverse = A.damped(0.1).inverse(tol=1e-12)
        columns = np.random.default_rng(0).normal(size=(44, 3))
        want = np.linalg.solve(matrix, columns)
        np.testing.assert_allclose(inverse @ columns[:, 0], want[:, 0], rtol=1e-7, atol=1e-9)
        both = quickly(lambda B, v: (B @ v, (B + B).to_dense()))
        got, twice = both(inverse, columns)
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(twice, 2 * np.linalg.inv(matrix), rtol=1e-6, atol=1e-8)
        tree = inverse @ A.unflatten(columns[:, 1])
        np.testing.assert_allclose(A.flatten(tree), want[:, 1], rtol=1e-7, atol=1e-9)
        b = columns[:, 0]
        value = lambda c, b: b @ (A.damped(c).inverse(tol=1e-12) @ b)
        by_damping, by_b = quickly(jax.grad(value, argnums=(0, 1)))(0.1, b)
        np.testing.assert_allclose(by_damping, -want[:, 0] @ want[:, 0], rtol=1e-7)  # -|A⁻¹ b|²
        np.testing.assert_allclose(by_b, 2 * want[:, 0], rtol=1e-7, atol=1e-9)
        np.testing.assert_array_equal(inverse @ np.zeros(44), np.zeros(44))


@pytest.mark.parametrize("many", [False, True])
def test_inverse_reports_a_matrix_that_is_not_positive_definite(many):
    A = matrix_operator(jnp.diag(jnp.array([2.0, -1.0, 3.0])), symmetric=True)
    b = jnp.ones((3, 2)) if many else jnp.ones(3)
    with pytest.raises(nn.ConvergenceError, match="p·Ap") as caught:
        A.inverse() @ b
    what, why, instead = str(caught.value).split("\n")
    assert "not positive definite" in what and "max_steps=1000" in what
    assert "indefinite" in why and "damped" in instead
    vectors = "vectors 0, 1 of 2" if many else "not positive"
    for inverse in (A.inverse(), A.inverse(tol=None)):
        with pytest.raises(nn.ConvergenceError, match=rf"(?s){vectors}"):
            nn.jit(lambda A, b: A @ b)(inverse, b)
    each = jax.vmap(lambda A, b: A.inverse() @ b, in_axes=(None, None), axis_size=2)
    with pytest.raises(RuntimeError, match=r"(?s)ConvergenceError.*p·Ap"):
        jax.block_until_ready(jax.jit(each)(A, b))
        jax.effects_barrier()
    for fine in (
        A.damped(1.5).inverse() @ b,
        jax.jit(lambda A, b: A.damped(1.5).inverse() @ b)(A, b),
    ):
        np.testing.assert_allclose(
            (fine.T / b.T)[..., :], np.broadcast_to([1 / 3.5, 2.0, 1 / 4.5], b.T.shape), rtol=1e-5
        )


def test_inverse_reports_what_it_did_not_reach():
    A = matrix_operator(jnp.diag(jnp.logspace(-3, 3, 20)), symmetric=True)
    message = r"(?s)max_steps=5\) did not converge: residual .* after 5 steps\n.*max_steps=50\)"
    solve = lambda A, b: A.inverse(max_steps=5) @ b
    for way in (solve, nn.jit(solve)):
        with pytest.raises(nn.ConvergenceError, match=message):
            way(A, jnp.ones(20))
    assert jnp.isfinite(A.inverse(tol=None, max_steps=5) @ jnp.ones(20)).all()
    nan = matrix_operator(jnp.full((2, 2), jnp.nan), symmetric=True)
    with pytest.raises(nn.ConvergenceError, match="not finite"):
        nan.inverse() @ jnp.ones(2)


def test_a_solve_that_fails_on_the_way_back_or_within_another_estimate_is_the_same_error():
    A = matrix_operator(jnp.diag(jnp.logspace(-3, 3, 20)), symmetric=True)
    first = jnp.zeros(20).at[0].set(1.0)  # of which one step is the solution
    value = lambda b: (A.inverse(max_steps=5) @ b).sum()
    for way in (nn.grad(value), nn.jit(jax.grad(value))):
        with pytest.raises(nn.ConvergenceError, match="did not converge"):
            way(first)
    with pytest.raises(nn.ConvergenceError, match="did not converge"):
        curvature.trace(A.inverse(max_steps=5), samples=4, rng=0)


def test_what_has_no_inverse_by_conjugate_gradients_is_refused():
    A = matrix_operator(some_matrix(3, 5))
    with pytest.raises(TypeError, match=r"\(3, 5\) that is not known to be symmetric"):
        A.inverse()
    with pytest.raises(ValueError, match="max_steps=0"):
        (A.T @ A).inverse(max_steps=0)


def test_compiled_functions_take_and_return_operators():
    model, x, y = net(), jnp.ones((6, 3)), jnp.arange(6) % 4
    A = curvature.hessian(model, F.cross_entropy, (x, y)).damped(0.1)
    v = jnp.ones(44)

    @jax.jit
    def product(A, v):
        return A @ v, 2 * A

    out, double = product(A, v)
    np.testing.assert_allclose(out, A @ v, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(double @ v, 2 * out, rtol=1e-5, atol=1e-6)
    inside = nn.jit(lambda m, x, y, v: curvature.hessian(m, F.cross_entropy, (x, y)) @ v)
    np.testing.assert_allclose(inside(model, x, y, v) + 0.1 * v, out, rtol=1e-5, atol=1e-6)


def test_operators_of_other_parameters_share_compiled_code():
    traces = []
    fn, params = nn.functionalize(net())

    def counted(params, x):
        traces.append(1)
        return fn(params, x)

    x, y = jnp.ones((6, 3)), jnp.zeros(6, int)
    counts = []
    for scale in (1.0, 2.0, 3.0):
        moved = jax.tree.map(lambda p, s=scale: s * p, params)
        A = curvature.ggn((counted, moved), F.cross_entropy, (x, y))
        before = len(traces)
        for _ in range(3):
            A @ jnp.ones(44)
        counts.append(len(traces) - before)
    assert counts[0] > 0 and counts[1:] == [0, 0]


def test_vmap_over_parameters_and_vectors_is_a_loop_over_them():
    with in_float64():
        model, params, x, y = problem()
        fn, _ = nn.functionalize(model)
        stack = {n: jnp.stack([p, 1.5 * p]) for n, p in params.items()}
        v = some_matrix(2, 44)

        def product(params, v):
            return curvature.hessian((fn, params), F.cross_entropy, (x, y), batch_size=3) @ v

        got = jax.vmap(product)(stack, v)
        for i in range(2):
            one = product({n: p[i] for n, p in stack.items()}, v[i])
            np.testing.assert_allclose(got[i], one, rtol=1e-9, atol=1e-12)


class Tied(nn.Module):
    """A weight in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=jnp.float64)
        self.second = nn.Linear(4, 4, dtype=jnp.float64)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(jnp.tanh(self.first(x)))


def test_a_tied_parameter_is_one():
    with in_float64():
        model, x = Tied(), some_matrix(5, 4)
        A = curvature.hessian(model, F.mse_loss, (x, x))
        assert list(A.in_structure) == ["first.bias", "first.weight", "second.bias"]
        f, flat = flat_function(model)
        want = quickly(jax.hessian(lambda p: jnp.mean((f(p, x) - x) ** 2)))(flat)
        np.testing.assert_allclose(A.to_dense(), want, rtol=1e-9, atol=1e-12)


class LoRA(nn.Module):
    """A linear layer with a low-rank update."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(some_matrix(4, 3))
        self.lora_A, self.lora_B = nn.Parameter(some_matrix(2, 3)), nn.Parameter(some_matrix(4, 2))

    def forward(self, x):
        return jnp.tanh(x @ (self.weight + self.lora_B.value @ self.lora_A.value).T)


def test_a_subset_is_a_block_of_the_matrix():
    with in_float64():
        model, x = nn.Sequential(LoRA(), nn.Linear(4, 2, dtype=jnp.float64)), some_matrix(6, 3)
        y = some_matrix(6, 2)
        whole = curvature.ggn(model, F.mse_loss, (x, y)).to_dense()
        blocks = {
            "lora_*": slice(12, 26),
            "0.*": slice(0, 26),
            "last_layer": slice(26, 36),
            "1.bias": slice(34, 36),
        }
        for subset, block in blocks.items():
            A = curvature.ggn(model, F.mse_loss, (x, y), subset=subset)
            np.testing.assert_allclose(A.to_dense(), whole[block, block], rtol=1e-9, atol=1e-12)
        by_function = curvature.jacobian(model, x, subset=lambda name: "lora" in name)
        assert sorted(by_function.in_structure) == ["0.lora_A", "0.lora_B"]
        model[1].requires_grad_(False)
        assert curvature.ggn(model, F.mse_loss, (x, y)).shape == (26, 26)
        some = {"0.lora_A": model[0].lora_A.value}
        assert curvature.ggn((model, some), F.mse_loss, (x, y)).shape == (6, 6)
        with pytest.raises(UnknownNameError, match="lora_C"):
            curvature.ggn(model, F.mse_loss, (x, y), subset="lora_C")
        with pytest.raises(
            UnknownNameError, match="subset was given a filter that chooses nothing"
        ):
            curvature.ggn(model, F.mse_loss, (x, y), subset=lambda name: False)


def test_parameters_may_be_any_tree():
    with in_float64():
        fn = lambda p, x: jnp.tanh(x @ p["layer"]["w"]) * p["scale"][0]
        params = {"layer": {"w": some_matrix(3, 2)}, "scale": (jnp.asarray(2.0),)}
        x, y = some_matrix(5, 3), some_matrix(5, 2)
        A = curvature.hessian((fn, params), F.mse_loss, (x, y))
        flat, unravel = ravel_pytree(params)
        want = quickly(jax.hessian(lambda p: jnp.mean((fn(unravel(p), x) - y) ** 2)))(flat)
        np.testing.assert_allclose(A.to_dense(), want, rtol=1e-9, atol=1e-12)
        assert jax.tree.structure(A @ params) == jax.tree.structure(params)
        with pytest.raises(ShapeError, match=r"'layer.w' of shape \(2, 3\) for \(3, 2\)"):
            A @ {"layer": {"w": params["layer"]["w"].T}, "scale": params["scale"]}


# In float32 there are also the comparisons of tests/curvature/test_reductions.py.
@pytest.mark.parametrize("dtype", first(1, [jnp.bfloat16, jnp.float32]))
def test_single_and_half_precision_are_close_to_double(dtype):
    with in_float64():
        model, params, x, y = problem()
        want = curvature.ggn(model, F.cross_entropy, (x, y)).to_dense()
    low = net(dtype=dtype)
    low.load_state_dict({n: np.asarray(p, np.float32).astype(dtype) for n, p in params.items()})
    x, y = jnp.asarray(np.asarray(x), dtype), jnp.asarray(np.asarray(y), jnp.int32)
    A = curvature.ggn(low, F.cross_entropy, (x, y), batch_size=3)
    got = A.to_dense()
    assert got.dtype == A.dtype == jnp.float32
    tolerance = 1e-6 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max() * 5)
    assert (A @ {n: p.value for n, p in low.named_parameters()})["0.bias"].dtype == dtype


def test_sharded_batches_give_the_same_products():
    run_on_devices(
        4,
        """
import jax, jax.numpy as jnp, numpy as np, statefulnn as nn, statefulnn.functional as F
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from statefulnn import curvature
placed = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
x, y = jax.random.normal(jax.random.key(0), (16, 3)), jnp.arange(16) % 4
v = jnp.ones(44)
cut = lambda put: [(put(x[i : i + 8]), put(y[i : i + 8])) for i in (0, 8)]
put = lambda a: jax.device_put(a, placed)
for make in (curvature.hessian, curvature.ggn, curvature.empirical_fisher):
    want = make(model, F.cross_entropy, (x, y)) @ v
    for data in ((put(x), put(y)), cut(put)):
        A = make(model, F.cross_entropy, data)
        assert len(A.operands[2][0][1].sharding.device_set) == 4
        np.testing.assert_allclose(A @ v, want, rtol=1e-5, atol=1e-6)
""",
    )


def test_models_that_write_or_draw_are_refused():
    x = jnp.ones((4, 3))
    writing = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    drawing = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    for model, error in ((writing, nn.StateWriteError), (drawing, MissingRngError)):
        for make in (
            lambda m: curvature.hessian(m, F.mse_loss, (x, jnp.ones((4, 4)))),
            lambda m: curvature.fisher(m, x),
            lambda m: curvature.jacobian(m, x),
        ):
            with pytest.raises(error):
                make(model)
            assert make(model.eval()).shape[1] >= 16
            model.train()


def test_a_loss_may_be_a_module_with_weights():
    with in_float64():
        model, _, x, y = problem()
        weight = jnp.array([1.0, 2.0, 0.5, 3.0])
        got = curvature.hessian(model, nn.CrossEntropyLoss(weight=weight), (x, y)).to_dense()
        f, flat = flat_function(model)
        picked = lambda p: jnp.take_along_axis(jax.nn.log_softmax(f(p, x)), y[:, None], 1)[:, 0]
        w = weight[y]
        want = quickly(jax.hessian(lambda p: -jnp.sum(w * picked(p)) / w.sum()))(flat)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


X, Y = jnp.ones((4, 3)), jnp.zeros(4, int)
BAD_VECTORS = {
    "a missing name": (lambda v: v.pop("0.bias"), r"without \['0.bias'\]"),
    "an unknown name": (lambda v: v.update(other=jnp.ones(1)), r"with \['other'\]"),
    "another shape": (
        lambda v: v.update({"2.bias": jnp.ones(5)}),
        r"'2.bias' of shape \(5,\) for \(4,\)",
    ),
    "None": (lambda v: v.update({"2.bias": None}), r"without \['2.bias'\]"),
}


@pytest.mark.parametrize("case", BAD_VECTORS)
def test_a_vector_that_does_not_fit_is_refused_by_name(case):
    model = net()
    A = curvature.hessian(model, F.cross_entropy, (X, Y))
    vector = {n: p.value for n, p in model.named_parameters()}
    change, message = BAD_VECTORS[case]
    change(vector)
    with pytest.raises(ShapeError, match=message) as caught:
        A @ vector
    what, why, instead = str(caught.value).split("\n")
    assert "A @ v was given a vector" in what and "(44,)" in why and "A.in_structure" in instead


def test_flat_and_stacked_vectors_that_do_not_fit_are_refused():
    model = net()
    A = curvature.hessian(model, F.cross_entropy, (X, Y))
    params = {n: p.value for n, p in model.named_parameters()}
    with pytest.raises(ShapeError, match=r"of shape \(43,\)"):
        A @ jnp.ones(43)
    with pytest.raises(ShapeError, match=r"A.matmat\(V\) was given a vector of shape \(3, 44\)"):
        A.matmat(jnp.ones((3, 44)))
    with pytest.raises(ShapeError, match="'2.bias' of shape"):
        A.matmat({n: p[None] if n != "2.bias" else p for n, p in params.items()})
    uneven = {n: jnp.stack([p] * (2 if n == "2.bias" else 3)) for n, p in params.items()}
    with pytest.raises(ShapeError, match="'2.bias' of shape"):
        A.matmat(uneven)
    with pytest.raises(DtypeError, match="complex64 for '2.bias'"):
        A @ {**params, "2.bias": jnp.ones(4, jnp.complex64)}
    with pytest.raises(ShapeError, match=r"\(3,\) as c"):
        A * jnp.ones(3)
    with pytest.raises(TypeError, match=r"damped\(c\)"):
        A + 1.0


def test_operators_that_do_not_fit_each_other_are_refused():
    model = net()
    A = curvature.hessian(model, F.cross_entropy, (X, Y))
    B = curvature.hessian(model, F.cross_entropy, (X, Y), subset="0.*")
    with pytest.raises(ShapeError, match=r"44 numbers, and 20 of what B takes\n.*'2.bias'"):
        A + B
    with pytest.raises(ShapeError, match="A @ B"):
        A @ curvature.jacobian(model, X)
    with pytest.raises(ShapeError, match="symmetric=True"):
        LinearOperator.of(lambda _, v: v[:2], jnp.ones(3), symmetric=True)


BAD_DATA = {
    "no batch": ([], "no batches"),
    "an empty batch": ((X[:0], Y[:0]), "0 examples"),
    "an empty batch among others": ([(X, Y), (X[:0], Y[:0])], "0 examples"),
    "no targets": ((X,), "a tuple of 1"),
    "an array": (X, "a batch that is a"),
    "other lengths": ((X, Y[:3]), "data"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_do_not_fit_are_refused(case):
    data, message = BAD_DATA[case]
    with pytest.raises(ShapeError, match=message) as caught:
        curvature.ggn(net(), F.cross_entropy, data)
    assert str(caught.value).startswith("ggn was given") and "Instead:" in str(caught.value)


def test_losses_and_outputs_that_do_not_fit_are_refused():
    model = net()
    with pytest.raises(TypeError, match="scalar"):
        curvature.hessian(model, functools.partial(F.cross_entropy, reduction="none"), (X, Y))
    with pytest.raises(TypeError, match="a loss of type str"):
        curvature.hessian(model, "cross_entropy", (X, Y))
    with pytest.raises(ValueError, match="reduction='none'"):
        curvature.hessian(model, F.cross_entropy, (X, Y), reduction="none")
    with pytest.raises(ValueError, match="likelihood='cauchy'"):
        curvature.fisher(model, X, likelihood="cauchy")
    with pytest.raises(ValueError, match="samples=0"):
        curvature.fisher(model, X, samples=0)
    for bad in (lambda p, x: (x @ p, x), lambda p, x: (x @ p).sum(), lambda p, x: (x @ p)[:2]):
        with pytest.raises(ShapeError, match="got an output"):
            curvature.jacobian((bad, jnp.ones((3, 2))), X)
    with pytest.raises(DtypeError, match="int32"):
        curvature.jacobian((lambda p, x: (x @ p).argmax(-1), jnp.ones((3, 2))), X)
