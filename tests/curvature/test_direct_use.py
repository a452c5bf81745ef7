"""Weights of layers that are used without calling the layer: gradients one by one, and dense matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature
from tests.precision import in_float64


class Model(nn.Module):
    """A layer, and another one downstream of it, which is called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def direct(self, x):
        return jnp.tanh(F.linear(x, self.layer.weight, self.layer.bias))


class Direct(Model):
    def forward(self, x):
        return self.head(self.direct(x)).mean(-2)


class ByMethod(Model):
    def forward(self, x):
        return self.head(jnp.tanh(self.layer.forward(x))).mean(-2)


class DirectThenCalled(Model):
    def forward(self, x):
        return self.head(self.layer(self.direct(x))).mean(-2)


class CalledThenDirect(Model):
    def forward(self, x):
        return self.head(self.direct(self.layer(x))).mean(-2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0]).mean(-2)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(x)).mean(-2)


def case(build):
    nn.manual_seed(0)
    model = build().to(jnp.float64)
    x = np.random.default_rng(0).normal(size=(4, 3, 4))
    return model, x, np.arange(4) % 2


def loss(model, x, y):
    return F.cross_entropy(model(x[None]), y[None])


MODELS = [Direct, ByMethod, DirectThenCalled, CalledThenDirect, Attention, Encoder]


@pytest.mark.filterwarnings("ignore:ghost_clip computes the gradients of examples")
@pytest.mark.parametrize("build", MODELS)
def test_ghost_clipping_finds_it(build):
    with in_float64():
        model, x, y = case(build)
        fn, params = nn.functionalize(model)
        gradient = jax.jit(jax.grad(lambda p, x, y: F.cross_entropy(fn(p, x[None]), y[None])))
        total, norms = dict.fromkeys(params, 0.0), []
        for g in (gradient(params, *example) for example in zip(x, y, strict=True)):
            norms.append(np.sqrt(sum(np.sum(np.square(v)) for v in g.values())))
            total = {n: t + g[n] / max(1.0, norms[-1] / 0.5) for n, t in total.items()}
        got = nn.jit(curvature.ghost_clip(loss, 0.5, reduce="sum"))(model, x, y)
        np.testing.assert_allclose(got.norms, norms, rtol=1e-10)
        for name in total:
            np.testing.assert_allclose(
                got.gradients[name], total[name], rtol=1e-9, atol=1e-13, err_msg=name
            )


@pytest.mark.parametrize("build", MODELS)
def test_the_tangent_kernel_finds_it(build):
    with in_float64():
        model, x, _ = case(build)
        fn, params = nn.functionalize(model)
        flat, unravel = ravel_pytree(params)
        j = jax.jit(jax.jacrev(lambda flat: fn(unravel(flat), x)))(flat)
        got = nn.jit(lambda model, x: curvature.empirical_ntk(model, x, method="layers"))(model, x)
        np.testing.assert_allclose(got, jnp.einsum("acp,bdp->abcd", j, j), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("build", [Direct, DirectThenCalled, Attention])
def test_a_kronecker_posterior_keeps_its_whole_block(build):
    with in_float64():
        model, x, y = case(build)
        posterior = curvature.Laplace.fit(
            model, x, y, likelihood="classification", structure="kron"
        )
        precision = np.linalg.inv(np.asarray(posterior.covariance())) - np.eye(
            posterior.eigenvalues.size
        )
        fn, params = nn.functionalize(model)
        p = np.asarray(jax.nn.softmax(fn(params, x)))
        jacobians = jax.jit(jax.jacrev(lambda p: fn(p, x)))(params)
        end = 0
        for name in sorted(params):  # the order of the flat parameters
            start, end = end, end + params[name].size
            if "head" in name:
                continue
            j = np.asarray(jacobians[name]).reshape(4, 2, -1)
            curved = p[:, :, None] * np.eye(2) - p[:, :, None] * p[:, None]
            np.testing.assert_allclose(
                precision[start:end, start:end],
                np.einsum("ncp,ncd,ndq->pq", j, curved, j),
                atol=1e-10,
                err_msg=name,
            )
