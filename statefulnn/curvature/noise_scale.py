"""The gradient noise scale: how large a batch pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.scaling import exponent_of, shifted
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._blocks import fold_blocks, length
from statefulnn.curvature._examples import check_examples, flattened, gradient_of_examples
from statefulnn.curvature._models import (
    check_batch_size,
    check_finite,
    check_parameters,
    number_of_examples,
)
from statefulnn.transforms.types import PyTree


class NoiseScale(NamedTuple):
    """Estimates of the noise of gradients.

    Attributes:
        noise_scale: ``trace / gradient_squared``, in examples; infinite where the estimate of the
            squared gradient is not positive, that is, where it drowns in the noise.
        gradient_squared: unbiased estimate of ``|G|²``, the squared norm of the expected gradient; it
            may come out negative.
        trace: unbiased estimate of ``tr Σ``, the summed variance of one example's gradient.

    To smooth over steps, average `gradient_squared` and `trace` apart and divide then: the average of
    ratios is biased.
    """

    noise_scale: Any
    gradient_squared: Any
    trace: Any


@shortened
def gradient_noise_scale(gradients: object) -> NoiseScale:
    """Return the simple noise scale ``tr Σ / |G|²`` from the gradients of single examples.

    Batches much smaller than it lose nothing by being doubled, much larger ones gain nothing.

    Args:
        gradients: arrays ``(N, ...)`` (a dict by name, or any pytree), N at least 2, such as of
            ``jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, xs, ys)``.

    Returns:
        a `NoiseScale`. ``trace = Σᵢ |gᵢ - ḡ|² / (N - 1)`` and ``gradient_squared = |ḡ|² - trace / N``. The
        ratio is right where these two are too large or too small for their dtype.

    Raises:
        ShapeError: for fewer than two examples, or arrays of different numbers of them.
        FloatingPointError: if a gradient is not finite (checked outside of compiled code).

    Source: McCandlish, Kaplan, Amodei 2018, "An Empirical Model of Large-Batch Training",
    https://arxiv.org/abs/1812.06162, equation 2.9.

    Example:
        >>> gradients = {"w": jnp.array([[3.0, 0.0], [5.0, 0.0]])}
        >>> nn.curvature.gradient_noise_scale(gradients)._asdict() == {
        ...     "noise_scale": 2 / 15,
        ...     "gradient_squared": 15.0,
        ...     "trace": 2.0,
        ... }
        True
    """
    function = "gradient_noise_scale"
    check_parameters(gradients, function)
    _at_least_two(number_of_examples(gradients, function), function)
    check_finite(
        gradients,
        f"{function} was given gradients that are not finite",
        "their variance is not a number",
        "look for the example: jnp.isfinite(g).all(axis=...) of each gradient",
    )
    return _scale(*_summary(gradients))


@shortened
def noise_scale_of(
    loss: Callable, params: object, *examples: object, batch_size: int | None = None
) -> NoiseScale:
    """Return the simple noise scale of a loss; see `gradient_noise_scale`.

    Args:
        loss: ``loss(params, *example) -> scalar``, of one example.
        params: arrays by name (or any pytree), or a Module, which the loss then takes.
        examples: arrays ``(N, ...)``, N at least 2.
        batch_size: how many examples' gradients are in memory at once; None for all.

    Returns:
        a `NoiseScale`, the same for every `batch_size`.

    Raises:
        ShapeError: for fewer than two examples, or arrays of different numbers of them.
        StateWriteError, MissingRngError: if a Module writes state or draws random numbers.

    Example:
        >>> def loss(model, x, y):
        ...     return F.mse_loss(model(x), y)
        >>> x = jax.random.normal(jax.random.key(0), (32, 3))
        >>> scale = nn.curvature.noise_scale_of(loss, nn.Linear(3, 1), x, x[:, :1], batch_size=8)
        >>> float(scale.trace) > 0
        True
    """
    function = "noise_scale_of"
    check_batch_size(batch_size, function)
    gradients = gradient_of_examples(loss, params, function)
    _at_least_two(check_examples(examples, function), function)
    examples = jax.tree.map(jnp.asarray, examples)

    def summary(block: tuple) -> tuple[Any, None]:
        return _summary(gradients(block)), None

    return _scale(*fold_blocks(summary, _merged, examples, batch_size)[0])


@shortened
def noise_scale_from_batches(
    small_squared: ArrayLike, big_squared: ArrayLike, small: int, big: int
) -> NoiseScale:
    """Return the simple noise scale from the gradients of two batches of different size.

    Where several devices each compute the gradient of their share, both norms are there already.

    Args:
        small_squared: ``|G_small|²``, the squared norm of the mean gradient of a small batch, or its
            average over several small batches.
        big_squared: ``|G_big|²``, the same of a big batch.
        small: the number of examples in a small batch.
        big: that in a big batch, more than `small`.

    Returns:
        a `NoiseScale`; both estimates are unbiased.

    Raises:
        ValueError: unless ``1 <= small < big``.

    Source: McCandlish, Kaplan, Amodei 2018, https://arxiv.org/abs/1812.06162, appendix A.1.

    Example:
        >>> scale = nn.curvature.noise_scale_from_batches(5.0, 2.0, small=1, big=4)
        >>> float(scale.gradient_squared), float(scale.trace), float(scale.noise_scale)
        (1.0, 4.0, 4.0)
    """
    if not 1 <= small < big:
        raise ValueError(
            explain(
                f"noise_scale_from_batches was given small={small!r} and big={big!r}",
                "two batch sizes that differ tell noise from gradient",
                "pass the numbers of examples of both batches, the small one first",
            )
        )
    little, much = jnp.asarray(small_squared), jnp.asarray(big_squared)
    squared = (big * much - small * little) / (big - small)
    trace = (little - much) / (1 / small - 1 / big)
    return _ratio(squared, trace)


def _at_least_two(n: int, function: str) -> None:
    if n < 2:
        raise ShapeError(
            explain(
                f"{function} was given {n} examples",
                "a variance needs two",
                "pass arrays (N, ...) with N of 2 or more",
            )
        )


@jax.jit
def _summary(gradients: PyTree) -> tuple[Any, Any, list, Any]:
    """Return the number of examples, an exponent, the mean gradients and the summed squared deviations.

    These are of gradients in the unit 2^exponent, in which no square over- or underflows.
    """
    flat = flattened(gradients)
    exponent = exponent_of(flat)
    flat = shifted(flat, -exponent)
    means = [g.mean(0) for g in flat]
    spread = sum(jnp.sum(jnp.square(g - m)) for g, m in zip(flat, means, strict=True))
    return jnp.asarray(float(length(flat))), exponent, means, spread


def _merged(one: tuple, two: tuple) -> tuple:
    """Merge the summaries of two blocks, without differences of large sums."""
    exponent = jnp.maximum(one[1], two[1])
    (n, means, spread), (m, others, other_spread) = _in_unit(one, exponent), _in_unit(two, exponent)
    total = n + m
    steps = [b - a for a, b in zip(means, others, strict=True)]
    between: Any = sum(jnp.sum(jnp.square(s)) for s in steps)
    weight = n * m / total
    return (
        total,
        exponent,
        [a + s * (m / total).astype(s.dtype) for a, s in zip(means, steps, strict=True)],
        spread + other_spread + between * weight.astype(between.dtype),
    )


def _in_unit(summary: tuple, exponent: jax.Array) -> tuple[Any, list, Any]:
    n, own, means, spread = summary
    return n, shifted(means, own - exponent), _of_squares(spread, own - exponent)


def _of_squares(value: jax.Array, exponent: jax.Array) -> Any:
    return shifted(shifted(value, exponent), exponent)


@jax.jit
def _scale(n: jax.Array, exponent: jax.Array, means: list, spread: jax.Array) -> NoiseScale:
    n = n.astype(spread.dtype)
    trace = spread / (n - 1)
    squared = sum(jnp.sum(jnp.square(m)) for m in means) - trace / n
    ratio = _ratio(squared, trace).noise_scale
    return NoiseScale(ratio, _of_squares(squared, exponent), _of_squares(trace, exponent))


def _ratio(squared: jax.Array, trace: jax.Array) -> NoiseScale:
    positive = squared > 0
    ratio = jnp.where(positive, trace / jnp.where(positive, squared, 1), jnp.inf)
    return NoiseScale(ratio, squared, trace)
