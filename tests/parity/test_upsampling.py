"""Interpolation, sampling and shuffling: what the rows cannot say."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import statefulnn.functional as F
from tests.parity.oracle import array, close

IMAGE = array(2, 3, 5, 6)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("upsample", {"scale_factor": 2}),
        ("upsample_nearest", {"size": (3, 4)}),
        ("upsample_bilinear", {"scale_factor": 2}),
    ],
)
def test_deprecated_names_warn_and_compute_what_torch_does(name: str, kwargs: dict) -> None:
    with pytest.warns(UserWarning, match="deprecated"):
        ours = getattr(F, name)(jnp.asarray(IMAGE), **kwargs)
    with pytest.warns(UserWarning, match="deprecated"):
        theirs = getattr(TF, name)(torch.as_tensor(IMAGE), **kwargs)
    close(ours, theirs, name, 2e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda L, F: F.grid_sample(L(IMAGE), L(array(2, 4, 3, 2))),
        lambda L, F: F.affine_grid(L(array(2, 2, 3)), (2, 1, 4, 5)),
    ],
    ids=["grid_sample", "affine_grid"],
)
def test_unset_align_corners_warns_and_means_false(call: Callable) -> None:
    with pytest.warns(UserWarning, match="align_corners"):
        ours = call(jnp.asarray, F)
    with pytest.warns(UserWarning, match="align_corners"):
        theirs = call(torch.as_tensor, TF)
    close(ours, theirs, "out", 2e-5)


def test_aligned_corners_of_a_single_row_warn_and_are_its_centre() -> None:
    theta, size = array(2, 2, 3), (2, 1, 1, 3)
    with pytest.warns(UserWarning, match="align_corners"):
        ours = F.affine_grid(jnp.asarray(theta), size, align_corners=True)
    with pytest.warns(UserWarning, match="align_corners"):
        theirs = TF.affine_grid(torch.as_tensor(theta), size, align_corners=True)
    close(ours, theirs, "grid", 2e-5)


@pytest.mark.parametrize("size", [(10, 12), (7, 11), (5, 3)])
def test_an_infinite_pixel_spoils_its_neighbourhood_only(size: tuple[int, int]) -> None:
    x = IMAGE.copy()
    x[0, 1, 2, 3] = np.inf
    ours = F.interpolate(jnp.asarray(x), size, mode="bilinear")
    theirs = TF.interpolate(torch.as_tensor(x), size, mode="bilinear")
    assert (np.isfinite(ours) >= np.isfinite(theirs.numpy())).all()


@pytest.mark.parametrize(
    ("mode", "kwargs"),
    [
        ("nearest", {"scale_factor": 1.05}),
        ("nearest", {"scale_factor": (1.3, 1.05)}),
        ("bicubic", {"scale_factor": 1.05}),
        ("bicubic", {"scale_factor": 1.05, "antialias": True}),
        ("lanczos", {"scale_factor": (3.0, 1.04), "antialias": True}),
    ],
)
def test_gradient_is_the_transpose_of_torchs_forward(mode: str, kwargs: dict) -> None:
    # torch's own gradients belong to another forward here. Interpolation is linear, so that
    # <gradient of <f(x), c>, d> is <f(d), c>.
    direction = array(*IMAGE.shape, seed=5)
    moved = TF.interpolate(torch.as_tensor(direction), mode=mode, **kwargs).numpy()
    weights = array(*moved.shape, seed=6)
    loss = lambda x: (F.interpolate(x, mode=mode, **kwargs) * weights).sum()
    slope = jax.grad(loss)(jnp.asarray(IMAGE))
    np.testing.assert_allclose((slope * direction).sum(), (moved * weights).sum(), rtol=2e-4)


def test_batches_without_examples_keep_the_other_sizes() -> None:
    # torch leaves an empty batch as it is when it unshuffles, and cannot differentiate a shuffle.
    empty = jnp.zeros((0, 8, 4, 6))
    assert F.pixel_shuffle(empty, 2).shape == (0, 2, 8, 12)
    assert F.pixel_unshuffle(empty, 2).shape == (0, 32, 2, 3)


def test_one_hot_without_a_number_of_classes_is_refused_in_compiled_code() -> None:
    with pytest.raises(RuntimeError, match="num_classes=10"):
        jax.jit(F.one_hot)(jnp.array([0, 1]))


def test_one_hot_of_a_wrong_class_in_compiled_code_is_zeros() -> None:
    out = jax.jit(lambda x: F.one_hot(x, 3))(jnp.array([2, 3, -1]))
    assert out.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_normalize_of_complex_vectors() -> None:
    x = array(2, 3) + 1j * array(2, 3, seed=1)
    ours = F.normalize(jnp.asarray(x, jnp.complex64))
    theirs = TF.normalize(torch.as_tensor(x.astype("complex64")))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


def test_interpolation_compiles_once_a_shape() -> None:
    traced = []
    resize = jax.jit(
        lambda x: traced.append(x.shape) or F.interpolate(x, scale_factor=2, mode="bicubic")
    )
    for _ in range(3):
        resize(jnp.asarray(IMAGE))
    assert len(traced) == 1
