"""What the numbers in an array look like: range, mean, a histogram, and how many are NaN or infinite."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.compat import Tracer

BINS = 24
# Larger arrays are looked at in steps that leave about so many numbers.
_WHOLE, _SAMPLE = 2**20, 2**18


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Numbers about an array.

    Attributes:
        step: 1 if all numbers were looked at, else one in so many was.
        mean, std, low, high: of the finite numbers; of complex ones, of their magnitudes.
        zeros, nans, infinities: how many of those looked at.
        histogram: how many finite numbers lie in each of the bins between `low` and `high`.
    """

    step: int
    mean: float
    std: float
    low: float
    high: float
    zeros: int
    nans: int
    infinities: int
    histogram: tuple[int, ...]


def statistics_of(value: jax.Array | jax.ShapeDtypeStruct) -> Statistics | str:
    """Return statistics of an array, or why there are none; nothing is traced."""
    if isinstance(value, Tracer):
        return "traced: it has no numbers here"
    if isinstance(value, jax.ShapeDtypeStruct):
        return "on the meta device: it has no numbers"
    if value.is_deleted():
        return "deleted: its memory was given away"
    if not value.is_fully_addressable:
        return "on devices of other processes"
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return "random keys"
    if value.size == 0:
        return "empty"
    step = 1 if value.size <= _WHOLE else value.size // _SAMPLE
    return _of_numbers(_sample(value, step), step)


def _sample(value: jax.Array, step: int) -> np.ndarray:
    # What lies in the memory of the host is read there; of other arrays only the sample is fetched.
    if step > 1 and any(d.platform != "cpu" for d in value.devices()):
        with jax.ensure_compile_time_eval():
            value, step = value.reshape(-1)[::step], 1
    array = np.asarray(value).reshape(-1)[::step]
    array = np.abs(array) if np.iscomplexobj(array) else array
    return array.astype(np.float64)


def _of_numbers(array: np.ndarray, step: int) -> Statistics:
    finite = array[np.isfinite(array)]
    nans = int(np.isnan(array).sum())
    zeros, infinities = int((array == 0).sum()), array.size - finite.size - nans
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    most = max(abs(low), abs(high))
    # A sum of numbers near the end of float64 overflows.
    scale = most if most > 1e100 else 1.0
    mean = float((finite / scale).mean() * scale) if finite.size else 0.0
    std = float((finite / scale).std() * scale) if finite.size else 0.0
    bins = _histogram(finite, low, high, most)
    return Statistics(step, mean, std, low, high, zeros, nans, infinities, tuple(bins.tolist()))


def _histogram(finite: np.ndarray, low: float, high: float, most: float) -> np.ndarray:
    if 1e-9 * most < high / 2 - low / 2 < 1e300 and high - low > 1e-300:
        return np.histogram(finite, BINS, (low, high))[0]
    # The bins would be wider than what a number holds, or narrower than the next number.
    width = high / 2 - low / 2
    places = (finite / 2 - low / 2) / width if width else np.full_like(finite, 0.5)
    return np.histogram(places, BINS, (0, 1))[0]


def sharding_of(value: object) -> str | None:
    """Return where an array lies, if that is more than one device."""
    sharding = None if isinstance(value, Tracer) else getattr(value, "sharding", None)
    if sharding is None or len(sharding.device_set) == 1:
        return None
    spec = getattr(sharding, "spec", None)
    return (
        f"{type(sharding).__name__ if spec is None else spec} on {len(sharding.device_set)} devices"
    )
