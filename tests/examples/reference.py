"""The models of the examples beside those they are named after, with the same weights.

In comments: reference, the model of torchvision or transformers.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bert
import convnext
import gpt2
import lstm_lm
import resnet
import statefulnn as nn
import vit


def _import_torchvision() -> Any:
    # torchvision's own kernels need the build of torch that it was made with. No model here uses them,
    # but its import, and so that of transformers, asks for two of them by name. Where the kernels are
    # there, a second definition of their names would abort the process: so the import goes first.
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed", allow_module_level=True)
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    stubs = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        stubs.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    module = importlib.import_module("torchvision")
    module.stubs = stubs  # the definitions go when this does
    return module


torchvision = _import_torchvision()
transformers = pytest.importorskip("transformers")
safetensors_torch = importlib.import_module("safetensors.torch")

# Of a decoder of one layer that the tests of generation run.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,  # larger than usual, so that tokens differ
    "bos_token_id": None,
    "eos_token_id": None,
}


class TorchRNNModel(torch.nn.Module):
    """``RNNModel`` of torch's example word_language_model, in torch."""

    def __init__(self, ntoken, ninp, nhid, nlayers, dropout=0.5, tie_weights=False):
        super().__init__()
        self.drop = torch.nn.Dropout(dropout)
        self.encoder = torch.nn.Embedding(ntoken, ninp)
        self.rnn = torch.nn.LSTM(ninp, nhid, nlayers, dropout=dropout)
        self.decoder = torch.nn.Linear(nhid, ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight

    def forward(self, tokens, hidden=None):
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        return self.decoder(self.drop(output)), hidden


class TorchSileroVAD(torch.nn.Module):
    """The network of the package silero-vad, which has it as a program of TorchScript alone."""

    def __init__(self):
        super().__init__()
        self.stft_conv = torch.nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = torch.nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = torch.nn.Conv1d(128, 64, 3, 2, padding=1)
        self.conv3 = torch.nn.Conv1d(64, 64, 3, 2, padding=1)
        self.conv4 = torch.nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = torch.nn.LSTMCell(128, 128)
        self.final_conv = torch.nn.Conv1d(128, 1, 1)

    def forward(self, x, h, c):
        """Return the probability of a piece ``(B, 576)``, ``(B, 1)``, and the state after it."""
        x = torch.nn.functional.pad(x, (0, 64), mode="reflect")
        real, imaginary = self.stft_conv(x[:, None]).chunk(2, 1)
        x = (real**2 + imaginary**2).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        h, c = self.lstm_cell(x[:, :, 0], (h, c))
        return self.final_conv(h.relu()[:, :, None]).sigmoid()[:, 0], h, c


@dataclasses.dataclass
class Case:
    """A model of the examples and its reference.

    Args:
        ours: builds ours.
        theirs: builds the reference.
        inputs: makes the inputs of a batch, as numpy arrays, from a generator.
        output: what to compare of what their forward returns.
        our_output: the same of ours.
    """

    ours: Callable[[], nn.Module]
    theirs: Callable[[], Any]
    inputs: Callable[[np.random.Generator], tuple[np.ndarray, ...]]
    output: Callable[[Any], Any] = lambda out: out
    our_output: Callable[[Any], Any] = lambda out: out

    def reference(self, seed: int = 0) -> Any:
        """Return the reference in eval mode, its weights away from their initial values."""
        torch.manual_seed(seed)
        return randomised(self.theirs()).eval()

    def pair(self, seed: int = 0) -> tuple[nn.Module, Any]:
        """Return ours and the reference, in eval mode, with the reference's weights."""
        theirs = self.reference(seed)
        ours = self.ours().eval()
        ours.load_state_dict({k: from_torch(v) for k, v in theirs.state_dict().items()})
        return ours, theirs

    def call(self, theirs: Any, *inputs: np.ndarray) -> np.ndarray:
        """Return what the reference gives, without gradients."""
        with torch.no_grad():
            return from_torch(self.output(theirs(*map(to_torch, inputs))))


def randomised(model: Any) -> Any:
    """Give every parameter and statistic of a reference a value that matters, and return it.

    Fresh biases are 0, scales 1, and a running mean of 0 could be left out unseen.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 or name.endswith(("layer_scale", "class_token")):
                p.add_(torch.randn_like(p) * 0.2)
            elif not p.any():  # a head that starts at 0
                p.copy_(torch.randn_like(p) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(3)
    return model


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x.astype(np.int64) if x.dtype == np.int32 else x)


def from_torch(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy()


def saved_by_torch(model: Any, folder: Path, kind: str) -> Path:
    """Save a reference as its users do, and return the file."""
    path = folder / f"model.{kind}"
    if kind == "pth":
        torch.save(model.state_dict(), path)
    else:  # which takes no memory twice: tied parameters are copied
        state = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
        safetensors_torch.save_file(state, path)
    return path


def assert_close(actual: Any, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Compare to so much of the largest number, and of 1."""
    assert actual.shape == expected.shape
    difference = np.abs(np.asarray(actual, np.float64) - expected.astype(np.float64)).max()
    assert difference <= tolerance * max(1.0, float(np.abs(expected).max()))


# --------------------------------------------------------------------------------------------------
# The models


def images(size: int, count: int = 2) -> Callable:
    return lambda rng: (rng.normal(size=(count, 3, size, size)).astype(np.float32),)


def tokens(vocab_size: int, *shape: int) -> Callable:
    return lambda rng: (rng.integers(0, vocab_size, shape).astype(np.int32),)


def padded_tokens(vocab_size: int, batch: int, length: int) -> Callable:
    """Return a maker of token numbers, masks of several lengths, and types of tokens."""

    def make(rng):
        ids = rng.integers(0, vocab_size, (batch, length)).astype(np.int32)
        lengths = np.linspace(length, 1, batch).astype(int)
        mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
        kinds = rng.integers(0, 2, (batch, length)).astype(np.int32)
        return ids, mask, kinds

    return make


def _bert(**sizes: int) -> Case:
    config = transformers.BertConfig(**sizes)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(bert.BertConfig)}
    return Case(
        lambda: bert.BertModel(bert.BertConfig(**fields)),
        lambda: transformers.BertModel(config),
        padded_tokens(config.vocab_size, 3, 12),
        output=lambda out: out.pooler_output,
        our_output=lambda out: out[1],
    )


def _gpt2(**sizes: Any) -> Case:
    config = transformers.GPT2Config(**sizes)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(gpt2.GPT2Config)}
    return Case(
        lambda: gpt2.GPT2LMHeadModel(gpt2.GPT2Config(**fields)),
        lambda: transformers.GPT2LMHeadModel(config),
        tokens(config.vocab_size, 2, 24),
        output=lambda out: out.logits,
    )


def _resnet(block: str, layers: list[int]) -> Case:
    theirs = getattr(torchvision.models.resnet, block)
    return Case(
        lambda: resnet.ResNet(getattr(resnet, block), layers, num_classes=10),
        lambda: torchvision.models.ResNet(theirs, layers, num_classes=10),
        images(32),
    )


def _convnext(dims: list[int], depths: list[int]) -> Case:
    def theirs():
        after = [*dims[1:], None]
        settings = [
            torchvision.models.convnext.CNBlockConfig(*row)
            for row in zip(dims, after, depths, strict=True)
        ]
        return torchvision.models.ConvNeXt(settings, num_classes=10)

    return Case(lambda: convnext.ConvNeXt(dims, depths, num_classes=10), theirs, images(32))


def _vit(**sizes: int) -> Case:
    return Case(
        lambda: vit.VisionTransformer(**sizes),
        lambda: torchvision.models.VisionTransformer(**sizes),
        images(sizes["image_size"]),
    )


def _lstm(*sizes: int, tie_weights: bool) -> Case:
    first = lambda out: out[0]
    return Case(
        lambda: lstm_lm.RNNModel(*sizes, tie_weights=tie_weights),
        lambda: TorchRNNModel(*sizes, tie_weights=tie_weights),
        tokens(sizes[0], 9, 3),
        output=first,
        our_output=first,
    )


SMALL = {
    "bert": _bert(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=20,
    ),
    "gpt2": _gpt2(vocab_size=90, n_positions=40, n_embd=32, n_layer=2, n_head=4),
    "gpt2-untied": _gpt2(
        vocab_size=90, n_positions=40, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=False
    ),
    "resnet-basic": _resnet("BasicBlock", [1, 2, 1, 1]),
    "resnet-bottleneck": _resnet("Bottleneck", [1, 1, 1, 1]),
    "vit": _vit(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=48,
        num_classes=10,
    ),
    "convnext": _convnext([8, 16], [1, 1]),
    "lstm": _lstm(50, 16, 24, 2, tie_weights=False),
    "lstm-tied": _lstm(50, 24, 24, 2, tie_weights=True),
}

FULL = {
    "bert-base": _bert(),
    "gpt2": _gpt2(),
    **{
        name: Case(getattr(ours, name), getattr(torchvision.models, name), images(224))
        for ours, names in (
            (resnet, ("resnet18", "resnet34", "resnet50", "resnet101")),
            (vit, ("vit_b_16", "vit_b_32", "vit_l_16")),
            (convnext, ("convnext_tiny", "convnext_small")),
        )
        for name in names
    },
    "lstm": _lstm(33278, 650, 650, 2, tie_weights=True),
}


def as_arrays(inputs: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.asarray, inputs))
