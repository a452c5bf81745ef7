"""Converts a module of torch, and compares it with the original for several inputs."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import torch

import statefulnn as nn
from statefulnn.bridge.torch import from_torch
from tests.quick import QUICKLY


def arrays(structure):
    """Return a structure of tensors as one of arrays."""
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: jnp.asarray(t.detach().numpy()), structure
    )


def same(ours, theirs, tolerance=1e-5):
    """Compare the leaves of two outputs; None has no leaf in JAX."""
    theirs = [t for t in torch.utils._pytree.tree_leaves(theirs) if t is not None]
    for a, b in zip(jax.tree.leaves(ours), theirs, strict=True):
        b = b.detach().numpy() if torch.is_tensor(b) else np.asarray(b)
        assert np.shape(a) == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def beside(module, *inputs, others=(), gradients=True, kwargs=None, tolerance=1e-5, **options):
    """Convert a module, and compare outputs (eager and compiled) and gradients, also for other inputs."""
    ours = from_torch(module, *inputs, kwargs=kwargs, **options)
    compiled = nn.jit(lambda m, given, named: m(*given, **named), compiler_options=QUICKLY)
    for given in (inputs, *others):
        named = kwargs or {}
        out = module(*copy.deepcopy(given), **copy.deepcopy(named))
        same(ours(*arrays(given), **arrays(named)), out, tolerance)
        same(compiled(ours, arrays(given), arrays(named)), out, tolerance)
        if gradients and any(p.requires_grad for p in module.parameters()):
            _same_gradients(module, ours, given, named, tolerance)
    return ours


def _same_gradients(module, ours, given, named, tolerance):
    module.zero_grad()
    out = torch.utils._pytree.tree_leaves(module(*copy.deepcopy(given), **named))
    sum(x.square().mean() for x in out if torch.is_tensor(x) and x.requires_grad).backward()
    differentiable = [torch.is_tensor(x) and x.requires_grad for x in out if x is not None]

    def loss(model):
        found = jax.tree.leaves(model(*arrays(given), **arrays(named)))
        chosen = (x for x, one in zip(found, differentiable, strict=True) if one)
        return sum(jnp.mean(jnp.square(x)) for x in chosen)

    grads = nn.grad(loss)(ours)
    for name, p in module.named_parameters():
        if p.grad is not None:
            np.testing.assert_allclose(
                grads[name], p.grad.numpy(), rtol=50 * tolerance, atol=50 * tolerance, err_msg=name
            )
