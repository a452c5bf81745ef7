"""What all readers of files share: one door for errors, one budget of memory, one way to quote a file.

A file may come from anybody. So every error while it is read leaves through `reading`, as one of a few
documented errors. What is built from it is counted in a `Budget`. Messages quote it with `shown`, since the
text of a hostile value can be larger than memory.
"""

from __future__ import annotations

import contextlib
import gc
import json
import operator
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import jax
import numpy as np

from statefulnn.core.errors import CheckpointError, explain

# A small file may unpack to this much, and every file to this many times its size.
_FLOOR = 64 << 20
_MULTIPLE = 4
# The parts that describe arrays and other objects (pickles, lists of archives, JSON) turn into Python
# objects, each of which takes many times its bytes in the file. These parts may grow by this factor.
OF_OBJECTS = 16
# A Python object takes about this many bytes.
OBJECT = 64


def broken(path: Path, offset: int, found: str, expected: str) -> CheckpointError:
    """Return the error for a file that is not as it should be, with the place."""
    return CheckpointError(
        explain(
            f"{path}, at byte {offset}: {found}",
            f"expected {expected}",
            "copy or download the file again, or load another checkpoint",
        )
    )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Let out only the errors that are documented for reading a file.

    These are `CheckpointError`, ``MemoryError``, and ``OSError`` of the operating system with the path. The
    user's code (functions of names, modules) is not called in here, so its errors stay as they are.

    Args:
        path: what the user asked for.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except OSError as error:
        if error.errno is None:
            raise broken(path, 0, type(error).__name__, "a file that can be read") from error
        if str(path) in f"{error.filename} {error}":
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        # No reader foresaw this. The error's text may quote the file, so only its class is shown.
        raise broken(path, 0, type(error).__name__, "a file that can be read") from error


class _Collector:
    """Pauses Python's garbage collector while many objects are built at once.

    It would go through all objects of the process again and again, though none of the new ones is garbage. A
    file of 20,000 arrays takes twice as long with it (``benchmarks/files.py``).
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._was_on = threading.Lock(), 0, False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pause it. The last of several threads to leave turns it on again, if it was on."""
        with self._lock:
            if not self._inside:
                self._was_on = gc.isenabled()
                gc.disable()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and self._was_on:
                    gc.enable()


collector = _Collector()


class Budget:
    """How many bytes of memory a file may turn into. Everything built, copied or expanded counts, each time.

    Args:
        path: the file, for the message.
        limit: the bytes; None for 64 MiB plus four times the size of all files that are opened with it, plus
            sixteen times the size of the parts of them that describe objects.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.path, self.spent = path, 0
        self.fixed = limit is not None
        self.limit = _FLOOR if limit is None else limit

    def opened(self, size: int) -> None:
        """Add to the limit what a file of this size is allowed."""
        self.allow(_MULTIPLE * size)

    def allow(self, nbytes: int) -> None:
        """Raise the limit, unless the user has set it."""
        if not self.fixed:
            self.limit += nbytes

    def spend(self, nbytes: int) -> None:
        """Count bytes that are about to be built.

        Raises:
            CheckpointError: if they are too many.
        """
        self.spent += nbytes
        if self.spent > self.limit:
            raise self.exceeded()

    def exceeded(self) -> CheckpointError:
        """Return the error for a file that turns into too much."""
        return CheckpointError(
            explain(
                f"{self.path} would take more than {self.limit / 2**20:,.0f} MiB of memory",
                "that is far more than its size: a file can be made so that little turns into very much",
                'if you trust it, nn.load(path, max_bytes="8GB")',
            )
        )


def shown(value: Any) -> str:
    """Return a short text for a value from a file: for large and unknown ones only type and size."""
    if isinstance(value, (str, bytes)):
        return repr(value) if len(value) <= 80 else f"{value[:60]!r} ..."
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple)):
        if len(value) > 8 or _nested(value):
            return f"{type(value).__name__} of {len(value)}"
        inside = ", ".join(map(shown, value))
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, np.dtype):
        return str(value)
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return f"an array of {value.dtype}{list(value.shape)}"
    name = type(value).__name__
    return f"{name} of {len(value)}" if isinstance(value, Sized) else name


def _nested(value: list | tuple) -> bool:
    return any(hasattr(v, "__len__") and not isinstance(v, (str, bytes)) for v in value)


def parsed_json(
    path: Path,
    at: int,
    text: bytes,
    budget: Budget,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Return the value of a JSON text.

    Args:
        path: the file it is from.
        at: where in the file it begins, in bytes.
        text: UTF-8.
        budget: pays for what the text turns into, before it is parsed.
        pairs: makes an object from names and values; None for a dict.

    Raises:
        CheckpointError: with the byte at which it stops being JSON.
    """
    budget.allow(OF_OBJECTS * len(text))
    # Each value but the first of a container follows one of these.
    budget.spend(len(text) + OBJECT * sum(text.count(c) for c in (b"[", b"{", b",", b":")))
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        raise broken(path, at + error.start, "bytes that are no text", "JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise broken(path, at + error.pos, error.msg, "JSON") from None
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        raise broken(path, at, "a text that cannot be read", "JSON") from None


def number_of_bytes(size: int | str, argument: str) -> int:
    """Return a number of bytes that was given as a number or as a text such as ``"5GB"``."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    if isinstance(size, str):
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Z]+)", size.upper())
        if found and found[2] in units:
            return max(1, int(float(found[1]) * units[found[2]]))
    elif hasattr(size, "__index__") and not isinstance(size, bool) and operator.index(size) > 0:
        return operator.index(size)
    raise ValueError(f"{argument} must be a number of bytes or '5GB', got {size!r}")


def check_versions(path: Path, metadata: Mapping[Any, Any]) -> None:
    """Raise unless ``load_state_dict`` can read the versions of modules that come with a state dict.

    Args:
        path: the file.
        metadata: dotted name of a module -> a dict with its version, a number.

    Raises:
        CheckpointError: if it cannot.
    """
    for name, entry in metadata.items():
        known = isinstance(name, str) and isinstance(entry, Mapping)
        if not known or not isinstance(entry.get("version", 0), (int, float, type(None))):
            what = f"the version of a module {shown(name)} that is none"
            raise broken(path, 0, what, "a dict with a number as 'version'")
