"""Parameters and buffers: boxes that work where ``jax.numpy`` takes an array.

Terms
  Parameter   a box that may be trained. Reading the attribute gives the box.
  Buffer      a box that is not trained. Reading the attribute gives the plain array.

Source: ``torch.nn.Parameter`` and ``torch.nn.Buffer``, with the same meanings.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from statefulnn.core import habits, refusals
from statefulnn.core.array_types import ArrayTypes
from statefulnn.core.arrays import as_array
from statefulnn.core.box import Box, unwrap
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.lending import lend
from statefulnn.core.ownership import check_write, real_dict
from statefulnn.core.placement import Value, elsewhere, is_meta, place_in_force, placed
from statefulnn.core.stamps import clock, tick

# What a traced function may ask without making the value a constant of the compiled code.
_METADATA = frozenset({"aval", "dtype", "itemsize", "nbytes", "ndim", "shape", "sharding", "size"})


class ArrayBox(Box, ArrayTypes):
    """A box that works where ``jax.numpy`` takes an array; arithmetic on it gives plain arrays."""

    __slots__ = ()
    # An array of numpy's on the left leaves the operation to the box, as it does to an array of JAX's.
    __array_priority__ = 100

    def __jax_array__(self) -> Any:
        value = self.value
        if is_meta(value):
            raise refusals.no_numbers(self.label())
        return value

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.__jax_array__())
        return array if dtype is None else array.astype(dtype)

    def __getattr__(self, name: str) -> Any:
        # Shape, dtype, T, at, astype, reshape, mean ... are the array's own.
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._value if name in _METADATA else self.value
        try:
            return getattr(value, name)
        except AttributeError:
            if name not in habits.BOX:
                raise
        habits.refuse_name(f"{type(self).__name__!r} object", name, habits.BOX)

    def view(self, dtype: DTypeLike | None = None, *shape: int) -> jax.Array:
        """Return the bits of the array as another dtype, as ``jax.Array.view`` does."""
        if shape or isinstance(dtype, (int, tuple)):  # torch's reshapes
            raise refusals.name_of_habit("called view with a shape", habits.BOX["view"])
        return self.value.view(dtype)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._value)})

    def _repr_html_(self) -> str:
        """Return shape, dtype and what the numbers look like, for notebooks."""
        # The layer above: only this method reaches up.
        from statefulnn.inspect.html import html_of_array

        return html_of_array(self)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value)

    def __getitem__(self, index: Any) -> jax.Array:
        if isinstance(index, int):
            self._require_inside(index)
        return self.value[index]

    def __setitem__(self, index: Any, new: object) -> None:
        self._require_inside(index)
        self.value = self.value.at[index].set(unwrap(new))

    def _require_inside(self, index: Any) -> None:
        """Raise for an index out of range: JAX drops what is written there, and reads the last row."""
        try:
            np.broadcast_to(np.False_, self.value.shape)[index]
        except IndexError as error:
            if "out of bounds" in str(error):
                raise refusals.out_of_range(self.label(), index, self.value.shape) from None
        except TypeError:  # not known while tracing, or of a kind that JAX has an error for
            pass

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

    if not TYPE_CHECKING:
        __hash__ = object.__hash__  # identity, as torch's tensors; `==` below compares elements

    def __round__(self, ndigits: int = 0) -> jax.Array:
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

    def __init__(self, data: object, *, persistent: bool = True) -> None:
        super().__init__(_given(as_array(unwrap(data), "nn.Buffer"), data))
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
            if isinstance(self._nn_home, int):
                raise refusals.persistence_of_a_clone(self.label())
        self._persistent = bool(flag)
        # The module keeps the names of such buffers; the box may have left it since.
        module = self._nn_home[0]() if isinstance(self._nn_home, tuple) else None
        if module is not None and real_dict(module)["_buffers"].get(self._nn_home[1]) is self:
            module._remember_persistence(self._nn_home[1], self._persistent)

    def __deepcopy__(self, memo: dict) -> Buffer:
        with elsewhere():
            return Buffer(self, persistent=self.persistent)

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

    def __init__(self, data: object = None, requires_grad: bool = True) -> None:
        value = as_array(jnp.zeros((0,)) if data is None else unwrap(data), "nn.Parameter")
        if requires_grad:
            _require_inexact(value)
        super().__init__(_given(value, data))
        self._requires_grad = bool(requires_grad)
        self._grad: Any = None

    def static_part(self) -> bool:
        return self._requires_grad

    def _set_static_part(self, like: Any) -> None:
        self._requires_grad = like
        self._grad = None

    @property
    def grad(self) -> Any:
        """A gradient that somebody has noted here, None otherwise; nothing of this package does."""
        return self._grad

    @grad.setter
    def grad(self, gradient: object) -> None:
        # No clone has it, so what traced code leaves here would be lost or outlive its trace.
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

    def write(self, new: object) -> None:
        """Put another array of the same shape and dtype into the box."""
        array, old = as_array(unwrap(new), self.label), self._value
        if array.shape != old.shape:
            raise refusals.other_shape(self.label(), array.shape, old.shape)
        if array.dtype != old.dtype:
            # What is weakly typed came from a Python number, and takes the parameter's dtype.
            if not array.weak_type or jnp.issubdtype(array.dtype, jnp.complexfloating):
                raise refusals.other_dtype(self.label(), array.dtype, old.dtype)
            array = array.astype(old.dtype)
        super().write(array)

    @property
    def data(self) -> jax.Array:
        """The array; writing replaces it, whatever its shape and dtype."""
        return self.value

    @data.setter
    def data(self, new: object) -> None:
        array = as_array(unwrap(new), self.label)
        if self._requires_grad:
            _require_inexact(array)
        Box.write(self, lend(array))

    def copy_(self, src: object) -> Parameter:
        """Copy an array into the box, broadcast to its shape and cast to its dtype; return the box."""
        array = as_array(unwrap(src), self.label)
        Box.write(self, lend(jnp.broadcast_to(array, self.shape).astype(self.dtype)))
        return self

    def detach(self) -> jax.Array:
        """Return the array, cut off from gradients."""
        return jax.lax.stop_gradient(self.value)

    def __deepcopy__(self, memo: dict) -> Parameter:
        with elsewhere():
            return Parameter(self, self._requires_grad)

    def __reduce__(self) -> Any:
        return Parameter, (self.out(), self._requires_grad)

    def __repr__(self) -> str:
        text = f"Parameter containing:\n{self._value!r}"
        return text if self._requires_grad else f"{text}, requires_grad=False"


def _given(value: Value, data: object) -> Value:
    """Return the value for a box that is made of `data`, whose holder may keep it."""
    place = place_in_force()
    if value is data and is_meta(value):  # of its own, unlike that of a copy: see nn.materialize
        return jax.ShapeDtypeStruct(value.shape, value.dtype)
    if place is None:
        return lend(value) if value is data or isinstance(data, Box) else value
    return placed(value, place)


def _require_inexact(value: Value) -> None:
    if hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jnp.inexact):
        raise refusals.dtype_without_gradients(value.dtype)


def _add_operators() -> None:
    # Arithmetic, comparison and matrix operators act on the array and give arrays; the in-place
    # forms write the box, which stays the same box.

    def binary(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda self, other: op(self.__jax_array__(), unwrap(other))

    def reflected(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda self, other: op(unwrap(other), self.__jax_array__())

    def in_place(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def method(self, other):
            self.value = op(self.value, unwrap(other))
            return self

        return method

    names = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
    arithmetic = {n: getattr(operator, n + "_" if n in ("and", "or") else n) for n in names}
    for name, op in {**arithmetic, "divmod": divmod}.items():
        setattr(ArrayBox, f"__{name}__", binary(op))
        setattr(ArrayBox, f"__r{name}__", reflected(op))
    for name, op in arithmetic.items():
        setattr(ArrayBox, f"__i{name}__", in_place(op))
    for name in "eq ne lt le gt ge".split():
        setattr(ArrayBox, f"__{name}__", binary(getattr(operator, name)))
    for name in "neg pos abs invert".split():
        op = getattr(operator, name)
        setattr(ArrayBox, f"__{name}__", lambda self, op=op: op(self.value))


_add_operators()
