"""Fusing batch norm in evaluation mode into the layer before it.

Source: ``torch.nn.utils.fusion``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jax.typing import ArrayLike

from statefulnn.core.box import unwrap
from statefulnn.core.errors import explain
from statefulnn.core.module import Module
from statefulnn.core.parameter import Parameter

M = TypeVar("M", bound=Module)


def _require_fusible(layer: Module, bn: Module, function: str) -> None:
    if layer.training or bn.training:
        raise AssertionError(
            explain(
                f"{function} of modules in training mode",
                "Fusion only for eval! In training mode batch norm uses the statistics of the batch",
                "call eval() on both first",
            )
        )
    if bn.running_mean is None or bn.running_var is None:
        raise AssertionError(
            explain(
                f"{function} with a batch norm that keeps no statistics",
                "bn.running_mean and bn.running_var must not be None",
                "build it with track_running_stats=True",
            )
        )


@jax.jit
def _fused(
    w: jax.Array,
    b: jax.Array | None,
    mean: jax.Array,
    var: jax.Array,
    eps: ArrayLike,
    scale: jax.Array | None,
    shift: jax.Array | None,
) -> Any:
    """Return the factor of each channel, and the bias."""
    factor = jax.lax.rsqrt(var + eps)
    if scale is not None:
        factor = factor * scale.astype(factor.dtype)
    bias = -mean if b is None else b.astype(mean.dtype) - mean
    bias = bias * factor
    return factor, bias if shift is None else bias + shift.astype(bias.dtype)


def _parameters(
    w: ArrayLike,
    b: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    eps: float,
    scale: ArrayLike | None,
    shift: ArrayLike | None,
    shape: Sequence[int],
) -> tuple[Parameter, Parameter]:
    arrays = [unwrap(x) for x in (w, b, mean, var, eps, scale, shift)]
    factor, bias = _fused(*arrays)
    value = arrays[0]
    with jax.numpy_dtype_promotion("standard"):
        weight = (value * factor.reshape(shape)).astype(value.dtype)
    bias = bias.astype(value.dtype if b is None else arrays[1].dtype)
    return (
        Parameter(weight, getattr(w, "requires_grad", False)),
        Parameter(bias, getattr(b, "requires_grad", False)),
    )


def fuse_conv_bn_eval(conv: M, bn: Module, transpose: bool = False) -> M:
    """Return a convolution that does what a convolution and a batch norm do.

    Args:
        conv: a convolution in evaluation mode.
        bn: the batch norm that takes its output, in evaluation mode.
        transpose: whether it is a transposed convolution.

    Returns:
        A new convolution.

    Raises:
        AssertionError: in training mode, or without running statistics.

    Source: ``torch.nn.utils.fuse_conv_bn_eval``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> conv, bn = nn.Conv2d(2, 3, 3).eval(), nn.BatchNorm2d(3).eval()
        >>> x = jnp.ones((1, 2, 5, 5))
        >>> bool(jnp.allclose(nn.utils.fuse_conv_bn_eval(conv, bn)(x), bn(conv(x)), atol=1e-5))
        True
    """
    _require_fusible(conv, bn, "fuse_conv_bn_eval")
    fused: Any = copy.deepcopy(conv)
    fused.weight, fused.bias = fuse_conv_bn_weights(
        fused.weight,
        fused.bias,
        bn.running_mean,
        bn.running_var,
        bn.eps,
        bn.weight,
        bn.bias,
        transpose,
    )
    return fused


def fuse_conv_bn_weights(
    conv_w: ArrayLike,
    conv_b: ArrayLike | None,
    bn_rm: ArrayLike,
    bn_rv: ArrayLike,
    bn_eps: float,
    bn_w: ArrayLike | None,
    bn_b: ArrayLike | None,
    transpose: bool = False,
) -> tuple[Parameter, Parameter]:
    """Return weight and bias of a convolution that does what convolution and batch norm do.

    Args:
        conv_w: ``(C_out, C_in, ...)``, or ``(C_in, C_out, ...)`` if transposed.
        conv_b: ``(C_out,)`` or None.
        bn_rm, bn_rv: running mean and variance, ``(C_out,)``.
        bn_eps: added to the variance.
        bn_w, bn_b: ``(C_out,)`` or None.
        transpose: whether it is a transposed convolution.

    Returns:
        ``(weight, bias)``, parameters that are trained if those given were.

    Source: ``torch.nn.utils.fuse_conv_bn_weights``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> one = jnp.ones(1)
        >>> weight, bias = nn.utils.fuse_conv_bn_weights(
        ...     jnp.ones((1, 1, 1)), None, one, one, 0.0, 2 * one, one
        ... )
        >>> float(weight[0, 0, 0]), float(bias[0])
        (2.0, -1.0)
    """
    ndim = unwrap(conv_w).ndim
    shape = [1, -1] if transpose else [-1, 1]
    shape += [1] * (ndim - 2)
    return _parameters(conv_w, conv_b, bn_rm, bn_rv, bn_eps, bn_w, bn_b, shape)


def fuse_linear_bn_eval(linear: M, bn: Module) -> M:
    """Return a linear layer that does what a linear layer and a batch norm do.

    Args:
        linear: a linear layer in evaluation mode.
        bn: the batch norm that takes its output, in evaluation mode.

    Returns:
        A new linear layer.

    Raises:
        AssertionError: in training mode, without running statistics, or for another number of
            features.

    Source: ``torch.nn.utils.fuse_linear_bn_eval``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> linear, bn = nn.Linear(2, 3).eval(), nn.BatchNorm1d(3).eval()
        >>> x = jnp.ones((4, 2))
        >>> bool(
        ...     jnp.allclose(nn.utils.fuse_linear_bn_eval(linear, bn)(x), bn(linear(x)), atol=1e-5)
        ... )
        True
    """
    _require_fusible(linear, bn, "fuse_linear_bn_eval")
    if bn.num_features not in (linear.out_features, 1):
        raise AssertionError(
            explain(
                f"fuse_linear_bn_eval of a linear layer with out_features={linear.out_features} and a "
                f"batch norm with num_features={bn.num_features}",
                "To fuse, linear.out_features == bn.num_features or bn.num_features == 1",
                f"nn.BatchNorm1d({linear.out_features})",
            )
        )
    fused: Any = copy.deepcopy(linear)
    fused.weight, fused.bias = fuse_linear_bn_weights(
        fused.weight,
        fused.bias,
        bn.running_mean,
        bn.running_var,
        bn.eps,
        bn.weight,
        bn.bias,
    )
    return fused


def fuse_linear_bn_weights(
    linear_w: ArrayLike,
    linear_b: ArrayLike | None,
    bn_rm: ArrayLike,
    bn_rv: ArrayLike,
    bn_eps: float,
    bn_w: ArrayLike | None,
    bn_b: ArrayLike | None,
) -> tuple[Parameter, Parameter]:
    """Return weight and bias of a linear layer that does what linear layer and batch norm do.

    Args:
        linear_w: ``(out_features, in_features)``.
        linear_b: ``(out_features,)`` or None.
        bn_rm, bn_rv: running mean and variance, ``(out_features,)``.
        bn_eps: added to the variance.
        bn_w, bn_b: ``(out_features,)`` or None.

    Returns:
        ``(weight, bias)``, parameters that are trained if those given were.

    Source: ``torch.nn.utils.fuse_linear_bn_weights``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> one = jnp.ones(1)
        >>> weight, bias = nn.utils.fuse_linear_bn_weights(
        ...     jnp.ones((1, 2)), None, one, one, 0.0, 2 * one, one
        ... )
        >>> weight.tolist(), bias.tolist()
        ([[2.0, 2.0]], [-1.0])
    """
    return _parameters(linear_w, linear_b, bn_rm, bn_rv, bn_eps, bn_w, bn_b, (-1, 1))
