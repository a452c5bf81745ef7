"""What a call of a compiled function goes through: find its version, call it, write back.

The usual call, modules and arrays by position, is recognised argument by argument; any other is taken
apart. What the function reads from Python (the ModuleDef, static arguments) is looked at again only after
something has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from statefulnn.core.arrays import check_usable
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.generator import current_generator, streams
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.plan import Plan, build_plan, count_changes
from statefulnn.core.pytree import flatten_collecting
from statefulnn.transforms.lift import Signature, restore_output, write_back
from statefulnn.transforms.versions import Options, Statics, Version, versions_of


class KnownModules:
    """What is remembered of one combination of modules in the arguments."""

    __slots__ = ("plan", "references", "targets", "versions")

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.versions: dict[Any, Version] = {}  # by the structure of the arguments
        self.references: list[Any] = []
        self.targets: dict[int, list[Any]] = {}  # for each kind of result, the boxes it writes


class RecentCall:
    """A recent call with modules and arrays by position, to recognise the next one like it.

    Attributes:
        count: how many arguments it had; -1 once a module of it has died.
        wants: for each argument the identity of the module, or the type of the array.
        generator: the generator in force.
    """

    __slots__ = ("__weakref__", "count", "generator", "known", "references", "version", "wants")

    def __init__(
        self, wants: tuple[Any, ...], generator: Any, known: KnownModules, version: Version
    ) -> None:
        self.count = len(wants)
        self.wants = wants
        self.generator = generator
        self.known: Any = known
        self.version = version
        self.references: list[Any] = []

    def forget(self) -> None:
        """Match no call any more, and let go of the boxes."""
        self.count, self.known = -1, None


def _when_dead(objects: list[Any], owner: Any, forget: Callable[[Any], Any]) -> list[Any]:
    """Return weak references to objects; when one of them dies, `owner` forgets.

    The owner is referred to weakly as well: a cycle would keep arrays until the garbage collector runs.
    """
    reference = weakref.ref(owner)

    def callback(_: Any) -> None:
        alive = reference()
        if alive is not None:
            forget(alive)

    return [weakref.ref(obj, callback) for obj in objects]


class Dispatch:
    """A function of modules and arrays that finds its compiled version at each call.

    Args:
        function: the user's function.
        owner: the module whose call or method it is; it is passed as the first argument.
        options: how it is compiled.
    """

    def __init__(self, function: Callable, owner: ModuleBase | None, options: Options) -> None:
        self.function = function
        self.owner = owner
        self.options = options
        self.versions = versions_of(function, owner, options)
        self._counter = [0]
        self._met: weakref.WeakSet[Version] = weakref.WeakSet()
        self._known: dict[Any, KnownModules] = {}  # by the identities of the modules
        self._recent: list[RecentCall] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.owner is not None:
            args = (self.owner, *args)
        known: Any = None
        version: Any = None
        dynamic: Any = None
        if not kwargs:
            count, generator = len(args), streams.current
            for recent in self._recent:
                if recent.count == count and recent.generator is generator:
                    dynamic = []
                    for arg, want in zip(args, recent.wants):  # noqa: B905 (of one length)
                        if type(arg) is want:
                            dynamic.append(arg)
                        elif id(arg) != want:
                            break
                    else:
                        if recent.known.plan.valid():
                            known, version = recent.known, recent.version
                        break
        if known is None:
            known, version, dynamic = self.look_up(args, kwargs)
        if current_trace() is not EAGER:
            known.plan.note_read()
        leaves = known.plan.cached_leaves
        if leaves is None:
            leaves = known.plan.leaves()
            if known.plan.placements is not version.placements:
                known, version, dynamic = self.look_up(args, kwargs)
        self.versions.counter = self._counter
        try:
            out, written = version.call(leaves, dynamic)
        except (TypeError, RuntimeError):
            for box, leaf in zip(known.plan.boxes, leaves, strict=True):
                check_usable(leaf, box.label)
            raise
        return out if written is None else self.finish(known, leaves, out, written, args, kwargs)

    def finish(
        self,
        known: KnownModules,
        leaves: Sequence[Any],
        out: Any,
        written: dict[int, list[Any]],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """Put what a version wrote into the boxes, and the caller's own modules into its output."""
        number, values = written.popitem()
        plan, targets = known.plan, known.targets.get(number)
        indices, described = self.versions.results[number]
        if targets is None:
            targets = known.targets[number] = [plan.boxes[i] for i in indices]
        if targets:
            stamp = write_back(targets, values)
            if stamp is not None and indices[-1] == len(indices) - 1:
                # The first leaves were written, usually all but the generator: no need to gather.
                plan.keep([*values, *leaves[len(indices) :]], stamp)
        if described is not None:
            return restore_output(out, described, plan, flatten_collecting((args, kwargs))[2])
        return out

    def look_up(self, args: tuple, kwargs: dict[str, Any]) -> tuple[KnownModules, Version, list]:
        """Return what a call needs: what is known of its modules, its version, the other leaves."""
        statics = None
        self.versions.counter = self._counter
        if self.options.static_argnums or self.options.static_argnames:
            args, kwargs, statics = self._without_statics(args, kwargs)
        dynamic, treedef, roots = flatten_collecting((args, kwargs))
        generator = current_generator()
        known = self._known_of(roots if generator is None else [*roots, generator])
        plan, version = known.plan, known.versions.get(treedef) if statics is None else None
        plan.leaves()  # finds out where they lie
        if version is None or version.placements is not plan.placements:
            signature = Signature(plan.moduledef, treedef, generator is not None)
            version = self.versions.find(signature, statics, plan.placements)
            plan.placements = version.placements  # equal ones are one object
            if version not in self._met:
                self._met.add(version)
                self.versions.note_use(map(id, roots))
                self._counter[0] += version.traces > 0  # by an equal function, before this one
            if statics is None:
                known.versions[treedef] = version
        if statics is None and not kwargs and len(roots) + len(dynamic) == len(args):
            self._remember(args, roots, known, version)
        return known, version, dynamic

    def _known_of(self, everything: list[Any]) -> KnownModules:
        key = tuple(map(id, everything))
        known = self._known.get(key)
        if known is None or not known.plan.valid():
            stale, known = known, KnownModules(build_plan(everything))
            if stale is not None:
                count_changes(stale.plan, known.plan)
            known.references = _when_dead(
                everything, self, lambda owner: owner._known.pop(key, None)
            )
            self._known[key] = known
        return known

    def _remember(self, args: tuple, roots: list, known: KnownModules, version: Version) -> None:
        if not all(isinstance(a, (ModuleBase, jax.Array, np.ndarray, int, float)) for a in args):
            return
        wants = tuple(id(a) if isinstance(a, ModuleBase) else type(a) for a in args)
        recent = RecentCall(wants, streams.current, known, version)
        recent.references = _when_dead(roots, recent, RecentCall.forget)
        others = [r for r in self._recent if r.count >= 0 and r.wants != wants]
        self._recent = [recent, *others[:3]]

    def _without_statics(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any], Statics]:
        names = self.options.static_argnames
        numbers = {n % len(args) if args else n for n in self.options.static_argnums}
        static_args = tuple((i, args[i]) for i in sorted(numbers) if i < len(args))
        static_kwargs = tuple((k, kwargs[k]) for k in sorted(names & set(kwargs)))
        args = tuple(None if i in numbers else a for i, a in enumerate(args))
        kwargs = {k: v for k, v in kwargs.items() if k not in names}
        return args, kwargs, Statics(static_args, static_kwargs)

    @property
    def trace_count(self) -> int:
        """How many traces the calls made or met: one that an equal function made earlier counts."""
        return self._counter[0]

    def clear_cache(self) -> None:
        """Forget all compiled code."""
        self._known.clear()
        self._recent = []
        self._met.clear()
        self.versions.by_key.clear()
