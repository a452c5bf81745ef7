"""nn.capture: the outputs of submodules as a result, not a side effect."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from statefulnn.core import compat
from statefulnn.core.errors import TraceLeakError, UnknownNameError, explain
from statefulnn.core.graph import require_module
from statefulnn.core.hooks import active
from statefulnn.core.module import Module


def capture(
    module: Module, names: Iterable[str] | str | None = None, method: str = "forward"
) -> Callable:
    """Return a function that calls a module and also returns what its submodules put out.

    Args:
        module: the module to call.
        names: dotted names of the submodules to record; None records all.
        method: the method to call.

    Returns:
        a function of the module's inputs that returns ``(out, outputs)``. `outputs` maps the name of
        each submodule that was called to its output, or to the tuple of its outputs, in order, if it
        was called several times.

    Raises:
        UnknownNameError: for names of no submodule.
        TraceLeakError: for a submodule that is called inside an inner transformation.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> out, outputs = nn.capture(model)(jnp.ones((4, 2)))
        >>> {name: y.shape for name, y in outputs.items()}
        {'0': (4, 3), '1': (4, 3)}
    """
    require_module(module, "nn.capture")
    if isinstance(names, str):
        names = (names,)
    wanted = None if names is None else tuple(names)
    if wanted is not None:
        known = {name for name, _ in module.named_modules(remove_duplicate=False)}
        unknown = [n for n in wanted if n not in known]
        if unknown or not wanted:
            raise UnknownNameError(
                explain(
                    f"nn.capture was asked for {unknown or 'no names'}",
                    f"{type(module).__name__} has the submodules {sorted(known - {''})}",
                    "use the names of named_modules()",
                )
            )

    def call(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        labels = {
            id(m): name
            for name, m in reversed(list(module.named_modules(remove_duplicate=False)))
            if name and (wanted is None or name in wanted)
        }
        outputs: dict[str, list[Any]] = {}
        here = list(compat.chain(compat.current_trace()))

        def listener(called: Any, out: Any) -> None:
            name = labels.get(id(called))
            if name is None:
                return
            for leaf in jax.tree_util.tree_leaves(out):
                home = compat.trace_of(leaf)
                if home is not None and home not in here:
                    raise TraceLeakError(
                        explain(
                            f"nn.capture met {name!r} inside an inner transformation (vmap, scan, "
                            "grad, remat ...)",
                            "its output does not exist outside of it",
                            "capture inside the inner function and return the outputs from it, or "
                            "leave the name out: nn.capture(model, names=[...])",
                        )
                    )
            outputs.setdefault(name, []).append(out)

        before, active.captures = active.captures, (*active.captures, listener)
        try:
            out = (
                module(*args, **kwargs)
                if method == "forward"
                else getattr(module, method)(*args, **kwargs)
            )
        finally:
            active.captures = before
        return out, {n: v[0] if len(v) == 1 else tuple(v) for n, v in outputs.items()}

    return call
