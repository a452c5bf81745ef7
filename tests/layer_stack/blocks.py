"""The models that the tests stack, ours and torch's, and what is compared of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

import statefulnn as nn
import statefulnn.functional as F

SIZE = 6


class Block(nn.Module):
    """What a layer may hold: weights, running statistics, random masks."""

    # The batch norm comes first: the gradient of a shift before it is rounding errors, which Adam blows up.

    def __init__(self, p: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.fc = nn.Linear(SIZE, SIZE, bias=False)
        self.bn = nn.BatchNorm1d(SIZE)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        return x + self.drop(self.fc(self.norm(self.bn(x))))


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(SIZE)
        self.fc = torch.nn.Linear(SIZE, SIZE, bias=False)
        self.bn = torch.nn.BatchNorm1d(SIZE)
        self.drop = torch.nn.Dropout(0.0)

    def forward(self, x):
        return x + self.drop(self.fc(self.norm(self.bn(x))))


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.head = nn.Linear(SIZE, 3)
        self.blocks = blocks

    def forward(self, x):
        if isinstance(self.blocks, nn.LayerStack):
            return self.head(self.blocks(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def listed(count: int = 4, p: float = 0.0) -> Model:
    with nn.rng_scope(jax.random.key(0)):
        return Model(nn.ModuleList([Block(p) for _ in range(count)]))


def stacked(count: int = 4, p: float = 0.0, **options) -> Model:
    with nn.rng_scope(jax.random.key(0)):
        return Model(nn.LayerStack([Block(p) for _ in range(count)], **options))


def inputs():
    return jax.random.normal(jax.random.key(1), (5, SIZE))


LABELS = jnp.arange(5) % 3


def close(a, b, tolerance=1e-5):
    a, b = dict(a), dict(b)
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


def loss_of(model, x):
    return F.cross_entropy(model(x), LABELS)


def train_step(model, opt, x):
    loss, grads = nn.value_and_grad(loss_of)(model, x)
    opt.step(grads)
    return loss


def check_gradients(of_list, of_stack, tolerance=1e-4):
    for name, gradient in of_list.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            other = of_stack[f"blocks.stack.{rest}"][int(number)]
        else:
            other = of_stack[name]
        np.testing.assert_allclose(gradient, other, rtol=tolerance, atol=tolerance, err_msg=name)
