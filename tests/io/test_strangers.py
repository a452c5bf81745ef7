"""Files made to do harm: nothing outside of them is read or changed, and they cost about what they weigh."""

from __future__ import annotations

import collections
import gc
import json
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.io.test_damaged import made
from tests.io.test_torch_files import archive
from tests.quick import first

GLOBAL = {
    "tensor": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "storage": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x04tQ",
}
# A tensor of the storage "0", which has four floats: its offset, sizes and strides are to be filled in.
TENSOR = b"\x80\x02" + GLOBAL["tensor"] + b"(" + GLOBAL["storage"] + b"%b(%bt(%bt\x89)tR."
WHOLE = TENSOR[:-2] % (b"K\x00", b"K\x02K\x02", b"K\x02K\x01")
DATA = np.arange(4, dtype="f4").tobytes()
DOUBLED = b"]q\x00" + b"".join(b"(h%ch%cl" % (i, i) + b"q%c" % (i + 1) for i in range(60))


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def load(tmp_path, pickled, data=DATA, **options):
    archive(tmp_path / "x", b"\x80\x02" + pickled, data__0=data)
    return nn.load(tmp_path / "x", **options)


# BUILD on each kind of object that a pickle can have on its stack.
BUILDS = {
    "a dtype": b"ctorch\nbfloat16\n(K\x03" + text("<") + b"NNNJ\x00\x00\x01\x00K\x01K\x00tb",
    "a storage's class": b"ctorch\nFloatStorage\n}" + text("itemsize") + b"K\x09sb",
    "a function": GLOBAL["tensor"] + b"}" + text("build") + b"K\x01sb",
    "a tensor": WHOLE[2:] + b"R}" + text("offset") + b"J\xfd\xff\xff\xffsb",
    "a tensor, by slots": WHOLE[2:] + b"RN}" + text("stride") + b"(J\xff\xff\xff\xfftsb" + b"\x86b",
    "a storage": GLOBAL["storage"] + b"}" + text("first") + b"J\xf7\xff\xff\xffsb",
    "versions of odd kinds": (
        b"ccollections\nOrderedDict\n)R}" + text("_metadata") + b"}" + text("") + b"K\x03ssb"
    ),
    "a version that is a text": (
        b"ccollections\nOrderedDict\n)R}" + text("_metadata") + b"}" + text("") + b"}"
        + text("version") + text("2") + b"sssb"
    ),
    "a dict": b"}}" + text("items") + b"Nsb",
    "a list": b"]}" + text("append") + b"Nsb",
    "a number": b"K\x01}b",
    "a counter": b"ccollections\nCounter\n)R}" + text("update") + b"Nsb",
    "a foreign class itself": b"cos\npath\n}" + text("sep") + text("!") + b"sb",
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDS)
def test_a_pickle_gives_no_state_to_what_torch_gives_none(name, tmp_path):
    with pytest.raises(nn.CheckpointError) as info:
        load(tmp_path, BUILDS[name] + b".")
    assert (
        "state" in str(info.value) or "version" in str(info.value) or "_metadata" in str(info.value)
    )
    assert np.dtype(jnp.bfloat16).itemsize == 2
    path = tmp_path / "y"
    torch.save({"w": torch.ones(2, dtype=torch.bfloat16), "f": torch.arange(3.0)}, path)
    assert nn.load(path)["w"].tolist() == [1.0, 1.0]
    assert nn.load(path)["f"].tolist() == [0.0, 1.0, 2.0]


# States of an OrderedDict that would hide what it holds, or its versions.
HIDING = {
    "items": b"}" + text("items") + b"Ns",
    "values, beside versions": b"}(" + text("_metadata") + b"}" + text("values") + b"Nu",
    "slots": b"N}" + text("items") + b"Ns\x86",
    "versions that are no dict": b"}" + text("_metadata") + b"K\x01s",
    "a list": b"]",
}


@pytest.mark.parametrize("name", HIDING)
def test_a_state_of_an_ordered_dict_hides_nothing(name, tmp_path):
    program = (
        b"ccollections\nOrderedDict\n)R" + text("w") + WHOLE[2:] + b"Rs" + HIDING[name] + b"b."
    )
    found = load(tmp_path, program)
    assert list(found.items())[0][0] == "w" and list(found.values())[0].shape == (2, 2)
    assert isinstance(getattr(found, "_metadata", {}), dict)
    with pytest.raises(nn.CheckpointError, match="a state of an OrderedDict"):
        load(tmp_path, program, strict=True)


@pytest.mark.parametrize(
    "key",
    [
        b")" + b"\x85" * 100_000,  # a tuple as deep
        b"(K\x01l",
        DOUBLED,
        DOUBLED.replace(b"l", b"t"),
        b"}",
        b"\x8a\xff" + b"\x01" * 255,
        b"K\x01\x85\x85\x85\x85\x85",
        GLOBAL["tensor"],
    ],
    ids=["deep", "list", "doubled lists", "doubled tuples", "dict", "2040 bits", "tuples", "function"],
)  # fmt: skip
def test_only_plain_scalars_and_short_tuples_of_them_are_hashed(key, tmp_path):
    for program in (
        b"}" + key + b"K\x01s.",
        b"c__builtin__\nset\n]" + key + b"a\x85R.",
        b"\x8f(" + key + b"\x90.",
    ):
        with pytest.raises(nn.CheckpointError):
            load(tmp_path, program, strict=True)
        try:
            (found,) = load(tmp_path, program)
        except nn.CheckpointError:
            continue  # it would take too much, or be too deep
        assert type(found) is nn.io.Placeholder and len(repr(found)) < 600


@pytest.mark.parametrize("callee", [b"ctorch\ndevice\n", b"ctorch\nSize\n", b"c_codecs\nencode\n"])
@pytest.mark.parametrize(
    "argument", [DOUBLED, DOUBLED.replace(b"l", b"t")], ids=["lists", "tuples"]
)
def test_nothing_is_made_a_text_but_plain_scalars(callee, argument, tmp_path):
    program = argument + b"0" * 61 + callee + b"h\x3ch\x3c\x86R."
    try:
        assert "torch.device" not in repr(load(tmp_path, program))
    except nn.CheckpointError as error:
        assert len(str(error)) < 2000


def test_a_placeholder_of_doubled_containers_is_shown_short(tmp_path):
    found = load(tmp_path, DOUBLED + b"0" * 61 + b"cfoo\nBar\nh\x0ch\x0c\x86R.")
    assert found.name == "foo.Bar" and len(repr(found)) < 600
    with pytest.raises(
        nn.CheckpointError, match="max_bytes"
    ):  # 2**60 for whoever looks at all of it
        load(tmp_path, DOUBLED + b"0" * 61 + b"cfoo\nBar\nh\x3ch\x3c\x86R.")


# Sizes that overflow, or have thousands of digits; offsets before the storage, and behind it.
LONG = b"\x8b" + struct.pack("<I", 3000) + b"\x7f" * 3000
NEGATIVE = b"J\xff\xff\xff\xff"
EDGE = b"\x8a\x09" + (1 << 63).to_bytes(9, "little")
LAST = b"\x8a\x08" + ((1 << 63) - 1).to_bytes(8, "little")


@pytest.mark.parametrize(
    "number", [LONG, NEGATIVE, EDGE, LAST, b"\x88", b"G" + struct.pack(">d", 1.0)]
)
@pytest.mark.parametrize("place", ["offset", "size", "stride", "numel", "first"])
def test_numbers_that_are_none_of_a_tensor_are_refused(place, number, tmp_path):
    parts = {"offset": b"K\x00", "size": b"K\x02K\x02", "stride": b"K\x02K\x01"}
    program = TENSOR
    if place in parts:
        parts[place] = number + (b"K\x02" if place != "offset" else b"")
    elif place == "numel":
        program = TENSOR.replace(b"K\x04tQ", number + b"tQ")
    else:
        view = b"(" + text("v").replace(b"%", b"%%") + number + b"K\x01t"
        program = TENSOR.replace(b"K\x04tQ", b"K\x04" + view + b"tQ")
    body = program % (parts["offset"], parts["size"], parts["stride"])
    if place == "numel" and number == LAST:
        # How much a storage claims to have does not matter: the file says how much there is.
        assert load(tmp_path, body[2:]).tolist() == [[0, 1], [2, 3]]
        return
    with pytest.raises(nn.CheckpointError) as info:
        load(tmp_path, body[2:])
    assert len(str(info.value)) < 1000


def test_tensors_without_elements_have_no_sizes_that_numpy_cannot_have(tmp_path):
    for size in (b"K\x00" + LAST + LAST, b"K\x00" * 65):
        stride = b"K\x01" * (3 if size[2:] != b"K\x00" * 64 else 65)
        with pytest.raises(nn.CheckpointError):
            load(tmp_path, (TENSOR % (b"K\x00", size, stride))[2:])
    found = load(tmp_path, (TENSOR % (b"K\x00", b"K\x00" * 30, b"K\x01" * 30))[2:])
    assert found.shape == (0,) * 30


# --------------------------------------------------------------------------------------------------
# What a file may cost

RUN = """
    import resource, sys, time
    import jax, numpy as np, statefulnn as nn
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    try:
        found = nn.load(sys.argv[1])
    except nn.CheckpointError as error:
        print("refused", str(error).splitlines()[0][-80:])
    else:
        print("loaded", type(found).__name__)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""


def cost(path):
    """Load a file in a process of its own; return what became of it and the MiB it took at most."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUN), str(path)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result, mebibytes = done.stdout.splitlines()
    return result, int(mebibytes)


def stretched(path):
    """1,000 tensors of 64 MiB, each one number of a small storage."""
    one = TENSOR[2:-1] % (b"K\x00", b"\x8a\x04" + struct.pack("<i", 1 << 24), b"K\x00")
    another = [one.replace(b"(K\x00", b"(K\x00", 1) for _ in range(1000)]
    body = (
        b"("
        + b"".join(
            part[: part.rindex(b"Q") + 1]
            + b"M"
            + struct.pack("<H", i)
            + b"(\x8a\x04"
            + struct.pack("<i", 1 << 24)
            + b"t(K\x00t\x89)tR"
            for i, part in enumerate(another)
        )
        + b"l."
    )
    archive(path, b"\x80\x02" + body, data__0=np.arange(1000, dtype="f4").tobytes())  # fmt: skip


def repeated(path, program):
    """One long list or text, from which each following operation makes another."""
    archive(path, b"\x80\x02" + program)


def overlapping(path):
    """Entries of an archive that are all the same bytes."""
    archive(path, b"\x80\x02].", data__0=bytes(1 << 20))
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02", content.index(b"data/0"))
    assert directory
    tensors = b"".join(
        TENSOR[2:-1].replace(b"X\x01\x00\x00\x000", b"X" + struct.pack("<I", 4) + b"%04d" % i)
        % (b"K\x00", b"\x8a\x04" + struct.pack("<i", 1 << 18), b"K\x01")
        + b"."[:0]
        for i in range(1000)
    )
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a/data.pkl", b"\x80\x02(" + tensors + b"l.")
        z.writestr("a/data/0000", bytes(1 << 20))
        first = z.getinfo("a/data/0000")
        for i in range(1, 1000):
            info = zipfile.ZipInfo(f"a/data/{i:04d}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(info, field, getattr(first, field))
            info.compress_type, info.create_system = first.compress_type, first.create_system
            z.filelist.append(info)
            z.NameToInfo[info.filename] = info


COSTLY = {
    "tensors of one number": stretched,
    "sizes": lambda path: repeated(
        path, b"(" + b"K\x01" * 60 + b"lq\x00ctorch\nSize\nq\x01(" + b"h\x01h\x00\x85R" * 400_000 + b"l."
    ),
    "encoded texts": lambda path: repeated(
        path,
        text("x" * 100_000) + b"q\x00" + text("latin1") + b"q\x01c_codecs\nencode\nq\x02("
        + b"h\x02h\x00h\x01\x86R" * 100_000 + b"l.",
    ),
    "empty containers": lambda path: repeated(path, b"(" + b"}" * 4_000_000 + b"l."),
    "a memo": lambda path: repeated(path, b"N" + b"\x94" * 4_000_000 + b"."),
    "marks": lambda path: repeated(path, b"(" * 5_000_000 + b"."),
    "overlapping entries": overlapping,
    "a header of empty lists": lambda path: path.write_bytes(
        made(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}", b"")
    ),
    "notes of empty lists": lambda path: path.write_bytes(
        made({"__metadata__": {"statefulnn": json.dumps({"values": {"a": [[]] * 4_000_000}})}}, b"")
    ),
}  # fmt: skip


# The others are of the same kinds: many small values from few bytes of a pickle, or of a header.
KINDS = ["tensors of one number", "encoded texts", "empty containers", "overlapping entries"]
KINDS += ["a header of empty lists"]


@pytest.mark.parametrize(
    "name", first(len(KINDS), [*KINDS, *(n for n in COSTLY if n not in KINDS)])
)
def test_a_file_that_unpacks_to_far_more_than_its_size_is_refused(name, tmp_path):
    COSTLY[name](tmp_path / "x")
    size = (tmp_path / "x").stat().st_size >> 20
    result, mebibytes = cost(tmp_path / "x")
    assert result.startswith("refused"), result
    # The limit is 64 MiB and four times the file; half as much again is for what Python adds.
    assert mebibytes < 1.5 * (64 + 4 * size) + 64, (result, mebibytes, size)


def test_the_limit_can_be_raised_and_lowered(tmp_path):
    torch.save({"w": torch.ones(1).expand(5000, 5000)}, tmp_path / "x")
    with pytest.raises(nn.CheckpointError, match=r'nn.load\(path, max_bytes="8GB"\)'):
        nn.load(tmp_path / "x")
    assert nn.load(tmp_path / "x", max_bytes="1GB")["w"].shape == (5000, 5000)
    assert nn.load(tmp_path / "x", device="meta")["w"].shape == (5000, 5000)
    nn.save({"w": jnp.ones(1000)}, tmp_path / "y")
    with pytest.raises(nn.CheckpointError, match="more than 0 MiB"):
        nn.load(tmp_path / "y", max_bytes=1000)
    for odd in (0, -1, True, "much", "1 XB"):
        with pytest.raises(ValueError, match="max_bytes must be"):
            nn.load(tmp_path / "y", max_bytes=odd)


def header_of(dimensions):
    return made({"a": {"dtype": "F32", "shape": [2] * dimensions, "data_offsets": [0, 4]}}, b"1234")


def entries(count, last=""):
    names = [f'"{i}":{{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}' for i in range(count)]
    return made(("{" + ",".join(names) + last + "}").encode(), b"")


SLOW = {
    "dimensions": lambda n: header_of(20 * n),
    "names": entries,
    "names, the last twice": lambda n: entries(n, f',"{n - 1}":1'),
}


@pytest.mark.parametrize("name", SLOW)
def test_the_time_of_a_header_grows_with_its_length(name, tmp_path):
    def seconds(count):
        (tmp_path / "x").write_bytes(SLOW[name](count))
        times = []
        for _ in range(3):
            start = time.process_time()
            try:
                nn.load(tmp_path / "x", device="meta")
            except nn.CheckpointError:
                pass
            times.append(time.process_time() - start)
        return min(times)

    seconds(100)
    # Eight times as much: linear is 8, quadratic 64.
    assert seconds(16_000) < 24 * seconds(2000) + 0.2


def test_what_json_counts_as_objects_is_paid_before_it_is_parsed(tmp_path):
    (tmp_path / "m.safetensors.index.json").write_bytes(b"[" + b"[]," * 3_000_000 + b"[]]")
    with pytest.raises(nn.CheckpointError, match="max_bytes"):
        nn.load(tmp_path / "m.safetensors.index.json")


# --------------------------------------------------------------------------------------------------
# What nn.save noted, forged

FORGED = {
    "versions that are numbers": {"modules": {"": 3}},
    "versions that are texts": {"modules": {"": {"version": "2"}}},
    "an order of numbers": {"order": [1]},
    "ties to lists": {"ties": {"a": ["b"]}},
    "values that are a list": {"values": []},
    "a list": [],
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_notes_are_refused(name, tmp_path):
    entry = {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}
    header = {"__metadata__": {"statefulnn": json.dumps(FORGED[name])}, "a": entry}
    (tmp_path / "x").write_bytes(made(header, b""))
    with pytest.raises(nn.CheckpointError):
        nn.load(tmp_path / "x")


def test_a_forged_tie_does_not_hide_an_array(tmp_path):
    entry = lambda at: {"dtype": "I8", "shape": [1], "data_offsets": [at, at + 1]}
    notes = {"ties": {"a": "b", "c": "nothing", "d": "a"}, "order": ["d", "zzz", "b"]}
    header = {"__metadata__": {"statefulnn": json.dumps(notes)}, "a": entry(0), "b": entry(1)}
    (tmp_path / "x").write_bytes(made(header, b"\1\2"))
    found = nn.load(tmp_path / "x")
    assert {n: v.tolist() for n, v in found.items()} == {"a": [1], "b": [2], "d": [1]}


# --------------------------------------------------------------------------------------------------
# Around it


def test_threads_may_load_at_once_and_leave_the_garbage_collector_as_it_was(tmp_path):
    state = {f"w{i}": np.full(3, i, np.float32) for i in range(500)}
    nn.save(state, tmp_path / "x")
    found: list = []

    def run():
        found.extend(nn.load(tmp_path / "x") for _ in range(3))

    for on in (True, False):
        gc.enable() if on else gc.disable()
        try:
            threads = [threading.Thread(target=run) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert gc.isenabled() == on
        finally:
            gc.enable()
    assert len(found) == 24
    assert all(float(f["w499"][0]) == 499 for f in found)
    with pytest.raises(nn.CheckpointError):
        load(tmp_path, b"]q\x00h\x00a.")
    assert gc.isenabled()


def test_errors_of_the_functions_that_are_passed_are_their_own(tmp_path):
    nn.save({"w": jnp.ones(2)}, tmp_path / "x")

    def failing(*args):
        raise ZeroDivisionError("mine")

    for options in ({"device": failing}, {"names": failing}):
        with pytest.raises(ZeroDivisionError, match="mine"):
            nn.load(tmp_path / "x", **options)


def test_an_error_that_nobody_foresaw_is_a_checkpoint_error(tmp_path, monkeypatch):
    import statefulnn.io._folders as folders

    nn.save({"w": jnp.ones(2)}, tmp_path / "x")

    def failing(*args):
        raise LookupError("x" * 10_000_000)

    monkeypatch.setattr(folders, "_state", failing)
    with pytest.raises(nn.CheckpointError, match="LookupError") as info:
        nn.load(tmp_path / "x")
    assert len(str(info.value)) < 1000


def test_ordered_dicts_of_old_pythons_are_built_of_pairs(tmp_path):
    found = load(tmp_path, b"ccollections\nOrderedDict\n](]" + text("a") + b"aK\x01ae\x85R.")
    assert found == collections.OrderedDict(a=1)
