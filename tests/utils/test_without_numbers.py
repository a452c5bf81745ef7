"""What computes parameters from others, on the meta device: it works, or says in three parts why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.utils.prune

import statefulnn as nn
from statefulnn.utils import parametrizations, parametrize, prune


def old(function: Callable) -> Callable:
    """Return a function that warns of its age, without the warning."""

    def call(layer: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            function(layer)

    return call


class Symmetric(nn.Module):
    def forward(self, x):
        return jnp.triu(x) + jnp.triu(x, 1).T


NEEDS_NUMBERS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "a parametrization": lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
    "unsafe": lambda m: parametrize.register_parametrization(m, "weight", Symmetric(), unsafe=True),
    "old weight_norm": old(nn.utils.weight_norm),
    "old spectral_norm": old(nn.utils.spectral_norm),
    "l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "ln_structured": lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0),
    "global_unstructured": lambda m: prune.global_unstructured(
        [(m, "weight")], prune.L1Unstructured, amount=0.5
    ),
}


@pytest.mark.parametrize("change", NEEDS_NUMBERS.values(), ids=NEEDS_NUMBERS)
def test_what_needs_numbers_says_so_and_leaves_the_layer_alone(change) -> None:
    layer = nn.Linear(4, 4, device="meta")
    before = nn.get_rng_state()
    with pytest.raises(nn.UninitializedParameterError) as caught:
        change(layer)
    assert "meta device" in str(caught.value)
    assert "Why: " in str(caught.value)
    assert "Instead: first nn.materialize(model)" in str(caught.value)
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == ["weight", "bias"]
    np.testing.assert_array_equal(nn.get_rng_state(), before)
    change(nn.materialize(layer))


MASKS: dict[str, Callable] = {
    "identity": lambda of, m: of.identity(m, "weight"),
    "random_unstructured": lambda of, m: of.random_unstructured(m, "weight", 0.5),
    "random_structured": lambda of, m: of.random_structured(m, "weight", 0.5, 0),
}


@pytest.mark.parametrize("change", MASKS.values(), ids=MASKS)
def test_masks_that_need_no_numbers_are_made_and_a_checkpoint_fills_them(change) -> None:
    theirs, ours = torch.nn.Linear(4, 4), nn.Linear(4, 4, device="meta")
    change(torch.nn.utils.prune, theirs)
    change(prune, ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert jax.eval_shape(lambda m, x: m(x), ours, jnp.ones((2, 4))).shape == (2, 4)
    ours.to_empty(device="cpu")
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(ours(x), theirs(torch.as_tensor(x)).detach(), rtol=1e-5, atol=1e-6)


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "parametrized": parametrizations.weight_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("change", COMPUTED.values(), ids=COMPUTED)
def test_reading_and_materializing_what_is_computed_from_no_numbers_says_what_to_do(change) -> None:
    layer = nn.Linear(4, 4)
    change(layer)
    layer.to(device="meta")
    assert jax.eval_shape(lambda m, x: m(x), layer, jnp.ones((2, 4))).shape == (2, 4)
    for use in (lambda: layer.weight, lambda: layer(jnp.ones((2, 4)))):
        with pytest.raises(nn.UninitializedParameterError, match=r"computed .*Linear\.weight"):
            use()
    with pytest.raises(
        nn.UninitializedParameterError, match="nn.materialize met .* of 'weight'|pruned"
    ):
        nn.materialize(layer)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.vmap(lambda i: nn.Linear(3, 4, device="meta"))(jnp.arange(3)),
        lambda: nn.jit(lambda: nn.Linear(3, 4, device="meta"))(),
    ],
    ids=["vmap", "jit"],
)
def test_a_module_without_numbers_does_not_come_out_of_a_transformation(build) -> None:
    with pytest.raises(
        nn.UninitializedParameterError, match="new Linear with 'weight' on the meta"
    ):
        build()


def test_a_module_without_numbers_may_be_built_and_left_inside() -> None:
    def rows(x):
        return x + nn.Linear(3, 4, device="meta").weight.shape[0]

    assert nn.jit(rows)(jnp.ones(())) == 5
