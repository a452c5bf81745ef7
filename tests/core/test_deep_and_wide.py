"""Deep and wide models: nothing recurses per module, and the work grows with the number of modules.

Work is counted in calls of Python and C functions, never in seconds. Python's default limit of recursion
is in force; a model of 2,000 levels is twice as deep.
"""

from __future__ import annotations

import copy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import statefulnn as nn
from statefulnn.core.moduledef import differences

DEPTH = 2000


class Link(nn.Module):
    """A chain: each module has a parameter, a buffer and the rest of the chain."""

    def __init__(self, child=None):
        super().__init__()
        self.weight = nn.Parameter(jnp.ones(1))
        self.register_buffer("seen", jnp.zeros(1))
        self.child = child

    def forward(self, x):
        return x * self.weight


class Renaming(Link):
    """A link that calls its parameter by an old name, and has hooks."""

    def __init__(self, child=None):
        super().__init__(child)
        self.register_state_dict_post_hook(lambda m, state, prefix, local: None)
        self.register_load_state_dict_pre_hook(lambda m, state, prefix, *rest: None)
        self.register_load_state_dict_post_hook(lambda m, keys: None)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "old"] = destination.pop(prefix + "weight")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "old")
        super()._load_from_state_dict(state_dict, prefix, *args)


def chain(depth):
    model = Link()
    for _ in range(depth - 1):
        model = Link(model)
    return model


def nested(depth):
    model = nn.Sequential(nn.Linear(1, 1))
    for _ in range(depth - 1):
        model = nn.Sequential(model)
    return model


def wide(count):
    return nn.Sequential(*(Link() for _ in range(count)))


def last_name(model):
    *_, (name, _) = model.named_modules()
    return name


OPERATIONS = {
    "parameters": lambda m: list(m.parameters()),
    "named_parameters": lambda m: list(m.named_parameters(remove_duplicate=False)),
    "named_buffers": lambda m: list(m.named_buffers()),
    "modules": lambda m: list(m.modules()),
    "named_modules": lambda m: list(m.named_modules(remove_duplicate=False)),
    "eval": lambda m: m.eval().train(),
    "apply": lambda m: m.apply(lambda child: None),
    "requires_grad_": lambda m: m.requires_grad_(False).requires_grad_(True),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "to": lambda m: m.to(jnp.float16),
    "zero_grad": lambda m: m.zero_grad(),
    "state_dict": lambda m: m.state_dict(),
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "repr": repr,
    "deepcopy": copy.deepcopy,
    "split and merge": lambda m: nn.merge(*nn.split(m)),
    "functionalize": nn.functionalize,
    "flatten": lambda m: jax.tree.map(lambda leaf: leaf, m).eval(),
    "names of leaves": lambda m: jax.tree_util.tree_flatten_with_path(m)[1],
    "jax.jit": lambda m: jax.jit(lambda m: jax.tree.leaves(m)[0])(m),
    "get_submodule": lambda m: m.get_submodule(last_name(m)),
    "set_submodule": lambda m: m.set_submodule(last_name(m), nn.Linear(1, 1)),
    "stack_module_state": lambda m: nn.stack_module_state([m, m]),
    "differences": lambda m: differences(nn.split(m)[0], nn.split(m.eval())[0]),
    "Optimizer": lambda m: nn.Optimizer(m, optax.sgd(0.1)),
}

# One array for each leaf goes to JAX and comes back: its work is what is counted there.
LINEAR = [name for name in OPERATIONS if name not in ("to", "to_empty", "stack_module_state")]


@pytest.fixture(autouse=True)
def _default_limit_of_recursion():
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize("build", [chain, nested])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("depth", [1100, pytest.param(DEPTH, marks=pytest.mark.long)])
def test_a_model_deeper_than_the_stack(depth, name, build):
    OPERATIONS[name](build(depth))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: nn.functional_call(m, {"weight": jnp.full(1, 3.0)}, x),
        lambda m, x: nn.capture(m)(x)[0],
        lambda m, x: nn.jit(m)(x),
        lambda m, x: nn.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, x[None])[0],
    ],
    ids=["functional_call", "capture", "jit", "vmap"],
)
def test_a_call_of_a_deep_model_whose_forward_does_not_recurse(call):
    model = chain(DEPTH)
    model.weight.value = jnp.full(1, 3.0)
    np.testing.assert_array_equal(call(model, jnp.full(1, 2.0)), [6.0])


def test_audit_of_a_deep_model_names_what_is_not_used():
    report = nn.audit(chain(DEPTH), jnp.ones(1))
    assert report.used == ["weight"]
    assert len(report.unused) == DEPTH - 1


def calls(f, *args):
    """Count the calls of functions, of Python and of C, while a function runs."""
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        f(*args)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("build", [chain, wide])
@pytest.mark.parametrize("name", LINEAR)
def test_four_times_as_many_modules_are_at_most_five_times_the_work(name, build):
    operation = OPERATIONS[name]
    operation(build(10))  # what is done once, at the first call
    small, large = (calls(operation, build(n)) for n in (100, 400))
    assert large <= 5 * small


def test_a_wide_load_with_names_that_do_not_match_is_linear():
    def load(n):
        return calls(
            lambda m, s: m.load_state_dict(s, strict=False), wide(n), wide(2 * n).state_dict()
        )

    load(10)
    assert load(400) <= 5 * load(100)


def test_guesses_for_unknown_names_are_made_for_the_first_eight():
    fn, params = nn.functionalize(wide(50))
    wrong = {f"{name}_": value for name, value in params.items()}
    with pytest.raises(nn.errors.UnknownNameError) as caught:
        fn({**params, **wrong}, jnp.ones(1))
    message = caught.value.args[0]
    assert message.count("did you mean") == 8
    assert "'0.weight_' (did you mean '0.weight'?)" in message
    assert "and 42 more" in message


# --------------------------------------------------------------------------------------------------
# What is the same as before, and as in torch


def test_deep_hooks_and_overridden_methods_are_called_and_change_the_names():
    model = None
    for level in reversed(range(DEPTH)):
        model = (Link if level % 200 else Renaming)(model)
    state = model.state_dict()
    olds = [name for name in state if name.endswith("old")]
    assert len(olds) == DEPTH // 200
    state[olds[-1]] = jnp.full(1, 7.0)
    assert model.load_state_dict(state) == ([], [])
    assert model.get_parameter(olds[-1].replace("old", "weight")).item() == 7.0


def watched(lib, log):
    """A tree whose modules note what is called on them: hooks and overridden methods, some in between."""

    class Plain(lib.nn.Module):
        def __init__(self, **children):
            super().__init__()
            self.weight = lib.nn.Parameter(lib.ones(1))
            for name, child in children.items():
                setattr(self, name, child)

    class Watched(Plain):
        def __init__(self, label, **children):
            super().__init__(**children)
            self.label = label
            for when in ("state_dict_pre", "state_dict_post"):
                getattr(self, f"register_{when}_hook")(
                    lambda m, *args, when=when: log.append((when, m.label))
                )
            self.register_load_state_dict_pre_hook(
                lambda m, state, prefix, *rest: log.append(("pre", prefix, list(state)))
            )
            self.register_load_state_dict_post_hook(
                lambda m, keys: log.append(("post", m.label, list(keys.missing_keys)))
            )

        def train(self, mode=True):
            log.append(("train", self.label))
            return super().train(mode)

        def apply(self, fn):
            log.append(("apply", self.label))
            return super().apply(fn)

        def __repr__(self):
            return f"<{self.label}\n{super().__repr__()}>"

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            log.append(("save", prefix, list(destination)))
            super()._save_to_state_dict(destination, prefix, keep_vars)

        def _load_from_state_dict(self, state_dict, prefix, *args):
            log.append(("load", prefix, list(state_dict)))
            super()._load_from_state_dict(state_dict, prefix, *args)

    class Stated(Watched):
        def state_dict(self, *args, **kwargs):
            log.append(("state_dict", self.label, kwargs["prefix"]))
            return super().state_dict(*args, **kwargs)

    shared = Watched("shared")
    return Plain(
        a=Plain(x=Watched("x", deep=Plain(w=Stated("w"))), y=shared),
        b=Watched("b", y=shared, z=Plain()),
        none=None,
    )


def test_methods_and_hooks_are_called_as_in_torch_and_in_its_order(agree):
    def scenario(lib):
        log = []
        model = watched(lib, log)
        model.eval()
        model.apply(lambda m: log.append(("applied", getattr(m, "label", None), m.training)))
        state = model.state_dict()
        log.append(list(state))
        state["a.unknown"] = state["b.z.q.r"] = lib.ones(1)
        del state["b.z.weight"]
        keys = model.load_state_dict(state, strict=False)
        return log, list(keys.missing_keys), list(keys.unexpected_keys), repr(model)

    agree(scenario)


def test_what_a_parents_hook_puts_under_a_childs_name_is_loaded(agree):
    def scenario(lib):
        model = lib.nn.Sequential(lib.nn.Sequential(lib.nn.Linear(1, 1)), lib.nn.BatchNorm1d(1))

        def rename(state, prefix, *rest):
            for name in [k for k in state if k.startswith(f"{prefix}old.")]:
                state[name.replace("old.", "0.0.")] = state.pop(name)

        model._register_load_state_dict_pre_hook(rename)
        state = {k.replace("0.0.", "old."): v + 1 for k, v in model.state_dict().items()}
        return list(model.load_state_dict(state)), model.state_dict()

    def same_start(lib):
        out = scenario(lib)
        return out[0], [(name, tuple(v.shape)) for name, v in out[1].items()]

    agree(same_start)


def test_unexpected_names_come_in_the_order_of_the_state_dict(agree):
    def scenario(lib):
        model = lib.nn.Sequential(lib.nn.Linear(1, 1), lib.nn.Sequential(lib.nn.ReLU()))
        names = [
            "1.0.b",
            "0.x",
            "z",
            "0-1.w",
            "0.weight.y",
            "1",
            "a.b.c",
            "0.",
            "1.0.a",
            "y.",
            "0/0",
        ]
        state = {**model.state_dict(), **{name: lib.ones(1) for name in names}}
        return model.load_state_dict(state, strict=False).unexpected_keys

    agree(scenario)


def test_a_name_that_is_no_text_is_refused_with_the_reason():
    with pytest.raises(TypeError, match=r"the key 0 of type int\n  Why: .*\n  Instead: "):
        nn.Linear(1, 1).load_state_dict({0: jnp.ones(1)})
    with pytest.raises(AttributeError):
        torch.nn.Linear(1, 1).load_state_dict({0: torch.ones(1)})


# --------------------------------------------------------------------------------------------------
# Cycles


def test_a_cycle_of_modules_ends_everywhere():
    a, b = Link(), Link()
    a.child, b.child = b, a
    assert not a.eval().training and not b.training
    assert list(a.state_dict()) == ["weight", "seen", "child.weight", "child.seen"]
    assert repr(a) == "Link(\n  (child): Link(\n    (child): ...\n  )\n)"
    applied = []
    a.apply(applied.append)
    assert applied == [b, a]

    state = {name: value + 1 for name, value in a.state_dict().items()}
    assert a.load_state_dict(state) == ([], [])
    assert a.weight.item() == b.weight.item() == 2
    twin = copy.deepcopy(a)
    assert twin.child.child is twin and twin.child is not b
    assert nn.merge(*nn.split(a)).child.child.weight.item() == 2


def test_a_cycle_through_modules_with_methods_of_their_own_ends():
    log = []

    class Own(Link):
        def train(self, mode=True):
            log.append(mode)
            return super().train(mode)

        def state_dict(self, *args, **kwargs):
            return super().state_dict(*args, **kwargs)

        def __repr__(self):
            return f"own {super().__repr__()}"

    a, b = Own(), Own()
    a.child, b.child = nn.ModuleList([b]), nn.ModuleList([a])
    a.eval()
    assert log == [False, False]
    assert list(a.state_dict()) == ["weight", "seen", "child.0.weight", "child.0.seen"]
    assert repr(a).count("...") == 1
    a.train()  # nothing of the first walk is left behind
    assert log == [False, False, True, True] and b.training


def test_a_method_of_its_own_may_set_another_mode_below():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Sequential(nn.Dropout()))
            self.head = nn.Dropout()

        def train(self, mode=True):
            super().train(mode)
            self.body.train(False)
            return self

    model = nn.Sequential(nn.Sequential(Frozen())).train()
    assert [m.training for m in model.modules()] == [True, True, True, False, False, False, True]


def test_a_walk_that_failed_leaves_nothing_behind():
    class Own(Link):
        def train(self, mode=True):
            return super().train(mode)

    a, b = Own(), Own()
    a.child, b.child = b, a

    def fail(module):
        raise KeyError("on purpose")

    for _ in range(2):
        with pytest.raises(KeyError, match="on purpose"):
            a.apply(fail)
    assert not a.eval().child.training


# --------------------------------------------------------------------------------------------------
# Copies


def test_a_copy_keeps_ties_shared_modules_references_and_copies_states_once():
    states = []

    class Stated(Link):
        def __getstate__(self):
            states.append(self)
            return super().__getstate__()

    shared = Stated()
    model = nn.Sequential(Stated(shared), Stated(shared))
    model[1].weight = model[0].weight
    model.watched = nn.Ref(nn.Linear(1, 1))
    twin, listed = copy.deepcopy((model, [model[1], shared]))
    assert twin[0].child is twin[1].child is listed[1] and listed[0] is twin[1]
    assert twin[0].weight is twin[1].weight and twin[0].weight is not model[0].weight
    assert twin.watched is not model.watched
    assert len(states) == 3 and set(states) == {model[0], model[1], shared}


def test_classes_that_say_how_they_are_copied_are_asked():
    class Reduced(Link):
        def __reduce__(self):
            return Reduced, (self.child,)

    class Copied(Link):
        def __deepcopy__(self, memo):
            return self

    class Selective(Link):
        def __getstate__(self):
            return {**super().__getstate__(), "_modules": {}}

    class Refusing(Link):
        def __getstate__(self):
            raise RuntimeError("never asked")

    inner = Link()
    model = nn.Sequential(Reduced(inner), Copied(), Selective(Refusing()), Link(inner))
    model[0].weight.value = jnp.zeros(1)
    twin = copy.deepcopy(model)
    assert twin[0].weight.item() == 1.0  # made anew
    assert twin[0].child is twin[3].child and twin[0].child is not inner
    assert twin[1] is model[1]
    assert dict(twin[2].named_children()) == {}
