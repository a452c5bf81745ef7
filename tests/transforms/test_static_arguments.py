"""Static arguments of nn.jit: they compare by value, and compiled code keeps copies of them.

The oracle is the same function in eager code.
"""

from __future__ import annotations

import collections
import types

import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Settings:
    def __init__(self, factor):
        self.factor = factor


def scaled(read):
    return nn.jit(lambda x, value: x * read(value), static_argnames="value")


# What is passed, how it is read, how it changes in place: the factor is 2 before and 5 afterwards.
ARGUMENTS = {
    "list": (lambda: [2.0], lambda v: v[0], lambda v: v.__setitem__(0, 5.0)),
    "dict of lists": (lambda: {"a": [2.0]}, lambda v: v["a"][0], lambda v: v["a"].insert(0, 5.0)),
    "deque": (lambda: collections.deque([2.0], 1), lambda v: v[0], lambda v: v.append(5.0)),
    "array": (lambda: np.asarray([2.0]), lambda v: v[0], lambda v: v.__setitem__(0, 5.0)),
    "object": (lambda: Settings(2.0), lambda v: v.factor, lambda v: setattr(v, "factor", 5.0)),
    "namespace": (
        lambda: types.SimpleNamespace(factor=2.0),
        lambda v: v.factor,
        lambda v: setattr(v, "factor", 5.0),
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_shape_that_is_met_later_is_compiled_for_the_value_of_its_call(case):
    make, read, change = ARGUMENTS[case]
    f, first = scaled(read), make()
    for size in (1, 2):
        np.testing.assert_array_equal(np.asarray(f(jnp.ones(size), value=make())), [2.0] * size)
    np.testing.assert_array_equal(np.asarray(f(jnp.ones(3), value=first)), [2.0] * 3)
    change(first)
    np.testing.assert_array_equal(np.asarray(f(jnp.ones(4), value=first)), [5.0] * 4)
    np.testing.assert_array_equal(np.asarray(f(jnp.ones(5), value=make())), [2.0] * 5)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_code_compiled_for_an_argument_keeps_its_value_when_the_caller_changes_it(case):
    make, read, change = ARGUMENTS[case]
    f, own = scaled(read), make()
    f(jnp.ones(1), value=own)
    change(own)
    # The same version is traced again, for another shape and for an argument equal to the old one.
    np.testing.assert_array_equal(np.asarray(f(jnp.ones(2), value=make())), [2.0, 2.0])


@pytest.mark.parametrize("case", ARGUMENTS)
def test_equal_arguments_share_compiled_code(case):
    make, read, _ = ARGUMENTS[case]
    f = scaled(read)
    for _ in range(3):
        f(jnp.ones(2), value=make())
    assert f.trace_count == 1


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_change_of_a_static_argument_by_the_traced_function_raises(case):
    make, read, change = ARGUMENTS[case]
    own = make()
    f = scaled(lambda value: (change(value), read(value))[1])
    with pytest.raises(nn.StructureChangeError, match="static argument"):
        f(jnp.ones(2), value=own)
    assert read(own) == 2.0


def test_what_compares_by_identity_is_passed_as_it_is():
    seen = []
    marker = object()

    def function():
        return 2.0

    f = nn.jit(lambda x, a, b: (seen.append((a, b)), x * b())[1], static_argnums=(1, 2))
    np.testing.assert_array_equal(np.asarray(f(jnp.ones(2), marker, function)), [2.0, 2.0])
    assert seen[0][0] is marker and seen[0][1] is function


@pytest.mark.parametrize(
    "options", [{"static_argnames": "k"}, {"static_argnums": 2}, {"static_argnums": -1}]
)
def test_a_static_argument_may_be_passed_by_position_and_by_name(options):
    layer = nn.Linear(2, 2)

    @nn.jit(**options)
    def f(layer, x, k=2):
        return layer(x) * k if k > 1 else layer(x)  # a traced k has no truth value

    x, whole = jnp.ones((1, 2)), np.asarray(layer(jnp.ones((1, 2))))
    for call in (
        lambda: f(layer, x, 3),
        lambda: f(layer, x, k=3),
        lambda: f(x=x, layer=layer, k=3),
    ):
        np.testing.assert_allclose(np.asarray(call()), 3 * whole, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(f(layer, x)), 2 * whole, rtol=1e-6)


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, times=1):
        for _ in range(times):
            x = self.layer(x)
        return x


def test_static_arguments_of_a_module_are_those_of_its_forward():
    model, x = Repeated(), jnp.ones((1, 2))
    for compiled in (nn.jit(model, static_argnames="times"), nn.jit(model, static_argnums=1)):
        for out in (compiled(x, 3), compiled(x, times=3)):
            np.testing.assert_allclose(np.asarray(out), np.asarray(model(x, 3)), rtol=1e-6)
    with pytest.raises(ValueError, match="'time'"):
        nn.jit(model, static_argnames="time")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"static_argnames": "kk"}, "static_argnames='kk'"),
        ({"static_argnums": 3}, "static_argnums=3"),
        ({"static_argnums": -4}, "static_argnums=-4"),
        ({"donate": 3}, "donate=3"),
        ({"static_argnums": 2, "donate": -1}, "static and donated"),
        ({"static_argnames": "k", "donate": 2}, "static and donated"),
    ],
)
def test_an_option_about_an_argument_that_is_not_there_is_refused(options, message):
    def f(layer, x, k=2):
        return layer(x) * k

    with pytest.raises(ValueError, match=message):
        nn.jit(f, **options)


def test_a_module_as_a_static_argument_is_refused():
    f = nn.jit(lambda layer, x: layer(x), static_argnums=0)
    with pytest.raises(nn.RegistrationError, match="passed a Linear as a static argument"):
        f(nn.Linear(2, 2), jnp.ones((1, 2)))


def test_positions_are_counted_from_the_end_of_a_call_with_any_number_of_arguments():
    f = nn.jit(
        lambda *values: sum(values[:-1]) * (2 if values[-1] == "twice" else 1), static_argnums=-1
    )
    x = jnp.ones(2)
    np.testing.assert_array_equal(np.asarray(f(x, "once")), [1.0, 1.0])
    np.testing.assert_array_equal(np.asarray(f(x, x, x, "twice")), [6.0, 6.0])
