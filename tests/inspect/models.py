"""Models that the tests of this folder and of `tests/browser` look at."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import statefulnn as nn

Struct = jax.ShapeDtypeStruct


def image(*shape: int) -> jax.ShapeDtypeStruct:
    """Return a struct of floats."""
    return Struct(shape, jnp.float32)


def tokens(*shape: int) -> jax.ShapeDtypeStruct:
    """Return a struct of integers."""
    return Struct(shape, jnp.int32)


class Shared(nn.Module):
    """Ties, a shared module, one that nobody calls, blocks in `nn.remat`, two inputs, a dict as output."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.alias = self.enc
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.unused = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Bilinear(8, 8, 4)

    def forward(self, x, y, *, scale=1.0):
        u, v = self.enc(x), self.alias(y)
        z = self.a(u) * self.b(v)
        for block in self.blocks:
            z = nn.remat(block)(z)
        return {"out": self.head(u + z, v) * scale, "z": z}


SHARED_INPUTS = image(2, 8), image(2, 8)
