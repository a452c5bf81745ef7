"""Which dtype parameters are stored in, computed with, and given out in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from statefulnn.core.module import Module
from statefulnn.core.parameter import ArrayBox, Parameter
from statefulnn.core.placement import floating
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.lift import SplitCall, unbound
from statefulnn.transforms.types import P, R

_M = TypeVar("_M", bound=Module)


@dataclasses.dataclass(frozen=True)
class policy:  # noqa: N801 (it is called where a function would be)
    """Three dtypes: of parameters as they are stored, of the computation, of its output.

    Unlike `autocast` it casts once, where a model is entered and left, and everything between computes in
    one dtype. Norms, softmax and losses of F still compute in float32 inside.

    Args:
        param: of the parameters of a model, see `cast_to_param`.
        compute: of parameters and inputs inside, see `apply`.
        output: of what comes out.

    Raises:
        DtypeError: for a dtype that is not floating, or float64 unless 64-bit types are enabled.

    Source: jmp, https://github.com/google-deepmind/jmp.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> policy = nn.amp.policy(compute=jnp.bfloat16)
        >>> model = policy.cast_to_param(nn.Linear(3, 1))
        >>> def loss_fn(model, x):
        ...     return policy.apply(model)(x).sum()
        >>> loss, grads = nn.value_and_grad(loss_fn)(model, jnp.ones((2, 3)))
        >>> str(loss.dtype), str(grads["weight"].dtype)
        ('float32', 'float32')
    """

    param: DTypeLike = jnp.float32
    compute: DTypeLike = jnp.float32
    output: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            call = f"nn.amp.policy({field.name}={{}})"
            why = "parameters and what is computed with them are floating numbers"
            object.__setattr__(self, field.name, floating(getattr(self, field.name), call, why))

    def cast_to_param(self, model: _M) -> _M:
        """Cast the floating parameters of a model in place, and return it; buffers stay as they are."""
        for p in model.parameters():
            if jnp.issubdtype(p.dtype, jnp.floating):
                p.data = p.value.astype(self.param)
        return model

    def apply(self, fun: Callable[P, R]) -> Callable[P, R]:
        """Return a function that computes in `compute` and returns `output`.

        Args:
            fun: a Module, a method of one, or a function of modules and arrays.

        Returns:
            A function of the same arguments. The parameters of their modules and other floating arrays are
            cast inside; what it writes is written back in the dtype that it had.
        """
        function, owner = unbound(fun)

        @shortened
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            call = SplitCall(((owner, *args) if owner is not None else args, kwargs))
            leaves = [
                _cast(leaf, self.compute) if isinstance(box, Parameter) else leaf
                for box, leaf in zip(call.plan.boxes, call.leaves, strict=True)
            ]
            dynamic = [_cast(x, self.compute) for x in call.dynamic]
            out, writes = call.signature.pure(function)(leaves, dynamic)
            boxes = [call.plan.boxes[i] for i in writes.indices]
            writes.values = [
                v.astype(box.dtype) if isinstance(box, ArrayBox) else v
                for box, v in zip(boxes, writes.values, strict=True)
            ]
            return call.finish(jax.tree.map(lambda x: _cast(x, self.output), out), writes)

        return wrapper


def _cast(x: object, dtype: DTypeLike) -> Any:
    arrays = isinstance(x, (jax.Array, np.ndarray))
    return jnp.asarray(x, dtype) if arrays and jnp.issubdtype(x.dtype, jnp.floating) else x
