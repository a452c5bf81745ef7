"""nn.summary: a model as a table, without computing anything."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

from statefulnn.core import habits
from statefulnn.core.graph import require_module
from statefulnn.core.module import Module
from statefulnn.inspect.numbers import brief, in_bytes
from statefulnn.inspect.trace import Trace
from statefulnn.inspect.trace import trace as trace_of
from statefulnn.inspect.tree import Node, bytes_of, describe, runs_of_equals, tree_of


@dataclasses.dataclass(frozen=True)
class Row:
    """One module in a `Summary`; the numbers are those of one of `repeats` equal ones.

    Attributes:
        path: the module's dotted name, "" for the model.
        name: what is shown, such as ``h`` or ``0-11``.
        cls: the name of its class.
        depth: how deep it lies in the model.
        repeats: how many equal neighbours the row stands for.
        calls: how often one call of the model calls it; None without inputs.
        output: what it returned, with a ``jax.ShapeDtypeStruct`` for each array; a tuple of that if it
            is called several times with different results.
        parameters: how many numbers its parameters hold, each tied one once.
        trainable: how many of them are trained.
        buffers: how many numbers its buffers hold.
        nbytes: the bytes of both.
        flops: floating-point operations of all its calls; None without inputs.
        ties: (name, first name) of parameters that have another name before this one.
        shared: the first name of a module that has several; the numbers are there.
        unused: whether the call called neither the module nor one in it.
        read: whether the call computed with its parameters or buffers.
        without_shape: names of lazy parameters of unknown shape.
        stranger: what to say of a module that the call calls and the model does not have: "not registered"
            (built in forward, hidden in a list, or from outside), or that `nn.Ref` refers to it. The
            row of the model does not count its parameters. "" for all others.
    """

    path: str
    name: str
    cls: str
    depth: int
    repeats: int
    calls: int | None
    output: Any
    parameters: int
    trainable: int
    buffers: int
    nbytes: int
    flops: int | None
    ties: tuple[tuple[str, str], ...] = ()
    shared: str | None = None
    unused: bool = False
    read: bool = False
    without_shape: tuple[str, ...] = ()
    stranger: str = ""

    @property
    def output_shape(self) -> str:
        """The shapes in the output as text."""
        return "" if self.calls in (None, 0) else describe(self.output)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A table of the modules of a model: print it, or read its rows.

    Attributes:
        rows: a `Row` for each module, parents before children; equal neighbours share one.
        total: the row of the model.
        activations: the bytes of all outputs of the layers; None without inputs.
        width: how many columns the text takes at most; None for as many as the terminal has.
    """

    rows: tuple[Row, ...]
    activations: int | None = None
    width: int | None = None

    @property
    def total(self) -> Row:
        return self.rows[0]

    def __str__(self) -> str:
        width = self.width or shutil.get_terminal_size((100, 24)).columns
        return "\n".join((*_lines(self, width), *footer(self)))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from statefulnn.inspect.html import html_of_summary

        return html_of_summary(self)


def summary(
    model: Module,
    *inputs: object,
    depth: int | None = None,
    width: int | None = None,
    **kwargs: object,
) -> Summary:
    """Return a table of a model's modules: outputs, parameters, memory, floating-point operations.

    The model is called once on shapes (``jax.make_jaxpr``), on a copy: nothing is computed, and nothing of
    the model changes. Its hooks run, unless one keeps what it is given. Equal neighbours, such as the blocks
    of a list, share a row.

    Operations are those of one forward pass: ``2 * m * n * k`` for a product of matrices or a convolution,
    otherwise one for each element; a scan counts each of its steps, a ``while_loop`` one, of the branches
    of a ``cond`` the dearest. What only moves numbers, and integer arithmetic, count nothing.

    Args:
        model: a Module; it may be on the meta device, or lazy.
        inputs: what it is called with, arrays or ``jax.ShapeDtypeStruct``; without any, the table
            has no outputs and no operations.
        depth: how deep modules are shown; None for all.
        width: the width of the text; None for that of the terminal.
        kwargs: keyword arguments of the call.

    Returns:
        a `Summary`: print it, show it in a notebook, or read ``rows`` and ``total``.

    Example:
        >>> import jax, statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> table = nn.summary(model, jax.ShapeDtypeStruct((4, 8), "float32"), width=80)
        >>> print(table)
        layer         output   parameters  bytes  FLOPs
        ───────────────────────────────────────────────
        Sequential    (4, 2)          178  712 B  1.4 k
        ├─ 0: Linear  (4, 16)         144  576 B  1.1 k
        ├─ 1: ReLU    (4, 16)           0      0     64
        └─ 2: Linear  (4, 2)           34  136 B    264
        ───────────────────────────────────────────────
        178 parameters, all trained: 712 B
        1,416 FLOPs a call; outputs of the layers take 544 B
        >>> table.total.parameters, table.rows[1].output.shape
        (178, (4, 16))
    """
    require_module(model, "nn.summary")
    habits.refuse_sizes("nn.summary", model, inputs, kwargs)
    trace = trace_of(model, inputs, kwargs) if inputs or kwargs else None
    rows: list[Row] = []
    todo: list[tuple[int, list[Node]]] = [(0, [tree_of(model, trace)])]
    while todo:
        level, group = todo.pop()
        rows.append(_row(group, level, trace))
        if depth is None or level < depth:
            todo += [(level + 1, g) for g in reversed(runs_of_equals(group[0].children))]
    layers = [c for c in trace.calls.values() if not c.children] if trace else []
    activations = sum(c.times * bytes_of(c.output) for c in layers) if trace else None
    return Summary(tuple(rows), activations, width)


def _row(group: list[Node], level: int, trace: Trace | None) -> Row:
    node, last = group[0], group[-1]
    outputs = [call.output for call in node.calls]
    same = len({describe(out) for out in outputs}) == 1
    return Row(
        path=node.path,
        name=node.name if last is node or not node.name else f"{node.name}-{last.name}",
        cls=node.cls,
        depth=level,
        repeats=len(group),
        calls=None if trace is None else sum(call.times for call in node.calls),
        output=outputs[0] if same else tuple(outputs),
        parameters=node.parameters,
        trainable=node.trainable,
        buffers=node.buffers,
        nbytes=node.nbytes,
        flops=None if trace is None else node.flops,
        ties=tuple((h.name, h.tied) for h in node.own if h.tied is not None),
        shared=node.shared,
        unused=trace is not None and not node.is_called,
        read=node.read,
        without_shape=tuple(node.without_shape),
        stranger=node.stranger,
    )


# --------------------------------------------------------------------------------------------------
# Text


def title(row: Row) -> str:
    """Return the name of a row, its class and how often it stands for one."""
    return (
        (f"{row.name}: " if row.name else "")
        + row.cls
        + (f" × {row.repeats}" if row.repeats > 1 else "")
    )


def remarks(row: Row) -> list[str]:
    """Return what is to be said of a row beside its numbers."""
    said = [f"{name} is {first}" for name, first in row.ties]
    said += [row.stranger] if row.stranger else []
    if row.shared is not None:
        said.append(f"is {row.shared or 'the model'}")
    elif row.unused and row.parameters:
        said.append("used by its parent" if row.read else "not called")
    elif row.calls is not None and row.calls > 1:
        said.append(f"{row.calls} calls")
    return said


def columns(summary: Summary) -> dict[str, list[str]]:
    """Return the columns of numbers, as text by title; those that say nothing are left out."""
    rows, unknown = summary.rows, ["?" if r.without_shape else "" for r in summary.rows]
    shared = [r.shared is not None for r in rows]

    def column(values: list[str]) -> list[str]:
        return ["" if s else u or v for s, u, v in zip(shared, unknown, values, strict=True)]

    found = {"parameters": column([f"{r.parameters:,}" for r in rows])}
    if summary.total.trainable != summary.total.parameters:
        found["trained"] = column([f"{r.trainable:,}" for r in rows])
    if summary.total.buffers:
        found["buffers"] = column([f"{r.buffers:,}" for r in rows])
    found["bytes"] = column([in_bytes(r.nbytes) for r in rows])
    if summary.total.flops is not None:
        flops = ["" if r.unused or r.shared is not None else brief(r.flops or 0) for r in rows]
        found["output"] = [r.output_shape for r in rows]
        found["FLOPs"] = flops
    return found


def footer(summary: Summary) -> list[str]:
    """Return the lines under the table."""
    total = summary.total
    frozen = total.parameters - total.trainable
    trained = ", all trained" if total.parameters else ""
    if frozen:
        trained = f", {total.trainable:,} trained, {frozen:,} frozen"
    buffers = f", and {total.buffers:,} numbers in buffers" if total.buffers else ""
    lines = [f"{total.parameters:,} parameters{trained}{buffers}: {in_bytes(total.nbytes)}"]
    if any(row.stranger == "not registered" and row.parameters for row in summary.rows):
        lines.append("What is not registered is neither trained nor saved, and not counted here.")
    if total.without_shape:
        lines.append(
            f"not counted, since their shapes are not known: {', '.join(total.without_shape)}"
        )
    if total.flops is not None:
        memory = in_bytes(summary.activations or 0)
        lines.append(f"{total.flops:,} FLOPs a call; outputs of the layers take {memory}")
    if any(row.repeats > 1 for row in summary.rows):
        lines.append("Rows with × show one of several equal modules.")
    return lines


def _branches(rows: tuple[Row, ...]) -> list[str]:
    """Return the lines that lead to each row, as a tree has them."""
    found, open_ = [], set()  # the levels on which another row will come
    for row in reversed(rows):
        deeper = "".join("│  " if level in open_ else "   " for level in range(1, row.depth))
        end = "├─ " if row.depth in open_ else "└─ "
        found.append(deeper + end if row.depth else "")
        open_ = {level for level in open_ if level < row.depth} | {row.depth}
    return found[::-1]


def _lines(summary: Summary, width: int) -> list[str]:
    notes = ["".join(f"  ({said})" for said in remarks(row)) for row in summary.rows]
    branches = _branches(summary.rows)
    names = [b + title(r) + n for b, r, n in zip(branches, summary.rows, notes, strict=True)]
    table = columns(summary)
    output = table.pop("output", None)
    table = {"layer": names, **({"output": output} if output else {}), **table}
    widths = {head: max(map(len, (head, *cells))) for head, cells in table.items()}

    def too_wide() -> int:
        return sum(widths.values()) + 2 * (len(widths) - 1) - width

    def shrink(head: str, least: int) -> None:
        if too_wide() > 0 and head in widths:
            widths[head] = max(min(least, widths[head]), widths[head] - too_wide())

    shrink("output", 36)
    shrink("layer", 36)
    for head in ("bytes", "buffers", "trained"):
        if too_wide() > 0:
            widths.pop(head, None)
    shrink("output", 20)
    shrink("layer", min(36, 10 + max(map(len, notes))))
    shrink("output", 8)
    shrink("layer", 16)

    def cut(text: str, room: int, note: str) -> str:
        if len(text) <= room:
            return text
        note = (
            note if len(note) <= room - 8 else ""
        )  # what the name is cut for, unless nothing is left
        return text[: room - 1 - len(note)] + "…" + note

    def line(cells: dict[str, str], note: str = "") -> str:
        parts = []
        for head, room in widths.items():
            text = cut(cells[head], room, note if head == "layer" else "")
            parts.append(text.ljust(room) if head in ("layer", "output") else text.rjust(room))
        return "  ".join(parts).rstrip()

    rule = "─" * (sum(widths.values()) + 2 * (len(widths) - 1))
    body = [line({h: table[h][i] for h in widths}, note) for i, note in enumerate(notes)]
    return [line({h: h for h in widths}), rule, *body, rule]
