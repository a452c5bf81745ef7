"""One small network with several kinds of layers, in torch and here under the same names."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import statefulnn as nn


class Squashed(nn.Linear):
    """A subclass with a forward of its own, which is no linear map."""

    def forward(self, x):
        return super().forward(jnp.tanh(x))


class Conv1D(nn.Module):
    """GPT-2's layer: a linear one whose weight lies as ``(in, out)``."""

    def __init__(self, out, size):
        super().__init__()
        self.weight = nn.Parameter(jnp.zeros((size, out)))
        self.bias = nn.Parameter(jnp.zeros(out))
        nn.init.normal_(self.weight)

    def forward(self, x):
        return x @ self.weight + self.bias


class Net(nn.Module):
    def __init__(self, lstm=True):
        super().__init__()
        self.emb = nn.Embedding(7, 6, padding_idx=0)
        self.fc = nn.Linear(6, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
        self.c_attn = Conv1D(6, 4)
        self.conv = nn.Conv1d(6, 4, 3, stride=2, padding=1)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.lstm = nn.LSTM(4, 5, batch_first=True) if lstm else None
        self.norm = nn.LayerNorm(5 if lstm else 4, eps=1.0)

    def forward(self, tokens):
        x = self.c_attn(self.mlp(self.fc(self.emb(tokens))))
        x = self.conv(x.mT).mT
        x = x + self.attn(x, x, x)[0]
        return self.norm(x if self.lstm is None else self.lstm(x)[0])


TOKENS = jnp.arange(12).reshape(2, 6) % 7
# Of every kind, each layer once; "mlp.*" matches the ReLU too.
LAYERS = "emb|fc|mlp.*|c_attn|conv|attn"


def network(lstm: bool = True) -> Net:
    nn.manual_seed(0)
    return Net(lstm).eval()


def filled(model, name="default"):
    """Give all parameters of an adapter random values, so that it does something."""
    for i, (key, p) in enumerate(model.named_parameters()):
        if f".{name}.lora_" in key:
            p.value = p.value + 0.3 * jax.random.normal(jax.random.key(i), p.shape)
    return model
