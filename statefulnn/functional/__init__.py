"""Pure functions under the names and arguments of ``torch.nn.functional``.

Arrays in, arrays out; a Parameter or Buffer is taken wherever an array is. Each function checks shapes
and dtypes in Python and is then one compiled call.
"""

from typing import TYPE_CHECKING, Any

from statefulnn.core import habits
from statefulnn.core.listing import listing
from statefulnn.functional import _autocast
from statefulnn.functional.activation import (
    gelu,
    glu,
    hardshrink,
    hardsigmoid,
    hardswish,
    logsigmoid,
    mish,
    sigmoid,
    silu,
    softplus,
    softshrink,
    softsign,
    tanh,
    tanhshrink,
)
from statefulnn.functional.adaptive_pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool1d_with_indices,
    adaptive_max_pool2d,
    adaptive_max_pool2d_with_indices,
    adaptive_max_pool3d,
    adaptive_max_pool3d_with_indices,
)
from statefulnn.functional.attention import scaled_dot_product_attention
from statefulnn.functional.avg_pooling import avg_pool1d, avg_pool2d, avg_pool3d
from statefulnn.functional.batch_norm import (
    batch_norm,
    batch_norm_with_stats,
    instance_norm,
    instance_norm_with_stats,
)
from statefulnn.functional.binary_cross_entropy import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    multilabel_soft_margin_loss,
    soft_margin_loss,
)
from statefulnn.functional.conv import conv1d, conv2d, conv3d, conv_tbc
from statefulnn.functional.conv_transpose import (
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from statefulnn.functional.cross_entropy import cross_entropy, nll_loss
from statefulnn.functional.ctc_loss import ctc_loss
from statefulnn.functional.distance import cosine_similarity, normalize, pairwise_distance, pdist
from statefulnn.functional.dropout import (
    alpha_dropout,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
)
from statefulnn.functional.embedding import embedding
from statefulnn.functional.embedding_bag import embedding_bag
from statefulnn.functional.fold import fold, unfold
from statefulnn.functional.fractional_pooling import (
    fractional_max_pool2d,
    fractional_max_pool2d_with_indices,
    fractional_max_pool3d,
    fractional_max_pool3d_with_indices,
)
from statefulnn.functional.grid_sampling import affine_grid, grid_sample
from statefulnn.functional.grouped_mm import grouped_mm
from statefulnn.functional.inplace import (
    celu_,
    elu_,
    hardtanh_,
    leaky_relu_,
    relu_,
    rrelu_,
    selu_,
    threshold_,
)
from statefulnn.functional.interpolation import (
    interpolate,
    upsample,
    upsample_bilinear,
    upsample_nearest,
)
from statefulnn.functional.kl_div import kl_div
from statefulnn.functional.linear import bilinear, linear
from statefulnn.functional.linear_cross_entropy import linear_cross_entropy
from statefulnn.functional.local_response_norm import local_response_norm
from statefulnn.functional.loss import (
    gaussian_nll_loss,
    huber_loss,
    l1_loss,
    mse_loss,
    poisson_nll_loss,
    smooth_l1_loss,
)
from statefulnn.functional.lp_pooling import lp_pool1d, lp_pool2d, lp_pool3d
from statefulnn.functional.margin_loss import (
    cosine_embedding_loss,
    hinge_embedding_loss,
    margin_ranking_loss,
    multi_margin_loss,
    multilabel_margin_loss,
)
from statefulnn.functional.multi_head import multi_head_attention_forward
from statefulnn.functional.normalization import group_norm, layer_norm, rms_norm
from statefulnn.functional.one_hot import one_hot
from statefulnn.functional.padding import pad
from statefulnn.functional.pixel_shuffle import (
    channel_shuffle,
    native_channel_shuffle,
    pixel_shuffle,
    pixel_unshuffle,
)
from statefulnn.functional.pooling import (
    max_pool1d,
    max_pool1d_with_indices,
    max_pool2d,
    max_pool2d_with_indices,
    max_pool3d,
    max_pool3d_with_indices,
)
from statefulnn.functional.rectifier import (
    celu,
    elu,
    hardtanh,
    leaky_relu,
    prelu,
    relu,
    relu6,
    rrelu,
    selu,
    threshold,
)
from statefulnn.functional.shape import flatten, unflatten
from statefulnn.functional.softmax import gumbel_softmax, log_softmax, softmax, softmin
from statefulnn.functional.triplet_loss import (
    triplet_margin_loss,
    triplet_margin_with_distance_loss,
)
from statefulnn.functional.unpooling import max_unpool1d, max_unpool2d, max_unpool3d

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool1d_with_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d",
    "adaptive_max_pool3d_with_indices",
    "affine_grid",
    "alpha_dropout",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "batch_norm_with_stats",
    "bilinear",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "celu",
    "celu_",
    "channel_shuffle",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_tbc",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cosine_embedding_loss",
    "cosine_similarity",
    "cross_entropy",
    "ctc_loss",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "elu",
    "elu_",
    "embedding",
    "embedding_bag",
    "feature_alpha_dropout",
    "flatten",
    "fold",
    "fractional_max_pool2d",
    "fractional_max_pool2d_with_indices",
    "fractional_max_pool3d",
    "fractional_max_pool3d_with_indices",
    "gaussian_nll_loss",
    "gelu",
    "glu",
    "grid_sample",
    "group_norm",
    "grouped_mm",
    "gumbel_softmax",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "hardtanh_",
    "hinge_embedding_loss",
    "huber_loss",
    "instance_norm",
    "instance_norm_with_stats",
    "interpolate",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "leaky_relu_",
    "linear",
    "linear_cross_entropy",
    "local_response_norm",
    "log_softmax",
    "logsigmoid",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "margin_ranking_loss",
    "max_pool1d",
    "max_pool1d_with_indices",
    "max_pool2d",
    "max_pool2d_with_indices",
    "max_pool3d",
    "max_pool3d_with_indices",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
    "mish",
    "mse_loss",
    "multi_head_attention_forward",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "native_channel_shuffle",
    "nll_loss",
    "normalize",
    "one_hot",
    "pad",
    "pairwise_distance",
    "pdist",
    "pixel_shuffle",
    "pixel_unshuffle",
    "poisson_nll_loss",
    "prelu",
    "relu",
    "relu6",
    "relu_",
    "rms_norm",
    "rrelu",
    "rrelu_",
    "scaled_dot_product_attention",
    "selu",
    "selu_",
    "sigmoid",
    "silu",
    "smooth_l1_loss",
    "soft_margin_loss",
    "softmax",
    "softmin",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
    "threshold",
    "threshold_",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
    "unflatten",
    "unfold",
    "upsample",
    "upsample_bilinear",
    "upsample_nearest",
]
_autocast.apply_rules(globals(), __name__)
__dir__ = listing(globals())

if not TYPE_CHECKING:  # with it, a type checker would take any name for one of the module

    def __getattr__(name: str) -> Any:
        habits.refuse_name(f"module {__name__!r}", name, habits.FUNCTIONAL)
