"""Gradients of a scaled loss, so that small ones do not vanish in float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import ArgumentError, explain
from statefulnn.core.module import Module
from statefulnn.core.tracebacks import shortened
from statefulnn.functional._checks import widened
from statefulnn.optim import Optimizer
from statefulnn.transforms.jit import jit

_T = TypeVar("_T")

STEP = """
    def scaled(model):
        loss = loss_fn(model, x, y)
        return scaler.scale(loss), loss
    (_, loss), grads = nn.value_and_grad(scaled, has_aux=True)(model)
    scaler.step(opt, grads)
    scaler.update()"""

# Whether any loss was scaled so far. A scaler cannot know it of itself: compiled code scales on a clone.
_met = {"scale": False}


class GradScaler(Module):
    """Scale a loss, undo it in the gradients, and leave out steps whose gradients are not finite.

    The scale grows while gradients are finite, and shrinks when they are not. A step that is left out
    changes nothing: no weight, no slot and no count. All of it is computed on the device, within `nn.jit`
    too, and nothing waits for the host. bfloat16 has the range of float32 and needs no scaler.

    Args:
        init_scale: the first scale.
        growth_factor: what the scale is multiplied by after `growth_interval` steps with finite gradients.
        backoff_factor: what it is multiplied by after a step without.
        growth_interval: how many steps in a row it takes to grow.
        enabled: False makes `scale` and `unscale_` return what they are given, and `step` an ordinary step.

    Attributes:
        growth_factor, backoff_factor, growth_interval: buffers, as given.

    Raises:
        AssertionError: for factors on the wrong side of 1 (torch's class).

    Source: ``torch.amp.GradScaler``; Micikevicius et al. 2018. The names in its state_dict are torch's.

    Example:
        >>> import jax.numpy as jnp, optax, statefulnn as nn
        >>> model, scaler = nn.Linear(3, 1), nn.amp.GradScaler(init_scale=8.0)
        >>> opt = nn.Optimizer(model, optax.sgd(0.1))
        >>> @nn.jit
        ... def train_step(model, opt, scaler, x):
        ...     def scaled(model):
        ...         with nn.amp.autocast(jnp.float16):
        ...             loss = nn.functional.mse_loss(model(x), jnp.zeros((4, 1)))
        ...         return scaler.scale(loss), loss
        ...
        ...     (_, loss), grads = nn.value_and_grad(scaled, has_aux=True)(model)
        ...     scaler.step(opt, grads)
        ...     scaler.update()
        ...     return loss
        >>> loss = train_step(model, opt, scaler, jnp.ones((4, 3)))
        >>> loss = train_step(model, opt, scaler, jnp.full((4, 3), jnp.inf))
        >>> float(scaler.get_scale()), bool(jnp.isfinite(model.weight).all())
        (4.0, True)
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self.enabled = bool(enabled)
        # Both are False again after `update`: where compiled code leaves one set, law 8 tells.
        self.unscaled_without_step = False
        self.stepped_without_update = False
        if not enabled:
            return
        if growth_factor <= 1 or backoff_factor >= 1:
            raise AssertionError(
                explain(
                    f"made a GradScaler with growth_factor={growth_factor}, "
                    f"backoff_factor={backoff_factor}",
                    "the scale grows by the first and shrinks by the second",
                    "growth_factor=2.0, backoff_factor=0.5",
                )
            )
        self.register_buffer("_scale", jnp.asarray(init_scale, jnp.float32))
        self.register_buffer("growth_factor", jnp.asarray(growth_factor, jnp.float32))
        self.register_buffer("backoff_factor", jnp.asarray(backoff_factor, jnp.float32))
        self.register_buffer("growth_interval", jnp.asarray(growth_interval, jnp.int32))
        self.register_buffer("_growth_tracker", jnp.asarray(0, jnp.int32))
        # Whether gradients were not finite: of the step to come, and of those since the last update.
        self.register_buffer("_unscaled_inf", jnp.asarray(False), persistent=False)
        self.register_buffer("_found_inf", jnp.asarray(False), persistent=False)

    def scale(self, outputs: _T) -> _T:
        """Multiply a loss, or a tree of them, by the scale; float16 and bfloat16 become float32.

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> float(nn.amp.GradScaler(init_scale=8.0).scale(jnp.ones(())))
            8.0
        """
        if not self.enabled:
            return outputs
        _met["scale"] = True
        scale = self._scale
        return jax.tree.map(lambda x: (wide := widened(x)) * scale.astype(wide.dtype), outputs)

    @shortened
    def unscale_(self, grads: Mapping[str, ArrayLike]) -> dict[str, Any]:
        """Divide gradients by the scale before the step, to clip them or look at them.

        `step` does it for gradients that were not unscaled. Arrays do not change in place: take the result.

        Raises:
            RuntimeError: if it was called already, and no step since.
            AssertionError: if no loss was scaled (torch's class, as below).

        Example:
            >>> import jax.numpy as jnp, statefulnn as nn
            >>> scaler = nn.amp.GradScaler(init_scale=8.0)
            >>> loss = scaler.scale(jnp.ones(()))
            >>> float(scaler.unscale_({"weight": loss})["weight"])
            1.0
        """
        if not self.enabled:
            return dict(grads)
        self._require_scaled("unscale_")
        if self.unscaled_without_step:
            raise RuntimeError(
                explain(
                    "called GradScaler.unscale_ twice",
                    "unscale_() has already been called since the last step, and gradients would be "
                    "divided by the scale twice",
                    "grads = scaler.unscale_(grads) once, then scaler.step(opt, grads) for these; after "
                    "that, the gradients of the next optimizer",
                )
            )
        unscaled, found = _unscaled(dict(grads), self._scale)
        self._unscaled_inf = found
        self.unscaled_without_step = True
        return unscaled

    @shortened
    def step(self, opt: Optimizer, grads: Mapping[str, ArrayLike], **extra: Any) -> None:
        """Step an optimizer, unless a gradient is not finite: then nothing changes.

        Args:
            opt: the optimizer.
            grads: gradients of the scaled loss, or what `unscale_` made of them, and clipping of that.
            extra: what the optimizer's step takes beside them.

        Raises:
            AssertionError: if no loss was scaled.
            ArgumentError: if `opt` is no `nn.Optimizer`.
        """
        if not isinstance(opt, Optimizer):
            raise ArgumentError(
                explain(
                    f"GradScaler.step was given a {type(opt).__name__}",
                    "it puts back the weights and slots of an nn.Optimizer",
                    "scaler.step(opt, grads), with opt = nn.Optimizer(model, optax.adamw(1e-3))",
                )
            )
        if not self.enabled:
            return opt.step(grads, **extra)
        self._require_scaled("step")
        inputs = jax.tree_util.tree_leaves((grads, extra))
        eager = current_trace() is EAGER and not any(isinstance(x, Tracer) for x in inputs)
        run = _compiled_step if eager else _step
        run(self, opt, grads, extra)
        self.unscaled_without_step = False
        self.stepped_without_update = True

    @shortened
    def update(self, new_scale: float | ArrayLike | None = None) -> None:
        """Let the scale grow or shrink, after the steps of all optimizers.

        Args:
            new_scale: a scale to set instead.

        Raises:
            AssertionError: if there was no step since the last update.
        """
        if not self.enabled:
            return
        if new_scale is None and not self.stepped_without_update:
            raise AssertionError(
                explain(
                    "called GradScaler.update without a step",
                    "No inf checks were recorded prior to update, so that it cannot know where to go",
                    "scaler.step(opt, grads) before scaler.update(), in one function:" + STEP,
                )
            )
        scale, found = self._scale, self._found_inf
        if new_scale is None:
            count = self._growth_tracker + 1
            due = count == self.growth_interval
            larger = scale * self.growth_factor
            grown = jnp.where(due & jnp.isfinite(larger), larger, scale)
            self._scale = jnp.where(found, scale * self.backoff_factor, grown)
            self._growth_tracker = jnp.where(found | due, 0, count)
        else:
            self._scale = jnp.asarray(new_scale, jnp.float32).reshape(())
        self._found_inf = jnp.zeros_like(found)
        self.stepped_without_update = False

    def get_scale(self) -> jax.Array:
        """Return the scale, an array; 1 where scaling is off."""
        return self._scale if self.enabled else jnp.ones(())

    def is_enabled(self) -> bool:
        """Return whether scaling is on."""
        return self.enabled

    def _require_scaled(self, method: str) -> None:
        if not _met["scale"]:
            raise AssertionError(
                explain(
                    f"called GradScaler.{method}, and no loss was scaled so far",
                    "the gradients would be divided by a scale that is not in them",
                    "differentiate scaler.scale(loss):" + STEP,
                )
            )

    # The method has the name of torch's key, so that the buffer has another.

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        for name, value in own.items():
            destination[prefix + "scale" if name == prefix + "_scale" else name] = value

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        if prefix + "scale" in state_dict:
            state_dict[prefix + "_scale"] = state_dict.pop(prefix + "scale")
        for name, buffer in self._buffers.items():
            value = state_dict.get(prefix + name)
            if isinstance(value, (int, float)):  # as torch saves them
                state_dict[prefix + name] = np.asarray(value, buffer.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return "" if self.enabled else "enabled=False"


@jax.jit
def _unscaled(grads: dict[str, Any], scale: jax.Array) -> tuple[dict[str, Any], Any]:
    """Divide gradients by the scale; say whether any of them is not finite."""
    finite = [jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]
    inverse = 1 / scale
    grads = jax.tree.map(
        lambda g: ((wide := widened(g)) * inverse.astype(wide.dtype)).astype(g.dtype), grads
    )
    return grads, ~jnp.stack(finite).all() if finite else jnp.asarray(False)


def _step(
    scaler: GradScaler, opt: Optimizer, grads: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    if scaler.unscaled_without_step:
        found = scaler._unscaled_inf
    else:
        grads, found = _unscaled(dict(grads), scaler._scale)
    # Both outcomes in one program, and a choice: a branch would have to be waited for on some devices.
    boxes = [*opt._boxes(), *(p for p in opt.module.parameters() if p.requires_grad)]
    boxes = [box for box in boxes if box is not None]
    before = [box.value for box in boxes]
    opt.step(grads, **extra)
    for box, old in zip(boxes, before, strict=True):
        if box.value is not old:
            box.value = jnp.where(found, old, box.value)
    scaler._found_inf = scaler._found_inf | found


_compiled_step = jit(_step)
