"""nn.amp.policy: parameters in one dtype, computation in another, output in a third."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn

MIXED = nn.amp.policy(param=jnp.float32, compute=jnp.bfloat16, output=jnp.float32)
x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)


def low_by_hand(model, x):
    """Return what a copy of the model gives whose parameters were cast for good."""
    call, params, state = nn.functionalize(model, mutable=True)
    params = {name: p.astype(jnp.bfloat16) for name, p in params.items()}
    out, state = call(params, state, x.astype(jnp.bfloat16))
    return out, state


def test_it_computes_what_a_model_of_that_dtype_computes():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    expected, _ = low_by_hand(model, x)
    assert expected.dtype == jnp.bfloat16
    for run in (MIXED.apply(model), MIXED.apply(model.forward)):
        out = run(x)
        assert out.dtype == jnp.float32
        np.testing.assert_array_equal(out, expected.astype(jnp.float32))
    # Compiled as one, XLA leaves out roundings that are undone at once: of three layers.
    compiled = nn.jit(MIXED.apply(model))(x)
    tolerance = 3 * float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(compiled, out, rtol=tolerance, atol=tolerance)


def test_gradients_have_the_dtype_of_the_parameters_and_are_those_of_casts_by_hand():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    call, params = nn.functionalize(model)

    def by_hand(params):
        low = {name: p.astype(jnp.bfloat16) for name, p in params.items()}
        return call(low, x.astype(jnp.bfloat16)).astype(jnp.float32).sum()

    grads = nn.grad(lambda m, x: MIXED.apply(m)(x).sum())(model, x)
    expected = jax.grad(by_hand)(params)
    for name, value in expected.items():
        assert grads[name].dtype == jnp.float32
        np.testing.assert_array_equal(grads[name], value)


def test_state_is_written_back_in_the_dtype_it_had():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    _, expected = low_by_hand(model, x)
    before = model[1].running_mean
    MIXED.apply(model)(x)
    assert model[1].running_mean.dtype == before.dtype == jnp.float32
    assert not np.array_equal(model[1].running_mean, before)
    np.testing.assert_array_equal(model[1].running_mean, expected["1.running_mean"])
    assert int(model[1].num_batches_tracked) == 1


def test_draws_advance_the_generator():
    model = nn.Dropout(0.5)
    first, second = MIXED.apply(model)(x), MIXED.apply(model)(x)
    assert not np.array_equal(first, second)
    nn.manual_seed(0)
    again = MIXED.apply(model)(x)
    nn.manual_seed(0)
    np.testing.assert_array_equal(again, model(x.astype(jnp.bfloat16)).astype(jnp.float32))


def test_parameters_are_stored_in_the_first_dtype_and_buffers_as_they_are():
    model = nn.amp.policy(param=jnp.bfloat16).cast_to_param(nn.BatchNorm1d(3))
    assert {p.dtype.name for p in model.parameters()} == {"bfloat16"}
    assert {str(b.dtype) for b in model.buffers()} == {"float32", "int32"}


def test_integers_are_left_as_they_are():
    table = nn.Embedding(5, 2)
    out = MIXED.apply(table)(jnp.arange(3))
    np.testing.assert_array_equal(out, table.weight.astype(jnp.bfloat16)[:3].astype(jnp.float32))


@pytest.mark.parametrize("which", ["param", "compute", "output"])
def test_a_dtype_that_is_not_floating_is_refused(which):
    with pytest.raises(nn.DtypeError) as error:
        nn.amp.policy(**{which: jnp.int32})
    assert f"nn.amp.policy({which}=jnp.bfloat16)" in str(error.value)
    with pytest.raises(nn.DtypeError, match="jax_enable_x64"):
        nn.amp.policy(**{which: jnp.float64})


def test_a_model_that_is_a_pytree_and_transforms_around_it_are_served():
    model = nn.Linear(3, 2)
    expected = MIXED.apply(model)(x)
    tolerance = float(jnp.finfo(jnp.bfloat16).eps)
    for out in (
        jax.jit(lambda m, x: MIXED.apply(m)(x))(model, x),
        nn.vmap(lambda m, row: MIXED.apply(m)(row), in_axes=(None, 0))(model, x),
        nn.remat(lambda m, x: MIXED.apply(m)(x))(model, x),
    ):
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
