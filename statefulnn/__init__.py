"""torch.nn's object model on JAX: write models as classes, compile and transform them as functions."""

from statefulnn import functional, init, utils
from statefulnn.core import errors
from statefulnn.core.box import Buffer, Parameter
from statefulnn.core.errors import (
    DtypeError,
    MissingRngError,
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
    UnknownNameError,
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
from statefulnn.modules import *  # noqa: F403
from statefulnn.modules.containers import (
    Lambda,
    ModuleDict,
    ModuleList,
    ParameterDict,
    ParameterList,
    Sequential,
)
from statefulnn.optimizer import Optimizer
from statefulnn.transforms.audit import audit
from statefulnn.transforms.capture import capture
from statefulnn.transforms.functional_call import (
    functional_call,
    functionalize,
    stack_module_state,
    statefulize,
)
from statefulnn.transforms.grad import grad, value_and_grad
from statefulnn.transforms.jit import jit
from statefulnn.transforms.remat import remat
from statefulnn.transforms.scan import scan
from statefulnn.transforms.vmap import vmap
from statefulnn.utils import parameters_to_vector, vector_to_parameters

__version__ = "0.1.0"
