"""Utilities around modules: parametrized, normalised, pruned and fused weights, clipped gradients."""

from statefulnn.core.listing import listing
from statefulnn.modules.utils import consume_prefix_in_state_dict_if_present
from statefulnn.utils import parametrizations, parametrize, prune, rnn, stateless
from statefulnn.utils.clip_grad import (
    clip_grad_norm,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from statefulnn.utils.convert_parameters import parameters_to_vector, vector_to_parameters
from statefulnn.utils.fusion import (
    fuse_conv_bn_eval,
    fuse_conv_bn_weights,
    fuse_linear_bn_eval,
    fuse_linear_bn_weights,
)
from statefulnn.utils.materialize import skip_init
from statefulnn.utils.memory_format import (
    convert_conv2d_weight_memory_format,
    convert_conv3d_weight_memory_format,
)
from statefulnn.utils.spectral_norm import remove_spectral_norm, spectral_norm
from statefulnn.utils.weight_norm import remove_weight_norm, weight_norm

__all__ = [
    "clip_grad_norm",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "consume_prefix_in_state_dict_if_present",
    "convert_conv2d_weight_memory_format",
    "convert_conv3d_weight_memory_format",
    "fuse_conv_bn_eval",
    "fuse_conv_bn_weights",
    "fuse_linear_bn_eval",
    "fuse_linear_bn_weights",
    "get_total_norm",
    "parameters_to_vector",
    "parametrizations",
    "parametrize",
    "prune",
    "remove_spectral_norm",
    "remove_weight_norm",
    "rnn",
    "skip_init",
    "spectral_norm",
    "stateless",
    "vector_to_parameters",
    "weight_norm",
]
__dir__ = listing(globals())
