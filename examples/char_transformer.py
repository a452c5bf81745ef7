"""A transformer that writes sentences, with its keys and values kept in buffers while it writes.

The sentences come from a small grammar, in which the verb follows the noun at the sentence's start: "the old
cats under the tree see a dog." So the entropy of the text is known, and what the model writes can be
checked. About a minute on two cores.

    python examples/char_transformer.py [--steps 1500] [--seed 0]
"""

from __future__ import annotations

import argparse
import math
import random
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import statefulnn as nn
import statefulnn.functional as F

NOUNS = ["cat", "dog", "bird", "fox", "owl", "cow", "girl", "king"]
VERBS = ["see", "hear", "like", "greet", "follow", "draw", "help", "know"]
ADJECTIVES = ["old ", "small ", "red ", ""]
PLACES = [" under the tree", " by the river", " in the house", ""]
LETTERS = "\n" + "".join(sorted(set("".join([*NOUNS, *VERBS, *ADJECTIVES, *PLACES]) + "the.")))
CHOICES = (
    2 * len(NOUNS) ** 2 * len(VERBS) * len(ADJECTIVES) * len(PLACES)
)  # sentences, all as likely
SENTENCE = re.compile(
    "the (old |small |red |)({0})((s?)( under the tree| by the river| in the house|)) ({1})(s?) a ({0})[.]"
    .format("|".join(NOUNS), "|".join(VERBS))
)  # fmt: skip


class Attention(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.register_buffer("keys", jnp.zeros(0), persistent=False)
        self.register_buffer("values", jnp.zeros(0), persistent=False)

    def make_room(self, batch: int, length: int) -> None:
        """Make the buffers that hold the keys and values of earlier positions."""
        shape = (batch, self.heads, length, self.out.in_features // self.heads)
        self.keys, self.values = jnp.zeros(shape), jnp.zeros(shape)

    def forward(self, x, position=None):
        N, T, C = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        if position is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # one new position, which looks at all before it
            self.keys = self.keys.at[:, :, position].set(k[:, :, 0])
            self.values = self.values.at[:, :, position].set(v[:, :, 0])
            seen = jnp.arange(self.keys.shape[2])[None] <= position  # (1, length)
            y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)
        return self.out(y.transpose(0, 2, 1, 3).reshape(N, T, C))


class Block(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.ln_1, self.attention = nn.LayerNorm(size), Attention(size, heads)
        self.ln_2 = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x, position=None):
        x = x + self.attention(self.ln_1(x), position)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Source: Radford et al., Language models are unsupervised multitask learners, 2019."""

    def __init__(self, size: int = 64, heads: int = 4, layers: int = 2, length: int = 64):
        super().__init__()
        self.length = length
        self.letters = nn.Embedding(len(LETTERS), size)
        self.places = nn.Embedding(length, size)
        self.blocks = nn.ModuleList([Block(size, heads) for _ in range(layers)])
        self.head = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, len(LETTERS)))

    def forward(self, tokens, position=None):
        """Return logits (N, T, letters) for tokens (N, T); at a `position`, (N, 1) after those before."""
        place = jnp.arange(tokens.shape[1]) if position is None else position
        x = self.letters(tokens) + self.places(place)
        for block in self.blocks:
            x = block(x, position)
        return self.head(x)

    def make_room(self, batch: int) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.make_room(batch, self.length)


@nn.jit
def loss_of(model: nn.Module, tokens) -> jax.Array:
    """Return the nats of each character but the first, (N, T - 1)."""
    return F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="none")


@nn.jit
def train_step(model: nn.Module, opt: nn.Optimizer, tokens) -> jax.Array:
    loss, grads = nn.value_and_grad(lambda model: loss_of(model, tokens).mean())(model)
    opt.step(grads)
    return loss


@nn.jit
def next_letter(model: Transformer, tokens, position) -> jax.Array:
    """Draw what follows tokens (N, 1) at a position; the buffers have what came before."""
    return jax.random.categorical(nn.next_key(), model(tokens, position)[:, -1])[:, None]


def write(model: Transformer, texts: int) -> list[str]:
    """Write texts of the model's length, from a line's start."""
    model.make_room(texts)
    written = [jnp.zeros((texts, 1), jnp.int32)]
    for position in range(model.length - 1):
        written.append(next_letter(model, written[-1], position))
    return ["".join(LETTERS[i] for i in row) for row in np.concatenate(written, 1)]


def sentence(rng: random.Random) -> str:
    (noun, other), verb = rng.choices(NOUNS, k=2), rng.choice(VERBS)
    ends = rng.choice([("s", ""), ("", "s")])  # cats see, a cat sees
    return f"the {rng.choice(ADJECTIVES)}{noun}{ends[0]}{rng.choice(PLACES)} {verb}{ends[1]} a {other}."


def draw_texts(rng: random.Random, texts: int, length: int) -> np.ndarray:
    """Draw tokens (texts, length + 1): lines of sentences, cut where they get too long."""
    lines = ["\n" + "\n".join(sentence(rng) for _ in range(length // 15)) for _ in range(texts)]
    return np.array([[LETTERS.index(c) for c in line[: length + 1]] for line in lines], np.int32)


def is_right(line: str) -> bool:
    """Tell whether a line is a sentence of the grammar: one of the noun and the verb has an s."""
    match = SENTENCE.fullmatch(line)
    return match is not None and (match[4] == "s") != (match[7] == "s")


def draw(nats: np.ndarray, tokens: np.ndarray, file: Path) -> None:
    """Save a picture of what surprises the model: nats of each letter of a text."""
    figure = Figure(figsize=(12, 2.5), layout="constrained")
    axis = figure.subplots()
    axis.bar(range(len(nats)), nats)
    axis.set_xticks(range(len(nats)), [LETTERS[i].replace("\n", "/") for i in tokens], fontsize=8)
    axis.set(ylabel="nats", xlim=(-1, len(nats)))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, write, save the picture; return the loss, the text's entropy, and the share of right lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/char_transformer.png"))
    args = parser.parse_args(argv)

    nn.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = Transformer()
    tx = optax.adamw(optax.cosine_onecycle_schedule(args.steps, 5e-3))
    opt = nn.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), tx))
    for _ in range(args.steps):
        train_step(model, opt, draw_texts(rng, args.batch_size, model.length))

    test = draw_texts(rng, 200, model.length)
    nats = np.asarray(loss_of(model, test))
    lines = [line for text in write(model, 20) for line in text.split("\n")[1:-1]]
    letters = np.mean([len(sentence(rng)) + 1 for _ in range(2000)])
    numbers = {
        "loss": float(nats.mean()),
        "entropy": float(math.log(CHOICES) / letters),
        "right": float(np.mean([is_right(line) for line in lines])),
    }
    print("\n".join(lines[:5]))
    print(f"nats per letter {numbers['loss']:.3f}, of the grammar {numbers['entropy']:.3f}")
    print(f"right sentences {numbers['right']:.1%} of {len(lines)}")
    draw(nats[0], test[0, 1:], args.picture)
    print(f"picture: {args.picture}")
    return numbers


if __name__ == "__main__":
    main()
