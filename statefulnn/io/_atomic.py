"""Files that are replaced as a whole: whoever reads sees the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file in the same folder, which takes the place of `path` at the end.

    It is on the disk before it gets its name, so that a crash leaves one of the two files. After an
    exception the old one is as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        flushed(temporary)
        os.replace(temporary, path)
        flushed(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def flushed(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
