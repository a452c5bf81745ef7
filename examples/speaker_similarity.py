"""Resemblyzer's voice encoder tells who speaks, under its own names.

The weights come with a package of PyPI. What it asks for (torch, librosa, webrtcvad) is not needed here:

    pip install --no-deps resemblyzer

    python examples/speaker_similarity.py anna.wav ben.wav who.wav --picture out/speaker_similarity.png
    python examples/speaker_similarity.py

Without recordings the program makes two voices that say two things each. The package cuts long silences out
before it listens; here recordings are taken as they are.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import statefulnn as nn
import statefulnn.functional as F
from voice_activity import RATE, file_of_package, read_wav, speak

WINDOW, HOP, MELS = 400, 160, 40  # 25 and 10 ms
FRAMES, STEP = 160, 77  # of a part: 1.6 s, and from one to the next: 1.3 in a second
LOUDNESS = -30  # dB; what is less loud is raised to this


class VoiceEncoder(nn.Module):
    """A vector of length 1 for 1.6 s of a voice; of one speaker they are near each other.

    Source: Wan, Wang, Papir and Moreno, Generalized end-to-end loss for speaker verification, 2018;
    ``resemblyzer.VoiceEncoder``.
    """

    def __init__(self):
        super().__init__()
        # Of the loss it was trained with, which compared voices by weight * cosine + bias.
        self.similarity_weight = nn.Parameter(jnp.full(1, 10.0))
        self.similarity_bias = nn.Parameter(jnp.full(1, -5.0))
        self.lstm = nn.LSTM(MELS, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: jax.Array) -> jax.Array:
        """Return vectors: ``(N, T, 40) -> (N, 256)``."""
        _, (hidden, _) = self.lstm(mels)
        x = F.relu(self.linear(hidden[-1]))
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


# --------------------------------------------------------------------------------------------------
# Sound


def to_mels(hertz: np.ndarray) -> np.ndarray:
    """The scale of Slaney's toolbox: 200 / 3 Hz each up to 1 kHz, and then by logarithms."""
    above = 15 + 27 * np.log(np.maximum(hertz, 1e-9) / 1000) / np.log(6.4)
    return np.where(hertz < 1000, hertz * 3 / 200, above)


def to_hertz(mels: np.ndarray) -> np.ndarray:
    return np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))


@functools.cache
def mel_filters() -> np.ndarray:
    """Return triangles of area 1 that overlap by half: ``(201, 40)``."""
    corners = to_hertz(np.linspace(0, to_mels(np.array(RATE / 2)), MELS + 2))
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    hertz = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising, falling = (hertz - low) / (middle - low), (high - hertz) / (high - middle)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return triangles * 2 / (high - low)


def mel_spectrogram(samples: np.ndarray) -> np.ndarray:
    """Return the energy in 40 bands every 10 ms: ``(N,) -> (N // 160 + 1, 40)``."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    padded = np.pad(samples, WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2
    return (power @ mel_filters()).astype(np.float32)


def louder(samples: np.ndarray) -> np.ndarray:
    """Raise a recording to -30 dB, unless it is louder."""
    now = 10 * np.log10(np.mean(np.square(samples, dtype=np.float64)) + 1e-20)
    return samples * np.float32(10 ** (max(LOUDNESS - now, 0.0) / 20))


def parts(samples: np.ndarray) -> np.ndarray:
    """Return mel spectrograms of 1.6 s each, which overlap: ``(N,) -> (P, 160, 40)``.

    A last part that is filled by less than three quarters is left out, unless it is the only one.
    """
    frames = -(-(len(samples) + 1) // HOP)
    starts = list(range(0, max(1, frames - FRAMES + STEP + 1), STEP))
    if len(starts) > 1 and (len(samples) - starts[-1] * HOP) / (FRAMES * HOP) < 0.75:
        starts.pop()
    end = (starts[-1] + FRAMES) * HOP
    mels = mel_spectrogram(np.pad(samples, (0, max(0, end - len(samples)))))
    return np.stack([mels[start : start + FRAMES] for start in starts])


# --------------------------------------------------------------------------------------------------
# Who speaks


@nn.jit
def encode(model: nn.Module, mels: jax.Array) -> jax.Array:
    return model(mels)


def embed(model: nn.Module, samples: np.ndarray) -> np.ndarray:
    """Return the mean of the vectors of a recording's parts, of length 1: ``(N,) -> (256,)``."""
    if not samples.any():
        raise ValueError(
            "a recording is silent from start to end: pass one in which somebody speaks"
        )
    mels = parts(louder(samples))
    padded = np.zeros(
        (-(-len(mels) // 8) * 8, FRAMES, MELS), np.float32
    )  # few sizes: each is compiled
    padded[: len(mels)] = mels
    mean = np.asarray(encode(model, jnp.asarray(padded)))[: len(mels)].mean(0)
    return mean / np.linalg.norm(mean)


def load_encoder(path: str | Path | None = None) -> VoiceEncoder:
    """Return the network with the weights of the package resemblyzer, or of another file."""
    found = nn.load(path or file_of_package("resemblyzer", "pretrained.pt", "resemblyzer"))
    with nn.device("meta"):  # shapes alone: the numbers come from the file
        model = VoiceEncoder()
    model.load_state_dict(found.get("model_state", found), assign=True)
    return model.eval()


def made_voices() -> dict[str, np.ndarray]:
    """Return two voices that say two things each."""
    texts = ("aieaouiaeoiu", "ouieaueioaui")
    voices = {"low": (110, 1.0), "high": (210, 1.18)}
    return {
        f"{name} voice, {i}": speak(text, *voice, seed=i)[0]
        for name, voice in voices.items()
        for i, text in enumerate(texts, 1)
    }


def draw(similarity: np.ndarray, names: Sequence[str], file: Path) -> None:
    from matplotlib.figure import Figure

    size = 2.5 + 0.5 * len(names)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(similarity, vmin=0.4, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(similarity):
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", c="w" if value < 0.75 else "k")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print how similar the voices are, each pair; return the cosines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recordings", nargs="*", help="wav files")
    parser.add_argument("--weights", metavar="FILE", help="in place of those of the package")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="save a picture")
    args = parser.parse_args(argv)
    if len(args.recordings) == 1:
        parser.error("one recording has nothing to be compared with: pass two or more")
    model = load_encoder(args.weights)
    made = {} if args.recordings else made_voices()
    names = list(made) or [Path(path).stem for path in args.recordings]
    voices = list(made.values()) or [read_wav(path) for path in args.recordings]
    vectors = np.stack([embed(model, samples) for samples in voices])
    similarity = vectors @ vectors.T
    width = max(map(len, names))
    for name, row in zip(names, similarity, strict=True):
        print(f"{name:{width}}  " + "  ".join(f"{value:.2f}" for value in row))
    print("the cosine of each pair; of one voice it is mostly above 0.8")
    numbers: dict[str, Any] = {"similarity": similarity, "names": names}
    if made:
        same = [similarity[0, 1], similarity[2, 3]]
        numbers["same"], numbers["different"] = min(same), similarity[:2, 2:].max()
    if args.picture:
        draw(similarity, names, args.picture)
        print(f"picture saved to {args.picture}")
    return numbers


if __name__ == "__main__":
    main()
