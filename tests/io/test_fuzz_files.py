"""nn.load of archives, headers and indexes that say what is not so.

Each fuzzer makes files whose structure it knows, and changes what stands in them: a field of a zip archive, a
value of a JSON tree, the file behind a name. What is loaded must be usable, and lie within its file.
"""

from __future__ import annotations

import errno
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import statefulnn as nn
from statefulnn.io._safetensors import DTYPES
from tests.io.fuzzing import HOSTILE, Fuzzer, Pairs, Raw, changed_tree, dumps, run_fuzz
from tests.io.test_fuzz_pickles import (
    PATTERN,
    STORAGES,
    check_pattern,
    check_usable,
    legacy,
    state_of_the_process,
    what_is_in,
    zipped,
)


class Files(Fuzzer):
    """What these fuzzers have in common: an honest file each, and what is checked of what was loaded."""

    def setup(self) -> None:
        self.path = self.folder / "x"
        self.before = state_of_the_process()
        for make in self.honest():
            make()
            self.load(self.path)

    def honest(self) -> list[Callable[[], Any]]:
        """Return what writes whole files."""
        raise NotImplementedError

    def load(self, path: Path) -> None:
        try:
            loaded = nn.load(path)
            check_usable(loaded)
            self.check_values(loaded, path)
        finally:
            assert state_of_the_process() == self.before, "the state of the process has changed"

    def check_values(self, loaded: Any, path: Path) -> None:
        """Raise if a number in an array is none that the file has there."""
        for value in what_is_in(loaded):
            if isinstance(value, (jax.Array, np.ndarray)):
                check_pattern(np.asarray(value))


# --------------------------------------------------------------------------------------------------
# The records of a zip archive


def tensors_program(count: int) -> bytes:
    """Return a pickle of a list of tensors that see storages "0", "1" and so on."""
    text = lambda t: b"X" + struct.pack("<I", len(t)) + t.encode()
    tensor = lambda i: (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text(str(i))
        + text("cpu")
        + b"K\x04tQK\0K\x04\x85K\x01\x85\x89NtR"
    )
    return b"\x80\x02](" + b"".join(map(tensor, range(count))) + b"e."


# The fields of the three records, as (name, size), behind the four bytes by which each is known.
LOCAL = [
    *(("version", 2), ("flags", 2), ("method", 2), ("time", 2), ("date", 2), ("crc", 4)),
    *(("packed", 4), ("size", 4), ("name_length", 2), ("extra_length", 2)),
]
CENTRAL = [
    *(("made_by", 2), *LOCAL, ("comment_length", 2), ("disk", 2)),
    *(("attributes", 2), ("more_attributes", 4), ("offset", 4)),
]
END = [
    *(("disk", 2), ("first_disk", 2), ("here", 2), ("entries", 2)),
    *(("list_size", 4), ("list_offset", 4), ("comment_length", 2)),
]
END64 = [
    *(("rest", 8), ("made_by", 2), ("version", 2), ("disk", 4), ("first_disk", 4)),
    *(("here", 8), ("entries", 8), ("list_size", 8), ("list_offset", 8)),
]
NUMBERS = [
    0,
    1,
    2,
    8,
    29,
    30,
    46,
    63,
    64,
    255,
    2**15,
    2**16 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
]
NAMES = [
    *("", "/", "a/data.pkl", "data.pkl", "a/data/0", "a/data/1", "a/data/", "a/byteorder", "\0"),
    *("../../x", "/etc/passwd", "a/../data/0", "C:\\x", "a/data/0\0b", "é", "a" * 65535, "a/.data"),
    *("x.npy", "archive_format", "constants.pkl", "b/data.pkl", "A/DATA.PKL", "a/data//0"),
]
EXTRAS = [
    b"\1\0",
    b"\1\0\x08\0" + b"\0" * 8,
    b"\1\0\x10\0" + b"\0\1\0\0\0\0\0\0" * 2,
    b"\1\0\x18\0" + struct.pack("<QQQ", 16, 16, 2**63),
    b"\1\0\xff\xff",
    b"FB\x01\0z",
    b"\xff" * 8,
    b"\0" * 65535,
]


def packed(signature: bytes, fields: list[tuple[str, int]], values: dict[str, Any]) -> bytes:
    """Return a record: numbers that are too large lose their first bytes."""
    numbers = [(values.get(n, 0) % 256**size).to_bytes(size, "little") for n, size in fields]
    return values.get("signature", signature) + b"".join(numbers)


class Entry:
    """One file in an archive, and what its two records say about it, where that is not so."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name, self.content, self.kept = name, content, content
        self.local: dict[str, Any] = {}
        self.central: dict[str, Any] = {}
        self.local_name: str | None = None
        self.local_extra, self.extra, self.comment = b"", b"", b""
        self.method = 0

    def record(self, fields: list[tuple[str, int]], name: bytes, extra: bytes) -> dict[str, Any]:
        return {
            "version": 20,
            "flags": 0x800,
            "method": self.method,
            "date": 33,
            "crc": zlib.crc32(self.content),
            "packed": len(self.kept),
            "size": len(self.content),
            "name_length": len(name),
            "extra_length": len(extra),
        }


class Archive:
    """An archive whose every field can be set."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.listed: list[Entry] | None = None  # what the list at the end has, if not each once
        self.before = self.comment = self.gap = b""
        self.end: dict[str, Any] = {}
        self.end64: dict[str, Any] | None = None
        self.locator: dict[str, Any] = {}
        self.inside: dict[str, int] = {}  # name -> an entry lies so far inside of another

    def whole(self) -> bytes:
        body = bytearray(self.before)
        offsets: dict[int, int] = {}
        for entry in self.entries:
            name = (entry.name if entry.local_name is None else entry.local_name).encode()
            offsets[id(entry)] = len(body)
            values = entry.record(LOCAL, name, entry.local_extra) | entry.local
            body += packed(b"PK\3\4", LOCAL, values) + name + entry.local_extra + entry.kept
        body += self.gap
        at = len(body)
        listed = self.entries if self.listed is None else self.listed
        for entry in listed:
            name = entry.name.encode()
            values = entry.record(CENTRAL, name, entry.extra)
            values |= {"offset": offsets[id(entry)], "comment_length": len(entry.comment)}
            record = packed(b"PK\1\2", CENTRAL, values | entry.central)
            body += record + name + entry.extra + entry.comment
        ended = {
            "here": len(listed),
            "entries": len(listed),
            "list_size": len(body) - at,
            "list_offset": at,
            "comment_length": len(self.comment),
        }
        if self.end64 is not None:
            where = len(body)
            body += packed(b"PK\6\6", END64, {**ended, "rest": 44, "version": 45} | self.end64)
            locator = {"disk": 0, "at": where, "disks": 1} | self.locator
            body += packed(b"PK\6\7", [("disk", 4), ("at", 8), ("disks", 4)], locator)
        return bytes(body) + packed(b"PK\5\6", END, ended | self.end) + self.comment


class Zips(Files):
    """Archives in which one to three things are not as they are in honest ones."""

    def honest(self) -> list[Callable[[], Any]]:
        return [lambda: self.path.write_bytes(self.archive().whole())]

    def archive(self) -> Archive:
        """Return an honest archive."""
        entries = [Entry("a/data.pkl", tensors_program(2)), Entry("a/byteorder", b"little")]
        entries += [Entry(f"a/data/{i}", PATTERN[:16]) for i in range(2)]
        for entry in entries:
            entry.local_extra = b"FB" + struct.pack("<H", 8) + b"Z" * 8
        return Archive([*entries, Entry("a/last", b"\xff" * 64)])

    def write(self, random: random.Random) -> tuple[Path, str]:
        archive, notes = self.archive(), []
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            change = random.choice(
                [self.field, self.field, self.field, self.ending, self.name, self.extra]
                + [self.listing, self.content, self.place, self.zip64]
            )
            notes.append(change(archive, random))
        content = archive.whole()
        if random.random() < 0.03:
            content = content[: random.randrange(len(content))]
            notes.append("cut off")
        self.path.write_bytes(content)
        return self.path, "; ".join(notes)

    def check_values(self, loaded: Any, path: Path) -> None:
        # Where an entry is, the file says as it likes; but its bytes are among those of the file.
        content = path.read_bytes()
        for value in what_is_in(loaded):
            if isinstance(value, (jax.Array, np.ndarray)):
                assert np.asarray(value).tobytes() in content

    def field(self, archive: Archive, random: random.Random) -> str:
        entry = random.choice(archive.entries)
        which = random.choice(["local", "central"])
        field, size = random.choice(LOCAL if which == "local" else CENTRAL)
        number = random.choice([*NUMBERS, len(entry.content) + 1, random.randrange(300)])
        if random.random() < 0.03:
            getattr(entry, which)["signature"] = random.choice([b"PK\0\0", b"PK\5\6", b"abcd"])
        if field in ("flags", "method") and random.random() < 0.7:
            number = random.choice([1, 8, 12, 14, 93, 95, 99, 0x20, 0x40, 0x2000])
        getattr(entry, which)[field] = number
        return f"{entry.name[:20]}: {which} {field} = {number}"

    def ending(self, archive: Archive, random: random.Random) -> str:
        field, _ = random.choice(END)
        archive.end[field] = random.choice([*NUMBERS, len(archive.entries) - 1, 300])
        if random.random() < 0.3:
            archive.comment = random.choice(
                [b"x", b"PK\5\6" + bytes(18), b"PK\1\2" * 9, b"c" * 65535]
            )
        if random.random() < 0.2:
            archive.before = random.choice([b"PK\3\4", b"#!/bin/sh\n", b"\0" * 512, b"PK"])
        return f"end {archive.end}, comment {archive.comment[:20]!r}, before {archive.before[:9]!r}"

    def name(self, archive: Archive, random: random.Random) -> str:
        entry, name = random.choice(archive.entries), random.choice(NAMES)
        if random.random() < 0.5:
            entry.name = name
        else:
            entry.local_name = name
        return f"a name {name[:30]!r}"

    def extra(self, archive: Archive, random: random.Random) -> str:
        entry, extra = random.choice(archive.entries), random.choice(EXTRAS)
        if random.random() < 0.7:
            entry.extra = extra
            if random.random() < 0.7:  # a size or place that stands in these
                entry.central[random.choice(["size", "packed", "offset"])] = 2**32 - 1
        else:
            entry.local_extra = extra
        return f"{entry.name[:20]}: extra {extra[:30]!r}, {entry.central}"

    def listing(self, archive: Archive, random: random.Random) -> str:
        listed = list(archive.entries)
        way = random.choice(["twice", "left out", "order", "second", "many", "none"])
        entry = random.choice(listed)
        if way == "twice":
            listed.append(entry)
        elif way == "left out":
            listed.remove(entry)
        elif way == "order":
            random.shuffle(listed)
        elif way == "second":
            other = Entry(
                random.choice(["b/data.pkl", "a/x/data.pkl", "a/data.pkl"]), b"\x80\x02N."
            )
            archive.entries.append(other)
            listed.append(other)
        elif way == "many":
            listed += [entry] * 3000
        else:
            listed = []
        archive.listed = listed
        return f"list: {way} {entry.name[:20]!r}"

    def content(self, archive: Archive, random: random.Random) -> str:
        entry = random.choice(archive.entries)
        way = random.choice(["deflated", "claimed", "shorter", "inside", "bomb", "empty"])
        if way == "deflated":
            entry.method, entry.kept = 8, zlib.compress(entry.content)[2:-4]
        elif way == "claimed":
            entry.method = random.choice([8, 12, 14])
        elif way == "shorter":
            entry.content = entry.kept = entry.content[: random.randrange(len(entry.content) + 1)]
        elif way == "inside":  # another archive
            entry.content = entry.kept = self.archive().whole()
        elif way == "bomb":
            entry.content, entry.method = bytes(10**6), 8
            entry.kept = zlib.compress(entry.content)[2:-4]
            entry.central["size"] = random.choice([10**6, 2**32 - 2])
        else:
            entry.content = entry.kept = b""
        return f"{entry.name[:20]}: {way}"

    def place(self, archive: Archive, random: random.Random) -> str:
        """Let an entry begin elsewhere: in another one, at its end, behind the file."""
        entry, other = random.choice(archive.entries), random.choice(archive.entries)
        if random.random() < 0.5:  # a whole record in the content of another
            head = packed(b"PK\3\4", LOCAL, entry.record(LOCAL, b"n", b"")) + b"n" + entry.kept
            before = archive.entries[: archive.entries.index(other)]
            sizes = [30 + len(e.name) + len(e.local_extra) + len(e.kept) for e in before]
            other.kept = other.content = head + other.content
            at = sum(sizes) + 30 + len(other.name) + len(other.local_extra)
        else:
            at = random.choice([0, 1, 30, 64, 100, 200, 300, 400, 2**31, 2**32 - 2])
        entry.central["offset"] = at
        return f"{entry.name[:20]} at {at}, in {other.name[:20]}"

    def zip64(self, archive: Archive, random: random.Random) -> str:
        archive.end64 = {}
        if random.random() < 0.7:
            archive.end64[random.choice(END64)[0]] = random.choice(NUMBERS)
        if random.random() < 0.3:
            archive.locator[random.choice(["disk", "at", "disks"])] = random.choice(NUMBERS)
        if random.random() < 0.5:
            for field in ("entries", "list_size", "list_offset"):
                archive.end[field] = 2**32 - 1
        return f"zip64 {archive.end64}, {archive.locator}, {archive.end}"


# --------------------------------------------------------------------------------------------------
# Headers of safetensors


SHAPES: list[Any] = [
    *([], [0], [1], [2, 3], [4], [0, 7], [1] * 5, [2, 2, 2], [1] * 33, [1] * 64, [1] * 65),
    *([0, 2**31], [0, 2**62], [2**62, 0, 2], [2**63], [-1], [-1, -1], [1.0], [True], ["1"], [[1]]),
    *([2**32, 2**32], [0] * 64, None, "4", {"0": 1}),
]
NOTE = {
    "order": ["b", "a", "n", "tied"],
    "ties": {"tied": "a", "again": "tied"},
    "values": {"n": 3, "list": [1, {"x": None}]},
    "modules": {"": {"version": 1}, "sub": {"version": 2}},
}
NOTE_POOL = [
    *HOSTILE,
    *("a", "b", "n", "tied", "version", "order", "ties", "values", "modules"),
    {"version": 1},
    {"version": "1"},
    {"version": {}},
    {"a": "a"},
    {"tied": "tied"},
    ["a", "a", "a"],
    ["b", "missing"],
]


def whole_entry(entry: Any) -> bool:
    """Say whether a value in a header still describes an array, after other changes."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and [type(n) for n in offsets] == [int, int]


class Headers(Files):
    """Files of safetensors: their header, what nn.save notes in it, and the lengths."""

    def honest(self) -> list[Callable[[], Any]]:
        return [lambda: self.path.write_bytes(self.whole(*self.sound(random.Random(0))))]

    def sound(self, random: random.Random) -> tuple[dict[str, Any], bytes]:
        """Return a header and the arrays it describes."""
        header: dict[str, Any] = {}
        note = {key: value for key, value in NOTE.items() if random.random() < 0.8}
        header["__metadata__"] = {"format": "pt", "statefulnn": json.dumps(note)}
        at = 0
        for name in ["a", "b", "layer.0.weight", "é"][: random.randint(1, 4)]:
            code = random.choice(list(DTYPES))
            shape = random.choice(SHAPES[:10])
            nbytes = int(np.prod(shape, dtype=np.int64)) * DTYPES[code].itemsize
            # The pattern goes on from array to array, and a number may begin anywhere in it.
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
        return header, (PATTERN * (1 + at // len(PATTERN)))[:at]

    def whole(self, header: Any, body: bytes) -> bytes:
        text = dumps(header).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + body

    def write(self, random: random.Random) -> tuple[Path, str]:
        header, body = self.sound(random)
        notes, length = [], None
        for _ in range(random.choice([1, 1, 2])):
            way = random.choice(
                ["note", "note", "tree", "array", "array", "twice", "length", "metadata"]
            )
            change = ""
            if not isinstance(header, dict):
                break
            arrays = [n for n, e in header.items() if whole_entry(e)]
            if way == "note":
                note, change = changed_tree(NOTE, random, NOTE_POOL)
                header["__metadata__"] = {"format": "pt", "statefulnn": dumps(note)}
            elif way == "tree":
                header, change = changed_tree(header, random)
            elif way == "array" and arrays:
                change = self.other_array(header[random.choice(arrays)], random)
            elif way == "twice" and arrays:
                name = random.choice([*header])
                items = [*header.items(), (name, random.choice([*header.values()]))]
                header = Pairs(items)
                change = repr(name)
            elif way == "metadata":
                names = ["__metadata__", "statefulnn", "", "format"]
                change = random.choice(names)
                header["__metadata__"] = {change: random.choice(["", "{}", "[]", "{", "null", "1"])}
            elif way == "length":
                if random.random() < 0.5:
                    length = random.choice(NUMBERS)
                elif random.random() < 0.5:
                    body += b"\0" * random.choice([1, 8, 4096])
                else:
                    body = body[: len(body) // 2]
            notes.append(f"{way}: {change}")
        content = self.whole(header, body)
        if length is not None:
            content = struct.pack("<Q", length % 2**64) + content[8:]
        self.path.write_bytes(content)
        return self.path, "; ".join(notes)

    def other_array(self, entry: dict[str, Any], random: random.Random) -> str:
        """Change what an entry says; sometimes so that the number of bytes stays."""
        way = random.randrange(4)
        begin, end = entry["data_offsets"]
        if way == 0:
            entry["dtype"] = random.choice([*DTYPES, "F4", "f32", "", None, 3, Raw("1" * 5000)])
        elif way == 1:
            entry["shape"] = random.choice(SHAPES)
        elif way == 2:
            entry["data_offsets"] = random.choice(
                [[end, begin], [begin + 1, end + 1], [0, 2**63], [begin], [-1, end], [0, 0], "x"]
                + [[begin, end, end], [float(begin), end], [begin, Raw("9" * 5000)], [True, end]]
            )
        else:
            width = random.choice(
                [c for c in DTYPES if end - begin == 0 or DTYPES[c].itemsize == 1]
            )
            entry |= {"dtype": width, "shape": [1] * random.choice([0, 3, 63]) + [end - begin]}
        return str(entry)[:200]

    def check_values(self, loaded: Any, path: Path) -> None:
        # The format's own reader takes what we take, and finds the same bytes.
        for name, found in safetensors.deserialize(path.read_bytes()):
            array = loaded[name]
            if isinstance(array, (jax.Array, np.ndarray)):  # a value that was noted may hide it
                assert np.asarray(array).tobytes() == bytes(found["data"])
                assert list(array.shape) == found["shape"]


# --------------------------------------------------------------------------------------------------
# Indexes


ARRAYS = {f"{i}": np.frombuffer(PATTERN[:16], np.float32).reshape(2, 2) for i in range(4)}
SHARDS = [
    *("one.safetensors", "two.safetensors", "three.bin", "four.pt", "five.pth"),
    *("pipe.bin", "folder.safetensors", "loop.bin", "dangling.bin", "zero.bin", "link.safetensors"),
    *("empty.bin", "page.bin", "notes.bin", "list.bin", "numbers.safetensors", "é.bin", "a\nb.bin"),
    *("index.bin", "cut.safetensors", "npz.bin", "sparse.bin", "closed.bin"),
    *("none.bin", "/one.safetensors", "../one.safetensors", "a\\b.bin", "C:x.bin", "a\0.bin"),
    *(
        "a" * 300 + ".bin",
        "a" * 70_000 + ".bin",
        "\ud800.bin",
        ".bin",
        "..bin",
        "ONE.SAFETENSORS",
        "",
    ),
    *("./one.safetensors", "one.safetensors/", "one.safetensors\n", "x.index.json", "one"),
]


class Indexes(Files):
    """A folder of many files, and indexes that name them: what is there, what is not, and what is no file."""

    def honest(self) -> list[Callable[[], Any]]:
        folder = self.folder
        two = {"weights": ARRAYS["2"], "3": ARRAYS["3"]}
        safetensors.numpy.save_file(
            {"0": ARRAYS["0"], "1": ARRAYS["1"]}, folder / "one.safetensors"
        )
        safetensors.numpy.save_file(
            two, folder / "two.safetensors", {"statefulnn": json.dumps(NOTE)}
        )
        chance = random.Random(1)
        names = b"\x80\x02}(X\x01\0\0\x00wctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storage"
        rest = b"ctorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x04tQK\0K\x04\x85K\x01\x85\x89NtR"
        rest += b"X\1\0\0\x00nK\3u."
        classes = {"0": STORAGES["0"][0]}
        files = {
            "three.bin": zipped(names + rest, chance),
            "four.pt": legacy(names + rest, chance, classes),
            "five.pth": zipped(tensors_program(2), chance),
            "é.bin": zipped(names + rest, chance),
            "a\nb.bin": zipped(names + rest, chance),
            "empty.bin": b"",
            "page.bin": b"<!DOCTYPE html><html></html>",
            "notes.bin": b'{"weight_map": {}}',
            "list.bin": zipped(b"\x80\x02].", chance),
            "numbers.safetensors": zipped(b"\x80\x02}K\1K\2s.", chance),
            "index.bin": b'{"weight_map": {"0": "index.bin"}}',
            "cut.safetensors": (folder / "one.safetensors").read_bytes()[:-3],
            "closed.bin": zipped(names + rest, chance)[:-30],
        }
        for name, content in files.items():
            (folder / name).write_bytes(content)
        np.savez(folder / "npz", first=ARRAYS["0"])
        (folder / "npz.npz").rename(folder / "npz.bin")
        with open(folder / "sparse.bin", "wb") as sparse:
            sparse.truncate(1 << 40)
        os.mkfifo(folder / "pipe.bin")
        (folder / "folder.safetensors").mkdir()
        for link, target in (("loop", "loop.bin"), ("dangling", "nothing"), ("zero", "/dev/zero")):
            (folder / f"{link}.bin").symlink_to(target)
        (folder / "link.safetensors").symlink_to("one.safetensors")
        self.inside = {
            "one.safetensors": ["0", "1"],
            "two.safetensors": ["weights", "3"],
            **dict.fromkeys(["three.bin", "four.pt", "é.bin", "a\nb.bin"], ["w", "n"]),
            "link.safetensors": ["0", "1"],
        }
        self.path = folder / "model.safetensors.index.json"
        return [lambda: self.path.write_text(json.dumps(self.sound(random.Random(0))))]

    def sound(self, random: random.Random) -> dict[str, Any]:
        """Return an index of files that are there."""
        files = random.sample(list(self.inside), random.randint(1, 3))
        places = {
            name: file for file in files for name in self.inside[file] if random.random() < 0.8
        }
        return {"metadata": {"total_size": 64}, "weight_map": places}

    def write(self, random: random.Random) -> tuple[Path, str]:
        index, change = self.sound(random), "sound"
        for _ in range(random.choice([0, 1, 1, 2])):
            places = index.get("weight_map") if isinstance(index, dict) else None
            if isinstance(places, dict) and places and random.random() < 0.7:
                name, file = random.choice(list(places)), random.choice(SHARDS)
                names = self.inside.get(file, [name, "0", "é"])
                places[random.choice([name, *names])] = file
                change = f"{name!r} in {file[:50]!r}"
            elif isinstance(places, dict):
                index, change = changed_tree(index, random, [*HOSTILE, *SHARDS])
            if isinstance(places, dict) and random.random() < 0.05:
                others = [(f"{i}", random.choice(SHARDS)) for i in range(200)]
                index = {"weight_map": Pairs([*places.items(), *others])}
        self.path.write_bytes(dumps(index).encode("utf-8", "surrogatepass"))
        # The folder stands for the index in it.
        return random.choice([self.path, self.path, self.folder]), change

    def outcome(self, error: Exception, path: Path) -> str | None:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.ENXIO):
            return "OSError" if str(error.filename).startswith(str(self.folder)) else None
        return super().outcome(error, path)


# --------------------------------------------------------------------------------------------------
# The tests


KINDS = pytest.mark.parametrize("kind", ["Zips", "Headers", "Indexes"])


def check_many(kind: str, count: int) -> None:
    outcomes = run_fuzz(f"tests.io.test_fuzz_files:{kind}", count, seed=0)
    assert set(outcomes) <= {"loaded", "CheckpointError", "OSError"}
    # Many are loaded, and many are not: so the files between are reached.
    assert min(outcomes["loaded"], outcomes["CheckpointError"]) > count / 20


@KINDS
def test_hundreds_of_hostile_files_are_refused_or_loaded(kind):
    check_many(kind, 300)


@pytest.mark.long
@KINDS
def test_many_hostile_files_are_refused_or_loaded(kind):
    check_many(kind, 20_000)
