"""Finding the parameters that the functions of this package are asked to change."""

from __future__ import annotations

from typing import Any

from statefulnn.core.box import unwrap
from statefulnn.core.errors import UninitializedParameterError, explain
from statefulnn.core.module import Module
from statefulnn.core.parameter import Parameter
from statefulnn.core.placement import is_meta


def numbers_of(tensor: object, what: str) -> Any:
    """Return the array of a box, and anything else as it is; raise if it is on the meta device.

    Args:
        tensor: the box or array.
        what: what was done with it, to begin the message with.
    """
    value = unwrap(tensor)
    if is_meta(value):
        raise UninitializedParameterError(
            explain(
                f"{what}, which is on the meta device",
                "what is computed from its numbers is not known, since it has none",
                "first nn.materialize(model), or module.to_empty(device=...) and load_state_dict",
            )
        )
    return value


def parameter_of(
    module: Module, name: str, function: str, missing: type = AttributeError
) -> Parameter:
    """Return a parameter of a module.

    Args:
        module: the module.
        name: of a parameter of its own.
        function: what to call the caller in messages.
        missing: the class of the error if there is none.
    """
    if name not in module._parameters:
        raise missing(
            explain(
                f"{function} of {name!r} of {type(module).__name__}",
                f"'{type(module).__name__}' has no parameter '{name}' of its own",
                "name one of named_parameters(recurse=False)",
            )
        )
    parameter: Any = module._parameters[name]
    if parameter is None:
        raise ValueError(
            explain(
                f"{function} of {name!r} of {type(module).__name__}",
                f"{function} cannot be applied as parameter `{name}` is None",
                "build the layer with that parameter, or leave it as it is",
            )
        )
    if hasattr(type(parameter), "materialize"):
        raise ValueError(
            explain(
                f"{function} of {name!r} of {type(module).__name__}",
                f"The module passed to {function} can't have uninitialized parameters: their shape is "
                "not known yet",
                "call the module once on an example first",
            )
        )
    return parameter
