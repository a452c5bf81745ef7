"""Stands in for an object of a foreign class in a file: it describes the object, and does nothing."""

from __future__ import annotations

import itertools
from typing import Any, NoReturn

from statefulnn.core.errors import CheckpointError, explain
from statefulnn.io._reading import shown

_SHOWN, _LONGEST = 6, 500  # parts of a container, letters of a repr


class Placeholder:
    """Stands for an object in a file of ``torch.save`` whose class `nn.load` does not build.

    A file names classes and functions, and the arguments to call them with. `nn.load` imports and calls none
    of them. For a name that is not on its list, such as ``argparse.Namespace`` in a checkpoint of Lightning,
    it returns a Placeholder. Placeholders are compared by identity.

    Attributes:
        name: the class or function, with its module.
        args: the arguments it was to be called with; None for the class or function itself.
        kwargs: the keyword arguments.
        state: the attributes the object had, mostly a dict; None if it had none.
        content: what it held as a list or a dict; None if it held nothing.

    Example:
        >>> import argparse, os, tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "last.ckpt")
        ...     torch.save({"w": torch.ones(2), "args": argparse.Namespace(lr=0.1)}, path)
        ...     found = nn.load(path)
        >>> found["w"].tolist(), found["args"]
        ([1.0, 1.0], Placeholder('argparse.Namespace', state={'lr': 0.1}))
        >>> found["args"].state["lr"]
        0.1
    """

    __slots__ = ("args", "content", "kwargs", "name", "state")

    def __init__(
        self, name: str, args: tuple | None = None, kwargs: dict[str, Any] | None = None
    ) -> None:
        self.name, self.args, self.kwargs = name, args, kwargs or {}
        self.state: Any = None
        self.content: list | dict | None = None

    def __repr__(self) -> str:
        parts = [repr(self.name) if len(self.name) < 200 else f"{self.name[:200]!r} ..."]
        if self.args:
            parts.append(f"args={_outline(self.args)}")
        if self.kwargs:
            parts.append(f"kwargs={_outline(self.kwargs)}")
        if self.state is not None:
            parts.append(f"state={_outline(self.state)}")
        if self.content is not None:
            parts.append(f"content={_outline(self.content)}")
        text = f"Placeholder({', '.join(parts)})"
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...)"

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise self._refusal("used as an array")

    def __jax_array__(self) -> NoReturn:
        raise self._refusal("used as an array")

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise self._refusal("called")

    def __getattr__(self, name: str) -> NoReturn:
        # Called only for missing attributes. An AttributeError, so that hasattr() works.
        if name.startswith("__") or name in self.__slots__:  # in an unfinished copy
            raise AttributeError(name)
        message = f"a Placeholder for {shown(self.name)} has no attribute {name!r}"
        if isinstance(self.state, dict) and name in self.state:
            message += f"; the object's own attributes are in its state: .state[{name!r}]"
        raise AttributeError(message)

    def _refusal(self, done: str) -> CheckpointError:
        return CheckpointError(
            explain(
                f"{self!r} was {done}",
                "it stands for an object in a file, of a class that nn.load does not build",
                "take what you need from its args and state, or use the entries beside it",
            )
        )


def _outline(value: object) -> str:
    """Return a short text for a container: its first plain parts."""
    if isinstance(value, dict):
        first = itertools.islice(value.items(), _SHOWN)
        items = [f"{shown(k)}: {_brief(v)}" for k, v in first]
        return "{" + ", ".join(items + ["..."] * (len(value) > _SHOWN)) + "}"
    if isinstance(value, (list, tuple)):
        inside = ", ".join([_brief(v) for v in value[:_SHOWN]] + ["..."] * (len(value) > _SHOWN))
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return _brief(value)


def _brief(value: object) -> str:
    if isinstance(value, Placeholder):
        return f"Placeholder({shown(value.name)})"
    return shown(value)
