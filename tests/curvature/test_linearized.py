"""Taylor expansions of models in their parameters."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from statefulnn import curvature
from statefulnn.core.errors import MissingRngError, ShapeError, StateWriteError
from tests.precision import in_float64
from tests.quick import first


def a_model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def moved(params, by=0.3):
    keys = jax.random.split(jax.random.key(5), len(params))
    return {
        name: p + by * jax.random.normal(key, p.shape, p.dtype)
        for key, (name, p) in zip(keys, params.items(), strict=True)
    }


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_first_order_is_the_jacobian_vector_product_of_torch():
    model, x = a_model(), jax.random.normal(jax.random.key(0), (5, 3))
    linear, params = curvature.linearize_model(model)
    there = moved(params)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    tensors = lambda tree: {n: torch.tensor(np.asarray(v)) for n, v in tree.items()}
    step = tensors({name: there[name] - params[name] for name in params})
    value, slope = torch.func.jvp(
        lambda p: torch.func.functional_call(net, p, (torch.tensor(np.asarray(x)),)),
        (tensors(params),),
        (step,),
    )
    np.testing.assert_allclose(linear(there, x), (value + slope).numpy(), rtol=1e-5, atol=1e-6)


def test_it_touches_the_model_at_its_own_parameters():
    model, x = a_model(), jnp.ones((5, 3))
    for expansion in (curvature.linearize_model(model), curvature.taylor_model(model, 3)):
        fn, params = expansion
        np.testing.assert_allclose(fn(params, x), model(x), rtol=1e-6)


def test_it_is_affine_in_the_parameters():
    model, x = a_model(), jnp.ones((5, 3))
    linear, params = curvature.linearize_model(model)
    a, b = moved(params, 1.0), moved(params, -2.0)
    middle = jax.tree.map(lambda a, b: (a + 3 * b) / 4, a, b)
    want = (linear(a, x) + 3 * linear(b, x)) / 4
    np.testing.assert_allclose(linear(middle, x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("degree", first(1, [2, 0, 1, 3]))
def test_error_falls_with_the_next_power_of_the_step(degree):
    with in_float64():
        model = nn.Sequential(
            nn.Linear(3, 4, dtype=jnp.float64), nn.Tanh(), nn.Linear(4, 2, dtype=jnp.float64)
        )
        x = jax.random.normal(jax.random.key(0), (5, 3), jnp.float64)
        fn, params = curvature.taylor_model(model, degree)
        exact, _ = nn.functionalize(model)
        errors = [
            np.abs(fn(moved(params, by), x) - exact(moved(params, by), x)).max()
            for by in (2e-2, 1e-2)
        ]
        assert errors[1] > 0
        assert 0.8 < np.log2(errors[0] / errors[1]) / (degree + 1) < 1.2


def test_quadratic_expansion_has_the_second_derivatives():
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    fn = lambda p, x: jnp.sin(p["a"] @ x) * p["b"] ** 2
    x, step = jnp.array([0.3, 0.7]), {"a": jnp.array([0.2, 0.1]), "b": jnp.array(-0.4)}
    quadratic, _ = curvature.taylor_model((fn, params), 2)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    d = jax.flatten_util.ravel_pytree(step)[0]
    f = lambda flat: fn(unravel(flat), x)
    want = f(flat) + jax.grad(f)(flat) @ d + d @ jax.hessian(f)(flat) @ d / 2
    got = quadratic(jax.tree.map(jnp.add, params, step), x)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_gradients_are_those_of_a_linear_model_everywhere():
    model, x = a_model(), jnp.ones((1, 3))
    linear, params = curvature.linearize_model(model)
    fn, _ = nn.functionalize(model)
    here = jax.grad(lambda p: fn(p, x).sum())(params)
    for where in (params, moved(params, 3.0)):
        there = jax.grad(lambda p: linear(p, x).sum())(where)
        for name in params:
            np.testing.assert_allclose(there[name], here[name], rtol=1e-5, atol=1e-6)


def test_it_is_a_model_for_the_kernel_and_keeps_it():
    model, x = a_model(), jax.random.normal(jax.random.key(0), (3, 3))
    linear, params = curvature.linearize_model(model)
    want = curvature.empirical_ntk(model, x)
    kernel = jax.jit(lambda p: curvature.empirical_ntk((linear, p), x))
    np.testing.assert_allclose(kernel(moved(params)), want, rtol=1e-4, atol=1e-5)


def test_later_changes_of_the_module_do_not_reach_it():
    model, x = a_model(), jnp.ones((1, 3))
    linear, params = curvature.linearize_model(model)
    before = linear(params, x)
    model[0].weight.value = model[0].weight * 2
    np.testing.assert_array_equal(linear(params, x), before)


def test_it_works_inside_jit_vmap_and_grad():
    model, x = a_model(), jax.random.normal(jax.random.key(0), (6, 3))
    linear, params = curvature.linearize_model(model)
    there = moved(params)
    want = linear(there, x)
    rows = jax.jit(jax.vmap(lambda p, x: linear(p, x[None])[0], in_axes=(None, 0)))(there, x)
    np.testing.assert_allclose(rows, want, rtol=1e-5, atol=1e-6)


def test_keyword_arguments_and_several_outputs_pass_through():
    fn = lambda p, x, *, scale: {"a": p["w"] * x * scale, "b": p["w"] ** 2}
    linear, params = curvature.linearize_model((fn, {"w": jnp.array(1.0)}))
    out = linear({"w": jnp.array(2.0)}, jnp.array(3.0), scale=2.0)
    assert (float(out["a"]), float(out["b"])) == (12.0, 3.0)


def test_dropout_takes_its_key_and_asks_for_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    linear, params = curvature.linearize_model(model)
    with pytest.raises(MissingRngError):
        linear(params, jnp.ones((2, 3)))
    fn, _ = nn.functionalize(model)
    key = jax.random.key(1)
    there = moved(params)  # linear in its parameters, given the mask
    want = functools.partial(fn, rng=key)(there, jnp.ones((2, 3)))
    np.testing.assert_allclose(linear(there, jnp.ones((2, 3)), rng=key), want, rtol=1e-5, atol=1e-6)


def test_writing_models_are_refused():
    linear, params = curvature.linearize_model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with pytest.raises(StateWriteError):
        linear(params, jnp.ones((2, 3)))


def test_other_parameters_than_its_own_are_refused():
    linear, params = curvature.linearize_model(nn.Linear(2, 1))
    x = jnp.ones((1, 2))
    with pytest.raises(ShapeError, match=r"missing \['bias'\]"):
        linear({"weight": params["weight"]}, x)
    with pytest.raises(ShapeError, match=r"unknown \['wieght'\]"):
        linear({**params, "wieght": params["weight"]}, x)
    with pytest.raises(ShapeError, match=r"'bias' \(2,\) for \(1,\)"):
        linear({**params, "bias": jnp.zeros(2)}, x)
    with pytest.raises(ShapeError, match="another tree"):
        curvature.linearize_model((lambda p, x: p[0] * x, [jnp.ones(())]))[0]((jnp.ones(()),), x)


@pytest.mark.parametrize("degree", [-1, 1.5, True, "2"])
def test_degrees_are_checked(degree):
    with pytest.raises(ValueError, match="taylor_model was given degree="):
        curvature.taylor_model(nn.Linear(2, 1), degree)
