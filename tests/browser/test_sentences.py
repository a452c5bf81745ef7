"""The page of examples/sentences_in_the_browser.py: its tokenizer, and the network in it."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest

import bert
import digits_in_the_browser as digits
import sentences_in_the_browser as example
from tests.examples.sentence_model import TEXTS, read, write_folder


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """A tokenizer, and a page that has it and neither a runtime nor a model."""
    folder = write_folder(tmp_path_factory.mktemp("sentences"))
    for name in digits.FILES:
        (folder / name).write_text("throw 0" if name == digits.SCRIPT else "")
    tokenizer = bert.load_tokenizer(folder)
    example.write_page(folder / "page.html", b"", tokenizer, folder)
    return tokenizer, folder / "page.html"


def test_the_page_reads_texts_as_the_tokenizer_does(reading, page):
    tokenizer, path = reading
    opened = page(path)
    found = opened.evaluate("texts => Promise.all(texts.map(tokens))", TEXTS)
    expected = read(tokenizer, TEXTS)
    for text, one, other in zip(TEXTS, found, expected, strict=True):
        assert one == other, text
    assert "could not be loaded" in opened.page.inner_text("#status")  # and it says so


@pytest.mark.long
def test_the_page_reads_every_character_as_transformers_does(reading, page):
    transformers = pytest.importorskip("transformers")
    _, path = reading
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert.minilm_folder())
    opened = page(path)
    kinds = map(unicodedata.category, map(chr, range(0x110000)))
    every = [chr(n) for n, kind in enumerate(kinds) if kind not in ("Cn", "Co", "Cs")]
    for start in range(0, len(every), 10_000):
        texts = [f"a{c}b {c}" for c in every[start : start + 10_000]]
        found = opened.evaluate("texts => Promise.all(texts.map(tokens))", texts)
        expected = tokenizer(texts)["input_ids"]
        assert [
            t for t, one, other in zip(texts, found, expected, strict=True) if one != other
        ] == []


# npm is asked for 33 MB: too much for every run.
@pytest.mark.long
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_sentences_that_are_typed_are_found_with_the_numbers_of_the_module(weights, page, tmp_path):
    path = tmp_path / "sentences.html"
    model = example.main(["--weights", weights, "--page", str(path)])
    opened = page(path, width=900, height=1000)
    opened.page.wait_for_function(
        "document.getElementById('status').textContent.includes('computed in this page')"
    )
    tokenizer = bert.load_tokenizer(bert.minilm_folder())
    texts = [text for text in TEXTS if text.strip()] + bert.CORPUS.splitlines()
    vectors = opened.evaluate("async texts => (await embed(texts)).map(v => [...v])", texts)
    np.testing.assert_allclose(vectors, bert.encode(model, tokenizer, texts), rtol=1e-4, atol=1e-4)

    opened.evaluate("() => shown")
    assert opened.page.locator("#found li").count() == 12
    assert "restart the device" in opened.page.inner_text("#found li:first-child")
    opened.page.fill("#query", "something to eat")
    opened.page.fill(
        "#sentences", "A football match\nPasta with tomatoes\n\nPasta with tomatoes\n<i>Maths</i>"
    )
    opened.evaluate("() => shown")
    rows = opened.page.locator("#found li").all_inner_texts()
    assert len(rows) == 3 and "Pasta with tomatoes" in rows[0]
    assert any("<i>Maths</i>" in row for row in rows)
    cosine = float(rows[0].split()[0])
    one, other = bert.encode(model, tokenizer, ["something to eat", "Pasta with tomatoes"])
    assert abs(cosine - float(one @ other)) < 1e-3
    opened.screenshot(Path(tmp_path) / "typed.png")
    assert opened.errors == []
    assert all(url.startswith(("file:", "blob:")) for url in opened.requests)
