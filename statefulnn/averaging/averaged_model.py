"""AveragedModel: a copy of a model whose parameters follow those of the model. lerp_: one step of that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.averaging import _refusals as refusals
from statefulnn.averaging.rules import MultiRule, Rule, for_all, get_swa_avg_fn
from statefulnn.core.compat import EAGER, current_trace
from statefulnn.core.graph import require_module
from statefulnn.core.module import Module
from statefulnn.core.parameter import Buffer, Parameter
from statefulnn.core.placement import DeviceLike
from statefulnn.core.tracebacks import shortened
from statefulnn.functional._checks import widened
from statefulnn.transforms.jit import jit

# A name, the box that moves, the array it moves to.
Trio: TypeAlias = tuple[str, Any, jax.Array]


class AveragedModel(Module):
    """A copy of a model that holds the mean of the parameters over the steps of a training.

    It is called as the model is. Each `update_parameters` is one compiled call, or a part of the compiled
    function that calls it. The first takes the model's arrays over, later ones follow the rule.

    Args:
        model: the model to average. It is copied.
        device: where the copy is put; None for where the model is.
        avg_fn: the rule ``(averaged, current, n) -> array``, where `n` tells how many models were averaged
            before. None for the mean of all. It is traced: `n` is an array.
        multi_avg_fn: a rule for all arrays at once: it takes and returns lists.
        use_buffers: whether the rule holds for buffers too; False copies them.

    Attributes:
        module: the copy.
        n_averaged: how many models were averaged, buffer.

    Frozen parameters are averaged as others are, a tied one once. An integer buffer under a rule loses its
    fraction. The average may have a dtype of its own: ``avg.float()`` for a model in bfloat16. Rules get
    float32 for bfloat16 and float16.

    Raises:
        ArgumentError: for no module, for two rules, and when a rule returns no array of the shape.

    Source: ``torch.optim.swa_utils.AveragedModel``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> avg = nn.AveragedModel(model, avg_fn=nn.averaging.get_ema_avg_fn(0.75))
        >>> for value in (8.0, 4.0):
        ...     model.weight.value = jnp.full((1, 1), value)
        ...     avg.update_parameters(model)
        >>> avg(jnp.ones((1, 1))).item(), list(avg.state_dict())
        (7.0, ['n_averaged', 'module.weight'])
    """

    n_averaged: Any

    @shortened
    def __init__(
        self,
        model: Module,
        device: DeviceLike | None = None,
        avg_fn: Rule | None = None,
        multi_avg_fn: MultiRule | None = None,
        use_buffers: bool = False,
    ) -> None:
        super().__init__()
        require_module(model, "nn.AveragedModel")
        if avg_fn is not None and multi_avg_fn is not None:
            raise refusals.two_rules()
        self.module = copy.deepcopy(model)
        count = jnp.zeros((), jax.dtypes.canonicalize_dtype(np.int64))
        self.register_buffer("n_averaged", Buffer(count))
        if device is not None:
            self.to(device=device)
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers
        self._elsewhere = device is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @shortened
    def update_parameters(self, model: Module) -> None:
        """Take another model into the average.

        Args:
            model: one of the structure of the averaged one; modes and ``requires_grad`` may differ.

        Raises:
            StructureChangeError: if the names of parameters or buffers differ, as where other ones are tied.
            ShapeError: if shapes differ.
            ArgumentError: for no module, and if the rule returns something else than an array of the shape.

        Example:
            >>> import statefulnn as nn
            >>> model = nn.Linear(2, 1)
            >>> avg = nn.AveragedModel(model)
            >>> avg.update_parameters(model)
            >>> int(avg.n_averaged)
            1
        """
        require_module(model, _UPDATE)
        if current_trace() is not EAGER:
            _update(self, model)
        elif self._elsewhere:
            trios = _matched(self.module, model, _UPDATE)
            places = [box.value.sharding for _, box, _ in trios]
            _compiled_take(self, jax.device_put([array for _, _, array in trios], places))
        else:
            _compiled_update(self, model)

    def _take(self, arrays: Sequence[jax.Array]) -> None:
        """Take the arrays of a model into the average, in the order of the average's own boxes."""
        n, ruled, copied = self.n_averaged, [], []
        for (name, box), array in zip(_boxes(self.module).items(), arrays, strict=True):
            under_rule = self.use_buffers or isinstance(box, Parameter)
            (ruled if under_rule else copied).append((name, box, array))
        rule = self.multi_avg_fn or for_all(self.avg_fn or get_swa_avg_fn())
        new = _moved(ruled, lambda averaged, current: rule(averaged, current, n))
        for (_, box, array), value in zip(ruled, new, strict=True):
            box.write(jnp.where(n == 0, array.astype(box.dtype), value))
        for _, box, array in copied:
            box.write(array.astype(box.dtype))
        self.n_averaged = n + 1

    def extra_repr(self) -> str:
        return f"use_buffers={self.use_buffers}"


@shortened
def lerp_(target: Module, source: Module, t: ArrayLike, use_buffers: bool = False) -> None:
    """Move a model towards another one in place: ``(1 - t) * target + t * source``.

    It is one compiled call, which another `t` does not compile anew, or a part of the compiled function that
    calls it. Target networks of reinforcement learning and momentum encoders are moved this way.

    Args:
        target: the model that is changed; gradients do not matter to it.
        source: a model of the same structure.
        t: the share of the source, a number or a scalar array.
        use_buffers: whether buffers move too; those of integers are copied.

    Raises:
        StructureChangeError: if the names of parameters or buffers differ, as where other ones are tied.
        ShapeError: if shapes differ.
        ArgumentError: if `target` or `source` is not a module, or `t` is not a number.

    Source: ``torch.lerp``, on all parameters of a model.

    Example:
        >>> import copy, jax.numpy as jnp, statefulnn as nn
        >>> source = nn.Linear(1, 1, bias=False)
        >>> target = copy.deepcopy(source)
        >>> source.weight.value, target.weight.value = jnp.ones((1, 1)), jnp.zeros((1, 1))
        >>> nn.lerp_(target, source, 0.25)
        >>> target.weight.item()
        0.25
    """
    for model in (target, source):
        require_module(model, _LERP)
    if not isinstance(t, (int, float, np.ndarray, np.number, jax.Array)) or np.shape(t):
        raise refusals.no_share(t)
    lerp = _lerp if current_trace() is not EAGER else _compiled_lerp
    lerp(target, source, t, use_buffers)


_UPDATE, _LERP = "AveragedModel.update_parameters", "nn.lerp_"


def _boxes(model: Module) -> dict[str, Any]:
    """Return the parameters and buffers of a model by name."""
    return {n: b for n, b in model._named_boxes() if isinstance(b, (Parameter, Buffer))}


def _matched(target: Module, source: Module, where: str) -> list[Trio]:
    """Return each box of one model beside the array of the other; raise unless the models agree."""
    ours, theirs = _boxes(target), _boxes(source)
    owners = ("average", "model") if where == _UPDATE else ("target", "source")
    only = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    if any(only):
        raise refusals.other_model(where, list(zip(owners, only, strict=True)))
    differing = [
        (n, b.shape, theirs[n].shape) for n, b in ours.items() if b.shape != theirs[n].shape
    ]
    if differing:
        raise refusals.other_shapes(where, owners, differing)
    return [(name, box, theirs[name].value) for name, box in ours.items()]


def _moved(trios: Sequence[Trio], rule: Callable[[list[Any], list[Any]], Any]) -> list[jax.Array]:
    """Return what a rule makes of boxes and current values, in the dtypes of the boxes."""
    averaged = [widened(box.value) for _, box, _ in trios]
    # In the average's precision first: it may be the wider one.
    current = [array.astype(a.dtype) for a, (_, _, array) in zip(averaged, trios, strict=True)]
    with jax.numpy_dtype_promotion("standard"):
        new = rule(averaged, current)
    if not isinstance(new, (list, tuple)) or len(new) != len(trios):
        raise refusals.result_of_a_rule(f"{_described(new)} for {len(trios)} arrays")
    for value, (name, box, _) in zip(new, trios, strict=True):
        if getattr(value, "shape", None) != box.shape:
            raise refusals.result_of_a_rule(f"{_described(value)} for {name!r} of {box.shape}")
    return [value.astype(box.dtype) for value, (_, box, _) in zip(new, trios, strict=True)]


def _described(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"{len(value)} arrays"
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" if shape is None else f"an array of shape {shape}"


def _update(average: AveragedModel, model: Module) -> None:
    average._take([array for _, _, array in _matched(average.module, model, _UPDATE)])


def _lerp(target: Module, source: Module, t: Any, use_buffers: bool) -> None:
    moving, copied = [], []
    for name, box, array in _matched(target, source, _LERP):
        if use_buffers or isinstance(box, Parameter):
            whole = not jnp.issubdtype(box.dtype, jnp.inexact)
            (copied if whole else moving).append((name, box, array))
    rule = lambda a, c, n: (1 - t) * a + t * c
    new = _moved(moving, lambda averaged, current: for_all(rule)(averaged, current, t))
    for (_, box, _), value in zip(moving, new, strict=True):
        box.write(value)
    for _, box, array in copied:
        box.write(array.astype(box.dtype))


_compiled_update = jit(_update)
_compiled_take = jit(AveragedModel._take)
_compiled_lerp = jit(_lerp, static_argnames="use_buffers")
