"""statefulnn: torch.nn's object model on JAX."""

from statefulnn.core import errors as errors
from statefulnn.core.box import Buffer
from statefulnn.core.box import Parameter
from statefulnn.core.errors import DtypeError as DtypeError
from statefulnn.core.errors import MissingRngError as MissingRngError
from statefulnn.core.errors import RegistrationError as RegistrationError
from statefulnn.core.errors import RetraceWarning as RetraceWarning
from statefulnn.core.errors import ShapeError as ShapeError
from statefulnn.core.errors import StaleCaptureWarning as StaleCaptureWarning
from statefulnn.core.errors import StatefulnnError as StatefulnnError
from statefulnn.core.errors import StateDictError as StateDictError
from statefulnn.core.errors import StateWriteError as StateWriteError
from statefulnn.core.errors import StructureChangeError as StructureChangeError
from statefulnn.core.errors import TraceLeakError as TraceLeakError
from statefulnn.core.errors import UninitializedModuleError as UninitializedModuleError
from statefulnn.core.errors import UnknownNameError as UnknownNameError
from statefulnn.core.errors import UnusedModuleError as UnusedModuleError
from statefulnn.core.generator import Generator as Generator
from statefulnn.core.generator import default_generator as default_generator
from statefulnn.core.generator import get_rng_state as get_rng_state
from statefulnn.core.generator import initial_seed as initial_seed
from statefulnn.core.generator import manual_seed as manual_seed
from statefulnn.core.generator import rng_scope as rng_scope
from statefulnn.core.generator import set_rng_state as set_rng_state
from statefulnn.core.moduledef import ModuleDef
from statefulnn.core.graph import merge
from statefulnn.core.graph import mutable
from statefulnn.core.graph import split
from statefulnn.core.module import Module as Module
from statefulnn.core.module import Ref as Ref
from statefulnn.core.module import (
    register_module_forward_hook as register_module_forward_hook,
)
from statefulnn.core.module import (
    register_module_forward_pre_hook as register_module_forward_pre_hook,
)
from statefulnn.core.module import (
    register_module_full_backward_hook as register_module_full_backward_hook,
)
from statefulnn.core.module import (
    register_module_full_backward_pre_hook as register_module_full_backward_pre_hook,
)
from statefulnn.transforms.audit import audit as audit
from statefulnn.transforms.capture import capture as capture
from statefulnn.transforms.functional_call import functional_call as functional_call
from statefulnn.transforms.functional_call import functionalize as functionalize
from statefulnn.transforms.functional_call import stack_module_state as stack_module_state
from statefulnn.transforms.functional_call import statefulize as statefulize
from statefulnn.transforms.grad import grad as grad
from statefulnn.transforms.grad import value_and_grad as value_and_grad
from statefulnn.transforms.jit import jit as jit
from statefulnn.transforms.remat import remat as remat
from statefulnn.transforms.scan import scan as scan
from statefulnn.transforms.vmap import vmap as vmap

try:
    from statefulnn.modules import *  # noqa: F403
    from statefulnn import functional, init
except ImportError:
    pass
try:
    from statefulnn.optimizer import Optimizer as Optimizer
except ImportError:
    pass
