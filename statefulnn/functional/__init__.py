"""Pure functions under the names and arguments of ``torch.nn.functional``.

Arrays in, arrays out; a Parameter or Buffer is taken wherever an array is. Each function checks shapes
and dtypes in Python and is then one compiled call.
"""

from statefulnn.functional.activation import gelu as gelu
from statefulnn.functional.activation import glu as glu
from statefulnn.functional.activation import hardshrink as hardshrink
from statefulnn.functional.activation import hardsigmoid as hardsigmoid
from statefulnn.functional.activation import hardswish as hardswish
from statefulnn.functional.activation import logsigmoid as logsigmoid
from statefulnn.functional.activation import mish as mish
from statefulnn.functional.activation import sigmoid as sigmoid
from statefulnn.functional.activation import silu as silu
from statefulnn.functional.activation import softplus as softplus
from statefulnn.functional.activation import softshrink as softshrink
from statefulnn.functional.activation import softsign as softsign
from statefulnn.functional.activation import tanh as tanh
from statefulnn.functional.activation import tanhshrink as tanhshrink
from statefulnn.functional.adaptive_pooling import adaptive_avg_pool1d as adaptive_avg_pool1d
from statefulnn.functional.adaptive_pooling import adaptive_avg_pool2d as adaptive_avg_pool2d
from statefulnn.functional.adaptive_pooling import adaptive_avg_pool3d as adaptive_avg_pool3d
from statefulnn.functional.adaptive_pooling import adaptive_max_pool1d as adaptive_max_pool1d
from statefulnn.functional.adaptive_pooling import (
    adaptive_max_pool1d_with_indices as adaptive_max_pool1d_with_indices,
)
from statefulnn.functional.adaptive_pooling import adaptive_max_pool2d as adaptive_max_pool2d
from statefulnn.functional.adaptive_pooling import (
    adaptive_max_pool2d_with_indices as adaptive_max_pool2d_with_indices,
)
from statefulnn.functional.adaptive_pooling import adaptive_max_pool3d as adaptive_max_pool3d
from statefulnn.functional.adaptive_pooling import (
    adaptive_max_pool3d_with_indices as adaptive_max_pool3d_with_indices,
)
from statefulnn.functional.attention import (
    scaled_dot_product_attention as scaled_dot_product_attention,
)
from statefulnn.functional.avg_pooling import avg_pool1d as avg_pool1d
from statefulnn.functional.avg_pooling import avg_pool2d as avg_pool2d
from statefulnn.functional.avg_pooling import avg_pool3d as avg_pool3d
from statefulnn.functional.batch_norm import batch_norm as batch_norm
from statefulnn.functional.batch_norm import batch_norm_with_stats as batch_norm_with_stats
from statefulnn.functional.batch_norm import instance_norm as instance_norm
from statefulnn.functional.batch_norm import instance_norm_with_stats as instance_norm_with_stats
from statefulnn.functional.binary_cross_entropy import binary_cross_entropy as binary_cross_entropy
from statefulnn.functional.binary_cross_entropy import (
    binary_cross_entropy_with_logits as binary_cross_entropy_with_logits,
)
from statefulnn.functional.binary_cross_entropy import (
    multilabel_soft_margin_loss as multilabel_soft_margin_loss,
)
from statefulnn.functional.binary_cross_entropy import soft_margin_loss as soft_margin_loss
from statefulnn.functional.conv import conv1d as conv1d
from statefulnn.functional.conv import conv2d as conv2d
from statefulnn.functional.conv import conv3d as conv3d
from statefulnn.functional.conv import conv_tbc as conv_tbc
from statefulnn.functional.conv_transpose import conv_transpose1d as conv_transpose1d
from statefulnn.functional.conv_transpose import conv_transpose2d as conv_transpose2d
from statefulnn.functional.conv_transpose import conv_transpose3d as conv_transpose3d
from statefulnn.functional.cross_entropy import cross_entropy as cross_entropy
from statefulnn.functional.cross_entropy import nll_loss as nll_loss
from statefulnn.functional.ctc_loss import ctc_loss as ctc_loss
from statefulnn.functional.distance import cosine_similarity as cosine_similarity
from statefulnn.functional.distance import normalize as normalize
from statefulnn.functional.distance import pairwise_distance as pairwise_distance
from statefulnn.functional.distance import pdist as pdist
from statefulnn.functional.dropout import alpha_dropout as alpha_dropout
from statefulnn.functional.dropout import dropout as dropout
from statefulnn.functional.dropout import dropout1d as dropout1d
from statefulnn.functional.dropout import dropout2d as dropout2d
from statefulnn.functional.dropout import dropout3d as dropout3d
from statefulnn.functional.dropout import feature_alpha_dropout as feature_alpha_dropout
from statefulnn.functional.embedding import embedding as embedding
from statefulnn.functional.embedding_bag import embedding_bag as embedding_bag
from statefulnn.functional.fold import fold as fold
from statefulnn.functional.fold import unfold as unfold
from statefulnn.functional.fractional_pooling import fractional_max_pool2d as fractional_max_pool2d
from statefulnn.functional.fractional_pooling import (
    fractional_max_pool2d_with_indices as fractional_max_pool2d_with_indices,
)
from statefulnn.functional.fractional_pooling import fractional_max_pool3d as fractional_max_pool3d
from statefulnn.functional.fractional_pooling import (
    fractional_max_pool3d_with_indices as fractional_max_pool3d_with_indices,
)
from statefulnn.functional.grid_sampling import affine_grid as affine_grid
from statefulnn.functional.grid_sampling import grid_sample as grid_sample
from statefulnn.functional.grouped_mm import grouped_mm as grouped_mm
from statefulnn.functional.inplace import celu_ as celu_
from statefulnn.functional.inplace import elu_ as elu_
from statefulnn.functional.inplace import hardtanh_ as hardtanh_
from statefulnn.functional.inplace import leaky_relu_ as leaky_relu_
from statefulnn.functional.inplace import relu_ as relu_
from statefulnn.functional.inplace import rrelu_ as rrelu_
from statefulnn.functional.inplace import selu_ as selu_
from statefulnn.functional.inplace import threshold_ as threshold_
from statefulnn.functional.interpolation import interpolate as interpolate
from statefulnn.functional.interpolation import upsample as upsample
from statefulnn.functional.interpolation import upsample_bilinear as upsample_bilinear
from statefulnn.functional.interpolation import upsample_nearest as upsample_nearest
from statefulnn.functional.kl_div import kl_div as kl_div
from statefulnn.functional.linear import bilinear as bilinear
from statefulnn.functional.linear import linear as linear
from statefulnn.functional.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from statefulnn.functional.local_response_norm import local_response_norm as local_response_norm
from statefulnn.functional.loss import gaussian_nll_loss as gaussian_nll_loss
from statefulnn.functional.loss import huber_loss as huber_loss
from statefulnn.functional.loss import l1_loss as l1_loss
from statefulnn.functional.loss import mse_loss as mse_loss
from statefulnn.functional.loss import poisson_nll_loss as poisson_nll_loss
from statefulnn.functional.loss import smooth_l1_loss as smooth_l1_loss
from statefulnn.functional.lp_pooling import lp_pool1d as lp_pool1d
from statefulnn.functional.lp_pooling import lp_pool2d as lp_pool2d
from statefulnn.functional.lp_pooling import lp_pool3d as lp_pool3d
from statefulnn.functional.margin_loss import cosine_embedding_loss as cosine_embedding_loss
from statefulnn.functional.margin_loss import hinge_embedding_loss as hinge_embedding_loss
from statefulnn.functional.margin_loss import margin_ranking_loss as margin_ranking_loss
from statefulnn.functional.margin_loss import multi_margin_loss as multi_margin_loss
from statefulnn.functional.margin_loss import multilabel_margin_loss as multilabel_margin_loss
from statefulnn.functional.multi_head import (
    multi_head_attention_forward as multi_head_attention_forward,
)
from statefulnn.functional.normalization import group_norm as group_norm
from statefulnn.functional.normalization import layer_norm as layer_norm
from statefulnn.functional.normalization import rms_norm as rms_norm
from statefulnn.functional.one_hot import one_hot as one_hot
from statefulnn.functional.padding import pad as pad
from statefulnn.functional.pixel_shuffle import channel_shuffle as channel_shuffle
from statefulnn.functional.pixel_shuffle import native_channel_shuffle as native_channel_shuffle
from statefulnn.functional.pixel_shuffle import pixel_shuffle as pixel_shuffle
from statefulnn.functional.pixel_shuffle import pixel_unshuffle as pixel_unshuffle
from statefulnn.functional.pooling import max_pool1d as max_pool1d
from statefulnn.functional.pooling import max_pool1d_with_indices as max_pool1d_with_indices
from statefulnn.functional.pooling import max_pool2d as max_pool2d
from statefulnn.functional.pooling import max_pool2d_with_indices as max_pool2d_with_indices
from statefulnn.functional.pooling import max_pool3d as max_pool3d
from statefulnn.functional.pooling import max_pool3d_with_indices as max_pool3d_with_indices
from statefulnn.functional.rectifier import celu as celu
from statefulnn.functional.rectifier import elu as elu
from statefulnn.functional.rectifier import hardtanh as hardtanh
from statefulnn.functional.rectifier import leaky_relu as leaky_relu
from statefulnn.functional.rectifier import prelu as prelu
from statefulnn.functional.rectifier import relu as relu
from statefulnn.functional.rectifier import relu6 as relu6
from statefulnn.functional.rectifier import rrelu as rrelu
from statefulnn.functional.rectifier import selu as selu
from statefulnn.functional.rectifier import threshold as threshold
from statefulnn.functional.shape import flatten as flatten
from statefulnn.functional.shape import unflatten as unflatten
from statefulnn.functional.softmax import gumbel_softmax as gumbel_softmax
from statefulnn.functional.softmax import log_softmax as log_softmax
from statefulnn.functional.softmax import softmax as softmax
from statefulnn.functional.softmax import softmin as softmin
from statefulnn.functional.triplet_loss import triplet_margin_loss as triplet_margin_loss
from statefulnn.functional.triplet_loss import (
    triplet_margin_with_distance_loss as triplet_margin_with_distance_loss,
)
from statefulnn.functional.unpooling import max_unpool1d as max_unpool1d
from statefulnn.functional.unpooling import max_unpool2d as max_unpool2d
from statefulnn.functional.unpooling import max_unpool3d as max_unpool3d
