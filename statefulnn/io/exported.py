"""Files of nn.export: a compiled function and its weights, run with JAX alone.

This file needs the standard library, NumPy and JAX, and nothing else of the package: copied elsewhere, it
runs a model where neither its class nor this package is installed.

A file of nn.export is in the safetensors format: the length of the header (8 bytes, little-endian), the
header (JSON: name -> dtype, shape, begin and end), and the arrays. The weights are arrays under their dotted
names, each tied one once; each StableHLO program is an array of bytes. What belongs together is said by a
JSON text in the header's metadata. Nothing in it is executed as Python.

Terms
  method       one exported function; a file has one or several
  program      StableHLO, with weights and inputs as its arguments. A method has one, and one more for each
               order of derivative: its vector-Jacobian product
  tree         how arrays are put together to arguments or outputs: tuples, lists, dicts, None

Source: github.com/huggingface/safetensors; docs.jax.dev, "Exporting and serializing staged-out computations".
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import mmap
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

FORMAT = 1
MANIFEST, DIGEST, PROGRAM = "statefulnn.export", "statefulnn.export.sha256", "program:"
_LONGEST_HEADER = 100_000_000
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


class DamagedFileError(RuntimeError):
    """A file that is not what nn.export wrote, or is of a newer format."""


def load_exported(path: str | os.PathLike, *, device: Any = None) -> ExportedModule:
    """Read a file of nn.export.

    Args:
        path: the file.
        device: where the weights go, a ``jax.Device`` or ``Sharding``; None for JAX's default.

    Returns:
        an object that is called as the module was; see `ExportedModule`.

    Raises:
        DamagedFileError: for a file that is cut off, changed, of another format or a newer version.
        FileNotFoundError: if there is none.
        RuntimeError: if it holds 64-bit arrays, and JAX's 64-bit types are off.
    """
    path = Path(path)
    arrays, texts, size = _opened(path)
    manifest = _manifest(path, texts)
    try:
        loaded = ExportedModule(path, manifest, arrays, size)
    except Exception as error:
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
            raise  # an error of this file's own
        # The digest is right, so this was written by something that is not nn.export.
        raise _damaged(
            path, 8, f"a manifest that cannot be used ({error})", "nn.export's"
        ) from None
    loaded._params = {n: jax.device_put(v, device) for n, v in loaded._params.items()}
    return loaded


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

    def __init__(self, path: Path, manifest: Any, arrays: dict[str, np.ndarray], size: int) -> None:
        self.metadata: dict[str, str] = dict(manifest["metadata"])
        self.platforms = tuple(manifest["platforms"])
        self.versions: dict[str, str] = dict(manifest["versions"])
        self.ties: dict[str, str] = dict(manifest["ties"])
        self._name, self._path, self._size = str(manifest["module"]), path, size
        self._kinds: dict[str, str] = {}
        self._specs: dict[str, Any] = {}
        self._params: dict[str, Any] = {}
        for name, kind, dtype, crc in manifest["weights"]:
            view = arrays.pop(name, None)
            if view is None or view.dtype.name != dtype:
                raise _damaged(path, 8, f"no array {name!r} of {dtype}", "every weight")
            _require_64_bits(path, repr(name), view.dtype)
            own = np.array(view)  # a copy: the file may change while the array lives
            if _crc(own) != crc:
                raise _damaged(path, 8, f"{name!r} with other bytes than written", f"CRC {crc:#x}")
            self._kinds[name] = kind
            self._specs[name] = jax.ShapeDtypeStruct(own.shape, own.dtype)
            self._params[name] = own
        self.methods: dict[str, ExportedMethod] = {}
        for name, entry in manifest["methods"].items():
            self.methods[name] = ExportedMethod(self, name, entry, path, arrays)
        if arrays:
            raise _damaged(path, 8, f"an array {next(iter(arrays))!r} more", "weights, programs")

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
            raise KeyError(
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
        weights = sum(math.prod(s.shape) * s.dtype.itemsize for s in self._specs.values())
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
                raise KeyError(
                    _message(
                        f"was given a weight {name!r}",
                        f"the file has {_listed(self._specs)}",
                        "use these names",
                    )
                )
            if first in checked and checked[first] is not value:
                raise ValueError(
                    _message(
                        f"was given different arrays for {first!r} and {name!r}",
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
        entry: Any,
        path: Path,
        arrays: dict[str, np.ndarray],
    ) -> None:
        self.name = name
        self._module = module
        self._positional = [(str(n), tree) for n, tree in entry["positional"]]
        self._keyword = dict(entry["keyword"])
        self._out, self._state = entry["out"], list(entry["state"])
        self._mutable, self._rng = bool(entry["mutable"]), bool(entry["rng"])
        self._labels = [str(label) for label in entry["labels"]]
        self._weights = list(module._specs)
        self._programs = [
            _Program(path, f"{PROGRAM}{name}:{i}", p, module.platforms, arrays)
            for i, p in enumerate(entry["programs"])
        ]
        program = self._programs[0]
        weights, rest = program.ins[: len(self._weights)], program.ins[len(self._weights) :]
        for n, spec in zip(self._weights, weights, strict=True):
            if (spec.shape, spec.dtype) != (module._specs[n].shape, module._specs[n].dtype):
                raise ValueError(f"the program takes {n!r} as {_text(spec)}")
        self._specs = rest[self._rng :]
        labels = zip(self._labels, self._specs, strict=True)
        self.inputs = {label: _text(spec) for label, spec in labels}
        self.outputs = _texts(self._out, [_text(o) for o in program.outs])
        self.vjp_order = len(self._programs) - 1
        for spec in (*rest, *program.outs):
            _require_64_bits(path, f"an input or output of {name!r}", spec.dtype)
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

    def _take(self, tree: Any, value: Any, where: str, flat: dict[int, Any]) -> None:
        """Take a value apart as a tree says."""
        if isinstance(tree, int):
            flat[tree] = value
        elif tree is None:
            if value is not None:
                raise self._misfit(f"{where!r} of type {type(value).__name__}", "None")
        elif tree[0] == "dict":
            if not isinstance(value, Mapping) or set(value) != {k for k, _ in tree[1]}:
                found = _listed(value) if isinstance(value, Mapping) else type(value).__name__
                raise self._misfit(
                    f"{where!r} with {found}", f"a dict with {_listed(k for k, _ in tree[1])}"
                )
            for key, sub in tree[1]:
                self._take(sub, value[key], f"{where}[{key!r}]", flat)
        else:
            kind = list if tree[0] == "list" else tuple
            if not isinstance(value, kind) or len(value) != len(tree[1]):
                found = f"{len(value)} items" if isinstance(value, kind) else type(value).__name__
                raise self._misfit(
                    f"{where!r} with {found}", f"a {kind.__name__} of {len(tree[1])}"
                )
            for i, sub in enumerate(tree[1]):
                self._take(sub, value[i], f"{where}[{i}]", flat)

    def _misfit(self, got: str, wanted: str) -> TypeError:
        return TypeError(
            _message(
                f"{self.name} was given {got}", f"it takes {wanted}", f"call {self.describe()}"
            )
        )

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
        self,
        path: Path,
        name: str,
        entry: Any,
        platforms: tuple[str, ...],
        arrays: dict[str, np.ndarray],
    ) -> None:
        blob = arrays.pop(name, None)
        if blob is None or blob.dtype != np.uint8 or blob.ndim != 1:
            raise _damaged(path, 8, f"no bytes under {name!r}", "the program")
        self._blob = blob.tobytes()
        if hashlib.sha256(self._blob).hexdigest() != entry["sha256"]:
            raise _damaged(path, 8, f"{name!r} with other bytes than written", entry["sha256"])
        version = entry["calling_convention"]
        lowest = jax.export.minimum_supported_calling_convention_version
        highest = jax.export.maximum_supported_calling_convention_version
        if not lowest <= version <= highest:
            raise DamagedFileError(
                _message(
                    f"{path}: a program of calling convention {version}",
                    f"JAX {version_of('jax')} runs those of {lowest} to {highest}",
                    "install a newer JAX, or export the model again",
                )
            )
        self._fields = {
            "fun_name": name.removeprefix(PROGRAM),
            "calling_convention_version": version,
            "module_kept_var_idx": tuple(entry["kept"]),
            "uses_global_constants": bool(entry["global_constants"]),
        }
        scope = jax.export.SymbolicScope(entry["constraints"])
        self.ins = [_spec(text, scope) for text in entry["in"]]
        self.outs = [_spec(text, scope) for text in entry["out"]]
        self.inexact = [jnp.issubdtype(spec.dtype, jnp.inexact) for spec in self.ins]
        self._platforms = platforms
        self._exported: Any = None

    def call(self, args: Sequence[Any]) -> list[Any]:
        """Run it on a flat list of arrays."""
        if self._exported is None:

            def nothing(*_: Any) -> tuple:
                return tuple(jnp.zeros(o.shape, o.dtype) for o in self.outs)

            jitted = jax.jit(nothing)
            template = jax.export.export(jitted, platforms=self._platforms)(*self.ins)
            self._exported = dataclasses.replace(
                template, mlir_module_serialized=self._blob, **self._fields
            )
        return list(self._exported.call(*args))


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


def _spec(text: str, scope: Any) -> Any:
    """Return the shape and dtype of a text such as ``float32[b, 3]``."""
    dtype, _, shape = text.removesuffix("]").partition("[")
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), jnp.dtype(dtype))


def _text(spec: Any) -> str:
    return f"{spec.dtype.name}[{', '.join(map(str, spec.shape))}]"


def _built(tree: Any, leaves: Sequence[Any]) -> Any:
    """Put arrays together as a tree says."""
    if isinstance(tree, int):
        return leaves[tree]
    if tree is None:
        return None
    kind, items = tree[0], tree[1]
    if kind == "dict":
        return {key: _built(sub, leaves) for key, sub in items}
    values = [_built(sub, leaves) for sub in items]
    if kind == "list":
        return values
    if kind == "tuple":
        return tuple(values)
    return collections.namedtuple(kind, tree[2])(*values)


def _texts(tree: Any, leaves: Sequence[str]) -> str:
    """Return a tree as a text."""
    if isinstance(tree, int):
        return leaves[tree]
    if tree is None:
        return "None"
    if tree[0] == "dict":
        return "{" + ", ".join(f"{k!r}: {_texts(sub, leaves)}" for k, sub in tree[1]) + "}"
    inside = ", ".join(_texts(sub, leaves) for sub in tree[1])
    if tree[0] == "list":
        return f"[{inside}]"
    return f"({inside},)" if len(tree[1]) == 1 else f"({inside})"


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
                f"{noun} {label!r} is of type {type(value).__name__}",
                f"it is an array of {_text(spec)}",
                "pass a jax.Array or a numpy array",
            )
        )
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)  # numpy's 64 bits, as every function of JAX
    fits = len(value.shape) == len(spec.shape)
    for have, want in zip(value.shape, spec.shape, strict=False):
        # Dimensions that are expressions, such as 2*b, are left to JAX.
        name = str(want)
        if jax.export.is_symbolic_dim(want):
            want = sizes.setdefault(name, have or 1) if name.isidentifier() else have
        fits = fits and have == want
    if not fits:
        seen = ", ".join(f"{n} = {s}" for n, s in sizes.items())
        raise ValueError(
            _message(
                f"{noun} {label!r} has shape {tuple(value.shape)}",
                f"it was exported as {_text(spec)}" + (f", and here {seen}" if seen else ""),
                "pass an array of that shape; a dimension with a name may have any size from 1",
            )
        )
    if dtype != spec.dtype:
        raise TypeError(
            _message(
                f"{noun} {label!r} has dtype {value.dtype}",
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


def _opened(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str], int]:
    """Return the arrays of a safetensors file as views of it, its metadata and its size."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise _damaged(
                path, 0, f"a header of {length} bytes in a file of {size}", "a file of nn.export"
            )
        header = file.read(length)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        entries = json.loads(header.decode("utf-8"))
        texts = entries.pop("__metadata__", {})
        items = [(n, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in entries.items()]
        items.sort(key=lambda item: item[3:])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _damaged(path, 8, "a header that cannot be read", "JSON of safetensors") from None
    if not isinstance(texts, dict) or not all(isinstance(v, str) for v in texts.values()):
        raise _damaged(path, 8, "metadata that are no texts", "a dict of text -> text")
    arrays: dict[str, np.ndarray] = {}
    begin, position = 8 + length, 0
    for name, code, shape, start, stop in items:
        dtype = _DTYPES.get(code) if isinstance(code, str) else None
        sizes = all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, stop))
        if dtype is None or not sizes or stop - start != math.prod(shape) * dtype.itemsize:
            raise _damaged(
                path, 8, f"{name!r} as {code!r}{list(shape)} at {start}", "its dtype and size"
            )
        if start != position or begin + stop > size:
            raise _damaged(
                path, begin + start, f"{name!r} overlaps, or is cut off", f"{stop - start} bytes"
            )
        position = stop
        count = math.prod(shape)
        view = np.frombuffer(mapped, dtype, count, begin + start) if count else np.empty(0, dtype)
        arrays[name] = view.reshape(shape)
    if begin + position != size:
        raise _damaged(path, begin + position, f"{size - begin - position} bytes more", "the end")
    return arrays, texts, size


def _manifest(path: Path, texts: Mapping[str, str]) -> Any:
    """Return what nn.export noted, if it is unchanged and this code knows the format."""
    text = texts.get(MANIFEST)
    if text is None:
        raise _damaged(
            path, 8, "no exported program", "a file of nn.export (nn.load reads state dicts)"
        )
    if hashlib.sha256(text.encode()).hexdigest() != texts.get(DIGEST):
        raise _damaged(path, 8, "a manifest with other bytes than written", "its SHA-256")
    try:
        manifest = json.loads(text)
        version = manifest["format"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _damaged(path, 8, "a manifest that cannot be read", "JSON") from None
    if version != FORMAT:
        raise DamagedFileError(
            _message(
                f"{path}: format {version} of nn.export",
                f"this code reads format {FORMAT}",
                "load it with the statefulnn that wrote it, or a newer one",
            )
        )
    return manifest


def _require_64_bits(path: Path, what: str, dtype: np.dtype) -> None:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise RuntimeError(
            _message(
                f"loaded {path}, where {what} has dtype {dtype.name}",
                "64-bit types are off in JAX, which would silently give 32 bits",
                'jax.config.update("jax_enable_x64", True) at the start of the program',
            )
        )


def _damaged(path: Path, offset: int, found: str, expected: str) -> DamagedFileError:
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


def _listed(names: Any) -> str:
    names = list(names)
    shown = ", ".join(repr(n) for n in names[:8])
    return (shown or "nothing") + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
