"""The transformer learns the grammar; its cache gives what it would give without."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

import char_transformer as example
import statefulnn as nn

pytestmark = pytest.mark.compiled_with_care


def entropy_of_pairs(tokens: np.ndarray) -> float:
    """Return the entropy of a letter, given the one before it: the best that pairs of letters allow."""
    counts = np.zeros((len(example.LETTERS),) * 2)
    np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    given = counts.sum(1, keepdims=True)
    return float(
        -(counts * np.log(np.where(counts > 0, counts / given.clip(1), 1))).sum() / counts.sum()
    )


@pytest.mark.long
def test_it_learns_more_than_pairs_of_letters_and_no_more_than_there_is(capsys):
    numbers = example.main(["--steps", "150", "--batch-size", "16", "--picture", "pictures/c.png"])
    pairs = entropy_of_pairs(example.draw_texts(random.Random(1), 500, 64))
    assert 0.98 * numbers["entropy"] < numbers["loss"] < pairs
    assert Path("pictures/c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"{numbers['loss']:.3f}" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_at_full_length_it_comes_near_the_entropy_and_writes_sentences(seed):
    numbers = example.main(["--seed", str(seed)])
    assert numbers["loss"] < 1.1 * numbers["entropy"]
    assert numbers["right"] > 0.75


def test_logits_with_the_cache_are_those_without():
    nn.manual_seed(0)
    model = example.Transformer(size=16, heads=2, length=12)
    tokens = example.draw_texts(random.Random(0), 3, 11)
    expected = nn.jit(model)(tokens)
    model.make_room(3)
    step = nn.jit(model)
    for position in range(tokens.shape[1]):
        logits = step(tokens[:, position : position + 1], np.int32(position))
        np.testing.assert_allclose(logits[:, 0], expected[:, position], rtol=1e-4, atol=1e-5)
    assert step.trace_count == 1
    assert not [name for name in model.state_dict() if "keys" in name or "values" in name]


def test_sentences_are_right_and_others_are_not():
    rng = random.Random(0)
    drawn = [example.sentence(rng) for _ in range(300)]
    assert all(example.is_right(line) for line in drawn)
    assert example.is_right("the old cats under the tree see a dog.")
    for wrong in ("the old cat under the tree see a dog.", "the cats sees a dog.", "the cat sees."):
        assert not example.is_right(wrong)
    parts = example.NOUNS, example.NOUNS, example.VERBS, example.ADJECTIVES, example.PLACES
    assert math.prod(map(len, parts)) * 2 == example.CHOICES
