"""The compiled code of one function: which versions there are, how one is made, when there are too many.

Terms
  version     a function compiled for one `Signature` and one value of its static arguments; `jax.jit`
              inside of it compiles anew for other shapes and dtypes.

`jit` of the same function or module, made anew at each call, finds the versions of the one before, so
``nn.jit(model)(x)`` in a loop compiles once. Another function of the same code compiles again: it may reach
other values, in its closure or through a global. What compiles again and again says so, once.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from statefulnn.core.box import Box
from statefulnn.core.class_keys import ValueKeyMaker
from statefulnn.core.construction import settings
from statefulnn.core.errors import RetraceWarning, user_stack_level
from statefulnn.core.failures import checks_traced
from statefulnn.core.lending import donated
from statefulnn.core.listeners import active
from statefulnn.core.objects import copied
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.placement import kept_in_place, traced_on
from statefulnn.core.plan import RETRACE_LIMIT
from statefulnn.core.static_keys import KeyMaker
from statefulnn.transforms import refusals
from statefulnn.transforms.lift import Signature, leaves_below, template
from statefulnn.transforms.naming import as_users, rename, source_of
from statefulnn.transforms.types import PyTree

MOST_VERSIONS = 64  # of one function, and traces of one version, that are kept
MOST_FUNCTIONS = 64  # whose versions are kept although the function that nn.jit returned is gone
SHAPES_LIMIT = 16  # traces of one version before a warning


class Options(NamedTuple):
    """How a function is compiled: what `jit` was given beside it."""

    static_argnums: frozenset[int]
    static_argnames: frozenset[str]
    donate: frozenset[int]
    for_jax: dict[str, Any]

    @classmethod
    def of(
        cls,
        function: Callable,
        static_argnums: Iterable[int | str],
        static_argnames: Iterable[str],
        donate: Iterable[int | str],
        for_jax: dict[str, Any],
    ) -> Options:
        """Return the options for a function, with every static argument known by position and by name.

        A caller passes an argument either way, so one that is named has to be found at its position too.

        Raises:
            ValueError: if the function has no such argument, or one is to be static and donated.
        """
        try:
            parameters = [*inspect.signature(function).parameters.values()]
        except (TypeError, ValueError):  # of a function written in C, perhaps
            parameters = [_ANY_POSITION, _ANY_NAME]
        kinds = {p.kind for p in parameters}
        positions = [p for p in parameters if p.kind in _BY_POSITION]
        by_name = {p.name for p in parameters if p.kind in _BY_NAME}
        count, more = len(positions), inspect.Parameter.VAR_POSITIONAL in kinds
        places = {p.name: i for i, p in enumerate(positions)}

        def numbered(option: str, given: Iterable[int | str]) -> set[int]:
            numbers: set[int] = set()
            for n in given:
                at = places.get(n) if isinstance(n, str) else n
                if at is None or not (more or -count <= at < count):
                    raise refusals.no_argument_for_option(option, n, list(places))
                # With *args, only a call tells what the last argument is: see `Dispatch._without_statics`.
                numbers.add(at % count if at < 0 and not more else at)
            return numbers

        numbers, donated = numbered("static_argnums", static_argnums), numbered("donate", donate)
        chosen = frozenset(static_argnames)
        wrong = [] if inspect.Parameter.VAR_KEYWORD in kinds else chosen - by_name
        if wrong:
            raise refusals.no_argument_for_option("static_argnames", min(wrong), sorted(by_name))
        named = {i for i, p in enumerate(positions) if p.name in chosen & by_name}
        names = {positions[n].name for n in numbers if 0 <= n < count} & by_name
        both = (numbers | named) & donated
        if both:
            raise refusals.static_and_donated(min(both))
        return cls(frozenset(numbers | named), chosen | names, frozenset(donated), for_jax)


_ANY_POSITION = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
_ANY_NAME = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Statics(NamedTuple):
    """The static arguments of a call, by position and by name."""

    args: tuple[tuple[int, Any], ...]
    kwargs: tuple[tuple[str, Any], ...]

    def key(self) -> tuple:
        """Return what tells them apart: names and keys."""
        return self._key_and_objects()[0]

    def _key_and_objects(self) -> tuple[tuple, dict[int, object]]:
        for _, value in (*self.args, *self.kwargs):
            if isinstance(value, (ModuleBase, Box)):
                raise refusals.static_module(type(value).__name__)
        keys = ValueKeyMaker(lambda: "a static argument")
        key = tuple((where, keys.of(value)) for group in self for where, value in group)
        return key, keys.objects

    def bound(self, function: Callable) -> Callable:
        """Return a function of the other arguments; it keeps copies, since the caller may change his."""
        key, objects = self._key_and_objects()
        kept = copied(tuple(self), lambda value: value, objects)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            statics = Statics(*copied(kept, lambda value: value))
            # Each static argument left a None in its place: see `Dispatch._without_statics`.
            full = list(args)
            for i, value in statics.args:
                full[i] = value
            out = function(*full, **kwargs, **dict(statics.kwargs))
            if statics.key() != key:
                name = getattr(function, "__name__", "a function")
                raise refusals.changed_static_argument(name)
            return out

        return call


class Version:
    """A function compiled for one signature and one value of its static arguments.

    Attributes:
        signature, statics: these; of the static arguments the key.
        placements: the shardings of the leaves that lie on several devices; what is written keeps them.
        call: ``call(leaves, dynamic) -> (out, written)``. `written` is None, or a dict with one item: the
            number of the trace, whose indices `Versions.results` has, and the values that were written.
        traces: how often it has been traced.
    """

    __slots__ = (
        "__weakref__",
        "_make",
        "_shapes",
        "call",
        "donation",
        "placements",
        "signature",
        "statics",
        "traces",
    )

    def __init__(
        self, signature: Signature, statics: tuple | None, donation: Donation | None
    ) -> None:
        self.signature, self.statics, self.donation = signature, statics, donation
        self.traces = 0
        self._shapes: list[tuple] = []
        self.placements: tuple[Any, ...] | None = None
        self.call: Any = None
        self._make: Callable[[], Any] = lambda: None

    def compiled_by(self, make: Callable[[], Any]) -> None:
        """Take the function that makes `call`, and make it."""
        self._make, self.call = make, make()

    def given(self, leaves: Sequence[jax.Array], dynamic: Sequence[ArrayLike]) -> tuple:
        """Return the arguments as the jitted function takes them."""
        return (leaves, dynamic) if self.donation is None else self.donation.select(leaves, dynamic)

    def lower(self, leaves: Sequence[jax.Array], dynamic: Sequence[ArrayLike]) -> Any:
        jitted = self.call if self.donation is None else self.call.__wrapped__
        return jitted.lower(*self.given(leaves, dynamic))

    def note_trace(
        self, name: str, leaves: Sequence[jax.Array], dynamic: Sequence[ArrayLike]
    ) -> None:
        """Count a trace; warn if there are many, and let go of old code if there are very many."""
        self.traces += 1
        before = self._shapes
        # Equinox leaves None in a module where there is nothing to differentiate.
        self._shapes = [
            ((), None) if v is None else (jnp.shape(v), jnp.result_type(v))
            for v in (*leaves, *dynamic)
        ]
        if self.traces == SHAPES_LIMIT:
            changed = [
                i for i, (a, b) in enumerate(zip(before, self._shapes, strict=True)) if a != b
            ]
            warn_of_compilations(refusals.many_shapes(name, self.traces, self._shown(changed)))
        if self.traces % MOST_VERSIONS == 0:
            self.call = self._make()  # the calls to come; JAX drops the code of the old one

    def _shown(self, changed: list[int]) -> list[str]:
        """Return the names of the first few arrays of these numbers, and their last shapes."""
        labels = [repr(n) for n in self.signature.moduledef.leaf_names]
        marks = jax.tree_util.tree_flatten_with_path(template(self.signature.treedef))[0]
        paths = {m.number: p for p, m in marks if m.is_leaf}
        for number in sorted(paths):
            (which, *path) = paths[number]
            where = "kwargs" if which.idx else "args"
            labels.append(f"{where}{jax.tree_util.keystr(tuple(path))}")
        return [f"{labels[i]} (last: {self._shapes[i][0]})" for i in changed[:4]]


class Versions:
    """All versions of one function.

    Attributes:
        results: what each trace found out: which leaves it writes, and the modules in its output.
        checked: the numbers of the traces with checks that may fail: their results are waited for.
        by_key: the versions by signature, static arguments and settings, the one used last at the end.
        counter: a list with one number, which counts the traces; that of the caller. Equal functions share
            versions, and each counts for itself.
    """

    def __init__(self, function: Callable, options: Options) -> None:
        self._function = function
        self._options = options
        self.name = getattr(function, "__name__", "forward")
        self.counter = [0]
        self.results: list[tuple[tuple[int, ...], Any]] = []
        self.checked: set[int] = set()
        self.by_key: collections.OrderedDict[Any, Version] = collections.OrderedDict()

    def find(
        self, signature: Signature, statics: Statics | None, placements: tuple[Any, ...] | None
    ) -> Version:
        """Return the version for a call; make it if there is none."""
        key = (signature, None if statics is None else statics.key(), placements, settings())
        version = self.by_key.get(key)
        if version is None:
            version = self.by_key[key] = self._made(signature, statics, key[1])
            version.placements = placements
            if len(self.by_key) > MOST_VERSIONS:
                self.by_key.popitem(last=False)
        self.by_key.move_to_end(key)
        return version

    def _made(self, signature: Signature, statics: Statics | None, key: tuple | None) -> Version:
        self._warn_of_versions(signature, key)
        function = self._function if statics is None else statics.bound(self._function)
        name, numbers, results = self.name, self._options.donate, self.results
        checked = self.checked
        donation = Donation(signature, numbers) if numbers else None
        returned = frozenset() if donation is None else donation.leaves
        version = Version(signature, key, donation)
        # Compiled code refers to what it is part of weakly: all of it goes when the last user does. JAX keeps
        # the code by the function, so a strong reference from the function would keep everything.
        this, all_of_them = weakref.ref(version), weakref.ref(self)

        def traced(leaves: list[jax.Array], dynamic: list[ArrayLike]) -> tuple[PyTree, Any]:
            # The number is taken before the user's function runs, which may trace this one again.
            number = len(results)
            results.append(((), None))
            versions, alive = all_of_them(), this()
            if versions is not None and alive is not None:
                versions.counter[0] += 1
                alive.note_trace(name, leaves, dynamic)
            checks = checks_traced()
            placements = () if alive is None else alive.placements or ()
            with traced_on(placements):
                out, written = signature.run(function, leaves, dynamic, returned=returned)
            if checks_traced() != checks:
                checked.add(number)
            elif not written.indices and written.out is None:
                return out, None
            values = list(written.values)
            for at, i in enumerate(written.indices if placements else ()):
                values[at] = kept_in_place(values[at], placements[i])
            # The key of a dict is static, part of the output's structure. So the caller learns which
            # trace a result is of without an array that says so: one function has several traces, and
            # each may write other leaves.
            results[number] = (written.indices, written.out)
            return out, {number: values}

        for_jax = self._options.for_jax

        def make() -> Any:
            # Each a function of its own: JAX finds code by the function, and drops it with it. The same
            # function, jitted again, would get the old code back, and nothing would ever be dropped.
            again = as_users(traced, signature.written_by_user(function), name)
            if donation is None:
                return jax.jit(again, **for_jax)
            return donation.compiled(again, for_jax)

        version.compiled_by(make)
        return version

    def note_use(self, modules: Sequence[Any]) -> None:
        """Note that a call is about to compile; warn if functions like this one are made again and again.

        Args:
            modules: the modules and boxes in the arguments.
        """
        function = source_of(self._function)
        code = getattr(function, "__code__", None) or getattr(
            type(function).__call__, "__code__", None
        )
        modules = [*modules, *_modules_in(function)]
        if self.results or code is None or not modules:
            return
        # A function made at the same place for other modules has every reason to be compiled.
        place = (code.co_filename, code.co_firstlineno, code.co_name)
        references, count = _made.pop(place, ((), 0))
        same = len(references) == len(modules) and all(
            reference() is module for reference, module in zip(references, modules, strict=True)
        )
        count = count + 1 if same else 1
        _made[place] = tuple(map(weakref.ref, modules)), count
        if len(_made) > MOST_FUNCTIONS:
            _made.popitem(last=False)
        if count == RETRACE_LIMIT + 1:
            where = f"{code.co_filename}:{code.co_firstlineno}"
            warn_of_compilations(refusals.made_anew(self.name, where, count))

    def _warn_of_versions(self, signature: Signature, statics: tuple | None) -> None:
        """Warn where static arguments, or the structure of the arguments, keep causing compilations."""
        same = [v for v in self.by_key.values() if v.signature.moduledef is signature.moduledef]
        alike = [v for v in same if v.signature == signature]
        if statics is not None and len(alike) == RETRACE_LIMIT:
            last = dict(alike[-1].statics or ())
            names = [n for n, value in statics if last.get(n) != value]
            warn_of_compilations(refusals.many_values(self.name, RETRACE_LIMIT + 1, names))
        elif not alike and len({v.signature.treedef for v in same}) == RETRACE_LIMIT:
            warn_of_compilations(
                refusals.many_structures(self.name, RETRACE_LIMIT + 1, signature.treedef)
            )


class Donation:
    """Which arguments of a version give their memory away.

    JAX donates whole arguments. So the compiled function takes two: the arrays to give away, and the others.

    Args:
        signature: of the call.
        numbers: the positional arguments that are donated.

    Attributes:
        leaves: the leaf positions that are donated.
    """

    def __init__(self, signature: Signature, numbers: frozenset[int]) -> None:
        args, _ = template(signature.treedef)
        chosen = [args[i] for i in sorted(numbers) if i < len(args)]
        marks = jax.tree_util.tree_leaves(chosen)
        roots = [m.number for m in marks if not m.is_leaf]
        self.leaves = frozenset(leaves_below(signature.moduledef, roots))
        self._dynamic = frozenset(m.number for m in marks if m.is_leaf)
        self._signature, self._num_leaves = signature, signature.moduledef.num_leaves

    def select(self, leaves: Sequence[jax.Array], dynamic: Sequence[ArrayLike]) -> tuple:
        """Return the arrays that are donated, and the others."""
        others = [dynamic[i] for i in sorted(self._dynamic)]
        gone = donated(leaves, sorted(self.leaves), others)
        return gone, self._kept(leaves, dynamic)

    def _kept(self, leaves: Sequence[Any], dynamic: Sequence[Any]) -> list[Any]:
        kept = [v for i, v in enumerate(leaves) if i not in self.leaves]
        return kept + [v for i, v in enumerate(dynamic) if i not in self._dynamic]

    def _labels(self, function: Callable) -> dict[str, list[str]]:
        """Return what messages call the arguments of the jitted function."""
        leaves, dynamic = self._signature.labels(function).values()
        gone = [leaves[i] for i in sorted(self.leaves)]
        gone += [dynamic[i] for i in sorted(self._dynamic)]
        return {"gone": gone, "kept": self._kept(leaves, dynamic)}

    def _joined(self, gone: Sequence[jax.Array], kept: Sequence[jax.Array]) -> tuple[list, list]:
        """Undo `select`: return the leaves, and the other arrays."""
        first, rest = iter(gone), iter(kept)
        numbers = range(len(gone) + len(kept) - self._num_leaves)
        leaves = [next(first if i in self.leaves else rest) for i in range(self._num_leaves)]
        return leaves, [next(first if i in self._dynamic else rest) for i in numbers]

    def compiled(self, traced: Callable, for_jax: dict[str, Any]) -> Any:
        """Compile a function of ``(leaves, dynamic)`` so that it takes the memory it is given."""

        def donating(gone: list[jax.Array], kept: list[jax.Array]) -> Any:
            try:
                return traced(*self._joined(gone, kept))
            except Exception as error:
                rename(error, traced, lambda: self._labels(source_of(traced)))
                raise

        own = {"__signature__": inspect.signature(donating)}
        functools.update_wrapper(donating, traced, updated=()).__dict__.update(own)
        jitted = jax.jit(donating, donate_argnums=0, **for_jax)

        def call(leaves: list[jax.Array], dynamic: list[ArrayLike]) -> Any:
            return jitted(*self.select(leaves, dynamic))

        call.__wrapped__ = jitted  # for `Version.lower`
        return call


def warn_of_compilations(text: str) -> None:
    """Warn at the user's line that something keeps causing compilations."""
    warnings.warn(text, RetraceWarning, stacklevel=user_stack_level())


# --------------------------------------------------------------------------------------------------
# Functions made anew

# By the function, its owner and the options: its versions, and a reference to the owner, whose death
# removes the entry.
_shared: collections.OrderedDict[Any, tuple[Versions, Any]] = collections.OrderedDict()
# For places in the source: the modules of the last function made there, and how many were made for them.
_made: collections.OrderedDict[tuple, tuple[tuple[weakref.ref, ...], int]] = (
    collections.OrderedDict()
)


def versions_of(function: Callable, owner: ModuleBase | None, options: Options) -> Versions:
    """Return the versions of a function, those that an earlier `jit` of the same object made if it can.

    Args:
        function: the user's function.
        owner: the module whose call or method it is; other modules have versions of their own.
        options: how it is compiled.
    """
    # A listener (nn.capture) hears what is traced, and not what was compiled before.
    if active.listeners or not _holds_nothing(function):
        return Versions(function, options)
    for_jax = KeyMaker(lambda: "an option of nn.jit").of(options.for_jax)
    key = (function, id(owner), *options[:3], for_jax)
    versions, _ = _shared.get(key, (None, None))
    if versions is None:
        versions = Versions(function, options)
        # Python gives the id of a dead owner to a new object: the entry goes with the owner.
        dies = None if owner is None else weakref.ref(owner, lambda _: _shared.pop(key, None))
        _shared[key] = versions, dies
        if len(_shared) > MOST_FUNCTIONS:
            _shared.popitem(last=False)
    return versions


def _holds_nothing(function: Callable) -> bool:
    """Say whether a function keeps nothing alive, so that its versions may outlive what `jit` returned."""
    if type(function) is not types.FunctionType:
        return False
    held = (function.__closure__, function.__defaults__, function.__kwdefaults__, function.__dict__)
    return not any(held)


def _modules_in(function: object, depth: int = 3) -> list[Any]:
    """Return the modules that a function closes over."""
    found = []
    for cell in getattr(function, "__closure__", None) or () if depth else ():
        with contextlib.suppress(ValueError):  # it has no value yet
            held = cell.cell_contents
            found += [held] if isinstance(held, ModuleBase) else _modules_in(held, depth - 1)
    return found
