"""Attention beyond one function: which kernel may serve it, causal biases, scores and masks by functions.

The names are those of ``torch.nn.attention``.
"""

from statefulnn.attention import bias as bias
from statefulnn.attention import flex_attention as flex_attention
from statefulnn.attention.backend import SDPBackend as SDPBackend
from statefulnn.attention.backend import sdpa_kernel as sdpa_kernel
