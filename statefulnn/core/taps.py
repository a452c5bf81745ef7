"""Backward hooks, as taps: identities with a derivative of their own, around forward.

Each module has two taps, identities with a custom derivative: one on the inputs and one on the
outputs of a module. The output tap hands its cotangent to the input tap through the data flow, as the
cotangent of a zero slot of the output's shape, so the pair works under jit, vmap, scan and checkpoint.
The taps are also given the arrays of the module and of other arguments, so that the input tap fires when
only these are differentiated, and the backward pass has their values.

As in torch, hooks see the arrays among the positional arguments and the top level of a tuple that
forward returns; an LSTM's state, a tuple in that tuple, passes by. A second derivative is the derivative
of the gradient that the hooks made: ``jax.grad(jax.grad(f))`` and ``jax.hessian(f)`` agree with finite
differences of ``jax.grad(f)``. (torch runs the hooks again in the second backward pass.)

A hook is given the module itself if that holds no traced arrays. Else it is given a copy with the values
that the module had when it was called, which may be read and not written: the call is over.

Limitations
  - Forward-mode differentiation (``jax.jvp``, ``jax.jacfwd``, ``jax.linearize``) through a module with
    backward hooks is a TypeError; a cotangent does not exist there.
  - The slots need the output's shape before forward has run, so forward runs twice while tracing, first
    silently on a clone. Where that does not tell the shape (hooks further inside change it, forward
    needs what clones lack), forward itself runs twice, with its forward hooks; what the first run wrote
    to the module is taken back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core import compat, refusals
from statefulnn.core.compat import Tracer, current_trace
from statefulnn.core.errors import user_stack_level
from statefulnn.core.generator import Generator, current_generator, use_generator
from statefulnn.core.graph import build_clones, own_scope
from statefulnn.core.leaks import note_hook, watching_hooks
from statefulnn.core.listeners import listening, run_abstractly
from statefulnn.core.ownership import Scope
from statefulnn.core.plan import build_plan, plan_of
from statefulnn.core.pytree import flatten_collecting, unflatten_with
from statefulnn.core.stamps import value_changed

if TYPE_CHECKING:
    from statefulnn.core.module import Module


class _Static:
    """A pytree without leaves that carries a Python value."""

    def __init__(self, value: Any) -> None:
        self.value = value


jax.tree_util.register_pytree_node(_Static, lambda s: ((), s.value), lambda v, _: _Static(v))


def tapped(
    module: Module,
    args: tuple,
    kwargs: dict,
    forward: Callable[..., Any],
    before: list,
    after: list,
) -> Any:
    """Call `forward` between the taps of a module that has backward hooks, and return the output."""
    _refuse_forward_mode(module)
    memory = _Memory(module, args, kwargs)
    expected = _probe(module, args, kwargs)
    if expected is None:
        expected = _Arrays(forward(*args))
        memory.restore()
    # The probe, a clone in a trace of its own, may have seen other shapes than there are. What the first
    # run shows is right, unless forward gives other shapes each time.
    for _ in range(2):
        out, found = _between_taps(module, args, kwargs, forward, before, after, expected)
        if found == expected:
            if expected.hidden:
                text = refusals.hooks_see_no_output(type(module).__name__)
                warnings.warn(text, stacklevel=user_stack_level())
            return out
        memory.restore()
        expected = found
    raise refusals.outputs_differ(type(module).__name__)


def _refuse_forward_mode(module: Module) -> None:
    for trace in compat.chain(current_trace()):
        if compat.is_forward_mode(trace):
            raise refusals.forward_mode(type(module).__name__)
        if compat.kind(trace) == "autodiff":
            return  # reverse mode is nearer: its gradient may be differentiated in any mode


class _Memory:
    """The values in the boxes of a call, to take back what a run of forward wrote."""

    def __init__(self, module: Module, args: tuple, kwargs: dict) -> None:
        roots = flatten_collecting((args, kwargs))[2]
        plan = build_plan((module, *roots)) if roots else plan_of(module)
        generator = current_generator()
        boxes = plan.boxes if generator is None else [*plan.boxes, generator]
        self._values = [(box, box._value) for box in boxes]

    def restore(self) -> None:
        for box, value in self._values:
            box._value = value
        value_changed()


class _Arrays:
    """Which items of an output hooks can see: the floating arrays at its top level.

    Attributes:
        count: how many items a tuple has; 1 for an array alone.
        where: which of them are floating arrays.
        shapes: their shapes and dtypes.
        hidden: whether the only floating arrays are deeper in the output.
    """

    def __init__(self, out: object) -> None:
        items = _items(out)
        self.count = len(items)
        self.where = tuple(i for i, x in enumerate(items) if _differentiable(x))
        self.shapes = tuple((items[i].shape, items[i].dtype) for i in self.where)
        leaves = [] if self.where else jax.tree_util.tree_leaves(out)
        self.hidden = any(map(_differentiable, leaves))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Arrays) and vars(self) == vars(other)


def _items(out: object) -> list[Any]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _differentiable(x: object) -> TypeGuard[jax.Array]:
    dtype = getattr(x, "dtype", None)
    return dtype is not None and hasattr(x, "shape") and jnp.issubdtype(dtype, jnp.inexact)


def _between_taps(
    module: Module,
    args: tuple,
    kwargs: dict,
    forward: Callable[..., Any],
    before: list,
    after: list,
    expected: _Arrays,
) -> tuple[Any, _Arrays]:
    """Run forward between the two taps; return the output and its arrays, tapped if as expected."""
    where = tuple(i for i, x in enumerate(args) if _differentiable(x))
    inputs = [jnp.asarray(args[i]) for i in where]
    backward = _Backward(module, before, after, len(args), where, expected)
    rest = [x for i, x in enumerate(args) if i not in where]
    others = filter(_differentiable, jax.tree_util.tree_leaves((rest, kwargs)))
    # JAX runs a backward rule only if an argument of it is differentiated. So the tap is also given an empty
    # piece of each array deeper in the arguments; what is no tracer is not differentiated.
    anchors = [(x if x.ndim else x[None])[:0] for x in others if isinstance(x, Tracer)]
    fires = any(isinstance(x, Tracer) for x in inputs) or anchors or backward.values

    slots: list[Any] = []
    if after and fires and expected.where:
        inputs, slots = backward.input_tap()(inputs, anchors, backward.values)
        args = tuple(inputs[where.index(i)] if i in where else x for i, x in enumerate(args))
    out = forward(*args)
    found = _Arrays(out)
    # Slots of other shapes cannot carry the gradient: the caller tries again with what was found.
    if found != expected or not expected.where:
        return out, found
    items = _items(out)
    tap = backward.output_tap(alone=not slots)
    seen = tap([jnp.asarray(items[i]) for i in expected.where], slots, backward.values)
    for i, x in zip(expected.where, seen, strict=True):
        items[i] = x
    if isinstance(out, (tuple, list)):
        return (type(out)(*items) if hasattr(out, "_fields") else type(out)(items)), found
    return items[0], found


class _Backward:
    """The hooks of one call, and the two taps that run them in the backward pass.

    Attributes:
        values: the traced arrays of the module; a tap that is given them knows them in its backward pass.
    """

    def __init__(
        self,
        module: Module,
        before: list,
        after: list,
        num_inputs: int,
        where: Sequence[int],
        outputs: _Arrays,
    ) -> None:
        self.module = module
        self.before, self.after = before, after
        self.num_inputs, self.where = num_inputs, where
        self.outputs = outputs
        plan = plan_of(module)
        self._moduledef, self._leaves = plan.moduledef, list(plan.leaves())
        self._traced = [i for i, v in enumerate(self._leaves) if isinstance(v, Tracer)]
        self.values = [self._leaves[i] for i in self._traced]

    def input_tap(self) -> Any:
        """Return the identity on ``(inputs, anchors, values)`` that gives ``(inputs, slots)``."""

        def slots():
            return [jnp.zeros(shape, dtype) for shape, dtype in self.outputs.shapes]

        @jax.custom_vjp
        def tap(xs, anchors, values):
            return xs, slots()

        def fwd(xs, anchors, values):
            # Which inputs are differentiated, known by `symbolic_zeros`: a hook sees None for others.
            flags = tuple(x.perturbed for x in xs)
            kept = [v.value for v in values]
            return ([x.value for x in xs], slots()), (_Static((flags, len(anchors))), kept)

        def bwd(residuals, cotangents):
            static, values = residuals
            flags, num_anchors = static.value
            grad_inputs, grad_outputs = (list(map(_dense, c)) for c in cotangents)
            shown: list[Any] = [None] * self.num_inputs
            for i, g, flag in zip(self.where, grad_inputs, flags, strict=True):
                shown[i] = g if flag else None
            result = self.run_after(values, tuple(shown), self.output_gradients(grad_outputs))
            grads = [
                _like(result[i], g, "backward hook") if flag else g
                for i, g, flag in zip(self.where, grad_inputs, flags, strict=True)
            ]
            # None is no gradient: the anchors and the module's arrays get theirs from forward itself.
            return grads, [None] * num_anchors, [None] * len(values)

        tap.defvjp(fwd, bwd, symbolic_zeros=True)
        return tap

    def output_tap(self, alone: bool) -> Any:
        """Return the identity on outputs; `alone` if there is no input tap to run the hooks."""

        @jax.custom_vjp
        def tap(ys, slots, values):
            return ys

        def fwd(ys, slots, values):
            return ys, values

        def bwd(values, grads):
            shown = self.output_gradients(grads)
            module = self.module_with(values)
            with watching_hooks():
                for hook, _, _ in self.before:
                    note_hook(hook, "backward pre-hook", module)
                    result = hook(module, shown)
                    if result is not None:
                        shown = _replaced(result, shown, "backward pre-hook", "grad_output")
            grads = [
                _like(shown[i], g, "backward pre-hook")
                for i, g in zip(self.outputs.where, grads, strict=True)
            ]
            if alone:
                self.run_after(values, (None,) * self.num_inputs, self.output_gradients(grads))
            # As the slots' gradient too, on which it reaches the input's tap when forward is done.
            return grads, [] if alone else grads, [None] * len(values)

        tap.defvjp(fwd, bwd)
        return tap

    def module_with(self, values: Sequence[jax.Array]) -> Any:
        """Return the module that hooks are given: itself, or a copy with the values of a traced call."""
        if not values:
            return self.module
        # The module's own boxes hold tracers of a forward pass that may be over.
        leaves = list(self._leaves)
        for i, value in zip(self._traced, values, strict=True):
            leaves[i] = value
        scope = Scope(False, refusals.LOST_AFTER_THE_CALL, self._moduledef)
        return build_clones(self._moduledef, leaves, scope)[0][0]

    def output_gradients(self, grads: Sequence[jax.Array]) -> tuple:
        """Return what hooks are shown: a gradient for each floating array, None for other items."""
        shown: list[Any] = [None] * self.outputs.count
        for i, g in zip(self.outputs.where, grads, strict=True):
            shown[i] = g
        return tuple(shown)

    def run_after(
        self, values: Sequence[jax.Array], grad_inputs: tuple, grad_outputs: tuple
    ) -> tuple:
        """Run the hooks that come after the module's gradient; return what they make of it."""
        module = self.module_with(values)
        given = any(g is not None for g in grad_inputs)
        for hook, _, _ in self.after:
            with watching_hooks():
                note_hook(hook, "backward hook", module)
                result = hook(module, grad_inputs, grad_outputs)
            if result is None:
                continue
            grad_inputs = _replaced(result, grad_inputs, "backward hook", "grad_input")
            if not given and any(g is not None for g in grad_inputs):
                raise refusals.gradient_of_nothing(type(module).__name__)
        return grad_inputs


def _probe(module: Module, args: tuple, kwargs: dict) -> _Arrays | None:
    """Run forward silently on a clone to see what it returns; None if that fails."""
    dynamic, treedef, roots = flatten_collecting((args, kwargs))
    plan = build_plan((module, *roots)) if roots else plan_of(module)
    generator = current_generator()
    found: list[_Arrays] = []

    def run(cut=lambda x: x):
        leaves = [cut(v) for v in plan.leaves()]
        clone, *others = build_clones(plan.moduledef, leaves, own_scope(plan.moduledef))[0]
        args, kwargs = unflatten_with(treedef, [cut(x) for x in dynamic], others)
        draws = None
        if generator is not None:
            draws = Generator.clone_of(None, generator.state, own_scope(plan.moduledef), 0)
        with use_generator(draws):
            found.append(_Arrays(clone.forward(*args, **kwargs)))

    def stop(x):
        return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x

    # A forward that looks at values may do so outside jit.
    for attempt in (lambda: run_abstractly(run), lambda: run(stop)):
        try:
            with listening(silently=True):
                attempt()
        except Exception:
            continue
        return found[-1]
    return None


def _dense(cotangent: jax.Array | jax.custom_derivatives.SymbolicZero) -> jax.Array:
    if not isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return cotangent
    zero: Any = cotangent
    return jnp.zeros(zero.shape, zero.dtype)


def _replaced(result: object, old: tuple, what: str, name: str) -> tuple:
    result = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    if len(result) != len(old):
        raise RuntimeError(
            f"{what} returned an invalid number of {name} gradients, got {len(result)}, but expected "
            f"{len(old)}."
        )
    return result


def _like(new: object, old: jax.Array, what: str) -> jax.Array:
    """Return what a hook put in place of a gradient; None is zero, as in torch."""
    if new is None:
        return jnp.zeros_like(old)
    if not isinstance(new, (jax.Array, np.ndarray, np.generic)):
        raise refusals.gradient_of_no_array(what, type(new).__name__)
    if new.shape != old.shape:
        raise refusals.gradient_of_other_shape(what, new.shape, old.shape)
    if new.dtype != old.dtype and not getattr(new, "weak_type", False):
        raise refusals.gradient_of_other_dtype(what, new.dtype, old.dtype)
    return jnp.asarray(new, old.dtype)
