"""Dates as people write them become ISO dates, in torch."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

FORMATS = ["%d %B %Y", "%B %d, %Y", "%A, %B %d %Y", "%d %b %Y", "%d/%m/%Y", "%Y.%m.%d"]
FIRST, LAST = datetime.date(1900, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
LONGEST, ISO = 28, 10
START = ord("\n")


class Seq2Seq(nn.Module):
    def __init__(self, size: int = 128, vocabulary: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.encoder = nn.GRU(size, size, batch_first=True)
        self.decoder = nn.GRU(size, size, batch_first=True)
        self.head = nn.Linear(2 * size, vocabulary)

    def encode(self, texts, lengths):
        packed = pack_padded_sequence(self.embedding(texts), lengths, True, enforce_sorted=False)
        out, hidden = self.encoder(packed)
        return pad_packed_sequence(out, batch_first=True, total_length=LONGEST)[0], hidden

    def decode(self, tokens, hidden, memory, lengths):
        out, hidden = self.decoder(self.embedding(tokens), hidden)
        scores = out @ memory.mT
        inside = torch.arange(memory.shape[1]) < lengths[:, None, None]
        weights = scores.masked_fill(~inside, -torch.inf).softmax(-1)
        return self.head(torch.cat([out, weights @ memory], -1)), weights, hidden

    def forward(self, texts, lengths, targets):
        memory, hidden = self.encode(texts, lengths)
        start = torch.full_like(targets[:, :1], START)
        given = torch.cat([start, targets[:, :-1]], 1)
        return self.decode(given, hidden, memory, lengths)[0]


def train_step(model: nn.Module, opt: torch.optim.Optimizer, texts, lengths, targets) -> Tensor:
    opt.zero_grad()
    logits = model(texts, lengths, targets)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    return loss.detach()


@torch.no_grad()
def translate(model: Seq2Seq, texts, lengths) -> tuple[np.ndarray, np.ndarray]:
    memory, hidden = model.encode(texts, lengths)
    tokens = torch.full((len(texts), 1), START)
    written, looked = [], []
    for _ in range(ISO):
        logits, weights, hidden = model.decode(tokens, hidden, memory, lengths)
        tokens = logits.argmax(-1)
        written.append(tokens)
        looked.append(weights)
    return torch.cat(written, 1).numpy(), torch.cat(looked, 1).numpy()


def draw_dates(rng: np.random.Generator, size: int) -> list[Tensor]:
    dates = [datetime.date.fromordinal(int(d)) for d in rng.integers(FIRST, LAST + 1, size)]
    texts = [d.strftime(FORMATS[f]) for d, f in zip(dates, rng.integers(0, 6, size), strict=True)]
    padded = np.array(texts, f"S{LONGEST}").view(np.uint8).reshape(size, LONGEST)
    targets = np.array([d.isoformat() for d in dates], f"S{ISO}").view(np.uint8)
    lengths = np.array([len(text) for text in texts])
    arrays = padded.astype(np.int64), lengths, targets.reshape(size, ISO).astype(np.int64)
    return [torch.from_numpy(a) for a in arrays]


def as_text(row) -> str:
    return bytes(np.asarray(row).astype(np.uint8)).decode(errors="replace").rstrip("\0")


def draw(texts, written, weights, file: Path) -> None:
    figure = Figure(figsize=(4 * len(texts), 3), layout="constrained")
    axes = figure.subplots(1, len(texts))
    for axis, text, iso, weight in zip(axes, map(as_text, texts), written, weights, strict=True):
        axis.imshow(weight[:, : len(text)], cmap="Blues", aspect="auto")
        axis.set_xticks(range(len(text)), list(text))
        axis.set_yticks(range(ISO), list(as_text(iso)))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("out/seq2seq_dates.png"))
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = Seq2Seq()
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps)
    for _ in range(args.steps):
        train_step(model, opt, *draw_dates(rng, args.batch_size))
        schedule.step()

    texts, lengths, targets = draw_dates(rng, 500)
    written, weights = translate(model, texts, lengths)
    for text, iso in zip(texts[:5], written, strict=False):
        print(f"{as_text(text):>28} -> {as_text(iso)}")
    right = written == targets.numpy()
    shares = {"characters": float(right.mean()), "dates": float(right.all(1).mean())}
    print(f"right: {shares['characters']:.1%} of characters, {shares['dates']:.1%} of dates")
    draw(texts[:3], written[:3], weights[:3], args.picture)
    print(f"picture: {args.picture}")
    return shares


if __name__ == "__main__":
    main()
