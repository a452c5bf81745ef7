"""A folder as sentence-transformers writes it: MiniLM's tokenizer, and a small BERT of random weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

import bert
import statefulnn as nn

# Letters with accents, scripts, signs, characters that are taken out, special tokens, words without pieces.
TEXTS = [
    "", " ", "a", "The train to the coast leaves at noon.", "don't-stop: 3.14€ (50%) <b>&amp;</b> a_b",
    "Ein Zug fährt um 12 Uhr nach Köln; ÄÖÜ ß ẞ İstanbul ﬁn",
    "Crème brûlée, naïve coöperation, e\u0301a\u0308",
    "東京は日本の首都です。 我喜欢猫 한국어 조선글", "Привет, мир! Ἀθήνα ΟΔΟΣ", "नमस्ते दुनिया สวัสดี مَرْحَبًا שָׁלוֹם",
    "👍🏽 ☃ ½ № ™ x² — “quoted” …", "tab\tnew\nline\r\nand\u2028more\u00a0spaces\u3000wide\x85end",
    "zero\u200bwidth\u200djoined\ufeff\x00\x07 soft\u00adhyphen \ufffd private\ue000use",
    "[CLS] in a text [MASK], and [SEP][PAD] [unk] [UNK]", "x" * 101, "antidisestablishmentarianism" * 3,
    "unbelievably qwxzjk 1234567890123 ñandú", "word " * 300, "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠀀𪜀 \U0001f9d1\u200d\U0001f680",
]  # fmt: skip


def write_folder(folder: Path) -> Path:
    """Write the folder, and return it."""
    source = bert.minilm_folder()
    for name in ("tokenizer.json", "sentence_bert_config.json"):
        shutil.copy(source / name, folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = bert.BertConfig(**sizes, intermediate_size=16)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    nn.manual_seed(0)
    model = bert.BertModel(config)
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.ndim == 2:
            p.value = 20 * p.value  # so that texts differ
    nn.save(model, folder / "model.safetensors")
    return folder


def read(tokenizer, texts):
    """Return the tokens of each text, without padding."""
    return [
        np.array(e.ids)[np.array(e.attention_mask) == 1].tolist()
        for e in tokenizer.encode_batch(texts)
    ]
