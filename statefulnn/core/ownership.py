"""Who owns what, and who may write it (laws 4 and 5).

Terms
  Scope       who owns a set of boxes and modules: the trace they were built in, and whether anybody
              will keep what is written to them. The user's own objects have no scope.

Writes go through `check_write`: nothing is written that would be lost, and no traced value is written
where it would outlive its trace.
"""

from __future__ import annotations

import weakref
from typing import Any

from statefulnn.core import compat
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import StateWriteError, TraceLeakError, explain, name_of
from statefulnn.core.stamps import Cell


class Scope:
    """The owner of clones: the trace they live in, and what may be written to them.

    Args:
        writable: whether somebody will collect what is written.
        lost: for read-only scopes, the reason and the remedy, as the two last parts of a message.
        moduledef: the static half of the clones; it knows their names.
        birth: whether this is the trace that user code built a box or module in. Should they outlive
            it, they are the user's.
    """

    __slots__ = (
        "__weakref__",
        "_trace",
        "birth",
        "lost",
        "moduledef",
        "read",
        "stop_gradients",
        "writable",
    )

    def __init__(
        self,
        writable: bool = True,
        lost: tuple[str, str] | None = None,
        moduledef: Any = None,
        birth: bool = False,
    ) -> None:
        self._trace = weakref.ref(current_trace())
        self.birth = birth
        self.writable = writable
        self.lost = lost
        self.moduledef = moduledef
        self.read = False  # whether any parameter of the scope was read
        self.stop_gradients = False

    @property
    def trace(self) -> Any:
        """The trace the scope was opened in, or None once it has ended."""
        return self._trace()

    def name_of(self, position: int) -> str | None:
        """Return the dotted name of the box at a leaf position."""
        return None if self.moduledef is None else self.moduledef.leaf_names[position]


class ModuleBase:
    """The slots of a Module, apart from its attributes; `core.module.Module` is the class to use."""

    __slots__ = ("__dict__", "__weakref__", "_cell", "_home", "_plan", "_shell")

    _cell: Cell
    _home: Any  # a node number, or (weak reference to the parent, name); for messages only
    _plan: Any
    _shell: Any


# Module intercepts assignment, so the slots are written through their descriptors.
set_cell = ModuleBase.__dict__["_cell"].__set__
set_home = ModuleBase.__dict__["_home"].__set__
set_plan = ModuleBase.__dict__["_plan"].__set__
set_shell = ModuleBase.__dict__["_shell"].__set__
real_dict = ModuleBase.__dict__["__dict__"].__get__


def birth_scope() -> Scope | None:
    """Return the owner of what is built here: the current trace, or the user outside every trace."""
    return None if current_trace() is EAGER else Scope(birth=True)


# What a clone that JAX built, and not this package, answers to a write.
LOST_IN_RAW_TRANSFORM = (
    "this module was rebuilt by a plain JAX transformation (jax.jit, jax.grad, jax.vmap, "
    "jax.tree.map ...), which never looks at it again, so the write would be lost",
    "use nn.jit, nn.value_and_grad or nn.vmap, which write back; or a pure call, "
    "functionalize(module, mutable=True); or return the updated module: "
    "module = nn.mutable(module) first, write, and return it. "
    "Call train() and eval() outside the transformation",
)


def check_write(scope: Scope | None, value: Any, subject: Any) -> None:
    """Raise unless a box or module of `scope` may take `value` at this point of the program.

    Args:
        scope: the owner, None for the user's own objects.
        value: what is about to be written; None for a structural or static change.
        subject: what is written to, for the message: a name, or a function that gives it.
    """
    trace = current_trace()
    if scope is None:
        if trace is EAGER and not isinstance(value, Tracer):
            return
        owner = EAGER
    else:
        if not scope.writable:
            why, instead = scope.lost or LOST_IN_RAW_TRANSFORM
            raise StateWriteError(explain(f"wrote to {name_of(subject)}", why, instead))
        owner = scope.trace
        if owner is None and scope.birth:
            owner = EAGER

    between = compat.between(trace, owner)
    if between is None:
        raise TraceLeakError(
            explain(
                f"wrote to {name_of(subject)}",
                "it belongs to a traced call that has ended, or to one that is not around this line",
                "return values from the traced function instead of keeping its modules",
            )
        )
    if any(compat.kind(t) == "staged" for t in between):
        raise TraceLeakError(
            explain(
                f"wrote to {name_of(subject)} inside a function that JAX traces "
                "(jax.jit, lax.scan, lax.cond, jax.checkpoint ...)",
                "the module is not an argument of that function: the write would happen once, while "
                "tracing, and leave a dead tracer or a stale value behind",
                "pass the module as an argument to nn.jit (nn.scan, nn.remat), which writes back; "
                "or return the new value and write it outside",
            )
        )
    if isinstance(value, Tracer):
        home = compat.trace_of(value)
        if home in between or not compat.may_be_around(home, owner):
            raise TraceLeakError(
                explain(
                    f"wrote a traced value to {name_of(subject)}",
                    "the module lives outside the transformation that made the value, so the value "
                    "would outlive its trace",
                    "pass the module as an argument to nn.value_and_grad, nn.vmap or nn.jit, which "
                    "write back; or return the value (has_aux=True) and write it outside",
                )
            )
