"""The GPT-2 example: folders of transformers, and generation token by token as transformers does it."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gpt2
import statefulnn as nn
from tests.examples.reference import FULL, assert_close, safetensors_torch, to_torch, transformers

END = 5
SIZES = {
    "vocab_size": 97,
    "n_positions": 46,  # the prompts and 40 more, so that the last one is used
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    # Larger than usual, so that the likeliest token is not always the last one again.
    "initializer_range": 0.5,
    "eos_token_id": END,
}


@functools.cache
def built(seed, **changes):
    torch.manual_seed(seed)
    sizes = {**SIZES, **changes}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=None)
    ).eval()
    ours = gpt2.GPT2LMHeadModel(gpt2.GPT2Config(**sizes)).eval()
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    return ours, theirs


def pair(seed=0, **changes):
    """Return ours, which may be changed, and transformers' with its weights, which may not."""
    ours, theirs = built(seed, **changes)
    return copy.deepcopy(ours), theirs


def prompts(rows=4, length=6, seed=0):
    # No END in the prompt.
    return np.random.default_rng(seed).integers(END + 1, 97, (rows, length)).astype(np.int32)


def before(*lengths, width=6):
    """Return the mask of prompts of these lengths."""
    return (np.arange(width) >= width - np.array(lengths)[:, None]).astype(np.int32)


def theirs_greedily(theirs, ids, count, end: int | tuple = END, mask=None):
    mask = np.ones_like(ids) if mask is None else mask
    stop = list(end) if isinstance(end, tuple) else [end]
    with torch.no_grad():
        found = theirs.generate(
            to_torch(ids),
            attention_mask=to_torch(mask),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop[0],
        ).numpy()
    # It stops where all rows have ended.
    rest = ((0, 0), (0, ids.shape[1] + count - found.shape[1]))
    return np.pad(found, rest, constant_values=stop[0])


def likeliest(model, found, mask=None):
    """Return what a model without a cache finds likeliest after each token, each row without its padding."""
    padding = np.zeros(len(found), int) if mask is None else (mask == 0).sum(1)
    # What stands behind a text changes nothing before it.
    rows = np.stack([np.roll(row, -n) for row, n in zip(np.asarray(found), padding, strict=True)])
    best = np.asarray(nn.jit(model)(rows).argmax(-1))
    return np.stack([np.roll(row, n) for row, n in zip(best, padding, strict=True)])


# --------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.long) for i in (1, 2))])
def test_greedy_tokens_are_those_of_transformers_up_to_the_last_position(seed):
    ours, theirs = pair(seed)
    ids = prompts(seed=seed)
    found = np.asarray(gpt2.generate(ours, ids, max_new_tokens=40))
    assert found.shape == (4, 46) and found.dtype == np.int32
    np.testing.assert_array_equal(found, theirs_greedily(theirs, ids, 40))
    assert len(np.unique(found)) > 10


def test_prompts_of_several_lengths_end_at_one_of_several_tokens_as_in_transformers():
    ours, theirs = pair(n_layer=1)
    ids, mask, none = prompts(), before(6, 1, 3, 5), 97

    def generated(*stop):
        options = {"max_new_tokens": 16, "eos_token_id": stop}
        found = np.asarray(gpt2.generate(ours, ids, mask, **options))
        np.testing.assert_array_equal(found, theirs_greedily(theirs, ids, 16, stop, mask))
        return found

    found = generated(none, none)
    np.testing.assert_array_equal(found[:, 6:], likeliest(ours, found, mask)[:, 5:-1])
    rows_with = {t: (found[:, 6:] == t).any(1).sum() for t in np.unique(found[:, 6:])}
    ends = [t for t, rows in rows_with.items() if rows == 1][:2]
    ended = np.isin(generated(*ends)[:, 6:], ends).any(1)
    assert len(ends) == 2 and 0 < ended.sum() < 4


@pytest.mark.long
def test_greedy_tokens_of_full_size_are_those_of_transformers():
    ours, theirs = FULL["gpt2"].pair()
    ids = np.random.default_rng(0).integers(0, 50000, (2, 16)).astype(np.int32)
    with torch.no_grad():
        expected = theirs.generate(
            to_torch(ids),
            max_new_tokens=100,
            do_sample=False,
            attention_mask=torch.ones(2, 16, dtype=torch.long),
            pad_token_id=50256,
        ).numpy()
    found = np.asarray(gpt2.generate(ours, ids, max_new_tokens=100))
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)


def test_generation_with_a_cache_is_generation_without():
    ours, _ = pair()
    found = np.asarray(gpt2.generate(ours, prompts(), max_new_tokens=40))
    new, best = found[:, 6:], likeliest(ours, found)[:, 5:-1]
    before_end = np.cumsum(new == END, axis=1) - (new == END) == 0
    np.testing.assert_array_equal(new[before_end], best[before_end])


def assert_follows(counts, expected):
    """Compare counts of draws with probabilities; those of 0 are never drawn."""
    rows = counts.sum()
    spread = np.sqrt(rows * expected * (1 - expected))
    assert counts[expected == 0].sum() == 0
    assert (np.abs(counts - rows * expected) <= 5 * spread + 1e-9).all()


OPTIONS = [{}, {"top_k": 6}, {"top_p": 0.7}, {"top_k": 12, "top_p": 0.8}, {"top_k": 500}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) + str(o.get("top_k", "")))
def test_draws_follow_the_distribution_of_transformers(options):
    logits = np.random.default_rng(0).normal(0, 2, (1, 97)).astype(np.float32)
    kinds = transformers.generation
    warped = kinds.TemperatureLogitsWarper(2.0)(None, torch.tensor(logits))
    if "top_k" in options:
        warped = kinds.TopKLogitsWarper(options["top_k"])(None, warped)
    if "top_p" in options:
        warped = kinds.TopPLogitsWarper(options["top_p"])(None, warped)
    many = jnp.asarray(logits).repeat(4000, 0)
    found = gpt2.choose(many, jax.random.key(0), temperature=2.0, **options)
    expected = torch.softmax(warped[0].double(), 0).numpy()
    assert_follows(np.bincount(np.asarray(found), minlength=97), expected)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}], ids=["top_k", "top_p"])
def test_the_likeliest_of_one_token_is_the_greedy_choice(options):
    logits = jax.random.normal(jax.random.key(1), (20, 97))
    drawn = gpt2.choose(logits, jax.random.key(0), **options)
    np.testing.assert_array_equal(drawn, gpt2.choose(logits))
    np.testing.assert_array_equal(drawn, np.argmax(np.asarray(logits), -1))


def test_sampled_tokens_follow_the_distribution_of_transformers():
    ours, theirs = pair(n_layer=1)
    prompt = prompts(rows=1)
    with torch.no_grad():
        logits = theirs(to_torch(prompt)).logits[0, -1] / 2.0
    kept = torch.topk(logits, 6)
    expected = np.zeros(97)
    expected[kept.indices.numpy()] = torch.softmax(kept.values.double(), 0).numpy()
    options = {"do_sample": True, "temperature": 2.0, "top_k": 6}
    found = gpt2.generate(ours, np.repeat(prompt, 4000, 0), max_new_tokens=1, **options)
    assert_follows(np.bincount(np.asarray(found)[:, -1], minlength=97), expected)


def test_only_sampling_draws_and_other_numbers_of_the_same_shapes_compile_nothing(monkeypatch):
    ours, _ = pair(n_layer=1)
    calls = []
    forward = gpt2.GPT2Model.forward

    def counted(self, *args):
        calls.append(None)
        return forward(self, *args)

    monkeypatch.setattr(gpt2.GPT2Model, "forward", counted)

    def sample(temperature=0.5, top_p=0.9, lengths=(6, 6, 2), **stop):
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, **stop}
        mask = before(*lengths)
        return np.asarray(gpt2.generate(ours, prompts(3), mask, max_new_tokens=9, **options))

    state = np.asarray(nn.get_rng_state())
    gpt2.generate(ours, prompts(3), max_new_tokens=9)
    np.testing.assert_array_equal(np.asarray(nn.get_rng_state()), state)
    nn.manual_seed(1)
    first, second = sample(), sample()
    traced = len(calls)
    assert traced > 0 and (first != second).any()
    nn.manual_seed(1)
    np.testing.assert_array_equal(sample(), first)
    other, _ = pair(7, n_layer=1)
    changes: tuple[dict[str, Any], ...] = (
        {"temperature": 0.9},
        {"top_p": 0.2},
        {"lengths": (1, 6, 4)},
        {"temperature": 3.0, "top_p": 1.0},
    )
    for changed in changes:
        nn.manual_seed(1)
        assert (sample(**changed) != first).any()
    ours.load_state_dict(other.state_dict())
    nn.manual_seed(1)
    assert (sample() != first).any()
    assert len(calls) == traced


def test_generation_works_in_bfloat16():
    ours, _ = pair(n_layer=1)
    ids = prompts()
    found = np.asarray(gpt2.generate(ours.to(jnp.bfloat16), ids, max_new_tokens=2))
    assert ((found >= 0) & (found < 97)).all()
    logits = nn.jit(ours)(ids)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[:, 6], np.asarray(logits[:, -1].argmax(-1)))


@pytest.mark.parametrize(
    "length, count, match",
    [(6, 41, "n_positions=46"), (0, 3, "at least one"), (6, 0, "at least one")],
)
def test_lengths_that_do_not_fit_are_refused(length, count, match):
    ours, _ = pair()
    with pytest.raises(ValueError, match=match):
        gpt2.generate(ours, prompts(length=length), max_new_tokens=count)


def test_generation_in_training_mode_is_refused():
    ours, _ = pair()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        gpt2.generate(ours.train(), prompts(), max_new_tokens=3)


def test_text_longer_than_the_positions_is_not_read_as_something_else():
    ours, _ = pair(n_layer=1)
    assert np.isnan(np.asarray(nn.jit(ours)(prompts(rows=1, length=47)))).any()


# --------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_folder_of_save_pretrained_loads_key_for_key(shard, tmp_path):
    _, theirs = pair()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    assert "lm_head.weight" not in nn.load(tmp_path)  # the tied weight is there once
    ours = gpt2.load_gpt2(tmp_path)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    ids = prompts()
    with torch.no_grad():
        expected = theirs(to_torch(ids)).logits.numpy()
    assert_close(nn.jit(ours)(ids), expected)


@pytest.mark.long
def test_folder_of_full_size_in_shards_loads_key_for_key(tmp_path):
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="100MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    ours = gpt2.load_gpt2(tmp_path)
    assert sum(p.size for p in ours.parameters()) == 124_439_808 == theirs.num_parameters()
    ids = np.random.default_rng(0).integers(0, 50257, (2, 128)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(to_torch(ids)).logits.numpy()
    assert_close(nn.jit(ours)(ids), expected)


def test_file_in_the_hubs_first_layout_loads(tmp_path):
    # Without a head and a prefix, and with the causal masks, as openai-community/gpt2 has them.
    _, theirs = pair()
    state = {k: v.contiguous() for k, v in theirs.transformer.state_dict().items()}
    for i in range(2):
        state[f"h.{i}.attn.bias"] = torch.tril(torch.ones(1, 1, 46, 46))
    safetensors_torch.save_file(state, tmp_path / "model.safetensors")
    theirs.config.save_pretrained(tmp_path)
    ours = gpt2.load_gpt2(tmp_path)
    ids = prompts()
    with torch.no_grad():
        expected = theirs(to_torch(ids)).logits.numpy()
    assert_close(nn.jit(ours)(ids), expected)


def test_tied_model_inside_another_loads_without_the_head():
    ours, _ = pair()
    outer = nn.Sequential(gpt2.GPT2LMHeadModel(ours.config))
    state = {f"0.{k}": v for k, v in ours.state_dict().items() if k != "lm_head.weight"}
    outer.load_state_dict(state)
    np.testing.assert_array_equal(outer[0].lm_head.weight.value, ours.transformer.wte.weight.value)


def test_config_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"activation_function": "relu"}))
    with pytest.raises(ValueError, match="activation_function='relu'.*'gelu_new' alone"):
        gpt2.load_gpt2(tmp_path)


# --------------------------------------------------------------------------------------------------
# The program


def test_program_trains_and_writes(capsys):
    text = gpt2.main(["class", "--steps", "2", "--tokens", "20"])
    assert text.startswith("class") and len(text) == 25
    assert text in capsys.readouterr().out


@pytest.mark.long
def test_program_learns_its_own_text():
    source = open(gpt2.__file__).read()
    model, letters = gpt2.train(source, 600)
    ids = np.array([[letters.index(c) for c in source[1000:1128]]], np.int32)
    logits = nn.jit(model)(ids[:, :-1])
    loss = float(-jax.nn.log_softmax(logits)[0, np.arange(127), ids[0, 1:]].mean())
    assert loss < 2.0 < np.log(len(letters))


def test_program_reads_a_folder_of_the_hub(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    letters = {c: i for i, c in enumerate("abcdefghij ")}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({**letters, "<|endoftext|>": END + 90}, [])
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _, theirs = pair(n_layer=1, eos_token_id=None)
    theirs.save_pretrained(tmp_path)
    text = gpt2.main(["abc", "--weights", str(tmp_path), "--tokens", "5", "--temperature", "0"])
    assert text.replace(" ", "").startswith("abc")
