"""Adapters that peft made for models of transformers, on the same models converted."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from statefulnn.bridge.torch import from_torch
from tests.examples.reference import transformers

peft = pytest.importorskip("peft")
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(2, 97, (2, 6), generator=GENERATOR)
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
DEEP = {**SIZES, "intermediate_size": 48}
OWN = {"bos_token_id": None, "eos_token_id": None}
SEQ2SEQ = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
PICTURES = {**DEEP, "image_size": 16, "patch_size": 8}
del PICTURES["vocab_size"]

# A model, its inputs, which output, and an adapter; what peft chooses if it is given no layers.
CASES = {
    "GPT-2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **OWN)),
        {"input_ids": IDS, "use_cache": False},
        "logits",
        {"target_modules": ["c_attn", "c_fc", "c_proj"], "use_rslora": True, "lora_dropout": 0.1},
    ),
    "Llama": (
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**DEEP, **OWN, num_key_value_heads=2)
        ),
        {"input_ids": IDS, "use_cache": False},
        "logits",
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    ),
    "BERT": (
        lambda: transformers.BertModel(transformers.BertConfig(**DEEP)),
        {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3])},
        "last_hidden_state",
        {"target_modules": "all-linear", "use_dora": True},
    ),
    "ViT": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**PICTURES)),
        {"pixel_values": torch.randn(2, 3, 16, 16, generator=GENERATOR)},
        "last_hidden_state",
        {"target_modules": ["q_proj", "v_proj", "projection"]},  # a convolution, too
    ),
    "T5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**SEQ2SEQ)),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :4], "use_cache": False},
        "logits",
        {},
    ),
}


def adapted(theirs, **options):
    """Return a peft model whose adapter does something."""
    adapter = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if "lora_" in name:
                p += 0.2 * torch.randn(p.shape, generator=GENERATOR)
    return adapter.eval()


def arrays(inputs):
    return {k: jnp.asarray(v.numpy()) if torch.is_tensor(v) else v for k, v in inputs.items()}


def close(found, expected):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


# peft says that it sets fan_in_fan_out for the layers of GPT-2, and asks transformers in an old way.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=(pytest.mark.long,) if n == "T5" else ()) for n in CASES]
)
def test_an_adapter_of_peft_gives_the_outputs_of_peft_merged_or_not(name, tmp_path):
    torch.manual_seed(0)
    make, inputs, output, options = CASES[name]
    theirs = make().eval()
    ours, given = from_torch(theirs, kwargs=inputs), arrays(inputs)
    before = ours(**given)[output]
    adapter = adapted(theirs, **options)
    adapter.save_pretrained(tmp_path / "theirs")
    nn.lora.load(ours, tmp_path / "theirs")
    expected = adapter(**inputs)[output]
    close(ours(**given)[output], expected)
    assert abs(ours(**given)[output] - before).max() > 1e-2
    assert all("lora" in n for n, p in ours.named_parameters() if p.requires_grad)
    nn.lora.merge(ours)
    close(ours(**given)[output], expected)
    nn.lora.unmerge(ours)
    nn.lora.save(ours, tmp_path / "ours")
    torch.manual_seed(0)
    close(
        peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()(**inputs)[output].detach(),
        expected,
    )


def test_layers_that_multiply_from_the_right_are_known_by_what_they_compute(tmp_path):
    # A square matrix: its shape does not tell the two ways apart.
    theirs = torch.nn.Sequential(transformers.pytorch_utils.Conv1D(4, 4))
    x = torch.randn(3, 2, 4, generator=GENERATOR)
    for dynamic in ("auto", "none"):
        ours = from_torch(theirs, x, dynamic=dynamic)
        nn.lora.attach(ours, "0", rank=1)
        assert ours[0].lora.layout.transposed
    ours = from_torch(theirs, x)
    adapted(theirs, target_modules=["0"], fan_in_fan_out=True).save_pretrained(tmp_path)
    ours[0].graphs = ()  # nothing tells any more
    with pytest.raises(nn.CheckpointError, match="whether '0' computes x @ weight"):
        nn.lora.load(ours, tmp_path)
    assert not any("lora" in n for n, _ in ours.named_parameters())
