"""torch.nn's object model on JAX: write models as classes, compile and transform them as functions."""

import importlib
from typing import TYPE_CHECKING, Any

from statefulnn import attention, functional, init, parameter, utils
from statefulnn.core import errors
from statefulnn.core.errors import (
    CheckpointError,
    ConvergenceError,
    DivergenceWarning,
    DtypeError,
    MissingRngError,
    NotDifferentiableError,
    PicklingError,
    RegistrationError,
    RetraceWarning,
    ShapeError,
    StaleCaptureWarning,
    StateDictError,
    StatefulnnError,
    StateWriteError,
    StructureChangeError,
    TraceLeakError,
    UninitializedModuleError,
    UninitializedParameterError,
    UnknownNameError,
    UntrainedLeavesWarning,
    UnusedModuleError,
)
from statefulnn.core.generator import (
    Generator,
    default_generator,
    get_rng_state,
    initial_seed,
    manual_seed,
    next_key,
    rng_scope,
    set_rng_state,
)
from statefulnn.core.graph import merge, mutable, split
from statefulnn.core.module import (
    Module,
    Ref,
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from statefulnn.core.moduledef import ModuleDef
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.core.placement import device
from statefulnn.core.uninitialized import UninitializedBuffer, UninitializedParameter
from statefulnn.modules import (
    CELU,
    ELU,
    GELU,
    GLU,
    GRU,
    LSTM,
    RNN,
    SELU,
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveLogSoftmaxWithLoss,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AlphaDropout,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BCELoss,
    BCEWithLogitsLoss,
    Bilinear,
    ChannelShuffle,
    CircularPad1d,
    CircularPad2d,
    CircularPad3d,
    ConstantPad1d,
    ConstantPad2d,
    ConstantPad3d,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    CosineEmbeddingLoss,
    CosineSimilarity,
    CrossEntropyLoss,
    CrossMapLRN2d,
    CTCLoss,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    Embedding,
    EmbeddingBag,
    FeatureAlphaDropout,
    Flatten,
    Fold,
    FractionalMaxPool2d,
    FractionalMaxPool3d,
    GaussianNLLLoss,
    GroupNorm,
    GRUCell,
    Hardshrink,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    HingeEmbeddingLoss,
    HuberLoss,
    Identity,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    KLDivLoss,
    L1Loss,
    Lambda,
    LayerNorm,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyConv1d,
    LazyConv2d,
    LazyConv3d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
    LazyConvTranspose3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
    LazyLinear,
    LeakyReLU,
    Linear,
    LinearCrossEntropyLoss,
    LinearCrossEntropyOptions,
    LocalResponseNorm,
    LogSigmoid,
    LogSoftmax,
    LPPool1d,
    LPPool2d,
    LPPool3d,
    LSTMCell,
    MarginRankingLoss,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool1d,
    MaxUnpool2d,
    MaxUnpool3d,
    Mish,
    ModuleDict,
    ModuleList,
    MSELoss,
    MultiheadAttention,
    MultiLabelMarginLoss,
    MultiLabelSoftMarginLoss,
    MultiMarginLoss,
    NLLLoss,
    NLLLoss2d,
    PairwiseDistance,
    ParameterDict,
    ParameterList,
    PixelShuffle,
    PixelUnshuffle,
    PoissonNLLLoss,
    PReLU,
    ReflectionPad1d,
    ReflectionPad2d,
    ReflectionPad3d,
    ReLU,
    ReLU6,
    ReplicationPad1d,
    ReplicationPad2d,
    ReplicationPad3d,
    RMSNorm,
    RNNBase,
    RNNCell,
    RNNCellBase,
    RReLU,
    Sequential,
    Sigmoid,
    SiLU,
    SmoothL1Loss,
    SoftMarginLoss,
    Softmax,
    Softmax2d,
    Softmin,
    Softplus,
    Softshrink,
    Softsign,
    SyncBatchNorm,
    Tanh,
    Tanhshrink,
    Threshold,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    TripletMarginLoss,
    TripletMarginWithDistanceLoss,
    Unflatten,
    Unfold,
    Upsample,
    UpsamplingBilinear2d,
    UpsamplingNearest2d,
    ZeroPad1d,
    ZeroPad2d,
    ZeroPad3d,
)
from statefulnn.optimizer import Optimizer
from statefulnn.transforms.audit import audit
from statefulnn.transforms.branches import cond, switch
from statefulnn.transforms.capture import capture
from statefulnn.transforms.checkify import checkify
from statefulnn.transforms.custom_vjp import custom_vjp
from statefulnn.transforms.functional_call import (
    functional_call,
    functionalize,
    stack_module_state,
)
from statefulnn.transforms.grad import grad, value_and_grad
from statefulnn.transforms.jit import jit
from statefulnn.transforms.loops import associative_scan, fori_loop, while_loop
from statefulnn.transforms.remat import remat
from statefulnn.transforms.scan import scan
from statefulnn.transforms.shard_map import shard_map
from statefulnn.transforms.statefulize import statefulize
from statefulnn.transforms.vmap import vmap
from statefulnn.utils import parameters_to_vector, vector_to_parameters
from statefulnn.utils.materialize import materialize

if TYPE_CHECKING:
    from statefulnn import bridge, curvature, func, meta
    from statefulnn.ensemble import Ensemble
    from statefulnn.io import Checkpointer, export, load, load_exported, save
    from statefulnn.transforms.loops import map

__version__ = "0.1.0"

# Built on top, and imported when first used: modules, and names out of modules. `map` is among them so that
# ``from statefulnn import *`` leaves Python's own.
_LATER = ("bridge", "curvature", "func", "io", "meta")
_LATER_NAMES = {
    "Ensemble": "ensemble",
    "map": "transforms.loops",
    **dict.fromkeys(("Checkpointer", "export", "load", "load_exported", "save"), "io"),
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"statefulnn.{name}")
    if name in _LATER_NAMES:
        return getattr(importlib.import_module(f"statefulnn.{_LATER_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_LATER_NAMES})
