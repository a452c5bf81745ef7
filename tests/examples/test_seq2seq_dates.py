"""Dates of any length are translated, and what is padded changes nothing."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest

import seq2seq_dates as example
import statefulnn as nn


@pytest.mark.long
def test_it_writes_more_characters_right_than_the_likeliest_of_each_place(capsys):
    shares = example.main(
        ["--steps", "200", "--batch-size", "32", "--picture", "pictures/dates.png"]
    )
    targets = example.draw_dates(np.random.default_rng(1), 2000)[2]
    likeliest = np.mean([np.bincount(column).max() / len(column) for column in targets.T])
    assert shares["characters"] > (1 + likeliest) / 2
    assert Path("pictures/dates.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"{shares['characters']:.1%} of characters" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_at_full_length_nearly_all_dates_are_right(seed):
    assert example.main(["--seed", str(seed)])["dates"] > 0.97


def test_texts_are_the_dates_of_the_targets():
    texts, lengths, targets = example.draw_dates(np.random.default_rng(0), 60)
    for text, length, target in zip(texts, lengths, targets, strict=True):
        written = example.as_text(text)
        assert len(written) == length <= example.LONGEST
        date = datetime.date.fromisoformat(example.as_text(target))
        assert written in [date.strftime(f) for f in example.FORMATS]


def test_padding_changes_nothing_and_compiles_nothing():
    model = example.Seq2Seq(size=8)
    texts, lengths, targets = example.draw_dates(np.random.default_rng(0), 4)
    run = nn.jit(model)
    logits = run(texts, lengths, targets)
    changed = np.where(np.arange(example.LONGEST) < lengths[:, None], texts, 65).astype(np.int32)
    np.testing.assert_array_equal(logits, run(changed, lengths, targets))
    run(texts, np.maximum(lengths - 1, 1), targets)
    alone = model(texts[:1, : lengths[0]], lengths[:1], targets[:1])
    np.testing.assert_allclose(logits[:1], alone, rtol=1e-4, atol=1e-5)


def test_what_is_written_is_what_the_forward_finds_likeliest():
    model = example.Seq2Seq(size=8)
    texts, lengths, _ = example.draw_dates(np.random.default_rng(0), 3)
    written, weights = example.translate(model, texts, lengths)
    likeliest = model(texts, lengths, written).argmax(-1)
    np.testing.assert_array_equal(written, likeliest)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    outside = np.arange(example.LONGEST) >= lengths[:, None, None]
    assert not np.asarray(weights)[np.broadcast_to(outside, weights.shape)].any()
