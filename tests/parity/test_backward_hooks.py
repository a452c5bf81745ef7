"""Backward hooks on every layer, against torch: what they see, and what replacing gradients does.

One compiled call a row: a pre-hook doubles the output's gradient and a hook triples the input's, and
both tell what they were given. torch's twin has the same two hooks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.parity.oracle import (
    TOLERANCE,
    Case,
    array,
    close,
    flat,
    is_float,
    pair,
    to_jax,
    to_numpy,
    to_torch,
)
from tests.parity.table import LAYERS, TORCH_WARNS, representative
from tests.quick import QUICKLY

pytestmark = [
    *TORCH_WARNS,
    pytest.mark.filterwarnings("ignore:Using a target size"),
    # By torch only: we fire the hook when the gradients are there, whatever they are taken by.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed"),
]


def chosen() -> list[Any]:
    """Return rows of all layers: the first of every third for the short run."""
    # torch refuses an in-place operation on an input of a module with backward hooks.
    in_place = {"RReLU": 2, "Threshold": 2}  # where it may be given by position
    rows = [
        c
        for c in LAYERS
        if not c.kwargs.get("inplace") and c.args[in_place.get(c.layer, len(c.args)) :] != (True,)
    ]
    return representative(rows, parts=3)


def hooks(seen: dict[str, Any]) -> tuple[Any, Any]:
    """Return a pre-hook and a hook for either library."""

    def doubled(module, grad_output):
        seen["pre"] = grad_output
        return tuple(None if g is None else g * 2 for g in grad_output)

    def tripled(module, grad_input, grad_output):
        seen["in"], seen["out"] = grad_input, grad_output
        return tuple(None if g is None else g * 3 for g in grad_input)

    return doubled, tripled


def of_torch(case: Case) -> tuple[dict, dict, list, list] | None:
    """Return what torch's hooks saw, the gradients of parameters and inputs, and the cotangents."""
    model, _ = pair(case)
    seen: dict[str, Any] = {}
    doubled, tripled = hooks(seen)
    model.register_full_backward_pre_hook(doubled)
    model.register_full_backward_hook(tripled)
    given = [to_torch(x) for x in case.inputs]
    for x in given:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_(True)
    out = model(*given, **{k: to_torch(v) for k, v in case.call.items()})
    cotangents = [array(*o.shape, seed=100 + i) for i, o in enumerate(flat(out))]
    terms = [
        (o * torch.as_tensor(c)).sum()
        for o, c in zip(flat(out), cotangents, strict=True)
        if is_float(o)
    ]
    loss = sum(terms[1:], terms[0]) if terms else None
    if loss is None or not loss.requires_grad:
        return None
    loss.backward()
    parameters = {name: p.grad for name, p in model.named_parameters()}
    return seen, parameters, [getattr(x, "grad", None) for x in given], cotangents


def same_gradient(ours: Any, theirs: Any, what: str, tolerance: float) -> None:
    """Compare two gradients; no gradient is one of zeros."""
    if theirs is None or ours is None:
        for g in (ours, theirs):
            assert g is None or not np.any(to_numpy(g)), what
        return
    close(ours, theirs, what, tolerance)


@pytest.mark.parametrize("case", chosen())
def test_hooks_see_and_replace_what_torchs_do(case: Case) -> None:
    wanted = of_torch(case)
    if wanted is None:
        return  # integers only: there is no gradient
    seen_by_torch, parameters, inputs, cotangents = wanted

    _, model = pair(case)
    seen: dict[str, Any] = {}
    doubled, tripled = hooks(seen)
    model.register_full_backward_pre_hook(doubled)
    model.register_full_backward_hook(tripled)
    given = [to_jax(x) for x in case.inputs]
    floating = [i for i, x in enumerate(given) if isinstance(x, jax.Array) and is_float(x)]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    numbers = ((0,) if trained else ()) + tuple(i + 1 for i in floating)

    def loss_of(model: nn.Module, *inputs: Any) -> Any:
        out = model(*inputs, **{k: to_jax(v) for k, v in case.call.items()})
        terms = [
            (o * jnp.asarray(c, o.dtype)).sum()
            for o, c in zip(flat(out), cotangents, strict=True)
            if is_float(o)
        ]
        return sum(terms[1:], terms[0])

    def step(model: nn.Module, *inputs: Any) -> Any:
        return nn.grad(loss_of, argnums=numbers)(model, *inputs), dict(seen)

    gradients, seen_by_us = nn.jit(step, compiler_options=QUICKLY)(model, *given)
    by_number = dict(zip(numbers, gradients, strict=True))
    by_name = by_number.get(0, {})

    tolerance = 16 * TOLERANCE["float32"] * case.tolerance
    assert seen_by_us.keys() == seen_by_torch.keys()
    for what, theirs in seen_by_torch.items():
        ours = seen_by_us[what]
        assert len(ours) == len(theirs), what
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            same_gradient(a, b, f"gradient {i} that the hook saw as {what}", tolerance)
    for name, theirs in parameters.items():
        same_gradient(by_name.get(name), theirs, f"gradient of {name}", tolerance)
    for i in floating:
        same_gradient(by_number[i + 1], inputs[i], f"gradient of input {i}", tolerance)
