"""only= in nn.grad, nn.value_and_grad and nn.Optimizer: a part of the parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import statefulnn as nn
from tests.optim.twins import gradients, names, pair, same

X = jnp.asarray(np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3))


def loss_fn(model, x):
    return (model(x) ** 2).mean()


FILTERS = {
    "pattern": (lambda m: "2.*", ["2.weight", "2.bias"]),
    "alternatives": (lambda m: "2.*|0.bias", ["0.bias", "2.weight", "2.bias"]),
    "module": (lambda m: m[2], ["2.weight", "2.bias"]),
    "parameter": (lambda m: m[2].weight, ["2.weight"]),
    "several": (lambda m: [m[1], "0.bias", m[2].bias], ["0.bias", "1.weight", "1.bias", "2.bias"]),
    "torch's iterator": (lambda m: m[2].parameters(), ["2.weight", "2.bias"]),
    "function": (lambda m: lambda name: name.endswith("bias"), ["0.bias", "1.bias", "2.bias"]),
    "the module itself": (lambda m: m, None),
}


@pytest.mark.parametrize("kind", FILTERS)
def test_gradients_of_a_part_are_those_of_the_whole(kind):
    model, _ = pair()
    make, expected = FILTERS[kind]
    whole = nn.grad(loss_fn)(model, X)
    of_part = nn.value_and_grad(loss_fn, only=make(model))
    for _ in range(2):  # an iterator serves more than one call
        loss, part = of_part(model, X)
    assert list(part) == (expected or list(whole))
    np.testing.assert_allclose(loss, loss_fn(model, X), rtol=1e-6)
    for name, gradient in part.items():
        np.testing.assert_allclose(gradient, whole[name], rtol=1e-6, err_msg=name)
    assert list(nn.Optimizer(model, optax.sgd(0.1), only=make(model)).groups["*"]) == list(part)


def test_a_part_is_chosen_in_compiled_code_by_name_and_by_module():
    model, _ = pair()
    whole = nn.grad(loss_fn)(model, X)
    for f in (
        nn.grad(loss_fn, only="2.*"),
        lambda model, x: nn.grad(loss_fn, only=model[2])(model, x),
        nn.grad(only="2.*")(loss_fn),
    ):
        part = nn.jit(f)(model, X)
        assert sorted(part) == ["2.bias", "2.weight"]
        np.testing.assert_allclose(part["2.weight"], whole["2.weight"], rtol=1e-6)


def test_no_gradient_is_computed_for_the_others():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))

    def products(only):
        text = str(jax.make_jaxpr(lambda m: nn.grad(loss_fn, only=only)(m, X))(model))
        return text.count("dot_general")

    assert products(None) == 5  # two forward; of each weight; of the hidden layer
    assert products("1.*") == 3


def test_a_name_may_be_that_of_any_of_several_modules():
    first, second = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 1))
    f = nn.grad(lambda a, b, x: b(a(x)).sum(), argnums=(0, 1), only="0.weight")
    assert [list(g) for g in f(first, second, X)] == [[], ["0.weight"]]
    gradient, of_x = nn.grad(lambda a, x: a(x).sum(), (0, 1), only="bias")(first, X)
    assert (list(gradient), of_x.shape) == (["bias"], X.shape)


def test_a_tied_parameter_is_chosen_by_any_of_its_names():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert list(nn.grad(loss_fn, only="1.*")(model, X)) == ["0.weight"]
    opt = nn.Optimizer(model, {"1.*": optax.sgd(0.1)}, only="1.weight")
    assert opt.groups == {"1.*": ("0.weight",)}


def frozen():
    model, _ = pair()
    model[2].requires_grad_(False)
    return model


MISTAKES = {
    "no such name": (pair()[0], "head.*", nn.UnknownNameError, "names are '0.weight'"),
    "a near name": (pair()[0], "2.wieght", nn.UnknownNameError, "did you mean '2.weight'"),
    "a module's name": (pair()[0], "2", nn.UnknownNameError, r"did you mean '2\.\*'"),
    "frozen": (frozen(), "2.*", nn.UnknownNameError, "'2.weight', '2.bias', all frozen"),
    "another model's": (pair()[0], pair()[0][2], nn.UnknownNameError, "a Linear that is not in"),
    "a function": (pair()[0], lambda name: False, nn.UnknownNameError, "chooses nothing"),
    "a number": (pair()[0], 3, TypeError, "filter of type int"),
    "a list of numbers": (pair()[0], [3], TypeError, "3 in a filter"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_chooses_nothing_is_refused(kind):
    model, only, error, words = MISTAKES[kind]
    with pytest.raises(error, match=words):
        nn.grad(loss_fn, only=only)(model, X)
    with pytest.raises(error, match=words):
        nn.Optimizer(model, optax.sgd(0.1), only=only)


def test_only_without_a_module_is_refused():
    with pytest.raises(TypeError, match="differentiates by no module"):
        nn.grad(lambda x: x.sum(), only="head.*")(X)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nn.jit"])
def test_an_optimizer_of_a_part_is_torch_s_of_its_parameters(compiled):
    ours, theirs = pair()
    opt = nn.Optimizer(ours, optax.adamw(1e-2, weight_decay=0.1), only=ours[2], clip=0.5)
    torch_opt = torch.optim.AdamW(theirs[2].parameters(), lr=1e-2, weight_decay=0.1)
    step = nn.jit(lambda opt, grads: opt.step(grads)) if compiled else nn.Optimizer.step
    for i in range(3):
        grads = gradients(theirs, i)
        torch.nn.utils.clip_grad_norm_(theirs[2].parameters(), 0.5)
        torch_opt.step()
        # Those of other parameters are ignored: two optimizers may share the gradients of one loss.
        step(opt, grads if i else {n: grads[n] for n in opt.groups["*"]})
    same(ours, theirs)
    assert sorted(opt.state_dict()) == [
        "count",
        *("mu.2.bias", "mu.2.weight", "nu.2.bias", "nu.2.weight"),
    ]
    assert repr(opt) == "Optimizer(Sequential, 2 trainable parameters, only=('2.*',), clip=0.5)"


def test_gradients_that_are_missing_or_of_no_parameter_are_refused():
    model, theirs = pair()
    opt = nn.Optimizer(model, optax.sgd(0.1), only="2.*")
    with pytest.raises(nn.UnknownNameError, match=r"no gradient for '2\.bias'(.|\n)*only="):
        opt.step({"2.weight": jnp.zeros((2, 4))})
    with pytest.raises(nn.UnknownNameError, match="unknown names '3.weight'"):
        opt.step({**gradients(theirs, 0), "3.weight": jnp.zeros(1)})
    whole = nn.Optimizer(model, optax.sgd(0.1))
    with pytest.raises(nn.UnknownNameError, match='nn.grad\\(loss_fn, only="head'):
        whole.step(nn.grad(loss_fn, only="2.*")(model, X))


def test_freezing_what_is_not_chosen_changes_nothing():
    model, theirs = pair()
    opt = nn.Optimizer(model, optax.adam(1e-2), only="2.*")
    model[0].requires_grad_(False)
    opt.step({n: g for n, g in gradients(theirs, 0).items() if n in names(model, ["2."])})
    model[2].requires_grad_(False)
    with pytest.raises(nn.StructureChangeError, match=r"no longer trainable: '2\.weight'"):
        opt.step({})
    with pytest.raises(nn.UnknownNameError, match="all frozen"):
        opt.adapt()
