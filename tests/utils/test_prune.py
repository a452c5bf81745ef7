"""Pruning against torch, and under this package's transforms."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.utils import prune as torch_prune

import statefulnn as nn
from statefulnn.utils import prune
from tests.parity.oracle import array, close, same_class
from tests.utils.twins import compare_calls, same_state

DIM = [0, 1, -1]


def layers(kind="Linear", args=(6, 5)):
    torch.manual_seed(0)
    theirs, ours = getattr(torch.nn, kind)(*args), getattr(nn, kind)(*args)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    return theirs, ours


def prune_both(theirs, ours, function, *args, **kwargs):
    convert = lambda f: {k: f(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
    assert getattr(torch_prune, function)(theirs, *args, **convert(torch.as_tensor)) is theirs
    assert getattr(prune, function)(ours, *args, **convert(jnp.asarray)) is ours


CASES = [
    ("identity", {}),
    ("l1_unstructured", {"amount": 0.3}),
    ("l1_unstructured", {"amount": 7}),
    ("l1_unstructured", {"amount": 0}),
    ("l1_unstructured", {"amount": 0.0}),
    ("l1_unstructured", {"amount": 1.0}),
    ("l1_unstructured", {"amount": 0.3, "importance_scores": array(5, 6, seed=3)}),
    *[
        ("ln_structured", {"amount": 2, "n": n, "dim": dim})
        for n in (1, 2, 3.5, float("inf"), float("-inf"), "fro")
        for dim in DIM
    ],
    ("ln_structured", {"amount": 0.5, "n": 2, "dim": 0}),
    ("ln_structured", {"amount": 0, "n": 2, "dim": 0}),
    (
        "ln_structured",
        {"amount": 2, "n": 2, "dim": 0, "importance_scores": array(5, 6, seed=3)},
    ),
    ("custom_from_mask", {"mask": np.arange(30).reshape(5, 6) % 2}),
    ("custom_from_mask", {"mask": np.arange(30).reshape(5, 6) % 2 == 0}),
]


def short(value):
    return (
        str({k: "array" if isinstance(v, np.ndarray) else v for k, v in value.items()})
        if (isinstance(value, dict))
        else str(value)
    )


@pytest.mark.parametrize(("function", "kwargs"), CASES, ids=short)
def test_masks_outputs_and_gradients_are_torchs(function, kwargs):
    theirs, ours = layers()
    box = ours.weight
    prune_both(theirs, ours, function, "weight", **kwargs)
    same_state(ours, theirs)
    assert ours.weight_orig is box
    assert repr(ours) == repr(theirs)
    close(ours.weight, theirs.weight, "weight", 1e-6)
    compare_calls(theirs, ours, array(4, 6), 1, jitted=kwargs.get("amount") == 0.3)
    assert prune.is_pruned(ours)
    torch_prune.remove(theirs, "weight")
    assert prune.remove(ours, "weight") is ours
    same_state(ours, theirs)
    assert ours.weight is box
    assert type(ours) is nn.Linear
    assert not prune.is_pruned(ours)


@pytest.mark.parametrize("n", [1, 2, "fro", "nuc"])
def test_channels_of_convolutions(n):
    for dim in (0, 1, -1):
        theirs, ours = layers("Conv1d", (4, 6, 3))
        prune_both(theirs, ours, "ln_structured", "weight", amount=1, n=n, dim=dim)
        same_state(ours, theirs)


def test_channels_by_how_many_are_not_zero():
    theirs, ours = layers()
    weight = np.triu(array(5, 6))  # another number in each row and column
    theirs.weight.data = torch.as_tensor(weight)
    ours.weight.value = jnp.asarray(weight)
    prune_both(theirs, ours, "ln_structured", "weight", amount=2, n=0, dim=0)
    same_state(ours, theirs)


AGAIN = [
    ("l1_unstructured", {"amount": 0.3}),
    ("l1_unstructured", {"amount": 4}),
    ("ln_structured", {"amount": 1, "n": 2, "dim": 0}),
    ("ln_structured", {"amount": 1, "n": 1, "dim": -1}),
    ("custom_from_mask", {"mask": np.arange(30).reshape(5, 6) % 3 > 0}),
    ("identity", {}),
]


@pytest.mark.parametrize("second", AGAIN, ids=short)
@pytest.mark.parametrize("first", AGAIN, ids=short)
def test_pruning_again_and_again(first, second):
    theirs, ours = layers()
    for function, kwargs in (first, second, first):
        prune_both(theirs, ours, function, "weight", **kwargs)
        same_state(ours, theirs)
    close(ours.weight, theirs.weight, "weight", 1e-6)
    (entry,) = theirs._forward_pre_hooks.values()
    container = prune.Identity.apply(ours, "weight")
    torch_prune.Identity.apply(theirs, "weight")
    assert isinstance(container, prune.PruningContainer)
    assert len(container) == len(entry) == 4
    assert [type(m).__name__ for m in container] == [type(m).__name__ for m in entry]
    assert type(container[0]).__name__ == type(entry[0]).__name__


def test_weight_and_bias_are_pruned_apart():
    theirs, ours = layers()
    prune_both(theirs, ours, "l1_unstructured", "weight", amount=0.5)
    prune_both(theirs, ours, "l1_unstructured", "bias", amount=2)
    same_state(ours, theirs)
    compare_calls(theirs, ours, array(4, 6), 1, jitted=True)
    torch_prune.remove(theirs, "weight")
    prune.remove(ours, "weight")
    same_state(ours, theirs)
    assert prune.is_pruned(ours)


@pytest.mark.parametrize("scores", [False, True])
def test_global_pruning(scores):
    def build(library, net):
        pairs = [(net[0], "weight"), (net[1], "weight"), (net[1], "bias")]
        given = {}
        if scores:
            value = array(*net[1].weight.shape, seed=2)
            given[pairs[1]] = (
                torch.as_tensor(value) if library is torch_prune else jnp.asarray(value)
            )
        for amount in (10, 0.25):
            library.global_unstructured(
                pairs, library.L1Unstructured, importance_scores=given, amount=amount
            )

    torch.manual_seed(0)
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    ours = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    build(torch_prune, theirs)
    build(prune, ours)
    same_state(ours, theirs)


def test_of_equal_values_the_first_ones_are_pruned():
    layer = nn.Linear(6, 1)
    layer.weight.value = jnp.asarray([[2.0, -1, 1, 0.5, 1, 2]])
    prune.l1_unstructured(layer, "weight", 2)
    assert layer.weight_mask.tolist() == [[1, 0, 1, 0, 1, 1]]


@pytest.mark.parametrize("amount", [3, 0.4])
def test_random_pruning_prunes_as_many_as_asked_uniformly(amount):
    elements, channels = np.zeros((5, 6)), np.zeros(6)
    for seed in range(80):
        nn.manual_seed(seed)
        layer = prune.random_unstructured(nn.Linear(6, 5), "weight", amount)
        off = np.asarray(layer.weight_mask == 0)
        assert off.sum() == (3 if amount == 3 else 12)
        elements += off
        prune.random_unstructured(layer, "weight", amount)
        assert (layer.weight_mask == 0).sum() == (6 if amount == 3 else 12 + round(0.4 * 18))
        layer = prune.random_structured(nn.Linear(6, 5), "weight", amount, dim=1)
        off = np.asarray(layer.weight_mask == 0)
        assert off.all(0).sum() == off.any(0).sum() == (3 if amount == 3 else 2)
        channels += off.all(0)
    for counts in (elements, channels):
        share = counts.sum() / counts.size / 80
        spread = np.sqrt(80 * share * (1 - share))
        assert (abs(counts - 80 * share) < 4.5 * spread).all()
    nn.manual_seed(1)
    first = prune.RandomUnstructured(3).prune(jnp.ones(9))
    nn.manual_seed(1)
    np.testing.assert_array_equal(first, prune.RandomUnstructured(3).prune(jnp.ones(9)))


def test_prune_without_a_module():
    t, mask = array(5, 6), (np.arange(30).reshape(5, 6) % 2).astype(np.float32)
    for name, kwargs in (
        ("L1Unstructured", {"amount": 4}),
        ("LnStructured", {"amount": 2, "n": 2, "dim": 0}),
        ("Identity", {}),
    ):
        for given in ({}, {"default_mask": mask}, {"importance_scores": array(5, 6, seed=1)}):
            theirs = getattr(torch_prune, name)(**kwargs).prune(
                torch.as_tensor(t), **{k: torch.as_tensor(v) for k, v in given.items()}
            )
            ours = getattr(prune, name)(**kwargs).prune(
                jnp.asarray(t), **{k: jnp.asarray(v) for k, v in given.items()}
            )
            close(ours, theirs, name, 1e-6)


def test_methods_of_ones_own():
    class EverySecond(prune.BasePruningMethod):
        PRUNING_TYPE = "structured"
        dim = 0

        def compute_mask(self, t, default_mask):
            return default_mask.at[::2].set(0)

    layer = nn.Linear(2, 5)
    method = EverySecond.apply(layer, "weight")
    assert layer.weight_mask[:, 0].tolist() == [0, 1, 0, 1, 0]
    again = EverySecond.apply(layer, "weight")  # of rows 1 and 3
    assert layer.weight_mask[:, 0].tolist() == [0, 0, 0, 1, 0]
    assert again[0] is method
    again.remove(layer)
    assert type(layer) is nn.Linear

    class Other(EverySecond):
        def apply_mask(self, module):
            return module.weight_orig

    with pytest.raises(TypeError, match="register_parametrization"):
        Other.apply(layer, "weight")


def build():
    layer = nn.Linear(6, 5)
    layer.weight.value = jnp.asarray(array(5, 6))
    return prune.l1_unstructured(layer, "weight", 0.5)


X = jnp.asarray(array(4, 6))


def test_transforms():
    layer = build()
    assert nn.split(layer)[0] is nn.split(build())[0]
    out = layer(X)
    np.testing.assert_allclose(nn.jit(layer)(X), out, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(layer, X), out, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(layer)(X), out, rtol=1e-5)
    fn, params = nn.functionalize(layer)
    assert list(params) == ["bias", "weight_orig"]
    np.testing.assert_allclose(jax.jit(fn)(params, X), out, rtol=1e-5)
    grads = nn.jit(nn.grad(lambda m: (m(X) ** 2).sum()))(layer)
    assert (np.asarray(grads["weight_orig"] == 0) == np.asarray(layer.weight_mask == 0)).all()


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: nn.merge(*nn.split(m)),
        lambda m: jax.tree.map(lambda v: v + 0, m),
    ],
    ids=["deepcopy", "pickle", "merge", "tree.map"],
)
def test_copies_are_pruned_further_and_removed(copied):
    layer = build()
    twin, reference = copied(layer), build()
    assert prune.is_pruned(twin)
    np.testing.assert_array_equal(twin(X), layer(X))
    for model in (twin, reference):
        prune.l1_unstructured(model, "weight", 0.5)
    np.testing.assert_array_equal(twin.weight_mask, reference.weight_mask)
    assert (layer.weight_mask == 0).sum() < (twin.weight_mask == 0).sum()
    prune.remove(twin, "weight")
    assert type(twin) is nn.Linear


def test_pruning_further_does_not_compile_again():
    traces = []

    @nn.jit
    def call(model, x):
        traces.append(1)
        return model(x)

    layer = build()
    for _ in range(3):
        np.testing.assert_allclose(call(layer, X), layer(X), rtol=1e-5)
        prune.l1_unstructured(layer, "weight", 0.3)
    assert len(traces) == 1


def test_pruning_inside_a_trace_raises():
    layer = nn.Linear(6, 5)
    with pytest.raises(nn.TraceLeakError):
        jax.jit(lambda x: prune.l1_unstructured(layer, "weight", 0.5)(x))(X)
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_a_parametrized_layer_is_pruned_elsewhere():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    prune.l1_unstructured(layer, "bias", 2)
    assert type(layer).__name__ == "ParametrizedLinear"
    assert (layer.bias == 0).sum() == 2
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert prune.is_pruned(layer)
    prune.remove(layer, "bias")
    assert type(layer) is nn.Linear


MISUSE = {
    "amount is no number": lambda p, m: p.l1_unstructured(m, "weight", "many"),
    "negative number": lambda p, m: p.l1_unstructured(m, "weight", -1),
    "negative share": lambda p, m: p.random_unstructured(m, "weight", -0.1),
    "share above one": lambda p, m: p.ln_structured(m, "weight", 1.1, 2, 0),
    "more than there is": lambda p, m: p.l1_unstructured(m, "weight", 31),
    "more channels than there are": lambda p, m: p.random_structured(m, "weight", 6, 0),
    "channels of a vector": lambda p, m: p.random_structured(m, "bias", 1, 0),
    "no such axis": lambda p, m: p.ln_structured(m, "weight", 1, 2, 2),
    "no such name": lambda p, m: p.identity(m, "nothing"),
    "removed without": lambda p, m: p.remove(m, "weight"),
    "global, no iterable": lambda p, m: p.global_unstructured(3, p.L1Unstructured, amount=1),
    "global, no dict": lambda p, m: p.global_unstructured(
        [(m, "weight")], p.L1Unstructured, importance_scores=[1], amount=1
    ),
    "global, structured": lambda p, m: p.global_unstructured(
        [(m, "weight")], p.LnStructured, amount=1, n=2
    ),
    "container of something": lambda p, m: p.PruningContainer(p.Identity(), 3),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_raises_what_torch_raises(case):
    theirs, ours = layers()
    state = ours.state_dict()
    with pytest.raises(Exception) as their_error:
        MISUSE[case](torch_prune, theirs)
    with pytest.raises(Exception) as our_error:
        MISUSE[case](prune, ours)
    if isinstance(their_error.value, AttributeError):
        assert isinstance(our_error.value, (AttributeError, TypeError))
    else:
        same_class(our_error.value, their_error.value)
    assert list(ours.state_dict()) == list(state)


def test_shapes_have_to_fit():
    for library, layer, ones in (
        (torch_prune, torch.nn.Linear(6, 5), torch.ones),
        (prune, nn.Linear(6, 5), lambda *s: jnp.ones(s)),
    ):
        with pytest.raises(AssertionError, match="same shape"):
            library.l1_unstructured(layer, "weight", 1, importance_scores=ones(5, 5))
        with pytest.raises(AssertionError, match="must match"):
            library.custom_from_mask(layer, "weight", ones(5, 5))
        with pytest.raises(AssertionError, match="same shape"):
            library.L1Unstructured(1).prune(ones(3), importance_scores=ones(2))
        assert list(layer.state_dict()) in (["weight", "bias"], ["bias", "weight"])


def test_containers_hold_methods_of_one_tensor():
    for library in (torch_prune, prune):
        container = library.PruningContainer()
        container._tensor_name = "test"
        method = library.L1Unstructured(1)
        method._tensor_name = "other"
        with pytest.raises(ValueError, match="acting on"):
            container.add_pruning_method(method)
        method._tensor_name = "test"
        container.add_pruning_method(method)
        assert list(container) == [method]
        assert library.PruningContainer(method)._tensor_name == "test"
