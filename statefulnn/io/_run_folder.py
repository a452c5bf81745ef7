"""The folder of a training run: one writer, quiet, and finished when the interpreter ends."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from pathlib import Path
from typing import Any

from statefulnn.core.errors import CheckpointError, explain

LOCK = ".lock"


def lock_of(folder: Path) -> Any:
    """Lock a folder for this process, and return the open file that holds the lock.

    The system takes the lock away when the file is closed or the process ends, however it ends.

    Raises:
        CheckpointError: if somebody has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a+")  # noqa: SIM115 (open as long as the lock is held)
    try:
        _lock(file)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise CheckpointError(
            explain(
                f"saved to {folder}, where {holder} saves",
                "two runs in one folder would delete each other's steps",
                "a folder for each run; or close() the other Checkpointer",
            )
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    return file


def _lock(file: Any) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
