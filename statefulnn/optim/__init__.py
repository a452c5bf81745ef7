"""An optax transformation, or several, as a module that steps the parameters of another."""

from typing import TYPE_CHECKING, Any

from statefulnn.core import habits
from statefulnn.core.listing import listing
from statefulnn.optim.optimizer import Adaptation, Optimizer

__all__ = ["Adaptation", "Optimizer"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        habits.refuse_name(f"module {__name__!r}", name, habits.OPTIM)


__dir__ = listing(globals())
