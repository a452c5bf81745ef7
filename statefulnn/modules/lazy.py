"""Layers that learn their input sizes from the first input, and then become the ordinary layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.typing import DTypeLike

from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import ShapeError, UninitializedParameterError, explain
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike
from statefulnn.core.uninitialized import UninitializedBuffer, UninitializedParameter, is_lazy
from statefulnn.modules.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from statefulnn.modules.conv import Conv1d, Conv2d, Conv3d
from statefulnn.modules.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from statefulnn.modules.instancenorm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from statefulnn.modules.linear import Linear

Size = int | Sequence[int]


class LazyModuleMixin:
    """What a lazy layer inherits first, before the layer that it becomes.

    Its parameters are `UninitializedParameter` until `initialize_parameters` has seen an input: at the
    first call in eager code, or in ``nn.materialize(model, *inputs)``, which computes nothing.

    Attributes:
        cls_to_become: the class of the object once it is initialised.

    Source: ``torch.nn.modules.lazy.LazyModuleMixin``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> layer = nn.LazyLinear(4)
        >>> layer.has_uninitialized_params(), layer(jnp.ones((2, 3))).shape, type(layer).__name__
        (True, (2, 4), 'Linear')
    """

    cls_to_become: type | None = None

    if TYPE_CHECKING:  # the next class in line is the layer

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def initialize_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Give every parameter its shape and values; it is called with what forward is called with."""
        raise NotImplementedError(
            f"initialize_parameters is not implemented for {type(self).__name__}"
        )

    def has_uninitialized_params(self: Any) -> bool:
        """Say whether a parameter or buffer has no shape yet."""
        boxes = itertools.chain(self._parameters.values(), self._buffers.values())
        return any(is_lazy(box) for box in boxes)

    def _infer_parameters(self: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if current_trace() is not EAGER and self._nn_stamp.scope is None:
            raise UninitializedParameterError(
                explain(
                    f"called {type(self).__name__} for the first time inside a JAX transformation",
                    "its parameters get their shapes from the first input, and what is made while "
                    "tracing would be lost",
                    "call the model once on an example before, or nn.materialize(model, *inputs)",
                )
            )
        self.initialize_parameters(*args, **kwargs)
        if self.has_uninitialized_params():
            raise RuntimeError(
                explain(
                    f"called {type(self).__name__} for the first time",
                    f"module {self._get_name()} has not been fully initialized",
                    "initialize_parameters has to call materialize(shape) of every parameter",
                )
            )
        if self.cls_to_become is not None:
            object.__setattr__(self, "__class__", self.cls_to_become)
            self._nn_stamp.touch()

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        becomes = self.cls_to_become
        if becomes is not None or self.has_uninitialized_params():
            self._infer_parameters(args, kwargs)
        return Module.__call__(self, *args, **kwargs)

    def reset_parameters(self: Any) -> None:
        """Draw new initial values, once there are shapes."""
        if not self.has_uninitialized_params():
            super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue]


def _refuse(name: str, shape: Sequence[int], expected: str) -> ShapeError:
    return ShapeError(
        explain(
            f"{name} was given input of shape {tuple(shape)}",
            f"it learns its sizes from an input that is {expected}",
            "reshape the input to these axes",
        )
    )


# --------------------------------------------------------------------------------------------------
# Linear


class LazyLinear(LazyModuleMixin, Linear):
    """A `Linear` that takes ``in_features`` from its first input.

    Args:
        out_features: the size of each output.
        bias: whether there is a bias.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(*, in_features)``; output: ``(*, out_features)``.

    Source: ``torch.nn.LazyLinear``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> layer = nn.LazyLinear(4)
        >>> _ = layer(jnp.ones((2, 3)))
        >>> layer
        Linear(in_features=3, out_features=4, bias=True)
    """

    cls_to_become = Linear

    def __init__(
        self,
        out_features: int,
        bias: bool = True,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__(0, 0, False, device, dtype)
        self.out_features = out_features
        self.weight = UninitializedParameter(device=device, dtype=dtype)
        if bias:
            self.bias = UninitializedParameter(device=device, dtype=dtype)

    def initialize_parameters(self, input: jax.Array) -> None:
        if not input.ndim:
            raise _refuse("nn.LazyLinear", input.shape, "(*, in_features)")
        self.in_features = input.shape[-1]
        if self.has_uninitialized_params():
            self.weight.materialize((self.out_features, self.in_features))
            if self.bias is not None:
                self.bias.materialize((self.out_features,))
            self.reset_parameters()


# --------------------------------------------------------------------------------------------------
# Convolutions


class _LazyConv(LazyModuleMixin):
    transposed = False

    def _make_lazy(self: Any, out_channels: int, bias: bool, device: Any, dtype: Any) -> None:
        self.out_channels = out_channels
        self.weight = UninitializedParameter(device=device, dtype=dtype)
        if bias:
            self.bias = UninitializedParameter(device=device, dtype=dtype)

    def initialize_parameters(self: Any, input: jax.Array, *args: Any, **kwargs: Any) -> None:
        spatial = len(self.kernel_size)
        axes = ("L", "H, W", "D, H, W")[spatial - 1]
        name = f"nn.{type(self).__name__}"
        if input.ndim not in (spatial + 1, spatial + 2):
            raise _refuse(name, input.shape, f"(N, C, {axes}) or (C, {axes})")
        channels = input.shape[-spatial - 1]
        for which, count in (("in_channels", channels), ("out_channels", self.out_channels)):
            if count % self.groups:
                raise ValueError(
                    explain(
                        f"{name} with groups={self.groups} was given input of shape {input.shape}",
                        f"{which}={count} must be divisible by groups",
                        f"a number of groups that divides {count}",
                    )
                )
        self.in_channels = channels
        if self.has_uninitialized_params():
            ends = (
                (channels, self.out_channels) if self.transposed else (self.out_channels, channels)
            )
            self.weight.materialize((ends[0], ends[1] // self.groups, *self.kernel_size))
            if self.bias is not None:
                self.bias.materialize((self.out_channels,))
            self.reset_parameters()


class _LazyConvForward(_LazyConv):
    def __init__(
        self: Any,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        # The bias comes later, when its size is known. The next class is the layer that it becomes.
        super().__init__(
            0, 0, kernel_size, stride, padding, dilation, groups, False, padding_mode, device, dtype
        )
        self._make_lazy(out_channels, bias, device, dtype)


class _LazyConvTransposed(_LazyConv):
    transposed = True

    def __init__(
        self: Any,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__(
            0,
            0,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            False,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self._make_lazy(out_channels, bias, device, dtype)


class LazyConv1d(_LazyConvForward, Conv1d):
    """A `Conv1d` that takes ``in_channels`` from its first input; the other arguments are the same.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``.

    Source: ``torch.nn.LazyConv1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LazyConv1d(8, 3)(jnp.ones((2, 5, 10))).shape
        (2, 8, 8)
    """

    cls_to_become = Conv1d


class LazyConv2d(_LazyConvForward, Conv2d):
    """A `Conv2d` that takes ``in_channels`` from its first input; the other arguments are the same.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``.

    Source: ``torch.nn.LazyConv2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LazyConv2d(8, 3)(jnp.ones((2, 5, 10, 10))).shape
        (2, 8, 8, 8)
    """

    cls_to_become = Conv2d


class LazyConv3d(_LazyConvForward, Conv3d):
    """A `Conv3d` that takes ``in_channels`` from its first input; the other arguments are the same.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``.

    Source: ``torch.nn.LazyConv3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LazyConv3d(8, 3)(jnp.ones((2, 5, 6, 6, 6))).shape
        (2, 8, 4, 4, 4)
    """

    cls_to_become = Conv3d


class LazyConvTranspose1d(_LazyConvTransposed, ConvTranspose1d):
    """A `ConvTranspose1d` that takes ``in_channels`` from its first input.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``.

    Source: ``torch.nn.LazyConvTranspose1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LazyConvTranspose1d(8, 3)(jnp.ones((2, 5, 10))).shape
        (2, 8, 12)
    """

    cls_to_become = ConvTranspose1d


class LazyConvTranspose2d(_LazyConvTransposed, ConvTranspose2d):
    """A `ConvTranspose2d` that takes ``in_channels`` from its first input.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``.

    Source: ``torch.nn.LazyConvTranspose2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LazyConvTranspose2d(8, 3)(jnp.ones((2, 5, 10, 10))).shape
        (2, 8, 12, 12)
    """

    cls_to_become = ConvTranspose2d


class LazyConvTranspose3d(_LazyConvTransposed, ConvTranspose3d):
    """A `ConvTranspose3d` that takes ``in_channels`` from its first input.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``.

    Source: ``torch.nn.LazyConvTranspose3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LazyConvTranspose3d(8, 3)(jnp.ones((2, 5, 4, 4, 4))).shape
        (2, 8, 6, 6, 6)
    """

    cls_to_become = ConvTranspose3d


# --------------------------------------------------------------------------------------------------
# Normalisations


class _LazyNorm(LazyModuleMixin):
    def __init__(
        self: Any,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,  # also for InstanceNorm, which torch has otherwise where it is not lazy
        track_running_stats: bool = True,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
        *,
        bias: bool = True,
    ) -> None:
        # The sizes come later: no affine parameters now, and statistics of no channels.
        super().__init__(0, eps, momentum, False, track_running_stats, device, dtype)
        self.affine = affine
        if affine:
            self.weight = UninitializedParameter(device=device, dtype=dtype)
            if bias:
                self.bias = UninitializedParameter(device=device, dtype=dtype)
        if track_running_stats:
            self.running_mean = UninitializedBuffer(device=device, dtype=dtype)
            self.running_var = UninitializedBuffer(device=device, dtype=dtype)

    def _features_axis(self: object, input: object) -> int:
        return 1

    def initialize_parameters(self: Any, input: jax.Array) -> None:
        self._check_input_dim(input)
        if not self.has_uninitialized_params():
            if not self.num_features:
                self.num_features = input.shape[self._features_axis(input)]
            return
        self.num_features = input.shape[self._features_axis(input)]
        for box in (*self._parameters.values(), *self._buffers.values()):
            if is_lazy(box):
                box.materialize((self.num_features,))
        self.reset_parameters()


class LazyBatchNorm1d(_LazyNorm, BatchNorm1d):
    """A `BatchNorm1d` that takes ``num_features`` from its first input.

    Shape:
        - input: ``(N, C)`` or ``(N, C, L)``; output: the same.

    Source: ``torch.nn.LazyBatchNorm1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> layer = nn.LazyBatchNorm1d()
        >>> _ = layer(jnp.ones((4, 3)))
        >>> layer.num_features
        3
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyNorm, BatchNorm2d):
    """A `BatchNorm2d` that takes ``num_features`` from its first input.

    Shape:
        - input: ``(N, C, H, W)``; output: the same.

    Source: ``torch.nn.LazyBatchNorm2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LazyBatchNorm2d()(jnp.ones((4, 3, 2, 2))).shape
        (4, 3, 2, 2)
    """

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyNorm, BatchNorm3d):
    """A `BatchNorm3d` that takes ``num_features`` from its first input.

    Shape:
        - input: ``(N, C, D, H, W)``; output: the same.

    Source: ``torch.nn.LazyBatchNorm3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LazyBatchNorm3d()(jnp.ones((4, 3, 2, 2, 2))).shape
        (4, 3, 2, 2, 2)
    """

    cls_to_become = BatchNorm3d


class _LazyInstanceNorm(_LazyNorm):
    def _features_axis(self: Any, input: Any) -> int:
        return 0 if input.ndim == self.ranks[0] else 1


class LazyInstanceNorm1d(_LazyInstanceNorm, InstanceNorm1d):
    """An `InstanceNorm1d` that takes ``num_features`` from its first input.

    Shape:
        - input: ``(N, C, L)`` or ``(C, L)``; output: the same.

    Source: ``torch.nn.LazyInstanceNorm1d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LazyInstanceNorm1d(affine=True)(jnp.ones((4, 3, 2))).shape
        (4, 3, 2)
    """

    cls_to_become = InstanceNorm1d


class LazyInstanceNorm2d(_LazyInstanceNorm, InstanceNorm2d):
    """An `InstanceNorm2d` that takes ``num_features`` from its first input.

    Shape:
        - input: ``(N, C, H, W)`` or ``(C, H, W)``; output: the same.

    Source: ``torch.nn.LazyInstanceNorm2d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LazyInstanceNorm2d(affine=True)(jnp.ones((4, 3, 2, 2))).shape
        (4, 3, 2, 2)
    """

    cls_to_become = InstanceNorm2d


class LazyInstanceNorm3d(_LazyInstanceNorm, InstanceNorm3d):
    """An `InstanceNorm3d` that takes ``num_features`` from its first input.

    Shape:
        - input: ``(N, C, D, H, W)`` or ``(C, D, H, W)``; output: the same.

    Source: ``torch.nn.LazyInstanceNorm3d``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.LazyInstanceNorm3d(affine=True)(jnp.ones((4, 3, 2, 2, 2))).shape
        (4, 3, 2, 2, 2)
    """

    cls_to_become = InstanceNorm3d
