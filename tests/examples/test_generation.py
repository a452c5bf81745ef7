"""docs/generation.md: the loop around models of transformers that were converted with their caches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gpt2
import statefulnn as nn
from tests.examples.reference import SIZES, to_torch, transformers
from tests.test_docs import ROOT, blocks

CODE = [code for _, _, code in blocks(ROOT / "docs/generation.md")]
(CONVERTED,) = [code for code in CODE if "StaticCache" in code]
(DECODED,) = [code for code in CODE if "class Decoder" in code]
(WITHOUT_CACHE,) = [code for code in CODE if "def without_cache" in code]
IDS = np.random.default_rng(0).integers(6, 97, (2, 4)).astype(np.int32)
MASK = np.array([[1, 1, 1, 1], [0, 0, 1, 1]], np.int32)


def greedily(theirs, ids, mask, end=5):
    with torch.no_grad():
        return theirs.generate(
            to_torch(ids),
            attention_mask=to_torch(mask),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        ).numpy()


def assert_begins_with(found, expected):
    # That of transformers stops where all rows have ended.
    np.testing.assert_array_equal(np.asarray(found)[:, : expected.shape[1]], expected)


@pytest.fixture(scope="module")
def names():
    """Run the blocks of the page on a converted model, and return its names."""
    names = {"nn": nn, "jax": jax, "jnp": jnp, "decode": gpt2.decode}
    names |= {"input_ids": jnp.asarray(IDS), "attention_mask": jnp.asarray(MASK)}
    torch.manual_seed(0)
    exec(CONVERTED.replace("bos_token_id=None", "bos_token_id=None, initializer_range=0.5"), names)
    names["by_greedily"] = names["tokens"]
    exec(DECODED, names)
    return names


def test_the_page_continues_a_llama_with_its_cache_in_buffers(names):
    expected = greedily(names["theirs"], IDS, np.ones_like(MASK), end=97)  # which is no token
    np.testing.assert_array_equal(names["by_greedily"], expected)
    assert_begins_with(names["tokens"], greedily(names["theirs"], IDS, MASK))


def test_one_converted_decoder_takes_prompts_of_other_lengths_by_one_program(names):
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)).eval()
    cache = transformers.StaticCache(config=theirs.config, max_cache_len=12)
    given = {"attention_mask": torch.ones(2, 12).long(), "position_ids": torch.ones(2, 3).long()}
    given = {**given, "cache": cache}
    model = nn.bridge.torch.from_torch(theirs, to_torch(IDS[:, :3]), kwargs=given)
    decoder = names["Decoder"](model)
    traces = []

    @nn.jit
    def continued(decoder, mask):
        traces.append(None)
        return gpt2.decode(decoder, jnp.asarray(IDS), mask, 8, jnp.array([5]))

    for mask in (MASK, np.ones_like(MASK)):  # the second finds the buffers as the first left them
        assert_begins_with(continued(decoder, mask), greedily(theirs, IDS, mask))
    assert len(traces) == 1


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens)["logits"]


def test_without_a_cache_a_converted_gpt2_continues_as_transformers():
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, use_cache=False)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = Logits(nn.bridge.torch.from_torch(theirs, to_torch(IDS)))
    tokens = np.zeros((2, 12), np.int32)
    tokens[0, :4], tokens[1, :2] = IDS[0], IDS[1, 2:]
    names: dict[str, Any] = {"nn": nn, "jnp": jnp}
    exec(WITHOUT_CACHE[: WITHOUT_CACHE.index("prompts =")], names)
    found = np.asarray(names["without_cache"](ours, tokens, np.array([4, 2])))
    expected = greedily(theirs, IDS, MASK, end=97)  # which is no token
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1, :10], expected[1, 2:])


def test_the_wrapper_of_transformers_keeps_its_cache_between_calls():
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)).eval()
    theirs.generation_config = transformers.GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        cache_config={"batch_size": 1, "max_cache_len": 12},
    )
    wrapper = transformers.integrations.TorchExportableModuleWithStaticCache(theirs)
    first = {"input_ids": torch.tensor([[7]]), "cache_position": torch.tensor([0])}
    ours = nn.bridge.torch.from_torch(wrapper, kwargs=first, dynamic="none")
    with torch.no_grad():
        expected = theirs(to_torch(IDS[:1]), use_cache=False).logits[0].numpy()
    for place, token in enumerate(IDS[0]):
        found = ours(input_ids=jnp.array([[token]]), cache_position=jnp.array([place]))
        np.testing.assert_allclose(found[0, -1], expected[place], rtol=1e-4, atol=1e-4)
