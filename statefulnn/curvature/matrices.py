"""The matrices of a model, a loss and data as linear operators."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.errors import DtypeError, ReductionError, ShapeError, explain
from statefulnn.core.generator import as_key, next_key
from statefulnn.core.module import Module
from statefulnn.core.names import Filter, chosen
from statefulnn.core.reports import fail_unless
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._batches import (
    Stacks,
    examples_in,
    like_stacks,
    mapped,
    stacked,
    summed,
)
from statefulnn.curvature._blocks import length
from statefulnn.curvature._laplace_parts import chosen_names, parts
from statefulnn.curvature._models import Model, check_choice, pure
from statefulnn.curvature._spaces import Space
from statefulnn.curvature.operators import Bound, Leaf, LinearOperator, check_count
from statefulnn.transforms.differentiate import real_scalar
from statefulnn.transforms.functional_call import functionalize
from statefulnn.transforms.types import PyTree

LIKELIHOODS = ("categorical", "bernoulli", "gaussian", "poisson")
REDUCTIONS = ("mean", "sum")

Loss = Callable[[Any, Any], Any]


@shortened
def hessian(
    model: Model,
    loss: Loss,
    data: Iterable[object],
    *,
    reduction: str = "mean",
    subset: Filter = "all",
    batch_size: int | None = None,
) -> LinearOperator:
    """Return the Hessian of a loss by the parameters, as an operator.

    A product is forward over reverse mode, about four calls of the model for all data.

    Args:
        model: a Module, ``(fn, params)`` as `functionalize` returns it, or ``(module, params)``. With
            ``(fn, params)`` the operators of other parameters share compiled code.
        loss: ``loss(outputs, targets) -> scalar`` of a batch, such as ``F.cross_entropy``; or a Module.
        data: a tuple ``(x, y)``, where x is an array ``(N, ...)`` or a tuple of these; or a list, or any
            other iterable, of such batches. All are kept; those of equal shape run in one loop.
        reduction: what the loss does with its batch, "mean" or "sum": the operator is that of the mean, or of
            the sum, over all examples of all batches.
        subset: which parameters: "all"; "last_layer"; a name, or a pattern such as ``"lora_*"``; several of
            them; or a function of a name.
        batch_size: how many examples are worked on at once; None for a batch as it is.

    Returns:
        a symmetric `LinearOperator`, ``(P, P)``.

    Raises:
        ShapeError: if the data are empty, or the loss is not a scalar.
        UnknownNameError: if the subset matches no parameter.
        ReductionError: if the loss of several batches is not that of all examples, as with class
            weights, labels of -100 or another reduction; from compiled code as `LinearOperator.inverse`.
        StateWriteError: if the model writes state, as BatchNorm does in training mode.
        MissingRngError: if the model draws random numbers.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> x, y = jnp.ones((10, 3)), jnp.arange(10) % 2
        >>> A = nn.curvature.hessian(model, F.cross_entropy, (x, y), batch_size=5)
        >>> A.shape, sorted(A @ {name: p.value for name, p in model.named_parameters()})
        ((50, 50), ['0.bias', '0.weight', '2.bias', '2.weight'])
    """
    problem = problem_of("hessian", model, data, subset, batch_size, loss, reduction)
    problem.check_batches("hessian")
    rule = Bound(_hessian_product, (problem.fn, problem.loss, problem.mean))
    return problem.symmetric(rule)


@shortened
def ggn(
    model: Model,
    loss: Loss,
    data: Iterable[object],
    *,
    reduction: str = "mean",
    subset: Filter = "all",
    batch_size: int | None = None,
) -> LinearOperator:
    """Return the generalised Gauss-Newton matrix ``Σ Jᵀ H J`` of a loss, as an operator.

    J is the Jacobian of the outputs, H the Hessian of the loss by these. For a loss that is convex in the
    outputs the matrix has no negative eigenvalue.

    Args:
        model, loss, data, reduction, subset, batch_size: as in `hessian`.

    Returns:
        a symmetric `LinearOperator`, ``(P, P)``.

    Raises:
        StatefulnnError: as `hessian`.

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".

    Example:
        >>> model, data = nn.Linear(2, 1), (jnp.eye(2), jnp.zeros((2, 1)))
        >>> A = nn.curvature.ggn(model, F.mse_loss, data, subset="weight")
        >>> A.to_dense().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    problem = problem_of("ggn", model, data, subset, batch_size, loss, reduction)
    problem.check_batches("ggn")
    outputs = Bound(_outputs, (problem.fn,))
    return problem.sandwich(outputs, Bound(_loss_of_outputs, (problem.loss,)))


@shortened
def empirical_fisher(
    model: Model,
    loss: Loss,
    data: Iterable[object],
    *,
    reduction: str = "mean",
    subset: Filter = "all",
    batch_size: int | None = None,
) -> LinearOperator:
    """Return the empirical Fisher matrix ``Σ g gᵀ`` over the gradients of the examples, as an operator.

    It is no approximation of the Fisher matrix away from a good fit (Kunstner et al. 2019). The model sees
    the whole batch, the loss a batch of one example at a time.

    Args:
        model, loss, data, subset, batch_size: as in `hessian`.
        reduction: "mean" divides by the number of examples, "sum" does not.

    Returns:
        a symmetric `LinearOperator`, ``(P, P)``.

    Raises:
        StatefulnnError: as `hessian`.

    Source: Kunstner, Balles, Hennig 2019, "Limitations of the Empirical Fisher Approximation",
    https://arxiv.org/abs/1905.12558.

    Example:
        >>> model, data = nn.Linear(2, 3), (jnp.ones((4, 2)), jnp.arange(4) % 3)
        >>> nn.curvature.empirical_fisher(model, F.cross_entropy, data).shape
        (9, 9)
    """
    problem = problem_of("empirical_fisher", model, data, subset, batch_size, loss, reduction)
    problem.check_reduction("empirical_fisher")
    outputs = Bound(_losses, (problem.fn, problem.loss))
    return problem.sandwich(outputs, Bound(_half_squares, (problem.mean,)))


@shortened
def fisher(
    model: Model,
    data: Iterable[object],
    *,
    likelihood: str = "categorical",
    samples: int | None = None,
    rng: jax.Array | None = None,
    reduction: str = "mean",
    subset: Filter = "all",
    batch_size: int | None = None,
) -> LinearOperator:
    """Return the Fisher information matrix of a model's predictions, as an operator.

    The outputs are natural parameters: logits ("categorical" over the last axis, "bernoulli"), means of unit
    variance ("gaussian"), logarithms of rates ("poisson"). The exact matrix is a generalised Gauss-Newton
    matrix; with `samples` it is estimated by targets that are drawn once, here, from the model's predictions.

    Args:
        model, subset, batch_size: as in `hessian`.
        data: inputs ``(N, ...)``, a tuple of these for a model of several inputs, or a list of batches.
        likelihood: "categorical", "bernoulli", "gaussian" or "poisson".
        samples: how many targets are drawn for each example; None for the exact matrix.
        rng: a random key, for the draws; None for the generator in force.
        reduction: "mean" divides by the number of examples, "sum" does not.

    Returns:
        a symmetric `LinearOperator`, ``(P, P)``.

    Raises:
        StatefulnnError: as `hessian`.
        ValueError: for an unknown likelihood, or `samples` below 1.

    Source: Amari 1998, "Natural gradient works efficiently in learning"; Martens 2020, "New Insights and
    Perspectives on the Natural Gradient Method", https://arxiv.org/abs/1412.1193.

    Example:
        >>> model, x = nn.Linear(2, 3), jnp.ones((4, 2))
        >>> exact = nn.curvature.fisher(model, x)
        >>> estimate = nn.curvature.fisher(model, x, samples=10, rng=jax.random.key(0))
        >>> exact.shape == estimate.shape == (9, 9)
        True
    """
    check_choice(likelihood, LIKELIHOODS, "likelihood", "fisher")
    problem = problem_of("fisher", model, data, subset, batch_size, None, reduction)
    if samples is None:
        outputs = Bound(_outputs, (problem.fn,))
        return problem.sandwich(outputs, Bound(_log_partition, (likelihood, problem.mean)))
    check_count(samples, 1, "samples", "fisher")
    key = next_key() if rng is None else as_key(rng)
    problem = problem.with_draws(key, likelihood, samples)
    outputs = Bound(_sampled_losses, (problem.fn, likelihood))
    return problem.sandwich(outputs, Bound(_half_squares, (problem.mean,)))


@shortened
def jacobian(
    model: Model, data: Iterable[object], *, subset: Filter = "all", batch_size: int | None = None
) -> LinearOperator:
    """Return the Jacobian of a model's outputs by its parameters, as an operator.

    Args:
        model, subset, batch_size: as in `hessian`.
        data: inputs ``(N, ...)``, a tuple of these for a model of several inputs, or a list of batches.

    Returns:
        a `LinearOperator`, ``(N C, P)``, whose products are arrays like the outputs, ``(N, C)``, those of all
        batches; ``A.T`` takes such arrays.

    Raises:
        StatefulnnError: as `hessian`.

    Example:
        >>> J = nn.curvature.jacobian(nn.Linear(2, 1), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> J.to_dense().tolist()
        [[1.0, 2.0, 1.0], [3.0, 4.0, 1.0]]
        >>> (J.T @ jnp.ones((2, 1)))["weight"].tolist()
        [[4.0, 6.0]]
    """
    problem = problem_of("jacobian", model, data, subset, batch_size)
    return problem.rows(Bound(_outputs, (problem.fn,)))


@shortened
def tangent_kernel(
    model: Model, data: Iterable[object], *, subset: Filter = "all", batch_size: int | None = None
) -> LinearOperator:
    """Return the neural tangent kernel ``J Jᵀ`` of a model on data, as an operator.

    A product is one with Jᵀ and one with J; the kernel is never formed. `empirical_ntk` forms it.

    Args:
        model, data, subset, batch_size: as in `jacobian`.

    Returns:
        a symmetric `LinearOperator`, ``(N C, N C)``, of arrays like the outputs, ``(N, C)``.

    Raises:
        StatefulnnError: as `hessian`.

    Source: Jacot, Gabriel, Hongler 2018, https://arxiv.org/abs/1806.07572.

    Example:
        >>> x, y = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.ones((2, 1))
        >>> kernel = nn.curvature.tangent_kernel(nn.Linear(2, 1), x)
        >>> kernel.to_dense().tolist()
        [[6.0, 14.0], [14.0, 35.0]]
        >>> weights = kernel.damped(1e-2).inverse() @ y  # of kernel ridge regression
    """
    J = jacobian(model, data, subset=subset, batch_size=batch_size)
    return J @ J.T


def examples_jacobian(
    model: Model, loss: Loss, data: PyTree, subset: Filter, batch_size: int | None, function: str
) -> LinearOperator:
    """Return the operator whose rows are the gradients of the examples' losses, (N, P)."""
    problem = problem_of(function, model, data, subset, batch_size, loss)
    problem.check_reduction(function)
    return problem.rows(Bound(_losses, (problem.fn, problem.loss)))


# --------------------------------------------------------------------------------------------------
# What the matrices have in common


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, a loss and data, checked.

    Attributes:
        fn: the model as a pure function of all its parameters.
        loss: of outputs and targets, or None.
        mean: whether the loss averages over its batch.
        params: those that are differentiated.
        rest: the others by name, or None.
        stacks: the data.
        space: of the parameters.
    """

    fn: Callable
    loss: Any
    mean: bool
    params: Any
    rest: Any
    stacks: Stacks
    space: Space

    @property
    def operands(self) -> tuple:
        return self.params, self.rest, self.stacks

    def symmetric(self, rule: Callable) -> LinearOperator:
        return Leaf(self.space, self.space, True, self.operands, rule, rule)

    def sandwich(self, outputs: Callable, loss: Callable) -> LinearOperator:
        return self.symmetric(Bound(_sandwich_product, (outputs, loss, self.mean)))

    def rows(self, outputs: Callable) -> LinearOperator:
        shapes = jax.eval_shape(Bound(_all_outputs, (outputs,)), self.operands)
        push, pull = Bound(_push, (outputs,)), Bound(_pull, (outputs,))
        return Leaf(self.space, Space.of(shapes), False, self.operands, push, pull)

    def check_batches(self, function: str) -> None:
        """Raise if the data are several batches, and their losses do not make up that of all examples."""
        if sum(map(length, self.stacks)) > 1:
            self.check_reduction(function)

    def check_reduction(self, function: str) -> None:
        """Raise unless the loss of many examples is the mean, or the sum, of the losses of each."""
        # The Fisher matrix of a mean may be wanted as a sum.
        either = function == "empirical_fisher"
        fine = _adds_up(
            self.fn, self.loss, self.mean or either, not self.mean or either, self.operands
        )
        word = "mean or sum" if either else "mean" if self.mean else "sum"
        fail_unless(fine, functools.partial(_not_additive, function, word))

    def with_draws(self, key: jax.Array, likelihood: str, samples: int) -> Problem:
        """Return the problem with targets drawn from the model's predictions, (n, samples, ...)."""

        def of_batch(pair: tuple) -> tuple:
            batch, key = pair
            out = _outputs(self.fn, _joined(self.params, self.rest), batch)
            return batch[0], _drawn(out, key, likelihood, samples)

        drawn = []
        for number, stack in enumerate(self.stacks):
            keys = jax.random.split(jax.random.fold_in(key, number), length(stack))
            drawn.append(jax.lax.map(of_batch, (stack, keys)))
        return dataclasses.replace(self, stacks=tuple(drawn))


def problem_of(
    function: str,
    model: Model,
    data: PyTree,
    subset: Filter,
    batch_size: int | None,
    loss: Loss | None = None,
    reduction: str = "mean",
) -> Problem:
    check_choice(reduction, REDUCTIONS, "reduction", function)
    fn, params = pure(model, function)
    ordered = _order(model, fn)
    names = None
    if not isinstance(subset, str) or subset != "all":
        names = _names(model, params, subset, ordered, function)
    random, rest, _ = parts(params, names)
    stacks = stacked(data, batch_size, loss is not None, function)
    problem = Problem(
        fn,
        _function_of(loss, function),
        reduction == "mean",
        random,
        rest if isinstance(params, Mapping) else None,
        stacks,
        Space.of(random, ordered),
    )
    for stack in stacks:
        _check_outputs(problem, stack, function)
    return problem


def _order(model: Model, fn: Callable) -> list[str]:
    """Return the names of a module's parameters in its order, which JAX's dicts lose."""
    module = model[0] if isinstance(model, tuple) else model
    if isinstance(module, Module):
        return [name for name, _ in module.named_parameters()]
    moduledef = getattr(fn, "moduledef", None)
    return [] if moduledef is None else list(moduledef.names)


def _names(
    model: Model, params: PyTree, subset: Filter, ordered: list[str], function: str
) -> tuple[str, ...] | None:
    if not isinstance(params, Mapping) or subset == "last_layer":
        return chosen_names(model, params, subset, function)  # type: ignore[arg-type]
    rank = {name: i for i, name in enumerate(ordered)}
    ordered_names = sorted(params, key=lambda n: rank.get(n, len(rank)))
    return tuple(chosen(ordered_names, subset, f"{function}: subset", required=True))


def _function_of(loss: object, function: str) -> Any:
    if isinstance(loss, Module):
        fn, params = functionalize(loss)
        return lambda outputs, targets: fn(params, outputs, targets)
    if loss is not None and not callable(loss):
        raise TypeError(
            explain(
                f"{function} was given a loss of type {type(loss).__name__}",
                "it is a function of the outputs and targets of a batch",
                "F.cross_entropy, or another loss(outputs, targets) -> scalar",
            )
        )
    return loss


def _check_outputs(problem: Problem, stack: PyTree, function: str) -> None:
    """Raise unless the outputs are an array of all examples, and the loss of a batch a scalar."""
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stack)
    n = examples_in(stack)
    out = jax.eval_shape(
        Bound(_outputs, (problem.fn,)), _joined(problem.params, problem.rest), batch
    )
    shape, dtype = getattr(out, "shape", None), getattr(out, "dtype", None)
    if not shape or shape[0] != n or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        what = f"of type {type(out).__name__}" if shape is None else f"of shape {shape}, {dtype},"
        raise (ShapeError if shape is None or not shape or shape[0] != n else DtypeError)(
            explain(
                f"{function} got an output {what} from the model for a batch of {n}",
                "it needs one real array, whose first axis counts the examples",
                "wrap the model: (lambda params, x: fn(params, x)[0], params) picks one of several "
                "outputs",
            )
        )
    if problem.loss is not None:
        real_scalar(problem.loss)(jax.eval_shape(problem.loss, out, batch[1]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _adds_up(fn: Callable, loss: Loss, mean: bool, total: bool, operands: tuple) -> Any:
    """Say whether the loss of a batch is the mean, or the sum, over its examples, by its derivatives.

    Each batch is joined with the next: what holds for every pair, such as equal weights, holds for all data.
    """
    params, rest, stacks = operands

    def fine(*batches: Any) -> Any:
        out = jnp.concatenate([_outputs(fn, _joined(params, rest), b) for b in batches])
        # A little off the outputs, since derivatives vanish where the fit is perfect.
        out, targets = (
            0.9 * out,
            jax.tree.map(lambda *a: jnp.concatenate(a), *[b[1] for b in batches]),
        )
        whole = jax.grad(loss)(out, targets)
        each = jax.vmap(jax.grad(functools.partial(_loss_of_one, loss)))(out, targets)
        near = math.sqrt(jnp.finfo(out.dtype).eps) * jnp.abs(whole).max()
        sizes = [len(out)] * mean + [1] * total
        met = [(jnp.abs(whole - each / n) <= near).all() for n in sizes]
        return jnp.stack(met).any() | ~jnp.isfinite(out).all()

    part = lambda stack, where: jax.tree.map(lambda a: a[where], stack)
    kind = lambda stack: [a.shape[2:] for a in jax.tree.leaves(stack)]
    met = []
    for stack, after in zip(stacks, (*stacks[1:], None), strict=True):
        if length(stack) > 1:
            pairs = part(stack, slice(-1)), part(stack, slice(1, None))
            met.append(jax.lax.map(lambda pair: fine(*pair), pairs).all())
        else:
            met.append(fine(part(stack, 0)))
        if after is not None and kind(after) == kind(stack):
            met.append(fine(part(stack, -1), part(after, 0)))
    return jnp.stack(met).all()


def _not_additive(function: str, word: str, fine: object) -> ReductionError:
    instead = "leave out the examples labelled -100, and take a loss without class weights"
    if function != "influence":
        instead += (
            '; or reduction="sum", here and in the loss (functools.partial(F.cross_entropy, weight=w, '
            'reduction="sum")), and divide by your own number: (1 / w[y].sum()) * A'
        )
    if function in ("hessian", "ggn"):
        instead += "; or one batch, (x, y) with batch_size=None"
    return ReductionError(
        explain(
            f"{function} was given a loss of which that of a batch is not the {word} of the losses of its "
            "examples",
            "it is put together from parts of the data; class weights, labels of -100 and another "
            "reduction make the divisor differ from the number of examples",
            instead,
        )
    )


def _joined(params: PyTree, rest: Mapping[str, Any] | None) -> Any:
    return params if rest is None else {**rest, **params}


# --------------------------------------------------------------------------------------------------
# Products, each of `operands` and a vector. Functions of all parameters and a batch come first.


def _outputs(fn: Callable, params: PyTree, batch: PyTree) -> Any:
    return fn(params, *batch[0])


def _losses(fn: Callable, loss: Loss, params: PyTree, batch: PyTree) -> Any:
    """Return the loss of each example, (n,)."""
    return jax.vmap(functools.partial(_loss_of_one, loss))(fn(params, *batch[0]), batch[1])


def _loss_of_one(loss: Loss, out: jax.Array, target: PyTree) -> Any:
    return loss(out[None], jax.tree.map(lambda a: a[None], target))


def _sampled_losses(fn: Callable, likelihood: str, params: PyTree, batch: PyTree) -> Any:
    """Return the negative log-likelihood of each drawn target over √samples, (n, samples)."""
    inputs, statistics = batch
    out = fn(params, *inputs)
    size = statistics.shape[1]
    of_examples = jax.vmap(lambda o: _log_partition_of(likelihood, o))(out)
    fits = jax.vmap(lambda o, t: jnp.tensordot(t, o, o.ndim, precision="highest"))(out, statistics)
    return (of_examples[:, None] - fits) / math.sqrt(size)


def _hessian_product(fn: Callable, loss: Loss, mean: bool, operands: tuple, vector: PyTree) -> Any:
    params, rest, stacks = operands

    def of_batch(batch: PyTree) -> Any:
        def total(params: PyTree) -> Any:
            return loss(fn(_joined(params, rest), *batch[0]), batch[1])

        return jax.jvp(jax.grad(total), (params,), (vector,))[1]

    return _cast(summed(of_batch, stacks, mean), params)


def _sandwich_product(
    outputs: Callable, loss: Callable, mean: bool, operands: tuple, vector: PyTree
) -> Any:
    """Return ``Σ Jᵀ H J v``: J of the outputs of a batch, H of the loss of outputs and batch."""
    params, rest, stacks = operands

    def of_batch(batch: PyTree) -> Any:
        out, push = jax.linearize(lambda p: outputs(_joined(p, rest), batch), params)
        inner = jax.jvp(jax.grad(lambda out: loss(out, batch)), (out,), (push(vector),))[1]
        return jax.linear_transpose(push, params)(inner)[0]

    return _cast(summed(of_batch, stacks, mean), params)


def _all_outputs(outputs: Callable, operands: tuple) -> Any:
    params, rest, stacks = operands
    return mapped(lambda batch: outputs(_joined(params, rest), batch), stacks)


def _push(outputs: Callable, operands: tuple, vector: PyTree) -> Any:
    params, rest, stacks = operands

    def of_batch(batch: PyTree) -> Any:
        return jax.jvp(lambda p: outputs(_joined(p, rest), batch), (params,), (vector,))[1]

    return mapped(of_batch, stacks)


def _pull(outputs: Callable, operands: tuple, vector: PyTree) -> Any:
    params, rest, stacks = operands

    def of_batch(pair: tuple) -> Any:
        batch, part = pair
        return jax.vjp(lambda p: outputs(_joined(p, rest), batch), params)[1](part)[0]

    pairs = tuple(zip(stacks, like_stacks(vector, stacks), strict=True))
    return _cast(summed(of_batch, pairs, False), params)


def _cast(tree: PyTree, like: PyTree) -> Any:
    return jax.tree.map(lambda a, p: a.astype(p.dtype), tree, like)


# --------------------------------------------------------------------------------------------------
# Losses of outputs and a batch, and likelihoods


def _loss_of_outputs(loss: Loss, out: PyTree, batch: PyTree) -> Any:
    return loss(out, batch[1])


def _half_squares(mean: bool, out: jax.Array, batch: PyTree) -> Any:
    """Return a loss whose Hessian is the identity, over the number of examples for a mean."""
    return jnp.sum(jnp.square(out)) / (2 * (out.shape[0] if mean else 1))


def _log_partition(likelihood: str, mean: bool, out: jax.Array, batch: PyTree) -> Any:
    """Return a loss whose Hessian is the covariance of the targets, given natural parameters."""
    return _log_partition_of(likelihood, out) / (out.shape[0] if mean else 1)


def _log_partition_of(likelihood: str, out: jax.Array) -> Any:
    if likelihood == "categorical":
        return jnp.sum(jax.nn.logsumexp(out, axis=-1))
    if likelihood == "bernoulli":
        return jnp.sum(jax.nn.softplus(out))
    return jnp.sum(jnp.square(out)) / 2 if likelihood == "gaussian" else jnp.sum(jnp.exp(out))


def _drawn(out: jax.Array, key: jax.Array, likelihood: str, samples: int) -> Any:
    """Draw sufficient statistics, (n, samples, ...), for natural parameters (n, ...)."""
    shape = (samples, *out.shape)
    if likelihood == "categorical":
        classes = jax.random.categorical(key, out, axis=-1, shape=shape[:-1])
        drawn = jax.nn.one_hot(classes, out.shape[-1], dtype=out.dtype)
    elif likelihood == "bernoulli":
        drawn = jax.random.bernoulli(key, jax.nn.sigmoid(out), shape)
    elif likelihood == "gaussian":
        drawn = out + jax.random.normal(key, shape, out.dtype)
    else:
        drawn = jax.random.poisson(key, jnp.exp(out), shape)
    return jnp.moveaxis(drawn.astype(out.dtype), 0, 1)
