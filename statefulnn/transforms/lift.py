"""The one mechanism under the stateful transforms: split, a plain JAX transform, write-back.

`SplitCall` takes the arguments of a call apart: the boxes of every module in them (each box once, also
when several modules share it), the generator in force, and the other leaves. `SplitCall.run` is the pure
function of these that JAX transforms: it builds clones, runs the user's function on them and returns,
beside the output, the values of the boxes that were written. `SplitCall.finish` puts those into the
caller's boxes and the caller's own modules into the output. A transform is these three steps.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike

from statefulnn.core.box import Box
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.generator import Generator, current_generator, use_generator
from statefulnn.core.graph import build_clones
from statefulnn.core.leaks import outer_traces, watching
from statefulnn.core.module import Module
from statefulnn.core.moduledef import ModuleDef, differences
from statefulnn.core.ownership import ModuleBase, Scope, check_write, real_dict
from statefulnn.core.parameter import Parameter
from statefulnn.core.placement import is_meta
from statefulnn.core.plan import Plan, build_plan, plan_of
from statefulnn.core.pytree import flatten_collecting, unflatten_with
from statefulnn.core.stamps import clock, value_changed
from statefulnn.transforms import refusals
from statefulnn.transforms.arguments import advise
from statefulnn.transforms.naming import argument_names, as_users, rename, source_of
from statefulnn.transforms.types import PyTree, TreeDef


class Writes:
    """The values a traced call wrote, and which leaves they belong to; a pytree.

    Attributes:
        indices: the leaf positions, static.
        values: the arrays.
        out: None if the output holds no module or box; else what `restore_output` needs, static.
    """

    __slots__ = ("indices", "out", "values")

    def __init__(
        self, indices: tuple[int, ...], values: Sequence[jax.Array], out: _Described | None = None
    ) -> None:
        self.indices = indices
        self.values = values
        self.out = out


# The positions are static, so that JAX hands them back as they are: which boxes a function writes is found
# out while it is traced, and belongs to the trace.
jax.tree_util.register_pytree_node(
    Writes,
    lambda w: (w.values, (w.indices, w.out)),
    lambda aux, values: Writes(aux[0], values, aux[1]),
)


class Signature(NamedTuple):
    """What traced code is made for; it refers to no module, and equal ones share compiled code.

    Attributes:
        moduledef: of all modules and boxes in the arguments, the generator in force last.
        treedef: of the arguments ``(args, kwargs)``.
        has_generator: whether there is a generator in force.
    """

    moduledef: ModuleDef
    treedef: TreeDef
    has_generator: bool

    def run(
        self,
        f: Callable,
        leaves: Sequence[jax.Array],
        dynamic: Sequence[ArrayLike],
        *,
        on_scope: Callable[[Scope], None] | None = None,
        returned: Collection[int] = (),
        lost: tuple[str, str] | None = None,
        names: Sequence[Any] | None = None,
    ) -> tuple[Any, Writes]:
        """Run a function on clones, as a pure function of arrays.

        Args:
            f: the user's function.
            leaves: the arrays of the boxes, in leaf order.
            dynamic: the other leaves of the arguments.
            on_scope: is shown the scope of the clones after the call.
            returned: leaf positions to return whether written or not.
            lost: if the clones may only be read, why a write would be lost, and what to do instead.
            names: of the arguments for messages, see `labels`; by default those of `f`.

        Returns:
            the output, and the values that were written.
        """
        scope = Scope(lost is None, lost, self.moduledef)
        roots, boxes, modules = build_clones(self.moduledef, leaves, scope)
        arguments = roots[:-1] if self.has_generator else roots
        args, kwargs = unflatten_with(self.treedef, dynamic, arguments)
        generator = roots[-1] if self.has_generator else None
        with use_generator(generator), watching(outer_traces()) as inventory:
            try:
                out = f(*args, **kwargs)
            except Exception as error:
                rename(error, self.written_by_user(f), lambda: self.labels(f, names))
                advise(error)
                raise
            returned_leaves, _, returned_modules = flatten_collecting(out)
            inventory.note_returned(returned_leaves)
        if scope.stepped:
            _refuse_lost_slots(scope.stepped, returned_leaves, returned_modules)
        check_structure(self.moduledef, modules, roots, boxes)
        if on_scope is not None:
            on_scope(scope)
        # A box whose array is not the very one that went in was written: what is only read stays the same
        # object. So nothing has to be noted while the function runs, and nothing compared by value.
        indices = tuple(
            i
            for i, (box, leaf) in enumerate(zip(boxes, leaves, strict=True))
            if box._value is not leaf or i in returned
        )
        out, described = describe_output(out, modules, boxes)
        return out, Writes(indices, [boxes[i]._value for i in indices], described)

    def pure(self, f: Callable, **options: Any) -> Callable:
        """Return `run` with a function as a function of arrays, which JAX takes for the user's."""
        return as_users(functools.partial(self.run, f, **options), self.written_by_user(f))

    def written_by_user(self, f: Callable) -> Callable:
        """Return a function as the user wrote it: forward, where the function calls a module."""
        kind, number = next(iter(self.moduledef.roots), ("box", 0))
        is_module = source_of(f) is call_module and kind == "node"
        return self.moduledef.nodes[number].cls.forward if is_module else f

    def labels(self, f: Callable, names: Sequence[Any] | None = None) -> dict[str, list[str]]:
        """Return what messages call the leaves, and the other arrays, after the arguments of a function.

        Args:
            f: the function.
            names: of its positional arguments; that of a tuple may be a tuple of names.
        """
        tree = template(self.treedef)
        if names is None:
            names = argument_names(self.written_by_user(f), len(tree[0]))
        roots: dict[str, str] = {}
        arrays: dict[int, str] = {}
        for (which, first, *path), mark in jax.tree_util.tree_flatten_with_path(tree)[0]:
            name = first.key if which.idx else names[first.idx]
            while isinstance(name, tuple):
                name, path = name[path[0].idx], path[1:]
            label = f"{name}{jax.tree_util.keystr(tuple(path))}"
            if mark.is_leaf:
                arrays[mark.number] = label
            else:
                roots[f"[{mark.number}]"] = label
        # Where there are several roots, names begin with their numbers: core/moduledef.py.
        parts = [re.match(r"(\[\d+\])?(.*)", n) for n in self.moduledef.leaf_names]
        leaves = []
        for root, rest in [p.groups() for p in parts if p]:
            where = roots.get(root or "[0]", "the generator")
            leaves.append(where + (rest if root else f".{rest}"))
        return {"leaves": leaves, "dynamic": [arrays[i] for i in sorted(arrays)]}


class SplitCall:
    """The arguments of one call, taken apart.

    Attributes:
        plan: of all modules and boxes in the arguments, and of the generator in force, as one.
        roots: these modules and boxes.
        dynamic: the other leaves.
        signature: the static rest.
    """

    __slots__ = ("dynamic", "plan", "roots", "signature")

    def __init__(self, arguments: tuple[tuple, dict[str, Any]]) -> None:
        self.dynamic, treedef, self.roots = flatten_collecting(arguments)
        generator = current_generator()
        # The generator comes last. The caller's roots then keep their numbers, which treedefs and marks refer
        # to, whether there is a generator in force or not.
        everything = self.roots if generator is None else [*self.roots, generator]
        self.plan: Plan = build_plan(everything)
        self.signature = Signature(self.plan.moduledef, treedef, generator is not None)
        if current_trace() is not EAGER:
            # The boxes' arrays become constants of that trace, unless it owns them: see core/baked_in.py.
            self.plan.note_read()

    @property
    def moduledef(self) -> ModuleDef:
        return self.signature.moduledef

    @property
    def leaves(self) -> list[Any]:
        """The arrays of the boxes, in leaf order; a list of its own."""
        return list(self.plan.leaves())

    def run(
        self,
        f: Callable,
        leaves: Sequence[jax.Array],
        dynamic: Sequence[ArrayLike],
        *,
        on_scope: Callable[[Scope], None] | None = None,
    ) -> tuple[Any, Writes]:
        """Run a function on clones: the pure function that JAX transforms; see `Signature.run`."""
        return self.signature.run(f, leaves, dynamic, on_scope=on_scope)

    def finish(self, out: PyTree, writes: Writes) -> PyTree:
        """Put what a transformed call wrote into the caller's boxes, and return its output."""
        if writes.indices:
            write_back([self.plan.boxes[i] for i in writes.indices], writes.values)
        if writes.out is not None:
            return restore_output(out, writes.out, self.plan, self.roots)
        return out

    def positions_under(self, root: ModuleBase | Box) -> list[int]:
        """Return the leaf positions of the trainable parameters that a root owns, in its own order."""
        own = {id(box): i for i, box in enumerate(self.plan.boxes)}
        if isinstance(root, Box):
            return [own[id(root)]]
        plan = plan_of(root)
        return [own[id(box)] for box in plan.boxes[: plan.moduledef.count("trainable")]]


def _refuse_lost_slots(
    stepped: Sequence[tuple[ModuleBase, list]], leaves: Sequence[Any], modules: Sequence[Any]
) -> None:
    """Raise if the slots of an optimizer that was built in a trace, and stepped once there, are dropped."""
    kept = {id(leaf) for leaf in leaves}
    kept |= {id(m) for root in modules if isinstance(root, Module) for m in root.modules()}
    for optimizer, slots in stepped:
        steps = sum(other is optimizer for other, _ in stepped)
        unused = all(box._value is value for box, value in slots)
        if steps == 1 and unused and id(optimizer) not in kept:
            if not any(id(value) in kept for _, value in slots):
                raise refusals.slots_dropped(type(optimizer).__name__)


def check_structure(
    moduledef: ModuleDef,
    modules: Sequence[ModuleBase],
    roots: Sequence[ModuleBase | Box],
    boxes: Sequence[Box],
) -> None:
    """Raise if the clones are no longer what the ModuleDef says: the change would be lost."""
    noted = [i for i, b in enumerate(boxes) if isinstance(b, Parameter) and b.grad is not None]
    if noted:
        raise refusals.gradient_left_behind(moduledef.leaf_names[noted[0]])
    # Nearly always the stamps say that nothing has changed: those of fresh clones are 0, and every structural
    # or static change sets one. Otherwise the clones are planned anew, which walks the whole model. It is
    # also walked if it holds copies of what can change in place, since no stamp tells of that; and
    # requires_grad is an affair of the box, which has no stamp.
    unchanged = not any(m._nn_stamp.number for m in modules) and all(
        not copy for d in moduledef.nodes for _, _, copy in d.values
    )
    if unchanged and not _trainability_changed(moduledef, modules):
        return
    plan = build_plan(roots)
    if plan.moduledef is moduledef:  # which does not say which object a box is
        changes = [
            (moduledef.leaf_names[i], f"replaced by another {type(box).__name__}")
            for i, box in enumerate(plan.boxes)
            if box is not boxes[i]
        ]
    else:
        changes = differences(moduledef, plan.moduledef)
    if changes:
        raise refusals.structure_changed(changes)


def _trainability_changed(moduledef: ModuleDef, modules: Sequence[ModuleBase]) -> bool:
    """Say whether a parameter of the clones was frozen or unfrozen."""
    for module, d in zip(modules, moduledef.nodes, strict=True):
        held = real_dict(module)["_parameters"]
        for name, number in d.members[0]:
            if number is not None and held[name]._requires_grad != moduledef.boxes[number][1]:
                return True
    return False


def write_back(boxes: Sequence[Box], values: Sequence[jax.Array]) -> int | None:
    """Put values into boxes, with the checks that hold where the boxes live.

    Returns:
        the stamp of the change, or None if another thread wrote at the same time.
    """
    before = clock.values
    # All checks come before the first write: a call either changes all of its boxes or none.
    if current_trace() is not EAGER:
        for box, value in zip(boxes, values, strict=True):
            check_write(box._scope, value, box.label)
            if isinstance(box, Generator):
                box.drawable_state()  # raises where lanes would share what was drawn
    if clock.baked_in:
        for box in boxes:
            if box.baked_in is not None:
                box.baked_in.warn_of_value(box)
    for box, value in zip(boxes, values):  # noqa: B905 (of one length)
        box._value = value
    # One change for all of them, after the last: whoever sees the new stamp sees the new values. Two changes
    # since `before` mean that somebody else wrote as well, so the caller knows of no box what it holds.
    value_changed()
    return clock.values if clock.values == before + 1 else None


# --------------------------------------------------------------------------------------------------
# Modules in the output


class _Described:
    """How the output of a traced call is put together where it holds modules or boxes; hashable."""

    __slots__ = ("items", "treedef")

    def __init__(self, treedef: TreeDef, items: tuple) -> None:
        self.treedef = treedef
        # How many arrays there are beside those of new modules; then, for each module or box,
        # ("node" | "box", number in the ModuleDef) or ("new", ModuleDef, start, stop).
        self.items = items

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is _Described
            and self.items == other.items
            and self.treedef == other.treedef
        )

    def __hash__(self) -> int:
        return hash(self.items)


def describe_output(
    out: PyTree, modules: Sequence[ModuleBase], boxes: Sequence[Box]
) -> tuple[PyTree, _Described | None]:
    """Replace modules and boxes in an output by what JAX can carry.

    A clone of an argument is carried as its number: its arrays come back as writes, if at all, and outside
    the caller's own object takes its place. A new module has arrays of its own, which join the output's.
    """
    leaves, treedef, found = flatten_collecting(out)
    if not found:
        return out, None
    nodes = {id(m): i for i, m in enumerate(modules)}
    positions = {id(b): i for i, b in enumerate(boxes)}
    arrays, items = list(leaves), []
    for obj in found:
        if id(obj) in nodes:
            items.append(("node", nodes[id(obj)]))
        elif id(obj) in positions:
            items.append(("box", positions[id(obj)]))
        else:
            plan = build_plan([obj])
            if any(id(b) in positions for b in plan.boxes):
                raise refusals.shared_with_argument(type(obj).__name__)
            for name, leaf in zip(plan.moduledef.leaf_names, plan.leaves(), strict=True):
                if is_meta(leaf):
                    raise refusals.returned_without_numbers(type(obj).__name__, name)
            items.append(("new", plan.moduledef, len(arrays), len(arrays) + len(plan.boxes)))
            arrays.extend(plan.leaves())
    return arrays, _Described(treedef, (len(leaves), *items))


def restore_output(
    arrays: Sequence[jax.Array],
    described: _Described,
    plan: Plan,
    roots: Sequence[ModuleBase | Box],
) -> PyTree:
    """Undo `describe_output`: arguments come back as the caller's own objects."""
    count, *items = described.items
    found = []
    for item in items:
        if item[0] == "new":
            _, moduledef, start, stop = item
            found.append(jax.tree_util.tree_unflatten(_structure(moduledef), arrays[start:stop]))
        elif item[0] == "box":
            found.append(plan.boxes[item[1]])
        else:
            # By its path: a plan knows no modules, so that it keeps none alive.
            root, *names = plan.moduledef.paths[item[1]]
            obj = roots[root]
            for name in names:
                obj = getattr(obj, name)
            found.append(obj)
    return unflatten_with(described.treedef, arrays[:count], found)


def _structure(moduledef: ModuleDef) -> TreeDef:
    """Return the treedef of a module or box, from one that is built around nothing."""
    what, index = moduledef.roots[0]
    if what == "box":
        cls, static = moduledef.boxes[index]
        return jax.tree_util.tree_structure(cls.clone_of(static, 0, None, 0))
    return jax.tree_util.tree_structure(
        build_clones(moduledef, [0] * moduledef.num_leaves, None)[0][0]
    )


def unbound(fun: Callable) -> tuple[Callable, ModuleBase | None]:
    """Return a function, and the module that is its first argument if `fun` is a module or its method."""
    if isinstance(fun, ModuleBase):
        return call_module, fun
    owner = getattr(fun, "__self__", None)
    return (getattr(fun, "__func__", fun), owner) if isinstance(owner, ModuleBase) else (fun, None)


def several_unbound(functions: Sequence[Callable]) -> tuple[list[Callable], tuple]:
    """Apply `unbound` to each function; what comes back takes all owners first, then the arguments."""
    pairs = [unbound(f) for f in functions]

    def taking_owners(number: int, function: Callable) -> Callable:
        def call(owners: tuple, *args: Any) -> Any:
            owner = owners[number]
            return function(*args) if owner is None else function(owner, *args)

        forward = getattr(type(owners[number]), "forward", function)
        call.__wrapped__ = forward if function is call_module else function
        return call

    owners = tuple(owner for _, owner in pairs)
    return [taking_owners(i, f) for i, (f, _) in enumerate(pairs)], owners


def call_module(module: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a module, as a function of it."""
    return module(*args, **kwargs)


# --------------------------------------------------------------------------------------------------
# Looking at the arguments of a call


class Mark:
    """Stands for a leaf, or for a module or box, in the template of a call's arguments."""

    __slots__ = ("is_leaf", "number")

    def __init__(self, is_leaf: bool, number: int) -> None:
        self.is_leaf = is_leaf
        self.number = number


def template(treedef: TreeDef) -> PyTree:
    """Return ``(args, kwargs)`` with marks in place of leaves, modules and boxes."""
    # A collected module or box is a node without children, so there are no more of them than nodes.
    leaves = [Mark(True, i) for i in range(treedef.num_leaves)]
    roots = [Mark(False, i) for i in range(treedef.num_nodes)]
    return unflatten_with(treedef, leaves, roots)


def spread(
    prefix: Any, shape: Any, ends: Callable[[Any], bool] = lambda entry: entry is None
) -> Iterator[tuple[Mark, Any]]:
    """Yield each mark of a template with its entry in a tree that has entries, or ends, above the marks.

    Args:
        prefix: a tree like the template; what it has in a module's place is that module's entry.
        shape: the template.
        ends: says of a part of `prefix` whether it is the entry of every mark below.

    Raises:
        ValueError: if the trees do not fit.
    """
    if isinstance(shape, Mark):
        yield shape, prefix
    elif ends(prefix):
        yield from ((mark, prefix) for mark in jax.tree_util.tree_leaves(shape))
    else:
        parts, treedef = jax.tree_util.tree_flatten(shape, is_leaf=lambda node: node is not shape)
        for entry, part in zip(treedef.flatten_up_to(prefix), parts, strict=True):
            yield from spread(entry, part, ends)


def leaves_below(moduledef: ModuleDef, roots: Sequence[int]) -> list[int]:
    """Return the leaf positions that can be reached from some of the roots."""
    found: set[int] = set()
    seen: set[int] = set()
    todo: list[int] = []
    for number in roots:
        what, index = moduledef.roots[number]
        if what == "box":
            found.add(moduledef.order[index])
        else:
            todo.append(index)
    while todo:
        index = todo.pop()
        if index in seen:
            continue
        seen.add(index)
        parameters, buffers, children = moduledef.nodes[index].members
        found |= {moduledef.order[b] for _, b in (*parameters, *buffers) if b is not None}
        todo.extend(m for _, m in children if m is not None)
        for _, what, i in moduledef.nodes[index].references:
            if what == "box":
                found.add(moduledef.order[i])
            else:
                todo.append(i)
    return sorted(found)
