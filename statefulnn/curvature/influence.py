"""What single training examples do to a test loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from statefulnn.core.names import Filter
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._models import Model, check_choice
from statefulnn.curvature.matrices import (
    Loss,
    empirical_fisher,
    examples_jacobian,
    ggn,
    hessian,
)
from statefulnn.curvature.operators import Scalar

CURVATURES = {"ggn": ggn, "hessian": hessian, "empirical_fisher": empirical_fisher}


@shortened
def influence(
    model: Model,
    loss: Loss,
    train: Iterable[object],
    test: Iterable[object],
    *,
    damping: Scalar = 0.0,
    curvature: str = "ggn",
    each: bool = False,
    subset: Filter = "all",
    batch_size: int | None = None,
    tol: float | None = 1e-5,
    max_steps: int = 1000,
) -> jax.Array:
    """Return for each training example how much the test loss would rise if it had been left out.

    To first order that is ``∇L_test · (C + damping I)⁻¹ ∇ℓₙ / N``, where C is the curvature of the mean loss
    over the N training examples and ``∇ℓₙ`` the gradient of one. Positive examples help, negative ones harm:
    those with wrong labels are mostly among the lowest. It holds at a minimum of the training loss, penalty
    included: for a penalty ``λ/2 |θ|²`` on the mean loss, ``damping=λ``.

    Args:
        model: a trained Module, ``(fn, params)`` as `functionalize` returns it, or ``(module, params)``.
        loss: ``loss(outputs, targets) -> scalar``, the mean over a batch, such as ``F.cross_entropy``.
        train: a tuple ``(x, y)`` of N examples, or a list of batches.
        test: the same of M examples.
        damping: added to the curvature, which has to become positive definite.
        curvature: "ggn"; "hessian", which is that of theory, but positive definite at a minimum only; or
            "empirical_fisher".
        each: whether there is a score for each test example, and not one for their mean loss.
        subset, batch_size: as in `hessian`.
        tol, max_steps: of the conjugate gradients, see `LinearOperator.inverse`.

    Returns:
        ``(N,)``; or ``(M, N)`` with `each`.

    Raises:
        ConvergenceError: if the curvature is found to be not positive definite, or the tolerance is not
            reached; from compiled code as `LinearOperator.inverse`.
        ReductionError: if the loss of a batch is not the mean of its examples' losses, as with labels
            of -100 and class weights: no score of one example follows from it.
        ShapeError, StateWriteError, UnknownNameError: as `hessian`.

    Source: Koh and Liang 2017, "Understanding Black-box Predictions via Influence Functions",
    https://arxiv.org/abs/1703.04730, where the sign is the other one; Hampel 1974.

    Example:
        >>> x = jnp.array([[0.0], [1.0], [2.0], [3.0]])
        >>> y = jnp.array([[0.0], [1.0], [2.0], [6.0]])  # the last one is off the line
        >>> model = nn.Linear(1, 1)
        >>> model.weight.value, model.bias.value = jnp.array([[1.9]]), jnp.array([-0.6])
        >>> scores = nn.curvature.influence(model, F.mse_loss, (x, y), (x[:3], y[:3]))
        >>> int(scores.argmin())
        3
    """
    function = "influence"
    check_choice(curvature, tuple(CURVATURES), "curvature", function)
    kwargs: dict[str, Any] = {"subset": subset, "batch_size": batch_size}
    of_train = examples_jacobian(model, loss, train, subset, batch_size, function)
    of_test = examples_jacobian(model, loss, test, subset, batch_size, function)
    A = CURVATURES[curvature](model, loss, train, **kwargs).damped(damping)
    n, m = of_train.shape[0], of_test.shape[0]
    inverse = A.inverse(tol, max_steps)
    if each:
        return of_train.matmat(inverse.matmat(of_test.T.matmat(jnp.eye(m, dtype=A.dtype)))).T / n
    return (of_train @ (inverse @ (of_test.T @ jnp.full(m, 1 / m, A.dtype)))) / n
