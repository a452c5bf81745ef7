"""The folder of a training run: one writer, quiet, and finished when the interpreter ends."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

from statefulnn.core.errors import CheckpointError, explain
from statefulnn.io._locks import LockFile
from statefulnn.io._reading import broken

LOCK = ".lock"
# What the holder of a lock writes into it.
_HOLDER = re.compile(r"process \d{1,20}")


def lock_of(folder: Path) -> LockFile:
    """Lock a folder for this process; made where it is missing.

    The lock goes with this process, however it ends, also if processes live on that were forked from it.

    Raises:
        CheckpointError: if somebody has the lock.
        OSError: if the folder cannot be written.

    Warns:
        UserWarning: where the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = LockFile(folder / LOCK, os.O_CREAT)
    if lock.take() is False:
        said = lock.file.read(80).decode(errors="replace")
        lock.close()
        holder = said if _HOLDER.fullmatch(said) else "another process"
        raise CheckpointError(
            explain(
                f"saved to {folder}, where {holder} saves",
                "two runs in one folder would delete each other's steps",
                "a folder for each run; or close() the other Checkpointer",
            )
        )
    if lock.held is None:
        warnings.warn(
            f"{folder} is on a file system without locks: a second run that saves there would not be noticed",
            UserWarning,
            stacklevel=4,
        )
    lock.file.truncate(0)
    lock.file.write(f"process {os.getpid()}".encode())
    return lock


def check_files(folder: Path, step: int | None = None) -> None:
    """Refuse a folder in which opening a file might never end: with a pipe or a device for a file.

    Args:
        folder: of the run.
        step: look at all files of this step; None for what is read of every step to list them.

    Raises:
        CheckpointError: with the name of what is no file.
        OSError: if the folder, or the step's, cannot be read.
    """
    if step is not None:
        _check(folder / str(step), set())
        return
    with os.scandir(folder) as entries:
        steps = [Path(e.path) for e in entries if e.name.isdecimal() and e.is_dir()]
    for path in steps:
        for part in (path, path / "metrics"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _check(part)


def _check(folder: Path, seen: set[tuple[int, int]] | None = None) -> None:
    """Check the files of a folder and, if those seen before are given, of the folders in it."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                found = os.stat(entry.path)  # what a link leads to
            except OSError:
                continue  # nothing can be opened under that name
            if not stat.S_ISDIR(found.st_mode):
                if not stat.S_ISREG(found.st_mode):
                    raise broken(Path(entry.path), 0, "a pipe or a device", "a file")
            elif seen is not None and (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))  # links may lead in circles
                _check(Path(entry.path), seen)


class _FromOrbax(logging.Filter):
    """Drops what orbax says of its progress; errors stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "orbax" not in Path(record.pathname).parts


_from_orbax = _FromOrbax()


def silence() -> None:
    """Keep orbax from logging its progress, in this process."""
    logging.getLogger("absl").addFilter(_from_orbax)


def close_at_exit(checkpointer: Any) -> None:
    """Finish writing when the interpreter ends, while threads can still be started."""
    reference = weakref.ref(checkpointer)

    def finish() -> None:
        alive = reference()
        if alive is not None:
            alive.close()

    # atexit is too late: by then the threads that write can start no other.
    threading._register_atexit(finish)  # pyright: ignore[reportAttributeAccessIssue]
