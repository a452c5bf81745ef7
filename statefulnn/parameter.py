"""Parameters and buffers under the names of ``torch.nn.parameter``."""

from statefulnn.core.listing import listing
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.core.uninitialized import UninitializedBuffer, UninitializedParameter, is_lazy

__all__ = ["Buffer", "Parameter", "UninitializedBuffer", "UninitializedParameter", "is_lazy"]
__dir__ = listing(globals())
