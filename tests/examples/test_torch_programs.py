"""Eleven kinds of program are as short here as in torch, and are the same: models, names and numbers."""

from __future__ import annotations

import ast
import importlib
import io
import tokenize
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import seq2seq_dates
import statefulnn as nn
from tests.examples.reference import assert_close, from_torch, to_torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests/examples/torch_programs"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py"))
SHORT = dict.fromkeys(PROGRAMS, ("--steps", "2"))
SHORT |= dict.fromkeys(("resume_digits", "vae_digits"), ("--epochs", "1"))
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
NO_CODE |= {tokenize.ENDMARKER}


def lines_of_code(text: str) -> int:
    """Count the lines that hold more than comments and docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    used = {n for t in tokens if t.type not in NO_CODE for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            doc = node.body[0]
            used -= set(range(doc.lineno, (doc.end_lineno or doc.lineno) + 1))
    return len(used)


def test_lines_of_code_are_counted_without_comments_docstrings_and_blank_lines():
    text = '"""A."""\n\n# b\ndef f(x):  # c\n    """D.\n\n    e\n    """\n\n    return (\n        x\n    )\n'
    assert lines_of_code(text) == 4


def test_no_program_is_more_than_a_tenth_longer_than_in_torch():
    assert len(PROGRAMS) == 11
    lengths = {
        name: [lines_of_code((at / f"{name}.py").read_text()) for at in (ROOT / "examples", FOLDER)]
        for name in PROGRAMS
    }
    longer = {name: both for name, both in lengths.items() if both[0] > 1.1 * both[1]}
    assert longer == {}, lengths


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_in_torch_runs_and_draws(name, capsys):
    program = importlib.import_module(f"tests.examples.torch_programs.{name}")
    program.main([*SHORT[name], "--picture", "pictures/torch.png"])
    assert Path("pictures/torch.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "picture: pictures/torch.png" in capsys.readouterr().out


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def whole(below: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, below, shape).astype(np.int32)


# Of each program with a class of its own: the class, its arguments, and inputs. (maml_reptile has none.)
MODELS = {
    "char_transformer": ("Transformer", (16, 2), (whole(20, 3, 12),)),
    "diffusion_moons": ("Denoiser", (8,), (floats(5, 2), whole(100, 5))),
    "dqn_cartpole": ("QNetwork", (8,), (floats(5, 4),)),
    "ensemble_gap": ("Member", (8,), (floats(5, 1),)),
    "gan_ring": ("Critic", (8,), (floats(5, 2),)),
    "graph_net": ("GraphNet", (6, 3), (whole(6, 2, 10),)),
    "pinn_burgers": ("Solution", (8,), (floats(), floats())),
    "resume_digits": ("Classifier", (8,), (floats(5, 64),)),
    "seq2seq_dates": ("Seq2Seq", (8,), seq2seq_dates.draw_dates(np.random.default_rng(0), 5)),
    "vae_digits": ("VAE", (2, 8), (floats(5, 64),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_torchs_weights_load_by_name_and_give_torchs_outputs(name):
    kind, args, inputs = MODELS[name]
    ours = getattr(importlib.import_module(name), kind)(*args).eval()
    theirs = getattr(importlib.import_module(f"tests.examples.torch_programs.{name}"), kind)(*args)
    ours.load_state_dict({k: from_torch(v) for k, v in theirs.eval().state_dict().items()})
    with torch.no_grad():
        expected = theirs(*map(to_torch, inputs))
    run: Any = nn.jit(ours)
    out = run(*inputs)
    if name == "vae_digits":  # the rest has noise in it
        out, expected = out[1:], expected[1:]
    expected = expected if isinstance(expected, tuple) else (expected,)
    for mine, other in zip(jax.tree.leaves(out), expected, strict=True):
        assert_close(mine, from_torch(other))
