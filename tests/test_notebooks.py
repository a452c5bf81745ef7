"""The notebooks run from top to bottom, and show what a run shows."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tomllib
from pathlib import Path

import jax
import matplotlib
import pytest

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
pages = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(cell: dict) -> str:
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


def pictures(cell: dict) -> int:
    return sum("image/png" in o.get("data", {}) for o in cell["outputs"])


def comparable(text: str) -> str:
    # Decimals and how far a progress bar got depend on the machine; names, shapes and counts do not.
    without_bars = re.sub(r"^.*\r.*\n?", "", text, flags=re.M)
    return re.sub(r"\d+\.\d+", "#", without_bars).strip()


def test_there_are_notebooks():
    assert NOTEBOOKS


@pages
def test_every_cell_was_run_in_order_and_has_an_output(notebook):
    for number, cell in enumerate(code_cells(notebook), 1):
        assert cell["execution_count"] == number
        assert cell["outputs"], f"cell {number} shows nothing"
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds <= {"stream", "display_data"}, f"cell {number} shows {kinds}"
        assert all(o.get("name", "stdout") == "stdout" for o in cell["outputs"]), "a warning"


# These train many networks. What they call runs in other pages and tests.
LONG = "ensembles.ipynb", "maml.ipynb", "meta-learning.ipynb"


@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(p, id=p.name, marks=pytest.mark.long if p.name in LONG else ())
        for p in NOTEBOOKS
    ],
)
def test_a_run_prints_and_draws_what_is_stored(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown: list[int] = []

    def show() -> None:
        shown.append(plt.get_fignums()[0])
        plt.gcf().canvas.draw()
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    names: dict = {"__name__": "__main__"}
    # A reader's session has JAX's own setting, not the strict one of the test session.
    with jax.numpy_dtype_promotion("standard"):
        for number, cell in enumerate(code_cells(notebook), 1):
            shown.clear()
            output = io.StringIO()
            source = "".join(cell["source"])
            with contextlib.redirect_stdout(output):
                exec(compile(source, f"{notebook.name}, cell {number}", "exec"), names)
            assert comparable(output.getvalue()) == comparable(printed(cell)), number
            assert len(shown) == pictures(cell), f"cell {number} draws {len(shown)}"


def prose(notebook: Path) -> str:
    cells = json.loads(notebook.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


@pages
def test_colab_opens_the_notebook_and_installs_from_the_repository(notebook):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repository = project["urls"]["Repository"]
    path = f"{repository.removeprefix('https://')}/blob/main/notebooks/{notebook.name}"
    path = path.replace("github.com", "github", 1)
    assert f"(https://colab.research.google.com/{path})" in prose(notebook)
    assert f' @ git+{repository}"' in "".join(code_cells(notebook)[0]["source"])


@pages
def test_links_lead_somewhere(notebook):
    text = prose(notebook)
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (notebook.parent / target).exists(), target
