"""Files that are not what they should be: an error that names the place, and nothing else happens."""

from __future__ import annotations

import json
import re
import struct
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import statefulnn as nn
from tests.io.mutations import for_mutations

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "I8", "shape": [3], "data_offsets": [16, 19]}


def made(header, data=b"\0" * 19, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


WHOLE = made({"a": A, "b": B})
# What is wrong, the file, and what the message says.
DAMAGED = {
    "empty": (b"", "at byte 0: the file ends after 0 bytes"),
    "a part of the length": (b"\1\0\0", "at byte 0: the file ends after 3 bytes"),
    "a header that lies about its length": (
        made({}, length=1 << 62),
        "a header of 4611686018427387904",
    ),
    "a header longer than the file": (made({"a": A}, b"", length=500), "a header of 500 bytes"),
    "a truncated header": (WHOLE[:30], "a header of"),
    "truncated data": (WHOLE[:-1], "the file ends inside of 'b'"),
    "no data": (WHOLE[:-19], "the file ends inside of 'a'"),
    "more data": (WHOLE + b"\0", "1 bytes of no array"),
    "no JSON": (made(b"{a}"), "at byte 9: Expecting property name"),
    "no text": (made(b'{"\xff": 1}'), "at byte 10: bytes that are no text"),
    "a list": (made([1, 2]), "a header of type list"),
    "nested deeply": (made(b'{"a":' + b"[" * 100_000), "a text that cannot be read"),
    "a name twice": (
        made(b'{"a": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}, "a": 1}', b""),
        "at byte 9: the name 'a' comes twice",
    ),
    "an entry that is none": (made({"a": 3}), "at byte 9: the entry 'a'"),
    "an entry with less": (made({"a": {"dtype": "F32", "shape": [0]}}), "the entry 'a'"),
    "an unknown dtype": (made({"a": {**A, "dtype": "F4"}}), "'a' of dtype 'F4'"),
    "a dtype that is no text": (made({"a": {**A, "dtype": ["F32"]}}), "'a' of dtype"),
    "a negative size": (made({"a": {**A, "shape": [-2, -2]}}), "'a' of F32 with shape=[-2, -2]"),
    "a size that is no number": (made({"a": {**A, "shape": [True, 4]}}), "with shape=[True, 4]"),
    "a fraction": (made({"a": {**A, "shape": [2.0, 2]}}), "with shape=[2.0, 2]"),
    "a huge size": (made({"a": {**A, "shape": [1 << 62, 1 << 62]}}), "more elements than there is"),
    "huge sizes beside a zero": (
        made({"a": {**A, "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}, b""),
        "more elements than there is",
    ),
    "a size of 64 bits": (
        made({"a": {**A, "shape": [0, 1 << 63], "data_offsets": [0, 0]}}, b""),
        "sizes that",
    ),
    "a size of 4,000 digits": (
        made(
            b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 0]}}' % (b"9" * 4000), b""
        ),
        "a number of 13288 bits",
    ),
    "65 dimensions": (
        made({"a": {**A, "shape": [1] * 65, "data_offsets": [0, 4]}}, b"1234"),
        "65 dimensions",
    ),
    "offsets in the wrong order": (made({"a": {**A, "data_offsets": [16, 0]}}), "in -16 bytes"),
    "another number of bytes": (made({"a": {**A, "shape": [2, 3]}, "b": B}), "expected 24 bytes"),
    "three offsets": (made({"a": {**A, "data_offsets": [0, 8, 16]}}), "'a' with shape"),
    "an overlap": (made({"a": A, "b": {**B, "data_offsets": [15, 18]}}), "'b' overlaps"),
    "a gap": (made({"a": A, "b": {**B, "data_offsets": [17, 20]}}, b"\0" * 20), "after a gap"),
    "metadata that are no texts": (made({"__metadata__": {"a": 1}, "a": A, "b": B}), "no texts"),
    "our notes, broken": (
        made({"__metadata__": {"statefulnn": "{"}, "a": A, "b": B}),
        "metadata 'statefulnn' that cannot be read",
    ),
    "our notes, of other types": (
        made({"__metadata__": {"statefulnn": '{"order": [[1]]}'}, "a": A, "b": B}),
        "metadata 'statefulnn' that cannot be read",
    ),
}


def test_the_file_they_are_made_of_is_whole(tmp_path):
    (tmp_path / "x").write_bytes(WHOLE)
    assert nn.load(tmp_path / "x")["a"].shape == (2, 2)
    safetensors.deserialize(WHOLE)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_the_place_and_what_was_expected(name, tmp_path):
    content, message = DAMAGED[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(nn.CheckpointError) as info:
        nn.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message in str(info.value)
    assert re.search(rf"{re.escape(str(path))}, at byte \d+: ", str(info.value))
    assert "Why: expected " in str(info.value)
    assert peak < 50_000_000  # whatever a header promises


def test_no_file_is_python_s_own_error(tmp_path):
    for path in (tmp_path, tmp_path / "x", tmp_path / "x.index.json"):
        with pytest.raises(FileNotFoundError):
            nn.load(path)


@pytest.mark.parametrize("length", [0x80, 0x280, 0x0480, 0x4B50])
def test_a_header_whose_length_begins_like_another_format_is_read(length, tmp_path):
    text = json.dumps({"a": A, "b": B}).encode()
    (tmp_path / "x").write_bytes(made(text + b" " * (length - len(text))))
    assert nn.load(tmp_path / "x")["b"].shape == (3,)


INDEXES = {
    "no JSON": ("{", "Expecting property name"),
    "no map": ('{"weights": {}}', "cannot be read"),
    "a list": ("[]", "cannot be read"),
    "a way up": ('{"weight_map": {"a": "../a.safetensors"}}', "'../a.safetensors'"),
    "an absolute path": ('{"weight_map": {"a": "/a.safetensors"}}', "'/a.safetensors'"),
    "a way up on Windows": ('{"weight_map": {"a": "..\\\\a.safetensors"}}', "a file in the same"),
    "another type": ('{"weight_map": {"a": "a.pkl"}}', "'a.pkl'"),
    "no text": ('{"weight_map": {"a": 3}}', "a file in the same folder"),
    "a file that is not there": (
        '{"weight_map": {"a": "b.safetensors"}}',
        "no file 'b.safetensors'",
    ),
    "a name that is not there": (
        '{"weight_map": {"c": "a.safetensors"}}',
        "'c' in 'a.safetensors'",
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_damaged_index_is_refused(name, tmp_path):
    content, message = INDEXES[name]
    (tmp_path / "in").mkdir()
    for folder in (tmp_path, tmp_path / "in"):
        (folder / "a.safetensors").write_bytes(WHOLE)
    (tmp_path / "in" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(nn.CheckpointError, match=re.escape(message)):
        nn.load(tmp_path / "in")


def saved(tmp_path_factory):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    path = tmp_path_factory.mktemp("fuzz") / "x"
    nn.save(model, path, metadata={"a": "b"})
    return path, path.read_bytes(), model


def fuzz(tmp_path_factory, examples):
    path, whole, model = saved(tmp_path_factory)
    before = {n: np.asarray(v) for n, v in model.state_dict().items()}
    header = 8 + struct.unpack("<Q", whole[:8])[0]

    def check(content):
        path.write_bytes(content)
        try:
            state = nn.load(path)
        except nn.CheckpointError:
            return
        # What we take, the format's own reader takes as well.
        safetensors.deserialize(content)
        try:
            model.load_state_dict(state)
        except (nn.StateDictError, TypeError):
            for name, value in model.state_dict().items():
                np.testing.assert_array_equal(np.asarray(value), before[name])
            return
        model.load_state_dict(before)

    for_mutations(whole, header, examples, check)


def test_mutated_files_load_or_are_refused(tmp_path_factory):
    fuzz(tmp_path_factory, 300)


@pytest.mark.long
def test_ten_thousand_mutated_files_load_or_are_refused(tmp_path_factory):
    fuzz(tmp_path_factory, 10_000)


def test_a_failed_load_changes_no_module(tmp_path):
    model = nn.Linear(2, 2)
    before = np.asarray(model.weight)
    nn.save({"weight": jnp.zeros((2, 2)), "bias": jnp.zeros(3)}, tmp_path / "x")
    with pytest.raises(nn.StateDictError):
        model.load_state_dict(nn.load(tmp_path / "x"))
    np.testing.assert_array_equal(model.weight, before)
