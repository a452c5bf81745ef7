"""nn.export: a module's methods as StableHLO and its weights, in one file that runs without its class.

The weights are arguments of the programs and lie in the file as arrays. `statefulnn.io.exported` says what
the file looks like, and reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import statefulnn
from statefulnn.core import refusals
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import CheckpointError, explain
from statefulnn.core.graph import require_module
from statefulnn.core.module import Module
from statefulnn.core.placement import META, DeviceLike, is_meta, resolve_device
from statefulnn.core.plan import Plan, plan_of
from statefulnn.io import exported
from statefulnn.io._atomic import replacing
from statefulnn.io._export_formats import check_format, write_onnx, write_stablehlo
from statefulnn.io._export_programs import lowered, refused
from statefulnn.io._export_tasks import named, task_of
from statefulnn.io._reading import reading
from statefulnn.io._safetensors import DTYPES, NAMES, write
from statefulnn.io.exported import DIGEST, FORMAT, MANIFEST, PROGRAM, ExportedModule


def export(
    module: Module,
    inputs: object,
    path: str | os.PathLike,
    *,
    format: Literal["statefulnn", "stablehlo", "onnx"] = "statefulnn",
    kwargs: Mapping[str, object] | None = None,
    methods: str | Iterable[str] | Mapping[str, Mapping[str, object]] = ("forward",),
    batch: str | None = "b",
    shapes: Mapping[str, object] | None = None,
    constraints: Sequence[str] = (),
    platforms: Sequence[str] | None = None,
    rng: bool = False,
    mutable: bool = False,
    vjp_order: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a module as compiled functions and weights, to one file that runs without its class.

    The module is exported in the mode it is in: call ``eval()`` first for inference.

    Args:
        module: it is not changed.
        inputs: the positional inputs, a tuple or one that is no tuple: arrays, ``jax.ShapeDtypeStruct``, and
            tuples, lists and dicts of these. Only shapes and dtypes matter.
        path: the file, which is replaced as a whole.
        format: who is to read it. "statefulnn": `load_exported`. "stablehlo": compilers of MLIR, and JAX;
            the ending of `path` says which form, .mlir for text, .mlirbc for portable bytecode, .jax for
            ``jax.export.deserialize``. "onnx": ONNX's runtimes, in browsers too; where `inputs` are arrays,
            onnxruntime's outputs are compared with the module's first. The latter two hold one method, a
            function of its inputs alone.
        kwargs: the keyword inputs.
        methods: names of methods with these inputs; or a dict of name -> settings, which may have
            ``function`` (a function of module and inputs; without it, the method of that name), ``inputs``,
            ``kwargs``, ``shapes`` and ``constraints`` of their own. The first is what calling runs.
        batch: the name of the first dimension, which may then have any size of 1 or more; inputs have it
            whose first dimension is that of the first input. None for fixed shapes.
        shapes: for inputs by argument name, their shapes with names for dimensions of any size:
            ``{"ids": "b, t", "mask": "b, t"}``, or the same within tuples, lists and dicts. These inputs take
            no part in `batch`.
        constraints: what may be assumed of the dimensions, such as ``"t <= 512"``.
        platforms: what to lower for: "cpu", "cuda", "rocm", "tpu". The first two by default, for StableHLO
            the first; ONNX knows none.
        rng: whether the functions take a random key, ``loaded(x, rng=key)``, as ``functional_call`` does.
        mutable: whether the module may write state; the functions then return ``(out, new_state)``.
        vjp_order: how often the functions can be differentiated.
        metadata: texts to keep in the file.

    Raises:
        MissingRngError: if the module draws random numbers and `rng` is False.
        StateWriteError: if it writes state and `mutable` is False.
        ShapeError: if it cannot be traced with dimensions of any size.
        CheckpointError: for what a file cannot hold; nothing is written. For ONNX it names the primitives of
            JAX that are not there, and the modules that use them.
        ImportError: if safetensors is not installed (extra ``io``); for ONNX jax2onnx (extra ``onnx``), for
            .jax flatbuffers (extra ``stablehlo``).

    Source: ``jax.export``; ``torch.export.save``; ``torch.onnx.export``.

    Example:
        >>> import os, tempfile, jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nn.export(model, jnp.ones((1, 3)), os.path.join(folder, "model.export"))
        ...     loaded = nn.load_exported(os.path.join(folder, "model.export"))
        >>> loaded
        ExportedModule(Sequential: forward(input: float32[b, 3]) -> float32[b, 2])
        >>> x = jnp.ones((7, 3))
        >>> bool(jnp.allclose(loaded(x), model(x)))
        True
    """
    require_module(module, "nn.export")
    path = Path(path)
    texts = dict(metadata or {})
    if not all(isinstance(t, str) for item in texts.items() for t in item):
        raise refused(f"with metadata {texts!r}", "metadata are texts", "{'epoch': str(epoch)}")
    common = {
        "inputs": inputs,
        "kwargs": kwargs,
        "shapes": shapes,
        "constraints": constraints,
    }
    wanted = named(methods)
    settings = {"rng": rng, "mutable": mutable, "vjp_order": vjp_order, "metadata": metadata}
    check_format(format, list(wanted), {**settings, "platforms": platforms})
    tasks = [task_of(module, n, {**common, **s}, batch) for n, s in wanted.items()]
    weights, table, ties = _weights(plan_of(module))
    if format == "stablehlo":
        return write_stablehlo(path, tasks[0], module, weights, platforms or ("cpu",), vjp_order)
    if format == "onnx":
        return write_onnx(path, tasks[0], module, weights, texts)
    platforms = ("cpu", "cuda") if platforms is None else platforms
    entries = {}
    blobs = {}
    for task in tasks:
        entry, programs = lowered(task, module, len(weights), platforms, rng, mutable, vjp_order)
        entries[task.name] = entry
        blobs.update({f"{PROGRAM}{task.name}:{i}": blob for i, blob in enumerate(programs)})
    taken = next((n for n in weights if n in blobs), None)
    if taken is not None:
        raise refused(f"with a weight {taken!r}", "a program has that name", "another name")
    # What nn.load reads: the weights in their order, with their ties.
    notes = {"order": [*weights, *ties], "ties": ties}
    manifest = {
        "format": FORMAT,
        "module": type(module).__name__,
        "versions": {"jax": version_of("jax"), "statefulnn": statefulnn.__version__},
        "platforms": list(platforms),
        "weights": table,
        "ties": ties,
        "methods": entries,
        "metadata": texts,
    }
    text, arrays = json.dumps(manifest), {**weights, **blobs}
    _check_readable(path, text, arrays)
    header = {
        MANIFEST: text,
        DIGEST: hashlib.sha256(text.encode()).hexdigest(),
        "format": "pt",
        "statefulnn": json.dumps(notes),
    }
    with replacing(path) as temporary:
        write(temporary, arrays, header, "statefulnn")


def _check_readable(path: Path, manifest: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise for what the reader would refuse: it is not written."""
    specs = {n: exported.Spec(a.dtype, a.shape) for n, a in arrays.items()}
    try:
        ExportedModule(path, exported.checked(path, json.loads(manifest)), specs)
    except exported.DamagedFileError as error:
        what, why, _ = str(error).split("\n", 2)
        what, why = what.removeprefix(f"{path}, at byte 8: "), why.removeprefix("  Why: ")
        raise refused(f"with what a file cannot hold: {what}", why, "leave it out") from None


def load_exported(path: str | os.PathLike, *, device: DeviceLike | None = None) -> ExportedModule:
    """Read a file of `export`: an object that is called as the module was, without its class.

    The file ``statefulnn/io/exported.py`` does the same alone: it needs JAX and NumPy only.

    Args:
        path: the file. A program is compiled and run as it stands, so take it from where you would take code.
        device: where the weights go: a device, its name, or a ``Sharding``.

    Returns:
        an object with a method for each that was exported, ``params`` by name, ``load_state_dict``,
        ``functionalize`` for gradients, and ``describe()``.

    Raises:
        CheckpointError: for a file that is cut off, changed, of another format or a newer version, or that
            nn.export cannot have written.
        OSError: of the operating system, with the path: FileNotFoundError if there is none.
        MemoryError: if the weights do not fit into memory.
        RuntimeError: if it holds 64-bit arrays, and JAX's 64-bit types are off.
        ValueError: for ``device="meta"``; of JAX, for a sharding that does not fit a weight.

    Example: see `export`.
    """
    place = resolve_device(device)
    if place == META:
        raise ValueError(
            explain(
                "called nn.load_exported with device='meta'",
                "a program needs numbers to run on",
                "nn.load_exported(path).describe() for shapes",
            )
        )
    with reading(Path(path)):
        try:
            module = exported.read(Path(path))
        except exported.DamagedFileError as error:
            raise CheckpointError(str(error)) from None
    return module.placed(place)


def _weights(plan: Plan) -> tuple[dict[str, np.ndarray], list, dict[str, str]]:
    """Return the arrays in leaf order, the table of them, and the further names of tied ones."""
    if current_trace() is not EAGER:
        raise refused("inside of a JAX transformation", "a file holds numbers", "export outside")
    moduledef = plan.moduledef
    arrays, table = {}, []
    for i, (name, value) in enumerate(zip(moduledef.leaf_names, plan.leaves(), strict=True)):
        if moduledef.kind_of(i) == "generator":
            continue
        if is_meta(value):
            raise refusals.no_numbers(plan.boxes[i].label())
        if jnp.issubdtype(value.dtype, jax.dtypes.extended) or np.dtype(value.dtype) not in NAMES:
            raise refused(
                f"with {name!r} of dtype {value.dtype}",
                f"safetensors has {', '.join(DTYPES)}",
                "cast it, or keep jax.random.key_data(key) of a key",
            )
        array = np.asarray(value)
        arrays[name] = array = np.ascontiguousarray(array).reshape(array.shape)
        crc = exported._crc(array)
        table.append([name, moduledef.kind_of(i), array.dtype.name, crc])
    names = moduledef.leaf_names
    ties = {n: names[i] for n, i in moduledef.names.items() if n != names[i] and names[i] in arrays}
    return arrays, table, ties
