"""Containers: modules and parameters in sequence or by name.

Source: ``torch.nn.modules.container``.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, NoReturn, Self

import numpy as np

from statefulnn.core import refusals
from statefulnn.core.box import Box
from statefulnn.core.errors import RegistrationError, explain
from statefulnn.core.module import Module
from statefulnn.core.parameter import Parameter

_ARRAYS = (np.ndarray, np.generic)


class Lambda(Module):
    """A function as a module without parameters, for use in `Sequential`.

    Args:
        fn: called with the module's inputs.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.Sequential(nn.Lambda(lambda x: x * 2))(jnp.ones(2)).tolist()
        [2.0, 2.0]
    """

    def __init__(self, fn: Callable) -> None:
        super().__init__()
        if not callable(fn) or isinstance(fn, type):
            raise RegistrationError(
                explain(
                    f"made nn.Lambda of {fn!r}",
                    "it calls a function",
                    "pass a function: nn.Lambda(fn)",
                )
            )
        self.fn = fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def extra_repr(self) -> str:
        return getattr(self.fn, "__name__", repr(self.fn))


def _index(container: Any, index: Any, length: int) -> int:
    """Return the position an index stands for, counted from the end if it is negative."""
    position = operator.index(index)
    if not -length <= position < length:
        raise IndexError(f"index {position} is out of range")
    return position % length


def _require_module(value: object, where: str) -> Module:
    if not isinstance(value, Module):
        raise refusals.no_module_in(where, value)
    return value


def _renumber(container: Module, modules: list[Any]) -> None:
    """Make these the children of a container, under consecutive numbers."""
    container._check_static_write("_modules", None)
    container._modules.clear()
    container._modules.update({str(i): m for i, m in enumerate(modules)})


class Sequential(Module):
    """Modules that are called one after the other, each with the output of the one before.

    Args:
        args: modules, or one ``OrderedDict`` of name -> module.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> model(jnp.ones((4, 2))).shape
        (4, 3)
        >>> model[:1]
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
        )
    """

    def __init__(self, *args: Any) -> None:
        super().__init__()
        if len(args) == 1 and isinstance(args[0], OrderedDict):
            for name, module in args[0].items():
                self.add_module(name, module)
        else:
            for i, module in enumerate(args):
                self.add_module(str(i), _require_module(module, "Sequential"))

    def forward(self, input: Any) -> Any:
        for module in list(self._modules.values()):
            input = module(input)
        return input

    def _name_at(self, index: object) -> str:
        return list(self._modules)[_index(self, index, len(self))]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(OrderedDict(list(self._modules.items())[index]))
        return self._modules[self._name_at(index)]

    def __setitem__(self, index: Any, module: Module) -> None:
        setattr(self, self._name_at(index), _require_module(module, "Sequential"))

    def __delitem__(self, index: Any) -> None:
        names = list(self._modules)
        for name in names[index] if isinstance(index, slice) else [self._name_at(index)]:
            delattr(self, name)
        # The names stay consecutive.
        _renumber(self, list(self._modules.values()))

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(list(self._modules.values()))

    def __add__(self, other: Sequential) -> Sequential:
        if not isinstance(other, Sequential):
            raise ValueError(
                "add operator supports only objects of Sequential class, but "
                f"{type(other)} is given."
            )
        return Sequential(*self, *other)

    def __iadd__(self, other: Sequential) -> Self:
        if not isinstance(other, Sequential):
            raise ValueError(
                "add operator supports only objects of Sequential class, but "
                f"{type(other)} is given."
            )
        for module in other:
            self.append(module)
        return self

    def __mul__(self, other: int) -> Sequential:
        _require_repeat(self, other)
        return Sequential(*(list(self) * other))

    def __rmul__(self, other: int) -> Sequential:
        return self * other

    def __imul__(self, other: int) -> Self:
        _require_repeat(self, other)
        modules = list(self)
        for _ in range(other - 1):
            self.extend(modules)
        return self

    def append(self, module: Module) -> Self:
        """Add a module at the end, and return the container."""
        self.add_module(str(len(self)), _require_module(module, "Sequential"))
        return self

    def extend(self, sequential: Iterable[Module]) -> Self:
        """Add modules at the end, and return the container."""
        for module in [_require_module(m, "Sequential") for m in sequential]:
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> Self:
        """Put a module before a position, and return the container."""
        _require_module(module, "Sequential")
        length = len(self)
        if not -length <= index <= length:
            raise IndexError(f"Index out of range: {index}")
        modules = list(self)
        modules.insert(index + length if index < 0 else index, module)
        _renumber(self, modules)
        return self

    def pop(self, key: int | slice) -> Module:
        """Remove the module at a position and return it."""
        module = self[key]
        del self[key]
        return module


def _require_repeat(container: object, other: object) -> None:
    if not isinstance(other, int):
        raise TypeError(f"unsupported operand type(s) for *: {type(container)} and {type(other)}")
    if other <= 0:
        raise ValueError(f"Non-positive multiplication factor {other} for {type(container)}")


class ModuleList(Module):
    """A list of modules.

    Args:
        modules: the modules.

    Example:
        >>> import statefulnn as nn
        >>> layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        >>> len(layers), [name for name, _ in layers.named_children()]
        (3, ['0', '1', '2'])
    """

    def __init__(self, modules: Iterable[Module] | None = None) -> None:
        super().__init__()
        if modules is not None:
            self.extend(modules)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(list(self._modules.values())[index])
        return self._modules[str(_index(self, index, len(self)))]

    def __setitem__(self, index: int, module: Module) -> None:
        setattr(self, str(_index(self, index, len(self))), _require_module(module, "ModuleList"))

    def __delitem__(self, index: Any) -> None:
        modules = list(self._modules.values())
        if not isinstance(index, slice):
            index = _index(self, index, len(self))
        del modules[index]
        _renumber(self, modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._modules.values()))

    def __contains__(self, module: object) -> bool:
        return any(m is module for m in self)

    def __iadd__(self, modules: Iterable[Module]) -> Self:
        return self.extend(modules)

    def __add__(self, other: Iterable[Module]) -> ModuleList:
        return ModuleList([*self, *other])

    def insert(self, index: int, module: Module) -> None:
        """Put a module before a position."""
        modules = list(self)
        modules.insert(index, _require_module(module, "ModuleList"))
        _renumber(self, modules)

    def append(self, module: Module) -> Self:
        """Add a module at the end, and return the container."""
        self.add_module(str(len(self)), _require_module(module, "ModuleList"))
        return self

    def pop(self, key: int) -> Module:
        """Remove the module at a position and return it."""
        module = self[key]
        del self[key]
        return module

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add modules at the end, and return the container."""
        if isinstance(modules, (str, bytes)) or not isinstance(modules, Iterable):
            raise RegistrationError(
                explain(
                    "ModuleList.extend should be called with an iterable, but got "
                    f"{type(modules).__name__}",
                    "it adds every element",
                    "use append for one module",
                )
            )
        for module in [_require_module(m, "ModuleList") for m in modules]:
            self.append(module)
        return self

    def __repr__(self) -> str:
        """Equal neighbours are shown once, with how many there are."""
        return grouped(self._get_name(), [(i, i, repr(m)) for i, m in enumerate(self)])


def grouped(name: str, parts: Iterable[tuple[int, int, str]]) -> str:
    """Return the text of a list of modules, given as (first, last, text), equal neighbours as one."""
    shown: list[tuple[int, int, str]] = []
    for first, last, text in parts:
        if shown and shown[-1][2] == text:
            shown[-1] = (shown[-1][0], last, text)
        else:
            shown.append((first, last, text))
    if not shown:
        return f"{name}()"
    lines = []
    for first, last, text in shown:
        text = text.replace("\n", "\n  ")
        if first == last:
            lines.append(f"({first}): {text}")
        else:
            lines.append(f"({first}-{last}): {last - first + 1} x {text}")
    return f"{name}(\n  " + "\n  ".join(lines) + "\n)"


def _pairs(container: object, given: object, noun: str) -> list[tuple[str, Any]]:
    """Return the (name, value) pairs of a mapping or an iterable of pairs."""
    name = type(container).__name__
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            f"{name}.update should be called with an iterable of key/value pairs, but got "
            f"{type(given).__name__}"
        )
    if isinstance(given, (Mapping, ModuleDict, ParameterDict)):
        return list(given.items())
    pairs = []
    for i, pair in enumerate(given):
        if not isinstance(pair, Iterable):
            raise TypeError(
                f"{name} update sequence element #{i} should be Iterable; is {type(pair).__name__}"
            )
        pair = list(pair)
        if len(pair) != 2:
            raise ValueError(
                f"{name} update sequence element #{i} has length {len(pair)}; 2 is required"
            )
        pairs.append((pair[0], pair[1]))
    return pairs


class ModuleDict(Module):
    """A dict of modules.

    Args:
        modules: a mapping of name -> module, or pairs.

    Example:
        >>> import statefulnn as nn
        >>> heads = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 3)})
        >>> list(heads), heads["b"].out_features
        (['a', 'b'], 3)
    """

    def __init__(
        self,
        modules: Mapping[str, Module] | ModuleDict | Iterable[tuple[str, Module]] | None = None,
    ) -> None:
        super().__init__()
        if modules is not None:
            self.update(modules)

    def __getitem__(self, key: str) -> Any:
        return self._modules[key]

    def __setitem__(self, key: str, module: Module) -> None:
        self.add_module(key, module)

    def __delitem__(self, key: str) -> None:
        self._check_static_write(key, None)
        del self._modules[key]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._modules))

    def __contains__(self, key: object) -> bool:
        return key in self._modules

    def clear(self) -> None:
        """Remove everything."""
        self._check_static_write("_modules", None)
        self._modules.clear()

    def pop(self, key: str) -> Module:
        """Remove a module and return it."""
        module = self[key]
        del self[key]
        return module

    def keys(self) -> KeysView[str]:
        """Return the names."""
        return self._modules.keys()

    def items(self) -> ItemsView[str, Any]:
        """Return the pairs of name and module."""
        return self._modules.items()

    def values(self) -> ValuesView[Any]:
        """Return the modules."""
        return self._modules.values()

    def update(
        self, modules: Mapping[str, Module] | ModuleDict | Iterable[tuple[str, Module]]
    ) -> None:
        """Add or replace modules by name."""
        for key, module in _pairs(self, modules, "module"):
            self[key] = module


def _as_parameter(value: Any) -> Any:
    """Return an array as a Parameter, anything else as it is."""
    if isinstance(value, Box):
        return value
    if isinstance(value, _ARRAYS) or (hasattr(value, "dtype") and hasattr(value, "shape")):
        import jax.numpy as jnp

        return Parameter(value, requires_grad=bool(jnp.issubdtype(value.dtype, jnp.inexact)))
    return value


def _describe(value: object) -> str:
    if isinstance(value, Parameter):
        return f"Parameter containing: [{value.dtype} of size {'x'.join(map(str, value.shape))}]"
    return f"Object of type: {type(value).__name__}"


class ParameterList(Module):
    """A list of parameters; arrays become parameters, other objects are kept as they are.

    Args:
        values: the elements.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> params = nn.ParameterList([jnp.ones(2), jnp.zeros(3)])
        >>> [name for name, _ in params.named_parameters()]
        ['0', '1']
    """

    def __init__(self, values: Iterable[object] | None = None) -> None:
        super().__init__()
        self._size = 0
        if values is not None:
            self.extend(values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)([self[i] for i in range(*index.indices(len(self)))])
        return getattr(self, str(_index(self, index, len(self))))

    def __setitem__(self, index: int, value: Any) -> None:
        setattr(self, str(_index(self, index, len(self))), _as_parameter(value))

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])

    def __iadd__(self, values: Iterable[Any]) -> Self:
        return self.extend(values)

    def append(self, value: object) -> Self:
        """Add an element at the end, and return the container."""
        setattr(self, str(self._size), _as_parameter(value))
        self._size += 1
        return self

    def extend(self, values: Iterable[object]) -> Self:
        """Add elements at the end, and return the container."""
        if isinstance(values, (str, Box)) or not isinstance(values, Iterable):
            raise TypeError(
                "ParameterList.extend should be called with an iterable, but got "
                f"{type(values).__name__}"
            )
        for value in list(values):
            self.append(value)
        return self

    def extra_repr(self) -> str:
        return "\n".join(f"  ({i}): {_describe(v)}" for i, v in enumerate(self))

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError("ParameterList should not be called.")


class ParameterDict(Module):
    """A dict of parameters; arrays become parameters, other objects are kept as they are.

    Args:
        parameters: a mapping of name -> value, or pairs.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> params = nn.ParameterDict({"scale": jnp.ones(2)})
        >>> params["scale"].shape, list(params)
        ((2,), ['scale'])
    """

    def __init__(
        self,
        parameters: Mapping[str, object]
        | ParameterDict
        | Iterable[tuple[str, object]]
        | None = None,
    ) -> None:
        super().__init__()
        self._keys: dict[str, None] = {}
        if parameters is not None:
            self.update(parameters)

    def _attribute(self, key: object) -> str:
        if not isinstance(key, str):
            raise TypeError(
                f"Index given to ParameterDict cannot be used as a key as it is not a string "
                f"(type is '{type(key).__name__}'). Open an issue if you need non-string keys."
            )
        return key

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return getattr(self, self._attribute(key))

    def __setitem__(self, key: str, value: Any) -> None:
        name = self._attribute(key)
        if key not in self._keys and hasattr(self, name):
            raise KeyError(f"attribute '{name}' already exists")
        setattr(self, name, _as_parameter(value))
        if key not in self._keys:
            self._keys = {**self._keys, key: None}

    def __delitem__(self, key: str) -> None:
        if key not in self._keys:
            raise KeyError(key)
        delattr(self, self._attribute(key))
        self._keys = {k: None for k in self._keys if k != key}

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._keys))

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self._keys))

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def copy(self) -> ParameterDict:
        """Return a dict of the same parameters."""
        return ParameterDict(OrderedDict(self.items()))

    def setdefault(self, key: str, default: object = None) -> Any:
        """Return the value of a key, which is set to a default if it is missing."""
        if key not in self:
            self[key] = default
        return self[key]

    def clear(self) -> None:
        """Remove everything."""
        for key in list(self._keys):
            del self[key]

    def pop(self, key: str) -> Any:
        """Remove a key and return its value."""
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[str, Any]:
        """Remove the last key and return it with its value."""
        if not self._keys:
            raise KeyError("popitem(): dictionary is empty")
        key = list(self._keys)[-1]
        return key, self.pop(key)

    def get(self, key: str, default: object = None) -> Any:
        """Return the value of a key, or a default."""
        return self[key] if key in self else default

    def fromkeys(self, keys: Iterable[str], default: object = None) -> ParameterDict:
        """Return a new dict with one value under each key."""
        return ParameterDict((key, default) for key in keys)

    def keys(self) -> KeysView[str]:
        """Return the names."""
        return self._keys.keys()

    def items(self) -> list[tuple[str, Any]]:
        """Return the pairs of name and value."""
        return [(key, self[key]) for key in self._keys]

    def values(self) -> list[Any]:
        """Return the values."""
        return [self[key] for key in self._keys]

    def update(
        self, parameters: Mapping[str, object] | ParameterDict | Iterable[tuple[str, object]]
    ) -> None:
        """Add or replace values by name."""
        pairs = _pairs(self, parameters, "parameter")
        if isinstance(parameters, Mapping) and not isinstance(parameters, OrderedDict):
            pairs.sort(key=lambda pair: pair[0])  # torch's order of plain dicts
        for key, value in pairs:
            self[key] = value

    def __or__(self, other: ParameterDict) -> ParameterDict:
        new = self.copy()
        new.update(other)
        return new

    def __ror__(self, other: ParameterDict) -> ParameterDict:
        new = ParameterDict(other.items())
        new.update(self)
        return new

    def __ior__(self, other: ParameterDict) -> Self:
        self.update(other)
        return self

    def extra_repr(self) -> str:
        return "\n".join(f"  ({k}): {_describe(v)}" for k, v in self.items())

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError("ParameterDict should not be called.")
