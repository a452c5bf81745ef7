"""Attributes that are computed from registered parameters each time they are read.

A module with a computed ``weight`` has no parameter of that name: its class is exchanged for a subclass
whose property ``weight`` computes the array. Nothing is kept in a plain attribute, so no traced value
can outlive its trace, and clones, copies and compiled calls need no care.

A class is made once for each pair of base class and computations, which are compared by value: equal
models have the same class and share compiled code.
"""

from __future__ import annotations

from typing import Any

from statefulnn.core.errors import RegistrationError, explain
from statefulnn.core.module import Module
from statefulnn.utils._tensors import numbers_of


class Computation:
    """How one attribute is computed; a frozen dataclass, compared by value.

    Attributes:
        name: the attribute's name.
    """

    name: str
    # Whether the class is renamed, "ParametrizedLinear"; torch renames in this one case.
    renames: bool = False
    # Attributes that are kept for Python code only, as `Module._python_cache` says.
    python_cache: tuple[str, ...] = ()

    def read(self, module: Module) -> Any:
        """Return the array."""
        raise NotImplementedError

    def write(self, module: Module, value: object) -> None:
        """Take a value that is assigned to the attribute."""
        label = f"{type(module).__name__}.{self.name}"
        raise RegistrationError(
            explain(
                f"assigned a {type(value).__name__} to {label!r}",
                f"it is computed each time it is read, {self}: the value would be lost",
                "write the parameters that it is computed from, or remove the computation first",
            )
        )

    def before_saving(self, module: Module, destination: dict, prefix: str) -> None:
        """See the dict that the module is about to put its own entries into."""

    def before_loading(self, module: Module, given: Loading) -> None:
        """Bring a checkpoint of an older form into the present one."""


class Loading:
    """What `Module._load_from_state_dict` is given, by name.

    Attributes:
        state_dict: the entries, which may be exchanged in place.
        prefix: of the module's own names.
        metadata: of the module.
        strict: whether what is missing is to be noted.
        missing: the list of missing names.
    """

    __slots__ = ("metadata", "missing", "prefix", "state_dict", "strict")

    def __init__(
        self, state_dict: dict, prefix: str, metadata: dict, strict: bool, missing: list[str]
    ) -> None:
        self.state_dict = state_dict
        self.prefix = prefix
        self.metadata = metadata
        self.strict = strict
        self.missing = missing


_classes: dict[tuple, type] = {}


def base_of(module: Module) -> type:
    """Return the class of a module without its computed attributes."""
    return getattr(type(module), "_computed_base", type(module))


def computations(module: Module) -> tuple[Computation, ...]:
    """Return the computations of a module, by name."""
    return getattr(type(module), "_computations", ())


def computation(module: Module, name: str, kind: type) -> Any:
    """Return the computation of a kind under a name, None if there is none."""
    return next((c for c in computations(module) if c.name == name and isinstance(c, kind)), None)


def add_computation(module: Module, new: Computation) -> None:
    """Have an attribute computed from here on; its parameter must be gone already."""
    _exchange(module, (*computations(module), new))


def remove_computation(module: Module, old: Computation) -> None:
    """Have an attribute no longer computed; the module has none of that name then."""
    _exchange(module, tuple(c for c in computations(module) if c != old))


def _exchange(module: Module, wanted: tuple[Computation, ...]) -> None:
    module._check_static_write("__class__", None)
    object.__setattr__(module, "__class__", _class_with(base_of(module), wanted))
    module._nn_stamp.touch()


def _class_with(base: type, wanted: tuple[Computation, ...]) -> type:
    if not wanted:
        return base
    wanted = tuple(sorted(wanted, key=lambda c: c.name))
    cls = _classes.get((base, wanted))
    if cls is None:
        cls = _classes[base, wanted] = _made(base, wanted)
    return cls


def _made(base: Any, wanted: tuple[Computation, ...]) -> type:
    by_name = {c.name: c for c in wanted}

    def setattr_(self: Any, name: str, value: object) -> None:
        if name in by_name:
            by_name[name].write(self, value)
        else:
            base.__setattr__(self, name, value)

    def save(self: Any, destination: dict, prefix: str, keep_vars: bool) -> None:
        for c in wanted:
            c.before_saving(self, destination, prefix)
        base._save_to_state_dict(self, destination, prefix, keep_vars)

    def load(
        self: Any,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        *lists: Any,
    ) -> None:
        given = Loading(state_dict, prefix, local_metadata, strict, missing_keys)
        for c in wanted:
            c.before_loading(self, given)
        base._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, *lists
        )

    def reduce(self: object, protocol: int) -> Any:
        # The class cannot be found under its name; it is made again from what it was made of.
        return _bare, (base, wanted), self.__getstate__()

    name = base.__name__
    if any(c.renames for c in wanted):
        name = f"Parametrized{name}"
    return type(
        name,
        (base,),
        {
            "__doc__": base.__doc__,
            "__module__": base.__module__,
            "__setattr__": setattr_,
            "__reduce_ex__": reduce,
            "_computations": wanted,
            "_computed_base": base,
            "_load_from_state_dict": load,
            "_python_cache": (
                *base._python_cache,
                *sorted({name for c in wanted for name in c.python_cache}),
            ),
            "_save_to_state_dict": save,
            **{c.name: _property(c) for c in wanted},
        },
    )


def _bare(base: type, wanted: tuple[Computation, ...]) -> Any:
    cls: Any = _class_with(base, wanted)
    return cls.__new__(cls)


def _property(c: Computation) -> property:
    def read(module: Module) -> Any:
        try:
            return c.read(module)
        except (TypeError, AttributeError) as error:
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                numbers_of(tensor, f"computed {type(module).__name__}.{c.name} beside {name!r}")
            if isinstance(error, TypeError):
                raise
            # Out of a property, Python would take it for "there is no such attribute".
            raise RuntimeError(
                explain(
                    f"computed {type(module).__name__}.{c.name}, {c}",
                    f"the computation reads what is not there: {error}",
                    "restore the parameters and modules that it reads",
                )
            ) from error

    return property(read, doc=f"Computed each time it is read, by {c}.")
