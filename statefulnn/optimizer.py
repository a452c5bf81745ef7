"""An optax transformation as a module: its slots are buffers, its step writes the parameters.

Because the slots are ordinary buffers, ``nn.jit`` carries them as state, ``state_dict`` saves them by
name, and a raw JAX transformation sees them as leaves. Needs the extra ``optim``.
"""

from __future__ import annotations

import collections
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core import habits
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import (
    ArgumentError,
    DtypeError,
    OtherModuleWarning,
    ShapeError,
    StructureChangeError,
    UnknownNameError,
    explain,
    user_stack_level,
)
from statefulnn.core.extras import import_extra
from statefulnn.core.gradients import parameter_of
from statefulnn.core.module import Module, Ref, find_box, place_box
from statefulnn.core.ownership import Scope
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.core.plan import plan_of
from statefulnn.core.refusals import array_of, to_shape
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.jit import jit

# Static attributes compare by identity unless they are known types: equal treedefs are made one object,
# so that two equal optimizers share compiled code.
_treedefs: dict[Any, Any] = {}


class Slots(Module):
    """The slots of one kind, and the settings of ``optax.inject_hyperparams``: their names are fixed."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in self._buffers or name in self._modules or name in self.__dict__):
            habits.refuse_slot(
                ".".join(self._path()), name, [*self._buffers, *self._modules], value
            )
        super().__setattr__(name, value)


class Optimizer(Module):
    """Trains the parameters of a module with any optax transformation.

    Only parameters with ``requires_grad=True`` take part: a frozen one gets no slot, no update and no
    weight decay. A tied parameter gets one slot. The slots are buffers named after optax's fields and
    the parameters, ``mu.fc1.weight``, ``count``; the module itself is referred to and not owned, so
    ``state_dict()`` holds the slots and not the weights.

    Outside a transformation the whole step is one compiled call.

    Args:
        module: the module to train.
        tx: an optax transformation, such as ``optax.adamw(1e-3)``.

    Attributes:
        module: the module to train.
        tx: the transformation.
        hyperparams: where `tx` comes of ``optax.inject_hyperparams``, its settings by name. They are buffers:
            read them, and assign arrays between two steps; that compiles nothing.

    Raises:
        TypeError: if `tx` is no optax transformation, or `module` no module.
        UnknownNameError: if no parameter of the module is trainable.
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
        >>> opt.hyperparams.learning_rate = opt.hyperparams.learning_rate / 10
        >>> round(float(opt.hyperparams.learning_rate), 6)
        0.001
    """

    # optax's transformations are closures over settings that stay as they are.
    _unwatched = ("tx",)

    _habits = habits.OPTIMIZER
    zero_grad: Any = property()  # of nothing: Python asks `__getattr__`, which has the answer

    module: Any

    @shortened
    def __init__(self, module: Module, tx: Any) -> None:
        super().__init__()
        optax = import_extra("optax", "optax", "made an nn.Optimizer", "does the arithmetic")
        if not isinstance(module, Module):
            several = isinstance(module, (list, tuple))
            model = "nn.ModuleList([a, b])" if several else "model"
            swapped = isinstance(tx, Module)
            raise ArgumentError(
                explain(
                    f"nn.Optimizer was given {_described(module)} as the module",
                    "it trains the parameters of an nn.Module, and finds them itself",
                    "nn.Optimizer(model, tx), the module first"
                    if swapped
                    else f"nn.Optimizer({model}, optax.adam(1e-3))",
                )
            )
        if not isinstance(tx, optax.GradientTransformation):
            raise ArgumentError(
                explain(
                    f"nn.Optimizer was given {_described(tx)} as the transformation",
                    "it needs an optax transformation: an object with init and update",
                    "call the factory, nn.Optimizer(model, optax.adam(1e-3)); for optax.MultiSteps "
                    "pass its .gradient_transformation()",
                )
            )
        plan_of(module)  # a module hidden in a list would not be trained: raises here
        parameters = dict(_trainable(module))
        if not parameters:
            raise UnknownNameError(
                explain(
                    f"made an Optimizer of {type(module).__name__}",
                    "none of its parameters is trainable, so a step would do nothing",
                    "unfreeze what is to be trained, module.requires_grad_(True), and build the "
                    "optimizer after that",
                )
            )
        self.module = Ref(module)
        # The boxes themselves: a parameter of the same name may be another one by the time of a step.
        for name, p in parameters.items():
            setattr(self, _built_for(name), Ref(p))
        self.tx = tx
        self._names = tuple(parameters)
        self._shapes = tuple(p.shape for p in parameters.values())

        with jax.numpy_dtype_promotion("standard"):
            state = tx.init({name: p.value for name, p in parameters.items()})
        self._place(state, {id(p.value) for p in parameters.values()})

    def _place(self, state: Any, held: set[int]) -> None:
        """Put the arrays of optax's state into buffers; `held` are arrays that are in boxes already."""
        paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
        self._treedef = _treedefs.setdefault(treedef, treedef)
        # A slot is the path of a buffer, or None for a leaf that is no array and stays as it is.
        slots: list[tuple[str, ...] | None] = []
        constants = []
        names = _slot_names([path for path, leaf in paths_and_leaves if _is_array(leaf)])
        for _, leaf in paths_and_leaves:
            if _is_array(leaf):
                slot = next(names)
                # Some transformations start from the parameters themselves; a donated array must
                # not sit in two boxes.
                array = jnp.array(leaf) if id(leaf) in held else jnp.asarray(leaf)
                held.add(id(array))
                place_box(self, slot, Buffer(array), Slots)
                slots.append(slot)
            else:
                slots.append(None)
                constants.append(leaf)
        self._slots = tuple(slots)
        self._constants = tuple(constants)

    @property
    def state(self) -> Any:
        """The state as optax knows it, for reading: ``optax.tree.get(opt.state, "count")``."""
        constants = iter(self._constants)
        leaves = [next(constants) if b is None else b.value for b in self._boxes()]
        return jax.tree_util.tree_unflatten(self._treedef, leaves)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in habits.SETTINGS_OF_OPTIMIZERS and type(self) is Optimizer:
            getattr(self, name)  # has the answer
        super().__setattr__(name, value)

    @shortened
    def step(
        self, grads: Mapping[str, object] = types.MappingProxyType({}), **extra: object
    ) -> None:
        """Update the parameters and the slots in place.

        Args:
            grads: dotted name -> gradient, of the parameter's shape and dtype, for every trainable
                parameter; what ``nn.grad`` and ``nn.value_and_grad`` return.
            extra: what the transformation takes beside gradients, such as ``value=loss``.

        Raises:
            UnknownNameError: for missing or unknown names.
            ShapeError, DtypeError: if a gradient does not fit its parameter.
            StructureChangeError: if a parameter was added, removed, replaced, frozen or unfrozen
                since the optimizer was built.

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
        if eager and all(_is_array(x) for x in inputs):
            _compiled_step(self, grads, extra)
        else:
            self._step(grads, extra)

    def _step(self, grads: Any, extra: Mapping[str, Any]) -> None:
        parameters = dict(_trainable(self.module))
        self._check_structure(parameters)
        grads = self._checked(grads, parameters)
        values = {name: p.value for name, p in parameters.items()}

        # optax mixes integers, floats and float32 freely, and computes in the widest dtype at hand; a
        # session with strict promotion keeps that for its own code. The sum goes back to the
        # parameter's own dtype.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = self.tx.update(grads, self.state, values, **extra)
            values = {name: (v + updates[name]).astype(v.dtype) for name, v in values.items()}

        leaves, treedef = jax.tree_util.tree_flatten(state)
        boxes = self._boxes()
        self._check_state(treedef, boxes, leaves)
        for name, p in parameters.items():
            p.value = values[name]
        for box, new in zip(boxes, leaves, strict=True):
            if box is not None and new is not box.value:
                box.value = new
        self._note_step(next(iter(parameters.values()))._scope, boxes)

    def _note_step(self, scope: Scope | None, boxes: list[Any]) -> None:
        """Note a step of an optimizer that is built in the trace in which the module is an argument."""
        own, slots = self._nn_stamp.scope, [(b, b._value) for b in boxes if b is not None]
        if own is not None and own.birth and scope is not None and not scope.birth and slots:
            scope.stepped.append((self, slots))

    def _check_owner(self, grads: Any) -> None:
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
        warnings.warn(
            explain(
                f"stepped an Optimizer of a {type(self.module).__name__} with gradients of another module",
                "the step changes the module that the optimizer was built for, and the other one learns "
                "nothing",
                "build the optimizer for the model that is trained, opt = nn.Optimizer(model, tx); if it "
                "is meant, as with gradients of an adapted copy, filter nn.OtherModuleWarning",
            ),
            OtherModuleWarning,
            stacklevel=user_stack_level(),
        )

    def _boxes(self) -> list[Any]:
        return [None if path is None else find_box(self, path) for path in self._slots]

    def _check_structure(self, parameters: Mapping[str, Parameter]) -> None:
        kept = [n for n in self._names if n in parameters]
        replaced = [n for n in kept if getattr(self, _built_for(n)) is not parameters[n]]
        built_with = dict(zip(self._names, self._shapes, strict=True))
        reshaped = [n for n in kept if parameters[n].shape != built_with[n]]
        if tuple(parameters) == self._names and not replaced and not reshaped:
            return
        found = {
            "no longer trainable": [n for n in self._names if n not in parameters],
            "trainable since then": [n for n in parameters if n not in self._names],
            "replaced by another Parameter": replaced,
            "of another shape": [n for n in reshaped if n not in replaced],
        }
        parts = [f"{what}: {_listed(names)}" for what, names in found.items() if names]
        raise StructureChangeError(
            explain(
                "stepped an Optimizer whose module has other trainable parameters than when it was "
                f"built ({'; '.join(parts) or 'their order changed'})",
                "the slots belong to the parameters of that time",
                "build the optimizer after freezing, unfreezing, adding or replacing parameters: "
                "opt = nn.Optimizer(model, tx)",
            )
        )

    def _check_state(self, treedef: Any, boxes: list[Any], leaves: list[Any]) -> None:
        if treedef != self._treedef:
            raise StructureChangeError(
                explain(
                    "the transformation returned a state of another structure than it was given",
                    f"the slots were made for\n  {self._treedef}\n  and not for\n  {treedef}",
                    "a transformation must keep the structure of its state, as jax.lax.scan asks too",
                )
            )
        for path, box, new in zip(self._slots, boxes, leaves, strict=True):
            if path is not None and jnp.shape(new) != box.shape:
                raise StructureChangeError(
                    explain(
                        f"a step would turn the slot {'.'.join(path)!r} of shape {box.shape} into one "
                        f"of shape {jnp.shape(new)}",
                        "the slots have the shapes that the parameters had when the optimizer was built",
                        "build the optimizer after giving a parameter another shape: "
                        "opt = nn.Optimizer(model, tx)",
                    )
                )

    def _checked(self, grads: Any, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        if not isinstance(grads, Mapping):
            raise ArgumentError(
                explain(
                    f"Optimizer.step was given {_described(grads)}",
                    "gradients are matched to parameters by name",
                    f"the dict that nn.grad and nn.value_and_grad return: {habits.TRAIN}",
                )
            )
        unknown = [n for n in grads if n not in parameters]
        missing = [n for n in parameters if n not in grads]
        if unknown or missing:
            parts = []
            if unknown:
                parts.append(f"unknown names {_listed(unknown)}")
            if missing:
                parts.append(f"no gradient for {_listed(missing)}")
            raise UnknownNameError(
                explain(
                    f"Optimizer.step was given {' and '.join(parts)}",
                    f"it needs one gradient for each trainable parameter: {_listed(self._names)}",
                    "take the gradient with respect to the module the optimizer was built with: "
                    f"{habits.TRAIN.replace('(model,', '(opt.module,')}",
                )
            )
        checked = {}
        for name, p in parameters.items():
            grad = grads[name]
            if not _is_array(grad):
                entry = f'grads["{name}"]'
                array = f"jnp.zeros({p.shape}, jnp.{p.dtype}), which leaves it as it is"
                array = array if grad is None else array_of(grad, entry)
                raise ArgumentError(
                    explain(
                        f"Optimizer.step was given {_described(grad)} as the gradient of {name!r}",
                        "a gradient is an array of the parameter's shape",
                        f"{entry} = {array}",
                    )
                )
            grad = checked[name] = grad if isinstance(grad, jax.Array) else jnp.asarray(grad)
            if grad.shape != p.shape:
                raise ShapeError(
                    explain(
                        f"Optimizer.step was given a gradient of shape {grad.shape} for {name!r} of "
                        f"shape {p.shape}",
                        "a broadcast update would train something else than was meant",
                        _shape_advice(name, grad.shape, p.shape),
                    )
                )
            if grad.dtype != p.dtype:
                raise DtypeError(
                    explain(
                        f"Optimizer.step was given a gradient of dtype {grad.dtype} for {name!r} of "
                        f"dtype {p.dtype}",
                        "the slots have the parameter's dtype, and mixing would change it silently",
                        f"cast it: grads[{name!r}].astype({str(p.dtype)!r})",
                    )
                )
        return checked

    def __repr__(self) -> str:
        return f"Optimizer({type(self.module).__name__}, {len(self._names)} trainable parameters)"


@jit
def _compiled_step(opt: Optimizer, grads: Any, extra: Mapping[str, Any]) -> None:
    opt._step(grads, extra)


def _built_for(name: str) -> str:
    """Return the attribute that refers to the parameter which had a name when the optimizer was built."""
    return f"built for {name}"


def _trainable(module: Module) -> Iterator[tuple[str, Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _shape_advice(name: str, given: tuple[int, ...], own: tuple[int, ...]) -> str:
    if given[1:] == own and given[0] != 1:
        return f"the mean of the gradients of examples: grads[{name!r}].mean(0)"
    return to_shape(f"grads[{name!r}]", given, own) or f"a gradient of shape {own}"


def _is_array(leaf: Any) -> bool:
    # Python numbers count as arrays, as they do for jax.jit: a step counter must not be a constant.
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex))


def _slot_names(paths: list[Any]) -> Iterator[tuple[str, ...]]:
    """Turn optax's paths into dotted names, as short as they can be.

    The positions in a chain are left out, ``mu.fc1.weight`` for ``[0].mu['fc1.weight']``, unless two
    names would then be one, or one the beginning of another.
    """
    full = [tuple(part for key in path for part in _parts(key)) for path in paths]
    short = [
        tuple(
            part
            for key in path
            if not isinstance(key, jax.tree_util.SequenceKey)
            for part in _parts(key)
        )
        for path in paths
    ]
    uses = collections.Counter(short)
    inner = {parts[:i] for parts in short for i in range(len(parts))}
    for parts, long in zip(short, full, strict=True):
        clear = uses[parts] == 1 and parts not in inner
        yield (parts if clear else long) or ("slot",)


def _parts(key: Any) -> list[str]:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute)).split(".")
    return [str(key)]


def _listed(names: Any, limit: int = 8) -> str:
    names = list(names)
    shown = ", ".join(repr(n) for n in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _described(value: Any) -> str:
    if isinstance(value, jax.Array):
        return "an array"
    if isinstance(value, Iterator):
        return "an iterator"
    name = getattr(value, "__name__", None)
    return f"the {type(value).__name__} {name}" if name else f"a {type(value).__name__}"
