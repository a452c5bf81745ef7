"""Boxes: the mutable cells that hold a module's arrays.

Terms
  Box         one array with an identity. Two attributes that hold the same box are tied.
  Parameter   a box that may be trained. Reading the attribute gives the box.
  Buffer      a box that is not trained. Reading the attribute gives the plain array.
  Scope       who owns a set of boxes and modules: the trace they were built in, and whether anybody
              will keep what is written to them. The user's own objects have no scope.
  Cell        the version stamp of one module. Caches compare stamps instead of walking the modules.

Writes to a box go through `check_write`, which is where laws 4 and 5 live: nothing is written that
would be lost, and no traced value is written where it would outlive its trace.
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core import compat
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import (
    DtypeError,
    RegistrationError,
    ShapeError,
    StaleCaptureWarning,
    StateWriteError,
    TraceLeakError,
    explain,
)

# --------------------------------------------------------------------------------------------------
# Clocks. One counter stamps structural and static changes, another counts changes of values.

_tick = itertools.count(1).__next__
_value_tick = itertools.count(1).__next__


class Clock:
    """The two global counters, and what hangs on them.

    Attributes:
        structure: the stamp of the last structural or static change.
        values: the stamp of the last change of a value.
        gathered: weak references to the plans whose list of leaves is cached; the next change of a
            value drops the lists.
        captured: how many boxes were taken as constants by traced code and not written since.
    """

    __slots__ = ("captured", "gathered", "structure", "values")

    def __init__(self) -> None:
        self.structure = 0
        self.values = 0
        self.gathered: list[Any] = []
        self.captured = 0


clock = Clock()


def value_changed() -> None:
    """Drop every cached list of leaves; call after a box took another value."""
    clock.values = _value_tick()
    if clock.gathered:
        plans, clock.gathered = clock.gathered, []
        for reference in plans:
            plan = reference()
            if plan is not None:
                plan.cached_leaves = None


class Cell:
    """The stamp of one module, and the scope that owns the module (None: the user)."""

    __slots__ = ("scope", "stamp")

    def __init__(self, scope: Scope | None = None) -> None:
        self.stamp = 0
        self.scope = scope

    def touch(self) -> None:
        """Record a change that has just been made to the structure or to a static attribute."""
        self.stamp = clock.structure = _tick()


class Scope:
    """The owner of clones: the trace they live in, and what may be written to them.

    Args:
        writable: whether somebody will collect what is written.
        lost: for read-only scopes, the reason and the remedy, as the two last parts of a message.
        moduledef: the static half of the clones; it knows their names.
    """

    __slots__ = ("__weakref__", "_trace", "lost", "moduledef", "read", "stop_gradients", "writable")

    def __init__(
        self,
        writable: bool = True,
        lost: tuple[str, str] | None = None,
        moduledef: Any = None,
    ) -> None:
        self._trace = weakref.ref(current_trace())
        self.writable = writable
        self.lost = lost
        self.moduledef = moduledef
        self.read = False  # whether any parameter of the scope was read
        self.stop_gradients = False

    @property
    def trace(self) -> Any:
        """The trace the scope was opened in, or None once it has ended."""
        return self._trace()

    def name_of(self, position: int) -> str | None:
        """Return the dotted name of the box at a leaf position."""
        return None if self.moduledef is None else self.moduledef.leaf_names[position]


class ModuleBase:
    """The slots of a Module, apart from its attributes; `core.module.Module` is the class to use."""

    __slots__ = ("__dict__", "__weakref__", "_cell", "_home", "_plan", "_shell")

    _cell: Cell
    _home: Any  # a node number, or (weak reference to the parent, name); for messages only
    _plan: Any
    _shell: Any


# Module intercepts assignment, so the slots are written through their descriptors.
set_cell = ModuleBase.__dict__["_cell"].__set__
set_home = ModuleBase.__dict__["_home"].__set__
set_plan = ModuleBase.__dict__["_plan"].__set__
set_shell = ModuleBase.__dict__["_shell"].__set__
real_dict = ModuleBase.__dict__["__dict__"].__get__


# What a clone that JAX built, and not this package, answers to a write.
LOST_IN_RAW_TRANSFORM = (
    "this module was rebuilt by a plain JAX transformation (jax.jit, jax.grad, jax.vmap, "
    "jax.tree.map ...), which never looks at it again, so the write would be lost",
    "use nn.jit, nn.value_and_grad or nn.vmap, which write back; or a pure call, "
    "functionalize(module, mutable=True); or return the updated module: "
    "module = nn.mutable(module) first, write, and return it. "
    "Call train() and eval() outside the transformation",
)


def check_write(scope: Scope | None, value: Any, subject: Any) -> None:
    """Raise unless a box or module of `scope` may take `value` at this point of the program.

    Args:
        scope: the owner, None for the user's own objects.
        value: what is about to be written; None for a structural or static change.
        subject: what is written to, for the message: a name, or a function that gives it.
    """
    trace = current_trace()
    if scope is None:
        if trace is EAGER and not isinstance(value, Tracer):
            return
        owner = EAGER
    else:
        if not scope.writable:
            why, instead = scope.lost or LOST_IN_RAW_TRANSFORM
            raise StateWriteError(explain(f"wrote to {_name(subject)}", why, instead))
        owner = scope.trace

    between = []
    for around in compat.chain(trace):
        if around is owner:
            break
        between.append(around)
    else:
        raise TraceLeakError(
            explain(
                f"wrote to {_name(subject)}",
                "it belongs to a traced call that has ended, or to one that is not around this line",
                "return values from the traced function instead of keeping its modules",
            )
        )
    if any(compat.kind(t) == "staged" for t in between):
        raise TraceLeakError(
            explain(
                f"wrote to {_name(subject)} inside a function that JAX traces "
                "(jax.jit, lax.scan, lax.cond, jax.checkpoint ...)",
                "the module is not an argument of that function: the write would happen once, while "
                "tracing, and leave a dead tracer or a stale value behind",
                "pass the module as an argument to nn.jit (nn.scan, nn.remat), which writes back; "
                "or return the new value and write it outside",
            )
        )
    if isinstance(value, Tracer):
        home = compat.trace_of(value)
        if home in between or home not in compat.chain(owner):
            raise TraceLeakError(
                explain(
                    f"wrote a traced value to {_name(subject)}",
                    "the module lives outside the transformation that made the value, so the value "
                    "would outlive its trace",
                    "pass the module as an argument to nn.value_and_grad, nn.vmap or nn.jit, which "
                    "write back; or return the value (has_aux=True) and write it outside",
                )
            )


def _name(subject: Any) -> str:
    return subject() if callable(subject) else str(subject)


# --------------------------------------------------------------------------------------------------
# Boxes


class Box:
    """A mutable cell around one array, with an identity."""

    __slots__ = ("__weakref__", "_captured", "_home", "_scope", "_value")

    _value: Any
    _scope: Scope | None
    _home: Any  # a leaf position in the scope, or (weak reference to the module, attribute name)
    _captured: str | None  # where traced code took the value as a constant

    def __init__(self, value: Any) -> None:
        self._value = value
        self._scope = None
        self._home = None
        self._captured = None

    @classmethod
    def clone_of(cls, like: Any, value: Any, scope: Scope | None, position: int) -> Any:
        """Build a box without checks; `like` is what `static_part` gave."""
        box = cls.__new__(cls)
        box._value = value
        box._scope = scope
        box._home = position
        box._captured = None
        box._set_static_part(like)
        return box

    def static_part(self) -> Any:
        """Return what a clone needs beside the value; hashable."""
        return None

    def _set_static_part(self, like: Any) -> None:
        pass

    @property
    def value(self) -> Any:
        """The array. Writing checks that the write will be kept."""
        if current_trace() is not EAGER:
            self._read_in_trace()
        return self._value

    @value.setter
    def value(self, new: Any) -> None:
        self.write(new)

    def write(self, new: Any) -> None:
        """Put another array into the box, which keeps its identity."""
        new = as_array(new, self.label)
        if current_trace() is not EAGER or self._scope is not None or isinstance(new, Tracer):
            check_write(self._scope, new, self.label)
        if self._captured is not None:
            self._warn_stale()
        self._value = new
        value_changed()

    def _read_in_trace(self) -> None:
        scope = self._scope
        if scope is not None:
            scope.read = True
        elif self._captured is None and not isinstance(self._value, Tracer):
            if any(compat.kind(t) == "staged" for t in compat.chain(current_trace())):
                self._captured = _caller()
                clock.captured += 1

    def _warn_stale(self) -> None:
        where, self._captured = self._captured, None
        clock.captured -= 1
        warnings.warn(
            explain(
                f"wrote to {self.label()}",
                f"compiled code took its old value as a constant at {where}, and will go on using it",
                "pass the module to the compiled function as an argument",
            ),
            StaleCaptureWarning,
            stacklevel=user_stack_level(),
        )

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
    """Follow the hints of where modules were registered up to the root; for messages only."""
    parts, seen = [name], set()
    module = module_ref()
    while module is not None and id(module) not in seen:
        seen.add(id(module))
        home = module._home
        if not isinstance(home, tuple):
            break
        parent = home[0]()
        if parent is None or real_dict(parent)["_modules"].get(home[1]) is not module:
            break
        parts.append(home[1])
        module = parent
    return ".".join(reversed(parts))


def unwrap(x: Any) -> Any:
    """Return the array of a box, and anything else as it is."""
    return x.value if isinstance(x, Box) else x


def as_array(value: Any, subject: Any = "a box") -> Any:
    """Return `value` as a JAX array, or raise if it is none."""
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, Box):
        return value.value
    if isinstance(value, (np.ndarray, np.generic, bool, int, float, complex)):
        return jnp.asarray(value)
    if hasattr(value, "__jax_array__"):
        return value.__jax_array__()
    if isinstance(value, (list, tuple)):
        raise RegistrationError(
            explain(
                f"wrote a {type(value).__name__} to {_name(subject)}",
                "only arrays can be held",
                "convert it first: jnp.asarray(value)",
            )
        )
    raise RegistrationError(
        explain(
            f"wrote an object of type {type(value).__name__} to {_name(subject)}",
            "only arrays can be held",
            "pass a jax.Array or a numpy array",
        )
    )


def _caller() -> str:
    """Return file:line of the nearest frame outside this package and JAX."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("statefulnn.", "jax.", "jax._src")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown place"


def user_stack_level() -> int:
    """Return the `stacklevel` that points a warning at the user's line."""
    frame, level = sys._getframe(1), 1
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(("statefulnn.", "jax.", "jax._src")):
            return level
        frame, level = frame.f_back, level + 1
    return 2


class Buffer(Box):
    """An array that belongs to a module's state but is not trained.

    Args:
        data: the array.
        persistent: whether it is part of ``state_dict``.

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

    __slots__ = ("persistent",)

    def __init__(self, data: Any, *, persistent: bool = True) -> None:
        super().__init__(as_array(data, "nn.Buffer"))
        self.persistent = persistent

    def static_part(self) -> Any:
        return self.persistent

    def _set_static_part(self, like: Any) -> None:
        self.persistent = like

    def __deepcopy__(self, memo: dict) -> Buffer:
        return Buffer(self._value, persistent=self.persistent)

    def __reduce__(self) -> Any:
        return functools.partial(Buffer, persistent=self.persistent), (self._value,)

    def __repr__(self) -> str:
        return f"Buffer containing:\n{self._value!r}"


class Parameter(Box):
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

    __slots__ = ("_requires_grad", "grad")

    def __init__(self, data: Any = None, requires_grad: bool = True) -> None:
        if data is None:
            data = jnp.zeros((0,))
        value = as_array(data, "nn.Parameter")
        if requires_grad:
            _require_inexact(value)
        super().__init__(value)
        self._requires_grad = bool(requires_grad)
        self.grad: Any = None

    def static_part(self) -> Any:
        return self._requires_grad

    def _set_static_part(self, like: Any) -> None:
        self._requires_grad = like
        self.grad = None

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
            clock.structure = _tick()
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
            if getattr(new, "weak_type", False) and not jnp.issubdtype(
                new.dtype, jnp.complexfloating
            ):
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
        Box.write(self, new)

    def copy_(self, src: Any) -> Parameter:
        """Copy an array into the box, broadcast to its shape and cast to its dtype; return the box."""
        src = as_array(src, self.label)
        Box.write(self, jnp.broadcast_to(src, self.shape).astype(self.dtype))
        return self

    def detach(self) -> Any:
        """Return the array, cut off from gradients."""
        return jax.lax.stop_gradient(self.value)

    def __jax_array__(self) -> Any:
        return self.value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.value)
        return array if dtype is None else array.astype(dtype)

    def __getattr__(self, name: str) -> Any:
        # Shape, dtype, T, at, astype, reshape, mean ... are the array's own.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value, name)

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

    def __deepcopy__(self, memo: dict) -> Parameter:
        return Parameter(self._value, self._requires_grad)

    def __reduce__(self) -> Any:
        return Parameter, (self._value, self._requires_grad)

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
    import operator

    def binary(op):
        return lambda self, other: op(self.value, unwrap(other))

    def reflected(op):
        return lambda self, other: op(unwrap(other), self.value)

    def in_place(op):
        def method(self, other):
            self.value = op(self.value, unwrap(other))
            return self

        return method

    for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
        op = getattr(operator, name + "_" if name in ("and", "or") else name)
        setattr(Parameter, f"__{name}__", binary(op))
        setattr(Parameter, f"__r{name}__", reflected(op))
        setattr(Parameter, f"__i{name}__", in_place(op))
    for name in "eq ne lt le gt ge".split():
        setattr(Parameter, f"__{name}__", binary(getattr(operator, name)))
    for name in "neg pos abs invert".split():
        op = getattr(operator, name)
        setattr(Parameter, f"__{name}__", lambda self, op=op: op(self.value))
    for name, function in (("divmod", divmod),):
        setattr(Parameter, f"__{name}__", binary(function))
        setattr(Parameter, f"__r{name}__", reflected(function))
    Parameter.__hash__ = object.__hash__
    Parameter.__round__ = lambda self, ndigits=0: jnp.round(self.value, ndigits)


_add_operators()
