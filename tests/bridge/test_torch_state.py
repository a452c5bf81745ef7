"""Objects with tensors among the inputs of a converted model: caches of transformers, and a user's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from statefulnn.bridge.torch import ConversionError, from_torch
from tests.examples.reference import SIZES, to_torch, transformers
from tests.quick import QUICKLY

IDS = np.random.default_rng(0).integers(6, 97, (2, 5)).astype(np.int32)
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)).eval()


def mistral():
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**GROUPED, sliding_window=4)
    ).eval()


MODELS = {
    "GPT-2": gpt2,
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)).eval(),
}


def static(theirs, size=12):
    return transformers.StaticCache(config=theirs.config, max_cache_len=size)


def full(theirs, size=12):
    return transformers.Cache(layers=[transformers.StaticLayer(size)])


def greedily(decoder, ids, count, traces):
    """Continue texts by `count` tokens; the cache holds whatever was read before."""

    def continued(decoder, ids):
        traces.append(None)
        for layer in decoder.cache.layers:
            layer.cumulative_length = jnp.zeros((), jnp.int32)
        start, end = ids.shape[1], ids.shape[1] + count
        tokens = jnp.zeros((len(ids), end), ids.dtype).at[:, :start].set(ids)
        tokens = tokens.at[:, start].set(decoder(ids).logits[:, -1].argmax(-1))

        def step(i, carry):
            decoder, tokens = carry
            last = jax.lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1)
            return decoder, tokens.at[:, i].set(decoder(last).logits[:, -1].argmax(-1))

        return nn.fori_loop(start + 1, end, step, (decoder, tokens))[1]

    return nn.jit(continued, compiler_options=QUICKLY)


def generated(theirs, ids, count):
    given = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    ids = to_torch(ids)
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), **given).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_with_a_static_cache_are_those_of_transformers_by_one_program(name):
    torch.manual_seed(0)
    theirs, traces = MODELS[name](), []
    decoder = from_torch(theirs, to_torch(IDS[:, :3]), kwargs={"cache": static(theirs)})
    continued = greedily(decoder, IDS, 7, traces)
    for ids in (IDS, IDS[::-1].copy()):  # the second finds the buffers as the first left them
        np.testing.assert_array_equal(
            continued(decoder, jnp.asarray(ids)), generated(theirs, ids, 7)
        )
    assert len(traces) == 1
    assert int(decoder.cache.layers[0].cumulative_length) == 11  # the last token was not read


def test_a_model_with_sliding_windows_takes_layers_that_keep_all_tokens():
    torch.manual_seed(0)
    theirs = mistral()
    decoder = from_torch(theirs, to_torch(IDS[:, :3]), kwargs={"cache": full(theirs)})
    found = greedily(decoder, IDS, 7, [])(decoder, jnp.asarray(IDS))
    np.testing.assert_array_equal(found, generated(theirs, IDS, 7))


def test_a_cache_begins_with_what_it_holds_and_stays_as_it_was():
    torch.manual_seed(0)
    theirs = gpt2()
    cache = static(theirs)
    with torch.no_grad():
        theirs(to_torch(IDS[:, :2]), cache=cache)
        before = cache.layers[0].keys.clone()
        decoder = from_torch(theirs, to_torch(IDS[:, :3]), kwargs={"cache": cache})
        expected = theirs(to_torch(IDS), use_cache=False).logits[:, 2:].numpy()
    np.testing.assert_array_equal(decoder.cache.layers[0].keys, before.numpy())
    found = decoder(jnp.asarray(IDS[:, 2:]))
    np.testing.assert_allclose(found.logits, expected, rtol=1e-4, atol=1e-4)
    assert found.cache is None
    assert torch.equal(cache.layers[0].keys, before) and int(cache.layers[0].cumulative_length) == 2


def test_the_model_of_torch_is_as_it_was_and_the_checkpoint_has_no_cache():
    theirs = gpt2()
    names, attributes, cache = list(theirs.state_dict()), set(vars(theirs)), static(theirs)
    decoder = from_torch(theirs, to_torch(IDS[:, :3]), kwargs={"cache": cache}, dynamic="none")
    assert list(theirs._modules) == ["transformer", "lm_head"] and set(vars(theirs)) == attributes
    assert not cache.layers[0].is_initialized
    assert list(decoder.state_dict()) == names


def test_states_of_fixed_size_that_a_model_counts_in_python_are_converted_after_a_first_call():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    fresh = {"cache": transformers.DynamicCache(config=theirs.config)}
    with pytest.raises(ConversionError, match="has_previous_state.0 is False before"):
        from_torch(theirs, to_torch(IDS[:, :3]), kwargs=fresh)
    with torch.no_grad():
        cache = theirs(to_torch(IDS[:, :2])).cache
        step = from_torch(theirs, to_torch(IDS[:, 2:3]), kwargs={"cache": cache}, dynamic="none")
        expected = theirs(to_torch(IDS)).logits.numpy()
    for i in range(2, 5):
        found = step(jnp.asarray(IDS[:, i : i + 1])).logits
        np.testing.assert_allclose(found[:, 0], expected[:, i], rtol=1e-4, atol=1e-5)


REFUSED = {
    "grows": (
        gpt2,
        lambda _: transformers.DynamicCache(),
        "StaticCache(config=config, max_cache_len=64)",
    ),
    "branches": (mistral, static, "StaticLayer(64)"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_cache_that_cannot_be_state_is_refused_with_the_one_that_can(why, capfd):
    model, cache, instead = REFUSED[why]
    theirs = model()
    with pytest.raises(ConversionError, match="Instead: ") as error:
        from_torch(theirs, to_torch(IDS[:, :3]), kwargs={"cache": cache(theirs)})
    assert instead in str(error.value)
    assert "cache" not in theirs._modules and "forward" not in vars(theirs)
    assert capfd.readouterr().out == ""


# --------------------------------------------------------------------------------------------------
# Objects of a user's own


class Memory:
    def __init__(self, **tensors):
        self.seen = []
        self.__dict__.update(tensors)


class Averaging(torch.nn.Module):
    """Adds up what it sees, in a tensor that is replaced and one that is written to."""

    def __init__(self, how="fixed"):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.how = how

    def forward(self, x, memory, shift=0.0):
        memory.total = memory.total + x.sum(0)
        memory.count.add_(x.shape[0])
        if self.how == "grows":
            memory.total = torch.cat([memory.total, x[0]])
        elif self.how == "counts":
            memory.calls = getattr(memory, "calls", 0) + 1
        elif self.how == "makes":
            memory.last = x.clone()
        return self.scale * memory.total / memory.count + shift, memory


def memory():
    return Memory(total=torch.zeros(3), count=torch.tensor(0.0), calls=0)


def test_an_object_of_a_users_own_becomes_buffers():
    theirs, x, ours_is = Averaging(), torch.randn(4, 3), memory()
    ours = from_torch(theirs, x, ours_is, torch.ones(3))
    kept = memory()
    for count in (2, 5):
        x = torch.randn(count, 3)
        expected, _ = theirs(x, kept, torch.ones(3))
        found, none = ours(jnp.asarray(x.numpy()), shift=jnp.ones(3))
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-6)
        assert none is None
    np.testing.assert_allclose(ours.memory.total, kept.total.numpy(), rtol=1e-6)
    assert sorted(n for n, _ in ours.named_buffers()) == ["memory.count", "memory.total"]
    assert float(ours_is.count) == 0 and float(ours_is.total.sum()) == 0


def test_what_comes_after_the_object_is_given_by_name():
    ours = from_torch(Averaging(), torch.randn(4, 3), memory(), torch.ones(3))
    with pytest.raises(TypeError, match="positional"):
        ours(jnp.ones((4, 3)), jnp.ones(3))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("grows", r"total was float32\(3,\) before a call and is float32\(6,\)"),
        ("counts", "calls is 0 before a call and 1 after it"),
        ("makes", r"makes tensors while it is called \(last\)"),
    ],
)
def test_an_object_that_cannot_be_state_is_refused(how, message):
    theirs = Averaging(how)
    with pytest.raises(ConversionError, match=message) as error:
        from_torch(theirs, torch.randn(4, 3), memory())
    assert "with memory, an object of type Memory" in str(error.value)
    assert not theirs._modules and "forward" not in vars(theirs)


def test_an_object_without_tensors_is_no_input():
    with pytest.raises(ConversionError, match="an example input of type Memory"):
        from_torch(Averaging(), torch.randn(4, 3), Memory())
