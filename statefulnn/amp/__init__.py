"""Low precision: autocast and gradient scaling under torch's names, float32 masters, jmp's policies."""

from statefulnn.amp.autocast import autocast
from statefulnn.amp.grad_scaler import GradScaler
from statefulnn.amp.master_weights import master_weights
from statefulnn.amp.policy import policy
from statefulnn.core.listing import listing

__all__ = ["GradScaler", "autocast", "master_weights", "policy"]
__dir__ = listing(globals())
