"""Convolutions in the body of a loop, and with many kernels at once, are those of straight code.

On CPU they are computed in another form there: see statefulnn/functional/_conv_lowering.py.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
import statefulnn.functional as F
from statefulnn.functional import _conv_lowering
from tests.precision import in_float64
from tests.quick import diagonal, first, quickly

CASES = {
    "1-d": (nn.Conv1d, torch.nn.Conv1d, (4, 6, 3), {"padding": 1}, (9,)),
    "3x3": (nn.Conv2d, torch.nn.Conv2d, (4, 6, 3), {"padding": 1}, (7, 8)),
    "one channel": (nn.Conv2d, torch.nn.Conv2d, (1, 6, 3), {}, (7, 8)),
    "stride and dilation": (
        nn.Conv2d,
        torch.nn.Conv2d,
        (4, 6, (3, 2)),
        {"stride": (2, 1), "dilation": (1, 2), "padding": (2, 0)},
        (9, 8),
    ),
    "groups": (nn.Conv2d, torch.nn.Conv2d, (4, 6, 3), {"groups": 2, "padding": 1}, (7, 8)),
    "depthwise": (nn.Conv2d, torch.nn.Conv2d, (4, 4, 3), {"groups": 4, "padding": 1}, (7, 8)),
    "reflected border": (
        nn.Conv2d,
        torch.nn.Conv2d,
        (4, 6, 3),
        {"padding": 1, "padding_mode": "reflect"},
        (7, 8),
    ),
    "3-d": (nn.Conv3d, torch.nn.Conv3d, (2, 3, 3), {"padding": 1}, (4, 5, 6)),
    "transposed": (nn.ConvTranspose2d, torch.nn.ConvTranspose2d, (4, 6, 3), {"stride": 2}, (5, 6)),
}


def pair(case: str) -> tuple[nn.Module, torch.nn.Module, np.ndarray]:
    """Return our layer, torch's with the same weights in float64, and two batches."""
    make, theirs, sizes, options, space = CASES[case]
    torch.manual_seed(0)
    reference = theirs(*sizes, **options).double()
    layer = make(*sizes, **options, dtype=jnp.float64)
    layer.load_state_dict({k: v.numpy() for k, v in reference.state_dict().items()})
    rng = np.random.default_rng(1)
    return layer, reference, rng.standard_normal((2, 2, sizes[0], *space))


def torch_gradients(reference: torch.nn.Module, x: np.ndarray, order: int) -> list[np.ndarray]:
    """Return the gradients of the output, cubed, or of their squares: of the input and the parameters."""
    at = torch.tensor(x, requires_grad=True)
    value, over = reference(at).pow(3).sum(), [at, *reference.parameters()]
    for _ in range(order - 1):
        value = sum(g.pow(2).sum() for g in torch.autograd.grad(value, over, create_graph=True))
    return [g.numpy() for g in torch.autograd.grad(value, over)]


# Of the others the code in a loop is that of those: of fewer dimensions, or before or after the border.
ORDERS = [
    pytest.param(case, "small", 1, marks=pytest.mark.long)
    for case in ("1-d", "3x3", "one channel", "depthwise", "reflected border")
] + [
    ("stride and dilation", "small", 1),
    ("groups", "small", 1),
    ("3-d", "small", 1),
    ("transposed", "small", 1),
    ("groups", "image by image", 1),
    ("3x3", "small", 2),
    pytest.param("3x3", "image by image", 2, marks=pytest.mark.long),
]


@pytest.mark.parametrize("case, size, order", ORDERS)
def test_derivatives_in_a_loop_are_torchs(case, size, order, monkeypatch):
    if size != "small":
        monkeypatch.setattr(_conv_lowering, "LARGE_BATCH", 1)
        jax.clear_caches()
    with in_float64():
        layer, reference, batches = pair(case)
        fn, params = nn.functionalize(layer)
        value = lambda x, p: (fn(p, x) ** 3).sum()
        if order == 2:
            first = jax.grad(value, argnums=(0, 1))
            value = lambda x, p: sum((g**2).sum() for g in jax.tree.leaves(first(x, p)))
        step = lambda carry, x: (carry, jax.grad(value, argnums=(0, 1))(x, params))
        _, (of_x, of_params) = quickly(lambda x: nn.scan(step, (), x))(jnp.asarray(batches))
        for i, x in enumerate(batches):
            found = [of_x[i], *(of_params[n][i] for n, _ in reference.named_parameters())]
            for ours, theirs in zip(found, torch_gradients(reference, x, order), strict=True):
                np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-9, atol=1e-9)
    if size != "small":
        jax.clear_caches()


@pytest.mark.parametrize("case", diagonal(2, list(CASES)))
def test_many_kernels_at_once_are_each_by_itself(case):
    make, theirs, sizes, options, space = CASES[case]
    torch.manual_seed(0)
    members = [theirs(*sizes, **options) for _ in range(3)]
    layers = [make(*sizes, **options) for _ in members]
    for layer, member in zip(layers, members, strict=True):
        layer.load_state_dict({k: v.detach().numpy() for k, v in member.state_dict().items()})
    x = np.random.default_rng(2).standard_normal((2, sizes[0], *space)).astype(np.float32)
    out = nn.Ensemble.of(layers)(jnp.asarray(x))
    for i, member in enumerate(members):
        expected = member(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(np.asarray(out[i]), expected, rtol=1e-5, atol=1e-5)


def convolutions(compiled: Any) -> int:
    """Count XLA's own convolutions in a compiled program."""
    return len(re.findall(r"= \S+ convolution\(", compiled.as_text()))


@pytest.mark.parametrize("loop", first(3, ["scan", "while_loop", "Ensemble", "fori_loop", "map"]))
def test_xlas_convolution_is_not_in_repeated_code(loop):
    layer = nn.Conv2d(8, 8, 3, padding=1)
    x = jnp.ones((2, 8, 6, 6))
    programs = {
        "scan": lambda m, x: nn.scan(lambda h, _: (m(h), None), x, length=3)[0],
        "fori_loop": lambda m, x: nn.fori_loop(0, 3, lambda i, h: m(h), x),
        "while_loop": lambda m, x: nn.while_loop(lambda h: h.sum() > 0, lambda h: m(h), x),
        "map": lambda m, x: nn.map(m, jnp.stack([x, x])),
        "Ensemble": lambda m, x: m(x),
    }
    model = nn.Ensemble(lambda: nn.Conv2d(8, 8, 3, padding=1), 3) if loop == "Ensemble" else layer
    assert convolutions(nn.jit(programs[loop]).lower(model, x).compile()) == 0
    assert convolutions(nn.jit(lambda m, x: m(x)).lower(layer, x).compile()) == 1


def test_a_call_after_a_loop_is_straight_code_again():
    layer, x = nn.Conv2d(8, 8, 3), jnp.ones((2, 8, 6, 6))

    def f(layer: Any, x: Any) -> Any:
        out = nn.scan(lambda c, x: (c, layer(x)), (), x[None])[1]
        return out, layer(x)

    assert convolutions(nn.jit(f).lower(layer, x).compile()) == 1
    with pytest.raises(nn.ShapeError):
        nn.scan(lambda c, x: (c, F.conv2d(x, x[:, :3])), (), x[None])
    assert convolutions(nn.jit(lambda m, x: m(x)).lower(layer, x).compile()) == 1
