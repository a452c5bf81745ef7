"""Law 5: a traced value that is left in a Python object is found when the trace ends, and taken out.

Honest programs, which take such values out again themselves, are left alone.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.core import Tracer

import statefulnn as nn

X = jnp.ones((4, 2))


@dataclasses.dataclass
class Record:
    values: list = dataclasses.field(default_factory=list)


class Slotted:
    __slots__ = ("value",)


class Plain:
    def __init__(self):
        self.value = None


def append(log, x):
    log.append(x)


def put(log, x):
    log["y"] = x


# An attribute, and how forward leaves a value in it.
LOGS = {
    "list": (list, append),
    "dict": (dict, put),
    "dict that holds None": (lambda: {"y": None}, put),
    "OrderedDict": (collections.OrderedDict, put),
    "defaultdict of lists": (
        lambda: collections.defaultdict(list),
        lambda log, x: log["y"].append(x),
    ),
    "deque": (collections.deque, append),
    "nested lists": (lambda: [[], [[]]], lambda log, x: log[1][0].append(x)),
    "dict of dicts": (lambda: {"a": {}}, lambda log, x: log["a"].update(b=[x])),
    "dataclass": (Record, lambda log, x: log.values.append(x)),
    "a list in a tuple": (lambda: ([],), lambda log, x: log[0].append((1, x))),
    "SimpleNamespace": (
        lambda: types.SimpleNamespace(a=1),
        lambda log, x: setattr(log, "y", x),
    ),
    "UserDict": (collections.UserDict, put),
    "plain object": (Plain, lambda log, x: setattr(log, "value", x)),
    "new attribute of a plain object": (Plain, lambda log, x: setattr(log, "late", [x])),
    "slots": (Slotted, lambda log, x: setattr(log, "value", x)),
    "object in an object": (
        lambda: types.SimpleNamespace(trainer=Plain()),
        lambda log, x: setattr(log.trainer, "value", {"y": (1, x)}),
    ),
    "long list": (lambda: list(range(5000)), append),
}

# Transformations under which the module is found through the closure.
TRACES = {
    "raw jit": lambda f: jax.jit(f)(X),
    "raw grad": lambda f: jax.grad(lambda x: f(x).sum())(X),
    "raw vmap": lambda f: jax.vmap(f)(X),
    "raw scan": lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0, X),
    "eval_shape": lambda f: jax.eval_shape(f, X),
    "grad of another model": lambda f: nn.grad(lambda m: f(m(X)).sum())(nn.Linear(2, 2)),
    "jit of another model": lambda f: nn.jit(lambda m: f(m(X)))(nn.Linear(2, 2)),
}


def shown(log):
    """Return the content of an object as plain values, to compare."""
    if isinstance(log, (Record, Plain, types.SimpleNamespace)):
        return {name: shown(value) for name, value in vars(log).items()}
    if isinstance(log, Slotted):
        return getattr(log, "value", "nothing")
    return log.data if isinstance(log, collections.UserDict) else log


def keeper(make, leave):
    class Keeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.log = make()

        def forward(self, x):
            leave(self.log, x * 2)
            return x * 3

    return Keeper()


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("log", LOGS)
def test_a_value_left_in_an_attribute_raises_and_the_attribute_is_as_it_was(log, trace):
    make, leave = LOGS[log]
    model = keeper(make, leave)
    kept, before = model.log, copy.deepcopy(shown(model.log))
    with pytest.raises(
        nn.errors.TraceLeakError, match="log.*\n.*Why:.*\n.*Instead:.*register_buffer"
    ):
        TRACES[trace](model)
    assert model.log is kept
    assert shown(model.log) == before


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize(
    "trace", ["raw jit", "nn.jit of the model", "nn.jit of a function", "nn.grad"]
)
def test_a_value_left_in_a_container_of_the_class_raises_and_is_taken_out(kind, trace):
    class Keeper(nn.Linear):
        log = kind()

        def forward(self, x):
            (append if kind is list else put)(self.log, x * self.weight[0])
            return super().forward(x)

    calls = {
        "raw jit": lambda m: jax.jit(m)(X),
        "nn.jit of the model": lambda m: nn.jit(m)(X),
        "nn.jit of a function": lambda m: nn.jit(lambda m, x: m(x))(m, X),
        "nn.grad": lambda m: nn.grad(lambda m: m(X).sum())(m),
    }
    model = Keeper(2, 2)
    for _ in range(2):
        with pytest.raises(nn.errors.TraceLeakError, match="'Keeper.log'"):
            calls[trace](model)
        assert Keeper.log == kind()


HOOK_STORES = {
    "dict.update": (dict, lambda s: lambda m, i, o: s.update(f=o)),
    "list.append": (list, lambda s: lambda m, i, o: s.append(o)),
    "dict of lists": (
        lambda: collections.defaultdict(list),
        lambda s: lambda m, i, o: s["f"].append(o),
    ),
    "partial": (dict, lambda s: functools.partial(lambda s, m, i, o: s.update(f=o), s)),
    "default": (dict, lambda s: lambda m, i, o, s=s: s.update(f=o)),
    "bound method": (list, lambda s: s.append),
    "attribute": (Plain, lambda s: lambda m, i, o: setattr(s, "value", o)),
    "slot": (Slotted, lambda s: lambda m, i, o: setattr(s, "value", o)),
}


def traced_values(store):
    if isinstance(store, dict):
        store = list(store.values())
    elif isinstance(store, (Plain, Slotted)):
        store = [getattr(store, "value", None)]
    return [v for v in jax.tree.leaves(list(store)) if isinstance(v, Tracer)]


def silent(hook):
    """Return a hook that leaves the output alone, whatever `hook` returns."""
    return lambda m, i, o: (hook(m, i, o), None)[1]


HOOKED = {
    "nn.jit": lambda m: nn.jit(lambda m, x: m(x))(m, X),
    "nn.jit of the model": lambda m: nn.jit(m)(X),
    "nn.grad": lambda m: nn.grad(lambda m: m(X).sum())(m),
    "nn.vmap": lambda m: nn.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, X),
    "nn.jit of a step with nn.grad": lambda m: nn.jit(lambda m: nn.grad(lambda m: m(X).sum())(m))(
        m
    ),
    "raw jit, argument": lambda m: jax.jit(lambda m, x: m(x))(m, X),
    "raw jit, closure": lambda m: jax.jit(lambda x: m(x))(X),
    "raw grad": lambda m: jax.grad(lambda x: m(x).sum())(X),
    "functionalize": lambda m: jax.jit(nn.functionalize(m)[0])(nn.functionalize(m)[1], X),
}


@pytest.mark.parametrize("call", HOOKED)
@pytest.mark.parametrize("kind", [k for k in HOOK_STORES if k != "bound method"])
def test_a_forward_hook_that_stores_an_output_outside_is_told_of_capture(kind, call):
    make, hook = HOOK_STORES[kind]
    store, model = make(), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].register_forward_hook(silent(hook(store)))
    with pytest.raises(nn.errors.TraceLeakError, match="forward hook[\\s\\S]*Instead:.*nn.capture"):
        HOOKED[call](model)
    assert not traced_values(store)


LATEST = None


def test_a_global_and_a_variable_of_a_closure_are_looked_at_too():
    latest = "nothing"

    def into_closure(module, inputs, out):
        nonlocal latest
        latest = out

    def into_global(module, inputs, out):
        global LATEST
        LATEST = out

    for hook in (into_closure, into_global):
        model = nn.Linear(2, 2)
        model.register_forward_hook(hook)
        with pytest.raises(nn.errors.TraceLeakError, match=hook.__name__):
            nn.jit(model)(X)
    assert latest == "nothing"
    assert LATEST is None


def test_a_callable_object_as_a_hook_is_looked_into():
    class Store:
        def __init__(self):
            self.features = []

        def __call__(self, module, inputs, out):
            self.features.append(out)

    store, model = Store(), nn.Linear(2, 2)
    model.register_forward_hook(store)
    with pytest.raises(nn.errors.TraceLeakError, match="Store"):
        nn.jit(model)(X)
    assert store.features == []


@pytest.mark.parametrize("transform", [nn.jit, jax.jit], ids=["nn.jit", "jax.jit"])
def test_a_backward_hook_that_stores_a_gradient_outside_raises_in_compiled_code(transform):
    grads, model = {}, nn.Linear(2, 2)
    model.register_full_backward_hook(lambda m, gi, go: grads.update(g=go[0]))
    with pytest.raises(nn.errors.TraceLeakError, match="backward hook"):
        transform(lambda x: jax.grad(lambda x: model(x).sum())(x))(X)
    assert grads == {}


def test_a_backward_hook_may_store_a_gradient_that_is_a_value():
    grads, model = {}, nn.Linear(2, 2)
    model.register_full_backward_hook(lambda m, gi, go: grads.update(g=go[0]))
    nn.grad(lambda m: m(X).sum())(model)
    assert (grads["g"] == jnp.ones((4, 2))).all()


def test_eager_hooks_store_what_they_like():
    features, model = {}, nn.Linear(2, 2)
    model.register_forward_hook(lambda m, i, o: features.update(f=o))
    out = model(X)
    assert features["f"] is out


# --------------------------------------------------------------------------------------------------
# Honest programs


def test_a_value_may_go_from_one_hook_to_the_next():
    notes, model = {}, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].register_forward_pre_hook(lambda m, i: notes.update(x=i[0]))
    model[1].register_forward_hook(lambda m, i, o: o + notes.pop("x"))
    expected = model(X)
    for call in (lambda: nn.jit(model)(X), lambda: jax.jit(lambda m, x: m(x))(model, X)):
        assert jnp.allclose(call(), expected)


def test_hooks_may_read_a_value_that_was_there_before_the_call():
    context, model = {}, nn.Linear(2, 2)
    model.register_forward_hook(lambda m, i, o: o * context["scale"])

    def step(m, x, scale):
        context["scale"] = scale
        out = m(x)
        context.clear()
        return out

    for transform in (nn.jit, jax.jit):
        assert jnp.allclose(transform(step)(model, X, 2.0), step(model, X, 2.0))


def test_a_step_may_use_what_a_hook_stored_and_take_it_out_again():
    features, model = {}, nn.Linear(2, 2)
    model.register_forward_hook(lambda m, i, o: features.update(f=o))

    def loss(m, x):
        return m(x).sum() + (features.pop("f") ** 2).sum()

    compiled = nn.jit(nn.grad(loss))(model, X)
    eager = nn.grad(loss)(model, X)
    for name, gradient in eager.items():
        assert jnp.allclose(compiled[name], gradient), name


def test_a_value_of_an_outer_trace_may_stay_for_the_outer_function():
    outer, model = {}, nn.Linear(2, 2)
    model.register_forward_pre_hook(lambda m, i: outer.update(x=i[0]))

    @nn.jit
    def step(m, x):
        nn.grad(lambda m: m(x).sum())(m)
        return outer.pop("x") + 1

    assert (step(model, X) == 2).all()


def test_an_exception_in_the_middle_comes_through_and_nothing_is_left():
    class Stop(Exception):
        pass

    def hook(module, inputs, out):
        features.append(out)
        raise Stop

    features, model = [], nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].register_forward_hook(hook)
    with pytest.raises(Stop):
        nn.jit(model)(X)
    assert features == []


def test_what_was_there_stays_when_a_hook_replaces_it():
    store, model = {"f": "old", "g": 1}, nn.Linear(2, 2)
    model.register_forward_hook(lambda m, i, o: store.update(f=o))
    with pytest.raises(nn.errors.TraceLeakError):
        nn.jit(model)(X)
    assert store == {"f": "old", "g": 1}


def test_looking_runs_no_code_of_the_user():
    class Hostile(dict):
        def __iter__(self):
            raise AssertionError("iterated")

        items = keys = values = __contains__ = __len__ = __getitem__ = __eq__ = __iter__
        __hash__ = None

        def __getattr__(self, name):
            raise AssertionError(name)

    store, model = Hostile(), nn.Linear(2, 2)
    model.register_forward_hook(lambda m, i, o: dict.update(store, f=o))
    with pytest.raises(nn.errors.TraceLeakError):
        nn.jit(model)(X)
    assert dict.__len__(store) == 0


def test_a_trace_looks_at_a_bounded_part_of_what_a_hook_reaches(monkeypatch):
    from statefulnn.core import leaks

    looked_into = []
    real = leaks._looked_into
    monkeypatch.setattr(leaks, "_looked_into", lambda t: looked_into.append(t) or real(t))
    huge = [[i] for i in range(100_000)]
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda m, i, o: huge and None)
    nn.jit(model)(X)
    assert len(looked_into) < 10 * leaks.MOST


def test_a_function_may_return_what_backward_hooks_saw():
    grads, model = {}, nn.Linear(2, 2)
    model.register_full_backward_hook(lambda m, gi, go: grads.update(g=go[0]))

    def step(m, x):
        return nn.grad(lambda m: (m(x) ** 2).sum())(m), dict(grads)

    _, seen = nn.jit(step)(model, X)
    assert jnp.allclose(seen["g"], 2 * model(X), atol=1e-6)
    assert grads == {}
