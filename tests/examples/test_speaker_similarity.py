"""The speaker example gives the vectors of Resemblyzer's voice encoder."""

from __future__ import annotations

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import speaker_similarity as example
from tests.examples.reference import saved_by_torch, transformers
from voice_activity import speak, write_wav

pytestmark = pytest.mark.compiled_with_care  # an LSTM of three layers takes 160 steps


class TorchVoiceEncoder(torch.nn.Module):
    """The network of the package resemblyzer, with what its file holds."""

    def __init__(self):
        super().__init__()
        self.similarity_weight = torch.nn.Parameter(torch.tensor([10.0]))
        self.similarity_bias = torch.nn.Parameter(torch.tensor([-5.0]))
        self.lstm = torch.nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = torch.nn.Linear(256, 256)

    def forward(self, mels):
        x = self.linear(self.lstm(mels)[1][0][-1]).relu()
        return x / x.norm(dim=1, keepdim=True)


def expected_embedding(theirs, mels: np.ndarray) -> np.ndarray:
    """Return the normalised mean of the parts' vectors."""
    with torch.no_grad():
        mean = theirs(torch.tensor(mels)).mean(0)
    return (mean / mean.norm()).numpy()


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return TorchVoiceEncoder()


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    """A file as the package's: the weights, and what goes on with training."""
    path = tmp_path_factory.mktemp("weights") / "pretrained.pt"
    torch.save({"step": 3, "model_state": theirs.state_dict(), "optimizer_state": {}}, path)
    return path


@pytest.fixture(scope="module")
def model(weights):
    return example.load_encoder(weights)


@pytest.fixture
def samples():
    return 0.1 * np.random.default_rng(0).standard_normal(16000 * 2).astype(np.float32)


def test_names_and_shapes_are_those_of_the_file(theirs, model):
    shapes = lambda state: [(name, tuple(v.shape)) for name, v in state.items()]
    assert shapes(model.state_dict()) == shapes(theirs.state_dict())


def test_a_file_of_weights_alone_is_read_too(theirs, model, tmp_path):
    again = example.load_encoder(saved_by_torch(theirs, tmp_path, "safetensors"))
    for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        np.testing.assert_array_equal(a.value, b.value, err_msg=name)


def test_vectors_are_those_of_torch(theirs, model):
    mels = np.random.default_rng(0).random((2, 20, 40)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(mels)).numpy()
    np.testing.assert_allclose(model(jnp.asarray(mels)), expected, atol=1e-5)


def test_a_recording_has_the_mean_vector_of_its_parts(theirs, model, samples):
    found = example.embed(model, samples)
    np.testing.assert_allclose(found, expected_embedding(theirs, example.parts(samples)), atol=1e-5)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)


def test_mel_filters_and_spectrogram_are_librosas_as_transformers_has_them(samples):
    audio = transformers.audio_utils
    filters = audio.mel_filter_bank(201, 40, 0, 8000, 16000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(example.mel_filters(), filters, atol=1e-9)
    expected = audio.spectrogram(
        samples,
        audio.window_function(400, "hann"),
        frame_length=400,
        hop_length=160,
        power=2.0,
        pad_mode="constant",
        mel_filters=filters,
        mel_floor=0.0,
    )
    found = example.mel_spectrogram(samples)
    np.testing.assert_allclose(found, expected.T, atol=1e-6 * expected.max())


# A part has 25,600 samples, the next one starts 12,320 later, and needs 19,200 of its own.
@pytest.mark.parametrize(
    "samples, count",
    [(1, 1), (25_600, 1), (12_320 + 19_199, 1), (12_320 + 19_200, 2), (7 * 12_320 + 19_200, 8)],
)
def test_parts_overlap_and_the_last_is_three_quarters_full(samples, count):
    assert example.parts(np.ones(samples, np.float32)).shape == (count, 160, 40)


def test_parts_are_pieces_of_the_spectrogram(samples):
    whole = example.mel_spectrogram(samples)
    found = example.parts(samples)
    for i, part in enumerate(found[:-1]):
        np.testing.assert_allclose(part, whole[77 * i :][:160], rtol=1e-5, atol=1e-8)


def test_quiet_recordings_are_raised_and_loud_ones_stay():
    quiet = np.full(1000, 1e-3, np.float32)
    raised = example.louder(quiet)
    assert 10 * np.log10((raised**2).mean()) == pytest.approx(-30, abs=1e-3)
    loud = np.full(1000, 0.5, np.float32)
    np.testing.assert_array_equal(example.louder(loud), loud)


def test_silence_is_refused(model):
    with pytest.raises(ValueError, match="silent from start to end"):
        example.embed(model, np.zeros(16000, np.float32))


def test_the_program_compares_each_pair_and_draws_it(weights, tmp_path, capsys):
    for folder, pitch in (("a", 120), ("b", 200)):
        write_wav(tmp_path / folder / "same_name.wav", speak("ae", pitch)[0])
    files = [str(tmp_path / folder / "same_name.wav") for folder in "ab"]
    picture = tmp_path / "new" / "a.png"
    numbers = example.main([*files, "--weights", str(weights), "--picture", str(picture)])
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert numbers["names"] == ["same_name", "same_name"]
    similarity = numbers["similarity"]
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-5)
    np.testing.assert_array_equal(similarity, similarity.T)
    assert capsys.readouterr().out.startswith("same_name  1.00  ")


def test_one_recording_is_refused(capsys):
    with pytest.raises(SystemExit):
        example.main(["one.wav"])
    assert "pass two or more" in capsys.readouterr().err


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps resemblyzer.*--weights"):
        example.load_encoder()


@pytest.mark.long
def test_real_weights_tell_two_made_voices_apart():
    if importlib.util.find_spec("resemblyzer") is None:
        pytest.skip("resemblyzer is not installed")
    model, real = example.load_encoder(), TorchVoiceEncoder()
    real.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in model.state_dict().items()})
    voice = example.louder(speak("aieaouiaeoiu", 110)[0])
    expected = expected_embedding(real, example.parts(voice))
    np.testing.assert_allclose(example.embed(model, voice), expected, atol=1e-5)
    numbers = example.main([])
    assert numbers["same"] >= 0.9
    assert numbers["different"] <= 0.75
