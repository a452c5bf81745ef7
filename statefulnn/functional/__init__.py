"""Pure functions under the names and arguments of ``torch.nn.functional``.

Arrays in, arrays out; a Parameter or Buffer is taken wherever an array is. Each function checks shapes
and dtypes in Python and is then one compiled call.
"""

from statefulnn.functional.activation import gelu as gelu
from statefulnn.functional.activation import log_softmax as log_softmax
from statefulnn.functional.activation import relu as relu
from statefulnn.functional.activation import sigmoid as sigmoid
from statefulnn.functional.activation import silu as silu
from statefulnn.functional.activation import softmax as softmax
from statefulnn.functional.activation import tanh as tanh
from statefulnn.functional.attention import (
    multi_head_attention_forward as multi_head_attention_forward,
)
from statefulnn.functional.attention import (
    scaled_dot_product_attention as scaled_dot_product_attention,
)
from statefulnn.functional.conv import conv1d as conv1d
from statefulnn.functional.conv import conv2d as conv2d
from statefulnn.functional.dropout import dropout as dropout
from statefulnn.functional.embedding import embedding as embedding
from statefulnn.functional.linear import bilinear as bilinear
from statefulnn.functional.linear import linear as linear
from statefulnn.functional.loss import cross_entropy as cross_entropy
from statefulnn.functional.loss import mse_loss as mse_loss
from statefulnn.functional.normalization import batch_norm as batch_norm
from statefulnn.functional.normalization import batch_norm_with_stats as batch_norm_with_stats
from statefulnn.functional.normalization import layer_norm as layer_norm
from statefulnn.functional.normalization import rms_norm as rms_norm
from statefulnn.functional.pooling import adaptive_avg_pool2d as adaptive_avg_pool2d
from statefulnn.functional.pooling import avg_pool2d as avg_pool2d
from statefulnn.functional.pooling import max_pool2d as max_pool2d
from statefulnn.functional.pooling import max_pool2d_with_indices as max_pool2d_with_indices
from statefulnn.functional.shape import flatten as flatten
