"""For first_call.py: three networks as they are written by hand in JAX, and in flax.nnx.

The functions by hand take parameters under the names of the models in examples/, so that all of them start
from the same numbers and can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Arrays = dict[str, jax.Array]

# --------------------------------------------------------------------------------------------------
# By hand


def _conv(x: jax.Array, w: jax.Array, stride: int = 1, border: int = 1) -> jax.Array:
    pads = [(border, border)] * 2
    numbers = ("NCHW", "OIHW", "NCHW")
    return lax.conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=numbers)


def resnet18(p: Arrays, state: Arrays, x: jax.Array) -> tuple[jax.Array, Arrays]:
    """Return logits and the new running statistics, in training mode."""
    new: Arrays = {}

    def norm(x: jax.Array, name: str) -> jax.Array:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        n = x.size // x.shape[1]
        new[f"{name}.running_mean"] = 0.9 * state[f"{name}.running_mean"] + 0.1 * mean
        unbiased = var * n / (n - 1)
        new[f"{name}.running_var"] = 0.9 * state[f"{name}.running_var"] + 0.1 * unbiased
        new[f"{name}.num_batches_tracked"] = state[f"{name}.num_batches_tracked"] + 1
        x = (x - mean[:, None, None]) * lax.rsqrt(var + 1e-5)[:, None, None]
        return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    x = jax.nn.relu(norm(_conv(x, p["conv1.weight"], 2, 3), "bn1"))
    pads = [(0, 0), (0, 0), (1, 1), (1, 1)]
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), pads)
    for layer in range(1, 5):
        for block in range(2):
            name = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = _conv(x, p[f"{name}.conv1.weight"], stride)
            y = jax.nn.relu(norm(y, f"{name}.bn1"))
            y = norm(_conv(y, p[f"{name}.conv2.weight"]), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in p:
                x = _conv(x, p[f"{name}.downsample.0.weight"], stride, 0)
                x = norm(x, f"{name}.downsample.1")
            x = jax.nn.relu(y + x)
    return x.mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"], new


def gpt(heads: int) -> Callable[[Arrays, Arrays, jax.Array], tuple[jax.Array, Arrays]]:
    """Return the forward of a GPT-2 without dropout."""

    def norm(p: Arrays, x: jax.Array, name: str) -> jax.Array:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) * lax.rsqrt(var + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(p: Arrays, x: jax.Array, name: str) -> jax.Array:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def forward(p: Arrays, state: Arrays, tokens: jax.Array) -> tuple[jax.Array, Arrays]:
        batch, length = tokens.shape
        x = p["transformer.wte.weight"][tokens] + p["transformer.wpe.weight"][:length]
        width = x.shape[-1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        i = 0
        while f"transformer.h.{i}.ln_1.weight" in p:
            name = f"transformer.h.{i}"
            qkv = linear(p, norm(p, x, f"{name}.ln_1"), f"{name}.attn.c_attn")
            qkv = qkv.reshape(batch, length, 3, heads, width // heads)
            q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))
            scores = q @ k.swapaxes(-1, -2) / math.sqrt(width // heads)
            weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
            y = jnp.moveaxis(weights @ v, 1, 2).reshape(batch, length, width)
            x = x + linear(p, y, f"{name}.attn.c_proj")
            y = linear(p, norm(p, x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
            x = x + linear(p, jax.nn.gelu(y), f"{name}.mlp.c_proj")
            i += 1
        x = norm(p, x, "transformer.ln_f")
        return x @ p["transformer.wte.weight"].T, state

    return forward


def lstm(p: Arrays, state: Arrays, tokens: jax.Array) -> tuple[jax.Array, Arrays]:
    """Return the logits of tokens ``(T, B)``, without dropout."""
    x = p["encoder.weight"][tokens]
    layer = 0
    while f"rnn.weight_ih_l{layer}" in p:
        gates = x @ p[f"rnn.weight_ih_l{layer}"].T + p[f"rnn.bias_ih_l{layer}"]
        recurrent, bias = p[f"rnn.weight_hh_l{layer}"], p[f"rnn.bias_hh_l{layer}"]

        def step(
            carry: tuple, gate: jax.Array, recurrent: Any = recurrent, bias: Any = bias
        ) -> tuple:
            h, c = carry
            i, f, g, o = jnp.split(gate + h @ recurrent.T + bias, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((tokens.shape[1], recurrent.shape[1]))
        _, x = lax.scan(step, (zeros, zeros), gates)
        layer += 1
    return x @ p["decoder.weight"].T + p["decoder.bias"], state


# --------------------------------------------------------------------------------------------------
# In flax.nnx, as its documentation writes such models


def nnx_resnet18(classes: int) -> Any:
    from flax import nnx

    def conv(a: int, b: int, k: int, s: int, rngs: Any) -> Any:
        border = [(k // 2, k // 2)] * 2
        return nnx.Conv(a, b, (k, k), strides=s, padding=border, use_bias=False, rngs=rngs)

    def norm(n: int, rngs: Any) -> Any:
        return nnx.BatchNorm(n, momentum=0.9, epsilon=1e-5, rngs=rngs)

    class Block(nnx.Module):
        def __init__(self, a: int, b: int, stride: int, rngs: Any) -> None:
            self.conv1, self.bn1 = conv(a, b, 3, stride, rngs), norm(b, rngs)
            self.conv2, self.bn2 = conv(b, b, 3, 1, rngs), norm(b, rngs)
            other = stride != 1 or a != b
            down = nnx.Sequential(conv(a, b, 1, stride, rngs), norm(b, rngs)) if other else None
            self.down = nnx.data(down)

        def __call__(self, x: Any) -> Any:
            y = nnx.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            return nnx.relu(y + (x if self.down is None else self.down(x)))

    class ResNet(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.conv1, self.bn1 = conv(3, 64, 7, 2, rngs), norm(64, rngs)
            widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
            blocks = [
                Block(a, b, 2 if a != b else 1, rngs)
                for a, b in zip(widths, widths[1:], strict=False)
            ]
            self.blocks = nnx.List(blocks)
            self.fc = nnx.Linear(512, classes, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = x.transpose(0, 2, 3, 1)  # flax's layout
            x = nnx.relu(self.bn1(self.conv1(x)))
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
            for block in self.blocks:
                x = block(x)
            return self.fc(x.mean((1, 2)))

    return ResNet(nnx.Rngs(0))


def nnx_gpt(vocabulary: int, positions: int, width: int, layers: int, heads: int) -> Any:
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.ln_1 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
            self.ln_2 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
            self.c_fc = nnx.Linear(width, 4 * width, rngs=rngs)
            self.c_proj = nnx.Linear(4 * width, width, rngs=rngs)

        def __call__(self, x: Any, mask: Any) -> Any:
            x = x + self.attn(self.ln_1(x), mask=mask)
            return x + self.c_proj(nnx.gelu(self.c_fc(self.ln_2(x))))

    class GPT(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.wte = nnx.Embed(vocabulary, width, rngs=rngs)
            self.wpe = nnx.Embed(positions, width, rngs=rngs)
            self.h = nnx.List([Block(rngs) for _ in range(layers)])
            self.ln_f = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)

        def __call__(self, tokens: Any) -> Any:
            x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
            mask = nnx.make_causal_mask(tokens)
            for block in self.h:
                x = block(x, mask)
            return self.wte.attend(self.ln_f(x))

    return GPT(nnx.Rngs(0))


def nnx_lstm(vocabulary: int, width: int, layers: int) -> Any:
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.encoder = nnx.Embed(vocabulary, width, rngs=rngs)
            cells = [nnx.OptimizedLSTMCell(width, width, rngs=rngs) for _ in range(layers)]
            self.rnn = nnx.List([nnx.RNN(cell, time_major=True) for cell in cells])
            self.decoder = nnx.Linear(width, vocabulary, rngs=rngs)

        def __call__(self, tokens: Any) -> Any:
            x = self.encoder(tokens)
            for rnn in self.rnn:
                x = rnn(x)
            return self.decoder(x)

    return Model(nnx.Rngs(0))
