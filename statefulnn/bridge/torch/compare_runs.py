"""What compare sees of a run: inputs, outputs and gradients of each call, and the arrays afterwards."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from statefulnn.bridge.torch.arrays import as_numpy, to_jax, to_tensor
from statefulnn.bridge.torch.structures import flat, leaves, rebuilt
from statefulnn.core import compat
from statefulnn.core.box import unwrap
from statefulnn.core.generator import rng_scope
from statefulnn.core.module import Module
from statefulnn.transforms.capture import capture
from statefulnn.transforms.functional_call import functionalize

# Arrays by their places in a structure; None is a gradient that nobody asked for.
Places = dict[str, Any]
_NUMBERS = (bool, int, float)


@dataclasses.dataclass
class Call:
    """One call of a module.

    Attributes:
        name: the first dotted name of the module.
        given: the arrays among its arguments.
        output: the arrays and numbers that it returned.
        gradient: of the loss by the floating arrays in the output.
        keys: the names that it returned arrays under, if it returned a dict.
        drew: whether torch's module drew random numbers.
        start: torch's state of random numbers when it was called.
    """

    name: str
    given: Places = dataclasses.field(default_factory=dict)
    output: Places = dataclasses.field(default_factory=dict)
    gradient: Places = dataclasses.field(default_factory=dict)
    keys: tuple[str, ...] | None = None
    drew: bool = False
    start: Any = None


@dataclasses.dataclass
class Run:
    """One call of a model.

    Attributes:
        calls: of its modules, in the order in which they finished.
        gradients: of the loss by the parameters, and by the model's own arguments.
        buffers: afterwards.
        inside: names of modules that were called inside of a transformation, where arrays have no numbers.
    """

    calls: list[Call] = dataclasses.field(default_factory=list)
    gradients: Places = dataclasses.field(default_factory=dict)
    buffers: Places = dataclasses.field(default_factory=dict)
    inside: set[str] = dataclasses.field(default_factory=set)


class _Stack:
    """Collects the calls of a run: `before` and `after` are the hooks of each module."""

    def __init__(self, run: Run, array: Callable[[Any], np.ndarray | None]) -> None:
        self._run, self._array = run, array
        self.open: list[Call] = []

    def before(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> Call:
        call = Call(name)
        self.open.append(call)
        call.given = self.arrays((args, dict(kwargs)))
        return call

    def after(self, name: str, out: Any) -> Call:
        while self.open[-1].name != name:  # an error ended those, and the caller went on
            self.open.pop()
        call = self.open[-1]
        call.output = self.arrays(out, numbers=True)
        call.keys = tuple(map(str, out)) if isinstance(out, Mapping) else None
        self._run.calls.append(self.open.pop())
        return call

    def arrays(self, tree: Any, numbers: bool = False) -> Places:
        found = {}
        for place, leaf in flat(tree).items():
            value = self._array(leaf)
            if value is None and numbers and isinstance(leaf, _NUMBERS):
                value = np.asarray(leaf)
            if value is not None:
                found[place] = value
        return found


def argument(place: str) -> str:
    """Return how a place in ``(args, kwargs)`` is called in messages."""
    whose, _, rest = place[1:].partition("]")
    name = rest.replace("]", "").replace("[", ".").replace("'", "")[1:]
    return f"the argument {name}" + ("" if whose == "1" else " by position")


# --------------------------------------------------------------------------------------------------
# torch's


def run_theirs(
    module: torch.nn.Module, inputs: tuple, kwargs: Mapping[str, object], grads: bool
) -> Run:
    """Call a copy of torch's module."""
    run = Run()
    stack = _Stack(run, lambda x: as_numpy(x).copy() if isinstance(x, torch.Tensor) else None)
    module = _copied(module)

    def before(name: str, _: object, args: tuple, kwargs: dict) -> None:
        stack.before(name, args, kwargs).start = torch.get_rng_state()

    def after(name: str, _: object, args: object, out: object) -> None:
        call = stack.after(name, out)
        call.drew = not torch.equal(call.start, torch.get_rng_state())
        for place, tensor in flat(out).items():
            if grads and isinstance(tensor, torch.Tensor) and _may_have_gradient(tensor):
                call.gradient[place] = np.zeros(tuple(tensor.shape), call.output[place].dtype)
                tensor.register_hook(functools.partial(_keep, call.gradient, place))

    for name, sub in module.named_modules():
        sub.register_forward_pre_hook(functools.partial(before, name), with_kwargs=True)
        sub.register_forward_hook(functools.partial(after, name))
    args, named = _as_tensors((inputs, dict(kwargs)), grads)
    with torch.set_grad_enabled(grads), torch.random.fork_rng():
        try:
            # What code writes to, as x += 1, must not be a leaf.
            own = rebuilt((args, named), lambda x: x.clone() if _is_tensor(x) else x)
            out = module(*own[0], **own[1])
            floating = [t for t in leaves(out) if _is_tensor(t) and _may_have_gradient(t)]
            if grads and floating:
                terms = [(t * to_tensor(direction(t.shape)).to(t)).sum() for t in floating]
                torch.autograd.backward(terms)
        except Exception as error:
            inside = f"{stack.open[-1].name!r} of " if stack.open and stack.open[-1].name else ""
            error.add_note(f"raised while compare called {inside}torch's module")
            raise
    if grads:
        tensors = {n: p for n, p in module.named_parameters() if p.requires_grad}
        given = {argument(n): t for n, t in flat((args, named)).items() if _is_tensor(t)}
        for name, t in (tensors | given).items():
            if t.requires_grad and t.is_floating_point():
                run.gradients[name] = as_numpy(torch.zeros_like(t) if t.grad is None else t.grad)
    run.buffers = {n: as_numpy(b).copy() for n, b in module.named_buffers()}
    return run


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a module, without gradients.

    The old weight_norm keeps a computed weight in an attribute, which torch itself cannot copy.
    """
    computed = {
        id(value): value.detach().clone()
        for sub in module.modules()
        for value in vars(sub).values()
        if _is_tensor(value) and not value.is_leaf
    }
    twin = copy.deepcopy(module, dict(computed))
    twin.zero_grad()
    return twin


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _may_have_gradient(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and tensor.is_floating_point()


def _keep(gradients: Places, place: str, gradient: torch.Tensor) -> None:
    gradients[place] = gradients[place] + as_numpy(gradient)


def _as_tensors(given: Any, grads: bool) -> Any:
    def leaf(x: Any) -> Any:
        if isinstance(x, (np.ndarray, np.generic, jax.Array)):
            x = to_tensor(x)
        if not _is_tensor(x):
            return copy.deepcopy(x)
        return x.detach().clone().requires_grad_(grads and x.is_floating_point())

    return rebuilt(given, leaf)


# --------------------------------------------------------------------------------------------------
# Ours


def run_ours(module: Module, inputs: tuple, kwargs: Mapping[str, object], grads: bool) -> Run:
    """Call copies of our module."""
    args, named = _as_arrays((inputs, dict(kwargs)))
    run = Run()

    def array(x: Any) -> np.ndarray | None:
        x = unwrap(x)
        if compat.trace_of(x) is not None:
            run.inside.add(stack.open[-1].name)
            return None
        return np.array(x) if isinstance(x, (jax.Array, np.ndarray, np.generic)) else None

    stack = _Stack(run, array)
    hooked = copy.deepcopy(module)

    def before(name: str, _: object, args: tuple, kwargs: dict) -> None:
        stack.before(name, args, kwargs)

    def after(name: str, _: object, args: object, out: object) -> None:
        stack.after(name, out)

    for name, sub in hooked.named_modules():
        sub.register_forward_pre_hook(functools.partial(before, name), with_kwargs=True)
        sub.register_forward_hook(functools.partial(after, name))
    # The same draws in each run, and none from the generator in force.
    with rng_scope(_key()):
        try:
            hooked(*args, **named)
        except Exception as error:
            error.add_note("raised while compare called our module")
            raise
    run.calls = [c for c in run.calls if c.name not in run.inside]
    run.buffers = {n: np.asarray(b) for n, b in hooked.named_buffers()}
    if grads:
        try:
            _add_gradients(run, module, args, named)
        except Exception as error:
            error.add_note(
                "raised while compare took gradients of our module; grads=False leaves them out"
            )
            raise
    return run


def _add_gradients(run: Run, module: Module, args: tuple, named: dict[str, Any]) -> None:
    """Take the gradients by what modules returned, and by parameters and arguments."""
    names = list(dict.fromkeys(c.name for c in run.calls if c.name))
    if names:
        with rng_scope(_key()):
            recorded = capture(copy.deepcopy(module), names, grads=True)
            out, _, backward = recorded(*args, **named)
        cotangent = jax.tree_util.tree_map(
            lambda y: jnp.asarray(direction(y.shape), y.dtype) if _is_real(y) else None, out
        )
        found = backward(cotangent)
        for name in names:
            calls = [c for c in run.calls if c.name == name]
            gradients = found.get(name)
            for i, call in enumerate(calls):
                own = gradients[i] if len(calls) > 1 and gradients is not None else gradients
                call.gradient = {p: np.asarray(g) for p, g in flat(own).items() if g is not None}
    fn, params, state = functionalize(copy.deepcopy(module), mutable=True)
    real = {n: p for n, p in params.items() if _is_real(p)}
    places = {n: x for n, x in flat((args, named)).items() if _is_real(x)}

    def loss(real: Places, given: list[Any]) -> Any:
        rest = iter(given)
        own = rebuilt((args, named), lambda x: next(rest) if _is_real(x) else x)
        out, _ = fn({**params, **real}, state, *own[0], rng=_key(), **own[1])
        terms = [
            jnp.sum(y * jnp.asarray(direction(y.shape), y.dtype))
            for y in map(unwrap, leaves(out))
            if _is_real(y)
        ]
        return sum((t.astype(jnp.float32) for t in terms), jnp.zeros(()))

    by_parameters, by_arguments = jax.grad(loss, (0, 1))(real, list(places.values()))
    run.gradients = {n: np.asarray(g) for n, g in by_parameters.items()}
    for place, gradient in zip(places, by_arguments, strict=True):
        run.gradients[argument(place)] = np.asarray(gradient)


def _key() -> jax.Array:
    return jax.random.key(0)


def _is_real(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray)) and jnp.issubdtype(x.dtype, jnp.floating)


def direction(shape: Iterable[int]) -> np.ndarray:
    """Return what an output is multiplied by: the loss is the sum of these products."""
    return np.random.default_rng(0).standard_normal(tuple(shape)).astype(np.float32)


def _as_arrays(given: Any) -> Any:
    return rebuilt(given, lambda x: to_jax(x, True) if _is_tensor(x) else x)
