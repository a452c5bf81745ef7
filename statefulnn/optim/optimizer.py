"""An optax transformation as a module: its slots are buffers, its step writes the parameters.

Because the slots are ordinary buffers, ``nn.jit`` carries them as state, ``state_dict`` saves them by
name, and a raw JAX transformation sees them as leaves. Needs the extra ``optim``.

Terms
  group     the parameters that one transformation steps.
  cohort    those of a group whose slots began at the same step. A transformation has one count of steps for
            all parameters, and Adam divides by it. So it runs once for each cohort, with the count of that
            cohort, on all gradients; what is not taken from a run, the compiler leaves out.
"""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, overload

import jax
import jax.numpy as jnp
from jax import lax

from statefulnn.core import habits
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import OtherModuleWarning, user_stack_level
from statefulnn.core.extras import import_extra
from statefulnn.core.gradients import parameter_of
from statefulnn.core.module import Module, Ref, find_box, place_box
from statefulnn.core.ownership import Scope
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.core.plan import plan_of
from statefulnn.core.refusals import named
from statefulnn.core.selection import Selection, names_in, trainable
from statefulnn.core.tracebacks import shortened
from statefulnn.optim import _refusals as refusals
from statefulnn.optim._groups import REST, group_numbers
from statefulnn.optim._slots import Leaf, Slots, as_setting, is_array, leaves_of
from statefulnn.transforms.jit import jit
from statefulnn.utils.clip_grad import scaled_to, total_norm_of

# Static attributes compare by identity unless they are known types: equal treedefs are made one object,
# so that two equal optimizers share compiled code.
_treedefs: dict[Any, Any] = {}

_NO_SLOTS = Slots()
_OF_COHORT = re.compile(r"cohort(\d+)\.")  # begins the names of slots of all cohorts but the first


class Adaptation(NamedTuple):
    """What `Optimizer.adapt` did: the names of parameters.

    Attributes:
        kept: those whose slots stayed.
        fresh: those whose slots begin now.
        dropped: those that are trained no more, by their former names.

    Example:
        >>> print(nn.optim.Adaptation(("fc.weight",), (), ("head.weight", "head.bias")))
        kept 1: 'fc.weight'; fresh none; dropped 2: 'head.weight', 'head.bias'
    """

    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]

    def __repr__(self) -> str:
        return "; ".join(
            f"{what} {len(names)}: {named(names)}" if names else f"{what} none"
            for what, names in self._asdict().items()
        )


class Optimizer(Module):
    """Trains the parameters of a module with any optax transformation.

    Only parameters with ``requires_grad=True`` take part: a frozen one gets no slot, no update and no
    weight decay. A tied parameter gets one slot. The slots are buffers named after optax's fields and
    the parameters, ``mu.fc1.weight``, ``count``; the module itself is referred to and not owned, so
    ``state_dict()`` holds the slots and not the weights.

    Outside a transformation the whole step is one compiled call.

    Args:
        module: the module to train.
        tx: an optax transformation, such as ``optax.adamw(1e-3)``; or a dict of groups, pattern of names ->
            transformation, in which ``"*"`` is the rest. Each trainable parameter is in one group.
        only: which parameters to train: names or patterns, ``"head.*|*.bias"``; modules or parameters of
            the module, one or several; or a function of the name. Gradients of others are ignored.
        clip: the largest norm of the gradient, all parameters together; a larger one is scaled down to it.
        accumulate: how many calls of `step` make one update.
        reduction: ``"mean"`` or ``"sum"``, of the gradients of these calls.

    Attributes:
        module: the module to train.
        tx: the transformation, or the dict of groups.
        clip: the largest norm; None for no limit.
        hyperparams: where `tx` comes of ``optax.inject_hyperparams``, its settings by name; where there are
            groups, these by pattern. Read them, and assign numbers between two steps; that compiles nothing.

    Raises:
        TypeError: if `tx` is no optax transformation, or `module` no module; for a parameter in two groups.
        UnknownNameError: if no parameter of the module is trainable, or none that is chosen; for a pattern
            that matches nothing, and a parameter in no group.
        ImportError: if optax is not installed.

    Limitations: optax's transformations are closures, which Python cannot pickle; save
    ``state_dict()`` instead of the object.

    Example:
        >>> import jax.numpy as jnp, optax, statefulnn as nn
        >>> model = nn.Linear(3, 1)
        >>> opt = nn.Optimizer(model, optax.adam(1e-2))
        >>> sorted(opt.state_dict())
        ['count', 'mu.bias', 'mu.weight', 'nu.bias', 'nu.weight']
        >>> @nn.jit
        ... def train_step(model, opt, x, y):
        ...     loss, grads = nn.value_and_grad(lambda m: ((m(x) - y) ** 2).mean())(model)
        ...     opt.step(grads)
        ...     return loss
        >>> x, y = jnp.ones((8, 3)), jnp.ones((8, 1))
        >>> losses = [float(train_step(model, opt, x, y)) for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
        >>> opt = nn.Optimizer(model, optax.inject_hyperparams(optax.adam)(learning_rate=1e-2))
        >>> opt.lr = opt.lr / 10
        >>> round(float(opt.lr), 6)
        0.001
        >>> nn.Optimizer(model, {"bias": optax.sgd(0.1), "*": optax.adam(1e-3)}, clip=1.0)
        Optimizer(Linear, 2 trainable parameters, clip=1.0)
          'bias': 'bias'
          '*': 'weight'
    """

    # optax's transformations are closures over settings that stay as they are.
    _unwatched = ("tx",)
    # `adapt` changes these on purpose: code that is compiled anew for it is not warned of.
    _adapted = ("_names", "_shapes", "_slots")

    _habits = habits.OPTIMIZER
    zero_grad: Any = property()  # of nothing: Python asks `__getattr__`, which has the answer

    module: Any

    @shortened
    def __init__(
        self,
        module: Module,
        tx: Any,
        *,
        only: Selection = None,
        clip: float | None = None,
        accumulate: int = 1,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        optax = import_extra("optax", "optax", "made an nn.Optimizer", "does the arithmetic")
        if not isinstance(module, Module):
            raise refusals.no_module(module, isinstance(tx, Module))
        for pattern, one in tx.items() if isinstance(tx, Mapping) else ((None, tx),):
            if not isinstance(one, optax.GradientTransformation):
                raise refusals.no_transformation(one, pattern)
        _check_options(clip, accumulate, reduction)
        plan_of(module)  # a module hidden in a list would not be trained: raises here
        self.module = Ref(module)
        self.tx = dict(tx) if isinstance(tx, Mapping) else tx
        self.clip = clip
        self._only = names_in([module], only, "nn.Optimizer")
        self._every, self._reduction = accumulate, reduction
        self._names: tuple[str, ...] = ()
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self._groups: tuple[int, ...] = ()
        self._cohorts: tuple[int, ...] = ()
        self._leaves: tuple[Leaf, ...] = ()
        # Of the numbers that cohorts have of their own: the cohort, but for the first, and the leaf.
        self._own: tuple[tuple[int, int], ...] = ()
        self._slots: tuple[tuple[str, ...], ...] = ()
        self._lay_out()

    # ----------------------------------------------------------------------------------------------
    # What there is

    @property
    def _patterns(self) -> tuple[str, ...]:
        return tuple(self.tx) if isinstance(self.tx, dict) else (REST,)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The names of the parameters in each group, by its pattern; ``"*"`` where there is one for all."""
        found: dict[str, list[str]] = {pattern: [] for pattern in self._patterns}
        for name, number in zip(self._names, self._groups, strict=True):
            found[self._patterns[number]].append(name)
        return {pattern: tuple(names) for pattern, names in found.items()}

    @property
    def state(self) -> Any:
        """The state as optax knows it, for reading: ``optax.tree.get(opt.state, "count")``.

        Where there are groups, a dict of pattern -> state.
        """
        states = self._states([b.value for b in self._boxes()[: len(self._leaves)]])
        return dict(zip(self._patterns, states, strict=True)) if self._has_groups else states[0]

    @property
    def hyperparams(self) -> Any:
        """The settings of ``optax.inject_hyperparams`` by name; where there are groups, these by pattern."""
        found = self._holders("hyperparams")
        if not found:
            raise AttributeError("hyperparams")  # upon which `__getattr__` has the answer
        return types.MappingProxyType(found) if self._has_groups else found[REST]

    @property
    def lr(self) -> Any:
        """The learning rate, if it is injected; by pattern where there are groups. Numbers may be assigned.

        That of a schedule is the rate of the last step. Of groups, a number sets the rates of all, and a
        dict those that it names.
        """
        rates = {pattern: at.learning_rate for pattern, at in self._rates().items()}
        if not rates:
            raise AttributeError("lr")
        return types.MappingProxyType(rates) if self._has_groups else rates[REST]

    @lr.setter
    def lr(self, value: Any) -> None:
        rates = self._rates()
        given = value if isinstance(value, Mapping) else dict.fromkeys(self._patterns, value)
        for pattern in given:
            if pattern not in rates:
                raise refusals.no_rate(pattern, list(rates))
            if "learning_rate" in getattr(rates[pattern], "scheduled", ()):
                raise refusals.set_by_a_schedule("learning_rate")
        # Of all first: one that does not fit changes none.
        new = {p: as_setting(rates[p]._buffers["learning_rate"], rate) for p, rate in given.items()}
        for pattern, rate in new.items():
            rates[pattern].learning_rate = rate

    def _rates(self) -> dict[str, Any]:
        """Return the module that has the learning rate of each group, of those that have one."""
        found = self._tops() | self._holders("hyperparams")
        return {pattern: at for pattern, at in found.items() if "learning_rate" in at._buffers}

    def _holders(self, name: str) -> dict[str, Any]:
        """Return the slots of one name of each group, of those that have some."""
        tops = self._tops().items()
        return {pattern: at._modules[name] for pattern, at in tops if name in at._modules}

    def _tops(self) -> dict[str, Any]:
        """Return the module under which each group has the slots that are no parameter's, if it has some."""
        tops = {p: self._modules.get(f"group{i}", _NO_SLOTS) for i, p in enumerate(self._patterns)}
        return tops if self._has_groups else {REST: self}

    @property
    def _has_groups(self) -> bool:
        return isinstance(self.tx, dict)

    def __setattr__(self, name: str, value: object) -> None:
        if name in habits.SETTINGS_OF_OPTIMIZERS and type(self) is Optimizer:
            getattr(self, name)  # has the answer
        if name in ("only", "accumulate", "reduction") and type(self) is Optimizer:
            raise refusals.fixed_option(name, value)
        if name == "clip":
            _check_options(value, 1, "mean")
        if name in ("lr", "hyperparams"):
            object.__setattr__(self, name, value)  # properties
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        options = {"only": self._only, "clip": self.clip}
        options |= (
            {"accumulate": self._every, "reduction": self._reduction} if self._every > 1 else {}
        )
        shown = "".join(f", {k}={v!r}" for k, v in options.items() if v is not None)
        head = f"Optimizer({type(self.module).__name__}, {len(self._names)} trainable parameters{shown})"
        groups = self.groups.items() if self._has_groups else ()
        return "\n".join([head, *(f"  {p!r}: {named(ns) or 'none'}" for p, ns in groups)])

    # ----------------------------------------------------------------------------------------------
    # Slots

    @shortened
    def adapt(self) -> Adaptation:
        """Bring the slots up to date with the module, between two steps, and say what was done.

        Call it after freezing, unfreezing, adding, replacing or resizing parameters. A parameter that is
        the same object, of the same shape and in the same group, keeps its slots, under its present name.
        Any other one begins with fresh slots, and a count of steps of its own where the transformation
        counts beside slots, as Adam does. Schedules, hyperparameters and gradients accumulated so far go on.

        Returns:
            the names that were kept, are fresh, and were dropped.

        Raises:
            UnknownNameError, TypeError: if `only` or the groups no longer fit; then nothing has changed.

        Example:
            >>> import optax, statefulnn as nn
            >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
            >>> opt = nn.Optimizer(model, optax.adam(1e-3))
            >>> model[1] = nn.Linear(2, 3, bias=False)
            >>> opt.adapt()
            kept 1: '0.weight'; fresh 1: '1.weight'; dropped 1: '1.weight'
        """
        if current_trace() is not EAGER:
            raise refusals.adapted_while_tracing()
        return self._lay_out()

    def _trained(self, required: bool = False) -> dict[str, Parameter]:
        return trainable([self.module], self._only, "nn.Optimizer", required=required)[0]

    def _lay_out(self) -> Adaptation:
        """Give every trained parameter its slots: those it has, or fresh ones."""
        parameters = self._trained(required=True)
        if not parameters:
            raise refusals.nothing_to_train(type(self.module).__name__)
        groups = group_numbers(self.module, self._patterns, parameters)
        with jax.numpy_dtype_promotion("standard"):
            # Of groups without parameters too: their rates can be set, and are kept while all is frozen.
            states = [
                tx.init({n: p.value for n, p in parameters.items() if groups[n] == number})
                for number, tx in enumerate(self._transformations())
            ]
        paths, treedef = jax.tree_util.tree_flatten_with_path(states)
        arrays = [(path, leaf) for path, leaf in paths if is_array(leaf)]
        leaves = leaves_of([path for path, _ in arrays], parameters, self._has_groups)
        kept = {
            name: old
            for name, p in parameters.items()
            for old, shape, group in zip(self._names, self._shapes, self._groups, strict=True)
            if getattr(self, _built_for(old)) is p and shape == p.shape and group == groups[name]
        }
        fresh = _distinct([x for _, x in arrays], {id(p.value) for p in parameters.values()})
        values, cohorts, own = self._carried(leaves, fresh, groups, kept)
        accumulated = self._accumulated(parameters, kept)
        report = Adaptation(
            tuple(kept),
            tuple(n for n in parameters if n not in kept),
            tuple(n for n in self._names if n not in kept.values()),
        )
        # Nothing has changed so far, and from here on nothing fails.
        self._clear_slots()
        for name in self._names:
            delattr(self, _built_for(name))
        # The boxes themselves: a parameter of the same name may be another one by the time of a step.
        for name, p in parameters.items():
            setattr(self, _built_for(name), Ref(p))
        self._names, self._shapes = tuple(parameters), tuple(p.shape for p in parameters.values())
        self._groups, self._leaves = tuple(groups[n] for n in parameters), tuple(leaves)
        self._treedef = _treedefs.setdefault(treedef, treedef)
        self._constants = tuple((i, x) for i, (_, x) in enumerate(paths) if not is_array(x))
        self._cohorts, self._own = cohorts, tuple(own)
        self._place([*values, *own.values(), *accumulated])
        return report

    def _carried(
        self,
        leaves: Sequence[Leaf],
        fresh: Sequence[Any],
        groups: Mapping[str, int],
        kept: Mapping[str, str],
    ) -> tuple[list[Any], tuple[int, ...], dict[tuple[int, int], Any]]:
        """Return the values of the leaves, the cohort of each parameter, and the numbers of later cohorts."""
        boxes = self._boxes()
        old = {(leaf.key, leaf.owner): b.value for leaf, b in zip(self._leaves, boxes)}  # noqa: B905
        counts = {(0, leaf.key): old[leaf.key, None] for leaf in self._leaves if leaf.counts}
        for (cohort, i), box in zip(self._own, boxes[len(self._leaves) :]):  # noqa: B905
            counts[cohort, self._leaves[i].key] = box.value
        before = dict(zip(self._names, self._cohorts, strict=True))

        values = []
        for leaf, start in zip(leaves, fresh, strict=True):
            known = leaf.owner is None or leaf.owner in kept
            value = old.get((leaf.key, leaf.owner and kept.get(leaf.owner)), start)
            values.append(value if known and value.shape == start.shape else start)
        cohorts, own = dict.fromkeys(groups, 0), {}
        for group in set(groups.values()):
            members = [n for n, number in groups.items() if number == group]
            counting = [i for i, leaf in enumerate(leaves) if leaf.counts and leaf.group == group]
            if not counting:
                continue
            numbers = sorted({before[kept[n]] for n in members if n in kept})
            table = [[counts[k, leaves[i].key] for i in counting] for k in numbers]
            start = [fresh[i] for i in counting]
            if len([n for n in members if n in kept]) < len(members):
                same = (k for k, row in enumerate(table) if _equal(row, start))
                new = next(same, len(table))
                table += [start] if new == len(table) else []
            for name in members:
                cohorts[name] = numbers.index(before[kept[name]]) if name in kept else new
            for k, row in enumerate(table):
                for i, value in zip(counting, row, strict=True):
                    if k:
                        own[k, i] = value
                    else:
                        values[i] = value
        return values, tuple(cohorts.values()), own

    def _accumulated(
        self, parameters: Mapping[str, Parameter], kept: Mapping[str, str]
    ) -> list[jax.Array]:
        """Return the gradients accumulated so far, and of how many steps they are."""
        if self._every == 1:
            return []
        boxes = self._boxes()[len(self._leaves) + len(self._own) :]
        old = {name: box.value for name, box in zip(self._names, boxes)}  # noqa: B905 (one more)
        steps = boxes[-1].value if boxes else jnp.zeros((), jnp.int32)
        sums = [old[kept[n]] if n in kept else jnp.zeros_like(p) for n, p in parameters.items()]
        return [*sums, steps]

    def _place(self, values: Sequence[Any]) -> None:
        """Put the arrays of the slots into buffers: of leaves, of later cohorts, of accumulated gradients."""
        of_cohort = dict(zip(self._names, self._cohorts, strict=True))
        places = [(of_cohort.get(leaf.owner or "", 0), leaf) for leaf in self._leaves]
        places += [(k, self._leaves[i]) for k, i in self._own]
        slots = [(f"cohort{k}", *leaf.slot) if k else leaf.slot for k, leaf in places]
        if self._every > 1:
            slots += [("accumulated", *name.split(".")) for name in self._names]
            slots.append(("micro_step",))
        self._slots = tuple(slots)
        for slot, value in zip(slots, values, strict=True):
            place_box(self, slot, Buffer(value), Slots)
        schedules = self._holders("hyperparams_states")
        for pattern, settings in self._holders("hyperparams").items():
            settings.note_schedules(schedules.get(pattern, _NO_SLOTS)._modules)

    def _clear_slots(self) -> None:
        for name in {slot[0] for slot in self._slots}:
            self._modules.pop(name, None)
            self._buffers.pop(name, None)

    def _boxes(self) -> list[Any]:
        return [find_box(self, slot) for slot in self._slots]

    def _transformations(self) -> tuple[Any, ...]:
        return tuple(self.tx.values()) if isinstance(self.tx, dict) else (self.tx,)

    def _states(self, values: Sequence[Any]) -> list[Any]:
        """Return the states of the groups, of the arrays in them."""
        leaves = list(values)
        for position, constant in self._constants:
            leaves.insert(position, constant)
        return jax.tree_util.tree_unflatten(self._treedef, leaves)

    def _set_cohorts(self, cohorts: tuple[int, ...]) -> None:
        """Say which cohort each parameter is in; what a cohort has of its own begins as that of the first."""
        boxes = self._boxes()
        first, rest = boxes[: len(self._leaves)], boxes[len(self._leaves) + len(self._own) :]
        later = sorted(set(zip(cohorts, self._groups, strict=True)))
        own = [
            (cohort, i)
            for cohort, group in later
            for i, leaf in enumerate(self._leaves)
            if cohort and leaf.counts and leaf.group == group
        ]
        self._clear_slots()
        self._cohorts, self._own = cohorts, tuple(own)
        copies = [jnp.array(first[i].value) for _, i in own]
        self._place([*(b.value for b in first), *copies, *(b.value for b in rest)])

    def _expect_state(self, names: Iterable[str]) -> None:
        """Take the cohorts that the names of a state dict tell of; parameters without a name keep theirs."""
        owners = {".".join(leaf.slot): leaf.owner for leaf in self._leaves}
        found = dict(zip(self._names, self._cohorts, strict=True))
        for name in names:
            later = _OF_COHORT.match(name)
            owner = owners.get(name[later.end() :] if later else name)
            if owner is not None:
                found[owner] = int(later[1]) if later else 0
        cohorts = tuple(found.values())
        if cohorts != self._cohorts:
            self._set_cohorts(cohorts)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        self._expect_state([n[len(prefix) :] for n in state_dict if n.startswith(prefix)])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the slots by name; see `Module.load_state_dict`. Cohorts of `adapt` are those of the dict."""
        before = self._cohorts, self._own, [box.value for box in self._boxes()]
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except BaseException:
            if self._cohorts != before[0]:
                self._clear_slots()
                self._cohorts, self._own = before[:2]
                self._place(before[2])
            raise

    # ----------------------------------------------------------------------------------------------
    # A step

    @overload
    def step(
        self, grads: Mapping[str, object] = ..., *, norm: Literal[False] = ..., **extra: Any
    ) -> None: ...
    @overload
    def step(
        self, grads: Mapping[str, object] = ..., *, norm: Literal[True], **extra: Any
    ) -> jax.Array: ...
    @shortened
    def step(
        self,
        grads: Mapping[str, object] = types.MappingProxyType({}),
        *,
        norm: bool = False,
        **extra: Any,
    ) -> jax.Array | None:
        """Update the parameters and the slots in place.

        Args:
            grads: dotted name -> gradient, of the parameter's shape and dtype, for every parameter that is
                trained; what ``nn.grad`` and ``nn.value_and_grad`` return.
            norm: whether to return the norm of the gradient.
            extra: what the transformation takes beside gradients, such as ``value=loss``.

        Returns:
            None; with `norm` the norm of all gradients together, before clipping, and of those accumulated
            so far.

        Raises:
            UnknownNameError: for missing or unknown names.
            ShapeError, DtypeError: if a gradient does not fit its parameter.
            StructureChangeError: if a parameter was added, removed, replaced, frozen or unfrozen
                since the optimizer was built; `adapt` takes that in.

        Example:
            >>> import jax.numpy as jnp, optax, statefulnn as nn
            >>> model = nn.Linear(1, 1, bias=False)
            >>> before = float(model.weight[0, 0])
            >>> nn.Optimizer(model, optax.sgd(0.5)).step({"weight": jnp.ones((1, 1))})
            >>> round(before - float(model.weight[0, 0]), 4)
            0.5
        """
        self._check_owner(grads)
        inputs = jax.tree_util.tree_leaves((grads, extra))
        eager = current_trace() is EAGER and not any(isinstance(x, Tracer) for x in inputs)
        if eager and all(is_array(x) for x in inputs):
            return (_step_with_norm if norm else _step)(self, grads, extra)
        return self._step(grads, extra, norm)

    def _step(
        self, grads: Mapping[str, Any], extra: Mapping[str, Any], norm: bool = False
    ) -> jax.Array | None:
        parameters = self._trained()
        self._check_structure(parameters)
        grads = self._checked(grads, parameters)
        values = {name: p.value for name, p in parameters.items()}
        boxes = self._boxes()
        slots = [box.value for box in boxes]

        # optax mixes integers, floats and float32 freely, and computes in the widest dtype at hand; a
        # session with strict promotion keeps that for its own code. The sum goes back to the
        # parameter's own dtype.
        with jax.numpy_dtype_promotion("standard"):
            update = self._updated if self._every == 1 else self._updated_in_turn
            values, slots, total = update(values, slots, grads, extra, norm)
        for name, p in parameters.items():
            p.value = values[name]
        for box, new in zip(boxes, slots, strict=True):
            if new is not box.value:
                box.value = new
        self._note_step(next(iter(parameters.values()))._scope, boxes)
        return total

    def _updated(
        self,
        values: dict[str, jax.Array],
        slots: list[jax.Array],
        grads: dict[str, jax.Array],
        extra: Mapping[str, Any],
        norm: bool,
    ) -> Any:
        """Return parameters and slots after a step, and the norm of the gradients if it is asked for."""
        arrays = list(grads.values())
        total = total_norm_of(arrays, 2) if norm or self.clip is not None else None
        if self.clip is not None:
            grads = dict(zip(grads, scaled_to(arrays, jnp.asarray(self.clip), total), strict=True))
        first, own = slots[: len(self._leaves)], slots[len(self._leaves) :]
        of_cohort = dict(zip(self._names, self._cohorts, strict=True))
        stepped, runs = {}, []
        for cohort in range(max(self._cohorts) + 1):
            current = list(first)
            for (k, i), value in zip(self._own, own, strict=True):
                current[i] = value if k == cohort else current[i]
            updates, leaves = self._run(cohort, values, current, grads, extra)
            runs.append(leaves)
            for name in (n for n in values if of_cohort[n] == cohort):
                stepped[name] = (values[name] + updates[name]).astype(values[name].dtype)
        leaves = [
            runs[of_cohort.get(leaf.owner or "", 0)][i] for i, leaf in enumerate(self._leaves)
        ]
        slots = [*leaves, *(runs[k][i] for k, i in self._own)]
        return stepped, slots, total if norm else None

    def _run(
        self,
        cohort: int,
        values: dict[str, jax.Array],
        slots: list[jax.Array],
        grads: dict[str, jax.Array],
        extra: Mapping[str, Any],
    ) -> Any:
        """Run the transformations of the groups that have a cohort: return updates and leaves of states."""
        states, updates = self._states(slots), {}
        alone = len(states) == 1
        members = set(zip(self._groups, self._cohorts, strict=True))
        for number, tx in enumerate(self._transformations()):
            if (number, cohort) not in members:
                continue
            mine = [
                n for n, group in zip(self._names, self._groups, strict=True) if group == number
            ]
            more = extra if alone or _takes_extra(tx) else {}
            own, states[number] = tx.update(
                {n: grads[n] for n in mine}, states[number], {n: values[n] for n in mine}, **more
            )
            updates |= own
        leaves, treedef = jax.tree_util.tree_flatten(states)
        if treedef != self._treedef:
            raise refusals.state_of_other_structure(self._treedef, treedef)
        for position, _ in reversed(self._constants):
            del leaves[position]
        for leaf, old, new in zip(self._leaves, slots, leaves, strict=True):
            if jnp.shape(new) != old.shape:
                raise refusals.slot_of_other_shape(leaf.slot, old.shape, jnp.shape(new))
        return updates, leaves

    def _updated_in_turn(
        self,
        values: dict[str, jax.Array],
        slots: list[jax.Array],
        grads: dict[str, jax.Array],
        extra: Mapping[str, Any],
        norm: bool,
    ) -> Any:
        """Accumulate gradients, and make an update of them in every so many-th step."""
        count = len(self._leaves) + len(self._own)
        slots, sums, steps = slots[:count], slots[count:-1], slots[-1] + 1
        sums = [s + grads[n] for n, s in zip(self._names, sums, strict=True)]
        scale = 1 / self._every if self._reduction == "mean" else 1.0

        def reduced(sums: list[jax.Array]) -> dict[str, Any]:
            return {n: s * scale for n, s in zip(self._names, sums, strict=True)}

        def update(carry: tuple) -> Any:
            values, slots, sums, steps = carry
            new, after, _ = self._updated(values, slots, reduced(sums), extra, False)
            new, after = jax.tree.map(_of_type, (new, after), (values, slots))
            return new, after, [jnp.zeros_like(s) for s in sums], jnp.zeros_like(steps)

        total = total_norm_of(list(reduced(sums).values()), 2) if norm else None
        # A loop that runs once or not at all: unlike a branch, it leaves what it carries where it lies.
        due = lambda carry: carry[-1] == self._every
        values, slots, sums, steps = lax.while_loop(due, update, (values, slots, sums, steps))
        return values, [*slots, *sums, steps], total

    def _note_step(self, scope: Scope | None, boxes: list[Any]) -> None:
        """Note a step of an optimizer that is built in the trace in which the module is an argument."""
        own, slots = self._nn_stamp.scope, [(b, b._value) for b in boxes]
        if own is not None and own.birth and scope is not None and not scope.birth and slots:
            scope.stepped.append((self, slots))

    # ----------------------------------------------------------------------------------------------
    # Checks

    def _check_owner(self, grads: object) -> None:
        """Warn of gradients that are known to be those of another module."""
        first = self._names[0]
        gradient = grads.get(first) if isinstance(grads, Mapping) else None
        owner = parameter_of(gradient)
        if owner is None:
            return
        own = getattr(self, _built_for(first))
        if owner is own or owner._scope is not own._scope:
            return  # of another scope: the optimizer is no argument there, which is an error of its own
        if any(owner is p for p in self.module.parameters()):
            return  # replaced since then, which is an error of its own
        message = refusals.other_module().format(type(self.module).__name__)
        warnings.warn(message, OtherModuleWarning, stacklevel=user_stack_level())

    def _check_structure(self, parameters: Mapping[str, Parameter]) -> None:
        kept = [n for n in self._names if n in parameters]
        replaced = [n for n in kept if getattr(self, _built_for(n)) is not parameters[n]]
        built_with = dict(zip(self._names, self._shapes, strict=True))
        reshaped = [n for n in kept if parameters[n].shape != built_with[n]]
        if tuple(parameters) == self._names and not replaced and not reshaped:
            return
        raise refusals.other_parameters(
            {
                "no longer trainable": [n for n in self._names if n not in parameters],
                "trainable since then": [n for n in parameters if n not in self._names],
                "replaced by another Parameter": replaced,
                "of another shape": [n for n in reshaped if n not in replaced],
            }
        )

    def _checked(self, grads: object, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        if not isinstance(grads, Mapping):
            raise refusals.no_gradients(grads)
        unknown = [n for n in grads if n not in parameters]
        if self._only is not None and unknown:  # two optimizers may share the gradients of one loss
            own = {n for n, p in self.module.named_parameters() if p.requires_grad}
            unknown = [n for n in unknown if n not in own]
        missing = [n for n in parameters if n not in grads]
        if unknown or missing:
            raise refusals.other_gradients(unknown, missing, self._names)
        checked = {}
        for name, p in parameters.items():
            grad = grads[name]
            if not is_array(grad):
                raise refusals.gradient_of_no_array(name, grad, p.shape, p.dtype)
            grad = checked[name] = grad if isinstance(grad, jax.Array) else jnp.asarray(grad)
            if grad.shape != p.shape:
                raise refusals.gradient_of_other_shape(name, grad.shape, p.shape)
            if grad.dtype != p.dtype:
                raise refusals.gradient_of_other_dtype(name, grad.dtype, p.dtype)
        return checked


@jit
def _step(opt: Optimizer, grads: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    opt._step(grads, extra)


@jit
def _step_with_norm(
    opt: Optimizer, grads: Mapping[str, Any], extra: Mapping[str, Any]
) -> jax.Array:
    return cast(jax.Array, opt._step(grads, extra, True))


def _built_for(name: str) -> str:
    """Return the attribute that refers to the parameter which had a name when the optimizer was built."""
    return f"built for {name}"


def _check_options(clip: object, accumulate: object, reduction: object) -> None:
    if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
        raise refusals.no_option("clip", clip, "it is the largest norm of a gradient", "clip=1.0")
    if type(accumulate) is not int or accumulate < 1:
        why = "it is the number of steps that make one update"
        raise refusals.no_option("accumulate", accumulate, why, "accumulate=8")
    if reduction not in ("mean", "sum"):
        why = "gradients of several steps are averaged or added"
        raise refusals.no_option("reduction", reduction, why, 'reduction="mean", or "sum"')


def _distinct(arrays: Sequence[Any], held: set[int]) -> list[jax.Array]:
    """Return arrays of which none is held already, nor twice among them."""
    # Some transformations start from the parameters themselves; a donated array must not sit in two boxes.
    result = []
    for x in arrays:
        result.append(jnp.array(x) if id(x) in held else jnp.asarray(x))
        held.add(id(result[-1]))
    return result


def _of_type(x: object, other: jax.Array) -> jax.Array:
    """Return an array of the dtype of another, which lies on an explicit mesh as the other does."""
    x, sharding = jnp.asarray(x, other.dtype), jax.typeof(other).sharding
    return x if jax.typeof(x).sharding == sharding else jax.sharding.reshard(x, sharding)


def _takes_extra(tx: object) -> bool:
    optax = import_extra("optax", "optax", "stepped an nn.Optimizer", "does the arithmetic")
    return isinstance(tx, optax.GradientTransformationExtraArgs)


def _equal(row: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(bool(jnp.array_equal(a, b)) for a, b in zip(row, other, strict=True))
