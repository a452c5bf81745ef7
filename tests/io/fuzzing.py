"""What a fuzzer of files needs beside its files: a process with limits, and changes of JSON.

A fuzzer is a class that makes files and loads them; `run_fuzz` runs it in a process of its own, with a
limit of memory for the process and of processor time for each file, and says how each file ended:

    class Exports(Fuzzer):
        def setup(self): ...                    # honest files, in self.folder
        def write(self, random): ...            # one hostile file: its path, and a text for what was changed
        def load(self, path): ...               # load it, and use what was loaded

    outcomes = run_fuzz("tests.io.test_export_hostile:Exports", count=1000, seed=0)
    assert outcomes["loaded"] and outcomes["CheckpointError"]

What is neither loaded nor a documented error fails the test, with the numbers that make the file again:
``run_fuzz(..., first=number, count=1)``. `changed_tree` and `dumps` change what is written as JSON.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import importlib
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


class Fuzzer:
    """Makes hostile files and loads them; derive from it.

    Attributes:
        folder: an empty folder for its files.
        kind: what `run_fuzz` was given as its kind, for a class with files of several kinds.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind

    def setup(self) -> None:
        """Write honest files, and load them once, so that no later file pays for imports."""

    def write(self, random: random.Random) -> tuple[Path, str]:
        """Write a hostile file; return its path and what is hostile about it."""
        raise NotImplementedError

    def load(self, path: Path) -> None:
        """Load it, and use what was loaded as one would."""
        raise NotImplementedError

    def outcome(self, error: Exception, path: Path) -> str | None:
        """Return the name of a documented error, None for one that must not happen."""
        from statefulnn.core.errors import CheckpointError

        if type(error) is CheckpointError and len(str(error)) < 5000:
            return "CheckpointError"
        if isinstance(error, OSError) and error.errno and str(error.filename) == str(path):
            return "OSError"
        return None


class TooSlow(BaseException):
    """The processor time of a file is over; no ``except Exception`` stops it."""


def run_fuzz(
    fuzzer: str,
    count: int,
    seed: int,
    *,
    kind: str = "",
    first: int = 0,
    seconds: float = 10.0,
    memory: int = 2 * GIB,
) -> collections.Counter[str]:
    """Load many hostile files in a process with limits.

    Args:
        fuzzer: "package.module:Class", a `Fuzzer`.
        count: how many files.
        seed: file i is a function of (seed, i).
        kind: passed to the fuzzer.
        first: the number of the first file; to make one file again, with ``count=1``.
        seconds: the processor time that a file may take.
        memory: the bytes that the process may take beside what it has after `Fuzzer.setup`.

    Returns:
        how many files ended how: "loaded", or the name of a documented error.

    Raises:
        AssertionError: if a file ended otherwise, with its number and what was changed; also if the
            process died.
    """
    with tempfile.TemporaryDirectory() as folder:
        order = json.dumps([fuzzer, count, seed, kind, first, seconds, memory, folder])
        code = f"from tests.io.fuzzing import _child; _child(*{order!s})"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=7200,
        )
        again = f"run_fuzz({fuzzer!r}, kind={kind!r}, seed={seed}, count=1, first=...)"
        report = Path(folder, "report.json")
        if done.returncode or not report.exists():
            at = Path(folder, "current")
            current = at.read_text() if at.exists() else "before the first file"
            raise AssertionError(
                f"the process ended with {done.returncode} at {current}\n{again}\n{done.stderr[-4000:]}"
            )
        outcomes, failures = json.loads(report.read_text())
    assert not failures, f"{again}\n" + "\n\n".join(failures)
    return collections.Counter(outcomes)


def _child(
    name: str,
    count: int,
    seed: int,
    kind: str,
    first: int,
    seconds: float,
    memory: int,
    folder: str,
) -> None:
    module, _, attribute = name.partition(":")
    place = Path(folder, "files")
    place.mkdir()
    fuzzer: Fuzzer = getattr(importlib.import_module(module), attribute)(place, kind)
    fuzzer.setup()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    signal.signal(signal.SIGPROF, _too_slow)
    outcomes: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    with open(Path(folder, "current"), "w") as current:
        for number in range(first, first + count):
            path, change = fuzzer.write(random.Random(f"{seed}:{number}"))
            change = change[:2000].encode("ascii", "backslashreplace").decode()
            current.seek(0)
            current.truncate()
            current.write(f"file {number}: {change}")
            current.flush()
            try:
                with _processor_time(seconds):
                    fuzzer.load(path)
                outcomes["loaded"] += 1
            except (Exception, TooSlow) as error:
                found = None if isinstance(error, TooSlow) else fuzzer.outcome(error, path)
                if found is None:
                    text = "".join(traceback.format_exception(error))[-2500:]
                    failures.append(f"file {number}: {change}\n{text}")
                    if len(failures) == 5:
                        break
                else:
                    outcomes[found] += 1
    Path(folder, "report.json").write_text(json.dumps([outcomes, failures]))


@contextlib.contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _too_slow(*_: Any) -> None:
    raise TooSlow("the file took more processor time than a file may")


# --------------------------------------------------------------------------------------------------
# JSON that is changed in its structure


class Raw(str):
    """A text that stands in the JSON as it is: what Python's own values cannot say."""


class Pairs(list):
    """An object as (name, value), whose names may repeat."""


NUMBERS = [
    0,
    1,
    -1,
    2**31,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**400,
    1.5,
    -0.0,
    1e308,
    Raw("9" * 5000),
    Raw("1e999"),
    Raw("NaN"),
    Raw("-Infinity"),
]
TEXTS = [
    "",
    "a",
    "a" * 5000,
    "é" * 300_000,
    "\0",
    "\ud800",
    "\x1b[2J",
    "../../x",
    "/dev/zero",
    "__class__",
    "__metadata__",
    "None",
    "1",
]
CONTAINERS = [
    [],
    {},
    [[]],
    [None],
    {"": {}},
    [0] * 1000,
    Raw("[" * 60 + "]" * 60),
    Raw("[" * 200_000 + "]" * 200_000),
    Raw('{"a":' * 900 + "1" + "}" * 900),
    Raw("[" + "[]," * 200_000 + "[]]"),
]
HOSTILE = [True, False, None, *NUMBERS, *TEXTS, *CONTAINERS]


def changed_tree(tree: Any, random: random.Random, pool: list[Any] = HOSTILE) -> tuple[Any, str]:
    """Return a JSON tree with one to three changes, and a text that names them.

    Args:
        tree: dicts, lists and scalars; it is not changed.
        random: decides.
        pool: values that take the place of others.
    """
    tree = {"": copy.deepcopy(tree)}
    notes = []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        places = list(_places(tree, ()))
        where = random.choice(places)
        # The deepest places are the most: some of the changes are to be near the root.
        where = where[: random.randint(1, len(where))] if random.random() < 0.2 else where
        notes.append(_change(tree, where, places, random, pool))
    return tree[""], "; ".join(notes)


def _places(tree: Any, where: tuple) -> Iterator[tuple]:
    for key, value in _items(tree):
        yield (*where, key)
        yield from _places(value, (*where, key))


def _items(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, Pairs):
        return []
    if isinstance(tree, dict):
        return list(tree.items())
    return list(enumerate(tree)) if isinstance(tree, list) else []


def _change(
    tree: Any, where: tuple, places: list[tuple], random: random.Random, pool: list[Any]
) -> str:
    *before, key = where
    holder = tree
    for step in before:
        holder = holder[step]
    kind = random.choice(["put", "put", "put", "near", "drop", "twice", "nest", "copy", "rename"])
    at = "/".join(map(str, where))[:200]
    if kind == "near" and type(holder[key]) in (int, str, bool):
        holder[key] = _near(holder[key], random)
        return f"{at} = {str(holder[key])[:80]!r}"
    if kind == "drop" and before:
        del holder[key]
        return f"{at} left out"
    if kind == "twice" and before:
        if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            _put(tree, before, Pairs([*holder.items(), (key, holder[key])]))
        return f"{at} twice"
    if kind == "nest":
        value = holder[key]
        holder[key] = random.choice([[value], {"a": value}, [value, value]])
        return f"{at} nested"
    if kind == "copy":
        source = random.choice(places)
        with contextlib.suppress(LookupError, TypeError):  # it is gone by now
            value = tree
            for step in source:
                value = value[step]
            holder[key] = copy.deepcopy(value)
        return f"{at} = what is at {'/'.join(map(str, source))[:200]}"
    if kind == "rename" and isinstance(holder, dict) and before:
        name = random.choice([n for n in pool if isinstance(n, str) and not isinstance(n, Raw)])
        holder[name] = holder.pop(key)
        return f"{at} renamed {name[:80]!r}"
    holder[key] = copy.deepcopy(random.choice(pool))
    return f"{at} = {type(holder[key]).__name__} {str(holder[key])[:80]!r}"


def _put(tree: Any, where: list, value: Any) -> None:
    for step in where[:-1]:
        tree = tree[step]
    tree[where[-1]] = value


def _near(value: Any, random: random.Random) -> Any:
    """Return a value that is nearly the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        other = float(value) if abs(value) < 2**64 else 0.5
        return random.choice([value + 1, value - 1, -value, value * 2, other, str(value)])
    if not value:
        return " "
    at = random.randrange(len(value))
    other = random.choice('0123456789abcxyz[](){},:;*^+-=<>_. "\\\n')
    return random.choice(
        [
            value[:at] + other + value[at + 1 :],
            value[:at] + other + value[at:],
            value[:at] + value[at + 1 :],
            value * 2,
        ]
    )


def dumps(tree: Any) -> str:
    """Return JSON, with `Raw` and `Pairs` as they are."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {dumps(v)}" for k, v in tree) + "}"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {dumps(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(dumps, tree)) + "]"
    return json.dumps(tree)
