"""Gradient clipping, by norm and by value.

Each function takes gradients in one of two forms:

- Parameters whose ``grad`` is set, as torch does: ``grad`` is replaced.
- Gradients, as `nn.grad` gives them: a dict, whose entries are replaced, or any other tree of arrays, whose
  dicts and lists take the clipped ones. They are returned too: the same dict, or another tree. This form
  works inside compiled functions.

Source: ``torch.nn.utils.clip_grad``.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from statefulnn.core.box import Box, unwrap
from statefulnn.core.compat import EAGER, Tracer, current_trace
from statefulnn.core.errors import DtypeError, explain, user_stack_level
from statefulnn.core.ownership import ModuleBase, check_write
from statefulnn.core.parameter import Parameter
from statefulnn.transforms.types import PyTree


def _wide(x: jax.Array) -> Any:
    return x.astype(jnp.float32) if x.dtype.itemsize == 2 else x


def _vector_norm(x: jax.Array, order: float) -> Any:
    size = jnp.abs(_wide(x))  # of any rank: on a mesh a flat one would have to be gathered
    if order == math.inf:
        norm = jnp.max(size, initial=0)
    elif order == -math.inf:
        norm = jnp.min(size, initial=jnp.inf)
    elif order == 0:
        norm = jnp.sum((size != 0).astype(size.dtype))
    elif order == 1:
        norm = jnp.sum(size)
    elif order == 2:
        norm = jnp.sqrt(jnp.sum(size * size))
    else:
        norm = jnp.sum(size**order) ** (1 / order)
    return norm if x.dtype.itemsize > 2 else norm.astype(x.dtype)


@functools.partial(jax.jit, static_argnums=1)
def total_norm_of(tensors: list[Any], order: float) -> Any:
    """Return the norm of the norms of arrays, of which there is at least one."""
    norms = [_vector_norm(x, order) for x in tensors]
    with jax.numpy_dtype_promotion("standard"):
        together = jnp.stack(norms)
    return _vector_norm(together, order)


@jax.jit
def scaled_to(grads: list[Any], max_norm: jax.Array, total_norm: jax.Array) -> list[Any]:
    """Return gradients whose norm is at most `max_norm`, an array."""
    total_norm = _wide(total_norm)
    scale = jnp.minimum(max_norm.astype(total_norm.dtype) / (total_norm + 1e-6), 1)
    return [g * scale.astype(g.dtype) for g in grads]


@functools.partial(jax.jit, static_argnums=2)
def _scaled_with_norm(grads: list[Any], max_norm: jax.Array, order: float) -> tuple[list[Any], Any]:
    norm = total_norm_of(grads, order)
    return scaled_to(grads, max_norm, norm), norm


@jax.jit
def _clamped(grads: list[Any], limit: jax.Array) -> list[Any]:
    return [jnp.clip(g, -limit.astype(g.dtype), limit.astype(g.dtype)) for g in grads]


class _Gradients:
    """The gradients in an argument, and what to do with the clipped ones.

    Attributes:
        values: the arrays.
        parameters: the parameters they belong to, None for a tree of gradients.
        names: the dict that holds them, None for parameters and other trees.
        tree: the other tree.
    """

    __slots__ = ("names", "parameters", "tree", "treedef", "values")

    def __init__(self, given: Any, function: str) -> None:
        if isinstance(given, ModuleBase):
            raise TypeError(
                explain(
                    f"{function} was given a module",
                    "it takes parameters that have a grad, or gradients",
                    f"{function}(model.parameters(), ...), or pass the dict that nn.grad returned",
                )
            )
        if isinstance(given, Parameter):
            given = [given]
        elif not isinstance(given, (dict, list, tuple, jax.Array, np.ndarray)) and hasattr(
            given, "__iter__"
        ):
            given = _listed(given, function)
        self.parameters: list[Parameter] | None = None
        self.names: dict[str, Any] | None = None
        if isinstance(given, (list, tuple)) and all(isinstance(p, Parameter) for p in given):
            self.parameters = [p for p in given if p.grad is not None]
            self.values = [unwrap(p.grad) for p in self.parameters]
            self.treedef = None
            if given and not self.parameters:
                _warn_of_no_gradient(function)
        elif type(given) is dict and all(map(_is_array, given.values())):
            self.names, self.values, self.treedef = given, list(given.values()), None
        else:
            self.tree = given
            self.values, self.treedef = jax.tree.flatten(
                given, is_leaf=lambda x: isinstance(x, (Box, ModuleBase))
            )
        for value in self.values:
            _require_gradient(value, function)

    def replaced(self, values: Sequence[Any]) -> Any:
        """Put other arrays in place of the gradients; return the dict or tree, None for parameters."""
        if self.names is not None:
            self.names.update(zip(self.names, values, strict=True))
            return self.names
        if self.parameters is None:
            clipped = jax.tree.unflatten(self.treedef, values)
            _put(self.tree, clipped)
            return clipped
        for parameter, value in zip(self.parameters, values, strict=True):
            if current_trace() is not EAGER or isinstance(value, Tracer):
                check_write(parameter._scope, value, lambda p=parameter: f"grad of {p.label()}")
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.grad = value
        return None


def _listed(given: Iterable[Any], function: str) -> list[Any]:
    """Return the members of an iterable; raise if they are arrays, which nothing could replace there."""
    members = list(given)
    if not members and isinstance(given, Iterator) and function == "clip_grad_norm_":
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.",
            stacklevel=user_stack_level(),
        )
    if any(map(_is_array, members)):
        raise TypeError(
            explain(
                f"{function} was given arrays in an object of type {type(given).__name__}",
                "it replaces gradients in what holds them, and cannot do so there: the dict that they "
                "come from would keep the old ones",
                f"{function}(grads, ...), the dict itself and not its values; or a list of arrays",
            )
        )
    return members


def _put(old: PyTree, new: PyTree) -> None:
    """Put the arrays of a tree into the dicts and lists of another one, as deep as there are any."""
    if type(old) in (dict, list):
        for key, value in old.items() if isinstance(old, dict) else enumerate(old):
            if _is_array(value):
                old[key] = new[key]
            else:
                _put(value, new[key])
    elif type(old) is tuple:
        for before, after in zip(old, new, strict=True):
            _put(before, after)


def _warn_of_no_gradient(function: str) -> None:
    warnings.warn(
        explain(
            f"{function} was given parameters, and none of them has a grad",
            "nn.grad returns the gradients and sets no grad, so nothing was clipped",
            f"give it what nn.grad returned: {function}(grads, 1.0)",
        ),
        stacklevel=user_stack_level(),
    )


def _is_array(value: object) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic))


def _require_gradient(value: Any, function: str) -> None:
    if not _is_array(value):
        raise TypeError(
            explain(
                f"{function} was given a {type(value).__name__} among gradients",
                "it takes parameters that have a grad, or a tree of arrays",
                f"{function}(model.parameters(), ...), or pass the dict that nn.grad returned",
            )
        )
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise DtypeError(
            explain(
                f"{function} was given an array of dtype {value.dtype} among gradients",
                "gradients are floating or complex",
                "leave it out",
            )
        )


def _require_finite(norm: jax.Array, order: float, function: str) -> None:
    if isinstance(norm, Tracer):
        raise RuntimeError(
            explain(
                f"{function}(..., error_if_nonfinite=True) inside a compiled function",
                "the value of the norm is not known while the function is traced",
                "error_if_nonfinite=False, and look at the norm that is returned",
            )
        )
    if not bool(jnp.isfinite(norm)):
        raise RuntimeError(
            explain(
                f"{function} met a norm of {norm}",
                f"The total norm of order {order} for gradients from `parameters` is non-finite, so it "
                "cannot be clipped",
                "error_if_nonfinite=False, to scale the gradients by it anyway",
            )
        )


def get_total_norm(
    tensors: object,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> jax.Array:
    """Return the norm of several arrays as if they were one vector.

    Args:
        tensors: an array, an iterable of arrays, or a tree of them.
        norm_type: the order p; infinite for the largest absolute value.
        error_if_nonfinite: whether a norm that is NaN or infinite is an error; not while tracing.
        foreach: accepted for compatibility with torch.

    Returns:
        A scalar; 0 for no arrays. As in torch it is the norm of the arrays' norms, which for p = 0 is
        the number of arrays that are not all zero.

    Raises:
        RuntimeError: for a norm that is not finite, with `error_if_nonfinite`.
        TypeError: for something else than arrays.

    Source: ``torch.nn.utils.get_total_norm``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> float(nn.utils.get_total_norm([jnp.array([3.0]), jnp.array([4.0])]))
        5.0
    """
    tree: Any = tensors
    if isinstance(tree, (Box, jax.Array, np.ndarray)):
        tree = [tree]
    elif not isinstance(tree, (dict, list, tuple)) and hasattr(tree, "__iter__"):
        tree = list(tree)
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, (Box, ModuleBase)))
    return _norm_of([unwrap(x) for x in leaves], norm_type, error_if_nonfinite, "get_total_norm")


def _norm_of(values: list[Any], norm_type: float, check: bool, function: str) -> Any:
    for value in values:
        _require_gradient(value, function)
    if not values:
        return jnp.zeros(())
    order = float(norm_type)
    norm = total_norm_of(values, order)
    if check:
        _require_finite(norm, order, function)
    return norm


def clip_grads_with_norm_(
    parameters: object, max_norm: float, total_norm: ArrayLike, foreach: bool | None = None
) -> Any:
    """Scale gradients by ``max_norm / (total_norm + 1e-6)``, if that is less than 1.

    Args:
        parameters: a Parameter or an iterable of them, whose ``grad`` is replaced; a dict of
            gradients, whose entries are replaced; or another tree of gradients.
        max_norm: the largest norm that is left as it is.
        total_norm: the norm, from `get_total_norm`.
        foreach: accepted for compatibility with torch.

    Returns:
        None for parameters; for a tree the tree of scaled gradients.

    Raises:
        TypeError: for something else than parameters or gradients.

    Source: ``torch.nn.utils.clip_grads_with_norm_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> grads = {"weight": jnp.array([3.0, 4.0])}
        >>> clipped = nn.utils.clip_grads_with_norm_(grads, 1.0, nn.utils.get_total_norm(grads))
        >>> clipped["weight"].round(3).tolist()
        [0.6..., 0.8...]
    """
    gradients = _Gradients(parameters, "clip_grads_with_norm_")
    if not gradients.values:
        return gradients.replaced([])
    return gradients.replaced(scaled_to(gradients.values, _limit(max_norm), unwrap(total_norm)))


def _limit(value: SupportsFloat) -> Any:
    """Return a limit as something compiled code takes without compiling again for its value."""
    return unwrap(value) if isinstance(value, (jax.Array, Box)) else float(value)


def clip_grad_norm_(
    parameters: object,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Any:
    """Scale gradients so that their norm, taken together, is at most `max_norm`.

    Args:
        parameters: a Parameter or an iterable of them, whose ``grad`` is replaced; the dict that
            `nn.grad` returns, whose entries are replaced; or another tree of gradients.
        max_norm: the largest norm that is left as it is.
        norm_type: the order p; infinite for the largest absolute value.
        error_if_nonfinite: whether a norm that is NaN or infinite is an error; not while tracing.
        foreach: accepted for compatibility with torch.

    Returns:
        For parameters the norm before; for a tree ``(clipped, norm)``, the tree of scaled gradients and
        the norm before.

    Raises:
        RuntimeError: for a norm that is not finite, with `error_if_nonfinite`; nothing is changed.
        TypeError: for something else than parameters or gradients.

    Source: ``torch.nn.utils.clip_grad_norm_``.

    Example:
        >>> import jax, jax.numpy as jnp, statefulnn as nn
        >>> grads = {"weight": jnp.array([3.0, 4.0])}
        >>> clipped, norm = jax.jit(nn.utils.clip_grad_norm_)(grads, 1.0)
        >>> float(norm), clipped["weight"].round(3).tolist()
        (5.0, [0.6..., 0.8...])
        >>> p = nn.Parameter(jnp.zeros(2))
        >>> p.grad = jnp.array([3.0, 4.0])
        >>> float(nn.utils.clip_grad_norm_([p], 1.0)), p.grad.round(3).tolist()
        (5.0, [0.6..., 0.8...])
    """
    gradients = _Gradients(parameters, "clip_grad_norm_")
    if gradients.values:
        order = float(norm_type)
        scaled, norm = _scaled_with_norm(gradients.values, _limit(max_norm), order)
        if error_if_nonfinite:
            _require_finite(norm, order, "clip_grad_norm_")
    else:
        scaled, norm = [], jnp.zeros(())
    clipped = gradients.replaced(scaled)
    return norm if gradients.parameters is not None else (clipped, norm)


def clip_grad_norm(
    parameters: object,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Any:
    """Do the same as `clip_grad_norm_`, under its deprecated name.

    Args:
        parameters: see `clip_grad_norm_`, as for the others.

    Source: ``torch.nn.utils.clip_grad_norm``.

    Example:
        >>> import warnings, jax.numpy as jnp, statefulnn as nn
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     clipped, norm = nn.utils.clip_grad_norm([jnp.ones(4)], 1.0)
        >>> float(norm)
        2.0
    """
    warnings.warn(
        "statefulnn.utils.clip_grad_norm is deprecated in favor of statefulnn.utils.clip_grad_norm_",
        FutureWarning,
        stacklevel=user_stack_level(),
    )
    return clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


def clip_grad_value_(parameters: object, clip_value: float, foreach: bool | None = None) -> Any:
    """Limit every element of gradients to ``[-clip_value, clip_value]``.

    Args:
        parameters: a Parameter or an iterable of them, whose ``grad`` is replaced; a dict of
            gradients, whose entries are replaced; or another tree of gradients.
        clip_value: the limit.
        foreach: accepted for compatibility with torch.

    Returns:
        None for parameters; for a tree the tree of limited gradients.

    Raises:
        TypeError: for something else than parameters or gradients.

    Source: ``torch.nn.utils.clip_grad_value_``.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.utils.clip_grad_value_({"weight": jnp.array([-3.0, 0.5])}, 1.0)["weight"].tolist()
        [-1.0, 0.5]
    """
    gradients = _Gradients(parameters, "clip_grad_value_")
    if not gradients.values:
        return gradients.replaced([])
    return gradients.replaced(_clamped(gradients.values, _limit(clip_value)))
