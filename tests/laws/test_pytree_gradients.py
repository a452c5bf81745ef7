"""Plain JAX gradients of whole modules: what is not trained is not moved silently."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
from tests.quick import diagonal

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)


def frozen_first() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    return model


def with_running_mean() -> nn.Module:
    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.mean = nn.Buffer(jnp.ones(2))

        def forward(self, x):
            return super().forward(x - self.mean)

    return Net()


def loss(model):
    return model(X).sum()


REVERSE = {
    "grad": lambda m: jax.grad(loss)(m),
    "value_and_grad": lambda m: jax.value_and_grad(loss)(m),
    "grad inside jit": lambda m: jax.jit(jax.grad(loss))(m),
    "grad inside nn.jit": nn.jit(lambda m: jax.tree.leaves(jax.grad(loss)(m))),
    "grad inside vmap": lambda m: jax.vmap(lambda x: jax.grad(lambda m: m(x).sum())(m))(X),
    "grad of a tree": lambda m: jax.grad(lambda t: loss(t["model"]))({"model": m}),
    "vjp": lambda m: jax.vjp(loss, m)[1](1.0),
    "linearize": lambda m: jax.linearize(loss, m)[0],
    "jacrev": lambda m: jax.jacrev(loss)(m),
    "hessian": lambda m: jax.hessian(loss)(m),
}

SILENT = {
    "jvp": lambda m: jax.jvp(loss, (m,), (m,)),
    "a gradient of another argument": lambda m: jax.grad(lambda s, m: s * loss(m))(1.0, m),
    "the same inside jit": lambda m: jax.jit(jax.grad(lambda s, m: s * loss(m)))(1.0, m),
    "a copy inside of a gradient": lambda m: jax.grad(
        lambda s: s * loss(jax.tree.map(lambda a: 2 * a, m))
    )(1.0),
    "nn.grad": lambda m: nn.grad(loss)(m),
    "nn.grad inside jit": lambda m: jax.jit(nn.grad(loss))(m),
    "functionalize": lambda m: jax.grad(lambda p: nn.functionalize(m)[0](p, X).sum())(
        nn.functionalize(m)[1]
    ),
    "jit": lambda m: jax.jit(loss)(m),
}


@pytest.mark.parametrize(
    "how, build", diagonal(2, list(REVERSE), [frozen_first, with_running_mean])
)
def test_a_plain_gradient_of_a_whole_module_with_untrained_numbers_warns(how, build) -> None:
    model = build()
    with pytest.warns(nn.UntrainedLeavesWarning) as record:
        REVERSE[how](model)
    (warning,) = record
    assert warning.filename == __file__
    name = "'0.weight', '0.bias'" if build is frozen_first else "'mean'"
    assert f"frozen parameters or buffers: {name}\n" in str(warning.message)
    assert "nn.Optimizer(model, tx)" in str(warning.message)


@pytest.mark.parametrize("how", SILENT)
def test_other_transformations_do_not_warn(how) -> None:
    SILENT[how](frozen_first())  # warnings are errors here


def test_a_module_that_is_trained_as_a_whole_does_not_warn() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    jax.grad(loss)(model)


def test_the_warning_is_shown_once_for_each_line_and_again_elsewhere() -> None:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")
        for _ in range(3):
            jax.grad(loss)(frozen_first())
        jax.grad(loss)(frozen_first())
    first, second = (w.lineno for w in record)
    assert second == first + 1


def test_what_is_frozen_does_not_move_silently_by_optax_over_the_module() -> None:
    model, tx = frozen_first(), optax.adamw(0.1, weight_decay=0.5)
    with pytest.warns(nn.UntrainedLeavesWarning, match=r"optax\.adamw"):
        jax.grad(loss)(model)

    # The two ways that the warning names.
    before = np.array(model[0].weight)
    fn, params, state = nn.functionalize(model, mutable=True)
    grads = jax.grad(lambda p: fn(p, state, X)[0].sum())(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(grads, tx.init(params), params)
        moved = optax.apply_updates(params, updates)
    nn.Optimizer(model, tx).step(nn.grad(loss)(model))
    np.testing.assert_array_equal(model[0].weight, before)
    for name, value in moved.items():
        np.testing.assert_allclose(model.get_parameter(name), value, rtol=1e-6, err_msg=name)
    assert sorted(moved) == ["1.bias", "1.weight"]


def test_a_warning_turned_into_an_error_leaves_nothing_behind() -> None:
    model = frozen_first()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(nn.UntrainedLeavesWarning):
            jax.grad(loss)(model)
    assert not any(isinstance(p.value, jax.core.Tracer) for p in model.parameters())
    nn.grad(loss)(model)
