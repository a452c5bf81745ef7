"""Static attributes of any kind: what compiled code sees of them, and what is said where it cannot see.

The oracle of most tests is eager code, which reads the attributes anew at each call.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import pickle
import threading
import types
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
from statefulnn.core.plan import plan_of

X = jnp.ones(2)


class Reader(nn.Module):
    """y = read(value) * x."""

    def __init__(self, value, read):
        super().__init__()
        self.value = value
        self.read = read

    def forward(self, x):
        return x * self.read(self.value)


class Plain:
    def __init__(self, **members):
        self.__dict__.update(members)


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a):
        self.a = a


class SlottedChild(Slotted):
    __slots__ = ("c",)


class OwnMapping(Mapping):
    def __init__(self, held):
        self._held = held

    def __getitem__(self, key):
        return self._held[key]

    def __iter__(self):
        return iter(self._held)

    def __len__(self):
        return len(self._held)


class Hostile:
    """Whoever asks this object anything runs into an error."""

    def __init__(self, a):
        object.__setattr__(self, "a", a)

    def _refuse(self, *args):
        raise AssertionError("code of the object ran")

    __eq__ = __hash__ = __getattr__ = __bool__ = __len__ = __iter__ = _refuse
    __reduce_ex__ = __copy__ = __deepcopy__ = __setattr__ = __class_getitem__ = _refuse

    def __getattribute__(self, name):
        if name != "__class__":  # which isinstance() asks for
            raise AssertionError("code of the object ran")
        return Hostile


class HostileDict(dict):
    def _refuse(self, *args):
        raise AssertionError("code of the dict ran")

    __iter__ = __len__ = keys = values = items = get = __contains__ = __eq__ = copy = _refuse
    __setitem__ = update = __reduce_ex__ = _refuse


class NamedList(list):
    pass


class HostileList(list):
    def _refuse(self, *args):
        raise AssertionError("code of the list ran")

    __iter__ = __len__ = __eq__ = copy = append = extend = __reduce_ex__ = _refuse


class AttributeDict(dict):
    def __init__(self, **members):
        super().__init__(**members)
        self.__dict__ = self


@dataclasses.dataclass
class Data:
    a: float
    extra: object = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    held: list


Pair = collections.namedtuple("Pair", "a b")


def read_a(value):
    return object.__getattribute__(value, "a")


def set_a(value):
    object.__setattr__(value, "a", 5.0)


def _attribute(value):
    value.a = 5.0


def _item(value):
    value["a"] = 5.0


def item(value):
    return value["a"]


def shared(value):
    value.outer = value.inner = Plain(a=2.0)
    return value


def cyclic():
    value = Plain(a=2.0, others=[])
    value.me = value
    value.others.append(value)
    return value


def proxied(held):
    return Plain(proxy=types.MappingProxyType(held), held=held)


# name -> (what is kept, how forward reads it, how it changes in place); 2 before and 5 afterwards
class Noted(np.ndarray):
    """An array with a note."""

    def __new__(cls, values, note):
        array = np.asarray(values).view(cls)
        array.note = note
        return array

    def __array_finalize__(self, other):
        self.note = getattr(other, "note", None)


CHANGES = {
    "SimpleNamespace": (lambda: types.SimpleNamespace(a=2.0), read_a, _attribute),
    "argparse.Namespace": (lambda: argparse.Namespace(a=2.0), read_a, _attribute),
    "plain object": (lambda: Plain(a=2.0), read_a, _attribute),
    "new attribute": (Plain, lambda v: getattr(v, "a", 2.0), _attribute),
    "deleted attribute": (
        lambda: Plain(a=1, b=2),
        lambda v: 2.0 if hasattr(v, "b") else 5.0,
        lambda v: delattr(v, "b"),
    ),
    "another __dict__": (
        lambda: Plain(a=2.0),
        read_a,
        lambda v: setattr(v, "__dict__", {"a": 5.0}),
    ),
    "another class": (
        lambda: Plain(a=1),
        lambda v: 2.0 if type(v) is Plain else 5.0,
        lambda v: setattr(v, "__class__", type("Other", (Plain,), {})),
    ),
    "slots": (lambda: Slotted(2.0), read_a, _attribute),
    "inherited slots": (lambda: SlottedChild(2.0), read_a, _attribute),
    "a slot that was empty": (
        lambda: Slotted(1.0),
        lambda v: getattr(v, "b", 2.0),
        lambda v: setattr(v, "b", 5.0),
    ),
    "UserDict": (lambda: collections.UserDict(a=2.0), item, _item),
    "UserList": (
        lambda: collections.UserList([2.0]),
        lambda v: v[0],
        lambda v: v.__setitem__(0, 5.0),
    ),
    "ChainMap": (lambda: collections.ChainMap({}, {"a": 2.0}), item, _item),
    "MappingProxyType": (
        lambda: proxied({"a": 2.0}),
        lambda v: v.proxy["a"],
        lambda v: _item(v.held),
    ),
    "a Mapping of one's own": (lambda: OwnMapping({"a": 2.0}), item, lambda v: _item(v._held)),
    "list in objects": (
        lambda: Plain(b=Plain(c=[2.0])),
        lambda v: v.b.c[0],
        lambda v: v.b.c.__setitem__(0, 5.0),
    ),
    "objects in a tuple": (lambda: (1, Plain(a=2.0)), lambda v: v[1].a, lambda v: _attribute(v[1])),
    "object in a list": (lambda: [Plain(a=2.0)], lambda v: v[0].a, lambda v: _attribute(v[0])),
    "list in a namedtuple": (
        lambda: Pair([2.0], 1),
        lambda v: v.a[0],
        lambda v: v.a.__setitem__(0, 5.0),
    ),
    "list in a frozen dataclass": (
        lambda: Frozen([2.0]),
        lambda v: v.held[0],
        lambda v: v.held.__setitem__(0, 5.0),
    ),
    "attribute beside a dataclass's fields": (
        lambda: Data(1.0),
        lambda v: getattr(v, "late", 2.0),
        lambda v: setattr(v, "late", 5.0),
    ),
    "array in an object": (
        lambda: Plain(a=np.asarray([2.0])),
        lambda v: v.a[0],
        lambda v: v.a.__setitem__(0, 5.0),
    ),
    "object array": (
        lambda: np.asarray([[2.0], None], object),
        lambda v: v[0][0],
        lambda v: v[0].__setitem__(0, 5.0),
    ),
    "mask of a masked array": (
        lambda: np.ma.masked_array([2.0, 3.0], [False, True]),
        lambda v: float(v.sum()),
        lambda v: v.mask.__setitem__(1, False),
    ),
    "record array": (
        lambda: np.rec.array([(2.0, 1)], dtype=[("a", float), ("b", int)]),
        lambda v: float(v.a[0]),
        lambda v: v.a.__setitem__(0, 5.0),
    ),
    "attribute of an array": (
        lambda: Noted([1.0], [2.0]),
        lambda v: v.note[0],
        lambda v: v.note.__setitem__(0, 5.0),
    ),
    "bytearray": (lambda: bytearray([2]), lambda v: float(v[0]), lambda v: v.__setitem__(0, 5)),
    "order of an OrderedDict": (
        lambda: collections.OrderedDict(a=2.0, b=5.0),
        lambda v: next(iter(v.values())),
        lambda v: v.move_to_end("a"),
    ),
    "default_factory": (
        lambda: collections.defaultdict(None),
        lambda v: 5.0 if v.default_factory is list else 2.0,
        lambda v: setattr(v, "default_factory", list),
    ),
    "attribute of a list": (
        lambda: NamedList([1]),
        lambda v: getattr(v, "a", 2.0),
        _attribute,
    ),
    "dict that is its own __dict__": (lambda: AttributeDict(a=2.0), lambda v: v.a, _attribute),
    "object that holds itself": (cyclic, lambda v: v.me.others[0].a, _attribute),
    "object that is held twice": (
        lambda: shared(Plain()),
        lambda v: v.outer.a,
        lambda v: _attribute(v.inner),
    ),
    "the get of a dict": (
        lambda: {"a": 2.0}.get,
        lambda v: v("a"),
        lambda v: _item(v.__self__),
    ),
    "bound method of an object": (
        lambda: Slotted(2.0).__getattribute__,
        lambda v: v("a"),
        lambda v: _attribute(v.__self__),
    ),
    "hostile object": (lambda: Hostile(2.0), read_a, set_a),
    "hostile dict": (
        lambda: HostileDict(a=2.0),
        lambda v: dict.__getitem__(v, "a"),
        lambda v: dict.__setitem__(v, "a", 5.0),
    ),
    "hostile list": (
        lambda: HostileList([2.0]),
        lambda v: list.__getitem__(v, 0),
        lambda v: list.__setitem__(v, 0, 5.0),
    ),
    "member moved to the next list": (
        lambda: ([None, None], [None]),
        lambda v: 2.0 if len(v[0]) == 2 else 5.0,
        lambda v: v[1].append(v[0].pop()),
    ),
}


@pytest.mark.parametrize("compiled", [nn.jit, jax.jit], ids=["nn.jit", "jax.jit"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_change_inside_of_an_attribute_is_seen(case, compiled):
    make, read, change = CHANGES[case]
    value = make()
    m = Reader(value, read)
    f = compiled(lambda m, x: m(x))
    for factor in (2.0, 2.0, 5.0, 5.0):
        if factor == 5.0 and m.read is read:
            change(value)
            m.read = functools.partial(read)  # once: a second change could be another one
        np.testing.assert_array_equal(np.asarray(f(m, X)), np.full(2, factor))


@pytest.mark.parametrize(
    "case", [c for c in CHANGES if not c.endswith(("get of a dict", "of an object"))]
)
def test_equal_values_built_anew_share_compiled_code_until_one_changes(case):
    make, read, change = CHANGES[case]
    f = nn.jit(lambda m, x: m(x))
    first, second = Reader(make(), read), Reader(make(), read)
    f(first, X)
    f(second, X)
    traces = 2 if case == "new attribute" else 1  # what is empty stands for itself
    assert f.trace_count == traces
    change(second.value)
    np.testing.assert_array_equal(np.asarray(f(second, X)), [5.0, 5.0])
    np.testing.assert_array_equal(np.asarray(f(first, X)), [2.0, 2.0])
    assert f.trace_count == traces + 1


COPIES = [
    "plain object",
    "slots",
    "UserDict",
    "ChainMap",
    "argparse.Namespace",
    "list in a namedtuple",
    "hostile object",
    "hostile dict",
    "hostile list",
    "dict that is its own __dict__",
    "object that holds itself",
]


@pytest.mark.parametrize("case", COPIES)
def test_a_module_def_holds_a_copy_of_the_value_of_its_time(case):
    make, read, change = CHANGES[case]
    m = Reader(make(), read)
    moduledef, leaves = nn.split(m)
    change(m.value)
    again = nn.merge(moduledef, leaves)
    assert type(again.value) is type(m.value)
    np.testing.assert_array_equal(np.asarray(again(X)), [2.0, 2.0])
    change(again.value)
    np.testing.assert_array_equal(np.asarray(nn.merge(moduledef, leaves)(X)), [2.0, 2.0])


def test_a_copy_holds_itself_where_the_original_does():
    held = nn.merge(*nn.split(Reader(cyclic(), read_a))).value
    assert held.me is held and held.others[0] is held


@pytest.mark.parametrize("case", COPIES)
def test_a_change_by_forward_inside_of_a_trace_raises_and_names_the_attribute(case):
    make, read, change = CHANGES[case]
    m = Reader(make(), lambda value: (change(value), read(value))[1])
    with pytest.raises(nn.StructureChangeError, match="value"):
        nn.jit(m)(X)
    assert read(m.value) == 2.0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_module_share_compiled_code(copied):
    m = Reader(Plain(a=2.0, b=[1, Slotted(3.0)]), read_a)
    f = nn.jit(lambda m, x: m(x))
    f(m, X)
    twin = copied(m)
    f(twin, X)
    assert f.trace_count == 1
    twin.value.b[1].a = 4.0
    f(twin, X)
    assert f.trace_count == 2


def test_a_config_that_many_modules_share_is_watched_once():
    config = types.SimpleNamespace(a=2.0, sizes=[1, 2, 3])
    many = nn.ModuleList([Reader(config, read_a) for _ in range(100)])
    one = nn.ModuleList([Reader(config, read_a)])
    assert len(plan_of(many).watch) == len(plan_of(one).watch)
    f = nn.jit(lambda m, x: sum(c(x) for c in m))
    f(many, X)
    config.a = 5.0
    np.testing.assert_array_equal(np.asarray(f(many, X)), [500.0, 500.0])


def test_an_equal_value_in_the_place_of_another_compiles_nothing():
    config = Plain(a=2.0, sizes=[1000, 2000])
    m = Reader(config, read_a)
    f = nn.jit(m)
    f(X)
    config.a, config.sizes = float("2.0"), [int("1000"), int("2000")]
    f(X)
    config.a = 5.0
    f(X)
    config.a = 2.0
    np.testing.assert_array_equal(np.asarray(f(X)), [2.0, 2.0])
    assert f.trace_count == 2


def test_a_marker_without_content_is_the_same_object_in_clones():
    marker = Plain()
    m = Reader(marker, lambda value: 2.0 if value is marker else 3.0)
    np.testing.assert_array_equal(np.asarray(nn.jit(m)(X)), [2.0, 2.0])


def test_keys_of_dicts_are_the_same_objects_in_clones():
    key = Plain(a=1)
    m = Reader({key: 2.0}, lambda value: value[key])
    np.testing.assert_array_equal(np.asarray(nn.jit(m)(X)), [2.0, 2.0])


def test_a_cached_property_is_no_change():
    class Config(Plain):
        @functools.cached_property
        def double(self):
            return 2 * self.a

    m = Reader(Config(a=2.0), lambda value: value.double)
    f = nn.jit(m)
    np.testing.assert_array_equal(np.asarray(f(X)), [4.0, 4.0])
    assert m.value.double == 4.0
    f(X)
    assert f.trace_count == 1


# --------------------------------------------------------------------------------------------------
# Closures


def closing_over(held):
    return lambda value: held[0]


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: [2.0], lambda v: v.__setitem__(0, 5.0)),
        (lambda: np.asarray([2.0]), lambda v: v.__setitem__(0, 5.0)),
        (lambda: {0: 2.0}, lambda v: v.__setitem__(0, 5.0)),
        (lambda: collections.UserList([2.0]), lambda v: v.__setitem__(0, 5.0)),
    ],
    ids=["list", "array", "dict", "UserList"],
)
@pytest.mark.parametrize(
    "hide",
    [
        closing_over,
        lambda held: lambda value, held=held: held[0],
        lambda held: lambda value, *, held=held: held[0],
        lambda held: functools.partial(lambda held, value: held[0], held),
        lambda held: functools.partial(lambda value, held: held[0], held=held),
    ],
    ids=["closure", "default", "keyword default", "partial", "keyword of a partial"],
)
def test_a_change_of_what_a_function_refers_to_is_seen(hide, make, change):
    held = make()
    m = Reader(None, hide(held))
    f = nn.jit(m)
    f(X)
    f(X)
    assert f.trace_count == 1
    change(held)
    np.testing.assert_array_equal(np.asarray(f(X)), [5.0, 5.0])
    assert f.trace_count == 2


def test_functions_over_equal_lists_differ_since_each_may_change():
    a, b = [2.0], [2.0]
    assert (
        nn.split(Reader(None, closing_over(a)))[0] is not nn.split(Reader(None, closing_over(b)))[0]
    )
    assert nn.split(Reader(None, closing_over(a)))[0] is nn.split(Reader(None, closing_over(a)))[0]


def test_a_function_that_counts_its_traces_in_a_list_is_traced_once():
    traces = []

    def read(value):
        traces.append(1)
        return value

    m = Reader(2.0, read)
    f = nn.jit(m)
    for _ in range(3):
        f(X)
    assert len(traces) == f.trace_count == 1
    traces.append(1)  # a change between two calls is one, whatever it is for
    f(X)
    assert f.trace_count == 2


def test_code_that_is_put_into_a_function_is_seen():
    def read(value):
        return 2.0

    m = Reader(None, read)
    f = nn.jit(m)
    f(X)
    read.__code__ = (lambda value: 5.0).__code__
    np.testing.assert_array_equal(np.asarray(f(X)), [5.0, 5.0])


# --------------------------------------------------------------------------------------------------
# What cannot be seen


def warned(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return caught


def with_lock():
    return Plain(lock=threading.Lock(), a=2.0)


def chain_of(n):
    value = Plain()
    for _ in range(n):
        value = Plain(next=value)
    return value


UNSEEN = {
    "lock": (lambda cls: cls(lock=threading.Lock(), a=2.0), "lock"),
    "generator": (lambda cls: cls(rest=(i for i in range(3)), a=2.0), "generator"),
    "many members": (lambda cls: cls(many=list(range(2000)), a=2.0), "1000"),
    "large array": (lambda cls: cls(data=np.zeros(1 << 21), a=2.0), "large"),
    "deep": (lambda cls: cls(next=chain_of(20), a=2.0), "deeper"),
    "module": (lambda cls: cls(model=nn.Linear(2, 2), a=2.0), "module"),
    "function of a module": (lambda cls: cls(call=nn.Linear(2, 2).forward, a=2.0), "module"),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_an_object_that_cannot_be_looked_into_warns_once_for_its_class(case):
    make, why = UNSEEN[case]
    cls = type("Trainer", (Plain,), {})
    m = Reader(make(cls), read_a)
    f = nn.jit(m)
    (warning,) = warned(lambda: f(X))
    assert warning.filename == __file__
    text = str(warning.message)
    assert all(part in text for part in ("Trainer", "value", "Why:", why, "_unwatched", "Instead:"))
    assert not warned(lambda: nn.jit(Reader(make(cls), read_a))(X))
    assert f.trace_count == 1
    m.value = types.SimpleNamespace(a=5.0)
    np.testing.assert_array_equal(np.asarray(f(X)), [5.0, 5.0])


def test_an_object_that_is_left_alone_is_the_same_object_in_clones():
    trainer = with_lock()

    class Promised(Reader):
        _unwatched = ("value",)

    number = id(trainer)
    m = Promised([trainer], lambda value: 2.0 if id(value[0]) == number else 3.0)
    np.testing.assert_array_equal(np.asarray(nn.jit(m)(X)), [2.0, 2.0])


def test_an_attribute_that_is_unwatched_gives_no_warning():
    class Promised(Reader):
        _unwatched = ("value",)

    value = type("Tokenizer", (Plain,), {})(lock=threading.Lock(), a=2.0)
    assert not warned(lambda: nn.jit(Promised(value, read_a))(X))


def test_an_object_with_a_finaliser_is_not_copied():
    gone = []

    class File(Plain):
        def __del__(self):
            gone.append(self)

    m = Reader(File(a=2.0), read_a)
    caught = warned(lambda: nn.jit(m)(X))
    assert len(caught) == 1
    assert not gone


NAMESPACES = {
    "SimpleNamespace": lambda m: types.SimpleNamespace(a=m),
    "Namespace": lambda m: argparse.Namespace(a=m),
    "UserDict": lambda m: collections.UserDict(a=m),
    "ChainMap": lambda m: collections.ChainMap({}, {"a": m}),
    "dataclass": Data,
    "partial": lambda m: functools.partial(lambda m, x: m, m),
    "nested": lambda m: [types.SimpleNamespace(a=[m])],
    "in a tuple of namespaces": lambda m: (1, types.SimpleNamespace(a={"b": m})),
}
MEMBERS = {"module": lambda: nn.Linear(2, 2), "parameter": lambda: nn.Parameter(jnp.ones(2))}


@pytest.mark.parametrize("hide", NAMESPACES)
@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_hidden_in_a_namespace_is_refused_when_it_is_assigned(hide, member):
    m = Reader(3, read_a)
    with pytest.raises(nn.RegistrationError, match=r"'Reader\.value'"):
        m.value = NAMESPACES[hide](MEMBERS[member]())
    assert m.value == 3


@pytest.mark.parametrize("hide", ["SimpleNamespace", "UserDict", "dataclass"])
@pytest.mark.parametrize("used_before", [False, True])
def test_a_member_put_into_a_namespace_later_is_refused_at_the_next_split(hide, used_before):
    m = Reader(NAMESPACES[hide]([]), read_a)
    if used_before:
        nn.split(m)
    held = m.value["a"] if hide == "UserDict" else m.value.a
    held.append(nn.Linear(2, 2))
    with pytest.raises(nn.RegistrationError, match="value"):
        nn.split(m)


def test_a_member_behind_a_read_only_proxy_is_refused():
    m = Reader(types.MappingProxyType({"a": nn.Linear(2, 2)}), read_a)
    with pytest.raises(nn.RegistrationError, match="value"):
        nn.split(m)


COMPILED = {
    "nn.jit": nn.jit,
    "jax.jit": jax.jit,
    "nn.jit of a method": lambda layer: nn.jit(layer.forward),
    "jax.jit of a method": lambda layer: jax.jit(layer.forward),
    "jax.jit of a lambda": lambda layer: jax.jit(lambda x: layer(x)),
    "partial": lambda layer: functools.partial(nn.jit(layer)),
    "jax.jit of a partial": lambda layer: jax.jit(
        functools.partial(lambda layer, x: layer(x), layer)
    ),
}


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_layer_is_refused_when_it_is_assigned(compiled):
    m = Reader(None, None)
    with pytest.raises(nn.RegistrationError, match=r"self\.layer = layer") as info:
        m.layer = COMPILED[compiled](nn.Linear(2, 2))
    assert "'Reader.layer'" in str(info.value)
    assert not hasattr(m, "layer")


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_layer_in_a_list_is_refused_at_the_next_split(compiled):
    m = Reader(None, None)
    m.layers = [COMPILED[compiled](nn.Linear(2, 2))]
    with pytest.raises(nn.RegistrationError, match=r"self\.layer = layer") as info:
        nn.split(m)
    assert "'Reader.layers'" in str(info.value)


@pytest.mark.parametrize(
    "wrap",
    [lambda m: functools.partial(m, 2.0), lambda m: lambda: m(2.0)],
    ids=["partial", "closure"],
)
def test_a_method_of_the_module_itself_inside_of_a_function_is_refused(wrap):
    # A clone would call the method of the original, with the original's weights.
    m = nn.Linear(2, 2)
    with pytest.raises(nn.RegistrationError, match="call"):
        m.call = wrap(m.forward)
        nn.split(m)
    m.call = m.forward
    nn.split(m)


@pytest.mark.parametrize(
    "function", [jnp.tanh, jax.nn.relu, jax.jit(jnp.sin), jnp.add, np.add.reduce]
)
def test_compiled_functions_of_arrays_are_fine(function):
    assert nn.split(Reader(function, None))[0] is nn.split(Reader(function, None))[0]


# --------------------------------------------------------------------------------------------------
# Keys of random numbers, optimizers


def test_a_typed_key_is_a_static_attribute_by_value():
    def build(seed):
        return Reader(jax.random.key(seed), lambda key: jax.random.normal(key))

    f = nn.jit(lambda m, x: m(x))
    for seed, traces in ((0, 1), (0, 1), (1, 2)):
        m = build(seed)
        np.testing.assert_allclose(np.asarray(f(m, X)), np.asarray(m(X)), rtol=1e-6)
        assert f.trace_count == traces
    other = Reader(jax.random.key(0, impl="rbg"), m.read)
    assert nn.split(other)[0] is not nn.split(build(0))[0]


def test_a_typed_key_in_a_list_is_compared_inside_of_a_trace_too():
    m = Reader([jax.random.key(0)], lambda keys: jax.random.normal(keys[0]))
    np.testing.assert_allclose(np.asarray(nn.jit(m)(X)), np.asarray(m(X)), rtol=1e-6)


LABELS = {"weight": "a", "bias": "b"}
TRANSFORMATIONS = {
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.sgd(0.1), "b": optax.adam(0.1)}, dict(LABELS)
    ),
    "partition": lambda: optax.partition({"a": optax.sgd(0.1), "b": optax.sgd(0.2)}, dict(LABELS)),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "masked": lambda: optax.masked(optax.sgd(0.1), {"weight": True, "bias": False}),
    "add_noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_equal_optimizers_share_compiled_code(name):
    f = nn.jit(lambda opt, grads: opt.step(grads))
    for _ in range(2):
        model = nn.Linear(2, 2)
        opt = nn.Optimizer(model, TRANSFORMATIONS[name]())
        f(opt, {"weight": jnp.ones((2, 2)), "bias": jnp.ones(2)})
    assert f.trace_count == 1


def test_optimizers_of_other_settings_differ():
    model = nn.Linear(2, 2)

    def build(rate, every):
        tx = optax.MultiSteps(optax.sgd(rate), every).gradient_transformation()
        return nn.split(nn.Optimizer(model, tx))[0]

    assert len({build(0.1, 2), build(0.2, 2), build(0.1, 3), build(0.1, 2)}) == 3


# --------------------------------------------------------------------------------------------------
# Classes


@dataclasses.dataclass(frozen=True)
class Scale:
    factor: float

    def __call__(self, module, inputs, output):
        return output * self.factor


def test_hooks_that_are_equal_frozen_dataclasses_share_compiled_code():
    def build(factor):
        m = nn.Identity()
        m.register_forward_hook(Scale(factor))
        return m

    f = nn.jit(lambda m, x: m(x))
    for factor in (2.0, 2.0, 5.0):
        np.testing.assert_array_equal(np.asarray(f(build(factor), X)), np.full(2, factor))
    assert f.trace_count == 2


CONTAINERS_OF_A_CLASS = {
    "list": (lambda: [2.0], lambda v: v.__setitem__(0, 5.0)),
    "dict": (lambda: {0: 2.0}, lambda v: v.__setitem__(0, 5.0)),
    "array": (lambda: np.asarray([2.0]), lambda v: v.__setitem__(0, 5.0)),
    "deque": (lambda: collections.deque([2.0]), lambda v: v.__setitem__(0, 5.0)),
    "list that grows": (lambda: [2.0], lambda v: v.insert(0, 5.0)),
    "list in a tuple": (lambda: ([2.0],), lambda v: v[0].__setitem__(0, 5.0)),
}


@pytest.mark.parametrize("compiled", [nn.jit, jax.jit], ids=["nn.jit", "jax.jit"])
@pytest.mark.parametrize("case", CONTAINERS_OF_A_CLASS)
def test_a_change_inside_of_an_attribute_of_the_class_is_seen(case, compiled):
    make, change = CONTAINERS_OF_A_CLASS[case]

    def forward(self, x):
        return x * np.ravel(self.table[0])[0]

    cls = new_class(table=make(), forward=forward)
    m = nn.Sequential(cls())
    f = compiled(lambda m, x: m(x))
    for factor in (2.0, 2.0, 5.0, 5.0):
        if factor == 5.0 and not hasattr(cls, "changed"):
            change(cls.table)
            cls.changed = True
        np.testing.assert_array_equal(np.asarray(f(m, X)), np.full(2, factor))


def test_a_long_table_of_a_class_is_not_compared_at_each_call():
    cls = new_class(table=list(range(5000)), forward=lambda self, x: x * self.table[2])
    m = cls()
    f = nn.jit(m)
    np.testing.assert_array_equal(np.asarray(f(X)), [2.0, 2.0])
    before = len(plan_of(m).watch)
    cls.table = [*range(10_000)]
    f(X)
    assert len(plan_of(m).watch) == before


def test_a_class_that_collects_its_instances_or_traces_compiles_once():
    def init(self):
        nn.Module.__init__(self)
        self.instances.append(self)

    def forward(self, x):
        self.traces.append(1)
        return x

    cls = new_class(__init__=init, forward=forward, instances=[], traces=[])
    m = cls()
    f = nn.jit(m)
    for _ in range(3):
        f(X)
        cls()
    assert f.trace_count == 1


def new_class(**content):
    def forward(self, x):
        return x * self.scale

    content = {"scale": 2.0, "forward": forward, **content}
    return type("Scaled", (nn.Module,), content)


def five(self, x):
    return x * 5.0


CLASS_CHANGES = {
    "attribute": lambda cls: setattr(cls, "scale", 5.0),
    "forward": lambda cls: setattr(cls, "forward", five),
    "property": lambda cls: setattr(cls, "scale", property(lambda self: 5.0)),
    "code of forward": lambda cls: setattr(cls.forward, "__code__", five.__code__),
    "attribute of the base": lambda cls: setattr(cls.__mro__[1], "scale", 5.0),
    "forward of the base": lambda cls: setattr(cls.__mro__[1], "forward", five),
}


@pytest.mark.parametrize("compiled", [nn.jit, jax.jit], ids=["nn.jit", "jax.jit"])
@pytest.mark.parametrize("change", CLASS_CHANGES)
def test_a_change_of_the_class_is_seen(change, compiled):
    cls = new_class()
    if "base" in change:
        cls = type("Child", (cls,), {})
    m = nn.Sequential(cls())
    f = compiled(lambda m, x: m(x))
    np.testing.assert_array_equal(np.asarray(f(m, X)), [2.0, 2.0])
    CLASS_CHANGES[change](cls)
    np.testing.assert_array_equal(np.asarray(f(m, X)), [5.0, 5.0])
    np.testing.assert_array_equal(np.asarray(f(nn.Sequential(cls()), X)), [5.0, 5.0])


def test_a_replaced_forward_of_a_layer_of_this_package_is_seen(monkeypatch):
    m = nn.Identity()
    f = nn.jit(m)
    f(X)
    monkeypatch.setattr(nn.Identity, "forward", five)
    np.testing.assert_array_equal(np.asarray(f(X)), [5.0, 5.0])
    monkeypatch.undo()
    np.testing.assert_array_equal(np.asarray(f(X)), [1.0, 1.0])
    assert f.trace_count == 2


def test_going_back_to_the_former_class_attribute_compiles_nothing():
    cls = new_class()
    f = nn.jit(cls())
    for scale in (2.0, 5.0, 2.0, 5.0):
        cls.scale = scale
        np.testing.assert_array_equal(np.asarray(f(X)), np.full(2, scale))
    assert f.trace_count == 2


def test_what_python_writes_into_a_class_compiles_nothing():
    cls = new_class()
    m = cls()
    f = nn.jit(m)
    f(X)
    _ = cls.__annotations__
    cls.__doc__ = "Scales."
    copy.copy(m)
    f(X)
    assert f.trace_count == 1


@pytest.mark.parametrize("declared", ["_python_cache", "_unwatched"])
def test_a_class_that_counts_its_instances_may_say_so(declared):
    def build(**declaration):
        def init(self):
            nn.Module.__init__(self)
            type(self).count += 1

        return new_class(__init__=init, count=0, **declaration)

    for cls, traces in ((build(), 2), (build(**{declared: ("count",)}), 1)):
        m = cls()
        f = nn.jit(m)
        f(X)
        cls()
        f(X)
        assert f.trace_count == traces


def test_methods_that_count_traces_in_a_variable_are_traced_once():
    traces = 0

    class Counting(nn.Module):
        def forward(self, x):
            nonlocal traces
            traces += 1
            return x

    f = nn.jit(Counting())
    for _ in range(3):
        f(X)
    assert traces == f.trace_count == 1


# --------------------------------------------------------------------------------------------------
# Threads


def test_threads_that_change_a_config_and_call_see_a_value_of_the_time_of_the_call():
    config = Plain(a=0.0, many={})
    m = Reader(config, read_a)
    f = nn.jit(m)
    errors = []

    def call():
        try:
            for _ in range(40):
                before = config.a
                got = float(f(X)[0])
                assert before <= got <= config.a
        except BaseException as error:
            errors.append(error)

    def change():
        for i in range(200):
            config.many[i % 7] = i
            config.a = float(i // 50)
            config.many.pop((i + 3) % 7, None)

    threads = [threading.Thread(target=t) for t in (call, call, change)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nn.RetraceWarning)
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not errors


def config(**members):
    """Return a class of configurations, whose base has the default of one attribute."""
    base = type("Defaults", (), {"a": 2.0})
    return type("Config", (base,), members)


CLASSES = {
    "default of a base": (config, read_a, lambda cls: setattr(cls.__base__, "a", 5.0)),
    "override of a default": (config, read_a, lambda cls: setattr(cls, "a", 5.0)),
    "list of a class": (
        lambda: config(table=[2.0]),
        lambda v: v.table[0],
        lambda cls: cls.table.__setitem__(0, 5.0),
    ),
    "method": (
        lambda: config(scale=lambda self: 2.0),
        lambda v: v.scale(),
        lambda cls: setattr(cls, "scale", lambda self: 5.0),
    ),
    "property": (
        lambda: config(scale=property(lambda self: 2.0)),
        lambda v: v.scale,
        lambda cls: setattr(cls, "scale", property(lambda self: 5.0)),
    ),
    "slots": (
        lambda: config(__slots__=()),
        read_a,
        lambda cls: setattr(cls, "a", 5.0),
    ),
    "dataclass": (
        lambda: dataclasses.dataclass(config(__annotations__={"n": int}, n=1)),
        read_a,
        lambda cls: setattr(cls, "a", 5.0),
    ),
    "namespace": (
        lambda: type("Options", (argparse.Namespace,), {"a": 2.0}),
        read_a,
        lambda cls: setattr(cls, "a", 5.0),
    ),
}


@pytest.mark.parametrize("where", ["attribute", "static argument", "closure"])
@pytest.mark.parametrize("case", CLASSES)
def test_what_the_class_of_a_configuration_holds_is_watched(case, where):
    make, read, change = CLASSES[case]
    cls = make()
    value = cls()
    if where == "attribute":
        compiled = functools.partial(nn.jit(lambda m, x: m(x)), Reader(value, read))
    elif where == "closure":
        compiled = functools.partial(nn.jit(lambda m, x: m(x)), Reader(0, lambda _: read(value)))
    else:
        f = nn.jit(lambda x, value: x * read(value), static_argnums=1)
        compiled = lambda x: f(x, value)
    np.testing.assert_array_equal(np.asarray(compiled(X)), [2.0, 2.0])
    change(cls)
    np.testing.assert_array_equal(np.asarray(compiled(X)), [5.0, 5.0])


def test_a_class_attribute_that_is_written_without_a_change_compiles_nothing():
    cls = config()
    f, m = nn.jit(lambda m, x: m(x)), Reader(cls(), read_a)
    f(m, X)
    cls.unused = 1
    del cls.unused
    f(m, X)
    assert f.trace_count == 1
