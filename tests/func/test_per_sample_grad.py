"""Gradients of every example's own loss, against a loop over examples in torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
import statefulnn.functional as F
from tests.precision import in_float64
from tests.quick import QUICKLY, first, quickly


def network(lib):
    return lib.Sequential(
        lib.Conv2d(2, 4, 3, padding=1),
        lib.ReLU(),
        lib.Conv2d(4, 4, 3, stride=2, groups=2),
        lib.GroupNorm(2, 4),
        lib.MaxPool2d(2),
        lib.Flatten(),
        lib.Linear(16, 3),
    )


def twins():
    torch.manual_seed(0)
    theirs, ours = network(torch.nn), network(nn)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    rng = np.random.default_rng(0)
    return ours, theirs, rng.standard_normal((5, 2, 9, 9)).astype("f"), rng.integers(0, 3, 5)


def torch_loop(theirs, xs, ys):
    rows = []
    for x, y in zip(torch.tensor(xs), torch.tensor(ys).long(), strict=True):
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(theirs(x[None]), y[None]).backward()
        rows.append({n: p.grad.numpy().copy() for n, p in theirs.named_parameters()})
    return {n: np.stack([r[n] for r in rows]) for n in rows[0]}


@pytest.mark.parametrize("form", first(2, ["nn.jit", "params", "module"]))
def test_a_convolutional_network(form):
    ours, theirs, xs, ys = twins()
    loss = lambda model, x, y: F.cross_entropy(model(x[None])[0], y)
    xs, ys = jnp.asarray(xs), jnp.asarray(ys)
    if form == "params":
        fn, params = nn.functionalize(ours)
        f = quickly(nn.func.per_sample_grad(lambda p, x, y: F.cross_entropy(fn(p, x[None])[0], y)))
        grads = f(params, xs, ys)
    else:
        f = nn.func.per_sample_grad(loss)
        grads = (nn.jit(f, compiler_options=QUICKLY) if form == "nn.jit" else f)(ours, xs, ys)
    expected = torch_loop(theirs, np.asarray(xs), np.asarray(ys))
    assert grads.keys() == expected.keys()
    for name in grads:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_their_mean_is_the_gradient_of_the_mean():
    ours, _, xs, ys = twins()
    fn, params = nn.functionalize(ours)
    loss = lambda p, x, y: F.cross_entropy(fn(p, x[None])[0], y)
    each = quickly(nn.func.per_sample_grad(loss))(params, jnp.asarray(xs), jnp.asarray(ys))
    whole = quickly(jax.grad(lambda p: jax.vmap(loss, (None, 0, 0))(p, xs, ys).mean()))(params)
    for name in whole:
        np.testing.assert_allclose(each[name].mean(0), whole[name], rtol=1e-4, atol=1e-6)


def test_the_outer_product_of_one_row_is_exact_in_every_mode():
    # The derivative of a product with one row is written in another way; see F.linear.
    rng = np.random.default_rng(0)
    w, x, c = (rng.standard_normal(s).astype("f") for s in ((3, 4), (5, 4), (5, 3)))
    f = lambda w, x, c: jnp.vdot(F.linear(x, w), c)
    for lead in ((), (1,), (1, 1)):
        rows = x.reshape(5, *lead, 4)
        grads = quickly(jax.vmap(jax.grad(f, (0, 1)), (None, 0, 0)))(
            w, rows, c.reshape(5, *lead, 3)
        )
        np.testing.assert_array_equal(grads[0], np.einsum("no,ni->noi", c, x))
        np.testing.assert_allclose(grads[1], (c @ w).reshape(rows.shape), rtol=1e-5)
    second = quickly(jax.hessian(lambda w, x: jnp.vdot(F.linear(x, w), F.linear(x, w))))(w, x[0])
    by_formula = 2 * np.einsum("ac,b,d->abcd", np.eye(3), x[0], x[0])
    np.testing.assert_allclose(second, by_formula, rtol=1e-5, atol=1e-6)
    tangent = jax.jvp(F.linear, (x[0], w), (x[1], w))[1]
    np.testing.assert_allclose(tangent, w @ (x[0] + x[1]), rtol=1e-5)


def test_aux_and_other_axes():
    loss = lambda w, x: ((w * x).sum(), x.max())
    w, xs = jnp.arange(3.0), jnp.arange(12.0).reshape(3, 4)
    grads, aux = nn.func.per_sample_grad(loss, in_dims=(None, 1), has_aux=True)(w, xs)
    np.testing.assert_array_equal(grads, xs.T)
    np.testing.assert_array_equal(aux, xs.max(0))


def test_by_the_input_and_the_weights():
    model = nn.Linear(3, 1)
    f = nn.func.per_sample_grad(lambda m, x: m(x).sum(), argnums=(0, 1), in_dims=(None, 0))
    of_model, of_x = f(model, jnp.ones((4, 3)))
    assert of_model["weight"].shape == (4, 1, 3)
    np.testing.assert_allclose(of_x, jnp.broadcast_to(model.weight.value, (4, 3)))


@pytest.mark.parametrize("randomness, masks", [("different", 6), ("same", 1)])
def test_examples_have_their_own_dropout_masks_or_one(randomness, masks):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 1))
    loss = lambda m, x: m(x).sum()
    grads = nn.func.per_sample_grad(loss, randomness=randomness)(model, jnp.ones((6, 40)))
    assert len({tuple(r.ravel()) for r in np.asarray(grads["1.weight"] != 0)}) == masks
    with pytest.raises(nn.MissingRngError):
        nn.func.per_sample_grad(loss, randomness="error")(model, jnp.ones((6, 40)))


def test_a_batch_of_none_gives_none():
    grads = nn.func.per_sample_grad(lambda m, x: m(x).sum())(nn.Linear(3, 1), jnp.ones((0, 3)))
    assert grads["weight"].shape == (0, 1, 3)


def test_batch_normalisation_in_training_mode_is_refused():
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))
    loss = lambda m, x: m(x[None]).sum()
    with pytest.raises(nn.StateWriteError, match="running_mean"):
        nn.func.per_sample_grad(loss)(model, jnp.ones((4, 2, 5)))
    model.eval()
    grads = nn.func.per_sample_grad(loss)(model, jnp.ones((4, 2, 5)))
    assert grads["0.weight"].shape == (4, 2, 2, 1)


def test_what_is_no_function_is_refused_where_it_is_given():
    with pytest.raises(TypeError, match=r"per_sample_grad(.|\n)*Instead: .*lambda model, x, y"):
        nn.func.per_sample_grad(jnp.ones(3))
    with pytest.raises(TypeError, match=r"per_sample_grad(.|\n)*argnums"):
        nn.func.per_sample_grad(lambda model, x: x.sum(), argnums=1.5)


def test_bad_input_is_refused():
    model = nn.Linear(3, 1)
    with pytest.raises(nn.ShapeError, match="all differentiated"):
        nn.func.per_sample_grad(lambda m: m(jnp.ones(3)).sum())(model)
    with pytest.raises(TypeError, match="a gradient is that of a scalar"):
        nn.func.per_sample_grad(lambda m, x: m(x))(model, jnp.ones((4, 3)))
    with pytest.raises(nn.ShapeError):
        nn.func.per_sample_grad(lambda m, x, y: m(x).sum())(model, jnp.ones((4, 3)), jnp.ones(5))


# The axes of an image, and a layer: with 4 channels and with 8 the gradient is computed in different ways.
CONVOLUTIONS = [
    ((9, 8), {"in_channels": 4, "kernel_size": 3}),
    ((9, 8), {"in_channels": 16, "kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}),
    ((9, 8), {"in_channels": 8, "kernel_size": (2, 3), "padding": (3, 0), "dilation": (1, 2)}),
    ((9, 8), {"in_channels": 8, "kernel_size": 5, "padding": "same", "padding_mode": "reflect"}),
    ((9, 8), {"in_channels": 8, "kernel_size": (3, 1)}),
    ((11,), {"in_channels": 8, "kernel_size": 3, "stride": 2, "padding": 1}),
    ((5, 4, 6), {"in_channels": 8, "kernel_size": 2, "padding": 1}),
]


@pytest.mark.parametrize("space, how", CONVOLUTIONS, ids=lambda v: str(v).replace("_", ""))
def test_convolutions_of_each_image(space, how):
    with in_float64():
        name = f"Conv{len(space)}d"
        layer = getattr(nn, name)(out_channels=6, **how).to(jnp.float64)
        # Two images are one example.
        x = np.random.default_rng(0).normal(size=(3, 2, how["in_channels"], *space))
        theirs = getattr(torch.nn, name)(out_channels=6, **how).double()
        theirs.load_state_dict(
            {k: torch.tensor(np.array(v)) for k, v in layer.state_dict().items()}
        )
        for images in (slice(0, 1), slice(0, 2)):
            loss = lambda m, x: jnp.sum(jnp.sin(m(x)))
            got = nn.jit(nn.func.per_sample_grad(loss))(layer, x[:, images])
            for i, example in enumerate(torch.tensor(x[:, images])):
                theirs.zero_grad()
                theirs(example).sin().sum().backward()
                for name, p in theirs.named_parameters():
                    np.testing.assert_allclose(got[name][i], p.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("channels", [4, 8])
def test_gradients_of_a_derivative_of_a_convolution(channels):
    # The loss has a derivative along the image and along the weight in it, forward and then in reverse.
    with in_float64():
        rng = np.random.default_rng(0)
        x, w = rng.normal(size=(3, 2, channels, 5, 5)), rng.normal(size=(6, channels, 3, 3))
        of, along = ({"w": w}, {"w": rng.normal(size=w.shape)})

        def loss(p, x):
            value = lambda p, x: F.conv2d(jnp.sin(x)[None], p["w"]).sum() ** 3
            return jax.jvp(value, (p, x[0]), (along, x[1]))[1] ** 2

        def torchs(w, x):
            value = lambda w, x: torch.nn.functional.conv2d(x.sin()[None], w).sum() ** 3
            tangents = torch.tensor(along["w"]), x[1]
            return (
                torch.autograd.functional.jvp(value, (w, x[0]), tangents, create_graph=True)[1] ** 2
            )

        got = nn.func.per_sample_grad(loss)(of, x)["w"]
        for i, example in enumerate(torch.tensor(x)):
            leaf = torch.tensor(w, requires_grad=True)
            (expected,) = torch.autograd.grad(torchs(leaf, example), leaf)
            np.testing.assert_allclose(got[i], expected, rtol=1e-9, atol=1e-9)
