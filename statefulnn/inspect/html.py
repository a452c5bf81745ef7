"""Modules, parameters and summaries as HTML for notebooks: trees to fold, without scripts."""

from __future__ import annotations

import functools
import importlib.resources
import itertools
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from statefulnn.core.box import Box
from statefulnn.inspect.numbers import in_bytes
from statefulnn.inspect.statistics import BINS, Statistics, sharding_of, statistics_of
from statefulnn.inspect.tree import Held, Node, held_of, runs_of_equals, tree_of

if TYPE_CHECKING:
    from statefulnn.core.module import Module
    from statefulnn.inspect.summary import Summary

# What a notebook keeps has an end: so many lines, and values of so many arrays.
_MOST_LINES, _MOST_VALUES = 4000, 500


@functools.cache
def asset(name: str) -> str:
    """Return the text of a file that lies beside this one."""
    return importlib.resources.files("statefulnn.inspect").joinpath(name).read_text("utf-8")


def html_of_module(module: Module) -> str:
    """Return a module as a tree of `<details>`."""
    return _wrapped("".join(_Tree(tree_of(module)).lines()))


def html_of_array(box: Box) -> str:
    """Return a parameter or buffer: shape, dtype and what its numbers look like."""
    held = held_of(box, "", type(box).__name__)
    return _wrapped(_array(held, None if held.shape is None else statistics_of(box._value)))


def html_of_summary(summary: Summary) -> str:
    """Return a summary as a table."""
    from statefulnn.inspect.summary import columns, footer, remarks, title

    table = columns(summary)
    output = {"output": table.pop("output")} if "output" in table else {}
    table = {**output, **table}
    head = "".join(f"<th>{escape(name)}</th>" for name in table)
    body = []
    for i, row in enumerate(summary.rows):
        said = "".join(f" <i>{escape(text)}</i>" for text in remarks(row))
        cells = "".join(f"<td>{escape(cells[i])}</td>" for cells in table.values())
        name = f'<th style="--d:{row.depth}">{escape(title(row))}{said}</th>'
        body.append(f"<tr>{name}{cells}</tr>")
    notes = "".join(f"<p>{escape(line)}</p>" for line in footer(summary))
    return _wrapped(
        f"<table><thead><tr><th>layer</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>{notes}"
    )


def _wrapped(inner: str) -> str:
    return f'<div class="snn"><style>{asset("notebook.css")}</style>{inner}</div>'


class _Tree:
    """Writes the lines of a tree, until there are too many."""

    def __init__(self, root: Node) -> None:
        self._root, self._count = root, 0
        shown = itertools.islice(root.boxes.items(), _MOST_VALUES)
        self._found = {
            i: statistics_of(held.box._value) for i, held in shown if held.shape is not None
        }

    def lines(self) -> Iterator[str]:
        todo: list[str | Node | list[Node]] = [self._root]
        while todo:
            step = todo.pop()
            if isinstance(step, str):
                yield step
                continue
            self._count += 1 if isinstance(step, list) else 1 + len(step.own)
            if self._count > _MOST_LINES:
                if any(not isinstance(rest, str) for rest in todo):
                    todo = [rest for rest in todo if isinstance(rest, str)]
                yield "<p>… and more, which is left out here</p>"
            elif isinstance(step, list):
                yield self._opening(step)
                todo += ["</details>", *reversed(step)]
            elif step.shared is not None or not (step.own or step.children):
                yield f"<p>{self._label([step])}</p>"
            else:
                yield self._opening([step])
                yield from (_array(held, self._found.get(id(held.box))) for held in step.own)
                groups = runs_of_equals(step.children)
                todo += ["</details>", *reversed([g if len(g) > 1 else g[0] for g in groups])]

    def _opening(self, nodes: list[Node]) -> str:
        opened = " open" if nodes[0] is self._root else ""
        return f"<details{opened}><summary>{self._label(nodes)}</summary>"

    def _label(self, nodes: list[Node]) -> str:
        node, last, count = nodes[0], nodes[-1], len(nodes)
        name = node.name if count == 1 else f"{node.name}-{last.name}"
        parts = [f"<code>{escape(name)}</code>"] if node.name else []
        parts.append(f"<b>{escape(node.cls)}</b>")
        parts.append(f"× {count}" if count > 1 else f"<i>{escape(node.module.extra_repr())}</i>")
        found = (self._found.get(i) for n in nodes for i in n.boxes)
        if bad := sum(x.nans + x.infinities for x in found if isinstance(x, Statistics)):
            parts.append(f"<strong>{bad:,} NaN or infinite</strong>")
        if node.shared is not None:
            parts.append(f"<i>is {escape(node.shared or 'the model')}</i>")
        elif node.boxes:
            frozen = node.parameters - node.trainable
            size = f"{node.parameters:,} parameters" + (f", {frozen:,} frozen" if frozen else "")
            size += " and some without a shape" if node.without_shape else ""
            each = " each" if count > 1 else ""
            parts.append(f"<span>{size} · {in_bytes(node.nbytes)}{each}</span>")
        return " ".join(parts)


def _array(held: Held, found: Statistics | str | None) -> str:
    shape = "no shape yet," if held.shape is None else str(held.shape)
    kind = "" if held.trainable else " frozen" if held.is_parameter else " buffer"
    line = f"<code>{escape(held.name)}</code> {escape(f'{shape} {held.dtype}')}{kind}"
    if held.tied is not None:
        return f"<p>{line} <i>is {escape(held.tied)}</i></p>"
    sharding = None if held.shape is None else sharding_of(held.box._value)
    if sharding:
        line += f" <i>{escape(sharding)}</i>"
    if found is not None:
        line += f" <i>{found}</i>" if isinstance(found, str) else _numbers(found)
    return f"<p>{line}</p>"


def _numbers(found: Statistics) -> str:
    bad = [
        f"{n:,} {what}" for n, what in ((found.nans, "NaN"), (found.infinities, "infinite")) if n
    ]
    loud = f" <strong>{' and '.join(bad)}</strong>" if bad else ""
    spread = f"{found.mean:.3g} ± {found.std:.3g}, from {found.low:.3g} to {found.high:.3g}"
    text = f"all {found.low:.6g}" if found.low == found.high else spread
    if not any(found.histogram):
        text = "no finite number"
    of = f" (a sample of one in {found.step})" if found.step > 1 else ""
    picture = "" if found.low == found.high else _picture(found.histogram)
    return f" {picture}{loud} <span>{text}{of}</span>"


def _picture(histogram: tuple[int, ...]) -> str:
    most = max(histogram) or 1
    bars = "".join(
        f"M{i} 1V{1 - max(n / most, 0.04):.2f}h.9V1" for i, n in enumerate(histogram) if n
    )
    return (
        f'<svg viewBox="0 0 {BINS} 1" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="{bars}"/></svg>'
    )
