"""Schemes for whole models: each rule by its variance, patterns that match, and nothing half done."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2)
        self.ln_2 = nn.LayerNorm(width)
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)


class GPT(nn.Module):
    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.wte = nn.Embedding(300, width, padding_idx=0)
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])
        self.head = nn.Linear(width, 300, bias=False)


class ResBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(16, 32, 3)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3)
        self.bn2 = nn.BatchNorm2d(32)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(ResBlock(), ResBlock())
        self.fc = nn.Linear(32, 200)


@pytest.fixture(autouse=True)
def seeded():
    nn.manual_seed(0)


def std_is(box, wanted: float) -> None:
    values = np.asarray(box, np.float64).ravel()
    assert abs(values.std() / wanted - 1) < 5 / math.sqrt(2 * values.size)


def test_gpt2_scales_residual_projections_by_depth() -> None:
    model = nn.init.apply_scheme(GPT(), "gpt2")
    for block in model.blocks:
        std_is(block.c_fc.weight, 0.02)
        std_is(block.attn.in_proj_weight, 0.02)
        std_is(block.c_proj.weight, 0.02 / math.sqrt(6))
        std_is(block.attn.out_proj.weight, 0.02 / math.sqrt(6))
        assert (np.asarray(block.c_proj.bias) == 0).all()
        assert (np.asarray(block.ln_1.weight) == 1).all()
    std_is(model.wte.weight.value[1:], 0.02)
    assert (np.asarray(model.wte.weight[0]) == 0).all()
    std_is(model.head.weight, 0.02)


def test_gpt2_takes_patterns_and_a_depth() -> None:
    model = nn.init.apply_scheme(GPT(), "gpt2", residual="*.c_proj", num_layers=50, std=0.1)
    std_is(model.blocks[0].c_proj.weight, 0.1 / 10)
    std_is(model.blocks[0].attn.out_proj.weight, 0.1)


def test_vit_cuts_at_absolute_bounds_and_zeroes_the_head() -> None:
    model = nn.init.apply_scheme(GPT(), "vit")
    std_is(model.blocks[0].c_fc.weight, 0.02)
    assert (np.asarray(model.head.weight) == 0).all()


def test_resnet_uses_fan_out_and_zeroes_the_last_norm_of_each_block() -> None:
    model = nn.init.apply_scheme(ResNet(), "resnet")
    std_is(model.blocks[0].conv1.weight, math.sqrt(2 / (32 * 9)))
    std_is(model.fc.weight, 0.01)
    for block in model.blocks:
        assert (np.asarray(block.bn1.weight) == 1).all()
        assert (np.asarray(block.bn2.weight) == 0).all()
    assert (np.asarray(model.bn.weight) == 1).all()


def test_lecun_has_one_over_fan_in_after_the_cut() -> None:
    model = nn.init.apply_scheme(nn.Linear(100, 3000), "lecun")
    std_is(model.weight, 0.1)
    assert float(abs(model.weight.value).max()) < 0.1 / 0.8796 * 2.0001


def test_mup_gives_factors_for_adam_by_how_much_wider_the_input_is() -> None:
    model, base = GPT(width=128), GPT(width=32)
    factors = nn.init.apply_scheme(model, "mup", base=base)
    assert list(factors) == [n for n, _ in model.named_parameters()]
    assert factors["wte.weight"] == 1.0
    assert factors["blocks.0.c_fc.weight"] == 32 / 128
    assert factors["blocks.0.c_proj.weight"] == 32 / 128
    assert factors["blocks.0.c_fc.bias"] == factors["blocks.0.ln_1.weight"] == 1.0
    assert (np.asarray(model.head.weight) == 0).all()
    std_is(model.blocks[0].c_fc.weight, 1 / math.sqrt(128))


@pytest.mark.parametrize(
    ("scheme", "options", "error"),
    [
        ("gpt3", {}, ValueError),
        ("gpt2", {"residual": "*.nothing"}, nn.UnknownNameError),
        ("gpt2", {"residual": lambda name: False}, nn.UnknownNameError),
        ("mup", {}, ValueError),
        ("mup", {"base": nn.Linear(2, 2)}, nn.UnknownNameError),
        ("resnet", {"residual": "bn9"}, nn.UnknownNameError),
        ("gpt2", {"std": -1.0}, RuntimeError),
        ("vit", {"colour": 1}, TypeError),
    ],
)
def test_a_scheme_that_fails_changes_nothing(scheme, options, error) -> None:
    model = GPT()
    before = model.state_dict()
    with pytest.raises(error):
        nn.init.apply_scheme(model, scheme, **options)
    for name, value in model.state_dict().items():
        assert (value == before[name]).all(), name


def test_layers_copied_into_a_project_are_known_by_name() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(jnp.zeros((300, 40)))
            self.bias = nn.Parameter(jnp.ones(300))

    layer = nn.init.apply_scheme(Linear(), "gpt2")
    std_is(layer.weight, 0.02)
    assert (np.asarray(layer.bias) == 0).all()


@pytest.mark.parametrize("scheme", ["gpt2", "vit", "resnet", "lecun", "mup"])
def test_stacked_weights_are_refused_and_members_are_not(scheme):
    ensemble = nn.Ensemble(lambda: nn.Sequential(nn.Linear(200, 100), nn.ReLU()), 3)
    before = ensemble.stack[0].weight.value
    for whole in (ensemble, ensemble.stack):
        with pytest.raises(
            nn.ShapeError, match=r"'(stack\.)?0' with a weight of .*\(3, 100, 200\)"
        ):
            nn.init.apply_scheme(whole, scheme)
    assert ensemble.stack[0].weight.value is before


def test_a_scheme_gives_each_member_its_own_values():
    ensemble = nn.Ensemble(lambda: nn.Sequential(nn.Linear(200, 100), nn.ReLU()), 3)
    ensemble.map(lambda member: nn.init.apply_scheme(member, "lecun") and None)
    weight = np.asarray(ensemble.stack[0].weight)
    np.testing.assert_allclose(weight.std((1, 2)) * 200**0.5, 1.0, atol=0.03)
    assert (weight[0] != weight[1]).mean() > 0.99
