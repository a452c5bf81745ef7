"""The Laplace approximation: a Gaussian over parameters from the curvature at trained ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from statefulnn.core.compat import Tracer
from statefulnn.core.errors import MissingRngError, explain
from statefulnn.core.generator import as_key
from statefulnn.core.tracebacks import shortened
from statefulnn.curvature._blocks import fold_blocks, map_blocks
from statefulnn.curvature._gaussians import gaussian
from statefulnn.curvature._kron import find_blocks, kron_curvature
from statefulnn.curvature._laplace_parts import (
    Likelihood,
    Subset,
    check_targets,
    chosen_names,
    module_in,
    parts,
    triangle,
)
from statefulnn.curvature._laplace_state import from_state, state_of
from statefulnn.curvature._lowrank import lowrank_curvature
from statefulnn.curvature._models import (
    Model,
    at_least_one,
    check_batch_size,
    check_choice,
    check_finite,
    checked_output,
    inputs_of,
    number_of_examples,
    one_output,
    pure,
    wide,
)
from statefulnn.curvature._priors import (
    Groups,
    as_arrays,
    check_positive,
    check_prior,
    groups_of,
    squares,
)
from statefulnn.curvature.operators import Scalar, check_count
from statefulnn.transforms.types import PyTree

LIKELIHOODS = ("regression", "classification")
STRUCTURES = ("full", "kron", "diag", "lowrank")


def _field(static: bool = False) -> Any:
    return dataclasses.field(metadata={"static": static})


def _curvature(
    outputs_of: Callable[[Any, tuple], Any],
    flat: jax.Array,
    data: tuple,
    likelihood: Likelihood,
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

    def one_example(inputs: tuple, target: jax.Array) -> tuple[Any, Any]:
        out, pull = jax.vjp(lambda flat: outputs_of(flat, inputs), flat)
        score, root = likelihood.of(out.astype(dtype), target)
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

    The prior is ``N(0, I / prior_precision)``, or has its own precision for each group of parameters; the
    posterior is ``N(θ, (H / σ² + prior_precision I)⁻¹)``,
    with θ the trained parameters and H the generalised Gauss-Newton matrix (GGN) of the data,
    ``Σₙ Jₙᵀ Λₙ Jₙ``: J the Jacobian of the outputs of an example, Λ the curvature of its negative
    log-likelihood by the outputs, the identity for regression (with the noise σ put apart) and
    ``diag(p) - p pᵀ`` for a softmax. H is kept by its eigenvalues, so that other hyperparameters cost
    little.

    Made by `Laplace.fit`. It is a pytree: compiled functions take and return it. ``nn.save`` writes it, and
    `from_state_dict` makes it of what ``nn.load`` returns.

    Attributes:
        params: all parameters, trained ones.
        eigenvalues: ``(P,)``, of the GGN; with ``structure="diag"`` its diagonal; with
            ``structure="lowrank"`` the largest, ``(rank,)``.
        eigenvectors: ``(P, P)`` or ``(P, rank)``, in columns; None with ``structure="diag"``; with
            ``structure="kron"`` a pair for each parameter, see `Laplace.fit`.
        log_likelihood: of the data; for regression minus the sum of squared errors in its place.
        prior_precision: a scalar; ``(L,)``, one for each random array; or a dict of name or pattern ->
            scalar.
        sigma: standard deviation of the noise, a scalar; 1 for classification.
        fn: the model as a pure function.
        likelihood: "regression" or "classification".
        names: the parameters that are random, in order; None for all of them.
        numbers: how many outputs the data have together, N · C.
        structure: "full", "kron", "diag" or "lowrank".
        outputs: the shape in which the outputs of an example are seen: ``(C,)``, or ``(T, C)``.

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
    structure: str = _field(static=True)
    outputs: tuple[int, ...] = _field(static=True)

    @classmethod
    @shortened
    def fit(
        cls,
        model: Model,
        x: object,
        y: ArrayLike,
        *,
        likelihood: str,
        structure: str = "full",
        subset: Subset = "all",
        prior_precision: ArrayLike | Mapping[str, ArrayLike] = 1.0,
        sigma: Scalar = 1.0,
        batch_size: int | None = None,
        rank: int = 20,
    ) -> Laplace:
        """Compute the curvature of a trained model on its data.

        Args:
            model: a Module, ``(fn, params)`` as `functionalize` returns it, or ``(module, params)``;
                trained, with a penalty that fits the prior.
            x: inputs ``(N, ...)``, or a tuple of arrays for a model of several inputs.
            y: targets ``(N, C)`` for regression, labels ``(N,)`` of integers for classification. Where an
                example has several data, as a text with a label for each token has, ``(N, T)`` with outputs
                ``(N, T, C)``: each token is a datum, and a label of -100 is none, as in torch.
            likelihood: "regression" or "classification".
            structure: "full" for the whole matrix, P x P, whose eigenvectors take P³ operations; "diag" for
                its diagonal; "kron" (of a Module) for a block of each parameter, ``A ⊗ B`` for the weights
                of Linear, Conv and Embedding, whole for others of up to 1,024 numbers (biases, norms) and
                diagonal for larger ones; or "lowrank" for its largest eigenvalues, from ``4 rank + 40``
                products with vectors, which are in memory at once.
            subset: which parameters are random: "all"; "last_layer", those of the submodule that owns
                the last one (of a Module, since arrays by name have no order); names and patterns, such as
                ``"lora_*"`` or ``"head.*"``; or a function of a name.
            prior_precision: a positive number; one for each random array, ``(L,)``, in the order of their
                sorted names; or a dict of name or pattern -> number, where the longest that fits counts:
                ``{"*": 1.0, "head.*": 0.1}``. `maximize_evidence` finds them.
            sigma: a positive number, the standard deviation of the noise of a regression; it stays 1 for
                classification.
            batch_size: how many examples' Jacobians, (C, P), are in memory at once; None for all.
            rank: the number of eigenvalues, a whole number, for ``structure="lowrank"``.

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
        check_prior(prior_precision, function)
        check_positive(sigma, "sigma", function)
        check_count(rank, 1, "rank", function)
        if likelihood == "classification" and (isinstance(sigma, Tracer) or float(sigma) != 1):
            raise ValueError(
                explain(
                    f"{function} was given sigma={sigma!r} for a classification",
                    "it is the noise of a regression; labels have none",
                    'leave it out, or likelihood="regression"',
                )
            )
        fn, params = pure(model, function)
        names = chosen_names(model, params, subset, function)
        data = (jax.tree.map(jnp.asarray, inputs_of(x)), jnp.asarray(y))
        n = number_of_examples(data, function)
        at_least_one(n, function)
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), data[0])
        shape = checked_output(jax.eval_shape(fn, params, *one), function).shape[1:]
        seen = Likelihood(likelihood, check_targets(data[1], shape, likelihood, function))
        chosen, rest, with_rest = parts(params, names)
        flat, unravel = ravel_pytree(chosen)
        dtype = wide(flat.dtype)
        groups_of(chosen, prior_precision, function)  # checks its form

        if structure == "kron":
            example = jax.tree.map(lambda a: a[0], data[0])
            module = module_in(model, f"{function}(structure='kron')")
            blocks = find_blocks(module, params, chosen, example)
            found = kron_curvature(blocks, params, data, seen, batch_size, function)
        else:
            single = one_output(fn, function)
            outputs_of = lambda flat, inputs: single(with_rest(unravel(flat), rest), inputs)
            if structure == "lowrank":
                found = lowrank_curvature(outputs_of, flat, data, seen, rank, batch_size)
            else:
                found = _curvature(outputs_of, flat, data, seen, structure, batch_size)
        score, values, vectors = found
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
            prior_precision=as_arrays(prior_precision, dtype),
            sigma=jnp.asarray(sigma, dtype),
            fn=fn,
            likelihood=likelihood,
            names=names,
            numbers=n * math.prod(seen.shape),
            structure=structure,
            outputs=seen.shape,
        )

    @shortened
    def log_marginal_likelihood(
        self, log_prior_precision: ArrayLike | None = None, log_sigma: ArrayLike | None = None
    ) -> jax.Array:
        """Return the logarithm of the evidence, to be differentiated by its arguments.

        With D the diagonal of the prior precisions,
        ``log p(y | θ, σ) - θᵀ D θ / 2 + ½ log det D - ½ log det(H / σ² + D)``

        Args:
            log_prior_precision: a scalar, or an array or dict, as for `Laplace.fit`; None for that of this
                posterior.
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
        prior, log_noise = self.prior_precision, jnp.log(self.sigma)
        if log_prior_precision is not None:
            prior = jax.tree.map(jnp.exp, as_arrays(log_prior_precision, dtype))
        if log_sigma is not None:
            log_noise = jnp.asarray(log_sigma, dtype)
        groups = self._groups(prior, "log_marginal_likelihood")
        fit = jnp.vdot(groups.spread(prior), squares(self._random()))
        occam = self._gaussian(prior, jnp.exp(2 * log_noise), groups).log_ratio()
        return self._log_likelihood(log_noise) + (occam - fit) / 2

    @shortened
    def maximize_evidence(self, steps: int = 1000, tolerance: float = 1e-5) -> Laplace:
        """Return this posterior with the hyperparameters that maximise the marginal likelihood.

        MacKay's fixed point: with γ the number of parameters that the data determine,
        ``γ = Σ λᵢ/σ² / (λᵢ/σ² + prior_precision)``, the maximum has ``prior_precision = γ / |θ|²`` and
        ``σ² = Σ (y - f)² / (N C - γ)``. Several prior precisions have their own γ and |θ|² each.

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

        function = "maximize_evidence"
        groups = self._groups(self.prior_precision, function)
        norms = groups.collect(squares(self._random()))

        def update(state: tuple) -> tuple:
            prior, sigma, _, step = state
            determined = self._gaussian(prior, sigma**2, groups).determined()
            better = jax.tree.map(jnp.divide, groups.collect(determined), norms)
            noise = sigma
            if self.likelihood == "regression":
                noise = jnp.sqrt(-self.log_likelihood / (self.numbers - determined.sum()))
            changes = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a / b - 1)), better, prior)
            change = jnp.stack([*jax.tree.leaves(changes), jnp.abs(noise / sigma - 1)]).max()
            return better, noise, change, step + 1

        def unfinished(state: tuple) -> Any:
            return (state[2] > tolerance) & (state[3] < steps)

        start = (self.prior_precision, self.sigma, jnp.full_like(self.sigma, jnp.inf), 0)
        prior, sigma, change, _ = jax.lax.while_loop(unfinished, update, start)
        logs = jax.tree.map(jnp.log, (prior, sigma))
        check_finite(
            (logs, jnp.where(change > tolerance, jnp.inf, change)),
            f"{function} did not arrive within {steps} steps",
            "it has no maximum where the parameters are all zero or the data are fitted exactly, and "
            "float32 may not allow the tolerance",
            "train the model, or pass more steps or a larger tolerance",
        )
        return dataclasses.replace(self, prior_precision=prior, sigma=sigma)

    @shortened
    def functional(
        self, x: object, *, batch_size: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return mean and covariance of the outputs, under the linearised model.

        Args:
            x: inputs ``(M, ...)``, or a tuple of arrays.
            batch_size: how many examples' Jacobians, (C, P), are in memory at once; None for all.

        Returns:
            mean ``(M, C)``, that of the trained model, and covariance ``(M, C, C)``,
            ``J (H / σ² + prior_precision I)⁻¹ Jᵀ``, without the noise of the data. Where an example has
            several data, ``(M, T, C)`` and ``(M, T, C, C)``.
        """

        def of_block(mean: jax.Array, roots: jax.Array) -> tuple[Any, Any]:
            return mean, jnp.einsum("m...cp,m...dp->m...cd", roots, roots, precision="highest")

        return self._on_examples(x, of_block, batch_size, "Laplace.functional")

    @shortened
    def predict(self, x: object, *, batch_size: int | None = None) -> tuple[jax.Array, jax.Array]:
        """Return mean and variance of the targets of a regression, under the linearised model.

        Args:
            x: inputs ``(M, ...)``, or a tuple of arrays.
            batch_size: how many examples' Jacobians are in memory at once; None for all.

        Returns:
            mean and variance, ``(M, C)`` each or in the shape of several data, the noise σ² included.

        Raises:
            ValueError: for a classification, which has `predict_proba`.
        """
        self._require("regression", "predict", "predict_proba")
        mean, covariance = self.functional(x, batch_size=batch_size)
        return mean, jnp.diagonal(covariance, axis1=-2, axis2=-1) + self.sigma**2

    @shortened
    def predict_proba(
        self,
        x: object,
        *,
        link: str = "probit",
        samples: int = 100,
        rng: jax.Array | None = None,
        batch_size: int | None = None,
    ) -> jax.Array:
        """Return the probabilities of the classes, under the linearised model.

        Args:
            x: inputs ``(M, ...)``, or a tuple of arrays.
            link: "probit" for the softmax of the mean over ``√(1 + π/8 variance)``, an approximation
                that costs nothing, or "mc" for the average of softmaxes of draws of the outputs.
            samples: the number of draws.
            rng: a random key, for the draws.
            batch_size: how many examples' Jacobians are in memory at once; None for all.

        Returns:
            ``(M, C)``, or ``(M, T, C)``; rows sum to one.

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
            variance = jnp.diagonal(covariance, axis1=-2, axis2=-1)
            return jax.nn.softmax(mean / jnp.sqrt(1 + math.pi / 8 * variance))
        noise = self._noise(rng, samples, "predict_proba(link='mc')")

        def of_block(mean: jax.Array, roots: jax.Array) -> Any:
            moves = jnp.einsum("m...p,sp->sm...", roots, noise, precision="highest")
            return jax.nn.softmax(mean + moves).mean(0)

        return self._on_examples(x, of_block, batch_size, "Laplace.predict_proba")

    @shortened
    def functional_samples(
        self,
        x: object,
        *,
        rng: jax.Array | None = None,
        samples: int = 100,
        batch_size: int | None = None,
    ) -> jax.Array:
        """Draw functions: the outputs of the linearised model for parameters of the posterior.

        A draw is one function on all of `x`: its outputs vary together, as `functional` does not tell.
        No Jacobian is in memory.

        Args:
            x: inputs ``(M, ...)``, or a tuple of arrays.
            rng: a random key.
            samples: how many.
            batch_size: how many examples are computed at once; None for all.

        Returns:
            outputs ``(samples, M, C)``, or ``(samples, M, T, C)``, without the noise of the data.

        Raises:
            MissingRngError: without `rng`.

        Example:
            >>> x, y = jnp.linspace(0.0, 1.0, 6)[:, None], jnp.zeros((6, 1))
            >>> posterior = nn.curvature.Laplace.fit(nn.Linear(1, 1), x, y, likelihood="regression")
            >>> posterior.functional_samples(x, rng=jax.random.key(0), samples=5).shape
            (5, 6, 1)
        """
        function = "functional_samples"
        moves = self._moves(self._noise(rng, samples, function))
        outputs_of, flat = self._outputs_of(function)

        def block(inputs: tuple) -> Any:
            of_all = lambda flat: jax.vmap(outputs_of, (None, 0))(flat, inputs)
            mean, push = jax.linearize(of_all, flat)
            pushed = jax.vmap(lambda move: push(move.astype(flat.dtype)))(moves)
            drawn = mean.astype(moves.dtype) + pushed.astype(moves.dtype)
            return jnp.swapaxes(drawn.reshape(samples, -1, *self.outputs), 0, 1)

        check_batch_size(batch_size, function)
        return jnp.swapaxes(map_blocks(block, self._checked_inputs(x, function), batch_size), 0, 1)

    @shortened
    def sample(self, rng: jax.Array, samples: int = 1) -> Any:
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
        moves = self._moves(self._noise(rng, samples, "Laplace.sample"))
        chosen, rest, with_rest = parts(self.params, self.names)
        flat, unravel = ravel_pytree(chosen)
        drawn = jax.vmap(unravel)((flat.astype(moves.dtype) + moves).astype(flat.dtype))
        repeated = jax.tree.map(lambda p: jnp.broadcast_to(p, (samples, *p.shape)), rest)
        return with_rest(drawn, repeated)

    def covariance(self) -> jax.Array:
        """Return the posterior covariance of the parameters, ``(P, P)``, or its diagonal ``(P,)``.

        The order of the parameters is that of ``jax.flatten_util.ravel_pytree``. It is the diagonal for
        ``structure="diag"``.
        """
        form = self._own_gaussian()
        if self.structure == "diag":
            return form.variances()
        root = form.root(jnp.eye(self._size(), dtype=self.eigenvalues.dtype))
        return jnp.matmul(root, root.T, precision="highest")

    def state_dict(self) -> dict[str, jax.Array]:
        """Return the posterior as arrays and plain data by name, without the model's code.

        ``nn.save(posterior, path)`` writes it; see `from_state_dict`.
        """
        return state_of(self)

    @classmethod
    def from_state_dict(cls, model: Model, state: Mapping[str, ArrayLike]) -> Laplace:
        """Make a posterior of what `state_dict` returned.

        Args:
            model: as for `fit`, with any values: those of the posterior are in `state`.
            state: of `state_dict`, or of ``nn.load``.

        Raises:
            UnknownNameError: if the model has other parameters.
            ShapeError: if they have other shapes.

        Example:
            >>> import os, tempfile
            >>> x, y = jnp.ones((4, 2)), jnp.ones((4, 1))
            >>> posterior = nn.curvature.Laplace.fit(nn.Linear(2, 1), x, y, likelihood="regression")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     nn.save(posterior, os.path.join(folder, "posterior.safetensors"))
            ...     state = nn.load(os.path.join(folder, "posterior.safetensors"))
            >>> again = nn.curvature.Laplace.from_state_dict(nn.Linear(2, 1), state)
            >>> bool((again.predict(x)[1] == posterior.predict(x)[1]).all())
            True
        """
        fn, params = pure(model, "Laplace.from_state_dict")
        return cls(fn=fn, **from_state(params, state))

    def _random(self) -> Any:
        return parts(self.params, self.names)[0]

    def _size(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self._random()))

    def _groups(self, prior: ArrayLike | Mapping[str, Any], function: str) -> Groups:
        return groups_of(self._random(), prior, function)

    def _gaussian(self, prior: object, noise: ArrayLike, groups: Groups) -> Any:
        sizes = [leaf.size for leaf in jax.tree.leaves(self._random())]
        spread, scalar = groups.spread(prior), groups.keys is None
        return gaussian(self.eigenvalues, self.eigenvectors, sizes, noise, spread, scalar)

    def _own_gaussian(self) -> Any:
        groups = self._groups(self.prior_precision, "Laplace")
        return self._gaussian(self.prior_precision, self.sigma**2, groups)

    def _noise(self, rng: int | jax.Array | None, samples: int, function: str) -> Any:
        """Draw from the standard normal distribution, (samples, P)."""
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
        return jax.random.normal(as_key(rng), (samples, self._size()), self.eigenvalues.dtype)

    def _moves(self, noise: jax.Array) -> Any:
        """Return changes of the parameters, (samples, P)."""
        return self._own_gaussian().moves(noise)

    def _log_likelihood(self, log_sigma: ArrayLike) -> Any:
        if self.likelihood == "classification":
            return self.log_likelihood
        fit = self.log_likelihood * jnp.exp(-2 * log_sigma) / 2
        return fit - self.numbers * (log_sigma + math.log(2 * math.pi) / 2)

    def _outputs_of(self, function: str) -> tuple[Callable, Any]:
        """Return the flat outputs of an example as a function of the flat parameters, and these."""
        single = one_output(self.fn, function)
        chosen, rest, with_rest = parts(self.params, self.names)
        flat, unravel = ravel_pytree(chosen)
        return (lambda flat, inputs: single(with_rest(unravel(flat), rest), inputs)), flat

    def _checked_inputs(self, x: PyTree, function: str) -> tuple:
        inputs = jax.tree.map(jnp.asarray, inputs_of(x))
        at_least_one(number_of_examples(inputs, function), function)
        return inputs

    def _on_examples(self, x: PyTree, function: Callable, size: int | None, name: str) -> Any:
        """Map a function of means (M, C) and Jacobians times the root of the covariance (M, C, P)."""
        check_batch_size(size, name)
        inputs = self._checked_inputs(x, name)
        outputs_of, flat = self._outputs_of(name)
        form, dtype = self._own_gaussian(), self.eigenvalues.dtype

        def one_example(inputs: tuple) -> tuple[Any, Any]:
            out, pull = jax.vjp(lambda flat: outputs_of(flat, inputs), flat)
            rows = jax.vmap(lambda r: pull(r)[0])(jnp.eye(out.size, dtype=out.dtype))
            return out.astype(dtype).reshape(self.outputs), rows.astype(dtype)

        def block(inputs: tuple) -> Any:
            mean, rows = jax.vmap(one_example)(inputs)
            roots = form.root(rows)
            return function(mean, roots.reshape(*mean.shape, -1))

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
