"""What a node of torch.export's graph says: which operator it is, and which line it comes from."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from statefulnn.bridge.torch import tracing
from statefulnn.bridge.torch.errors import ConversionError
from statefulnn.bridge.torch.tracing import Call
from statefulnn.core.errors import explain

# torch notes also the frames in which this package follows a forward.
_OUR_OWN = tracing.__file__


def is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") or name.startswith("__i")


def operator_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def entry_of(target: Any, custom: dict[Any, Any]) -> Any:
    """Return the operator's name in our table, or the function that the user gave for it."""
    if target in custom:
        return custom[target]
    packet = getattr(target, "overloadpacket", None)
    if packet is not None and packet in custom:
        return custom[packet]
    if not isinstance(target, torch._ops.OpOverload):
        return f"{getattr(target, '__module__', '')}.{operator_name(target)}"
    space, name = target._schema.name.split("::")
    if is_in_place(name):
        name = name.removeprefix("__i").removesuffix("__") if name.startswith("__i") else name[:-1]
    overload = target._overloadname
    prefix = "" if space == "aten" else f"{space}::"
    return f"{prefix}{name}.{overload}"


def place_of(node: Any, call: Call) -> str:
    """Say which line of the user's code a node comes from."""
    module = (
        f"{call.path!r} ({type(call.module).__name__})" if call.path else type(call.module).__name__
    )
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    frames = [s.strip() for s in lines if s.strip().startswith("File ") and _OUR_OWN not in s]
    place = frames[-1] if frames else ""
    code = lines[-1].strip() if place and lines[-2].strip() == place else ""
    return ", ".join(x for x in (module, place, code) if x)


def unclear_view(where: str) -> ConversionError:
    return ConversionError(
        explain(
            f"found an in-place operator on the result of reshape or flatten ({where})",
            "whether that shares memory with what it was made from depends on the layout of the tensor",
            "write it without the in-place operator, or use view() or clone()",
        )
    )


def written_constant(where: str) -> ConversionError:
    return ConversionError(
        explain(
            f"found an in-place operator on a tensor that is no buffer ({where})",
            "it lives on between two calls: in an attribute, or in an object that one refers to. Only "
            "parameters and buffers have a place in the converted module, so what is written would be lost",
            "self.register_buffer(name, tensor), and write to self.name; or clone() it first",
        )
    )


def layout_of_memory(where: str) -> ConversionError:
    return ConversionError(
        explain(
            f"found as_strided on a tensor that is not contiguous ({where})",
            "it looks at how numbers lie in torch's memory, and arrays have no such layout",
            "call contiguous() first, or use unfold(), transpose() and slices",
        )
    )


def number_of_array(where: str) -> ConversionError:
    return ConversionError(
        explain(
            f"found a number of Python's made of an array ({where})",
            "in compiled code the numbers in an array are not known",
            "keep it an array: no .item(), int() or float() in forward",
        )
    )


def unknown_size(what: str, where: str) -> ConversionError:
    return ConversionError(
        explain(
            f"found {what} ({where})",
            "how large its result is depends on the numbers in an array, which compiled code does not know",
            "keep the shape, torch.where(mask, a, b) or x * mask; or pad to as many as there can be, with a "
            "mask of those that count; or do it before the model (there jnp.unique and jnp.nonzero take "
            "size=), and give it the result",
        )
    )


def depends_on_numbers(value: Any) -> bool:
    """Say whether the size of what an operator gives is no function of the sizes it was given."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(v is not None and free_unbacked_symbols(v) for v in values)


def counts_places(node: Any) -> bool:
    """Say whether an operator writes a row of numbers to the places of a mask: how many does it take?"""
    if operator_name(node.target) not in ("index_put", "index_put_", "_index_put_impl_"):
        return False
    x, indices, values = (*node.args, *node.kwargs.values())[:3]
    indices = [None if i is None else i.meta["val"] for i in indices]
    masks = [i for i in indices if i is not None and i.dtype == torch.bool and i.ndim]
    if not masks:
        return False
    if sum(i is not None for i in indices) > 1:
        return True
    after = x.meta["val"].ndim - (len(indices) - 1) - masks[0].ndim
    shape = values.meta["val"].shape
    return len(shape) > after and shape[len(shape) - after - 1] != 1


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether one tensor is a view of the other: with the layout of the example, as torch decided."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
