"""Law 10: names, shapes, dtypes and duplicates are checked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Module()
        self.fc1.weight = nn.Parameter(jnp.ones((3, 2)))
        self.fc2 = nn.Module()
        self.fc2.weight = self.fc1.weight
        self.fc2.bias = nn.Parameter(jnp.zeros(3))
        self.register_buffer("steps", jnp.zeros((), jnp.int32))
        self.note = "text"

    def forward(self, x):
        return self.fc1.weight @ x + self.fc2.bias


X = jnp.ones(2)
GOOD = {"fc1.weight": jnp.full((3, 2), 2.0), "fc2.bias": jnp.ones(3)}


def call(params, **kw):
    return nn.functional_call(Net(), params, (X,), **kw)


def fn(params, **kw):
    return nn.functionalize(Net())[0](params, X, **kw)


APIS = {"functional_call": call, "functionalize": fn}


@pytest.mark.parametrize("api", APIS)
def test_right_names_are_used(api):
    np.testing.assert_array_equal(np.asarray(APIS[api](GOOD)), [5.0, 5.0, 5.0])


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    "name",
    [
        "fc1.wieght",
        "weight",
        "fc1",
        "fc1.",
        ".fc1.weight",
        "fc1.weight.data",
        "",
        "nope.w",
        "forward",
        "training",
    ],
)
def test_an_unknown_name_is_an_error_that_shows_it(api, name):
    with pytest.raises(nn.UnknownNameError) as info:
        APIS[api]({**GOOD, name: jnp.ones(3)})
    assert repr(name) in str(info.value) or name in str(info.value)


def test_a_typo_is_answered_with_the_name_that_was_meant():
    with pytest.raises(nn.UnknownNameError, match=r"fc1\.weight"):
        call({"fc1.wieght": jnp.ones((3, 2))})


def test_the_key_error_shows_its_lines_not_their_repr():
    with pytest.raises(KeyError) as info:
        call({"fc1.wieght": jnp.ones((3, 2))})
    assert "\\n" not in str(info.value)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("shape", [(2, 3), (3,), (), (3, 2, 1), (1, 2), (0, 2)])
def test_a_wrong_shape_is_an_error_with_name_and_both_shapes(api, shape):
    with pytest.raises(nn.ShapeError) as info:
        APIS[api]({**GOOD, "fc1.weight": jnp.ones(shape)})
    message = str(info.value)
    assert "fc1.weight" in message or "fc2.weight" in message
    assert str(shape) in message
    assert "(3, 2)" in message


@pytest.mark.parametrize("api", APIS)
def test_swapped_arrays_of_other_shapes_are_an_error(api):
    with pytest.raises(nn.ShapeError):
        APIS[api]({"fc1.weight": GOOD["fc2.bias"], "fc2.bias": GOOD["fc1.weight"]})


@pytest.mark.parametrize("api", APIS)
def test_integers_for_a_float_parameter_are_an_error(api):
    with pytest.raises(nn.DtypeError, match=r"weight.*|int32"):
        APIS[api]({**GOOD, "fc1.weight": jnp.ones((3, 2), jnp.int32)})


@pytest.mark.parametrize(
    "value", ["text", [1.0, 2.0, 3.0], object(), {}], ids=["text", "list", "object", "dict"]
)
def test_a_value_that_is_no_array_is_a_type_error(value):
    with pytest.raises(TypeError):
        call({**GOOD, "fc2.bias": value})


@pytest.mark.parametrize("strict", [False, True])
def test_missing_names_use_the_module_s_own_values_unless_strict(strict):
    given = {"fc2.bias": jnp.ones(3)}
    if strict:
        with pytest.raises(nn.StatefulnnError, match=r"fc1\.weight"):
            call(given, strict=True)
    else:
        np.testing.assert_array_equal(np.asarray(call(given)), [3.0, 3.0, 3.0])


def test_a_tuple_of_dicts_is_merged_and_a_duplicate_is_a_value_error():
    first, second = {"fc1.weight": GOOD["fc1.weight"]}, {"fc2.bias": GOOD["fc2.bias"]}
    np.testing.assert_array_equal(np.asarray(call((first, second))), [5.0, 5.0, 5.0])
    with pytest.raises((ValueError, nn.StatefulnnError), match=r"fc2\.bias"):
        call((GOOD, second))


def test_conflicting_values_for_a_tie_are_a_value_error():
    with pytest.raises((ValueError, nn.StatefulnnError), match="weight"):
        call({"fc1.weight": jnp.ones((3, 2)), "fc2.weight": jnp.zeros((3, 2))})


def test_one_name_of_a_tie_replaces_all():
    np.testing.assert_array_equal(np.asarray(call({"fc2.weight": jnp.zeros((3, 2))})), [0, 0, 0])


def test_the_same_array_under_both_names_of_a_tie_is_fine():
    w = jnp.zeros((3, 2))
    np.testing.assert_array_equal(np.asarray(call({"fc1.weight": w, "fc2.weight": w})), [0, 0, 0])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["fc1.weight", "fc2.weight"])
def test_a_state_dict_may_hold_any_name_of_a_tie(name, strict):
    m = Net()
    given = {name: GOOD["fc1.weight"], "fc2.bias": GOOD["fc2.bias"], "steps": jnp.array(3)}
    assert not any(m.load_state_dict(given, strict=strict))
    np.testing.assert_array_equal(np.asarray(m.fc2.weight), GOOD["fc1.weight"])
    assert m.fc1.weight is m.fc2.weight


@pytest.mark.parametrize("strict", [True, False])
def test_conflicting_values_for_a_tie_in_a_state_dict_are_an_error_that_names_both(strict):
    m = Net()
    given = {**m.state_dict(), "fc2.weight": jnp.zeros((3, 2))}
    with pytest.raises(nn.StateDictError, match=r'"fc1\.weight" and "fc2\.weight"'):
        m.load_state_dict(given, strict=strict)
    np.testing.assert_array_equal(np.asarray(m.fc1.weight), np.ones((3, 2)))


@pytest.mark.parametrize("assign", [True, False])
def test_an_integer_that_the_box_cannot_hold_is_an_error_with_name_and_number(assign):
    m = Net()
    given = {**m.state_dict(), "steps": np.array(2**31)}
    with pytest.raises(nn.StateDictError, match=r'"steps" is 2147483648.*jax_enable_x64'):
        m.load_state_dict(given, assign=assign)
    assert int(m.steps) == 0


@pytest.mark.parametrize("params", [None, 3, [("fc2.bias", X)], "fc2.bias"], ids=repr)
def test_what_is_no_dict_is_a_type_error(params):
    with pytest.raises(TypeError):
        call(params)


def test_what_is_no_module_is_a_type_error_that_says_so():
    for wrong in (lambda x: x, Net, None):
        with pytest.raises(TypeError, match="[Mm]odule"):
            nn.functional_call(wrong, {}, (X,))
        with pytest.raises(TypeError, match="[Mm]odule"):
            nn.functionalize(wrong)


def test_an_unknown_method_is_an_error_that_names_it():
    with pytest.raises((AttributeError, nn.StatefulnnError), match="encode"):
        nn.functional_call(Net(), {}, (X,), method="encode")


def test_names_are_checked_under_jit_as_well():
    with pytest.raises(nn.UnknownNameError, match="nope"):
        jax.jit(lambda p: call(p))({**GOOD, "nope": X})


def test_merge_refuses_leaves_of_the_wrong_count():
    moduledef, leaves = nn.split(Net())
    with pytest.raises((ValueError, nn.StatefulnnError)):
        nn.merge(moduledef, leaves[:-1])


def test_capture_refuses_a_name_that_matches_nothing():
    with pytest.raises(nn.UnknownNameError, match="fc3"):
        nn.capture(Net(), names=["fc3"])(X)


@pytest.mark.parametrize("change", ["extra", "missing", "shape", "integer"])
def test_an_optimizer_step_checks_its_gradients(change):
    import optax

    m = Net()
    opt = nn.Optimizer(m, optax.sgd(0.1))
    grads = {n: jnp.ones_like(p.value) for n, p in m.named_parameters()}
    if change == "extra":
        grads["nope"] = X
    elif change == "missing":
        del grads["fc2.bias"]
    elif change == "shape":
        grads["fc2.bias"] = jnp.ones(4)
    else:
        grads["fc2.bias"] = jnp.ones(3, jnp.int32)
    before = np.asarray(m.fc2.bias)
    with pytest.raises(nn.StatefulnnError):
        opt.step(grads)
    np.testing.assert_array_equal(np.asarray(m.fc2.bias), before)


def test_the_gradient_of_a_module_without_trainable_parameters_is_an_error():
    m = Net().requires_grad_(False)
    with pytest.raises((nn.StatefulnnError, ValueError)):
        nn.grad(lambda m: m(X).sum())(m)


def test_stack_module_state_refuses_models_that_differ():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(jnp.ones(1))

    with pytest.raises((nn.StatefulnnError, ValueError, RuntimeError)):
        nn.stack_module_state([Net(), Other()])
    with pytest.raises((nn.StatefulnnError, ValueError, RuntimeError)):
        nn.stack_module_state([])
