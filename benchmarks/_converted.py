"""For from_torch.py: one network of torch, converted and timed in a process of its own.

    python benchmarks/_converted.py ResNet-50 --seconds 10

prints one line of JSON: seconds of torch.export and of the conversion, memory, and milliseconds of a forward.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from _harness import Case, measure  # noqa: E402

import statefulnn as nn  # noqa: E402
from statefulnn.bridge.torch import from_torch  # noqa: E402

Made = tuple[torch.nn.Module, tuple, dict[str, Any]]  # a network, and what it is called with


def _torchvision() -> Any:
    # Its kernels need another build of torch; no network here uses them, but its import asks for two.
    with contextlib.suppress(RuntimeError):
        stubs = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            stubs.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision.stubs = stubs  # pyright: ignore[reportFunctionMemberAccess]
    import torchvision

    return torchvision


def _images() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224)


def _tokens(length: int = 128) -> torch.Tensor:
    return torch.randint(0, 1000, (2, length))


def _timm(name: str) -> Callable[[], Made]:
    def make() -> Made:
        _torchvision()
        import timm

        return timm.create_model(name), (_images(),), {}

    return make


def _transformers(kind: str, config: str, inputs: Callable[[], dict], **sizes: Any) -> Callable:
    def make() -> Made:
        _torchvision()
        import transformers

        settings = getattr(transformers, config)(**sizes)
        return getattr(transformers, kind)(settings), (), inputs()

    return make


def _resnet() -> Made:
    return _torchvision().models.resnet50(), (_images(),), {}


def _unet() -> Made:
    _torchvision()
    import diffusers

    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    net = diffusers.UNet2DModel(
        32, block_out_channels=(64, 128), down_block_types=down, up_block_types=up
    )
    return net, (torch.randn(2, 3, 32, 32), torch.tensor([3, 7])), {"return_dict": False}


def _decoder(length: int = 128) -> dict:
    return {"input_ids": _tokens(length), "use_cache": False}


NETWORKS: dict[str, Callable[[], Made]] = {
    "ResNet-50": _resnet,
    "EfficientNet-B0": _timm("efficientnet_b0"),
    "MobileNetV3": _timm("mobilenetv3_large_100"),
    "ConvNeXt-T": _timm("convnext_tiny"),
    "Swin-T": _timm("swin_tiny_patch4_window7_224"),
    "ViT-B/16": _transformers("ViTModel", "ViTConfig", lambda: {"pixel_values": _images()}),
    "BERT": _transformers("BertModel", "BertConfig", lambda: {"input_ids": _tokens()}),
    "GPT-2": _transformers("GPT2LMHeadModel", "GPT2Config", _decoder),
    "T5-small": _transformers(
        "T5ForConditionalGeneration",
        "T5Config",
        lambda: {**_decoder(64), "decoder_input_ids": _tokens(64)},
        decoder_start_token_id=0,
    ),
    "Llama, 8 layers": _transformers(
        "LlamaForCausalLM",
        "LlamaConfig",
        _decoder,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8000,
    ),
    "Qwen2-MoE, 4 layers": _transformers(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        lambda: _decoder(64),
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=512,
    ),
    "diffusion U-Net": _unet,
}


def _axes(x: Any) -> Any:
    """Return which axes of an argument vary: those that from_torch frees."""
    if not isinstance(x, torch.Tensor):
        return None
    return dict.fromkeys(range(x.ndim if x.ndim <= 3 else 1), torch.export.Dim.AUTO)


class _Warm(torch.nn.Module):
    """What runs first: imports and torch's own warming up belong to no network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def _exported(net: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    given = inspect.signature(net.forward).bind(*args, **kwargs)
    axes: dict[str, Any] = {}
    for name, value in given.arguments.items():
        kind = given.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            axes |= {k: _axes(v) for k, v in value.items()}
        else:
            axes[name] = _axes(value)
    with torch.enable_grad():
        torch.export.export(net, args, kwargs, dynamic_shapes=axes, strict=False)


def _least(call: Callable[[], Any], times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _kilobytes(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1])
    return 0


def _peak(call: Callable[[], Any]) -> int:
    """Return by how many bytes memory grows at most while a function runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _kilobytes("VmRSS")
    made = call()
    peak = _kilobytes("VmHWM") - before
    del made
    return peak * 1024


def memory(name: str, copy: bool) -> dict[str, float]:
    """Return the peaks of torch.export and of a conversion above what was held before each.

    They are relative to the bytes of the network's arrays.
    """
    net, args, kwargs = NETWORKS[name]()
    net.eval()
    from_torch(_Warm(), torch.ones(2, 3))
    # Imports and what the first run keeps belong to nobody's arrays.
    _exported(net, args, kwargs)
    weights = sum(x.nbytes for x in (*net.parameters(), *net.buffers()))
    export = _peak(lambda: _exported(net, args, kwargs))
    peak = _peak(lambda: from_torch(net, *args, kwargs=kwargs, copy=copy))
    return {"export_peak": export / weights, "peak": peak / weights, "weights_mb": weights / 1e6}


def _first_array(out: Any) -> np.ndarray:
    found = [x for x in jax.tree.leaves(out) if hasattr(x, "shape")]
    return np.asarray(found[0])


def timed(name: str, seconds: float, times: int, inductor: bool) -> dict[str, Any]:
    """Return seconds of the conversion and milliseconds of the forward."""
    net, args, kwargs = NETWORKS[name]()
    net.eval()
    from_torch(_Warm(), torch.ones(2, 3))
    exported = _least(lambda: _exported(net, args, kwargs), times)
    conversion = _least(lambda: from_torch(net, *args, kwargs=kwargs), times)
    model = from_torch(net, *args, kwargs=kwargs)

    to_jax = lambda x: jnp.asarray(x.numpy()) if isinstance(x, torch.Tensor) else x
    arrays = {k: to_jax(v) for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in kwargs.items() if k not in arrays}
    inputs = tuple(map(to_jax, args))
    forward = nn.jit(lambda model, inputs, arrays: model(*inputs, **arrays, **rest))
    start = time.perf_counter()
    ours = jax.block_until_ready(forward(model, inputs, arrays))
    first_call = time.perf_counter() - start

    def eager(net: Any = net) -> Any:
        with torch.no_grad():
            return net(*args, **kwargs)

    theirs = eager()
    theirs = _first_array(theirs if isinstance(theirs, tuple) else list(theirs.values())
                          if isinstance(theirs, dict) else theirs)  # fmt: skip
    mine = next(x for x in jax.tree.leaves(ours) if x.shape == theirs.shape)
    difference = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
    if not difference < 1e-4:
        raise AssertionError(f"{name}: the converted network differs by {difference}")
    cases = [Case("eager", eager), Case("ours", lambda: forward(model, inputs, arrays))]
    inductor_first = None
    if inductor:
        compiled = torch.compile(net)
        inductor_first = _least(lambda: eager(compiled), 1)
        cases.insert(1, Case("compiled", lambda: eager(compiled)))
    # OpenMP's threads spin for a while after their work.
    timings = measure(cases, seconds=seconds, description=name, fewest=5, pause=0.05, burst_us=0)
    return {
        "export": exported,
        "conversion": conversion,
        "first_call": first_call,
        "inductor_first_call": inductor_first,
        "ms": {t.label: t.done / 1e3 for t in timings},
        "ratio": {t.label: t.ratio_done for t in timings},
    }


def main() -> None:
    """Measure one network and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument(
        "--times", type=int, default=2, help="conversions, of which the least counts"
    )
    parser.add_argument("--no-inductor", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--memory", choices=("copy", "share"), help="measure the peak of a conversion"
    )
    options = parser.parse_args()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    warnings.simplefilter("ignore")
    try:
        if options.memory:
            found = memory(options.name, options.memory == "copy")
        else:
            found = timed(options.name, options.seconds, options.times, not options.no_inductor)
    except ImportError as error:
        found = {"missing": str(error).splitlines()[0]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
