"""Schemes: initial values for a whole model, by rules that need its depth or width.

A scheme knows layers by the names of their classes (`Linear`, `Conv2d`, ... and subclasses or copies of
these names), so it also serves layers that were copied into a project.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from statefulnn.core.box import Box
from statefulnn.core.errors import ShapeError, UnknownNameError, explain
from statefulnn.core.module import Module
from statefulnn.core.parameter import Parameter
from statefulnn.init import _initializers as draw

Pattern = str | Iterable[str] | Callable[[str], bool] | None


def _is(module: Module, *names: str) -> bool:
    return any(cls.__name__ in names for cls in type(module).__mro__)


_CONV = ("Conv1d", "Conv2d", "Conv3d")
_CONV_TRANSPOSE = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
_BATCH_NORM = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
_NORM = (
    *_BATCH_NORM,
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "GroupNorm",
    "LayerNorm",
    "RMSNorm",
)


def _matching(names: Iterable[str], pattern: Pattern, default: str, what: str) -> set[str]:
    """Return the names that a pattern matches; one that matches nothing is an error."""
    names = list(names)
    if callable(pattern):
        found, shown = {n for n in names if pattern(n)}, "the function"
    else:
        wanted = (pattern,) if isinstance(pattern, str) else tuple(pattern or ())
        shown = ", ".join(map(repr, wanted))
        if pattern is None:
            return {n for n in names if re.search(default, n)}
        found = {n for n in names if any(fnmatch.fnmatchcase(n, w) for w in wanted)}
    if not found:
        raise UnknownNameError(
            explain(
                f"nn.init.apply_scheme was given {what} that match nothing: {shown}",
                f"the candidates are {', '.join(names[:12]) or 'none'}{' ...' if len(names) > 12 else ''}",
                f'{what}="*.out_proj", with wildcards as in file names',
            )
        )
    return found


def _norm_to_identity(module: Module) -> None:
    if getattr(module, "weight", None) is not None:
        draw.ones_(module.weight)
    if getattr(module, "bias", None) is not None:
        draw.zeros_(module.bias)


def _zero_bias(module: Module) -> None:
    if getattr(module, "bias", None) is not None:
        draw.zeros_(module.bias)


def _attention_weights(module: Module) -> list[Any]:
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return [module._parameters[n] for n in names if module._parameters.get(n) is not None]


def _gpt2(
    model: Module,
    *,
    std: float = 0.02,
    residual: Pattern = None,
    num_layers: int | None = None,
) -> None:
    """Linear and Embedding N(0, std²), biases 0; residual projections std / √(2 · layers).

    Options: `std`; `residual`, the names of the layers whose output is added to the residual stream
    (``*.c_proj``, ``*.out_proj``, ``*.linear2`` if left out); `num_layers`, half their number if left out.

    Source: Radford et al. 2019, section 2.3; karpathy/nanoGPT, model.py.
    """
    linear = {n: m for n, m in model.named_modules() if _is(m, "Linear")}
    ends = _matching(linear, residual, r"(^|\.)(c_proj|out_proj|linear2)$", "residual")
    layers = num_layers or max(1, len(ends) // 2)
    for name, m in model.named_modules():
        if name in linear:
            draw.normal_(m.weight, 0.0, std / math.sqrt(2 * layers) if name in ends else std)
            _zero_bias(m)
        elif _is(m, "Embedding", "EmbeddingBag"):
            draw.normal_(m.weight, 0.0, std)
            if m.padding_idx is not None:
                m.weight.value = m.weight.value.at[m.padding_idx].set(0)
        elif _is(m, "MultiheadAttention"):
            for weight in _attention_weights(m):
                draw.normal_(weight, 0.0, std)
            if m.in_proj_bias is not None:
                draw.zeros_(m.in_proj_bias)
        elif _is(m, *_NORM):
            _norm_to_identity(m)


def _vit(model: Module, *, std: float = 0.02, head: Pattern = None) -> None:
    """Linear truncated N(0, std²), biases 0; patch convolution LeCun normal; the head 0.

    Options: `std`; `head`, the names of the layers that start at zero (``head``, ``heads.*``, ``fc`` and
    ``classifier`` if left out).

    Source: Dosovitskiy et al. 2021; timm, vision_transformer.py (init_weights_vit_timm, lecun_normal_).
    """
    linear = {n: m for n, m in model.named_modules() if _is(m, "Linear")}
    heads = _matching(linear, head, r"(^|\.)(head|heads\..*|fc|classifier)$", "head")
    for name, m in model.named_modules():
        if name in heads:
            draw.zeros_(m.weight)
            _zero_bias(m)
        elif name in linear:
            draw.trunc_normal_(m.weight, std=std)
            _zero_bias(m)
        elif _is(m, *_CONV):
            _lecun_normal(m.weight, math.prod(m.weight.shape[1:]))
            _zero_bias(m)
        elif _is(m, "MultiheadAttention"):
            for weight in _attention_weights(m):
                draw.trunc_normal_(weight, std=std)
            if m.in_proj_bias is not None:
                draw.zeros_(m.in_proj_bias)
        elif _is(m, *_NORM):
            _norm_to_identity(m)


def _lecun_normal(weight: Parameter, fan_in: float) -> None:
    # Cut at two standard deviations, and stretched so that the variance is 1/fan_in after the cut.
    std = 1 / math.sqrt(max(fan_in, 1)) / 0.87962566103423978
    draw.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std)


def _lecun(model: Module) -> None:
    """Linear, Conv and recurrent inputs truncated normal with variance 1/fan_in, biases 0.

    Source: LeCun et al. 1998; the default of flax and haiku.
    """
    for _, m in model.named_modules():
        if _is(m, "Linear", *_CONV):
            _lecun_normal(m.weight, math.prod(m.weight.shape[1:]))
            _zero_bias(m)
        elif _is(m, *_CONV_TRANSPOSE):
            _lecun_normal(m.weight, m.weight.shape[0] / m.groups * math.prod(m.weight.shape[2:]))
            _zero_bias(m)
        elif _is(m, *_NORM):
            _norm_to_identity(m)


def _resnet(model: Module, *, residual: Pattern = None, fc_std: float = 0.01) -> None:
    """Conv N(0, 2/fan_out), norms 1 and 0, the last norm of each block 0, Linear N(0, fc_std²), biases 0.

    Options: `residual`, the names of the last norms of the blocks (the ``bn`` or ``norm`` of the highest
    number in each block if left out); `fc_std`.

    Source: He et al. 2015; Goyal et al. 2017 (arXiv 1706.02677) for the zero; torchvision, resnet.py.
    """
    norms = {n: m for n, m in model.named_modules() if _is(m, "GroupNorm", *_BATCH_NORM)}
    if residual is None:
        last = _last_of_each_block(norms)
    else:
        last = _matching(norms, residual, "", "residual")
    for name, m in model.named_modules():
        if _is(m, *_CONV):
            draw.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            _zero_bias(m)
        elif name in norms:
            _norm_to_identity(m)
            if name in last and m.weight is not None:
                draw.zeros_(m.weight)
        elif _is(m, "Linear"):
            draw.normal_(m.weight, 0.0, fc_std)
            _zero_bias(m)


def _last_of_each_block(norms: Iterable[str]) -> set[str]:
    """Return, of bn1, bn2, bn3 below one module, the last; a lone one is no end of a block."""
    numbered: dict[str, list[tuple[int, str]]] = {}
    for name in norms:
        match = re.fullmatch(r"((?:.*\.)?)(?:bn|norm)(\d+)", name)
        if match:
            numbered.setdefault(match[1], []).append((int(match[2]), name))
    return {max(found)[1] for found in numbered.values() if len(found) > 1}


def _mup(
    model: Module,
    *,
    base: Module | None = None,
    readout: Pattern = None,
) -> dict[str, float]:
    """Hidden weights with variance 1/fan_in, the readout 0, Embedding N(0, 1), biases 0.

    Options: `base`, the same model at the width where the learning rate was tuned; `readout`, the names of
    the last layers (``head``, ``lm_head``, ``readout``, ``fc``, ``classifier`` if left out). Returns the
    factors for Adam's learning rate by parameter name: base fan_in / fan_in for matrices whose input
    grows with the width, 1 for all others. Scale attention by 1/head_dim instead of 1/√head_dim yourself,
    and the logits by base width / width where the readout shares its weight with an embedding, whose
    rules it then follows.

    Source: Yang et al. 2022 (arXiv 2203.03466), table 8; microsoft/mup.
    """
    if base is None:
        raise ValueError(
            explain(
                'nn.init.apply_scheme(model, "mup") was given no base model',
                "learning rates are scaled by how much wider the model is than the one they were "
                "tuned on",
                'nn.init.apply_scheme(model, "mup", base=Model(width=128))',
            )
        )
    shapes = {n: tuple(p.shape) for n, p in base.named_parameters()}
    ours = {n: tuple(p.shape) for n, p in model.named_parameters()}
    if list(shapes) != list(ours):
        strange = sorted(set(shapes) ^ set(ours))
        raise UnknownNameError(
            explain(
                "nn.init.apply_scheme was given a base model with other parameters",
                f"only one of them has {', '.join(strange[:5]) or 'this order of names'}",
                "the same class with a smaller width",
            )
        )
    linear = {n: m for n, m in model.named_modules() if _is(m, "Linear")}
    last = _matching(linear, readout, r"(^|\.)(head|lm_head|readout|fc|classifier)$", "readout")
    # By identity: a tied weight has several names, and at zero nothing would ever reach the embedding.
    embedded = {id(m.weight) for m in model.modules() if _is(m, "Embedding", "EmbeddingBag")}
    for name, m in model.named_modules():
        if name in last:
            if id(m.weight) not in embedded:
                draw.zeros_(m.weight)
            _zero_bias(m)
        elif name in linear or _is(m, *_CONV):
            fan_in = math.prod(m.weight.shape[1:])
            draw.normal_(m.weight, 0.0, 1 / math.sqrt(max(fan_in, 1)))
            _zero_bias(m)
        elif _is(m, "Embedding", "EmbeddingBag"):
            draw.normal_(m.weight)
        elif _is(m, "MultiheadAttention"):
            for weight in _attention_weights(m):
                draw.normal_(weight, 0.0, 1 / math.sqrt(weight.shape[1]))
            if m.in_proj_bias is not None:
                draw.zeros_(m.in_proj_bias)
        elif _is(m, *_NORM):
            _norm_to_identity(m)
    factors = {}
    for (name, shape), p in zip(ours.items(), model.parameters(), strict=True):
        grown = len(shape) > 1 and id(p) not in embedded
        factors[name] = math.prod(shapes[name][1:]) / math.prod(shape[1:]) if grown else 1.0
    return factors


SCHEMES: dict[str, Callable[..., Any]] = {
    "gpt2": _gpt2,
    "vit": _vit,
    "resnet": _resnet,
    "lecun": _lecun,
    "mup": _mup,
}


_RANKS = {
    "Linear": 2,
    "Embedding": 2,
    **{name: rank for names in (_CONV, _CONV_TRANSPOSE) for rank, name in enumerate(names, 3)},
}


def _require_unstacked(model: Module) -> None:
    """Raise for layers with an axis of members: a scheme would take it for one of features."""
    for name, m in model.named_modules():
        for layer, rank in _RANKS.items():
            shape = getattr(getattr(m, "weight", None), "shape", ()) if _is(m, layer) else ()
            if len(shape) > rank:
                raise ShapeError(
                    explain(
                        f"nn.init.apply_scheme met the {layer} {name!r} with a weight of shape {shape}",
                        "its first axis counts the members of an ensemble, and the variance of each "
                        "follows from the shape of one",
                        "apply the scheme in make_member, or to each member: "
                        "ensemble.map(lambda m: nn.init.apply_scheme(m, scheme) and None)",
                    )
                )


def apply_scheme(model: Any, scheme: str, **options: Any) -> Any:
    """Give a whole model initial values by a scheme that knows its depth or width.

    Args:
        model: the model; its parameters are written in place.
        scheme: "gpt2", "vit", "resnet", "lecun" or "mup"; ``nn.init.describe(scheme)`` prints the rules.
        options: what the scheme takes: `std` and `residual` (names with wildcards, or a function of the
            name), `num_layers`, `head`, `base` ...

    Returns:
        The model; for "mup" the factors for Adam's learning rate by parameter name.

    Raises:
        ValueError: if there is no such scheme.
        UnknownNameError: if a pattern matches no layer. The model is then as it was.
        ShapeError: for layers whose weights are stacked, as in an `Ensemble`.

    Example:
        >>> import statefulnn as nn
        >>> model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))
        >>> model = nn.init.apply_scheme(model, "gpt2")
        >>> 0.01 < float(model[0].weight.std()) < 0.03
        True
    """
    if scheme not in SCHEMES:
        raise ValueError(
            explain(
                f"asked for the initialisation scheme {scheme!r}",
                f"the schemes are {', '.join(map(repr, SCHEMES))}",
                'nn.init.apply_scheme(model, "gpt2")',
            )
        )
    _require_unstacked(model)
    before = [(p, p.value) for p in model.parameters()]
    try:
        result = SCHEMES[scheme](model, **options)
    except BaseException:
        for p, value in before:
            if p.value is not value:
                Box.write(p, value)
        raise
    return model if result is None else result
