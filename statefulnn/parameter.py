"""Parameters and buffers under the names of ``torch.nn.parameter``."""

from statefulnn.core.parameter import Buffer as Buffer
from statefulnn.core.parameter import Parameter as Parameter
from statefulnn.core.uninitialized import UninitializedBuffer as UninitializedBuffer
from statefulnn.core.uninitialized import UninitializedParameter as UninitializedParameter
from statefulnn.core.uninitialized import is_lazy as is_lazy
