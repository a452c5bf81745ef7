"""The names that a file of torch.save may use, and what is built for each.

Tensors and storages become descriptions, which nothing in a file can change; `_torch_files` makes arrays
from them. The rest is plain data of Python and numpy. None of the classes and functions that a file names is
ever looked up: a name is either a key of the dict `ALL_NAMES` below, or it is foreign.

Source: torch/_utils.py, torch/_tensor.py and torch/storage.py of torch 2.13; numpy/_core of numpy 2.
"""

from __future__ import annotations

import collections
import math
import re
import sys
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import jax.numpy as jnp
import numpy as np

from statefulnn.io._reading import OBJECT, shown
from statefulnn.io._stored import check_booleans, misshapen
from statefulnn.io._unpickling import Machine, Named
from statefulnn.io.placeholder import Placeholder

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "UntypedStorage": np.dtype(np.uint8),
}
_DTYPES = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "bool")},
    **{f"{u}int{bits}": np.dtype(f"{u}int{bits}") for u in ("", "u") for bits in (8, 16, 32, 64)},
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
    "bfloat16": np.dtype(jnp.bfloat16),
    "float8_e4m3fn": np.dtype(jnp.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(jnp.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(jnp.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(jnp.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(jnp.float8_e8m0fnu),
}

_MOST_ARGUMENTS = 16  # that a builder of tensors has
# Numbers and texts of a fixed length; dtypes with Python objects or fields are foreign.
_NUMPY_CODES = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)|[SU][1-9][0-9]{0,6}")


class Dtype:
    """Stands for a dtype of torch, or for the class of storages of that dtype."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype

    @property
    def as_key(self) -> np.dtype:
        """What stands for it where it is the key of a dict."""
        return self.dtype


class Storage:
    """Memory that tensors view, identified by its key.

    Attributes:
        dtype: of its elements.
        key: its name in the file.
        numel: how many elements it has.
        first: where it begins in the storage it is a part of, in elements.
    """

    __slots__ = ("dtype", "first", "key", "numel")

    def __init__(self, dtype: np.dtype, key: str, numel: int, first: int = 0) -> None:
        self.dtype, self.key, self.numel, self.first = dtype, key, numel, first


class Tensor:
    """A tensor as a view of a storage; offset and stride count elements.

    Raises:
        ValueError: for values that no tensor has.
    """

    __slots__ = ("as_key", "conjugated", "dtype", "negated", "offset", "size", "storage", "stride")

    def __init__(
        self,
        storage: Storage,
        offset: Any,
        size: Any,
        stride: Any,
        dtype: np.dtype | None = None,
        conjugated: bool = False,
        negated: bool = False,
    ) -> None:
        if type(storage) is not Storage or not is_count(offset):
            raise ValueError("a tensor of no storage, or with a negative offset")
        for sizes in (size, stride):
            if type(sizes) not in (tuple, list):
                raise ValueError("a tensor without sizes")
        if len(size) != len(stride):
            raise ValueError("a tensor whose size and stride differ in length")
        self.dtype = storage.dtype if dtype is None else dtype
        wrong = misshapen(size, self.dtype.itemsize)
        if wrong or not all(map(is_count, stride)):
            raise ValueError(f"a tensor with {wrong or 'negative strides'}")
        self.storage, self.offset = storage, offset
        self.size, self.stride = tuple(size), tuple(stride)
        self.conjugated, self.negated = conjugated, negated
        # What stands for it where it is the key of a dict: arrays cannot be keys.
        self.as_key = Placeholder("torch.Tensor", (self,))

    @property
    def identity(self) -> tuple[str, str]:
        """Equal for tensors that are one array. It is text: tuples of numbers can be made to collide."""
        whole = (self.storage.first, self.offset, self.size, self.stride)
        return self.storage.key, f"{whole} {self.dtype} {self.conjugated} {self.negated}"


def is_count(value: object) -> bool:
    """Say whether a value of a file is a number of elements."""
    return type(value) is int and 0 <= value < 1 << 63


def storage_of(key: tuple[Any, ...]) -> Any:
    """Return what a file of torch.save means by a key of something outside of its pickle.

    The key is ``("storage", class, name, device, number of elements)``. In old files a sixth entry may name a
    part of that storage: ``(name, first element, number of elements)``. Old files also refer to the class of
    a module in this way, with its source: ``("module", class, file, text)``.
    """
    if type(key) is tuple and len(key) == 4 and key[0] == "module":
        return key[1]
    if type(key) is not tuple or len(key) not in (5, 6) or key[0] not in ("storage", b"storage"):
        raise ValueError("a reference to what is no storage")
    kind, name, numel, *view = (*key[1:3], *key[4:])
    first = 0
    if isinstance(kind, Placeholder):
        return Placeholder(kind.name, (name, numel))
    if type(kind) is not Dtype:
        raise ValueError("a storage of no type")
    if view and view[0] is not None:
        if type(view[0]) is not tuple or len(view[0]) != 3:
            raise ValueError("a part of a storage that is none")
        _, first, numel = view[0]
    if not is_count(first) or not is_count(numel):
        raise ValueError("a storage of a negative size")
    return Storage(kind.dtype, storage_name(name), numel, first)


def storage_name(name: object) -> str:
    """Return the name of a storage as a text; in old files it is a number."""
    if is_count(name):
        return str(name)
    if type(name) is not str:
        raise ValueError("a storage with a name that is no text")
    return name


# --------------------------------------------------------------------------------------------------
# What torch builds


def _bytes_of(machine: Machine, text: object, encoding: object) -> Any:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding != "latin1":
        return NotImplemented
    machine.budget.spend(OBJECT + len(text))
    return text.encode("latin1")


def _size(machine: Machine, sizes: Any = ()) -> Any:
    if type(sizes) not in (tuple, list) or misshapen(sizes, 1):
        raise ValueError("a torch.Size that is none")
    machine.budget.spend(8 * len(sizes))
    return tuple(sizes)


def _device(machine: Machine, kind: object, index: object = None) -> Any:
    if type(kind) is not str or not (index is None or is_count(index)):
        raise ValueError("a torch.device that is none")
    machine.budget.spend(OBJECT + len(kind))
    return kind if index is None else f"{kind}:{index}"


def _tensor(
    machine: Machine,
    storage: object,
    offset: object,
    size: object,
    stride: object,
    requires_grad: object = False,
    hooks: object = None,
    metadata: object = None,
) -> Any:
    return _typed_tensor(
        machine, storage, offset, size, stride, requires_grad, hooks, None, metadata
    )


def _typed_tensor(
    machine: Machine,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Any:
    """A tensor. Its hooks are code and left out; whether it takes gradients is up to the model."""
    if type(storage) is not Storage or (dtype is not None and type(dtype) is not Dtype):
        return NotImplemented  # of a foreign kind
    dimensions = len(size) if type(size) in (tuple, list) else 0
    machine.budget.spend(8 * OBJECT + OBJECT * dimensions)
    flags = {} if metadata is None else metadata
    if type(flags) is not dict or len(flags) > 2 or not flags.keys() <= {"conj", "neg"}:
        return NotImplemented
    if not all(type(v) is bool for v in flags.values()):
        return NotImplemented
    return Tensor(
        storage,
        offset,
        size,
        stride,
        None if dtype is None else dtype.dtype,
        conjugated=flags.get("conj", False),
        negated=flags.get("neg", False),
    )


def _parameter(
    machine: Machine, tensor: object, requires_grad: object, hooks: object, state: object = None
) -> Any:
    return tensor if isinstance(tensor, Tensor) else NotImplemented


def _of_type(machine: Machine, build: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor without its Python attributes; one of a foreign class is wrapped in a Placeholder."""
    known = isinstance(build, Named) and build.build in (_tensor, _typed_tensor)
    if not known or type(args) is not tuple or len(args) > _MOST_ARGUMENTS:
        return NotImplemented
    tensor = build.build(machine, *args)
    if kind is _TENSOR_CLASS or tensor is NotImplemented:
        return tensor
    if not isinstance(kind, Placeholder):
        return NotImplemented
    foreign = machine.foreign(kind.name, (tensor,))
    foreign.state = state
    return foreign


_TENSOR_CLASS = Named("torch.Tensor", lambda machine, *_: NotImplemented)

# --------------------------------------------------------------------------------------------------
# What Python and numpy build


def _ordered(machine: Machine, pairs: Any = ()) -> Any:
    """An OrderedDict; old versions of Python pass its items as an argument."""
    made: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    machine.budget.spend(3 * OBJECT)
    if type(pairs) not in (tuple, list) or not all(
        type(pair) in (tuple, list) and len(pair) == 2 for pair in pairs
    ):
        raise ValueError("an OrderedDict of no pairs")
    machine.budget.spend(2 * OBJECT * len(pairs))
    for key, value in pairs:
        made[machine.key(key, made)] = value
    return made


def _defaulting(machine: Machine, *factory: object) -> Any:
    """A defaultdict without its function: a missing key stays missing."""
    machine.budget.spend(4 * OBJECT)
    return collections.defaultdict(None)


def _counter(machine: Machine, counts: object = None) -> Any:
    counts = {} if counts is None else counts
    if type(counts) is not dict:
        return NotImplemented
    machine.budget.spend(OBJECT * (4 + len(counts)))
    made: collections.Counter = collections.Counter()
    dict.update(made, counts)
    return made


def _set(machine: Machine, members: Any = ()) -> Any:
    if type(members) not in (tuple, list, set, frozenset):
        return NotImplemented
    return machine.join(members, set())


def _frozen(machine: Machine, members: object = ()) -> Any:
    found = _set(machine, members)
    return found if found is NotImplemented else frozenset(found)


def _complex(machine: Machine, real: Any = 0.0, imaginary: Any = 0.0) -> Any:
    parts = (real, imaginary)
    if not all(type(v) is float for v in parts):
        return NotImplemented
    return complex(*parts)


def _bytes(kind: type) -> Callable[..., Any]:
    """Bytes, which have no operation of their own in old protocols: empty, or a copy of others."""

    def build(machine: Machine, content: object = b"", encoding: object = "latin-1") -> Any:
        if type(content) is str and encoding == "latin-1":
            content = content.encode("latin1")
        if type(content) is not bytes:
            return NotImplemented
        machine.budget.spend(OBJECT + len(content))
        return kind(content)

    return build


def _path_of(kind: type) -> Callable[..., Any]:
    """A path becomes a pure path, which touches no disk."""

    def path(machine: Machine, *parts: Any) -> Any:
        if not all(type(part) is str for part in parts):
            return NotImplemented
        machine.budget.spend(4 * OBJECT * (1 + len(parts)) + 4 * sum(map(len, parts)))
        return kind(*parts)

    return path


class NumpyDtype:
    """A numpy dtype: numbers, or texts of a fixed length."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype

    @property
    def as_key(self) -> np.dtype:
        """What stands for it where it is the key of a dict."""
        return self.dtype

    def take_state(self, machine: Machine, state: Any) -> None:
        """Take the byte order, and check that there are no fields."""
        known = type(state) is tuple and len(state) in (8, 9) and state[1] in ("<", ">", "|", "=")
        if not known or any(part is not None for part in state[2:5]):
            raise ValueError("a dtype with fields")
        self.dtype = self.dtype.newbyteorder(state[1]) if state[1] != "|" else self.dtype


class NumpyArray(Placeholder):
    """A numpy array, empty until its state comes; an array of objects stays a Placeholder.

    Attributes:
        array: the array; None before its state has come, and for objects.
    """

    __slots__ = ("array",)

    def __init__(self) -> None:
        super().__init__("numpy.ndarray", ())
        self.array: np.ndarray | None = None

    def take_state(self, machine: Machine, state: object) -> None:
        """Take shape, dtype, order and bytes."""
        if type(state) is not tuple or len(state) not in (4, 5):
            raise ValueError("a numpy array that is none")
        shape, dtype, by_columns, raw = state[-4:]
        if type(dtype) is NumpyDtype:
            self.array = _array(machine, raw, dtype, shape, "F" if by_columns is True else "C")
        elif machine.strict or self.state is not None:
            raise ValueError("a numpy array of foreign objects")
        else:
            self.state = state


def _numpy_dtype(machine: Machine, code: object, *_: object) -> Any:
    if type(code) is not str or not _NUMPY_CODES.fullmatch(code):
        return NotImplemented
    machine.budget.spend(2 * OBJECT)
    return NumpyDtype(np.dtype(code))


def _empty_array(machine: Machine, kind: object, *_: object) -> Any:
    machine.budget.spend(2 * OBJECT)
    return NumpyArray() if kind is _ARRAY_CLASS else NotImplemented


def _from_buffer(machine: Machine, raw: object, dtype: object, shape: object, order: object) -> Any:
    if type(dtype) is not NumpyDtype or order not in ("C", "F"):
        return NotImplemented
    made = NumpyArray()
    made.array = _array(machine, raw, dtype, shape, order)
    return made


def _scalar(machine: Machine, dtype: object, raw: object = None) -> Any:
    if type(dtype) is not NumpyDtype:
        return NotImplemented
    return _array(machine, raw, dtype, (), "C")[()]


def _array(machine: Machine, raw: Any, dtype: NumpyDtype, shape: Any, order: str) -> np.ndarray:
    if type(raw) is str:  # of Python 2, where texts were bytes
        raw = raw.encode("latin1")
    if type(raw) not in (bytes, bytearray) or type(shape) is not tuple:
        raise ValueError("a numpy array without bytes")
    itemsize = dtype.dtype.itemsize
    wrong = misshapen(shape, itemsize)
    if wrong or math.prod(shape) * itemsize != len(raw):
        raise ValueError(f"a numpy array with {wrong or f'{len(raw)} bytes'} for {shown(shape)}")
    machine.budget.spend(OBJECT * (2 + len(shape)) + len(raw))
    array = np.ndarray(shape, dtype.dtype, bytearray(raw), order="F" if order == "F" else "C")
    if dtype.dtype.kind == "U" and len(raw):
        letters = np.frombuffer(raw, np.dtype(np.uint32).newbyteorder(dtype.dtype.byteorder))
        if letters.max() > sys.maxunicode:
            raise ValueError("a numpy array with letters that are none")
    check_booleans(array)
    return array


_ARRAY_CLASS = Named("numpy.ndarray", lambda machine, *_: NotImplemented)

# --------------------------------------------------------------------------------------------------
# The closed list

_BUILDERS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _bytes_of,
    "collections.OrderedDict": _ordered,
    "__builtin__.set": _set,
    "builtins.set": _set,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_MORE_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "collections.defaultdict": _defaulting,
    "collections.Counter": _counter,
    "builtins.frozenset": _frozen,
    "__builtin__.frozenset": _frozen,
    "builtins.complex": _complex,
    "__builtin__.complex": _complex,
    "numpy.dtype": _numpy_dtype,
    **{
        f"{module}.{kind.__name__}": _bytes(kind)
        for module in ("builtins", "__builtin__")
        for kind in (bytes, bytearray)
    },
    **{
        f"pathlib{private}.{pure}{system}Path": _path_of(kind)
        for private in ("", "._local")
        for pure in ("", "Pure")
        for system, kind in (("Posix", PurePosixPath), ("Windows", PureWindowsPath))
    },
    **{
        f"numpy.{package}.{name}": function
        for package in ("core", "_core")
        for name, function in (
            ("multiarray.scalar", _scalar),
            ("multiarray._reconstruct", _empty_array),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}

# In the tar format a class of tensors stands for the same dtype as its class of storages.
_TORCH_TYPES = {
    **_DTYPES,
    **_STORAGES,
    **{name.replace("Storage", "Tensor"): dtype for name, dtype in _STORAGES.items()},
}

# Full name -> what it stands for in a pickle: first what torch writes for tensors, then all that is built.
TENSOR_NAMES: dict[str, Any] = {
    **{name: Named(name, build) for name, build in _BUILDERS.items()},
    **{f"torch.{name}": Dtype(dtype) for name, dtype in _TORCH_TYPES.items()},
    **{f"torch.storage.{name}": Dtype(dtype) for name, dtype in _STORAGES.items()},
}
ALL_NAMES: dict[str, Any] = {
    **TENSOR_NAMES,
    **{name: Named(name, build) for name, build in _MORE_BUILDERS.items()},
    "torch.Tensor": _TENSOR_CLASS,
    "numpy.ndarray": _ARRAY_CLASS,
}
