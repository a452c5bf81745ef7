"""Dates as people write them become ISO dates: an encoder for texts of any length, and a decoder.

"Sunday, July 20 1969" becomes "1969-07-20". The texts of a batch are padded to one length, and the encoder
is told theirs (`lengths=`), so all batches run in the same compiled code. About half a minute on two cores.

    python examples/seq2seq_dates.py [--steps 1000] [--seed 0]
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import statefulnn as nn
import statefulnn.functional as F

FORMATS = ["%d %B %Y", "%B %d, %Y", "%A, %B %d %Y", "%d %b %Y", "%d/%m/%Y", "%Y.%m.%d"]
FIRST, LAST = datetime.date(1900, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
LONGEST, ISO = 28, 10  # characters
START = ord("\n")  # what the decoder is given first; texts are bytes, padded with zeros


class Seq2Seq(nn.Module):
    """Source: Luong, Pham and Manning, Effective approaches to attention-based translation, 2015."""

    def __init__(self, size: int = 128, vocabulary: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.encoder = nn.GRU(size, size, batch_first=True)
        self.decoder = nn.GRU(size, size, batch_first=True)
        self.head = nn.Linear(2 * size, vocabulary)

    def encode(self, texts, lengths):
        """Return the states at each character (N, T, size), and the last (1, N, size)."""
        return self.encoder(self.embedding(texts), lengths=lengths)

    def decode(self, tokens, hidden, memory, lengths):
        """Return logits (N, L, vocabulary), weights of the attention (N, L, T), and the last state."""
        out, hidden = self.decoder(self.embedding(tokens), hidden)
        scores = out @ memory.mT  # (N, L, T)
        inside = jnp.arange(memory.shape[1]) < lengths[:, None, None]
        weights = jax.nn.softmax(jnp.where(inside, scores, -jnp.inf))
        return self.head(jnp.concatenate([out, weights @ memory], -1)), weights, hidden

    def forward(self, texts, lengths, targets):
        """Return logits of each character of the targets (N, L), given those before it."""
        memory, hidden = self.encode(texts, lengths)
        start = jnp.full_like(targets[:, :1], START)
        given = jnp.concatenate([start, targets[:, :-1]], 1)
        return self.decode(given, hidden, memory, lengths)[0]


@nn.jit
def train_step(model: nn.Module, opt: nn.Optimizer, texts, lengths, targets) -> jax.Array:
    def loss_of(model):
        logits = model(texts, lengths, targets)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))

    loss, grads = nn.value_and_grad(loss_of)(model)
    opt.step(grads)
    return loss


@nn.jit
def translate(model: Seq2Seq, texts, lengths) -> tuple[jax.Array, jax.Array]:
    """Write the likeliest characters (N, ISO), one after the other; return them and the attention."""
    memory, hidden = model.encode(texts, lengths)

    def write(carry, _):
        tokens, hidden = carry
        logits, weights, hidden = model.decode(tokens, hidden, memory, lengths)
        tokens = logits.argmax(-1).astype(tokens.dtype)
        return (tokens, hidden), (tokens[:, 0], weights[:, 0])

    start = jnp.full((len(texts), 1), START)
    _, (written, weights) = nn.scan(write, (start, hidden), length=ISO)
    return written.T, weights.transpose(1, 0, 2)


def draw_dates(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return texts (size, LONGEST), their lengths (size,), and ISO dates (size, ISO), as bytes."""
    dates = [datetime.date.fromordinal(int(d)) for d in rng.integers(FIRST, LAST + 1, size)]
    texts = [d.strftime(FORMATS[f]) for d, f in zip(dates, rng.integers(0, 6, size), strict=True)]
    padded = np.array(texts, f"S{LONGEST}").view(np.uint8).reshape(size, LONGEST)
    targets = np.array([d.isoformat() for d in dates], f"S{ISO}").view(np.uint8)
    lengths = np.array([len(text) for text in texts], np.int32)
    return padded.astype(np.int32), lengths, targets.reshape(size, ISO).astype(np.int32)


def as_text(row) -> str:
    return bytes(np.asarray(row).astype(np.uint8)).decode(errors="replace").rstrip("\0")


def draw(texts, written, weights, file: Path) -> None:
    """Save a picture: where the decoder looked at, for each character that it wrote."""
    figure = Figure(figsize=(4 * len(texts), 3), layout="constrained")
    axes = figure.subplots(1, len(texts))
    for axis, text, iso, weight in zip(axes, map(as_text, texts), written, weights, strict=True):
        axis.imshow(weight[:, : len(text)], cmap="Blues", aspect="auto")
        axis.set_xticks(range(len(text)), list(text))
        axis.set_yticks(range(ISO), list(as_text(iso)))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, print translations, save the picture; return how much of new dates is right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/seq2seq_dates.png"))
    args = parser.parse_args(argv)

    nn.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = Seq2Seq()
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, args.steps))
    opt = nn.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), tx))
    for _ in range(args.steps):
        train_step(model, opt, *draw_dates(rng, args.batch_size))

    texts, lengths, targets = draw_dates(rng, 500)
    written, weights = map(np.asarray, translate(model, texts, lengths))
    for text, iso in zip(texts[:5], written, strict=False):
        print(f"{as_text(text):>28} -> {as_text(iso)}")
    right = written == targets
    shares = {"characters": float(right.mean()), "dates": float(right.all(1).mean())}
    print(f"right: {shares['characters']:.1%} of characters, {shares['dates']:.1%} of dates")
    draw(texts[:3], written[:3], weights[:3], args.picture)
    print(f"picture: {args.picture}")
    return shares


if __name__ == "__main__":
    main()
