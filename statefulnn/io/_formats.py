"""Recognises the format of a file: those that are read here, and others, with what reads them.

People point `nn.load` at whatever they have downloaded. A file that is whole, but of another format, is not
called damaged: the error says what it is and what reads it.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Collection
from pathlib import Path

from statefulnn.core.errors import CheckpointError, explain
from statefulnn.io._stored import Source

# This many bytes tell one format from the others.
HEAD = 4096
# The first thing in a file of torch.save, before it was a zip archive.
MAGIC = 0x1950A86A20F9469CFC6C
# A safetensors header is never longer than this: the format's own limit.
LONGEST_HEADER = 100_000_000

_RESAVE = "and save it with nn.save"
# How a file begins, what it is, and what reads it.
_BEGINNINGS: list[tuple[bytes, str, str]] = [
    (b"\x93NUMPY", "an array of numpy (.npy)", f"np.load(path), {_RESAVE}"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, h5py)", f"h5py.File(path), {_RESAVE}"),
    (b"GGUF", "a GGUF file (llama.cpp)", f"gguf.GGUFReader(path) of the package gguf, {_RESAVE}"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it first: gzip -d, or tar -xzf"),
    (b"BZh", "compressed by bzip2", "unpack it first: bzip2 -d, or tar -xjf"),
    (b"\xfd7zXZ\0", "compressed by xz", "unpack it first: xz -d, or tar -xJf"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it first: zstd -d"),
    (b"\x89PNG", "a picture (PNG)", "a file of weights"),
    (b"PK\x05\x06", "an empty archive", "download or save it again"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: 7z x"),
    (
        b"version https://git-lfs",
        "a pointer of git-lfs: the file itself was not downloaded",
        "git lfs pull, or download the file by itself",
    ),
]
_MSGPACK = (
    "a msgpack file (Flax)",
    f"flax.serialization.msgpack_restore(open(path, 'rb').read()), {_RESAVE}",
)
_ONNX = ("an ONNX file", "onnx.load(path): its weights are in .graph.initializer; or onnxruntime")
_TORCHSCRIPT = (
    "a TorchScript archive",
    "in torch: torch.save(torch.jit.load(path).state_dict(), other_path)",
)
_WHY_NOT = "nn.load reads safetensors, and what torch.save wrote"


def named(path: Path, what: str, instead: str) -> CheckpointError:
    """Return the error for a file of another format."""
    return CheckpointError(explain(f"{path} is {what}", _WHY_NOT, instead))


def is_torch(source: Source) -> bool:
    """Say whether a file is for `load_torch`, rather than safetensors.

    Raises:
        CheckpointError: for a file of a known format that neither reads.
    """
    head = source.read(0, HEAD)
    length = int.from_bytes(head[:8], "little")
    # The length of a safetensors header may look like the beginning of another format.
    if head[8:9] == b"{" and length <= min(LONGEST_HEADER, source.size - 8):
        return False
    if head[:4] == b"PK\x03\x04" or head[257:262] == b"ustar":
        return True
    known = _named(head)
    if known is not None:
        raise named(source.path, *known)
    if head[8:9] != b"{" and length > LONGEST_HEADER and head[:1] != b"\x80":
        what = "a text" if _is_text(head) else "of no format that is known here"
        raise named(
            source.path,
            f"{what}: it begins with {head[:24]!r}",
            "look at where it comes from: a failed download is often a message",
        )
    if head[:1] == b"\x80" and length > LONGEST_HEADER:
        if not _begins_as_torch_does(head):
            raise named(
                source.path,
                "a pickle that torch.save did not write",
                "if you trust who made it, pickle.load(open(path, 'rb')), which can run any code; then save "
                "its arrays with nn.save",
            )
        return True
    return False


def _begins_as_torch_does(head: bytes) -> bool:
    """Say whether the first pickle of a file is torch's magic number, or too damaged to tell."""
    try:
        for operation, argument, _ in pickletools.genops(io.BytesIO(head)):
            if operation.name not in ("PROTO", "FRAME"):
                return argument == MAGIC
    except ValueError:
        pass
    return True


def _named(head: bytes) -> tuple[str, str] | None:
    for beginning, what, instead in _BEGINNINGS:
        if head.startswith(beginning):
            return what, instead
    text = head[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page", "open it in a browser: it mostly says why there was no download"
    if text.startswith((b"{", b"[")) and not head[:8].count(0):
        return "a JSON text", "the file with the weights beside it, such as model.safetensors"
    if _is_msgpack(head):
        return _MSGPACK
    if _is_onnx(head):
        return _ONNX
    return None


def _is_text(head: bytes) -> bool:
    return all(32 <= c < 127 or c in b"\t\r\n" for c in head[:200])


def _is_msgpack(head: bytes) -> bool:
    """A map whose first key is text: 0x8n, or 0xde and 2 bytes; then 0xa1 to 0xbf, or 0xd9 and a byte."""
    if not head or not (0x81 <= head[0] <= 0x8F or head[0] == 0xDE):
        return False
    key = head[1:] if head[0] != 0xDE else head[3:]
    if not key or not (0xA1 <= key[0] <= 0xBF or key[0] == 0xD9):
        return False
    text = key[1 : 1 + (key[0] & 31)] if key[0] != 0xD9 else key[2 : 2 + key[1]]
    return len(text) > 0 and all(32 <= c < 127 for c in text)


def _is_onnx(head: bytes) -> bool:
    """A protobuf message: field 1 is a version below 32; a text (producer, domain) or the graph follows."""
    if len(head) < 8 or head[0] != 0x08 or not 1 <= head[1] < 32:
        return False
    return head[2] in (0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42)


def foreign_archive(path: Path, members: Collection[str]) -> CheckpointError | None:
    """Return the error for a zip archive that torch.save did not write; None if it may have.

    Args:
        members: the names in the archive.
    """
    ends = [name.rpartition("/")[2] for name in members]
    if any(name in ("constants.pkl", "bytecode.pkl") for name in ends):
        return named(path, *_TORCHSCRIPT)
    if "archive_format" in ends or any(name.endswith("models/model.json") for name in members):
        instead = "in torch: torch.save(torch.export.load(path).state_dict, other_path)"
        return named(path, "a program of torch.export (.pt2)", instead)
    if "data.pkl" in ends:
        return None
    if ends and all(name.endswith(".npy") for name in ends):
        return named(path, "arrays of numpy (.npz)", f"dict(np.load(path)), {_RESAVE}")
    if any(name.endswith(".weights.h5") for name in ends):
        return named(path, "a Keras model", f"keras.saving.load_model(path), {_RESAVE}")
    inside = (
        ".pt",
        ".pth",
        ".bin",
        ".ckpt",
        ".safetensors",
        ".zip",
        ".npz",
        ".npy",
        ".h5",
        ".onnx",
    )
    found = next((name for name in members if name.endswith(inside)), None)
    if found is not None:
        return named(
            path, f"an archive that holds {found[:80]!r}", "unpack it, and load what is in it"
        )
    return None
