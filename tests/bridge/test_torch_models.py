"""Networks of torchvision, timm and transformers, converted: outputs, and gradients of all parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from statefulnn.bridge.torch import Traced, from_torch
from tests.examples.reference import torchvision
from tests.quick import QUICKLY

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]
long = pytest.mark.long


def image(size=64):
    return torch.randn(2, 3, size, size)


def as_array(x):
    return jax.tree.map(lambda t: jnp.asarray(t.numpy()) if torch.is_tensor(t) else t, x)


def leaves(out):
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


def follows(theirs, *inputs, gradients=True, tolerance=1e-4, **kwargs):
    """Convert a network in evaluation mode, and compare outputs and gradients."""
    torch.manual_seed(0)
    theirs = theirs.eval()
    ours = from_torch(theirs, *inputs, kwargs=kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    out = theirs(*inputs, **kwargs)
    arrays, named = as_array(inputs), as_array(kwargs)
    fn, params, state = nn.functionalize(ours, mutable=True)
    chosen = [i for i, t in enumerate(leaves(out)) if t.is_floating_point()]

    def loss(params):
        found = jax.tree.leaves(fn(params, state, *arrays, **named)[0])
        return sum(
            jnp.mean(found[i] * jnp.cos(jnp.arange(found[i].size)).reshape(found[i].shape))
            for i in chosen
        ), found

    run = jax.value_and_grad(loss, has_aux=True) if gradients else lambda p: (loss(p), None)
    (_, found), grads = jax.jit(run, compiler_options=QUICKLY)(params)
    for a, b in zip(found, leaves(out), strict=True):
        scale = max(1.0, float(b.detach().abs().max()))
        np.testing.assert_allclose(a, b.detach().numpy(), atol=tolerance * scale)
    if gradients:
        weights = [torch.cos(torch.arange(t.numel())).reshape(t.shape) for t in leaves(out)]
        sum(
            (t * w).mean()
            for t, w in zip(leaves(out), weights, strict=True)
            if t.is_floating_point()
        ).backward()
        for name, p in theirs.named_parameters():
            if p.grad is not None and name in grads:
                scale = max(float(p.grad.abs().max()), 1e-3)
                np.testing.assert_allclose(
                    np.asarray(grads[name]) / scale, p.grad.numpy() / scale, atol=2e-3, err_msg=name
                )
    return ours


VISION = [
    ("resnet18", {}, 64, ()),
    ("mobilenet_v3_small", {}, 64, long),
    ("efficientnet_b0", {}, 64, long),
    ("vit_b_16", {"image_size": 64}, 64, long),
    ("convnext_tiny", {}, 64, long),
    ("densenet121", {}, 64, long),
    ("googlenet", {"init_weights": False}, 96, long),
    ("inception_v3", {"init_weights": False}, 96, long),
    ("swin_t", {}, 64, long),
    ("maxvit_t", {}, 224, long),
    ("regnet_x_400mf", {}, 64, long),
    ("shufflenet_v2_x0_5", {}, 64, long),
    ("squeezenet1_0", {}, 64, long),
]


@pytest.mark.parametrize(
    "name, options, size", [pytest.param(*c[:3], marks=c[3], id=c[0]) for c in VISION]
)
def test_networks_of_torchvision(name, options, size):
    network = getattr(torchvision.models, name)(**options)
    # Backward in torch of the largest takes long, and shows nothing that the others do not.
    ours = follows(
        network, image(size), gradients=name in ("resnet18", "convnext_tiny", "vit_b_16")
    )
    if name == "resnet18":
        assert isinstance(ours.layer1[0], Traced) and isinstance(ours.layer1, nn.Sequential)
        ours.fc = nn.Linear(512, 10)
        assert nn.jit(ours, compiler_options=QUICKLY)(jnp.ones((1, 3, 64, 64))).shape == (1, 10)


TIMM = [
    ("resnet18", {}),
    ("vit_tiny_patch16_224", {"img_size": 64}),
    ("convnext_atto", {}),
    ("mixer_s32_224", {"img_size": 64}),
    ("regnety_002", {}),
    ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4}),
]


@pytest.mark.long
@pytest.mark.parametrize("name, options", TIMM, ids=[n for n, _ in TIMM])
def test_networks_of_timm(name, options):
    timm = pytest.importorskip("timm")
    follows(timm.create_model(name, **options), image())


IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 12, dtype=torch.int64)
MASK[0, 9:] = 0
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = {**TINY, "vocab_size": 100}
PICTURE = {**TINY, "image_size": 32, "patch_size": 8}
NAMED = {"input_ids": IDS, "attention_mask": MASK}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TRANSFORMERS: dict[str, Any] = {
    "GPT2LMHeadModel": (
        {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 100, **SPECIAL},
        {**NAMED, "use_cache": False},
    ),
    "BertModel": (TEXT, NAMED),
    "RobertaModel": (TEXT, NAMED),
    "DistilBertModel": (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100},
        NAMED,
    ),
    "LlamaForCausalLM": ({**TEXT, "num_key_value_heads": 2}, {**NAMED, "use_cache": False}),
    "MistralModel": (
        {**TEXT, "num_key_value_heads": 2, "sliding_window": 8},
        {**NAMED, "use_cache": False},
    ),
    "T5ForConditionalGeneration": (
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
        {**NAMED, "decoder_input_ids": IDS[:, :5], "use_cache": False},
    ),
    "ViTModel": (PICTURE, {"pixel_values": image(32)}),
    "CLIPModel": (
        {"text_config": {**TEXT, **SPECIAL}, "vision_config": PICTURE},
        {**NAMED, "pixel_values": image(32)},
    ),
    "WhisperModel": (
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "vocab_size": 100,
            "max_source_positions": 50,
            "num_mel_bins": 16,
            "decoder_start_token_id": 1,
            **SPECIAL,
        },
        {
            "input_features": torch.randn(2, 16, 100),
            "decoder_input_ids": IDS[:, :5],
            "use_cache": False,
        },
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "GPT2LMHeadModel" else long) for n in TRANSFORMERS]
)
def test_models_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    options, inputs = TRANSFORMERS[name]
    configuration = name.replace("LMHeadModel", "").replace("ForCausalLM", "")
    configuration = configuration.replace("ForConditionalGeneration", "").removesuffix("Model")
    config = getattr(transformers, f"{configuration}Config")(**options)
    ours = follows(getattr(transformers, name)(config), gradients=name != "WhisperModel", **inputs)
    if name == "GPT2LMHeadModel":
        assert ours.lm_head.weight is ours.transformer.wte.weight
        out = ours(as_array(IDS)[:, :5], attention_mask=as_array(MASK)[:, :5], use_cache=False)
        assert out.logits.shape == (2, 5, 100)
