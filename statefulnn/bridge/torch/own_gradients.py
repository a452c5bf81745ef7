"""The backward of a torch.autograd.Function: traced beside the forward, which does not tell its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from statefulnn.bridge.torch.errors import ConversionError
from statefulnn.core.errors import explain


class _Context:
    """What forward and backward of a Function are given as ``ctx``."""

    needs_input_grad: tuple[bool, ...] = ()
    saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    save_for_forward = save_for_backward

    @property
    def saved_variables(self) -> tuple[Any, ...]:
        return self.saved_tensors

    def mark_dirty(self, *_: Any) -> None:
        raise _Dirty

    def mark_non_differentiable(self, *_: Any) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


class _Dirty(Exception):
    """A Function that writes to its arguments."""


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def traced_backward(
    function: Any, args: tuple[Any, ...], outputs: tuple[Any, ...], line: Callable[[], str]
) -> torch.fx.GraphModule:
    """Return a graph of the arguments that are tensors and the gradients of the floating outputs.

    It gives a gradient for each argument that is a floating tensor.

    Args:
        function: the class of the Function.
        args: what it is applied to.
        outputs: what that gave.
        line: the line of the user's code, for messages.

    Raises:
        ConversionError: for code that cannot be followed.
    """
    count = sum(isinstance(x, torch.Tensor) for x in args)

    def backward(*given: Any) -> tuple[Any, ...]:
        tensors = iter(given[:count])
        own = [next(tensors) if isinstance(x, torch.Tensor) else x for x in args]
        context = _Context()
        context.needs_input_grad = tuple(map(_is_float, own))
        if function.setup_context is torch.autograd.Function.setup_context:
            found = function.forward(context, *own)
        else:
            found = function.forward(*own)
            function.setup_context(context, tuple(own), found)
        found = found if isinstance(found, tuple) else (found,)
        some = iter(given[count:])
        by_output = [
            next(some)
            if _is_float(x)
            else torch.zeros_like(x)
            if isinstance(x, torch.Tensor)
            else None
            for x in found
        ]
        slopes = function.backward(context, *by_output)
        slopes = slopes if isinstance(slopes, tuple) else (slopes,)
        pairs = [(g, x) for g, x in zip(slopes, own, strict=False) if _is_float(x)]
        return tuple(torch.zeros_like(x) if g is None else g * 1 for g, x in pairs)

    try:
        with disable_proxy_modes_tracing(), torch.no_grad():
            inputs = [x.detach() for x in args if isinstance(x, torch.Tensor)]
            gradients = [torch.empty_like(x) for x in outputs if _is_float(x)]
            return make_fx(backward)(*inputs, *gradients)
    except Exception as error:
        why = (
            "it writes to its arguments"
            if isinstance(error, _Dirty)
            else f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        )
        raise ConversionError(
            explain(
                f"could not follow the backward of {function.__name__}, a torch.autograd.Function{line()}",
                why,
                "write what it computes with operators of torch, and x + (y - x).detach() for y with the "
                "gradient of x",
            )
        ) from error
