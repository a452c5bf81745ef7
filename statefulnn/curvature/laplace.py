"""The Laplace approximation: a Gaussian over parameters from the curvature at trained ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from statefulnn.core.errors import MissingRngError, explain
from statefulnn.core.generator import as_key
from statefulnn.curvature._blocks import fold_blocks, map_blocks
from statefulnn.curvature._laplace_parts import (
    Subset,
    check_positive,
    check_targets,
    chosen_names,
    likelihood_of,
    parts,
    triangle,
)
from statefulnn.curvature._models import (
    Model,
    at_least_one,
    check_batch_size,
    check_choice,
    check_finite,
    inputs_of,
    number_of_examples,
    one_output,
    pure,
    wide,
)

LIKELIHOODS = ("regression", "classification")
STRUCTURES = ("full", "diag")


def _field(static: bool = False) -> Any:
    return dataclasses.field(metadata={"static": static})


def _curvature(
    outputs_of: Callable[[Any, tuple], Any],
    flat: Any,
    data: tuple,
    likelihood: str,
    structure: str,
    batch_size: int | None,
) -> tuple[Any, Any, Any]:
    """Return the log-likelihood of the data, and eigenvalues and eigenvectors of the GGN.

    Args:
        outputs_of: the outputs of one example as a function of the flat parameters and its inputs.
        flat: the parameters, (P,).
        data: inputs and targets.
        likelihood, structure, batch_size: as in `Laplace.fit`.
    """
    dtype = wide(flat.dtype)

    def one_example(inputs: tuple, target: Any) -> tuple[Any, Any]:
        out, pull = jax.vjp(lambda flat: outputs_of(flat, inputs), flat)
        score, root = likelihood_of(out.astype(dtype), target, likelihood)
        return score, jax.vmap(lambda r: pull(r.astype(out.dtype))[0])(root.T).astype(dtype)

    def block(data: tuple) -> tuple[Any, None]:
        scores, rows = jax.vmap(one_example)(*data)  # (B,), (B, C, P)
        rows = rows.reshape(-1, rows.shape[-1])
        if structure == "diag":
            return (scores.sum(), jnp.sum(jnp.square(rows), axis=0)), None
        return (scores.sum(), triangle(rows)), None

    def combine(one: tuple, two: tuple) -> tuple:
        if structure == "diag":
            return one[0] + two[0], one[1] + two[1]
        return one[0] + two[0], triangle(jnp.concatenate([one[1], two[1]]))

    @jax.jit
    def compute(data: tuple) -> tuple[Any, Any, Any]:
        score, curvature = fold_blocks(block, combine, data, batch_size)[0]
        if structure == "diag":
            return score, curvature, None
        _, roots, vectors = jnp.linalg.svd(curvature)
        return score, jnp.square(roots), vectors.T

    return compute(data)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Laplace:
    """A Gaussian posterior over the parameters of a trained model.

    The prior is ``N(0, I / prior_precision)``; the posterior is ``N(θ, (H / σ² + prior_precision I)⁻¹)``,
    with θ the trained parameters and H the generalised Gauss-Newton matrix (GGN) of the data,
    ``Σₙ Jₙᵀ Λₙ Jₙ``: J the Jacobian of the outputs of an example, Λ the curvature of its negative
    log-likelihood by the outputs, the identity for regression (with the noise σ put apart) and
    ``diag(p) - p pᵀ`` for a softmax. H is kept by its eigenvalues, so that other hyperparameters cost
    nothing.

    Made by `Laplace.fit`. It is a pytree: compiled functions take and return it.

    Attributes:
        params: all parameters, trained ones.
        eigenvalues: ``(P,)``, of the GGN; with ``structure="diag"`` its diagonal.
        eigenvectors: ``(P, P)``, in columns; None with ``structure="diag"``.
        log_likelihood: of the data; for regression the sum of squared errors in its place.
        prior_precision: a scalar.
        sigma: standard deviation of the noise, a scalar; 1 for classification.
        fn: the model as a pure function.
        likelihood: "regression" or "classification".
        names: the parameters that are random, in order; None for all of them.
        numbers: how many outputs the data have together, N · C.

    Source: MacKay 1992, "A Practical Bayesian Framework for Backpropagation Networks"; Daxberger et al.
    2021, "Laplace Redux", https://arxiv.org/abs/2106.14806; for predictions by the linearised model,
    Immer, Korzepa, Bauer 2021, https://arxiv.org/abs/2008.08400.

    Example:
        >>> x = jnp.linspace(0.0, 1.0, 20)[:, None]
        >>> y = 2 * x + 0.1 * jax.random.normal(jax.random.key(0), x.shape)
        >>> model = nn.Linear(1, 1)
        >>> model.weight.value, model.bias.value = jnp.array([[2.0]]), jnp.array([0.0])
        >>> posterior = nn.curvature.Laplace.fit(model, x, y, likelihood="regression")
        >>> posterior = posterior.maximize_evidence()
        >>> 0.05 < float(posterior.sigma) < 0.2
        True
        >>> mean, variance = posterior.predict(jnp.array([[0.5], [50.0]]))
        >>> bool(variance[1, 0] > variance[0, 0])
        True
    """

    params: Any = _field()
    eigenvalues: Any = _field()
    eigenvectors: Any = _field()
    log_likelihood: Any = _field()
    prior_precision: Any = _field()
    sigma: Any = _field()
    fn: Callable = _field(static=True)
    likelihood: str = _field(static=True)
    names: tuple[str, ...] | None = _field(static=True)
    numbers: int = _field(static=True)

    @classmethod
    def fit(
        cls,
        model: Model,
        x: Any,
        y: Any,
        *,
        likelihood: str,
        structure: str = "full",
        subset: Subset = "all",
        prior_precision: Any = 1.0,
        sigma: Any = 1.0,
        batch_size: int | None = None,
    ) -> Laplace:
        """Compute the curvature of a trained model on its data.

        Args:
            model: a Module, ``(fn, params)`` as `functionalize` returns it, or ``(module, params)``;
                trained, with a penalty that fits the prior.
            x: inputs ``(N, ...)``, or a tuple of arrays for a model of several inputs.
            y: targets ``(N, C)`` for regression, labels ``(N,)`` of integers for classification.
            likelihood: "regression" or "classification".
            structure: "full" for the whole matrix, P x P, whose eigenvectors take P³ operations, or
                "diag" for its diagonal.
            subset: which parameters are random: "all"; "last_layer", those of the submodule that owns
                the last one (of a Module, since arrays by name have no order); names; or a function of
                a name.
            prior_precision: a positive number; `maximize_evidence` finds one.
            sigma: a positive number, the standard deviation of the noise of a regression.
            batch_size: how many examples' Jacobians, (C, P), are in memory at once; None for all.

        Raises:
            ValueError: for an unknown likelihood or structure, or hyperparameters that are not
                positive; for labels outside the outputs (checked outside of compiled code).
            ShapeError: if targets and outputs do not fit each other.
            UnknownNameError: if the subset names parameters that are not there, or none.
            FloatingPointError: if outputs or curvature are not finite (checked outside of compiled
                code).
            StateWriteError: if the model writes state: use ``module.eval()``.
        """
        function = "Laplace.fit"
        check_choice(likelihood, LIKELIHOODS, "likelihood", function)
        check_choice(structure, STRUCTURES, "structure", function)
        check_batch_size(batch_size, function)
        for value, option in ((prior_precision, "prior_precision"), (sigma, "sigma")):
            check_positive(value, option, function)
        fn, params = pure(model, function)
        names = chosen_names(model, params, subset, function)
        data = (jax.tree.map(jnp.asarray, inputs_of(x)), jnp.asarray(y))
        n = number_of_examples(data, function)
        at_least_one(n, function)
        single = one_output(fn, function)
        outputs = jax.eval_shape(
            single,
            params,
            jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), data[0]),
        )
        check_targets(data[1], outputs.shape[0], likelihood, function)
        chosen, rest, with_rest = parts(params, names)
        flat, unravel = ravel_pytree(chosen)
        dtype = wide(flat.dtype)

        def outputs_of(flat: Any, inputs: tuple) -> Any:
            return single(with_rest(unravel(flat), rest), inputs)

        score, values, vectors = _curvature(
            outputs_of, flat, data, likelihood, structure, batch_size
        )
        check_finite(
            (score, values),
            f"{function} got outputs or curvature that are not finite",
            "a Gaussian cannot be made of them",
            "check the parameters and the data: jnp.isfinite(fn(params, x)).all()",
        )
        return cls(
            params=params,
            eigenvalues=values,
            eigenvectors=vectors,
            log_likelihood=score,
            prior_precision=jnp.asarray(prior_precision, dtype),
            sigma=jnp.asarray(sigma, dtype),
            fn=fn,
            likelihood=likelihood,
            names=names,
            numbers=n * outputs.shape[0],
        )

    def log_marginal_likelihood(
        self, log_prior_precision: Any = None, log_sigma: Any = None
    ) -> Any:
        """Return the logarithm of the evidence, to be differentiated by its arguments.

        ``log p(y | θ, σ) - prior_precision |θ|² / 2 + P/2 log prior_precision
        - ½ log det(H / σ² + prior_precision I)``

        Args:
            log_prior_precision: a scalar; None for that of this posterior.
            log_sigma: a scalar, for regression; None for that of this posterior.

        Returns:
            a scalar.

        Raises:
            ValueError: for `log_sigma` with classification.

        Example:
            >>> x, y = jnp.ones((4, 1)), jnp.zeros((4, 1))
            >>> posterior = nn.curvature.Laplace.fit(nn.Linear(1, 1), x, y, likelihood="regression")
            >>> slopes = jax.grad(posterior.log_marginal_likelihood, argnums=(0, 1))(0.0, 0.0)
            >>> [slope.shape for slope in slopes]
            [(), ()]
        """
        if log_sigma is not None and self.likelihood != "regression":
            raise ValueError(
                explain(
                    "log_marginal_likelihood was given log_sigma for a classification",
                    "labels have no Gaussian noise",
                    "log_marginal_likelihood(log_prior_precision)",
                )
            )
        dtype = self.eigenvalues.dtype

        def given(value: Any, own: Any) -> Any:
            return jnp.log(own) if value is None else jnp.asarray(value, dtype)

        log_precision = given(log_prior_precision, self.prior_precision)
        log_noise = given(log_sigma, self.sigma)
        precision = jnp.exp(log_precision)
        posterior = self.eigenvalues * jnp.exp(-2 * log_noise) + precision
        occam = jnp.sum(log_precision - jnp.log(posterior)) / 2
        return self._log_likelihood(log_noise) - precision * self._squared_norm() / 2 + occam

    def maximize_evidence(self, steps: int = 1000, tolerance: float = 1e-5) -> Laplace:
        """Return this posterior with the hyperparameters that maximise the marginal likelihood.

        MacKay's fixed point: with γ the number of parameters that the data determine,
        ``γ = Σ λᵢ/σ² / (λᵢ/σ² + prior_precision)``, the maximum has ``prior_precision = γ / |θ|²`` and
        ``σ² = Σ (y - f)² / (N C - γ)``.

        Args:
            steps: iterations at most.
            tolerance: it ends when no hyperparameter changes by more than this share of itself.

        Raises:
            FloatingPointError: if there is no maximum (checked outside of compiled code): for
                parameters that are all zero, or a model that fits its data exactly; or if `steps` do not
                suffice.

        Source: MacKay 1992, "Bayesian Interpolation", equations 4.8 to 4.10; Bishop 2006, "Pattern
        Recognition and Machine Learning", section 3.5.2.
        """

        def update(state: tuple) -> tuple:
            precision, sigma, _, step = state
            ratio = self.eigenvalues / sigma**2
            well_determined = jnp.sum(ratio / (ratio + precision))
            better = well_determined / self._squared_norm()
            noise = sigma
            if self.likelihood == "regression":
                noise = jnp.sqrt(-self.log_likelihood / (self.numbers - well_determined))
            change = jnp.maximum(jnp.abs(better / precision - 1), jnp.abs(noise / sigma - 1))
            return better, noise, change, step + 1

        def unfinished(state: tuple) -> Any:
            return (state[2] > tolerance) & (state[3] < steps)

        start = (self.prior_precision, self.sigma, jnp.full_like(self.sigma, jnp.inf), 0)
        precision, sigma, change, _ = jax.lax.while_loop(unfinished, update, start)
        check_finite(
            (jnp.log(precision), jnp.log(sigma), jnp.where(change > tolerance, jnp.inf, change)),
            f"maximize_evidence did not arrive within {steps} steps",
            "it has no maximum where the parameters are all zero or the data are fitted exactly, and "
            "float32 may not allow the tolerance",
            "train the model, or pass more steps or a larger tolerance",
        )
        return dataclasses.replace(self, prior_precision=precision, sigma=sigma)

    def functional(self, x: Any, *, batch_size: int | None = None) -> tuple[Any, Any]:
        """Return mean and covariance of the outputs, under the linearised model.

        Args:
            x: inputs ``(M, ...)``, or a tuple of arrays.
            batch_size: how many examples' Jacobians, (C, P), are in memory at once; None for all.

        Returns:
            mean ``(M, C)``, that of the trained model, and covariance ``(M, C, C)``,
            ``J (H / σ² + prior_precision I)⁻¹ Jᵀ``, without the noise of the data.
        """

        def of_block(mean: Any, rows: Any) -> tuple[Any, Any]:
            scaled = rows * jnp.sqrt(self._variances())
            return mean, jnp.einsum("mcp,mdp->mcd", scaled, scaled, precision="highest")

        return self._on_examples(x, of_block, batch_size, "Laplace.functional")

    def predict(self, x: Any, *, batch_size: int | None = None) -> tuple[Any, Any]:
        """Return mean and variance of the targets of a regression, under the linearised model.

        Args:
            x: inputs ``(M, ...)``, or a tuple of arrays.
            batch_size: how many examples' Jacobians are in memory at once; None for all.

        Returns:
            mean ``(M, C)`` and variance ``(M, C)``, the noise σ² included.

        Raises:
            ValueError: for a classification, which has `predict_proba`.
        """
        self._require("regression", "predict", "predict_proba")
        mean, covariance = self.functional(x, batch_size=batch_size)
        return mean, jnp.diagonal(covariance, axis1=1, axis2=2) + self.sigma**2

    def predict_proba(
        self,
        x: Any,
        *,
        link: str = "probit",
        samples: int = 100,
        rng: Any = None,
        batch_size: int | None = None,
    ) -> Any:
        """Return the probabilities of the classes, under the linearised model.

        Args:
            x: inputs ``(M, ...)``, or a tuple of arrays.
            link: "probit" for the softmax of the mean over ``√(1 + π/8 variance)``, an approximation
                that costs nothing, or "mc" for the average of softmaxes of draws of the outputs.
            samples: the number of draws.
            rng: a random key, for the draws.
            batch_size: how many examples' Jacobians are in memory at once; None for all.

        Returns:
            ``(M, C)``; rows sum to one.

        Raises:
            ValueError: for a regression, which has `predict`; for an unknown link.
            MissingRngError: for ``link="mc"`` without `rng`.

        Source: probit: MacKay 1992, "The Evidence Framework Applied to Classification Networks", for
        two classes; Daxberger et al. 2021, https://arxiv.org/abs/2106.14806, for several.
        """
        self._require("classification", "predict_proba", "predict")
        check_choice(link, ("probit", "mc"), "link", "predict_proba")
        if link == "probit":
            mean, covariance = self.functional(x, batch_size=batch_size)
            variance = jnp.diagonal(covariance, axis1=1, axis2=2)
            return jax.nn.softmax(mean / jnp.sqrt(1 + math.pi / 8 * variance))
        draws = self._draws(rng, samples, "predict_proba(link='mc')")

        def of_block(mean: Any, rows: Any) -> Any:
            moves = jnp.einsum("mcp,sp->smc", rows, draws, precision="highest")
            return jax.nn.softmax(mean + moves).mean(0)

        return self._on_examples(x, of_block, batch_size, "Laplace.predict_proba")

    def sample(self, rng: Any, samples: int = 1) -> Any:
        """Draw parameters from the posterior.

        Args:
            rng: a random key.
            samples: how many.

        Returns:
            all parameters, as `fn` takes them, with a leading axis of length `samples`, also on those
            that are not random.

        Example:
            >>> posterior = nn.curvature.Laplace.fit(
            ...     nn.Linear(2, 1), jnp.ones((4, 2)), jnp.ones((4, 1)), likelihood="regression"
            ... )
            >>> drawn = posterior.sample(jax.random.key(0), 5)
            >>> jax.vmap(posterior.fn, in_axes=(0, None))(drawn, jnp.ones((3, 2))).shape
            (5, 3, 1)
        """
        moves = self._draws(rng, samples, "Laplace.sample")
        if self.eigenvectors is not None:
            moves = moves @ self.eigenvectors.T
        chosen, rest, with_rest = parts(self.params, self.names)
        flat, unravel = ravel_pytree(chosen)
        drawn = jax.vmap(unravel)((flat.astype(moves.dtype) + moves).astype(flat.dtype))
        repeated = jax.tree.map(lambda p: jnp.broadcast_to(p, (samples, *p.shape)), rest)
        return with_rest(drawn, repeated)

    def covariance(self) -> Any:
        """Return the posterior covariance of the parameters, ``(P, P)``, or its diagonal ``(P,)``.

        The order of the parameters is that of ``jax.flatten_util.ravel_pytree``.
        """
        if self.eigenvectors is None:
            return self._variances()
        scaled = self.eigenvectors * jnp.sqrt(self._variances())
        return jnp.matmul(scaled, scaled.T, precision="highest")

    def _variances(self) -> Any:
        """Return the posterior variances along the eigenvectors, (P,)."""
        return 1 / (self.eigenvalues / self.sigma**2 + self.prior_precision)

    def _draws(self, rng: Any, samples: int, function: str) -> Any:
        """Draw changes of the parameters in coordinates of the eigenvectors, (samples, P)."""
        if rng is None:
            raise MissingRngError(
                explain(
                    f"called {function} without rng",
                    "it draws from the posterior",
                    "pass rng=jax.random.key(0), or another key",
                )
            )
        if samples < 1:
            raise ValueError(
                explain(
                    f"{function} was given samples={samples}", "it draws that many", "samples=100"
                )
            )
        key = as_key(rng)
        values = self.eigenvalues
        noise = jax.random.normal(key, (samples, *values.shape), values.dtype)
        return noise * jnp.sqrt(self._variances())

    def _squared_norm(self) -> Any:
        flat = ravel_pytree(parts(self.params, self.names)[0])[0]
        return jnp.sum(jnp.square(flat.astype(self.eigenvalues.dtype)))

    def _log_likelihood(self, log_sigma: Any) -> Any:
        if self.likelihood == "classification":
            return self.log_likelihood
        fit = self.log_likelihood * jnp.exp(-2 * log_sigma) / 2
        return fit - self.numbers * (log_sigma + math.log(2 * math.pi) / 2)

    def _on_examples(self, x: Any, function: Callable, size: int | None, name: str) -> Any:
        """Map a function of means (M, C) and Jacobian rows in eigenvectors (M, C, P) over blocks."""
        check_batch_size(size, name)
        inputs = jax.tree.map(jnp.asarray, inputs_of(x))
        at_least_one(number_of_examples(inputs, name), name)
        single = one_output(self.fn, name)
        chosen, rest, with_rest = parts(self.params, self.names)
        flat, unravel = ravel_pytree(chosen)
        dtype = self.eigenvalues.dtype

        def one_example(inputs: tuple) -> tuple[Any, Any]:
            def outputs_of(flat: Any) -> Any:
                return single(with_rest(unravel(flat), rest), inputs)

            out, pull = jax.vjp(outputs_of, flat)
            rows = jax.vmap(lambda r: pull(r)[0])(jnp.eye(out.size, dtype=out.dtype))
            return out.astype(dtype), rows.astype(dtype)

        def block(inputs: tuple) -> Any:
            mean, rows = jax.vmap(one_example)(inputs)
            if self.eigenvectors is not None:
                rows = jnp.matmul(rows, self.eigenvectors, precision="highest")
            return function(mean, rows)

        return map_blocks(block, inputs, size)

    def _require(self, likelihood: str, method: str, other: str) -> None:
        if self.likelihood != likelihood:
            raise ValueError(
                explain(
                    f"called {method} of a Laplace posterior for {self.likelihood}",
                    f"it is for {likelihood}",
                    f"posterior.{other}(x)",
                )
            )
