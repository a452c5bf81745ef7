"""What the rows cannot say of normalisation: several batches, and what a state dict holds."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.parity.oracle import Case, array, pair


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
def test_batch_norm_statistics_agree_over_several_batches(momentum: float | None) -> None:
    case = Case("BatchNorm2d", (4,), {"momentum": momentum})
    theirs, ours = pair(case)
    step = nn.jit(lambda model, x: model(x))
    for seed in range(4):
        x = array(3, 4, 5, 5, seed=seed)
        theirs(torch.as_tensor(x))
        step(ours, jnp.asarray(x))
    for name, value in theirs.named_buffers():
        np.testing.assert_allclose(ours.get_buffer(name), value.numpy(), rtol=1e-5, atol=1e-7)
    assert int(ours.num_batches_tracked) == 4


def test_batch_norm_state_without_a_version_counts_from_zero() -> None:
    old = {k: np.ones(3, np.float32) for k in ("weight", "bias", "running_mean", "running_var")}
    theirs, ours = torch.nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    theirs.load_state_dict({k: torch.as_tensor(v) for k, v in old.items()})
    ours.load_state_dict(old)
    assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked) == 0


def test_batch_norm_state_carries_its_version() -> None:
    assert nn.BatchNorm1d(3).state_dict()._metadata[""]["version"] == 2
