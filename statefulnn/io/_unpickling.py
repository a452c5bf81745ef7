"""Runs a pickle, and builds only plain containers and what a closed list of names stands for.

A pickle is a program for a machine with a stack. ``pickletools`` of the standard library takes it apart into
operations. What each may do is written here, because Python's own unpicklers do too much: they set attributes
of any object that a file can reach, hash and compare anything that it uses as a key, and count nothing.

Here an object changes in four ways only. A list, a dict or a set that the same pickle made takes items. A
`Placeholder` takes what it is given. An ``OrderedDict`` takes ``_metadata``, as torch writes it. A value with
a method ``take_state`` checks what it takes. Keys are plain scalars, or short tuples of them; a Placeholder
stands in for any other. Nothing else from a file is ever hashed or compared.

Source: pickletools.py of Python 3.11, which describes each operation.
"""

from __future__ import annotations

import collections
import pickletools
from collections.abc import Callable, Iterable, Mapping, Sized
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np

from statefulnn.core.errors import CheckpointError, explain
from statefulnn.io._reading import OBJECT, OF_OBJECTS, Budget, broken, shown
from statefulnn.io.placeholder import Placeholder

_NEWEST_PROTOCOL = 5
# An integer key has at most this many bits: longer ones could be made to collide in a dict.
_LONGEST_NUMBER = 64
_LONGEST_KEY, _DEEPEST_KEY = 16, 3  # members of a tuple, and tuples in tuples
_LONGEST_KEY_BITS = 1024
_MOST_MEMO_BITS = 31
_GETATTR = "builtins.getattr", "__builtin__.getattr"


class Named:
    """A function or class of the closed list, as an object on the stack.

    Attributes:
        name: what the pickle calls it.
        build: makes a value from the arguments, or returns NotImplemented if it does not know them.
    """

    __slots__ = ("build", "name")

    def __init__(self, name: str, build: Callable[..., Any]) -> None:
        self.name, self.build = name, build

    @property
    def as_key(self) -> Placeholder:
        """What stands for it where it is the key of a dict."""
        return Placeholder(self.name)


def _member(function: object, args: tuple) -> str | None:
    """Return the full name where a pickle asks a foreign class for a member of it, else None.

    Up to protocol 3 a class in a class is written so, and early releases of Python 3.11 write members of
    an Enum so.
    """
    if not (isinstance(function, Placeholder) and function.name in _GETATTR and len(args) == 2):
        return None
    owner, name = args
    if isinstance(owner, Placeholder) and owner.args is None and type(name) is str:
        return f"{owner.name}.{name}"
    return None


class Machine:
    """Runs the pickles of one file.

    Args:
        path: the file, for messages.
        names: full name -> what it stands for: `Named`, or a value.
        persistent: returns the value for a key of something outside of the pickle, such as a storage.
        budget: pays for what is built.
        strict: whether other names are an error; otherwise they become a `Placeholder`.
    """

    def __init__(
        self,
        path: Path,
        names: Mapping[str, Any],
        persistent: Callable[[Any], Any],
        budget: Budget,
        strict: bool = False,
    ) -> None:
        self.path, self.names, self.persistent = path, names, persistent
        self.budget, self.strict = budget, strict
        self.position = 0

    def run(self, file: bytes | IO[bytes], at: int = 0) -> Any:
        """Return what one pickle builds.

        Args:
            file: the bytes of the pickle, or a file at its first byte.
            at: the byte of the whole file at which `file` begins.

        Raises:
            CheckpointError: if it is not a pickle, or does what a pickle of data does not do.
        """
        self.stack: list[Any] = []
        self.marks: list[int] = []  # the height of the stack at each mark
        self.memo: dict[int, Any] = {}
        self.position = at
        budget = self.budget
        multiple, before = (0 if budget.fixed else OF_OBJECTS), None
        try:
            for operation, argument, position in pickletools.genops(file):
                position = position or 0
                # The more of the pickle has been read, the more may have been built from it.
                budget.limit += multiple * (position - (position if before is None else before))
                before = position
                self.position = at + position
                run = _OPERATIONS.get(operation.name)
                if run is None:
                    raise _Refused(f"the operation {operation.name}")
                cost, act = run
                budget.spent += cost
                if budget.spent > budget.limit:
                    raise budget.exceeded()
                act(self, argument)
            if len(self.stack) != 1 or self.marks:
                raise _Refused(f"{len(self.stack)} objects")
            return self.stack.pop()
        except (CheckpointError, MemoryError, OSError):
            raise
        except Exception as error:
            text = shown(str(error))[1:-1]
            found = text if isinstance(error, _Refused) else f"{type(error).__name__}: {text}"
            expected = "a pickle of tensors and containers"
            raise broken(self.path, self.position, found, expected) from None

    # ----------------------------------------------------------------------------------------------
    # The stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _Refused("nothing on the stack")
        return self.stack.pop()

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _Refused("nothing on the stack")
        return self.stack[-1]

    def from_mark(self) -> list[Any]:
        """Take the mark, and what was pushed since, off the stack."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def drop(self, _: None) -> None:
        if self.marks and len(self.stack) == self.marks[-1]:
            self.marks.pop()
        else:
            self.pop()

    def remember(self, index: int) -> None:
        if index.bit_length() > _MOST_MEMO_BITS:
            raise _Refused("a memo of billions")
        self.memo[index] = self.top()

    # ----------------------------------------------------------------------------------------------
    # Plain values

    def sized(self, value: str | bytes | bytearray) -> None:
        self.budget.spend(len(value))
        self.push(value)

    def old_text(self, value: str) -> None:
        """A text of Python 2, where texts were bytes: pickletools has decoded it byte by byte."""
        raw = value.encode("latin-1")
        try:
            self.sized(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self.sized(raw)

    def number(self, value: int) -> None:
        self.budget.spend(value.bit_length() // 8)
        self.push(value)

    def protocol(self, number: int) -> None:
        if number > _NEWEST_PROTOCOL:
            raise _Refused(f"unsupported pickle protocol: {number}")

    # ----------------------------------------------------------------------------------------------
    # Containers

    def tuple_of(self, items: list[Any]) -> None:
        self.budget.spend(8 * len(items))
        self.push(tuple(items))

    def last_as_tuple(self, count: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(count)])))

    def dict_of(self, items: list[Any]) -> None:
        self.push({})
        self.set_items(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if len(items) % 2:
            raise _Refused("a key without a value")
        if isinstance(target, Placeholder):
            target.content = {} if target.content is None else target.content
            target = target.content
        if not isinstance(target, dict):
            raise _Refused(f"items for a {type(target).__name__}")
        self.budget.spend(OBJECT * (len(items) // 2))
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key, target)] = value

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Placeholder):
            target.content = [] if target.content is None else target.content
            target = target.content
        if type(target) is not list:
            raise _Refused(f"elements for a {type(target).__name__}")
        self.budget.spend(8 * len(items))
        target += items

    def set_item(self, _: None) -> None:
        value = self.pop()
        key = self.pop()
        self.set_items([key, value])

    def add(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not set:
            raise _Refused(f"members for a {type(target).__name__}")
        self.join(items, target)

    def join(self, items: Iterable[Any], target: set[Any]) -> set[Any]:
        """Put values into a set, or what stands in for them, and return the set."""
        for item in items:
            self.budget.spend(OBJECT)
            target.add(self.key(item, target))
        return target

    def key(self, value: Any, among: Sized) -> Any:
        """Return the value itself if it may be hashed and compared, else what stands in for it.

        Args:
            value: what a file has as a key, or as a member of a set.
            among: the dict or set it goes into.

        Raises:
            _Refused: with ``strict=True``, unless it is a plain scalar or a short tuple of these.
        """
        if self.is_scalar(value):
            return value
        if self.strict and type(value) is not tuple:
            raise _Refused(f"a key of type {type(value).__name__}")
        if self.is_short(value):
            # Several numbers can be made to collide, so the worst number of comparisons is paid for.
            self.budget.spend(4 * len(among))
            return value
        if self.strict:
            raise _Refused("a key that is a long tuple, or one of other things than scalars")
        found = getattr(value, "as_key", None)
        if found is not None:
            return found
        # The value itself is not looked at: a Placeholder is hashed by its identity.
        self.budget.spend(4 * OBJECT)
        return Placeholder(f"a {type(value).__name__} as a key", (value,))

    def is_scalar(self, value: Any) -> bool:
        """Say whether a value is a number or a text, and pay for the time it takes to hash and compare."""
        if isinstance(value, (str, bytes)):  # numpy's, too
            self.budget.spend(len(value))  # the cost of comparing it with an equal one
            return True
        if type(value) is int:
            return value.bit_length() <= _LONGEST_NUMBER
        of_numpy = isinstance(value, np.generic) and value.dtype.kind in "biuf"
        return value is None or type(value) in (bool, float, Placeholder) or of_numpy

    def is_short(self, value: Any, depth: int = _DEEPEST_KEY) -> bool:
        """Say whether a value is made of a few scalars, and nothing else."""
        if type(value) in (tuple, frozenset):
            inside = len(value) <= _LONGEST_KEY and depth > 0
            return inside and all(self.is_scalar(v) or self.is_short(v, depth - 1) for v in value)
        if isinstance(value, PurePath):
            self.budget.spend(sum(map(len, value.parts)))
            return True
        if type(value) is int:
            return value.bit_length() <= _LONGEST_KEY_BITS
        return type(value) is complex or isinstance(value, np.complexfloating)

    # ----------------------------------------------------------------------------------------------
    # Names, calls and states

    def find(self, full: str) -> None:
        found = self.names.get(full)
        self.push(self.foreign(full) if found is None else found)

    def find_on_stack(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise _Refused("a name that is no text")
        self.budget.spend(len(name) + len(module))
        self.find(f"{module}.{name}")

    def foreign(self, name: str, args: tuple | None = None, kwargs: Any = None) -> Placeholder:
        if self.strict:
            raise CheckpointError(
                explain(
                    f"{self.path}, at byte {self.position}: the file names {shown(name)}",
                    "with strict=True only tensors, numbers, texts and containers of these are taken",
                    "save data only, torch.save(model.state_dict(), path); or leave strict=True out: then a "
                    "Placeholder stands there, and nothing of the file is called",
                )
            )
        self.budget.spend(4 * OBJECT)
        return Placeholder(name, args, kwargs)

    def call(self, function: Any, args: Any, kwargs: Any = None) -> None:
        if type(args) is not tuple or (kwargs is not None and type(kwargs) is not dict):
            raise _Refused("a call without a tuple of arguments")
        self.budget.spend(8 * len(args))
        if (member := _member(function, args)) is not None:
            self.budget.spend(len(member))
            self.push(self.foreign(member))
        elif isinstance(function, Named):
            made = NotImplemented if kwargs else function.build(self, *args)
            self.push(self.foreign(function.name, args, kwargs) if made is NotImplemented else made)
        elif isinstance(function, Placeholder):
            # A Placeholder with arguments is a result. If it is called, the new one is named name().
            name = function.name if function.args is None else f"{function.name.rstrip('()')}()"
            self.budget.spend(len(name))
            self.push(self.foreign(name, args, kwargs))
        else:
            raise _Refused(f"a call of a {type(function).__name__}")

    def call_top(self, _: None) -> None:
        args = self.pop()
        self.call(self.pop(), args)

    def call_with_names(self, _: None) -> None:
        kwargs = self.pop()
        args = self.pop()
        self.call(self.pop(), args, kwargs)

    def call_old(self, full: str) -> None:
        """Protocol 0: the arguments are above the mark, the class is named by the operation."""
        args = tuple(self.from_mark())
        self.find(_full_name(full))
        self.call(self.pop(), args)

    def call_marked(self, _: None) -> None:
        """Protocol 1: the class and the arguments are above the mark."""
        function, *args = self.from_mark()
        self.call(function, tuple(args))

    def build(self, _: None) -> None:
        state = self.pop()
        target = self.top()
        if hasattr(type(target), "take_state"):
            target.take_state(self, state)
        elif isinstance(target, Placeholder):
            if target.args is None or target.state is not None:
                raise _Refused("a state for what is no object, or has one")
            target.state = state
        elif type(target) is collections.OrderedDict:
            known = isinstance(state, dict) and isinstance(state.get("_metadata"), dict)
            if self.strict and (not known or len(state) != 1):
                raise _Refused("a state of an OrderedDict other than _metadata")
            if known:  # other attributes are left out, as those of tensors are
                target._metadata = state["_metadata"]  # pyright: ignore[reportAttributeAccessIssue]
        else:
            raise _Refused(f"a state for a {type(target).__name__}")

    def outside(self, key: Any) -> None:
        self.budget.spend(4 * OBJECT)
        self.push(self.persistent(key))


class _Refused(Exception):
    """A pickle does what one of data does not do; `Machine.run` says where."""


def _full_name(argument: str) -> str:
    """Return the dotted name for the argument of an operation: module and name, separated by a blank."""
    module, _, name = argument.partition(" ")
    return f"{module}.{name}"


def _push(machine: Machine, value: object) -> None:
    machine.stack.append(value)


def _marked(act: Callable[[Machine, list[Any]], None]) -> Callable[[Machine, Any], None]:
    """Return an action on what is above the mark."""
    return lambda m, _: act(m, m.from_mark())


# Name of the operation -> the bytes it takes, besides those its action counts, and the action.
_OPERATIONS: dict[str, tuple[int, Callable[[Machine, Any], None]]] = {
    "PROTO": (0, Machine.protocol),
    "FRAME": (0, lambda m, _: None),
    "STOP": (0, lambda m, _: None),
    "MARK": (8, lambda m, _: m.marks.append(len(m.stack))),
    "POP": (0, Machine.drop),
    "POP_MARK": (0, _marked(lambda m, items: None)),
    "DUP": (8, lambda m, _: m.push(m.top())),
    "NONE": (8, _push),
    "NEWTRUE": (8, lambda m, _: m.push(True)),
    "NEWFALSE": (8, lambda m, _: m.push(False)),
    "INT": (40, _push),
    "BININT": (40, _push),
    "BININT1": (8, _push),  # Python keeps one object for each of these numbers
    "BININT2": (40, _push),
    "LONG": (OBJECT, Machine.number),
    "LONG1": (OBJECT, Machine.number),
    "LONG4": (OBJECT, Machine.number),
    "FLOAT": (32, _push),
    "BINFLOAT": (32, _push),
    "STRING": (OBJECT, Machine.old_text),
    "BINSTRING": (OBJECT, Machine.old_text),
    "SHORT_BINSTRING": (OBJECT, Machine.old_text),
    "UNICODE": (OBJECT, Machine.sized),
    "BINUNICODE": (OBJECT, Machine.sized),
    "SHORT_BINUNICODE": (OBJECT, Machine.sized),
    "BINUNICODE8": (OBJECT, Machine.sized),
    "BINBYTES": (OBJECT, Machine.sized),
    "SHORT_BINBYTES": (OBJECT, Machine.sized),
    "BINBYTES8": (OBJECT, Machine.sized),
    "BYTEARRAY8": (OBJECT, Machine.sized),
    "EMPTY_TUPLE": (8, lambda m, _: m.push(())),
    "TUPLE1": (2 * OBJECT, lambda m, _: m.last_as_tuple(1)),
    "TUPLE2": (2 * OBJECT, lambda m, _: m.last_as_tuple(2)),
    "TUPLE3": (2 * OBJECT, lambda m, _: m.last_as_tuple(3)),
    "TUPLE": (2 * OBJECT, _marked(Machine.tuple_of)),
    "EMPTY_LIST": (2 * OBJECT, lambda m, _: m.push([])),
    "LIST": (2 * OBJECT, _marked(lambda m, items: m.push(items))),
    "APPEND": (8, lambda m, _: m.append([m.pop()])),
    "APPENDS": (0, _marked(Machine.append)),
    "EMPTY_DICT": (2 * OBJECT, lambda m, _: m.push({})),
    "DICT": (2 * OBJECT, _marked(Machine.dict_of)),
    "SETITEM": (0, Machine.set_item),
    "SETITEMS": (0, _marked(Machine.set_items)),
    "EMPTY_SET": (4 * OBJECT, lambda m, _: m.push(set())),
    "ADDITEMS": (0, _marked(Machine.add)),
    "FROZENSET": (4 * OBJECT, _marked(lambda m, items: m.push(frozenset(m.join(items, set()))))),
    "PUT": (OBJECT, Machine.remember),
    "BINPUT": (OBJECT, Machine.remember),
    "LONG_BINPUT": (OBJECT, Machine.remember),
    "MEMOIZE": (OBJECT, lambda m, _: m.remember(len(m.memo))),
    "GET": (8, lambda m, index: m.push(m.memo[index])),
    "BINGET": (8, lambda m, index: m.push(m.memo[index])),
    "LONG_BINGET": (8, lambda m, index: m.push(m.memo[index])),
    "GLOBAL": (8, lambda m, argument: m.find(_full_name(argument))),
    "STACK_GLOBAL": (8, Machine.find_on_stack),
    "REDUCE": (8, Machine.call_top),
    "NEWOBJ": (8, Machine.call_top),
    "NEWOBJ_EX": (8, Machine.call_with_names),
    "INST": (8, Machine.call_old),
    "OBJ": (8, Machine.call_marked),
    "BUILD": (8, Machine.build),
    "PERSID": (8, Machine.outside),
    "BINPERSID": (8, lambda m, _: m.outside(m.pop())),
}
