"""Replaces files as a whole: a reader sees the old one or the new one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from statefulnn.io._locks import marked, removed, sweep

# File names may have 255 bytes, and a temporary name is longer than the final one.
_LONGEST = 200
# The errors of file systems that cannot wait until the names in a folder are on the disk.
_UNFLUSHED = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOSYS}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name on the same disk; the new file there replaces `path` at the end.

    It is flushed to the disk before it gets its final name, so a crash leaves one of the two files. The next
    call for the same path removes what a killed process has left. After an exception the old file is as it
    was. A link stays a link, and the file it leads to is replaced.

    Raises:
        OSError: with `path`, if the folder is missing, may not be written, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    before = _mode(path, target)
    label = target.name
    if len(os.fsencode(label)) > _LONGEST:
        label = hashlib.sha256(os.fsencode(label)).hexdigest()[:16]
    parts = re.compile(rf"\.{re.escape(label)}\.([0-9a-f]{{8}})\.(?:tmp|saving)")

    def run_of(name: str) -> str | None:
        match = parts.fullmatch(name)
        return match[1] if match else None

    def marker(run: str) -> Path:
        return target.with_name(f".{label}.{run}.saving")

    with naming(path, target.parent):
        sweep(target.parent, run_of, marker, lambda names, _: names)
        run, lock = marked(marker)
        # In a folder of its own: a library may make temporary files too, beside the one it is told to write.
        room = target.with_name(f".{label}.{run}.tmp")
        try:
            room.mkdir()
            temporary = room / target.name
            yield temporary
            flushed(temporary)
            # Libraries make files that only the user may read; the new file takes the mode of the old one.
            os.chmod(temporary, lock.mode if before is None else stat.S_IMODE(before))
            os.replace(temporary, target)
            flushed(target.parent)
        finally:
            removed(room)
            lock.close(remove=True)


def _mode(path: Path, target: Path) -> int | None:
    """Return the mode of the old file; None if there is none.

    Raises:
        OSError: if a file cannot replace what is there.
    """
    try:
        mode = os.lstat(target).st_mode
    except OSError:  # it is not there yet; making the new one shows any other error
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISLNK(mode):  # links that lead to each other
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "A pipe or a device cannot be replaced by a file", str(path))
    return mode


@contextlib.contextmanager
def naming(path: Path, folder: Path) -> Iterator[None]:
    """Make errors of the system name the path that the user gave, not the temporary files.

    Args:
        path: what the user gave.
        folder: where the temporary files are made.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        ours = not isinstance(name, (str, bytes)) or folder in Path(os.fsdecode(name)).parents
        if error.errno is None or not ours:
            raise
        raise _named(error.errno, path, folder) from None
    except Exception as error:
        # Libraries in Rust put the system's error number into the text of their own error.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise _named(int(found[1]), path, folder) from None


def _named(number: int, path: Path, folder: Path) -> OSError:
    if number == errno.ENOENT:
        missing = next((p for p in (folder, *folder.parents) if p.parent.is_dir()), folder)
        if not missing.exists():
            text = f"No folder {str(missing)!r}, make it first with os.makedirs({str(folder)!r})"
            return FileNotFoundError(number, text, str(path))
    return OSError(number, os.strerror(number), str(path))  # of the subclass for the number


def flushed(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # a folder cannot be opened there
        return
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not folder or error.errno not in _UNFLUSHED:
            raise


def content_of(path: Path, limit: int | None = None) -> bytes:
    """Return what a file holds, and never wait for a writer, as opening a pipe would.

    Args:
        path: the file.
        limit: how many bytes to read at most; None for all.

    Raises:
        OSError: if it cannot be opened, or is not a regular file.
    """
    flags = os.O_RDONLY | sum(getattr(os, n, 0) for n in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
    descriptor = os.open(path, flags)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read(-1 if limit is None else limit)
