"""The GPT-2 example: folders of transformers, and generation token by token as transformers does it."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gpt2
import statefulnn as nn
from tests.examples.reference import FULL, assert_close, safetensors_torch, transformers

END = 5
SIZES = {
    "vocab_size": 97,
    "n_positions": 48,
    "n_embd": 32,
    "n_layer": 1,  # each takes long to compile; two where their order or their files matter
    "n_head": 4,
    # Larger than usual, so that the likeliest token is not always the last one again.
    "initializer_range": 0.5,
    "eos_token_id": END,
}


def pair(seed=0, **changes):
    """Return ours and transformers' with its weights."""
    torch.manual_seed(seed)
    sizes = {**SIZES, **changes}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=None)
    ).eval()
    ours = gpt2.GPT2LMHeadModel(gpt2.GPT2Config(**sizes)).eval()
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    return ours, theirs


def prompts(rows=4, length=6, seed=0):
    # No END in the prompt.
    return np.random.default_rng(seed).integers(END + 1, 97, (rows, length)).astype(np.int32)


def theirs_greedily(theirs, ids, count, end=END):
    ids = torch.tensor(ids.astype(np.int64))
    with torch.no_grad():
        return theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=end,
        ).numpy()


# --------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.long) for i in (1, 2))])
def test_greedy_tokens_are_those_of_transformers(seed):
    ours, theirs = pair(seed, n_layer=2)
    ids = prompts(seed=seed)
    expected = theirs_greedily(theirs, ids, 40)
    found = np.asarray(gpt2.generate(ours, ids, max_new_tokens=40))
    assert found.shape == (4, 46) and found.dtype == np.int32
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert (found[:, expected.shape[1] :] == END).all()
    assert len(np.unique(found)) > 10


def test_rows_end_with_the_end_of_text_and_others_go_on():
    _, theirs = pair()
    ids = prompts(rows=24)
    new = theirs_greedily(theirs, ids, 30)[:, ids.shape[1] :]
    rows_with = {int(t): int((new == t).any(1).sum()) for t in np.unique(new)}
    end = min(rows_with, key=lambda t: abs(rows_with[t] - 12))
    assert 0 < rows_with[end] < 24
    ours, theirs = pair(eos_token_id=end)
    found = np.asarray(gpt2.generate(ours, ids, max_new_tokens=30))
    np.testing.assert_array_equal(found, theirs_greedily(theirs, ids, 30, end))


@pytest.mark.long
def test_greedy_tokens_of_full_size_are_those_of_transformers():
    ours, theirs = FULL["gpt2"].pair()
    ids = np.random.default_rng(0).integers(0, 50000, (2, 16)).astype(np.int32)
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(ids.astype(np.int64)),
            max_new_tokens=100,
            do_sample=False,
            attention_mask=torch.ones(2, 16, dtype=torch.long),
            pad_token_id=50256,
        ).numpy()
    found = np.asarray(gpt2.generate(ours, ids, max_new_tokens=100))
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)


def test_generation_with_a_cache_is_generation_without():
    ours, _ = pair()
    ids = prompts()
    found = gpt2.generate(ours, ids, max_new_tokens=40)
    logits = nn.jit(ours)(found[:, :-1])
    likeliest = np.asarray(logits.argmax(-1))[:, ids.shape[1] - 1 :]
    new = np.asarray(found)[:, ids.shape[1] :]
    before_end = np.cumsum(new == END, axis=1) - (new == END) == 0
    np.testing.assert_array_equal(new[before_end], likeliest[before_end])


def test_sampled_tokens_follow_the_distribution_of_transformers():
    ours, theirs = pair()
    prompt = prompts(rows=1)
    with torch.no_grad():
        logits = theirs(torch.tensor(prompt.astype(np.int64))).logits[0, -1] / 2.0
    kept = torch.topk(logits, 6)
    expected = np.zeros(97)
    expected[kept.indices.numpy()] = torch.softmax(kept.values.double(), 0).numpy()
    rows = 4000
    found = gpt2.generate(
        ours, np.repeat(prompt, rows, 0), max_new_tokens=1, do_sample=True, temperature=2.0, top_k=6
    )
    counts = np.bincount(np.asarray(found)[:, -1], minlength=97)
    assert counts[expected == 0].sum() == 0
    spread = np.sqrt(rows * expected * (1 - expected))
    assert (np.abs(counts - rows * expected) <= 5 * spread + 1e-9).all()


def test_sampling_draws_by_the_generator_and_changed_weights_and_temperature_compile_nothing(
    monkeypatch,
):
    ours, _ = pair()
    calls = []
    forward = gpt2.GPT2Model.forward

    def counted(self, *args):
        calls.append(None)
        return forward(self, *args)

    monkeypatch.setattr(gpt2.GPT2Model, "forward", counted)

    def sample(temperature):
        options = {"do_sample": True, "temperature": temperature}
        return np.asarray(gpt2.generate(ours, prompts(rows=3), max_new_tokens=9, **options))

    nn.manual_seed(1)
    first, second = sample(0.5), sample(0.5)
    traced = len(calls)
    assert traced > 0 and (first != second).any()
    nn.manual_seed(1)
    np.testing.assert_array_equal(sample(0.5), first)
    other, _ = pair(7)
    ours.load_state_dict(other.state_dict())
    nn.manual_seed(1)
    assert (sample(0.9) != first).any()
    assert len(calls) == traced


def test_the_likeliest_of_one_token_is_the_greedy_choice_which_draws_nothing():
    ours, _ = pair()
    state = np.asarray(nn.get_rng_state())
    greedy = gpt2.generate(ours, prompts(), max_new_tokens=40)
    np.testing.assert_array_equal(np.asarray(nn.get_rng_state()), state)
    sampled = gpt2.generate(ours, prompts(), max_new_tokens=40, do_sample=True, top_k=1)
    np.testing.assert_array_equal(sampled, greedy)


def test_generation_works_in_bfloat16():
    ours, _ = pair()
    ids = prompts()
    found = np.asarray(gpt2.generate(ours.to(jnp.bfloat16), ids, max_new_tokens=8))
    assert ((found >= 0) & (found < 97)).all()
    logits = nn.jit(ours)(ids)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[:, 6], np.asarray(logits[:, -1].argmax(-1)))


@pytest.mark.parametrize(
    "length, count, match",
    [(6, 43, "n_positions=48"), (0, 3, "at least one"), (6, 0, "at least one")],
)
def test_lengths_that_do_not_fit_are_refused(length, count, match):
    ours, _ = pair()
    with pytest.raises(ValueError, match=match):
        gpt2.generate(ours, prompts(length=length), max_new_tokens=count)


def test_the_last_position_can_be_used():
    ours, theirs = pair(n_positions=10)
    found = np.asarray(gpt2.generate(ours, prompts(), max_new_tokens=4))
    np.testing.assert_array_equal(found, theirs_greedily(theirs, prompts(), 4))


def test_generation_in_training_mode_is_refused():
    ours, _ = pair()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        gpt2.generate(ours.train(), prompts(), max_new_tokens=3)


def test_text_longer_than_the_positions_is_not_read_as_something_else():
    ours, _ = pair()
    assert np.isnan(np.asarray(nn.jit(ours)(prompts(rows=1, length=49)))).any()


# --------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_folder_of_save_pretrained_loads_key_for_key(shard, tmp_path):
    _, theirs = pair(n_layer=2)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    assert "lm_head.weight" not in nn.load(tmp_path)  # the tied weight is there once
    ours = gpt2.load_gpt2(tmp_path)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    ids = prompts()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids.astype(np.int64))).logits.numpy()
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
        expected = theirs(torch.tensor(ids.astype(np.int64))).logits.numpy()
    assert_close(nn.jit(ours)(ids), expected)


def test_file_in_the_hubs_first_layout_loads(tmp_path):
    # Without a head and a prefix, and with the causal masks, as openai-community/gpt2 has them.
    _, theirs = pair(n_layer=2)
    state = {k: v.contiguous() for k, v in theirs.transformer.state_dict().items()}
    for i in range(2):
        state[f"h.{i}.attn.bias"] = torch.tril(torch.ones(1, 1, 48, 48))
    safetensors_torch.save_file(state, tmp_path / "model.safetensors")
    theirs.config.save_pretrained(tmp_path)
    ours = gpt2.load_gpt2(tmp_path)
    ids = prompts()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids.astype(np.int64))).logits.numpy()
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
    _, theirs = pair(eos_token_id=None)
    theirs.save_pretrained(tmp_path)
    text = gpt2.main(["abc", "--weights", str(tmp_path), "--tokens", "5", "--temperature", "0"])
    assert text.replace(" ", "").startswith("abc")
