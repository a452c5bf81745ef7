"""Ghost clipping against explicit gradients of examples, in double precision; and the bytes it needs."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature
from statefulnn.core.errors import MissingRngError, ShapeError, StateWriteError
from tests.precision import in_float64


class Text(nn.Module):
    """Tables, linear layers over many positions and few, norms, and a layer that is called twice."""

    def __init__(self, width, hidden):
        super().__init__()
        self.words = nn.Embedding(7, width, padding_idx=0)
        self.mix = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.again = nn.Linear(hidden, hidden, bias=False)
        self.head = nn.Linear(hidden, 3)

    def forward(self, tokens):
        h = self.norm(jnp.tanh(self.mix(self.words(tokens))))
        return self.head(jnp.tanh(self.again(jnp.tanh(self.again(h)))).mean(-2))


def images(lib):
    return lib.Sequential(
        lib.Conv2d(2, 3, 3, stride=2, padding=1),
        lib.GroupNorm(1, 3),
        lib.Tanh(),
        lib.Conv2d(3, 4, 2, dilation=2),
        lib.Tanh(),
        lib.Flatten(),
        lib.Linear(36, 3),
    )


def cases():
    rng = np.random.default_rng(0)
    labels = np.arange(6) % 3
    return {
        "dense": (
            lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
            rng.normal(size=(6, 5)),
            labels,
        ),
        "convolution": (lambda: images(nn), rng.normal(size=(6, 2, 9, 9)), labels),
        "one axis": (
            lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding="same"), nn.Flatten(), nn.Tanh()),
            rng.normal(size=(6, 2, 1)),
            labels,
        ),
        "few positions": (lambda: Text(8, 16), rng.integers(0, 7, (6, 4)), labels),
        "many positions": (lambda: Text(2, 3), rng.integers(0, 7, (6, 30)), labels),
    }


def loss(model, x, y):
    return F.cross_entropy(model(x[None])[0], y)


def explicit(model, x, y, max_norm):
    """Clip the gradient of one example after the other."""
    fn, params = nn.functionalize(model)
    gradient = jax.jit(jax.grad(lambda p, x, y: F.cross_entropy(fn(p, x[None])[0], y)))
    total, norms = dict.fromkeys(params, 0.0), []
    for a, b in zip(x, y, strict=True):
        g = gradient(params, a, b)
        norms.append(np.sqrt(sum(np.sum(np.square(v)) for v in g.values())))
        for n in total:
            total[n] = total[n] + np.asarray(g[n]) / max(1.0, norms[-1] / max_norm)
    return total, np.array(norms)


@pytest.mark.parametrize("case", cases())
def test_it_is_the_clipped_sum_of_explicit_gradients(case):
    with in_float64():
        build, x, y = cases()[case]
        model = build().to(jnp.float64)
        max_norm = float(np.median(explicit(model, x, y, 1.0)[1]))
        total, norms = explicit(model, x, y, max_norm)
        for batch_size in (None, 4):
            clip = curvature.ghost_clip(loss, max_norm, reduce="sum", batch_size=batch_size)
            got = nn.jit(clip)(model, x, y)
            np.testing.assert_allclose(got.norms, norms, rtol=1e-10)
            assert got.gradients.keys() == total.keys()
            for name in total:
                np.testing.assert_allclose(
                    got.gradients[name], total[name], rtol=1e-10, atol=1e-13, err_msg=name
                )
        np.testing.assert_allclose(got.share, (norms > max_norm).mean())


@pytest.mark.parametrize("n", [16, 13])
def test_layers_of_which_examples_are_looked_at_in_parts(n):
    with in_float64():
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 24, 5), nn.Flatten(), nn.Linear(96, 3)
        ).to(jnp.float64)
        x, y = np.random.default_rng(0).normal(size=(n, 2, 8, 8)), np.arange(n) % 3
        total, norms = explicit(model, x, y, 0.5)
        got = nn.jit(curvature.ghost_clip(loss, 0.5, reduce="sum"))(model, x, y)
        np.testing.assert_allclose(got.norms, norms, rtol=1e-10)
        for name in total:
            np.testing.assert_allclose(got.gradients[name], total[name], rtol=1e-9, atol=1e-13)


def test_dp_gradients_are_the_same_by_either_clipping():
    build, x, y = cases()["dense"]
    model, x = build(), jnp.asarray(x, jnp.float32)
    key = jax.random.key(0)
    by_example, ghost = (
        curvature.dp_gradients(loss, 0.3, 1.1, lot_size=8, has_norms=True, clipping=c)
        for c in ("per_example", "ghost")
    )
    (want, norms), (got, ghost_norms) = (
        by_example(model, x, y, rng=key),
        ghost(model, x, y, rng=key),
    )
    np.testing.assert_allclose(ghost_norms, norms, rtol=1e-5)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6)
    empty, none = ghost(model, x[:0], y[:0], rng=key)
    assert none.shape == (0,) and np.isfinite(empty["0.weight"]).all()
    assert empty.keys() == want.keys()


def test_frozen_parameters_count_for_nothing_and_halves_are_summed_in_float32():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)).to(jnp.bfloat16)
    model[0].weight.requires_grad_(False)
    x, y = jnp.asarray(np.random.randn(5, 4), jnp.bfloat16), jnp.arange(5) % 3
    got = curvature.ghost_clip(loss, 0.1)(model, x, y)
    want = curvature.clip_per_example(nn.func.per_sample_grad(loss)(model, x, y), 0.1)
    assert got.norms.dtype == jnp.float32 and "0.weight" not in got.gradients
    np.testing.assert_allclose(got.norms, want.norms, rtol=2e-2)
    for name, g in got.gradients.items():
        assert g.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(g, np.float32), np.asarray(want.gradients[name], np.float32), atol=1e-3
        )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.recurrent = nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.recurrent(self.table(tokens))[0].mean(-2))


def test_what_has_gradients_of_examples_is_named():
    with in_float64():
        model = Tied().to(jnp.float64)
        x, y = np.random.default_rng(0).integers(0, 5, (4, 3)), np.arange(4) % 5
        total, norms = explicit(model, x, y, 0.5)
        with pytest.warns(UserWarning, match="'table.weight', 'recurrent.weight_ih_l0'"):
            got = nn.jit(curvature.ghost_clip(loss, 0.5, reduce="sum"))(model, x, y)
        np.testing.assert_allclose(got.norms, norms, rtol=1e-10)
        for name in total:
            np.testing.assert_allclose(got.gradients[name], total[name], rtol=1e-9, atol=1e-13)


def test_a_penalty_in_the_loss_is_part_of_the_gradient():
    with in_float64():
        model = nn.Linear(3, 2, dtype=jnp.float64)
        x, y = np.random.randn(4, 3), np.random.randn(4, 2)

        def penalised(model, x, y):
            return F.mse_loss(model(x), y) + 0.1 * jnp.sum(jnp.square(model.weight.value))

        with pytest.warns(UserWarning, match="'weight'"):
            got = curvature.ghost_clip(penalised, 0.2, reduce="sum")(model, x, y)
        want = curvature.clip_per_example(
            nn.func.per_sample_grad(penalised)(model, x, y), 0.2, reduce="sum"
        )
        np.testing.assert_allclose(got.norms, want.norms, rtol=1e-12)
        np.testing.assert_allclose(got.gradients["weight"], want.gradients["weight"], rtol=1e-12)


def of_opacus():
    """Build the CNN of opacus's MNIST example."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


@pytest.mark.parametrize("network", ["dense", "convolution", "opacus"])
def test_it_needs_about_the_bytes_of_a_plain_gradient(network, no_compilation_cache):
    n = 64
    if network == "dense":
        widths = (64, 256, 256, 10)
        layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        model, x = nn.Sequential(*layers[:1], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), (n, 64)
    elif network == "opacus":
        model, x = of_opacus(), (n, 1, 28, 28)
    else:
        model, x = (
            nn.Sequential(
                nn.Conv2d(1, 16, 5, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 5, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(32 * 49, 10),
            ),
            (n, 1, 28, 28),
        )
    x, y = jnp.zeros(x), jnp.arange(n) % 10
    fn, params = nn.functionalize(model)

    def ghost(p, x, y):
        twin = nn.merge(*nn.split(model))
        for name, value in p.items():
            twin.get_parameter(name).value = value
        return curvature.ghost_clip(loss, 1.0)(twin, x, y).gradients

    plain = jax.grad(lambda p, x, y: F.cross_entropy(fn(p, x), y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all weights are of layers that are known
        bytes_of = [
            jax.jit(f).lower(params, x, y).compile().memory_analysis().temp_size_in_bytes
            for f in (plain, ghost)
        ]
    assert bytes_of[1] <= 1.5 * bytes_of[0], bytes_of


def test_what_is_wrong_is_named():
    model, x = nn.Linear(3, 2), jnp.ones((4, 3))
    square = lambda m, x: jnp.sum(m(x) ** 2)
    with pytest.raises(ValueError, match="max_norm="):
        curvature.ghost_clip(square, 0.0)
    with pytest.raises(ValueError, match="reduce='max'"):
        curvature.ghost_clip(square, 1.0, reduce="max")
    with pytest.raises(ValueError, match="clipping='fast'"):
        curvature.dp_gradients(square, 1.0, 1.0, clipping="fast")
    clip = curvature.ghost_clip(square, 1.0)
    with pytest.raises(TypeError, match="arrays do not show"):
        clip({"w": x}, x)
    with pytest.raises(TypeError, match="no examples"):
        clip(model)
    with pytest.raises(ShapeError, match="0 examples"):
        clip(model, x[:0])
    with pytest.raises(TypeError, match=r"shape \(2,\)"):
        curvature.ghost_clip(lambda m, x: m(x), 1.0)(model, x)
    with pytest.raises(FloatingPointError, match="not finite"):
        clip(model, x.at[1].set(jnp.inf))
    with pytest.raises(MissingRngError, match="of one example"):
        curvature.ghost_clip(square, 1.0)(nn.Sequential(model, nn.Dropout(0.5)), x)
    normed = nn.Sequential(model, nn.BatchNorm1d(2))
    with pytest.raises(StateWriteError):
        curvature.ghost_clip(lambda m, x: m(jnp.stack([x, x])).sum(), 1.0)(normed, x)
    assert int(normed[1].num_batches_tracked) == 0


@pytest.mark.parametrize("scale", [1e-24, 1e22])
@pytest.mark.parametrize("name", ["convolution", "few positions", "many positions"])
def test_gradients_whose_squares_over_or_underflow_are_clipped_too(name, scale):
    # In float32 the squares are 0, or infinite. The oracle is the loss without the scale.
    make, x, y = cases()[name]
    nn.manual_seed(0)
    model = make()
    x, y = jnp.asarray(x, None if x.dtype.kind == "i" else jnp.float32), jnp.asarray(y)
    expected = [nn.grad(loss)(model, a, b) for a, b in zip(x, y, strict=True)]
    norms = [
        np.sqrt(sum(np.sum(np.asarray(v, np.float64) ** 2) for v in g.values())) for g in expected
    ]
    most = float(np.median(norms))
    clip = curvature.ghost_clip(lambda m, x, y: scale * loss(m, x, y), scale * most, reduce="sum")
    found = clip(model, x, y)
    np.testing.assert_allclose(np.asarray(found.norms, np.float64) / scale, norms, rtol=1e-4)
    for key, value in found.gradients.items():
        total = sum(
            np.asarray(g[key], np.float64) / max(1, n / most)
            for g, n in zip(expected, norms, strict=True)
        )
        np.testing.assert_allclose(
            np.asarray(value, np.float64) / scale, total, rtol=1e-3, atol=1e-4 * most
        )
