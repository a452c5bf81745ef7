"""The inner loop: gradient steps on one task, as a differentiable function of where they start."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statefulnn.core.box import Box
from statefulnn.core.errors import ArgumentError, DtypeError, ShapeError, UnknownNameError, explain
from statefulnn.core.generator import as_key
from statefulnn.core.module import Module
from statefulnn.core.names import Filter, chosen
from statefulnn.core.repeated import body_of_loop
from statefulnn.core.tracebacks import shortened
from statefulnn.meta._arrays import strong_arrays
from statefulnn.meta._cotangents import counted, note_losses
from statefulnn.meta._one_by_one import in_turn
from statefulnn.meta.inner_optimizer import require_differentiable, updated
from statefulnn.meta.per_step import (
    PerStep,
    is_rows,
    require_rows,
    require_steps,
    rows_at,
)

CHECKPOINTS = ("none", "all", "sqrt")
# By default up to this many steps are compiled one after the other, which runs faster than a loop;
# each costs compile time (sinusoid MAML, 5 steps: 1.9 ms and 2.4 s to compile against 2.3 ms and 1.2 s).
UNROLLED = 5


class Adapted(NamedTuple):
    """What an inner loop ended with.

    Attributes:
        params: the parameters after the last step, all of them.
        state: the state after the last step (None without one); `PerStep` values stand as the row of the
            last step.
        losses: the loss before each step, ``(steps,)``.
        rows: the `PerStep` values of the state, as the steps wrote them, by name.
        path: with ``keep_path=True`` the parameters before the first and after each step, with a leading
            axis ``steps + 1``; else None.
        slots: the optimizer's state after the last step (empty without one): ``adapt(slots=...)`` goes on
            from there.
    """

    params: Any
    state: Any
    losses: Any
    rows: dict[str, PerStep]
    path: Any
    slots: Any


@shortened
def adapt(
    fn: Callable | None,
    params: object,
    loss: Callable,
    data: object,
    *separate: object,
    optimizer: object = None,
    slots: object = None,
    lr: object = None,
    steps: int = 1,
    only: Filter = None,
    state: Mapping[str, object] | None = None,
    rng: jax.Array | None = None,
    first_order: bool = False,
    truncate: int | None = None,
    checkpoint: str = "none",
    batches: bool = False,
    keep_path: bool = False,
    unroll: int | None = None,
) -> Adapted:
    """Take optimisation steps on one task; the result is differentiable by where they started.

    Everything is pure: wrap it in ``jax.vmap`` for tasks (`nn.meta.over_tasks`), in ``jax.grad`` for
    the meta-gradient, in ``jax.jit`` for speed.

    Args:
        fn: ``fn(params, *inputs)``, as `functionalize` returns it; with `state`
            ``fn(params, state, *inputs) -> (out, state)``. None if `loss` does it all.
        params: where to start: a dict of name -> array (any pytree of arrays if `fn` is None). Values
            of `PerStep` give each step its own, and are not adapted.
        loss: ``loss(out, target) -> scalar``; without `fn`, ``loss(params, *data) -> scalar``, or with
            `state` ``loss(params, state, *data) -> (scalar, state)``.
        data: ``(*inputs, target)``, one tuple.
        separate: nothing; for the message where the data are not in one tuple.
        optimizer: any optax transformation; None for plain gradient descent.
        slots: the optimizer's state to start with, from ``Adapted.slots``; None for a fresh one.
        lr: the step size of gradient descent, or a factor on the optimizer's updates: a number or traced
            scalar for all; a dict of name -> array (a scalar or of the parameter's shape, learnable:
            Meta-SGD); `PerStep` in either place for one of each step. Required without `optimizer`.
        steps: how many; where the number is traced, or depends on the task, see `adapt_until`.
        only: which parameters are adapted: a pattern (``"head.*"``: ANIL), a list of these, or a function
            of the name; None for all.
        state: buffers (and frozen parameters) by name; what the steps write is carried on and returned,
            so every task has its own. `PerStep` values give each step its own (MAML++).
        rng: a random key; each step draws from its own part of it.
        first_order: treats the gradients of the inner steps as constants (FOMAML). Learning rates still
            get a gradient.
        truncate: differentiates through the last `truncate` steps only.
        checkpoint: what is kept for the way back: "none" keeps what each step computes, and computes nothing
            twice; "all" keeps the parameters of each step; "sqrt" those of every √steps-th, for the least
            memory, and up to 1.6 times the time.
        batches: whether `data` has a leading axis of steps: a batch for each.
        keep_path: whether to return the parameters after every step.
        unroll: up to this many steps are compiled one after the other, and run faster; more are a loop,
            which compiles once. 0 is always a loop, and what is taken where `over_tasks` runs one task
            after the other; elsewhere it is 5. Only with ``checkpoint="none"``.

    Returns:
        `Adapted`: params, state, losses, rows, path, slots.

    Raises:
        TypeError: for an inner loss that is no real scalar.
        DtypeError: for parameters to adapt that are not floating-point.
        UnknownNameError: for a filter, or a learning rate, that matches no parameter.
        ShapeError: if `data` or `PerStep` values have another number of steps, or `data` no examples.
        NotDifferentiableError: for an optimizer whose steps cannot be differentiated; use
            ``first_order=True``.
        StateWriteError: if the model writes state and there is no `state`.

    Source: Finn, Abbeel and Levine 2017 (MAML, FOMAML); Raghu et al. 2020 (ANIL); Li et al. 2017
    (Meta-SGD); Antoniou et al. 2019 (MAML++).

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn, statefulnn.functional as F
        >>> fn, params = nn.functionalize(nn.Linear(1, 1))
        >>> x, y = jnp.ones((5, 1)), jnp.zeros((5, 1))
        >>> def after_adaptation(params):
        ...     adapted = nn.meta.adapt(fn, params, F.mse_loss, (x, y), lr=0.1, steps=3)
        ...     return F.mse_loss(fn(adapted.params, x), y)
        >>> meta_gradient = jax.grad(after_adaptation)(params)
        >>> meta_gradient["weight"].shape
        (1, 1)
    """
    _check_options(steps, truncate, checkpoint, unroll)
    if unroll is None:
        unroll = 0 if in_turn() else UNROLLED
    task = InnerTask.of("adapt", locals())
    return Loop(task, steps, batches).run(truncate, checkpoint, keep_path, unroll)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InnerTask:
    """What an inner loop is told: the arguments of `adapt` that say what a step does."""

    fn: Callable | None
    params: Any
    loss: Callable
    data: tuple
    optimizer: Any
    slots: Any
    lr: Any
    only: Any
    state: Mapping[str, Any] | None
    rng: Any
    first_order: bool

    @classmethod
    def of(cls, function: str, given: Mapping[str, Any]) -> InnerTask:
        """Return the task that a function was given, as its arguments by name; raise if it makes no sense."""
        if given["separate"]:
            raise TypeError(
                explain(
                    f"{function} was given its data as {1 + len(given['separate'])} separate arguments",
                    "they are the inputs and the target, in this order",
                    f"pass one tuple: {function}(fn, params, loss, (x, y), lr=0.01)",
                )
            )
        _check_functions(function, given["fn"], given["params"], given["loss"])
        _check_task(given["fn"], given["params"], given["data"], given["state"])
        _check_examples(function, given["data"], given.get("batches", False))
        return cls(**{field.name: given[field.name] for field in dataclasses.fields(cls)})


def _check_options(steps: int, truncate: int | None, checkpoint: str, unroll: int | None) -> None:
    require_steps(steps, "adapt")
    if checkpoint not in CHECKPOINTS:
        raise ValueError(f"adapt: checkpoint must be one of {CHECKPOINTS}, got {checkpoint!r}")
    if truncate is not None and not (isinstance(truncate, int) and 0 <= truncate):
        raise ValueError(f"adapt: truncate must be a number of steps or None, got {truncate!r}")
    if unroll is not None and (not isinstance(unroll, int) or unroll < 0):
        raise ValueError(f"adapt: unroll must be a number of steps, got {unroll!r}")


def _check_functions(function: str, fn: Any, params: Any, loss: Any) -> None:
    """Raise unless the model and the loss are functions, in this order, and the loss takes two arguments."""
    wrong = {
        what: value
        for what, value in (("fn", fn), ("loss", loss))
        if not callable(value) and (what, value) != ("fn", None)
    }
    if wrong and not isinstance(params, Module):
        what, value = next(iter(wrong.items()))
        raise ArgumentError(
            explain(
                f"{function} was given {type(value).__name__} as {what}",
                "the function comes first, then its parameters, then the loss",
                f"{function}(fn, params, loss, (x, y), lr=0.01)",
            )
        )
    if fn is None or isinstance(fn, Module):
        return
    try:
        inspect.signature(loss).bind(None, None)
    except TypeError:
        raise ArgumentError(
            explain(
                f"{function} was given a loss that does not take two arguments",
                "with fn it is called with the model's output and the target",
                f"{function}(fn, params, lambda out, target: ..., (x, y), lr=0.01); a loss of the "
                f"parameters takes None for fn: {function}(None, params, loss, (x, y), lr=0.01)",
            )
        ) from None
    except ValueError:  # it has no signature: the call will tell
        return


def _check_task(fn: Callable | None, params: object, data: object, state: object) -> None:
    """Raise unless what is adapted is a pure function, with a tuple of data, and state if it takes any."""
    for value, what in ((fn, "fn"), (params, "params")):
        if isinstance(value, Module):
            raise TypeError(
                explain(
                    f"adapt was given a {type(value).__name__} as {what}",
                    "its steps are pure: they take a function of the parameters, and never touch a module",
                    "fn, params = nn.functionalize(model); adapt(fn, params, loss, (x, y), lr=0.01)",
                )
            )
    if not isinstance(data, tuple):
        raise TypeError(
            explain(
                f"adapt was given data of type {type(data).__name__}",
                "they are the inputs and the target, in this order",
                "pass a tuple: adapt(fn, params, loss, (x, y))",
            )
        )
    if fn is not None and not data:
        raise TypeError(
            explain(
                "adapt was given no data",
                "the last entry is the target of the loss, what is before it goes into the model",
                "adapt(fn, params, loss, (x, y)); or adapt(None, params, loss, ()) for a loss of params",
            )
        )
    takes_state = getattr(fn, "mutable", state is not None)  # functionalize says so
    if takes_state != (state is not None):
        raise TypeError(
            explain(
                f"adapt was given {'no state' if takes_state else 'state'} for a function that takes "
                f"{'it' if takes_state else 'none'}",
                "the state goes into every step, and what the step wrote comes out",
                "fn, params, state = nn.functionalize(model, mutable=True); adapt(..., state=state)",
            )
        )


def _check_examples(function: str, data: tuple, batches: bool) -> None:
    """Raise if every array is a batch of no examples: the mean of no losses is not a number."""
    shapes = [jnp.shape(leaf)[int(batches) :] for leaf in jax.tree.leaves(data)]
    counted = [shape for shape in shapes if shape]
    if counted and all(shape[0] == 0 for shape in counted):
        raise ShapeError(
            explain(
                f"{function} was given data of shape {', '.join(map(str, counted))}: a batch of 0 examples",
                "there is nothing to adapt to, and a mean over no examples is NaN",
                "leave the task out; or give tasks of unequal sizes one size, with weights of 0 in the loss",
            )
        )


class Loop:
    """An inner loop, taken apart into what is carried from step to step and what is not."""

    def __init__(self, task: InnerTask, steps: int, batches: bool = False) -> None:
        self.fn, self.loss, self.optimizer, self.lr = task.fn, task.loss, task.optimizer, task.lr
        self.steps, self.first_order = steps, task.first_order
        params, state, only, rng = task.params, task.state, task.only, task.rng
        self.rng = None if rng is None else as_key(rng)
        self.by_name = isinstance(params, Mapping)
        self.order = list(params) if self.by_name else []
        params = _values(params)  # whose names come out sorted
        if only is not None and not self.by_name:
            raise TypeError(
                explain(
                    f"adapt was given only={only!r} and params of type {type(params).__name__}",
                    "a filter chooses names",
                    "pass params as a dict of name -> array",
                )
            )
        self.fixed: dict[str, Any] = {}
        moved = params
        if self.by_name:
            names = set(chosen(params, only, "adapt", required=True))
            self.fixed = {n: v for n, v in params.items() if n not in names or is_rows(v)}
            moved = {n: v for n, v in params.items() if n not in self.fixed}
        _require_floating(moved)
        self._require_learning_rate(moved)
        for tree, what in ((params, "params"), (state, "state"), (self.lr, "lr")):
            require_rows(tree, steps, what)
        self.has_state = state is not None
        self.rows = {n: v for n, v in (state or {}).items() if is_rows(v)}
        carried = {n: v for n, v in (state or {}).items() if n not in self.rows}
        moved = strong_arrays(moved)
        if self.optimizer is not None:
            require_differentiable(self.optimizer, moved, steps, unless=self.first_order)
        fresh = () if self.optimizer is None else self.optimizer.init(moved)
        slots = fresh if task.slots is None else _fitting(task.slots, fresh)
        self.data, self.batches = task.data, batches
        if batches:
            self._require_batches()
        self.start = (moved, slots, strong_arrays(carried), strong_arrays(self.rows))

    # ---------------------------------------------------------------------------------------------
    # One step

    def step(self, constants: tuple, carry: tuple, x: tuple) -> tuple[tuple, Any, Any]:
        """Take a step; `constants` are the learning rates, the fixed parameters and the data.

        Returns:
            what is carried on, and the loss and the gradient before the step.
        """
        lr, fixed, data = constants
        chosen, slots, carried, rows = carry
        i, batch = x
        data = batch if self.batches else data
        key = None if self.rng is None else jax.random.fold_in(self.rng, i)

        def objective(chosen: object) -> tuple[Any, Any]:
            state = {**carried, **rows_at(rows, i)} if self.has_state else None
            return self.value(self.merged(chosen, fixed, i), state, data, key)

        (value, state), grads = jax.value_and_grad(objective, has_aux=True)(chosen)
        grads = jax.lax.stop_gradient(grads) if self.first_order else counted(grads)
        lr = rows_at(lr, i)
        if self.optimizer is None:
            moved = self.each(lambda p, g, lr: p - lr * g, chosen, grads, lr)
        else:
            updates, slots = updated(self.optimizer, grads, slots, chosen)
            moved = self.each(lambda p, u, lr: p + u * lr, chosen, updates, 1 if lr is None else lr)
        if self.has_state:
            carried = {n: state[n] for n in carried}
            rows = {n: PerStep(r.rows.at[i].set(state[n])) for n, r in rows.items()}
        return (moved, slots, carried, rows), value, grads

    def value(self, params: Any, state: Any, data: tuple, key: Any) -> tuple[Any, Any]:
        """Return the inner loss, checked, and the state after it."""
        random = {} if key is None else {"rng": key}
        if self.fn is None:
            out = self.loss(params, *((state,) if self.has_state else ()), *data, **random)
            value, state = _pair(out, "loss", "scalar") if self.has_state else (out, None)
        else:
            *inputs, target = data
            out = self.fn(params, *((state,) if self.has_state else ()), *inputs, **random)
            out, state = _pair(out, "fn", "out") if self.has_state else (out, None)
            value = self.loss(out, target)
        return _scalar(value), state

    def merged(self, chosen: Any, fixed: dict[str, Any], i: Any) -> Any:
        """Return all parameters of a step."""
        if not self.by_name:
            return chosen
        merged = {**rows_at(fixed, i), **chosen}
        return {n: merged[n] for n in self.order}

    def each(self, rule: Callable, chosen: Any, other: Any, lr: Any) -> Any:
        """Apply a rule of a parameter, its gradient or update, and its learning rate."""

        def one(p: Any, o: Any, lr: Any) -> Any:
            return rule(p, o.astype(p.dtype), jnp.asarray(lr, p.dtype)).astype(p.dtype)

        if isinstance(lr, Mapping) and self.by_name:
            # A name without a rate is an error of its own; see _require_learning_rate.
            return {n: one(p, other[n], lr[n]) for n, p in chosen.items()}
        if jax.tree_util.tree_structure(lr).num_leaves == 1 and not isinstance(lr, Mapping):
            (lr,) = jax.tree_util.tree_leaves(lr)
            return jax.tree_util.tree_map(lambda p, o: one(p, o, lr), chosen, other)
        return jax.tree_util.tree_map(one, chosen, other, lr)

    # ---------------------------------------------------------------------------------------------
    # All steps

    def run(self, truncate: int | None, checkpoint: str, keep_path: bool, unroll: int) -> Adapted:
        def stepper(constants: tuple) -> Callable:
            # One function for each phase: JAX keeps the trace of a loop's body by its function, with the
            # constants it met there.
            def step(carry: tuple, x: tuple) -> tuple[tuple, Any]:
                after, value, _ = self.step(constants, carry, x)
                return after, (value, after[0] if keep_path else None)

            return step

        constants = (self.lr, self.fixed, self.data)
        xs = (jnp.arange(self.steps), self.data if self.batches else None)
        carry, outs = self.start, []
        silent = 0 if truncate is None else max(0, self.steps - truncate)
        if silent:
            stop = jax.lax.stop_gradient
            step = stepper(stop(constants))
            carry, out = stop(_steps(step, stop(carry), _part(stop(xs), 0, silent), "none", unroll))
            outs.append(out)
        if silent < self.steps:
            carry, out = _steps(
                stepper(constants), carry, _part(xs, silent, self.steps), checkpoint, unroll
            )
            outs.append(out)
        losses, path = jax.tree_util.tree_map(lambda *parts: jnp.concatenate(parts), *outs)
        note_losses(losses)
        chosen, slots, carried, rows = carry
        last = self.steps - 1
        return Adapted(
            params=self.merged(chosen, self.fixed, last),
            state={**carried, **rows_at(rows, last)} if self.has_state else None,
            losses=losses,
            rows=rows,
            path=self._path(path) if keep_path else None,
            slots=slots,
        )

    def _path(self, path: object) -> Any:
        first = self.start[0]
        whole = jax.tree_util.tree_map(
            lambda p, later: jnp.concatenate([p[None], later]), first, path
        )
        if not self.by_name:
            return whole

        def at_each(value: Any) -> Any:
            if isinstance(value, PerStep):
                # After a step its own row; before the first, the first's.
                return jnp.concatenate([value.rows[:1], value.rows])
            return jnp.broadcast_to(value, (self.steps + 1, *jnp.shape(value)))

        merged = {**{n: at_each(v) for n, v in self.fixed.items()}, **whole}
        return {n: merged[n] for n in self.order}

    # ---------------------------------------------------------------------------------------------
    # Checks

    def _require_learning_rate(self, chosen: Any) -> None:
        lr = self.lr
        if any(isinstance(leaf, str) for leaf in jax.tree_util.tree_leaves(lr)):
            raise TypeError(f"adapt: lr is a number or arrays, got {lr!r}")
        if lr is None:
            if self.optimizer is None:
                raise TypeError(
                    explain(
                        "called adapt without a learning rate",
                        "plain gradient descent needs a step size",
                        "pass lr=0.01, or optimizer=optax.adam(1e-3, eps_root=1e-8)",
                    )
                )
            return
        rates = lr
        if isinstance(lr, Mapping) and self.by_name:
            self._require_names(lr, chosen)
            rates = {n: lr[n] for n in chosen}
        elif not isinstance(lr, Mapping) and jax.tree_util.tree_structure(lr).num_leaves == 1:
            (rate,) = jax.tree_util.tree_leaves(lr, is_leaf=is_rows)
            rates = jax.tree_util.tree_map(lambda _: rate, chosen)
        jax.tree_util.tree_map_with_path(_require_rate, chosen, rates)

    def _require_names(self, lr: Mapping[str, Any], chosen: dict[str, Any]) -> None:
        unknown = [n for n in lr if n not in self.order]
        missing = [n for n in chosen if n not in lr]
        if unknown or missing:
            raise UnknownNameError(
                explain(
                    "adapt was given learning rates "
                    + (f"for {unknown}" if unknown else f"without {missing}"),
                    f"the adapted parameters are {list(chosen)}",
                    "pass one number for all, or one for each: nn.meta.learning_rates(params, 0.01)",
                )
            )

    def _require_batches(self) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.data):
            if jnp.shape(leaf)[:1] != (self.steps,):
                raise ShapeError(
                    explain(
                        f"adapt(batches=True, steps={self.steps}) was given "
                        f"data{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}",
                        "each step takes its batch from the first axis",
                        f"pass arrays of shape ({self.steps}, ...), or batches=False",
                    )
                )


def _require_rate(path: tuple, p: Any, rate: Any) -> None:
    """Raise unless a learning rate changes no shape of its parameter."""
    shape, own = jnp.shape(rate.rows)[1:] if is_rows(rate) else jnp.shape(rate), jnp.shape(p)
    # Broadcasting may not go the other way, which would make the parameter larger.
    ends = zip(shape[::-1], own[::-1], strict=False)
    if len(shape) > len(own) or any(size not in (1, end) for size, end in ends):
        raise ShapeError(
            explain(
                f"adapt was given a learning rate of shape {shape} for "
                f"params{jax.tree_util.keystr(path)}",
                f"the parameter has shape {own}",
                "pass a scalar, an array of the parameter's shape, or PerStep of these",
            )
        )


def _steps(
    step: Callable, carry: tuple, xs: tuple, checkpoint: str, unroll: int
) -> tuple[tuple, Any]:
    """Run a step over the first axis of `xs`, in the cheapest form, or the one that saves memory."""
    count = len(xs[0])
    if checkpoint == "none" and count <= unroll:
        outs = []
        for i in range(count):
            carry, out = step(carry, jax.tree_util.tree_map(lambda v, i=i: v[i], xs))
            outs.append(out)
        return carry, jax.tree_util.tree_map(lambda *v: jnp.stack(v), *outs)
    step = body_of_loop(step)
    if checkpoint == "none":
        return jax.lax.scan(step, carry, xs)
    cheap = jax.checkpoint(step, prevent_cse=False)
    if checkpoint == "all":
        return jax.lax.scan(cheap, carry, xs)
    # Every √count-th carry is kept. The steps in between run again in the backward pass, where each carry of
    # one chunk is kept; what a step computes (the activations, twice) is there for one step at a time. The
    # backward pass begins with the last chunk, so its carries are kept as they come, which saves a run.
    width = math.isqrt(count - 1) + 1
    chunks = (count - 1) // width

    @jax.checkpoint
    def chunk(carry: tuple, xs: tuple) -> tuple[tuple, Any]:
        return jax.lax.scan(cheap, carry, xs)

    whole = jax.tree_util.tree_map(
        lambda v: v[: chunks * width].reshape(chunks, width, *v.shape[1:]), xs
    )
    carry, out = jax.lax.scan(chunk, carry, whole)
    out = jax.tree_util.tree_map(lambda v: v.reshape(chunks * width, *v.shape[2:]), out)
    carry, last = jax.lax.scan(cheap, carry, _part(xs, chunks * width, count))
    return carry, jax.tree_util.tree_map(lambda a, b: jnp.concatenate([a, b]), out, last)


def _part(xs: object, start: int, stop: int) -> Any:
    return jax.tree_util.tree_map(lambda v: v[start:stop], xs)


def _values(params: object) -> Any:
    """Return parameters with the arrays of boxes, as ``dict(model.named_parameters())`` has them."""

    def is_box(x: object) -> bool:
        return isinstance(x, Box)

    return jax.tree_util.tree_map(lambda v: v.value if is_box(v) else v, params, is_leaf=is_box)


def _fitting(slots: object, fresh: object) -> Any:
    """Return slots as strong arrays, or raise if they are not what the optimizer would start with."""
    shapes = lambda tree: jax.tree_util.tree_map(jnp.shape, tree)
    same = jax.tree_util.tree_structure(slots) == jax.tree_util.tree_structure(fresh)
    if not same or shapes(slots) != shapes(fresh):
        raise ShapeError(
            explain(
                f"adapt was given slots with the shapes {shapes(slots)}",
                f"the optimizer's are {shapes(fresh)}",
                "pass the slots of adapt(...) with this optimizer and these parameters, or None",
            )
        )
    return strong_arrays(slots)


def _pair(out: object, what: str, first: str) -> tuple:
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            explain(
                f"{what} returned {type(out).__name__} to adapt(state=...)",
                "the state after the step is needed",
                f"return ({first}, state), as functionalize(model, mutable=True) does",
            )
        )
    return out


def _scalar(value: Any) -> Any:
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            explain(
                f"the inner loss is of shape {shape} and dtype {dtype}",
                "a step follows the gradient of a real scalar",
                "return loss.mean()" if shape else "compute the loss in a floating dtype",
            )
        )
    return value


def _require_floating(chosen: object) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(chosen):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise DtypeError(
                explain(
                    f"adapt was given params{jax.tree_util.keystr(path)} of dtype "
                    f"{jnp.result_type(leaf)}",
                    "a gradient step needs real numbers",
                    "keep it out with only=..., or make it a buffer",
                )
            )
