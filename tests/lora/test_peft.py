"""Adapters beside peft: outputs, gradients, files in both directions, weighted sums."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.examples.reference import transformers
from tests.lora.models import TOKENS, network

peft = pytest.importorskip("peft")


class TorchNet(torch.nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.emb = torch.nn.Embedding(7, 6, padding_idx=0)
        self.fc = torch.nn.Linear(6, 4)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4, bias=False)
        )
        self.c_attn = transformers.pytorch_utils.Conv1D(6, 4)
        self.conv = torch.nn.Conv1d(6, 4, 3, stride=2, padding=1)
        self.attn = torch.nn.MultiheadAttention(4, 2, batch_first=True)
        self.lstm = torch.nn.LSTM(4, 5, batch_first=True) if lstm else None
        self.norm = torch.nn.LayerNorm(5 if lstm else 4, eps=1.0)

    def forward(self, tokens):
        x = self.c_attn(self.mlp(self.fc(self.emb(tokens))))
        x = self.conv(x.mT).mT
        x = x + self.attn(x, x, x)[0]
        return self.norm(x if self.lstm is None else self.lstm(x)[0])


TORCH_TOKENS = torch.tensor(np.asarray(TOKENS))
BESIDE = ["emb", "fc", "mlp.0", "mlp.2", "c_attn", "conv"]
FEW = ["emb", "fc", "conv", "c_attn"]
CASES = {
    "plain": {"target_modules": BESIDE, "lora_dropout": 0.1},
    "dora": {"target_modules": BESIDE, "use_dora": True},
    "pissa": {"target_modules": ["fc", "mlp.0", "c_attn"], "init_lora_weights": "pissa"},
    "single weights": {
        "target_parameters": ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "fc.weight"]
    },
    "rslora of several ranks": {
        "target_modules": ["fc", "conv"],
        "use_rslora": True,
        "rank_pattern": {"conv": 3},
        "alpha_pattern": {"fc": 5},
    },
}


def torch_twin(model):
    twin = TorchNet(model.lstm is not None).eval()
    state = {k: torch.tensor(np.asarray(v)) for k, v in model.state_dict().items()}
    twin.load_state_dict(state)
    return twin


def adapted(twin, name="default", **options):
    """Return a peft model whose adapter does something."""
    torch.manual_seed(len(name))
    options = {"r": 2, "lora_alpha": 3, "fan_in_fan_out": "c_attn" in str(options)} | options
    config = peft.LoraConfig(**options)
    if isinstance(twin, peft.PeftModel):
        twin.add_adapter(name, config)
    else:
        twin = peft.get_peft_model(twin, config, adapter_name=name)
    with torch.no_grad():
        for key, p in twin.named_parameters():
            if "lora_" in key and f".{name}" in key:
                p += 0.3 * torch.randn_like(p)
    return twin.eval()


def close(ours, theirs, rtol=1e-6, atol=1e-6):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol, atol)


# peft says in warnings what it does about fan_in_fan_out, and that embeddings are saved.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_file_of_peft_loads_here_and_one_of_ours_loads_there(case, tmp_path):
    model = network("target_parameters" in CASES[case])
    state = model.state_dict()
    theirs = adapted(torch_twin(model), **CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    base = model(TOKENS)
    nn.lora.load(model, tmp_path / "theirs")
    close(model(TOKENS), theirs(TORCH_TOKENS))
    assert float(abs(model(TOKENS) - base).max()) > 1e-2

    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.value = p.value + 0.2 * jax.random.normal(jax.random.key(i), p.shape)
    nn.lora.save(model, tmp_path / "ours")
    fresh = network(model.lstm is not None)
    fresh.load_state_dict(state)
    read = peft.PeftModel.from_pretrained(torch_twin(fresh), tmp_path / "ours").eval()
    close(model(TOKENS), read(TORCH_TOKENS))
    ours = nn.load(tmp_path / "ours" / "adapter_model.safetensors")
    assert ours.keys() == nn.load(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["bias"] == "none"


def test_adapters_of_attention_go_through_files_and_are_the_formula_s(tmp_path):
    # peft 0.21 itself adds the change of out_proj twice (github.com/huggingface/peft/pull/3774).
    model = network(lstm=False)
    theirs = adapted(torch_twin(model), target_modules=["attn"])
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    assert (tmp_path / "theirs" / "adapter_model.bin").exists()
    nn.lora.load(model, tmp_path / "theirs")
    nn.lora.save(model, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(torch_twin(network(lstm=False)), tmp_path / "ours").eval()
    expected = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    found = {n: p for n, p in read.named_parameters() if "lora_" in n}
    assert len(expected) == 4 and found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)

    by_hand, start = torch_twin(network(lstm=False)), "base_model.model.attn."
    with torch.no_grad():
        for weight, inner in (
            (by_hand.attn.in_proj_weight, ""),
            (by_hand.attn.out_proj.weight, "base_layer.out_proj."),
        ):
            a, b = (expected[f"{start}{inner}lora_{x}.default.weight"] for x in "AB")
            weight += 3 / 2 * b @ a
    close(model(TOKENS), by_hand(TORCH_TOKENS))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("case", ["dora"])
def test_gradients_are_peft_s(case, tmp_path):
    model = network(lstm=False)
    theirs = adapted(torch_twin(model), **CASES[case])
    theirs.save_pretrained(tmp_path)
    nn.lora.load(model, tmp_path)
    weights = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    grads = nn.grad(lambda m: (m(TOKENS) * weights).sum())(model)
    (theirs(TORCH_TOKENS) * torch.tensor(weights)).sum().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(grads) == len(expected) == (18 if case == "dora" else 12)
    for name, grad in grads.items():
        layer, kind = name.split(".lora.default.")
        kind = {"lora_magnitude": "lora_magnitude_vector"}.get(kind, kind)
        if layer == "emb":
            kind = kind.replace("lora_A", "lora_embedding_A").replace("lora_B", "lora_embedding_B")
        key = f"base_model.model.{layer}.{kind}.default"
        close(grad, expected.get(f"{key}.weight", expected.get(key)), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("how", ["linear", "cat"])
def test_weighted_sums_are_peft_s(how, tmp_path):
    model = network(lstm=False)
    theirs = adapted(torch_twin(model), "first", target_modules=FEW)
    theirs = adapted(theirs, "second", target_modules=FEW)
    theirs.save_pretrained(tmp_path)
    for name in ("first", "second"):
        nn.lora.load(model, tmp_path / name, name)
    theirs.set_adapter("second")
    close(model(TOKENS), theirs(TORCH_TOKENS))

    nn.lora.combine(model, {"first": 0.7, "second": -0.4}, name="c", how=how)
    close(model(TOKENS), theirs(TORCH_TOKENS))  # it is off
    nn.lora.enable(model, "c")
    theirs.add_weighted_adapter(["first", "second"], [0.7, -0.4], "c", combination_type=how)
    theirs.set_adapter("c")
    close(model(TOKENS), theirs(TORCH_TOKENS))
    if how == "cat":  # the sum of the changes, by the formula
        nn.lora.enable(model, "first")
        weight = model.fc.weight + 0
        change = sum(
            w * model.fc.lora[n].delta(weight) for n, w in (("first", 0.7), ("second", -0.4))
        )
        np.testing.assert_allclose(model.fc.lora["c"].delta(weight), change, rtol=1e-5, atol=1e-6)


def test_initial_values_have_peft_s_distributions(tmp_path):
    nn.manual_seed(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(500, 40), nn.Linear(40, 900), nn.Conv1d(900, 40, 3))
    twin = torch.nn.Sequential(
        torch.nn.Embedding(500, 40), torch.nn.Linear(40, 900), torch.nn.Conv1d(900, 40, 3)
    )
    nn.lora.attach(model, "*", rank=20)
    theirs = peft.get_peft_model(twin, peft.LoraConfig(r=20, target_modules=["0", "1", "2"]))
    for key, p in theirs.named_parameters():
        if "lora_" in key:
            adapter = model[int(key.split(".")[2])].lora["default"]
            ours = np.asarray(adapter.lora_A if "_A." in key else adapter.lora_B)
            values = p.detach().numpy()
            assert ours.shape == values.shape
            np.testing.assert_allclose(ours.std(), values.std(), rtol=0.05)
            if "embedding" not in key:  # those are normal, and the ends of a uniform draw are sharp
                np.testing.assert_allclose(abs(ours).max(), abs(values).max(), rtol=0.01)
