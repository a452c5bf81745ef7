"""What the rows cannot say about transformers: stacks, custom parts, initial values, dropout, tracing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend as TorchBackend
from torch.nn.attention import sdpa_kernel as torch_sdpa_kernel

import statefulnn as nn
import statefulnn.functional as F
from tests.parity.oracle import close, load, to_jax, to_torch
from tests.parity.rows.transformer import (
    ACROSS,
    CAUSAL_SRC,
    CAUSAL_TGT,
    SRC,
    SRC_FIRST,
    SRC_PADDING,
    TGT,
    TGT_FIRST,
    TGT_PADDING,
)
from tests.quick import diagonal, first, quickly

E, H, WIDTH = 8, 2, 12


def _stacks(kind: str, norm: bool, **options: Any) -> tuple[torch.nn.Module, nn.Module]:
    torch.manual_seed(1)
    options = {"dropout": 0.0, **options}
    # torch warns that a layer without batch_first cannot use nested tensors.
    extra = {"enable_nested_tensor": False} if kind == "Encoder" else {}
    pair = []
    for library in (torch.nn, nn):
        layer = getattr(library, f"Transformer{kind}Layer")(E, H, WIDTH, **options)
        stack = getattr(library, f"Transformer{kind}")
        pair.append(stack(layer, 3, library.LayerNorm(E) if norm else None, **extra))
    theirs, ours = pair
    for p in theirs.parameters():  # the layers differ
        torch.nn.init.normal_(p, 0.1, 0.3)
    load(ours, theirs)
    return theirs, ours


def _same(theirs: torch.nn.Module, ours: nn.Module, inputs: tuple, call: dict) -> None:
    tensors = [x.requires_grad_(True) for x in to_torch(inputs)]
    expected = theirs(*tensors, **{k: to_torch(v) for k, v in call.items()})
    (expected**2).sum().backward()
    fn, params = nn.functionalize(ours)

    @quickly
    def run(params, inputs):
        def loss(params, inputs):
            out = fn(params, *inputs, **to_jax_dict(call))
            return (out**2).sum(), out

        return jax.grad(loss, (0, 1), has_aux=True)(params, inputs)

    (by_name, by_input), out = run(params, to_jax(inputs))
    close(out, expected, "output", 2e-5)
    for name, p in theirs.named_parameters():
        close(by_name[name], p.grad, name, 1e-4)
    for got, x in zip(by_input, tensors, strict=True):
        close(got, x.grad, "input", 1e-4)


def to_jax_dict(call: dict) -> dict:
    return {k: to_jax(v) for k, v in call.items()}


CALLS = {
    "plain": {},
    "causal": {"mask": CAUSAL_SRC},
    "hint": {"mask": CAUSAL_SRC, "is_causal": True},
    "padded": {"mask": CAUSAL_SRC.astype(np.float32) * -9, "src_key_padding_mask": SRC_PADDING},
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("name, norm", diagonal(4, list(CALLS), [False, True]))
def test_encoder_computes_what_torch_does(name: str, norm: bool) -> None:
    call = CALLS[name]
    _same(*_stacks("Encoder", norm), (SRC,), call)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(
    "call",
    [
        {},
        {
            "tgt_mask": CAUSAL_TGT,
            "memory_mask": ACROSS,
            "tgt_key_padding_mask": TGT_PADDING,
            "memory_key_padding_mask": SRC_PADDING,
        },
    ],
    ids=["plain", "masked"],
)
def test_decoder_computes_what_torch_does(call: dict) -> None:
    theirs, ours = _stacks("Decoder", True, batch_first=True, norm_first=True)
    _same(theirs, ours, (TGT_FIRST, SRC_FIRST), call)


@pytest.mark.parametrize("kind", first(1, ["Decoder", "Encoder"]))
def test_second_derivatives_agree_with_torchs_formula(kind: str) -> None:
    theirs, ours = _stacks(kind, False, activation="gelu")
    inputs = (SRC,) if kind == "Encoder" else (TGT, SRC)
    direction = np.cos(np.arange(inputs[0].size, dtype=np.float32)).reshape(inputs[0].shape)
    first, *rest = to_torch(inputs)
    first.requires_grad_(True)
    with torch_sdpa_kernel(TorchBackend.MATH):
        out = theirs(first, *rest)
        (slope,) = torch.autograd.grad((out**3).sum(), first, create_graph=True)
        (wanted,) = torch.autograd.grad((slope * torch.as_tensor(direction)).sum(), first)
    x, *others = to_jax(inputs)
    fn, params = nn.functionalize(ours)
    slope_of = jax.grad(lambda x: (fn(params, x, *others) ** 3).sum())
    _, got = quickly(lambda x, d: jax.jvp(slope_of, (x,), (d,)))(x, jnp.asarray(direction))
    close(got, wanted, "Hessian times a vector", 2e-4)


def test_stacks_read_like_torchs() -> None:
    for kind in ("Encoder", "Decoder"):
        theirs, ours = _stacks(kind, True)
        assert repr(ours) == repr(theirs).replace("NonDynamicallyQuantizableLinear", "Linear")


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
def test_layers_of_a_stack_start_equal_and_are_not_shared(kind: str) -> None:
    layer = getattr(nn, f"Transformer{kind}Layer")(E, H, WIDTH)
    stack = getattr(nn, f"Transformer{kind}")(layer, 2)
    first, second = stack.layers[0].linear1.weight, stack.layers[1].linear1.weight
    assert first is not second and first is not layer.linear1.weight
    np.testing.assert_array_equal(first, second)


def test_layers_of_a_stack_are_independent_in_later_versions() -> None:
    with nn.init.version("2026.1"):
        stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256), 3)
    for name in ("linear1", "linear2", "self_attn.out_proj"):
        weights = [np.asarray(layer.get_submodule(name).weight) for layer in stack.layers]
        assert (weights[0] != weights[1]).any() and (weights[1] != weights[2]).any()
    # Variance 2/in before the relu, 1/in after it and in the output projection.
    layer = stack.layers[1]
    assert abs(layer.linear1.weight.var() * 64 / 2 - 1) < 0.1
    assert abs(layer.linear2.weight.var() * 256 - 1) < 0.1
    assert abs(layer.self_attn.out_proj.weight.var() * 64 - 1) < 0.1


def test_whole_model_draws_every_matrix_by_xavier() -> None:
    model = nn.Transformer(64, 4, 2, 1, 128)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            bound = np.sqrt(6 / sum(p.shape))
            values = np.asarray(p)
            assert np.abs(values).max() <= bound, name
            assert abs(values.var() / (bound**2 / 3) - 1) < 0.1, name
    weights = [np.asarray(layer.linear1.weight) for layer in model.encoder.layers]
    assert (weights[0] != weights[1]).any()


def test_custom_encoder_and_decoder_are_called_as_torchs_are() -> None:
    class TheirEncoder(torch.nn.Module):
        def forward(self, src, **kwargs):
            return src * 2, list(kwargs)

    class OurEncoder(nn.Module):
        def forward(self, src, **kwargs):
            return src * 2, list(kwargs)

    class TheirDecoder(torch.nn.Module):
        def forward(self, tgt, memory, **kwargs):
            return tgt + memory[0][: tgt.shape[0]], memory[1], list(kwargs)

    class OurDecoder(nn.Module):
        def forward(self, tgt, memory, **kwargs):
            return tgt + memory[0][: tgt.shape[0]], memory[1], list(kwargs)

    theirs = torch.nn.Transformer(E, custom_encoder=TheirEncoder(), custom_decoder=TheirDecoder())
    ours = nn.Transformer(E, custom_encoder=OurEncoder(), custom_decoder=OurDecoder())
    expected = theirs(*to_torch((SRC, TGT)))
    out = ours(*to_jax((SRC, TGT)))
    close(out[0], expected[0], "output", 1e-6)
    assert list(out[1:]) == list(expected[1:])


@pytest.mark.parametrize("activation", ["silu", "module"])
def test_activation_may_be_a_function_or_a_module(activation: str) -> None:
    made = {"silu": (torch.nn.functional.silu, F.silu), "module": (torch.nn.GELU(), nn.GELU())}
    theirs, ours = (
        library.TransformerEncoderLayer(E, H, WIDTH, 0.0, chosen)
        for library, chosen in zip((torch.nn, nn), made[activation], strict=True)
    )
    load(ours, theirs)
    close(ours(jnp.asarray(SRC)), theirs(torch.as_tensor(SRC)), "output", 2e-5)
    assert repr(ours) == repr(theirs).replace("NonDynamicallyQuantizableLinear", "Linear")


@pytest.mark.parametrize("size", [0, 1, 4])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_generated_mask_is_torchs(size: int, dtype: str | None) -> None:
    theirs = torch.nn.Transformer.generate_square_subsequent_mask(
        size, dtype=None if dtype is None else getattr(torch, dtype)
    )
    ours = nn.Transformer.generate_square_subsequent_mask(size, dtype=dtype)
    assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
    close(ours, theirs, "mask", 0)


def test_float32_mask_serves_a_low_precision_model() -> None:
    theirs, ours = _stacks("Encoder", True)
    theirs, ours = theirs.bfloat16(), ours.to(jnp.bfloat16)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    expected = theirs(torch.as_tensor(SRC).bfloat16(), mask)
    out = ours(jnp.asarray(SRC, jnp.bfloat16), jnp.asarray(mask.numpy()))
    assert out.dtype == jnp.bfloat16
    close(out, expected, "output", 5e-2)


def test_dropout_acts_in_training_only_and_advances() -> None:
    layer = nn.TransformerEncoderLayer(E, H, WIDTH, 0.5)
    x = jnp.asarray(SRC)
    assert (layer(x) != layer(x)).any()
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))


def test_copies_and_pickles_compute_the_same() -> None:
    model = nn.Transformer(E, H, 1, 1, WIDTH, activation="gelu").eval()
    inputs = to_jax((SRC, TGT))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(other(*inputs), model(*inputs))


def test_depth_adds_no_traced_kernels() -> None:
    # Layers share compiled functions: a deeper stack has more calls of the same ones.
    def kernels(depth: int) -> set[int]:
        layer = nn.TransformerEncoderLayer(E, H, WIDTH, 0.0)
        fn, params = nn.functionalize(nn.TransformerEncoder(layer, depth))
        equations = jax.make_jaxpr(fn)(params, jnp.asarray(SRC)).eqns
        return {id(e.params["jaxpr"]) for e in equations if e.primitive.name == "jit"}

    assert len(kernels(6)) == len(kernels(1))
