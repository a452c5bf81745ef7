"""What a call of a compiled function goes through: find its version, call it, write back.

The usual call, modules and arrays by position, is recognised argument by argument; any other is taken
apart. What the function reads from Python (the ModuleDef, static arguments) is looked at again only after
something has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.arrays import check_usable
from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.construction import settings
from statefulnn.core.errors import StatefulnnError
from statefulnn.core.failures import raise_original, wait_for
from statefulnn.core.generator import Forbidden, Generator, current_generator, streams
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.plan import Plan, build_plan, count_changes
from statefulnn.core.pytree import flatten_collecting
from statefulnn.core.refusals import several_meshes
from statefulnn.core.tracebacks import shorten
from statefulnn.transforms.arguments import refuse_what_is_no_array
from statefulnn.transforms.lift import Signature, call_module, restore_output, write_back
from statefulnn.transforms.types import PyTree, TreeDef
from statefulnn.transforms.versions import Options, Statics, Version, versions_of

_Owner = TypeVar("_Owner")


class KnownModules:
    """What is remembered of one combination of modules in the arguments."""

    __slots__ = ("plan", "references", "targets", "versions")

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        plan.settings = settings()
        self.versions: dict[TreeDef, Version] = {}  # by the structure of the arguments
        self.references: list[weakref.ref] = []
        self.targets: dict[int, list[Box]] = {}  # by the number of a trace, the boxes it writes


class RecentCall:
    """A recent call with modules and arrays by position, to recognise the next one like it.

    What a call needs beside its arrays depends on its modules and on how the arguments are put together. The
    same modules have the same plan, while that is valid; an array or a number is one leaf, whatever its
    value, and ``jax.jit`` tells shapes apart by itself. So the identities of the modules and the types of the
    others are enough, and nothing has to be flattened.

    Attributes:
        count: how many arguments it had; -1 once a module of it has died.
        wants: for each argument the identity of the module, or the type of the array.
        generator: the generator in force.
    """

    __slots__ = ("__weakref__", "count", "generator", "known", "references", "version", "wants")

    def __init__(
        self,
        wants: tuple[int | type, ...],
        generator: Generator | Forbidden,
        known: KnownModules,
        version: Version,
    ) -> None:
        self.count = len(wants)
        self.wants = wants
        self.generator = generator
        self.known: Any = known  # `KnownModules`, None once it is forgotten
        self.version = version
        self.references: list[weakref.ref] = []

    def forget(self) -> None:
        """Match no call any more, and let go of the boxes."""
        self.count, self.known = -1, None


def _when_dead(
    objects: Sequence[object], owner: _Owner, forget: Callable[[_Owner], object]
) -> list[weakref.ref]:
    """Return weak references to objects; when one of them dies, `owner` forgets.

    Modules are found again by their ids, and Python gives the id of a dead object to a new one: what is kept
    under an id has to go with the object. A strong reference would guard the id too, and keep the model's
    memory for as long as the compiled function lives.

    The owner is referred to weakly as well: a cycle would keep arrays until the garbage collector runs.
    """
    reference = weakref.ref(owner)

    def callback(_: weakref.ref) -> None:
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
        # The versions may be shared with equal functions, the count of traces is this one's: before each call
        # it is lent to the versions, which count there.
        self._counter = [0]
        self._met: weakref.WeakSet[Version] = weakref.WeakSet()
        # By the settings in force and the identities of the modules.
        self._known: dict[tuple, KnownModules] = {}
        self._recent: list[RecentCall] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Everything down to `version.call` is paid for by every step of a training loop: no functions are
        # called that need not be, and no list is built that is there already.
        try:
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
                            # The same modules; whether they are still what the code was compiled for, the
                            # plan knows (law 9).
                            if recent.known.plan.valid():
                                known, version = recent.known, recent.version
                            break
            if known is None:
                known, version, dynamic = self.look_up(args, kwargs)
            if current_trace() is not EAGER:
                known.plan.note_read()
            # The list is the plan's own, and shared by all calls until somebody writes: a call that only
            # reads gathers nothing, and JAX finds the very same arrays. Nobody changes it in place.
            leaves = known.plan.cached_leaves
            if leaves is None:
                leaves = known.plan.leaves()
                # Only gathering tells where the arrays lie, and a version is for one placement of them.
                if known.plan.placements is not version.placements:
                    known, version, dynamic = self.look_up(args, kwargs)
            self.versions.counter = self._counter
            try:
                out, written = version.call(leaves, dynamic)
            except (TypeError, RuntimeError) as error:
                # JAX does not know which array is whose: an error about one that is deleted names the
                # parameter.
                for box, leaf in zip(known.plan.boxes, leaves, strict=True):
                    check_usable(leaf, box.label)
                raise_original(error)
                if not isinstance(error, StatefulnnError):
                    self._refuse_what_is_no_array(args, kwargs)
                raise
            except ValueError as error:
                self._refuse_other_devices(error, version, [*leaves, *dynamic])
                raise
            return (
                out if written is None else self.finish(known, leaves, out, written, args, kwargs)
            )
        except Exception as error:
            shorten(error)
            raise

    def finish(
        self,
        known: KnownModules,
        leaves: Sequence[jax.Array],
        out: PyTree,
        written: dict[int, list[jax.Array]],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> PyTree:
        """Put what a version wrote into the boxes, and the caller's own modules into its output."""
        number, values = written.popitem()
        plan, targets = known.plan, known.targets.get(number)
        indices, described = self.versions.results[number]
        if targets is None:
            targets = [plan.boxes[i] for i in indices]
            if number in self.versions.checked:  # these come here each time
                wait_for((out, values))
            else:
                known.targets[number] = targets
        if targets:
            stamp = write_back(targets, values)
            if stamp is not None and indices[-1] == len(indices) - 1:
                # The first leaves were written, usually all but the generator: no need to gather. The next
                # step of a training loop finds its list of leaves made.
                plan.keep([*values, *leaves[len(indices) :]], stamp)
        if described is not None:
            return restore_output(out, described, plan, flatten_collecting((args, kwargs))[2])
        return out

    def look_up(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[KnownModules, Version, list[ArrayLike]]:
        """Return what a call needs: what is known of its modules, its version, the other leaves."""
        statics = None
        self.versions.counter = self._counter
        if self.options.static_argnums or self.options.static_argnames:
            args, kwargs, statics = self._without_statics(args, kwargs)
        dynamic, treedef, roots = flatten_collecting((args, kwargs))
        generator = current_generator()
        # As in `SplitCall`: the generator in force is the last root.
        known = self._known_of(roots if generator is None else [*roots, generator])
        plan, version = known.plan, known.versions.get(treedef) if statics is None else None
        plan.leaves()  # finds out where they lie
        if version is None or version.placements is not plan.placements:
            signature = Signature(plan.moduledef, treedef, generator is not None)
            version = self.versions.find(signature, statics, plan.placements)
            plan.placements = version.placements  # equal ones are one object
            if version not in self._met:
                self._met.add(version)
                self.versions.note_use(roots)
                self._counter[0] += version.traces > 0  # by an equal function, before this one
            if statics is None:
                known.versions[treedef] = version
        if statics is None and not kwargs and len(roots) + len(dynamic) == len(args):
            self._remember(args, roots, known, version)
        return known, version, dynamic

    def _known_of(self, everything: list[ModuleBase | Box]) -> KnownModules:
        key = (settings(), *map(id, everything))
        known = self._known.get(key)
        if known is None or not known.plan.valid():
            stale, known = known, KnownModules(build_plan(everything))
            if stale is not None:  # the modules have changed: the cause of a compilation, perhaps
                count_changes(stale.plan, known.plan)
            known.references = _when_dead(
                everything, self, lambda owner: owner._known.pop(key, None)
            )
            self._known[key] = known
        return known

    def _remember(self, args: tuple, roots: list, known: KnownModules, version: Version) -> None:
        # Of these types alone it is certain that one object is one leaf, or one module.
        if not all(isinstance(a, (ModuleBase, jax.Array, np.ndarray, int, float)) for a in args):
            return
        wants = tuple(id(a) if isinstance(a, ModuleBase) else type(a) for a in args)
        recent = RecentCall(wants, streams.current, known, version)
        recent.references = _when_dead(roots, recent, RecentCall.forget)
        # A few, since they are tried one after the other: training and evaluation alternate, for instance.
        others = [r for r in self._recent if r.count >= 0 and r.wants != wants]
        self._recent = [recent, *others[:3]]

    def _refuse_what_is_no_array(self, args: tuple, kwargs: dict[str, Any]) -> None:
        args, kwargs, _ = self._without_statics(args, kwargs)
        if self.function is call_module:
            refuse_what_is_no_array(args[0].forward, args[1:], kwargs)
        refuse_what_is_no_array(self.function, args, kwargs)

    def _refuse_other_devices(
        self, error: ValueError, version: Version, arrays: Sequence[ArrayLike]
    ) -> None:
        meshes = "Mesh for all inputs should be equal" in str(error)
        if not meshes and "incompatible devices" not in str(error):
            return
        labels = version.signature.labels(self.function)
        places: dict[str, str] = {}
        for name, x in zip([*labels["leaves"], *labels["dynamic"]], arrays, strict=True):
            if isinstance(x, jax.Array) and x.committed:
                mesh = getattr(x.sharding, "mesh", None) if meshes else None
                place = sorted(d.id for d in x.devices()) if mesh is None else mesh
                places.setdefault(str(place), name)
        if len(places) > 1:
            raise several_meshes([(name, place) for place, name in places.items()]) from None

    def _without_statics(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any], Statics]:
        names = self.options.static_argnames
        numbers = {n if n >= 0 else len(args) + n for n in self.options.static_argnums}
        static_args = tuple((i, args[i]) for i in sorted(numbers) if i < len(args))
        static_kwargs = tuple((k, kwargs[k]) for k in sorted(names & set(kwargs)))
        # None in their place keeps the positions of the others, and holds no leaf.
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
