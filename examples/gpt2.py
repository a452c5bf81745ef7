"""GPT-2 under the names of transformers: its checkpoints load key for key; generation is one compiled call.

Without weights a small GPT-2 learns the characters of this file for a minute, and goes on with the prompt.

    python examples/gpt2.py "class GPT2"
    python examples/gpt2.py "JAX is" --weights FOLDER    # config.json, model.safetensors, tokenizer.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The fields of ``transformers.GPT2Config`` that this model uses; GPT-2 with 124M parameters."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    eos_token_id: int | None = 50256
    tie_word_embeddings: bool = True

    @classmethod
    def from_json(cls, path: str | Path) -> GPT2Config:
        """Read the config.json of a checkpoint."""
        given = json.loads(Path(path).read_text())
        for name, value in FIXED.items():
            if given.get(name, value) != value:
                raise ValueError(f"{path}: {name}={given[name]!r}; this model has {value!r} alone")
        return cls(**{f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given})


# Other values of these fields are other models.
FIXED = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


class Conv1D(nn.Module):
    """A linear layer whose weight lies as ``(in, out)``; GPT's code called it a convolution."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.weight = nn.Parameter(jnp.zeros((nx, nf)))
        self.bias = nn.Parameter(jnp.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        return x @ self.weight + self.bias  # (..., nx) -> (..., nf)


class GPT2Attention(nn.Module):
    """Causal attention of several heads."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is no multiple of n_head={config.n_head}")
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, cache=None, start=0, seen=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).reshape(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(k, v, start)  # (B, H, S, D)
        dropout_p = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, seen, dropout_p, is_causal=seen is None)
        y = jnp.moveaxis(y, 1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class GPT2MLP(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner)
        self.act = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))  # (B, T, C)


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x, *cached):
        x = x + self.attn(self.ln_1(x), *cached)
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    """Tokens to hidden states."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([GPT2Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, input_ids, positions=None, caches=None, *cached):
        positions = jnp.arange(input_ids.shape[1]) if positions is None else positions
        x = self.drop(self.wte(input_ids) + self.wpe(positions))  # (B, T) -> (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x) if caches is None else block(x, caches[i], *cached)
        return self.ln_f(x)


class GPT2LMHeadModel(nn.Module):
    """Source: Radford et al., Language models are unsupervised multitask learners, 2019;
    ``transformers.GPT2LMHeadModel``."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
            self.register_load_state_dict_pre_hook(_tied_head)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two to a block add to the residual stream
                nn.init.normal_(p, std=config.initializer_range / math.sqrt(2 * config.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, std=config.initializer_range)

    def forward(self, input_ids: jax.Array) -> jax.Array:
        return self.lm_head(self.transformer(input_ids))  # (B, T) -> (B, T, vocab_size)


def _tied_head(module, state_dict, prefix, *_):
    """Give the head its weight where a file has it once, as `save_pretrained` writes it."""
    weight = state_dict.get(prefix + "transformer.wte.weight")
    if weight is not None:
        state_dict.setdefault(prefix + "lm_head.weight", weight)


class KVCache(nn.Module):
    """Keys and values of a layer's earlier positions, in buffers with room for all of them."""

    def __init__(self, *shape: int, dtype):
        super().__init__()
        self.keys = nn.Buffer(jnp.zeros(shape, dtype))  # (B, H, S, D)
        self.values = nn.Buffer(jnp.zeros(shape, dtype))

    def extend(self, keys, values, start):
        """Write those of positions from `start` on, each (B, H, T, D); return those of all."""
        self.keys = jax.lax.dynamic_update_slice_in_dim(self.keys, keys, start, axis=2)
        self.values = jax.lax.dynamic_update_slice_in_dim(self.values, values, start, axis=2)
        return self.keys, self.values


class GPT2Decoder(nn.Module):
    """A `GPT2LMHeadModel` that reads texts piece by piece, with room for S tokens of B texts."""

    def __init__(self, model: GPT2LMHeadModel, B: int, S: int):
        super().__init__()
        self.model, c = model, model.config
        shape, dtype = (B, c.n_head, S, c.n_embd // c.n_head), model.lm_head.weight.dtype
        self.caches = nn.ModuleList(KVCache(*shape, dtype=dtype) for _ in range(c.n_layer))

    def forward(self, ids, mask, start):
        """Return the logits after the last of ids (B, T), which go on at `start`; mask is (B, S)."""
        (_, T), S = ids.shape, mask.shape[1]
        positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)  # (B, S), the first token's is 0
        positions = jax.lax.dynamic_slice_in_dim(positions, start, T, axis=1)
        query, key = start + jnp.arange(T)[:, None], jnp.arange(S)
        # What stands before a text sees itself: a softmax over nothing is NaN.
        seen = (key == query) | (key < query) & mask[:, None, None].astype(bool)  # (B, 1, T, S)
        hidden = self.model.transformer(ids, positions, self.caches, start, seen)
        return self.model.lm_head(hidden[:, -1])  # (B, vocab_size)


def choose(logits, key=None, temperature=1.0, top_k=None, top_p=None):
    """Return the likeliest tokens (B,) of logits (B, vocab_size); with a key, draw them."""
    if key is None:
        return logits.argmax(-1)
    logits = logits.astype(jnp.float32) / temperature
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits)
    falling, tokens = jax.lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))
    if top_p is not None:
        p = jax.nn.softmax(falling)
        # Those before a token that is kept have less than top_p together.
        falling = jnp.where(jnp.cumsum(p, -1) - p < top_p, falling, -jnp.inf)
    drawn = jax.random.categorical(key, falling)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=1)[:, 0]


def decode(decoder, ids, mask, max_new_tokens, stop, choose=choose, key=None):
    """Continue texts of one length by a decoder whose buffers hold what it has read.

    Args:
        decoder: gives logits ``(B, vocab_size)`` for ``decoder(ids, mask, start)``, as `GPT2Decoder`.
        ids: ``(B, T)``.
        mask: ``(B, T)``, 0 before the text of a row and 1 in it.
        max_new_tokens: how many tokens to add; the loop ends when all rows have ended.
        stop: tokens that end a row, ``(N,)``; what follows them is the first of these.
        choose: a function of logits and a key.
        key: for all steps; None for a `choose` that draws nothing.

    Returns:
        ``(B, T + max_new_tokens)``.
    """
    (B, T), S = ids.shape, ids.shape[1] + max_new_tokens
    end = stop[0] if len(stop) else 0
    mask = jnp.pad(mask, ((0, 0), (0, max_new_tokens)), constant_values=1)

    def unfinished(carry):
        _, position, _, ended, _ = carry
        return (position < S) & ~ended.all()

    def step(carry):
        decoder, position, tokens, ended, logits = carry
        drawn = choose(logits, None if key is None else jax.random.fold_in(key, position))
        token = jnp.where(ended, end, drawn.astype(ids.dtype))
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, position))
        logits = decoder(token[:, None], mask, position)
        return decoder, position + 1, tokens, ended | jnp.isin(token, stop), logits

    tokens = jnp.pad(ids, ((0, 0), (0, max_new_tokens)), constant_values=end)
    start = decoder, T, tokens, jnp.zeros(B, bool), decoder(ids, mask, jnp.array(0))
    return nn.while_loop(unfinished, step, start)[2]


@functools.partial(nn.jit, static_argnames=("max_new_tokens", "do_sample", "top_k"))
def generate(
    model,
    input_ids,
    attention_mask=None,
    *,
    max_new_tokens,
    do_sample=False,
    temperature=1.0,
    top_k=None,
    top_p=None,
    eos_token_id=None,
):
    """Continue prompts, with keys and values of earlier positions kept; one compiled call.

    Args:
        model: a `GPT2LMHeadModel` in eval mode.
        input_ids: ``(B, T)``; shorter prompts stand at the right end.
        attention_mask: ``(B, T)``, 0 before a shorter prompt and 1 in it; None for prompts of one length.
        max_new_tokens: how many tokens to add; the loop ends when all rows have ended.
        do_sample: draw from the distribution, by `nn.default_generator`, and do not take the likeliest.
        temperature: the logits are divided by it; above 0.
        top_k: draw from so many of the likeliest; None for all.
        top_p: draw from the fewest of the likeliest that have this probability together; None for all.
        eos_token_id: a token or several that end a row; None for the one of the model's config.

    Returns:
        tokens ``(B, T + max_new_tokens)``; after a token that ended a row, the first of `eos_token_id`.
    """
    config = model.config
    (B, T), S = input_ids.shape, input_ids.shape[1] + max_new_tokens
    if model.training:
        raise ValueError("generate: the model is in training mode; call model.eval() before")
    if not (T and max_new_tokens > 0 and S <= config.n_positions):
        raise ValueError(
            f"generate: {T} tokens and {max_new_tokens} new ones; at least one of each, and at most "
            f"n_positions={config.n_positions} together"
        )
    eos_token_id = config.eos_token_id if eos_token_id is None else eos_token_id
    stop = jnp.array([] if eos_token_id is None else eos_token_id, input_ids.dtype).reshape(-1)
    mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
    chosen = functools.partial(choose, temperature=temperature, top_k=top_k, top_p=top_p)
    key = nn.next_key() if do_sample else None
    return decode(GPT2Decoder(model, B, S), input_ids, mask, max_new_tokens, stop, chosen, key)


def load_gpt2(folder: str | Path) -> GPT2LMHeadModel:
    """Build the model that a folder of `save_pretrained` or of the Hugging Face hub describes."""
    config = GPT2Config.from_json(Path(folder) / "config.json")
    with nn.device("meta"):  # shapes alone: the numbers come from the file
        model = GPT2LMHeadModel(config)
    # The files of 2019 hold the causal masks as well, and no head.
    state = nn.load(
        folder, names=lambda name: not name.endswith((".attn.bias", ".attn.masked_bias"))
    )
    headless = not any(name.startswith("transformer.") for name in state)
    target = model.transformer if headless else model
    target.load_state_dict(state, assign=True)
    return model.eval()


@nn.jit
def train_step(model, opt, tokens):
    """One step on windows ``(B, T + 1)``; the next character is the target."""

    def loss_of(model):
        logits = model(tokens[:, :-1])  # (B, T, vocab_size)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))

    loss, grads = nn.value_and_grad(loss_of)(model)
    opt.step(grads)
    return loss


def train(text: str, steps: int) -> tuple[GPT2LMHeadModel, list[str]]:
    """Train a small GPT-2 on the characters of a text; return it and the characters by number."""
    letters = sorted(set(text))
    data = np.array([letters.index(c) for c in text], np.int32)
    nn.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            len(letters), n_positions=256, n_embd=128, n_layer=2, n_head=4, eos_token_id=None
        )
    )
    opt = nn.Optimizer(model, optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3)))
    rng = np.random.default_rng(0)
    progress = tqdm(range(steps), desc="gpt2", unit="step")
    for i in progress:
        starts = rng.integers(0, len(data) - 64, 16)
        loss = train_step(model, opt, data[starts[:, None] + np.arange(65)])
        if i % 20 == 0:
            progress.set_postfix(loss=f"{float(loss):.3f}")
    return model.eval(), letters


def main(argv: list[str] | None = None) -> str:
    """Print and return the continuation of a prompt."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="class GPT2")
    parser.add_argument("--weights", metavar="FOLDER", help="a checkpoint in the layout of the hub")
    parser.add_argument("--tokens", type=int, default=200, help="how many to add")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 for the likeliest token")
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--top-p", type=float, default=None)
    parser.add_argument("--steps", type=int, default=600, help="of training, without weights")
    args = parser.parse_args(argv)

    if args.weights:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(
                "GPT-2 reads text by its tokenizer: pip install tokenizers"
            ) from error
        model = load_gpt2(args.weights)
        tokenizer = Tokenizer.from_file(str(Path(args.weights) / "tokenizer.json"))
        encode, decode = lambda text: tokenizer.encode(text).ids, tokenizer.decode
    else:
        model, letters = train(Path(__file__).read_text(), args.steps)
        encode = lambda text: [letters.index(c) for c in text]
        decode = lambda ids: "".join(letters[i] for i in ids)
    tokens = generate(
        model,
        jnp.asarray([encode(args.prompt)], jnp.int32),
        max_new_tokens=args.tokens,
        do_sample=args.temperature > 0,
        temperature=args.temperature or 1.0,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    text = decode(tokens[0].tolist())
    print(text)
    return text


if __name__ == "__main__":
    main()
