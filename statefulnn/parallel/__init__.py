"""Models on many devices: where parameters and batches lie, under torch's names. JAX does the rest.

A mesh names devices, a plan says how each array is split over it, and ``nn.jit`` keeps every parameter and
slot where it is put. XLA adds the communication.
"""

from statefulnn.core.listing import listing
from statefulnn.parallel.mesh import init_device_mesh, shard_batch
from statefulnn.parallel.placing import data_parallel, fully_shard, parallelize_module
from statefulnn.parallel.plan import Plan
from statefulnn.parallel.styles import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
)

__all__ = [
    "ColwiseParallel",
    "ParallelStyle",
    "Plan",
    "RowwiseParallel",
    "SequenceParallel",
    "data_parallel",
    "fully_shard",
    "init_device_mesh",
    "parallelize_module",
    "shard_batch",
]
__dir__ = listing(globals())
