"""Other formats are named with what reads them, folders are searched, indexes checked, links followed."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import socket
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

import statefulnn as nn


def zipped(**entries):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/"), content)
    return made.getvalue()


def of_numpy(save):
    made = io.BytesIO()
    save(made)
    return made.getvalue()


def of_torch(content):
    return of_numpy(lambda file: torch.save(content, file))


def scripted():
    made = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), made)
    return made.getvalue()


def msgpack():
    import flax.serialization

    return flax.serialization.msgpack_serialize({"params": {"w": np.ones((2, 2), np.float32)}})


def exported():
    made = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), made)
    return made.getvalue()


# What a file is, how it is made, and what the error says reads it.
FOREIGN = {
    "npz": (lambda: of_numpy(lambda f: np.savez(f, a=np.ones(2))), "np.load"),
    "npz compressed": (lambda: of_numpy(lambda f: np.savez_compressed(f, a=np.ones(2))), "np.load"),
    "npy": (lambda: of_numpy(lambda f: np.save(f, np.ones(2))), "np.load"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(2000), "h5py"),
    "GGUF": (lambda: b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(500), "gguf"),
    "ONNX": (lambda: b'\x08\x07\x12\x07pytorch\x1a\x052.0.0:\xa1\x02\n' + bytes(300), "onnx.load"),
    "msgpack": (msgpack, "msgpack_restore"),
    "gzip": (lambda: gzip.compress(of_torch({"a": torch.ones(2)})), "gzip -d"),
    "bzip2": (lambda: bz2.compress(b"abc" * 100), "bzip2 -d"),
    "xz": (lambda: lzma.compress(b"abc" * 100), "xz -d"),
    "html": (lambda: b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>", "a web page"),
    "git-lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "git lfs pull",
    ),
    "TorchScript": (scripted, "torch.jit.load"),
    "pt2": (exported, "torch.export"),
    "zip in zip": (lambda: zipped(a__model_pt=b"x", **{"b.pt": of_torch([1])}), "unpack it"),
    "pickle": (lambda: pickle.dumps({"a": np.ones(2)}), "pickle.load"),
    "pickle of protocol 2": (lambda: pickle.dumps([1, 2], protocol=2), "pickle.load"),
    "JSON": (lambda: json.dumps({"hidden_size": 768, "layers": 12}).encode(), "a JSON text"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_format_is_named_with_what_reads_it(name, tmp_path):
    make, reader = FOREIGN[name]
    path = tmp_path / "model"
    path.write_bytes(make())
    with pytest.raises(nn.CheckpointError) as info:
        nn.load(path)
    assert reader in str(info.value) and str(path) in str(info.value)
    assert "Why: " in str(info.value) and "Instead: " in str(info.value)
    assert "damaged" not in str(info.value) and "download the file again" not in str(info.value)


@pytest.mark.parametrize("low", [0x80, 0x8B1F, 0x5A42, 0x4B50, 0x4E93, 0x4748, 0x0208, 0x81, 0xDE])
def test_a_sound_file_is_never_taken_for_another_format(low, tmp_path):
    header = json.dumps({"a": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    header += (
        b" " * (low - len(header)) if low > len(header) else b" " * (low + 0x100 - len(header))
    )
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + b"\1\2")
    assert nn.load(tmp_path / "x")["a"].tolist() == [1, 2]


def test_what_is_no_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        with pytest.raises(nn.CheckpointError, match="a pipe, a socket or a device"):
            nn.load(path)
    with pytest.raises((nn.CheckpointError, OSError), match="socket"):
        nn.load(tmp_path / "socket")
    listener.close()


# --------------------------------------------------------------------------------------------------
# Folders


def state():
    return {"a.weight": torch.randn(2, 3), "b.bias": torch.randn(4)}


def agree(found, theirs):
    assert sorted(found) == sorted(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(np.asarray(found[name]), tensor.numpy())


@pytest.mark.parametrize(
    "name", ["model", "diffusion_pytorch_model", "adapter_model"], ids=lambda v: v
)
def test_a_folder_of_the_hub_is_loaded_by_the_names_used_there(name, tmp_path):
    theirs = state()
    safetensors.torch.save_file(theirs, tmp_path / f"{name}.safetensors")
    agree(nn.load(tmp_path), theirs)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_folder_with_a_bin_file_and_one_with_several(new, tmp_path):
    theirs = state()
    torch.save(theirs, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    agree(nn.load(tmp_path), theirs)
    parts = tmp_path / "parts"
    parts.mkdir()
    places = {}
    for i, (entry, tensor) in enumerate(theirs.items()):
        places[entry] = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({entry: tensor, "other": tensor}, parts / places[entry])
    index = {"metadata": {}, "weight_map": places}
    (parts / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    agree(nn.load(parts), theirs)
    agree(nn.load(parts, names="b.*"), {"b.bias": theirs["b.bias"]})
    agree(nn.load(parts / "pytorch_model.bin.index.json"), theirs)
    torch.save([1], parts / places["a.weight"])
    with pytest.raises(nn.CheckpointError, match="00001-of-00002.bin' holds list"):
        nn.load(parts)


def test_safetensors_comes_before_what_a_pickle_holds(tmp_path):
    theirs = state()
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    safetensors.torch.save_file(theirs, tmp_path / "model.safetensors")
    agree(nn.load(tmp_path), theirs)


def test_a_folder_without_a_model_says_what_is_there(tmp_path):
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(
        FileNotFoundError, match=r"it holds readme.md; looked for model.safetensors"
    ):
        nn.load(tmp_path)
    (tmp_path / "unet").mkdir()
    nn.save({"w": jnp.ones(2)}, tmp_path / "unet" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nn.load\('.*unet'\)"):
        nn.load(tmp_path)
    assert nn.load(tmp_path / "unet")["w"].shape == (2,)


def test_a_folder_of_a_checkpointer_says_so(tmp_path):
    with nn.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(3, model=nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError, match=r"nn.Checkpointer\(.*\).restore"):
        nn.load(tmp_path / "run")


def test_links_are_followed_as_in_the_cache_of_the_hub(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "main").mkdir(parents=True)
    theirs = state()
    safetensors.torch.save_file(theirs, tmp_path / "blobs" / "4f2a")
    (tmp_path / "snapshots" / "main" / "model.safetensors").symlink_to("../../blobs/4f2a")
    agree(nn.load(tmp_path / "snapshots" / "main"), theirs)


# --------------------------------------------------------------------------------------------------
# Indexes

ODD_SHARDS = {
    "a folder": lambda folder: (folder / "s.safetensors").mkdir(),
    "a pipe": lambda folder: os.mkfifo(folder / "s.safetensors"),
    "a link to itself": lambda folder: (folder / "s.safetensors").symlink_to("s.safetensors"),
    "a device": lambda folder: (folder / "s.safetensors").symlink_to("/dev/zero"),
    "nothing": lambda folder: None,
}


@pytest.mark.parametrize("name", ODD_SHARDS)
def test_a_shard_that_is_no_file_is_an_error_of_the_index(name, tmp_path):
    ODD_SHARDS[name](tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "s.safetensors"}}))
    with pytest.raises(nn.CheckpointError, match="s.safetensors"):
        nn.load(tmp_path)


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".bin", "a\0.bin", "..bin/../x.bin", ".bin", "\ud800.bin"]
)
def test_a_shard_with_the_name_of_no_file_is_an_error_of_the_index(name, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(nn.CheckpointError) as info:
        nn.load(index)
    assert len(str(info.value)) < 1000


def test_an_index_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    nn.save({"w": jnp.zeros(2)}, tmp_path, max_shard_size="1KB")
    import statefulnn.io._folders as folders

    real, calls = folders._indexed, []

    def first_too_late(*args):
        calls.append(args)
        if len(calls) == 1:  # somebody saves between the index and its files
            nn.save({"w": jnp.ones(2)}, tmp_path, max_shard_size="1KB")
        return real(*args)

    monkeypatch.setattr(folders, "_indexed", first_too_late)
    assert nn.load(tmp_path)["w"].tolist() == [1.0, 1.0]
    assert len(calls) == 2


def test_a_missing_file_and_an_unreadable_one_keep_the_path_of_the_user(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as info:
        nn.load(tmp_path / "no" / "m.safetensors")
    assert str(tmp_path / "no" / "m.safetensors") in str(info.value)
    nn.save({"w": jnp.ones(2)}, tmp_path / "m.safetensors")

    def failing(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(OSError, match="Input/output error") as info:
        nn.load(tmp_path / "m.safetensors")
    assert info.value.errno == 5 and str(tmp_path / "m.safetensors") in str(info.value)
