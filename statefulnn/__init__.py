"""torch.nn's object model on JAX: write models as classes, compile and transform them as functions."""

import gc
import importlib
from typing import TYPE_CHECKING, Any

# What an import makes stays: a collection meanwhile would look through all of JAX and free nothing.
_collecting = gc.isenabled()
gc.disable()
try:
    from statefulnn import attention, functional, init, modules, optim, parameter, utils
    from statefulnn.core import errors, habits
    from statefulnn.core.default_dtype import default_dtype, get_default_dtype, set_default_dtype
    from statefulnn.core.errors import *  # noqa: F403
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
    from statefulnn.core.listing import listing
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
    from statefulnn.modules import *  # noqa: F403
    from statefulnn.optim import Optimizer
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
finally:
    if _collecting:
        gc.enable()

if TYPE_CHECKING:
    from statefulnn import (
        amp,
        averaging,
        bridge,
        curvature,
        func,
        lora,
        meta,
        parallel,
        quantization,
    )
    from statefulnn import io as io
    from statefulnn.averaging import AveragedModel, lerp_, update_bn
    from statefulnn.ensemble import Ensemble
    from statefulnn.inspect import explore, summary
    from statefulnn.io import Checkpointer, export, load, load_exported, save
    from statefulnn.layer_stack import LayerStack
    from statefulnn.quantization import quantize
    from statefulnn.transforms.loops import map as map

__all__ = [
    "AveragedModel",
    "Buffer",
    "Checkpointer",
    "Ensemble",
    "Generator",
    "LayerStack",
    "Module",
    "ModuleDef",
    "Optimizer",
    "Parameter",
    "Ref",
    "UninitializedBuffer",
    "UninitializedParameter",
    "amp",
    "associative_scan",
    "attention",
    "audit",
    "averaging",
    "bridge",
    "capture",
    "checkify",
    "cond",
    "curvature",
    "custom_vjp",
    "default_dtype",
    "default_generator",
    "device",
    "errors",
    "explore",
    "export",
    "fori_loop",
    "func",
    "functional",
    "functional_call",
    "functionalize",
    "get_default_dtype",
    "get_rng_state",
    "grad",
    "init",
    "initial_seed",
    "jit",
    "lerp_",
    "load",
    "load_exported",
    "lora",
    "manual_seed",
    "materialize",
    "merge",
    "meta",
    "modules",
    "mutable",
    "next_key",
    "optim",
    "parallel",
    "parameter",
    "parameters_to_vector",
    "quantization",
    "quantize",
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
    "remat",
    "rng_scope",
    "save",
    "scan",
    "set_default_dtype",
    "set_rng_state",
    "shard_map",
    "split",
    "stack_module_state",
    "statefulize",
    "summary",
    "switch",
    "update_bn",
    "utils",
    "value_and_grad",
    "vector_to_parameters",
    "vmap",
    "while_loop",
]
__all__ += errors.__all__
__all__ += modules.__all__

__version__ = "0.1.0"

# Built on top, and imported when first used: modules, and names out of modules. `io` and `map` are not in
# `__all__`, so that ``from statefulnn import *`` leaves Python's own.
_LATER = (
    "amp",
    "averaging",
    "bridge",
    "curvature",
    "func",
    "io",
    "lora",
    "meta",
    "parallel",
    "quantization",
)
_LATER_NAMES = {
    "Ensemble": "ensemble",
    "LayerStack": "layer_stack",
    "map": "transforms.loops",
    "quantize": "quantization",
    **dict.fromkeys(("AveragedModel", "lerp_", "update_bn"), "averaging"),
    **dict.fromkeys(("explore", "summary"), "inspect"),
    **dict.fromkeys(("Checkpointer", "export", "load", "load_exported", "save"), "io"),
}

if not TYPE_CHECKING:  # with it, a type checker would take any name for one of the package

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return importlib.import_module(f"statefulnn.{name}")
        if name in _LATER_NAMES:
            return getattr(importlib.import_module(f"statefulnn.{_LATER_NAMES[name]}"), name)
        habits.refuse_name(f"module {__name__!r}", name, habits.of_package(name, functional))


__dir__ = listing(globals(), "io", "map")
