"""The initialisers of ``torch.nn.init``: they write a Parameter in place and return it."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from statefulnn.core.arrays import from_numpy, host_array
from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import RegistrationError, ShapeError, explain
from statefulnn.core.generator import Generator
from statefulnn.core.placement import is_meta
from statefulnn.init import _draw

Tensor = TypeVar("Tensor")

_LINEAR = (
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "sigmoid",
)


def _box(tensor: object, function: str) -> Any:
    if not isinstance(tensor, Box):
        raise RegistrationError(
            explain(
                f"init.{function} was given a value of type {type(tensor).__name__}",
                "it writes new values in place, and arrays are immutable",
                f"pass the Parameter: init.{function}(module.weight); a weight that is computed is "
                "written by assigning it, module.weight = new",
            )
        )
    return tensor


def _on_meta(box: Box) -> bool:
    """Say whether a box has no numbers, which are not drawn then.

    Copies of such a box hold the very same struct, and nn.materialize gives them the same numbers; after
    an initialiser they would have their own.
    """
    if not is_meta(box.value):
        return False
    if current_trace() is EAGER:
        Box.write(box, jax.ShapeDtypeStruct(box.value.shape, box.value.dtype))
    return True


def _write(box: Box, values: object) -> Any:
    """Put values into a box, on the device where it is."""
    if _on_meta(box):
        return box
    old = box.value
    if isinstance(values, np.ndarray):
        placed = not isinstance(old, Tracer) and getattr(old, "committed", False)
        values = from_numpy(
            values.astype(old.dtype, copy=False), old.sharding if placed else None, copy=False
        )
    box.write(values)
    return box


def _filled(box: Box, value: float) -> Any:
    if _on_meta(box):
        return box
    values = host_array(box.value.shape, box.value.dtype, np.zeros)
    if value:
        values[...] = value
    return _write(box, values)


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """Return the factor by which a non-linearity should raise the standard deviation of weights.

    Args:
        nonlinearity: "linear", "sigmoid" and the names of convolutions (1), "tanh" (5/3), "relu" (√2),
            "leaky_relu" (√(2 / (1 + slope²))), "selu" (3/4).
        param: the negative slope of a leaky ReLU, 0.01 if left out.

    Raises:
        ValueError: for an unknown name or a slope that is no number.

    Source: ``torch.nn.init.calculate_gain``.

    Example:
        >>> import statefulnn as nn
        >>> nn.init.calculate_gain("relu")
        1.414...
    """
    if nonlinearity in _LINEAR:
        return 1.0
    if nonlinearity == "tanh":
        return 5.0 / 3
    if nonlinearity == "relu":
        return math.sqrt(2.0)
    if nonlinearity == "leaky_relu":
        if param is None:
            slope = 0.01
        elif isinstance(param, (int, float)) and not isinstance(param, bool):
            slope = param
        else:
            raise ValueError(f"negative_slope {param} not a valid number")
        return math.sqrt(2.0 / (1 + slope**2))
    if nonlinearity == "selu":
        return 3.0 / 4
    raise ValueError(
        explain(
            f"init.calculate_gain was given nonlinearity={nonlinearity!r}",
            f"Unsupported nonlinearity {nonlinearity}",
            'one of "linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu", "conv1d" ...',
        )
    )


def uniform_(
    tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Fill a Parameter with draws from U(a, b).

    Args:
        tensor: a Parameter or Buffer.
        a: the lower bound.
        b: the upper bound.
        generator: where to draw from; None for the generator in force.

    Returns:
        The same Parameter.

    Source: ``torch.nn.init.uniform_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> w = nn.init.uniform_(nn.Parameter(jnp.zeros((3, 5))), 2.0, 3.0)
        >>> bool((w >= 2).all() and (w < 3).all())
        True
    """
    box = _box(tensor, "uniform_")
    if not a <= b:
        raise RuntimeError(
            explain(
                f"init.uniform_ was given a={a} and b={b}",
                "uniform_ expects to return a [from, to) range, so a must not be above b",
                f"init.uniform_(tensor, {b}, {a})",
            )
        )
    return _write(box, _draw.uniform(generator, a, b, box.value))


def normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Fill a Parameter with draws from N(mean, std²).

    Args:
        tensor: a Parameter or Buffer.
        mean: the mean.
        std: the standard deviation.
        generator: where to draw from; None for the generator in force.

    Returns:
        The same Parameter.

    Source: ``torch.nn.init.normal_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> w = nn.init.normal_(nn.Parameter(jnp.zeros(10_000)), std=0.02)
        >>> 0.019 < float(w.std()) < 0.021
        True
    """
    box = _box(tensor, "normal_")
    if std < 0:
        raise RuntimeError(
            explain(
                f"init.normal_ was given std={std}",
                "normal expects std >= 0.0",
                "init.normal_(tensor, std=0.02)",
            )
        )
    if std == 0:
        return _filled(box, mean)
    return _write(box, _draw.normal(generator, mean, std, box.value))


def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: Generator | None = None,
) -> Tensor:
    """Fill a Parameter with draws from N(mean, std²), cut off at a and b.

    Args:
        tensor: a Parameter or Buffer.
        mean: the mean before cutting.
        std: the standard deviation before cutting.
        a: the lower bound, an absolute value and not a multiple of `std`.
        b: the upper bound, likewise.
        generator: where to draw from; None for the generator in force.

    Returns:
        The same Parameter.

    Source: ``torch.nn.init.trunc_normal_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> w = nn.init.trunc_normal_(nn.Parameter(jnp.zeros(1000)))
        >>> bool((abs(w.value) <= 2).all())
        True
    """
    box = _box(tensor, "trunc_normal_")
    if mean < a - 2 * std or mean > b + 2 * std:
        warnings.warn(
            "mean is more than 2 std from [a, b] in nn.init.trunc_normal_. "
            "The distribution of values may be incorrect.",
            stacklevel=2,
        )
    if std == 0:
        return _filled(box, min(max(mean, a), b))
    return _write(box, _draw.normal(generator, mean, std, box.value, a, b))


def constant_(tensor: Tensor, val: float) -> Tensor:
    """Fill a Parameter with one value, and return it.

    Source: ``torch.nn.init.constant_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.init.constant_(nn.Parameter(jnp.zeros(2)), 0.5).tolist()
        [0.5, 0.5]
    """
    return _filled(_box(tensor, "constant_"), val)


def ones_(tensor: Tensor) -> Tensor:
    """Fill a Parameter with ones, and return it.

    Source: ``torch.nn.init.ones_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.init.ones_(nn.Parameter(jnp.zeros(2))).tolist()
        [1.0, 1.0]
    """
    return _filled(_box(tensor, "ones_"), 1)


def zeros_(tensor: Tensor) -> Tensor:
    """Fill a Parameter with zeros, and return it.

    Source: ``torch.nn.init.zeros_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.init.zeros_(nn.Parameter(jnp.ones(2))).tolist()
        [0.0, 0.0]
    """
    return _filled(_box(tensor, "zeros_"), 0)


def _require_axes(box: Box, counts: tuple[int, ...], function: str, layout: str) -> None:
    if box.value.ndim not in counts:
        raise ShapeError(
            explain(
                f"init.{function} was given a tensor of shape {tuple(box.value.shape)}",
                f"it is defined for {layout}",
                "a Parameter with that many dimensions; init.uniform_, normal_ and constant_ take any",
            )
        )


def eye_(tensor: Tensor) -> Tensor:
    """Fill a matrix with the identity (as far as it goes), and return the Parameter.

    Source: ``torch.nn.init.eye_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.init.eye_(nn.Parameter(jnp.zeros((2, 3)))).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    box = _box(tensor, "eye_")
    _require_axes(box, (2,), "eye_", "tensors with 2 dimensions only")
    rows, columns = box.value.shape
    return _write(box, np.eye(rows, columns).astype(box.value.dtype))


def dirac_(tensor: Tensor, groups: int = 1) -> Tensor:
    """Make a convolution's kernel pass its input channels on, and return the Parameter.

    Args:
        tensor: ``(out_channels, in_channels / groups, *kernel)`` with 1 to 3 kernel axes.
        groups: the groups of the convolution; each passes on its own channels.

    Source: ``torch.nn.init.dirac_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.init.dirac_(nn.Parameter(jnp.zeros((2, 2, 3)))).tolist()
        [[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    box = _box(tensor, "dirac_")
    _require_axes(box, (3, 4, 5), "dirac_", "tensors with 3, 4 or 5 dimensions only")
    out_channels, in_channels = box.value.shape[:2]
    if out_channels % groups:
        raise ShapeError(
            explain(
                f"init.dirac_ was given {out_channels} output channels and groups={groups}",
                "dim 0 must be divisible by groups",
                "a number of groups that divides the output channels",
            )
        )
    values = np.zeros(box.value.shape, box.value.dtype)
    centre = tuple(k // 2 for k in box.value.shape[2:])
    per_group = out_channels // groups
    for group in range(groups):
        for channel in range(min(per_group, in_channels)):
            values[(group * per_group + channel, channel, *centre)] = 1
    return _write(box, values)


def _fans(box: Box, function: str) -> tuple[int, int]:
    """Return how many inputs each output has, and how many outputs each input has."""
    if box.value.ndim < 2:
        raise ShapeError(
            explain(
                f"init.{function} was given a tensor of shape {tuple(box.value.shape)}",
                "Fan in and fan out can not be computed for tensor with fewer than 2 dimensions",
                "init.uniform_ or init.zeros_ for a bias",
            )
        )
    field = math.prod(box.value.shape[2:])
    return box.value.shape[1] * field, box.value.shape[0] * field


def xavier_uniform_(
    tensor: Tensor, gain: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Fill with draws from U(-a, a), ``a = gain √(6 / (fan_in + fan_out))``, and return the Parameter.

    Args:
        tensor: a Parameter with at least 2 dimensions.
        gain: a factor, see `calculate_gain`.
        generator: where to draw from; None for the generator in force.

    Source: Glorot and Bengio 2010; ``torch.nn.init.xavier_uniform_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> w = nn.init.xavier_uniform_(nn.Parameter(jnp.zeros((3, 3))))
        >>> bool((abs(w.value) <= 1).all())
        True
    """
    box = _box(tensor, "xavier_uniform_")
    bound = gain * math.sqrt(6.0 / (sum(_fans(box, "xavier_uniform_")) or 1))
    return uniform_(box, -bound, bound, generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Fill with draws from N(0, s²), ``s = gain √(2 / (fan_in + fan_out))``, and return the Parameter.

    Args:
        tensor: a Parameter with at least 2 dimensions.
        gain: a factor, see `calculate_gain`.
        generator: where to draw from; None for the generator in force.

    Source: Glorot and Bengio 2010; ``torch.nn.init.xavier_normal_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> w = nn.init.xavier_normal_(nn.Parameter(jnp.zeros((100, 100))))
        >>> 0.095 < float(w.std()) < 0.105
        True
    """
    box = _box(tensor, "xavier_normal_")
    std = gain * math.sqrt(2.0 / (sum(_fans(box, "xavier_normal_")) or 1))
    return normal_(box, 0.0, std, generator)


def _kaiming_std(box: Box, a: float, mode: str, nonlinearity: str, function: str) -> float | None:
    if 0 in box.value.shape:
        warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=3)
        return None
    mode = str(mode).lower()
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(
            explain(
                f"init.{function} was given mode={mode!r}",
                f"Mode {mode} not supported, please use one of ['fan_in', 'fan_out']",
                f'init.{function}(tensor, mode="fan_in")',
            )
        )
    fan = _fans(box, function)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan)


Mode = Literal["fan_in", "fan_out"]


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Tensor:
    """Fill with draws from U(-b, b), ``b = gain √(3 / fan)``, and return the Parameter.

    Args:
        tensor: a Parameter with at least 2 dimensions.
        a: the negative slope, for "leaky_relu".
        mode: "fan_in" keeps the variance of activations, "fan_out" that of gradients.
        nonlinearity: decides the gain, see `calculate_gain`.
        generator: where to draw from; None for the generator in force.

    Source: He et al. 2015; ``torch.nn.init.kaiming_uniform_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> w = nn.init.kaiming_uniform_(nn.Parameter(jnp.zeros((2, 6))))
        >>> bool((abs(w.value) <= 1).all())
        True
    """
    box = _box(tensor, "kaiming_uniform_")
    std = _kaiming_std(box, a, mode, nonlinearity, "kaiming_uniform_")
    if std is None:
        return box
    bound = math.sqrt(3.0) * std
    return uniform_(box, -bound, bound, generator)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Tensor:
    """Fill with draws from N(0, s²), ``s = gain / √fan``, and return the Parameter.

    Args:
        tensor: a Parameter with at least 2 dimensions.
        a: the negative slope, for "leaky_relu".
        mode: "fan_in" keeps the variance of activations, "fan_out" that of gradients.
        nonlinearity: decides the gain, see `calculate_gain`.
        generator: where to draw from; None for the generator in force.

    Source: He et al. 2015; ``torch.nn.init.kaiming_normal_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> w = nn.init.kaiming_normal_(nn.Parameter(jnp.zeros((100, 200))))
        >>> 0.095 < float(w.std()) < 0.105
        True
    """
    box = _box(tensor, "kaiming_normal_")
    std = _kaiming_std(box, a, mode, nonlinearity, "kaiming_normal_")
    return box if std is None else normal_(box, 0.0, std, generator)


def orthogonal_(tensor: Tensor, gain: float = 1, generator: Generator | None = None) -> Tensor:
    """Fill with a random (semi-)orthogonal matrix times a factor, and return the Parameter.

    Args:
        tensor: a Parameter with at least 2 dimensions; all but the first are taken as one.
        gain: the factor.
        generator: where to draw from; None for the generator in force.

    Source: Saxe, McClelland and Ganguli 2013; ``torch.nn.init.orthogonal_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> w = nn.init.orthogonal_(nn.Parameter(jnp.zeros((3, 5))))
        >>> bool(jnp.allclose(w @ w.T, jnp.eye(3), atol=1e-5))
        True
    """
    box = _box(tensor, "orthogonal_")
    if box.value.ndim < 2:
        raise ShapeError(
            explain(
                f"init.orthogonal_ was given a tensor of shape {tuple(box.value.shape)}",
                "Only tensors with 2 or more dimensions are supported",
                "a matrix; init.uniform_ or init.zeros_ for a bias",
            )
        )
    if 0 in box.value.shape or _on_meta(box):
        return box
    q = _orthogonal(generator, box.value.shape[0], math.prod(box.value.shape[1:]), box.value.dtype)
    xp: Any = np if isinstance(q, np.ndarray) else jnp
    q = xp.asarray(q * np.asarray(gain, q.dtype))
    return _write(box, q.reshape(box.value.shape).astype(box.value.dtype))


def _orthogonal(generator: Generator | None, rows: int, columns: int, dtype: DTypeLike) -> Any:
    """Draw a matrix with orthonormal rows or columns, uniformly."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    tall = (max(rows, columns), min(rows, columns))
    draw = _draw.normal(generator, 0.0, 1.0, _draw.Like(tall, wide))
    # numpy in eager code, where compiling a factorisation for each shape would take longest.
    xp: Any = np if isinstance(draw, np.ndarray) else jnp
    q, r = xp.linalg.qr(draw)
    # With the signs of R's diagonal moved over, Q is uniform over all orthogonal matrices.
    q = q * xp.where(xp.diagonal(r) < 0, np.asarray(-1, wide), np.asarray(1, wide))
    return q.T if rows < columns else q


def orthogonal_by_block_(tensor: Tensor, blocks: int, generator: Generator | None = None) -> Tensor:
    """Fill a matrix of several stacked blocks (the gates of a cell) with one orthogonal matrix each.

    Args:
        tensor: a Parameter ``(blocks · n, m)``.
        blocks: how many.
        generator: where to draw from; None for the generator in force.

    Source: Saxe, McClelland and Ganguli 2013.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> w = nn.init.orthogonal_by_block_(nn.Parameter(jnp.zeros((6, 3))), 2)
        >>> bool(jnp.allclose(w[:3] @ w[:3].T, jnp.eye(3), atol=1e-5))
        True
    """
    box = _box(tensor, "orthogonal_by_block_")
    if 0 in box.value.shape or _on_meta(box):
        return box
    rows, columns = box.value.shape
    parts = [
        _orthogonal(generator, rows // blocks, columns, box.value.dtype) for _ in range(blocks)
    ]
    xp: Any = np if isinstance(parts[0], np.ndarray) else jnp
    return _write(box, xp.concatenate(parts).astype(box.value.dtype))


def sparse_(
    tensor: Tensor, sparsity: float, std: float = 0.01, generator: Generator | None = None
) -> Tensor:
    """Fill a matrix with draws from N(0, std²), a share of each column zero, and return the Parameter.

    Args:
        tensor: a Parameter with 2 dimensions.
        sparsity: the share of each column that is set to zero.
        std: the standard deviation of the others.
        generator: where to draw from; None for the generator in force.

    Source: Martens 2010; ``torch.nn.init.sparse_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> w = nn.init.sparse_(nn.Parameter(jnp.zeros((10, 4))), sparsity=0.3)
        >>> (w.value == 0).sum(0).tolist()
        [3, 3, 3, 3]
    """
    box = _box(tensor, "sparse_")
    _require_axes(box, (2,), "sparse_", "tensors with 2 dimensions only")
    if _on_meta(box):
        return box
    zeros = math.ceil(sparsity * box.value.shape[0])
    wide = jnp.float64 if box.value.dtype == jnp.float64 else jnp.float32
    shape = box.value.shape
    values = _draw.normal(generator, 0.0, std, _draw.Like(shape, wide))
    order = _draw.uniform(generator, 0.0, 1.0, _draw.Like(shape, jnp.float32))
    xp: Any = np if isinstance(values, np.ndarray) else jnp
    rank = xp.argsort(xp.argsort(order, 0), 0)  # a random permutation in each column
    values = xp.where(rank < zeros, np.zeros((), wide), values)
    return _write(box, values.astype(box.value.dtype))
