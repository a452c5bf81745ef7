"""The Kronecker-factored curvature of a model as an operator that is inverted by its factors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from statefulnn.core.names import Filter
from statefulnn.core.reports import fail_unless
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._batches import examples_in, joined
from statefulnn.curvature._blocks import length
from statefulnn.curvature._gaussians import Pair, by_pair
from statefulnn.curvature._kron import find_blocks, kron_curvature
from statefulnn.curvature._laplace_parts import module_in
from statefulnn.curvature._models import Model
from statefulnn.curvature.matrices import Loss, problem_of
from statefulnn.curvature.operators import LinearOperator, Scalar, not_positive_definite, scalar
from statefulnn.transforms.types import PyTree


@shortened
def kfac(
    model: Model,
    loss: Loss,
    data: Iterable[object],
    *,
    reduction: str = "mean",
    subset: Filter = "all",
    batch_size: int | None = None,
) -> LinearOperator:
    """Return an approximation of `ggn` by Kronecker factors, as an operator whose inverse costs a product.

    There is a block for each parameter: ``A ⊗ B`` for the weights of Linear, Conv and Embedding, where A is
    the mean of ``a aᵀ`` over what they are multiplied with, B the sum of ``g gᵀ`` over the derivatives of the
    outputs; B for their biases; the whole block, or the diagonal of it beyond 1,024 numbers, for other
    parameters. ``kfac(...).damped(c).inverse()`` is exact, by the eigenvectors of the factors. As a
    preconditioner, ``ggn(...).damped(c).inverse(preconditioner=...)``, it saves steps where the inputs of a
    layer differ much in size; of what layers have to do with each other it knows nothing.

    Args:
        model: a Module, or ``(module, params)``.
        loss: as in `ggn`; where it is not convex in the outputs, its negative curvature counts as none.
        data, reduction, subset: as in `hessian`; all batches have examples of one shape.
        batch_size: how many examples are worked on at once; None for a batch as it is.

    Returns:
        a symmetric `LinearOperator`, ``(P, P)``.

    Raises:
        TypeError: for a function, which shows no layers; else as `hessian`. Its inverse raises
            ConvergenceError if an eigenvalue is zero, which damping mends.

    Source: Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature"; Grosse and Martens 2016 for convolutions.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> x, y = jnp.eye(3), jnp.arange(3) % 2
        >>> K = nn.curvature.kfac(model, F.cross_entropy, (x, y)).damped(1e-2)
        >>> step = K.inverse() @ nn.grad(lambda m: F.cross_entropy(m(x), y))(model)
        >>> A = nn.curvature.ggn(model, F.cross_entropy, (x, y)).damped(1e-2)
        >>> solve = A.inverse(preconditioner=K.inverse())  # in fewer steps
    """
    function = "kfac"
    module = module_in(model, function)
    problem = problem_of(function, model, data, subset, batch_size, loss, reduction)
    problem.check_reduction(function)
    chosen, examples = problem.params, joined(problem.stacks)
    params = {**(problem.rest or {}), **chosen}
    example = jax.tree.map(lambda a: a[0], examples[0])
    blocks = find_blocks(module, params, chosen, example)
    shape = jax.eval_shape(functools.partial(problem.fn, params), *_batch_of_one(example)).shape[1:]
    most = max(examples_in(stack) for stack in problem.stacks)
    curved = _Curved(problem.loss, shape)
    _, values, pairs = kron_curvature(blocks, params, examples, curved, most, function)
    if problem.mean:
        values = values / length(examples)
    parts, start = {}, 0
    for name in blocks.names:
        stop = start + math.prod(chosen[name].shape)
        parts[name], start = values[start:stop], stop
    vectors = dict(zip(blocks.names, pairs, strict=True))
    return Kronecker(problem.space, problem.space, True, parts, vectors)


@dataclass(frozen=True)
class _Curved:
    """The curvature of a loss of outputs of a shape."""

    loss: Callable
    shape: tuple[int, ...]

    def of(self, out: jax.Array, target: PyTree) -> tuple[Any, Any]:
        """Return the loss of an example, and R with R Rᵀ its curvature by the flat outputs."""
        one = lambda out: self.loss(out.reshape(1, *self.shape), _batch_of_one(target))
        values, vectors = jnp.linalg.eigh(jax.hessian(one)(out))
        return one(out), vectors * jnp.sqrt(jnp.maximum(values, 0))


def _batch_of_one(tree: PyTree) -> Any:
    return jax.tree.map(lambda a: a[None], tree)


@register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Kronecker(LinearOperator):
    """A block ``Q diag(values) Qᵀ`` for each named array, where Q is a Kronecker product.

    Attributes:
        values: the eigenvalues of each block, flat.
        vectors: of each block, see `Pair`.
    """

    values: dict[str, Any]
    vectors: dict[str, Pair]

    def _run(self, vector: Mapping[str, Any], many: bool) -> Any:
        def one(name: str, part: jax.Array) -> Any:
            pair, values = self.vectors[name], self.values[name]
            turned = by_pair(part.reshape(-1).astype(values.dtype), pair, False)
            return by_pair(values * turned, pair, True).reshape(part.shape).astype(part.dtype)

        run = lambda vector: {name: one(name, part) for name, part in vector.items()}
        return jax.vmap(run)(vector) if many else run(vector)

    def _with(self, change: Callable[[Any], Any]) -> Kronecker:
        return dataclasses.replace(self, values={n: change(v) for n, v in self.values.items()})

    def damped(self, damping: Scalar) -> Kronecker:
        """Return ``A + damping I``."""
        c = scalar(damping, "A.damped(c)")
        return self._with(lambda v: v + c.astype(v.dtype))

    def inverse(
        self,
        tol: float | None = None,
        max_steps: int = 1,
        preconditioner: LinearOperator | None = None,
    ) -> Kronecker:
        """Return the inverse; it is exact, whatever the options of `LinearOperator.inverse` say.

        Raises:
            ConvergenceError: if an eigenvalue is not above zero.
        """
        smallest = jnp.stack([v.min() for v in self.values.values()]).min()
        error = functools.partial(not_positive_definite, "the inverse of kfac(...)")
        fail_unless(smallest > 0, error, smallest)
        return self._with(lambda v: 1 / v)
