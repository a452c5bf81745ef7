"""The package stays readable: how long it and its functions are, what it imports, what its types say."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "statefulnn"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TYPED = [s for s in SOURCES if s.relative_to(PACKAGE).parts[0] in ("core", "transforms")]

# The engine, as docs/design.md lists it: what splits and merges modules, and who may write what.
ENGINE = (
    "stamps ownership baked_in box registry static_keys watch moduledef plan graph pytree generator "
    "lending"
).split()
ENGINE_LINES = 1713
# What it asks about objects of the user's: their members, their classes, what a trace left in them.
LOOKING = ("objects", "class_keys", "leaks")
LOOKING_LINES = 480
FUNCTION_LINES = 60
# The share of parameters of type Any, or of none, as where anything may come.
ANY_SHARE = {"core and transforms": (TYPED, 0.09), "all": (SOURCES, 0.08)}

_SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def docstring_lines(tree: ast.AST) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that hold code: no comments, no docstrings, no blank lines."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _SKIPPED:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(ast.parse(text))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def relative(source: Path) -> str:
    return str(source.relative_to(ROOT))


def test_lines_are_counted_without_comments_and_docstrings():
    text = '"""Doc."""\n\n# why\nx = [\n    1,\n]\ndef f():\n    """Doc\n\n    more."""\n    return x  # y\n'
    assert code_lines(text) == {4, 5, 6, 7, 11}


def test_the_engine_is_no_longer_than_it_was():
    for names, limit in ((ENGINE, ENGINE_LINES), (LOOKING, LOOKING_LINES)):
        lengths = {n: len(code_lines((PACKAGE / "core" / f"{n}.py").read_text())) for n in names}
        assert sum(lengths.values()) <= limit, lengths


def test_the_design_lists_the_engine():
    text = (ROOT / "docs" / "design.md").read_text()
    assert [n for n in (*ENGINE, *LOOKING) if f"`{n}`" not in text] == []


@pytest.mark.parametrize("source", SOURCES, ids=relative)
def test_no_function_is_long(source):
    text = source.read_text()
    code = code_lines(text)
    for f in functions(ast.parse(text)):
        # The body: how many lines torch's parameters take is not ours to choose.
        length = len(code & set(range(f.body[0].lineno, (f.end_lineno or f.lineno) + 1)))
        assert length <= FUNCTION_LINES, (
            f"{relative(source)}:{f.lineno} {f.name} has {length} lines"
        )


@pytest.mark.parametrize("part", ANY_SHARE)
def test_most_parameters_have_a_type_that_says_something(part):
    sources, share = ANY_SHARE[part]
    vague, total = [], 0
    for source in sources:
        for f in functions(ast.parse(source.read_text())):
            for argument in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs):
                if argument.arg in ("self", "cls"):
                    continue
                total += 1
                if argument.annotation is None or ast.unparse(argument.annotation) == "Any":
                    vague.append(f"{relative(source)}:{f.lineno} {f.name}({argument.arg})")
    assert len(vague) <= share * total, f"{len(vague)} of {total}:\n" + "\n".join(vague)


def imports_at_import_time(source: Path) -> set[str]:
    """Return the files of the package that a file imports when it is imported itself."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("statefulnn"):
            base = ROOT.joinpath(*(node.module or "").split("."))
            for alias in node.names:
                for path in (base / f"{alias.name}.py", base / alias.name / "__init__.py"):
                    if path.exists():
                        found.add(relative(path))
                        break
                else:
                    own = base.with_suffix(".py")
                    found.add(relative(own if own.exists() else base / "__init__.py"))
        todo += ast.iter_child_nodes(node)
    return found


def test_imports_make_no_circle():
    below = {relative(s): imports_at_import_time(s) - {relative(s)} for s in SOURCES}
    while below:
        free = [s for s, needs in below.items() if not needs & below.keys()]
        assert free, f"these import each other: {sorted(below)}"
        for source in free:
            del below[source]
