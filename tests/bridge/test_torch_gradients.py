"""Gradients of converted modules where torch has rules of its own: unseen writes, ties, zeros."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn as tnn

import statefulnn as nn
from statefulnn.bridge.torch import ConversionError, from_torch

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
        np.testing.assert_allclose(
            new[name], buffer.detach().numpy(), rtol=tolerance, atol=tolerance
        )


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
    return y + x


def normalise(self, x):
    y = tnn.functional.batch_norm(x + x**2, self.mean, self.var, training=True)
    return y + self.mean


def test_writes_under_no_grad_and_by_way_of_detach_leave_gradients_as_they_were():
    x = torch.randn(4, 3)
    follows_with_gradients(module_of(keep_a_mean, mean=torch.zeros(3)), x)
    follows_with_gradients(module_of(normalise, mean=torch.zeros(3), var=torch.ones(3)), x)
    for forward in (clamp_unseen, made_unseen, write_through_detach, write_through_data, infer):
        follows_with_gradients(module_of(forward), x)


# --------------------------------------------------------------------------------------------------
# torch.autograd.Function


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.neg() * ctx.factor, None


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Chosen(torch.autograd.Function):
    """Has several outputs, an argument of integers, and a backward that writes in place."""

    @staticmethod
    def forward(ctx, x, weight, rows):
        ctx.save_for_backward(x, weight, rows)
        return x @ weight, x[rows], x.argmax(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_product, by_rows, _):
        x, weight, rows = ctx.saved_tensors
        by_x = (by_product @ weight.T).clone()
        by_x.index_add_(0, rows, by_rows * 3)
        return by_x, x.T @ by_product * 2, None


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def with_functions(self, x, weight):
    product, rows, places = Chosen.apply(x, weight, torch.tensor([0, 2, 0]))
    with torch.no_grad():
        seen = Reversed.apply(x, 2.0)
    return (
        Reversed.apply(product, 0.5)
        + Rounded.apply(x * 3)[:, :1]
        + rows.sum()
        + places[:, None]
        + seen
    )


def test_the_backward_of_a_function_is_used():
    follows_with_gradients(module_of(with_functions), torch.randn(4, 4), torch.randn(4, 4))


def test_a_function_that_writes_to_its_arguments_is_refused_with_its_line():
    module = module_of(lambda self, x: Doubled.apply(x * 1))
    with pytest.raises(ConversionError, match="backward of Doubled.*test_torch_gradients") as error:
        from_torch(module, torch.randn(4))
    assert "it writes to its arguments" in str(error.value)


# --------------------------------------------------------------------------------------------------
# Ties, and zeros


TIED = torch.tensor([[1.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])


def lengths(x):
    vector_norm = torch.linalg.vector_norm
    rows = [vector_norm(x, p, dim=1) for p in (0.5, 1, 2, 3, float("inf"))]
    return torch.stack([*rows, tnn.functional.normalize(x, dim=1).sum(1), vector_norm(x, dim=1)])


def spreads(x):
    return torch.stack([x.std(1), x.var(1), torch.std_mean(x, 1)[0]])


def extremes(x):
    found = (x.max(1)[0], x.min(1, keepdim=True)[0].squeeze(1), x.amax(1), x.max().expand(3))
    running = x.cummax(1)[0].sum(1), x.cummin(1)[0].sum(1)
    return torch.stack(
        [*found, *running, torch.fmax(x, x.flip(1)).sum(1), torch.fmin(x, x.flip(1))[:, 0]]
    )


def bounds(x):
    two = torch.full((4,), 2.0)
    found = x.clamp(0, 2), x.clamp(min=2), x.clamp(max=3.0), x.clamp(3, 1), x.clamp(two * 0, two)
    return torch.cat([*found, x.clamp(0).sqrt(), x.abs()])


def powers(x):
    size = x.abs()
    return torch.cat(
        [x.pow(0), size.pow(size), x.pow(1.5), x ** torch.tensor(2), torch.atan2(x, x), 0.0**x]
    )


def distances(x):
    return torch.cat([torch.cdist(x, x.flip(1), p) for p in (0.0, 1.0, 2.0, 3.0)])


def test_slopes_at_ties_and_zeros_are_torch_s():
    for function in (lengths, spreads, extremes, bounds, powers, distances):
        forward = lambda _, x, function=function: function(x)
        follows_with_gradients(module_of(forward), TIED)


def test_squares_of_half_precision_do_not_overflow():
    forward = lambda _, x: torch.stack([x.norm(), x.var(), x.std(), torch.std_mean(x)[0]])
    x = torch.tensor([300.0, -300.0, 100.0], dtype=torch.float16)
    module = module_of(lambda _, x: (x.norm(), x.std(), torch.std_mean(x)[0]))
    for a, b in zip(
        from_torch(module, x)(jnp.asarray(x.numpy())), forward(None, x)[[0, 2, 3]], strict=True
    ):
        assert a.dtype == jnp.float16 and np.isfinite(b.item())
        np.testing.assert_allclose(np.float32(a), b.item(), rtol=1e-3)
