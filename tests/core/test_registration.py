"""What happens on assignment, registration, deletion and look-up; torch is the oracle."""

from __future__ import annotations

import pytest

import statefulnn as nn


def two_parameters(lib):
    m = lib.nn.Module()
    m.a = lib.nn.Parameter(lib.zeros(2))
    m.b = lib.nn.Parameter(lib.ones(3))
    m.c = lib.nn.Linear(2, 2)
    m.d = lib.nn.Module()
    return m


def names(m):
    return [n for n, _ in m.named_parameters()], [n for n, _ in m.named_children()]


def test_assigning_a_parameter_registers_it_and_a_plain_array_does_not(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.weight = lib.nn.Parameter(lib.ones(2))
        m.plain = lib.ones(3)
        return list(m._parameters), list(m._buffers), m.plain, dict(m.named_parameters())

    agree(scenario)


@pytest.mark.parametrize("value", ["array", "float", "list", "string"])
def test_replacing_a_parameter_by_something_else_is_a_type_error(agree, value):
    def scenario(lib):
        m = two_parameters(lib)
        m.a = {"array": lib.ones(2), "float": 1.0, "list": [1.0], "string": "x"}[value]

    agree(scenario, raises=TypeError)


def test_a_refused_assignment_leaves_the_parameter_in_place(agree):
    def scenario(lib):
        m = two_parameters(lib)
        before = m.a
        with pytest.raises(TypeError):
            m.a = lib.ones(2)
        return m.a is before, names(m), lib.numpy(m.a)

    agree(scenario)


@pytest.mark.parametrize("name", ["a", "c"])
def test_none_and_back_keeps_the_position(agree, name):
    def scenario(lib):
        m = two_parameters(lib)
        old = getattr(m, name)
        setattr(m, name, None)
        while_none = names(m), getattr(m, name)
        setattr(m, name, old)
        return while_none, names(m)

    agree(scenario)


@pytest.mark.parametrize("name", ["a", "c"])
def test_replacing_keeps_the_position_and_deleting_moves_to_the_end(agree, name):
    def scenario(lib):
        m = two_parameters(lib)
        new = lib.nn.Parameter(lib.zeros(4)) if name == "a" else lib.nn.Linear(3, 3)
        setattr(m, name, new)
        replaced = names(m)
        delattr(m, name)
        deleted = names(m), hasattr(m, name)
        setattr(m, name, new)
        return replaced, deleted, names(m)

    agree(scenario)


def test_replacing_a_module_by_a_plain_value_is_a_type_error(agree):
    def scenario(lib):
        m = two_parameters(lib)
        m.c = 3

    agree(scenario, raises=TypeError)


@pytest.mark.parametrize("register", ["register_buffer", "register_parameter", "add_module"])
@pytest.mark.parametrize("name", [3, None, "", "a.b", "forward", "taken"], ids=repr)
def test_bad_names_raise_what_torch_raises(agree, register, name):
    def scenario(lib):
        m = lib.nn.Module()
        m.taken = 1
        value = {
            "register_buffer": lib.ones(1),
            "register_parameter": lib.nn.Parameter(lib.ones(1)),
            "add_module": lib.nn.Module(),
        }[register]
        getattr(m, register)(name, value)

    agree(scenario, raises=(TypeError, KeyError))


def test_a_name_that_is_not_a_string_is_named_in_the_message():
    m = nn.Module()
    for register in (m.register_buffer, m.register_parameter, m.add_module):
        with pytest.raises(TypeError, match="int"):
            register(3, None)


@pytest.mark.parametrize("first", ["register_buffer", "register_parameter", "add_module"])
@pytest.mark.parametrize("second", ["register_buffer", "register_parameter", "add_module"])
def test_registering_one_name_as_two_kinds_of_thing(agree, first, second):
    def value(lib, register):
        return {
            "register_buffer": lib.ones(1),
            "register_parameter": lib.nn.Parameter(lib.ones(1)),
            "add_module": lib.nn.Module(),
        }[register]

    def scenario(lib):
        m = lib.nn.Module()
        getattr(m, first)("x", value(lib, first))
        getattr(m, second)("x", value(lib, second))
        return list(m._parameters), list(m._buffers), list(m._modules)

    agree(scenario, raises=None if first == second else KeyError)


@pytest.mark.parametrize("value", [None, "array"])
@pytest.mark.parametrize("register", ["register_buffer", "register_parameter"])
def test_registering_the_same_name_again_overwrites(agree, register, value):
    def scenario(lib):
        def made(x):
            return lib.nn.Parameter(x) if register == "register_parameter" else x

        m = lib.nn.Module()
        getattr(m, register)("x", made(lib.zeros(2)))
        getattr(m, register)("x", None if value is None else made(lib.ones(3)))
        return m.x, dict(m.state_dict())

    agree(scenario)


@pytest.mark.parametrize("value", [1.0, "text", [1.0, 2.0], "module"], ids=repr)
def test_a_buffer_must_be_an_array(agree, value):
    def scenario(lib):
        m = lib.nn.Module()
        m.register_buffer("x", lib.nn.Module() if value == "module" else value)

    agree(scenario, raises=TypeError)


@pytest.mark.parametrize("value", ["array", 1.0, "module"])
def test_register_parameter_wants_a_parameter(agree, value):
    def scenario(lib):
        m = lib.nn.Module()
        options = {"array": lib.ones(2), "module": lib.nn.Module()}
        m.register_parameter("x", options.get(value, value))

    agree(scenario, raises=TypeError)


@pytest.mark.parametrize("value", ["array", 1.0, "parameter"])
def test_add_module_wants_a_module(agree, value):
    def scenario(lib):
        m = lib.nn.Module()
        options = {"array": lib.ones(2), "parameter": lib.nn.Parameter(lib.ones(2))}
        m.add_module("x", options.get(value, value))

    agree(scenario, raises=TypeError)


def test_a_none_child_is_kept_and_skipped(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.add_module("nothing", None)
        m.add_module("inner", lib.nn.Linear(1, 1))
        m.register_module("alias", lib.nn.Linear(1, 1))
        return m.nothing, names(m), [n for n, _ in m.named_modules()]

    agree(scenario)


def test_a_buffer_survives_none_and_back_and_keeps_its_persistence(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.register_buffer("kept", lib.zeros(2))
        m.register_buffer("hidden", lib.zeros(2), persistent=False)
        seen = [list(m.state_dict())]
        m.kept = None
        m.hidden = None
        seen.append(list(m.state_dict()))
        m.kept = lib.ones(2)
        m.hidden = lib.ones(2)
        seen += [list(m.state_dict()), sorted(m._buffers), sorted(m._non_persistent_buffers_set)]
        return seen, m.hidden

    agree(scenario)


def test_overwriting_a_buffer_may_flip_its_persistence(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.register_buffer("x", lib.zeros(1), persistent=False)
        first = list(m.state_dict())
        m.register_buffer("x", lib.zeros(1), persistent=True)
        second = list(m.state_dict())
        m.x = lib.nn.Buffer(lib.ones(1), persistent=False)
        return first, second, list(m.state_dict()), m.x

    agree(scenario)


def test_assigning_a_parameter_turns_a_buffer_into_one(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.x = lib.nn.Buffer(lib.zeros(1))
        m.x = lib.nn.Parameter(lib.ones(1))
        return list(m._buffers), list(m._parameters), m.x

    agree(scenario)


def test_assigning_a_buffer_over_a_parameter_name(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.x = lib.nn.Parameter(lib.ones(1))
        m.x = lib.nn.Buffer(lib.zeros(1))

    agree(scenario, raises=TypeError)


def test_deleting_removes_the_buffer_and_its_persistence_mark(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.register_buffer("x", lib.zeros(1), persistent=False)
        del m.x
        gone = hasattr(m, "x"), sorted(m._non_persistent_buffers_set)
        m.register_buffer("x", lib.zeros(1))
        return gone, list(m.state_dict())

    agree(scenario)


def test_assigning_a_list_over_a_buffer_is_a_type_error(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.register_buffer("x", lib.zeros(1))
        m.x = [1.0]

    agree(scenario, raises=TypeError)


def test_a_module_assigned_over_a_parameter_is_a_type_error(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.x = lib.nn.Parameter(lib.ones(1))
        m.x = lib.nn.Linear(1, 1)

    agree(scenario, raises=TypeError)


def test_a_parameter_replaces_a_module(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.x = lib.nn.Linear(1, 1)
        m.x = lib.nn.Parameter(lib.ones(1))
        return list(m._parameters), list(m._modules)

    agree(scenario)


def test_a_plain_attribute_gives_way_to_a_parameter_and_a_module(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.p = m.m = 1
        m.p = lib.nn.Parameter(lib.ones(1))
        m.m = lib.nn.Linear(1, 1)
        return [n in m.__dict__ for n in "pm"], m.p, m.m

    agree(scenario)


def test_a_buffer_assigned_in_a_subclass_whose_register_buffer_lacks_persistent(agree):
    def scenario(lib):
        class Old(lib.nn.Module):
            def register_buffer(self, name, value):
                super().register_buffer(name, value)

        m = Old()
        m.x = lib.nn.Buffer(lib.ones(2))
        return m.x, list(m.state_dict())

    agree(scenario)


@pytest.mark.parametrize("getter", ["get_parameter", "get_buffer", "get_submodule"])
@pytest.mark.parametrize(
    "target", ["", "inner", "inner.weight", "inner.mean", "nope", "inner.nope", "inner.weight.x"]
)
def test_looking_up_by_dotted_name(agree, getter, target):
    def scenario(lib):
        m = lib.nn.Module()
        m.inner = lib.nn.Module()
        m.inner.weight = lib.nn.Parameter(lib.ones(2))
        m.inner.register_buffer("mean", lib.zeros(2))
        found = getattr(m, getter)(target)
        return found is m, found

    works = {"get_parameter": "inner.weight", "get_buffer": "inner.mean"}
    right = (getter == "get_submodule" and target in ("", "inner")) or works.get(getter) == target
    agree(scenario, raises=None if right else AttributeError)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("target", ["inner.fc", "inner.new", "nope.fc", "", "fc"])
def test_set_submodule(agree, target, strict):
    def scenario(lib):
        m = lib.nn.Module()
        m.inner = lib.nn.Module()
        m.inner.fc = lib.nn.Linear(1, 1)
        m.set_submodule(target, lib.nn.Identity(), strict=strict)
        return [(n, c) for n, c in m.named_modules()]

    fails = target in ("nope.fc", "") or (strict and target in ("inner.new", "fc"))
    agree(scenario, raises=(AttributeError, ValueError) if fails else None)


def test_set_submodule_refuses_what_is_no_module(agree):
    def scenario(lib):
        m = lib.nn.Module()
        m.fc = lib.nn.Linear(1, 1)
        m.set_submodule("fc", 3)

    agree(scenario, raises=ValueError)


def test_requires_grad_returns_self_and_leaves_buffers_alone(agree):
    def scenario(lib):
        m = lib.nn.Sequential(lib.nn.Linear(1, 1), lib.nn.BatchNorm1d(1))
        before = [p.requires_grad for p in m.parameters()]
        same = m.requires_grad_(False) is m
        return before, same, [p.requires_grad for p in m.parameters()], len(list(m.buffers()))

    agree(scenario)


@pytest.mark.parametrize("mode", ["x", 1, None], ids=repr)
def test_train_wants_a_bool(agree, mode):
    agree(lambda lib: lib.nn.Linear(1, 1).train(mode), raises=ValueError)


def test_train_and_eval_reach_every_child_and_return_self(agree):
    def scenario(lib):
        m = lib.nn.Sequential(lib.nn.Linear(1, 1), lib.nn.Sequential(lib.nn.Dropout()))
        seen = [[x.training for x in m.modules()]]
        same = m.eval() is m
        seen.append([x.training for x in m.modules()])
        m[1].train()
        seen.append([x.training for x in m.modules()])
        return same, seen, m.train(False) is m, [x.training for x in m.modules()]

    agree(scenario)


def test_call_super_init_reaches_a_mixin_after_module(agree):
    def scenario(lib):
        class Mixin:
            def __init__(self, *args, word="none", **kwargs):
                super().__init__(*args, **kwargs)
                self.word = word

        class Quiet(lib.nn.Module, Mixin):
            pass

        class Loud(lib.nn.Module, Mixin):
            call_super_init = True

        return hasattr(Quiet(), "word"), Loud(word="hello").word

    agree(scenario)


def test_a_missing_attribute_is_an_attribute_error_that_names_class_and_attribute(agree):
    agree(lambda lib: lib.nn.Linear(1, 1).nope, raises=AttributeError)
    with pytest.raises(AttributeError, match=r"'Linear' object has no attribute 'nope'"):
        nn.Linear(1, 1).nope


def test_deleting_a_missing_attribute_is_an_attribute_error(agree):
    def scenario(lib):
        del lib.nn.Linear(1, 1).nope

    agree(scenario, raises=AttributeError)


def test_dir_lists_what_is_registered(agree):
    def scenario(lib):
        m = two_parameters(lib)
        m.register_buffer("e", lib.ones(1))
        return [n in dir(m) for n in ("a", "c", "e", "forward", "nope")]

    agree(scenario)


def test_the_default_forward_is_not_implemented(agree):
    agree(lambda lib: lib.nn.Module()(1), raises=NotImplementedError)


def test_a_property_that_raises_attribute_error_is_not_hidden_as_missing(agree):
    def scenario(lib):
        class Net(lib.nn.Module):
            @property
            def size(self):
                return self.nope

        return Net().size

    agree(scenario, raises=AttributeError)


def test_a_property_with_a_setter_is_called_on_assignment(agree):
    def scenario(lib):
        class Net(lib.nn.Module):
            @property
            def width(self):
                return self._width

            @width.setter
            def width(self, value):
                self._width = 2 * value

        m = Net()
        m.width = 3
        return m.width

    agree(scenario)


@pytest.mark.parametrize("what", ["parameter", "buffer", "module"])
def test_using_a_module_before_super_init_raises_attribute_error(agree, what):
    def scenario(lib):
        class Net(lib.nn.Module):
            def __init__(self):
                value = {
                    "parameter": lib.nn.Parameter(lib.ones(1)),
                    "buffer": lib.nn.Buffer(lib.ones(1)),
                    "module": lib.nn.Linear(1, 1),
                }[what]
                self.x = value

        return Net()

    agree(scenario, raises=AttributeError)


def test_class_annotations_and_slots_of_a_subclass_do_no_harm(agree):
    def scenario(lib):
        class Net(lib.nn.Module):
            width: int
            weight: object

            def __init__(self, width):
                super().__init__()
                self.width = width
                self.weight = lib.nn.Parameter(lib.ones(width))

        return Net(2).weight, Net(3).width

    agree(scenario)
