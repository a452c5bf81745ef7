"""Files of nn.export: a compiled function and its weights, run with JAX alone.

This file needs the standard library, NumPy and JAX, and nothing else of the package: copied elsewhere, it
runs a model where neither its class nor this package is installed.

A file of nn.export is in the safetensors format: the length of the header (8 bytes, little-endian), the
header (JSON: name -> dtype, shape, begin and end), and the arrays. The weights are arrays under their dotted
names, each tied one once; each StableHLO program is an array of bytes. What belongs together is said by a
JSON text in the header's metadata. Nothing in it is executed as Python.

A file may come from anybody. Loading runs nothing of it: what the manifest says is checked against all that
nn.export can have written (`_Part`), shapes against the way JAX prints them (`_Shapes`), and arrays against
their checksums. JAX sees a program, and the names of its dimensions, when it is called.

Terms
  method       one exported function; a file has one or several
  program      StableHLO, with weights and inputs as its arguments. A method has one, and one more for each
               order of derivative: its vector-Jacobian product
  manifest     the JSON text that says what belongs together
  tree         how arrays are put together to arguments or outputs: tuples, lists, dicts, None

Source: github.com/huggingface/safetensors; docs.jax.dev, "Exporting and serializing staged-out computations".
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

FORMAT = 1
MANIFEST, DIGEST, PROGRAM = "statefulnn.export", "statefulnn.export.sha256", "program:"
_LONGEST_HEADER = 100_000_000
# What JSON may turn into: this much, and this many times the size of the file; an object takes so many bytes.
_FLOOR, _MULTIPLE, _OBJECT = 64 << 20, 4, 64
# More than an export needs, and little enough that no text keeps the reader busy.
_LONGEST_NAME, _LONGEST_SHAPE, _HIGHEST_POWER, _DEEPEST = 4096, 10_000, 64, 100
_MOST_CONSTRAINTS, _MOST_KINDS, _MOST_FIELDS, _MOST_DIMENSIONS = 100, 100, 1000, 64
_KINDS = ("trainable", "frozen", "buffer")
_DTYPES: dict[Any, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}

# By name: what the inputs and outputs of a program may have.
_NAMED: dict[str, np.dtype] = {
    np.dtype(kind).name: np.dtype(kind)
    for name in (
        *("bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz"),
        *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if (kind := getattr(jnp, name, None)) is not None
}


class DamagedFileError(RuntimeError):
    """A file that is not what nn.export wrote, or is of a newer format."""


class UnknownWeightError(KeyError):
    """A name of a weight that the file does not have, or one that is missing."""

    def __str__(self) -> str:  # KeyError shows the repr of its argument, newlines and all
        return str(self.args[0])


def load_exported(path: str | os.PathLike, *, device: Any = None) -> ExportedModule:
    """Read a file of nn.export.

    Args:
        path: the file.
        device: where the weights go, a ``jax.Device`` or ``Sharding``; None for JAX's default.

    Returns:
        an object that is called as the module was; see `ExportedModule`.

    Raises:
        DamagedFileError: for a file that is cut off, changed, of another format or a newer version, or that
            nn.export cannot have written.
        OSError: of the operating system, with the path: FileNotFoundError if there is none.
        MemoryError: if the weights do not fit into memory.
        RuntimeError: if it holds 64-bit arrays, and JAX's 64-bit types are off.
        ValueError: of JAX, for a sharding that does not fit a weight.
    """
    return read(Path(path)).placed(device)


def read(path: Path) -> ExportedModule:
    """Return what a file holds, with its weights as arrays of numpy; all errors of it are from here."""
    with _reading(path), _opened(path) as file:
        module = ExportedModule(path, file.manifest, dict(file.specs), file.size)
        for name, crc in module._sums.items():
            own = file.array(name)
            if _crc(own) != crc:
                raise _damaged(
                    path, 8, f"{_shown(name)} with other bytes than written", f"CRC {crc:#x}"
                )
            module._params[name] = own
        for method in module.methods.values():
            for program in method._programs:
                program.take(file.array(program.name).tobytes())
        return module


class ExportedModule:
    """A module that was exported: called as the module was, without its class.

    Attributes:
        methods: name -> `ExportedMethod`; each is an attribute as well, ``loaded.encode(x)``.
        params: name -> array, every parameter and buffer, each tied one once.
        ties: further names of tied parameters -> the name in `params`.
        metadata: what was given to nn.export.
        platforms: what it was lowered for.
        versions: of jax and statefulnn, where it was exported.
    """

    def __init__(self, path: Path, manifest: _Part, arrays: dict[str, Spec], size: int = 0) -> None:
        """Check what a manifest says against the arrays of the file; the weights come later."""
        parts = manifest.fields(
            *("format", "module", "versions", "platforms", "weights", "ties", "methods", "metadata")
        )
        _, module, versions, platforms, weights, ties, methods, metadata = parts
        self._name, self._path, self._size = module.text(), path, size
        self.metadata: dict[str, str] = metadata.texts(longest=_LONGEST_HEADER)
        self.versions: dict[str, str] = versions.texts()
        self.platforms = tuple(part.text() for part in platforms.each())
        if not self.platforms or len(set(self.platforms)) < len(self.platforms):
            raise platforms.wrong("names of platforms, each once")
        self._kinds: dict[str, str] = {}
        self._specs: dict[str, Spec] = {}
        self._sums: dict[str, int] = {}
        self._params: dict[str, Any] = {}
        for weight in weights.each():
            name, kind, dtype, crc = (part for part in weight.each(4))
            self._kinds[name.text()] = kind.one_of(_KINDS)
            spec = arrays.pop(name.text(), None)
            if spec is None or spec.dtype.name != dtype.text():
                found = f"no array {_shown(name.value)} of {_shown(dtype.value)}"
                raise _damaged(path, 8, found, "every weight, once")
            self._specs[name.text()] = spec
            self._sums[name.text()] = crc.number(1 << 32)
        self.ties: dict[str, str] = ties.texts()
        for name, first in self.ties.items():
            if name in self._specs or first not in self._specs:
                raise ties.wrong(f"further names of weights, not {_shown(name)}: {_shown(first)}")
        self.methods: dict[str, ExportedMethod] = {}
        classes: dict[tuple[str, ...], type] = {}
        for name, entry in methods.named().items():
            self.methods[name] = ExportedMethod(self, name, entry, arrays, classes)
        if not self.methods:
            raise methods.wrong("at least one method")
        if arrays:
            raise _damaged(
                path, 8, f"an array {_shown(next(iter(arrays)))} more", "weights, programs"
            )

    def placed(self, device: Any) -> ExportedModule:
        """Put the weights on a device; errors are about the device and the settings of JAX.

        Args:
            device: a ``jax.Device`` or ``Sharding``; None for JAX's default.

        Returns:
            this object.
        """
        specs = [(f"the weight {_shown(n)}", spec) for n, spec in self._specs.items()]
        for name, method in self.methods.items():
            specs += [(f"an input or output of {_shown(name)}", spec) for spec in method.specs]
        for what, spec in specs:
            if jax.dtypes.canonicalize_dtype(spec.dtype) != spec.dtype:
                raise RuntimeError(
                    _message(
                        f"loaded {self._path}, where {what} has dtype {spec.dtype.name}",
                        "64-bit types are off in JAX, which would silently give 32 bits",
                        'jax.config.update("jax_enable_x64", True) at the start of the program',
                    )
                )
        try:
            self._params = {n: jax.device_put(v, device) for n, v in self._params.items()}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MemoryError(
                _message(
                    f"loaded {self._path}, whose weights do not fit where they go",
                    str(error)[:500],
                    "another device=, or a sharding over several",
                )
            ) from error
        return self

    @property
    def params(self) -> Mapping[str, Any]:
        """Every parameter and buffer by name; `load_state_dict` replaces them."""
        return MappingProxyType(self._params)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the first method."""
        return next(iter(self.methods.values()))(*inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        methods = self.__dict__.get("methods", {})
        if name in methods:
            return methods[name]
        raise AttributeError(f"{type(self).__name__} has no attribute or method {name!r}")

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> list[str]:
        """Replace weights by name; after an error they are as they were.

        Args:
            state: name -> array; names of tied parameters mean the one array.
            strict: whether all must be given.

        Returns:
            the names that were not given.

        Raises:
            KeyError: for unknown names, or missing ones with ``strict=True``.
            ValueError, TypeError: for another shape, or dtype.
        """
        new = dict(self._params)
        new.update(self._checked(state))
        given = {self.ties.get(name, name) for name in state}
        missing = [name for name in new if name not in given]
        if strict and missing:
            raise UnknownWeightError(
                _message(
                    f"load_state_dict was not given {_listed(missing)}",
                    "with strict=True every weight must be given",
                    "pass them all, or strict=False to keep the others",
                )
            )
        self._params = {
            name: value if value is self._params[name] else _beside(value, self._params[name])
            for name, value in new.items()
        }
        return missing

    def functionalize(self, method: str | None = None) -> tuple[Callable, dict[str, Any]]:
        """Return a method as a pure function, and the trainable parameters.

        Args:
            method: its name; None for the first.

        Returns:
            ``fn, params`` with ``fn(params, *inputs, **kwargs)``: what `params` does not name is as in this
            object. Gradients need ``nn.export(..., vjp_order=1)``.
        """
        chosen = next(iter(self.methods.values())) if method is None else self.methods[method]

        def fn(params: Mapping[str, Any], /, *inputs: Any, **kwargs: Any) -> Any:
            return chosen._run({**self._params, **self._checked(params)}, inputs, kwargs)

        return fn, {n: v for n, v in self._params.items() if self._kinds[n] == "trainable"}

    def describe(self) -> str:
        """Return what the file holds: methods with their inputs and outputs, weights, versions."""
        weights = sum(spec.nbytes for spec in self._specs.values())
        lines = [f"{self._name}, exported for {', '.join(self.platforms)}"]
        lines += [f"  {method.describe()}" for method in self.methods.values()]
        lines.append(f"  weights: {len(self._specs)} arrays of {_bytes(weights)}")
        lines.append(f"  file: {self._path.name}, {_bytes(self._size)}")
        lines.append(f"  made with: {', '.join(f'{k} {v}' for k, v in self.versions.items())}")
        lines += [f"  {key}: {value}" for key, value in self.metadata.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        methods = ", ".join(method.describe() for method in self.methods.values())
        return f"ExportedModule({self._name}: {methods})"

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        checked: dict[str, Any] = {}
        for name, value in given.items():
            first = self.ties.get(name, name)
            if first not in self._specs:
                raise UnknownWeightError(
                    _message(
                        f"was given a weight {_shown(name)}",
                        f"the file has {_listed(self._specs)}",
                        "use these names",
                    )
                )
            if first in checked and checked[first] is not value:
                raise ValueError(
                    _message(
                        f"was given different arrays for {_shown(first)} and {_shown(name)}",
                        "they are tied: one array under two names",
                        "pass one of them, or the same array under both",
                    )
                )
            checked[first] = value
        return {n: _fitting(n, v, self._specs[n], {}, "the weight") for n, v in checked.items()}


class ExportedMethod:
    """One function of a file: called with the inputs it was exported for.

    Attributes:
        name: its name.
        inputs: name -> shape and dtype, as texts: ``{"x": "float32[b, 3]"}``.
        outputs: the same of the outputs.
        vjp_order: how often it can be differentiated.
    """

    def __init__(
        self,
        module: ExportedModule,
        name: str,
        entry: _Part,
        arrays: dict[str, Spec],
        classes: dict[tuple[str, ...], type],
    ) -> None:
        parts = entry.fields(
            *("positional", "keyword", "labels", "out", "state", "mutable", "rng", "programs")
        )
        positional, keyword, labels, out, state, mutable, rng, programs = parts
        self.name = name
        self._module = module
        self._mutable, self._rng = mutable.flag(), rng.flag()
        self._labels = [label.text() for label in labels.each()]
        self._weights = list(module._specs)
        self._programs = [
            _Program(f"{PROGRAM}{name}:{i}", program, module.platforms, arrays)
            for i, program in enumerate(programs.each())
        ]
        if not self._programs:
            raise programs.wrong("at least one program")
        first = self._programs[0]
        count = len(self._weights) + self._rng
        wanted = [*module._specs.values(), *([_KEY] if self._rng else [])]
        if first.ins[:count] != wanted or len(first.ins) != count + len(self._labels):
            raise programs.wrong("a program that takes the weights, a key if rng, and the labels")
        for program, after in zip(self._programs, self._programs[1:], strict=False):
            if (after.ins, after.outs) != program.transposed():
                raise programs.wrong("programs each of which is the derivative of the one before")
        self._specs = first.ins[count:]

        inputs: list[int] = []
        self._positional: list[tuple[str, _Tree]] = []
        for pair in positional.each():
            label, tree = pair.each(2)
            self._positional.append((label.text(), tree.tree(inputs, classes)))
        self._keyword = {n: tree.tree(inputs, classes) for n, tree in keyword.named().items()}
        names = [*(n for n, _ in self._positional), *self._keyword, *(["rng"] if self._rng else [])]
        if len(set(names)) < len(names):
            raise entry.wrong("arguments with different names")
        if sorted(inputs) != list(range(len(self._labels))):
            raise entry.wrong("inputs with every label once")
        self._state = [part.one_of(module._specs) for part in state.each()]
        if len(set(self._state)) < len(self._state) or (self._state and not self._mutable):
            raise state.wrong("names of weights, each once, of a method that is mutable")
        outputs: list[int] = []
        self._out = out.tree(outputs, classes)
        if sorted(outputs) != list(range(len(first.outs) - len(self._state))):
            raise out.wrong("every output of the program once")
        self.inputs = {
            label: _text(spec) for label, spec in zip(self._labels, self._specs, strict=True)
        }
        self.outputs = _texts(self._out, [_text(o) for o in first.outs])
        self.vjp_order = len(self._programs) - 1
        self._call = jax.jit(_differentiable(self._programs, name))

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the program on inputs, with the weights of the module."""
        return self._run(self._module._params, inputs, kwargs)

    def _run(self, params: Mapping[str, Any], inputs: tuple, kwargs: dict[str, Any]) -> Any:
        weights = [params[n] for n in self._weights]
        key = [_key_data(self.name, kwargs)] if self._rng else []
        outs = self._call([*weights, *key, *self._flat(inputs, kwargs)])
        out = _built(self._out, outs)
        if not self._mutable:
            return out
        return out, dict(zip(self._state, outs[len(outs) - len(self._state) :], strict=True))

    def _flat(self, inputs: tuple, kwargs: dict[str, Any]) -> list[Any]:
        """Return the inputs in the order of the program, checked."""
        names = [n for n, _ in self._positional]
        if len(inputs) > len(names):
            raise self._misfit(f"{len(inputs)} positional inputs", f"at most {len(names)}")
        given = dict(zip(names, inputs, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise self._misfit(f"the input {name!r} twice", "it once")
            if name not in names and name not in self._keyword:
                raise self._misfit(f"an input {name!r}", _listed([*names, *self._keyword]))
            given[name] = value
        flat: dict[int, Any] = {}
        for name, tree in (*self._positional, *self._keyword.items()):
            if name not in given:
                raise self._misfit(f"no {name!r}", _listed([*names, *self._keyword]))
            self._take(tree, given[name], name, flat)
        sizes: dict[str, int] = {}
        return [
            _fitting(self._labels[i], flat[i], self._specs[i], sizes, f"{self.name}: the input")
            for i in range(len(self._specs))
        ]

    def _take(self, tree: _Tree, value: object, where: str, flat: dict[int, Any]) -> None:
        """Take a value apart as a tree says."""
        if isinstance(tree, int):
            flat[tree] = value
        elif tree is None:
            if value is not None:
                raise self._misfit(f"{where!r} of type {type(value).__name__}", "None")
        elif tree.kind is dict:
            if not isinstance(value, Mapping) or set(value) != set(tree.keys):
                found = _listed(value) if isinstance(value, Mapping) else type(value).__name__
                raise self._misfit(f"{where!r} with {found}", f"a dict with {_listed(tree.keys)}")
            for key, sub in zip(tree.keys, tree.items, strict=True):
                self._take(sub, value[key], f"{where}[{key!r}]", flat)
        else:
            kind = list if tree.kind is list else tuple
            if not isinstance(value, kind) or len(value) != len(tree.items):
                found = f"{len(value)} items" if isinstance(value, kind) else type(value).__name__
                raise self._misfit(
                    f"{where!r} with {found}", f"a {kind.__name__} of {len(tree.items)}"
                )
            for i, sub in enumerate(tree.items):
                self._take(sub, value[i], f"{where}[{i}]", flat)

    def _misfit(self, got: str, wanted: str) -> TypeError:
        return TypeError(
            _message(
                f"{self.name} was given {got}", f"it takes {wanted}", f"call {self.describe()}"
            )
        )

    @property
    def specs(self) -> list[Spec]:
        """What goes in and comes out of the program, weights included."""
        return [*self._programs[0].ins, *self._programs[0].outs]

    def describe(self) -> str:
        """Return the name with inputs and outputs, in one line."""
        inputs = [f"{label}: {text}" for label, text in self.inputs.items()]
        inputs += ["rng"] if self._rng else []
        out = f"({self.outputs}, new_state)" if self._mutable else self.outputs
        grads = f", {self.vjp_order} derivatives" if self.vjp_order else ""
        return f"{self.name}({', '.join(inputs)}) -> {out}{grads}"

    def __repr__(self) -> str:
        return f"ExportedMethod({self.describe()})"


# --------------------------------------------------------------------------------------------------
# Programs


class _Program:
    """One StableHLO program with the shapes of what goes in and out.

    JAX's own class for it, ``jax.export.Exported``, has no public constructor, and its file format needs a
    library beside JAX. So a function that does nothing is exported with the same shapes, in whatever way this
    JAX does that, and its program is exchanged.
    """

    def __init__(
        self, name: str, entry: _Part, platforms: tuple[str, ...], arrays: dict[str, Spec]
    ) -> None:
        self.name, self._path = name, entry.path
        parts = entry.fields(
            *("sha256", "calling_convention", "kept", "global_constants", "constraints"),
            *("in", "out"),
        )
        sha256, version, kept, global_constants, constraints, ins, outs = parts
        spec = arrays.pop(name, None)
        if spec is None or spec.dtype != np.uint8 or len(spec.shape) != 1:
            raise _damaged(entry.path, 8, f"no bytes under {_shown(name)}", "the program")
        self._sha256 = sha256.text()
        lowest = jax.export.minimum_supported_calling_convention_version
        highest = jax.export.maximum_supported_calling_convention_version
        if not lowest <= version.number(1 << 31) <= highest:
            raise DamagedFileError(
                _message(
                    f"{entry.path}: a program of calling convention {version.value}",
                    f"JAX {version_of('jax')} runs those of {lowest} to {highest}",
                    "install a newer JAX, or export the model again",
                )
            )
        named: set[str] = set()
        self._constraints = [part.constraint(named) for part in constraints.each()]
        if len(self._constraints) > _MOST_CONSTRAINTS:
            raise constraints.wrong(f"at most {_MOST_CONSTRAINTS} constraints")
        self.ins = [part.spec(named) for part in ins.each()]
        known = set(named)
        self.outs = [part.spec(named) for part in outs.each()]
        if named != known:
            raise outs.wrong("dimensions whose names the inputs have")
        self.inexact = [jnp.issubdtype(spec.dtype, jnp.inexact) for spec in self.ins]
        used = [part.number(len(self.ins)) for part in kept.each()]
        if any(a >= b for a, b in zip(used, used[1:], strict=False)):
            raise kept.wrong("increasing numbers of arguments")
        self._fields = {
            "fun_name": name.removeprefix(PROGRAM),
            "calling_convention_version": version.value,
            "module_kept_var_idx": tuple(used),
            "uses_global_constants": global_constants.flag(),
        }
        self._platforms = platforms
        self._blob = b""
        self._exported: Any = None

    def take(self, blob: bytes) -> None:
        """Take the bytes of the program, if they are the ones that were written."""
        if hashlib.sha256(blob).hexdigest() != self._sha256:
            found = f"{_shown(self.name)} with other bytes than written"
            raise _damaged(self._path, 8, found, "its SHA-256")
        self._blob = blob

    def transposed(self) -> tuple[list[Spec], list[Spec]]:
        """Return what goes in and out of the derivative."""
        floats = [s for s, one in zip(self.ins, self.inexact, strict=True) if one]
        others = [s for s, one in zip(self.ins, self.inexact, strict=True) if not one]
        cotangents = [o for o in self.outs if jnp.issubdtype(o.dtype, jnp.inexact)]
        return [*floats, *cotangents, *others], floats

    def call(self, args: Sequence[Any]) -> list[Any]:
        """Run it on a flat list of arrays."""
        if self._exported is None:
            try:
                template = self._template()
            except (ValueError, TypeError, NotImplementedError) as error:
                raise ValueError(
                    _message(
                        f"called {_shown(self._fields['fun_name'])} of {self._path}",
                        f"JAX does not take its shapes and constraints: {str(error)[:500]}",
                        "export the model again",
                    )
                ) from error
            self._exported = dataclasses.replace(
                template, mlir_module_serialized=self._blob, **self._fields
            )
        return list(self._exported.call(*args))

    def _template(self) -> Any:
        """Export a function that does nothing, with the same shapes."""
        scope = jax.export.SymbolicScope(self._constraints)
        ins = [_struct(spec, scope) for spec in self.ins]
        outs = [_struct(spec, scope) for spec in self.outs]

        def nothing(*_: Any) -> tuple:
            return tuple(jnp.zeros(o.shape, o.dtype) for o in outs)

        return jax.export.export(jax.jit(nothing), platforms=self._platforms)(*ins)


def _differentiable(programs: Sequence[_Program], name: str) -> Callable:
    """Return the first program as a function of one list, with the others as its derivatives.

    The program of order k + 1 takes the real and complex arguments of the one of order k, the cotangents of
    its real and complex outputs, and the other arguments; it returns cotangents of the first.
    """

    def level(order: int) -> Callable:
        program = programs[order]

        @jax.custom_vjp
        def call(floats: list[Any], others: list[Any]) -> list[Any]:
            return program.call(_woven(program.inexact, floats, others))

        def forward(floats: list[Any], others: list[Any]) -> Any:
            if order + 1 == len(programs):
                raise TypeError(
                    _message(
                        f"took derivative {order + 1} of {name!r}",
                        f"it was exported with vjp_order={order}",
                        f"nn.export(..., vjp_order={order + 1})",
                    )
                )
            return call(floats, others), (floats, others)

        def backward(saved: Any, cotangents: list[Any]) -> Any:
            floats, others = saved
            given = [
                c
                for c, spec in zip(cotangents, program.outs, strict=True)
                if jnp.issubdtype(spec.dtype, jnp.inexact)
            ]
            return level(order + 1)([*floats, *given], others), None

        call.defvjp(forward, backward)
        return call

    def flat(args: list[Any]) -> list[Any]:
        inexact = programs[0].inexact
        floats = [a for a, one in zip(args, inexact, strict=True) if one]
        others = [a for a, one in zip(args, inexact, strict=True) if not one]
        return level(0)(floats, others)

    return flat


def _woven(inexact: Sequence[bool], floats: Any, others: Any) -> list[Any]:
    """Put the real and complex arguments among the others, where they belong."""
    first, rest = iter(floats), iter(others)
    return [next(first) if one else next(rest) for one in inexact]


def _key_data(name: str, kwargs: dict[str, Any]) -> Any:
    rng = kwargs.pop("rng", None)
    if rng is None:
        raise TypeError(
            _message(
                f"called {name} without rng",
                "it was exported with rng=True and draws random numbers",
                f"{name}(..., rng=jax.random.key(0))",
            )
        )
    if isinstance(rng, int):
        rng = jax.random.key(rng, impl="threefry2x32")
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(rng) if typed else rng
    if data.shape != (2,) or data.dtype != jnp.uint32:
        raise TypeError(
            _message(
                f"called {name} with rng of {data.dtype}{list(data.shape)}",
                "it takes one key of threefry2x32: two words of 32 bits",
                f"{name}(..., rng=jax.random.key(0, impl='threefry2x32'))",
            )
        )
    return data


# --------------------------------------------------------------------------------------------------
# Shapes and trees


class Spec(NamedTuple):
    """The dtype and the shape of an array; a size that is no number is the text for it, such as ``2*b``."""

    dtype: np.dtype
    shape: tuple[int | str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of an array, with 1 for each size that is no number."""
        return self.dtype.itemsize * math.prod(n for n in self.shape if isinstance(n, int))


class Node(NamedTuple):
    """A container of a tree: a dict with keys, a list, a tuple, or a class made by ``namedtuple``."""

    kind: type
    keys: tuple[Any, ...]
    items: tuple[_Tree, ...]


_Tree = Node | int | None
_KEY = Spec(np.dtype(np.uint32), (2,))


def _struct(spec: Spec, scope: Any) -> jax.ShapeDtypeStruct:
    shape: Any = spec.shape
    if any(isinstance(size, str) for size in shape):
        shape = jax.export.symbolic_shape(", ".join(map(str, shape)), scope=scope)
    return jax.ShapeDtypeStruct(shape, spec.dtype)


def _text(spec: Any) -> str:
    return f"{spec.dtype.name}[{', '.join(map(str, spec.shape))}]"


def _built(tree: _Tree, leaves: Sequence[Any]) -> Any:
    """Put arrays together as a tree says."""
    if isinstance(tree, int):
        return leaves[tree]
    if tree is None:
        return None
    values = [_built(sub, leaves) for sub in tree.items]
    if tree.kind is dict:
        return dict(zip(tree.keys, values, strict=True))
    return tree.kind(values) if tree.kind in (list, tuple) else tree.kind(*values)


def _texts(tree: _Tree, leaves: Sequence[str]) -> str:
    """Return a tree as a text."""
    if isinstance(tree, int):
        return leaves[tree]
    if tree is None:
        return "None"
    inside = [_texts(sub, leaves) for sub in tree.items]
    if tree.kind is dict:
        pairs = zip(tree.keys, inside, strict=True)
        return "{" + ", ".join(f"{k!r}: {text}" for k, text in pairs) + "}"
    if tree.kind is list:
        return f"[{', '.join(inside)}]"
    return f"({inside[0]},)" if len(inside) == 1 else f"({', '.join(inside)})"


class _Shapes:
    """Reads sizes of dimensions as JAX prints them, and its constraints: ``2*b, floordiv(t - 1, 2) + 1``.

    JAX's own parser computes what it reads, so a short text such as ``b^1000000000`` keeps it busy. This one
    looks only whether a text is one that JAX could have printed.

        sum:     product, + or - product ...
        product: factor, * factor ...           factor may have ^ and a number behind it
        factor:  number, name, or floordiv mod max min with two sums in parentheses

    Args:
        text: what to read.
        named: takes the names of dimensions.
    """

    _TOKEN = re.compile(r" *(?:([0-9]+)|([^\W\d]\w*)|([-+*^(),]))")
    _OPERATIONS = ("floordiv", "mod", "max", "min")

    def __init__(self, text: str, named: set[str]) -> None:
        self._text, self._named = text.strip(" "), named
        self._at = 0
        if len(text) > _LONGEST_SHAPE:
            raise ValueError("it is too long")
        self._next()

    def sizes(self) -> tuple[int | str, ...]:
        """Return the sizes between commas."""
        found: list[int | str] = []
        while self._text:
            begin = self._begin
            self._sum(0)
            size = self._text[begin : self._begin].strip(" ")
            if size.startswith("-") and size.removeprefix("-").strip(" ").isdecimal():
                raise ValueError("a size below 0")
            found.append(int(size) if size.isdecimal() else size)
            if self._token is None:
                break
            self._expect(",")
        return tuple(found)

    def whole(self) -> None:
        """Read one sum and the end."""
        self._sum(0)
        if self._token is not None:
            raise ValueError("something follows")

    def _next(self) -> None:
        self._begin = self._at
        self._token: str | None = None
        self._number = self._name = False
        if self._at < len(self._text):
            match = self._TOKEN.match(self._text, self._at)
            if match is None:
                raise ValueError("an unknown sign")
            self._at = match.end()
            self._number, self._name = match[1] is not None, match[2] is not None
            self._token = match[match.lastindex or 0]

    def _expect(self, token: str) -> None:
        if self._token != token:
            raise ValueError(f"no {token!r}")
        self._next()

    def _sum(self, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        if self._token in ("+", "-"):
            self._next()
        self._product(depth)
        while self._token in ("+", "-"):
            self._next()
            self._product(depth)

    def _product(self, depth: int) -> None:
        self._factor(depth)
        while self._token == "*":
            self._next()
            self._factor(depth)

    def _factor(self, depth: int) -> None:
        token = self._token or ""
        if self._name:
            self._next()
            if token in self._OPERATIONS:
                self._expect("(")
                self._sum(depth + 1)
                self._expect(",")
                zero = self._token == "0"
                self._sum(depth + 1)
                if zero and token in ("floordiv", "mod") and self._token == ")":
                    raise ValueError("a division by zero")
                self._expect(")")
            elif not token.isidentifier() or token == "_":
                raise ValueError("no name")
            else:
                self._named.add(token)
        else:
            if token == "-":  # JAX takes b * -2
                self._next()
            self._integer(1 << 63)
        if self._token == "^":
            self._next()
            self._integer(_HIGHEST_POWER + 1)

    def _integer(self, stop: int) -> None:
        token = self._token or ""
        small = self._number and len(token) < 20 and (token == "0" or token[0] != "0")
        if not small or int(token) >= stop:
            raise ValueError("no number, or one that is too large")
        self._next()


def _fitting(label: str, given: Any, spec: Any, sizes: dict[str, int], noun: str) -> Any:
    """Return a value as an array, or raise if it is not what a spec says."""
    kind = {bool: jnp.bool_, int: jnp.integer, float: jnp.floating}.get(type(given))
    if kind is not None and spec.shape == () and jnp.issubdtype(spec.dtype, kind):
        return np.asarray(given, spec.dtype)
    value: Any = given
    if not isinstance(value, jax.Array) and hasattr(value, "__jax_array__"):  # a Parameter
        value = value.__jax_array__()
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(
            _message(
                f"{noun} {_shown(label)} is of type {type(value).__name__}",
                f"it is an array of {_text(spec)}",
                "pass a jax.Array or a numpy array",
            )
        )
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)  # numpy's 64 bits, as every function of JAX
    fits = len(value.shape) == len(spec.shape)
    for have, want in zip(value.shape, spec.shape, strict=False):
        # Dimensions that are expressions, such as 2*b, are left to JAX.
        if isinstance(want, str):
            want = sizes.setdefault(want, have or 1) if want.isidentifier() else have
        fits = fits and have == want
    if not fits:
        seen = ", ".join(f"{n} = {s}" for n, s in sizes.items())
        raise ValueError(
            _message(
                f"{noun} {_shown(label)} has shape {tuple(value.shape)}",
                f"it was exported as {_text(spec)}" + (f", and here {seen}" if seen else ""),
                "pass an array of that shape; a dimension with a name may have any size from 1",
            )
        )
    if dtype != spec.dtype:
        raise TypeError(
            _message(
                f"{noun} {_shown(label)} has dtype {value.dtype}",
                f"it was exported as {_text(spec)}",
                f"cast it: array.astype({spec.dtype.name!r})",
            )
        )
    return value


def _beside(value: Any, other: Any) -> Any:
    """Return an array where another one is."""
    return jax.device_put(value, other.sharding)


# --------------------------------------------------------------------------------------------------
# The file


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Let nothing out but DamagedFileError, MemoryError, and OSError with the path."""
    try:
        yield
    except (DamagedFileError, MemoryError):
        raise
    except OSError as error:
        if error.errno is None:
            raise _damaged(path, 0, type(error).__name__, "a file that can be read") from error
        if str(path) == str(error.filename):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        # This reader did not foresee it. The text of the error may quote the file: its class has to do.
        raise _damaged(path, 0, type(error).__name__, "a file that can be read") from error


class _File(NamedTuple):
    """An open file: what it says of its arrays, where they are, and what nn.export noted."""

    path: Path
    file: io.FileIO
    size: int
    specs: dict[str, Spec]
    offsets: dict[str, int]
    manifest: _Part

    def array(self, name: str) -> np.ndarray:
        """Read an array into memory that JAX on a CPU takes over without a copy."""
        spec = self.specs[name]
        memory = np.empty(spec.nbytes + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        memory = memory[begin : begin + spec.nbytes]
        _fill(self.path, self.file, memory.data, self.offsets[name])
        if spec.dtype == np.bool_ and memory.size and memory.max() > 1:
            found = f"{_shown(name)} with bytes that are no booleans"
            raise _damaged(self.path, self.offsets[name], found, "0 or 1")
        return memory.view(spec.dtype).reshape([int(size) for size in spec.shape])


def _fill(path: Path, file: io.FileIO, memory: memoryview, offset: int) -> None:
    """Read as many bytes as the memory has; the file may have become shorter since it was opened."""
    file.seek(offset)
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done:])
        if not count:
            raise _damaged(
                path, offset + done, "the end of the file", f"{len(memory) - done} bytes more"
            )
        done += count


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; the other end of a pipe is not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_File]:
    """Open a file and read what it says of itself."""
    with open(path, "rb", buffering=0, opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(path, 0, "a pipe or a device", "a file")
        size = status.st_size
        head = bytearray(min(8, size))
        _fill(path, file, memoryview(head), 0)
        length = int.from_bytes(head, "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise _damaged(
                path, 0, f"a header of {length} bytes in a file of {size}", "a file of nn.export"
            )
        header = bytearray(length)
        _fill(path, file, memoryview(header), 8)
        allowed = _FLOOR + _MULTIPLE * size
        tree, cost = _json(path, bytes(header), "header", allowed)
        specs, offsets = _entries(_Part(path, "header", tree), 8 + length, size)
        texts = _metadata(_Part(path, "header", tree))
        manifest = _manifest(path, texts, allowed - cost)
        yield _File(path, file, size, specs, offsets, manifest)


def _json(path: Path, text: bytes, what: str, allowed: int) -> tuple[Any, int]:
    """Return what a text says, and about how much memory that takes."""
    # Each value but the first of a container follows one of these.
    cost = len(text) + _OBJECT * sum(text.count(sign) for sign in (b"[", b"{", b",", b":"))
    if cost > allowed:
        raise _damaged(path, 8, f"a {what} of {cost:,} bytes in memory", f"at most {allowed:,}")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats), cost
    except _Repeated as error:
        raise _damaged(path, 8, f"a {what} with {error} twice", "each name once") from None
    except (ValueError, RecursionError):
        raise _damaged(path, 8, f"a {what} that cannot be read", "JSON") from None


class _Repeated(ValueError):
    """A name that is twice in one object of JSON."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        raise _Repeated(_shown(next(n for n, _ in pairs if n in seen or seen.add(n))))
    return made


def _metadata(header: _Part) -> Mapping[str, str]:
    return _Part(header, "__metadata__", header.value.get("__metadata__", {})).texts(
        longest=_LONGEST_HEADER
    )


def _entries(header: _Part, begin: int, size: int) -> tuple[dict[str, Spec], dict[str, int]]:
    """Return what a header of safetensors says of the arrays, and where they begin in the file."""
    specs: dict[str, Spec] = {}
    places: list[tuple[int, int, str]] = []
    for name, part in header.named().items():
        if name == "__metadata__":
            continue
        dtype, shape, ends = part.fields("dtype", "shape", "data_offsets")
        spec = Spec(_DTYPES[dtype.one_of(_DTYPES)], tuple(n.number(1 << 63) for n in shape.each()))
        start, stop = (n.number(1 << 63) for n in ends.each(2))
        if not _possible(spec) or stop - start != spec.nbytes:
            raise part.wrong("a shape that numpy has, and as many bytes as it takes")
        specs[name] = spec
        places.append((start, stop, name))
    position = 0
    for start, stop, name in sorted(places):
        if start != position or begin + stop > size:
            raise _damaged(
                header.path,
                begin + start,
                f"{_shown(name)} overlaps, or is cut off",
                f"{stop - start} bytes",
            )
        position = stop
    if begin + position != size:
        found = f"{size - begin - position} bytes more"
        raise _damaged(header.path, begin + position, found, "the end")
    return specs, {name: begin + start for start, _, name in places}


def _possible(spec: Spec) -> bool:
    """Tell whether numpy has arrays of this shape."""
    sizes = (size for size in spec.shape if isinstance(size, int) and size)
    return (
        len(spec.shape) <= _MOST_DIMENSIONS
        and math.prod(sizes) * max(1, spec.dtype.itemsize) < 1 << 63
    )


def _manifest(path: Path, texts: Mapping[str, str], allowed: int) -> _Part:
    """Return what nn.export noted, if it is unchanged and this code knows the format."""
    text = texts.get(MANIFEST)
    if text is None:
        raise _damaged(
            path, 8, "no exported program", "a file of nn.export (nn.load reads state dicts)"
        )
    if hashlib.sha256(text.encode()).hexdigest() != texts.get(DIGEST):
        raise _damaged(path, 8, "a manifest with other bytes than written", "its SHA-256")
    return checked(path, _json(path, text.encode(), "manifest", allowed)[0])


def checked(path: Path, tree: Any) -> _Part:
    """Return a manifest of the format that this code knows."""
    manifest = _Part(path, "manifest", tree)
    version = manifest.named().get("format", _Part(manifest, "format", None)).number(1 << 31)
    if version != FORMAT:
        raise DamagedFileError(
            _message(
                f"{path}: format {version} of nn.export",
                f"this code reads format {FORMAT}",
                "load it with the statefulnn that wrote it, or a newer one",
            )
        )
    return manifest


class _Part:
    """A part of a JSON text, which knows the way to it: each method takes it as what it has to be.

    Args:
        parent: the part it is in; for the root, the path of the file.
        key: its name or number there; for the root, what the text is.
        value: what JSON says.
    """

    __slots__ = ("_key", "_parent", "value")

    def __init__(self, parent: _Part | Path, key: str | int, value: Any) -> None:
        self._parent, self._key, self.value = parent, key, value

    @property
    def path(self) -> Path:
        return self._parent.path if isinstance(self._parent, _Part) else self._parent

    def _where(self) -> str:
        if not isinstance(self._parent, _Part):
            return str(self._key)
        return f"{self._parent._where()}[{_shown(self._key)}]"

    def wrong(self, wanted: str) -> DamagedFileError:
        """Return the error for a part that is not what it has to be."""
        return _damaged(self.path, 8, f"{self._where()} is {_shown(self.value)}", wanted)

    def _fail(self, wanted: str) -> NoReturn:
        raise self.wrong(wanted)

    def text(self, longest: int = _LONGEST_NAME) -> str:
        value = self.value
        if not isinstance(value, str) or len(value) > longest:
            raise self.wrong("a text" if longest > _LONGEST_NAME else "a short text")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:  # half of a pair of surrogates: it cannot be printed
                raise self.wrong("a text of Unicode") from None
        return value

    def one_of(self, texts: Any) -> str:
        value = self.value
        if not isinstance(value, str) or value not in texts:
            raise self.wrong(f"one of {_listed(texts)}")
        return value

    def number(self, stop: int) -> int:
        if type(self.value) is not int or not 0 <= self.value < stop:
            raise self.wrong(f"a whole number from 0 to {stop - 1}")
        return self.value

    def key(self) -> str | int:
        """Take it as a key of a dict of arrays."""
        if type(self.value) is int and abs(self.value) < 1 << 63:
            return self.value
        return self.text()

    def flag(self) -> bool:
        return self.value if isinstance(self.value, bool) else self._fail("true or false")

    def each(self, length: int | None = None) -> Iterator[_Part]:
        """Return the items of a list."""
        value = self.value
        if not isinstance(value, list) or length not in (None, len(value)):
            raise self.wrong("a list" if length is None else f"a list of {length}")
        return (_Part(self, i, item) for i, item in enumerate(value))

    def named(self) -> dict[str, _Part]:
        """Return the values of an object by name."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object with names")
        return {
            _Part(self, "a name", n).text(): _Part(self, n, item) for n, item in self.value.items()
        }

    def fields(self, *names: str) -> list[_Part]:
        """Return the values of an object that has these names and no others."""
        value = self.value
        if not isinstance(value, dict) or set(value) != set(names):
            raise self.wrong(f"an object with exactly {', '.join(names)}")
        return [_Part(self, name, value[name]) for name in names]

    def texts(self, longest: int = _LONGEST_NAME) -> dict[str, str]:
        return {name: part.text(longest) for name, part in self.named().items()}

    def spec(self, named: set[str]) -> Spec:
        """Take it as a dtype and a shape, such as ``float32[b, 3]``; `named` takes names of dimensions."""
        text = self.text(_LONGEST_SHAPE)
        dtype, bracket, shape = text.removesuffix("]").partition("[")
        if dtype not in _NAMED or not bracket or not text.endswith("]"):
            raise self.wrong("a dtype and a shape, such as float32[b, 3]")
        try:
            spec = Spec(_NAMED[dtype], _Shapes(shape, named).sizes())
        except ValueError as error:
            raise self.wrong(f"a shape that JAX prints ({error})") from None
        return spec if _possible(spec) else self._fail("a shape that numpy has")

    def constraint(self, named: set[str]) -> str:
        """Take it as a comparison of two sizes, such as ``t <= 512``."""
        text = self.text()
        sides = re.split("==|<=|>=", text)
        try:
            if len(sides) != 2:
                raise ValueError("no comparison, or several")
            for side in sides:
                _Shapes(side, named).whole()
        except ValueError as error:
            raise self.wrong(f"a constraint such as 't <= 512' ({error})") from None
        return text

    def tree(
        self, leaves: list[int], classes: dict[tuple[str, ...], type], depth: int = 0
    ) -> _Tree:
        """Take it as a tree; the numbers of its leaves go into `leaves`."""
        value = self.value
        if value is None:
            return None
        if not isinstance(value, list):
            leaves.append(self.number(1 << 31))
            return value
        if depth > _DEEPEST:
            raise _damaged(self.path, 8, "a tree that is nested too deeply", f"{_DEEPEST} levels")
        parts = list(self.each(3 if len(value) == 3 else 2))
        kind, items = parts[0].text(), list(parts[1].each())
        keys: tuple[Any, ...] = ()
        if len(parts) == 3:
            container = _named_tuple(kind, parts[2], len(items), classes)
        elif kind == "dict":
            container = dict
            pairs = [list(item.each(2)) for item in items]
            keys = tuple(key.key() for key, _ in pairs)
            items = [item for _, item in pairs]
            if len(set(keys)) < len(keys):
                raise self.wrong("a dict with each key once")
        else:
            container = {"list": list, "tuple": tuple}[parts[0].one_of(("list", "tuple", "dict"))]
        return Node(container, keys, tuple(i.tree(leaves, classes, depth + 1) for i in items))


def _named_tuple(
    kind: str, fields: _Part, length: int, classes: dict[tuple[str, ...], type]
) -> type:
    """Return the class of named tuples with these fields; a file may have some of them."""
    if length > _MOST_FIELDS:
        raise fields.wrong(f"at most {_MOST_FIELDS} fields")
    names = (kind, *(part.text() for part in fields.each(length)))
    if names not in classes:
        if len(classes) == _MOST_KINDS:
            raise fields.wrong(f"at most {_MOST_KINDS} kinds of named tuples")
        try:
            classes[names] = collections.namedtuple(kind, names[1:])  # refuses what is no name
        except (ValueError, SyntaxError):
            raise fields.wrong("names of Python, for a named tuple") from None
    return classes[names]


def _damaged(path: Path, offset: int, found: str, expected: str) -> DamagedFileError:
    """Return the error for a file that is not as it should be, with the place."""
    return DamagedFileError(
        _message(
            f"{path}, at byte {offset}: {found}",
            f"expected {expected}",
            "copy or download the file again, or export the model again",
        )
    )


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _message(what: str, why: str, instead: str) -> str:
    return f"{what}\n  Why: {why}\n  Instead: {instead}"


def _shown(value: Any) -> str:
    """Return a short text for what a file holds; of containers only the size."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 80 else f"{value[:60]!r} ..."
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (int, float)):
        return repr(value)
    kind = {dict: "an object", list: "a list"}.get(type(value), type(value).__name__)
    return f"{kind} of {len(value)}" if hasattr(value, "__len__") else kind


def _listed(names: Any) -> str:
    names = list(names)
    shown = ", ".join(_shown(n) for n in names[:8])
    return (shown or "nothing") + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
