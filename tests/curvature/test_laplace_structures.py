"""Laplace with Kronecker factors, priors of groups and labels of parts, beside dense matrices of torch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev, vmap

import statefulnn as nn
from statefulnn.core.errors import ShapeError, UnknownNameError
from statefulnn.curvature import Laplace
from tests.precision import in_float64
from tests.quick import diagonal, first


def networks(kind):
    """A network of ours and the same of torch, in double precision, with inputs and labels."""

    def build(lib):
        if kind == "dense":
            return lib.Sequential(lib.Linear(3, 4), lib.Tanh(), lib.Linear(4, 3))
        return lib.Sequential(
            lib.Unflatten(1, (1, 5, 5)),
            lib.Conv2d(1, 2, 3, stride=2, padding=1),
            lib.Tanh(),
            lib.Flatten(),
            lib.Linear(18, 3),
        )

    ours, theirs = build(nn).to(jnp.float64), build(torch.nn).double()
    theirs.load_state_dict({n: torch.tensor(np.asarray(v)) for n, v in ours.state_dict().items()})
    rng = np.random.default_rng(0)
    return ours, theirs, rng.normal(size=(7, 3 if kind == "dense" else 25)), np.arange(7) % 3


def jacobians(theirs, x):
    """Jacobians of the outputs, name -> (N, C, size)."""
    params = {n: p.detach() for n, p in sorted(theirs.named_parameters())}
    one = lambda p, x: functional_call(theirs, p, (x[None],))[0]
    found = vmap(jacrev(one), (None, 0))(params, torch.tensor(x))
    return {n: j.flatten(2).numpy() for n, j in found.items()}


def softmax_curvature(theirs, x):
    p = torch.softmax(theirs(torch.tensor(x)), -1).detach().numpy()
    return np.eye(3) * p[:, :, None] - p[:, :, None] * p[:, None]


def kronecker_blocks(theirs, x):
    """The blocks of Grosse and Martens, from patches by unfold and derivatives by autograd."""
    curvature, seen, blocks = softmax_curvature(theirs, x), {}, {}
    layers = {n: m for n, m in theirs.named_modules() if list(m.parameters(recurse=False))}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: (args[0], out)})
        )
    out = theirs(torch.tensor(x))
    for name in layers:
        a, z = seen[name]
        rows = [torch.autograd.grad(out[:, c].sum(), z, retain_graph=True)[0] for c in range(3)]
        g = torch.stack(rows, 1).flatten(3) if z.ndim == 4 else torch.stack(rows, 1)[..., None]
        if z.ndim == 4:
            a = torch.nn.functional.unfold(a, 3, stride=2, padding=1)  # (N, K, T)
        a = a.detach().reshape(len(x), a.shape[1], -1).numpy()
        outer = np.einsum("ncot,ncd,ndpt->op", g.numpy(), curvature, g.numpy())
        inner = np.einsum("nkt,nlt->kl", a, a) / (len(x) * a.shape[-1])
        blocks[f"{name}.weight"], blocks[f"{name}.bias"] = np.kron(outer, inner), outer
    return blocks


def block_diagonal(blocks):
    return np.asarray(jax.scipy.linalg.block_diag(*(blocks[n] for n in sorted(blocks))))


def spread(theirs, priors):
    return np.concatenate(
        [np.full(p.numel(), priors[n]) for n, p in sorted(theirs.named_parameters())]
    )


def evidence(theirs, x, y, curvature, prior):
    """The log evidence by dense matrices: prior precisions (P,)."""
    theta = np.concatenate([p.detach().ravel() for _, p in sorted(theirs.named_parameters())])
    fit = -torch.nn.functional.cross_entropy(
        theirs(torch.tensor(x)), torch.tensor(y), reduction="sum"
    )
    occam = np.log(prior).sum() - np.linalg.slogdet(curvature + np.diag(prior))[1]
    return fit.item() + (occam - prior @ theta**2) / 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "structure, kind", diagonal(2, ["kron", "full", "diag"], ["dense", "convolution"])
)
def test_a_structure_is_the_dense_matrix_with_a_prior_for_each_parameter(kind, structure):
    with in_float64():
        ours, theirs, x, y = networks(kind)
        j = np.concatenate(list(jacobians(theirs, x).values()), 2)
        whole = np.einsum("ncp,ncd,ndq->pq", j, softmax_curvature(theirs, x), j)
        curvature = {
            "kron": lambda: block_diagonal(kronecker_blocks(theirs, x)),
            "full": lambda: whole,
            "diag": lambda: np.diag(np.diag(whole)),
        }[structure]()
        names = sorted(n for n, _ in ours.named_parameters())
        each = dict(zip(names, (0.3, 2.0, 1.0, 0.5), strict=True))
        prior = spread(theirs, each)
        posterior = Laplace.fit(
            ours,
            x,
            y,
            likelihood="classification",
            structure=structure,
            prior_precision=each,
            batch_size=3,
        )
        covariance = np.linalg.inv(curvature + np.diag(prior))
        got = np.asarray(posterior.covariance())
        if structure == "diag":
            covariance = np.diag(np.diag(covariance))
            got = np.diag(got)
        np.testing.assert_allclose(got, covariance, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(
            posterior.log_marginal_likelihood(),
            evidence(theirs, x, y, curvature, prior),
            rtol=1e-10,
        )
        listed = posterior.log_marginal_likelihood(np.log(list(each.values())))
        np.testing.assert_allclose(listed, posterior.log_marginal_likelihood(), rtol=1e-12)
        _, functional = posterior.functional(x, batch_size=4)
        want = np.einsum("mcp,pq,mdq->mcd", j, covariance, j)
        np.testing.assert_allclose(functional, want, rtol=1e-8, atol=1e-10)


def test_the_slope_of_the_evidence_is_that_of_the_dense_one_for_each_group():
    with in_float64():
        ours, theirs, x, y = networks("dense")
        curvature = block_diagonal(kronecker_blocks(theirs, x))
        posterior = Laplace.fit(ours, x, y, likelihood="classification", structure="kron")
        groups = {"*.bias": 0.4, "*": -0.2}
        slopes = jax.grad(posterior.log_marginal_likelihood)(groups)

        def dense(logs):
            priors = {n: np.exp(logs["*.bias" if "bias" in n else "*"]) for n in names}
            return evidence(theirs, x, y, curvature, spread(theirs, priors))

        names = [n for n, _ in theirs.named_parameters()]
        for key, step in ((k, 1e-5) for k in groups):
            up, down = ({**groups, key: groups[key] + s} for s in (step, -step))
            want = (dense(up) - dense(down)) / (2 * step)
            np.testing.assert_allclose(slopes[key], want, rtol=1e-6)


@pytest.mark.parametrize("structure", first(1, ["kron", "full", "diag"]))
def test_maximal_evidence_has_no_slope_in_any_group(structure):
    with in_float64():
        ours, rng = networks("dense")[0], np.random.default_rng(1)
        x = rng.normal(size=(80, 3))
        y = np.asarray(ours(x)) + 0.3 * rng.normal(size=(80, 3))
        best = Laplace.fit(
            ours,
            x,
            y,
            likelihood="regression",
            structure=structure,
            prior_precision={"0.*": 1.0, "*": 2.0},
        ).maximize_evidence(tolerance=1e-12)
        logs = jax.tree.map(jnp.log, (best.prior_precision, best.sigma))
        slopes = jax.grad(best.log_marginal_likelihood, argnums=(0, 1))(*logs)
        np.testing.assert_allclose(jax.tree.leaves(slopes), 0, atol=1e-8)
        assert set(best.prior_precision) == {"0.*", "*"}


class Tagger(nn.Module):
    """A class for each token: a table, a norm, a parameter of its own, and a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(jnp.array([1.1, 0.9, 1.2, 0.8]))
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.norm(jnp.tanh(self.table(tokens) * self.scale)))


def tagged(labels_of_padding=-100):
    model = Tagger().to(jnp.float64)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, (6, 3))
    labels = rng.integers(0, 3, (6, 3))
    labels[1, 2] = labels[4, 0] = labels_of_padding
    return model, tokens, labels


@pytest.mark.parametrize("structure", first(1, ["kron", "full", "diag"]))
def test_a_label_for_each_token_counts_as_an_example_for_each(structure):
    with in_float64():
        model, tokens, labels = tagged(labels_of_padding=1)
        fit = functools.partial(
            Laplace.fit, model, likelihood="classification", structure=structure
        )
        texts = fit(tokens, labels, batch_size=4)
        words = fit(tokens.reshape(-1), labels.reshape(-1))
        assert texts.outputs == (3, 3) and words.outputs == (3,)
        np.testing.assert_allclose(texts.covariance(), words.covariance(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(texts.log_likelihood, words.log_likelihood, rtol=1e-12)
        one, two = texts.functional(tokens), words.functional(tokens.reshape(-1))
        assert one[0].shape == (6, 3, 3) and one[1].shape == (6, 3, 3, 3)
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-8, atol=1e-10)
        probit = texts.predict_proba(tokens)
        np.testing.assert_allclose(
            probit.reshape(-1, 3), words.predict_proba(tokens.reshape(-1)), rtol=1e-9
        )
        draws = texts.predict_proba(tokens, link="mc", rng=jax.random.key(0), batch_size=4)
        np.testing.assert_allclose(draws.sum(-1), np.ones((6, 3)), rtol=1e-10)


def test_padding_is_no_datum():
    with in_float64():
        model, tokens, labels = tagged()
        fit = functools.partial(Laplace.fit, model, likelihood="classification")
        padded = fit(tokens, labels)
        kept = labels.reshape(-1) != -100
        words = fit(tokens.reshape(-1)[kept], labels.reshape(-1)[kept])
        np.testing.assert_allclose(padded.covariance(), words.covariance(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            padded.log_marginal_likelihood(), words.log_marginal_likelihood(), rtol=1e-12
        )
        with pytest.raises(ValueError, match="all -100"):
            fit(tokens, np.full((6, 3), -100))


@pytest.mark.long
def test_targets_of_a_regression_may_have_the_shape_of_the_outputs():
    with in_float64():
        model, x = nn.Linear(2, 3, dtype=jnp.float64), np.random.randn(5, 4, 2)
        y = np.random.randn(5, 4, 3)
        fit = functools.partial(Laplace.fit, likelihood="regression")
        shaped, flat = fit(model, x, y), fit(model, x.reshape(20, 2), y.reshape(20, 3))
        np.testing.assert_allclose(shaped.covariance(), flat.covariance(), rtol=1e-9, atol=1e-12)
        mean, variance = shaped.predict(x)
        assert mean.shape == variance.shape == (5, 4, 3)
        np.testing.assert_allclose(
            variance.reshape(20, 3), flat.predict(x.reshape(20, 2))[1], rtol=1e-9
        )


def test_tables_have_a_diagonal_factor_and_norms_their_whole_block():
    with in_float64():
        model, tokens, labels = tagged(labels_of_padding=1)
        fit = functools.partial(Laplace.fit, model, tokens, labels, likelihood="classification")
        kron, full = fit(structure="kron"), fit()
        whole = full.eigenvectors * full.eigenvalues @ full.eigenvectors.T
        precision = np.linalg.inv(np.asarray(kron.covariance())) - np.eye(len(whole))
        names = sorted(dict(model.named_parameters()))
        sizes = [dict(model.named_parameters())[n].size for n in names]
        ends = dict(zip(names, np.cumsum(sizes), strict=True))
        for name in ("norm.bias", "norm.weight", "scale", "head.bias"):
            here = slice(ends[name] - sizes[names.index(name)], ends[name])
            np.testing.assert_allclose(precision[here, here], whole[here, here], atol=1e-9)

        # The table: how often each row was met, beside the derivatives by what was read from it.
        fn, params = nn.functionalize(model)
        rest = {n: v for n, v in params.items() if n != "table.weight"}

        def after_the_table(read):
            hidden = nn.functional_call(model.norm, {}, (jnp.tanh(read * rest["scale"]),))
            return nn.functional_call(model.head, {}, (hidden,))

        outer = np.zeros((4, 4))
        for token in tokens.reshape(-1):
            read = params["table.weight"][token]
            j = np.asarray(jax.jacobian(after_the_table)(read)) * (token != 0)
            p = np.asarray(jax.nn.softmax(after_the_table(read)))
            outer += j.T @ (np.diag(p) - np.outer(p, p)) @ j
        counts = np.bincount(tokens.reshape(-1), minlength=5) / tokens.size
        here = slice(ends["table.weight"] - 20, ends["table.weight"])
        np.testing.assert_allclose(
            precision[here, here], np.kron(np.diag(counts), outer), atol=1e-9
        )


@pytest.mark.parametrize("structure", first(1, ["full", "kron", "diag"]))
def test_functional_samples_are_the_outputs_of_drawn_parameters_of_a_linear_model(structure):
    with in_float64():
        model, x = nn.Linear(3, 2, dtype=jnp.float64), np.random.randn(9, 3)
        posterior = Laplace.fit(
            model, x, np.random.randn(9, 2), likelihood="regression", structure=structure
        )
        key = jax.random.key(0)
        drawn = jax.vmap(posterior.fn, (0, None))(posterior.sample(key, 4), x)
        got = posterior.functional_samples(x, rng=key, samples=4, batch_size=2)
        np.testing.assert_allclose(got, drawn, rtol=1e-10, atol=1e-12)


@pytest.mark.long
def test_functional_samples_vary_as_functional_says():
    with in_float64():
        ours, _, x, y = networks("dense")
        posterior = Laplace.fit(
            ours,
            x,
            y,
            likelihood="classification",
            structure="kron",
            prior_precision={"*": 2.0, "2.*": 5.0},
        )
        drawn = posterior.functional_samples(x[:2], rng=jax.random.key(1), samples=40_000)
        mean, covariance = posterior.functional(x[:2])
        np.testing.assert_allclose(drawn.mean(0), mean, atol=0.03)
        for i in range(2):
            got = np.cov(drawn[:, i], rowvar=False)
            np.testing.assert_allclose(got, covariance[i], atol=0.04 * np.abs(covariance[i]).max())


def test_subsets_are_chosen_by_patterns():
    with in_float64():
        ours, _, x, y = networks("dense")
        fit = functools.partial(Laplace.fit, ours, x, y, likelihood="classification")
        assert fit(subset="2.*").names == ("2.weight", "2.bias")
        assert fit(subset=["bi*", "0.weight"]).names == ("0.weight", "0.bias", "2.bias")
        head, last = (fit(subset=s, structure="kron") for s in ("2.*", "last_layer"))
        np.testing.assert_array_equal(head.covariance(), last.covariance())
        with pytest.raises(UnknownNameError, match="lora_"):
            fit(subset="lora_*")


@pytest.mark.parametrize("structure", first(2, ["kron", "full", "diag"]))
@pytest.mark.parametrize("prior", [{"*": 0.5, "2.bias": 3.0}], ids=["groups"])
def test_a_saved_posterior_predicts_the_same(tmp_path, structure, prior):
    with in_float64():
        ours, _, x, y = networks("dense")
        options = {"likelihood": "classification", "structure": structure}
        subset = ["0.bias", "2.weight", "2.bias"]
        posterior = Laplace.fit(ours, x, y, prior_precision=prior, subset=subset, **options)
        nn.save(posterior, tmp_path / "posterior.safetensors")
        other = networks("dense")[0]
        for p in other.parameters():
            p.value = p * 0
        again = Laplace.from_state_dict(other, nn.load(tmp_path / "posterior.safetensors"))
        for a, b in (
            (again.predict_proba(x), posterior.predict_proba(x)),
            (again.log_marginal_likelihood(), posterior.log_marginal_likelihood()),
        ):
            np.testing.assert_array_equal(a, b)
        assert again.maximize_evidence().names == posterior.names


def test_what_is_wrong_is_named():
    ours = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = np.random.randn(7, 3).astype(np.float32), np.arange(7) % 3
    fit = functools.partial(Laplace.fit, ours, x, y, likelihood="classification")
    with pytest.raises(UnknownNameError, match=r"nothing there fits '0.weight', '2.weight'"):
        fit(prior_precision={"*.bias": 1.0})
    with pytest.raises(UnknownNameError, match="'3.bias'"):
        fit(prior_precision={"*": 1.0, "3.bias": 1.0})
    with pytest.raises(ValueError, match=r"prior_precision\['\*'\]=-1.0"):
        fit(prior_precision={"*": -1.0})
    with pytest.raises(ValueError, match=r"prior_precision\[1\]=0.0"):
        fit(prior_precision=np.array([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ShapeError, match=r"4 arrays of random parameters: 0.bias, 0.weight"):
        fit(prior_precision=np.ones(3))
    with pytest.raises(TypeError, match="structure='kron'"):
        Laplace.fit(nn.functionalize(ours), x, y, likelihood="classification", structure="kron")
    with pytest.raises(ShapeError, match=r"y \(N, T\) with outputs \(N, T, C\)"):
        fit_labels = np.zeros((7, 2), np.int32)
        Laplace.fit(ours, x, fit_labels, likelihood="classification")
    state = fit(structure="diag").state_dict()
    with pytest.raises(UnknownNameError, match="without 'eigenvalues'"):
        Laplace.from_state_dict(ours, {"weight": x})
    with pytest.raises(UnknownNameError, match="the model's are 'weight'"):
        Laplace.from_state_dict(nn.Linear(3, 4, bias=False), state)
    with pytest.raises(ShapeError, match="'0.weight' of shape"):
        wider = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        Laplace.from_state_dict(wider, state)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.long
def test_low_rank_keeps_the_largest_eigenvalues_of_the_dense_matrix():
    with in_float64():
        ours, theirs, x, y = networks("dense")
        j = np.concatenate(list(jacobians(theirs, x).values()), 2)
        whole = np.einsum("ncp,ncd,ndq->pq", j, softmax_curvature(theirs, x), j)
        values, vectors = np.linalg.eigh(whole)
        names = sorted(n for n, _ in ours.named_parameters())
        each = dict(zip(names, (0.3, 2.0, 1.0, 0.5), strict=True))
        for prior in (0.7, each):
            diagonal = spread(theirs, each if prior is each else dict.fromkeys(names, prior))
            posterior = Laplace.fit(
                ours,
                x,
                y,
                likelihood="classification",
                structure="lowrank",
                rank=5,
                prior_precision=prior,
                batch_size=3,
            )
            np.testing.assert_allclose(posterior.eigenvalues, values[-5:], rtol=1e-9)
            kept = vectors[:, -5:] * values[-5:] @ vectors[:, -5:].T
            np.testing.assert_allclose(
                posterior.covariance(),
                np.linalg.inv(kept + np.diag(diagonal)),
                rtol=1e-8,
                atol=1e-10,
            )
            want = evidence(theirs, x, y, kept, diagonal)
            np.testing.assert_allclose(posterior.log_marginal_likelihood(), want, rtol=1e-10)
        best = posterior.maximize_evidence(tolerance=1e-10)
        slopes = jax.grad(best.log_marginal_likelihood)(jax.tree.map(jnp.log, best.prior_precision))
        np.testing.assert_allclose(jax.tree.leaves(slopes), 0, atol=1e-7)
        again = Laplace.from_state_dict(ours, best.state_dict())
        np.testing.assert_array_equal(again.predict_proba(x), best.predict_proba(x))


def test_a_few_products_find_the_largest_eigenvalues_of_many_parameters():
    with in_float64():
        # Inputs whose scales fall by half; the eigenvalues are those of the inputs' second moments, twice.
        scales = 0.5 ** np.arange(200)
        x = np.linalg.qr(np.random.default_rng(0).normal(size=(300, 200)))[0] * scales
        model = nn.Linear(200, 2, bias=False, dtype=jnp.float64)
        posterior = Laplace.fit(
            model, x, np.zeros((300, 2)), likelihood="regression", structure="lowrank", rank=8
        )
        np.testing.assert_allclose(
            posterior.eigenvalues, np.repeat(scales[:4] ** 2, 2)[::-1], rtol=1e-9
        )


@pytest.mark.long
def test_a_rank_beyond_the_number_of_parameters_is_the_whole_matrix():
    with in_float64():
        x = np.random.default_rng(0).normal(size=(3, 4))  # three examples: rank 3 of 5
        model = nn.Linear(4, 1, dtype=jnp.float64)
        fit = functools.partial(Laplace.fit, model, x, np.zeros((3, 1)), likelihood="regression")
        full, low = fit(), fit(structure="lowrank", rank=50)
        np.testing.assert_allclose(low.covariance(), full.covariance(), rtol=1e-8, atol=1e-10)
        with pytest.raises(ValueError, match="rank=0"):
            fit(structure="lowrank", rank=0)
