"""Tests in float64: JAX's 64-bit types, and layers that are made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

import statefulnn as nn


@contextlib.contextmanager
def in_float64(enabled: bool = True) -> Iterator[None]:
    """Enable 64-bit types, and build layers in float64, within a block."""
    with jax.enable_x64(enabled), nn.default_dtype("float64" if enabled else "float32"):
        yield
