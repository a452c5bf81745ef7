"""The networks of torch that `torch_zoo.py` converts: how to build each, small, and what to call it with.

In comments: a *family* is a group of networks by one idea, such as Swin or BERT. One is here of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = tuple[tuple[object, ...], dict[str, object]]


@dataclass(frozen=True)
class Network:
    """One network: `make` builds it, `inputs` returns what it is called with for a batch of that size."""

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int], Inputs]
    operators: Mapping[Any, Callable] = field(default_factory=dict)


NETWORKS: dict[str, Network] = {}


# timm: one of each family. The number is the side of the image: the smallest that the network takes.
# Batch normalization over a batch of two wants more than one pixel at the end.
TIMM: dict[str, tuple[int, dict[str, object]]] = {
    "beit_base_patch16_224": (32, {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4}),
    "botnet26t_256": (64, {"img_size": 64}),
    "lambda_resnet26t": (64, {"img_size": 64}),
    "repvgg_a0": (64, {}),
    "mobileone_s0": (64, {}),
    "cait_xxs24_224": (32, {"img_size": 32, "depth": 2}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "convit_tiny": (32, {"img_size": 32, "depth": 4}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "crossvit_9_240": (240, {}),
    "cs3darknet_s": (64, {}),
    "davit_tiny": (
        64,
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (2, 4, 4, 4)},
    ),
    "halonet26t": (256, {}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "densenet121": (64, {"block_config": (2, 2, 2, 2)}),
    "dla46_c": (64, {}),
    "dpn48b": (64, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformerv2_s0": (224, {}),
    "efficientnet_b0": (64, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (224, {}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28, "depth": 2}),
    "fasternet_t0": (64, {}),
    "fastvit_t8": (64, {}),
    "ghostnetv2_100": (64, {}),
    "hgnetv2_b0": (64, {}),
    "hiera_tiny_224": (224, {"stages": (1, 1, 1, 1)}),
    "hrnet_w18_small": (64, {}),
    "inception_next_atto": (64, {}),
    "inception_v3": (96, {}),
    "levit_128s": (224, {}),
    "mambaout_femto": (64, {}),
    "test_maxvit": (160, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "mobilevitv2_050": (64, {}),
    "nextvit_small": (64, {"depths": (1, 1, 5, 1)}),
    "nf_regnet_b0": (64, {}),
    "pit_ti_224": (64, {"img_size": 64}),
    "pvt_v2_b0": (64, {}),
    "rdnet_tiny": (64, {}),
    "regnety_002": (64, {}),
    "repvit_m0_9": (64, {}),
    "res2net50_26w_4s": (64, {"layers": (1, 1, 1, 1)}),
    "resnest14d": (64, {}),
    "resnet18": (64, {}),
    "resnetv2_50": (64, {"layers": (1, 1, 1, 1)}),
    "rexnet_100": (64, {}),
    "sequencer2d_s": (32, {"img_size": 32, "layers": (1, 1, 1, 1)}),
    "shvit_s1": (64, {}),
    "skresnet18": (64, {}),
    "starnet_s050": (64, {}),
    "swiftformer_xs": (64, {}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (1, 1), "num_heads": (2, 4)}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "depths": (1, 1), "num_heads": (2, 4)}),
    "swinv2_cr_tiny_224": (56, {"img_size": 56, "depths": (1, 1), "num_heads": (2, 4)}),
    "tiny_vit_5m_224": (64, {"depths": (1, 1, 1, 1)}),
    "tnt_s_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "tresnet_m": (64, {"layers": (1, 1, 1, 1)}),
    "twins_svt_small": (64, {"depths": (1, 1, 2, 1), "img_size": 64}),
    "visformer_tiny": (64, {"img_size": 64}),
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "vit_relpos_small_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "samvit_base_patch16_224": (
        64,
        {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 4, "global_attn_indexes": (1,)},
    ),
    "ese_vovnet19b_slim": (64, {}),
    "xception41": (64, {}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, "depth": 2}),
}
# Their functions fix depths and widths, so these are built from the class, smaller.
TIMM_CLASSES: dict[str, tuple[int, dict[str, object]]] = {
    "convmixer.ConvMixer": (32, {"dim": 32, "depth": 3}),
    "focalnet.FocalNet": (64, {"depths": (1, 1, 1, 1), "embed_dim": 16}),
    "gcvit.GlobalContextVit": (
        64,
        {"img_size": 64, "depths": (1, 1, 1, 1), "num_heads": (2, 4, 8, 16), "embed_dim": 16},
    ),
    "metaformer.MetaFormer": (64, {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)}),
    "mlp_mixer.MlpMixer": (32, {"img_size": 32, "num_blocks": 2, "embed_dim": 64}),
    "mvitv2.MultiScaleVit": (64, {}),
    "nest.Nest": (
        32,
        {"img_size": 32, "embed_dims": (16, 32, 64), "num_heads": (2, 4, 8), "depths": (1, 1, 2)},
    ),
    "vgg.VGG": (32, {"cfg": [8, "M", 16, "M"], "norm_layer": torch.nn.BatchNorm2d}),
    "volo.VOLO": (
        64,
        {
            "img_size": 64,
            "layers": (1, 1, 1, 1),
            "embed_dims": (24, 48, 48, 48),
            "num_heads": (2, 4, 4, 4),
        },
    ),
}


def _timm_class(name: str, side: int, options: Mapping[str, object]) -> Network:
    def make() -> torch.nn.Module:
        from tests.examples.reference import torchvision  # noqa: F401 - its import must go first

        import importlib  # isort: skip

        file, kind = name.split(".")
        module = importlib.import_module(f"timm.models.{file}")
        if kind == "MultiScaleVit":
            config = module.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=(16, 32, 48, 64))
            return module.MultiScaleVit(config, img_size=side, num_classes=10)
        return getattr(module, kind)(num_classes=10, **options)

    return Network(make, lambda batch: ((torch.randn(batch, 3, side, side),), {}))


def _timm(name: str, side: int, options: Mapping[str, object]) -> Network:
    def make() -> torch.nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **options)

    return Network(make, lambda batch: ((torch.randn(batch, 3, side, side),), {}))


for _name, (_side, _options) in TIMM.items():
    NETWORKS[f"timm {_name}"] = _timm(_name, _side, _options)
for _name, (_side, _options) in TIMM_CLASSES.items():
    NETWORKS[f"timm {_name.split('.')[1]}"] = _timm_class(_name, _side, _options)


# torchvision: classification, segmentation, detection without kernels of its own, video, optical flow.
def _vision(path: str, shape: tuple[int, ...], copies: int = 1, **options: object) -> Network:
    def make() -> torch.nn.Module:
        from tests.examples.reference import torchvision

        place = torchvision.models
        *folders, name = path.split(".")
        for folder in folders:
            place = getattr(place, folder)
        return getattr(place, name)(**{"weights": None, **options})

    return Network(
        make, lambda batch: (tuple(torch.rand(batch, *shape) for _ in range(copies)), {})
    )


class _Head(torch.nn.Module):
    """A detector without what looks at numbers: its backbone and its head, on images of one size."""

    def __init__(self, detector: torch.nn.Module):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: torch.Tensor) -> object:
        return self.head(list(self.backbone(images).values()))


def _detector(name: str, side: int) -> Network:
    def make() -> torch.nn.Module:
        from tests.examples.reference import torchvision

        build = getattr(torchvision.models.detection, name)
        return _Head(build(weights=None, weights_backbone=None, num_classes=5))

    return Network(make, lambda batch: ((torch.rand(batch, 3, side, side),), {}))


_image = (3, 64, 64)
NETWORKS |= {
    "torchvision alexnet": _vision("alexnet", _image),
    "torchvision squeezenet1_1": _vision("squeezenet1_1", _image),
    "torchvision googlenet": _vision("googlenet", _image, init_weights=False, aux_logits=False),
    "torchvision shufflenet_v2_x0_5": _vision("shufflenet_v2_x0_5", _image),
    "torchvision mnasnet0_5": _vision("mnasnet0_5", _image),
    "torchvision mobilenet_v2": _vision("mobilenet_v2", _image),
    "torchvision resnet50": _vision("resnet50", _image),
    "torchvision fcn_resnet50": _vision(
        "segmentation.fcn_resnet50", _image, weights_backbone=None, aux_loss=True
    ),
    "torchvision deeplabv3_mobilenet_v3_large": _vision(
        "segmentation.deeplabv3_mobilenet_v3_large", _image, weights_backbone=None
    ),
    "torchvision lraspp_mobilenet_v3_large": _vision(
        "segmentation.lraspp_mobilenet_v3_large", _image, weights_backbone=None
    ),
    "torchvision ssdlite320_mobilenet_v3_large": _detector("ssdlite320_mobilenet_v3_large", 320),
    "torchvision retinanet_resnet50_fpn": _detector("retinanet_resnet50_fpn", 64),
    "torchvision r3d_18": _vision("video.r3d_18", (3, 4, 32, 32)),
    "torchvision r2plus1d_18": _vision("video.r2plus1d_18", (3, 4, 32, 32)),
    "torchvision mc3_18": _vision("video.mc3_18", (3, 4, 32, 32)),
    "torchvision raft_small": _vision("optical_flow.raft_small", (3, 128, 128), copies=2),
}


# transformers: one of each architecture that fits, with two layers of 32 to 64 channels.
ITS_OWN = object()  # the value that the architecture has
SMALL: dict[str, object] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "emb_dim": 32,
    "dim": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "intermediate_size": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_dim": 64,
    "d_ff": 64,
    "hidden_dim": 64,
    "head_dim": 8,
    "d_kv": 8,
    "max_position_embeddings": 64,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 32,
}


def _config(kind: str, options: Mapping[str, object]) -> Any:
    import transformers

    from tests.examples.reference import torchvision  # noqa: F401 - its import must go first

    plain = transformers.AutoConfig.for_model(kind)
    known = {**plain.attribute_map, **plain.to_dict()}
    same = plain.attribute_map  # other names of what `options` sets
    small = {k: v for k, v in SMALL.items() if k in known and same.get(k) not in options}
    small |= {k: 0.0 for k in known if "drop" in k and isinstance(known[k], float)}
    chosen = {k: v for k, v in {**small, **options}.items() if v is not ITS_OWN}
    return transformers.AutoConfig.for_model(kind, **chosen)


def _built(kind: str, model: str, options: Mapping[str, object]) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        import transformers

        config = _config(kind, options)
        if model == "AutoModel":
            return transformers.AutoModel.from_config(config)
        return getattr(transformers, model)._from_config(config)

    return make


def _language(kind: str, model: str = "AutoModel", extra: Any = None, **options: object) -> Network:
    """A network of texts: 10 words each; a mask hides the last two of the first text."""

    def inputs(batch: int) -> Inputs:
        mask = torch.ones(batch, 10, dtype=torch.int64)
        mask[0, 8:] = 0
        given: dict[str, object] = {
            "input_ids": torch.randint(3, 99, (batch, 10)),
            "attention_mask": mask,
            "use_cache": False,
        }
        for key, value in (extra(batch) if extra else {}).items():
            given[key] = value
        return (), {k: v for k, v in given.items() if v is not None}

    return Network(_built(kind, model, options), inputs)


def _plain(batch: int) -> dict[str, object]:
    return {"use_cache": None}


def _bare(batch: int) -> dict[str, object]:
    return {"use_cache": None, "attention_mask": None}


def _both(batch: int) -> dict[str, object]:
    return {"decoder_input_ids": torch.randint(3, 99, (batch, 7))}


def _pixels(
    kind: str,
    model: str = "AutoModel",
    side: int = 32,
    name: str = "pixel_values",
    frames: int = 0,
    **options: object,
) -> Network:
    shape = ((frames,) if frames else ()) + (3, side, side)
    return Network(
        _built(kind, model, options), lambda batch: ((), {name: torch.randn(batch, *shape)})
    )


def _sound(
    kind: str,
    model: str = "AutoModel",
    shape: tuple[int, ...] = (800,),
    name: str = "input_values",
    extra: Any = None,
    **options: object,
) -> Network:
    def inputs(batch: int) -> Inputs:
        return (), {name: torch.randn(batch, *shape), **(extra(batch) if extra else {})}

    return Network(_built(kind, model, options), inputs)


def _series(kind: str) -> Network:
    """A network of two series of 32 numbers each, in pieces of 8."""
    sizes = {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8}
    return _sound(kind, shape=(32, 2), name="past_values", **sizes)


_waves: dict[str, object] = {
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 3,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
_text: dict[str, object] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_sight: dict[str, object] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def _pairs(batch: int) -> dict[str, object]:
    return {"use_cache": None, "pixel_values": torch.randn(batch, 3, 32, 32)}


NETWORKS |= {
    f"transformers {key}": value
    for key, value in {
        # encoders of text
        "albert": _language("albert", extra=_plain),
        "bert": _language("bert", "BertForMaskedLM", extra=_plain),
        "roberta": _language("roberta", extra=_plain),
        "distilbert": _language("distilbert", extra=_plain),
        "electra": _language("electra", extra=_plain),
        "mpnet": _language("mpnet", extra=_plain),
        "deberta-v2": _language(
            "deberta-v2", extra=_plain, relative_attention=True, pos_att_type=["p2c", "c2p"]
        ),
        "convbert": _language("convbert", extra=_plain, head_ratio=2, num_groups=1),
        "funnel": _language(
            "funnel",
            "FunnelModel",
            extra=_plain,
            num_hidden_layers=ITS_OWN,
            block_sizes=[1, 1],
            d_inner=64,
            d_head=8,
        ),
        "xlnet": _language("xlnet", extra=_plain, d_inner=64),
        "xlm": _language("xlm", extra=_plain),
        "squeezebert": _language("squeezebert", extra=_plain),
        "nystromformer": _language(
            "nystromformer", extra=_bare, num_landmarks=10, segment_means_seq_len=10
        ),
        "roformer": _language("roformer", extra=_plain),
        "rembert": _language(
            "rembert", extra=_plain, input_embedding_size=16, output_embedding_size=16
        ),
        "fnet": _language("fnet", extra=_bare),
        "mobilebert": _language("mobilebert", extra=_plain, intra_bottleneck_size=32),
        "ibert": _language("ibert", extra=_plain),
        "modernbert": _language("modernbert", extra=_plain, cls_token_id=1, sep_token_id=2),
        "esm": _language("esm", extra=_plain, position_embedding_type="rotary"),
        "layoutlm": _language("layoutlm", extra=_plain),
        # decoders
        "gpt2": _language("gpt2", "GPT2LMHeadModel"),
        "gpt_neo": _language("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=4),
        "gpt_neox": _language("gpt_neox"),
        "gptj": _language("gptj", rotary_dim=4),
        "codegen": _language("codegen", rotary_dim=4),
        "opt": _language("opt", word_embed_proj_dim=32),
        "bloom": _language("bloom"),
        "mpt": _language("mpt", max_seq_len=64),
        "falcon": _language("falcon"),
        "biogpt": _language("biogpt"),
        "llama": _language("llama", "LlamaForCausalLM"),
        "mistral": _language("mistral", sliding_window=4),
        "qwen2": _language("qwen2", "Qwen2ForCausalLM"),
        "qwen3": _language("qwen3"),
        "gemma2": _language("gemma2", query_pre_attn_scalar=8, sliding_window=4),
        "gemma3_text": _language("gemma3_text", query_pre_attn_scalar=8, sliding_window=4),
        "phi": _language("phi"),
        "phi3": _language("phi3"),
        "stablelm": _language("stablelm"),
        "olmo2": _language("olmo2"),
        "cohere": _language("cohere"),
        "granite": _language("granite"),
        "starcoder2": _language("starcoder2"),
        "imagegpt": _language("imagegpt"),
        # mixtures of experts
        "mixtral": _language("mixtral"),
        "qwen2_moe": _language("qwen2_moe", shared_expert_intermediate_size=32),
        "gpt_oss": _language(
            "gpt_oss", sliding_window=4, experts_per_token=2, num_experts_per_tok=2
        ),
        "deepseek_v3": _language(
            "deepseek_v3",
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=1,
            num_key_value_heads=4,
        ),
        # state spaces and recurrence
        "mamba": _language("mamba", "MambaForCausalLM", state_size=4, use_mambapy=False),
        "mamba2": _language(
            "mamba2", state_size=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=5
        ),
        "rwkv": _language("rwkv", attention_hidden_size=32),
        "recurrent_gemma": _language(
            "recurrent_gemma",
            lru_width=32,
            attention_window_size=4,
            block_types=("recurrent", "attention"),
        ),
        # encoders with decoders
        "t5": _language("t5", extra=_both),
        "bart": _language("bart", extra=_both),
        "pegasus": _language("pegasus", extra=_both),
        "marian": _language("marian", extra=_both, decoder_vocab_size=99),
        "blenderbot": _language("blenderbot", extra=_both),
        "m2m_100": _language("m2m_100", extra=_both),
        "prophetnet": _language(
            "prophetnet",
            extra=_both,
            num_encoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
        ),
        "umt5": _language("umt5", extra=_both),
        # images and video
        "vit": _pixels("vit", "ViTForImageClassification"),
        "deit": _pixels("deit"),
        "swin": _pixels(
            "swin", patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4
        ),
        "swinv2": _pixels(
            "swinv2", patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4
        ),
        "convnextv2": _pixels("convnextv2", hidden_sizes=(16, 32), depths=(1, 1), num_stages=2),
        "dinov2": _pixels("dinov2"),
        "segformer": _pixels(
            "segformer",
            "SegformerForSemanticSegmentation",
            side=64,
            hidden_sizes=(16, 16, 32, 32),
            decoder_hidden_size=32,
            num_attention_heads=(1, 1, 2, 2),
            depths=(1, 1, 1, 1),
        ),
        "dpt": _pixels(
            "dpt",
            "DPTForDepthEstimation",
            is_hybrid=False,
            num_hidden_layers=4,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=(8, 8, 16, 16),
            fusion_hidden_size=16,
        ),
        "hiera": _pixels(
            "hiera",
            side=64,
            image_size=(64, 64),
            patch_size=(7, 7),
            embed_dim=16,
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 2, 2),
        ),
        "poolformer": _pixels(
            "poolformer", side=64, hidden_sizes=(8, 8, 16, 16), depths=(1, 1, 1, 1)
        ),
        "yolos": _pixels("yolos", image_size=(32, 32), num_detection_tokens=5),
        "mobilevit": _pixels(
            "mobilevit",
            side=64,
            image_size=64,
            patch_size=2,
            hidden_sizes=(16, 24, 32),
            neck_hidden_sizes=(8, 8, 16, 16, 24, 24, 32),
        ),
        "detr": _pixels(
            "detr",
            side=64,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            num_queries=5,
            backbone_config={
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": (8, 8, 16, 16),
                "depths": (1, 1, 1, 1),
                "out_features": ["stage4"],
            },
        ),
        "videomae": _pixels("videomae", frames=4, num_frames=4, tubelet_size=2),
        "timesformer": _pixels("timesformer", frames=2, num_frames=2),
        "vivit": _pixels("vivit", frames=4, num_frames=4, tubelet_size=(2, 8, 8)),
        # sound
        "wav2vec2": _sound("wav2vec2", **_waves),
        "hubert": _sound("hubert", **_waves),
        "wavlm": _sound("wavlm", **_waves),
        "sew": _sound("sew", **{**_waves, "squeeze_factor": 1}),
        "data2vec-audio": _sound(
            "data2vec-audio", **{**_waves, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3}
        ),
        "whisper": _sound(
            "whisper",
            shape=(16, 40),
            name="input_features",
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=20,
            decoder_start_token_id=1,
            extra=lambda batch: {**_both(batch), "use_cache": False},
        ),
        "audio-spectrogram-transformer": _sound(
            "audio-spectrogram-transformer",
            shape=(32, 16),
            max_length=32,
            num_mel_bins=16,
            patch_size=4,
            frequency_stride=4,
            time_stride=4,
        ),
        "encodec": _sound(
            "encodec",
            shape=(1, 320),
            num_filters=4,
            codebook_size=16,
            upsampling_ratios=(4, 2),
            num_lstm_layers=1,
            codebook_dim=32,
        ),
        # several kinds of input
        "clip": _language(
            "clip", extra=_pairs, text_config=_text, vision_config=_sight, projection_dim=16
        ),
        "siglip": _language("siglip", extra=_pairs, text_config=_text, vision_config=_sight),
        "blip": _language(
            "blip",
            "BlipForConditionalGeneration",
            extra=_pairs,
            text_config={**_text, "encoder_hidden_size": 32},
            vision_config=_sight,
            projection_dim=16,
        ),
        "vilt": _language(
            "vilt",
            extra=lambda batch: {
                **_pairs(batch),
                "token_type_ids": torch.zeros(batch, 10, dtype=torch.int64),
            },
        ),
        "lxmert": _language(
            "lxmert",
            extra=lambda batch: {
                "use_cache": None,
                "visual_feats": torch.randn(batch, 4, 16),
                "visual_pos": torch.rand(batch, 4, 4),
            },
            visual_feat_dim=16,
            l_layers=2,
            x_layers=1,
            r_layers=1,
        ),
        # series and decisions
        "patchtst": _series("patchtst"),
        "patchtsmixer": _series("patchtsmixer"),
        "decision_transformer": _sound(
            "decision_transformer",
            shape=(5, 4),
            name="states",
            state_dim=4,
            act_dim=2,
            max_ep_len=20,
            extra=lambda batch: {
                "actions": torch.randn(batch, 5, 2),
                "rewards": torch.randn(batch, 5, 1),
                "returns_to_go": torch.randn(batch, 5, 1),
                "timesteps": torch.arange(5).repeat(batch, 1),
                "attention_mask": torch.ones(batch, 5),
            },
        ),
    }.items()
}


# Others: segmentation, x-transformers, diffusion, graphs, a perceptual distance, and torch's own.
def _segmentation(kind: str, **options: object) -> Network:
    def make() -> torch.nn.Module:
        from tests.examples.reference import torchvision  # noqa: F401 - its import must go first

        import segmentation_models_pytorch as smp  # isort: skip

        return getattr(smp, kind)("resnet18", encoder_weights=None, classes=3, **options)

    return Network(make, lambda batch: ((torch.randn(batch, 3, 64, 64),), {}))


def _x_transformer(layers: str, causal: bool = True, **options: object) -> Network:
    def make() -> torch.nn.Module:
        import x_transformers

        attention = getattr(x_transformers, layers)(
            dim=32, depth=2, heads=4, attn_dim_head=8, **options
        )
        return x_transformers.TransformerWrapper(
            num_tokens=99, max_seq_len=64, attn_layers=attention
        )

    return Network(make, lambda batch: ((torch.randint(0, 99, (batch, 10)),), {}))


def _unet(kind: str = "UNet2DModel") -> Network:
    def make() -> torch.nn.Module:
        from tests.examples.reference import torchvision  # noqa: F401 - its import must go first

        import diffusers  # isort: skip

        shared: dict[str, Any] = {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
        }
        if kind == "UNet2DConditionModel":
            return diffusers.UNet2DConditionModel(
                **shared,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                cross_attention_dim=16,
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                attention_head_dim=4,
                sample_size=16,
            )
        if kind == "AutoencoderKL":
            return diffusers.AutoencoderKL(
                **shared,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            )
        return diffusers.UNet2DModel(
            **shared,
            sample_size=16,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        )

    def inputs(batch: int) -> Inputs:
        times = torch.arange(batch) * 3 + 1
        if kind == "UNet2DConditionModel":
            return (torch.randn(batch, 4, 16, 16), times, torch.randn(batch, 5, 16)), {
                "return_dict": False
            }
        if kind == "AutoencoderKL":
            return (torch.randn(batch, 3, 16, 16),), {"return_dict": False}
        return (torch.randn(batch, 3, 16, 16), times), {"return_dict": False}

    return Network(make, inputs)


def _graph(kind: str) -> Network:
    """Nodes in a ring, with an edge to each neighbour: the edges are fixed, and part of the input."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            import torch_geometric.nn as graphs

            super().__init__()
            if kind == "GINConv":
                inside = [
                    torch.nn.Sequential(torch.nn.Linear(n, 16), torch.nn.ReLU()) for n in (8, 16)
                ]
                self.first, self.second = (graphs.GINConv(m) for m in inside)
            else:
                # What takes self-loops out looks at numbers: they are in the edges, or left out.
                options = {"GCNConv": {"normalize": False}, "GATConv": {"add_self_loops": False}}
                layer, options = getattr(graphs, kind), options.get(kind, {})
                self.first, self.second = layer(8, 16, **options), layer(16, 16, **options)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x, edges)), edges)

    def inputs(batch: int) -> Inputs:
        n = 4 * batch
        there = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
        return (torch.randn(n, 8), torch.cat([there, there.flip(0)], 1)), {}

    return Network(Net, inputs)


def _lpips(net: str) -> Network:
    def make() -> torch.nn.Module:
        from tests.examples.reference import torchvision  # noqa: F401 - its import must go first

        import lpips  # isort: skip

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)

    return Network(make, lambda batch: (tuple(torch.rand(batch, 3, 64, 64) for _ in range(2)), {}))


class _Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(99, 16)
        self.rnn = torch.nn.LSTM(16, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.out = torch.nn.Linear(32, 99)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y, (h, _) = self.rnn(self.embed(ids))
        return self.out(y + h[-1:].transpose(0, 1).repeat(1, 1, 2))


class _Translator(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(99, 32)
        self.net = torch.nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = self.net.generate_square_subsequent_mask(target.shape[1])
        return self.net(
            self.embed(source), self.embed(target), tgt_mask=mask, src_key_padding_mask=source == 0
        )


NETWORKS |= {
    "segmentation_models Unet": _segmentation("Unet"),
    "segmentation_models UnetPlusPlus": _segmentation("UnetPlusPlus"),
    "segmentation_models FPN": _segmentation("FPN"),
    "segmentation_models PSPNet": _segmentation("PSPNet"),
    "segmentation_models DeepLabV3Plus": _segmentation("DeepLabV3Plus"),
    "segmentation_models MAnet": _segmentation("MAnet"),
    "segmentation_models Linknet": _segmentation("Linknet"),
    "segmentation_models Segformer": _segmentation("Segformer"),
    "x_transformers Decoder, rotary": _x_transformer("Decoder", rotary_pos_emb=True),
    "x_transformers Decoder, alibi": _x_transformer(
        "Decoder", alibi_pos_bias=True, alibi_num_heads=2
    ),
    "x_transformers Encoder, T5 bias": _x_transformer(
        "Encoder", rel_pos_bias=True, ff_glu=True, use_rmsnorm=True
    ),
    "diffusers UNet2DModel": _unet(),
    "diffusers UNet2DConditionModel": _unet("UNet2DConditionModel"),
    "diffusers AutoencoderKL": _unet("AutoencoderKL"),
    "torch_geometric GCNConv": _graph("GCNConv"),
    "torch_geometric GATConv": _graph("GATConv"),
    "torch_geometric SAGEConv": _graph("SAGEConv"),
    "torch_geometric GINConv": _graph("GINConv"),
    "lpips alex": _lpips("alex"),
    "lpips squeeze": _lpips("squeeze"),
    "torch LSTM": Network(_Recurrent, lambda batch: ((torch.randint(0, 99, (batch, 10)),), {})),
    "torch Transformer": Network(
        _Translator, lambda batch: (tuple(torch.randint(1, 99, (batch, n)) for n in (10, 7)), {})
    ),
}
