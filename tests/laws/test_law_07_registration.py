"""Law 7: registration cannot be lost."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jnp.ones(2))

    def forward(self, x):
        return x * self.w


@dataclasses.dataclass
class Config:
    inner: object = None


HIDING = {
    "list": lambda v: [v],
    "tuple": lambda v: (1, v),
    "dict": lambda v: {"a": v},
    "set": lambda v: {v},
    "nested list": lambda v: [[1], [2, [v]]],
    "dict of lists": lambda v: {"a": [1, v]},
    "tuple of dicts": lambda v: ({"a": v},),
    "OrderedDict": lambda v: collections.OrderedDict(a=v),
    "defaultdict": lambda v: collections.defaultdict(list, a=[v]),
    "namedtuple": lambda v: collections.namedtuple("Pair", "a b")(v, 1),
    "dataclass": lambda v: Config(v),
    "lambda closure": lambda v: lambda x: v(x),
    "default argument": lambda v: lambda x, v=v: v(x),
    "partial": lambda v: functools.partial(lambda v, x: v(x), v),
    "list in a closure": lambda v: (lambda many: lambda x: many[0](x))([v]),
}
VALUES = {"module": Leaf, "parameter": lambda: nn.Parameter(jnp.ones(2))}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("hide", HIDING)
def test_a_member_hidden_in_an_attribute_raises_before_it_is_used(hide, value):
    m = nn.Module()
    hidden = HIDING[hide](VALUES[value]())
    with pytest.raises(nn.RegistrationError, match="layers"):
        m.layers = hidden
        nn.split(m)  # a function's closure or an object's field may be found here instead


@pytest.mark.parametrize("hide", ["list", "tuple", "dict", "nested list", "OrderedDict"])
def test_the_refusal_is_at_the_assignment_and_the_module_is_as_before(hide):
    m = nn.Module()
    m.layers = 3
    with pytest.raises(nn.RegistrationError):
        m.layers = HIDING[hide](Leaf())
    assert m.layers == 3
    assert list(m.parameters()) == []


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ([Leaf()], "ModuleList"),
        ({"a": Leaf()}, "ModuleDict"),
        ([nn.Parameter(jnp.ones(1))], "ParameterList"),
    ],
    ids=["modules", "dict of modules", "parameters"],
)
def test_the_message_names_the_container_and_the_opt_out(value, names):
    m = nn.Module()
    with pytest.raises(nn.RegistrationError) as info:
        m.layers = value
    assert names in str(info.value)
    assert "nn.Ref" in str(info.value)


LATER = {
    "split": nn.split,
    "tree.leaves": jax.tree.leaves,
    "nn.jit": lambda m: nn.jit(lambda m, x: x)(m, jnp.ones(1)),
    "jax.jit": lambda m: jax.jit(lambda m, x: x)(m, jnp.ones(1)),
    "functional_call": lambda m: nn.functional_call(m, {}, (jnp.ones(1),)),
    "functionalize": lambda m: nn.functionalize(m),
    "nn.grad": lambda m: nn.grad(lambda m: m.own.value.sum())(m),
}


@pytest.mark.parametrize("how", LATER)
@pytest.mark.parametrize("used_before", [False, True])
def test_a_module_appended_to_a_plain_list_later_raises_at_the_next_split(how, used_before):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Parameter(jnp.ones(1))
            self.layers = []

        def forward(self, x):
            return x

    m = Net()
    if used_before:
        LATER[how](m)
    m.layers.append(Leaf())
    with pytest.raises(nn.RegistrationError, match="layers"):
        LATER[how](m)


USES = {
    "state_dict": lambda m: m.state_dict(),
    "load_state_dict": lambda m: m.load_state_dict({}, strict=False),
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "to": lambda m: m.to(jnp.bfloat16),
    "save": lambda m: nn.save(m, "never written"),
}


@pytest.mark.parametrize(
    "value", [nn.Linear(2, 2), nn.Parameter(jnp.zeros(2))], ids=["module", "parameter"]
)
@pytest.mark.parametrize("use", USES)
def test_what_is_put_into_a_list_later_raises_where_it_would_be_missed(use, value):
    model = nn.Sequential(nn.Linear(2, 2), nn.Module())
    model[1].layers = []
    USES["eval"](model).train()  # an empty list is nothing
    model[1].layers.append(value)
    with pytest.raises(
        nn.RegistrationError, match=r"the list '1.layers'(.|\n)*nn.(ModuleList|ParameterList)"
    ):
        USES[use](model)
    assert model.training and model[0].weight.dtype == jnp.float32


def test_a_module_put_into_a_plain_dict_later_raises_at_the_next_split():
    m = Leaf()
    m.table = {"sizes": [1, 2]}
    nn.split(m)
    m.table["sizes"].append(Leaf())
    with pytest.raises(nn.RegistrationError, match="table"):
        nn.split(m)


FORMS = {
    "array": lambda m: m.w * 0.9,
    "jnp": lambda m: jnp.zeros(2),
    "numpy": lambda m: np.zeros(2, np.float32),
    "float": lambda m: 0.0,
}


@pytest.mark.parametrize("form", FORMS)
def test_an_array_assigned_over_a_parameter_is_a_type_error_with_the_two_right_forms(form):
    m = Leaf()
    box = m.w
    with pytest.raises(TypeError) as info:
        m.w = FORMS[form](m)
    assert m.w is box
    assert isinstance(m.w, nn.Parameter)
    if form != "float":
        message = str(info.value)
        assert "w" in message
        assert re.search(r"\.value\s*=", message)
        assert "nn.Parameter(" in message


def test_augmented_assignment_on_the_attribute_is_not_lost():
    m = Leaf()
    box = m.w
    try:
        m.w += 1.0
    except TypeError:
        np.testing.assert_array_equal(np.asarray(m.w), [1.0, 1.0])
    else:
        np.testing.assert_array_equal(np.asarray(m.w), [2.0, 2.0])
    assert m.w is box


@pytest.mark.parametrize(
    "first", ["parameter", "module", "buffer", "register_buffer", "add_module"]
)
def test_forgotten_super_init_raises_at_the_first_registration(first):
    class Net(nn.Module):
        def __init__(self):
            if first == "parameter":
                self.x = nn.Parameter(jnp.ones(1))
            elif first == "module":
                self.x = Leaf()
            elif first == "buffer":
                self.x = nn.Buffer(jnp.ones(1))
            elif first == "register_buffer":
                self.register_buffer("x", jnp.ones(1))
            else:
                self.add_module("x", Leaf())

    with pytest.raises(nn.UninitializedModuleError, match=r"super\(\).__init__\(\)"):
        Net()


@pytest.mark.parametrize("use", ["call", "parameters", "split", "state_dict", "repr", "train"])
def test_a_module_whose_super_init_was_forgotten_does_not_pass_as_empty(use):
    class Net(nn.Module):
        def __init__(self):
            self.size = 3

        def forward(self, x):
            return x

    actions = {
        "call": lambda m: m(1.0),
        "parameters": lambda m: list(m.parameters()),
        "split": nn.split,
        "state_dict": lambda m: m.state_dict(),
        "repr": repr,
        "train": lambda m: m.train(),
    }
    with pytest.raises(AttributeError):
        m = Net()
        actions[use](m)


def test_nn_ref_is_the_explicit_opt_out():
    class Net(nn.Module):
        def __init__(self, teacher):
            super().__init__()
            self.teacher = nn.Ref(teacher)
            self.shared_weight = nn.Ref(teacher.w)

        def forward(self, x):
            return self.teacher(x) + self.shared_weight

    teacher = Leaf()
    m = Net(teacher)
    assert m.teacher is teacher
    assert m.shared_weight is teacher.w
    assert list(m.parameters()) == []
    assert list(m.state_dict()) == []
    assert list(m.children()) == []
    assert len(jax.tree.leaves(m)) == 1  # yet a compiled call sees what is in it
    f = nn.jit(m)
    np.testing.assert_array_equal(np.asarray(f(jnp.ones(2))), [2.0, 2.0])
    teacher.w.value = jnp.asarray([3.0, 3.0])
    np.testing.assert_array_equal(np.asarray(f(jnp.ones(2))), [6.0, 6.0])


def test_plain_containers_of_plain_things_are_free_attributes():
    m = Leaf()
    m.sizes = [1, 2]
    m.table = {"a": np.ones(2), "b": jnp.ones(2)}
    m.activation = jnp.tanh
    m.fn = lambda x: x + m.__class__.__name__.count("L")
    assert m.sizes == [1, 2]


def test_a_function_that_closes_over_its_own_module_is_not_hidden_state():
    """The module itself is already in the tree: nothing is lost, so either answer but silence."""
    m = Leaf()
    try:
        m.again = lambda x: m.w * x
        out = nn.jit(lambda m, x: m.again(x))(m, jnp.ones(2))
        m.w.value = jnp.asarray([5.0, 5.0])
        out = nn.jit(lambda m, x: m.again(x))(m, jnp.ones(2))
    except nn.StatefulnnError:
        return
    np.testing.assert_array_equal(np.asarray(out), [5.0, 5.0])


def test_non_modules_in_containers_are_refused():
    for make in (
        lambda: nn.ModuleList([3]),
        lambda: nn.ModuleDict({"a": 3}),
        lambda: nn.Sequential(3),
    ):
        with pytest.raises(nn.RegistrationError):
            make()


def test_a_parameter_of_integers_cannot_be_trainable():
    with pytest.raises(RuntimeError, match="requires_grad=False"):
        nn.Parameter(jnp.arange(3))
    p = nn.Parameter(jnp.arange(3), requires_grad=False)
    with pytest.raises(RuntimeError):
        p.requires_grad = True
    assert not p.requires_grad


def test_a_module_class_assigned_instead_of_an_instance_is_not_silently_static():
    m = nn.Module()
    m.kind = Leaf  # torch allows it: a class holds no parameters
    assert m.kind is Leaf
