"""Gradients of differentially private training (DP-SGD): clipped one by one, summed, with noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import MissingRngError, explain, user_stack_level
from statefulnn.core.generator import as_key
from statefulnn.core.module import Module
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._blocks import fold_blocks
from statefulnn.curvature._examples import (
    check_examples,
    flattened,
    gradient_of_examples,
    without_randomness,
)
from statefulnn.curvature._ghost import find_layers, ghost_sum, norms_of
from statefulnn.curvature._models import (
    check_batch_size,
    check_choice,
    check_finite,
    check_parameters,
    number_of_examples,
)
from statefulnn.transforms.functional_call import functionalize
from statefulnn.transforms.types import PyTree


class Clipped(NamedTuple):
    """What `clip_per_example` returns.

    Attributes:
        gradients: the sum or mean over the examples of their clipped gradients.
        norms: the norm of each example's gradient before clipping, ``(N,)``.
        share: the share of examples whose gradient was shortened, between 0 and 1.

    `norms` and `share` are computed from single examples without noise: publishing them gives away
    what DP-SGD protects.
    """

    gradients: Any
    norms: Any
    share: Any


@shortened
def clip_per_example(gradients: object, max_norm: float, *, reduce: str = "mean") -> Clipped:
    """Shorten each example's gradient to a norm of at most `max_norm`, then sum or average.

    The norm of an example is that over all parameters together. A gradient g becomes
    ``g / max(1, |g| / max_norm)``; a zero gradient stays zero. Norms and sums are taken in float32 at
    least, and norms without overflow.

    Args:
        gradients: arrays ``(N, ...)``: a dict by name, or any pytree.
        max_norm: positive.
        reduce: "mean" or "sum".

    Returns:
        a `Clipped`; its gradients have the dtype of those given.

    Raises:
        ValueError: if `max_norm` is not positive, or `reduce` unknown.
        ShapeError: for no examples.
        FloatingPointError: if a gradient is not finite (checked outside of compiled code).

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy",
    https://arxiv.org/abs/1607.00133, algorithm 1.

    Example:
        >>> gradients = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])}
        >>> clipped = nn.curvature.clip_per_example(gradients, 1.0, reduce="sum")
        >>> clipped.gradients["w"].round(6).tolist(), clipped.norms.tolist()
        ([0.8999999761581421, 1.2000000476837158], [5.0, 0.5, 0.0])
    """
    function = "clip_per_example"
    check_choice(reduce, ("mean", "sum"), "reduce", function)
    max_norm = _checked_norm(max_norm, function)
    check_parameters(gradients, function)
    n = number_of_examples(gradients, function)
    check_examples((gradients,), function)
    check_finite(
        gradients,
        f"{function} was given gradients that are not finite",
        "no length of them is a number, and the sum would be none either",
        "look for the example: jnp.isfinite(g).all(axis=...) of each gradient",
    )
    total, norms = _clipped_sum(gradients, max_norm)
    if reduce == "mean":
        total = jax.tree.map(lambda g: g / n, total)
    total = jax.tree.map(lambda t, g: t.astype(g.dtype), total, gradients)
    return Clipped(total, norms, _share(norms, max_norm))


@shortened
def dp_gradients(
    loss: Callable,
    max_norm: float,
    noise_multiplier: float,
    *,
    batch_size: int | None = None,
    lot_size: int | None = None,
    has_norms: bool = False,
    clipping: str = "per_example",
) -> Callable:
    """Return a function that computes the gradients of DP-SGD.

    It clips the gradient of each example to `max_norm`, sums, adds to every number independent
    Gaussian noise of standard deviation ``noise_multiplier · max_norm``, and divides by the number of
    examples.

    Which (ε, δ) a training run gives depends on the noise, the sampling of the batches and the number of
    steps: `privacy_spent` computes it. The analysis wants each example in a batch independently with one
    probability (Poisson sampling); the divisor is then the expected number of examples, `lot_size`.

    Args:
        loss: ``loss(params, *example) -> scalar``, of one example.
        max_norm: positive.
        noise_multiplier: 0 or more.
        batch_size: how many examples' gradients are in memory at once; None for all. The result is
            the same.
        lot_size: what the sum is divided by; None for the number of examples given.
        has_norms: whether the norms of the examples are returned, which are not private.
        clipping: "per_example" computes the gradient of each example; "ghost", of a Module, does without
            those of Linear, Conv and Embedding layers, see `ghost_clip`. The result is the same.

    Returns:
        ``f(params, *examples, rng=key) -> gradients``, with arrays ``(N, ...)`` as examples and a key
        that is used for nothing else; or, with `has_norms`, ``-> (gradients, norms)``, norms ``(N,)``.
        `params` are arrays by name (or any pytree), or a Module, which the loss then takes; of a Module
        the gradients are a dict by name.

    Raises:
        ValueError: for numbers out of range.
        MissingRngError: when the function is called without `rng`, unless there is no noise.
        ShapeError: when it is called with no examples and no `lot_size`.
        FloatingPointError: if a gradient is not finite (checked outside of compiled code).
        StateWriteError: if a Module writes state: a batch's statistics are not private.
        TypeError: for ``clipping="ghost"`` of arrays, which show no layers.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy",
    https://arxiv.org/abs/1607.00133, algorithm 1.

    Example:
        >>> def loss(model, x, y):
        ...     return F.mse_loss(model(x), y)
        >>> private = nn.curvature.dp_gradients(loss, max_norm=1.0, noise_multiplier=1.1)
        >>> gradients = private(
        ...     nn.Linear(3, 1), jnp.ones((8, 3)), jnp.ones((8, 1)), rng=jax.random.key(0)
        ... )
        >>> gradients["weight"].shape
        (1, 3)
    """
    function = "dp_gradients"
    max_norm = _checked_norm(max_norm, function)
    noise_multiplier = _checked_noise(noise_multiplier, function)
    check_batch_size(batch_size, function)
    check_choice(clipping, ("per_example", "ghost"), "clipping", function)
    if lot_size is not None and not lot_size > 0:
        raise ValueError(
            explain(
                f"dp_gradients was given lot_size={lot_size!r}",
                "the sum of the gradients is divided by it",
                "pass the expected number of examples of a batch, or None",
            )
        )
    noiseless = not isinstance(noise_multiplier, Tracer) and noise_multiplier == 0

    @shortened
    def private(params: PyTree, /, *examples: Any, rng: int | jax.Array | None = None) -> Any:
        if rng is None and not noiseless:
            raise MissingRngError(
                explain(
                    "called the function of dp_gradients without rng",
                    "its noise is drawn from a key, another one for each step",
                    "pass rng=key, with key from jax.random.split",
                )
            )
        n = number_of_examples(examples, function) if examples else 0
        if lot_size is None or not examples:
            check_examples(examples, function)

        arrays = jax.tree.map(jnp.asarray, examples)
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), arrays)
        sums = _ghost_sums if clipping == "ghost" else _example_sums
        block, like = sums(loss, params, one, max_norm, function)
        if n:
            total, norms = fold_blocks(block, _add, arrays, batch_size)
        else:  # a lot that came out empty
            total, norms = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(block, one)
            )
            norms = norms[:0]
        if not noiseless:
            total = _with_noise(total, noise_multiplier * max_norm, rng)
        divisor = n if lot_size is None else lot_size
        gradients = jax.tree.map(lambda t, g: (t / divisor).astype(g.dtype), total, like)
        return (gradients, norms) if has_norms else gradients

    return private


@shortened
def ghost_clip(
    loss: Callable, max_norm: float, *, reduce: str = "mean", batch_size: int | None = None
) -> Callable:
    """Return a function that sums or averages the clipped gradients of examples without computing them.

    For the Linear, Conv and Embedding layers of a Module, the norm of an example's gradient is computed from
    the layer's inputs and cotangents, and so is the clipped sum: one backward pass serves both. (Where a
    layer's gradients of examples are about as small as these, they are used themselves.) Everything else has
    gradients of examples, by vmap: norms, where these are no larger than the activations; layers of other
    classes (recurrent ones, attention's own weights), parameters that are used outside of their layer or by
    several, and layers in a loop or a checkpoint. There is a warning that names those of them with more than
    one axis.

    Args:
        loss: ``loss(model, *example) -> scalar``, of one example.
        max_norm: positive.
        reduce: "mean" or "sum".
        batch_size: how many examples are computed at once; None for all.

    Returns:
        ``f(model, *examples) -> Clipped``, with arrays ``(N, ...)`` as examples and gradients by name; as
        `clip_per_example` of all gradients.

    Raises:
        ValueError: for numbers out of range.
        TypeError: if it is called with arrays in place of a Module.
        ShapeError: when it is called with no examples.
        FloatingPointError: if a gradient is not finite (checked outside of compiled code).
        StateWriteError: if the Module writes state.

    Source: Li et al. 2022, https://arxiv.org/abs/2110.05679 (the norms); Bu et al. 2022,
    https://arxiv.org/abs/2205.10683 (convolutions), and 2023, https://arxiv.org/abs/2210.00038 (one backward
    pass).

    Example:
        >>> loss = lambda model, x, y: F.mse_loss(model(x), y)
        >>> clipped = nn.jit(nn.curvature.ghost_clip(loss, 1.0))(
        ...     nn.Linear(3, 1), jnp.ones((8, 3)), jnp.ones((8, 1))
        ... )
        >>> clipped.gradients["weight"].shape, clipped.norms.shape
        ((1, 3), (8,))
    """
    function = "ghost_clip"
    check_choice(reduce, ("mean", "sum"), "reduce", function)
    max_norm = _checked_norm(max_norm, function)
    check_batch_size(batch_size, function)

    @shortened
    def clipped(model: PyTree, /, *examples: Any) -> Clipped:
        n = check_examples(examples, function)
        arrays = jax.tree.map(jnp.asarray, examples)
        block, like = _ghost_sums(loss, model, arrays, max_norm, function)
        total, norms = fold_blocks(block, _add, arrays, batch_size)
        divisor = n if reduce == "mean" else 1
        total = jax.tree.map(lambda t, g: (t / divisor).astype(g.dtype), total, like)
        return Clipped(total, norms, _share(norms, max_norm))

    return clipped


_NOT_FINITE = (
    "clipping cannot shorten it, and the sum would be no number",
    "look at the examples whose loss is not finite",
)


def _example_sums(
    loss: Callable, target: PyTree, some: tuple, max_norm: ArrayLike, function: str
) -> tuple[Callable, Any]:
    """Return ``f(examples) -> (sum of clipped gradients, norms)``, and what has the gradients' dtypes."""
    gradients_of = gradient_of_examples(loss, target, function)

    def block(examples: tuple) -> tuple[Any, Any]:
        gradients = gradients_of(examples)
        check_finite(
            gradients, f"the loss of {function} has a gradient that is not finite", *_NOT_FINITE
        )
        return _clipped_sum(gradients, max_norm)

    return block, jax.eval_shape(gradients_of, some)


def _ghost_sums(
    loss: Callable, target: PyTree, some: tuple, max_norm: ArrayLike, function: str
) -> tuple[Callable, Any]:
    """Return what `_example_sums` does, by ghost clipping."""
    if not isinstance(target, Module):
        raise TypeError(
            explain(
                f"{function} was given {type(target).__name__} to clip without gradients of examples",
                "it looks at the layers of a Module, which arrays do not show",
                "pass the Module itself; or use dp_gradients(...) or clip_per_example",
            )
        )
    params = functionalize(target)[1]
    check_parameters(params, function)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), some)
    layers = find_layers(without_randomness(loss, function), target, params, one)
    _tell_others(
        [n for n, p in params.items() if n not in layers.by_weight and p.ndim > 1], function
    )

    def block(examples: tuple) -> tuple[Any, Any]:
        total, norms = ghost_sum(layers, params, examples, max_norm)
        check_finite(
            norms, f"the loss of {function} has a gradient that is not finite", *_NOT_FINITE
        )
        return total, norms

    return block, params


def _tell_others(names: list[str], function: str) -> None:
    if names:
        warnings.warn(
            explain(
                f"{function} computes the gradients of examples for {', '.join(map(repr, names))}",
                "it does without them for the weights of Linear, Conv (of one group, padded by zeros) and "
                "Embedding layers that are called as they are",
                "pass a batch_size if memory does not suffice, or ignore this",
            ),
            stacklevel=user_stack_level(),
        )


@jax.jit
def _clipped_sum(gradients: PyTree, max_norm: ArrayLike) -> tuple[Any, Any]:
    """Return the sum of clipped gradients, in float32 at least, and the norms before clipping."""
    norms = norms_of(flattened(gradients))
    factors = 1 / jnp.maximum(1, norms / max_norm)

    # A rounded product would let a gradient be a little longer than max_norm.
    totals = [jnp.dot(factors, g, precision="highest") for g in flattened(gradients)]
    leaves, treedef = jax.tree.flatten(gradients)
    shaped = [t.reshape(g.shape[1:]) for t, g in zip(totals, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped), norms


def _add(one: PyTree, two: PyTree) -> Any:
    return jax.tree.map(jnp.add, one, two)


def _share(norms: jax.Array, max_norm: ArrayLike) -> Any:
    return jnp.mean((norms > max_norm).astype(norms.dtype))


def _with_noise(total: PyTree, std: ArrayLike, rng: object) -> Any:
    leaves, treedef = jax.tree.flatten(total)
    key = as_key(rng)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + std * jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def _checked_norm(max_norm: Any, function: str) -> Any:
    if isinstance(max_norm, Tracer):
        return max_norm
    if not (float(max_norm) > 0 and math.isfinite(max_norm)):
        raise ValueError(
            explain(
                f"{function} was given max_norm={max_norm!r}",
                "gradients are shortened to this length",
                "max_norm=1.0, or another positive number",
            )
        )
    return float(max_norm)


def _checked_noise(noise_multiplier: Any, function: str) -> Any:
    if isinstance(noise_multiplier, Tracer):
        return noise_multiplier
    if not (float(noise_multiplier) >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(
            explain(
                f"{function} was given noise_multiplier={noise_multiplier!r}",
                "the noise's standard deviation is noise_multiplier · max_norm",
                "noise_multiplier=1.0, or another number of 0 or more",
            )
        )
    return float(noise_multiplier)
