"""The adaptive softmax as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.errors import DtypeError, explain
from statefulnn.core.module import Module
from statefulnn.core.placement import DeviceLike
from statefulnn.functional import adaptive
from statefulnn.functional._checks import array, require_rank, shape_error
from statefulnn.functional.cross_entropy import check_classes
from statefulnn.modules.containers import ModuleList, Sequential
from statefulnn.modules.linear import Linear


class _ASMoutput(NamedTuple):
    output: Any
    loss: Any


# Its fields and its name are torch's.
_ASMoutput.__name__ = _ASMoutput.__qualname__ = "ASMoutput"


class AdaptiveLogSoftmaxWithLoss(Module):
    """A softmax over very many classes of unequal frequency, and its loss.

    The classes are sorted by frequency, the most frequent first. Those below the first cutoff are
    scored by the head, the others in clusters, each behind a projection that is smaller than the last.
    Compiled code computes every cluster for every row, and masks what does not belong: the parameters
    are as few as in torch, the work is not less than that of all clusters.

    Args:
        in_features: the size of the input's last axis.
        n_classes: the number of classes.
        cutoffs: where the clusters start: increasing numbers from 1 to ``n_classes - 1``.
        div_value: cluster i projects to ``in_features // div_value ** (i + 1)`` features.
        head_bias: whether the head has a bias.
        device: where the parameters are put.
        dtype: their dtype.

    Shape:
        - input: ``(N, in_features)`` or ``(in_features,)``; target: ``(N,)`` or ``()``.
        - output: a named tuple: ``output``, the log-probability of each target, of the target's shape;
          ``loss``, the negative of their mean. Inside compiled code, and on devices where looking
          would stall, a class that does not exist gives NaN.

    Attributes:
        head: the `Linear` of frequent classes and clusters.
        tail: for each cluster a `Sequential` of two `Linear`.

    Source: Grave et al. 2017, *Efficient softmax approximation for GPUs*.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> softmax = nn.AdaptiveLogSoftmaxWithLoss(8, 20, cutoffs=[4, 10], div_value=2.0)
        >>> x = jnp.ones((3, 8))
        >>> softmax(x, jnp.array([0, 5, 19])).output.shape, softmax.log_prob(x).shape
        ((3,), (3, 20))
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        cutoffs: Sequence[int],
        div_value: float = 4.0,
        head_bias: bool = False,
        device: DeviceLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        super().__init__()
        cutoffs = list(cutoffs)
        if (
            not cutoffs
            or cutoffs != sorted(set(cutoffs))
            or cutoffs[0] <= 0
            or cutoffs[-1] >= n_classes
            or any(int(c) != c for c in cutoffs)
        ):
            raise ValueError(
                explain(
                    f"made nn.AdaptiveLogSoftmaxWithLoss with {n_classes} classes and "
                    f"cutoffs={cutoffs}",
                    "cutoffs should be at least one, unique and increasing integers from 1 to "
                    f"{n_classes - 1}",
                    f"cutoffs=[{max(1, n_classes // 10)}, {max(2, n_classes // 2)}]",
                )
            )
        self.in_features = in_features
        self.n_classes = n_classes
        self.cutoffs = [*cutoffs, n_classes]
        self.div_value = div_value
        self.head_bias = head_bias
        self.shortlist_size = cutoffs[0]
        self.n_clusters = len(cutoffs)
        self.head_size = self.shortlist_size + self.n_clusters
        self.head = Linear(in_features, self.head_size, bias=head_bias, device=device, dtype=dtype)
        self.tail = ModuleList()
        for i in range(self.n_clusters):
            hidden = int(in_features // div_value ** (i + 1))
            size = self.cutoffs[i + 1] - self.cutoffs[i]
            self.tail.append(
                Sequential(
                    Linear(in_features, hidden, bias=False, device=device, dtype=dtype),
                    Linear(hidden, size, bias=False, device=device, dtype=dtype),
                )
            )

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        self.head.reset_parameters()
        for project, score in self.tail:
            project.reset_parameters()
            score.reset_parameters()

    def _weights(self) -> tuple[Any, Any]:
        head = array(self.head.weight, "weight", ""), None
        if self.head.bias is not None:
            head = head[0], array(self.head.bias, "bias", "")
        tail = [tuple(array(layer.weight, "weight", "") for layer in pair) for pair in self.tail]
        return head, tuple(tail)

    def forward(self, input_: ArrayLike, target_: ArrayLike) -> _ASMoutput:
        name = "nn.AdaptiveLogSoftmaxWithLoss"
        x, target = array(input_, "input", name), array(target_, "target", name)
        self._check(x, target, name)
        head, tail = self._weights()
        check_classes(x, target, None, name, RuntimeError, self.n_classes)
        out = adaptive.log_prob_of_targets(x, target, head, tail, tuple(self.cutoffs))
        return _ASMoutput(*out)

    def _check(self, x: Any, target: Any, name: str) -> None:
        given = f"{name} was given input of shape {x.shape} and target of shape {target.shape}"
        if target.ndim > 1 or x.ndim != target.ndim + 1:
            raise shape_error(
                given,
                "there is one target for each row: (N,) for (N, in_features), () for (in_features,)",
                "input.reshape(-1, in_features), target.reshape(-1)",
            )
        if x.shape[:-1] != target.shape:
            raise shape_error(
                given, "input and target should have the same batch size", "as many targets as rows"
            )
        if not jnp.issubdtype(target.dtype, jnp.integer):
            raise DtypeError(
                explain(
                    f"{name} was given target of dtype {target.dtype}",
                    "it holds class numbers, which are integers",
                    "target.astype(jnp.int32)",
                )
            )
        self._check_features(x, name)

    def _check_features(self, x: Any, name: str) -> None:
        if x.shape[-1] != self.in_features:
            raise shape_error(
                f"{name} was given input of shape {x.shape}",
                f"its last axis has {x.shape[-1]} features and the layer expects {self.in_features}",
                f"nn.AdaptiveLogSoftmaxWithLoss({x.shape[-1]}, ...)",
            )

    def log_prob(self, input: ArrayLike) -> jax.Array:
        """Return the log-probabilities of all classes.

        Args:
            input: ``(N, in_features)``.

        Returns:
            ``(N, n_classes)``.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> softmax = nn.AdaptiveLogSoftmaxWithLoss(8, 20, cutoffs=[4, 10])
            >>> round(float(jnp.exp(softmax.log_prob(jnp.ones((1, 8)))).sum()), 4)
            1.0
        """
        x = self._rows(input, "nn.AdaptiveLogSoftmaxWithLoss.log_prob")
        return adaptive.log_prob(x, *self._weights(), self.shortlist_size)

    def predict(self, input: ArrayLike) -> jax.Array:
        """Return the most probable class of each row.

        Args:
            input: ``(N, in_features)``.

        Returns:
            ``(N,)``, integers.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> softmax = nn.AdaptiveLogSoftmaxWithLoss(8, 20, cutoffs=[4, 10])
            >>> softmax.predict(jnp.ones((3, 8))).shape
            (3,)
        """
        x = self._rows(input, "nn.AdaptiveLogSoftmaxWithLoss.predict")
        return adaptive.predict(x, *self._weights(), self.shortlist_size)

    def _rows(self, input: object, name: str) -> Any:
        x = array(input, "input", name)
        require_rank(x, (2,), "input", name, "(N, in_features)")
        self._check_features(x, name)
        return x
