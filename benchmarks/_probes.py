"""What else costs time: tracing, eager layers, construction, import; and whether calls wait."""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _harness import Case, Timing, measure, progress
from _report import uninstalled

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# What JAX reports of its own stages (`jax.monitoring`): seconds spent since the process began.
_STAGES = {
    "/jax/core/compile/jaxpr_to_mlir_module_duration": 0.0,
    "/jax/core/compile/backend_compile_duration": 0.0,
}


def _note_stage(event: str, seconds: float, **_: Any) -> None:
    if event in _STAGES:
        _STAGES[event] += seconds


jax.monitoring.register_event_duration_secs_listener(_note_stage)


# ------------------------------------------------------------------------------------------ tracing


def _trace_seconds(first_call: Callable[[], Any]) -> float:
    """The first call of something fresh, less lowering and XLA's compiler: what Python spends."""
    jax.clear_caches()
    gc.collect()
    gc.disable()
    try:
        before = sum(_STAGES.values())
        start = time.perf_counter()
        jax.block_until_ready(first_call())
        return time.perf_counter() - start - (sum(_STAGES.values()) - before)
    finally:
        gc.enable()


def _scale_shift_traces(layers: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Contenders for the model of `_contenders`: label -> maker of a first call."""
    import _contenders as contenders

    n = 2 * layers
    x, _ = contenders.batch()
    params = [jnp.asarray(v) for v in contenders.initial_values(n)]

    def plain() -> Callable[[], Any]:
        jitted = jax.jit(lambda params, x: contenders.flat_forward(params, x))
        return lambda: jitted(params, x)

    makers = {"plain function": plain}
    makers.update(_module_traces(lambda: contenders._statefulnn_net(n), x))
    makers.update(_other_traces(contenders._nnx_net, contenders._equinox_net, n, x))
    return makers


def _module_traces(build: Callable[[], Any], x: jax.Array) -> dict[str, Any]:
    try:
        import statefulnn as nn
    except ImportError:
        return {}
    model = build()

    def ours() -> Callable[[], Any]:
        compiled = nn.jit(lambda model, x: model(x))
        return lambda: compiled(model, x)

    def on_model() -> Callable[[], Any]:
        compiled = nn.jit(model)
        return lambda: compiled(x)

    def raw() -> Callable[[], Any]:
        compiled = jax.jit(lambda model, x: model(x))
        return lambda: compiled(model, x)

    return {"nn.jit(f)(model, x)": ours, "nn.jit(model)(x)": on_model, "jax.jit(f)(model, x)": raw}


def _other_traces(nnx_net: Any, equinox_net: Any, n: int, x: jax.Array) -> dict[str, Any]:
    makers: dict[str, Any] = {}
    missing = uninstalled(["flax.nnx", "equinox"])
    if "flax.nnx" not in missing:
        from flax import nnx

        nnx_model = nnx_net(n)

        def of_nnx() -> Callable[[], Any]:
            compiled = nnx.jit(lambda model, x: model(x))
            return lambda: compiled(nnx_model, x)

        makers["flax.nnx.jit"] = of_nnx
    if "equinox" not in missing:
        import equinox as eqx

        equinox_model = equinox_net(n)

        def of_equinox() -> Callable[[], Any]:
            compiled = eqx.filter_jit(lambda model, x: model(x))
            return lambda: compiled(equinox_model, x)

        makers["equinox.filter_jit"] = of_equinox
    return makers


def _linear_traces(layers: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Contenders for a chain of `layers` Linear layers of size 8."""
    x = jnp.ones((4, 8))
    rng = np.random.default_rng(0)
    weights = [jnp.asarray(rng.normal(size=(8, 8)) / 4, jnp.float32) for _ in range(layers)]
    biases = [jnp.asarray(rng.normal(size=8) / 4, jnp.float32) for _ in range(layers)]

    def plain() -> Callable[[], Any]:
        def forward(weights: list[Any], biases: list[Any], x: jax.Array) -> jax.Array:
            for weight, bias in zip(weights, biases, strict=True):
                x = x @ weight.T + bias
            return x

        jitted = jax.jit(forward)
        return lambda: jitted(weights, biases, x)

    makers = {"plain function": plain}
    try:
        import statefulnn as nn
        import statefulnn.functional as F
    except ImportError:
        return makers

    def plain_functional() -> Callable[[], Any]:
        def forward(weights: list[Any], biases: list[Any], x: jax.Array) -> jax.Array:
            for weight, bias in zip(weights, biases, strict=True):
                x = F.linear(x, weight, bias)
            return x

        jitted = jax.jit(forward)
        return lambda: jitted(weights, biases, x)

    makers["plain function of F.linear"] = plain_functional
    makers.update(
        _module_traces(lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))), x)
    )
    return makers


def trace_time(layers: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Seconds to trace a model of `layers` layers from cold caches, against a plain function.

    A trace takes a good part of a second, in which other programs run too, so the least of the
    rounds is reported.

    Returns:
        For each model a list of rows: label, milliseconds, ratio to the plain function.
    """
    shuffle = random.Random(0).shuffle
    results = {}
    models = {
        f"{layers} scale-and-shift layers": _scale_shift_traces(layers),
        f"{layers} Linear layers": _linear_traces(layers),
    }
    for name, makers in models.items():
        samples: dict[str, list[float]] = {label: [] for label in makers}
        # The first round is not counted: it pays for lazy imports and first looks at shapes.
        for number in progress(range(rounds + 1), f"trace, {name}"):
            labels = list(makers)
            shuffle(labels)
            for label in labels:
                seconds = _trace_seconds(makers[label]())
                if number:
                    samples[label].append(seconds)
        base = min(samples["plain function"])
        results[name] = [
            {
                "label": label,
                "ms": round(1e3 * min(values), 2),
                "ratio": round(min(values) / base, 3),
            }
            for label, values in samples.items()
        ]
    return results


# -------------------------------------------------------------------------------------------- eager


def _jax_eager_cases(kind: str, features: int, x: jax.Array) -> list[Case]:
    weight, bias = jnp.ones((features, features)) / features, jnp.zeros(features)
    gain = jnp.ones(features)

    def linear(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return x @ weight.T + bias

    def layer_norm(x: jax.Array, gain: jax.Array, bias: jax.Array) -> jax.Array:
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * gain + bias

    if kind == "Linear":
        bare, args = jax.jit(linear), (weight, bias)
        unjitted = linear
    else:
        bare, args = jax.jit(layer_norm), (gain, bias)
        unjitted = layer_norm
    return [
        Case("bare jitted function", lambda: bare(x, *args)),
        Case("the same without jit", lambda: unjitted(x, *args)),
    ]


def eager(kind: str, *, seconds: float) -> list[Timing]:
    """One eager layer of 64 features on a batch of 32: the bare jitted function, ours, the others.

    Args:
        kind: "Linear" or "LayerNorm".
        seconds: how long to measure.
    """
    features = 64
    rng = np.random.default_rng(0)
    values = rng.normal(size=(32, features)).astype(np.float32)
    x = jnp.asarray(values)
    cases = _jax_eager_cases(kind, features, x)
    missing = uninstalled(["statefulnn", "torch", "flax.nnx", "equinox"])
    if "statefulnn" not in missing:
        import statefulnn as nn
        import statefulnn.functional as F

        layer = nn.Linear(features, features) if kind == "Linear" else nn.LayerNorm(features)
        weight, bias = layer.weight.value, layer.bias.value
        cases.append(Case(f"nn.{kind}", lambda: layer(x)))
        if kind == "Linear":
            cases.append(Case("F.linear", lambda: F.linear(x, weight, bias)))
        else:
            cases.append(Case("F.layer_norm", lambda: F.layer_norm(x, (features,), weight, bias)))
    if "torch" not in missing:
        import torch

        # The layer is too small to share out, and waiting threads would meet other programs.
        torch.set_num_threads(1)
        torch_layer = getattr(torch.nn, kind)(*[features] * (2 if kind == "Linear" else 1))
        torch_x = torch.from_numpy(values)

        def of_torch() -> Any:
            with torch.no_grad():
                return torch_layer(torch_x)

        cases.append(Case(f"torch.nn.{kind} (CPU)", of_torch))
    if "flax.nnx" not in missing:
        from flax import nnx

        rngs = nnx.Rngs(0)
        nnx_layer = (
            nnx.Linear(features, features, rngs=rngs)
            if kind == "Linear"
            else nnx.LayerNorm(features, rngs=rngs)
        )
        cases.append(Case(f"nnx.{kind}", lambda: nnx_layer(x)))
    if "equinox" not in missing:
        import equinox as eqx

        equinox_layer: Any = (
            eqx.nn.Linear(features, features, key=jax.random.key(0))
            if kind == "Linear"
            else eqx.nn.LayerNorm(features)
        )
        over_batch = jax.vmap(equinox_layer)
        cases.append(Case(f"jax.vmap(eqx.nn.{kind})", lambda: over_batch(x)))
    return measure(cases, seconds=seconds, description=f"eager {kind}")


# --------------------------------------------------------------------------------------- asynchrony


def asynchrony(*, size: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Whether a call returns before its result is there: a chain of `length` (size, size) products.

    Returns:
        Rows: label, milliseconds until the call returned and until the result was there (medians).
    """
    weight = jnp.eye(size) * 0.5
    x = jnp.ones((size, size))

    def chain(weight: Any, x: jax.Array) -> jax.Array:
        for _ in range(length):
            x = jnp.matmul(x, weight)
        return x

    cases: dict[str, Callable[[], Any]] = {}
    raw = jax.jit(chain)
    cases["jax.jit"] = lambda: raw(weight, x)
    missing = uninstalled(["statefulnn", "flax.nnx", "equinox"])
    if "statefulnn" not in missing:
        import statefulnn as nn

        class Chain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(weight)

            def forward(self, x: jax.Array) -> jax.Array:
                return chain(self.weight.value, x)

        class Remembering(Chain):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("last", jnp.zeros((size, size)))

            def forward(self, x: jax.Array) -> jax.Array:
                self.last = chain(self.weight.value, x)
                return self.last

        reading, writing = nn.jit(Chain()), nn.jit(Remembering())
        module, plain = Chain(), jax.jit(lambda model, x: model(x))
        cases["nn.jit, read-only"] = lambda: reading(x)
        cases["nn.jit, writes a buffer"] = lambda: writing(x)
        cases["jax.jit on the module"] = lambda: plain(module, x)
    if "flax.nnx" not in missing:
        from flax import nnx

        class NnxChain(nnx.Module):
            def __init__(self) -> None:
                self.weight = nnx.Param(weight)

            def __call__(self, x: jax.Array) -> jax.Array:
                return chain(self.weight[...], x)

        nnx_model, nnx_jit = NnxChain(), nnx.jit(lambda model, x: model(x))
        cases["flax.nnx.jit"] = lambda: nnx_jit(nnx_model, x)
    if "equinox" not in missing:
        import equinox as eqx

        class EquinoxChain(eqx.Module):
            weight: jax.Array

            def __call__(self, x: jax.Array) -> jax.Array:
                return chain(self.weight, x)

        equinox_model, equinox_jit = EquinoxChain(weight), eqx.filter_jit(lambda m, x: m(x))
        cases["equinox.filter_jit"] = lambda: equinox_jit(equinox_model, x)
    returned: dict[str, list[float]] = {label: [] for label in cases}
    done: dict[str, list[float]] = {label: [] for label in cases}
    for number in progress(range(rounds + 1), "asynchrony"):
        for label, call in cases.items():
            start = time.perf_counter()
            out = call()
            middle = time.perf_counter()
            jax.block_until_ready(out)
            end = time.perf_counter()
            if number:
                returned[label].append(1e3 * (middle - start))
                done[label].append(1e3 * (end - start))
    rows = []
    for label in cases:
        a, b = statistics.median(returned[label]), statistics.median(done[label])
        rows.append(
            {
                "label": label,
                "returned_ms": round(a, 3),
                "done_ms": round(b, 3),
                # A synchronous call returns with its result there; what is left over then is noise.
                "asynchronous": a < 0.5 * b,
            }
        )
    return rows


def asynchrony_afresh(*, size: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """As `asynchrony`, in a process with JAX's default settings."""
    arguments = f"size={size}, length={length}, rounds={rounds}"
    code = f"import json, _probes; print(json.dumps(_probes.asynchrony({arguments})))"
    return json.loads(_fresh_process(code))


# ------------------------------------------------------------------------------------- invalidation


def invalidation(modules: int, *, rounds: int) -> list[dict[str, Any]]:
    """What a call of `nn.jit(model)` costs after something changed somewhere, in microseconds.

    The model has many modules and few tensors, so that looking at modules would show.

    Args:
        modules: how many modules the model has, about.
        rounds: how many times each is measured.
    """
    import statefulnn as nn

    class Scale(nn.Module):
        def __init__(self, with_parameter: bool) -> None:
            super().__init__()
            if with_parameter:
                self.scale = nn.Parameter(jnp.ones(8))

        def forward(self, x: jax.Array) -> jax.Array:
            return x * self.scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Scale(i < 8) for i in range(modules)])

        def forward(self, x: jax.Array) -> jax.Array:
            for layer in list(self.layers)[:8]:
                x = layer(x)
            return x

    model, other = Net(), Net()
    x = jnp.ones(8)
    compiled = nn.jit(model)

    def nothing() -> None:
        pass

    def value_write() -> None:
        box = next(iter(model.parameters()))
        box.value = box.value

    def elsewhere() -> None:
        other.train(not other.training)

    def here() -> None:
        model.layers[0].train(not model.layers[0].training)

    changes = {
        "nothing changed": nothing,
        "a value was written": value_write,
        "another model was switched to eval": elsewhere,
        "one of its modules was switched to eval": here,
    }
    samples: dict[str, list[float]] = {label: [] for label in changes}
    for number in progress(range(rounds + 2), "invalidation"):
        for label, change in changes.items():
            # Calls that are not counted, so that each change stands alone.
            for _ in range(3):
                jax.block_until_ready(compiled(x))
            change()
            start = time.perf_counter()
            out = compiled(x)
            elapsed = time.perf_counter() - start
            jax.block_until_ready(out)
            # The first two rounds compile both training modes.
            if number > 1:
                samples[label].append(1e6 * elapsed)
    return [
        {"label": label, "us": round(statistics.median(values), 2)}
        for label, values in samples.items()
    ]


# ------------------------------------------------------------ construction, import


def _build_torch_like(nn: Any, blocks: int, width: int) -> Any:
    """A transformer's modules, in torch's names."""
    layers = []
    for _ in range(blocks):
        layers += [
            nn.LayerNorm(width),
            nn.MultiheadAttention(width, 4, batch_first=True),
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        ]
    return nn.ModuleList(layers)


def _build(library: str, blocks: int, width: int) -> Any:
    if library in ("torch", "statefulnn"):
        import importlib

        nn = importlib.import_module("torch.nn" if library == "torch" else "statefulnn")
        return _build_torch_like(nn, blocks, width)
    layers: list[Any] = []
    if library == "flax.nnx":
        from flax import nnx

        rngs = nnx.Rngs(0)
        for _ in range(blocks):
            layers += [
                nnx.LayerNorm(width, rngs=rngs),
                nnx.MultiHeadAttention(4, width, rngs=rngs),
                nnx.LayerNorm(width, rngs=rngs),
                nnx.Linear(width, 4 * width, rngs=rngs),
                nnx.Linear(4 * width, width, rngs=rngs),
            ]
        return nnx.List(layers)
    import equinox as eqx

    keys = iter(jax.random.split(jax.random.key(0), 3 * blocks))
    for _ in range(blocks):
        layers += [
            eqx.nn.LayerNorm(width),
            eqx.nn.MultiheadAttention(4, width, key=next(keys)),
            eqx.nn.LayerNorm(width),
            eqx.nn.Linear(width, 4 * width, key=next(keys)),
            eqx.nn.Linear(4 * width, width, key=next(keys)),
        ]
    return layers


def _construct_here(library: str, blocks: int, width: int) -> None:
    """Runs in a fresh process: prints the seconds of the first and of the second construction."""
    __import__(library)
    compilations = [0]

    def count(event: str, _: float, **__: Any) -> None:
        compilations[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    # The backend's own start is nobody's construction.
    jax.block_until_ready(jnp.zeros(()))
    compilations[0] = 0
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        model = _build(library, blocks, width)
        if library == "torch":
            pass
        elif library in ("statefulnn", "equinox"):
            jax.block_until_ready(jax.tree.leaves(model))
        else:
            from flax import nnx

            jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"first": seconds[0], "second": seconds[1], "compilations": compilations[0]}))


def _fresh_process(code: str) -> str:
    path = os.pathsep.join(
        [str(HERE), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    )
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    # Installed packages have their bytecode; a source tree that may not write it compiles every time.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip().splitlines()[-1]


def construction(*, blocks: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """Building a transformer of `blocks` blocks in a fresh process, and once more in the same one."""
    rows = []
    for library in progress(["statefulnn", "torch", "flax.nnx", "equinox"], "construction"):
        if uninstalled([library]):
            continue
        code = f"import _probes; _probes._construct_here({library!r}, {blocks}, {width})"
        results = [json.loads(_fresh_process(code)) for _ in range(rounds)]
        rows.append(
            {
                "label": library,
                "first_ms": round(1e3 * statistics.median(r["first"] for r in results), 1),
                "second_ms": round(1e3 * statistics.median(r["second"] for r in results), 1),
                "compilations": results[0]["compilations"],
            }
        )
    return rows


def import_time(*, rounds: int) -> list[dict[str, Any]]:
    """Seconds to import each library in a fresh process, interleaved; the first row is jax."""
    names = ["jax", "statefulnn", "flax.nnx", "equinox", "torch"]
    missing = uninstalled(names)
    names = [name for name in names if name not in missing]
    samples: dict[str, list[float]] = {name: [] for name in names}
    # The first round reads the files from disk.
    order = random.Random(0)
    for number in progress(range(rounds + 1), "import"):
        # In another order each round: what a process finds in caches depends on the one before it.
        for name in order.sample(names, len(names)):
            code = f"import time; t = time.perf_counter(); import {name}; print(time.perf_counter() - t)"
            seconds = float(_fresh_process(code))
            if number:
                samples[name].append(seconds)
    base = samples["jax"]
    return [
        {
            "label": name,
            "ms": round(1e3 * statistics.median(values), 1),
            # Of the medians: single imports differ by a third here, and so would their ratios.
            "ratio": round(statistics.median(values) / statistics.median(base), 3),
        }
        for name, values in samples.items()
    ]
