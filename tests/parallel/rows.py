"""Rows of the parity table on an explicit mesh of two devices, which a process of its own has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import statefulnn as nn
from tests.parity.oracle import Case, flat, is_float, to_jax
from tests.parity.table import LAYERS, ONE_OF_EACH

# Of these the numbers are compared, too, in the short run: each is of another kind.
COMPARED = {
    "Linear",
    "Conv2d",
    "Embedding",
    "GRU",
    "MaxPool2d",
    "PixelShuffle",
    "Unfold",
    "BatchNorm2d",
    "MultiheadAttention",
    "CrossEntropyLoss",
}


def spread(mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
    """Return what splits the first axis of arrays over a mesh, where there is an even number of entries."""
    sharding = jax.NamedSharding(mesh, jax.P("data"))

    def put(x: Any) -> Any:
        even = isinstance(x, jax.Array) and x.ndim and x.shape[0] and x.shape[0] % 2 == 0
        return jax.device_put(x, sharding) if even else x

    return put


def doubled(inputs: Any) -> Any:
    """Return inputs with every first axis of odd length twice: two batches."""
    odd = lambda v: isinstance(v, np.ndarray) and v.ndim and v.shape[0] % 2
    return jax.tree.map(lambda v: np.concatenate([v, v]) if odd(v) else v, inputs)


def prepared(case: Case, inputs: Any, put: Callable[[Any], Any]) -> tuple[Any, tuple]:
    """Return a compiled function that gives loss and gradients of a row, and its arguments."""
    nn.manual_seed(0)
    model = getattr(nn, case.layer)(*case.args, **to_jax(case.kwargs))
    call = to_jax(case.call)
    leaves, treedef = jax.tree.flatten(jax.tree.map(put, to_jax(inputs)))
    arrays = [i for i, v in enumerate(leaves) if isinstance(v, jax.Array)]
    floats = [i for i in arrays if is_float(leaves[i])]
    rest = [i for i in arrays if i not in floats]

    def loss(m: Any, given: list[Any], others: list[Any]) -> Any:
        held = dict(zip([*floats, *rest], [*given, *others], strict=True))
        out = flat(m(*treedef.unflatten([held.get(i, v) for i, v in enumerate(leaves)]), **call))
        kept = [o for o in out if hasattr(o, "dtype") and is_float_dtype(o)]
        return sum((jnp.where(jnp.isfinite(o), o, 0.0) ** 2).sum() for o in kept)

    trained = any(p.requires_grad for p in model.parameters())
    wanted = tuple(i for i, there in enumerate((trained, floats)) if there)
    function = nn.jit(nn.value_and_grad(loss, argnums=wanted) if wanted else loss)
    return function, (model, [leaves[i] for i in floats], [leaves[i] for i in rest])


def is_float_dtype(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def check(case: Case, inputs: Any, put: Callable[[Any], Any], compare: bool) -> None:
    function, arguments = prepared(case, inputs, put)
    if not compare:
        function.lower(*arguments)
        return
    alone, there = prepared(case, inputs, lambda x: x)
    expected, found = jax.tree.leaves(alone(*there)), jax.tree.leaves(function(*arguments))
    for a, b in zip(expected, found, strict=True):
        scale = max(1.0, float(np.abs(np.asarray(a)).max(initial=0)))
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=0, atol=3e-5 * scale)


def failures(cases: Iterable[Case], compare: Callable[[Case], bool]) -> list[str]:
    """Trace and lower rows on an explicit mesh, or also compare them with one device; say what fails."""
    put = spread(jax.make_mesh((2,), ("data",)))
    found = []
    for case in cases:
        try:
            check(case, doubled(case.inputs), put, compare(case))
        except Exception:
            try:  # two batches are none for some rows
                check(case, case.inputs, put, compare(case))
            except Exception as error:
                found.append(f"{case}: {type(error).__name__}: {str(error)[:300]}")
    return found


def main(everything: bool) -> None:
    """Raise if a row fails."""
    warnings.simplefilter("ignore")
    assert jax.device_count() == 2
    if everything:
        some = [c for c in LAYERS if all(0 not in x.shape for x in c.inputs if hasattr(x, "shape"))]
        found = failures(some, lambda case: True)
    else:
        found = failures(ONE_OF_EACH, lambda case: case.layer in COMPARED)
    assert not found, "\n".join(found)
