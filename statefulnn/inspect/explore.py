"""nn.explore: a model as one page, with its modules, what flows between them, and their numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from statefulnn.core import habits
from statefulnn.core.graph import require_module
from statefulnn.core.module import Module
from statefulnn.inspect.html import asset
from statefulnn.inspect.statistics import Statistics, sharding_of, statistics_of
from statefulnn.inspect.trace import Call, Trace
from statefulnn.inspect.trace import trace as trace_of
from statefulnn.inspect.tree import Held, Node, bytes_of, describe, tree_of


def explore(
    model: Module,
    *inputs: object,
    path: str | Path = "model.html",
    values: bool = True,
    **kwargs: object,
) -> Path:
    """Write one page that shows a model, and return its path.

    The page has the tree of modules, to fold and to search; a drawing of what flows between them, with
    shapes; for each module its parameters, memory and floating-point operations; and for each array a
    histogram. It needs nothing beside itself: no network, no server.

    The model is called once on shapes, as in `nn.summary`: nothing is computed, and nothing of it changes.

    Args:
        model: a Module; it may be on the meta device, or lazy.
        inputs: what it is called with, arrays or ``jax.ShapeDtypeStruct``; without any, nothing flows.
        path: where the page is written.
        values: whether the numbers in parameters and buffers are looked at.
        kwargs: keyword arguments of the call.

    Returns:
        the path, as ``pathlib.Path``; ``webbrowser.open(path.absolute().as_uri())`` shows the page.

    Example:
        >>> import jax, statefulnn as nn, tempfile, pathlib
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = jax.ShapeDtypeStruct((4, 8), "float32")
        >>> page = nn.explore(model, x, path=pathlib.Path(tempfile.mkdtemp()) / "model.html")
        >>> page.read_text()[:15]
        '<!doctype html>'
    """
    require_module(model, "nn.explore")
    habits.refuse_sizes("nn.explore", model, inputs, kwargs)
    trace = trace_of(model, inputs, kwargs) if inputs or kwargs else None
    page = asset("page.html")
    parts = {
        "title": escape(type(model).__name__),
        "style": asset("page.css"),
        "script": asset("layout.js") + asset("page.js"),
        # A name of a module must not end the script that it stands in.
        "data": json.dumps(_data(model, trace, values)).replace("<", "\\u003c"),
    }
    head, *rest = page.split("{{")
    filled = (parts[name] + text for name, text in (part.split("}}", 1) for part in rest))
    path = Path(path)
    path.write_text(head + "".join(filled), "utf-8")
    return path


def _data(model: Module, trace: Trace | None, values: bool) -> dict[str, Any]:
    root = tree_of(model, trace)
    statistics: dict[int, Statistics | str] = {}
    if values:
        boxes = [held for held in root.boxes.values() if held.shape is not None]
        statistics = {
            id(held.box): statistics_of(held.box._value) for held in _progress(boxes, "explore")
        }
    modules: list[dict[str, Any]] = []
    numbers: dict[int, int] = {}  # by call
    signatures: dict[int, int] = {}
    todo: list[tuple[Node, int | None]] = [(root, None)]
    while todo:
        node, parent = todo.pop()
        numbers.update((call.number, len(modules)) for call in node.calls)
        signatures.update((call.number, node.signature) for call in node.calls)
        todo += [(child, len(modules)) for child in reversed(node.children)]
        modules.append(_module(node, parent, statistics))
    calls = trace.calls if trace else {}
    return {
        "modules": modules,
        "calls": {n: _call(c, calls, numbers, signatures) for n, c in calls.items()},
        "traced": trace is not None,
    }


def _progress(items: list[Held], label: str) -> Iterable[Held]:
    """Show a bar where it takes longer than two seconds, and where there is a library to draw it."""
    if importlib.util.find_spec("tqdm") is None:
        return items
    from tqdm import tqdm

    return tqdm(items, label, delay=2, unit="array")


def _module(
    node: Node, parent: int | None, statistics: dict[int, Statistics | str]
) -> dict[str, Any]:
    layers = [call for call in node.calls if not call.children]
    return {
        "path": node.path,
        "name": f"{node.name} ({node.stranger})".strip() if node.stranger else node.name,
        "cls": node.cls,
        "extra": node.module.extra_repr(),
        "mode": "training" if node.module.training else "eval",
        "parent": parent,
        "shared": node.shared,
        "parameters": node.parameters,
        "trainable": node.trainable,
        "buffers": node.buffers,
        "bytes": node.nbytes,
        "flops": node.flops,
        "activations": sum(c.times * bytes_of(c.output) for c in layers),
        "unknown": node.without_shape,
        "calls": [call.number for call in node.calls],
        "arrays": [_array(held, statistics.get(id(held.box))) for held in node.own],
    }


def _array(held: Held, found: Statistics | str | None) -> dict[str, Any]:
    kind = "buffer" if not held.is_parameter else "parameter" if held.trainable else "frozen"
    return {
        "name": held.name,
        "shape": "no shape yet" if held.shape is None else str(held.shape),
        "dtype": str(held.dtype),
        "size": held.size,
        "bytes": held.nbytes,
        "kind": kind,
        "tied": held.tied,
        "sharding": None if held.shape is None else sharding_of(held.box._value),
        "why": found if isinstance(found, str) else None,
        "numbers": _finite(found) if isinstance(found, Statistics) else None,
    }


def _finite(found: Statistics) -> dict[str, Any]:
    # JSON has no infinity, which the deviation of very large numbers may be.
    numbers = dataclasses.asdict(found)
    return {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in numbers.items()
    }


def _call(
    call: Call, calls: dict[int, Call], numbers: dict[int, int], signatures: dict[int, int]
) -> dict[str, Any]:
    args, kwargs = call.inputs
    given = [describe(x) for x in args] + [f"{k}={describe(v)}" for k, v in kwargs.items()]
    return {
        "module": numbers.get(call.number),
        "cls": call.cls,
        "parent": call.parent,
        "inputs": ", ".join(given),
        "output": describe(call.output),
        "flops": call.flops,
        "times": call.times,
        "children": call.children,
        "operations": call.operations,
        "edges": [[a, b, shape] for (a, b), shape in call.edges.items()],
        "stacks": list(_stacks(call, calls, signatures)),
    }


def _stacks(call: Call, calls: dict[int, Call], signatures: dict[int, int]) -> Iterator[list[int]]:
    """Yield runs of equal calls that may be drawn as one: what leaves them leaves the last one."""

    def may_follow(run: list[int], number: int) -> bool:
        before, after = run[-1], number
        return (
            before in signatures
            and after in signatures
            and signatures[before] == signatures[after]
            and calls[run[-1]].output is not None
            and describe(calls[run[-1]].output) == describe(calls[number].output)
        )

    targets: dict[int | str, set[int | str]] = {}
    for source, target in call.edges:
        targets.setdefault(source, set()).add(target)
    runs: list[list[int]] = []
    for number in call.children:
        if (
            runs
            and may_follow(runs[-1], number)
            and targets.get(runs[-1][-1], set()) <= {number, "out"}
        ):
            runs[-1].append(number)
        else:
            runs.append([number])
    return (run for run in runs if len(run) > 2)
