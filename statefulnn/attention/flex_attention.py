"""Attention whose scores and masks are functions of positions.

A score function takes ``(score, batch, head, q_idx, kv_idx)``, a mask function ``(batch, head, q_idx,
kv_idx)``; all arguments are scalars. XLA fuses both into the computation of the scores.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.errors import explain
from statefulnn.core.listing import listing
from statefulnn.functional._checks import array, shape_error
from statefulnn.functional.attention import (
    Form,
    masked_scores,
    softmax_of_scores,
    weighted_values,
)

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "noop_mask",
    "or_masks",
]
__dir__ = listing(globals())

_BLOCK = 128


class AuxRequest(NamedTuple):
    """What `flex_attention` is to return besides its output.

    Source: ``torch.nn.attention.flex_attention.AuxRequest``.

    Example:
        >>> from statefulnn.attention.flex_attention import AuxRequest
        >>> AuxRequest(lse=True).max_scores
        False
    """

    lse: bool = False
    max_scores: bool = False


class AuxOutput(NamedTuple):
    """What `flex_attention` returned besides its output, each ``(B, Hq, L)`` in float32 or None.

    Source: ``torch.nn.attention.flex_attention.AuxOutput``.

    Example:
        >>> from statefulnn.attention.flex_attention import AuxOutput
        >>> AuxOutput().lse is None
        True
    """

    lse: Any = None
    max_scores: Any = None


# --------------------------------------------------------------------------------------------------
# Masks by functions


def noop_mask(batch: ArrayLike, head: ArrayLike, token_q: ArrayLike, token_kv: ArrayLike) -> Any:
    """Allow every pair.

    Source: ``torch.nn.attention.flex_attention.noop_mask``.

    Example:
        >>> from statefulnn.attention.flex_attention import noop_mask
        >>> bool(noop_mask(0, 0, 1, 2))
        True
    """
    return jnp.ones((), jnp.bool_)


def or_masks(*mask_mods: Callable) -> Callable:
    """Return the mask function that allows what any of them allows.

    Raises:
        RuntimeError: if one is no function.

    Source: ``torch.nn.attention.flex_attention.or_masks``.

    Example:
        >>> from statefulnn.attention.flex_attention import or_masks
        >>> near = or_masks(lambda b, h, q, k: q == k, lambda b, h, q, k: q == k + 1)
        >>> bool(near(0, 0, 3, 2)), bool(near(0, 0, 3, 1))
        (True, False)
    """
    return _combined("or_masks", mask_mods, jnp.logical_or, False)


def and_masks(*mask_mods: Callable) -> Callable:
    """Return the mask function that allows what all of them allow.

    Raises:
        RuntimeError: if one is no function.

    Source: ``torch.nn.attention.flex_attention.and_masks``.

    Example:
        >>> from statefulnn.attention.flex_attention import and_masks
        >>> window = and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: q - k < 2)
        >>> bool(window(0, 0, 3, 2)), bool(window(0, 0, 3, 1))
        (True, False)
    """
    return _combined("and_masks", mask_mods, jnp.logical_and, True)


def _combined(name: str, mods: tuple[Callable, ...], combine: Callable, start: bool) -> Callable:
    if not all(callable(mod) for mod in mods):
        raise RuntimeError(
            explain(
                f"{name} was given {mods}",
                "All inputs should be callable mask_mods",
                f"{name}(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)",
            )
        )

    def mask(b: ArrayLike, h: ArrayLike, q_idx: ArrayLike, kv_idx: ArrayLike) -> Any:
        results = [mod(b, h, q_idx, kv_idx) for mod in mods]
        return functools.reduce(combine, results, jnp.asarray(start))

    return mask


def _positions(function: Callable, sizes: tuple[int, ...], scores: jax.Array | None = None) -> Any:
    """Return a function's values for all batches, heads and positions, ``(B, H, L, S)``."""
    indices = [jnp.arange(n, dtype=jnp.int32) for n in sizes]
    for axis in range(4):  # the innermost vmap is over the source
        own: list[int | None] = [None] * 4
        own[3 - axis] = 0
        axes = own if scores is None else [0, *own]
        function = jax.vmap(function, axes)
    return function(*indices) if scores is None else function(scores, *indices)


def _is_score_mod(function: Callable) -> bool:
    """Say whether a function takes a score first; raise unless it takes four or five arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    count = sum(p.kind in kinds and p.default is p.empty for p in parameters)
    if count not in (4, 5):
        raise AssertionError(
            explain(
                f"was given a function of {count} arguments",
                "a mask takes (b, h, q_idx, kv_idx), a score function (score, b, h, q_idx, kv_idx)",
                "lambda b, h, q_idx, kv_idx: q_idx >= kv_idx",
            )
        )
    return count == 5


def create_mask(
    mod_fn: Callable, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int, device: object = None
) -> Any:
    """Return a mask function's values, ``(B, H, Q_LEN, KV_LEN)``, booleans.

    Args:
        mod_fn: a mask function; or a score function, which masks where it gives -inf.
        B: the number of batches; None for 1.
        H: the number of heads; None for 1.
        Q_LEN: the number of target positions.
        KV_LEN: the number of source positions.
        device: where the mask is put.

    Raises:
        AssertionError: if the function takes neither four nor five arguments.

    Source: ``torch.nn.attention.flex_attention.create_mask``.

    Example:
        >>> from statefulnn.attention.flex_attention import create_mask
        >>> create_mask(lambda b, h, q, k: q >= k, 1, 1, 2, 3)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0]]
    """
    sizes = (1 if B is None else B, 1 if H is None else H, Q_LEN, KV_LEN)
    if _is_score_mod(mod_fn):
        mask = _positions(mod_fn, sizes, jnp.zeros(sizes)) != -jnp.inf
    else:
        mask = _positions(mod_fn, sizes).astype(jnp.bool_)
    return mask if device is None else jax.device_put(mask, device)


class BlockMask:
    """A mask function with its sizes, and which blocks of positions it leaves something of.

    The blocks are for inspection and for kernels that skip empty ones; XLA computes every score.

    Args:
        mask_mod: the mask function.
        batch_dims: B and H; 1 for masks that do not depend on them.
        seq_lengths: the numbers of target and source positions.
        block_size: the sizes of a block, in target and source positions.

    Source: ``torch.nn.attention.flex_attention.BlockMask``; made by `create_block_mask`.

    Example:
        >>> from statefulnn.attention.flex_attention import create_block_mask
        >>> mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 4, 4, BLOCK_SIZE=2)
        >>> mask.to_dense()[0, 0].tolist(), mask.sparsity()
        ([[1, 0], [1, 1]], 25.0)
    """

    def __init__(
        self,
        mask_mod: Callable,
        batch_dims: tuple[int, int],
        seq_lengths: tuple[int, int],
        block_size: tuple[int, int],
    ) -> None:
        self.mask_mod = mask_mod
        self.seq_lengths = seq_lengths
        self.BLOCK_SIZE = block_size
        self._batch_dims = batch_dims

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The sizes, ``(B, H, L, S)``."""
        return (*self._batch_dims, *self.seq_lengths)

    @functools.cached_property
    def _counts(self) -> np.ndarray:
        """How many pairs of each block are allowed, ``(B, H, rows, columns)``."""
        with jax.ensure_compile_time_eval():
            mask = np.asarray(create_mask(self.mask_mod, *self.shape))
        (rows, columns), (length, source) = self.BLOCK_SIZE, self.seq_lengths
        padded = np.pad(mask, [(0, 0), (0, 0), (0, -length % rows), (0, -source % columns)])
        blocks = (padded.shape[2] // rows, rows, padded.shape[3] // columns, columns)
        return padded.reshape(*padded.shape[:2], *blocks).sum((3, 5))

    def to_dense(self) -> Any:
        """Return 1 for each block that something is allowed in, ``(B, H, rows, columns)``."""
        return jnp.asarray((self._counts > 0).astype(np.int32))

    def numel(self) -> int:
        """Return the number of pairs, allowed or not."""
        return math.prod(self.shape)

    def sparsity(self) -> float:
        """Return the share of pairs, in percent, whose blocks are empty."""
        computed = int((self._counts > 0).sum()) * math.prod(self.BLOCK_SIZE)
        return 100 * (1 - computed / self.numel())

    def to(self, device: object) -> BlockMask:
        """Return the mask itself: a function has no device."""
        return self

    def __repr__(self) -> str:
        name = getattr(self.mask_mod, "__name__", repr(self.mask_mod))
        return f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, mask_mod={name})"


def create_block_mask(
    mask_mod: Callable,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: object = None,
    BLOCK_SIZE: int | tuple[int, int] = _BLOCK,
    _compile: bool = False,
) -> BlockMask:
    """Return a mask function with its sizes, for `flex_attention`.

    Args:
        mask_mod: the mask function.
        B: the number of batches; None for a mask that does not depend on them.
        H: the number of heads; None for a mask that does not depend on them.
        Q_LEN: the number of target positions.
        KV_LEN: the number of source positions.
        device: accepted for compatibility with torch; a function has no device.
        BLOCK_SIZE: the size of a block, or one for target and one for source positions.
        _compile: accepted for compatibility with torch.

    Raises:
        AssertionError: if the function does not take four arguments.

    Source: ``torch.nn.attention.flex_attention.create_block_mask``.

    Example:
        >>> from statefulnn.attention.flex_attention import create_block_mask
        >>> create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256).shape
        (1, 1, 256, 256)
    """
    if _is_score_mod(mask_mod):
        raise AssertionError(
            explain(
                f"create_block_mask was given {mask_mod}",
                "create_block_mask requires a mask_mod function, of four arguments",
                "score_mod=... of flex_attention for a function of scores",
            )
        )
    size = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else tuple(BLOCK_SIZE)
    batch_dims = (1 if B is None else B, 1 if H is None else H)
    return BlockMask(mask_mod, batch_dims, (Q_LEN, KV_LEN), (size[0], size[1]))


# --------------------------------------------------------------------------------------------------
# The function


def flex_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    score_mod: Callable | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: object = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """Return ``softmax(mask(score_mod(scale · Q Kᵀ))) V``.

    The functions may use arrays from outside, and gradients flow to them. They are traced at every
    call: put the call into compiled code.

    Args:
        query: ``(B, Hq, L, D)``.
        key: ``(B, H, S, D)``.
        value: ``(B, H, S, Dv)``.
        score_mod: ``(score, batch, head, q_idx, kv_idx)`` to the score that counts.
        block_mask: of `create_block_mask`, for these sizes.
        scale: the factor of the scores; None for ``1 / sqrt(D)``.
        enable_gqa: allow a multiple of the heads of `key` in `query`.
        return_lse: also return the log of the sum of exponentials (torch's older argument).
        kernel_options: accepted for compatibility with torch.
        return_aux: what is returned besides the output.

    Returns:
        ``(B, Hq, L, Dv)``, 0 where everything is masked; with `return_lse` also ``(B, Hq, L)``; with
        `return_aux` also an `AuxOutput`.

    Raises:
        ShapeError: if the shapes do not fit each other or the mask.
        NotImplementedError: unless there are four axes (torch's class).

    Source: Dong et al. 2024, arXiv:2412.05496; ``torch.nn.attention.flex_attention``.

    Example:
        >>> import jax.numpy as jnp
        >>> from statefulnn.attention.flex_attention import flex_attention
        >>> x = jnp.ones((1, 2, 5, 4))
        >>> near = lambda score, b, h, q_idx, kv_idx: (
        ...     score - abs(q_idx - kv_idx).astype(score.dtype)
        ... )
        >>> flex_attention(x, x, x, score_mod=near).shape
        (1, 2, 5, 4)
    """
    function = "flex_attention"
    q, k, v = (
        array(x, name, function) for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    _check_flex(q, k, v, block_mask, enable_gqa)
    if return_lse and return_aux is not None:
        raise ValueError(
            explain(
                f"{function} was given return_lse=True and return_aux",
                "Cannot specify both return_lse and return_aux",
                "return_aux=AuxRequest(lse=True)",
            )
        )
    sizes = (*q.shape[:3], k.shape[2])
    grouped = enable_gqa and q.shape[1] != k.shape[1]
    form = Form(
        1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale), None, grouped
    )
    scores = masked_scores(form, q, k, ())
    if score_mod is not None:
        scores = _positions(score_mod, sizes, scores).astype(scores.dtype)
    if block_mask is not None:
        batches, heads, *_ = block_mask.shape
        # A mask made for one batch or head is evaluated for that one.
        mask_sizes = (sizes[0] if batches > 1 else 1, sizes[1] if heads > 1 else 1, *sizes[2:])
        mask = _positions(block_mask.mask_mod, mask_sizes)
        scores = jnp.where(mask, scores, jnp.asarray(-jnp.inf, scores.dtype))
    out = weighted_values(form, softmax_of_scores(scores), v).astype(q.dtype)
    if return_lse:
        return out, _log_sum(scores)
    if return_aux is None:
        return out
    highest = jnp.max(scores, -1, initial=-jnp.inf) if return_aux.max_scores else None
    return out, AuxOutput(_log_sum(scores) if return_aux.lse else None, highest)


def _log_sum(scores: jax.Array) -> Any:
    return jax.nn.logsumexp(scores, -1)


def _check_flex(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: BlockMask | None, enable_gqa: bool
) -> None:
    given = f"flex_attention was given query {q.shape}, key {k.shape} and value {v.shape}"
    if any(x.ndim != 4 for x in (q, k, v)):
        raise NotImplementedError(
            explain(
                given,
                "query, key, and value must be 4D tensors: (B, H, L, D)",
                "query[None] for one batch",
            )
        )
    if q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise shape_error(
            given,
            "batches agree, query and key have the same features, and there is one value for each key",
            "query (B, Hq, L, D), key (B, H, S, D), value (B, H, S, Dv)",
        )
    heads, shared = q.shape[1], k.shape[1]
    if heads != shared and (not enable_gqa or not shared or heads % shared):
        raise shape_error(
            f"{given}, and enable_gqa={enable_gqa}",
            "query and key/value have the same number of heads, or the query a multiple with enable_gqa",
            "enable_gqa=True",
        )
    if mask is None:
        return
    sizes = (q.shape[0], heads, q.shape[2], k.shape[2])
    fits = all(
        m == n or (m == 1 and i < 2) for i, (m, n) in enumerate(zip(mask.shape, sizes, strict=True))
    )
    if not fits:
        raise shape_error(
            f"{given}, and a block_mask of shape {mask.shape}",
            f"the mask was created for other sizes than {sizes}",
            f"create_block_mask(mask_mod, {sizes[0]}, {sizes[1]}, {sizes[2]}, {sizes[3]})",
        )
