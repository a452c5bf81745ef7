"""Law 9: static means checked: a change is seen by the next compiled call."""

from __future__ import annotations

import collections
import dataclasses
import enum
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


@dataclasses.dataclass
class Config:
    factor: float = 2.0
    nested: list = dataclasses.field(default_factory=lambda: [2.0])


class Mode(enum.Enum):
    A = 2.0
    B = 5.0


class Holder(nn.Module):
    """y = read(self) * x for whatever plain value sits in `self.value`."""

    def __init__(self, value, read):
        super().__init__()
        self.inner = nn.Module()
        self.inner.value = value
        self.read = read
        self.register_buffer("one", jnp.ones(()))

    def forward(self, x):
        return jnp.asarray(self.read(self.inner.value), x.dtype) * x * self.one


def _set(obj, key, value):
    obj[key] = value


# name -> (value, read, in-place change or replacement, expected factor afterwards); before it is 2.
CASES = {
    "float": (lambda: 2.0, lambda v: v, lambda m: setattr(m, "value", 5.0), 5),
    "int for equal float": (
        lambda: 2.0,
        lambda v: 7.0 if type(v) is int else v,
        lambda m: setattr(m, "value", 2),
        7,
    ),
    "bool for int": (
        lambda: 1,
        lambda v: 5.0 if v is True else 2.0,
        lambda m: setattr(m, "value", True),
        5,
    ),
    "minus zero": (
        lambda: 0.0,
        lambda v: 5.0 if np.signbit(v) else 2.0,
        lambda m: setattr(m, "value", -0.0),
        5,
    ),
    "string": (lambda: "ab", len, lambda m: setattr(m, "value", "abcde"), 5),
    "None": (
        lambda: None,
        lambda v: 2.0 if v is None else v,
        lambda m: setattr(m, "value", 5.0),
        5,
    ),
    "enum": (lambda: Mode.A, lambda v: v.value, lambda m: setattr(m, "value", Mode.B), 5),
    "list append": (lambda: [1.0, 1.0], sum, lambda m: m.value.append(3.0), 5),
    "list item": (lambda: [1.0, 1.0], sum, lambda m: _set(m.value, 0, 4.0), 5),
    "list of lists": (lambda: [[2.0]], lambda v: v[0][0], lambda m: _set(m.value[0], 0, 5.0), 5),
    "dict item": (lambda: {"a": 2.0}, lambda v: v["a"], lambda m: _set(m.value, "a", 5.0), 5),
    "dict key": (
        lambda: {"a": 2.0},
        lambda v: sum(v.values()),
        lambda m: _set(m.value, "b", 3.0),
        5,
    ),
    "dict in a list": (
        lambda: [{"a": 2.0}],
        lambda v: v[0]["a"],
        lambda m: _set(m.value[0], "a", 5.0),
        5,
    ),
    "dict order": (
        lambda: {"a": 2.0, "b": 5.0},
        lambda v: next(iter(v.values())),
        lambda m: _set(m.value, "a", m.value.pop("a")),
        5,
    ),
    "set": (lambda: {2.0}, sum, lambda m: m.value.add(3.0), 5),
    "OrderedDict": (
        lambda: collections.OrderedDict(a=2.0),
        lambda v: v["a"],
        lambda m: _set(m.value, "a", 5.0),
        5,
    ),
    "tuple holding a list": (
        lambda: (1, [2.0]),
        lambda v: v[1][0],
        lambda m: _set(m.value[1], 0, 5.0),
        5,
    ),
    "dataclass field": (Config, lambda v: v.factor, lambda m: setattr(m.value, "factor", 5.0), 5),
    "dataclass, nested list": (
        Config,
        lambda v: v.nested[0],
        lambda m: _set(m.value.nested, 0, 5.0),
        5,
    ),
    "numpy array": (lambda: np.asarray([2.0]), lambda v: v[0], lambda m: _set(m.value, 0, 5.0), 5),
    "numpy array in a list": (
        lambda: [np.asarray([2.0])],
        lambda v: v[0][0],
        lambda m: _set(m.value[0], 0, 5.0),
        5,
    ),
    "numpy array in a dict": (
        lambda: {"a": np.asarray([2.0])},
        lambda v: v["a"][0],
        lambda m: _set(m.value["a"], 0, 5.0),
        5,
    ),
    "numpy array in a dataclass": (
        lambda: Config(nested=[np.asarray([2.0])]),
        lambda v: v.nested[0][0],
        lambda m: _set(m.value.nested[0], 0, 5.0),
        5,
    ),
    "jax array": (
        lambda: jnp.asarray(2.0),
        lambda v: v,
        lambda m: setattr(m, "value", jnp.asarray(5.0)),
        5,
    ),
    "function": (lambda: lambda: 2.0, lambda v: v(), lambda m: setattr(m, "value", lambda: 5.0), 5),
    "deleted": (
        lambda: 2.0,
        lambda v: v,
        lambda m: (delattr(m, "value"), setattr(m, "value", 5.0)),
        5,
    ),
}

HOW = {
    "nn.jit": lambda: nn.jit(lambda m, x: m(x)),
    "jax.jit": lambda: jax.jit(lambda m, x: m(x)),
    "nn.jit, in a dict": lambda: (lambda f: lambda m, x: f({"m": m}, x))(
        nn.jit(lambda d, x: d["m"](x))
    ),
    "jax.jit, in a list": lambda: (lambda f: lambda m, x: f([m], x))(jax.jit(lambda d, x: d[0](x))),
    "nn.jit of the module": lambda: (
        lambda: (lambda fs: lambda m, x: fs.setdefault(id(m), nn.jit(m))(x))({})
    )(),
}
X = jnp.ones(2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["nn.jit", "jax.jit"])
def test_a_changed_static_is_seen(how, case):
    value, read, change, after = CASES[case]
    m = Holder(value(), read)
    f = HOW[how]()
    np.testing.assert_array_equal(np.asarray(f(m, X)), [2.0, 2.0])
    np.testing.assert_array_equal(np.asarray(f(m, X)), [2.0, 2.0])
    change(m.inner)
    np.testing.assert_array_equal(np.asarray(f(m, X)), [after, after])


@pytest.mark.parametrize("how", HOW)
def test_a_change_is_seen_wherever_the_module_sits_among_the_arguments(how):
    m = Holder([2.0], sum)
    f = HOW[how]()
    f(m, X)
    m.inner.value.append(3.0)
    np.testing.assert_array_equal(np.asarray(f(m, X)), [5.0, 5.0])


def double_forward(m):
    m.fc.scale.value = m.fc.scale * 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Module()
        self.fc.scale = nn.Parameter(jnp.asarray(1.0))

    def forward(self, x):
        y = x * self.fc.scale * (2.0 if self.fc.training else 3.0)
        return y + sum(c.size for c in self.children() if hasattr(c, "size"))


class Sized(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size


STRUCTURAL = {
    "eval": (lambda m: m.eval(), 3.0),
    "eval of a child": (lambda m: m.fc.eval(), 3.0),
    "training flag": (lambda m: setattr(m.fc, "training", False), 3.0),
    "new child": (lambda m: m.add_module("extra", Sized(10.0)), 12.0),
    "new attribute of a child": (lambda m: setattr(m.fc, "size", 10.0), 12.0),
    "replaced parameter": (lambda m: setattr(m.fc, "scale", nn.Parameter(jnp.asarray(4.0))), 8.0),
    "value write": (lambda m: setattr(m.fc.scale, "value", jnp.asarray(4.0)), 8.0),
    "forward hook": (lambda m: m.fc.register_forward_hook(lambda *a: None) and None, 2.0),
    "output hook": (lambda m: m.register_forward_hook(lambda mod, a, out: out + 5) and None, 7.0),
    "pre-hook": (lambda m: m.register_forward_pre_hook(lambda mod, a: (a[0] * 4,)) and None, 8.0),
    "set_submodule": (lambda m: m.set_submodule("other", Sized(1.0)), 3.0),
    "registry write": (lambda m: m._modules.__setitem__("other", Sized(1.0)), 3.0),
    "float16 input": (lambda m: None, 2.0),
}


@pytest.mark.parametrize("change", STRUCTURAL)
@pytest.mark.parametrize("how", HOW)
def test_a_structural_change_is_seen(how, change):
    action, factor = STRUCTURAL[change]
    m = Net()
    f = HOW[how]()
    np.testing.assert_array_equal(np.asarray(f(m, X)), [2.0, 2.0])
    action(m)
    np.testing.assert_array_equal(np.asarray(f(m, X)), [factor, factor])


@pytest.mark.parametrize("how", ["nn.jit", "jax.jit"])
def test_a_removed_hook_is_gone(how):
    m = Net()
    handle = m.register_forward_hook(lambda mod, a, out: out + 5)
    f = HOW[how]()
    np.testing.assert_array_equal(np.asarray(f(m, X)), [7.0, 7.0])
    handle.remove()
    np.testing.assert_array_equal(np.asarray(f(m, X)), [2.0, 2.0])


@pytest.mark.parametrize("how", ["nn.jit", "jax.jit"])
def test_a_global_hook_is_seen_and_gone_again(how):
    m = Net()
    f = HOW[how]()
    f(m, X)
    handle = nn.register_module_forward_hook(lambda mod, a, out: out + 5)
    try:
        np.testing.assert_array_equal(np.asarray(f(m, X)), [7.0, 7.0])
    finally:
        handle.remove()
    np.testing.assert_array_equal(np.asarray(f(m, X)), [2.0, 2.0])


def test_a_frozen_parameter_is_seen_by_a_compiled_gradient():
    m = Net()
    f = nn.jit(nn.grad(lambda m, x: m(x).sum()))
    assert list(f(m, X)) == ["fc.scale"]
    extra = nn.Parameter(jnp.asarray(1.0))
    m.extra = extra
    m.fc.scale.requires_grad = False
    assert list(f(m, X)) == ["extra"]


def test_clones_hold_copies_of_mutable_statics():
    m = Holder([2.0], sum)
    seen = []

    @nn.jit
    def f(m, x):
        seen.append(m.inner.value)
        return m(x)

    f(m, X)
    assert seen[0] == [2.0]
    assert seen[0] is not m.inner.value


def test_the_module_def_holds_a_copy_too():
    m = Holder([2.0], sum)
    moduledef, leaves = nn.split(m)
    m.inner.value.append(9.0)
    assert nn.merge(moduledef, leaves).inner.value == [2.0]
    again = nn.merge(moduledef, leaves)
    again.inner.value.append(1.0)
    assert nn.merge(moduledef, leaves).inner.value == [2.0]


def test_plain_objects_compare_by_value():
    class Opaque:
        def __init__(self, factor):
            self.factor = factor

    m = Holder(Opaque(2.0), lambda v: v.factor)
    f = nn.jit(lambda m, x: m(x))
    f(m, X)
    m.inner.value = Opaque(2.0)
    f(m, X)
    assert f.trace_count == 1
    m.inner.value = Opaque(5.0)
    np.testing.assert_array_equal(np.asarray(f(m, X)), [5.0, 5.0])
    m.inner.value.factor = 7.0
    np.testing.assert_array_equal(np.asarray(f(m, X)), [7.0, 7.0])
    assert f.trace_count == 3


def test_objects_that_nobody_can_look_into_compare_by_identity_with_a_warning():
    class Guarded:
        def __init__(self, factor):
            self.lock = threading.Lock()
            self.factor = factor

    m = Holder(Guarded(2.0), lambda v: v.factor)
    f = nn.jit(lambda m, x: m(x))
    with pytest.warns(UserWarning, match="Guarded"):
        f(m, X)
    f(m, X)
    assert f.trace_count == 1
    m.inner.value = Guarded(5.0)
    np.testing.assert_array_equal(np.asarray(f(m, X)), [5.0, 5.0])
    assert f.trace_count == 2


def test_going_back_to_a_former_value_compiles_nothing():
    m = Net()
    f = nn.jit(lambda m, x: m(x))
    for _ in range(3):
        m.train()
        f(m, X)
        m.eval()
        f(m, X)
    assert f.trace_count == 2


@pytest.mark.parametrize("kind", ["nn.jit", "nn.jit of the module"])
def test_an_attribute_that_changes_at_every_call_warns_once_and_is_named(kind):
    class Soft(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = 1.0
            self.scale = nn.Parameter(jnp.ones(()))

        def forward(self, x):
            return x * self.scale / self.temperature

    m = Soft()
    f = (
        nn.jit(m)
        if kind == "nn.jit of the module"
        else (lambda g: lambda x: g(m, x))(nn.jit(lambda m, x: m(x)))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(12):
            m.temperature = 1.0 + i
            np.testing.assert_allclose(np.asarray(f(X)), np.ones(2) / (1.0 + i), rtol=1e-6)
    messages = [str(w.message) for w in caught if issubclass(w.category, nn.RetraceWarning)]
    assert len(messages) == 1
    assert "temperature" in messages[0]
    assert "buffer" in messages[0]


def test_equal_writes_cause_no_work():
    m = Net()
    f = nn.jit(lambda m, x: m(x))
    f(m, X)
    for _ in range(3):
        m.train()
        m.fc.training = True
        m.requires_grad_(True)
        f(m, X)
    assert f.trace_count == 1
