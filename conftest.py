"""Settings of the test session: no implicit promotion of dtypes, a fixed seed, names for docstrings."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
import statefulnn.functional as F

# Mixing dtypes by accident is an error in the package's own code.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Parity with torch is checked in float32: a GPU would otherwise multiply matrices in TensorFloat-32.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    nn.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    # Compiled code and its caches are millions of objects, which no collection needs to look at again.
    gc.freeze()


@pytest.fixture
def key() -> jax.Array:
    """A random key."""
    return jax.random.key(0)


@pytest.fixture(autouse=True)
def _names_in_docstrings(doctest_namespace: dict) -> None:
    # The imports every example would start with.
    doctest_namespace.update(nn=nn, F=F, jax=jax, jnp=jnp, np=np)
