"""Module: the base class of every model.

A module registers what is assigned to it: a Parameter, a Buffer, another Module. Everything else is a
static attribute. The dicts `_parameters`, `_buffers` and `_modules` hold boxes and children under
torch's names; reading a buffer gives its array.

Source: ``torch.nn.Module``, whose methods these are, with the same meanings.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from statefulnn.core import habits, refusals
from statefulnn.core import state_dict as _state_dict
from statefulnn.core.arrays import filled
from statefulnn.core.baked_in import BakedIn
from statefulnn.core.box import Box, path_of, unwrap
from statefulnn.core.class_keys import ValueKeyMaker
from statefulnn.core.compat import EAGER, current_trace, tracer_in
from statefulnn.core.construction import DEFAULT_VERSION, current_version
from statefulnn.core.errors import RegistrationError, TraceLeakError, UninitializedModuleError
from statefulnn.core.graph import unpack_shell
from statefulnn.core.hooks import RemovableHandle, add_hook, call_with_hooks
from statefulnn.core.leaks import traced_call
from statefulnn.core.listeners import active
from statefulnn.core.moduledef import COPIED
from statefulnn.core.objects import CONTAINERS
from statefulnn.core.ownership import (
    ModuleBase,
    Scope,
    birth_scope,
    check_write,
    real_dict,
    set_home,
    set_plan,
    set_shell,
    set_stamp,
)
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.core.placement import (
    META,
    DeviceLike,
    PlaceOf,
    Plan,
    Value,
    as_dtype,
    cast,
    is_meta,
    place_of_entry,
    place_of_whole,
    placed,
    places_by_name,
    resolve_device,
    says_by_name,
    supported,
)
from statefulnn.core.placement import device as device_type
from statefulnn.core.pytree import (
    flatten_module,
    flatten_module_with_keys,
    unflatten_module,
)
from statefulnn.core.registry import (
    GLOBAL_HOOKS,
    GLOBAL_STAMP,
    REGISTRIES,
    BareHooks,
    HookDict,
    Registry,
)
from statefulnn.core.slices import whole_of
from statefulnn.core.stamps import Stamp, clock
from statefulnn.core.static_keys import hidden_member, refuse_hidden
from statefulnn.core.tracebacks import shorten, shortened
from statefulnn.core.uninitialized import is_lazy
from statefulnn.core.walk import (
    CALL,
    ENTER,
    LEAVE,
    deepcopied,
    leave_copies_to_reduction,
    overrides,
    under_way,
    walk,
)

_SLOTS = frozenset({"_nn_stamp", "_nn_home", "_nn_plan", "_nn_shell"})
_PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu", META)
_ELSEWHERE = "members that another module had first"  # in the state of a copy


# Only mypy takes this name for True. It learns what a call takes from a property that stands for forward,
# pyright from a method whose parameters are those of forward; neither can do it the other's way.
MYPY = False
_P = ParamSpec("_P")
_R_co = TypeVar("_R_co", covariant=True)
_T = TypeVar("_T")


class Callee(Protocol[_P, _R_co]):
    """What a call of a module takes and returns: that of its `forward`."""

    def forward(self, *args: _P.args, **kwargs: _P.kwargs) -> _R_co: ...


class HasForward(Protocol[_R_co]):
    """What mypy takes a module for: the attribute itself, with what it takes and returns."""

    @property
    def forward(self) -> _R_co: ...


def _typed_by_forward(
    call: Callable[..., Any],
) -> Callable[Concatenate[Callee[_P, _R_co], _P], _R_co]:
    """Return a method as it is; type checkers take a call of it for a call of `forward`."""
    return call


class Ref:
    """Marks a module or parameter that is referred to, not owned, when it is assigned to an attribute.

    The attribute reads as the object itself. Compiled calls see it (shared boxes stay shared), but
    ``parameters()``, ``state_dict()`` and ``children()`` leave it to its owner.

    Args:
        target: a Module or Parameter.

    Example:
        >>> import statefulnn as nn
        >>> class Probe(nn.Module):
        ...     def __init__(self, model):
        ...         super().__init__()
        ...         self.model = nn.Ref(model)
        >>> probe = Probe(nn.Linear(2, 2))
        >>> probe.model, list(probe.parameters())
        (Linear(in_features=2, out_features=2, bias=True), [])
    """

    __slots__ = ("target",)

    if TYPE_CHECKING:  # the attribute is the object itself

        def __new__(cls, target: _T) -> _T: ...

        # Mypy makes a Ref of it all the same, which may then be anything.
        def __getattr__(self, name: str) -> Any: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __init__(self, target: Module | Box) -> None:
        if not isinstance(target, (Module, Box)):
            raise refusals.ref_to_something_else(type(target).__name__)
        self.target = target


class Module(ModuleBase):
    """Base class of all models and layers: subclass it, and assign what belongs to it in ``__init__``.

    Attributes:
        training: whether the module is in training mode; set by `train` and `eval`.

    Source: ``torch.nn.Module``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(3, 4)
        ...
        ...     def forward(self, x):
        ...         return self.fc(x)
        >>> net = Net()
        >>> net(jnp.ones((2, 3))).shape
        (2, 4)
        >>> [name for name, _ in net.named_parameters()]
        ['fc.weight', 'fc.bias']
    """

    __slots__ = ()

    _version: int = 1
    _hooked: bool = False
    # Names of Python-side caches: no part of the compiled code's identity, never copied to clones.
    _python_cache: tuple[str, ...] = ()
    # Static attributes that nobody changes in place: compared once, and not again at each call.
    _unwatched: tuple[str, ...] = ()
    # The names of buffers that stay out of state_dict; never changed in place.
    _non_persistent_buffers_set: frozenset[str] = frozenset()
    call_super_init: bool = False
    # By which version of the initial values the module draws its own; noted when it is built.
    init_version: str = DEFAULT_VERSION
    training: bool
    # What is said of attributes that are not there.
    _habits: Mapping[str, Any] = habits.MODULE

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if isinstance(value, (Box, Module)):
                raise hidden_member(f"the class attribute '{cls.__name__}.{name}'", value)
        leave_copies_to_reduction(cls)
        _register(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if args or kwargs:
            habits.refuse_construction(cls, args, kwargs)
        self = object.__new__(cls)
        set_shell(self, None)
        set_plan(self, None)
        set_home(self, None)
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not self.call_super_init and (args or kwargs):
            given = next(iter(kwargs)) if kwargs else None
            raise TypeError(
                f"{type(self).__name__}.__init__() got an unexpected keyword argument '{given}'"
                if kwargs
                else f"{type(self).__name__}.__init__() takes 1 positional argument but "
                f"{len(args) + 1} were given"
            )
        stamp = Stamp(birth_scope())
        set_stamp(self, stamp)
        attributes = real_dict(self)
        attributes["training"] = True
        attributes["_parameters"] = Registry(stamp)
        attributes["_buffers"] = Registry(stamp)
        attributes["_modules"] = Registry(stamp)
        version = current_version()
        if version != DEFAULT_VERSION:
            attributes["init_version"] = version
        if self.call_super_init:
            super().__init__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; every subclass defines it."""
        raise refusals.no_forward(type(self).__name__)

    if MYPY:  # which keeps the first definition, and pyright the last

        @property
        def __call__(self: HasForward[_R_co]) -> _R_co: ...  # pyright: ignore[reportRedeclaration]

    @_typed_by_forward
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            stamp = self._nn_stamp
            scope = stamp.scope
            if current_trace() is EAGER:
                if scope is None and not (self._hooked or GLOBAL_STAMP.number or active.listeners):
                    return self.forward(*args, **kwargs)
                return call_with_hooks(self, args, kwargs)
            if scope is None and stamp.baked_in is None:
                BakedIn.note(stamp)
            kept = functools.partial(_traced_attribute, self) if scope is None else None
            with traced_call(self, self._path(), kept):
                out = call_with_hooks(self, args, kwargs)
                if scope is not None:
                    _check_kept(self, scope)
            return out
        except Exception as error:
            if clock.baked_in:
                BakedIn.trace_failed()
            if isinstance(error, TypeError):
                habits.refuse_call(self, args, kwargs, error)
            _locate(error, self)
            shorten(error)
            raise

    def _path(self) -> tuple[str, ...]:
        """Return the names that lead to the module from the root of its tree."""
        return path_of(self)

    # ----------------------------------------------------------------------------------------------
    # Attributes

    def __getattr__(self, name: str) -> Any:
        attributes = real_dict(self)
        registry = attributes.get("_parameters")
        if registry is not None:
            if name in registry:
                return registry[name]
            registry = attributes["_modules"]
            if name in registry:
                return registry[name]
            registry = attributes["_buffers"]
            if name in registry:
                box = registry[name]
                return None if box is None else box.value
        elif self._nn_shell is not None:
            unpack_shell(self)
            return getattr(self, name)
        elif name in REGISTRIES or name in ("training", "_nn_stamp"):
            raise _uninitialized(self, "a use" if name == "_nn_stamp" else f"read {name!r}")
        message = f"'{type(self).__name__}' object"
        if name in type(self)._python_cache:
            raise AttributeError(
                f"{message} has no attribute '{name}': it is declared in _python_cache, so clones "
                f"inside transformed code start without it; use getattr(self, {name!r}, None)"
            )
        habits.refuse_attribute(message, self, name)

    @property
    def __dict__(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._nn_shell is not None:
            unpack_shell(self)
        return real_dict(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SLOTS:
            raise refusals.reserved_attribute(name, type(self).__name__)
        attributes = self.__dict__
        parameters = attributes.get("_parameters")
        if isinstance(value, (Box, Module, Ref)):
            if isinstance(value, (Parameter, Buffer, Module)):
                if parameters is None:
                    raise _uninitialized(self, f"assigned {name!r}")
                self._register(name, value)
                return
            if parameters is None:
                raise _uninitialized(self, f"assigned {name!r}")
            target = value.target if isinstance(value, Ref) else value
            if attributes.get(name) is target:
                return
            self._check_static_write(name, None)
            for registry in REGISTRIES:
                if name in attributes[registry]:
                    del attributes[registry][name]
            attributes[name] = target
            self._nn_stamp.touch()
            return
        if parameters is None:  # before super().__init__(), where plain attributes are fine
            if name in REGISTRIES or name == "training":
                raise _uninitialized(self, f"assigned {name!r}")
            _check_static_value(self, name, value)
            object.__setattr__(self, name, value)
            return
        if name in parameters:
            if value is not None:
                raise _array_over_parameter(self, name, value)
            self._set_member("_parameters", name, None)
        elif name in attributes["_buffers"]:
            if value is None:
                self._set_member("_buffers", name, None)
            else:
                self._write_buffer(name, value)
        elif name in attributes["_modules"]:
            if value is not None:
                raise refusals.assigned_over_module(
                    type(value).__name__, name, type(self).__name__, "assign a Module or None"
                )
            self._set_member("_modules", name, None)
        else:
            self._set_static(name, value)

    def _set_static(self, name: str, value: object) -> None:
        attributes = real_dict(self)
        if name in attributes:
            old = attributes[name]
            if old is value and not isinstance(value, CONTAINERS):
                return
            if type(old) is type(value) and isinstance(value, (bool, int, str)) and old == value:
                return
        elif name in habits.ASSIGNED:
            habits.refuse_flag(self, name, value)
        self._check_static_write(name, value)
        object.__setattr__(self, name, value)
        self._nn_stamp.touch(lambda: repr(self._label(name)))

    def _check_static_write(self, name: str, value: object) -> None:
        if name in type(self)._python_cache:
            return
        _check_static_value(self, name, value)
        scope = self._nn_stamp.scope
        if scope is not None or current_trace() is not EAGER:
            check_write(scope, None, lambda: f"the attribute {self._label(name)!r}")

    def _label(self, name: str) -> str:
        """Return the dotted name of an attribute, for messages."""
        return ".".join((*(self._path() or (type(self).__name__,)), name))

    def _register(self, name: str, value: Parameter | Buffer | Module) -> None:
        attributes = real_dict(self)
        self._check_free(name, value)
        if isinstance(value, Parameter):
            registry = "_parameters"
        elif isinstance(value, Module):
            registry = "_modules"
        else:
            registry = "_buffers"
        if attributes[registry].get(name) is value:
            return
        if registry != "_parameters" and name in attributes["_parameters"]:
            raise _array_over_parameter(self, name, value)
        self._check_static_write(name, None)
        if name in attributes:
            del attributes[name]
        for other in REGISTRIES:
            if other != registry and name in attributes[other]:
                del attributes[other][name]
        if isinstance(value, Buffer):
            self._remember_persistence(name, value.persistent)
        if isinstance(value, Box):
            self._adopt(value, name)
        elif value._nn_home is None or (
            isinstance(value._nn_home, tuple) and value._nn_home[0]() is None
        ):
            set_home(value, (weakref.ref(self), name))
        attributes[registry][name] = value

    def _check_free(self, name: str, value: Parameter | Buffer | Module) -> None:
        """Raise if a member cannot have a name: it would not be found under it, or hide something."""
        noun = "parameter" if isinstance(value, Parameter) else "buffer"
        noun = "module" if isinstance(value, Module) else noun
        if "." in name:
            raise KeyError(f'{noun} name can\'t contain ".", got: {name}')
        if name == "":
            raise KeyError(f'{noun} name can\'t be empty string ""')
        attributes = real_dict(self)
        if any(name in attributes[registry] for registry in REGISTRIES):
            if isinstance(value, Buffer) and attributes["_modules"].get(name) is not None:
                raise refusals.assigned_over_module(
                    "Buffer", name, type(self).__name__, "another name"
                )
            return
        own = next((vars(c)[name] for c in type(self).__mro__ if name in vars(c)), None)
        found = any(name in vars(c) for c in type(self).__mro__)
        if isinstance(own, property) and not isinstance(value, Module):
            found = hasattr(self, name)  # as torch asks
        elif isinstance(own, property):  # it may read the module that is registered under its name
            attributes["_modules"][name] = value
            try:
                found = getattr(self, name, None) is not value
            finally:
                del attributes["_modules"][name]
        if found:
            raise refusals.name_in_the_class(name, noun, type(self).__name__)
        if isinstance(value, Buffer) and name in attributes:
            raise KeyError(f"attribute '{name}' already exists")

    def _adopt(self, box: Box, name: str) -> None:
        if box._nn_home is None or (isinstance(box._nn_home, tuple) and box._nn_home[0]() is None):
            box._nn_home = (weakref.ref(self), name)
        scope = box._scope
        if scope is not None and scope.birth:
            # Built in a trace and given to a module: from here on it is the module's.
            check_write(self._nn_stamp.scope, box._value, lambda: repr(self._label(name)))
            box._scope = self._nn_stamp.scope

    def _set_member(self, registry: str, name: str, value: Box | Module | None) -> None:
        members = real_dict(self)[registry]
        if members.get(name, self) is value:
            return
        self._check_static_write(name, None)
        members[name] = value

    def _write_buffer(self, name: str, value: object) -> None:
        box = real_dict(self)["_buffers"][name]
        if not _is_array(value):
            raise refusals.buffer_without_array(type(value).__name__, self._label(name))
        if box is not None:
            box.value = value
            return
        self._check_static_write(name, None)
        box = Buffer(unwrap(value))
        self._adopt(box, name)
        real_dict(self)["_buffers"][name] = box

    def __delattr__(self, name: str) -> None:
        attributes = self.__dict__
        for registry in REGISTRIES:
            if name in attributes.get(registry, ()):
                self._check_static_write(name, None)
                del attributes[registry][name]
                self._remember_persistence(name, True)
                return
        if name in attributes:
            self._check_static_write(name, None)
        object.__delattr__(self, name)
        self._nn_stamp.touch()

    def __dir__(self) -> list[str]:
        names = {*object.__dir__(self)}
        for registry in REGISTRIES:
            names.update(self.__dict__.get(registry, ()))
        return sorted(n for n in names if not (n and n[0].isdigit()))

    # ----------------------------------------------------------------------------------------------
    # Registration by name

    def _check_new_name(self, name: object, noun: str, registry: str) -> None:
        if "_parameters" not in self.__dict__:
            raise _uninitialized(self, f"registered the {noun} {name!r}")
        if not isinstance(name, str):
            raise RegistrationError(f"{noun} name should be a string. Got {type(name).__name__}")
        if "." in name:
            raise KeyError(f'{noun} name can\'t contain ".", got: {name}')
        if name == "":
            raise KeyError(f'{noun} name can\'t be empty string ""')
        if hasattr(self, name) and name not in self.__dict__[registry]:
            raise KeyError(f"attribute '{name}' already exists")

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Add a parameter under a name; None reserves the name.

        Args:
            name: no dots, not empty.
            param: a Parameter or None.

        Raises:
            KeyError: if the name is taken by something else, empty or dotted.
            RegistrationError: if the name is no string or `param` no Parameter.
        """
        self._check_new_name(name, "parameter", "_parameters")
        if param is None:
            self._set_member("_parameters", name, None)
        elif isinstance(param, Parameter):
            self._register(name, param)
        else:
            raise refusals.registered_something_else(
                type(param).__name__,
                "parameter",
                name,
                "nn.Parameter or None",
                "nn.Parameter(array)",
            )

    def register_buffer(self, name: str, tensor: object, persistent: bool = True) -> None:
        """Add an array that is state but not trained, such as a running mean.

        Args:
            name: no dots, not empty.
            tensor: an array, or None.
            persistent: whether it is part of ``state_dict``.

        Raises:
            KeyError: if the name is taken by something else, empty or dotted.
            RegistrationError: if the name is no string or `tensor` no array.
        """
        self._check_new_name(name, "buffer", "_buffers")
        if tensor is None:
            self._set_member("_buffers", name, None)
        elif not _is_array(tensor) or isinstance(tensor, Parameter):
            raise refusals.registered_something_else(
                type(tensor).__name__,
                "buffer",
                name,
                "a jax.Array, numpy array or None",
                "jnp.asarray(value)",
            )
        else:
            self._register(name, tensor if isinstance(tensor, Buffer) else Buffer(tensor))
        self._remember_persistence(name, persistent)

    def _remember_persistence(self, name: str, persistent: bool) -> None:
        hidden = self._non_persistent_buffers_set
        changed = hidden - {name} if persistent else hidden | {name}
        if changed != hidden:
            real_dict(self)["_non_persistent_buffers_set"] = changed
            self._nn_stamp.touch()

    def add_module(self, name: str, module: Module | None) -> None:
        """Add a child module under a name; None reserves the name.

        Raises:
            KeyError: if the name is taken by something else, empty or dotted.
            RegistrationError: if the name is no string or `module` no Module.
        """
        if module is not None and not isinstance(module, Module):
            what = f"{type(module).__name__} is not a Module subclass"
            if isinstance(module, type):
                what = f"added the class {module.__name__} as a module"
            raise refusals.no_child(what, name)
        self._check_new_name(name, "module", "_modules")
        if module is None:
            self._set_member("_modules", name, None)
        else:
            self._register(name, module)

    def register_module(self, name: str, module: Module | None) -> None:
        """Add a child module under a name; the same as `add_module`."""
        self.add_module(name, module)

    # ----------------------------------------------------------------------------------------------
    # Look-up by dotted name

    def get_submodule(self, target: str) -> Module:
        """Return the module at a dotted path; "" is this module.

        Raises:
            AttributeError: if there is none, or something else is there.
        """
        module = self
        for part in target.split(".") if target else ():
            if not hasattr(module, part):
                raise AttributeError(f"{type(module).__name__} has no attribute `{part}`")
            module = getattr(module, part)
            if not isinstance(module, Module):
                raise AttributeError(f"`{part}` is not an nn.Module")
        return module

    def set_submodule(self, target: str, module: Module, strict: bool = False) -> None:
        """Put a module at a dotted path.

        Args:
            target: the path; its parent must exist.
            module: the module to put there.
            strict: whether something must be there already.

        Raises:
            ValueError: for an empty path, or if `module` is no Module.
            AttributeError: if the parent, or with ``strict`` the target itself, does not exist.
        """
        if target == "":
            raise ValueError("Cannot set the submodule without a target name!")
        if not isinstance(module, Module):
            raise ValueError(f'"module" is not an nn.Module, found type {type(module)}')
        *path, name = target.split(".")
        parent = self.get_submodule(".".join(path))
        if strict and not hasattr(parent, name):
            raise AttributeError(f"{type(parent).__name__} has no attribute `{name}`")
        if hasattr(parent, name) and not isinstance(getattr(parent, name), Module):
            raise AttributeError(f"`{name}` is not an nn.Module")
        setattr(parent, name, module)

    def get_parameter(self, target: str) -> Parameter:
        """Return the parameter at a dotted path.

        Raises:
            AttributeError: if there is none, or something else is there.
        """
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        if not hasattr(module, name):
            raise AttributeError(f"{type(module).__name__} has no attribute `{name}`")
        param = getattr(module, name)
        if not isinstance(param, Parameter):
            raise AttributeError(f"`{name}` is not an nn.Parameter")
        return param

    def get_buffer(self, target: str) -> jax.Array:
        """Return the array of the buffer at a dotted path.

        Raises:
            AttributeError: if there is none, or something else is there.
        """
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        if not hasattr(module, name):
            raise AttributeError(f"{type(module).__name__} has no attribute `{name}`")
        if name not in module._buffers:
            raise AttributeError(f"`{name}` is not a buffer")
        return getattr(module, name)

    # ----------------------------------------------------------------------------------------------
    # Iteration

    def _named_members(
        self,
        members: Callable[[Module], Any],
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        modules: Iterable[tuple[str, Module]] = [(prefix, self)]
        if recurse and overrides(self, "named_modules"):
            modules = self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate)
        elif recurse:
            modules = self._walk_modules(None, prefix, remove_duplicate, _stored)
        for path, module in modules:
            _state_dict.refuse_hidden_members(module)
            for name, box in members(module):
                if box is None or id(box) in seen:
                    continue
                if remove_duplicate:
                    seen.add(id(box))
                yield f"{path}.{name}" if path else name, box

    def _named_boxes(self, recurse: bool = True) -> Iterator[tuple[str, Any]]:
        return self._named_members(_all_boxes, recurse=recurse)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Yield (dotted name, Parameter): the module's own first, then its children's."""
        return self._named_members(
            lambda m: list(m._parameters.items()), prefix, recurse, remove_duplicate
        )

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield the parameters, each once."""
        return ParameterIterator(param for _, param in self.named_parameters(recurse=recurse))

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, jax.Array]]:
        """Yield (dotted name, array) of every buffer."""
        boxes = self._named_members(
            lambda m: list(m._buffers.items()), prefix, recurse, remove_duplicate
        )
        for name, box in boxes:
            yield name, box.value

    def buffers(self, recurse: bool = True) -> Iterator[jax.Array]:
        """Yield the arrays of the buffers, each once."""
        for _, array in self.named_buffers(recurse=recurse):
            yield array

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield (name, module) of the direct children, each once."""
        seen: set[int] = set()
        for name, module in list(self._nn_shown().items()):
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def children(self) -> Iterator[Module]:
        """Yield the direct children, each once."""
        for _, module in self.named_children():
            yield module

    def named_modules(
        self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """Yield (dotted name, module) of this module and everything below."""
        return self._walk_modules(memo, prefix, remove_duplicate, lambda module: module._nn_shown())

    def _walk_modules(
        self,
        memo: set | None,
        prefix: str,
        remove_duplicate: bool,
        children: Callable[[Module], Mapping[str, Module | None]],
    ) -> Iterator[tuple[str, Module]]:
        memo = set() if memo is None else memo
        met = {id(module) for module in memo}

        def below(module: Module, path: str) -> list[tuple[str, Module]]:
            return [
                (f"{path}.{name}" if path else name, child)
                for name, child in children(module).items()
                if child is not None
            ]

        steps = walk(self, below, prefix, method="named_modules", met=met, once=remove_duplicate)
        for event, path, module in steps:
            if event is ENTER:
                memo.add(module)
                yield path, module
            elif event is CALL:
                yield from module.named_modules(memo, path, remove_duplicate)
                met.update(map(id, memo))
            elif event is LEAVE and not remove_duplicate:
                memo.discard(module)  # what remains is the path to here, so that a cycle still ends

    def modules(self, remove_duplicate: bool = True) -> Iterator[Module]:
        """Yield this module and everything below, each once unless `remove_duplicate` is False."""
        for _, module in self.named_modules(remove_duplicate=remove_duplicate):
            yield module

    # ----------------------------------------------------------------------------------------------
    # Mode, gradients

    def train(self, mode: bool = True) -> Self:
        """Set training mode here and below, and return the module.

        Raises:
            ValueError: unless `mode` is a bool.
        """
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        with under_way(("train", mode), self) as met:
            steps = list(walk(self, _children, method="train", met=met, once=True))
            for event, _, module in steps:  # before any is changed
                if event is ENTER:
                    _state_dict.refuse_hidden_members(module)
            for event, _, module in steps:
                if event is ENTER:
                    module.training = mode
                elif event is CALL:
                    module.train(mode)
        return self

    def eval(self) -> Self:
        """Set evaluation mode here and below, and return the module."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Train or freeze every parameter, and return the module."""
        for param in self.parameters():
            param.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the ``grad`` of every parameter, to None or to zeros."""
        for param in self.parameters():
            if param.grad is not None:
                param.grad = None if set_to_none else jnp.zeros_like(param.grad)

    def apply(self, fn: Callable[[Module], object], *others: object) -> Self:
        """Call a function on every module, children first, and return the module."""
        if others or not callable(fn):  # as Flax has it
            raise refusals.apply_of_arrays(type(self).__name__)
        with under_way(("apply", id(fn)), self) as met:
            for event, _, module in walk(self, _children, method="apply", met=met):
                if event is LEAVE:
                    fn(module)
                elif event is CALL:
                    module.apply(fn)
        return self

    # ----------------------------------------------------------------------------------------------
    # Conversion

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        for _, module in self._walk_modules(None, "", True, _stored):
            _state_dict.refuse_hidden_members(module)
        boxes = [box for _, box in self._named_boxes(recurse)]
        # All or nothing. What has no shape yet is an empty array, whose dtype and place count.
        converted = [fn(box._value if is_lazy(box) else box.value) for box in boxes]
        for box, value in zip(boxes, converted, strict=True):
            if value is not box._value:
                Box.write(box, value)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast parameters and buffers, and return the module.

        Args:
            args: a dtype, a device (``jax.Device``, ``jax.sharding.Sharding`` or a platform name such
                as ``"cpu"``), both, or an array to take both from. A dtype casts floating and complex
                arrays only. A plan (`nn.parallel.Plan`), or a function of name and array, says for each name
                which device. Nothing is moved if it does not fit all of them. On the meta device it is noted
                where `nn.materialize` will draw.
        """
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        for ignored in ("non_blocking", "copy", "memory_format"):
            kwargs.pop(ignored, None)
        if kwargs:
            raise TypeError(f"to() got unexpected keyword arguments {sorted(kwargs)}")
        for arg in args:
            if isinstance(arg, bool) or arg is None:
                continue
            if says_by_name(arg):
                device = arg
            elif isinstance(arg, (jax.Array, np.ndarray, Box)):
                value = unwrap(arg)
                dtype, device = value.dtype, getattr(value, "sharding", None)
            elif isinstance(arg, (jax.Device, jax.sharding.Sharding, device_type)) or (
                isinstance(arg, str) and arg.split(":")[0] in _PLATFORMS
            ):
                device = arg
            else:
                dtype = arg
        if dtype is not None:
            dtype = as_dtype(dtype)
            if not jnp.issubdtype(dtype, jnp.inexact):
                raise refusals.cast_to_integers(dtype)
        if says_by_name(device):
            places = iter(places_in(self, device).values())
        else:
            places = itertools.repeat(resolve_device(device))
        # Copies of a box without numbers hold one struct, which tells that they will get the same numbers.
        structs: dict[Any, Any] = {}

        def convert(value: Value) -> Any:
            place, meta, source = next(places), is_meta(value), id(value)
            if dtype is not None and jnp.issubdtype(value.dtype, jnp.inexact):
                value = cast(value, supported(dtype))
            value = placed(value, place, share=False)
            return structs.setdefault((source, place), value) if meta else value

        return self._apply(convert)

    def type(self, dst_type: DTypeLike) -> Self:
        """Cast parameters and buffers of every dtype, and return the module."""
        return self._apply(lambda v: cast(v, supported(np.dtype(dst_type))))

    def float(self) -> Self:
        """Cast floating arrays to float32."""
        return self._cast_floating(jnp.float32)

    def double(self) -> Self:
        """Cast floating arrays to float64.

        Raises:
            DtypeError: unless 64-bit types are enabled, ``jax.config.update("jax_enable_x64", True)``.
        """
        return self._cast_floating(jnp.float64)

    def half(self) -> Self:
        """Cast floating arrays to float16."""
        return self._cast_floating(jnp.float16)

    def bfloat16(self) -> Self:
        """Cast floating arrays to bfloat16."""
        return self._cast_floating(jnp.bfloat16)

    def _cast_floating(self, dtype: DTypeLike) -> Self:
        dtype = supported(np.dtype(dtype))
        return self._apply(lambda v: cast(v, dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v)

    def cpu(self) -> Self:
        """Move parameters and buffers to the CPU."""
        return self.to("cpu")

    def cuda(self, device: int | None = None) -> Self:
        """Move parameters and buffers to a GPU."""
        return self.to(f"cuda:{device or 0}")

    def to_empty(self, *, device: DeviceLike, recurse: bool = True) -> Self:
        """Put zeros in place of every parameter and buffer, on a device, and return the module.

        Args:
            device: where to; a ``jax.sharding.Sharding`` too, or "meta".
            recurse: whether the modules below are meant as well.
        """
        place = resolve_device(device)
        return self._apply(lambda v: filled(v.shape, v.dtype, place), recurse)

    # ----------------------------------------------------------------------------------------------
    # State

    def state_dict(
        self,
        *,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> OrderedDict[str, Any]:
        """Return parameters and persistent buffers by dotted name, in torch's order and layout.

        Args:
            destination: a dict to fill.
            prefix: put before each name.
            keep_vars: give the boxes instead of the arrays.

        Returns:
            an ordered dict with an attribute ``_metadata`` (the version of each module). The arrays
            are immutable, so the dict is a snapshot. A cycle of modules ends where it would come back
            to a module that it is in, so ``load_state_dict`` finds the same names.
        """
        return _state_dict.state_dict(self, destination, prefix, keep_vars)

    @shortened
    def load_state_dict(
        self, state_dict: Mapping[str, object], strict: bool = True, assign: bool = False
    ) -> _state_dict.IncompatibleKeys:
        """Copy arrays by name into parameters and buffers; all or nothing.

        Args:
            state_dict: JAX or numpy arrays by dotted name.
            strict: whether missing and unexpected names are an error.
            assign: take the given dtypes instead of casting to the present ones.

        Returns:
            a named tuple ``missing_keys, unexpected_keys``.

        Raises:
            StateDictError: for names (with `strict`), shapes or dtypes that do not fit; the module is
                as it was before.
        """
        return _state_dict.load_state_dict(self, state_dict, strict, assign)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        _state_dict.save_own(self, destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        _state_dict.load_own(
            self,
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def get_extra_state(self) -> Any:
        """Return what else belongs into ``state_dict``; override it together with `set_extra_state`."""
        raise RuntimeError(
            "Reached a code path in Module.get_extra_state() that should never be called."
        )

    def set_extra_state(self, state: object) -> None:
        """Take what `get_extra_state` gave."""
        raise RuntimeError(
            "Reached a code path in Module.set_extra_state() that should never be called."
        )

    # ----------------------------------------------------------------------------------------------
    # Hooks

    def _hooks(self, name: str) -> HookDict:
        attributes = self.__dict__
        if name not in attributes:
            if "_parameters" not in attributes:
                raise _uninitialized(self, "registered a hook")
            attributes[name] = HookDict(self._nn_stamp)
        return attributes[name]

    def _add_call_hook(self, name: str, hook: tuple, prepend: bool) -> RemovableHandle:
        self._check_static_write(name, None)
        handle = add_hook(self._hooks(name), hook, prepend)
        real_dict(self)["_hooked"] = True
        return handle

    def register_forward_pre_hook(
        self, hook: Callable, *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Call ``hook(module, args)`` before forward; what it returns replaces the arguments."""
        return self._add_call_hook("_forward_pre_hooks", (hook, with_kwargs, False), prepend)

    def register_forward_hook(
        self,
        hook: Callable,
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> RemovableHandle:
        """Call ``hook(module, args, output)`` after forward; what it returns replaces the output."""
        return self._add_call_hook("_forward_hooks", (hook, with_kwargs, always_call), prepend)

    def register_full_backward_pre_hook(
        self, hook: Callable, prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(module, grad_output)`` in the backward pass, before the module's gradient."""
        return self._add_call_hook("_backward_pre_hooks", (hook, False, False), prepend)

    def register_full_backward_hook(self, hook: Callable, prepend: bool = False) -> RemovableHandle:
        """Call ``hook(module, grad_input, grad_output)`` after the module's gradient was computed."""
        return self._add_call_hook("_backward_hooks", (hook, False, False), prepend)

    def register_state_dict_pre_hook(self, hook: Callable) -> RemovableHandle:
        """Call ``hook(module, prefix, keep_vars)`` before ``state_dict`` collects."""
        return add_hook(self._hooks("_state_dict_pre_hooks"), (hook, True, False))

    def register_state_dict_post_hook(self, hook: Callable) -> RemovableHandle:
        """Call ``hook(module, state_dict, prefix, local_metadata)`` after; it must return None."""
        return add_hook(self._hooks("_state_dict_hooks"), (hook, True, False))

    def _register_state_dict_hook(self, hook: Callable) -> RemovableHandle:
        return add_hook(self._hooks("_state_dict_hooks"), (hook, False, False))

    def register_load_state_dict_pre_hook(self, hook: Callable) -> RemovableHandle:
        """Call ``hook(module, state_dict, prefix, ...)`` before the module's own part is loaded."""
        return add_hook(self._hooks("_load_state_dict_pre_hooks"), (hook, True, False))

    def _register_load_state_dict_pre_hook(
        self, hook: Callable, with_module: bool = False
    ) -> RemovableHandle:
        return add_hook(self._hooks("_load_state_dict_pre_hooks"), (hook, with_module, False))

    def register_load_state_dict_post_hook(self, hook: Callable) -> RemovableHandle:
        """Call ``hook(module, incompatible_keys)`` after; it may edit the two lists."""
        return add_hook(self._hooks("_load_state_dict_post_hooks"), (hook, True, False))

    # ----------------------------------------------------------------------------------------------
    # Text, copies, files

    def _get_name(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        """Return what stands in the parentheses of repr."""
        return ""

    def __repr__(self) -> str:
        lines: list[str] = []
        open_: list[bool] = []  # whether the modules around are closed by a line of their own
        with under_way("repr", self) as met:
            met.add(id(None))
            for event, name, module in walk(self, _shown, method="__repr__", met=met):
                if event is LEAVE:
                    if open_.pop():
                        lines.append("  " * len(open_) + ")")
                    continue
                indent = "  " * len(open_)
                start = f"{indent}({name}): " if open_ else ""
                if event is ENTER:
                    extra = module.extra_repr()
                    inside = extra.split("\n") if extra else []
                    open_.append(bool(module._modules) or len(inside) > 1)
                    start += f"{module._get_name()}("
                    if open_[-1]:
                        lines += [start, *(f"{indent}  {line}" for line in inside)]
                    else:
                        lines.append(f"{start}{extra})")
                elif event is CALL:
                    lines.append(start + repr(module).replace("\n", f"\n{indent}"))
                else:
                    lines.append(start + ("None" if module is None else "..."))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the module as a tree to fold, for notebooks."""
        from statefulnn.inspect.html import html_of_module  # the layer above, as in `compile`

        return html_of_module(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return deepcopied(self, memo)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name, value in state.items():
            if isinstance(value, Registry) and not isinstance(value, HookDict):
                state[name] = dict(value)
        # A member that another module had first is at home there, in a copy too.
        elsewhere = [
            (registry, name)
            for registry in REGISTRIES
            for name, member in state[registry].items()
            if isinstance(member, (Box, Module))
            and isinstance(member._nn_home, tuple)
            and member._nn_home[0]() not in (None, self)
        ]
        return {**state, _ELSEWHERE: elsewhere} if elsewhere else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        stamp = Stamp(birth_scope())
        set_stamp(self, stamp)
        attributes = real_dict(self)
        attributes.clear()
        elsewhere = state.get(_ELSEWHERE, ())
        for name, value in state.items():
            if name == _ELSEWHERE:
                continue
            if name in REGISTRIES:
                value = Registry(stamp, value)
            elif isinstance(value, BareHooks):
                value = HookDict(stamp, value)
            attributes[name] = value
        for registry in REGISTRIES:
            for key, member in attributes.get(registry, {}).items():
                if member is None or ((registry, key) in elsewhere and member._nn_home is not None):
                    continue
                place = (weakref.ref(self), key)
                set_home(member, place) if isinstance(member, Module) else setattr(
                    member, "_nn_home", place
                )
        stamp.touch()

    def compile(self, **kwargs: Any) -> Any:
        """Return this module as a compiled function: the same as ``nn.jit(module)``."""
        from statefulnn.transforms.jit import jit  # the layer above: only this method reaches up

        return jit(self, **kwargs)


class ParameterIterator(Iterator[Parameter]):
    """The parameters of a module, one by one; functions of trees do not take it for a leaf."""

    def __init__(self, parameters: Iterator[Parameter]) -> None:
        self._parameters = parameters

    def __next__(self) -> Parameter:
        return next(self._parameters)

    def __getitem__(self, number: object) -> Any:
        raise refusals.parameter_by_number(number)

    def __len__(self) -> int:
        raise refusals.number_of_parameters()

    def __bool__(self) -> bool:  # as any iterator
        return True


def _refuse_parameters(*_: object) -> Any:
    raise refusals.list_of_parameters()


jax.tree_util.register_pytree_node(ParameterIterator, _refuse_parameters, _refuse_parameters)


def _register(cls: type) -> None:
    jax.tree_util.register_pytree_with_keys(
        cls, flatten_module_with_keys, unflatten_module, flatten_module
    )


_register(Module)


def place_box(
    root: Module, path: Sequence[str], box: Box, container: type[Module] = Module
) -> None:
    """Put a box under a path of names, through modules of a class that are made as needed.

    It goes straight into the registries, since the names may be those of methods.
    """
    for part in path[:-1]:
        child = root._modules.get(part)
        if child is None:
            child = root._modules[part] = container()
            set_home(child, (weakref.ref(root), part))
        root = child
    registry = root._parameters if isinstance(box, Parameter) else root._buffers
    registry[path[-1]] = box
    root._adopt(box, path[-1])
    if isinstance(box, Buffer):
        root._remember_persistence(path[-1], box.persistent)


def find_box(root: Module, path: Sequence[str]) -> Box:
    """Return the box that `place_box` put under a path."""
    for part in path[:-1]:
        root = root._modules[part]
    last = path[-1]
    return root._parameters[last] if last in root._parameters else root._buffers[last]


def places_in(module: Module, plan: Plan | PlaceOf) -> dict[int, Any]:
    """Return the place of each parameter and buffer, by the identity of its box, in their order.

    A plan speaks of layers: what is stored for many of them is shown to it as the array of one, with the
    names of all, and its axes of layers are not split.
    """
    names: dict[int, list[str]] = {}
    for name, box in module._named_members(_all_boxes, remove_duplicate=False):
        names.setdefault(id(box), []).append(name)
    ranks: dict[int, set[int]] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        for name, box in _all_boxes(layer):
            whole, found = whole_of(box)
            if found and id(whole) in names:
                ranks.setdefault(id(whole), set()).update(found)
                names[id(whole)].append(f"{path}.{name}" if path else name)
    boxes = [box for _, box in module._named_members(_all_boxes)]
    axes: dict[int, tuple[int, int]] = {}
    named = []
    for box in boxes:
        value = box.value
        if id(box) in ranks:
            found = ranks[id(box)]
            first, count = len(value.shape) - max(found) - 1, max(found) - min(found) + 1
            axes[id(box)] = first, count
            shape = (*value.shape[:first], *value.shape[first + count :])
            place = place_of_entry(getattr(value, "sharding", None), first, count)
            value = jax.ShapeDtypeStruct(shape, value.dtype, sharding=place)
        named.append((names[id(box)], value))
    return {
        id(box): place_of_whole(place, *axes[id(box)]) if id(box) in axes else place
        for box, place in zip(boxes, places_by_name(named, plan), strict=True)
    }


def _all_boxes(module: Module) -> list[tuple[str, Any]]:
    return [*module._parameters.items(), *module._buffers.items()]


def _is_array(value: object) -> bool:
    arrays = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, Buffer, Parameter)
    return isinstance(value, arrays) or hasattr(value, "__jax_array__")


def _check_static_value(module: Module, name: str, value: object) -> None:
    """Raise if a plain attribute would hide a traced value, a module or a parameter."""
    if tracer_in(value):
        raise _traced_attribute(module, name)
    refuse_hidden(lambda: f"the {type(value).__name__} {module._label(name)!r}", value)


def _traced_attribute(module: Module, name: str) -> TraceLeakError:
    own = type(module).__module__.startswith("statefulnn.modules.")
    is_setting = own and name not in real_dict(module)
    return refusals.traced_attribute(module._label(name), name, is_setting)


def _uninitialized(module: Module, what: str) -> UninitializedModuleError:
    return refusals.before_super_init(type(module).__name__, what)


def _array_over_parameter(module: Module, name: str, value: object) -> RegistrationError:
    return refusals.array_over_parameter(type(value).__name__, module._label(name), name)


def _check_kept(module: Module, scope: Scope) -> None:
    """Raise if forward changed something in place in an attribute of a clone that nobody collects."""
    if scope.writable or scope.moduledef is None or not isinstance(module._nn_home, int):
        return
    d = scope.moduledef.nodes[module._nn_home]
    if type(module) is not d.cls:
        return
    keys = dict(d.statics)
    for name, _, copy in d.values:
        if copy == COPIED and name in module.__dict__:
            keys_of = ValueKeyMaker(
                lambda name=name: repr(module._label(name)), lambda m: m._nn_home
            )
            if keys_of.of(module.__dict__[name]) != keys[name]:
                raise refusals.change_in_place_would_be_lost(module._label(name), scope.lost)


def _locate(error: Exception, module: Module, child: str | None = None) -> None:
    """Note on an exception which module raised it, as a dotted path that grows on the way up."""
    where = getattr(error, "_statefulnn_where", None)
    if where is None:
        text, path = f"raised in {type(module).__name__}", ""
    else:
        if where[0] == id(module):
            return
        child = child or next((n for n, m in module._modules.items() if id(m) == where[0]), None)
        if child is None:
            return
        path = f"{child}.{where[1]}" if where[1] else child
        text = f"raised in {path!r} of {type(module).__name__} ({where[2]})"
    inner = type(module).__name__ if where is None else where[2]
    try:
        notes = getattr(error, "__notes__", None)
        if where is not None and notes and where[3] in notes:
            notes[notes.index(where[3])] = text
        else:
            error.add_note(text)
        error._statefulnn_where = (id(module), path, inner, text)  # pyright: ignore
    except Exception:  # an exception class may refuse attributes; the note is a courtesy
        return


def _stored(module: Module) -> Mapping[str, Module | None]:
    module._nn_settle()
    return module._modules


def _children(module: Module, _: str) -> list[tuple[str, Module]]:
    return [("", child) for child in module.children()]


def _shown(module: Module, _: str) -> list[tuple[str, Module | None]]:
    return list(module._nn_shown().items())


def _global(name: str, hook: tuple, prepend: bool = False) -> RemovableHandle:
    return add_hook(GLOBAL_HOOKS[name], hook, prepend)


def register_module_forward_pre_hook(hook: Callable) -> RemovableHandle:
    """Call ``hook(module, args)`` before every module's forward, before the module's own hooks."""
    return _global("_forward_pre_hooks", (hook, False, False))


def register_module_forward_hook(
    hook: Callable, *, with_kwargs: bool = False, always_call: bool = False
) -> RemovableHandle:
    """Call ``hook(module, args, output)`` after every module's forward."""
    return _global("_forward_hooks", (hook, with_kwargs, always_call))


def register_module_full_backward_pre_hook(hook: Callable) -> RemovableHandle:
    """Call ``hook(module, grad_output)`` before every module's gradient."""
    return _global("_backward_pre_hooks", (hook, False, False))


def register_module_full_backward_hook(hook: Callable) -> RemovableHandle:
    """Call ``hook(module, grad_input, grad_output)`` after every module's gradient."""
    return _global("_backward_hooks", (hook, False, False))
