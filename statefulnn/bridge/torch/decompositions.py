"""Operators that have no function here, as the simpler ones that torch itself makes them of."""

from __future__ import annotations

from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from statefulnn.bridge.torch.tracing import CUSTOM

# Those of torch's programs for its compilers that are taken, since tests compare them with the operators: not
# all compute the same, for one that of multilabel_margin_loss.
_COMPARED = (
    "addr diagonal_copy dist heaviside ldexp logaddexp2 max_unpool2d max_unpool3d multi_margin_loss "
    "mvlgamma renorm soft_margin_loss special_entr special_ndtr special_xlog1py unfold_copy view_copy"
).split()


def decomposed(node: torch.fx.Node) -> torch.fx.GraphModule | None:
    """Return a graph that computes what an operator does, of its arguments that are nodes, or None.

    An operator may be made of others in torch's own code, or there is a program for it in Python.
    """
    nodes = list(node.all_input_nodes)
    values = [n.meta.get("val") for n in nodes]
    if not all(isinstance(v, (torch.Tensor, torch.SymInt)) for v in values):
        return None
    target: Any = node.target

    def run(*given: Any) -> Any:
        of = dict(zip(nodes, given, strict=True))
        fill = lambda x: map_arg(x, lambda n: of[n])
        return target(*fill(node.args), **fill(node.kwargs))

    tables: list[dict[Any, Any]] = [{}]
    if str(target).split(".")[1] in _COMPARED and target in decomposition_table:
        tables.append({target: decomposition_table[target]})
    for table in tables:
        try:
            with torch.no_grad():
                graph = make_fx(run, decomposition_table=table)(*values)
        except Exception:  # it looks at numbers: then it is named as missing
            continue
        inner: list[Any] = [n for n in graph.graph.nodes if n.op == "call_function"]
        if any(n.target is target for n in inner):
            continue
        for n in inner:  # they belong to the line of code that the operator belongs to
            for key in ("stack_trace", CUSTOM):
                if key in node.meta:
                    n.meta[key] = node.meta[key]
        return graph
    return None
