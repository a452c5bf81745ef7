"""Every error and warning the package raises, in one place.

Each class derives from the builtin that fits, so that code written for ``torch.nn`` keeps catching
what it caught. Each message has three parts: what was done, why it cannot work, and the code that
does work; `explain` puts them together.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from statefulnn.core.listing import listing

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ConvergenceError",
    "DivergenceWarning",
    "DtypeError",
    "MissingRngError",
    "NotDifferentiableError",
    "OtherModuleWarning",
    "PicklingError",
    "ReductionError",
    "RegistrationError",
    "RetraceWarning",
    "ShapeError",
    "StaleCaptureWarning",
    "StateDictError",
    "StateWriteError",
    "StatefulnnError",
    "StructureChangeError",
    "TakenNameError",
    "TraceLeakError",
    "UninitializedModuleError",
    "UninitializedParameterError",
    "UnknownAttributeError",
    "UnknownNameError",
    "UntrainedLeavesWarning",
    "UnusedModuleError",
]
__dir__ = listing(globals())


def explain(what: str, why: str, instead: str) -> str:
    """Join the three parts of a message: what was done, why it cannot work, what does work."""
    return f"{what}\n  Why: {why}\n  Instead: {instead}"


def name_of(subject: str | Callable[[], str]) -> str:
    """Return the name of what a message is about; a function that gives it is asked only then."""
    return str(subject() if callable(subject) else subject)


# Modules of Python's that call back into this package for the user.
_BETWEEN = {"copy", "copyreg", "pickle"}


def _frames() -> Iterator[tuple[FrameType, int]]:
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("statefulnn.", "jax.")) and name not in _BETWEEN:
            yield frame, level - 1
        frame, level = frame.f_back, level + 1


def caller() -> str:
    """Return file:line of the nearest frame outside this package and JAX."""
    for frame, _ in _frames():
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return "an unknown place"


def called_by(*libraries: str) -> bool:
    """Say whether the nearest frame outside this package belongs to one of these libraries, or its copies."""
    frame, _ = next(_frames(), (None, 0))
    name = "" if frame is None else frame.f_globals.get("__name__", "")
    return not set(libraries).isdisjoint(name.split("."))


def user_stack_level() -> int:
    """Return the `stacklevel` that points a warning of the calling function at the user's line."""
    for _, level in _frames():
        return level
    return 2


class StatefulnnError(Exception):
    """Base of all errors of this package."""


class StateWriteError(StatefulnnError, RuntimeError):
    """A write that nobody would keep: into a read-only clone, or in a pure call."""


class TraceLeakError(StatefulnnError, RuntimeError):
    """A traced value that would outlive its trace, or a write that would happen at trace time only."""


class StructureChangeError(StatefulnnError, RuntimeError):
    """A module whose structure or static attributes changed inside a traced call."""


class RegistrationError(StatefulnnError, TypeError):
    """A value that cannot be registered where it was put, or would not be found there."""


class ArgumentError(StatefulnnError, TypeError):
    """An argument of another kind than the function takes."""


class UnknownAttributeError(StatefulnnError, AttributeError):
    """A name of torch's, Flax's or optax's that is written in another way here."""


class UninitializedModuleError(StatefulnnError, AttributeError):
    """A module used before ``super().__init__()`` ran."""


class UninitializedParameterError(StatefulnnError, RuntimeError, ValueError):
    """A parameter used before it had a shape, or numbers."""


class MissingRngError(StatefulnnError, RuntimeError):
    """A random draw that has no generator it may advance."""


class UnknownNameError(StatefulnnError, KeyError):
    """A name, or a filter, that matches nothing in the module."""

    def __str__(self) -> str:  # KeyError shows the repr of its argument, newlines and all
        return str(self.args[0]) if self.args else ""


class TakenNameError(StatefulnnError, KeyError):
    """A name that something else has already."""

    __str__ = UnknownNameError.__str__


class ShapeError(StatefulnnError, RuntimeError, ValueError):
    """Arrays whose shapes do not fit."""


class DtypeError(StatefulnnError, RuntimeError, TypeError):
    """Arrays whose dtypes do not fit."""


class StateDictError(StatefulnnError, RuntimeError):
    """A state dict that does not fit the module."""


class CheckpointError(StatefulnnError, RuntimeError):
    """A file that is not what it should be, or something a file cannot hold."""


class UnusedModuleError(StatefulnnError, RuntimeError):
    """A gradient with respect to a module that the loss never read."""


class StaleCaptureWarning(UserWarning):
    """A parameter or buffer was changed after compiled code had taken its value as a constant."""


class RetraceWarning(UserWarning):
    """One static attribute keeps causing compilations."""


class ConvergenceError(StatefulnnError, RuntimeError):
    """A solver that did not reach its tolerance."""


class NotDifferentiableError(StatefulnnError, ValueError):
    """A derivative is wanted that does not exist, or that is useless."""


class ReductionError(StatefulnnError, ValueError):
    """The loss of a batch is not the mean, or the sum, of the losses of its examples."""


class PicklingError(StatefulnnError, pickle.PicklingError):
    """What a pickle refers to by name is not found under this name."""


class DivergenceWarning(RuntimeWarning):
    """Numbers of a task, or of a training run, that are no longer finite."""


class OtherModuleWarning(UserWarning):
    """An optimizer was given gradients of a module that is not the one it trains."""


class UntrainedLeavesWarning(UserWarning):
    """Numbers that look trained and are not: zeros in a gradient, or layers of another library."""
