"""nn.capture: the outputs of submodules, and gradients with respect to them, as results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core import compat
from statefulnn.core.box import Box, unwrap
from statefulnn.core.graph import require_module
from statefulnn.core.habits import refuse_usage
from statefulnn.core.listeners import listening, run_abstractly
from statefulnn.core.module import Module
from statefulnn.core.ownership import ModuleBase
from statefulnn.core.plan import plan_of
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms import refusals
from statefulnn.transforms.lift import SplitCall, Writes
from statefulnn.transforms.types import PyTree, TreeDef


@shortened
def capture(
    module: Module,
    names: Iterable[str] | str | None = None,
    method: str = "forward",
    *,
    grads: bool = False,
) -> Callable:
    """Return a function that calls a module and also returns what its submodules put out.

    Args:
        module: the module to call.
        names: dotted names of the submodules to record; None records all.
        method: the method to call.
        grads: whether gradients with respect to these outputs are wanted as well.

    Returns:
        a function of the module's inputs that returns ``(out, outputs)``. `outputs` maps the name of
        each submodule that was called to its output, or to the tuple of its outputs, in order, if it
        was called several times. With ``grads=True`` it returns ``(out, outputs, backward)``, and
        ``backward(cotangent)`` takes the gradient of a loss with respect to `out` and returns a dict
        like `outputs` of the gradients of the loss with respect to those outputs. Names whose outputs
        hold no floating arrays are not in it, and None stands for a single array that is not floating.
        In the cotangent None stands for zeros. `backward` may be called several times.

    Raises:
        UnknownNameError: for names of no submodule.
        TraceLeakError: for a submodule that is called inside an inner transformation: in a plain one
            of JAX, or, if it is one of `names`, on a clone in one of this package's only.
        ShapeError, DtypeError, TypeError: from `backward`, for a cotangent that is not like `out`.

    A gradient is the one that arrives at the output, before the submodule's own backward pre-hooks. What
    forward writes to buffers is written once, whether or not `backward` is called.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> out, outputs = nn.capture(model)(jnp.ones((4, 2)))
        >>> {name: y.shape for name, y in outputs.items()}
        {'0': (4, 3), '1': (4, 3)}

        The gradient of a loss of the output:

        >>> out, outputs, backward = nn.capture(model, ["0"], grads=True)(jnp.ones((4, 2)))
        >>> loss, cotangent = jax.value_and_grad(lambda out: (out**2).sum())(out)
        >>> bool((backward(cotangent)["0"] == 2 * out).all())
        True

        Grad-CAM (Selvaraju et al. 2017), where an image classifier looks:

        >>> model = nn.Sequential(
        ...     nn.Conv2d(1, 4, 3),
        ...     nn.ReLU(),
        ...     nn.AdaptiveAvgPool2d(1),
        ...     nn.Flatten(),
        ...     nn.Linear(4, 10),
        ... )
        >>> scores, outputs, backward = nn.capture(model, "1", grads=True)(jnp.ones((2, 1, 8, 8)))
        >>> gradient = backward(jax.nn.one_hot(scores.argmax(1), 10))["1"]  # (N, C, H, W)
        >>> weights = gradient.mean((2, 3), keepdims=True)  # (N, C, 1, 1)
        >>> jax.nn.relu((weights * outputs["1"]).sum(1)).shape  # (N, H, W)
        (2, 6, 6)
    """
    require_module(module, "nn.capture")
    if isinstance(names, (jax.Array, np.ndarray)):  # an input of the module
        refuse_usage("capture", "nn.capture was given an array as the argument names")
    if isinstance(names, str):
        names = (names,)
    wanted = None if names is None else tuple(names)
    if wanted is not None:
        known = {name for name, _ in module.named_modules(remove_duplicate=False)} - {""}
        unknown = [n for n in wanted if n not in known]
        if unknown or not wanted:
            raise refusals.no_such_submodules(unknown, type(module).__name__, sorted(known))

    def recorded(
        target: Module, expected: tuple[_Kinds, _Probes] | None, args: tuple, kwargs: dict
    ) -> tuple[PyTree, _Recorder]:
        recorder = _Recorder(target, wanted, expected)
        function = target if method == "forward" else getattr(target, method)
        with listening(recorder):
            out = function(*args, **kwargs)
        if wanted is not None:
            recorder.require(wanted)
        return out, recorder

    @shortened
    def call(*args: Any, **kwargs: Any) -> Any:
        out, recorder = recorded(module, None, args, kwargs)
        return out, {name: _one_or_all(calls) for name, calls in recorder.outputs.items()}

    @shortened
    def call_with_grads(*args: Any, **kwargs: Any) -> Any:
        return _with_grads(recorded, SplitCall(((module, *args), kwargs)))

    return call_with_grads if grads else call


class _Recorder:
    """Listens to calls, keeps the outputs of named submodules and adds probes to them.

    Attributes:
        outputs: for each name the outputs of its calls.
        kinds: for each name what its outputs are like, a list of `_Kind`.
    """

    def __init__(
        self,
        module: Module,
        wanted: tuple[str, ...] | None,
        expected: tuple[_Kinds, _Probes] | None,
    ) -> None:
        self.outputs: dict[str, list[PyTree]] = {}
        self.kinds: _Kinds = {}
        # Reversed, so that of several names of a shared module the first one stays.
        self._names = {
            id(m): name
            for name, m in reversed(list(module.named_modules(remove_duplicate=False)))
            if name and (wanted is None or name in wanted)
        }
        self._modules = {id(m): m for m in module.modules()}
        # The ModuleDefs of modules that were called and are not of the tree. A clone is another object than
        # the module it was made of, but has its ModuleDef: so `require` can say why a name was not met.
        self._elsewhere: set[Any] = set()
        self._expected = expected
        self._here = compat.current_trace()

    def __call__(self, called: Module, out: PyTree) -> PyTree:
        name = self._names.get(id(called))
        if name is None:
            if called._nn_stamp.scope is not None and id(called) not in self._modules:
                self._elsewhere.add(plan_of(called).moduledef)
            return out
        if self._expected is not None:
            out = self._with_probes(name, out, *self._expected)
        # An output of an inner trace would be a dead tracer by the time it is returned.
        for leaf in jax.tree_util.tree_leaves(out):
            home = compat.trace_of(leaf)
            if home is not None and not compat.may_be_around(home, self._here):
                raise refusals.captured_inside(name)
        self.outputs.setdefault(name, []).append(out)
        return out

    def require(self, names: Iterable[str]) -> None:
        """Raise for names of modules that were called on clones only, as nn.scan and nn.remat do."""
        missing = [n for n in names if n not in self.outputs]
        if missing and self._elsewhere:
            for number, name in self._names.items():
                here = plan_of(self._modules[number]).moduledef
                if name in missing and here in self._elsewhere:
                    raise refusals.captured_inside(name)

    def _with_probes(self, name: str, out: PyTree, kinds: _Kinds, probes: _Probes) -> PyTree:
        """Note of what kind an output is; attach the probes that were made for it, if it is of the kind."""
        leaves, treedef = jax.tree_util.tree_flatten(out, is_leaf=_is_member)
        leaves = list(map(unwrap, leaves))
        kind = _Kind(leaves, treedef)
        number = len(self.kinds.setdefault(name, []))
        self.kinds[name].append(kind)
        if kinds.get(name, ())[number : number + 1] == [kind]:
            for (i, _, _), probe in zip(kind.floating, probes[name][number], strict=True):
                leaves[i] = _attach(jnp.asarray(leaves[i]), probe)
        return jax.tree_util.tree_unflatten(treedef, leaves)


class _Kind:
    """The structure of an output, and which of its leaves are floating arrays of what shape."""

    def __init__(self, leaves: list[Any], treedef: TreeDef) -> None:
        self.treedef = treedef
        self.floating = [(i, x.shape, x.dtype) for i, x in enumerate(leaves) if _is_floating(x)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kind) and vars(self) == vars(other)

    def zeros(self) -> list[jax.Array]:
        return [jnp.zeros(shape, dtype) for _, shape, dtype in self.floating]

    def filled(self, gradients: list[jax.Array]) -> PyTree:
        """Return the output's structure with gradients in it, and None for what is not floating."""
        leaves: list[Any] = [None] * self.treedef.num_leaves
        for (i, _, _), gradient in zip(self.floating, gradients, strict=True):
            leaves[i] = gradient
        return jax.tree_util.tree_unflatten(self.treedef, leaves)


# By name and call: of what kind the outputs are, and for each floating array in them a probe.
_Kinds: TypeAlias = dict[str, list[_Kind]]
_Probes: TypeAlias = dict[str, list[list[jax.Array]]]


def _is_floating(x: object) -> TypeGuard[jax.Array]:
    return isinstance(x, (jax.Array, np.ndarray)) and jnp.issubdtype(x.dtype, jnp.inexact)


def _is_member(x: object) -> bool:
    return isinstance(x, (Box, ModuleBase))


@jax.custom_jvp
def _attach(x: jax.Array, probe: jax.Array) -> jax.Array:
    """Return x, with the derivative of ``x + probe``; the sum itself would lose the sign of zeros."""
    return x


@_attach.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    return _attach(*primals), tangents[0] + tangents[1]


def _with_grads(recorded: Callable, call: SplitCall) -> tuple[Any, dict[str, Any], Callable]:
    """Call a module with probes at the outputs of its submodules, and differentiate by these.

    The shapes of the probes come from a silent, abstract run. Where that fails, or hooks change an
    output, the shapes seen in a first run are used in a second one: both are pure, and only what the
    last one wrote is written back.
    """

    def once(kinds: _Kinds, probes: _Probes) -> tuple[Any, _Kinds]:
        recorders: list[_Recorder] = []

        def function(*args: Any, **kwargs: Any) -> Any:
            out, recorder = recorded(args[0], (kinds, probes), args[1:], kwargs)
            recorders.append(recorder)
            return jax.tree_util.tree_map(unwrap, (out, recorder.outputs), is_leaf=_is_member)

        result, written = call.run(function, call.leaves, call.dynamic)
        if written.out is not None:
            raise refusals.module_captured()
        return (*result, written), recorders[0].kinds

    found: list[_Kinds] = []  # by each run
    try:
        run_abstractly(lambda: found.append(once({}, {})[1]))
    except Exception:  # the run below says what is wrong
        found.append({})

    for _ in range(2):
        # The probes are zeros, which change no output; the derivative by a probe is the gradient that
        # arrives where it is attached.
        kinds: _Kinds = found[-1]
        zeros = {name: [kind.zeros() for kind in calls] for name, calls in kinds.items()}
        parts: list[_Parts] = []

        def differentiable(
            probes: _Probes, kinds: _Kinds = kinds, parts: list[_Parts] = parts
        ) -> tuple[list[jax.Array], list[jax.Array]]:
            result, seen = once(kinds, probes)
            found.append(seen)
            parts.append(_Parts(result))
            return parts[0].floating, parts[0].rest

        floating, pullback, rest = jax.vjp(differentiable, zeros, has_aux=True)
        if found[-1] == kinds:
            break
    else:
        raise refusals.other_shapes_the_second_time()
    out, outputs, written = parts[0].joined(floating, rest)
    call.finish(None, written)

    @shortened
    def backward(cotangent: PyTree) -> dict[str, PyTree]:
        """Return the gradients with respect to the captured outputs."""
        (gradients,) = pullback(_matched(cotangent, out))
        return {
            name: _one_or_all([kind.filled(g) for kind, g in zip(kinds[name], calls, strict=True)])
            for name, calls in gradients.items()
            if any(calls)
        }

    return out, {name: _one_or_all(calls) for name, calls in outputs.items()}, backward


class _Parts:
    """What a call returned, ``(out, outputs, written)``, taken apart for `jax.vjp`.

    Only `out` gets a cotangent, and only its floating arrays can have one: the rest is auxiliary.

    Attributes:
        floating: the floating arrays in out.
        rest: all other arrays.
    """

    def __init__(self, result: tuple[Any, dict[str, Any], Writes]) -> None:
        self._leaves, self._treedef = jax.tree_util.tree_flatten(result)
        num_out = len(jax.tree_util.tree_leaves(result[0]))
        self._floating = [i for i in range(num_out) if _is_floating(self._leaves[i])]
        self._rest = [
            i
            for i, x in enumerate(self._leaves)
            if isinstance(x, jax.Array) and i not in self._floating
        ]
        self.floating = [jnp.asarray(self._leaves[i]) for i in self._floating]
        self.rest = [self._leaves[i] for i in self._rest]

    def joined(self, floating: list[Any], rest: list[Any]) -> Any:
        leaves = list(self._leaves)
        for i, x in zip((*self._floating, *self._rest), (*floating, *rest), strict=True):
            leaves[i] = x
        return jax.tree_util.tree_unflatten(self._treedef, leaves)


def _one_or_all(calls: list[Any]) -> Any:
    return calls[0] if len(calls) == 1 else tuple(calls)


def _matched(cotangent: PyTree, out: PyTree) -> list[jax.Array]:
    """Return the arrays of a cotangent that belong to the floating arrays of an output."""
    # The cotangent comes first: one None in it may stand for a whole part of the output.
    given, treedef = jax.tree_util.tree_flatten(cotangent, is_leaf=lambda x: x is None)
    try:
        parts = treedef.flatten_up_to(out)
    except ValueError:
        raise _other_structure(cotangent, out) from None
    matched: list[jax.Array] = []
    for value, part in zip(given, parts, strict=True):
        wanted = [x for x in jax.tree_util.tree_leaves(part) if _is_floating(x)]
        if value is None:
            matched += map(jnp.zeros_like, wanted)
        elif _is_floating(part):
            matched.append(_checked(value, part))
        elif wanted:
            raise _other_structure(cotangent, out)
    return matched


def _other_structure(cotangent: PyTree, out: PyTree) -> TypeError:
    given, own = (
        f"type {type(tree).__name__} and structure {jax.tree_util.tree_structure(tree)}"
        for tree in (cotangent, out)
    )
    return refusals.cotangent_of_other_structure(given, own)


def _checked(value: PyTree, out: jax.Array) -> jax.Array:
    # A Python number fits every dtype, as in arithmetic.
    weak = isinstance(value, (int, float, complex))
    if not weak and not hasattr(value, "dtype"):
        raise _other_structure(value, out)
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != out.shape:
        raise refusals.cotangent_of_other_shape(shape, out.shape)
    weak = weak or getattr(value, "weak_type", False)
    if dtype != out.dtype and not weak:
        raise refusals.cotangent_of_other_dtype(dtype, out.dtype)
    return jnp.asarray(value, out.dtype)
