"""Convolutions and padding: what the rows cannot say."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
import statefulnn.functional as F
from tests.devices import run_on_devices
from tests.parity.oracle import array, close, to_jax, to_torch
from tests.quick import diagonal, quickly

VOLUME = array(2, 4, 5, 6, 5)

# input, weight, stride, padding, dilation, groups: one for each way a convolution is computed.
WAYS = {
    "dense": (array(2, 4, 7, 8), array(6, 4, 3, 3), 2, 1, 1, 1),
    "many channels": (array(2, 9, 7, 8), array(4, 9, 3, 2), 2, 1, 2, 1),
    "many channels 3d": (array(1, 8, 5, 6, 5), array(3, 8, 3, 2, 3), 2, 1, 1, 1),
    "dense 3d": (VOLUME, array(3, 4, 3, 2, 3), 2, 1, 1, 1),
    "many taps": (array(1, 2, 13, 13), array(2, 2, 12, 12), 1, 1, 1, 1),
    "many taps 3d": (array(1, 2, 7, 7, 7), array(2, 2, 6, 5, 5), 2, 1, 1, 1),
    "smaller than the kernel": (array(2, 4, 2, 2), array(6, 4, 3, 3), 1, 1, 1, 1),
    "output smaller than the kernel": (array(2, 4, 4, 5), array(6, 4, 3, 3), 2, 1, 1, 1),
    "smaller with distances": (array(2, 4, 2, 3), array(6, 4, 3, 4), 1, (2, 3), 2, 1),
    "smaller in groups": (array(2, 4, 2, 1), array(6, 2, 3, 3), 1, 1, 1, 2),
    "smaller line": (array(2, 4, 2), array(6, 4, 5), 1, 2, 1, 1),
    "smaller 3d": (array(2, 4, 2, 1, 2), array(3, 4, 3, 3, 3), 1, 1, 1, 1),
    "no border": (array(2, 4, 7, 8), array(6, 4, 3, 3), 1, 0, 1, 1),
    "no border with steps": (array(2, 4, 7, 9), array(6, 4, 3, 2), (2, 3), 0, (1, 2), 1),
    "patches": (array(2, 4, 7, 8), array(6, 4, 2, 3), (2, 3), 0, 1, 1),
    "patches with a border": (array(2, 3, 6, 5), array(4, 3, 2, 2), 2, 1, 1, 1),
    "patches 3d": (VOLUME, array(3, 4, 2, 2, 2), 2, 0, 1, 1),
    "line": (array(2, 4, 9), array(6, 4, 3), 2, 1, 1, 1),
    "line that grows": (array(2, 4, 9), array(6, 4, 2), 1, 1, 1, 1),
    "image that grows": (array(2, 4, 7, 8), array(6, 4, 2, 2), 1, 2, 1, 1),
    "one tap": (array(2, 4, 7, 8), array(6, 4, 1, 1), 2, 1, 1, 1),
    "one tap 3d": (VOLUME, array(3, 4, 2, 1, 1), 1, 0, 1, 1),
    "one tap of many channels": (array(3, 16, 2, 1), array(24, 16, 1, 1), 1, 0, 1, 1),
    "groups": (array(2, 4, 7, 8), array(6, 2, 3, 3), 1, 1, 2, 2),
    "depthwise": (array(2, 4, 7, 8), array(4, 1, 3, 3), 1, 1, 2, 4),
    "depthwise with steps": (array(2, 4, 7, 8), array(4, 1, 3, 3), 2, 1, 1, 4),
    "depthwise, two outputs": (array(2, 4, 7, 8), array(8, 1, 3, 3), 1, 1, 1, 4),
    "depthwise with steps of an even size": (array(2, 4, 8, 6), array(4, 1, 3, 3), 2, 1, 1, 4),
    "depthwise, many taps": (array(2, 4, 7, 8), array(4, 1, 7, 5), 1, (3, 2), 1, 4),
    "depthwise, many taps, one image": (array(1, 4, 7, 8), array(8, 1, 6, 5), 2, 2, 1, 4),
    "depthwise, many taps, an odd image": (array(1, 3, 9, 8), array(3, 1, 6, 5), 1, 1, 1, 3),
    "depthwise line": (array(2, 4, 9), array(4, 1, 4), 1, 3, 1, 4),
}


def _cube_sum(x: Any) -> Any:
    return (x**3).sum()


@pytest.mark.parametrize("way, wanted", diagonal(3, list(WAYS), ["input", "weight", "both"]))
def test_each_way_has_torchs_gradients(way: str, wanted: str) -> None:
    x, w, *rest = WAYS[way]
    n = x.ndim - 2
    places = {"input": (0,), "weight": (1,), "both": (0, 1)}[wanted]
    call = lambda x, w: _cube_sum(getattr(F, f"conv{n}d")(x, w, None, *rest))
    ours = quickly(jax.grad(call, places))
    tensors = to_torch((x, w))
    for i in places:
        tensors[i].requires_grad_(True)
    _cube_sum(getattr(torch.nn.functional, f"conv{n}d")(*tensors, None, *rest)).backward()
    for got, i in zip(ours(*to_jax((x, w))), places, strict=True):
        close(got, tensors[i].grad, f"argument {i}", 1e-5)


def test_patches_of_a_large_batch_have_torchs_gradients() -> None:
    x, w = array(2, 2, 1500, 1500), array(3, 2, 2, 2)
    ours = quickly(jax.grad(lambda x, w: _cube_sum(F.conv2d(x, w, None, 2)), (0, 1)))
    tensors = [t.requires_grad_(True) for t in to_torch((x, w))]
    _cube_sum(torch.nn.functional.conv2d(*tensors, None, 2)).backward()
    for got, tensor in zip(ours(*to_jax((x, w))), tensors, strict=True):
        close(got, tensor.grad, "gradient", 1e-4)


# So long that their gradient by the kernel is a product for one image after the other, or for a few.
LONG = {
    "image after image": (array(5, 32, 48, 48), array(64, 32, 3, 3), 1, 1, 1, 1),
    "four images at a time, and a rest": (array(19, 64, 10, 10), array(128, 64, 3, 3), 1, 1, 1, 1),
    "with steps and distances": (array(12, 32, 61, 63), array(64, 32, 3, 2), 2, (2, 0), (1, 2), 1),
    "in groups": (array(8, 64, 32, 32), array(128, 32, 3, 3), 1, 1, 1, 2),
}


@pytest.mark.parametrize("case", LONG)
def test_long_gradients_are_torchs_and_so_are_theirs(case: str) -> None:
    x, w, *rest = LONG[case]
    call = f"conv{x.ndim - 2}d"

    about = w[0].size ** 0.5  # the size of an output
    tx, tw = (to_torch(a).requires_grad_() for a in (x, w))
    value = torch.tanh(getattr(torch.nn.functional, call)(tx, tw, None, *rest) / about) ** 2
    first = torch.autograd.grad(value.sum(), (tx, tw), create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), (tx, tw))

    ours = lambda x, w: (jnp.tanh(getattr(F, call)(x, w, None, *rest) / about) ** 2).sum()
    gradients = jax.grad(ours, (0, 1))
    of_gradients = jax.grad(lambda *a: sum((g * g).sum() for g in gradients(*a)), (0, 1))
    found = quickly(lambda *a: (gradients(*a), of_gradients(*a)))(to_jax(x), to_jax(w))
    for mine, theirs in zip(jax.tree.leaves(found), [*first, *second], strict=True):
        theirs = theirs.detach()
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_no_gradient_by_the_kernel_brings_the_images_of_a_batch_to_every_device() -> None:
    run_on_devices(
        2,
        """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import statefulnn.functional as F
sizes = {"long": ((8, 32, 40, 40), (64, 32, 3, 3), 1), "depthwise": ((8, 16, 9, 9), (16, 1, 3, 3), 16),
         "depthwise, many taps": ((8, 8, 9, 9), (8, 1, 7, 7), 8)}
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    split, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        for name, (x, w, groups) in sizes.items():
            x = jax.ShapeDtypeStruct(x, jnp.float32, sharding=split)
            w = jax.ShapeDtypeStruct(w, jnp.float32, sharding=whole)
            loss = lambda w, x: (F.conv2d(x, w, padding=1, groups=groups) ** 2).sum()
            text = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()
            assert "all-reduce(" in text and "all-gather(" not in text, (kind, name)
""",
    )


@pytest.mark.parametrize("way", diagonal(2, list(WAYS)))
def test_each_way_has_torchs_second_derivatives_by_the_weight(way: str) -> None:
    x, w, *rest = WAYS[way]
    n = x.ndim - 2
    direction = array(*w.shape, seed=3)
    call = lambda w: _cube_sum(getattr(F, f"conv{n}d")(to_jax(x), w, None, *rest))
    product = quickly(lambda w, v: jax.jvp(jax.grad(call), (w,), (v,))[1])
    got = product(to_jax(w), to_jax(direction))
    tx, tw = to_torch((x, w))
    tw.requires_grad_(True)
    out = _cube_sum(getattr(torch.nn.functional, f"conv{n}d")(tx, tw, None, *rest))
    (slope,) = torch.autograd.grad(out, tw, create_graph=True)
    (expected,) = torch.autograd.grad((slope * to_torch(direction)).sum(), tw)
    close(got, expected, "Hessian-vector product", 1e-5)


@pytest.mark.parametrize("way", diagonal(3, list(WAYS)))
def test_each_way_has_a_forward_derivative(way: str) -> None:
    # A convolution is bilinear: its derivative along (x, w) is twice its value.
    x, w, *rest = WAYS[way]
    n = x.ndim - 2
    call = lambda x, w: getattr(F, f"conv{n}d")(x, w, None, *rest)
    value, slope = quickly(lambda at: jax.jvp(call, at, at))(to_jax((x, w)))
    close(slope, to_torch(np.array(2 * value)), "derivative", 1e-5)


@pytest.mark.parametrize("way", diagonal(4, list(WAYS)))
def test_each_way_maps_over_weights(way: str) -> None:
    x, w, *rest = to_jax(WAYS[way])
    n = x.ndim - 2
    gradient = jax.grad(lambda w: _cube_sum(getattr(F, f"conv{n}d")(x, w, None, *rest)))
    slope = quickly(gradient)
    both = jnp.stack([w, 0.5 * w])
    together = quickly(jax.vmap(gradient))(both)
    for i in range(2):
        expected = np.asarray(slope(both[i]))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(together[i], expected, atol=1e-5 * scale)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_constructor_has_torchs_arguments(kind: str, n: int) -> None:
    ours = inspect.signature(getattr(nn, f"{kind}{n}d").__init__).parameters
    theirs = inspect.signature(getattr(torch.nn, f"{kind}{n}d").__init__).parameters
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


def test_a_transposed_layer_starts_within_torchs_bound() -> None:
    layer = nn.ConvTranspose2d(64, 8, 3)
    bound = 1 / np.sqrt(8 * 9)
    largest = float(jnp.abs(layer.weight.value).max())
    assert 0.99 * bound < largest <= bound
    assert float(jnp.abs(layer.bias.value).max()) <= bound


def test_eager_calls_of_one_shape_are_checked_and_compiled_once() -> None:
    x, w = jnp.ones((1, 2, 5, 5)), jnp.ones((3, 2, 3, 3))
    F.conv2d(x, w, stride=[2, 1])
    with pytest.MonkeyPatch.context() as patch:
        refuse = lambda *_: pytest.fail("checked again")
        patch.setattr("statefulnn.functional.conv.check_groups", refuse)
        F.conv2d(x, w, stride=[2, 1])


def test_border_wider_than_what_a_negative_padding_leaves_is_refused() -> None:
    # torch wraps around twice here, or returns memory that nobody wrote.
    with pytest.raises(nn.ShapeError, match="more than once"):
        F.pad(jnp.ones((2, 4)), (4, -2), "circular")


def test_value_of_a_padding_may_be_traced() -> None:
    fill = lambda x, value: F.pad(x, (1, 1), value=value)
    np.testing.assert_array_equal(quickly(fill)(jnp.ones(2), 3.0), [3, 1, 1, 3])
    _, by_value = jax.grad(lambda *a: fill(*a).sum(), (0, 1))(jnp.ones(2), 3.0)
    assert float(by_value) == 2


def test_another_value_of_a_padding_is_no_other_compiled_function() -> None:
    traced = []
    original = nn.functional.padding._pairs

    def counted(*args: Any) -> Any:
        traced.append(args)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("statefulnn.functional.padding._pairs", counted)
        for value in (0.25, 0.5, 0.75):
            F.pad(jnp.ones((3, 11)), (1, 7), value=value)
    assert len(traced) == 1


def test_fold_undoes_unfold_up_to_the_number_of_blocks() -> None:
    x = jnp.asarray(array(2, 3, 9, 10))
    options = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    count = F.fold(F.unfold(jnp.ones_like(x), **options), (9, 10), **options)
    both = F.fold(F.unfold(x, **options), (9, 10), **options)
    np.testing.assert_allclose(both, x * count, rtol=1e-5)


# Compiling XLA's own gradient by the image aborts the process for each of these (jaxlib 0.10.2).
ABORTED = [
    ((2, 3), (2, 2), (1, 0), (4, 6)),
    ((2, 5), (2, 2), (1, 0), (8, 6)),
    ((2, 2), (2, 2), (0, 1), (3, 4)),
    ((2, 3), (2, 1), (1, 1), (8, 2)),
    ((3, 2), (3, 2), (1, 1), (6, 8)),
    ((5, 2), (3, 2), (2, 1), (6, 4)),
    ((4, 2), (2, 2), (0, 1), (7, 6)),
]


@pytest.mark.compiled_with_care
@pytest.mark.parametrize(("kernel", "stride", "padding", "sizes"), ABORTED)
@pytest.mark.parametrize("groups", [1, 2])
def test_two_points_with_a_step_and_a_border_of_one(kernel, stride, padding, sizes, groups):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, *sizes)).astype(np.float32)
    w = rng.normal(size=(6, 4 // groups, *kernel)).astype(np.float32)
    how = {"stride": stride, "padding": padding, "groups": groups}
    value, pull = jax.vjp(lambda x, w: F.conv2d(x, w, **how), jnp.asarray(x), jnp.asarray(w))
    given = [torch.tensor(a, requires_grad=True) for a in (x, w)]
    expected = torch.nn.functional.conv2d(*given, **how)
    y = rng.normal(size=value.shape).astype(np.float32)
    expected.backward(torch.tensor(y))
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-4, atol=1e-5)
    for found, tensor in zip(pull(jnp.asarray(y)), given, strict=True):
        np.testing.assert_allclose(found, tensor.grad, rtol=1e-4, atol=1e-4)
