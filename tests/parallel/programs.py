"""A small language model and its step, for programs on several devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import statefulnn as nn
import statefulnn.functional as F

VOCABULARY, WIDTH, LENGTH, BATCH = 32, 16, 8, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: jax.Array) -> jax.Array:
        h = self.ln1(x)
        heads = (h.shape[0], h.shape[1], 4, WIDTH // 4)
        q, k, v = (
            p(h).reshape(heads).swapaxes(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.o_proj(mixed.swapaxes(1, 2).reshape(x.shape)))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block()])
        self.ln = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, tokens: jax.Array) -> jax.Array:
        x = self.tok(tokens) + self.pos(jnp.arange(LENGTH))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


def built(cls: type[nn.Module] = GPT) -> Any:
    nn.manual_seed(0)
    return cls()


def batch() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return F.cross_entropy(model(x).reshape(-1, VOCABULARY), y.reshape(-1))


def train_step(model: Any, opt: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, grads = nn.value_and_grad(loss_of)(model, x, y)
    opt.step(grads)
    return loss


def optimizer(model: nn.Module) -> nn.Optimizer:
    return nn.Optimizer(model, optax.adamw(1e-2))


def losses(step: Any, model: Any, opt: Any, x: Any, y: Any, count: int = 3) -> list[float]:
    """Run steps, always with the same dropout masks."""
    nn.manual_seed(1)
    return [float(step(model, opt, x, y)) for _ in range(count)]


def reference() -> list[float]:
    """The losses on one device."""
    model = built()
    return losses(nn.jit(train_step), model, optimizer(model), *batch())


COLUMNS, ROWS = nn.parallel.ColwiseParallel(), nn.parallel.RowwiseParallel()
STYLES = {"*.[qkv]_proj": COLUMNS, "*.up": COLUMNS, "*.o_proj": ROWS, "*.down": ROWS, "tok": ROWS}


def shardings(*modules: nn.Module) -> dict[str, Any]:
    found = {}
    for i, module in enumerate(modules):
        for name, p in module.named_parameters():
            found[f"{i} {name}"] = p.value.sharding
        for name, b in module.named_buffers():
            found[f"{i} {name}"] = b.sharding
    return found


@contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """Counts what XLA compiles inside the block."""
    count = 0

    def listen(event: str, *_: Any, **__: Any) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count
