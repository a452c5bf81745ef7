"""Gradients by evolution strategies, for objectives whose own gradient explodes or does not exist."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import DtypeError, explain
from statefulnn.core.reports import fail_unless, finite, report_unless
from statefulnn.core.tracebacks import shortened
from statefulnn.meta.tasks import require_rng, say_which_diverged

Tree = TypeVar("Tree")


@shortened
def es_gradient(
    objective: Callable,
    params: Tree,
    *,
    key: jax.Array | None = None,
    sigma: ArrayLike = 0.01,
    pairs: int = 16,
    report: bool = True,
) -> tuple[jax.Array, Tree]:
    """Estimate the gradient of a smoothed objective from its values alone.

    The objective is smoothed by normal perturbations of `params`; each is used with both signs, which
    takes out the variance of even terms.

    Args:
        objective: ``objective(params) -> scalar``; it need not be differentiable.
        params: a pytree of floating-point arrays.
        key: a random key.
        sigma: the standard deviation of the perturbations; it may be traced.
        pairs: how many perturbations; the objective is evaluated ``2 * pairs`` times, in one batch.
        report: whether to warn, naming the particles, when a value is not finite.

    Returns:
        ``(value, grads)``: the mean of the values and the estimate, of the structure of `params`.

    Raises:
        MissingRngError: without `key`.
        DtypeError: for parameters that are not floating-point, or that no perturbation changes.

    Source: Salimans et al. 2017; antithetic sampling, Brockhoff et al. 2010.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> _, grads = nn.meta.es_gradient(
        ...     lambda w: 3 * w, jnp.asarray(1.0), key=jax.random.key(0), pairs=2000
        ... )
        >>> 2.8 < float(grads) < 3.2
        True
    """
    _require_sizes("es_gradient", sigma, pairs)
    noise = _normal(require_rng(key, "es_gradient"), params, pairs, sigma)
    _require_moves("es_gradient", params, noise)
    values = _at_both_signs(objective, params, noise)
    _report(values, report)
    return values.mean(), _estimate(noise, values, sigma)


class PES(NamedTuple):
    """What persistent evolution strategies carry from one piece of an unroll to the next.

    Attributes:
        states: the inner state of each particle, ``(2 * pairs, ...)``, both signs.
        sums: the sum of the perturbations of each pair so far, ``(pairs, *shape)``.
    """

    states: Any
    sums: Any


@shortened
def pes_init(state: object, params: object, pairs: int) -> PES:
    """Return the start of persistent evolution strategies: all particles in one inner state.

    Args:
        state: the inner state at the beginning of an unroll, any pytree of arrays.
        params: the meta-parameters.
        pairs: how many perturbations.

    A `PES` is a pytree, so a loop starts the next unroll with
    ``jax.tree.map(lambda a, b: jnp.where(done, a, b), pes_init(...), pes)``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.meta.pes_init(jnp.zeros(3), jnp.zeros(()), pairs=4).states.shape
        (8, 3)
    """
    _require_sizes("pes_init", 1.0, pairs)
    spread = lambda v: jnp.broadcast_to(v, (2 * pairs, *jnp.shape(v)))
    zeros = lambda v: jnp.zeros((pairs, *jnp.shape(v)), jnp.result_type(v))
    return PES(jax.tree_util.tree_map(spread, state), jax.tree_util.tree_map(zeros, params))


@shortened
def pes_gradient(
    unroll: Callable,
    params: Tree,
    pes: PES,
    *,
    key: jax.Array | None = None,
    sigma: ArrayLike = 0.01,
    report: bool = True,
) -> tuple[jax.Array, Tree, PES]:
    """Estimate the gradient of a long unroll from a short piece of it, without truncation bias.

    Each particle goes on from where its own perturbed past led it, and its loss is credited to the sum
    of all its perturbations. Over the pieces of one unroll the estimates add up to that of the whole.

    Args:
        unroll: ``unroll(params, state) -> (loss, state)``: a few inner steps.
        params: the meta-parameters, a pytree of floating-point arrays.
        pes: from `pes_init`, or from the piece before.
        key: a random key.
        sigma: the standard deviation of a perturbation; it may be traced.
        report: whether to warn, naming the particles, when a loss is not finite.

    Returns:
        ``(loss, grads, pes)``: the mean loss of the piece, the estimate, and what the next piece needs.

    Raises:
        MissingRngError: without `key`.

    Source: Vicol, Metz and Sohl-Dickstein 2021, Unbiased gradient estimation in unrolled computation
    graphs with persistent evolution strategies.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> piece = lambda theta, x: ((x + theta) ** 2, x + theta)
        >>> pes = nn.meta.pes_init(jnp.zeros(()), jnp.zeros(()), pairs=8)
        >>> loss, grads, pes = nn.meta.pes_gradient(
        ...     piece, jnp.zeros(()), pes, key=jax.random.key(0)
        ... )
        >>> grads.shape
        ()
    """
    pairs = jax.tree_util.tree_leaves(pes.sums)[0].shape[0]
    _require_sizes("pes_gradient", sigma, pairs)
    noise = _normal(require_rng(key, "pes_gradient"), params, pairs, sigma)
    _require_moves("pes_gradient", params, noise)
    losses, states = _at_both_signs(unroll, params, noise, pes.states)
    _report(losses, report)
    sums = jax.tree_util.tree_map(jnp.add, pes.sums, noise)
    return losses.mean(), _estimate(sums, losses, sigma), PES(states, sums)


def _at_both_signs(function: Callable, params: object, noise: object, *states: Any) -> Any:
    """Evaluate a function at each perturbation, then at the negative of each, in one batch."""

    def one(noise: object, *state: Any) -> Any:
        return function(jax.tree_util.tree_map(jnp.add, params, noise), *state)

    both = jax.tree_util.tree_map(lambda e: jnp.concatenate([e, -e]), noise)
    return jax.vmap(one)(both, *states)


def _normal(key: Any, params: Any, pairs: int, sigma: Any) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise DtypeError(
                explain(
                    f"estimated a gradient by params{jax.tree_util.keystr(path)} of dtype "
                    f"{jnp.result_type(leaf)}",
                    "perturbations are real numbers",
                    "leave the array out of params",
                )
            )
    keys = jax.random.split(key, max(1, len(leaves)))
    return treedef.unflatten(
        jnp.asarray(sigma, jnp.result_type(v))
        * jax.random.normal(k, (pairs, *jnp.shape(v)), jnp.result_type(v))
        for k, v in zip(keys, leaves, strict=False)
    )


def _estimate(noise: Any, values: Any, sigma: Any) -> Any:
    """Return the mean over pairs of ``noise * (plus - minus) / (2 sigma^2)``."""
    plus, minus = jnp.split(values, 2)

    def one(e: Any) -> Any:
        # The square of a small sigma would be zero, and two factors of their own are not; nor may the slopes
        # be rounded to the parameters' dtype before the mean.
        wide = e.dtype if jnp.finfo(e.dtype).bits >= 32 else jnp.float32
        own = jnp.asarray(sigma, wide)
        slopes = (plus - minus).astype(wide) / (2 * own)
        return (jnp.tensordot(slopes, e.astype(wide) / own, axes=1) / len(slopes)).astype(e.dtype)

    return jax.tree_util.tree_map(one, noise)


def _require_moves(function: str, params: object, noise: object) -> None:
    """Fail if no perturbation changes any number of the parameters."""
    moved = jax.tree_util.tree_map(lambda p, e: jnp.any(p + e != p), params, noise)
    leaves = jax.tree_util.tree_leaves(moved)
    if leaves:
        fail_unless(jnp.stack(leaves).any(), functools.partial(_no_move, function))


def _no_move(function: str, _: object) -> DtypeError:
    return DtypeError(
        explain(
            f"{function} was given a sigma whose perturbations round to nothing",
            "params + noise is params in their dtype, so all values are the same",
            "a larger sigma, or parameters in a wider dtype",
        )
    )


def _report(values: Any, wanted: bool) -> None:
    if wanted:
        fine = finite(values, len(values))
        report_unless(fine.all(), say_which_diverged("particle"), fine)


def _require_sizes(function: str, sigma: Any, pairs: int) -> None:
    kinds = (int, float, np.ndarray, np.generic, jax.Array)
    number = isinstance(sigma, kinds) and jnp.ndim(sigma) == 0
    if not isinstance(sigma, Tracer) and not (number and float(sigma) > 0):
        raise ValueError(f"{function}: sigma must be a positive number, got {sigma!r}")
    if not isinstance(pairs, int) or pairs < 1:
        raise ValueError(f"{function}: pairs must be a positive integer, got {pairs!r}")
