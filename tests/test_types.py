"""Types: what checkers make of code that uses the package, and how much the public signatures say.

The code is that of README, docs and examples, and `typed_code.py`.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import os
import re
import runpy
import shutil
import site
import subprocess
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from statefulnn.transforms.types import PyTree
from tests.test_docs import PAGES, ROOT, blocks

# Errors in README, docs and examples that the types of other libraries cause (jax, optax, scikit-learn), and
# functions that a page defines twice; and words of torch in the FAQ, shown to be wrong. Lower it with
# every error that goes; mend a new one where it arises.
ERRORS_LEFT = 40
# The same of mypy, which also minds dicts of objects that are given with ``**``, and a subclass of a layer
# whose forward takes less.
MYPY_ERRORS_LEFT = 37
# Both are counts for the oldest JAX. The types of a newer one are others, and may bring a few more.
MORE_WITH_NEWER_TYPES = 0 if jax.__version_info__ < (0, 11) else 6
# The share of annotations in public signatures that say nothing: what containers hold, what users' functions
# take and give, and the objects of other libraries.
VAGUE_SHARE = 0.05
VAGUE = re.compile(r"\b(Any|PyTree)\b")
PUBLIC = """
. .amp .attention .bridge.equinox .bridge.flax .bridge.haiku .bridge.torch .curvature .func .functional .init
.io .meta .parallel .parameter .utils .utils.parametrizations .utils.parametrize .utils.prune .utils.rnn
""".split()
# Names that are not public: without an error for each, the test of names would find nothing.
HIDDEN = "import statefulnn as nn\nprint(nn.importlib, nn.listing, nn.Lineer)\n"


def code_of(page: Path) -> str:
    """Return a page's Python code, each line at its own number."""
    lines = [""] * len(page.read_text().splitlines())
    for first, flags, code in blocks(page):
        if "no-run" in flags:
            continue
        parts = [(0, code)]
        if ">>>" in code:
            parts = [(e.lineno, e.source) for e in doctest.DocTestParser().get_examples(code)]
        for start, source in parts:
            for number, line in enumerate(source.splitlines(), first - 1 + start):
                lines[number] = line
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """Return a folder of users' code."""
    code = tmp_path_factory.mktemp("types") / "code"
    shutil.copytree(ROOT / "examples", code, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "typed_code.py", code)
    for page in PAGES:
        (code / f"{page.stem.replace('-', '_')}_page.py").write_text(code_of(page))
    return code


@pytest.fixture(scope="module")
def errors(code) -> list[dict[str, Any]]:
    """Return pyright's errors about users' code, which finds the package where installed ones are."""
    folder = code.parent
    (code / "hidden.py").write_text(HIDDEN)
    # Of what is installed, a type checker sees only what is public; of a user's own folders, all.
    packages = folder / "env" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "installed.pth").write_text("\n".join([str(ROOT), *site.getsitepackages()]))
    settings = {"include": ["code"], "extraPaths": ["code"], "venvPath": ".", "venv": "env"}
    settings |= {"typeCheckingMode": "basic", "pythonVersion": "3.11"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    pyright = Path(sys.executable).with_name("pyright")
    command = [pyright, "--project", folder, "--outputjson"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
    output = json.loads(done.stdout)
    assert output["summary"]["filesAnalyzed"] == len(list(code.rglob("*.py"))), done.stdout
    return [d for d in output["generalDiagnostics"] if d["severity"] == "error"]


@pytest.fixture(scope="module")
def mypy_errors(code) -> list[str]:
    """Return mypy's errors about users' code, ``file:line: error: message``."""
    files = sorted(str(f.relative_to(code)) for f in code.rglob("*.py") if f.name != "hidden.py")
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
    command += ["--cache-dir", os.devnull, *files]  # it runs once
    path = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=code, env=path, capture_output=True, text=True, timeout=1200)
    lines = done.stdout.splitlines()
    assert lines and f"checked {len(files)} source files" in lines[-1], done.stdout + done.stderr
    return [line for line in lines if ": error: " in line]


def shown(errors: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{Path(e['file']).name}:{e['range']['start']['line'] + 1} {e.get('rule')}: {e['message']}"
        for e in errors
    )


def test_every_name_that_users_code_takes_from_the_package_is_public(errors):
    hidden = [e for e in errors if '"statefulnn' in e["message"]]
    assert [Path(e["file"]).name for e in hidden] == ["hidden.py"] * HIDDEN.count("nn."), shown(
        hidden
    )


def test_the_types_of_arrays_calls_and_transforms_are_kept(errors):
    wrong = [e for e in errors if e["file"].endswith("typed_code.py")]
    assert wrong == [], shown(wrong)


def test_pyright_complains_no_more_than_it_did(errors):
    errors = [e for e in errors if not e["file"].endswith("hidden.py")]
    by_rule = Counter(e.get("rule") for e in errors)
    assert len(errors) <= ERRORS_LEFT + MORE_WITH_NEWER_TYPES, f"{by_rule}\n{shown(errors)}"


def test_mypy_sees_the_types_of_arrays_calls_and_transforms_too(mypy_errors):
    wrong = [e for e in mypy_errors if e.startswith("typed_code.py") or '"statefulnn" has no' in e]
    assert wrong == []


def test_mypy_complains_no_more_than_it_did(mypy_errors):
    assert len(mypy_errors) <= MYPY_ERRORS_LEFT + MORE_WITH_NEWER_TYPES, "\n".join(mypy_errors)


def functions_of(value: object) -> Iterator[Callable]:
    """Return a public function, with its overloads in its place, or those that a class defines."""
    if inspect.isclass(value):
        for name, member in vars(value).items():
            if not name.startswith("_") or name in ("__init__", "__call__"):
                found = getattr(member, "__func__", member)
                yield from functions_of(found) if inspect.isfunction(found) else ()
    elif inspect.isfunction(function := inspect.unwrap(value) if callable(value) else value):
        yield from typing.get_overloads(function) or [function]


def vague_share(functions: Iterable[Callable]) -> tuple[float, list[str]]:
    """Return the share of annotations that say nothing, and where they are."""
    vague, total = [], 0
    for function in functions:
        total += len(function.__annotations__)
        for name, annotation in function.__annotations__.items():
            if VAGUE.search(str(annotation)):
                vague.append(f"{function.__module__}.{function.__qualname__}({name}: {annotation})")
    return len(vague) / total, vague


def test_public_signatures_say_what_they_take_and_give():
    functions: dict[Callable, None] = {}  # each once, in order
    for name in PUBLIC:
        package = importlib.import_module("statefulnn" + name.rstrip("."))
        for public in package.__all__:
            found = functions_of(getattr(package, public))
            functions |= {f: None for f in found if f.__module__.startswith("statefulnn")}
    share, vague = vague_share(functions)
    assert len(functions) > 700 and share <= VAGUE_SHARE, f"{share:.3f}\n" + "\n".join(vague)


def test_a_signature_that_says_nothing_is_found():
    def vague(x: Any, y: int, z: list[PyTree]) -> dict[str, Any]: ...

    @typing.overload
    def known(x: int) -> int: ...
    @typing.overload
    def known(x: str) -> str: ...
    def known(x: Any) -> Any: ...

    class Layer:
        def forward(self, x: Any) -> None: ...
        def _own(self, x: Any) -> None: ...

    found = [f for value in (vague, known, Layer) for f in functions_of(value)]
    share, where = vague_share(found)
    assert share == 4 / 10 and len(where) == 4


def test_the_typed_code_runs():
    runpy.run_path(str(ROOT / "tests" / "typed_code.py"))
