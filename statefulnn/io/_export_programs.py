"""The programs of nn.export: a module's method and its derivatives as StableHLO."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from statefulnn.core.box import Box
from statefulnn.core.errors import (
    CheckpointError,
    MissingRngError,
    ShapeError,
    StateWriteError,
    explain,
)
from statefulnn.core.generator import Forbidden, Generator, use_generator
from statefulnn.core.module import Module
from statefulnn.core.plan import build_plan, plan_of
from statefulnn.core.pytree import flatten_collecting
from statefulnn.io import exported
from statefulnn.io._export_tasks import Task
from statefulnn.transforms.lift import Signature

_NO_RNG = Forbidden(
    "exported a module that draws random numbers",
    "a program gives the same outputs for the same inputs: it would draw the same numbers at every call",
    "model.eval() before, which turns dropout off; or nn.export(..., rng=True), and then "
    "loaded(x, rng=key)",
)


def lowered(
    task: Task,
    module: Module,
    count: int,
    platforms: Sequence[str],
    rng: bool,
    mutable: bool,
    vjp_order: int,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Lower one method; return its entry in the manifest and the bytes of its programs."""
    method = FlatMethod(task, module, count, rng, mutable)
    f: Callable = method.flat
    example = method.example
    specs: list[Any] = [*method.before, *method.dynamic]
    programs, entries = [], []
    for order in range(vjp_order + 1):
        program = exported_of(task, f, (specs, {}), platforms, None if order else example)
        programs.append(np.frombuffer(program.mlir_module_serialized, np.uint8))
        entries.append(
            {
                "sha256": hashlib.sha256(program.mlir_module_serialized).hexdigest(),
                "calling_convention": program.calling_convention_version,
                "kept": list(program.module_kept_var_idx),
                "global_constants": program.uses_global_constants,
                "constraints": task.constraints,
                "in": [exported._text(spec) for spec in program.in_avals],
                "out": [exported._text(spec) for spec in program.out_avals],
            }
        )
        f, specs = _transposed(f, specs, program.out_avals)
    positional, keyword = jax.tree_util.tree_unflatten(
        jax.tree_util.tree_structure((task.args, task.kwargs)), range(len(method.dynamic))
    )
    out = jax.tree_util.tree_unflatten(method.out, range(method.out.num_leaves))
    named = zip(task.positional, positional, strict=True)
    entry = {
        "positional": [[n, _tree(v, f"the input {n!r} of {task.name!r}")] for n, v in named],
        "keyword": {n: _tree(v, f"the input {n!r} of {task.name!r}") for n, v in keyword.items()},
        "labels": task.labels,
        "out": _tree(out, f"the output of {task.name!r}"),
        "state": method.state,
        "mutable": mutable,
        "rng": rng,
        "programs": entries,
    }
    return entry, programs


class FlatMethod:
    """One method as a pure function of a flat list of arrays: the weights, a key, the inputs.

    Attributes:
        before: the specs before the inputs: of the weights, and of the key if there is one.
        dynamic: those of the inputs.
        example: arguments of `flat` without names of dimensions, None where the caller gave the names.
        out: the structure of the output, known once `flat` has been traced.
        state: the names of the state that is returned after the output, known then as well.
    """

    def __init__(self, task: Task, module: Module, count: int, rng: bool, mutable: bool) -> None:
        self.task, self.count, self.rng, self.mutable = task, count, rng, mutable
        self._names = plan_of(module).moduledef.leaf_names
        self._in_force = Generator(0)
        self._nn_plan = build_plan([module, self._in_force]) if rng else plan_of(module)
        self.dynamic, treedef, _ = flatten_collecting(((module, *task.args), task.kwargs))
        self._signature = Signature(self._nn_plan.moduledef, treedef, rng)
        leaves = self._nn_plan.leaves()
        self._constants = [jnp.asarray(v) for v in leaves[count:]]  # states of generators
        key = [jax.ShapeDtypeStruct((2,), jnp.uint32)] if rng else []
        self.before = [*(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in leaves[:count]), *key]
        fixed = None if task.example is None else jax.tree_util.tree_leaves(task.example)
        self.example = None if fixed is None else ([*self.before, *fixed], {})
        self.out: Any = None
        self.state: list[str] = []

    def flat(self, *given: Any) -> tuple:
        """Run the method, and return the arrays of its output and the state that it wrote."""
        leaves, rest = [*given[: self.count], *self._constants], list(given[self.count :])
        if self.rng:
            self._seed(leaves, jax.random.wrap_key_data(rest.pop(0), impl="threefry2x32"))
        out, written = self._signature.run(self._function, leaves, rest)
        _check_output(self.task, out, written)
        names = [self._names[i] if i < self.count else "" for i in written.indices]
        kinds = [self._nn_plan.moduledef.kind_of(i) for i in written.indices]
        _check_written(self.task, names, kinds, self.rng, self.mutable)
        out_leaves, self.out = jax.tree_util.tree_flatten(out)
        state = [v for v, kind in zip(written.values, kinds, strict=True) if kind != "generator"]
        self.state = [n for n, k in zip(names, kinds, strict=True) if k != "generator"]
        return tuple(jnp.asarray(v) for v in (*out_leaves, *state))

    def _function(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if self.rng else use_generator(_NO_RNG):
            out = self.task.function(*args, **kwargs)
        return jax.tree_util.tree_map(
            lambda v: v.value if isinstance(v, Box) else v,
            out,
            is_leaf=lambda v: isinstance(v, Box),
        )

    def _seed(self, leaves: list[Any], key: Any) -> None:
        """Put the states that follow from a key into the leaves of all generators."""
        # The module's own follow the key as in functional_call.
        number = self.count
        for i in range(self.count, len(leaves)):
            if self._nn_plan.boxes[i] is self._in_force:
                leaves[i] = Generator(key).state
            else:
                leaves[i] = Generator(jax.random.fold_in(key, number)).state
                number += 1


def exported_of(
    task: Task,
    f: Callable,
    specs: tuple[Sequence[Any], Mapping[str, Any]],
    platforms: Sequence[str],
    example: tuple[Sequence[Any], Mapping[str, Any]] | None,
) -> jax.export.Exported:
    """Lower a function of `specs`; `example` is as for `sizes_explained`."""
    with sizes_explained(task, f, example):
        program = jax.export.export(jax.jit(f), platforms=tuple(platforms))(*specs[0], **specs[1])
    if program.ordered_effects or program.unordered_effects:
        raise refused(
            f"with {task.name!r}, which calls back into Python",
            "a file holds no Python",
            "leave out jax.debug.print, io_callback and the like",
        )
    return program


@contextlib.contextmanager
def sizes_explained(
    task: Task, f: Callable, example: tuple[Sequence[Any], Mapping[str, Any]] | None
) -> Iterator[None]:
    """Say so where a trace of `f` fails for its names of dimensions.

    `example` are arguments with numbers in place of the names; None if there are no names, or none of ours.
    """
    try:
        yield
    except Exception as error:
        if example is None:
            raise
        # Is it the names of dimensions? With numbers in their place, an error of the model is plainer.
        jax.eval_shape(f, *example[0], **example[1])
        shapes = zip(task.labels, jax.tree_util.tree_leaves((task.args, task.kwargs)), strict=True)
        raise ShapeError(
            explain(
                f"exported {task.name!r} with {', '.join(f'{n} of {s.shape}' for n, s in shapes)}",
                f"it works for shapes that are numbers, not for any size: {_reason(error)}",
                f"{_constraint(error)}name other dimensions, shapes={{{task.labels[0]!r}: 'b, 64'}}; "
                "or fix them: batch=None",
            )
        ) from error


def _constraint(error: BaseException) -> str:
    """Return how to decide the comparison that an error is about, if it is about one."""
    given = re.search(r"constraints=\('(.+?)',\)", str(error))
    found = re.search(r"comparison '(.+?)' (<|>|<=|>=|==|!=) '(.+?)' is inconclusive", str(error))
    if given is not None:
        return f"say what the sizes obey, constraints=({given[1]!r},); "
    if found is not None:
        ways = (f"constraints=({said!r},)" for said in _decided(*found.groups()))
        return f"say what the sizes obey, {' or '.join(ways)}; "
    if "_DimExpr' object cannot be interpreted" in str(error):
        return "x.shape[0] in place of len(x), which is a number; "
    return ""


def _decided(left: str, sign: str, right: str) -> list[str]:
    """Return the ways to decide a comparison, in the words that JAX takes; larger sizes first."""
    if sign in ("==", "!="):
        return [f"{left} == {right}"]
    beyond = 1 if sign in (">", "<=") else 0  # from which distance on `left` counts as larger
    more, less = (
        str(int(right) + d) if right.isdigit() else f"{right} {'+-'[d < 0]} 1" if d else right
        for d in (beyond, beyond - 1)
    )
    return [f"{left} >= {more}", f"{left} <= {less}"]


def _reason(error: BaseException) -> str:
    """Return what an error says in its first lines, and where it was raised."""
    why = re.search(r"Why: (.+)", str(error))
    notes = [
        note for note in getattr(error, "__notes__", ()) if note.startswith(("at ", "raised "))
    ]
    return "; ".join([why[1] if why is not None else first_line(error), *notes])


def _transposed(f: Callable, specs: Sequence[Any], outs: Sequence[Any]) -> tuple[Callable, list]:
    """Return the vector-Jacobian product as `io.exported` wants it, and what it takes."""
    inexact = [jnp.issubdtype(spec.dtype, jnp.inexact) for spec in specs]
    real = [jnp.issubdtype(out.dtype, jnp.inexact) for out in outs]
    floats = [s for s, one in zip(specs, inexact, strict=True) if one]
    cotangents = [
        jax.ShapeDtypeStruct(o.shape, o.dtype) for o, one in zip(outs, real, strict=True) if one
    ]
    others = [s for s, one in zip(specs, inexact, strict=True) if not one]
    n, m = len(floats), len(floats) + len(cotangents)

    def product(*args: Any) -> Any:
        def differentiable(*floats: Any) -> list[Any]:
            found = f(*exported._woven(inexact, floats, args[m:]))
            return [v for v, one in zip(found, real, strict=True) if one]

        return jax.vjp(differentiable, *args[:n])[1](list(args[n:m]))

    return product, [*floats, *cotangents, *others]


def _check_output(task: Task, out: Any, written: Any) -> None:
    if written.out is not None:
        raise refused(
            f"with {task.name!r}, which returns a module",
            "a program returns arrays",
            "return what is needed of it: module.state_dict()",
        )
    for where, leaf in jax.tree_util.tree_leaves_with_path(out):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            raise refused(
                f"with {task.name!r}, whose output{jax.tree_util.keystr(where)} is of type "
                f"{type(leaf).__name__}",
                "a program returns arrays, in tuples, lists and dicts",
                f"methods={{{task.name!r}: {{'function': lambda model, *x: ...}}}}, which returns those",
            )


def _check_written(
    task: Task, names: Sequence[str], kinds: Sequence[str], rng: bool, mutable: bool
) -> None:
    if "generator" in kinds and not rng:
        raise MissingRngError(explain(*_NO_RNG.parts))
    state = [n for n, kind in zip(names, kinds, strict=True) if kind != "generator"]
    if state and not mutable:
        listed = ", ".join(map(repr, state[:8])) + (" ..." if len(state) > 8 else "")
        raise StateWriteError(
            explain(
                f"exported {task.name!r}, which writes {listed}",
                "a program returns its output only, so the new value would be lost",
                "model.eval() before, if nothing should change; or nn.export(..., mutable=True), and "
                "then out, new_state = loaded(x)",
            )
        )


def _tree(value: Any, what: str) -> Any:
    """Return numbered leaves in their containers as JSON; `exported._built` puts arrays in their places."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return ["dict", [[key, _tree(sub, what)] for key, sub in value.items()]]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_tree(sub, what) for sub in value]]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields: Any = value._fields  # pyright: ignore[reportAttributeAccessIssue]
        return [type(value).__name__, [_tree(sub, what) for sub in value], list(fields)]
    raise refused(
        f"with {what} in a {type(value).__name__}",
        "a file knows arrays in tuples, named tuples, lists, dicts with keys of str or int, and None",
        "a function that takes or returns a dict: methods={'forward': {'function': lambda model, x: ...}}",
    )


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refused(what: str, why: str, instead: str) -> CheckpointError:
    """Return the error for what a file cannot hold."""
    return CheckpointError(explain(f"called nn.export {what}", why, instead))
