"""Products by group on CPU, which are computed block by block: see functional/_grouped_lowering.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import statefulnn.functional as F
from tests.parity.oracle import array

GROUPS, INNER, OUT = 5, 3, 2
# The last ends of some are before the last row; torch leaves what comes after them undefined.
ENDS = {
    "uneven": (1, 18, 18, 20, 40),
    "one has all": (0, 0, 40, 40, 40),
    "the rest is nobody's": (7, 7, 9, 30, 35),
    "nobody has any": (0, 0, 0, 0, 0),
}
W = array(GROUPS, INNER, OUT, seed=1)


def rows(count: int) -> np.ndarray:
    return array(count, INNER)


def ends(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def expected(a: Any, w: Any, offs: Any) -> Any:
    """Multiply one group after the other, in torch; zeros after the last."""
    parts, start = [], 0
    for matrix, end in zip(w, offs, strict=True):
        parts.append(a[start:end] @ matrix)
        start = end
    return torch.cat([*parts, a.new_zeros(len(a) - start, w.shape[2])])


def loss(out: Any, sin: Any) -> Any:
    return (sin(out) * out).sum()


def ours(a: Any, w: Any, offs: Any) -> Any:
    return loss(F.grouped_mm(a, w, offs=offs), jnp.sin)


def gradients(a: Any, w: Any, offs: Any) -> list[np.ndarray]:
    """Return the output, torch's gradients, and those of a function of these."""
    a, w = (torch.tensor(np.asarray(x), requires_grad=True) for x in (a, w))
    out = expected(a, w, offs)
    first = torch.autograd.grad(loss(out, torch.sin), (a, w), create_graph=True)
    second = torch.autograd.grad((first[0] ** 3).sum() + (first[1] ** 3).sum(), (a, w))
    return [x.detach().numpy() for x in (out, *first, *second)]


def of_gradients(a: Any, w: Any, offs: Any) -> Any:
    return sum(jnp.sum(g**3) for g in jax.grad(ours, (0, 1))(a, w, offs))


def close(got: Any, wanted: Any) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("offs", ENDS.values(), ids=ENDS)
def test_values_and_two_derivatives_are_those_of_a_loop_over_groups(offs: tuple) -> None:
    a = rows(40)
    out, *rest = gradients(a, W, offs)

    @jax.jit
    def all_of_them(a: Any, w: Any, offs: Any) -> Any:
        first = jax.grad(ours, (0, 1))(a, w, offs)
        return F.grouped_mm(a, w, offs=offs), first, jax.grad(of_gradients, (0, 1))(a, w, offs)

    close(all_of_them(a, W, ends(offs)), (out, *rest))


def test_the_derivative_of_forward_mode_is_that_of_reverse_mode() -> None:
    a, offs = rows(40), ends(ENDS["uneven"])
    towards = (array(40, INNER, seed=2), array(GROUPS, INNER, OUT, seed=3))
    _, tangent = jax.jvp(lambda a, w: ours(a, w, offs), (a, W), towards)
    _, first_a, first_w, *_ = gradients(a, W, ENDS["uneven"])
    np.testing.assert_allclose(
        tangent, (first_a * towards[0]).sum() + (first_w * towards[1]).sum(), rtol=1e-4
    )


@pytest.mark.parametrize("count", [0, 1, 16, 17])
def test_numbers_of_rows_around_the_size_of_a_block(count: int) -> None:
    offs = tuple(min(end, count) for end in ENDS["uneven"])
    out, first_a, first_w, *_ = gradients(rows(count), W, offs)
    close(F.grouped_mm(rows(count), W, offs=ends(offs)), out)
    close(jax.grad(ours, (0, 1))(rows(count), jnp.asarray(W), ends(offs)), (first_a, first_w))


@pytest.mark.parametrize("axes", [(0, None, 0), (0, 0, None), (None, 0, 0), (None, None, 0)])
def test_lanes_with_groups_of_their_own(axes: tuple) -> None:
    lanes = list(ENDS.values())[:3]
    a, w = (np.stack([x, x + 1, x * 2]) for x in (rows(40), W))
    given = [x if axis is not None else x[0] for x, axis in zip((a, w), axes[:2], strict=True)]
    offs = ends(lanes if axes[2] is not None else lanes[0])
    of_lane = lambda x, axis, i: x[i] if axis is not None else x
    one = lambda a, w, offs: (F.grouped_mm(a, w, offs=offs), *jax.grad(ours, (0, 1))(a, w, offs))
    got = jax.jit(jax.vmap(one, axes))(*given, offs)
    for i in range(3):
        a_i, w_i = (of_lane(x, axis, i) for x, axis in zip(given, axes[:2], strict=True))
        wanted = gradients(a_i, w_i, lanes[i if axes[2] is not None else 0])[:3]
        close([x[i] for x in got], wanted)


def test_an_infinite_weight_is_in_the_products_of_its_own_group_alone() -> None:
    a, offs = rows(40), ends(ENDS["uneven"])
    broken = jnp.asarray(W).at[1].set(jnp.inf)
    after = lambda a, w: F.grouped_mm(a, w, offs=offs)[18:].sum()
    first_a, first_w = jax.grad(after, (0, 1))(a, broken)
    assert np.isfinite(after(a, broken))
    assert np.isfinite(first_a[18:]).all() and np.isfinite(first_w).all()


def test_a_number_of_rows_with_a_name() -> None:
    (name,) = jax.export.symbolic_shape("rows")
    one = lambda a, w, offs: (F.grouped_mm(a, w, offs=offs), *jax.grad(ours, (0, 1))(a, w, offs))
    shapes = [((name, INNER), "float32"), (W.shape, "float32"), ((GROUPS,), "int32")]
    made = jax.export.export(jax.jit(one))(*(jax.ShapeDtypeStruct(*x) for x in shapes))
    for count in (7, 40, 100):
        offs = tuple(min(end, count) for end in ENDS["uneven"])
        close(made.call(rows(count), W, ends(offs)), gradients(rows(count), W, offs)[:3])


def test_low_precision_is_that_of_torch() -> None:
    a, w = array(32, 16), array(4, 16, 8, seed=1)
    offs = [3, 3, 20, 32]
    theirs = TF.grouped_mm(
        torch.tensor(a).bfloat16(),
        torch.tensor(w).bfloat16(),
        offs=torch.tensor(offs, dtype=torch.int32),
    )
    out = F.grouped_mm(jnp.asarray(a, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), offs=ends(offs))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), theirs.float().numpy(), rtol=1e-2)


def test_neither_value_nor_gradient_keeps_all_rows_for_every_group() -> None:
    groups, count, width = 32, 256, 64
    shapes = [
        ((count, width), "float32"),
        ((groups, width, width), "float32"),
        ((groups,), "int32"),
    ]
    for call in (lambda a, w, offs: F.grouped_mm(a, w, offs=offs), jax.grad(ours, (0, 1))):
        made = jax.jit(call).lower(*(jax.ShapeDtypeStruct(*x) for x in shapes)).compile()
        memory = made.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < groups * count * width * 4 / 2


def test_rows_beyond_the_last_group_are_zeros() -> None:
    out = F.grouped_mm(jnp.ones((3, 2)), jnp.ones((1, 2, 4)), offs=jnp.array([2], jnp.int32))
    assert np.asarray(out).sum(1).tolist() == [8.0, 8.0, 0.0]
