"""What a type checker makes of code that uses the package: README, docs, examples, and `typed_code.py`."""

from __future__ import annotations

import doctest
import json
import runpy
import shutil
import site
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import PAGES, ROOT, blocks

# Errors in README, docs and examples that the types of other libraries cause (jax, optax, scikit-learn), and
# functions that a page defines twice. Lower it with every error that goes; mend a new one where it arises.
ERRORS_LEFT = 40
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
def errors(tmp_path_factory) -> list[dict[str, Any]]:
    """Return pyright's errors about users' code, which finds the package where installed ones are."""
    folder = tmp_path_factory.mktemp("types")
    code = folder / "code"
    shutil.copytree(ROOT / "examples", code, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "typed_code.py", code)
    (code / "hidden.py").write_text(HIDDEN)
    for page in PAGES:
        (code / f"{page.stem.replace('-', '_')}_page.py").write_text(code_of(page))
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


def test_a_type_checker_complains_no_more_than_it_did(errors):
    errors = [e for e in errors if not e["file"].endswith("hidden.py")]
    by_rule = Counter(e.get("rule") for e in errors)
    assert len(errors) <= ERRORS_LEFT, f"{by_rule}\n{shown(errors)}"


def test_the_typed_code_runs():
    runpy.run_path(str(ROOT / "tests" / "typed_code.py"))
