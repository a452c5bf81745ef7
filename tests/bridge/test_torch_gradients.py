"""Gradients of converted modules where torch has rules of its own: writes that they do not see, ties, zeros."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn as tnn

import statefulnn as nn
from statefulnn.bridge.torch import from_torch

torch.manual_seed(0)


def module_of(forward, **buffers):
    """Return a module whose forward is a function of itself and its inputs."""
    cls = type("Module", (tnn.Module,), {"forward": forward})
    module = cls()
    for name, value in buffers.items():
        module.register_buffer(name, value)
    return module


def follows_with_gradients(module, *inputs, tolerance=1e-5):
    """Compare outputs, buffers and the gradients of a fixed product, by the inputs, with torch's."""
    ours = from_torch(module, *inputs)
    arrays = [jnp.asarray(x.numpy()) for x in inputs]
    leaves = [x.clone().requires_grad_() for x in inputs]
    theirs = copy.deepcopy(module)
    out = theirs(*(x * 1 for x in leaves))
    weights = torch.randn(out.shape)
    wanted = torch.autograd.grad((out * weights).sum(), leaves)
    fn, params, state = nn.functionalize(ours, mutable=True)

    def loss(arrays):
        found, new = fn(params, state, *arrays)
        return jnp.sum(found * jnp.asarray(weights.numpy())), (found, new)

    found, (value, new) = jax.grad(loss, has_aux=True)(arrays)
    np.testing.assert_allclose(value, out.detach().numpy(), rtol=tolerance, atol=tolerance)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=tolerance, atol=tolerance)
    for name, buffer in theirs.named_buffers():
        np.testing.assert_allclose(new[name], buffer.detach().numpy(), rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------
# Writes that gradients do not see


def keep_a_mean(self, x):
    with torch.no_grad():
        self.mean.copy_(x.sum(0))
        self.mean /= 2
    return x * self.mean


def clamp_unseen(self, x):
    y = x * 2
    with torch.no_grad():
        y.clamp_(-1, 1)
        y += 1
    return y * x


def made_unseen(self, x):
    with torch.no_grad():
        y = x * 2
        y[0] += x[1]
        view = y.t()
        tail = x[1:]
    return y * x + view.t() + tail.sum()


def write_through_detach(self, x):
    y = x * 2
    y.detach().mul_(3)
    return y.t().t() + x


def write_through_data(self, x):
    y = x * 2
    y.data.clamp_(-1, 1)
    z = x * 3
    z.data = y.data * 2
    return y * x + x.data + z


def infer(self, x):
    with torch.inference_mode():
        y = x * 2
    return y * x


def normalise(self, x):
    y = tnn.functional.batch_norm(x + x**2, self.mean, self.var, training=True)
    return y + self.mean


def test_writes_under_no_grad_and_by_way_of_detach_leave_gradients_as_they_were():
    x = torch.randn(4, 3)
    follows_with_gradients(module_of(keep_a_mean, mean=torch.zeros(3)), x)
    follows_with_gradients(module_of(normalise, mean=torch.zeros(3), var=torch.ones(3)), x)
    for forward in (clamp_unseen, made_unseen, write_through_detach, write_through_data, infer):
        follows_with_gradients(module_of(forward), x)
