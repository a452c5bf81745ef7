"""torch's modules as ours and ours as torch's: needs torch, the extra of that name."""

from statefulnn.core.extras import import_extra
from statefulnn.core.listing import listing

import_extra("torch", "torch", "used nn.bridge.torch", "holds the modules to convert")

from statefulnn.bridge.torch.compare import Comparison, Row, compare  # noqa: E402
from statefulnn.bridge.torch.convert import from_torch, operators  # noqa: E402
from statefulnn.bridge.torch.errors import ConversionError  # noqa: E402
from statefulnn.bridge.torch.graph import Traced  # noqa: E402
from statefulnn.bridge.torch.structures import Output  # noqa: E402
from statefulnn.bridge.torch.to_torch import to_torch  # noqa: E402

__all__ = [
    "Comparison",
    "ConversionError",
    "Output",
    "Row",
    "Traced",
    "compare",
    "from_torch",
    "operators",
    "to_torch",
]
__dir__ = listing(globals())
