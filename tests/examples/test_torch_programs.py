"""Eleven kinds of program are as short here as in torch, and their torch versions run."""

from __future__ import annotations

import ast
import importlib
import io
import tokenize
from pathlib import Path

import pytest

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
