"""Examples run as a reader's program does: with JAX's own promotion of dtypes, in an empty folder."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True)
def _as_a_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        yield
