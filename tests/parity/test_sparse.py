"""What the rows cannot say of embeddings."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import torch

from tests.parity.oracle import Case, integers, pair


def test_max_norm_shrinks_rows_in_the_table_as_torch_does() -> None:
    theirs, ours = pair(Case("Embedding", (7, 3), {"max_norm": 0.5}))
    index = integers(7, 3)
    theirs(torch.as_tensor(index))
    ours(jnp.asarray(index, jnp.int32))
    np.testing.assert_allclose(ours.weight.value, theirs.weight.detach().numpy(), rtol=1e-5)
