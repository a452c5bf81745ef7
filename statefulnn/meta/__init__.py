"""Learning to learn: inner loops, tasks in parallel, implicit gradients, evolution strategies."""

from statefulnn.core.listing import listing
from statefulnn.meta.adapt import Adapted, adapt
from statefulnn.meta.adapt_until import Stopped, adapt_until
from statefulnn.meta.evolution import PES, es_gradient, pes_gradient, pes_init
from statefulnn.meta.fixed_point import FixedPoint
from statefulnn.meta.implicit import cg, gmres, implicit_gradient, neumann
from statefulnn.meta.inner_optimizer import adam, learning_rates
from statefulnn.meta.loop import loop
from statefulnn.meta.outer import multi_step_weights, reptile_gradient
from statefulnn.meta.per_step import PerStep, per_step
from statefulnn.meta.tasks import over_tasks

__all__ = [
    "PES",
    "Adapted",
    "FixedPoint",
    "PerStep",
    "Stopped",
    "adam",
    "adapt",
    "adapt_until",
    "cg",
    "es_gradient",
    "gmres",
    "implicit_gradient",
    "learning_rates",
    "loop",
    "multi_step_weights",
    "neumann",
    "over_tasks",
    "per_step",
    "pes_gradient",
    "pes_init",
    "reptile_gradient",
]
__dir__ = listing(globals())
