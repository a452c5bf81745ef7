"""Cross entropy, negative log likelihood, divergence and CTC as layers."""

from __future__ import annotations

import math
import warnings

import jax
from jax.typing import ArrayLike, DTypeLike

from statefulnn import functional as F
from statefulnn.core.errors import explain
from statefulnn.core.placement import DeviceLike
from statefulnn.functional._checks import shape_error
from statefulnn.functional.linear_cross_entropy import LinearCrossEntropyOptions
from statefulnn.modules._loss import _Loss, _WeightedLoss
from statefulnn.modules.linear import Linear


class CrossEntropyLoss(_WeightedLoss):
    """The cross entropy between logits and classes or class probabilities.

    Args:
        weight: a factor for each class, ``(C,)``; kept as a buffer.
        size_average: deprecated, as in torch; use `reduction`.
        ignore_index: a target that is left out, for class numbers.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (for class numbers, weighted by `weight`), "sum" or "none".
        label_smoothing: the share of the target that is spread evenly over all classes.

    Shape:
        - input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``.
        - target: class numbers, ``()``, ``(N,)`` or ``(N, d1, ..., dK)``; or probabilities of the
          input's shape.
        - output: a scalar, or the shape of class numbers.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> loss = nn.CrossEntropyLoss(reduction="sum")
        >>> round(float(loss(jnp.zeros((2, 4)), jnp.array([1, 3]))), 3)
        2.773
    """

    _by_class = True

    def __init__(
        self,
        weight: ArrayLike | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(_WeightedLoss):
    """A linear layer and its cross entropy in one, which need not keep all logits.

    Args:
        in_features: the size of the input's last axis.
        num_classes: C.
        out_features: (d1, ..., dK): the shape of the targets of one row.
        bias: whether the linear layer has one.
        device: where the parameters are put.
        dtype: their dtype.
        reduction: "mean" (for class numbers, weighted by `weight`), "sum" or "none".
        weight: a factor for each class, ``(C,)``; kept as a buffer.
        ignore_index: a target that is left out, for class numbers; None for -100.
        label_smoothing: the share of the target that is spread evenly over all classes.
        options: how to go through the batch in chunks; None makes all logits at once.

    Shape:
        - input: ``(N, in_features)`` or ``(in_features,)``.
        - target: class numbers, ``(N, d1, ..., dK)`` or ``()``; or probabilities,
          ``(N, C, d1, ..., dK)`` or ``(C,)``.
        - output: a scalar, or the shape of class numbers.

    Attributes:
        linear: the `Linear` from `in_features` to ``C · d1 · ... · dK``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
        >>> loss = nn.LinearCrossEntropyLoss(3, 4, options=options)
        >>> round(float(loss(jnp.zeros((5, 3)), jnp.arange(5) % 4)), 4)
        1.3863
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
        reduction: str = "mean",
        weight: ArrayLike | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
    ) -> None:
        super().__init__(weight, reduction=reduction)
        if self.weight is not None and self.weight.shape != (num_classes,):
            raise shape_error(
                f"made nn.LinearCrossEntropyLoss with {num_classes} classes and weight of shape "
                f"{self.weight.shape}",
                "each class needs a weight",
                f"a weight of shape ({num_classes},)",
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(
                explain(
                    f"made nn.LinearCrossEntropyLoss with label_smoothing={label_smoothing}",
                    "label_smoothing must be between 0.0 and 1.0",
                    "label_smoothing=0.1",
                )
            )
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        outputs = math.prod(out_features, start=num_classes)
        self.linear = Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)
        self.options = options

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        table, bias = self.linear.weight, self.linear.bias
        if self.out_features:
            # The layer keeps two axes; the loss knows several.
            shape = (self.num_classes, *self.out_features)
            table = table.reshape(*shape, self.linear.in_features)
            bias = None if bias is None else bias.reshape(shape)
        return F.linear_cross_entropy(
            input,
            table,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={self.linear.bias is not None}, "
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
        )


class NLLLoss(_WeightedLoss):
    """The negative log likelihood of classes, given log-probabilities.

    Args:
        weight: a factor for each class, ``(C,)``; kept as a buffer.
        size_average: deprecated, as in torch; use `reduction`.
        ignore_index: a target that is left out.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "mean" (weighted by `weight`), "sum" or "none".

    Shape:
        - input: log-probabilities, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dK)``.
        - target: class numbers, ``()``, ``(N,)`` or ``(N, d1, ..., dK)``.
        - output: a scalar, or the target's shape.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> float(nn.NLLLoss()(jnp.array([[-0.5, -1.0], [-2.0, -0.25]]), jnp.array([0, 1])))
        0.375
    """

    _by_class = True

    def __init__(
        self,
        weight: ArrayLike | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        self.ignore_index = ignore_index

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class NLLLoss2d(NLLLoss):
    """Deprecated, as in torch: `NLLLoss` takes images as well.

    Args:
        weight: as for `NLLLoss`.
        size_average: as for `NLLLoss`.
        ignore_index: as for `NLLLoss`.
        reduce: as for `NLLLoss`.
        reduction: as for `NLLLoss`.

    Example:
        >>> import warnings, jax.numpy as jnp, statefulnn as nn
        >>> with warnings.catch_warnings(action="ignore"):
        ...     loss = nn.NLLLoss2d()
        >>> float(loss(jnp.full((1, 2, 3, 3), -0.5), jnp.ones((1, 3, 3), jnp.int32)))
        0.5
    """

    def __init__(
        self,
        weight: ArrayLike | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        warnings.warn(
            "`NLLLoss2d` has been deprecated: write nn.NLLLoss, which does the same",
            FutureWarning,
            stacklevel=2,
        )
        super().__init__(weight, size_average, ignore_index, reduce, reduction)


class KLDivLoss(_Loss):
    """The Kullback-Leibler divergence of log-probabilities from target probabilities.

    Args:
        size_average: deprecated, as in torch; use `reduction`.
        reduce: deprecated, as in torch; use `reduction`.
        reduction: "batchmean" (the sum over the size of the first axis: the divergence of the
            mathematics), "mean" (over all elements, with a warning), "sum" or "none".
        log_target: whether the target holds log-probabilities, too.

    Shape:
        - input, target: any, the same; output: a scalar, or the same.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> p, q = jnp.array([[0.5, 0.5]]), jnp.array([[0.25, 0.75]])
        >>> round(float(nn.KLDivLoss(reduction="batchmean")(jnp.log(q), p)), 4)
        0.1438
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
    ) -> None:
        batch = reduction == "batchmean" and size_average is None and reduce is None
        super().__init__(size_average, reduce, "sum" if batch else reduction)
        if batch:
            self.reduction = "batchmean"
        self.log_target = log_target

    def forward(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class CTCLoss(_Loss):
    """The negative log likelihood of label sequences, over all their alignments.

    Args:
        blank: the number of the blank class.
        reduction: "mean" (of the losses over their target's length), "sum" or "none".
        zero_infinity: whether a target that does not fit into its input costs 0, instead of an
            infinite loss with a derivative that is not a number.

    Shape:
        - log_probs: ``(T, N, C)`` or ``(T, C)``.
        - targets: ``(N, S)``, or one after the other in one axis; ``(S,)`` for one example.
        - input_lengths, target_lengths: ``(N,)``, arrays or tuples of numbers; ``()`` for one example.
        - output: a scalar, or ``(N,)``.

    Source: Graves et al. 2006.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> log_probs = jnp.log(jnp.full((4, 1, 3), 1 / 3))
        >>> loss = nn.CTCLoss(reduction="sum")(log_probs, jnp.array([[1, 2]]), (4,), (2,))
        >>> round(float(jnp.exp(-loss) * 3**4))  # alignments
        15
    """

    def __init__(
        self, blank: int = 0, reduction: str = "mean", zero_infinity: bool = False
    ) -> None:
        super().__init__(reduction=reduction)
        self.blank = blank
        self.zero_infinity = zero_infinity

    def forward(
        self,
        log_probs: ArrayLike,
        targets: ArrayLike,
        input_lengths: ArrayLike,
        target_lengths: ArrayLike,
    ) -> jax.Array:
        return F.ctc_loss(
            log_probs,
            targets,
            input_lengths,
            target_lengths,
            self.blank,
            self.reduction,
            self.zero_infinity,
        )
