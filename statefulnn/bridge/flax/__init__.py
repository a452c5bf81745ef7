"""Flax: Linen and NNX modules as ours, and ours as theirs. It needs the extra ``flax``."""

from statefulnn.core.extras import import_extra
from statefulnn.core.listing import listing

import_extra("flax", "flax", "imported statefulnn.bridge.flax", "defines the modules it takes")

from statefulnn.bridge.flax.linen import from_linen, linen_variables, to_linen  # noqa: E402
from statefulnn.bridge.flax.nnx import from_nnx, nnx_module, to_nnx  # noqa: E402

__all__ = ["from_linen", "from_nnx", "linen_variables", "nnx_module", "to_linen", "to_nnx"]
__dir__ = listing(globals())
