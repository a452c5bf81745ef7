"""Locks that end with the process that took them, however it ends, and the cleanup that relies on them.

A lock belongs to an open file. The system drops it when the last copy of the open file is closed, and a
forked process has a copy. So a child closes its copies at once, and the owner unlocks before it closes. Some
file systems have no locks. Then nothing is known about other processes, and none of their files is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

# One thread may fork while another opens a file: the child's copy must be listed, or it is never closed.
_guard = threading.RLock()
_open: set[LockFile] = set()

_BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
_FLAGS = os.O_RDWR | sum(getattr(os, n, 0) for n in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))
# The byte that is locked on Windows, where others cannot read locked bytes: beyond all that is written.
_PLACE = 1 << 30
# No writer puts more than this into its marker.
_LONGEST_NOTE = 1 << 24
_TRIES = 100


class LockFile:
    """An open file to be locked, used by this process alone.

    Args:
        path: the file.
        flags: ``os.O_CREAT`` and the like, for a file that need not be there.

    Raises:
        OSError: if it cannot be opened, or is a pipe, a device or a link.

    Attributes:
        held: whether the lock is taken; None where the file system has no locks.
        mode: its permissions; for a new file, those this process gives to new files.
    """

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.path = path
        self.held: bool | None = False
        with _guard:
            descriptor = os.open(path, _FLAGS | flags, 0o666)
            self.file: IO[bytes] = os.fdopen(descriptor, "r+b", buffering=0)
            _open.add(self)
        mode = os.fstat(descriptor).st_mode
        self.mode = stat.S_IMODE(mode)
        if not stat.S_ISREG(mode):
            self.close()
            raise OSError(errno.EINVAL, "not a regular file", str(path))

    def take(self) -> bool | None:
        """Take the lock if it is free; return the new value of `held`."""
        with _guard:
            others = [f for f in _open if f is not self and f.path == self.path]
        if any(f.held is not False and f.is_there for f in others):
            return False  # on some file systems a lock belongs to the process, not to the open file
        try:
            _lock(self.file)
            self.held = True
        except OSError as error:
            self.held = False if error.errno in _BUSY else None
        return self.held

    @property
    def is_there(self) -> bool:
        """Whether the path is still the name of this file."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.lstat(self.path))
        except OSError:
            return False

    def close(self, *, remove: bool = False) -> None:
        """Release the lock, in the process that took it; in a forked child do nothing.

        Args:
            remove: whether to remove the file too, before it is unlocked where the system allows that.
        """
        with _guard:
            if self not in _open:
                return
            _open.discard(self)
            if remove and os.name != "nt":
                removed(self.path)
            with contextlib.suppress(OSError), self.file:
                if self.held:
                    _unlock(self.file)
            if remove and os.name == "nt":  # an open file cannot be removed there
                removed(self.path)
            self.held = False


def removed(path: Path) -> None:
    """Remove a file, or a folder with everything in it, as far as possible."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _lock(file: IO[bytes]) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(_PLACE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(file: IO[bytes]) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(_PLACE)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def _in_child() -> None:
    """Close the copies in a forked child, without unlocking: the locks are the parent's."""
    for lock in list(_open):
        lock.held = False
        with contextlib.suppress(OSError):
            lock.file.close()
    _open.clear()
    _guard.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_in_child
    )


# --------------------------------------------------------------------------------------------------
# Writers, and the files that killed ones have left


def marked(marker: Callable[[str], Path]) -> tuple[str, LockFile]:
    """Return a name for one act of writing, and its marker: a file that is locked until the writing ends.

    Args:
        marker: the path of the marker for a name.

    Raises:
        OSError: if no file can be made there.
    """
    for _ in range(_TRIES):
        run = uuid.uuid4().hex[:8]
        with contextlib.suppress(FileExistsError):
            lock = LockFile(marker(run), os.O_CREAT | os.O_EXCL)
            # Before it was locked, another process may have removed it, taking its writer for dead.
            if lock.take() is not False and lock.path.exists():
                return run, lock
            lock.close(remove=True)
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(marker("")))


def sweep(
    folder: Path,
    run_of: Callable[[str], str | None],
    marker: Callable[[str], Path],
    rubbish: Callable[[list[str], bytes], list[str]],
) -> None:
    """Remove the files of writers that ended without cleaning up. It never raises.

    A writer has ended if its marker is gone, or can be locked. Writers on other hosts are recognised as alive
    if the file system's locks work across hosts.

    Args:
        folder: where the files are.
        run_of: the name of the writer for a file's name; None for other files.
        marker: the path of the marker for a writer's name.
        rubbish: which files of a writer to remove, given all of them and the text of its marker; it is called
            once the writer is known to have ended.
    """
    found: dict[str, list[str]] = {}
    try:
        for name in os.listdir(folder):
            run = run_of(name)
            if run is not None:
                found.setdefault(run, []).append(name)
    except OSError:
        return
    for run, files in found.items():
        with _ended(marker(run)) as said:
            if said is not None:
                for name in rubbish(files, said):
                    removed(folder / name)


@contextlib.contextmanager
def _ended(marker: Path) -> Iterator[bytes | None]:
    """Yield the text of a writer's marker if the writer has ended, and remove the marker; else yield None."""
    try:
        lock = LockFile(marker) if not _is_ours(marker) else None
    except FileNotFoundError:
        yield b""
        return
    except OSError:
        lock = None
    if lock is None:
        yield None
        return
    ended = bool(lock.take())
    try:
        yield lock.file.read(_LONGEST_NOTE) if ended else None
    finally:
        lock.close(remove=ended)


def _is_ours(marker: Path) -> bool:
    """Say whether a marker is this process's own: if locks are per process, opening it could drop them."""
    with _guard:
        return any(lock.path == marker for lock in _open)
