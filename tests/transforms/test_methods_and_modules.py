"""A module, or a method of one, in the place of a function."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray([2.0, 3.0]))
        self.register_buffer("calls", jnp.zeros((), jnp.int32))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.w * x

    def twice(self, x):
        return self(self(x))


TRANSFORMS = {"nn.jit": nn.jit, "nn.remat": nn.remat}


@pytest.mark.parametrize("how", TRANSFORMS)
def test_a_module_is_transformed_and_its_state_written_back(how):
    m = Counting()
    np.testing.assert_array_equal(np.asarray(TRANSFORMS[how](m)(jnp.ones(2))), [2.0, 3.0])
    assert int(m.calls) == 1


@pytest.mark.parametrize("how", TRANSFORMS)
def test_a_bound_method_is_transformed_and_its_state_written_back(how):
    m = Counting()
    np.testing.assert_array_equal(np.asarray(TRANSFORMS[how](m.twice)(jnp.ones(2))), [4.0, 9.0])
    assert int(m.calls) == 2


def test_vmap_of_a_module_shares_it_between_the_lanes():
    m = Counting()
    xs = jnp.asarray([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    np.testing.assert_array_equal(np.asarray(nn.vmap(m)(xs)), np.asarray(xs) * [2.0, 3.0])
    assert int(m.calls) == 1  # every lane writes the same count


def test_remat_of_a_submodule_inside_a_forward_passes_gradient_and_state():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Counting()

        def forward(self, x):
            return nn.remat(self.block)(x).sum()

    m = Outer()
    grads = nn.grad(lambda m, x: m(x))(m, jnp.asarray([5.0, 7.0]))
    np.testing.assert_array_equal(np.asarray(grads["block.w"]), [5.0, 7.0])
    assert int(m.block.calls) == 1


def test_donating_two_parameters_that_start_as_one_array_works():
    start = jnp.ones(3)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(start), nn.Parameter(start)

    m = Two()

    @nn.jit(donate=0)
    def step(m):
        m.a.value = m.a + 1
        m.b.value = m.b + 2

    step(m)
    np.testing.assert_array_equal(np.asarray(m.a), 2 * np.ones(3))
    np.testing.assert_array_equal(np.asarray(m.b), 3 * np.ones(3))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: collections.deque([1.0]), lambda v: v.append(2.0)),
        (lambda: bytearray(b"a"), lambda v: v.extend(b"b")),
        (lambda: {"scale": [1.0]}, lambda v: v["scale"].append(2.0)),
    ],
    ids=["deque", "bytearray", "list in a dict"],
)
def test_a_static_changed_in_place_is_seen_by_the_next_compiled_call(make, change):
    class Static(nn.Module):
        def __init__(self):
            super().__init__()
            self.setting = make()

        def forward(self, x):
            inner = self.setting
            return x * len(inner["scale"] if isinstance(inner, dict) else inner)

    m = Static()
    f = nn.jit(m)
    assert float(f(jnp.ones(()))) == 1.0
    change(m.setting)
    assert float(f(jnp.ones(()))) == 2.0


def test_next_key_follows_the_generator_in_force():
    class Noise(nn.Module):
        def forward(self, x):
            return x + jax.random.normal(nn.next_key(), x.shape)

    key = jax.random.key(7)
    one = nn.functional_call(Noise(), {}, jnp.zeros(3), rng=key)
    two = nn.functional_call(Noise(), {}, jnp.zeros(3), rng=key)
    np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    f = nn.jit(Noise())
    assert not np.array_equal(np.asarray(f(jnp.zeros(3))), np.asarray(f(jnp.zeros(3))))
    with pytest.raises(nn.MissingRngError):
        nn.functional_call(Noise(), {}, jnp.zeros(3))
