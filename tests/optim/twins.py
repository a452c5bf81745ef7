"""A model beside its twin in torch, stepped with the same gradients."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
import torch

import statefulnn as nn


def pair() -> tuple[nn.Sequential, torch.nn.Sequential]:
    """Return two layers and a norm here, and the same in torch, with equal numbers."""
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)
    )
    ours = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    ours.load_state_dict({n: t.numpy() for n, t in theirs.state_dict().items()})
    return ours, theirs


def gradients(module: torch.nn.Module, seed: int, size: float = 1.0) -> dict[str, np.ndarray]:
    """Return made-up gradients of the trainable parameters, also put into those of the twin."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, p in module.named_parameters():
        g = (size * rng.normal(size=tuple(p.shape))).astype(np.float32)
        p.grad = torch.tensor(g) if p.requires_grad else None
        if p.requires_grad:
            found[name] = jnp.asarray(g)
    return found


def same(ours: nn.Module, theirs: torch.nn.Module, **tolerance: float) -> None:
    """Assert that the twins have equal parameters."""
    tolerance = {"rtol": 1e-5, "atol": 1e-6, **tolerance}
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        np.testing.assert_allclose(p, expected[name].detach(), err_msg=name, **tolerance)


def names(module: nn.Module, parts: Iterable[str]) -> list[str]:
    """Return the names of parameters that begin with one of some texts."""
    return [n for n, _ in module.named_parameters() if n.startswith(tuple(parts))]
