"""docs/recipes.md: both sides of each recipe run, compute the same, and ours are no longer in sum."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.test_docs import ROOT, blocks
from tests.test_readability import code_lines

PAGE = ROOT / "docs" / "recipes.md"
CODE = [code for _, _, code in blocks(PAGE) if "tensorboardX" not in code]
(OUR_START, *OURS), (THEIR_START, *THEIRS) = CODE[::2], CODE[1::2]
NAMES = re.findall(r"^## (.+)$", PAGE.read_text(), re.M)[:-1]
ROW = re.compile(r"^\| ([^|]+) \| (\d+) \| (\d+) \|$", re.M)
# Models are there, and nothing was made of them: an optimizer, a copy, a step.
MADE = re.compile(r"^(?=opt|fast|muon|@nn\.jit|for )", re.M)
# Noise of their own, another line search, another scale of the updates.
OTHER = {"A GAN", "L-BFGS", "Muon"}


def lines() -> list[tuple[str, int, int]]:
    sides = zip(NAMES, OURS, THEIRS, strict=True)
    return [(name, len(code_lines(ours)), len(code_lines(theirs))) for name, ours, theirs in sides]


def test_ours_are_no_longer_than_torchs_in_sum_and_the_table_has_the_numbers():
    rows = [(name, int(a), int(b)) for name, a, b in ROW.findall(PAGE.read_text())]
    ours, theirs = sum(row[1] for row in lines()), sum(row[2] for row in lines())
    table = "\n".join(f"| {name} | {a} | {b} |" for name, a, b in (*lines(), ("sum", ours, theirs)))
    assert ours <= theirs
    assert rows == [*lines(), ("sum", ours, theirs)], table


def test_both_sides_are_laid_out_alike():
    for ours, theirs in zip(OURS, THEIRS, strict=True):
        assert "torch" not in ours and "torch" in theirs + THEIR_START
        for code in (ours, theirs):
            assert max(map(len, code.splitlines())) <= 100 and ";" not in code


def data() -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    return {"x": x, "target": np.sin(x[:, :1]), "label": (x[:, 0] > 0).astype(np.int64)}


def started(code: str, start: str) -> tuple[dict[str, Any], str]:
    """Run a recipe until its models are there; return the names, and what is left to run."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(start, names)
    as_array = torch.tensor if start is THEIR_START else jnp.asarray
    names |= {name: as_array(value) for name, value in data().items()}
    found = MADE.search(code)
    assert found is not None
    exec(code[: found.start()], names)
    return names, code[found.start() :]


def as_numpy(value: Any) -> np.ndarray:
    return value.detach().clone().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def states(names: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of all models among the names, as they are now."""
    return {
        name: {key: as_numpy(v) for key, v in value.state_dict().items()}
        for name, value in names.items()
        if isinstance(value, (torch.nn.Module, nn.Module)) and not isinstance(value, nn.Optimizer)
    }


@pytest.mark.parametrize("number", range(len(OURS)), ids=NAMES)
def test_both_sides_compute_the_same(number):
    torch.manual_seed(0)
    theirs, rest = started(THEIRS[number], THEIR_START)
    weights = states(theirs)
    exec(rest, theirs)
    if NAMES[number] in OTHER:  # ours runs with the page
        return
    with jax.numpy_dtype_promotion("standard"):  # a reader's setting
        ours, rest = started(OURS[number], OUR_START)
        for name, state in weights.items():
            mine = ours[name].state_dict()
            ours[name].load_state_dict({k: v.astype(mine[k].dtype) for k, v in state.items()})
        exec(rest, ours)
    expected, found = states(theirs), states(ours)
    assert weights and weights.keys() <= found.keys()
    changed = False
    for name in expected.keys() & found.keys():
        assert list(found[name]) == list(expected[name])
        for key, value in expected[name].items():
            np.testing.assert_allclose(found[name][key], value, rtol=2e-5, atol=2e-6)
            changed |= name in weights and bool((value != weights[name][key]).any())
    assert changed or ours["log"] == theirs["log"]
