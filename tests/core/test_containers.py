"""Sequential, ModuleList, ModuleDict, ParameterList, ParameterDict; torch is the oracle."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


def seq(lib, n=4):
    return lib.nn.Sequential(*(lib.nn.Linear(i + 1, i + 2) for i in range(n)))


def shapes(m):
    return [(k, tuple(v.shape)) for k, v in m.state_dict().items()]


@pytest.mark.parametrize(
    "index",
    [0, -1, 3, -4, slice(1, None), slice(None, -1), slice(None, None, 2), np.int64(2), slice(5, 9)],
    ids=repr,
)
def test_sequential_getitem(agree, index):
    def scenario(lib):
        found = seq(lib)[index]
        return found, shapes(found)

    agree(scenario)


@pytest.mark.parametrize("index", [4, -5, 100])
def test_sequential_index_out_of_range(agree, index):
    agree(lambda lib: seq(lib)[index], raises=IndexError)


def test_a_slice_shares_its_modules_with_the_whole(agree):
    def scenario(lib):
        m = seq(lib)
        part = m[1:]
        return part[0] is m[1], part[0].weight is m[1].weight

    agree(scenario)


@pytest.mark.parametrize("index", [0, -1, 2])
def test_sequential_setitem_keeps_the_key(agree, index):
    def scenario(lib):
        m = lib.nn.Sequential(OrderedDict([(n, lib.nn.Linear(1, 1)) for n in "abcd"]))
        m[index] = lib.nn.Linear(2, 2)
        return shapes(m)

    agree(scenario)


@pytest.mark.parametrize("index", [0, -1, 1, slice(1, 3), slice(None, None, 2)], ids=repr)
def test_sequential_delitem_renumbers(agree, index):
    def scenario(lib):
        m = seq(lib)
        del m[index]
        return shapes(m)

    agree(scenario)


def test_named_sequential_keeps_names_and_order(agree):
    def scenario(lib):
        m = lib.nn.Sequential(OrderedDict(b=lib.nn.Linear(1, 2), a=lib.nn.ReLU()))
        return (
            shapes(m),
            [n for n, _ in m.named_children()],
            m.b,
            len(m),
            m(lib.ones(3, 1)).shape[1],
        )

    agree(scenario)


OPERATIONS = {
    "add": lambda lib, m: m + seq(lib, 2),
    "iadd": lambda lib, m: m.__iadd__(seq(lib, 2)),
    "mul": lambda lib, m: m * 2,
    "rmul": lambda lib, m: 2 * m,
    "imul": lambda lib, m: m.__imul__(3),
    "append": lambda lib, m: m.append(lib.nn.ReLU()),
    "extend": lambda lib, m: m.extend([lib.nn.ReLU(), lib.nn.Tanh()]),
    "insert first": lambda lib, m: m.insert(0, lib.nn.ReLU()),
    "insert middle": lambda lib, m: m.insert(2, lib.nn.ReLU()),
    "insert last": lambda lib, m: m.insert(4, lib.nn.ReLU()),
    "insert negative": lambda lib, m: m.insert(-1, lib.nn.ReLU()),
    "pop": lambda lib, m: m.pop(1),
    "pop last": lambda lib, m: m.pop(-1),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_sequential_list_operations(agree, operation):
    def scenario(lib):
        m = seq(lib)
        result = OPERATIONS[operation](lib, m)
        return (
            result is m,
            type(result).__name__,
            [(n, x) for n, x in m.named_children()],
            [(n, x) for n, x in getattr(result, "named_modules", list)()],
        )

    agree(scenario)


@pytest.mark.parametrize(
    "operation",
    [
        lambda lib, m: m.insert(99, lib.nn.ReLU()),
        lambda lib, m: m.insert(-99, lib.nn.ReLU()),
        lambda lib, m: m.append(3),
        lambda lib, m: m.extend([3]),
        lambda lib, m: m * 0,
        lambda lib, m: m * "x",
        lambda lib, m: m + 3,
        lambda lib, m: m.pop(99),
        lambda lib, m: m.__setitem__(99, lib.nn.ReLU()),
        lambda lib, m: m.__setitem__(0, 3),
        lambda lib, m: lib.nn.Sequential(lib.nn.ReLU(), lambda x: x),
    ],
    ids=[
        "insert out of range",
        "insert below range",
        "append a number",
        "extend by a number",
        "times zero",
        "times a string",
        "plus a number",
        "pop out of range",
        "set out of range",
        "set a number",
        "a bare function",
    ],
)
def test_sequential_refusals(agree, operation):
    def scenario(lib):
        m = seq(lib)
        return operation(lib, m), shapes(m)

    try:
        agree(scenario, raises=Exception)
    except AssertionError as error:
        if "torch does not raise" not in str(error):
            raise
        agree(scenario)


def test_sequential_names_lambda_when_given_a_bare_function():
    with pytest.raises(nn.RegistrationError, match=r"nn\.Lambda"):
        nn.Sequential(nn.Linear(1, 1), np.tanh)


def test_sequential_iterates_and_measures(agree):
    def scenario(lib):
        m = seq(lib)
        return list(m), len(m), bool(m), m[0] in list(m), list(reversed(list(m)))

    agree(scenario)


def test_an_empty_sequential_is_the_identity(agree):
    agree(lambda lib: lib.nn.Sequential()(lib.ones(2)))


LIST_OPERATIONS = {
    "append": lambda lib, m: m.append(lib.nn.ReLU()),
    "extend": lambda lib, m: m.extend([lib.nn.ReLU()]),
    "extend by a list of modules": lambda lib, m: m.extend(seq(lib)),
    "insert": lambda lib, m: m.insert(1, lib.nn.ReLU()),
    "iadd": lambda lib, m: m.__iadd__([lib.nn.ReLU()]),
    "add": lambda lib, m: m + [lib.nn.ReLU()],
    "pop": lambda lib, m: m.pop(0),
    "del": lambda lib, m: m.__delitem__(1),
    "del slice": lambda lib, m: m.__delitem__(slice(0, 2)),
    "set": lambda lib, m: m.__setitem__(-1, lib.nn.ReLU()),
    "get slice": lambda lib, m: m[1:],
    "get": lambda lib, m: m[-1],
}


@pytest.mark.parametrize("operation", LIST_OPERATIONS)
def test_module_list_operations(agree, operation):
    def scenario(lib):
        m = lib.nn.ModuleList(lib.nn.Linear(i + 1, 1) for i in range(3))
        result = LIST_OPERATIONS[operation](lib, m)
        return (
            result is m,
            type(result).__name__,
            [(n, x) for n, x in m.named_children()],
            shapes(m),
            shapes(result) if hasattr(result, "state_dict") else None,
        )

    agree(scenario)


@pytest.mark.parametrize(
    "operation",
    [
        lambda lib, m: m.__iadd__(lib.nn.ReLU()),
        lambda lib, m: m.extend(lib.nn.ReLU()),
        lambda lib, m: m.append(3),
        lambda lib, m: m(lib.ones(1)),
        lambda lib, m: m[7],
        lambda lib, m: lib.nn.ModuleList([3]),
    ],
    ids=["iadd a module", "extend by a module", "append a number", "call", "index", "of numbers"],
)
def test_module_list_refusals(agree, operation):
    def scenario(lib):
        return operation(lib, lib.nn.ModuleList([lib.nn.Linear(1, 1)]))

    agree(scenario, raises=Exception)


DICT_OPERATIONS = {
    "keys": lambda lib, m: list(m.keys()),
    "values": lambda lib, m: list(m.values()),
    "items": lambda lib, m: list(m.items()),
    "iterate": lambda lib, m: list(m),
    "contains": lambda lib, m: ("a" in m, "zz" in m),
    "len": lambda lib, m: len(m),
    "set": lambda lib, m: m.__setitem__("c", lib.nn.Tanh()),
    "replace": lambda lib, m: m.__setitem__("a", lib.nn.Tanh()),
    "del": lambda lib, m: m.__delitem__("a"),
    "pop": lambda lib, m: m.pop("a"),
    "clear": lambda lib, m: m.clear(),
    "update": lambda lib, m: m.update({"c": lib.nn.Tanh(), "a": lib.nn.ReLU()}),
    "update from pairs": lambda lib, m: m.update([("c", lib.nn.Tanh())]),
    "update from a ModuleDict": lambda lib, m: m.update(lib.nn.ModuleDict({"c": lib.nn.Tanh()})),
}


@pytest.mark.parametrize("operation", DICT_OPERATIONS)
def test_module_dict_operations(agree, operation):
    def scenario(lib):
        m = lib.nn.ModuleDict({"b": lib.nn.Linear(1, 1), "a": lib.nn.Linear(2, 1)})
        return (
            DICT_OPERATIONS[operation](lib, m),
            [(n, x) for n, x in m.named_children()],
            shapes(m),
        )

    agree(scenario)


@pytest.mark.parametrize(
    "operation",
    [
        lambda lib, m: m["zz"],
        lambda lib, m: m.pop("zz"),
        lambda lib, m: m.__setitem__("c", 3),
        lambda lib, m: m.__setitem__(3, lib.nn.ReLU()),
        lambda lib, m: m.__setitem__("a.b", lib.nn.ReLU()),
        lambda lib, m: m.__setitem__("keys", lib.nn.ReLU()),
        lambda lib, m: m.update(3),
        lambda lib, m: m.update([("a",)]),
        lambda lib, m: m(lib.ones(1)),
    ],
    ids=[
        "missing",
        "pop missing",
        "set a number",
        "number as key",
        "dotted key",
        "method name as key",
        "update by a number",
        "update by short pairs",
        "call",
    ],
)
def test_module_dict_refusals(agree, operation):
    def scenario(lib):
        return operation(lib, lib.nn.ModuleDict({"a": lib.nn.Linear(1, 1)}))

    agree(scenario, raises=Exception)


PLIST_OPERATIONS = {
    "wraps arrays": lambda lib, m: m.append(lib.ones(2)),
    "append a parameter": lambda lib, m: m.append(lib.nn.Parameter(lib.ones(2))),
    "extend": lambda lib, m: m.extend([lib.ones(2), lib.nn.Parameter(lib.ones(3))]),
    "iadd": lambda lib, m: m.__iadd__([lib.ones(2)]),
    "get": lambda lib, m: m[-1],
    "slice": lambda lib, m: m[1:],
    "set": lambda lib, m: m.__setitem__(0, lib.ones(5)),
    "len": lambda lib, m: len(m),
    "iterate": lambda lib, m: list(m),
    "a plain object": lambda lib, m: m.append("text"),
}


@pytest.mark.parametrize("operation", PLIST_OPERATIONS)
def test_parameter_list_operations(agree, operation):
    def scenario(lib):
        m = lib.nn.ParameterList([lib.nn.Parameter(lib.zeros(1)), lib.ones(2)])
        result = PLIST_OPERATIONS[operation](lib, m)
        result = list(result) if isinstance(result, lib.nn.ParameterList) else result
        return result, shapes(m), [p.requires_grad for p in m.parameters()], len(m)

    agree(scenario)


@pytest.mark.parametrize(
    "operation",
    [
        lambda lib, m: m.extend(lib.nn.Parameter(lib.ones(1))),
        lambda lib, m: m[9],
        lambda lib, m: m(lib.ones(1)),
        lambda lib, m: lib.nn.ParameterList(3),
    ],
    ids=["extend by a parameter", "index", "call", "of a number"],
)
def test_parameter_list_refusals(agree, operation):
    def scenario(lib):
        return operation(lib, lib.nn.ParameterList([lib.ones(1)]))

    agree(scenario, raises=Exception)


PDICT_OPERATIONS = {
    "set an array": lambda lib, m: m.__setitem__("c", lib.ones(2)),
    "set a plain object": lambda lib, m: m.__setitem__("c", "text"),
    "keys": lambda lib, m: list(m.keys()),
    "values": lambda lib, m: list(m.values()),
    "items": lambda lib, m: list(m.items()),
    "reversed": lambda lib, m: list(reversed(m)),
    "get": lambda lib, m: (m.get("a"), m.get("zz"), m.get("zz", 3)),
    "pop": lambda lib, m: m.pop("a"),
    "popitem": lambda lib, m: m.popitem(),
    "del": lambda lib, m: m.__delitem__("a"),
    "setdefault there": lambda lib, m: m.setdefault("a", lib.ones(9)),
    "setdefault new": lambda lib, m: m.setdefault("c", lib.ones(9)),
    "clear": lambda lib, m: m.clear(),
    "update": lambda lib, m: m.update({"a": lib.ones(4), "c": lib.ones(3)}),
    "or": lambda lib, m: dict((m | lib.nn.ParameterDict({"c": lib.ones(3)})).items()),
    "ior": lambda lib, m: dict(m.__ior__(lib.nn.ParameterDict({"c": lib.ones(3)})).items()),
    "contains": lambda lib, m: ("a" in m, "zz" in m),
    "len": lambda lib, m: len(m),
    "copy": lambda lib, m: [m.copy()["a"] is m["a"], list(m.copy().keys())],
    "fromkeys": lambda lib, m: [(k, v) for k, v in m.fromkeys(["x", "y"], None).items()],
}


@pytest.mark.parametrize("operation", PDICT_OPERATIONS)
def test_parameter_dict_operations(agree, operation):
    def scenario(lib):
        m = lib.nn.ParameterDict(
            {"b": lib.nn.Parameter(lib.zeros(1)), "a": lib.nn.Parameter(lib.ones(2))}
        )
        return PDICT_OPERATIONS[operation](lib, m), shapes(m)

    agree(scenario)


CONTAINERS = {
    "Sequential": lambda lib: seq(lib),
    "ModuleList": lambda lib: lib.nn.ModuleList([lib.nn.Linear(1, 2), lib.nn.ReLU()]),
    "ModuleDict": lambda lib: lib.nn.ModuleDict({"a": lib.nn.Linear(1, 2), "b": lib.nn.ReLU()}),
    "ParameterList": lambda lib: lib.nn.ParameterList([lib.ones(1), lib.ones(2)]),
    "ParameterDict": lambda lib: lib.nn.ParameterDict({"a": lib.ones(1), "b": lib.ones(2)}),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_deepcopy_and_pickle_are_independent_copies(container):
    lib = SimpleNamespace(nn=nn, ones=lambda *shape: jnp.ones(shape))
    m = CONTAINERS[container](lib)
    for again in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert list(again.state_dict()) == list(m.state_dict())
        for p, q in zip(m.parameters(), again.parameters(), strict=True):
            assert p is not q
            np.testing.assert_array_equal(np.asarray(p), np.asarray(q))
            q.value = q.value + 1
            assert not np.array_equal(np.asarray(p), np.asarray(q))
        assert repr(again) == repr(m)


@pytest.mark.parametrize("container", CONTAINERS)
def test_train_eval_and_apply_work_on_every_container(agree, container):
    def scenario(lib):
        m = CONTAINERS[container](lib)
        seen = []
        m.eval().apply(lambda x: seen.append((type(x).__name__, x.training)))
        return seen

    agree(scenario)


@pytest.mark.parametrize("container", ["Sequential", "ModuleList", "ModuleDict"])
def test_the_repr_of_a_container_is_torch_s(agree, container):
    agree(lambda lib: repr(CONTAINERS[container](lib)).split("\n"))
