"""Recurrent networks: one step of each kind, and whole sequences as scans.

In comments: T time steps, N batch, F input features, H hidden size, G gates times H, P projected size.

The sigmoid of a gate is written as ``tanh(x / 2) / 2 + 1 / 2``, and the halving is moved into the weights,
where it is exact: all gates of a step are then one tanh over one array. On CPU that takes a fifth off the
time of an LSTM of 256 units, products included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import DtypeError, explain
from statefulnn.functional._autocast import Rule, ruled
from statefulnn.functional._checks import (
    array,
    cast_advice,
    require_float,
    require_same_dtype,
    shape_error,
    widened,
)
from statefulnn.functional._compiled import compiled
from statefulnn.functional.dropout import dropped

# --------------------------------------------------------------------------------------------------
# The kinds
#
# `step(a, p, b, h, c)`: a is what the input gives (N, G), p what the state gives (N, G), b a bias inside
# p (GRU), h and c the state before; returns h, c, and what the derivative needs.
#
# The derivative of a step is linear in the derivatives of a, h and c; `slopes` returns its coefficients,
# and the derivatives of a, for all steps at once; `tangent(a, p, slopes, h, c)` is one step of it.


class Kind(NamedTuple):
    """A kind of recurrent network: how many gates it has and what happens in one step."""

    gates: int
    halved: tuple[int, ...]  # the gates with a sigmoid
    step: Callable[..., Any]
    slopes: Callable[..., Any]
    tangent: Callable[..., Any]


def _tanh_step(
    a: jax.Array, p: jax.Array, b: jax.Array | None, h: jax.Array, c: jax.Array | None
) -> Any:
    return jnp.tanh(a + p), None, None


def _tanh_slopes(
    a: jax.Array,
    e: jax.Array,
    b: jax.Array | None,
    kept: None,
    h: jax.Array,
    c: jax.Array | None,
    before: tuple[jax.Array, jax.Array | None],
) -> Any:
    return a + e, 1 - h * h


def _relu_step(
    a: jax.Array, p: jax.Array, b: jax.Array | None, h: jax.Array, c: jax.Array | None
) -> Any:
    return jax.nn.relu(a + p), None, None


def _relu_slopes(
    a: jax.Array,
    e: jax.Array,
    b: jax.Array | None,
    kept: None,
    h: jax.Array,
    c: jax.Array | None,
    before: tuple[jax.Array, jax.Array | None],
) -> Any:
    return a + e, (h > 0).astype(h.dtype)


def _rnn_tangent(
    a: jax.Array, p: jax.Array, slope: jax.Array, h: jax.Array, c: jax.Array | None
) -> Any:
    return (a + p) * slope, None


def _lstm_step(a: jax.Array, p: jax.Array, b: jax.Array | None, h: jax.Array, c: jax.Array) -> Any:
    t = jnp.tanh(a + p)
    i, f, g, o = jnp.split(t, 4, -1)
    c = (0.5 * f + 0.5) * c + (0.5 * i + 0.5) * g
    return (0.5 * o + 0.5) * jnp.tanh(c), c, t


def _lstm_slopes(
    a: jax.Array,
    e: jax.Array,
    b: jax.Array | None,
    kept: jax.Array,
    h: jax.Array,
    c: jax.Array,
    before: tuple[jax.Array, jax.Array],
) -> Any:
    i, f, g, o = jnp.split(kept, 4, -1)
    out = jnp.tanh(c)
    inner = jnp.concatenate([0.5 * g, 0.5 * before[1], 0.5 * i + 0.5, 0.5 * out], -1)
    return a + e, ((1 - kept * kept) * inner, 0.5 * f + 0.5, (0.5 * o + 0.5) * (1 - out * out))


def _lstm_tangent(
    a: jax.Array,
    p: jax.Array,
    slopes: tuple[jax.Array, jax.Array, jax.Array],
    h: jax.Array,
    c: jax.Array,
) -> Any:
    gates, f, out = slopes
    i, j, g, o = jnp.split((a + p) * gates, 4, -1)
    c = f * c + (i + j + g)
    return o + out * c, c


def _gru_step(
    a: jax.Array, p: jax.Array, b: jax.Array | None, h: jax.Array, c: jax.Array | None
) -> Any:
    size = h.shape[-1]
    t = jnp.tanh(a[..., : 2 * size] + p[..., : 2 * size])
    r, z = jnp.split(t, 2, -1)
    q = p[..., 2 * size :] if b is None else p[..., 2 * size :] + b
    n = jnp.tanh(a[..., 2 * size :] + (0.5 * r + 0.5) * q)
    # n + σ (h - n), with the half outside: as the last step is cheap, XLA repeats it where the state is
    # stored and where it is carried on, and computes each tanh once. Inside, it nests them in one loop,
    # which takes twice as long.
    return 0.5 * ((n + h) + z * (h - n)), None, (t, n, q)


def _gru_slopes(
    a: jax.Array,
    e: jax.Array,
    b: jax.Array | None,
    kept: tuple[jax.Array, jax.Array, jax.Array],
    h: jax.Array,
    c: jax.Array | None,
    before: tuple[jax.Array, jax.Array | None],
) -> Any:
    t, n, q = kept
    r, z = jnp.split(0.5 * t + 0.5, 2, -1)
    slope_r, slope_z = jnp.split(0.5 * (1 - t * t), 2, -1)
    slope_n = (1 - z) * (1 - n * n)
    slopes = jnp.concatenate([slope_n * q * slope_r, (before[0] - n) * slope_z, slope_n], -1)
    e_rz, e_n = jnp.split(e, (2 * h.shape[-1],), -1)
    e_n = e_n if b is None else e_n + b
    return a + jnp.concatenate([e_rz, r * e_n], -1), (slopes, r, z)


def _gru_tangent(
    a: jax.Array,
    p: jax.Array,
    slopes: tuple[jax.Array, jax.Array, jax.Array],
    h: jax.Array,
    c: jax.Array | None,
) -> Any:
    gates, r, z = slopes
    p_r, p_z, p_n = jnp.split(p, 3, -1)
    d_r, d_z, d_n = jnp.split((a + jnp.concatenate([p_r, p_z, r * p_n], -1)) * gates, 3, -1)
    return (d_r + d_z + d_n) + z * h, None


KINDS = {
    "RNN_TANH": Kind(1, (), _tanh_step, _tanh_slopes, _rnn_tangent),
    "RNN_RELU": Kind(1, (), _relu_step, _relu_slopes, _rnn_tangent),
    "LSTM": Kind(4, (0, 1, 3), _lstm_step, _lstm_slopes, _lstm_tangent),
    "GRU": Kind(3, (0, 1), _gru_step, _gru_slopes, _gru_tangent),
}


def _halves(kind: Kind, size: int) -> Any:
    """Return the factors of the gates, (G,), by which a sigmoid becomes a tanh."""
    factors = np.ones((kind.gates, size), np.float32)
    factors[list(kind.halved)] = 0.5
    return factors.reshape(-1)


def _biases(mode: str, b_ih: jax.Array | None, b_hh: Any, size: int) -> tuple[Any, Any]:
    """Return the bias beside the input, (G,), and the one that stays with the state, (H,) or None."""
    if b_ih is None:
        return None, None
    if mode != "GRU":
        return b_ih + b_hh, None
    # The state's part of the new gate is multiplied by r, its bias included.
    inside = b_hh[2 * size :]
    return b_ih + jnp.concatenate([b_hh[: 2 * size], jnp.zeros_like(inside)]), inside


def _times(h: jax.Array, weight: jax.Array, dtype: DTypeLike) -> Any:
    """Return ``h weightᵀ`` in a dtype that may be wider."""
    axes = (((h.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(h, weight, axes, preferred_element_type=dtype)


# --------------------------------------------------------------------------------------------------
# One layer in one direction


class Weights(NamedTuple):
    """What a scan multiplies and adds, halved where a sigmoid follows."""

    hidden: Any  # (G, H or P)
    bias: Any  # (G,) or None
    inside: Any  # (H,) or None
    projection: Any  # (P, H) or None


def _run(
    mode: str,
    reverse: bool,
    keep: bool,
    x: jax.Array,
    h: jax.Array,
    c: jax.Array | None,
    weights: Weights,
    mask: jax.Array | None,
) -> Any:
    """Return all h (T, N, P), the last h, the last c, and what the derivative needs."""
    kind = KINDS[mode]
    wide = widened(h).dtype
    hidden, bias, inside, projection = weights

    def step(state: tuple[jax.Array, jax.Array | None], given: Any) -> Any:
        h, c = state
        a, valid = given
        a = a.astype(wide)
        # Added here and not to the whole of x beforehand: that would write and read it once more.
        a = a if bias is None else a + bias.astype(wide)
        b = None if inside is None else inside.astype(wide)
        out, new_c, kept = kind.step(a, _times(h, hidden, wide), b, h.astype(wide), c)
        raw = out.astype(h.dtype)
        new_h = raw if projection is None else _times(raw, projection, h.dtype)
        if valid is not None:
            new_h = jnp.where(valid[:, None], new_h, h)
            new_c = None if c is None else jnp.where(valid[:, None], new_c, c)
        residuals = (new_c, kept, None if projection is None else raw) if keep else None
        return (new_h, new_c), (new_h, residuals)

    (h, c), (hs, residuals) = lax.scan(step, (h, c), (x, mask), reverse=reverse)
    return hs, h, c, residuals


# Differentiated as it stands, a scan adds up the weights' gradient step by step: T small products and T
# passes over an array of the weights' size. The rule below takes what the weights' derivative does out
# of the loop: it is one product over all steps, before the loop of the derivative; in reverse mode, where
# JAX transposes that loop, one product after it. The rule is made of plain operations, so forward mode,
# higher derivatives and vmap follow from it.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _direction(
    mode: str,
    reverse: bool,
    x: jax.Array,
    h: jax.Array,
    c: jax.Array | None,
    weights: Weights,
    mask: jax.Array | None,
) -> Any:
    return _run(mode, reverse, False, x, h, c, weights, mask)[:3]


@_direction.defjvp
def _direction_jvp(mode: str, reverse: bool, primals: tuple, tangents: tuple) -> Any:
    x, h0, c0, weights, mask = primals
    dx, dh0, dc0, dweights, _ = tangents
    kind = KINDS[mode]
    wide = widened(h0).dtype
    hs, h, c, (cs, kept, raw) = _run(mode, reverse, True, x, h0, c0, weights, mask)

    def before(states: jax.Array | None, first: Any) -> Any:
        if states is None:
            return None
        if reverse:
            return jnp.concatenate([states[1:], first[None]])
        return jnp.concatenate([first[None], states[:-1]])

    h_before = before(hs, h0)
    of_weights = _times(h_before, dweights.hidden, wide)  # (T, N, G)
    da = dx.astype(wide)
    da = da if weights.bias is None else da + dweights.bias.astype(wide)
    db = None if weights.inside is None else dweights.inside.astype(wide)
    da, slopes = kind.slopes(
        da, of_weights, db, kept, hs.astype(wide), cs, (h_before.astype(wide), before(cs, c0))
    )
    of_projection = None if raw is None else _times(raw, dweights.projection, hs.dtype)

    def step(state: tuple[jax.Array, jax.Array | None], given: Any) -> Any:
        dh, dc = state
        da, slopes, of_projection, valid = given
        p = _times(dh, weights.hidden, wide)
        out, new_c = kind.tangent(da, p, slopes, dh.astype(wide), dc)
        new_h = out.astype(dh.dtype)
        if of_projection is not None:
            new_h = of_projection + _times(new_h, weights.projection, dh.dtype)
        if valid is not None:
            new_h = jnp.where(valid[:, None], new_h, dh)
            new_c = None if dc is None else jnp.where(valid[:, None], new_c, dc)
        return (new_h, new_c), new_h

    (dh, dc), dhs = lax.scan(step, (dh0, dc0), (da, slopes, of_projection, mask), reverse=reverse)
    return (hs, h, c), (dhs, dh, dc)


# --------------------------------------------------------------------------------------------------
# The whole network


@functools.partial(compiled, static_argnames=("mode", "bidirectional", "batch_first", "p"))
def _network(
    x: jax.Array,
    hx: Any,
    layers: Sequence[Any],
    mask: jax.Array | None,
    rng: jax.Array | None,
    *,
    mode: str,
    bidirectional: bool,
    batch_first: bool,
    p: float,
) -> Any:
    kind = KINDS[mode]
    batched = x.ndim == 3
    if not batched:
        x = x[:, None]
        hx = jax.tree.map(lambda s: s[:, None], hx)
    elif batch_first:
        x = jnp.swapaxes(x, 0, 1)
    directions = 2 if bidirectional else 1
    size = layers[0]["weight_hh"].shape[0] // kind.gates
    wide = widened(x).dtype
    half = jnp.asarray(_halves(kind, size), x.dtype)

    last_h, last_c = [], []
    for i in range(0, len(layers), directions):
        if i and rng is not None:
            x = dropped(x, jax.random.fold_in(rng, i), p)
        outs = []
        for j in range(i, i + directions):
            layer = layers[j]
            bias, inside = _biases(mode, layer["bias_ih"], layer["bias_hh"], size)
            weights = Weights(
                layer["weight_hh"] * half[:, None],
                None if bias is None else bias * half,
                inside,
                layer["weight_hr"],
            )
            if hx is None:
                h0 = jnp.zeros((x.shape[1], layer["weight_hh"].shape[1]), x.dtype)
                c0 = jnp.zeros((x.shape[1], size), wide) if mode == "LSTM" else None
            elif mode == "LSTM":
                h0, c0 = hx[0][j], hx[1][j].astype(wide)
            else:
                h0, c0 = hx[j], None
            # What the inputs give, for all steps in one product: (T, N, F) -> (T, N, G).
            a = _times(x, layer["weight_ih"] * half[:, None], x.dtype)
            hs, h, c = _direction(mode, j > i, a, h0, c0, weights, mask)
            outs.append(hs)
            last_h.append(h)
            last_c.append(c)
        x = outs[0] if directions == 1 else jnp.concatenate(outs, -1)

    state = jnp.stack(last_h)
    if mode == "LSTM":
        state = (state, jnp.stack(last_c).astype(x.dtype))
    if not batched:
        x, state = x[:, 0], jax.tree.map(lambda s: s[:, 0], state)
    elif batch_first:
        x = jnp.swapaxes(x, 0, 1)
    return x, state


@ruled(Rule.LOW)
def recurrent(
    mode: str,
    input: ArrayLike,
    hx: Any,
    layers: Sequence[dict[str, Any]],
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    mask: ArrayLike | None = None,
    rng: jax.Array | None = None,
    lengths: ArrayLike | Sequence[int] | None = None,
) -> tuple[jax.Array, Any]:
    """Run a recurrent network of one or more layers over sequences.

    Compile time does not depend on the number of steps.

    Args:
        mode: "RNN_TANH", "RNN_RELU", "LSTM" or "GRU".
        input: ``(T, N, F)``, ``(N, T, F)`` with `batch_first`, or ``(T, F)``.
        hx: the first state, ``(D layers, N, P)``, where D is the number of directions and P the size of
            what a step gives; for an LSTM a pair of it and ``(D layers, N, H)``; without N for an input
            without it; None for zeros.
        layers: for each layer, and each direction in it, the arrays "weight_ih" ``(G, F)``, "weight_hh"
            ``(G, P)``, "bias_ih" and "bias_hh" ``(G,)`` or None, "weight_hr" ``(P, H)`` or None.
        bidirectional: whether there are two directions.
        batch_first: whether the batch is the first axis of input and output.
        dropout: the probability that an element is dropped between two layers; needs `rng`.
        mask: ``(T, N)``, True where a sequence goes on: elsewhere the state stays as it is.
        rng: a random key.
        lengths: ``(N,)``, integers from 0 to T, which may be traced: how many steps each sequence has. What
            lies beyond is not read, outputs are zero there, and a second direction starts at the last step.

    Returns:
        The outputs of the last layer, shaped as the input with ``D P`` features, and the last states,
        shaped as `hx`.

    Raises:
        ShapeError: if the shapes do not fit.
        RuntimeError: if a length is known and out of range.
        ValueError: if the input's dtype is not that of the weights.
        DtypeError: if the state's dtype is not that of the input.

    Source: Elman 1990; Hochreiter and Schmidhuber 1997; Cho et al. 2014; Sak et al. 2014 (projections).

    Example:
        >>> import jax.numpy as jnp
        >>> from statefulnn.functional.recurrent import recurrent
        >>> layer = {"weight_ih": jnp.ones((4, 3)), "weight_hh": jnp.ones((4, 4))}
        >>> layer |= {"bias_ih": None, "bias_hh": None, "weight_hr": None}
        >>> out, last = recurrent("RNN_TANH", jnp.ones((5, 2, 3)), None, [layer])
        >>> out.shape, last.shape
        ((5, 2, 4), (1, 2, 4))
    """
    name = "nn." + mode.partition("_")[0]
    x = array(input, "input", name)
    layers = [
        {k: None if v is None else array(v, k, name) for k, v in layer.items()} for layer in layers
    ]
    first = layers[0]
    if x.ndim not in (2, 3):
        raise shape_error(
            f"{name} was given input of shape {tuple(x.shape)}",
            "expected input to be 2D or 3D: (T, F), or (T, N, F) with a batch",
            "add the missing axis of features: input[:, None]"
            if x.ndim == 1
            else "reshape it to one of these",
        )
    if x.dtype != first["weight_ih"].dtype:
        raise ValueError(
            explain(
                f"{name} was given input of dtype {x.dtype}, and its weights are of dtype "
                f"{first['weight_ih'].dtype}",
                "mixed dtypes are not promoted: a model would silently compute in another precision",
                cast_advice(x, first["weight_ih"]),
            )
        )
    require_float(x, "input", name)
    features = first["weight_ih"].shape[1]
    if x.shape[-1] != features:
        raise shape_error(
            f"{name} was given input of shape {tuple(x.shape)}",
            f"the last axis has {x.shape[-1]} features, and input_size is {features}",
            f"an input whose last axis is {features}, or input_size={x.shape[-1]}",
        )
    batched = x.ndim == 3
    time = 1 if batched and batch_first else 0
    if x.shape[time] == 0:
        raise shape_error(
            f"{name} was given input of shape {tuple(x.shape)}",
            "expected sequence length to be larger than 0",
            "leave empty sequences out",
        )
    batch = (x.shape[1 - time],) if batched else ()
    if hx is not None:
        hidden = first["weight_hh"].shape
        cell = (len(layers), *batch, hidden[0] // KINDS[mode].gates)
        hx = _checked_state(name, mode, x, hx, (len(layers), *batch, hidden[1]), cell)
    within = None  # what lies within the lengths, laid out as x
    if lengths is not None:
        mask, within = _masks(name, x, lengths, batch, time)
        x = jnp.where(within, x, 0)  # NaN in the padding would reach the weights' gradients
    out, last = _network(
        x,
        hx,
        layers,
        mask,
        rng,
        mode=mode,
        bidirectional=bidirectional,
        batch_first=batch_first,
        p=float(dropout),
    )
    return (out if within is None else jnp.where(within, out, 0)), last


def _masks(
    name: str, x: jax.Array, lengths: ArrayLike | Sequence[int], batch: tuple[int, ...], time: int
) -> tuple[Any, Any]:
    """Return what lies within the lengths, ``(T, N)`` and as x, or raise unless they fit."""
    steps = x.shape[time]
    found = (
        jnp.asarray(lengths)
        if isinstance(lengths, (list, tuple))
        else array(lengths, "lengths", name)
    )
    given = f"{name} was given lengths of shape {found.shape} for input of shape {tuple(x.shape)}"
    if not batch:
        raise shape_error(
            given,
            "lengths are those of the sequences of a batch, and this input is one sequence",
            "leave lengths out, or add an axis for the batch: input[:, None]",
        )
    if found.dtype == bool:
        raise DtypeError(
            explain(
                f"{given}, and dtype bool",
                "lengths count the steps of each sequence, and a mask marks them",
                "lengths.sum(1), if each row has True for the steps of a sequence",
            )
        )
    if found.shape != batch:
        raise shape_error(
            given,
            f"expected one length for each of {batch[0]} sequences",
            "batch_first=True if the first axis of the input is the batch's",
        )
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise DtypeError(
            explain(
                f"{name} was given lengths of dtype {found.dtype}",
                "they count steps, so they are integers",
                "lengths.astype(jnp.int32)",
            )
        )
    if not isinstance(found, Tracer) and found.size:
        shortest, longest = np.asarray(found).min(), np.asarray(found).max()
        if shortest < 0 or longest > steps:
            raise RuntimeError(
                explain(
                    f"{name} was given lengths from {shortest} to {longest}",
                    f"the input has {steps} steps",
                    f"lengths from 0 to {steps}",
                )
            )
    mask = jnp.arange(steps, dtype=np.int32)[:, None] < found.astype(np.int32)
    return mask, (mask.T if time else mask)[:, :, None]


def _checked_state(name: str, mode: str, x: jax.Array, hx: object, *shapes: tuple[int, ...]) -> Any:
    """Return the arrays of a state, or raise unless they fit."""
    if mode == "LSTM":
        parts = [array(s, f"hx[{i}]", name) for i, s in enumerate(_pair(name, hx))]
    else:
        parts = [array(hx, "hx", name)]
    for i, (part, shape) in enumerate(zip(parts, shapes, strict=False)):
        which = f"hx[{i}]" if mode == "LSTM" else "hx"
        if part.shape != shape:
            raise shape_error(
                f"{name} was given {which} of shape {tuple(part.shape)} for input of shape "
                f"{tuple(x.shape)}",
                f"expected hidden size {shape}",
                f"jnp.zeros({shape}, input.dtype), or hx=None for zeros",
            )
        require_same_dtype(name, input=x, **{which.replace("[", "_").rstrip("]"): part})
    return tuple(parts) if mode == "LSTM" else parts[0]


def _pair(name: str, hx: object) -> Any:
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        given = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise DtypeError(
            explain(
                f"{name} was given hx={given}",
                "the state of an LSTM is a pair: hidden state and cell state",
                "hx=(h, c)",
            )
        )
    return hx


# --------------------------------------------------------------------------------------------------
# Cells


@functools.partial(compiled, static_argnums=0)
def _nn_stamp(
    mode: str,
    x: jax.Array,
    h: jax.Array | None,
    c: jax.Array | None,
    w_ih: jax.Array,
    w_hh: jax.Array,
    b_ih: jax.Array | None,
    b_hh: jax.Array | None,
) -> tuple[Any, Any]:
    kind = KINDS[mode]
    batched = x.ndim == 2
    if not batched:
        x = x[None]
        h, c = jax.tree.map(lambda s: s[None], (h, c))
    size = w_hh.shape[1]
    wide = widened(x).dtype
    if h is None:
        h = jnp.zeros((x.shape[0], size), x.dtype)
        c = h if mode == "LSTM" else None
    half = jnp.asarray(_halves(kind, size), wide)
    bias, inside = _biases(mode, b_ih, b_hh, size)
    a = _times(x, w_ih, wide)
    a = a if bias is None else a + bias.astype(wide)
    inside = None if inside is None else inside.astype(wide)
    c = None if c is None else c.astype(wide)
    h, c, _ = kind.step(a * half, _times(h, w_hh, wide) * half, inside, h.astype(wide), c)
    h, c = jax.tree.map(lambda s: s.astype(x.dtype), (h, c))
    return (h, c) if batched else jax.tree.map(lambda s: s[0], (h, c))


@ruled(Rule.LOW)
def recurrent_cell(
    mode: str,
    input: ArrayLike,
    hx: Any,
    w_ih: Any,
    w_hh: Any,
    b_ih: ArrayLike | None = None,
    b_hh: ArrayLike | None = None,
) -> Any:
    """Take one step of a recurrent network.

    Args:
        mode: "RNN_TANH", "RNN_RELU", "LSTM" or "GRU".
        input: ``(N, F)`` or ``(F,)``.
        hx: the state before, ``(N, H)`` or ``(H,)``; for an LSTM a pair of them; None for zeros.
        w_ih: ``(G, F)``.
        w_hh: ``(G, H)``.
        b_ih: ``(G,)`` or None.
        b_hh: ``(G,)`` or None.

    Returns:
        The state after, as `hx`.

    Raises:
        ShapeError: if the shapes do not fit.
        DtypeError: if the dtypes differ.

    Source: ``torch.rnn_tanh_cell``, ``torch.rnn_relu_cell``, ``torch.lstm_cell``, ``torch.gru_cell``.

    Example:
        >>> import jax.numpy as jnp
        >>> from statefulnn.functional.recurrent import recurrent_cell
        >>> recurrent_cell("RNN_RELU", jnp.ones(3), jnp.ones(2), jnp.ones((2, 3)), jnp.ones((2, 2)))
        Array([5., 5.], dtype=float32)
    """
    name = f"nn.{mode.partition('_')[0]}Cell"
    x = array(input, "input", name)
    if x.ndim not in (1, 2):
        raise shape_error(
            f"{name} was given input of shape {tuple(x.shape)}",
            "expected input to be 1D or 2D: (F,), or (N, F) with a batch; it takes one step",
            "input[t] in a loop over time, or the layer that runs over sequences: "
            f"{name.removesuffix('Cell')}",
        )
    w_ih, w_hh = array(w_ih, "weight_ih", name), array(w_hh, "weight_hh", name)
    b_ih = None if b_ih is None else array(b_ih, "bias_ih", name)
    b_hh = None if b_hh is None else array(b_hh, "bias_hh", name)
    if x.shape[-1] != w_ih.shape[1]:
        raise shape_error(
            f"{name} was given input of shape {tuple(x.shape)}",
            f"the last axis has {x.shape[-1]} features, and input_size is {w_ih.shape[1]}",
            f"an input whose last axis is {w_ih.shape[1]}, or input_size={x.shape[-1]}",
        )
    require_float(x, "input", name)
    require_same_dtype(name, input=x, weight_ih=w_ih, weight_hh=w_hh, bias_ih=b_ih, bias_hh=b_hh)
    h = c = None
    if hx is not None:
        shape = (*x.shape[:-1], w_hh.shape[1])
        state = _checked_state(name, mode, x, hx, shape, shape)
        h, c = state if mode == "LSTM" else (state, None)
    h, c = _nn_stamp(mode, x, h, c, w_ih, w_hh, b_ih, b_hh)
    return (h, c) if mode == "LSTM" else h
