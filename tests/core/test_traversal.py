"""Iteration over parameters, buffers and modules, casting, zero_grad; torch is the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.precision import in_float64


def family(lib):
    """Two levels, own parameters after children, a tie, a shared child, buffers."""
    m = lib.nn.Module()
    m.first = lib.nn.Linear(2, 3)
    m.scale = lib.nn.Parameter(lib.ones(2))
    m.register_buffer("steps", lib.zeros(1))
    m.block = lib.nn.Module()
    m.block.norm = lib.nn.BatchNorm1d(3)
    m.block.again = m.first
    m.block.tied = m.scale
    m.second = lib.nn.Linear(3, 1, bias=False)
    m.same_second = m.second
    return m


@pytest.mark.parametrize("prefix", ["", "net"])
@pytest.mark.parametrize("recurse", [True, False])
@pytest.mark.parametrize("remove_duplicate", [True, False])
@pytest.mark.parametrize("what", ["named_parameters", "named_buffers"])
def test_named_members(agree, what, prefix, recurse, remove_duplicate):
    def scenario(lib):
        found = getattr(family(lib), what)(prefix, recurse, remove_duplicate)
        return [(name, tuple(x.shape)) for name, x in found]

    agree(scenario)


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_named_modules(agree, remove_duplicate):
    def scenario(lib):
        m = family(lib)
        return (
            [(n, x) for n, x in m.named_modules(remove_duplicate=remove_duplicate)],
            len(list(m.modules(remove_duplicate=remove_duplicate))),
            [n for n, _ in m.named_modules(prefix="net")],
        )

    agree(scenario)


def test_children_come_once(agree):
    def scenario(lib):
        m = family(lib)
        return [n for n, _ in m.named_children()], len(list(m.children()))

    agree(scenario)


def test_a_tied_parameter_is_listed_once_and_each_time_when_asked(agree):
    def scenario(lib):
        m = family(lib)
        once = [n for n, _ in m.named_parameters()]
        every = [n for n, _ in m.named_parameters(remove_duplicate=False)]
        return once, every, m.block.tied is m.scale, m.block.again is m.first

    agree(scenario)


def test_a_cycle_of_modules_is_walked_once(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.child = lib.nn.Linear(1, 1)
        m.child.parent = m
        return [n for n, _ in m.named_modules()], [n for n, _ in m.named_parameters()]

    agree(scenario)


def test_apply_visits_children_first_and_returns_self(agree):
    def scenario(lib):
        m = lib.nn.Sequential(lib.nn.Linear(1, 1), lib.nn.Sequential(lib.nn.Dropout()))
        seen = []
        same = m.apply(lambda x: seen.append(type(x).__name__)) is m
        return same, seen

    agree(scenario)


def test_apply_can_change_parameters_in_place(agree):
    def scenario(lib):
        def fill(x):
            if isinstance(x, lib.nn.Linear):
                x.weight.data = lib.ones(*x.weight.shape) * 3
                x.bias.data = lib.zeros(*x.bias.shape)

        m = lib.nn.Sequential(lib.nn.Linear(2, 2), lib.nn.Linear(2, 1)).apply(fill)
        return dict(m.state_dict())

    agree(scenario)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_casting_methods_change_floating_arrays_only_and_return_self(agree, cast):
    def scenario(lib):
        m = lib.nn.Module()
        m.w = lib.nn.Parameter(lib.ones(2))
        m.register_buffer("mean", lib.ones(2))
        m.register_buffer("count", lib.array(np.array([3], np.int32)))
        m.inner = lib.nn.Linear(1, 1)
        before = m.w
        same = getattr(m, cast)() is m
        dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in m.state_dict().items()}
        return same, m.w is before, dtypes

    agree(scenario)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("keyword", [True, False])
def test_to_takes_a_dtype(dtype, keyword):
    m = nn.BatchNorm1d(2)
    wanted = jnp.dtype(dtype)
    assert (m.to(dtype=wanted) if keyword else m.to(wanted)) is m
    assert m.weight.dtype == m.running_mean.dtype == wanted
    assert jnp.issubdtype(m.num_batches_tracked.dtype, jnp.integer)


def test_to_takes_a_device():
    m = nn.Linear(2, 2)
    device = jax.devices("cpu")[0]
    assert m.to(device) is m
    assert m.weight.value.devices() == {device}


def test_double_without_x64_says_so_instead_of_giving_float32():
    m = nn.Linear(2, 2)
    with pytest.raises(Exception, match="x64"):
        m.double()
    assert m.weight.dtype == jnp.float32


def test_double_with_x64_gives_float64():
    with in_float64():
        m = nn.Linear(2, 2)
        before = np.asarray(m.weight)
        m.double()
        assert m.weight.dtype == m.bias.dtype == jnp.float64
        np.testing.assert_array_equal(np.asarray(m.weight), before.astype(np.float64))


@pytest.mark.parametrize("wrong", [jnp.int32, "int64"])
def test_to_an_integer_dtype_is_refused_as_in_torch(wrong):
    m = nn.Linear(2, 2)
    with pytest.raises(TypeError):
        m.to(dtype=wrong)
    assert m.weight.dtype == jnp.float32


@pytest.mark.parametrize("keep_names", [True, False])
def test_the_repr_is_torch_s(agree, keep_names):
    def scenario(lib):
        class Net(lib.nn.Module):
            def __init__(self):
                super().__init__()
                self.body = lib.nn.Sequential(
                    lib.nn.Linear(2, 3, bias=False), lib.nn.ReLU(), lib.nn.Dropout(0.1)
                )
                self.norm = lib.nn.BatchNorm1d(3)
                self.many = lib.nn.ModuleList([lib.nn.Linear(1, 1) for _ in range(3)])
                self.by_name = lib.nn.ModuleDict({"a": lib.nn.Identity()})
                self.none = None

            def extra_repr(self):
                return "one=1\ntwo=2" if keep_names else "one=1"

        return repr(Net()).split("\n"), repr(lib.nn.Module()), repr(lib.nn.Linear(1, 2))

    agree(scenario)


def test_parameters_to_vector_uses_the_order_of_parameters(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.first = lib.nn.Module()
        m.first.w = lib.nn.Parameter(lib.arange(2, 2))
        m.own = lib.nn.Parameter(lib.array(np.array([7.0, 8.0], np.float32)))
        p2v = nn.parameters_to_vector if lib.nn is nn else lib.nn.utils.parameters_to_vector
        v2p = nn.vector_to_parameters if lib.nn is nn else lib.nn.utils.vector_to_parameters
        vector = p2v(m.parameters())
        v2p(vector * 2, m.parameters())
        return vector, dict(m.state_dict())

    agree(scenario)


def test_parameters_of_an_empty_module_is_an_empty_iterator(agree):
    agree(lambda lib: [list(lib.nn.Module().parameters()), list(lib.nn.Identity().buffers())])


def test_a_frozen_parameter_is_still_listed(agree):
    def scenario(lib):
        m = lib.nn.Linear(1, 1)
        m.weight.requires_grad = False
        return [(n, p.requires_grad) for n, p in m.named_parameters()]

    agree(scenario)
