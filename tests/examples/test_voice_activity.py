"""The voice-activity example gives Silero VAD's probabilities, and cuts them into speech."""

from __future__ import annotations

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.io import wavfile

import statefulnn as nn
import voice_activity as example
from tests.examples.reference import TorchSileroVAD, saved_by_torch


def torch_probabilities(theirs, samples: np.ndarray) -> np.ndarray:
    """Go through a recording piece by piece, as the package does."""
    pieces = np.pad(samples, (64, -len(samples) % 512)).astype(np.float32)
    h = c = torch.zeros(1, 128)
    found = []
    with torch.no_grad():
        for start in range(64, len(pieces), 512):
            piece = torch.tensor(pieces[None, start - 64 : start + 512])
            p, h, c = theirs(piece, h, c)
            found.append(p.item())
    return np.array(found)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return TorchSileroVAD().eval()


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    return saved_by_torch(theirs, tmp_path_factory.mktemp("weights"), "safetensors")


@pytest.fixture(scope="module")
def model(weights):
    return example.load_vad(weights)


@pytest.fixture
def samples():
    return np.random.default_rng(0).normal(0, 0.3, 512 * 9 + 100).astype(np.float32)


def test_names_and_shapes_are_those_of_the_file(theirs, model):
    shapes = {name: tuple(v.shape) for name, v in model.state_dict().items()}
    expected = {name: tuple(v.shape) for name, v in theirs.state_dict().items()}
    assert list(shapes.items()) == list(expected.items())


def test_probabilities_are_those_of_torch_piece_by_piece(theirs, model, samples):
    found = example.probabilities(model, samples)
    np.testing.assert_allclose(found, torch_probabilities(theirs, samples), atol=1e-5)


def test_a_stream_goes_on_where_it_stopped(model, samples):
    pieces = jnp.asarray(example.cut(samples))
    whole, state = model(pieces)
    first, between = model(pieces[:4])
    second, last = model(pieces[4:], between)
    np.testing.assert_allclose(jnp.concatenate([first, second]), whole, atol=1e-6)
    for a, b in zip(last, state, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_pieces_hold_all_samples_and_64_before_each():
    pieces = example.cut(np.arange(1.0, 601.0))
    assert pieces.shape == (2, 576)
    np.testing.assert_array_equal(pieces[0], [*[0] * 64, *range(1, 513)])
    np.testing.assert_array_equal(pieces[1], [*range(449, 601), *[0] * (512 - 88)])
    assert example.cut(np.zeros(512)).shape == (1, 576)


@pytest.mark.parametrize(
    "probability, expected",
    [
        ([0] * 40, []),
        ([0.49] * 40, []),
        ([0.9] * 40, [(0, 40)]),
        ([0] * 5 + [0.5] * 20 + [0] * 9, [(5, 25)]),
        # Less likely by less than 0.15 is still speech, but does not start it.
        ([0.4] * 5 + [0.5] * 10 + [0.4] * 10 + [0] * 9, [(5, 25)]),
        # The fifth piece of a pause starts 128 ms after its start: the first one later than 100 ms.
        ([0.9] * 12 + [0] * 4 + [0.9] * 12, [(0, 28)]),
        ([0.9] * 12 + [0] * 5 + [0.9] * 12, [(0, 12), (17, 29)]),
        # 0.4 in a pause does not end the pause.
        ([0.9] * 12 + [0, 0.4, 0, 0, 0] + [0.9] * 12, [(0, 12), (17, 29)]),
        # Seven pieces are 224 ms, eight 256 ms.
        ([0] * 5 + [0.9] * 7 + [0] * 9, []),
        ([0] * 5 + [0.9] * 8 + [0] * 9, [(5, 13)]),
    ],
)
def test_segments_are_where_a_reader_would_put_them(probability, expected):
    found = example.segments(np.array(probability), margin=0)
    assert found == [pytest.approx((a * 0.032, b * 0.032)) for a, b in expected]
    wider = example.segments(np.array(probability))
    for (a, b), (start, end) in zip(wider, found, strict=True):
        assert a == pytest.approx(max(start - 0.03, 0))
        assert b == pytest.approx(min(end + 0.03, len(probability) * 0.032))


def test_margins_of_neighbours_do_not_overlap():
    found = example.segments(np.array([0.9] * 12 + [0] * 6 + [0.9] * 12), margin=0.1)
    assert found[0][1] == pytest.approx(15 * 0.032)
    assert found[1][0] == pytest.approx(15 * 0.032)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_a_tone_of_any_kind_of_file_is_read_as_a_tone(dtype, rate, tmp_path):
    tone = lambda rate: 0.5 * np.sin(2 * np.pi * 300 * np.arange(rate // 4) / rate)
    given = tone(rate)
    if dtype == "uint8":
        given = np.round(given * 128 + 128)
    elif dtype != "float32":
        given = given * -float(np.iinfo(dtype).min)
    wavfile.write(tmp_path / "tone.wav", rate, given.astype(dtype))
    found = example.read_wav(tmp_path / "tone.wav")
    expected = tone(16000)
    assert found.dtype == np.float32 and abs(len(found) - len(expected)) <= 1
    middle = slice(400, 3600)  # resampling has a border
    np.testing.assert_allclose(found[middle], expected[middle], atol=0.01)


def test_channels_are_averaged(tmp_path):
    two = np.array([[0.5, -0.5], [0.25, 0.75]], np.float32)
    wavfile.write(tmp_path / "two.wav", 16000, two)
    np.testing.assert_allclose(example.read_wav(tmp_path / "two.wav"), [0, 0.5])


def test_written_recordings_are_read_back(tmp_path):
    samples = np.array([0, 0.5, -0.5, 2, -2], np.float32)
    example.write_wav(tmp_path / "new" / "a.wav", samples)
    found = example.read_wav(tmp_path / "new" / "a.wav")
    np.testing.assert_allclose(found, np.clip(samples, -1, 1), atol=1e-4)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no recording at all, but a text", r"is not a recording.*ffmpeg -i"),
        (np.zeros(0, np.int16), "has no samples"),
        (np.array([0, np.nan], np.float32), "samples that are no numbers"),
    ],
)
def test_what_is_no_recording_is_refused(content, message, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(content) if isinstance(content, bytes) else wavfile.write(path, 16000, content)
    with pytest.raises(ValueError, match=rf"a\.wav .*{message}"):
        example.read_wav(path)


@pytest.mark.parametrize("pitch, tract", [(110, 1.0), (220, 1.2)])
def test_a_made_voice_has_the_pitch_that_is_returned(pitch, tract):
    samples, pitches = example.speak("aei ou", pitch, tract)
    assert samples.shape == pitches.shape == (6 * 3520,)
    assert np.abs(samples).max() == pytest.approx(0.2)
    blank = slice(3 * 3520, 4 * 3520)
    assert not samples[blank].any() and np.isnan(pitches[blank]).all()
    assert np.nanmean(pitches) == pytest.approx(pitch, rel=0.13)
    for middle in (1760, 3 * 1760, 9 * 1760):
        period = 16000 / pitches[middle]
        length = round(2 * period)
        now, half, later = (samples[middle + round(k * period) :][:length] for k in (0, 0.5, 1))
        assert np.corrcoef(now, later)[0, 1] > 0.9 > 0.8 > np.corrcoef(now, half)[0, 1]


def test_the_program_prints_times_and_draws_them(weights, tmp_path, capsys):
    picture = tmp_path / "new" / "a.png"
    numbers = example.main(
        ["--weights", str(weights), "--threshold", "0", "--picture", str(picture)]
    )
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # Everything is as likely as 0: one segment, and the share of voices in it.
    assert len(numbers["segments"]) == 1
    assert numbers["agreement"] == pytest.approx(15 * 0.22 / (15 * 0.22 + 6), abs=0.01)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["from", "to", "length"]
    assert lines[2] == "9.3 s of 9.3 s are speech"
    example.write_wav(tmp_path / "tone.wav", np.full(1600, 0.1))
    found = example.main(
        [str(tmp_path / "tone.wav"), "--weights", str(weights), "--threshold", "2"]
    )
    assert found == {"segments": []}


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps silero-vad.*--weights"):
        example.load_vad()


def test_weights_of_another_network_are_refused(tmp_path):
    nn.save({"conv1.weight": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(nn.StateDictError, match=r"conv1\.weight"):
        example.load_vad(tmp_path / "a.safetensors")


@pytest.mark.long
def test_real_weights_hear_voices_and_no_tones_and_clicks(theirs):
    if importlib.util.find_spec("silero_vad") is None:
        pytest.skip("silero-vad is not installed")
    model = example.load_vad()
    samples, _ = example.made_recording()
    real = TorchSileroVAD().eval()
    real.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in model.state_dict().items()})
    found = example.probabilities(model, samples)
    np.testing.assert_allclose(found, torch_probabilities(real, samples), atol=2e-5)
    numbers = example.main([])
    assert len(numbers["segments"]) == 2
    assert numbers["agreement"] >= 0.95
