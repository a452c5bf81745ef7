"""Random module graphs: with ties, shared submodules, cycles and None; nothing may get lost."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import statefulnn as nn


class Node(nn.Module):
    """A module with nothing in it; the strategy fills it."""


class Other(nn.Module):
    _python_cache = ("cache",)


STATICS = st.one_of(
    st.integers(-2, 2),
    st.booleans(),
    st.sampled_from([0.0, -0.0, 1.0, float("nan"), "a", "", None, (), (1, "b"), b"x"]),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from("ab"), st.integers(0, 2), max_size=2),
)


@st.composite
def graphs(draw, cycles=True):
    """A connected graph of modules from the first; edges may share, and close cycles."""
    n = draw(st.integers(1, 5))
    modules = [draw(st.sampled_from([Node, Other]))() for _ in range(n)]
    boxes = []
    for i in range(draw(st.integers(0, 4))):
        value = jnp.full((i + 1,), float(i))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            boxes.append(nn.Buffer(value, persistent=draw(st.booleans())))
        elif kind == 1:
            boxes.append(nn.Generator(i))
        else:
            boxes.append(nn.Parameter(value, requires_grad=draw(st.booleans())))
    for i, m in enumerate(modules):
        m.training = draw(st.booleans())
        for name in draw(st.lists(st.sampled_from("pqr"), unique=True, max_size=3)):
            if boxes:
                setattr(m, name, draw(st.sampled_from(boxes)))
        if draw(st.booleans()):
            m.register_parameter("none_parameter", None)
        if draw(st.booleans()):
            m.register_buffer("none_buffer", None)
        if draw(st.booleans()):
            m.add_module("none_child", None)
        for name in draw(st.lists(st.sampled_from(["static_a", "static_b"]), unique=True)):
            setattr(m, name, draw(STATICS))
        if i:  # a tree edge keeps it connected
            modules[draw(st.integers(0, i - 1))].add_module(f"child_{i}", m)
    for k in range(draw(st.integers(0, 3))):  # sharing, cycles, self loops, references
        i, j = draw(st.integers(0, n - 1)), draw(st.integers(0, n - 1))
        a, b = modules[i], modules[j]
        if draw(st.booleans()):
            if cycles or i < j:
                a.add_module(f"edge_{k}", b)
        else:
            setattr(a, f"ref_{k}", nn.Ref(b))
    return modules[0]


def members(m):
    """Every named thing directly in a module: (name, object)."""
    for registry in ("_parameters", "_buffers", "_modules"):
        yield from ((f"{registry}.{k}", v) for k, v in getattr(m, registry).items())
    for k in sorted(vars(m)):
        if k.startswith(("static_", "training")):
            yield k, vars(m)[k]
    for k in ("p", "q", "r", *(f"ref_{i}" for i in range(3))):
        if k not in m._parameters and k not in m._buffers and hasattr(m, k):
            yield "other." + k, getattr(m, k)


def isomorphic(a, b):
    """Walk both from the root: same classes, names, statics, values, and the same sharing."""
    pairs: dict[int, object] = {}
    inverse: dict[int, object] = {}
    stack = [(a, b)]
    keep = []
    while stack:
        x, y = stack.pop()
        keep += [x, y]
        assert type(x) is type(y), (x, y)
        if isinstance(x, (nn.Module, nn.Parameter, nn.Buffer, nn.Generator)):
            if id(x) in pairs or id(y) in inverse:
                assert pairs.get(id(x)) is y, "sharing differs"
                assert inverse.get(id(y)) is x, "sharing differs"
                continue
            pairs[id(x)], inverse[id(y)] = y, x
        if isinstance(x, nn.Module):
            mx, my = list(members(x)), list(members(y))
            assert [k for k, _ in mx] == [k for k, _ in my]
            stack += [(v, w) for (_, v), (_, w) in zip(mx, my, strict=True)]
            assert x._non_persistent_buffers_set == y._non_persistent_buffers_set
        elif isinstance(x, (nn.Parameter, nn.Buffer, nn.Generator)):
            np.testing.assert_array_equal(np.asarray(x.value), np.asarray(y.value))
            if isinstance(x, nn.Parameter):
                assert x.requires_grad == y.requires_grad
        else:
            assert repr(x) == repr(y)


SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@SETTINGS
@given(graphs())
def test_merge_of_split_is_the_same_graph(m):
    isomorphic(m, nn.merge(*nn.split(m)))


@SETTINGS
@given(graphs())
def test_the_identity_by_tree_map_is_the_same_graph(m):
    isomorphic(m, jax.tree.map(lambda x: x, m))


@SETTINGS
@given(graphs())
def test_deepcopy_and_pickle_give_the_same_graph(m):
    isomorphic(m, copy.deepcopy(m))
    isomorphic(m, pickle.loads(pickle.dumps(m)))


@SETTINGS
@given(graphs())
def test_split_is_stable_and_copies_split_alike(m):
    moduledef, leaves = nn.split(m)
    again, same = nn.split(m)
    assert again is moduledef
    for x, y in zip(leaves, same, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    for other in (nn.merge(moduledef, leaves), copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert nn.split(other)[0] is moduledef


@SETTINGS
@given(graphs())
def test_leaves_are_the_unique_boxes_by_kind(m):
    boxes: dict[int, object] = {}
    stack, seen = [m], set()
    while stack:
        x = stack.pop()
        if isinstance(x, nn.Module):
            if id(x) not in seen:
                seen.add(id(x))
                stack += [v for _, v in members(x)]
        elif isinstance(x, (nn.Parameter, nn.Buffer, nn.Generator)):
            boxes[id(x)] = x
    leaves = jax.tree.leaves(m)
    assert len(leaves) == len(boxes)
    trainable = [b for b in boxes.values() if isinstance(b, nn.Parameter) and b.requires_grad]
    frozen = [b for b in boxes.values() if isinstance(b, nn.Parameter) and not b.requires_grad]
    buffers = [b for b in boxes.values() if isinstance(b, nn.Buffer)]
    bounds = np.cumsum([len(trainable), len(frozen), len(buffers)])
    parts = np.split(np.arange(len(leaves)), bounds)
    for part, group in zip(parts, (trainable, frozen, buffers), strict=False):
        assert sorted(leaves[i].shape for i in part) == sorted(b.value.shape for b in group)


@SETTINGS
@given(graphs(), st.data())
def test_a_change_of_one_static_gives_another_module_def_and_back(m, data):
    before = nn.split(m)[0]
    target = data.draw(st.sampled_from(list(m.modules())))
    target.static_new = 7
    assert nn.split(m)[0] != before
    del target.static_new
    assert nn.split(m)[0] is before
    target.training = not target.training
    assert nn.split(m)[0] != before
    target.training = not target.training
    assert nn.split(m)[0] is before


@SETTINGS
@given(graphs(cycles=False))  # torch's state_dict does not end on a cycle either
def test_a_state_dict_loads_into_a_copy(m):
    other = copy.deepcopy(m)
    for p in other.parameters():
        p.value = p.value * 0 + 5
    result = other.load_state_dict(m.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    isomorphic(m, other)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(graphs())
def test_a_trip_through_jit_is_the_same_graph(m):
    isomorphic(m, jax.jit(lambda m: m)(m))
