"""nn.export for other readers: one method as StableHLO or ONNX, its weights among its numbers."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.extras import import_extra
from statefulnn.core.module import Module
from statefulnn.io._atomic import replacing
from statefulnn.io._export_programs import FlatMethod, exported_of, refused, sizes_explained
from statefulnn.io._export_tasks import Task
from statefulnn.io._to_onnx import check_numbers, converted, inlined, onnx_libraries

_NO_PLACE = {
    "statefulnn": (),
    "stablehlo": ("rng", "mutable", "metadata"),
    "onnx": ("rng", "mutable", "vjp_order", "platforms"),
}
_ENDINGS = {".mlir": "text", ".mlirbc": "bytecode", ".jax": "what jax.export.deserialize reads"}
_MOST_BYTES = 2**31 - 2**20  # protobuf ends at 2**31, and the graph needs some


def check_format(format: str, methods: Sequence[str], settings: Mapping[str, object]) -> None:
    """Raise for a format that is not there, and for settings that it has no place for."""
    if format not in _NO_PLACE:
        known = ", ".join(map(repr, _NO_PLACE))
        raise refused(f"with format={format!r}", f"there are {known}", "format='onnx'")
    given = [f"{n}={settings[n]!r}" for n in _NO_PLACE[format] if settings[n]]
    if format != "statefulnn" and len(methods) != 1:
        given.append(f"methods={list(methods)!r}")
    if given:
        raise refused(
            f"with format={format!r} and {', '.join(given)}",
            "such a file holds one function, of its inputs alone",
            "leave it out, and write a file for each method; or format='statefulnn'",
        )


def write_stablehlo(
    path: Path,
    task: Task,
    module: Module,
    weights: Mapping[str, np.ndarray],
    platforms: Sequence[str],
    vjp_order: int,
) -> None:
    """Write a method as StableHLO, in the form that the ending of the file's name says."""
    known = ", ".join(f"{ending} ({what})" for ending, what in _ENDINGS.items())
    called = f"with format='stablehlo' to {path.name!r}"
    if path.suffix not in _ENDINGS:
        raise refused(called, f"the ending says which form: {known}", repr(path.stem + ".mlir"))
    if path.suffix == ".jax":
        needs = "writes what jax.export.deserialize reads"
        import_extra("flatbuffers", '"statefulnn[stablehlo]"', f"called nn.export {called}", needs)
    elif vjp_order or len(platforms) != 1:
        raise refused(
            f"{called}, {vjp_order=}, platforms={tuple(platforms)!r}",
            "such a file holds one function for one platform",
            f"platforms=('cpu',); or {path.stem + '.jax'!r}, which holds several, and derivatives",
        )
    method = FlatMethod(task, module, len(weights), rng=False, mutable=False)
    constants = [jnp.asarray(array) for array in weights.values()]

    def call(*args: Any, **kwargs: Any) -> Any:
        found = method.flat(*constants, *jax.tree_util.tree_leaves((args, kwargs)))
        return jax.tree_util.tree_unflatten(method.out, found)

    call.__name__ = task.name
    program = exported_of(task, call, (task.args, task.kwargs), platforms, task.example)
    with replacing(path) as temporary:
        if path.suffix == ".jax":
            temporary.write_bytes(program.serialize(vjp_order=vjp_order))
        elif path.suffix == ".mlir":
            temporary.write_text(program.mlir_module())
        else:
            temporary.write_bytes(program.mlir_module_serialized)


def write_onnx(
    path: Path,
    task: Task,
    module: Module,
    weights: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Write a method as ONNX, with the weights as initializers under their names."""
    onnx, *_ = onnx_libraries()
    if sum(array.nbytes for array in weights.values()) > _MOST_BYTES:
        raise refused(
            "with format='onnx' and more than 2 GB of weights",
            "a file of ONNX cannot hold more",
            "format='stablehlo'",
        )
    method = FlatMethod(task, module, len(weights), rng=False, mutable=False)
    # Traced before jax2onnx is at work: meanwhile it replaces functions of JAX, and what F compiled of those
    # would be met by later calls of the model.
    with sizes_explained(task, method.flat, method.example):
        program = inlined(jax.make_jaxpr(method.flat)(*method.before, *method.dynamic))
    out = jax.tree_util.tree_unflatten(method.out, range(method.out.num_leaves))
    paths = jax.tree_util.tree_leaves_with_path(out)
    outputs = [_dotted(f"output{jax.tree_util.keystr(where)}") for where, _ in paths]
    inputs = [*weights, *map(_dotted, task.labels)]
    twice = [n for n, times in collections.Counter([*inputs, *outputs]).items() if times > 1]
    if twice:
        why = "weights, inputs and outputs share their names there"
        raise refused(f"with format='onnx' and two {twice[0]!r}", why, "another name")
    model = converted(program, task.name, inputs, outputs)
    del model.graph.input[: len(weights)]
    # A forward in eval mode does not read num_batches_tracked.
    used = {id(v) for v in [*(v for e in program.eqns for v in e.invars), *program.jaxpr.outvars]}
    for name, variable in zip(weights, program.jaxpr.invars, strict=False):
        if id(variable) in used:
            model.graph.initializer.append(onnx.numpy_helper.from_array(weights[name], name))
    model.graph.name, model.producer_name = type(module).__name__, "statefulnn"
    onnx.helper.set_model_props(model, dict(metadata))
    content = model.SerializeToString()
    given = [v.value if isinstance(v, Box) else v for v in task.given]
    if all(isinstance(v, (jax.Array, np.ndarray)) for v in given):
        specs = method.dynamic
        arrays = [np.asarray(v, s.dtype) for v, s in zip(given, specs, strict=True)]
        with jax.default_matmul_precision("highest"):
            found = jax.jit(method.flat)(*weights.values(), *arrays)
        wanted = dict(zip(outputs, map(np.asarray, found), strict=True))
        inputs = dict(zip(inputs[len(weights) :], arrays, strict=True))
        check_numbers(content, inputs, wanted, task.name)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _dotted(label: str) -> str:
    """Return ``batch.x`` for ``batch['x']``."""
    return re.sub(r"\[['\"]?(.*?)['\"]?\]", r".\1", label)
