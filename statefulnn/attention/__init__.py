"""Attention beyond one function: which kernel may serve it, causal biases, scores and masks by functions.

The names are those of ``torch.nn.attention``.
"""

from statefulnn.attention import bias, flex_attention
from statefulnn.attention.backend import SDPBackend, sdpa_kernel
from statefulnn.core.listing import listing

__all__ = ["SDPBackend", "bias", "flex_attention", "sdpa_kernel"]
__dir__ = listing(globals())
