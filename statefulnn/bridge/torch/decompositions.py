"""Operators that have no function here, as the simpler ones that torch itself makes them of."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from statefulnn.bridge.torch.tracing import CUSTOM


def decomposed(node: torch.fx.Node) -> torch.fx.GraphModule | None:
    """Return a graph that computes what an operator does, of its arguments that are nodes, or None."""
    nodes = list(node.all_input_nodes)
    values = [n.meta.get("val") for n in nodes]
    if not all(isinstance(v, torch.Tensor) for v in values):
        return None

    def run(*tensors: Any) -> Any:
        of = dict(zip(nodes, tensors, strict=True))
        fill = lambda x: torch.fx.node.map_arg(x, lambda n: of[n])
        return node.target(*fill(node.args), **fill(node.kwargs))  # type: ignore[operator]

    try:
        with torch.no_grad():
            graph = make_fx(run)(*values)
    except Exception:  # it looks at numbers: then it is named as missing
        return None
    inner = [n for n in graph.graph.nodes if n.op == "call_function"]
    if any(n.target is node.target for n in inner):
        return None
    for n in inner:  # they belong to the line of code that the operator belongs to
        for key in ("stack_trace", CUSTOM):
            if key in node.meta:
                n.meta[key] = node.meta[key]
    return graph
