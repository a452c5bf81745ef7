"""Who owns what, and who may write it (laws 4 and 5).

Terms
  Scope       who owns a set of boxes and modules: the trace they were built in, and whether anybody
              will keep what is written to them. The user's own objects have no scope.

Writes go through `check_write`: nothing is written that would be lost, and no traced value is written
where it would outlive its trace.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

from statefulnn.core import compat, refusals
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.refusals import Reason, Subject
from statefulnn.core.stamps import Stamp

if TYPE_CHECKING:
    from statefulnn.core.moduledef import ModuleDef

# One active transformation of JAX's, which has no public class for it; `core.compat` asks about them.
Trace: TypeAlias = object


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
        *("_trace", "birth", "lost", "moduledef", "read", "stepped", "stop_gradients", "writable"),
    )

    def __init__(
        self,
        writable: bool = True,
        lost: Reason | None = None,
        moduledef: ModuleDef | None = None,
        birth: bool = False,
    ) -> None:
        # Weak: a box that outlives its trace must not keep all that was traced alive.
        self._trace = weakref.ref(current_trace())
        self.birth = birth
        self.writable = writable
        self.lost = lost
        self.moduledef = moduledef
        self.read = False  # whether any parameter of the scope was read
        self.stop_gradients = False
        self.stepped: list[Any] = []  # steps of optimizers that were built in the same trace

    @property
    def trace(self) -> Trace | None:
        """The trace the scope was opened in, or None once it has ended."""
        return self._trace()

    def leaf_name(self, position: int) -> str | None:
        """Return the dotted name of the box at a leaf position."""
        return None if self.moduledef is None else self.moduledef.leaf_names[position]


class ModuleBase:
    """The slots of a Module, apart from its attributes; `core.module.Module` is the class to use."""

    __slots__ = ("__dict__", "__weakref__", "_nn_stamp", "_nn_home", "_nn_plan", "_nn_shell")

    _nn_stamp: Stamp
    _nn_home: Any  # a node number, or (weak reference to the parent, name); for messages only
    _nn_plan: Any
    _nn_shell: Any
    _modules: Any

    def _nn_settle(self) -> None:
        """Bring up to date what is stored; called before anybody walks it."""

    def _nn_shown(self) -> dict[str, Any]:
        """Return the children by the names that users know, where they are not stored under these."""
        return self._modules

    def _nn_child(self, name: str) -> Any:
        """Return the child of a name if it is there, without building it."""
        return real_dict(self)["_modules"].get(name)


# Module intercepts assignment, so the slots are written through their descriptors.
set_stamp = ModuleBase.__dict__["_nn_stamp"].__set__
set_home = ModuleBase.__dict__["_nn_home"].__set__
set_plan = ModuleBase.__dict__["_nn_plan"].__set__
set_shell = ModuleBase.__dict__["_nn_shell"].__set__
# `module.__dict__` builds what is still a shell; this does not.
real_dict = ModuleBase.__dict__["__dict__"].__get__


def birth_scope() -> Scope | None:
    """Return the owner of what is built here: the current trace, or the user outside every trace."""
    return None if current_trace() is EAGER else Scope(birth=True)


def check_write(scope: Scope | None, value: object, subject: Subject) -> None:
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
        # Law 4: whoever built these clones will not look at them again.
        if not scope.writable:
            raise refusals.write_would_be_lost(subject, scope.lost)
        owner = scope.trace
        # What user code built inside a trace and kept beyond it is the user's from then on.
        if owner is None and scope.birth:
            owner = EAGER

    between = compat.between(trace, owner)
    if between is None:
        raise refusals.owner_has_ended(subject)
    # A staged function runs once and is called often, so even a plain value would come too late. Under
    # autodiff and vmap the line runs at every call: there only traced values do harm.
    if any(compat.kind(t) == "staged" for t in between):
        raise refusals.write_while_tracing(subject)
    # Law 5: a value of a trace further in than the owner would still be there when that trace is over. A
    # value of the owner's own trace, or of one around it, lives long enough.
    if isinstance(value, Tracer):
        home = compat.trace_of(value)
        if home in between or not compat.may_be_around(home, owner):
            raise refusals.value_would_outlive_its_trace(subject)
