"""One layer at a common size, forward and with its gradient, in every library that has it.

Terms: a *kind* is "forward" (torch without a graph) or "backward": the output and the gradient of
`sum(out * cotangent)` by the parameters and by the input, if that is of floats. Everything is in
training mode. A *call* computes that once and returns when the results are there.

Each library gets its own layout: flax.nnx has channels last and the batch before the time, equinox
one example at a time under `jax.vmap`. The sizes are torch's and are turned for the others.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Call = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """A layer, how each library builds it, and what it is called with.

    Args:
        name: the name in the tables.
        size: the size in the tables.
        build: builds the layer from `torch.nn` or `statefulnn`.
        floats: the shape of the input of floats in torch's layout, or None.
        integers: the shape of the input of integers and the number they are below, or None.
        call: calls the layer of `build` with the inputs: the floats, then the integers.
        nnx: builds the layer from `flax.nnx` and its `Rngs`; None where flax has none.
        equinox: builds from `equinox` and a key what `_Equinox` holds; None where it has none.
        channels_last: whether flax.nnx wants the second axis at the end.
        time_first: whether the first axis is the time and the others want it after the batch.
    """

    name: str
    size: str
    build: Callable[[Any], Any]
    floats: tuple[int, ...] | None = None
    integers: tuple[tuple[int, ...], int] | None = None
    call: Callable[..., Any] = lambda layer, *inputs: layer(*inputs)
    nnx: Callable[[Any, Any], Any] | None = None
    equinox: Callable[[Any, jax.Array], Any] | None = None
    channels_last: bool = False
    time_first: bool = False

    def inputs(self, library: str) -> list[np.ndarray]:
        """The inputs in the layout of a library."""
        rng = np.random.default_rng(0)
        arrays = []
        if self.floats is not None:
            x = rng.standard_normal(self.floats, np.float32)
            if self.channels_last and library == "flax.nnx":
                x = np.moveaxis(x, 1, -1)
            if self.time_first and library in ("flax.nnx", "equinox"):
                x = np.moveaxis(x, 0, 1)
            arrays.append(np.ascontiguousarray(x))
        if self.integers is not None:
            shape, below = self.integers
            arrays.append(rng.integers(0, below, shape, np.int32))
        return arrays

    def shrunk(self, leading: int) -> Layer:
        """The same layer with a first axis (batch or time) of at most this size."""
        cut = lambda shape: (min(shape[0], leading), *shape[1:])
        return replace(
            self,
            floats=self.floats and cut(self.floats),
            integers=self.integers and (cut(self.integers[0]), self.integers[1]),
        )


@dataclass
class _Equinox:
    """What the calls of equinox need.

    Args:
        layer: is differentiated.
        apply: takes the layer, `extra` and the inputs.
        extra: a key or a state, which is not differentiated.
    """

    layer: Any
    apply: Callable[..., Any] = lambda layer, extra, x: jax.vmap(layer)(x)
    extra: Any = None


def _over_tokens(layer: Any, extra: Any, x: jax.Array) -> jax.Array:
    """A layer of vectors over (batch, tokens, ...)."""
    return jax.vmap(jax.vmap(layer))(x)


def _equinox_batch_norm(eqx: Any, key: jax.Array) -> _Equinox:
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(64, axis_name="batch", mode="batch")

    def apply(layer: Any, state: Any, x: jax.Array) -> Any:
        mapped = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return mapped(x, state)

    return _Equinox(layer, apply, state)


def _equinox_attention(eqx: Any, key: jax.Array) -> _Equinox:
    layer = eqx.nn.MultiheadAttention(
        8,
        256,
        use_query_bias=True,
        use_key_bias=True,
        use_value_bias=True,
        use_output_bias=True,
        key=key,
    )
    return _Equinox(layer, lambda layer, extra, x: jax.vmap(lambda x: layer(x, x, x))(x))


def _equinox_recurrent(name: str) -> Callable[[Any, jax.Array], _Equinox]:
    """The scan over a cell that equinox's documentation shows: it has cells only."""

    def apply(cell: Any, extra: Any, x: jax.Array) -> jax.Array:
        def one(x: jax.Array) -> jax.Array:
            zeros = jnp.zeros(cell.hidden_size)
            start = (zeros, zeros) if name == "LSTMCell" else zeros

            def step(state: Any, x: jax.Array) -> Any:
                state = cell(x, state)
                return state, state[0] if name == "LSTMCell" else state

            return jax.lax.scan(step, start, x)[1]

        return jax.vmap(one)(x)

    return lambda eqx, key: _Equinox(getattr(eqx.nn, name)(128, 256, key=key), apply)


def _equinox_function(function: Callable[[jax.Array], jax.Array]) -> Callable[..., _Equinox]:
    return lambda eqx, key: _Equinox(eqx.nn.Lambda(function))


def _conv(name: str, *sizes: int, **options: Any) -> dict[str, Any]:
    """A convolution in every library: `sizes` are channels in, channels out and the kernel."""
    dimensions = int(name[-2])
    into, out, kernel = sizes
    each = lambda n: (n,) * dimensions
    stride, padding = options.get("stride", 1), options["padding"]

    def nnx(nnx: Any, rngs: Any) -> Any:
        arguments: dict[str, Any] = {"strides": each(stride), "rngs": rngs}
        if "Transpose" in name:
            return nnx.ConvTranspose(into, out, each(kernel), padding="SAME", **arguments)
        groups = options.get("groups", 1)
        return nnx.Conv(
            into, out, each(kernel), padding=padding, feature_group_count=groups, **arguments
        )

    return {
        "build": lambda nn: getattr(nn, name)(*sizes, **options),
        "nnx": nnx,
        "equinox": lambda eqx, key: _Equinox(getattr(eqx.nn, name)(*sizes, **options, key=key)),
        "channels_last": True,
    }


def _pool(name: str, kernel: int, stride: int, padding: int = 0) -> dict[str, Any]:
    """A pooling of images in every library."""
    function = {"MaxPool2d": "max_pool", "AvgPool2d": "avg_pool"}[name]
    two = lambda n: (n, n)
    return {
        "build": lambda nn: getattr(nn, name)(kernel, stride, padding),
        "nnx": lambda nnx, rngs: nnx.Sequential(
            lambda x: getattr(nnx, function)(x, two(kernel), two(stride), [two(padding)] * 2)
        ),
        "equinox": lambda eqx, key: _Equinox(getattr(eqx.nn, name)(kernel, stride, padding)),
        "channels_last": True,
    }


IMAGES = (32, 64, 32, 32)
TOKENS = (32, 128, 512)

LAYERS = [
    Layer(
        "Linear",
        "128 x 1024 to 1024",
        lambda nn: nn.Linear(1024, 1024),
        (128, 1024),
        nnx=lambda nnx, rngs: nnx.Linear(1024, 1024, rngs=rngs),
        equinox=lambda eqx, key: _Equinox(eqx.nn.Linear(1024, 1024, key=key)),
    ),
    Layer(
        "Conv1d 3",
        "16 x 64 x 1024 to 64",
        floats=(16, 64, 1024),
        **_conv("Conv1d", 64, 64, 3, padding=1),
    ),
    Layer(
        "Conv2d 3x3", "32 x 64 x 32² to 64", floats=IMAGES, **_conv("Conv2d", 64, 64, 3, padding=1)
    ),
    Layer(
        "Conv2d 7x7, stride 2",
        "8 x 3 x 112² to 64",
        floats=(8, 3, 112, 112),
        **_conv("Conv2d", 3, 64, 7, stride=2, padding=3),
    ),
    Layer(
        "Conv2d 1x1",
        "32 x 64 x 32² to 256",
        floats=IMAGES,
        **_conv("Conv2d", 64, 256, 1, padding=0),
    ),
    Layer(
        "Conv2d 3x3, depthwise",
        "32 x 64 x 32²",
        floats=IMAGES,
        **_conv("Conv2d", 64, 64, 3, padding=1, groups=64),
    ),
    Layer(
        "Conv3d 3x3x3",
        "2 x 16 x 16 x 32² to 32",
        floats=(2, 16, 16, 32, 32),
        **_conv("Conv3d", 16, 32, 3, padding=1),
    ),
    Layer(
        "ConvTranspose2d 4x4, stride 2",
        "16 x 64 x 16² to 32",
        floats=(16, 64, 16, 16),
        **_conv("ConvTranspose2d", 64, 32, 4, stride=2, padding=1),
    ),
    Layer(
        "BatchNorm2d",
        "32 x 64 x 32²",
        lambda nn: nn.BatchNorm2d(64),
        IMAGES,
        nnx=lambda nnx, rngs: nnx.BatchNorm(64, momentum=0.9, epsilon=1e-5, rngs=rngs),
        equinox=_equinox_batch_norm,
        channels_last=True,
    ),
    Layer(
        "LayerNorm",
        "32 x 128 x 512",
        lambda nn: nn.LayerNorm(512),
        TOKENS,
        nnx=lambda nnx, rngs: nnx.LayerNorm(512, epsilon=1e-5, rngs=rngs),
        equinox=lambda eqx, key: _Equinox(eqx.nn.LayerNorm(512), _over_tokens),
    ),
    Layer(
        "GroupNorm, 8 groups",
        "32 x 64 x 32²",
        lambda nn: nn.GroupNorm(8, 64),
        IMAGES,
        nnx=lambda nnx, rngs: nnx.GroupNorm(64, 8, epsilon=1e-5, rngs=rngs),
        equinox=lambda eqx, key: _Equinox(eqx.nn.GroupNorm(8, 64)),
        channels_last=True,
    ),
    Layer(
        "RMSNorm",
        "32 x 128 x 512",
        lambda nn: nn.RMSNorm(512),
        TOKENS,
        nnx=lambda nnx, rngs: nnx.RMSNorm(512, rngs=rngs),
        equinox=lambda eqx, key: _Equinox(eqx.nn.RMSNorm(512, use_bias=False), _over_tokens),
    ),
    Layer("MaxPool2d 2", "16 x 64 x 56²", floats=(16, 64, 56, 56), **_pool("MaxPool2d", 2, 2)),
    Layer(
        "MaxPool2d 3, stride 2",
        "8 x 64 x 112²",
        floats=(8, 64, 112, 112),
        **_pool("MaxPool2d", 3, 2, 1),
    ),
    Layer("AvgPool2d 2", "16 x 64 x 56²", floats=(16, 64, 56, 56), **_pool("AvgPool2d", 2, 2)),
    Layer(
        "AdaptiveAvgPool2d 1",
        "32 x 256 x 14²",
        lambda nn: nn.AdaptiveAvgPool2d(1),
        (32, 256, 14, 14),
        equinox=lambda eqx, key: _Equinox(eqx.nn.AdaptiveAvgPool2d(1)),
    ),
    Layer(
        "GELU",
        "32 x 128 x 512",
        lambda nn: nn.GELU(),
        TOKENS,
        nnx=lambda nnx, rngs: nnx.Sequential(lambda x: nnx.gelu(x, approximate=False)),
        equinox=_equinox_function(lambda x: jax.nn.gelu(x, approximate=False)),
    ),
    Layer(
        "ReLU",
        "32 x 128 x 512",
        lambda nn: nn.ReLU(),
        TOKENS,
        nnx=lambda nnx, rngs: nnx.Sequential(nnx.relu),
        equinox=_equinox_function(jax.nn.relu),
    ),
    Layer(
        "Softmax",
        "32 x 8 x 128²",
        lambda nn: nn.Softmax(-1),
        (32, 8, 128, 128),
        nnx=lambda nnx, rngs: nnx.Sequential(nnx.softmax),
        equinox=_equinox_function(jax.nn.softmax),
    ),
    Layer(
        "Dropout",
        "32 x 128 x 512",
        lambda nn: nn.Dropout(0.1),
        TOKENS,
        nnx=lambda nnx, rngs: nnx.Dropout(0.1, rngs=rngs),
        equinox=lambda eqx, key: _Equinox(
            eqx.nn.Dropout(0.1), lambda layer, key, x: layer(x, key=key), key
        ),
    ),
    Layer(
        "Embedding",
        "32 x 128 of 10000 x 256",
        lambda nn: nn.Embedding(10000, 256),
        integers=((32, 128), 10000),
        nnx=lambda nnx, rngs: nnx.Embed(10000, 256, rngs=rngs),
        equinox=lambda eqx, key: _Equinox(eqx.nn.Embedding(10000, 256, key=key), _over_tokens),
    ),
    Layer(
        "EmbeddingBag",
        "256 bags of 20, 10000 x 256",
        lambda nn: nn.EmbeddingBag(10000, 256),
        integers=((256, 20), 10000),
    ),
    Layer(
        "CrossEntropyLoss",
        "1024 x 1000",
        lambda nn: nn.CrossEntropyLoss(),
        (1024, 1000),
        ((1024,), 1000),
    ),
    Layer(
        "MultiheadAttention, 8 heads",
        "16 x 128 x 256",
        lambda nn: nn.MultiheadAttention(256, 8, batch_first=True),
        (16, 128, 256),
        call=lambda layer, x: layer(x, x, x, need_weights=False)[0],
        nnx=lambda nnx, rngs: nnx.MultiHeadAttention(8, 256, decode=False, rngs=rngs),
        equinox=_equinox_attention,
    ),
    Layer(
        "TransformerEncoderLayer",
        "16 x 128 x 256, MLP 1024",
        lambda nn: nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True),
        (16, 128, 256),
    ),
    Layer(
        "TransformerEncoderLayer, dropout 0.1",
        "16 x 128 x 256, MLP 1024",
        lambda nn: nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.1, batch_first=True),
        (16, 128, 256),
    ),
    *(
        Layer(
            name,
            "128 steps, 32 x 128 to 256",
            lambda nn, name=name: getattr(nn, name)(128, 256),
            (128, 32, 128),
            call=lambda layer, x: layer(x)[0],
            nnx=lambda nnx, rngs, cell=cell: nnx.RNN(getattr(nnx, cell)(128, 256, rngs=rngs)),
            equinox=_equinox_recurrent(f"{name}Cell"),
            time_first=True,
        )
        for name, cell in (("LSTM", "OptimizedLSTMCell"), ("GRU", "GRUCell"))
    ),
    Layer(
        "Upsample, bilinear",
        "16 x 32 x 32² to 64²",
        lambda nn: nn.Upsample(scale_factor=2, mode="bilinear"),
        (16, 32, 32, 32),
    ),
]


def _cotangent(shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.random.default_rng(1).standard_normal(shape), np.float32)


# ---------------------------------------------------------------------------------------- libraries
# One function a library: a layer and a kind -> the call, or None where the library has no such layer.
# With a gradient, the sum itself is not returned, so that XLA need not compute it; the output is.


def of_statefulnn(layer: Layer, kind: str) -> Call | None:
    """`nn.jit` of a function of the layer."""
    import statefulnn as nn

    module = layer.build(nn)
    inputs = [jnp.asarray(x) for x in layer.inputs("statefulnn")]
    apply = layer.call
    forward = nn.jit(lambda module, *inputs: apply(module, *inputs))
    if kind == "forward":
        return lambda: jax.block_until_ready(forward(module, *inputs))
    cotangent = jnp.asarray(_cotangent(forward(module, *inputs).shape))

    def loss(module: Any, *inputs: jax.Array) -> Any:
        out = apply(module, *inputs[:-1])
        return (out * inputs[-1]).sum(), out

    argnums = 0 if layer.floats is None else (0, 1)
    step = nn.jit(nn.grad(loss, argnums=argnums, has_aux=True))

    def call() -> Any:
        grads, out = step(module, *inputs, cotangent)
        return jax.block_until_ready((out, grads))

    return call


def of_nnx(layer: Layer, kind: str) -> Call | None:
    """`nnx.jit` of a function of the layer."""
    if layer.nnx is None:
        return None
    from flax import nnx

    module = layer.nnx(nnx, nnx.Rngs(0))
    inputs = [jnp.asarray(x) for x in layer.inputs("flax.nnx")]
    forward = nnx.jit(lambda module, *inputs: module(*inputs))
    if kind == "forward":
        return lambda: jax.block_until_ready(forward(module, *inputs))
    cotangent = jnp.asarray(_cotangent(forward(module, *inputs).shape))

    def loss(module: Any, *inputs: jax.Array) -> Any:
        out = module(*inputs[:-1])
        return (out * inputs[-1]).sum(), out

    argnums = 0 if layer.floats is None else (0, 1)
    step = nnx.jit(nnx.grad(loss, argnums=argnums, has_aux=True))

    def call() -> Any:
        grads, out = step(module, *inputs, cotangent)
        return jax.block_until_ready((out, jax.tree.leaves(grads)))

    return call


def of_equinox(layer: Layer, kind: str) -> Call | None:
    """`eqx.filter_jit` of a function of the layer."""
    if layer.equinox is None:
        return None
    import equinox as eqx

    built = layer.equinox(eqx, jax.random.key(0))
    inputs = [jnp.asarray(x) for x in layer.inputs("equinox")]
    forward = eqx.filter_jit(lambda module, extra, *inputs: built.apply(module, extra, *inputs))
    if kind == "forward":
        return lambda: jax.block_until_ready(forward(built.layer, built.extra, *inputs))
    output = lambda result: result[0] if isinstance(result, tuple) else result
    shape = output(forward(built.layer, built.extra, *inputs)).shape
    cotangent = jnp.asarray(_cotangent(shape))

    def loss(differentiated: Any, extra: Any, *inputs: jax.Array) -> Any:
        module, x = differentiated
        result = built.apply(module, extra, *([] if x is None else [x]), *inputs[:-1])
        return (output(result) * inputs[-1]).sum(), result

    step = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))
    x = None if layer.floats is None else inputs.pop(0)

    def call() -> Any:
        grads, result = step((built.layer, x), built.extra, *inputs, cotangent)
        return jax.block_until_ready((result, grads))

    return call


def threads() -> int:
    """The cores that this process may use: XLA takes all of them, torch gets as many."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def torch_device() -> str | None:
    """Where torch is beside JAX; None where JAX has an accelerator that torch has not."""
    import torch

    if jax.default_backend() == "cpu":
        return "cpu"
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else None


def of_torch(layer: Layer, kind: str, *, compiled: bool = False) -> Call | None:
    """The eager layer, or `torch.compile` of a function of it."""
    import torch

    device = torch_device()
    torch.set_num_threads(threads())
    module = layer.build(torch.nn).to(device)
    inputs = [torch.from_numpy(x).to(device) for x in layer.inputs("torch")]
    if layer.integers is not None:
        inputs[-1] = inputs[-1].long()
    forward: Any = lambda *inputs: layer.call(module, *inputs)
    if compiled:
        # The cache of code goes by code objects, which all layers share: it would be full soon, and
        # then the layer runs eagerly without a word.
        torch.compiler.reset()
        forward = torch.compile(forward, dynamic=False)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run() -> Any:
        with torch.no_grad():
            out = forward(*inputs)
        wait()
        return out

    if kind == "forward":
        return run
    cotangent = torch.from_numpy(_cotangent(tuple(run().shape))).to(device)
    if compiled:
        torch.compiler.reset()
    wanted = list(module.parameters())
    if layer.floats is not None:
        wanted.insert(0, inputs[0].requires_grad_())

    def step() -> Any:
        out = forward(*inputs)
        grads = torch.autograd.grad(out, wanted, cotangent)
        wait()
        return out, grads

    return step


def of_torch_compile(layer: Layer, kind: str) -> Call | None:
    """`torch.compile` of a function of the layer."""
    with warnings.catch_warnings():
        # It says for instance that it leaves an LSTM to eager code.
        warnings.simplefilter("ignore")
        return of_torch(layer, kind, compiled=True)


def output_shape(result: Any) -> tuple[int, ...]:
    """The shape of the first thing in a result that has one, sorted: layouts differ."""
    while isinstance(result, (tuple, list)):
        result = result[0]
    return tuple(sorted(result.shape))


LIBRARIES: dict[str, Callable[[Layer, str], Call | None]] = {
    "statefulnn": of_statefulnn,
    "torch": of_torch,
    "torch.compile": of_torch_compile,
    "flax.nnx": of_nnx,
    "equinox": of_equinox,
}
