"""Utilities around modules: parametrized, normalised, pruned and fused weights, clipped gradients."""

from statefulnn.modules.utils import (
    consume_prefix_in_state_dict_if_present as consume_prefix_in_state_dict_if_present,
)
from statefulnn.utils import parametrizations as parametrizations
from statefulnn.utils import parametrize as parametrize
from statefulnn.utils import prune as prune
from statefulnn.utils import rnn as rnn
from statefulnn.utils import stateless as stateless
from statefulnn.utils.clip_grad import clip_grad_norm as clip_grad_norm
from statefulnn.utils.clip_grad import clip_grad_norm_ as clip_grad_norm_
from statefulnn.utils.clip_grad import clip_grad_value_ as clip_grad_value_
from statefulnn.utils.clip_grad import clip_grads_with_norm_ as clip_grads_with_norm_
from statefulnn.utils.clip_grad import get_total_norm as get_total_norm
from statefulnn.utils.convert_parameters import parameters_to_vector as parameters_to_vector
from statefulnn.utils.convert_parameters import vector_to_parameters as vector_to_parameters
from statefulnn.utils.fusion import fuse_conv_bn_eval as fuse_conv_bn_eval
from statefulnn.utils.fusion import fuse_conv_bn_weights as fuse_conv_bn_weights
from statefulnn.utils.fusion import fuse_linear_bn_eval as fuse_linear_bn_eval
from statefulnn.utils.fusion import fuse_linear_bn_weights as fuse_linear_bn_weights
from statefulnn.utils.materialize import skip_init as skip_init
from statefulnn.utils.memory_format import (
    convert_conv2d_weight_memory_format as convert_conv2d_weight_memory_format,
)
from statefulnn.utils.memory_format import (
    convert_conv3d_weight_memory_format as convert_conv3d_weight_memory_format,
)
from statefulnn.utils.spectral_norm import remove_spectral_norm as remove_spectral_norm
from statefulnn.utils.spectral_norm import spectral_norm as spectral_norm
from statefulnn.utils.weight_norm import remove_weight_norm as remove_weight_norm
from statefulnn.utils.weight_norm import weight_norm as weight_norm
