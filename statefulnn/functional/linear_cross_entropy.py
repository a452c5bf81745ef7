"""A linear layer and its cross entropy in one, which need not keep all logits."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.errors import explain
from statefulnn.functional._autocast import product_of_loss
from statefulnn.functional._checks import (
    LOW_PRECISION,
    array,
    reduction_of,
    require_same_dtype,
    shape_error,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional.cross_entropy import (
    check_classes,
    cross_entropy,
    losses_of_classes,
    weighted,
)
from statefulnn.functional.linear import linear

# What "auto" stands for, by platform: more precision where low precision is computed in float32 anyway.
_AUTO = {"cpu": ("accurate", "aspect_ratio"), "gpu": ("compact", "aspect_ratio:2")}


@dataclasses.dataclass(slots=True, frozen=True)
class LinearCrossEntropyOptions:
    """How `F.linear_cross_entropy` goes through the batch in chunks.

    The logits of one chunk are made, reduced to losses and dropped, and made again for the derivative:
    the ``(N, C)`` array of all logits never exists. That pays where C is large: the head of a language
    model. It can be compiled, mapped and differentiated any number of times.

    Args:
        allow_retain_graph: accepted for compatibility with torch; nothing is consumed here.
        batch_chunk_size: the rows of a chunk; None for all of them, unless a method is given.
        chunking_method: how the rows of a chunk are chosen. "aspect_ratio": so that the logits of a
            chunk take as much memory as the input; "aspect_ratio:N": an N-th of that; "auto": one of
            the two, by platform; None: `batch_chunk_size`.
        acc_policy: "accurate" and "balanced" sum the derivative of the weights in `acc_dtype`,
            "compact" in the dtype of the weights; "auto" chooses by platform.
        acc_dtype: the dtype of logits and sums; None for float32, or float64 for such inputs.

    Raises:
        ValueError: for a value that is none of these.

    Source: ``torch.nn.LinearCrossEntropyOptions``.

    Example:
        >>> import statefulnn as nn
        >>> nn.LinearCrossEntropyOptions(batch_chunk_size=256).batch_chunk_size
        256
    """

    allow_retain_graph: bool = False
    batch_chunk_size: int | None = None
    chunking_method: str | None = "auto"
    acc_policy: Literal["accurate", "balanced", "compact", "auto"] = "auto"
    acc_dtype: Any = None

    def __post_init__(self) -> None:
        if self.acc_policy not in ("auto", "accurate", "balanced", "compact"):
            raise _invalid(
                "acc_policy", self.acc_policy, '"auto", "accurate", "balanced" or "compact"'
            )
        if self.chunking_method not in (None, "auto"):
            name, colon, factor = self.chunking_method.partition(":")
            factor = factor if colon else "1"
            if name != "aspect_ratio" or not factor.isdigit() or int(factor) < 1:
                raise _invalid(
                    "chunking_method",
                    self.chunking_method,
                    '"auto", "aspect_ratio", "aspect_ratio:2" or None',
                )
        size = self.batch_chunk_size
        if size is not None and not (isinstance(size, int) and size > 0):
            raise _invalid("batch_chunk_size", size, "a positive int, or None")
        if self.acc_dtype is not None and jnp.dtype(self.acc_dtype).name not in (
            "float16",
            "bfloat16",
            "float32",
            "float64",
        ):
            raise _invalid("acc_dtype", self.acc_dtype, "a floating dtype, or None")


def _invalid(name: str, value: object, choices: str) -> ValueError:
    return ValueError(
        explain(
            f"made nn.LinearCrossEntropyOptions with {name}={value!r}",
            f"it is {choices}",
            "nn.LinearCrossEntropyOptions(), which chooses by itself",
        )
    )


def _rows_of_a_chunk(
    options: LinearCrossEntropyOptions, rows: int, features: int, classes: int
) -> int:
    given, method = options.batch_chunk_size, options.chunking_method
    if method == "auto":
        method = None if given else _AUTO.get(jax.default_backend(), _AUTO["gpu"])[1]
    if method is None:
        return max(1, min(given or rows, rows))
    factor = int(method.partition(":")[2] or 1)
    wide = max(1, -(-classes // max(1, features)))
    target = max(1, -(-rows // wide))
    size = max(1, min((1 << (target - 1).bit_length()) // factor, rows))
    if given is not None and given != size:
        raise ValueError(
            explain(
                f"F.linear_cross_entropy was given batch_chunk_size={given} and "
                f"chunking_method={method!r}",
                f"the method chooses chunks of {size} rows here",
                f"one of them: nn.LinearCrossEntropyOptions(batch_chunk_size={given})",
            )
        )
    return size


def _sums_in(options: LinearCrossEntropyOptions, dtype: DTypeLike) -> tuple[Any, bool]:
    # The dtype of logits, and whether the derivative of the weights is summed in it, too.
    policy = options.acc_policy
    if policy == "auto":
        policy = _AUTO.get(jax.default_backend(), _AUTO["gpu"])[0]
    wide = jnp.float32 if dtype in LOW_PRECISION else dtype
    acc_dtype = jnp.dtype(wide if options.acc_dtype is None else options.acc_dtype)
    if acc_dtype != dtype and not (dtype in LOW_PRECISION and acc_dtype == jnp.float32):
        raise RuntimeError(
            explain(
                f"F.linear_cross_entropy was given input of dtype {dtype} and acc_dtype {acc_dtype}",
                "sums are kept in the input's dtype, or of float16 and bfloat16 in float32",
                "acc_dtype=None",
            )
        )
    return acc_dtype, policy != "compact"


@functools.partial(compiled, static_argnums=(5, 6, 7, 8, 9, 10))
def _chunked(
    input: jax.Array,
    linear_weight: jax.Array,
    linear_bias: jax.Array | None,
    target: jax.Array,
    weight: jax.Array | None,
    reduction: str,
    ignore_index: int,
    chunk: int,
    acc_dtype: DTypeLike,
    wide_sums: bool,
    dtype: DTypeLike,
) -> Any:
    rows, features = input.shape
    chunks = max(1, -(-rows // chunk))
    missing = chunks * chunk - rows
    x = jnp.pad(input, ((0, missing), (0, 0))).reshape(chunks, chunk, features)
    ignored = jnp.full(missing, ignore_index, jnp.int32)
    y = jnp.concatenate([target.astype(jnp.int32), ignored]).reshape(chunks, chunk)
    # A cast outside of the loop: what the loop sums is the derivative of its result.
    table = linear_weight.astype(acc_dtype) if wide_sums else linear_weight

    @jax.checkpoint
    def losses(rows_of: jax.Array, target_of: jax.Array) -> tuple[Any, Any]:
        contracted = (((1,), (1,)), ((), ()))
        logits = lax.dot_general(
            rows_of.astype(table.dtype), table, contracted, preferred_element_type=acc_dtype
        )
        if linear_bias is not None:
            logits = logits + linear_bias.astype(acc_dtype)
        return losses_of_classes(logits, target_of, weight, ignore_index, 0.0, 1)

    def step(sums: tuple[jax.Array, jax.Array], one: tuple[Any, Any]) -> tuple[Any, Any]:
        loss, share = losses(*one)
        if reduction == "none":
            return sums, loss
        return (sums[0] + jnp.sum(loss), sums[1] + jnp.sum(share)), None

    zero = jnp.zeros((), acc_dtype)
    sums, each = lax.scan(step, (zero, zero), (x, y))
    if reduction == "none":
        return each.reshape(-1)[:rows].astype(dtype)
    return weighted(sums[0], sums[1], reduction).astype(dtype)


@functools.partial(compiled, static_argnums=(5, 6, 7, 8))
def _whole(
    input: jax.Array,
    linear_weight: jax.Array,
    linear_bias: jax.Array | None,
    target: jax.Array,
    weight: jax.Array | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    dtype: DTypeLike,
) -> Any:
    classes, *places, features = linear_weight.shape
    table = linear_weight.reshape(-1, features)
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = linear(input, table, bias).reshape(*input.shape[:-1], classes, *places)
    return cross_entropy(
        logits.astype(dtype),
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def linear_cross_entropy(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
) -> jax.Array:
    """Return ``cross_entropy(linear(input, linear_weight, linear_bias), target)``.

    Args:
        input: ``(N, in_features)`` or ``(in_features,)``.
        linear_weight: ``(C, in_features)``, or ``(C, d1, ..., dK, in_features)`` for several targets
            of one row.
        target: class numbers, ``(N,)``, ``()`` or ``(N, d1, ..., dK)``; or probabilities, floating and
            of the shape of the logits.
        linear_bias: ``(C,)`` or ``(C, d1, ..., dK)``.
        weight: a factor for each class, ``(C,)``.
        reduction: "mean" (for class numbers, weighted by `weight`), "sum" or "none".
        ignore_index: a target that is left out, for class numbers; None for -100.
        label_smoothing: the share of the target that is spread evenly over all classes.
        options: how to go through the rows in chunks; None makes all logits at once. Chunks are for
            class numbers, one to a row, without smoothing: otherwise a warning says that the options
            are left aside.

    Returns:
        A scalar, or one loss for each target.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes do not fit.
        IndexError: for a class that does not exist, where the values are at hand.

    Source: ``torch.nn.functional.linear_cross_entropy``; chunks as in Wijmans et al. 2024.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn, statefulnn.functional as F
        >>> options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
        >>> x, table, target = jnp.ones((5, 3)), jnp.zeros((4, 3)), jnp.arange(5) % 4
        >>> round(float(F.linear_cross_entropy(x, table, target, options=options)), 4)
        1.3863
    """
    function = "F.linear_cross_entropy"
    reduction = reduction_of(reduction, None, None, function)
    x = array(input, "input", function)
    table = array(linear_weight, "linear_weight", function)
    y = array(target, "target", function)
    bias = None if linear_bias is None else array(linear_bias, "linear_bias", function)
    w = None if weight is None else array(weight, "weight", function)
    _check(x, table, bias, function)
    (x, table, bias), loss_dtype = product_of_loss(x, table, bias)
    if loss_dtype is None:
        loss_dtype = x.dtype
    elif w is not None:
        w = w.astype(loss_dtype)
    classes, *places, features = table.shape
    if y.shape == (*x.shape[:-1], classes, *places) and ignore_index is not None:
        raise RuntimeError(
            explain(
                f"{function} was given class probabilities and ignore_index={ignore_index}",
                "a class can be ignored only where the target holds class numbers",
                "leave ignore_index out",
            )
        )
    ignored = -100 if ignore_index is None else ignore_index
    if options is not None:
        numbers = jnp.issubdtype(y.dtype, jnp.integer)
        if numbers and not places and not label_smoothing and y.shape == x.shape[:-1]:
            same = {"input": x, "linear_weight": table, "linear_bias": bias}
            if loss_dtype == x.dtype:
                same["weight"] = w
            require_same_dtype(function, **same)
            if w is not None and w.shape != (classes,):
                raise _misfit(table, w, "weight", (classes,), function)
            rows = math.prod(x.shape[:-1])
            chunk = _rows_of_a_chunk(options, rows, features, classes)
            acc_dtype, wide = _sums_in(options, x.dtype)
            check_classes(x, y, ignored, function, classes=classes)
            out = _chunked(
                x.reshape(rows, features),
                table,
                bias,
                y.reshape(rows),
                w,
                reduction,
                ignored,
                chunk,
                acc_dtype,
                wide,
                loss_dtype,
            )
            return out.reshape(y.shape) if reduction == "none" else out
        warnings.warn(
            f"{function} leaves options aside: chunks are for class numbers, one to a row, without "
            f"label smoothing, and it was given linear_weight of shape {table.shape}, target of shape "
            f"{y.shape} and dtype {y.dtype}, label_smoothing={label_smoothing}",
            UserWarning,
            stacklevel=2,
        )
    check_classes(x, y, ignored, function, classes=classes)
    return _whole(x, table, bias, y, w, reduction, ignored, float(label_smoothing), loss_dtype)


def _check(x: jax.Array, table: jax.Array, bias: jax.Array | None, function: str) -> None:
    given = (
        f"{function} was given input of shape {x.shape} and linear_weight of shape {table.shape}"
    )
    if x.ndim not in (1, 2):
        raise shape_error(
            given, "an input with 1 or 2 dimensions is needed", "input.reshape(-1, in_features)"
        )
    if table.ndim < 2:
        raise shape_error(
            given, "the weight is (C, in_features)", "linear_weight with at least 2 dimensions"
        )
    if x.shape[-1] != table.shape[-1]:
        raise shape_error(
            given,
            f"the input has {x.shape[-1]} features and the weight expects {table.shape[-1]}",
            f"an input whose last axis is {table.shape[-1]}",
        )
    if bias is not None and bias.shape != table.shape[:-1]:
        raise _misfit(table, bias, "linear_bias", table.shape[:-1], function)
    if table.ndim > 2 and x.ndim == 1:
        raise shape_error(
            given, "several targets of one row need an axis of rows", "input[None], target[None]"
        )


def _misfit(
    table: jax.Array, x: jax.Array, name: str, wanted: tuple[int, ...], function: str
) -> Exception:
    return shape_error(
        f"{function} was given linear_weight of shape {table.shape} and {name} of shape {x.shape}",
        f"its shape must be {wanted}: one for each class",
        f"a {name} of shape {wanted}",
    )
