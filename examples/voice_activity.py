"""Silero VAD marks the speech in a recording, under the names of its own file of weights.

The weights come with a package of PyPI. What it asks for (torch, torchaudio) is not needed here:

    pip install --no-deps silero-vad

    python examples/voice_activity.py recording.wav --picture out/voice_activity.png
    python examples/voice_activity.py

Without a recording the program makes one, of vowels and of noises, and compares with what it knows.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.io import wavfile
from scipy.signal import resample_poly

import statefulnn as nn
import statefulnn.functional as F

RATE = 16000
# Samples that one answer is for, and samples before them that are looked at too.
PIECE, BEFORE = 512, 64


class SileroVAD(nn.Module):
    """How likely it is that a piece of 32 ms is speech.

    Source: the Silero team, Silero VAD, 2021; ``silero_vad_16k.safetensors`` of the package silero-vad.
    """

    def __init__(self):
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)  # sines and cosines
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def encode(self, pieces: jax.Array) -> jax.Array:
        """Return what the LSTM is fed with: ``(T, 576) -> (T, 128)``."""
        x = F.pad(pieces, (0, BEFORE), mode="reflect")
        real, imaginary = jnp.split(self.stft_conv(x[:, None]), 2, axis=1)  # (T, 129, 4) each
        x = jnp.sqrt(real**2 + imaginary**2)
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(layer(x))
        return x[..., 0]  # (T, 128, 1) -> (T, 128)

    def forward(
        self, pieces: jax.Array, state: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Go through pieces that follow each other.

        Args:
            pieces: ``(T, 576)``, each with the last 64 samples of the one before.
            state: what a former call returned for the pieces before, or None at the start.

        Returns:
            Probabilities ``(T,)``, and the state to go on with.
        """
        if state is None:
            zeros = jnp.zeros(self.lstm_cell.hidden_size, pieces.dtype)
            state = zeros, zeros

        def step(state, x):
            state = self.lstm_cell(x, state)
            return state, state[0]

        last, hidden = nn.scan(step, state, self.encode(pieces))  # (T, 128)
        out = self.final_conv(F.relu(hidden)[..., None])  # (T, 1, 1)
        return F.sigmoid(out[:, 0, 0]), last


# --------------------------------------------------------------------------------------------------
# Recordings


def read_wav(path: str | Path) -> np.ndarray:
    """Return the mean of a recording's channels at 16 kHz, mostly in [-1, 1]: ``(N,)``, float32."""
    try:
        rate, samples = wavfile.read(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a recording that can be read ({error}): make a wav file of it, for "
            f"example by `ffmpeg -i {path} -ar {RATE} -ac 1 recording.wav`"
        ) from error
    if samples.size == 0:
        raise ValueError(f"{path} has no samples: pass a recording that is not empty")
    if samples.dtype == np.uint8:  # the one kind without a sign
        samples = (samples.astype(np.float32) - 128) / 128
    elif np.issubdtype(samples.dtype, np.integer):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    samples = samples.astype(np.float32).reshape(len(samples), -1).mean(1)
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} has samples that are no numbers: repair the recording first")
    shared = math.gcd(rate, RATE)
    if rate != RATE:
        samples = resample_poly(samples, RATE // shared, rate // shared).astype(np.float32)
    return samples


def write_wav(path: str | Path, samples: np.ndarray) -> None:
    """Save samples in [-1, 1] at 16 kHz with 16 bits."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, RATE, np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16))


# The resonances of the mouth for five vowels, in Hz.
VOWELS = {
    "a": (800, 1200, 2500),
    "e": (450, 1900, 2500),
    "i": (300, 2250, 3000),
    "o": (450, 850, 2400),
    "u": (320, 800, 2250),
}
WIDTHS = (80, 90, 120, 200, 300)  # of the resonances, in Hz
SYLLABLE = 0.22  # seconds


def speak(
    text: str, pitch: float = 120.0, tract: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Make a voice that says vowels: the harmonics of a pitch that moves, through resonances.

    Args:
        text: of "aeiou" and of blanks, each 0.22 s long.
        pitch: the mean of the pitch, in Hz.
        tract: a factor of the resonances; a shorter throat has a larger one.
        seed: of the melody.

    Returns:
        The samples at 16 kHz, and the pitch at each: ``(N,)`` both. It is NaN in the blanks.
    """
    length = round(SYLLABLE * RATE)
    t = np.arange(length * len(text)) / RATE
    start = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    melody = 0.12 * np.sin(2 * np.pi * 0.7 * t + start) + 0.01 * np.sin(2 * np.pi * 5.5 * t)
    pitches = pitch * np.exp(melody)
    phase = 2 * np.pi * np.cumsum(pitches) / RATE

    middles = (np.arange(len(text)) + 0.5) * SYLLABLE
    spoken = np.array([letter != " " for letter in text])
    formants = np.array([VOWELS.get(letter, (500, 1500, 2500)) for letter in text])  # (L, 3)
    centres = [tract * np.interp(t, middles, formants[:, j]) for j in range(3)]
    centres += [np.full_like(t, 3500 * tract), np.full_like(t, 4500 * tract)]

    samples = np.zeros_like(t)
    for k in range(1, int(RATE / 2 / pitches.min())):
        frequency = k * pitches
        gain = np.where(frequency < 0.47 * RATE, k**-1.2, 0.0)
        for centre, width in zip(centres, WIDTHS, strict=True):
            gain *= centre**2 / np.hypot(frequency**2 - centre**2, frequency * width)
        samples += gain * np.cos(k * phase)
    swell = np.sin(np.pi * (np.arange(length) + 0.5) / length) ** 0.4
    samples *= np.repeat(spoken, length) * np.tile(swell, len(text))
    samples *= 0.2 / max(np.abs(samples).max(), 1e-9)
    pitches[~np.repeat(spoken, length)] = np.nan
    return samples.astype(np.float32), pitches


def made_recording(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return two voices, a tone, clicks and silence in noise, and where the voices are: ``(N,)`` both."""
    rng = np.random.default_rng(seed)
    silence, t = np.zeros(RATE, np.float32), np.arange(RATE) / RATE
    clicks = np.where(rng.random(RATE) < 3e-4, 0.3, 0.0)
    parts = [
        (silence, False),
        (speak("aieaoui", 120)[0], True),
        (silence, False),
        (0.1 * np.sin(2 * np.pi * 1000 * t), False),
        (silence, False),
        (speak("ieaouaei", 210, 1.15, seed=1)[0], True),
        (silence, False),
        (clicks, False),
    ]
    samples = np.concatenate([part for part, _ in parts])
    is_speech = np.concatenate([np.full(len(part), spoken) for part, spoken in parts])
    samples = samples + 0.002 * rng.standard_normal(len(samples))
    return samples.astype(np.float32), is_speech


# --------------------------------------------------------------------------------------------------
# From probabilities to times


def cut(samples: np.ndarray) -> np.ndarray:
    """Return the pieces of a recording: ``(N,) -> (T, 576)``. Zeros fill up the last one."""
    count = -(-len(samples) // PIECE)
    padded = np.pad(samples, (BEFORE, count * PIECE - len(samples)))
    return np.lib.stride_tricks.sliding_window_view(padded, BEFORE + PIECE)[::PIECE]


@nn.jit
def predict(model: nn.Module, pieces: jax.Array) -> jax.Array:
    return model(pieces)[0]


def probabilities(model: nn.Module, samples: np.ndarray) -> np.ndarray:
    """Return how likely each 32 ms of a recording are speech: ``(N,) -> (T,)``."""
    pieces = cut(samples)
    longer = -(-len(pieces) // 256) * 256  # few lengths: each one is compiled
    padded = np.zeros((longer, BEFORE + PIECE), np.float32)
    padded[: len(pieces)] = pieces
    return np.asarray(predict(model, jnp.asarray(padded)))[: len(pieces)]


def segments(
    probability: np.ndarray,
    threshold: float = 0.5,
    shortest: float = 0.25,
    pause: float = 0.1,
    margin: float = 0.03,
) -> list[tuple[float, float]]:
    """Return where speech starts and ends, in seconds.

    Args:
        probability: of each piece, ``(T,)``.
        threshold: speech starts with a piece that is as likely as this. It ends with one that is less
            likely by 0.15, if no likely one follows within the pause.
        shortest: speech is left out that is not longer than this.
        pause: a shorter one does not end speech.
        margin: is added at both ends, if there is room.
    """
    second = RATE / PIECE
    found: list[tuple[int, int]] = []
    start: int | None = None
    end: int | None = None
    for i, p in enumerate(probability):
        if p >= threshold:
            start, end = i if start is None else start, None
        elif start is not None and p < max(threshold - 0.15, 0.01):
            end = i if end is None else end
            if i - end >= pause * second:
                found.append((start, end))
                start = end = None
    if start is not None:
        found.append((start, len(probability)))
    kept = [(a / second, b / second) for a, b in found if b - a > shortest * second]
    last = len(probability) / second
    out = []
    for i, (a, b) in enumerate(kept):
        room_before = (a - kept[i - 1][1]) / 2 if i else a
        room_after = (kept[i + 1][0] - b) / 2 if i + 1 < len(kept) else last - b
        out.append((a - min(margin, room_before), b + min(margin, room_after)))
    return out


# --------------------------------------------------------------------------------------------------
# The program


def file_of_package(module: str, name: str, package: str) -> Path:
    """Return a file that comes with a package, without importing the package."""
    found = importlib.util.find_spec(module)
    path = None if found is None or found.origin is None else Path(found.origin).parent / name
    if path is None or not path.exists():
        raise ImportError(
            f"the weights come with a package, which is not installed, or has no {name}: "
            f"pip install --no-deps {package}, or pass a file with --weights"
        )
    return path


def load_vad(path: str | Path | None = None) -> SileroVAD:
    """Return the network with the weights of the package silero-vad, or of another file."""
    file = path or file_of_package("silero_vad", "data/silero_vad_16k.safetensors", "silero-vad")
    with nn.device("meta"):  # shapes alone: the numbers come from the file
        model = SileroVAD()
    model.load_state_dict(nn.load(file), assign=True)
    return model.eval()


def draw(
    samples: np.ndarray, probability: np.ndarray, found: Sequence[tuple[float, float]], file: Path
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(np.arange(len(samples)) / RATE, samples, lw=0.4)
    top.set(ylabel="recording")
    bottom.plot((np.arange(len(probability)) + 0.5) * PIECE / RATE, probability, c="C1")
    bottom.set(xlabel="seconds", ylabel="probability", ylim=(-0.05, 1.05))
    for axes in (top, bottom):
        for start, end in found:
            axes.axvspan(start, end, color="C2", alpha=0.2, lw=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print when somebody speaks; return the times, and how many pieces agree with what is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recording", nargs="?", help="a wav file")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--weights", metavar="FILE", help="in place of those of the package")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="save a picture")
    args = parser.parse_args(argv)
    model = load_vad(args.weights)
    samples, is_speech = (read_wav(args.recording), None) if args.recording else made_recording()
    probability = probabilities(model, samples)
    found = segments(probability, args.threshold)
    print("  from      to   length")
    for start, end in found:
        print(f"{start:6.2f}  {end:6.2f}  {end - start:6.2f} s")
    spoken = sum(end - start for start, end in found)
    print(f"{spoken:.1f} s of {len(samples) / RATE:.1f} s are speech")
    numbers: dict[str, Any] = {"segments": found}
    if is_speech is not None:
        times = np.arange(len(samples)) / RATE
        marked = sum((a <= times) & (times < b) for a, b in found) > 0
        numbers["agreement"] = float(np.mean(marked == is_speech))
        print(f"{numbers['agreement']:.1%} of the time as it was made")
    if args.picture:
        draw(samples, probability, found, args.picture)
        print(f"picture saved to {args.picture}")
    return numbers


if __name__ == "__main__":
    main()
