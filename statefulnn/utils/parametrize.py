"""Parametrizations: a parameter that is computed by modules from others.

``register_parametrization(layer, "weight", Symmetric())`` moves the parameter to
``layer.parametrizations.weight.original``; from then on ``layer.weight`` is an array, computed each time
it is read. Those names are the ones of ``state_dict``, of `functional_call` and of gradients.

Assigning ``layer.weight = array`` writes what the ``right_inverse`` of the parametrizations gives.
Nothing else calls it: a pure call that is given ``parametrizations.weight.original`` uses that as it is.

Source: ``torch.nn.utils.parametrize``. Unlike torch's, parametrized modules can be pickled.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.box import Box, unwrap
from statefulnn.core.compat import Tracer, chain, current_trace, kind
from statefulnn.core.errors import RegistrationError, TakenNameError, explain
from statefulnn.core.listing import listing
from statefulnn.core.module import Module
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.modules.containers import ModuleDict, ModuleList
from statefulnn.utils._computed import (
    Computation,
    Loading,
    add_computation,
    base_of,
    remove_computation,
)
from statefulnn.utils._tensors import numbers_of

__all__ = [
    "ParametrizationList",
    "Parametrized",
    "cached",
    "is_parametrized",
    "register_parametrization",
    "remove_parametrizations",
    "transfer_parametrizations_and_params",
    "type_before_parametrizations",
]
__dir__ = listing(globals())


class _Cache:
    """What was computed inside a ``with cached()`` block.

    Attributes:
        trace: where the block was entered.
        values: for each `ParametrizationList` the trace it was computed in, what it was computed from
            and the result. Clones die with their trace, and their entries with them.
    """

    __slots__ = ("trace", "values")

    def __init__(self) -> None:
        self.trace = weakref.ref(current_trace())
        self.values: weakref.WeakKeyDictionary[Any, tuple] = weakref.WeakKeyDictionary()

    def applies(self) -> bool:
        """Say whether no compiled function began since the block was entered."""
        entered = self.trace()
        for trace in chain(current_trace()):
            if trace is entered:
                return True
            if kind(trace) == "staged":
                return False
        return False

    def get(self, parametrizations: ParametrizationList) -> Any:
        trace = current_trace()
        entry = self.values.get(parametrizations)
        if entry is not None:
            where, sources, value = entry
            if where() is trace and all(box._value is v for box, v in sources):
                return value
        value = parametrizations()
        scope = parametrizations._nn_stamp.scope
        # What a module of an outer trace gives here may be a traced value that would outlive the trace.
        if scope.trace is trace if scope is not None else not isinstance(value, Tracer):
            sources = [
                (box, box._value)
                for m in parametrizations.modules()
                for box in (*m._parameters.values(), *m._buffers.values())
                if box is not None
            ]
            self.values[parametrizations] = (weakref.ref(trace), sources, value)
        return value


_cache: ContextVar[_Cache | None] = ContextVar("cache of parametrizations", default=None)


@contextlib.contextmanager
def cached() -> Iterator[None]:
    """Compute each parametrized tensor only once inside the block, until what it depends on is written.

    Inside a compiled function the block belongs into that function: one around the call does not
    change what is compiled. The values are forgotten at the end of the block.

    Source: ``torch.nn.utils.parametrize.cached``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import parametrizations, parametrize
        >>> layer = parametrizations.weight_norm(nn.Linear(2, 3))
        >>> with parametrize.cached():
        ...     layer.weight is layer.weight
        True
    """
    outer = _cache.get()
    if outer is not None and outer.applies():
        yield
        return
    token = _cache.set(_Cache())
    try:
        yield
    finally:
        _cache.reset(token)


def _is_array(value: object) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, Box))


class ParametrizationList(ModuleList):
    """The parametrizations of one tensor, and what it is computed from.

    `register_parametrization` makes it; it is found at ``module.parametrizations.<name>``.

    Args:
        modules: the parametrizations, the first one first.
        original: the Parameter, Buffer or array that is parametrized.
        unsafe: whether they may change its shape and dtype, which is then not checked.

    Attributes:
        original: the Parameter or array that the first parametrization is called with; or
            ``original0``, ``original1`` ..., if its ``right_inverse`` returns several.

    Raises:
        ValueError: for no modules, and for results of another type, shape or dtype.

    Source: ``torch.nn.utils.parametrize.ParametrizationList``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import parametrizations
        >>> layer = parametrizations.weight_norm(nn.Linear(2, 3))
        >>> layer.parametrizations.weight
        ParametrizationList(
          (0): _WeightNorm()
        )
    """

    original: Any
    unsafe: bool

    def __init__(self, modules: Sequence[Module], original: Any, unsafe: bool = False) -> None:
        modules = list(modules)
        if not modules:
            raise ValueError(
                explain(
                    "made a ParametrizationList of no modules",
                    "ParametrizationList requires one or more modules",
                    "parametrize.register_parametrization(module, name, parametrization)",
                )
            )
        super().__init__(modules)
        self.unsafe = unsafe
        value = unwrap(original)
        shape, dtype = value.shape, value.dtype

        new = value
        for module in reversed(modules):
            inverse = getattr(module, "right_inverse", None)
            if inverse is not None:
                # Without a right inverse the original is taken as it is.
                with contextlib.suppress(NotImplementedError):
                    new = inverse(new)
        several = isinstance(new, (list, tuple))
        if not several and not _is_array(new):
            raise _wrong_result("right_inverse", modules, "an array or a sequence of arrays", new)
        self.is_tensor = not several
        self.ntensors = len(new) if several else 1

        if not several:
            new = unwrap(new)
            if new.dtype != dtype:
                raise _changed("right_inverse", modules, "dtype", dtype, new.dtype)
            if isinstance(original, Parameter):
                if new is not value:
                    original.data = new
                self.register_parameter("original", original)
            else:
                # A tied buffer stays tied: it keeps its box.
                box = original if isinstance(original, Buffer) else Buffer(value)
                if new is not value:
                    box.write(new)
                self.register_buffer("original", box)
        else:
            for i, part in enumerate(new):
                if not _is_array(part):
                    raise _wrong_result("right_inverse", modules, "a sequence of arrays", part)
                if isinstance(original, Parameter):
                    parameter = Parameter(unwrap(part), original.requires_grad)
                    self.register_parameter(f"original{i}", parameter)
                else:
                    self.register_buffer(f"original{i}", Buffer(unwrap(part)))

        if not unsafe:
            _require_like(self(), shape, dtype, modules)

    def right_inverse(self, value: ArrayLike) -> None:
        """Write what the right inverses of all parametrizations, the last one first, make of a value.

        Args:
            value: an array that the parametrized tensor is to be.

        Raises:
            RuntimeError: if a parametrization has no ``right_inverse``.
            ValueError: if one gives something else than at registration.
        """
        modules = list(self)
        value = unwrap(value)
        for module in reversed(modules):
            if not hasattr(module, "right_inverse"):
                raise RuntimeError(
                    explain(
                        "assigned to a parametrized tensor",
                        f"parametrization {type(module).__name__} does not implement right_inverse, "
                        "which tells what to compute the value from",
                        "define right_inverse(self, value) there, or write "
                        "module.parametrizations.<name>.original",
                    )
                )
            value = module.right_inverse(value)
        if self.is_tensor:
            if not _is_array(value):
                raise _wrong_result("right_inverse", modules, "an array", value)
            parts: list[Any] = [value]
            names = ["original"]
        else:
            if not isinstance(value, (list, tuple)):
                raise _wrong_result("right_inverse", modules, "a sequence of arrays", value)
            if len(value) != self.ntensors:
                raise ValueError(
                    explain(
                        f"right_inverse of {_names(modules)} gave a sequence of length {len(value)}",
                        f"it must return a sequence of tensors of length {self.ntensors}, as at "
                        "registration",
                        "return as many arrays as forward takes",
                    )
                )
            parts, names = list(value), [f"original{i}" for i in range(self.ntensors)]
        held = {**self._parameters, **self._buffers}
        boxes = [held[name] for name in names]
        for part, box in zip(parts, boxes, strict=True):
            if not _is_array(part):
                raise _wrong_result("right_inverse", modules, "a sequence of arrays", part)
            if part.dtype != box._value.dtype:
                raise _changed("right_inverse", modules, "dtype", box._value.dtype, part.dtype)
            if part.shape != box._value.shape:
                raise _changed("right_inverse", modules, "shape", box._value.shape, part.shape)
        for part, box in zip(parts, boxes, strict=True):
            box.write(unwrap(part))

    def forward(self) -> jax.Array:
        if self.is_tensor:
            originals = (self.original,)
        else:
            originals = tuple(getattr(self, f"original{i}") for i in range(self.ntensors))
        first, *others = self
        x = first(*map(unwrap, originals))
        for module in others:
            x = module(x)
        return x


def _names(modules: Sequence[Module]) -> str:
    return ", ".join(type(m).__name__ for m in modules)


def _wrong_result(method: str, modules: Sequence[Module], wanted: str, got: object) -> ValueError:
    return ValueError(
        explain(
            f"{method} of {_names(modules)} must return {wanted}. Got {type(got).__name__}",
            "the module holds it in parameters and buffers, or uses it in the parameter's place",
            f"return {wanted}",
        )
    )


def _changed(
    method: str, modules: Sequence[Module], noun: str, before: object, after: object
) -> ValueError:
    return ValueError(
        explain(
            f"{method} of {_names(modules)} gave an array of {noun} {after} for one of {noun} {before}",
            f"a parametrization may not change the {noun} of the tensor",
            "return an array like the one given"
            + (
                ""
                if method == "right_inverse"
                else "; or, if it is meant, register_parametrization(..., unsafe=True)"
            ),
        )
    )


def _require_like(
    value: Any, shape: tuple[int, ...], dtype: np.dtype, modules: Sequence[Module]
) -> None:
    if not _is_array(value):
        raise _wrong_result("forward", modules, "an array", value)
    if value.dtype != dtype:
        raise _changed("forward", modules, "dtype", dtype, value.dtype)
    if value.shape != shape:
        raise _changed("forward", modules, "shape", shape, value.shape)


@dataclass(frozen=True)
class Parametrized(Computation):
    """Computes ``module.<name>`` by ``module.parametrizations.<name>``."""

    name: str
    renames = True

    def __str__(self) -> str:
        return f"the parametrizations of {self.name!r}"

    def read(self, module: Module) -> Any:
        parametrizations = module.parametrizations._modules[self.name]
        cache = _cache.get()
        if cache is not None and cache.applies():
            return cache.get(parametrizations)
        return parametrizations()

    def write(self, module: Module, value: object) -> None:
        if isinstance(value, (Parameter, Buffer)):
            raise TakenNameError(
                explain(
                    f"attribute '{self.name}' already exists",
                    f"{type(module).__name__}.{self.name} is parametrized: it is computed, and holds "
                    "no parameter",
                    f"assign an array, module.{self.name} = array, or replace "
                    f"module.parametrizations.{self.name}.original",
                )
            )
        if not _is_array(value):
            raise RegistrationError(
                explain(
                    f"assigned a {type(value).__name__} to {type(module).__name__}.{self.name}",
                    "it is parametrized, and right_inverse takes an array",
                    "assign jnp.asarray(value), or parametrize.remove_parametrizations first",
                )
            )
        module.parametrizations._modules[self.name].right_inverse(value)

    def before_loading(self, module: Module, given: Loading) -> None:
        for parametrization in module.parametrizations._modules[self.name]:
            convert = getattr(type(parametrization), "_convert_old_names", None)
            if convert is not None:
                parametrization._convert_old_names(self.name, given)


def register_parametrization(
    module: Module, tensor_name: str, parametrization: Module, *, unsafe: bool = False
) -> Module:
    """Have a parameter or buffer computed by a module from here on.

    ``parametrization(original)`` is the new value of ``module.<tensor_name>``, at each reading. If the
    module has a method ``right_inverse(value)``, it gives the original to start from, and makes
    ``module.<tensor_name> = value`` possible; the first parametrization's may return a tuple, the
    members of which forward then takes. Several parametrizations of one tensor are chained.

    Args:
        module: it is changed: its class becomes a subclass, ``ParametrizedLinear`` of ``Linear``.
        tensor_name: the name of its parameter or buffer.
        parametrization: a module from an array to an array of the same shape and dtype.
        unsafe: whether shape and dtype may change; nothing is checked then.

    Returns:
        The module.

    Raises:
        ValueError: if there is no such parameter or buffer, or the parametrization does not fit it.

    Source: ``torch.nn.utils.parametrize.register_parametrization``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> from statefulnn.utils import parametrize
        >>> class Symmetric(nn.Module):
        ...     def forward(self, x):
        ...         return jnp.triu(x) + jnp.triu(x, 1).T
        ...
        ...     def right_inverse(self, a):
        ...         return jnp.triu(a)
        >>> layer = parametrize.register_parametrization(nn.Linear(3, 3), "weight", Symmetric())
        >>> bool((layer.weight == layer.weight.T).all())
        True
        >>> list(layer.state_dict())
        ['bias', 'parametrizations.weight.original']
    """
    if not isinstance(parametrization, Module):
        raise RegistrationError(
            explain(
                f"registered a {type(parametrization).__name__} as a parametrization",
                "a parametrization is a child of the module",
                "pass an instance of nn.Module; a plain function becomes one with nn.Lambda(fn)",
            )
        )
    parametrization.train(module.training)
    if is_parametrized(module, tensor_name):
        parametrizations = module.parametrizations[tensor_name]
        if not unsafe:
            _check_next(module, tensor_name, parametrization)
        parametrizations.append(parametrization)
        parametrizations.unsafe = parametrizations.unsafe or unsafe
        return module
    original = module._parameters.get(tensor_name)
    if original is None:
        original = module._buffers.get(tensor_name)
    if original is None:
        raise ValueError(
            explain(
                f"parametrized {tensor_name!r} of {type(module).__name__}",
                f"Module '{type(module).__name__}' does not have a parameter, a buffer, or a "
                f"parametrized element with name '{tensor_name}'",
                "name one of named_parameters(recurse=False) or named_buffers(recurse=False)",
            )
        )
    numbers_of(original, f"parametrized {tensor_name!r} of {type(module).__name__}")
    module._check_static_write("parametrizations", None)
    parametrizations = ParametrizationList([parametrization], original, unsafe)
    delattr(module, tensor_name)
    if not is_parametrized(module):
        module.parametrizations = ModuleDict()
    module.parametrizations[tensor_name] = parametrizations
    add_computation(module, Parametrized(tensor_name))
    return module


def _check_next(module: Module, name: str, parametrization: Module) -> None:
    """Raise unless a further parametrization keeps shape and dtype, there and back."""
    now = getattr(module, name)
    after = parametrization(now)
    _require_like(after, now.shape, now.dtype, [parametrization])
    if hasattr(parametrization, "right_inverse"):
        try:
            back = parametrization.right_inverse(after)
        except NotImplementedError:
            return
        if not _is_array(back):
            raise _wrong_result("right_inverse", [parametrization], "an array", back)
        if back.dtype != now.dtype:
            raise _changed("right_inverse", [parametrization], "dtype", now.dtype, back.dtype)
        if back.shape != now.shape:
            raise _changed("right_inverse", [parametrization], "shape", now.shape, back.shape)


def is_parametrized(module: Module, tensor_name: str | None = None) -> bool:
    """Say whether a tensor of a module is parametrized, or any of them if no name is given.

    Args:
        module: the module; its children do not count.
        tensor_name: the name of a parameter or buffer.

    Source: ``torch.nn.utils.parametrize.is_parametrized``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import parametrizations, parametrize
        >>> layer = parametrizations.weight_norm(nn.Linear(2, 3))
        >>> parametrize.is_parametrized(layer), parametrize.is_parametrized(layer, "bias")
        (True, False)
    """
    parametrizations = getattr(module, "parametrizations", None)
    if not isinstance(parametrizations, ModuleDict):
        return False
    if tensor_name is None:
        return len(parametrizations) > 0
    return tensor_name in parametrizations


def remove_parametrizations(
    module: Module, tensor_name: str, leave_parametrized: bool = True
) -> Module:
    """Make a parametrized tensor a parameter or buffer again.

    Args:
        module: it is changed.
        tensor_name: the name of the tensor.
        leave_parametrized: whether it keeps its present value; False gives back the original.

    Returns:
        The module.

    Raises:
        ValueError: if it is not parametrized, or there are several originals to give back.

    Source: ``torch.nn.utils.parametrize.remove_parametrizations``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import parametrizations, parametrize
        >>> layer = parametrizations.weight_norm(nn.Linear(2, 3))
        >>> list(parametrize.remove_parametrizations(layer, "weight").state_dict())
        ['bias', 'weight']
    """
    if not is_parametrized(module, tensor_name):
        raise ValueError(
            explain(
                f"removed the parametrizations of {tensor_name!r} of {type(module).__name__}",
                f"{type(module).__name__} does not have a parametrization on {tensor_name}",
                "ask parametrize.is_parametrized(module, name) first",
            )
        )
    parametrizations = module.parametrizations[tensor_name]
    if not parametrizations.is_tensor and not leave_parametrized:
        raise ValueError(
            explain(
                f"remove_parametrizations(module, {tensor_name!r}, leave_parametrized=False)",
                "it is computed from a sequence of tensors, none of which is the original",
                "leave_parametrized=True, which keeps the present value",
            )
        )
    module._check_static_write(tensor_name, None)
    held = {**parametrizations._parameters, **parametrizations._buffers}
    if parametrizations.is_tensor:
        box = held["original"]
        if leave_parametrized:
            Box.write(box, getattr(module, tensor_name))
    else:
        value = getattr(module, tensor_name)
        trained = any(isinstance(b, Parameter) and b.requires_grad for b in held.values())
        box = Parameter(value) if trained else Buffer(value)

    remove_computation(module, Parametrized(tensor_name))
    del module.parametrizations[tensor_name]
    if len(module.parametrizations) == 0:
        del module.parametrizations
    if isinstance(box, Parameter):
        module.register_parameter(tensor_name, box)
    else:
        module.register_buffer(tensor_name, box)
    return module


def type_before_parametrizations(module: Module) -> type:
    """Return the class that a module had before any of its tensors was parametrized.

    Args:
        module: a module, parametrized or not.

    Source: ``torch.nn.utils.parametrize.type_before_parametrizations``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import parametrizations, parametrize
        >>> layer = parametrizations.weight_norm(nn.Linear(2, 3))
        >>> type(layer).__name__, parametrize.type_before_parametrizations(layer).__name__
        ('ParametrizedLinear', 'Linear')
    """
    return base_of(module)


def transfer_parametrizations_and_params(
    from_module: Module, to_module: Module, tensor_name: str | None = None
) -> Module:
    """Give the parametrizations of one module, and what they compute from, to another as well.

    Args:
        from_module: where they are; nothing happens if there are none.
        to_module: it is changed, and shares modules and parameters with the other one afterwards.
        tensor_name: one tensor; None for all that are parametrized.

    Returns:
        `to_module`.

    Source: ``torch.nn.utils.parametrize.transfer_parametrizations_and_params``.

    Example:
        >>> import statefulnn as nn
        >>> from statefulnn.utils import parametrizations, parametrize
        >>> layer, other = parametrizations.weight_norm(nn.Linear(2, 3)), nn.Linear(2, 3)
        >>> other = parametrize.transfer_parametrizations_and_params(layer, other)
        >>> bool((other.weight == layer.weight).all())
        True
    """
    if not is_parametrized(from_module):
        return to_module
    for name in list(from_module.parametrizations) if tensor_name is None else [tensor_name]:
        source = from_module.parametrizations[name]
        if not hasattr(to_module, name):
            setattr(to_module, name, Parameter(getattr(from_module, name)))
        for parametrization in source:
            register_parametrization(to_module, name, parametrization)
        target = to_module.parametrizations[name]
        for key, box in (*source._parameters.items(), *source._buffers.items()):
            setattr(target, key, box)
    return to_module
