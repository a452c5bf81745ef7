"""What nn.lora refuses, with the names, and that the model is as it was then."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from statefulnn.utils import parametrizations, parametrize
from tests.lora.models import network


def attach(model, layers="fc", **options):
    nn.lora.attach(model, layers, **{"rank": 1, **options})


def taken(model):
    model.fc.lora = nn.Identity()
    attach(model)


def max_norm(model):
    model.emb = nn.Embedding(7, 6, max_norm=1.0)
    attach(model, "emb")


def integers(model):
    model.fc.weight = nn.Parameter(jnp.zeros((4, 6), jnp.int32), requires_grad=False)
    attach(model)


def tie(model):
    model.mlp[2].weight = model.mlp[0].weight


def covered(model):
    attach(model, "attn")
    parametrize.register_parametrization(model.attn, "in_proj_weight", nn.Identity())
    nn.lora.detach(model)


def after(*calls):
    def run(model):
        for call in calls:
            call(model)

    return run


merge, unmerge, detach = nn.lora.merge, nn.lora.unmerge, nn.lora.detach
second = lambda model: attach(model, name="second", rank=2)
combine = lambda weights, name="c", **how: lambda m: nn.lora.combine(m, weights, name=name, **how)

CASES = {
    "a pattern without a match": (lambda m: attach(m, "*.q_proj"), nn.UnknownNameError, "q_proj"),
    "no layer by a function": (lambda m: attach(m, lambda n: False), nn.ArgumentError, "no layer"),
    "containers alone": (
        lambda m: attach(m, "mlp"),
        nn.ArgumentError,
        r"'mlp' \(Sequential\)[\s\S]*'mlp.0', 'mlp.2'",
    ),
    "an unknown kind": (lambda m: attach(m, "norm"), nn.ArgumentError, r"'norm' \(LayerNorm\)"),
    "rank 0": (lambda m: attach(m, rank=0), nn.ArgumentError, "rank=0"),
    "rank True": (lambda m: attach(m, rank=True), nn.ArgumentError, "rank=True"),
    "a large rank": (
        lambda m: attach(m, "fc|emb", rank=5),
        nn.ShapeError,
        "rank=5, and 'fc.weight' is 4 x 6[^,]*\n",
    ),
    "alpha": (lambda m: attach(m, alpha=0), nn.ArgumentError, "alpha=0"),
    "dropout": (lambda m: attach(m, dropout=1.0), nn.ArgumentError, "dropout=1.0"),
    "dropout in a weight": (
        lambda m: attach(m, "fc|lstm", dropout=0.1),
        nn.ArgumentError,
        "'lstm.weight_ih_l0', 'lstm.weight_hh_l0'\n",
    ),
    "a variant": (lambda m: attach(m, variant="lokr"), nn.ArgumentError, "variant='lokr'"),
    "a name with a dot": (lambda m: attach(m, name="a.b"), nn.ArgumentError, "name='a.b'"),
    "a name of a method": (lambda m: attach(m, name="keys"), nn.ArgumentError, "name='keys'"),
    "a name twice": (after(attach, attach), nn.TakenNameError, "'default'.*'fc.weight'"),
    "a name that is taken": (taken, nn.TakenNameError, "'fc', which has an attribute 'lora'"),
    "weight norm": (
        after(lambda m: parametrizations.weight_norm(m.fc), lambda m: attach(m, "fc|emb")),
        nn.StructureChangeError,
        "'fc.weight'\n.*computed",
    ),
    "a table with max_norm": (max_norm, nn.ArgumentError, "'emb.weight', a table with max_norm"),
    "integers": (integers, nn.DtypeError, "'fc.weight' of dtype int32"),
    "PiSSA among others": (
        after(attach, lambda m: attach(m, name="second", variant="pissa")),
        nn.StructureChangeError,
        "'fc.weight', beside another",
    ),
    "PiSSA of a tie": (
        after(tie, lambda m: attach(m, "mlp.0", variant="pissa")),
        nn.StructureChangeError,
        "'mlp.0.weight' is also 'mlp.2.weight'",
    ),
    "others beside PiSSA": (
        after(lambda m: attach(m, variant="pissa"), second),
        nn.StructureChangeError,
        "'fc.weight', beside another",
    ),
    "no adapters": (merge, nn.StructureChangeError, "nn.lora.merge on a model without adapters"),
    "an unknown adapter": (
        after(attach, lambda m: nn.lora.enable(m, "x")),
        nn.UnknownNameError,
        "'x'\n.*has 'default'",
    ),
    "a merge of nothing": (
        after(attach, nn.lora.disable, merge),
        nn.StructureChangeError,
        "no adapter is active",
    ),
    "merging twice": (
        after(attach, merge, merge),
        nn.StructureChangeError,
        "merged into 'fc.weight'",
    ),
    "attach while merged": (after(attach, merge, second), nn.StructureChangeError, "unmerge"),
    "enable while merged": (
        after(attach, merge, lambda m: nn.lora.enable(m, "default")),
        nn.StructureChangeError,
        "nn.lora.enable while",
    ),
    "one detached while merged": (
        after(attach, merge, lambda m: detach(m, "default")),
        nn.StructureChangeError,
        "nn.lora.detach while",
    ),
    "unmerge first": (after(attach, unmerge), nn.StructureChangeError, "not merged"),
    "a parametrization on top": (covered, nn.StructureChangeError, "'attn.in_proj_weight'"),
    "DoRA with others": (
        after(
            lambda m: attach(m, variant="dora"),
            second,
            lambda m: nn.lora.enable(m, ["default", "second"]),
        ),
        nn.ArgumentError,
        "'default', 'second' together, on 'fc.weight'",
    ),
    "a sum of different ranks": (
        after(attach, second, combine({"default": 1, "second": 1})),
        nn.ShapeError,
        "{'default': 1, 'second': 2}",
    ),
    "a sum with DoRA": (
        after(lambda m: attach(m, variant="dora"), combine({"default": 1})),
        nn.ArgumentError,
        "variant 'dora'",
    ),
    "a sum under a name that is taken": (
        after(attach, combine({"default": 1}, "default")),
        nn.TakenNameError,
        "'default'",
    ),
    "a sum of nothing": (after(attach, combine({})), nn.ArgumentError, "weights={}"),
    "a sum in another way": (
        after(attach, combine({"default": 1}, how="svd")),
        nn.ArgumentError,
        "how='svd'",
    ),
}


def snapshot(model):
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    return nn.split(model)[0], trained, {n: np.asarray(v) for n, v in model.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_it_raises_with_the_names_and_leaves_the_model_as_it_was(case):
    call, error, message = CASES[case]
    model = network()
    before = []
    # The last call of several is the one that fails.
    closure = getattr(call, "__closure__", None)
    calls = closure[0].cell_contents if call.__qualname__.startswith("after.") else (call,)
    for prepare in calls[:-1]:
        prepare(model)
    if calls[-1] not in (taken, max_norm, integers, covered):
        before = snapshot(model)
    with pytest.raises(error, match=message):
        calls[-1](model)
    if before:
        now = snapshot(model)
        assert now[:2] == before[:2]
        assert all((now[2][n] == v).all() for n, v in before[2].items())


def write(folder, model=None, config=(), drop=(), **arrays):
    nn.lora.save(model or nn.lora.attach(network(), "fc|conv", rank=2), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    state = nn.load(folder / "adapter_model.safetensors")
    state = {n: v for n, v in state.items() if n not in drop} | arrays
    nn.save(state, folder / "adapter_model.safetensors")


FC = "base_model.model.fc.lora_A.weight"
FILES = {
    "another method": ({"config": {"peft_type": "LOHA"}}, "peft_type='LOHA'"),
    "an unknown option": ({"config": {"use_qalora": True}}, "use_qalora=True"),
    "biases": ({"config": {"bias": "all"}}, "bias='all'"),
    "whole layers": ({"config": {"modules_to_save": ["norm"]}}, r"modules_to_save=\['norm'\]"),
    "another base": ({"config": {"init_lora_weights": "olora"}}, "init_lora_weights='olora'"),
    "a text for a number": ({"config": {"r": "8"}}, "r='8'"),
    "another rank": (
        {"config": {"r": 3}},
        r"'conv.weight' has the shape \(2, 6, 3\), and \(3, 6, 3\)",
    ),
    "another variant": ({"config": {"use_dora": True}}, "lora_magnitude of '.*weight' is missing"),
    "another shape": ({FC: np.zeros((2, 9), np.float32)}, r"'fc.weight' has the shape \(2, 9\)"),
    "a missing matrix": ({"drop": [FC]}, "lora_A of 'fc.weight' is missing"),
    "another layer": (
        {"base_model.model.head.lora_A.weight": np.zeros((2, 6), np.float32)},
        r"no layer for base_model.model.head.\*",
    ),
    "a layer that cannot": (
        {"base_model.model.norm.lora_A.weight": np.zeros((2, 6), np.float32)},
        r"no layer for base_model.model.norm.\*",
    ),
    "something else": ({"fc.weight": np.zeros((2, 6), np.float32)}, "'fc.weight' is no part"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_attached(case, tmp_path):
    changes, message = FILES[case]
    write(tmp_path, **changes)
    model = network()
    before = nn.split(model)[0]
    with pytest.raises(nn.CheckpointError, match=message):
        nn.lora.load(model, tmp_path)
    assert nn.split(model)[0] == before and all(p.requires_grad for p in model.parameters())


def test_a_folder_without_its_files_and_a_broken_config_are_refused(tmp_path):
    with pytest.raises(nn.CheckpointError, match="no adapter_config.json"):
        nn.lora.load(network(), tmp_path)
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(nn.CheckpointError, match="no adapter_model.safetensors"):
        nn.lora.load(network(), tmp_path)
    for text, message in (("{", "no JSON"), ("[]", "a list, and no dict")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(nn.CheckpointError, match=message):
            nn.lora.load(network(), tmp_path)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ("lstm", {"variant": "dora"}, "'lstm.weight_ih_l0'[\\s\\S]*DoRA and PiSSA"),
        ("conv", {"variant": "pissa"}, "'conv.weight'[\\s\\S]*PiSSA there is for linear"),
        ("attn.out_proj", {}, "'attn.out_proj.weight'[\\s\\S]*one packed projection"),
    ],
)
def test_what_peft_has_no_place_for_is_not_saved(layers, options, message, tmp_path):
    model = nn.lora.attach(network(), layers, rank=1, **options)
    with pytest.raises(nn.CheckpointError, match=message):
        nn.lora.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_save_asks_which_of_several_adapters(tmp_path):
    model = network()
    attach(model)
    second(model)
    with pytest.raises(nn.ArgumentError, match="several adapters: 'default', 'second'"):
        nn.lora.save(model, tmp_path)
    nn.lora.save(model, tmp_path, "second")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2


def test_a_pattern_of_peft_s_that_would_find_more_layers_becomes_an_expression(tmp_path):
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "block": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    nn.lora.save(nn.lora.attach(model, "fc", rank=1), tmp_path / "one")
    nn.lora.detach(model)
    nn.lora.save(nn.lora.attach(model, "*.fc", rank=1), tmp_path / "two")
    read = lambda name: json.loads((tmp_path / name / "adapter_config.json").read_text())
    assert read("one")["target_modules"] == "fc"
    assert read("two")["target_modules"] == [r"block.fc"]
