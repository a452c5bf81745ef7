"""One change of a layer, made in torch and in statefulnn: the means of comparison of this folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

import statefulnn as nn
from tests.parity.oracle import close, compare_buffers, load, to_numpy
from tests.quick import QUICKLY

TOLERANCE = 2e-5


def twins(layer: str, args: tuple, change: Callable, **kwargs: Any) -> tuple[Any, Any]:
    """Build a layer in both libraries, change both, and give ours the values of torch's.

    Args:
        layer: the name of a class.
        args: the arguments of its constructor, kwargs the other ones.
        change: called with (nn, layer), where `nn` is either library.
    """
    torch.manual_seed(0)
    theirs, ours = getattr(torch.nn, layer)(*args, **kwargs), getattr(nn, layer)(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = change(torch.nn, theirs) or theirs
        ours = change(nn, ours) or ours
    load(ours, theirs)
    return theirs, ours


def compare_calls(theirs: Any, ours: Any, x: np.ndarray, calls: int, jitted: bool) -> None:
    """Compare outputs, gradients and buffers of several calls."""

    def loss(model: Any, x: Any) -> tuple[Any, Any]:
        out = model(x)
        return (out**3).sum(), out

    step = nn.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    step = nn.jit(step, compiler_options=QUICKLY) if jitted else step
    for _ in range(calls):
        theirs.zero_grad()
        tensor = torch.as_tensor(x).requires_grad_(True)
        expected = theirs(tensor)
        (expected**3).sum().backward()
        (_, out), (grads, grad_x) = step(ours, jnp.asarray(x))
        close(out, expected, "output", TOLERANCE)
        close(grad_x, tensor.grad, "gradient of the input", 4 * TOLERANCE)
        wanted = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
        assert set(grads) == set(wanted)  # jax sorts the names
        for name, gradient in wanted.items():
            close(grads[name], gradient, f"gradient of {name}", 4 * TOLERANCE)
        compare_buffers(ours, theirs, TOLERANCE)


def same_state(ours: Any, theirs: Any) -> None:
    """Compare names, values and metadata of two state dicts."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name, value in b.items():
        close(a[name], to_numpy(value), name, TOLERANCE)
    assert dict(a._metadata) == dict(b._metadata)
