"""Implicit layers: modules whose output is a solution, beside the same layers unrolled."""

from __future__ import annotations

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.quick import diagonal, first, quickly

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)


class Cell(nn.Module):
    def __init__(self, factor=0.5):
        super().__init__()
        self.state, self.input = nn.Linear(3, 3), nn.Linear(3, 3)
        self.factor = factor

    def forward(self, z, x):
        return jnp.tanh(self.factor * self.state(z) + self.input(x))


class Natural(nn.Module):
    """As one writes it: the condition uses what ``self`` owns."""

    def __init__(self):
        super().__init__()
        self.cell = Cell()

    def forward(self, x):
        def solve(z, x):
            return jax.lax.fori_loop(0, 25, lambda _, z: self.cell(z, x), z)

        fit = nn.meta.implicit_gradient(solve, fixed_point=lambda z, x: self.cell(z, x))
        return fit(jnp.zeros_like(x), x)


class AsArgument(Natural):
    """The module as an argument of solver and condition."""

    def forward(self, x):
        def solve(z, cell, x):
            return jax.lax.fori_loop(0, 25, lambda _, z: cell(z, x), z)

        fit = nn.meta.implicit_gradient(solve, fixed_point=lambda z, cell, x: cell(z, x))
        return fit(jnp.zeros_like(x), self.cell, x)


class Unrolled(Natural):
    def forward(self, x):
        # The turns of a scan are compiled once, and differentiated one after the other.
        step = lambda z, _: (self.cell(z, x), None)
        return jax.lax.scan(step, jnp.zeros_like(x), length=25)[0]


def fixed_point():
    return nn.meta.FixedPoint(Cell(), tol=1e-6)


def unrolled(layer):
    """A layer with the same weights, without implicit gradients."""
    other = Unrolled()
    other.load_state_dict(layer.state_dict())
    return other


def loss(layer, x):
    return (layer(x) ** 2).sum()


gradient_of = nn.jit(nn.grad(loss))


def agree(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), ours, theirs)


WRAPS = {"eager": lambda f: f, "nn.jit": nn.jit, "jax.jit": jax.jit}
LAYERS = [Natural, AsArgument, fixed_point]


@pytest.mark.parametrize("way, make", diagonal(3, list(WRAPS), LAYERS))
def test_gradients_by_weights_and_input_are_those_of_the_unrolled_layer(make, way):
    layer = make()
    both = lambda layer, x: nn.value_and_grad(loss, argnums=(0, 1))(layer, x)
    value, (by_weights, by_input) = WRAPS[way](both)(layer, X)
    expected, (weights, inputs) = nn.jit(both)(unrolled(layer), X)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    agree((by_weights, by_input), (weights, inputs))
    assert max(float(jnp.abs(g).max()) for g in by_weights.values()) > 1e-2


# As an argument it is another module like the others, of which the gradients above are.
OWNERS = first(2, [Natural, fixed_point, AsArgument])


@pytest.mark.parametrize("make", OWNERS)
def test_raw_transformations_of_jax_do_as_well(make):
    layer = make()
    fn, params = nn.functionalize(layer)
    by_params = jax.jit(jax.grad(lambda p, x: (fn(p, x) ** 2).sum()))(params, X)
    agree(by_params, gradient_of(unrolled(layer), X))
    each = jax.vmap(jax.grad(lambda x: loss(layer, x)))(X)  # the layer from a closure
    other = unrolled(layer)
    agree(each, quickly(jax.grad(lambda x: loss(other, x)))(X))


@pytest.mark.parametrize("make", OWNERS)
def test_the_members_of_an_ensemble_are_independent(make):
    ensemble = nn.Ensemble(make, 3)
    x = jnp.stack([X, 2 * X, 3 * X])
    total = lambda e, x: (e(x, in_axes=0) ** 2).sum()
    found = nn.grad(total)(ensemble, x)
    for i in range(3):
        expected = gradient_of(unrolled(ensemble.member(i)), x[i])
        agree({n: g[i] for n, g in found.items()}, {f"stack.{n}": g for n, g in expected.items()})


def test_per_example_gradients():
    layer = fixed_point()
    found = nn.func.per_sample_grad(lambda m, x: (m(x) ** 2).sum())(layer, X)
    other = unrolled(layer)
    expected = [gradient_of(other, x) for x in X]
    agree(found, {n: jnp.stack([e[n] for e in expected]) for n in found})


def test_second_derivatives_and_forward_mode():
    layer = fixed_point()
    fn, params = nn.functionalize(layer)
    other, _ = nn.functionalize(unrolled(layer))
    x = X[:1]

    def derivatives(fn):
        f = lambda x: (fn(params, x) ** 2).sum()
        return quickly(lambda x: (jax.hessian(f)(x), jax.jacfwd(f)(x)))(x)

    agree(derivatives(fn), derivatives(other))


class Stepping(Natural):
    """With a solver that is a loop of Python: no body that JAX would keep."""

    def forward(self, x):
        def solve(z, x):
            for _ in range(9):
                z = self.cell(z, x)
            return z

        fit = nn.meta.implicit_gradient(solve, fixed_point=lambda z, x: self.cell(z, x))
        return fit(jnp.zeros_like(x), x)


@pytest.mark.parametrize("make", [Stepping, fixed_point])
def test_training_after_an_eager_call_or_gradient_is_no_stale_capture(make):
    layer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            layer(X)
            jax.grad(lambda x: loss(layer, x))(X)
            for p in layer.parameters():
                p.value = p.value * 0.9


def test_a_start_may_be_given_and_changes_nothing():
    layer = fixed_point()
    np.testing.assert_allclose(layer(X), layer(X, start=jnp.ones_like(X)), atol=1e-5)
    from_ones = nn.grad(lambda m: (m(X, start=jnp.ones_like(X)) ** 2).sum())
    agree(nn.jit(from_ones)(layer), gradient_of(layer, X))


class Pair(nn.Module):
    """A cell of two arrays and two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, z, x, y):
        u, v = z
        return jnp.tanh(0.3 * self.a(v) + y), jnp.tanh(0.3 * self.b(u) + x)


def test_z_may_be_several_arrays():
    layer = nn.meta.FixedPoint(Pair(), solve=nn.meta.neumann(40))
    start = (jnp.zeros((5, 2)), jnp.zeros((5, 3)))
    total = lambda z: sum((v**2).sum() for v in z)
    found = nn.grad(lambda m: total(m(X, X[:, :2], start=start)))(layer)

    def by_hand(cell):
        step = lambda z, _: (cell(z, X, X[:, :2]), None)
        return total(jax.lax.scan(step, start, length=40)[0])

    expected = nn.jit(nn.grad(by_hand))(layer.cell)
    agree(found, {f"cell.{n}": g for n, g in expected.items()})


def test_pickles_copies_and_shows_as_other_modules():
    layer = fixed_point()
    np.testing.assert_array_equal(copy.deepcopy(layer)(X), layer(X))
    assert "FixedPoint(\n  steps=100, tol=1e-06" in repr(layer)


@pytest.mark.parametrize("way", ["eager", "nn.jit"])
@pytest.mark.parametrize("call", [loss, nn.grad(loss)], ids=["forward", "gradient"])
def test_a_cell_that_does_not_contract_is_an_error_of_ours(way, call):
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(jnp.ones(()))

        def forward(self, z, x):
            return x - self.scale * z

    layer = nn.meta.FixedPoint(Turning(), steps=7)
    with pytest.raises(nn.ConvergenceError, match=r"(?s)still changes .* in step 7.*steps=70"):
        WRAPS[way](call)(layer, X)


def test_numbers_that_are_not_finite_are_said_also_without_a_tolerance():
    class Doubling(nn.Module):
        def forward(self, z, x):
            return z * 1e30 + x

    layer = nn.meta.FixedPoint(Doubling(), steps=9, tol=None)
    with pytest.raises(nn.ConvergenceError, match="z is not finite after 9 steps"):
        layer(X)


def test_a_cell_that_writes_state_is_refused():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, z, x):
            return 0.1 * self.norm(z) + x

    with pytest.raises(nn.StateWriteError, match="running_mean"):
        nn.meta.FixedPoint(Normed())(X)
    with pytest.raises(ValueError, match="steps must be"):
        nn.meta.FixedPoint(Normed(), steps=0)


@pytest.mark.parametrize(
    "way, dtype", diagonal(2, ["gmres", "neumann"], [jnp.bfloat16, jnp.float16])
)
def test_a_fixed_point_in_half_precision_is_that_of_float32(way, dtype):
    nn.manual_seed(0)
    solve = {"gmres": None, "neumann": nn.meta.neumann(30)}[way]
    layer = nn.meta.FixedPoint(Cell(0.3), solve=solve)
    value = lambda layer, x: (layer(x).astype(jnp.float32) ** 2).sum()
    both = nn.jit(lambda layer, x: (layer(x), nn.grad(value)(layer, x)))
    expected, slopes = both(layer, X)
    half = copy.deepcopy(layer).to(dtype)
    found, gradients = both(half, X.astype(dtype))
    eps = float(jnp.finfo(dtype).eps)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=4 * eps)
    for name, slope in slopes.items():
        ours = np.asarray(gradients[name], np.float32)
        np.testing.assert_allclose(ours, slope, atol=10 * eps * np.abs(slope).max())


def test_a_batch_without_rows_has_a_fixed_point_and_a_gradient_of_zero():
    layer = nn.meta.FixedPoint(Cell())
    assert layer(X[:0]).shape == (0, 3)
    for gradient in nn.grad(lambda layer: layer(X[:0]).sum())(layer).values():
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_a_fixed_point_of_tiny_numbers_is_iterated_to():
    class Average(nn.Module):
        def forward(self, z, x):
            return (z + x) / 2

    x = 1e-25 * X
    z = nn.meta.FixedPoint(Average())(x, start=jnp.zeros_like(x))
    np.testing.assert_allclose(z / 1e-25, X, rtol=1e-3)
