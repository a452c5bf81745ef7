"""The page that finds sentences holds all it needs; tests/browser/test_sentences.py types in it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import bert
import digits_in_the_browser as digits
import sentences_in_the_browser as example
from tests.examples.sentence_model import write_folder


def part(page, name):
    (text,) = re.findall(rf'<script type="text/plain" id="{name}">(.*?)</script>', page)
    return gzip.decompress(base64.b64decode(text))


@pytest.mark.parametrize("weights", ["float32", pytest.param("int8", marks=pytest.mark.long)])
def test_the_page_holds_model_vocabulary_and_runtime_and_loads_nothing(weights, capsys):
    folder = Path("model")
    folder.mkdir()
    write_folder(folder)
    for name in digits.FILES:
        (folder / name).write_text(f"// {name} </script>")
    given = ["--model", "model", "--runtime", "model", "--weights", weights]
    model = example.main([*given, "--page", "sentences.html"])
    assert "sentences.html" in capsys.readouterr().out
    page = Path("sentences.html").read_text()
    assert "@@" not in page and not re.search(r"(src|href)=|https?://|\bfetch\(", page)
    assert part(page, "wasm") == (folder / digits.WASM).read_bytes()
    tokenizer = bert.load_tokenizer(folder)
    vocabulary = part(page, "vocabulary").decode().split("\n")
    assert vocabulary == [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    settings = json.loads(re.findall(r"const settings = (.*);\n", page)[0])
    assert settings["special"]["[MASK]"] == 103 and settings["length"] == 256
    session = onnxruntime.InferenceSession(part(page, "model"))
    encodings = tokenizer.encode_batch(bert.CORPUS.splitlines()[:3])
    ids = np.array([e.ids for e in encodings], np.int32)
    mask = np.array([e.attention_mask for e in encodings], np.int32)
    (vectors,) = session.run(["output"], {"ids": ids, "mask": mask})
    np.testing.assert_allclose(vectors, bert.embed(model, ids, mask), rtol=1e-4, atol=1e-5)


def test_code_points_become_the_inside_of_a_class_of_characters():
    assert example.ranges([97, 98, 99, 0x1F600, 101]) == r"\u{61}-\u{63}\u{1f600}\u{65}"
    assert example.ranges([]) == ""
