"""nn.materialize of models that copy their layers, and of those that fail: values, draws, what is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16)


def copies() -> Any:
    layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    return nn.Sequential(layer, nn.Linear(4, 4), copy.deepcopy(layer), nn.Linear(4, 4))


def tied_inside_of_copies() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.tok.weight

    model = Tied()
    return nn.ModuleList([model, copy.deepcopy(model), nn.Linear(2, 2)])


def copied_values() -> nn.Module:
    """A parameter that is made of another module's."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = nn.Parameter(first.weight)
    return nn.Sequential(first, second)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "adaptive softmax": lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10]),
    "adaptive softmax inside": lambda: nn.Sequential(
        nn.Linear(3, 8), nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5]), nn.Linear(3, 3)
    ),
    "encoder layer": encoder_layer,
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(), 3, nn.LayerNorm(8)),
    "decoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2),
    "two encoders": lambda: nn.ModuleList(
        [nn.TransformerEncoder(encoder_layer(), 2), nn.TransformerEncoder(encoder_layer(), 2)]
    ),
    "transformer": lambda: nn.Transformer(8, 2, 2, 2, 16),
    "copies": copies,
    "ties inside of copies": tied_inside_of_copies,
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_copies_get_the_values_of_a_model_built_with_numbers(build) -> None:
    nn.manual_seed(3)
    built, after = build(), nn.get_rng_state()
    nn.manual_seed(3)
    with nn.device("meta"):
        meta = build()
    nn.materialize(meta)
    values = meta.state_dict()
    assert list(values) == list(built.state_dict())
    for name, value in built.state_dict().items():
        np.testing.assert_array_equal(values[name], value, err_msg=name)
    np.testing.assert_array_equal(nn.get_rng_state(), after)


def test_copies_do_not_share_memory() -> None:
    with nn.device("meta"):
        model = copies()
    nn.materialize(model)

    def clear(model: Any) -> None:
        model[0][0].weight.value = jnp.zeros((4, 4))

    nn.jit(clear, donate=0)(model)
    assert not np.asarray(model[0][0].weight).any()
    assert np.asarray(model[2][0].weight).all()


def test_copies_go_where_their_own_names_say() -> None:
    with nn.device("meta"):
        model = nn.TransformerEncoder(encoder_layer(), 2)
    named: list[str] = []

    def place(name: str, struct: jax.ShapeDtypeStruct) -> str:
        named.append(name)
        return "cpu"

    nn.materialize(model, device=place)
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())


def test_a_copy_that_is_drawn_anew_has_values_of_its_own() -> None:
    with nn.device("meta"):
        layer = nn.Linear(4, 4)
        model: Any = nn.ModuleList([layer, copy.deepcopy(layer)])
        model[1].reset_parameters()
    nn.materialize(model)
    assert (np.asarray(model[0].weight) != np.asarray(model[1].weight)).all()


def test_two_parameters_of_one_struct_are_no_copies() -> None:
    struct = jax.ShapeDtypeStruct((4,), jnp.float32)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(struct)

        def reset_parameters(self) -> None:
            nn.init.normal_(self.scale)

    model: Any = nn.materialize(nn.Sequential(Scale(), Scale()))
    assert (np.asarray(model[0].scale) != np.asarray(model[1].scale)).all()


class Fails(nn.Module):
    """A layer whose reset_parameters draws, replaces a parameter, registers one, and raises."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(jnp.zeros(3))
        self.notes = 1

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        self.weight = nn.Parameter(jnp.ones(3))
        self.more = nn.Parameter(jnp.ones(3))
        self.notes = 2
        raise ZeroDivisionError


@pytest.mark.parametrize("scope", [False, True], ids=["default generator", "rng_scope"])
def test_a_materialize_that_raises_half_way_changes_and_draws_nothing(scope) -> None:
    with nn.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Fails())
    boxes, values = dict(model.named_parameters()), {**model.state_dict()}
    before = nn.get_rng_state()

    def draw_and_fail() -> jax.Array:
        with pytest.raises(ZeroDivisionError):
            nn.materialize(model)
        return nn.next_key()

    if scope:
        with nn.rng_scope(jax.random.key(1)):
            key = draw_and_fail()
        with nn.rng_scope(jax.random.key(1)):
            wanted = nn.next_key()
    else:
        key = draw_and_fail()
        nn.set_rng_state(before)
        wanted = nn.next_key()
    assert (jax.random.key_data(key) == jax.random.key_data(wanted)).all()
    after = dict(model.named_parameters())
    assert list(after) == list(boxes)
    assert all(after[name] is box for name, box in boxes.items())
    assert all(value is values[name] for name, value in model.state_dict().items())
    assert model[2].notes == 1


def test_a_materialize_whose_device_raises_draws_nothing() -> None:
    def place(name: str, struct: jax.ShapeDtypeStruct) -> str:
        if name.startswith("1"):
            raise KeyError(name)
        return "cpu"

    with nn.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = nn.get_rng_state()
    with pytest.raises(KeyError):
        nn.materialize(model, device=place)
    np.testing.assert_array_equal(nn.get_rng_state(), before)
    assert all(isinstance(v, jax.ShapeDtypeStruct) for v in model.state_dict().values())
