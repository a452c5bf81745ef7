"""nn.load of programs for the machine of pickle that nobody's pickler would write.

Some are made by a grammar: each step is an operation, or a few that belong together, and a model of the
stack keeps most of them valid, so that they come far. Others are what torch.save wrote, with operations and
arguments exchanged. The storages beside them hold a known pattern: whatever else is in an array was not read
from there.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import pathlib
import pickle
import pickletools
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from statefulnn.io import _torch_pickle
from statefulnn.io._torch_pickle import ALL_NAMES, Dtype, Named, NumpyArray
from tests.io.fuzzing import Fuzzer, run_fuzz

# --------------------------------------------------------------------------------------------------
# What may come out of nn.load


# The pattern of all memory that tensors see: byte i of a storage is i % PERIOD, so none is PERIOD or more.
PERIOD = 251
PATTERN = bytes(i % PERIOD for i in range(8 * PERIOD))
_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray)
_CONTAINERS = (dict, list, tuple, set, frozenset, collections.OrderedDict, collections.Counter)


def what_is_in(root: Any) -> Iterator[Any]:
    """Yield each object that a loaded value is made of, once, without recursion."""
    todo, seen = [root], {}
    while todo:
        value = todo.pop()
        if id(value) in seen or type(value) in _PLAIN:
            continue
        seen[id(value)] = value
        yield value
        if isinstance(value, dict):
            todo += [*value.keys(), *value.values(), getattr(value, "_metadata", None)]
        elif isinstance(value, (list, tuple, set, frozenset)):
            todo += value
        elif isinstance(value, nn.io.Placeholder):
            todo += [value.name, value.args, value.kwargs, value.state, value.content]


def check_usable(root: Any, patterned: bool = False) -> None:
    """Raise unless a loaded value is made of what nn.load promises, and is within its file.

    Args:
        patterned: whether what lies in the file as the memory of arrays is `PATTERN`.
    """
    for value in what_is_in(root):
        if isinstance(value, nn.io.Placeholder):
            assert len(repr(value)) < 3000, f"a repr of {len(repr(value))} letters"
            assert getattr(value, "array", None) is None, "an array that is still a note"
            assert type(value) in (nn.io.Placeholder, NumpyArray)
        elif isinstance(value, (jax.Array, np.ndarray)):
            array = np.asarray(value)
            assert array.dtype.kind != "O" and array.tobytes() is not None
            if patterned and not isinstance(array.base, bytearray):
                check_pattern(array)
        else:
            known = type(value) in (*_CONTAINERS, collections.defaultdict)
            assert known or isinstance(value, (np.generic, np.dtype, PurePath)), type(value)


def check_pattern(array: np.ndarray) -> None:
    """Raise unless each number of an array is a piece of `PATTERN`, perhaps negated or conjugated."""
    if array.dtype == np.bool_ and array.view(np.uint8).max(initial=0) <= 1:
        return
    whole = [array]
    if array.dtype != np.bool_:
        whole.append(np.negative(array))
    if array.dtype.kind == "c":
        whole += [np.conjugate(a) for a in whole]
    found = np.zeros(array.size, bool)
    for a in whole:
        raw = np.ascontiguousarray(a).reshape(-1, 1).view(np.uint8).astype(np.int64)
        found |= (raw < PERIOD).all(1) & ((raw[:, 1:] - raw[:, :-1]) % PERIOD == 1).all(1)
    assert found.all(), "numbers that lie in no storage"


def state_of_the_process() -> list[Any]:
    """Return what a file must not change."""
    inside = lambda v: v.dtype if isinstance(v, Dtype) else (v.name, v.build)
    names = [(name, id(value), inside(value)) for name, value in ALL_NAMES.items()]
    dtypes = [(d.name, d.itemsize, d.names) for d in map(np.dtype, (jnp.bfloat16, "f4", "i8"))]
    return [names, dtypes, len(_torch_pickle.TENSOR_NAMES), np.dtype(jnp.bfloat16).itemsize == 2]


# --------------------------------------------------------------------------------------------------
# Programs by a grammar


# The storages that a file has, and the class that most of its programs know each by.
STORAGES = {
    "0": ("FloatStorage", 256),
    "1": ("ByteStorage", 64),
    "2": ("LongStorage", 512),
    "3": ("BFloat16Storage", 100),
    "4": ("HalfStorage", 502),
    "5": ("ComplexFloatStorage", 128),
    "6": ("BoolStorage", 7),
    "7": ("UntypedStorage", 1000),
    "": ("DoubleStorage", 0),
}
STORAGE_CLASSES = [n.removeprefix("torch.") for n in ALL_NAMES if n.endswith("Storage")]
DTYPES = ["float32", "bfloat16", "float16", "int64", "uint8", "bool", "complex64", "float8_e4m3fn"]
FOREIGN = [
    *("posix.system", "os.system", "nt.system", "subprocess.Popen", "builtins.eval"),
    *("builtins.exec", "builtins.getattr", "builtins.__import__", "__builtin__.apply"),
    *("builtins.object", "builtins.type", "copyreg._reconstructor", "copyreg.__newobj__"),
    *("torch.load", "torch.nn.modules.linear.Linear", "torch.storage._load_from_bytes"),
    *("torch.jit._script.unpackage_script_module", "torch.hub.load", "torch._utils"),
    *("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor"),
    *("argparse.Namespace", "numpy.core.multiarray._reconstruct.x", "numpy.ndarray.tofile"),
    *("statefulnn.load", "statefulnn.io._stored.Stored", "statefulnn.io._torch_pickle.Tensor"),
    *(
        "__main__.Model",
        "a.b",
        ".",
        "a.",
        ".b",
        "é.é",
        "\U000f0000" * 150 + ".x",
        "functools.partial",
        "operator.attrgetter",
    ),
]
HOSTILE_NUMBERS = [
    *(0, 1, -1, 2, 3, 5, 63, 64, 65, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32),
    *(2**40, 2**61 - 1, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 2**64 - 1, 10**30, 1 << 20_000),
]
HOSTILE_TEXTS = [
    *("", "a", "0", "1", "9", "storage", "module", "cpu", "_metadata", "version", "data.pkl"),
    *("f4", "<f8", "O8", "V8", "U3", "S5", "M8[ns]", "f4,f4", "latin1", "../x", "\0", "a\nb", "é"),
    *(
        "\ud800",
        "\U0001f600" * 300,
        "x" * 5000,
        "\0" * 300,
        "\U000f0000" * 80,
        "__class__",
        "weight",
        "state",
    ),
]
HOSTILE_BYTES = [b"", b"\0", b"\xff" * 9, b"storage", b"x" * 3000, PATTERN[:4], PATTERN[:8]]

SCALARS = {"none", "bool", "int", "float", "text", "bytes", "number"}
KEYS = SCALARS | {"foreign", "object", "dtype", "npdtype", "tensor"}
CALLED = {"foreign", "object", "call"}


class Program:
    """Writes one pickle, operation by operation, and knows what the stack then holds.

    Args:
        random: decides.
        storage: pushes what stands for memory outside: "zip" and "legacy" files have keys of storages, "tar"
            files of tensors.
    """

    def __init__(self, random: random.Random, storage: str) -> None:
        self.random, self.storage_kind = random, storage
        self.code = bytearray()
        self.stack: list[str] = []
        self.marks: list[int] = []
        self.memo: dict[int, str] = {}
        # How often something stands where it does not belong.
        self.odd = random.choice([0, 0, 0.004, 0.03])
        self.protocol = random.choice([0, 1, 2, 2, 2, 3, 4, 4, 5])
        # What class the last reference to a storage had: the legacy format measures it by that.
        self.classes: dict[str, str] = {}
        self.left = 2000  # operations
        self.depth = 0

    def whole(self) -> bytes:
        """Return a program of some steps."""
        random = self.random
        self.op(b"\x80" + bytes([self.protocol]))
        root = random.choice(["dict", "ordered", "tuple", "any"])
        if root == "any":
            self.value()
            if random.random() < 0.5:
                self.build_upon_top()
        elif root == "tuple":
            self.mark()
            for _ in range(random.choice([1, 3, 10, 30])):
                self.loose_step()
            self.close_to(1)
            self.op(b"t")
        else:
            (self.ordered if root == "ordered" else lambda: self.push(b"}", "dict"))()
            for _ in range(random.choice([1, 2, 5, 12])):
                self.text(random.choice(["a", "b", "weight", "bias", "state", *HOSTILE_TEXTS]))
                self.value()
                self.op(b"s", 2)
        self.op(b".")
        return bytes(self.code)

    # ----------------------------------------------------------------------------------------------
    # The stack

    def op(self, raw: bytes, pops: int = 0, pushes: str | None = None) -> None:
        self.code += raw
        self.left -= 1
        if pops:
            del self.stack[-pops:]
        if pushes is not None:
            self.stack.append(pushes)

    def push(self, raw: bytes, kind: str) -> None:
        self.op(raw, 0, kind)

    def mark(self) -> None:
        self.op(b"(")
        self.marks.append(len(self.stack))

    def marked(self, raw: bytes, kind: str | None = None) -> None:
        del self.stack[self.marks.pop() :]
        self.op(raw, 0, kind)

    def close_to(self, marks: int) -> None:
        while len(self.marks) > marks:
            self.marked(self.random.choice([b"t", b"l"]), "any")
        if marks:
            del self.stack[self.marks.pop() :]
            self.stack.append("tuple")

    def remember(self) -> None:
        random = self.random
        index = random.choice([len(self.memo), len(self.memo), random.randrange(300)])
        if random.random() < self.odd:
            index = random.choice([2**31 - 1, 2**32 - 1])
        if index == len(self.memo) and self.protocol >= 4 and random.random() < 0.5:
            self.op(b"\x94")
        elif index < 256:
            self.op(random.choice([b"q" + bytes([index]), b"p%d\n" % index]))
        else:
            self.op(b"r" + struct.pack("<I", index))
        self.memo[index] = self.stack[-1]

    def recalled(self, *kinds: str) -> bool:
        found = [i for i, kind in self.memo.items() if not kinds or kind in kinds]
        if not found:
            return False
        index = self.random.choice(found)
        if self.random.random() < self.odd:
            index = self.random.choice([0, index ^ 1])
        if index < 256 and self.random.random() < 0.8:
            self.push(b"h" + bytes([index]), self.memo.get(index, "any"))
        elif self.random.random() < 0.5:
            self.push(b"j" + struct.pack("<I", index), self.memo.get(index, "any"))
        else:
            self.push(b"g%d\n" % index, self.memo.get(index, "any"))
        return True

    # ----------------------------------------------------------------------------------------------
    # Plain values

    def number(self, n: int) -> None:
        ways = [b"\x8a", b"\x8b", b"I", b"L"]
        if -(2**31) <= n < 2**31:
            ways += [b"J", b"J"]
        if 0 <= n < 256:
            ways += [b"K"] * 8
        if 0 <= n < 65536:
            ways.append(b"M")
        way = self.random.choice(ways)
        raw = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
        if abs(n) >> 8000 or (way == b"\x8a" and len(raw) > 255):  # too many digits for a line
            way = b"\x8b"
        packed = {
            b"K": lambda: bytes([n]),
            b"M": lambda: struct.pack("<H", n),
            b"J": lambda: struct.pack("<i", n),
            b"\x8a": lambda: bytes([len(raw)]) + raw,
            b"\x8b": lambda: struct.pack("<i", len(raw)) + raw,
            b"I": lambda: b"%d\n" % n,
            b"L": lambda: b"%dL\n" % n,
        }[way]()
        self.push(way + packed, "int")

    def text(self, text: str) -> None:
        raw = text.encode("utf-8", "surrogatepass")
        ways = [b"X" + struct.pack("<I", len(raw)) + raw]
        if len(raw) < 256:
            ways.append(b"\x8c" + bytes([len(raw)]) + raw)
        if self.random.random() < 0.1:
            ways.append(b"\x8d" + struct.pack("<Q", len(raw)) + raw)
            ways.append(b"V" + text.encode("raw-unicode-escape").replace(b"\n", b" ") + b"\n")
            if text.isascii() and text.isprintable() and "'" not in text and "\\" not in text:
                ways.append(b"S'" + raw + b"'\n")
                ways.append(b"T" + struct.pack("<i", len(raw)) + raw)
        self.push(self.random.choice(ways), "text")

    def bytes_of(self, raw: bytes) -> None:
        ways = [b"B" + struct.pack("<I", len(raw)) + raw]
        ways.append(b"\x8e" + struct.pack("<Q", len(raw)) + raw)
        if len(raw) < 256:
            ways.append(b"C" + bytes([len(raw)]) + raw)
        self.push(self.random.choice(ways), "bytes")

    def atom(self) -> None:
        random = self.random
        kind = random.randrange(9)
        if kind < 3:
            some = HOSTILE_NUMBERS[:6] if random.random() < 0.5 else HOSTILE_NUMBERS
            self.number(random.choice(some))
        elif kind < 5:
            self.text(random.choice(HOSTILE_TEXTS))
        elif kind == 5:
            self.bytes_of(random.choice(HOSTILE_BYTES))
        elif kind == 6:
            raw = random.choice([b"N", b"\x88", b"\x89", b"I01\n", b"I00\n"])
            self.push(raw, "none" if raw == b"N" else "bool")
        elif kind == 7:
            number = random.choice([0.0, -0.0, 1.5, 1e308, float("inf"), float("nan")])
            raw = b"G" + struct.pack(">d", number)
            self.push(random.choice([raw, b"F%s\n" % repr(number).encode()]), "float")
        else:
            raw = random.choice(HOSTILE_BYTES)
            self.push(b"\x96" + struct.pack("<Q", len(raw)) + raw, "bytearray")

    def key(self) -> None:
        random = self.random
        if random.random() < self.odd:
            self.value()
        elif random.random() < 0.75:
            self.text(random.choice(["a", "b", "weight", *HOSTILE_TEXTS]))
        elif random.random() < 0.5:
            self.number(random.choice([n for n in HOSTILE_NUMBERS if n.bit_length() <= 64]))
        elif random.random() < 0.3:
            for _ in range(2):
                self.number(random.choice(HOSTILE_NUMBERS[:10]))
            self.op(b"\x86", 2, "tuple")
        else:
            choices = [self.numpy_dtype, self.numpy_scalar, self.foreign_object, self.dtype]
            random.choice([*choices, self.tensor, self.foreign])()

    # ----------------------------------------------------------------------------------------------
    # Names, and what is built by them

    def name(self, full: str) -> None:
        module, _, name = full.rpartition(".")
        known = ALL_NAMES.get(full)
        kind = "foreign" if known is None else "call" if isinstance(known, Named) else "dtype"
        plain = f"{module}{name}".isascii() or self.protocol >= 3
        if self.protocol >= 4 and (self.random.random() < 0.6 or not plain):
            self.text(module)
            self.text(name)
            self.op(b"\x93", 2, kind)
        else:
            self.push(b"c" + f"{module}\n{name}\n".encode("ascii", "replace"), kind)

    def arg(self, usual: Callable[[], None]) -> None:
        """Push what an argument mostly is, or something else."""
        if self.random.random() < self.odd:
            self.value()
        else:
            usual()

    def tuple_of(self, *parts: Callable[[], None]) -> None:
        """Push a tuple of what these push."""
        if len(parts) <= 3 and self.protocol >= 2 and self.random.random() < 0.7:
            for part in parts:
                self.arg(part)
            self.op([b")", b"\x85", b"\x86", b"\x87"][len(parts)], len(parts), "tuple")
        else:
            self.mark()
            for part in parts:
                self.arg(part)
            self.marked(b"t", "tuple")

    def call(self, full: str, *args: Callable[[], None], kind: str) -> None:
        """Push what a name makes of arguments."""
        way = self.random.random()
        if way < 0.06:  # as protocol 0 does
            module, _, name = full.rpartition(".")
            self.mark()
            for arg in args:
                self.arg(arg)
            self.marked(b"i" + f"{module}\n{name}\n".encode("ascii", "replace"), kind)
        elif way < 0.12:  # as protocol 1 does
            self.mark()
            self.name(full)
            for arg in args:
                self.arg(arg)
            self.marked(b"o", kind)
        else:
            self.name(full)
            self.tuple_of(*args)
            if way < 0.17:
                names = self.dict_of if kind == "object" else lambda: self.push(b"}", "dict")
                names()
                self.op(b"\x92", 3, kind)
            else:
                self.op(b"\x81" if way < 0.25 else b"R", 2, kind)

    def constant(self, *values: Any) -> Callable[[], None]:
        """Return what pushes one of these numbers, texts, bytes or truths."""

        def push() -> None:
            value = self.random.choice(values)
            if value is None or isinstance(value, bool):
                self.push({None: b"N", True: b"\x88", False: b"\x89"}[value], "bool")
            elif isinstance(value, int):
                self.number(value)
            else:
                self.text(value) if isinstance(value, str) else self.bytes_of(value)

        return push

    def dtype(self) -> None:
        self.name("torch." + self.random.choice(DTYPES))

    def storage(self) -> None:
        """Push a reference to memory outside."""
        random = self.random
        key = random.choice(list(STORAGES))
        kind, nbytes = STORAGES[key]
        if random.random() < max(self.odd, 0.01):
            kind = random.choice([*STORAGE_CLASSES, "sparse.FloatStorage"]).removeprefix("storage.")
        if random.random() < self.odd:
            key = random.choice(HOSTILE_TEXTS)
        self.classes[key] = kind
        count = [4, nbytes, *(HOSTILE_NUMBERS if random.random() < 0.1 else [])]
        parts = [
            self.constant(*["storage"] * 20, b"storage"),
            lambda: self.name(f"torch.{random.choice(['', '', 'storage.'])}{kind}"),
            self.constant(int(key) if key.isdigit() and random.random() < 0.1 else key),
            self.constant("cpu", "cuda:0", None),
            self.constant(*count),
        ]
        if self.storage_kind == "legacy" or random.random() < 0.1:
            view = lambda: self.tuple_of(
                self.constant("v", "0"), self.constant(0, 1, 8), self.constant(*count)
            )
            parts.append(random.choice([self.constant(None), view]))
        if random.random() < 0.02:
            parts = [self.constant("module"), self.value, *[self.constant("x")] * 2]
        self.tuple_of(*parts)
        self.op(b"Q", 1, "storage")
        if random.random() < 0.3:
            self.remember()

    def sizes(self) -> tuple[list[int], list[int], int]:
        """Return shape, stride and offset of a tensor that mostly fits."""
        random = self.random
        shape = random.choice([[], [1], [3], [0], [2, 2], [2, 3], [1, 1, 2], [4, 0], [2] * 5, [6]])
        stride, step = [], 1
        for n in reversed(shape):
            stride.insert(0, step)
            step *= n
        if random.random() < 0.3:
            stride = [random.choice([0, 1, s, s + 1]) for s in stride]
        if random.random() < 0.3:
            random.shuffle(stride)
        offset = random.choice([0, 0, 0, 1, 2, 7])
        if random.random() < max(self.odd, 0.02):
            which = random.randrange(3)
            number = random.choice(HOSTILE_NUMBERS)
            if which == 0:
                offset = number
            elif which == 1 and shape:
                shape = [*shape[:-1], number]
            else:
                stride = [*stride[:-1], number] if stride else [number]
        if random.random() < 0.02:
            shape, stride = [1] * random.choice([32, 64, 65]), [1] * random.choice([32, 64, 65])
        return list(shape), stride, offset

    def tensor(self) -> None:
        random = self.random
        if self.storage_kind == "tar":
            key = random.choice([*range(100, 106), *([7, -1, 2**70] if self.odd else [])])
            if random.random() < 0.3:
                self.push(b"P%d\n" % key, "tensor")
            else:
                self.constant(key, str(key))()
                self.op(b"Q", 1, "tensor")
            return
        if random.random() < 0.15 and self.recalled("tensor"):
            return
        shape, stride, offset = self.sizes()
        tuple_of = lambda ns: lambda: self.tuple_of(*[self.constant(n) for n in ns])
        hooks = lambda: self.call("collections.OrderedDict", kind="ordered")
        storage = lambda: self.recalled("storage") or self.storage()
        first = random.choice([storage, self.storage])
        args = [first, self.constant(offset), tuple_of(shape), tuple_of(stride)]
        name = random.choice(["_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v2", "v3"])
        if name == "_rebuild_tensor_v2":
            args += [self.constant(True, False), hooks]
        elif name == "v3":
            name = "_rebuild_tensor_v3"
            args += [self.constant(True, False), hooks, self.dtype]
        if name != "_rebuild_tensor" and random.random() < 0.15:
            args.append(lambda: self.flags())
        full = f"torch._utils.{name}"
        if random.random() < 0.1:
            inner, inner_args = full, args
            made = lambda: self.call(inner, *inner_args, kind="tensor")
            wrapped = [made, self.constant(True), hooks]
            state = [self.value] if random.random() < 0.3 else []
            tail = "_with_state" if state else ""
            full, args = f"torch._utils._rebuild_parameter{tail}", wrapped + state
        elif random.random() < 0.07:
            kinds = ["torch.Tensor", "torch.Tensor", "a.Subclass", *FOREIGN[:2]]
            inner, inner_args = full, args
            full = "torch._tensor._rebuild_from_type_v2"
            args = [
                lambda: self.name(inner),
                lambda: self.name(random.choice(kinds)),
                lambda: self.tuple_of(*inner_args),
                self.value,
            ]
        self.call(full, *args, kind="tensor")
        if random.random() < 0.2:
            self.remember()

    def flags(self) -> None:
        self.push(b"}", "dict")
        for name in self.random.sample(["conj", "neg", "odd"], self.random.choice([0, 1, 1, 2])):
            self.text(name)
            self.constant(True, False)()
            self.op(b"s", 2)

    def numpy_dtype(self) -> None:
        random = self.random
        codes = ["f4", "f8", "i8", "u1", "b1", "c16", "S4", "U1"]
        if random.random() < 0.1:
            codes = [*HOSTILE_TEXTS, "U9999999", "S1000000"]
        self.call(
            "numpy.dtype",
            self.constant(*codes),
            self.constant(False),
            self.constant(True),
            kind="npdtype",
        )
        if random.random() < 0.7:
            none = self.constant(None)
            order = self.constant("<", "<", ">", "|", "=")
            flags = [self.constant(-1, 0, 63)] * 3
            self.tuple_of(self.constant(3), order, none, none, none, *flags)
            self.op(b"b", 1)

    def numpy_scalar(self) -> None:
        random = self.random
        size, code = random.choice(
            [(4, "f4"), (8, "f8"), (8, "i8"), (1, "b1"), (4, "U1"), (2, "f2")]
        )
        dtype = lambda: self.call("numpy.dtype", self.constant(code), kind="npdtype")
        at = random.randrange(200)
        raw = PATTERN[at : at + size + (random.random() < self.odd)]
        if random.random() < 0.3:
            raw = random.choice([b"\0" * size, b"\xff" * size])
        package = random.choice(["core", "_core"])
        self.call(f"numpy.{package}.multiarray.scalar", dtype, self.constant(raw), kind="number")

    def numpy_array(self) -> None:
        random = self.random
        size, code = random.choice([(4, "f4"), (8, "i8"), (1, "u1"), (16, "c16"), (8, "U2")])
        dtype = lambda: self.call("numpy.dtype", self.constant(code), kind="npdtype")
        shape = random.choice([(), (0,), (3,), (2, 2), (1, 1, 1), (0, 2**40)])
        if random.random() < self.odd:
            shape = (*shape, random.choice(HOSTILE_NUMBERS))
        count = int(np.prod([n for n in shape if n < 100], dtype=np.int64)) if 0 not in shape else 0
        raw = self.constant((PATTERN * 2)[: size * count])
        dims = lambda: self.tuple_of(*[self.constant(n) for n in shape])
        package = random.choice(["core", "_core"])
        if random.random() < 0.3:
            name = f"numpy.{package}.numeric._frombuffer"
            self.call(name, raw, dtype, dims, self.constant("C", "F"), kind="array")
            return
        kind = lambda: self.name("numpy.ndarray")
        zero = lambda: self.tuple_of(self.constant(0))
        name = f"numpy.{package}.multiarray._reconstruct"
        self.call(name, kind, zero, self.constant(b"b"), kind="array")
        for _ in range(random.choice([1, 1, 1, 0, 2])):
            objects = random.random() < 0.15
            what = self.foreign if objects else dtype
            held = (self.list_of) if objects else raw
            self.tuple_of(self.constant(1), dims, what, self.constant(True, False), held)
            self.op(b"b", 1)

    def ordered(self) -> None:
        random = self.random
        args = []
        if random.random() < 0.2:
            pair = lambda: self.tuple_of(self.key, self.value)
            args = [lambda: self.tuple_of(*[pair] * random.randrange(4))]
        self.call("collections.OrderedDict", *args, kind="ordered")
        if random.random() < 0.3:
            self.metadata()
            self.op(b"b", 1)

    def metadata(self) -> None:
        """Push the attributes of a state dict."""
        random = self.random
        self.push(b"}", "dict")
        self.arg(self.constant("_metadata"))
        if random.random() < self.odd:
            self.value()
        else:
            self.push(b"}", "dict")
            for name in random.sample(["", "0", "a.b", "é"], random.randrange(3)):
                self.arg(self.constant(name))
                self.push(b"}", "dict")
                self.arg(self.constant("version"))
                self.arg(self.constant(1, 2, None))
                self.op(b"s", 2)
                self.op(b"s", 2)
        self.op(b"s", 2)

    def foreign(self) -> None:
        self.name(self.random.choice(FOREIGN))

    def foreign_object(self) -> None:
        random = self.random
        args = [self.value] * random.choice([0, 0, 1, 3, 8])
        name = random.choice([*FOREIGN, random.choice(list(ALL_NAMES))])
        self.call(name, *args, kind="object")
        if random.random() < 0.2:
            self.remember()
        if random.random() < 0.5:
            self.build_upon_top()

    def build_upon_top(self) -> None:
        """Do to what is on top what a pickle may do to an object."""
        random = self.random
        kind = self.stack[-1]
        if kind in ("object", "foreign", "array") or random.random() < self.odd:
            choice = random.randrange(4)
            if choice == 0:
                self.value()
                self.op(b"b", 1)
            elif choice == 1:
                self.value()
                self.op(b"a", 1)
            else:
                self.mark()
                for _ in range(random.randrange(4)):
                    self.key()
                    self.value()
                self.marked(b"u")
        elif kind == "ordered":
            self.metadata()
            self.op(b"b", 1)

    # ----------------------------------------------------------------------------------------------
    # Containers

    def list_of(self) -> None:
        random = self.random
        self.push(b"]", "list")
        if random.random() < 0.2:
            self.remember()
        if random.random() < 0.5:
            self.mark()
            for _ in range(random.randrange(4)):
                self.value()
            self.marked(b"e")
        else:
            for _ in range(random.randrange(3)):
                self.value()
                self.op(b"a", 1)

    def dict_of(self) -> None:
        random = self.random
        makers = ["collections.defaultdict", "collections.Counter"]
        way = random.random()
        if way < 0.2:
            self.call(random.choice(makers), *[self.foreign] * (way < 0.02), kind="dict")
        elif way < 0.5:
            self.ordered()
        else:
            self.push(b"}", "dict")
        if random.random() < 0.2:
            self.remember()
        self.mark()
        for _ in range(random.randrange(4)):
            self.key()
            self.value()
        self.marked(b"u")

    def set_of(self) -> None:
        random = self.random
        way = random.randrange(4)
        members = [self.key] * random.randrange(5)
        if way < 2:
            if way:
                self.push(b"\x8f", "set")
            self.mark()
            for member in members:
                member()
            self.marked(b"\x90" if way else b"\x91", None if way else "set")
        else:
            held = random.choice([self.set_of, lambda: self.tuple_of(*members)])
            name = random.choice(["set", "frozenset"])
            self.call(f"{random.choice(['builtins', '__builtin__'])}.{name}", held, kind="set")

    def small_builder(self) -> None:
        random = self.random
        text, raw = self.constant(*HOSTILE_TEXTS), self.constant(*HOSTILE_BYTES)
        part = lambda: self.push(b"G" + struct.pack(">d", random.random()), "float")
        path = random.choice([n for n in ALL_NAMES if n.startswith("pathlib")])
        ints = [self.constant(0, 1, 5)] * random.randrange(4)
        choices: list[tuple[str, list[Callable[[], None]], str]] = [
            ("_codecs.encode", [self.constant("", "aé\xff"), self.constant("latin1")], "bytes"),
            ("torch.Size", [lambda: self.tuple_of(*ints)], "tuple"),
            ("torch.device", [self.constant("cpu", "cuda"), self.constant(0, 1)], "text"),
            ("torch.device", [text], "text"),
            ("builtins.bytes", [raw], "bytes"),
            ("builtins.bytearray", [raw], "bytearray"),
            ("__builtin__.bytearray", [self.constant("a\xff"), self.constant("latin-1")], "any"),
            ("builtins.complex", [part, part], "any"),
            (path, [text] * random.randrange(4), "any"),
        ]
        name, args, kind = random.choice(choices)
        self.call(name, *args, kind=kind)

    # ----------------------------------------------------------------------------------------------
    # What grows, and what goes in circles

    def doubled(self) -> None:
        """Push a container that holds one twice, which holds one twice, and so on; or a long name."""
        random = self.random
        way = random.randrange(4)
        if way == 3:  # a name that is called, and the result called, and so on
            self.foreign()
            for _ in range(random.choice([2, 40])):
                self.push(b")", "tuple")
                self.op(b"R", 2, "object")
            return
        self.value()
        for _ in range(random.choice([3, 30, 60])):
            if way == 0:
                self.op(b"2", 0, "any")
                self.op(b"\x86", 2, "tuple")
            else:
                self.remember()
                index = next(i for i in reversed(self.memo))
                get = b"j" + struct.pack("<I", index)
                self.op(b"0", 1)
                self.op(b"(" + get + get + (b"l" if way == 1 else b"t"), 0, "list")

    def nested(self) -> None:
        depth = self.random.choice([5, 100, 2000])
        before = self.random.choice([b"]", b"}", b")", b"N"])
        self.push(before, "any")
        self.op(b"\x85" * depth, 1, "tuple")

    def circle(self) -> None:
        """Push what holds itself: allowed for objects alone."""
        random = self.random
        if random.random() < max(self.odd, 0.05):
            self.push(random.choice([b"]", b"}"]), "list")
        else:
            self.call(random.choice(FOREIGN[:6]), kind="object")
        self.memo[200] = self.stack[-1]
        self.op(b"q\xc8")
        if self.code[-3:-2] == b"}":
            self.op(b"K\0h\xc8s")
        else:
            self.op(random.choice([b"h\xc8a", b"h\xc8\x85a", b"h\xc8h\xc8\x85Ra"]))

    def changed_later(self) -> None:
        """Add to what lies in the memo, and push it: it may be in its place already."""
        if self.recalled("list", "object"):
            self.value()
            self.op(b"a", 1)
        elif self.recalled("dict", "ordered"):
            self.key()
            self.value()
            self.op(b"s", 2)
        else:
            self.atom()

    def wild(self) -> None:
        """Any operation with any argument."""
        random = self.random
        operation = random.choice(pickletools.opcodes)
        raw = operation.code.encode("latin-1")
        if operation.arg is not None:
            n = operation.arg.n
            text = random.choice(HOSTILE_TEXTS).encode("utf-8", "replace")[:100]
            if n > 0:
                raw += random.randbytes(n) if random.random() < 0.5 else bytes(n)
            elif n == pickletools.UP_TO_NEWLINE:
                raw += random.choice([b"1\n", b"01\n", b"a\nb\n", b"'x'\n", text + b"\n"])
            else:
                size = {-2: 1, -3: 4, -4: 4, -5: 8}[n]
                length = random.choice([len(text)] * 8 + [2 ** (8 * size) - 1, 2 ** (8 * size - 1)])
                raw += length.to_bytes(8, "little")[:size] + text
        self.push(raw, "any")

    def value(self) -> None:
        """Push one value."""
        random = self.random
        if self.left < 0 or self.depth > 6:
            self.atom()
            return
        if random.random() < self.odd / 2:
            self.wild()
            return
        make = random.choices(
            [
                self.atom,
                self.tensor,
                self.list_of,
                self.dict_of,
                lambda: self.tuple_of(*[self.value] * random.randrange(4)),
                self.set_of,
                self.small_builder,
                self.numpy_scalar,
                self.numpy_array,
                self.numpy_dtype,
                self.dtype,
                self.foreign,
                self.foreign_object,
                lambda: self.name(random.choice(list(ALL_NAMES))),
                lambda: self.storage() if self.storage_kind != "tar" else self.tensor(),
                self.doubled,
                self.nested,
                self.circle,
                self.changed_later,
                lambda: self.recalled() or self.atom(),
            ],
            [20, 20, 8, 10, 6, 4, 6, 4, 5, 3, 2, 2, 6, 2, 2, 1, 1, 2, 3, 5],
        )[0]
        self.depth += 1
        make()
        self.depth -= 1
        if random.random() < 0.1:
            self.remember()

    def loose_step(self) -> None:
        """One operation whose needs the top of the stack fulfils, or a value."""
        random = self.random
        held = self.stack[self.marks[-1] :]
        if random.random() < 0.45 or not held:
            self.value()
            return
        top = held[-1]
        pairs = not len(held) % 2 and all(kind in KEYS for kind in held[::2])
        ways: list[Callable[[], None]] = [
            lambda: self.op(b"\x85", 1, "tuple"),
            lambda: self.op(b"2", 0, top),
            lambda: self.mark(),
            self.remember,
            self.build_upon_top,
        ]
        if len(held) > 1:
            under = held[-2]
            ways.append(lambda: self.op(b"0", 1))
            ways.append(lambda: self.op(b"\x86", 2, "tuple"))
            if under in ("list", "object", "foreign"):
                ways += [lambda: self.op(b"a", 1)] * 4
            if under in CALLED and top == "tuple":
                ways += [lambda: self.op(random.choice([b"R", b"\x81"]), 2, "object")] * 4
            if under == "object":
                ways += [lambda: self.op(b"b", 1)] * 4
        if len(held) > 2 and held[-2] in KEYS and held[-3] in ("dict", "ordered", "object"):
            ways += [lambda: self.op(b"s", 2)] * 8
        if len(held) > 2:
            ways.append(lambda: self.op(b"\x87", 3, "tuple"))
        if len(self.marks) > 1:
            ways += [lambda: self.marked(b"t", "tuple"), lambda: self.marked(b"l", "list")] * 2
            ways.append(lambda: self.marked(b"1"))
            under = self.stack[: self.marks[-1]][-1:]
            outer = self.marks[-2] < self.marks[-1]
            if outer and under in (["list"], ["object"]):
                ways += [lambda: self.marked(b"e")] * 4
            if outer and pairs and under in (["dict"], ["ordered"], ["object"]):
                ways += [lambda: self.marked(b"u")] * 4
            if outer and under == ["set"] and all(kind in KEYS for kind in held):
                ways += [lambda: self.marked(b"\x90")] * 4
            if pairs:
                ways.append(lambda: self.marked(b"d", "dict"))
            if all(kind in KEYS for kind in held):
                ways.append(lambda: self.marked(b"\x91", "set"))
            if held[0] in CALLED:
                ways += [lambda: self.marked(b"o", "object")] * 4
        random.choice(ways)()


# --------------------------------------------------------------------------------------------------
# Files around programs


def zipped(program: bytes, random: random.Random) -> bytes:
    """Return a zip archive as torch.save makes it, with the storages."""
    content = io.BytesIO()
    root = random.choice(["archive/", "x/", "", "a/b/"])
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}data.pkl", program)
        if random.random() < 0.5:
            archive.writestr(f"{root}byteorder", b"little")
        for key, (_, nbytes) in STORAGES.items():
            archive.writestr(f"{root}data/{key}", PATTERN[:nbytes])
            # What is read behind the end of a storage is not the pattern.
            archive.writestr(f"{root}between/{key}", b"\xff" * 64)
        archive.writestr(f"{root}version", b"3\n")
    return content.getvalue()


def legacy(program: bytes, random: random.Random, classes: dict[str, str]) -> bytes:
    """Return a file of the format before: pickles, and behind them the storages."""
    content = io.BytesIO()
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    for head in (0x1950A86A20F9469CFC6C, 1001, system):
        pickle.dump(head, content, protocol=2)
    content.write(program)
    pickle.dump(list(STORAGES), content, protocol=2)
    for key, (_, nbytes) in STORAGES.items():
        token = ALL_NAMES.get(f"torch.{classes.get(key)}")
        width = token.dtype.itemsize if isinstance(token, Dtype) else 1
        count = nbytes // width
        if random.random() < 0.01:
            count = random.choice([-1, count + 1, 2**40, 2**63 - 1])
        content.write(struct.pack("<q", count) + PATTERN[: nbytes // width * width])
    content.write(b"\xff" * 64)
    return content.getvalue()


def tarred(program: bytes, random: random.Random) -> bytes:
    """Return a tar archive as torch 0.1 made it, now and then with numbers that are wrong."""
    odd = lambda usual: random.choice(HOSTILE_NUMBERS) if random.random() < 0.01 else usual
    put = lambda file, value: pickle.dump(value, file, protocol=2)
    signed = lambda n: struct.pack("<q", min(max(n, -(2**63)), 2**63 - 1))
    stored, described = io.BytesIO(), io.BytesIO()
    kinds = {"0": ("Float", 4), "1": ("Byte", 1), "2": ("Long", 8)}
    put(stored, odd(len(kinds)))
    for key, (kind, width) in kinds.items():
        head = io.BytesIO()
        put(head, (odd(int(key)), "cpu", "class"))
        text = b"X\x05\x00\x00\x00class"
        stored.write(head.getvalue().replace(text, b"ctorch\n%sStorage\n" % kind.encode()))
        nbytes = STORAGES[key][1]
        stored.write(signed(odd(nbytes // width)) + PATTERN[:nbytes])
    views = [(5, 0, 2, 4), (6, 2, 1, 3)] if random.random() < 0.3 else []
    put(stored, [tuple(map(odd, view)) for view in views])
    put(described, 6)
    for number in range(100, 106):
        keys = [0, 1, 2, *(view[0] for view in views)]
        put(described, (odd(number), odd(random.choice(keys)), None))
        shape, stride, offset = random.choice([((2,), (1,), 0), ((), (), 1), ((1, 2), (2, 1), 0)])
        described.write(struct.pack("<ii", odd(len(shape)) % 100, 0))
        described.write(b"".join(signed(odd(n)) for n in (*shape, *stride, offset)))
    content = io.BytesIO()
    files = {"storages": stored.getvalue(), "tensors": described.getvalue(), "pickle": program}
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, held in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(held)
            archive.addfile(info, io.BytesIO(held))
    return content.getvalue()


class Files(Fuzzer):
    """What the fuzzers of files of torch.save have in common."""

    def setup(self) -> None:
        self.path = self.folder / "x.pt"
        self.before = state_of_the_process()
        for content in self.honest_files():
            self.path.write_bytes(content)
            self.load(self.path)

    def honest_files(self) -> Iterator[bytes]:
        """Yield whole files, which are loaded once before the others."""
        chance = random.Random(0)
        program = b"\x80\x02}."
        yield from (
            zipped(program, chance),
            legacy(program, chance, {}),
            tarred(program, random.Random(1)),
        )

    def load(self, path: Path) -> None:
        try:
            check_usable(nn.load(path), patterned=True)
            self.load_in_other_ways(path)
        finally:
            assert state_of_the_process() == self.before, "the state of the process has changed"

    def load_in_other_ways(self, path: Path) -> None:
        """Load what nn.load takes with other arguments."""
        check_usable(nn.load(path, mmap=True), patterned=True)
        nn.load(path, device="meta")
        with contextlib.suppress(nn.CheckpointError):
            for value in what_is_in(nn.load(path, strict=True)):
                assert not isinstance(value, nn.io.Placeholder), "what strict=True keeps out"


class Programs(Files):
    """Programs by the grammar, in the three formats."""

    def write(self, random: random.Random) -> tuple[Path, str]:
        kind = random.choice(["zip", "zip", "legacy", "legacy", "tar"])
        program = Program(random, kind)
        code = program.whole()
        if kind == "zip":
            content = zipped(code, random)
        elif kind == "legacy":
            content = legacy(code, random, program.classes)
        else:
            content = tarred(code, random)
        self.path.write_bytes(content)
        return self.path, f"{kind}: {code!r}"


# --------------------------------------------------------------------------------------------------
# Programs that torch.save wrote, changed


def honest_values() -> list[Any]:
    """Return what torch.save is given; all its memory is `PATTERN`."""
    import torch

    def memory(dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(bytearray(PATTERN[:96]), dtype=dtype)

    base = memory(torch.float32)
    state = collections.OrderedDict(weight=base.reshape(4, 6), bias=base[1:4])
    state["n"] = memory(torch.int64)
    state._metadata = collections.OrderedDict({"": {"version": 1}, "0": {"version": 2}})  # type: ignore
    space = argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a/b"), nested=[base[:2]])
    space.self = space
    return [
        state,
        {"model": state, "epoch": 3, "args": space, "seen": {1, 2}, "lr": [1e-3, None, True]},
        [torch.nn.Parameter(base[:6].reshape(2, 3).t()), memory(torch.complex64).conj()],
        {
            "scalar": np.float64(2.5),
            "array": np.frombuffer(PATTERN[:24], np.int64),
            "objects": np.array([None, {"a": 1}], object),
            "dtype": torch.bfloat16,
            "np": np.dtype("<f4"),
            "size": torch.Size([2, 3]),
            "device": torch.device("cpu"),
            "counts": collections.Counter("abca"),
            "default": collections.defaultdict(list, a=[1]),
            "fixed": frozenset({1, "x"}),
        },
        {"half": memory(torch.float16)[::3], "bf": memory(torch.bfloat16)[5], 7: b"raw"},
    ]


class Changes(Files):
    """Files of torch.save whose pickle is changed in one to three operations."""

    def honest_files(self) -> Iterator[bytes]:
        import torch

        self.files: list[tuple[bytes, int, int, list[bytes]]] = []
        for value in honest_values():
            for protocol in (2, 4):
                for new in (True, False):
                    content = io.BytesIO()
                    torch.save(
                        value,
                        content,
                        pickle_protocol=protocol,
                        _use_new_zipfile_serialization=new,
                    )
                    whole = content.getvalue()
                    begin, end = self.place(whole)
                    self.files.append((whole, begin, end, taken_apart(whole[begin:end])))
                    yield whole
        self.pieces = sorted({piece for *_, pieces in self.files for piece in pieces[:-1]})
        yield from super().honest_files()

    def place(self, whole: bytes) -> tuple[int, int]:
        """Return where the program begins and ends."""
        if whole[:2] != b"PK":
            file = io.BytesIO(whole)
            for _ in range(3):
                list(pickletools.genops(file))
            begin = file.tell()
            list(pickletools.genops(file))
            return begin, file.tell()
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            info = next(i for i in archive.infolist() if i.filename.endswith("data.pkl"))
        begin = (
            info.header_offset
            + 30
            + sum(struct.unpack("<HH", whole[info.header_offset + 26 : info.header_offset + 30]))
        )
        return begin, begin + info.file_size

    def write(self, random: random.Random) -> tuple[Path, str]:
        which = random.randrange(len(self.files))
        whole, begin, end, pieces = self.files[which]
        pieces, notes = list(pieces), []
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            notes.append(self.change(pieces, random))
        program = b"".join(pieces)
        if whole[:2] == b"PK":
            content = io.BytesIO()
            with (
                zipfile.ZipFile(io.BytesIO(whole)) as old,
                zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as new,
            ):
                for info in old.infolist():
                    is_program = info.filename.endswith("data.pkl")
                    held = program if is_program else old.read(info)
                    new.writestr(info.filename, held)
            self.path.write_bytes(content.getvalue())
        else:
            self.path.write_bytes(whole[:begin] + program + whole[end:])
        return self.path, f"file {which}: {'; '.join(notes)}"

    def change(self, pieces: list[bytes], random: random.Random) -> str:
        """Change a program, which is a list of its operations; say what was changed."""
        at = random.randrange(1, len(pieces) - 1)
        old = pieces[at]
        kind = random.choice(["alike", "alike", "alike", "any", "insert", "drop", "twice", "swap"])
        if kind == "alike":  # another argument, for the same place on the stack
            pieces[at] = self.alike(old, random)
        elif kind == "any":
            pieces[at] = random.choice(self.pieces)
        elif kind == "insert":
            pieces.insert(at, self.new(random))
        elif kind == "drop":
            del pieces[at : at + random.choice([1, 1, 2, 5])]
            pieces += [] if pieces[-1] == b"." else [b"."]
        elif kind == "twice":
            length = random.choice([1, 1, 3, 20])
            pieces[at:at] = pieces[at : min(at + length, len(pieces) - 1)]
        else:
            other = random.randrange(1, len(pieces) - 1)
            pieces[at], pieces[other] = pieces[other], pieces[at]
        return f"{kind} at {at}, {old[:60]!r} -> {pieces[min(at, len(pieces) - 1)][:200]!r}"

    def alike(self, old: bytes, random: random.Random) -> bytes:
        program = Program(random, "zip")
        if old[:1] in b"KMJ\x8a\x8b":
            program.number(random.choice(HOSTILE_NUMBERS))
        elif old[:1] in b"X\x8c":
            program.text(random.choice(HOSTILE_TEXTS))
        elif old[:1] in (b"c", b"\x93"):
            program.name(random.choice([*ALL_NAMES, *FOREIGN]))
        elif old[:1] in (b"h", b"j"):
            return b"h" + bytes([random.randrange(60)])
        else:
            program.atom()
        return bytes(program.code)

    def new(self, random: random.Random) -> bytes:
        program = Program(random, "legacy")
        if random.random() < 0.4:
            return random.choice(self.pieces)
        program.value()
        return bytes(program.code) + random.choice([b"", b"0", b"b", b"a", b"\x85", b"R", b"s"])


def taken_apart(program: bytes) -> list[bytes]:
    """Return the operations of a pickle with their arguments; no frames, whose lengths would be wrong."""
    found = list(pickletools.genops(program))
    ends = [position for _, _, position in found[1:]] + [len(program)]
    parts = zip(found, ends, strict=True)
    return [program[at:end] for (op, _, at), end in parts if op.name != "FRAME"]  # type: ignore[index]


# --------------------------------------------------------------------------------------------------
# The tests


KINDS = pytest.mark.parametrize("kind", ["Programs", "Changes"])


def check_many(kind: str, count: int) -> None:
    outcomes = run_fuzz(f"tests.io.test_fuzz_pickles:{kind}", count, seed=0)
    assert set(outcomes) <= {"loaded", "CheckpointError"}
    # Many come to their end, and many do not: so the files between are reached.
    assert min(outcomes["loaded"], outcomes["CheckpointError"]) > count / 20


@KINDS
def test_hundreds_of_hostile_programs_are_refused_or_loaded(kind):
    check_many(kind, 300)


@pytest.mark.long
@KINDS
def test_many_hostile_programs_are_refused_or_loaded(kind):
    check_many(kind, 20_000)
