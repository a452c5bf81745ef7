"""Codes and constants beside the formulas of the papers, written in numpy."""

from __future__ import annotations

from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
import pytest

from statefulnn.quantization import formats


def normal_float() -> np.ndarray:
    """The 16 values by their definition: 8 quantiles above 0 and 7 below it, 0 itself, scaled to 1."""
    quantiles = lambda count: [
        NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, count + 1)[:-1]
    ]
    values = np.array(sorted([*quantiles(8), 0.0, *(-q for q in quantiles(7))]))
    return values / values.max()


def numbers(*shape: int) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x[:, -1] *= 5
    return x


def test_the_values_of_nf4_are_quantiles_of_a_normal_distribution():
    np.testing.assert_allclose(formats.NF4_VALUES, normal_float(), atol=2e-7)


def test_int8_is_the_formula_and_off_by_half_a_step_at_most():
    x = numbers(5, 33)
    x[2] = 0
    codes, scale = map(np.asarray, formats.int8_codes(jnp.asarray(x)))
    want = np.abs(x).max(1, keepdims=True) / np.float32(127)
    np.testing.assert_allclose(scale, want, rtol=1e-6)
    rounded = np.where(scale == 0, 0, np.round(x / np.where(scale == 0, 1, scale)))
    np.testing.assert_array_equal(codes, rounded)
    assert codes.dtype == np.int8 and np.abs(codes.astype(int)).max() == 127
    values = np.asarray(formats.int8_values(codes, scale))
    np.testing.assert_allclose(values, codes * scale, rtol=1e-6)
    assert (np.abs(values - x) <= scale / 2 * (1 + 1e-5)).all()


def decoded(parts: tuple, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return what codes and constants stand for, and the constant of each number, by loops."""
    packed, constants, steps, mean = (np.asarray(p, np.float64) for p in parts)
    codes = [c for byte in packed.ravel().astype(int) for c in (byte // 16, byte % 16)]
    sizes = [c * steps[i // 256, 0] + mean for i, c in enumerate(constants)]
    each = np.repeat(sizes, 64)[: np.prod(shape)]
    return normal_float()[codes][: np.prod(shape)].reshape(shape) * each.reshape(shape), each


@pytest.mark.parametrize("shape", [(3, 50), (64, 300)], ids=str)
def test_nf4_is_the_formula_and_off_by_half_a_gap_at_most(shape):
    x = numbers(*shape)
    parts = formats.nf4_codes(jnp.asarray(x))
    blocks = np.pad(x.reshape(-1).astype(np.float64), (0, -x.size % 64)).reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    # The nearest of the values for each number, two in a byte, the first one above.
    nearest = np.abs(blocks[:, :, None] / absmax[:, None, None] - normal_float()).argmin(2)
    np.testing.assert_array_equal(np.ravel(parts[0]), nearest.reshape(-1, 2) @ [16, 1])
    # The constants: without their mean in 8 bits, by blocks of 256.
    rest = absmax - absmax.mean()
    steps = [np.abs(rest[i : i + 256]).max() / 127 for i in range(0, len(rest), 256)]
    np.testing.assert_allclose(parts[3], absmax.mean(), rtol=1e-6)
    np.testing.assert_allclose(np.ravel(parts[2]), steps, rtol=1e-4)
    assert np.abs(np.asarray(parts[1]) - rest / np.repeat(steps, 256)[: len(rest)]).max() < 0.51

    values = np.asarray(formats.nf4_values(*parts, shape=shape))
    want, constants = decoded(parts, shape)
    np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-6)
    exact = np.repeat(absmax, 64)[: x.size]
    half_gap = np.diff(normal_float()).max() / 2
    bound = half_gap * exact + np.abs(constants - exact) + 1e-5
    assert (np.abs(values - x).reshape(-1) <= bound).all()
    assert (np.abs(constants - exact) <= np.repeat(steps, 64 * 256)[: x.size] / 2 + 1e-5).all()


def test_zeros_and_low_precision():
    zeros = formats.nf4_codes(jnp.zeros((2, 64)))
    assert (formats.nf4_values(*zeros, shape=(2, 64)) == 0).all()
    x = jnp.asarray(numbers(4, 128), jnp.bfloat16)
    codes, scale = formats.int8_codes(x)
    values = formats.int8_values(codes, scale)
    assert values.dtype == scale.dtype == jnp.bfloat16
    wide = lambda a: np.asarray(a, np.float32)
    rounding = np.abs(wide(x)) * 2.0**-7
    assert (np.abs(wide(values) - wide(x)) <= wide(scale) / 2 + rounding).all()
    parts = formats.nf4_codes(x)
    values, want = formats.nf4_values(*parts, shape=x.shape), decoded(parts, x.shape)[0]
    assert values.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(values), want, rtol=2.0**-8, atol=1e-6)
