"""nn.load_exported of files that nn.export cannot have written: each is refused, at once."""

from __future__ import annotations

import collections
import errno
import functools
import hashlib
import json
import operator
import os
import random
import re
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from statefulnn.io import exported
from tests.io.fuzzing import HOSTILE, Fuzzer, Pairs, Raw, changed_tree, dumps, run_fuzz

Answer = collections.namedtuple("Answer", ["logits", "rest"])


class Answering(nn.Module):
    """Tied weights, containers in and out, state and randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, more, *, scale=None):
        out = self.norm(self.second(self.drop(self.first(x))) + more["y"][0])
        return Answer(out * scale, [{"mean": out.mean(0), "none": None}, (x,), {3: x}])


@functools.cache
def honest(kind: str) -> bytes:
    """Return the content of a file that nn.export wrote."""
    x = np.ones((2, 3), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m")
        if kind == "plain":
            model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
            nn.export(model, x, path, vjp_order=1)
        else:
            nn.export(
                Answering(),
                (x, {"y": [x]}),
                path,
                kwargs={"scale": x},
                constraints=["b <= 1024"],
                rng=True,
                mutable=True,
                metadata={"license": "MIT"},
            )
        return path.read_bytes()


def taken_apart(content: bytes) -> tuple[dict, dict, bytes]:
    """Return the header, the manifest and the arrays of a file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    manifest = json.loads(header["__metadata__"][exported.MANIFEST])
    return header, manifest, content[8 + length :]


def with_manifest(header: dict, manifest: Any) -> None:
    """Put a manifest into a header, with the digest that belongs to it."""
    text = manifest if isinstance(manifest, str) else dumps(manifest)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    header["__metadata__"] |= {exported.MANIFEST: text, exported.DIGEST: digest}


def joined(header: Any, body: bytes) -> bytes:
    text = dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


@pytest.fixture
def refused(tmp_path):
    """A function that writes a content, expects it to be refused, and returns the message."""

    def check(content: bytes, text: str | None = None) -> str:
        path = tmp_path / "m"
        path.write_bytes(content)
        with pytest.raises(nn.CheckpointError, match=text) as error:
            nn.load_exported(path)
        with pytest.raises(exported.DamagedFileError):
            exported.load_exported(path)
        assert str(path) in str(error.value) and len(str(error.value)) < 2000
        return str(error.value)

    return check


# --------------------------------------------------------------------------------------------------
# The manifest


def put(*keys_and_value: Any) -> Callable[[Any], None]:
    *keys, last, value = keys_and_value

    def change(manifest: Any) -> None:
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return change


def add(*keys_and_value: Any) -> Callable[[Any], None]:
    *keys, value = keys_and_value

    def change(manifest: Any) -> None:
        for key in keys:
            manifest = manifest[key]
        manifest.append(value)

    return change


def drop(*keys: Any) -> Callable[[Any], None]:
    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


FORWARD = ("methods", "forward")
PROGRAM = (*FORWARD, "programs", 0)
DERIVATIVE = (*FORWARD, "programs", 1)
OUT = (*FORWARD, "out")


def nested(depth: int) -> Raw:
    return Raw('["list", [' * depth + "0" + "]]" * depth)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (put("format", 2), "format 2 of nn.export\n.*reads format 1\n.*newer one"),
        (put("format", True), r"manifest\['format'\] is True"),
        (put("format", 1.0), r"manifest\['format'\] is 1.0"),
        (put("format", Raw("9" * 5000)), "a manifest that cannot be read"),
        (put("format", 10**4000), "a number of 13288 bits"),
        (drop("format"), r"manifest\['format'\] is None"),
        (put("more", 1), "manifest is an object of 9"),
        (drop("ties"), "an object with exactly format, module, versions"),
        (put("module", 3), r"manifest\['module'\] is 3"),
        (put("module", "x" * 10**7), r"manifest\['module'\] is 'xxx.* \.\.\."),
        (put("module", "\ud800"), r"manifest\['module'\] .*\n.*a text of Unicode"),
        (put("platforms", None), "manifest\\['platforms'\\] is None"),
        (put("platforms", []), "names of platforms"),
        (put("platforms", ["cpu", "cpu"]), "names of platforms, each once"),
        (put("platforms", [["cpu"]]), "is a list of 1"),
        (put("versions", "jax", 3), r"\['versions'\]\['jax'\] is 3"),
        (put("metadata", {"a": {}}), r"\['metadata'\]\['a'\] is an object of 0"),
        (put("weights", {}), "a list"),
        (put("weights", []), "the weights, a key if rng, and the labels"),
        (put("weights", 0, 3, -1), "a whole number from 0 to 4294967295"),
        (put("weights", 0, 3, True), r"\[3\] is True"),
        (put("weights", 0, 3, 0), "with other bytes than written"),
        (put("weights", 0, 1, "generator"), "one of 'trainable', 'frozen', 'buffer'"),
        (put("weights", 0, 1, ["frozen"]), "is a list of 1"),
        (put("weights", 0, 0, "weigth"), "no array 'weigth' of 'float32'"),
        (put("weights", 0, 2, "float16"), "no array '0.weight' of 'float16'"),
        (add("weights", 0, 1), "a list of 4"),
        (add("weights", ["0.weight", "frozen", "float32", 0]), "every weight, once"),
        (put("ties", "other", "none"), "further names of weights, not 'other': 'none'"),
        (put("ties", "0.bias", "0.weight"), "further names of weights, not '0.bias'"),
        (put("methods", []), r"manifest\['methods'\] is a list of 0"),
        (put("methods", {}), "at least one method"),
        (put("methods", "other", {}), r"\['other'\] is an object of 0"),
        (put(*FORWARD, 3), r"\['forward'\] is 3"),
        (put(*FORWARD, "mutable", 1), r"\['mutable'\] is 1\n.*true or false"),
        (put(*FORWARD, "rng", True), "the weights, a key if rng, and the labels"),
        (put(*FORWARD, "labels", []), "the weights, a key if rng, and the labels"),
        (add(*FORWARD, "labels", "y"), "the weights, a key if rng, and the labels"),
        (put(*FORWARD, "labels", [0]), r"\['labels'\]\[0\] is 0"),
        (put(*FORWARD, "positional", [["x", 1]]), "inputs with every label once"),
        (put(*FORWARD, "positional", [["x", -1]]), "is -1\n.*a whole number"),
        (put(*FORWARD, "positional", [["x", True]]), "is True\n.*a whole number"),
        (put(*FORWARD, "positional", [["x", 0.0]]), "is 0.0\n.*a whole number"),
        (put(*FORWARD, "positional", [["x", 0], ["x", None]]), "arguments with different names"),
        (put(*FORWARD, "positional", [["x", 0], ["y", 0]]), "inputs with every label once"),
        (put(*FORWARD, "positional", [["x"]]), "a list of 2"),
        (put(*FORWARD, "keyword", {"y": 0}), "inputs with every label once"),
        (put(*FORWARD, "keyword", {"input": None}), "arguments with different names"),
        (put(*FORWARD, "state", ["0.weight"]), "of a method that is mutable"),
        (put(*FORWARD, "state", ["none"]), "one of '0.weight', '0.bias'"),
        (put(*OUT, None), "every output of the program once"),
        (put(*OUT, ["tuple", [0, 0]]), "every output of the program once"),
        (put(*OUT, ["tuple", [0, 1]]), "every output of the program once"),
        (put(*OUT, ["set", [0]]), "one of 'list', 'tuple', 'dict'"),
        (put(*OUT, ["dict", [[0]]]), "a list of 2"),
        (put(*OUT, ["dict", [["a", 0], ["a", None]]]), "a dict with each key once"),
        (put(*OUT, ["dict", [[True, 0]]]), "is True"),
        (put(*OUT, ["dict", [[2**63, 0]]]), "a short text"),
        (put(*OUT, ["a b", [0], ["x"]]), "names of Python"),
        (put(*OUT, ["A", [0], ["x y"]]), "names of Python"),
        (put(*OUT, ["A", [0], ["class"]]), "names of Python"),
        (put(*OUT, ["A", [0], ["_x"]]), "names of Python"),
        (put(*OUT, ["A", [0, None], ["x", "x"]]), "names of Python"),
        (put(*OUT, ["A", [0], ["x=print('')"]]), "names of Python"),
        (put(*OUT, ["A", [0], ["x", "y"]]), "a list of 1"),
        (put(*OUT, ["A", [0], [3]]), "is 3"),
        (put(*OUT, ["A", [0] * 1001, ["x"] * 1001]), "at most 1000 fields"),
        (
            put(*OUT, ["list", [[f"A{i}", [], []] for i in range(101)]]),
            "at most 100 kinds of named tuples",
        ),
        (put(*OUT, nested(102)), "a tree that is nested too deeply"),
        (put(*OUT, nested(400)), "nested too deeply|cannot be read"),
        (put(*OUT, nested(2000)), "cannot be read"),
        (put(*FORWARD, "programs", []), "at least one program"),
        (put(*PROGRAM, "sha256", "0"), "'program:forward:0' with other bytes than written"),
        (put(*PROGRAM, "sha256", 0), r"\['sha256'\] is 0"),
        (put(*PROGRAM, "calling_convention", 99), "calling convention 99\n.*\n.*newer JAX"),
        (put(*PROGRAM, "calling_convention", 10.0), "is 10.0"),
        (put(*PROGRAM, "kept", [0, 0]), "increasing numbers"),
        (put(*PROGRAM, "kept", [1, 0]), "increasing numbers"),
        (put(*PROGRAM, "kept", [8]), "a whole number from 0 to 7"),
        (put(*PROGRAM, "kept", [False]), "is False"),
        (put(*PROGRAM, "global_constants", "yes"), "true or false"),
        (put(*PROGRAM, "in", ["float32[b, 3]"]), "a whole number from 0 to 0"),
        (put(*PROGRAM, "in", 0, "float32[5, 3]"), "a program that takes the weights"),
        (put(*PROGRAM, "in", 0, "float32[4, 3"), "a dtype and a shape"),
        (put(*PROGRAM, "in", 0, "object[4, 3]"), "a dtype and a shape"),
        (put(*PROGRAM, "in", 0, "f4,(1000000)i4[3]"), "a dtype and a shape"),
        (put(*PROGRAM, "in", -1, "float32[b, 4]"), "each of which is the derivative"),
        (put(*PROGRAM, "out", 0, "float32[c, 4]"), "dimensions whose names the inputs have"),
        (put(*PROGRAM, "out", 0, f"float32[{2**61}]"), "a shape that numpy has"),
        (put(*PROGRAM, "out", 0, f"float32[{'1, ' * 64}1]"), "a shape that numpy has"),
        (put(*PROGRAM, "constraints", ["b <= 3 <= 4"]), "a constraint"),
        (put(*PROGRAM, "constraints", ["b < 3"]), "a constraint"),
        (put(*PROGRAM, "constraints", ["b, b <= 3"]), "a constraint"),
        (put(*PROGRAM, "constraints", ["<="]), "a constraint"),
        (put(*PROGRAM, "constraints", "b <= 3"), "a list"),
        (put(*PROGRAM, "constraints", [f"b <= {i}" for i in range(101)]), "at most 100"),
        (put(*DERIVATIVE, "out", []), "each of which is the derivative"),
        (put(*DERIVATIVE, "in", 0, "float32[4, 4]"), "each of which is the derivative"),
        (drop(*FORWARD, "programs", 1), "an array 'program:forward:1' more"),
        (add(*FORWARD, "programs", {}), r"\['programs'\]\[2\] is an object of 0"),
    ],
)
def test_a_manifest_that_nn_export_does_not_write_is_refused(change, text, refused):
    header, manifest, body = taken_apart(honest("plain"))
    change(manifest)
    with_manifest(header, manifest)
    refused(joined(header, body), text)


@pytest.mark.parametrize(
    "shape",
    [
        "b^1000000000",
        "b^65",
        "*".join(["(a+b+c+d)"] * 40),
        "(b)",
        "b**2",
        "b + " * 100_000 + "b",
        "9" * 5000,
        str(2**63),
        "b * " + "9" * 30,
        "max(" * 101 + "b" + ", 0)" * 101,
        "max(" * 100_000,
        "floordiv(b, 0)",
        "mod(b, 0)",
        "floordiv(b)",
        "max(b, 1, 2)",
        "floordiv b",
        "print(b)",
        "b if b else 1",
        "b\n",
        "b # more",
        "...",
        "_",
        "1_0",
        "0x10",
        "٣",
        "-3",
        "b,",
        ", b",
        "b,, 3",
        "b c",
        "'b'",
        "\ud800",
        "\0",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_a_shape_that_jax_does_not_print_is_refused_at_once(shape, refused):
    header, manifest, body = taken_apart(honest("plain"))
    put(*PROGRAM, "out", 0, f"float32[{shape}, 4]")(manifest)
    with_manifest(header, manifest)
    begin = time.process_time()
    refused(joined(header, body))
    assert time.process_time() - begin < 5
    header, manifest, body = taken_apart(honest("plain"))
    put(*PROGRAM, "constraints", [f"b <= {shape}"])(manifest)
    with_manifest(header, manifest)
    if shape != "-3":  # a size is not negative; the side of a comparison may be
        refused(joined(header, body))
    assert time.process_time() - begin < 10


def test_every_shape_that_jax_prints_is_read():
    rng = random.Random(0)
    b, t, height, largest, smallest = jax.export.symbolic_shape(
        "b, t_1, höhe, max(b - 2, t_1), min(3*b, höhe)"
    )
    operations = [
        operator.add,
        operator.sub,
        operator.mul,
        lambda x, y: x // (rng.randint(2, 9)),
        lambda x, y: x % (rng.randint(2, 9)),
    ]
    shapes = [(b, 3), (), (0,), (b, b * t, 7, t), (b**3 * 2 - 5,), (-b + 2 * b**2,)]
    for _ in range(200):
        size: Any = b
        for _ in range(rng.randint(1, 5)):
            size = rng.choice(operations)(
                size, rng.choice([b, t, height, largest, smallest, 1, 2, 7])
            )
        if not isinstance(size, int) or size >= 0:
            shapes.append((size, 4))
    for shape in shapes:
        named: set[str] = set()
        printed = ", ".join(map(str, shape))
        sizes = exported._Shapes(printed, named).sizes()
        assert sizes == tuple(n if isinstance(n, int) else str(n) for n in shape)
        assert named == {str(n) for n in (b, t, height) if re.search(rf"\b{n}\b", printed)}


@pytest.mark.parametrize(
    ("constraints", "text"),
    [
        (["3 >= 5"], "Unsatisfiable explicit constraint: 3 >= 5"),
        (["b >= 5", "b <= 3"], "Unsatisfiable constraint"),
        (["2*b + 1 == 3"], "Invalid equality constraint"),
    ],
)
def test_constraints_that_jax_cannot_solve_are_an_error_of_the_call(constraints, text, tmp_path):
    header, manifest, body = taken_apart(honest("plain"))
    put(*PROGRAM, "constraints", constraints)(manifest)
    with_manifest(header, manifest)
    (tmp_path / "m").write_bytes(joined(header, body))
    loaded = nn.load_exported(tmp_path / "m")
    with pytest.raises(ValueError, match=text) as error:
        loaded(np.ones((2, 3), np.float32))
    assert str(tmp_path / "m") in str(error.value)


# --------------------------------------------------------------------------------------------------
# The header


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (put("0.weight", "shape", [4, 3, 1]), "an array|a program that takes the weights"),
        (put("0.weight", "shape", [4, 4]), "as many bytes as it takes"),
        (put("0.weight", "shape", [True, 12]), "is True"),
        (put("0.weight", "shape", [-4, -3]), "is -4"),
        (put("0.weight", "shape", [4.0, 3]), "is 4.0"),
        (put("0.weight", "shape", "43"), "is '43'"),
        (put("0.weight", "shape", [Raw("9" * 5000)]), "a header that cannot be read"),
        (put("0.weight", "shape", [10**4000]), "a number of 13288 bits"),
        (put("0.weight", "dtype", "X"), "is 'X'\n.*one of 'BOOL'"),
        (put("0.weight", "dtype", ["F32"]), "is a list of 1"),
        (put("0.weight", "dtype", "F64"), "as many bytes as it takes"),
        (put("0.weight", "data_offsets", [0]), "a list of 2"),
        (put("0.weight", "data_offsets", [0, 1, 2]), "a list of 2"),
        (put("0.weight", "more", 0), "exactly dtype, shape, data_offsets"),
        (put("0.weight", {}), "exactly dtype, shape, data_offsets"),
        (put("0.weight", None), "exactly dtype, shape, data_offsets"),
        (drop("0.weight"), "overlaps, or is cut off"),
        (put("__metadata__", []), r"\['__metadata__'\] is a list of 0"),
        (put("__metadata__", exported.MANIFEST, 3), "is 3"),
        (put("__metadata__", exported.DIGEST, "0"), "a manifest with other bytes"),
        (put("__metadata__", exported.MANIFEST, "\ud800"), "a text of Unicode"),
        (drop("__metadata__", exported.MANIFEST), "no exported program"),
        (drop("__metadata__"), "no exported program"),
    ],
)
def test_a_header_that_safetensors_does_not_have_is_refused(change, text, refused):
    header, _, body = taken_apart(honest("plain"))
    change(header)
    refused(joined(header, body), text)


@pytest.mark.parametrize(
    "shape", [[0, 2**62, 2**62], [0, 2**63], [1] * 65, [0] * 65, [0, 2**62, 4]], ids=str
)
def test_a_shape_that_numpy_does_not_have_is_refused(shape, refused):
    header, manifest, body = taken_apart(honest("plain"))
    header["empty"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * (0 not in shape)]}
    refused(joined(header, body))


def test_an_array_without_elements_may_have_any_sizes_that_numpy_has(tmp_path):
    header, manifest, body = taken_apart(honest("plain"))
    header["empty"] = {"dtype": "U8", "shape": [0, 2**40], "data_offsets": [0, 0]}
    manifest["weights"].append(["empty", "buffer", "uint8", 0])
    count = len(manifest["weights"]) - 1
    for program in manifest["methods"]["forward"]["programs"]:
        program["in"].append(program["in"][-1])
    first, second = manifest["methods"]["forward"]["programs"]
    first["in"][count:] = ["uint8[0, 1099511627776]", first["in"][-1]]
    with_manifest(header, manifest)
    (tmp_path / "m").write_bytes(joined(header, body))
    with pytest.raises(nn.CheckpointError, match="each of which is the derivative"):
        nn.load_exported(tmp_path / "m")
    header, manifest, body = taken_apart(honest("containers"))
    header["empty"] = {"dtype": "U8", "shape": [0, 2**40], "data_offsets": [0, 0]}
    count = len(manifest["weights"])
    manifest["weights"].append(["empty", "buffer", "uint8", 0])
    manifest["methods"]["forward"]["programs"][0]["in"].insert(count, "uint8[0, 1099511627776]")
    with_manifest(header, manifest)
    (tmp_path / "m").write_bytes(joined(header, body))
    assert nn.load_exported(tmp_path / "m").params["empty"].shape == (0, 2**40)


def test_names_that_repeat_are_refused(refused):
    header, manifest, body = taken_apart(honest("plain"))
    items = list(header.items())
    refused(joined(Pairs([*items, items[1]]), body), f"a header with '{items[1][0]}' twice")
    entry = Pairs([*header["0.weight"].items(), ("dtype", "F32")])
    refused(joined({**header, "0.weight": entry}, body), "a header with 'dtype' twice")
    with_manifest(header, Pairs([*manifest.items(), ("ties", {})]))
    refused(joined(header, body), "a manifest with 'ties' twice")


def test_names_as_long_as_the_file_make_short_messages(refused):
    header, manifest, body = taken_apart(honest("plain"))
    refused(joined({**header, "x" * 10**7: {}}, body))
    header["x" * 10**6] = header.pop("0.weight")
    refused(joined(header, body))


def test_json_that_unpacks_to_much_more_than_the_file_is_refused_before(tmp_path, refused):
    header, _, body = taken_apart(honest("plain"))
    many = Raw("[" + "[]," * 2_000_000 + "[]]")
    for content in (
        joined({**header, "more": many}, body),
        joined({**header, "__metadata__": {exported.MANIFEST: str(many)}}, body),
    ):
        tracemalloc.start()
        try:
            if b'"[[]' in content:  # as the manifest, with its digest
                with_manifest(header, str(many))
                content = joined(header, body)
            (tmp_path / "m").write_bytes(content)
            with pytest.raises(nn.CheckpointError, match="bytes in memory"):
                nn.load_exported(tmp_path / "m")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 64 << 20


# --------------------------------------------------------------------------------------------------
# What the path is, and what happens meanwhile


def test_a_pipe_a_device_and_a_folder_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(nn.CheckpointError, match="a pipe or a device"):
            nn.load_exported(path)
    with pytest.raises(IsADirectoryError) as error:
        nn.load_exported(tmp_path)
    assert str(error.value.filename) == str(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        nn.load_exported(tmp_path / "none")
    assert str(error.value.filename) == str(tmp_path / "none")
    with pytest.raises(nn.CheckpointError, match="ValueError"):
        nn.load_exported("a\0b")


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_file_that_becomes_shorter_meanwhile_is_refused(calls, tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(honest("plain"))
    fill, left = exported._fill, [calls]

    def shortening(*args):
        left[0] -= 1
        if left[0] == 0:
            os.truncate(path, 4)
        return fill(*args)

    monkeypatch.setattr(exported, "_fill", shortening)
    with pytest.raises(nn.CheckpointError, match="the end of the file"):
        nn.load_exported(path)


@pytest.mark.parametrize(
    "error", [RuntimeError("raw"), KeyError("x"), RecursionError(), IndexError()]
)
def test_an_error_that_nobody_foresaw_is_an_error_of_the_file(error, tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(honest("plain"))

    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(exported._Shapes, "sizes", failing)
    with pytest.raises(nn.CheckpointError, match=type(error).__name__):
        nn.load_exported(path)
    with pytest.raises(exported.DamagedFileError, match=type(error).__name__):
        exported.load_exported(path)


def test_an_error_of_the_operating_system_has_the_path(tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(honest("plain"))

    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(exported, "_fill", failing)
    with pytest.raises(OSError, match="Input/output error") as error:
        nn.load_exported(path)
    assert error.value.errno == errno.EIO and error.value.filename == str(path)


def test_booleans_are_zero_or_one(tmp_path, refused):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", jnp.array([True, False, True]))

        def forward(self, x):
            return jnp.where(self.mask, x, 0)

    nn.export(Masked(), np.ones((2, 3), np.float32), tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    header, manifest, body = taken_apart(content)
    begin, end = header["mask"]["data_offsets"]
    assert end - begin == 3 and nn.load_exported(tmp_path / "m").params["mask"].sum() == 2
    body = body[:begin] + b"\1\2\1" + body[end:]
    manifest["weights"][0][3] = zlib.crc32(b"\1\2\1")
    with_manifest(header, manifest)
    refused(joined(header, body), "'mask' with bytes that are no booleans")


def test_memory_that_is_not_there_is_a_memory_error(tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(honest("plain"))

    def full(*_: Any) -> None:
        raise MemoryError

    def full_device(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(exported, "_fill", full)
        nn.load_exported(path)
    with pytest.raises(MemoryError, match="do not fit where they go"):
        monkeypatch.setattr(jax, "device_put", full_device)
        nn.load_exported(path)


def test_64_bits_that_are_off_are_named(tmp_path):
    header, manifest, body = taken_apart(honest("plain"))
    header["0.bias"] |= {"dtype": "F64", "shape": [2]}
    next(w for w in manifest["weights"] if w[0] == "0.bias")[2] = "float64"
    for program in manifest["methods"]["forward"]["programs"]:
        program["in"][1] = "float64[2]"
    manifest["methods"]["forward"]["programs"][1]["out"][1] = "float64[2]"
    with_manifest(header, manifest)
    (tmp_path / "m").write_bytes(joined(header, body))
    with pytest.raises(RuntimeError, match="'0.bias' has dtype float64(.|\n)*jax_enable_x64"):
        nn.load_exported(tmp_path / "m")


def test_weights_are_read_into_memory_that_jax_takes_over(tmp_path):
    nn.export(nn.Linear(1000, 1000), np.ones((2, 1000), np.float32), tmp_path / "m")
    tracemalloc.start()
    try:
        loaded = exported.read(tmp_path / "m")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.1 * 4 * 1000 * 1000 + 100_000
    assert all(v.ctypes.data % 64 == 0 for v in loaded.params.values())


# --------------------------------------------------------------------------------------------------
# What nn.export refuses, since it could not be loaded


def test_what_could_not_be_loaded_is_not_written(tmp_path):
    x = np.ones((2, 3), np.float32)
    renamed = collections.namedtuple("Renamed", ["1", "2"], rename=True)

    class Odd(nn.Module):
        def forward(self, x, /, **more):
            return renamed(x, more["x"]) if more else x

    class Keys(nn.Module):
        def forward(self, x):
            return jax.random.wrap_key_data(x)

    with pytest.raises(nn.CheckpointError, match="arguments with different names"):
        nn.export(Odd(), x, tmp_path / "m", kwargs={"x": x})
    with pytest.raises(nn.CheckpointError, match="names of Python, for a named tuple"):
        nn.export(
            Odd(),
            x,
            tmp_path / "m",
            methods={"forward": {"function": lambda model, x: renamed(x, x)}},
        )
    with pytest.raises(nn.CheckpointError, match="a dtype and a shape"):
        nn.export(Keys(), np.ones(2, np.uint32), tmp_path / "m", batch=None)
    with pytest.raises(nn.CheckpointError, match="a constraint such as"):
        nn.export(Odd(), x, tmp_path / "m", constraints=["b^100 >= 1"])
    assert list(tmp_path.iterdir()) == []


def test_honest_files_are_loaded_with_all_they_hold(tmp_path):
    for kind in ("plain", "containers"):
        (tmp_path / kind).write_bytes(honest(kind))
    x = np.ones((4, 3), np.float32)
    assert nn.load_exported(tmp_path / "plain")(x).shape == (4, 4)
    loaded = nn.load_exported(tmp_path / "containers")
    out, state = loaded(x, {"y": [x]}, scale=x, rng=0)
    assert type(out).__name__ == "Answer" and out.logits.shape == (4, 3)
    assert set(state) == {
        f"norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert dict(loaded.ties) == {"second.weight": "first.weight"}
    jnp.asarray(out.rest[0]["mean"])


# --------------------------------------------------------------------------------------------------
# Many files


class Exports(Fuzzer):
    """Honest files whose header or manifest is changed in its structure, with the digest made right."""

    POOL = [
        *HOSTILE,
        *("dict", "list", "tuple", "float32[b, 3]", "float64[2]", "int8[]", "float32[b^99999999]"),
        *("0.weight", "program:forward:0", "forward", "input", "cpu", "F64", "trainable", "b <= 3"),
        ["tuple", [0, 0]],
        ["A", [0], ["x"]],
        ["dict", [["a", 0]]],
        ["0.weight", "trainable", "float32", 0],
    ]

    def setup(self) -> None:
        self.honest = [honest("plain"), honest("containers")]
        self.path = self.folder / "m"
        for content in self.honest:
            self.path.write_bytes(content)
            self.load(self.path)

    def write(self, random: random.Random) -> tuple[Path, str]:
        which = random.randrange(2)
        header, manifest, body = taken_apart(self.honest[which])
        if random.random() < 0.75:
            manifest, change = changed_tree(manifest, random, self.POOL)
            with_manifest(header, manifest)
            change = f"file {which}, manifest: {change}"
        else:
            header, change = changed_tree(header, random, self.POOL)
            change = f"file {which}, header: {change}"
        self.path.write_bytes(joined(header, body))
        return self.path, change

    def load(self, path: Path) -> None:
        loaded = nn.load_exported(path)
        loaded.describe().encode()
        repr(loaded)
        for method in loaded.methods.values():
            method.describe()

    def outcome(self, error: Exception, path: Path) -> str | None:
        if type(error) is RuntimeError and "jax_enable_x64" in str(error):
            return "64 bits"
        return super().outcome(error, path)


def check_many(count: int) -> None:
    outcomes = run_fuzz("tests.io.test_export_hostile:Exports", count, seed=0)
    assert set(outcomes) <= {"loaded", "CheckpointError", "64 bits"}
    assert outcomes["loaded"] > count / 100 and outcomes["CheckpointError"] > count / 2


def test_hundreds_of_hostile_files_are_refused_or_loaded():
    check_many(400)


@pytest.mark.long
def test_many_hostile_files_are_refused_or_loaded():
    check_many(20_000)
