"""ATen's operators as functions of arrays: one file a topic, one table of all."""

from statefulnn.bridge.torch.operators import (
    arithmetic,
    control_flow,
    creation,
    gradients,
    indexing,
    linear_algebra,
    network,
    reductions,
    views,
)
from statefulnn.bridge.torch.operators._table import OPERATORS as OPERATORS
from statefulnn.bridge.torch.operators._table import find as find
