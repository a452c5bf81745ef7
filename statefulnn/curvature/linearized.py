"""A model as a polynomial of its parameters around given ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._models import Model, path_name, pure
from statefulnn.transforms.types import PyTree


@shortened
def linearize_model(model: Model) -> tuple[Callable, Any]:
    """Return the first-order Taylor expansion of a model in its parameters.

    ``f_lin(p, x) = f(p0, x) + ∂f/∂p (p0, x) · (p - p0)``, around the parameters `p0` that the model
    has: a model that is linear in its parameters, with the model's tangent kernel, and what a wide
    network is close to throughout training. A call costs about twice a call of the model; no Jacobian
    is formed.

    Args:
        model: a Module, ``(fn, params)`` as `functionalize` returns it, or ``(module, params)``.

    Returns:
        ``fn, params`` as of `functionalize`: ``fn(params, *inputs, **kwargs)`` is pure, `params` are
        those around which it expands. The pair is a model for every function of this package.

    Raises:
        ShapeError: when ``fn`` is called with parameters of other names or shapes.
        StateWriteError: when ``fn`` is called and the model writes state: use ``module.eval()``.

    Compiled code that closes over ``fn`` holds the parameters it expands around as constants. For a large
    model build it inside the compiled function: ``linearize_model((fn, params))``, with `params` an
    argument.

    Source: Lee et al. 2019, "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient
    Descent", https://arxiv.org/abs/1902.06720, equation 4.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> linear, params = nn.curvature.linearize_model(model)
        >>> x = jnp.ones((5, 3))
        >>> bool(jnp.allclose(linear(params, x), model(x), atol=1e-6))
        True
        >>> moved = jax.tree.map(lambda p: p + 0.1, params)
        >>> linear(moved, x).shape
        (5, 1)
    """
    return _expansion(model, 1, "linearize_model")


@shortened
def taylor_model(model: Model, degree: int = 2) -> tuple[Callable, Any]:
    """Return the Taylor expansion of a model in its parameters, to any degree.

    The derivatives are those along the line from the model's parameters to the given ones, by forward
    mode inside forward mode: degree k costs about 2ᵏ calls of the model.

    Args:
        model: a Module, ``(fn, params)``, or ``(module, params)``.
        degree: 0 or more.

    Returns:
        ``fn, params``, see `linearize_model`.

    Raises:
        ValueError: for a degree that is no whole number, or negative.

    Example:
        >>> fn, params = nn.curvature.taylor_model(
        ...     (lambda p, x: p["w"] ** 2 * x, {"w": jnp.array(3.0)})
        ... )
        >>> float(fn({"w": jnp.array(5.0)}, jnp.array(1.0)))  # of degree 2 itself: exact
        25.0
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
        raise ValueError(
            explain(
                f"taylor_model was given degree={degree!r}",
                "it is the highest power of the parameters' change",
                "degree=1 for the linear model, 2 for the quadratic one",
            )
        )
    return _expansion(model, degree, "taylor_model")


def _expansion(model: Model, degree: int, function: str) -> tuple[Callable, Any]:
    fn, center = pure(model, function)

    def expansion(params: PyTree, /, *inputs: Any, **kwargs: Any) -> Any:
        _check_same(params, center, function)
        step = jax.tree.map(lambda p, c: p - c, params, center)
        along: Any = lambda p: (fn(p, *inputs, **kwargs),)
        for _ in range(degree):
            along = _with_derivative(along, step)
        terms = along(center)
        total = terms[0]
        for k, term in enumerate(terms[1:], 1):
            total = jax.tree.map(lambda t, d, k=k: t + d / math.factorial(k), total, term)
        return total

    name = getattr(fn, "__name__", type(fn).__name__)
    expansion.__name__ = expansion.__qualname__ = f"{function}({name})"
    return expansion, center


def _with_derivative(terms_of: Callable, step: PyTree) -> Callable:
    """Return (f, f', ..., f⁽ᵏ⁺¹⁾) along a step from (f, f', ..., f⁽ᵏ⁾)."""

    def more(p: PyTree) -> tuple:
        terms, derivatives = jax.jvp(terms_of, (p,), (step,))
        return (*terms, derivatives[-1])

    return more


def _check_same(params: PyTree, center: PyTree, function: str) -> None:
    have = {path_name(k): v.shape for k, v in jax.tree_util.tree_leaves_with_path(center)}
    given = {
        path_name(k): getattr(v, "shape", None)
        for k, v in jax.tree_util.tree_leaves_with_path(params)
    }
    if have == given and jax.tree.structure(params) == jax.tree.structure(center):
        return
    missing, unknown = [n for n in have if n not in given], [n for n in given if n not in have]
    other = [f"{n!r} {given[n]} for {have[n]}" for n in have if given.get(n, have[n]) != have[n]]
    parts = [f"missing {missing}"] * bool(missing) + [f"unknown {unknown}"] * bool(unknown) + other
    raise ShapeError(
        explain(
            f"the function of {function} was given other parameters than it expands around",
            "; ".join(parts) or "they form another tree",
            "start from the params that it was returned with",
        )
    )
