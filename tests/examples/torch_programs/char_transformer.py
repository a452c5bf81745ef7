"""A transformer that writes sentences, with a cache of keys and values, in torch."""

from __future__ import annotations

import argparse
import math
import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

NOUNS = ["cat", "dog", "bird", "fox", "owl", "cow", "girl", "king"]
VERBS = ["see", "hear", "like", "greet", "follow", "draw", "help", "know"]
ADJECTIVES = ["old ", "small ", "red ", ""]
PLACES = [" under the tree", " by the river", " in the house", ""]
LETTERS = "\n" + "".join(sorted(set("".join([*NOUNS, *VERBS, *ADJECTIVES, *PLACES]) + "the.")))
CHOICES = 2 * len(NOUNS) ** 2 * len(VERBS) * len(ADJECTIVES) * len(PLACES)
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
        self.register_buffer("keys", torch.zeros(0), persistent=False)
        self.register_buffer("values", torch.zeros(0), persistent=False)

    def make_room(self, batch: int, length: int) -> None:
        shape = (batch, self.heads, length, self.out.in_features // self.heads)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)

    def forward(self, x, position=None):
        N, T, C = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if position is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            self.keys[:, :, position] = k[:, :, 0]
            self.values[:, :, position] = v[:, :, 0]
            seen = torch.arange(self.keys.shape[2])[None] <= position
            y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)
        return self.out(y.transpose(1, 2).reshape(N, T, C))


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
    def __init__(self, size: int = 64, heads: int = 4, layers: int = 2, length: int = 64):
        super().__init__()
        self.length = length
        self.letters = nn.Embedding(len(LETTERS), size)
        self.places = nn.Embedding(length, size)
        self.blocks = nn.ModuleList([Block(size, heads) for _ in range(layers)])
        self.head = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, len(LETTERS)))

    def forward(self, tokens, position=None):
        place = torch.arange(tokens.shape[1]) if position is None else torch.tensor(position)
        x = self.letters(tokens) + self.places(place)
        for block in self.blocks:
            x = block(x, position)
        return self.head(x)

    def make_room(self, batch: int) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.make_room(batch, self.length)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="none")


def train_step(model: nn.Module, opt: torch.optim.Optimizer, tokens: Tensor) -> Tensor:
    opt.zero_grad()
    loss = loss_of(model, tokens).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    return loss.detach()


@torch.no_grad()
def next_letter(model: Transformer, tokens: Tensor, position: int) -> Tensor:
    return torch.multinomial(model(tokens, position)[:, -1].softmax(-1), 1)


def write(model: Transformer, texts: int) -> list[str]:
    model.make_room(texts)
    written = [torch.zeros(texts, 1, dtype=torch.long)]
    for position in range(model.length - 1):
        written.append(next_letter(model, written[-1], position))
    return ["".join(LETTERS[i] for i in row) for row in torch.cat(written, 1)]


def sentence(rng: random.Random) -> str:
    (noun, other), verb = rng.choices(NOUNS, k=2), rng.choice(VERBS)
    ends = rng.choice([("s", ""), ("", "s")])
    return f"the {rng.choice(ADJECTIVES)}{noun}{ends[0]}{rng.choice(PLACES)} {verb}{ends[1]} a {other}."


def draw_texts(rng: random.Random, texts: int, length: int) -> Tensor:
    lines = ["\n" + "\n".join(sentence(rng) for _ in range(length // 15)) for _ in range(texts)]
    return torch.tensor([[LETTERS.index(c) for c in line[: length + 1]] for line in lines])


def is_right(line: str) -> bool:
    match = SENTENCE.fullmatch(line)
    return match is not None and (match[4] == "s") != (match[7] == "s")


def draw(nats: np.ndarray, tokens: np.ndarray, file: Path) -> None:
    figure = Figure(figsize=(12, 2.5), layout="constrained")
    axis = figure.subplots()
    axis.bar(range(len(nats)), nats)
    axis.set_xticks(range(len(nats)), [LETTERS[i].replace("\n", "/") for i in tokens], fontsize=8)
    axis.set(ylabel="nats", xlim=(-1, len(nats)))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/char_transformer.png"))
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = Transformer()
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 5e-3, total_steps=args.steps)
    for _ in range(args.steps):
        train_step(model, opt, draw_texts(rng, args.batch_size, model.length))
        schedule.step()

    test = draw_texts(rng, 200, model.length)
    with torch.no_grad():
        nats = loss_of(model, test).numpy()
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
    draw(nats[0], test[0, 1:].numpy(), args.picture)
    print(f"picture: {args.picture}")
    return numbers


if __name__ == "__main__":
    main()
