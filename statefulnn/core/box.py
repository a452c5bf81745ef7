"""Boxes: the mutable cells that hold a module's arrays.

Terms
  Box         one array with an identity. Two attributes that hold the same box are tied.
  Parameter   a box that may be trained. Reading the attribute gives the box.
  Buffer      a box that is not trained. Reading the attribute gives the plain array.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.baked_in import Capture
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import (
    DtypeError,
    RegistrationError,
    ShapeError,
    StructureChangeError,
    explain,
    name_of,
)
from statefulnn.core.lending import lend
from statefulnn.core.narrowing import check_jax_holds
from statefulnn.core.ownership import ModuleBase, Scope, birth_scope, check_write, real_dict
from statefulnn.core.placement import (
    META,
    elsewhere,
    is_meta,
    no_numbers,
    place_in_force,
    placed,
)
from statefulnn.core.stamps import clock, tick, value_changed


class Box:
    """A mutable cell around one array, with an identity."""

    __slots__ = ("__weakref__", "_home", "_scope", "_value", "captured")

    _value: Any
    _scope: Scope | None
    _home: Any  # a leaf position in the scope, or (weak reference to the module, attribute name)
    captured: Capture | None  # that traced code took the value as a constant

    def __init__(self, value: Any) -> None:
        self._value = _strong(value)
        self._scope = birth_scope()
        self._home = None
        self.captured = None

    @classmethod
    def clone_of(cls, like: Any, value: Any, scope: Scope | None, position: int) -> Any:
        """Build a box without checks; `like` is what `static_part` gave."""
        box = cls.__new__(cls)
        box._value = value
        box._scope = scope
        box._home = position
        box.captured = None
        box._set_static_part(like)
        return box

    def static_part(self) -> Any:
        """Return what a clone needs beside the value; hashable."""
        return None

    def _set_static_part(self, like: Any) -> None:
        pass

    def out(self) -> Any:
        """Return the array, and let the trace in force know that it has been read.

        Every way on which an array leaves a box comes through here: reading `value`, flattening, copying
        and pickling a box, taking a module apart.
        """
        if current_trace() is not EAGER:
            self._read_in_trace()
        return self._value

    def lend(self) -> Any:
        """Return the array to somebody who keeps it: a call that donates it leaves that one a copy."""
        return lend(self.out())

    @property
    def value(self) -> Any:
        """The array. Writing checks that the write will be kept."""
        return self.out()

    @value.setter
    def value(self, new: Any) -> None:
        self.write(lend(unwrap(new)))  # the caller may keep it

    def write(self, new: Any) -> None:
        """Put another array into the box, which keeps its identity."""
        new = as_array(new, self.label)
        if current_trace() is not EAGER or self._scope is not None or isinstance(new, Tracer):
            check_write(self._scope, new, self.label)
        if self.captured is not None:
            self.captured.warn_of_value(self)
        self._value = _strong(new)
        value_changed()

    def _read_in_trace(self) -> None:
        if self._scope is not None:
            self._scope.read = True
        elif self.captured is None and not isinstance(self._value, Tracer):
            Capture.note(self)

    def label(self) -> str:
        """Return the dotted name under which the box was registered, for messages."""
        kind, home = type(self).__name__, self._home
        if isinstance(home, int):
            name = self._scope.name_of(home) if self._scope is not None else None
            return f"{name!r} ({kind})" if name else f"a {kind}"
        if home is None:
            return f"a {kind}"
        return f"{dotted_name(*home)!r} ({kind})"


def dotted_name(module_ref: Any, name: str) -> str:
    """Return the name of a member of a module, from the root of its tree; for messages only."""
    module = module_ref()
    return ".".join((*(() if module is None else path_of(module)), name))


def path_of(module: ModuleBase) -> tuple[str, ...]:
    """Follow the hints of where modules were registered up to the root; for messages only."""
    parts, seen = [], set()
    while id(module) not in seen:
        seen.add(id(module))
        home = module._home
        parent = home[0]() if isinstance(home, tuple) else None
        if parent is None or real_dict(parent)["_modules"].get(home[1]) is not module:
            break
        parts.append(home[1])
        module = parent
    return tuple(reversed(parts))


def _strong(value: Any) -> Any:
    """Return an array that is not weakly typed: compiled code for a weak one is another one."""
    if getattr(value, "weak_type", False):
        return jax.lax.convert_element_type(value, value.dtype)
    return value


def unwrap(x: Any) -> Any:
    """Return the array of a box, and anything else as it is."""
    return x.value if isinstance(x, Box) else x


def host_array(shape: Any, dtype: Any, empty: Any = np.empty) -> np.ndarray:
    """Return an uninitialised numpy array (with ``np.zeros``: of zeros) that JAX need not copy.

    The CPU backend takes memory over as it is if it starts at a multiple of 64 bytes.
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def from_numpy(values: Any, device: Any = None, copy: bool = True) -> Any:
    """Return a numpy array, or a list of them, on a device, without compiling anything for its shape.

    With ``copy=False`` the array may share memory with the numpy array, which nobody may write again.
    """
    if current_trace() is not EAGER:
        return jax.tree.map(jnp.asarray, values)
    return jax.device_put(jax.tree.map(np.array, values) if copy else values, device)


def filled(shape: Any, dtype: Any, place: Any = None, value: float = 0) -> Any:
    """Return an array of one value at a place (what `resolve_device` gives), compiling nothing for it.

    On the meta device that is its shape alone. What lies on several devices is made there, at one
    compilation a shape, and is never whole on the host.
    """
    shape = tuple(shape)
    if place == META:
        return jax.ShapeDtypeStruct(shape, dtype)
    if isinstance(place, jax.sharding.Sharding) and len(place.device_set) > 1:
        return jnp.full(shape, value, dtype, device=place)
    # Zeros of numpy's cost nothing until somebody reads them.
    values = host_array(shape, dtype, np.zeros)
    if value:
        values[...] = value
    return from_numpy(values, place, copy=False)


def as_array(value: Any, subject: Any = "a box") -> Any:
    """Return `value` as a JAX array, or raise if it is none."""
    if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
        _check_not_deleted(value, subject)
        return value
    if isinstance(value, Box):
        return value.value
    if isinstance(value, (np.ndarray, np.generic)):
        check_jax_holds(value, lambda: f"what was written to {name_of(subject)}")
        return from_numpy(value)
    if isinstance(value, (bool, int, float, complex)):
        return jnp.asarray(value)
    if hasattr(value, "__jax_array__"):
        return value.__jax_array__()
    if isinstance(value, (list, tuple)):
        raise RegistrationError(
            explain(
                f"wrote a {type(value).__name__} to {name_of(subject)}",
                "only arrays can be held",
                "convert it first: jnp.asarray(value)",
            )
        )
    raise RegistrationError(
        explain(
            f"wrote an object of type {type(value).__name__} to {name_of(subject)}",
            "only arrays can be held",
            "pass a jax.Array or a numpy array",
        )
    )


def _check_not_deleted(value: Any, subject: Any) -> None:
    if not isinstance(value, (Tracer, jax.ShapeDtypeStruct)) and value.is_deleted():
        raise RuntimeError(
            explain(
                f"used an array that has been deleted as the value of {name_of(subject)}",
                "its memory was given away, by a call with donate= or donate_argnums=",
                "keep what outlives donation: module.state_dict(), copy.deepcopy(module), or a copy, "
                "jnp.array(parameter.value)",
            )
        )


def check_usable(value: Any, subject: Callable[[], str]) -> None:
    """Raise if compiled code cannot use the value of a box: it has no numbers, or its memory is gone."""
    if is_meta(value):
        raise no_numbers(subject()) from None
    if isinstance(value, jax.Array):
        _check_not_deleted(value, subject)


# What a traced function may ask without making the value a constant of the compiled code.
_METADATA = frozenset({"aval", "dtype", "itemsize", "nbytes", "ndim", "shape", "sharding", "size"})


class ArrayBox(Box):
    """A box that works where ``jax.numpy`` takes an array; arithmetic on it gives plain arrays."""

    __slots__ = ()
    # An array of numpy's on the left leaves the operation to the box, as it does to an array of JAX's.
    __array_priority__ = 100

    def __jax_array__(self) -> Any:
        value = self.value
        if is_meta(value):
            raise no_numbers(self.label())
        return value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.__jax_array__())
        return array if dtype is None else array.astype(dtype)

    def __getattr__(self, name: str) -> Any:
        # Shape, dtype, T, at, astype, reshape, mean ... are the array's own.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._value if name in _METADATA else self.value, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._value)})

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Any:
        return iter(self.value)

    def __getitem__(self, index: Any) -> Any:
        return self.value[index]

    def __setitem__(self, index: Any, new: Any) -> None:
        self.value = self.value.at[index].set(unwrap(new))

    def __bool__(self) -> bool:
        return bool(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __complex__(self) -> complex:
        return complex(self.value)

    def __index__(self) -> int:
        return self.value.__index__()

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    __hash__ = object.__hash__  # identity, as torch's tensors; `==` below compares elements

    def __round__(self, ndigits: int = 0) -> Any:
        return jnp.round(self.value, ndigits)


class Buffer(ArrayBox):
    """An array that belongs to a module's state but is not trained.

    Args:
        data: the array.
        persistent: whether it is to be part of ``state_dict``; a module that it is assigned to takes
            note of it.

    Source: ``torch.nn.Buffer``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> class Counter(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.calls = nn.Buffer(jnp.zeros((), jnp.int32))
        ...
        ...     def forward(self, x):
        ...         self.calls = self.calls + 1
        ...         return x
        >>> counter = Counter()
        >>> _ = counter(1.0)
        >>> int(counter.calls)
        1
    """

    __slots__ = ("_persistent",)

    def __init__(self, data: Any, *, persistent: bool = True) -> None:
        super().__init__(placed(as_array(data, "nn.Buffer"), place_in_force()))
        self._persistent = bool(persistent)

    def _set_static_part(self, like: Any) -> None:
        self._persistent = True

    @property
    def persistent(self) -> bool:
        """Whether it is part of ``state_dict``; writing tells the module that has it."""
        return self._persistent

    @persistent.setter
    def persistent(self, flag: bool) -> None:
        if self._scope is not None or current_trace() is not EAGER:
            check_write(self._scope, None, lambda: f"persistent of {self.label()}")
            if isinstance(self._home, int):
                raise StructureChangeError(
                    explain(
                        f"set persistent of {self.label()} inside of a transformation",
                        "what a module has in its state dict is part of its structure, and would be lost",
                        "set it outside",
                    )
                )
        self._persistent = bool(flag)
        module = self._home[0]() if isinstance(self._home, tuple) else None
        if module is not None and real_dict(module)["_buffers"].get(self._home[1]) is self:
            module._remember_persistence(self._home[1], self._persistent)

    def __deepcopy__(self, memo: dict) -> Buffer:
        with elsewhere():
            return Buffer(self.lend(), persistent=self.persistent)

    def __reduce__(self) -> Any:
        return functools.partial(Buffer, persistent=self.persistent), (self.out(),)

    def __repr__(self) -> str:
        return f"Buffer containing:\n{self._value!r}"


class Parameter(ArrayBox):
    """An array that training changes: a mutable box with an identity.

    It works wherever ``jax.numpy`` takes an array (operators, indexing, ``jnp`` functions,
    ``np.asarray``) and arithmetic on it gives plain arrays. ``jax.lax`` functions want ``p.value``.

    Args:
        data: the array, of a floating or complex dtype if it is to be trained.
        requires_grad: whether gradients are taken with respect to it.

    Raises:
        DtypeError: for an integer or boolean array with ``requires_grad=True``.

    Source: ``torch.nn.Parameter``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> p = nn.Parameter(jnp.ones(3))
        >>> p.value = p.value * 2
        >>> (p + 1).tolist()
        [3.0, 3.0, 3.0]
    """

    __slots__ = ("_grad", "_requires_grad")

    def __init__(self, data: Any = None, requires_grad: bool = True) -> None:
        if data is None:
            data = jnp.zeros((0,))
        value = as_array(data, "nn.Parameter")
        if requires_grad:
            _require_inexact(value)
        super().__init__(placed(value, place_in_force()))
        self._requires_grad = bool(requires_grad)
        self._grad: Any = None

    def static_part(self) -> Any:
        return self._requires_grad

    def _set_static_part(self, like: Any) -> None:
        self._requires_grad = like
        self._grad = None

    @property
    def grad(self) -> Any:
        """A gradient that somebody has noted here, None otherwise; nothing of this package does."""
        return self._grad

    @grad.setter
    def grad(self, gradient: Any) -> None:
        if self._scope is not None or current_trace() is not EAGER or isinstance(gradient, Tracer):
            subject = f"the gradient (.grad) of {self.label()}"
            check_write(self._scope, gradient, subject)
        self._grad = gradient

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are taken with respect to this parameter."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, flag: bool) -> None:
        self.requires_grad_(flag)

    def requires_grad_(self, requires_grad: bool = True) -> Parameter:
        """Train or freeze the parameter, and return it."""
        if bool(requires_grad) != self._requires_grad:
            check_write(self._scope, None, lambda: f"requires_grad of {self.label()}")
            if requires_grad:
                _require_inexact(self._value)
            self._requires_grad = bool(requires_grad)
            clock.structure = tick()
        return self

    def write(self, new: Any) -> None:
        """Put another array of the same shape and dtype into the box."""
        new = as_array(new, self.label)
        old = self._value
        if new.shape != old.shape:
            raise ShapeError(
                explain(
                    f"wrote an array of shape {new.shape} to {self.label()} of shape {old.shape}",
                    "training keeps the shape of a parameter; another one is mostly a broadcast "
                    "that was not meant",
                    "write an array of the same shape, or p.data = array to replace it on purpose",
                )
            )
        if new.dtype != old.dtype:
            if new.weak_type and not jnp.issubdtype(new.dtype, jnp.complexfloating):
                new = new.astype(old.dtype)
            else:
                raise DtypeError(
                    explain(
                        f"wrote an array of dtype {new.dtype} to {self.label()} of dtype {old.dtype}",
                        "the parameter's dtype would drift silently",
                        "cast it, p.value = array.astype(p.dtype), or p.data = array to replace it "
                        "on purpose",
                    )
                )
        super().write(new)

    @property
    def data(self) -> Any:
        """The array; writing replaces it, whatever its shape and dtype."""
        return self.value

    @data.setter
    def data(self, new: Any) -> None:
        new = as_array(new, self.label)
        if self._requires_grad:
            _require_inexact(new)
        Box.write(self, lend(new))

    def copy_(self, src: Any) -> Parameter:
        """Copy an array into the box, broadcast to its shape and cast to its dtype; return the box."""
        src = as_array(src, self.label)
        Box.write(self, jnp.broadcast_to(src, self.shape).astype(self.dtype))
        return self

    def detach(self) -> Any:
        """Return the array, cut off from gradients."""
        return jax.lax.stop_gradient(self.value)

    def __deepcopy__(self, memo: dict) -> Parameter:
        with elsewhere():
            return Parameter(self.lend(), self._requires_grad)

    def __reduce__(self) -> Any:
        return Parameter, (self.out(), self._requires_grad)

    def __repr__(self) -> str:
        text = f"Parameter containing:\n{self._value!r}"
        return text if self._requires_grad else f"{text}, requires_grad=False"


def _require_inexact(value: Any) -> None:
    if hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jnp.inexact):
        raise DtypeError(
            explain(
                f"made a trainable Parameter of dtype {value.dtype}",
                "gradients exist for floating and complex dtypes only",
                "nn.Parameter(array, requires_grad=False), or nn.Buffer(array)",
            )
        )


def _add_operators() -> None:
    # Arithmetic, comparison and matrix operators act on the array and give arrays; the in-place
    # forms write the box, which stays the same box.

    def binary(op):
        return lambda self, other: op(self.__jax_array__(), unwrap(other))

    def reflected(op):
        return lambda self, other: op(unwrap(other), self.__jax_array__())

    def in_place(op):
        def method(self, other):
            self.value = op(self.value, unwrap(other))
            return self

        return method

    for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
        op = getattr(operator, name + "_" if name in ("and", "or") else name)
        setattr(ArrayBox, f"__{name}__", binary(op))
        setattr(ArrayBox, f"__r{name}__", reflected(op))
        setattr(ArrayBox, f"__i{name}__", in_place(op))
    for name in "eq ne lt le gt ge".split():
        setattr(ArrayBox, f"__{name}__", binary(getattr(operator, name)))
    for name in "neg pos abs invert".split():
        op = getattr(operator, name)
        setattr(ArrayBox, f"__{name}__", lambda self, op=op: op(self.value))
    for name, function in (("divmod", divmod),):
        setattr(ArrayBox, f"__{name}__", binary(function))
        setattr(ArrayBox, f"__r{name}__", reflected(function))
    ArrayBox.__hash__ = object.__hash__


_add_operators()
