"""torch's modules as ours and ours as torch's: needs torch, the extra of that name."""

from statefulnn.core.extras import import_extra

import_extra("torch", "torch", "used nn.bridge.torch", "holds the modules to convert")

from statefulnn.bridge.torch.convert import from_torch as from_torch  # noqa: E402
from statefulnn.bridge.torch.convert import operators as operators  # noqa: E402
from statefulnn.bridge.torch.graph import Traced as Traced  # noqa: E402
from statefulnn.bridge.torch.structures import Output as Output  # noqa: E402
from statefulnn.bridge.torch.to_torch import to_torch as to_torch  # noqa: E402
from statefulnn.bridge.torch.tracing import ConversionError as ConversionError  # noqa: E402
