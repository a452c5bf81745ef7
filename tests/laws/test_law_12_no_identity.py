"""Law 12: the static half does not depend on object identity; models die by reference count."""

from __future__ import annotations

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Block(nn.Module):
    def __init__(self, act, n=2):
        super().__init__()
        self.w = nn.Parameter(jnp.ones(n))
        self.act = act

    def forward(self, x):
        return self.act(x * self.w)


class Net(nn.Module):
    def __init__(self, value=1.0):
        super().__init__()
        self.value = value
        self.block = Block(lambda x: jnp.tanh(x) + 1)
        self.register_buffer("count", jnp.zeros(()))

    def forward(self, x):
        return self.block(x) * 2


X = jnp.ones(2)


def counted_jax_jit():
    traces = []

    @jax.jit
    def f(m, x):
        traces.append(1)
        return m(x)

    return f, lambda: len(traces)


def counted_nn_jit():
    f = nn.jit(lambda m, x: m(x))
    return f, lambda: f.trace_count


BOTH = pytest.mark.parametrize("counted", [counted_jax_jit, counted_nn_jit])


@BOTH
def test_a_rebuilt_equal_model_hits_the_cache(counted):
    f, count = counted()
    for _ in range(4):
        f(Net(), X)
    assert count() == 1


@BOTH
def test_value_writes_and_mode_switches_back_hit_the_cache(counted):
    f, count = counted()
    m = Net()
    f(m, X)
    m.block.w.value = m.block.w * 2
    f(m, X)
    m.eval()
    f(m, X)
    m.train()
    f(m, X)
    assert count() == 2


@BOTH
def test_a_copy_hits_the_cache(counted):
    import copy

    f, count = counted()
    m = Net()
    f(m, X)
    f(copy.deepcopy(m), X)
    f(jax.tree.map(lambda a: a + 1, m), X)
    f(nn.merge(*nn.split(m)), X)
    assert count() == 1


def scaled_by(k):
    return lambda x: x * k


def default_k(k):
    def f(x, k=k):
        return x * k

    return f


@BOTH
@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (scaled_by, True),
        (default_k, True),
        (lambda k: functools.partial(jnp.multiply, jnp.float32(k)), True),
    ],
    ids=["closure", "default", "partial"],
)
def test_functions_compare_by_code_and_captured_values(counted, make, factor):
    f, count = counted()
    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(f(Block(make(2.0)), X)), [2.0, 2.0])
    same = count()
    np.testing.assert_array_equal(np.asarray(f(Block(make(3.0)), X)), [3.0, 3.0])
    assert same == 1
    assert count() == 2


def test_functions_with_other_code_differ():
    a, b = Block(lambda x: x + 1), Block(lambda x: x + 2)
    assert nn.split(a)[0] != nn.split(b)[0]


def test_functions_of_other_globals_differ():
    code = "lambda x: x * K"
    a = eval(code, {"K": 2.0})
    b = eval(code, {"K": 3.0})
    f = nn.jit(lambda m, x: m(x))
    np.testing.assert_array_equal(np.asarray(f(Block(a), X)), [2.0, 2.0])
    np.testing.assert_array_equal(np.asarray(f(Block(b), X)), [3.0, 3.0])


def test_equal_module_defs_are_one_object():
    a, b = nn.split(Net())[0], nn.split(Net())[0]
    assert a is b
    assert a == b
    assert hash(a) == hash(b)


VALUES = [
    1,
    True,
    1.0,
    0.0,
    -0.0,
    0,
    False,
    None,
    "1",
    (1,),
    [1],
    {1},
    frozenset([1]),
    np.float32(1),
    np.float64(1),
    1 + 0j,
    b"1",
    {1: 1},
    {"1": 1},
    np.asarray(1),
    np.asarray([1]),
    np.asarray([1.0]),
    (1.0,),
    (True,),
    [True],
]


@pytest.mark.parametrize(
    "i", range(len(VALUES)), ids=lambda i: f"{type(VALUES[i]).__name__} {VALUES[i]!r}"
)
def test_values_that_python_calls_equal_differ_as_statics(i):
    mine = nn.split(Net(VALUES[i]))[0]
    for j, other in enumerate(VALUES):
        if j != i:
            assert nn.split(Net(other))[0] != mine, (VALUES[i], other)
    assert nn.split(Net(VALUES[i]))[0] is mine


@pytest.mark.parametrize(
    "make",
    [
        lambda: float("nan"),
        lambda: [1, [2, {"a": (3,)}]],
        lambda: np.arange(5),
        lambda: np.asarray([np.nan, 1.0]),
        lambda: {"b": 1, "a": np.zeros(2)},
        lambda: jnp.arange(3),
        lambda: jnp.float32,
        lambda: np.dtype("float32"),
        lambda: slice(1, None, 2),
        lambda: range(3),
        lambda: ...,
        lambda: functools.partial(jnp.sum, axis=0),
        lambda: lambda x: x,
        lambda: {1, 2, 3},
        lambda: nn.Module,
        lambda: jnp.tanh,
        lambda: "text" * 3,
        lambda: 10**30,
    ],
    ids=[
        "nan",
        "nested",
        "numpy",
        "numpy nan",
        "dict",
        "jax array",
        "type",
        "dtype",
        "slice",
        "range",
        "ellipsis",
        "partial",
        "lambda",
        "set",
        "class",
        "jnp function",
        "string",
        "big int",
    ],
)
def test_an_equal_static_built_anew_gives_the_same_module_def(make):
    assert nn.split(Net(make()))[0] is nn.split(Net(make()))[0]


def test_models_of_other_classes_with_the_same_content_differ():
    class Twin(Net):
        pass

    assert nn.split(Twin())[0] != nn.split(Net())[0]


def test_names_order_and_kind_are_part_of_the_structure():
    def build(*names, buffer=False, grad=True):
        m = nn.Module()
        for n in names:
            if buffer:
                m.register_buffer(n, jnp.ones(1))
            else:
                m.register_parameter(n, nn.Parameter(jnp.ones(1), requires_grad=grad))
        return nn.split(m)[0]

    defs = [
        build("a", "b"),
        build("b", "a"),
        build("a", "c"),
        build("a", "b", buffer=True),
        build("a", "b", grad=False),
    ]
    assert len(set(defs)) == 5


def test_a_module_def_does_not_keep_its_model_alive():
    m = Net()
    moduledef = nn.split(m)[0]
    ref = weakref.ref(m)
    gc.disable()
    try:
        del m
        assert ref() is None
    finally:
        gc.enable()
    assert moduledef is nn.split(Net())[0]


USES = {
    "call": lambda m: m(X),
    "nn.jit": lambda m: nn.jit(lambda m, x: m(x))(m, X),
    "jax.jit": lambda m: jax.jit(lambda m, x: m(x))(m, X),
    "nn.grad": lambda m: nn.grad(lambda m, x: m(x).sum())(m, X),
    "functional_call": lambda m: nn.functional_call(m, {}, (X,)),
    "functionalize": lambda m: nn.functionalize(m)[1],
    "split": nn.split,
    "state_dict": lambda m: m.state_dict(),
    "tree.map": lambda m: jax.tree.map(lambda x: x, m),
    "failed write": lambda m: (
        pytest.raises(nn.StatefulnnError, jax.jit(lambda m: m.eval()), m) and None
    ),
}


@pytest.mark.parametrize("use", USES)
def test_a_model_dies_by_reference_count(use):
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Net()
            self.b = self.a

        def forward(self, x):
            return self.b(x)

    m = Parent()
    gc.collect()
    gc.disable()
    try:
        USES[use](m)
        refs = weakref.ref(m), weakref.ref(m.a), weakref.ref(m.a.block.w.value)
        del m
        if use not in ("failed write",):  # a traceback may hold frames until it is dropped
            assert [r() is None for r in refs[:2]] == [True, True]
    finally:
        gc.enable()


def test_clones_of_a_thousand_compiled_calls_leave_no_arrays_behind():
    m = Net()
    f = nn.jit(lambda m, x: m(x))
    g = jax.jit(lambda m, x: (m, m(x)))
    f(m, X)
    g(m, X)
    gc.collect()
    gc.disable()
    try:
        before = len(jax.live_arrays())
        for _ in range(500):
            f(m, X)
            m2, _ = g(m, X)
            m2.block
        del m2
        assert len(jax.live_arrays()) <= before + 8
    finally:
        gc.enable()


def test_the_cache_of_module_defs_does_not_grow_with_equal_models():
    f = nn.jit(lambda m, x: m(x))
    for i in range(20):
        f(Net(value=i % 2), X)
    assert f.trace_count == 2
