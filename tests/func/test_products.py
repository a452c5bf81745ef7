"""hvp, ggn_vp, fisher_vp against dense matrices in float64, which torch.func and formulas give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.func import functional_call

import statefulnn as nn
from tests.precision import in_float64

# torch's own forward mode still uses torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _float64():
    with in_float64():
        yield


def setting(outputs=3):
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs)
    ).double()
    ours = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((6, 2)), rng.integers(0, outputs, 6)
    params = {n: p.detach() for n, p in theirs.named_parameters()}
    v = {n: rng.standard_normal(p.shape) for n, p in params.items()}
    return ours, theirs, params, x, labels, v


def flat(tree):
    return np.concatenate([np.asarray(tree[n]).ravel() for n in sorted(tree)])


def jacobian(theirs, params, x):
    """Return (N, C, P) by torch.func."""
    f = lambda p, x: functional_call(theirs, p, (x[None],))[0]
    blocks = torch.func.vmap(torch.func.jacrev(f), (None, 0))(params, torch.tensor(x))
    return np.concatenate(
        [blocks[n].detach().numpy().reshape(*blocks[n].shape[:2], -1) for n in sorted(blocks)], -1
    )


def cross_entropy(logits, labels):
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()


def test_hvp_is_torch_s_hessian_times_the_vector():
    ours, theirs, params, x, labels, v = setting()

    def loss(p):
        logits = functional_call(theirs, p, (torch.tensor(x),))
        return torch.nn.functional.cross_entropy(logits, torch.tensor(labels))

    _, expected = torch.func.jvp(
        torch.func.grad(loss), (params,), ({n: torch.tensor(a) for n, a in v.items()},)
    )
    found = nn.func.hvp(lambda m, x: cross_entropy(m(x), labels), (ours, jnp.asarray(x)), v)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-9)
    fn, ours_params = nn.functionalize(ours)
    pure = jax.jit(
        lambda p, v: nn.func.hvp(
            lambda p, x: cross_entropy(fn(p, x), labels), (p, jnp.asarray(x)), v
        )
    )(ours_params, v)
    np.testing.assert_allclose(flat(pure), flat(expected), rtol=1e-9)


def test_ggn_vp_is_the_sandwich_of_jacobians():
    ours, theirs, params, x, labels, v = setting()
    j = jacobian(theirs, params, x)
    logits = theirs(torch.tensor(x)).detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    h = (np.einsum("nc,cd->ncd", p, np.eye(3)) - np.einsum("nc,nd->ncd", p, p)) / len(x)
    expected = np.einsum("ncp,ncd,ndq,q->p", j, h, j, flat(v))
    found = nn.func.ggn_vp(
        lambda m, x: m(x), lambda out: cross_entropy(out, labels), (ours, jnp.asarray(x)), v
    )
    np.testing.assert_allclose(flat(found), expected, rtol=1e-9)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian", "poisson"])
def test_fisher_vp_is_the_expectation_over_the_model_s_own_predictions(likelihood):
    ours, theirs, params, x, _, v = setting()
    j = jacobian(theirs, params, x)
    out = theirs(torch.tensor(x)).detach().numpy()
    eye = np.eye(3)
    if likelihood == "categorical":  # E[(e_y - p)(e_y - p)'] over y
        p = np.exp(out) / np.exp(out).sum(1, keepdims=True)
        f = sum(np.einsum("n,nc,nd->ncd", p[:, y], eye[y] - p, eye[y] - p) for y in range(3))
    elif likelihood == "bernoulli":
        s = 1 / (1 + np.exp(-out))
        f = np.einsum("nc,cd->ncd", s * (1 - s) ** 2 + (1 - s) * s**2, eye)
    elif likelihood == "poisson":
        f = np.einsum("nc,cd->ncd", np.exp(out), eye)
    else:
        f = np.broadcast_to(eye, (len(x), 3, 3))
    expected = np.einsum("ncp,ncd,ndq,q->p", j, f, j, flat(v)) / len(x)
    found = nn.func.fisher_vp(lambda m, x: m(x), (ours, jnp.asarray(x)), v, likelihood)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-9)


def test_the_empirical_fisher_is_the_mean_of_squares_of_gradients():
    ours, theirs, params, x, labels, v = setting()
    each = lambda m, x: jnp.take_along_axis(
        -jax.nn.log_softmax(m(x)), jnp.asarray(labels)[:, None], 1
    )[:, 0]
    grads = []
    for i in range(len(x)):
        theirs.zero_grad()
        logits = theirs(torch.tensor(x[i : i + 1]))
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels[i : i + 1])).backward()
        grads.append(flat({n: p.grad.numpy() for n, p in theirs.named_parameters()}))
    g = np.stack(grads)
    found = nn.func.fisher_vp(each, (ours, jnp.asarray(x)), v, "empirical")
    np.testing.assert_allclose(flat(found), g.T @ (g @ flat(v)) / len(x), rtol=1e-9)


def test_state_is_written_back():
    norm = nn.BatchNorm1d(3).double()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)))
    v = {n: jnp.ones(3) for n, _ in norm.named_parameters()}
    for product in (
        lambda: nn.func.hvp(lambda m, x: (m(x) ** 3).sum(), (norm, x), v),
        lambda: nn.func.ggn_vp(lambda m, x: m(x), lambda out: (out**2).sum(), (norm, x), v),
        lambda: nn.func.fisher_vp(lambda m, x: m(x), (norm, x), v),
    ):
        before = int(norm.num_batches_tracked)
        product()
        assert int(norm.num_batches_tracked) == before + 1


def test_bad_input_is_refused():
    model = nn.Linear(2, 3).double()
    x, v = jnp.ones((4, 2)), {"weight": jnp.ones((3, 2)), "bias": jnp.ones(3)}
    with pytest.raises(TypeError, match="a gradient is that of a scalar"):
        nn.func.hvp(lambda m, x: m(x), (model, x), v)
    with pytest.raises(TypeError, match="a gradient is that of a scalar"):
        nn.func.ggn_vp(lambda m, x: m(x), lambda out: out, (model, x), v)
    with pytest.raises(TypeError, match="primals of type"):
        nn.func.hvp(lambda m: m(x).sum(), model, v)
    with pytest.raises(nn.UnknownNameError, match="gave a vector"):
        nn.func.hvp(lambda m, x: m(x).sum(), (model, x), {"weight": v["weight"]})
    with pytest.raises(nn.ShapeError, match=r"returned shape \(4,\)"):
        nn.func.fisher_vp(lambda m, x: m(x).sum(1), (model, x), v)
    with pytest.raises(ValueError, match="likelihood must be one of"):
        nn.func.fisher_vp(lambda m, x: m(x), (model, x), v, "student")
