"""Products of curvature matrices with vectors, without the matrices.

Each takes the arguments of a function as `primals`, the first of which is differentiated, and a vector
of its structure: for a Module a dict of name -> array. For many products at one point, compile the
function of the vector: ``jax.jit(lambda v: nn.func.hvp(loss, (params, x, y), v))``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from statefulnn.core.errors import ShapeError, explain
from statefulnn.core.tracebacks import shortened
from statefulnn.transforms.differentiate import Differentiation, function_name, real_scalar
from statefulnn.transforms.types import PyTree

Tree = TypeVar("Tree")

LIKELIHOODS = ("categorical", "bernoulli", "gaussian", "poisson", "empirical")


@shortened
def hvp(func: Callable, primals: tuple, vector: Tree) -> Tree:
    """Return the product of a loss's Hessian with a vector, forward over reverse.

    Args:
        func: the loss, ``func(*primals) -> scalar``.
        primals: its arguments; the first one is differentiated, a Module or any pytree of arrays.
        vector: of the first argument's structure; for a Module a dict of name -> array.

    Returns:
        the product, of the vector's structure.

    Raises:
        TypeError: if the loss is no scalar.

    Source: Pearlmutter 1994, Fast exact multiplication by the Hessian.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> nn.func.hvp(lambda x: (x**3).sum(), (jnp.arange(3.0),), jnp.ones(3)).tolist()
        [0.0, 6.0, 12.0]
    """
    call = _differentiated(func, primals, real_scalar(func))
    gradient = jax.grad(call, has_aux=True)
    given = call.take(vector, "a vector")
    _, product, effects = jax.jvp(gradient, (call.values,), (given,), has_aux=True)
    call.finish(effects)
    return call.show(product)


@shortened
def ggn_vp(func: Callable, loss: Callable, primals: tuple, vector: Tree) -> Tree:
    """Return the product of the generalised Gauss-Newton matrix ``J' H J`` with a vector.

    J is the Jacobian of `func`, H the Hessian of `loss` by the outputs. For a convex loss the matrix is
    positive semi-definite, which the Hessian of the whole is not.

    Args:
        func: the model, ``func(*primals) -> outputs``.
        loss: ``loss(outputs) -> scalar``.
        primals: its arguments; the first one is differentiated, a Module or any pytree of arrays.
        vector: of the first argument's structure; for a Module a dict of name -> array.

    Returns:
        the product, of the vector's structure.

    Raises:
        TypeError: if the loss is no scalar, or a module has backward hooks.

    Source: Schraudolph 2002, Fast curvature matrix-vector products for second-order gradient descent.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> square = lambda out: (out**2).sum() / 2
        >>> nn.func.ggn_vp(
        ...     lambda w, x: x @ w, square, (jnp.ones(2), jnp.eye(2)), jnp.ones(2)
        ... ).tolist()
        [1.0, 1.0]
    """
    scalar = real_scalar(loss)

    def curvature(out: PyTree, tangent: PyTree) -> Any:
        return jax.jvp(jax.grad(lambda o: scalar(loss(o))), (out,), (tangent,))[1]

    return _sandwich(func, primals, vector, curvature)


@shortened
def fisher_vp(
    func: Callable, primals: tuple, vector: Tree, likelihood: str = "categorical"
) -> Tree:
    """Return the product of the Fisher information matrix with a vector, averaged over examples.

    Args:
        func: the model, ``func(*primals) -> (N, C)`` natural parameters of each example: logits
            ("categorical", "bernoulli"), means of unit variance ("gaussian"), logarithms of rates
            ("poisson"). For "empirical" it returns the log-likelihood (or loss) of each example, ``(N,)``.
        primals: its arguments; the first one is differentiated, a Module or any pytree of arrays.
        vector: of the first argument's structure; for a Module a dict of name -> array.
        likelihood: "categorical", "bernoulli", "gaussian" or "poisson": the Fisher matrix, with the
            expectation over the model's own predictions; "empirical": the mean of ``g g'`` over the
            gradients of the examples, which is another matrix (Kunstner et al. 2019).

    Returns:
        the product, of the vector's structure.

    Raises:
        ShapeError: if the output has not the shape above.
        TypeError: if a module has backward hooks.

    Source: Amari 1998, Natural gradient works efficiently in learning; Martens 2020.

    Example:
        >>> import jax.numpy as jnp, statefulnn as nn
        >>> model = lambda w, x: x @ w
        >>> nn.func.fisher_vp(
        ...     model, (jnp.ones((2, 1)), jnp.eye(2)), jnp.ones((2, 1)), "gaussian"
        ... ).tolist()
        [[0.5], [0.5]]
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"fisher_vp: likelihood must be one of {LIKELIHOODS}, got {likelihood!r}")

    def curvature(out: PyTree, tangent: PyTree) -> Any:
        rank = 1 if likelihood == "empirical" else 2
        if jnp.ndim(out) != rank:
            raise ShapeError(
                explain(
                    f"{function_name(func)} returned shape {jnp.shape(out)} to "
                    f"fisher_vp(likelihood={likelihood!r})",
                    "the matrix is an average over examples, which are the first axis",
                    "return the log-likelihood of each example, (N,)"
                    if rank == 1
                    else "return one row of parameters an example, (N, C)",
                )
            )
        if likelihood == "categorical":
            p = jax.nn.softmax(out)
            tangent = p * (tangent - (p * tangent).sum(-1, keepdims=True))
        elif likelihood == "bernoulli":
            p = jax.nn.sigmoid(out)
            tangent = p * (1 - p) * tangent
        elif likelihood == "poisson":
            tangent = jnp.exp(out) * tangent
        return tangent / max(1, out.shape[0])

    return _sandwich(func, primals, vector, curvature)


def _differentiated(
    func: Callable, primals: object, view: Callable = lambda out: out
) -> Differentiation:
    if not isinstance(primals, (tuple, list)):
        raise TypeError(
            explain(
                f"called with primals of type {type(primals).__name__}",
                f"they are the arguments of {function_name(func)}, the first one is differentiated",
                "pass a tuple: (params, x, y), or (params,)",
            )
        )
    return Differentiation(func, tuple(primals), {}, 0, view=view)


def _sandwich(func: Callable, primals: tuple, vector: PyTree, curvature: Callable) -> Any:
    """Return ``J' B J v``: B, given by its product, between the Jacobian and its transpose."""
    call = _differentiated(func, primals)
    call.refuse_hooks()
    given = call.take(vector, "a vector")
    out, pushforward, effects = jax.linearize(call, call.values, has_aux=True)
    (product,) = jax.linear_transpose(pushforward, call.values)(curvature(out, pushforward(given)))
    call.finish(effects)
    return call.show(product)
