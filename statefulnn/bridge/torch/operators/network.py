"""What has a function in `statefulnn.functional`: the converted model runs the code that layers run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

import statefulnn.functional as F
from statefulnn.bridge.torch.operators._promotion import cast, dtype_of
from statefulnn.bridge.torch.operators._table import OPERATORS, operator

if TYPE_CHECKING:
    import jax

    from statefulnn.bridge.torch.operators._table import Scalar, Size

_REDUCTIONS = ("none", "mean", "sum")

# --------------------------------------------------------------------------------------------------
# Arguments in the same order

for _name in (
    "linear bilinear gelu silu mish hardsigmoid hardswish hardshrink softshrink glu relu relu6 "
    "leaky_relu prelu selu celu hardtanh softplus threshold conv1d conv2d conv3d layer_norm group_norm "
    "rms_norm scaled_dot_product_attention pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle cosine_similarity adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d conv_transpose1d conv_transpose2d conv_transpose3d"
).split():
    operator(_name)(getattr(F, _name))
operator("log_sigmoid")(F.logsigmoid)
operator("adaptive_max_pool1d")(F.adaptive_max_pool1d_with_indices)
operator("adaptive_max_pool2d")(F.adaptive_max_pool2d_with_indices)
operator("adaptive_max_pool3d")(F.adaptive_max_pool3d_with_indices)


@operator("layer_norm")
def layer_norm(
    x: jax.Array,
    shape: Sequence[int],
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
    *_: bool,
    **__: bool,
) -> jax.Array:
    return F.layer_norm(x, tuple(shape), weight, bias, eps)


@operator("group_norm")
def group_norm(
    x: jax.Array,
    groups: int,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
    *_: bool,
) -> jax.Array:
    return F.group_norm(x, groups, weight, bias, eps)


@operator("rms_norm")
def rms_norm(
    x: jax.Array, shape: Sequence[int], weight: jax.Array | None = None, eps: float | None = None
) -> jax.Array:
    return F.rms_norm(x, tuple(shape), weight, eps)


@operator("elu")
def elu(x: jax.Array, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> jax.Array:
    if scale == 1 and input_scale == 1:
        return F.elu(x, alpha)
    inner = jnp.asarray(input_scale, x.dtype) * x
    curved = jnp.asarray(alpha, x.dtype) * jnp.expm1(jnp.minimum(inner, jnp.zeros_like(inner)))
    return jnp.asarray(scale, x.dtype) * jnp.where(x > 0, x, curved)


# --------------------------------------------------------------------------------------------------
# Softmax, dropout, embeddings


@operator("softmax", "_softmax")
def softmax(x: jax.Array, dim: int, dtype: str | bool | None = None) -> jax.Array:
    return F.softmax(x, dim, dtype=dtype_of(dtype) if isinstance(dtype, str) else None)


@operator("log_softmax", "_log_softmax")
def log_softmax(x: jax.Array, dim: int, dtype: str | bool | None = None) -> jax.Array:
    return F.log_softmax(x, dim, dtype=dtype_of(dtype) if isinstance(dtype, str) else None)


@operator("_safe_softmax")
def safe_softmax(x: jax.Array, dim: int, dtype: str | bool | None = None) -> jax.Array:
    masked = jnp.all(x == -jnp.inf, dim, keepdims=True)
    out = softmax(jnp.where(masked, jnp.zeros_like(x), x), dim, dtype)
    return jnp.where(masked, jnp.zeros_like(out), out)


for _name, _function in {
    "dropout": F.dropout,
    "alpha_dropout": F.alpha_dropout,
    "feature_alpha_dropout": F.feature_alpha_dropout,
}.items():
    operator(_name)(lambda x, p, train, _f=_function: _f(x, p, training=train))


@operator("feature_dropout")
def feature_dropout(x: jax.Array, p: float, train: bool) -> jax.Array:
    """Zero whole channels, as F.dropout2d does for (N, C, *)."""
    if not train or p == 0:
        return x
    kept = F.dropout(jnp.ones(x.shape[:2] + (1,) * (x.ndim - 2), x.dtype), p)
    return x * kept


@operator("native_dropout")
def native_dropout(x: jax.Array, p: float, train: bool | None) -> tuple[jax.Array, jax.Array]:
    if train is False:
        return x, jnp.ones(x.shape, bool)
    kept = F.dropout(jnp.ones(x.shape, x.dtype), p)
    return x * kept, kept != 0


@operator("embedding")
def embedding(
    weight: jax.Array,
    x: jax.Array,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> jax.Array:
    padding = None if padding_idx < 0 else padding_idx
    return F.embedding(x, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


# --------------------------------------------------------------------------------------------------
# Convolutions and pooling


@operator("conv1d.padding", "conv2d.padding", "conv3d.padding")
def conv_padded(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None = None, stride: Size = 1,
    padding: str = "valid", dilation: Size = 1, groups: int = 1,
) -> jax.Array:  # fmt: skip
    return _conv(weight)(x, weight, bias, _plain(stride), padding, _plain(dilation), groups)


def _conv(weight: jax.Array) -> Callable:
    return (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@operator("conv1d", "conv2d", "conv3d")
def conv(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None = None, stride: Size = 1,
    padding: Size = 0, dilation: Size = 1, groups: int = 1,
) -> jax.Array:  # fmt: skip
    return _conv(weight)(x, weight, bias, _plain(stride), _plain(padding), _plain(dilation), groups)


@operator("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    x: jax.Array, weight: Any, bias: jax.Array | None = None, stride: Size = 1,
    padding: Size = 0, output_padding: Size = 0, groups: int = 1, dilation: Size = 1,
) -> jax.Array:  # fmt: skip
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
    sizes = map(_plain, (stride, padding, output_padding))
    return function(x, weight, bias, *sizes, groups, _plain(dilation))


@operator("convolution")
def convolution(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, stride: Size, padding: Size,
    dilation: Size, transposed: bool, output_padding: Size, groups: int,
) -> jax.Array:  # fmt: skip
    if transposed:
        return conv_transpose(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(x, weight, bias, stride, padding, dilation, groups)


def _pooled(function: Callable) -> Callable:
    def pool(
        x: jax.Array,
        kernel_size: Size,
        stride: Size | None = (),
        *rest: Size | bool | None,
        **kwargs: Size | bool | None,
    ) -> Any:
        stride = _plain(stride) or None  # an empty list stands for the size of the window
        return function(x, _plain(kernel_size), stride, *map(_plain, rest), **kwargs)

    return pool


for _n in (1, 2, 3):
    operator(f"max_pool{_n}d")(_pooled(getattr(F, f"max_pool{_n}d")))
    operator(f"max_pool{_n}d_with_indices")(_pooled(getattr(F, f"max_pool{_n}d_with_indices")))
    operator(f"avg_pool{_n}d")(_pooled(getattr(F, f"avg_pool{_n}d")))
operator("_adaptive_avg_pool2d")(lambda x, size: F.adaptive_avg_pool2d(x, _plain(size)))


@operator("im2col")
def im2col(
    x: jax.Array, kernel_size: Size, dilation: Size, padding: Size, stride: Size
) -> jax.Array:
    return F.unfold(x, *map(_plain, (kernel_size, dilation, padding, stride)))


@operator("col2im")
def col2im(
    x: jax.Array, output_size: Size, kernel_size: Size, dilation: Size, padding: Size, stride: Size
) -> jax.Array:
    return F.fold(x, *map(_plain, (output_size, kernel_size, dilation, padding, stride)))


# --------------------------------------------------------------------------------------------------
# Normalisation by running statistics


@operator("batch_norm")
def batch_norm(
    x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, mean: jax.Array | None,
    var: jax.Array | None, training: bool, momentum: float, eps: float, *_: bool,
) -> jax.Array:  # fmt: skip
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


@operator("batch_norm.updating")
def batch_norm_updating(
    x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, mean: jax.Array | None,
    var: jax.Array | None, training: bool, momentum: float, eps: float, *_: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Return the output and the new running mean and variance."""
    return F.batch_norm_with_stats(x, mean, var, weight, bias, momentum, eps)[:3]


@operator("instance_norm")
def instance_norm(
    x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, mean: jax.Array | None,
    var: jax.Array | None, use_input_stats: bool, momentum: float, eps: float, *_: bool,
) -> jax.Array:  # fmt: skip
    return F.instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps)


@operator("instance_norm.updating")
def instance_norm_updating(
    x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, mean: jax.Array | None,
    var: jax.Array | None, use_input_stats: bool, momentum: float, eps: float, *_: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Return the output and the new running mean and variance."""
    return F.instance_norm_with_stats(x, mean, var, weight, bias, momentum, eps)


# --------------------------------------------------------------------------------------------------
# Padding and resampling


@operator("pad")
def pad(
    x: jax.Array, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> jax.Array:
    if all(isinstance(n, int) for n in pad):
        return F.pad(x, tuple(pad), mode, value)
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    modes = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    options = {"constant_values": value or 0} if mode == "constant" else {}
    whole = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    return jnp.pad(x, whole, modes.get(mode, mode), **options)


@operator("constant_pad_nd")
def constant_pad_nd(x: jax.Array, pad: Sequence[int], value: Scalar = 0) -> jax.Array:
    return OPERATORS["pad"](x, pad, "constant", value)


for _mode in ("reflection", "replication"):
    for _n in (1, 2, 3):
        _called = {"reflection": "reflect", "replication": "replicate"}[_mode]
        operator(f"{_mode}_pad{_n}d")(lambda x, pad, _m=_called: F.pad(x, tuple(pad), _m))


def _resized(mode: str, aligned: bool, antialias: bool = False) -> None:
    def resize(x: jax.Array, size: Sequence[int] | None, *rest: Any) -> jax.Array:
        corners, factors = (rest[0], rest[1:]) if aligned else (None, rest)
        if len(factors) == 1 and isinstance(factors[0], list):
            factors = factors[0]
        factors = (
            [f for f in factors if f is not None] if not isinstance(factors, list) else factors
        )
        if size is not None:
            return F.interpolate(
                x, size=tuple(size), mode=mode, align_corners=corners, antialias=antialias
            )
        return F.interpolate(
            x, scale_factor=tuple(factors), mode=mode, align_corners=corners, antialias=antialias
        )

    name = {"nearest-exact": "_upsample_nearest_exact", "area": ""}.get(mode, f"upsample_{mode}")
    name = f"_{name}" if antialias else name
    dims = {"linear": (1,), "bilinear": (2,), "bicubic": (2,), "trilinear": (3,)}.get(
        mode, (1, 2, 3)
    )
    for n in dims:
        operator(f"{name}{n}d{'_aa' if antialias else ''}")(resize)


for _mode in ("nearest", "nearest-exact"):
    _resized(_mode, aligned=False)
for _mode in ("linear", "bilinear", "bicubic", "trilinear"):
    _resized(_mode, aligned=True)
for _mode in ("bilinear", "bicubic"):
    _resized(_mode, aligned=True, antialias=True)


@operator("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(
    x: jax.Array, grid: jax.Array, mode: int, padding_mode: int, align_corners: bool
) -> jax.Array:
    modes, borders = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
    return F.grid_sample(x, grid, modes[mode], borders[padding_mode], align_corners)


@operator("affine_grid_generator")
def affine_grid(theta: jax.Array, size: Sequence[int], align_corners: bool) -> jax.Array:
    return F.affine_grid(theta, tuple(size), align_corners)


# --------------------------------------------------------------------------------------------------
# Losses


@operator("cross_entropy_loss")
def cross_entropy(
    x: jax.Array, target: jax.Array, weight: jax.Array | None = None, reduction: int = 1,
    ignore_index: int = -100, label_smoothing: float = 0.0,
) -> jax.Array:  # fmt: skip
    return F.cross_entropy(
        x, target, weight, ignore_index=ignore_index, reduction=_REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
    )  # fmt: skip


@operator("nll_loss", "nll_loss_nd", "nll_loss2d")
def nll_loss(
    x: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
) -> jax.Array:
    return F.nll_loss(
        x, target, weight, ignore_index=ignore_index, reduction=_REDUCTIONS[reduction]
    )


@operator("kl_div")
def kl_div(
    x: jax.Array, target: jax.Array, reduction: int = 1, *, log_target: bool = False
) -> jax.Array:
    return F.kl_div(x, target, reduction=_REDUCTIONS[reduction], log_target=log_target)


@operator("mse_loss")
def mse_loss(x: jax.Array, target: jax.Array, reduction: int = 1) -> jax.Array:
    return F.mse_loss(x, target, reduction=_REDUCTIONS[reduction])


@operator("l1_loss")
def l1_loss(x: jax.Array, target: jax.Array, reduction: int = 1) -> jax.Array:
    return F.l1_loss(x, target, reduction=_REDUCTIONS[reduction])


@operator("smooth_l1_loss")
def smooth_l1_loss(
    x: jax.Array, target: jax.Array, reduction: int = 1, beta: float = 1.0
) -> jax.Array:
    return F.smooth_l1_loss(x, target, reduction=_REDUCTIONS[reduction], beta=beta)


@operator("huber_loss")
def huber_loss(
    x: jax.Array, target: jax.Array, reduction: int = 1, delta: float = 1.0
) -> jax.Array:
    return F.huber_loss(x, target, reduction=_REDUCTIONS[reduction], delta=delta)


@operator("binary_cross_entropy")
def binary_cross_entropy(
    x: jax.Array, target: jax.Array, weight: jax.Array | None = None, reduction: int = 1
) -> jax.Array:
    return F.binary_cross_entropy(x, target, weight, reduction=_REDUCTIONS[reduction])


@operator("binary_cross_entropy_with_logits")
def binary_cross_entropy_with_logits(
    x: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    pos_weight: jax.Array | None = None,
    reduction: int = 1,
) -> jax.Array:
    target = cast(target, x.dtype)
    return F.binary_cross_entropy_with_logits(
        x, target, weight, pos_weight=pos_weight, reduction=_REDUCTIONS[reduction]
    )


# --------------------------------------------------------------------------------------------------
# What torch's composite operators are made of: outputs, and the statistics that its gradients need


@operator("native_layer_norm")
def native_layer_norm(
    x: jax.Array, shape: Sequence[int], weight: jax.Array | None, bias: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    mean, inverse = _moments(x, axes, eps)
    return F.layer_norm(x, tuple(shape), weight, bias, eps), mean, inverse


@operator("native_group_norm")
def native_group_norm(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    n: int,
    c: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean, inverse = _moments(x.reshape(n, groups, -1), (2,), eps)
    return F.group_norm(x, groups, weight, bias, eps), mean[..., 0], inverse[..., 0]


def _moments(x: jax.Array, axes: tuple[int, ...], eps: float) -> tuple[jax.Array, jax.Array]:
    variance = jnp.var(x, axes, keepdims=True)
    return jnp.mean(x, axes, keepdims=True), 1 / jnp.sqrt(variance + eps)


@operator("_native_batch_norm_legit")
def native_batch_norm_with_stats(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array,
    var: jax.Array,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if not training:
        return native_batch_norm(x, weight, bias, mean, var, momentum, eps)
    return native_batch_norm_of_batch(x, weight, bias, training, momentum, eps)


@operator("_native_batch_norm_legit.updating")
def native_batch_norm_updating(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array,
    var: jax.Array,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Return the three outputs, and the new running mean and variance."""
    _, *new = batch_norm_updating(x, weight, bias, mean, var, training, momentum, eps)
    return native_batch_norm_of_batch(x, weight, bias, training, momentum, eps), *new


@operator("_native_batch_norm_legit_no_training")
def native_batch_norm(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array,
    var: jax.Array,
    momentum: float,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    none = jnp.zeros(0, x.dtype)
    return F.batch_norm(x, mean, var, weight, bias, False, momentum, eps), none, none


@operator("_native_batch_norm_legit.no_stats")
def native_batch_norm_of_batch(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean, inverse = _moments(x, (0, *range(2, x.ndim)), eps)
    out = F.batch_norm(x, None, None, weight, bias, True, momentum, eps)
    return out, mean.ravel(), inverse.ravel()


@operator("_adaptive_avg_pool3d")
def adaptive_avg_pool3d(x: jax.Array, size: Size) -> jax.Array:
    return F.adaptive_avg_pool3d(x, _plain(size))


@operator("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    weight: jax.Array, x: jax.Array, offsets: jax.Array, scale_grad_by_freq: bool = False,
    mode: int = 0, sparse: bool = False, per_sample_weights: jax.Array | None = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    padding = None if padding_idx is None or padding_idx < 0 else padding_idx
    out = F.embedding_bag(
        x, weight, offsets, mode=("sum", "mean", "max")[mode], include_last_offset=include_last_offset,
        per_sample_weights=per_sample_weights, padding_idx=padding,
    )  # fmt: skip
    none = jnp.zeros(0, jnp.int32)
    return out, none, none, none
