"""Forward and backward hooks.

Forward hooks are plain Python around ``forward``: under a compiled call they run once, while tracing.

Backward hooks are taps: two identities with a custom derivative, one on the inputs and one on the
outputs of a module. The output tap hands its cotangent to the input tap through the data flow, as the
cotangent of a zero slot of the output's shape, so the pair works under jit, vmap, scan, checkpoint and
in second derivatives. An empty slice of every parameter anchors the input tap, so that it fires also
when no input is differentiated.

Limitation: forward-mode differentiation (``jax.jvp``, ``jax.jacfwd``) through a module with backward
hooks is a TypeError; a cotangent does not exist there.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core import compat
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.generator import Generator, current_generator, use_generator
from statefulnn.core.graph import build_clones, own_scope
from statefulnn.core.plan import plan_of
from statefulnn.core.registry import GLOBAL_HOOKS, HookDict
from statefulnn.core.scope import user_stack_level

_number = itertools.count().__next__


class RemovableHandle:
    """Removes a hook: by `remove`, or at the end of a ``with`` block."""

    def __init__(self, hooks: HookDict, number: int) -> None:
        self._hooks = weakref.ref(hooks)
        self.id = number

    def remove(self) -> None:
        """Remove the hook; a second call does nothing."""
        hooks = self._hooks()
        if hooks is not None and self.id in hooks:
            del hooks[self.id]

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def add_hook(hooks: HookDict, hook: Any, prepend: bool = False) -> RemovableHandle:
    """Put a hook, (function, with_kwargs, always_call), at the end or the beginning."""
    if not callable(hook[0]):
        raise TypeError(
            explain(
                f"registered an object of type {type(hook[0]).__name__} as a hook",
                "a hook is called",
                "pass a function",
            )
        )
    number = _number()
    if prepend:
        later = dict(hooks)
        dict.clear(hooks)
        hooks[number] = hook
        hooks.update(later)
    else:
        hooks[number] = hook
    return RemovableHandle(hooks, number)


class _Active(threading.local):
    """Who listens to calls in this thread."""

    captures: tuple[Any, ...] = ()  # functions (module, output), see transforms.capture
    muted: bool = False  # a probe is running: no hook fires


active = _Active()


def hooks_of(module: Any, name: str) -> list[Any]:
    """Return global hooks, then the module's own."""
    own = module.__dict__.get(name)
    everywhere = GLOBAL_HOOKS[name]
    return [*everywhere.values(), *(own.values() if own else ())]


def call_with_hooks(module: Any, args: tuple, kwargs: dict) -> Any:
    """Call ``forward`` with every hook that applies."""
    if active.muted:
        return module.forward(*args, **kwargs)
    called: set[int] = set()
    try:
        return _call(module, args, kwargs, called)
    except Exception:
        # always_call hooks that have not run yet still do, once; the first error propagates.
        for index, (hook, with_kwargs, always) in enumerate(hooks_of(module, "_forward_hooks")):
            if always and index not in called:
                called.add(index)
                try:
                    if with_kwargs:
                        hook(module, args, kwargs, None)
                    else:
                        hook(module, args, None)
                except Exception as error:
                    warnings.warn(
                        f"a forward hook with always_call=True raised {error!r}; the error that made "
                        "forward fail is raised instead",
                        stacklevel=user_stack_level(),
                    )
        raise


def _call(module: Any, args: tuple, kwargs: dict, called: set[int]) -> Any:
    for hook, with_kwargs, _ in hooks_of(module, "_forward_pre_hooks"):
        if with_kwargs:
            result = hook(module, args, kwargs)
            if result is not None:
                if not (isinstance(result, tuple) and len(result) == 2):
                    raise RuntimeError(
                        "forward pre-hook must return None or a tuple of (new_args, new_kwargs), "
                        f"but got {result!r}."
                    )
                args, kwargs = result
        else:
            result = hook(module, args)
            if result is not None:
                args = result if isinstance(result, tuple) else (result,)

    def forward(*args):
        out = module.forward(*args, **kwargs)
        for index, (hook, with_kwargs, _) in enumerate(hooks_of(module, "_forward_hooks")):
            called.add(index)
            result = hook(module, args, kwargs, out) if with_kwargs else hook(module, args, out)
            if result is not None:
                out = result
        return out

    before = hooks_of(module, "_backward_pre_hooks")
    after = hooks_of(module, "_backward_hooks")
    if (before or after) and current_trace() is not EAGER:
        out = _tapped(module, args, kwargs, forward, before, after)
    else:
        out = forward(*args)
    for listener in active.captures:
        listener(module, out)
    return out


# --------------------------------------------------------------------------------------------------
# Taps


class _Static:
    """A pytree without leaves that carries a Python value."""

    def __init__(self, value: Any) -> None:
        self.value = value


jax.tree_util.register_pytree_node(_Static, lambda s: ((), s.value), lambda v, _: _Static(v))


def _tapped(module: Any, args: tuple, kwargs: dict, forward: Any, before: list, after: list) -> Any:
    if compat.is_forward_mode(current_trace()):
        raise TypeError(
            explain(
                f"differentiated {type(module).__name__} in forward mode (jax.jvp, jax.jacfwd)",
                "it has backward hooks, and forward mode has no cotangents to show them",
                "remove the hooks (handle.remove()), or use reverse mode (jax.grad, jax.vjp)",
            )
        )
    shapes = _outputs(_probe(module, args, kwargs))
    if shapes is None:
        warnings.warn(
            f"{type(module).__name__} has backward hooks, but its output is neither an array nor a "
            "tuple of arrays: they do not fire. Return an array or a tuple of arrays.",
            stacklevel=user_stack_level(),
        )
        return forward(*args)
    where = [i for i, x in enumerate(args) if _differentiable(x)]
    slots = [(s.shape, s.dtype) for s in shapes if jnp.issubdtype(s.dtype, jnp.inexact)]
    anchors = [p.value.reshape(-1)[:0] for p in module.parameters() if p.requires_grad]

    enter = _input_tap(module, after, slots, len(args), where)
    tapped, slot_values = enter([jnp.asarray(args[i]) for i in where], anchors)
    args = tuple(tapped[where.index(i)] if i in where else x for i, x in enumerate(args))
    out = forward(*args)
    outs = _outputs(out)
    if outs is None or [(o.shape, o.dtype) for o in outs] != [(s.shape, s.dtype) for s in shapes]:
        raise ShapeError(
            explain(
                f"a forward hook gave {type(module).__name__} an output of another shape or type",
                "the module has backward hooks too, which are tied to the shape that forward returns",
                "register the backward hook on the module around it",
            )
        )
    inexact = [i for i, o in enumerate(outs) if jnp.issubdtype(o.dtype, jnp.inexact)]
    passed = _output_tap(module, before, len(outs), inexact)(
        [outs[i] for i in inexact], slot_values
    )
    outs = [passed[inexact.index(i)] if i in inexact else o for i, o in enumerate(outs)]
    if isinstance(out, (tuple, list)):
        return type(out)(*outs) if hasattr(out, "_fields") else type(out)(outs)
    return outs[0]


def _differentiable(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def _outputs(out: Any) -> list[Any] | None:
    """Return the arrays of an output that backward hooks can see, None for any other output."""
    if hasattr(out, "dtype") and hasattr(out, "shape"):
        return [out]
    if isinstance(out, (tuple, list)) and out and all(hasattr(o, "dtype") for o in out):
        return list(out)
    return None


def _probe(module: Any, args: tuple, kwargs: dict) -> Any:
    """Run forward on a clone, silently, for the shapes of its outputs."""
    plan = plan_of(module)
    generator = current_generator()

    def run(leaves, state, dynamic):
        clone = build_clones(plan.moduledef, leaves, own_scope(plan.moduledef))[0][0]
        args, kwargs = jax.tree_util.tree_unflatten(treedef, _put_back(dynamic))
        draws = None
        if generator is not None:
            draws = Generator.clone_of(None, state, own_scope(plan.moduledef), 0)
        with use_generator(draws):
            return clone.forward(*args, **kwargs)

    flat, treedef = jax.tree_util.tree_flatten((args, kwargs))
    arrays = [x for x in flat if isinstance(x, jax.Array)]

    def _put_back(dynamic):
        given = iter(dynamic)
        return [next(given) if isinstance(x, jax.Array) else x for x in flat]

    stop = jax.lax.stop_gradient
    inputs = (
        [stop(v) if isinstance(v, jax.Array) else v for v in plan.leaves()],
        None if generator is None else generator.state,
        list(map(stop, arrays)),
    )
    was, active.muted = active.muted, True
    try:
        try:
            return jax.eval_shape(run, *inputs)
        except jax.errors.ConcretizationTypeError:
            return run(*inputs)  # forward looks at values, which it may outside jit
    finally:
        active.muted = was


def _input_tap(module: Any, hooks: list, slots: list, num_args: int, where: list[int]) -> Any:
    def zeros():
        return [jnp.zeros(shape, dtype) for shape, dtype in slots]

    @jax.custom_vjp
    def tap(xs, anchors):
        return xs, zeros()

    def fwd(xs, anchors):
        flags = tuple(x.perturbed for x in xs)
        shapes = tuple((a.value.shape, a.value.dtype) for a in anchors)
        return ([x.value for x in xs], zeros()), _Static((flags, shapes))

    def bwd(static, cotangents):
        flags, shapes = static.value
        grad_inputs, grad_outputs = (list(map(_dense, c)) for c in cotangents)
        shown: list[Any] = [None] * num_args
        for i, g, flag in zip(where, grad_inputs, flags, strict=True):
            shown[i] = g if flag else None
        shown_tuple = tuple(shown)
        for hook, _, _ in hooks:
            result = hook(module, shown_tuple, tuple(grad_outputs))
            if result is not None:
                shown_tuple = _replaced(result, shown_tuple, "backward hook", "grad_input")
        grads = [
            g if shown_tuple[i] is None else _like(shown_tuple[i], g, "backward hook")
            for i, g in zip(where, grad_inputs, strict=True)
        ]
        return grads, [jnp.zeros(s, d) for s, d in shapes]

    tap.defvjp(fwd, bwd, symbolic_zeros=True)
    return tap


def _output_tap(module: Any, hooks: list, num_outs: int, where: list[int]) -> Any:
    @jax.custom_vjp
    def tap(ys, slots):
        return ys

    def fwd(ys, slots):
        return ys, None

    def bwd(_, grads):
        shown: list[Any] = [None] * num_outs
        for i, g in zip(where, grads, strict=True):
            shown[i] = g
        shown_tuple = tuple(shown)
        for hook, _, _ in hooks:
            result = hook(module, shown_tuple)
            if result is not None:
                shown_tuple = _replaced(result, shown_tuple, "backward pre-hook", "grad_output")
        grads = [
            jnp.zeros_like(g) if shown_tuple[i] is None else _like(shown_tuple[i], g, "pre-hook")
            for i, g in zip(where, grads, strict=True)
        ]
        return grads, grads

    tap.defvjp(fwd, bwd)
    return tap


def _dense(cotangent: Any) -> Any:
    if not isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return cotangent
    zero: Any = cotangent
    return jnp.zeros(zero.shape, zero.dtype)


def _replaced(result: Any, old: tuple, what: str, name: str) -> tuple:
    result = result if isinstance(result, tuple) else (result,)
    if len(result) != len(old):
        raise RuntimeError(
            f"{what} returned an invalid number of {name} gradients, got {len(result)}, but expected "
            f"{len(old)}."
        )
    return result


def _like(new: Any, old: Any, what: str) -> Any:
    if getattr(new, "shape", None) != old.shape:
        raise ShapeError(
            explain(
                f"a {what} replaced a gradient of shape {old.shape} by one of shape "
                f"{getattr(new, 'shape', None)}",
                "a gradient has the shape of the array it belongs to",
                "return a gradient of the same shape, or None to keep it",
            )
        )
    return jnp.asarray(new, old.dtype)
