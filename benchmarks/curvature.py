"""What eigenvalues cost beside the products that they need.

    python benchmarks/curvature.py --json results.json --markdown docs/benchmarks.md
    python benchmarks/curvature.py --only hessian

The network has about 100,000 parameters, the data the size of digits (1,797 images of 8 x 8). Its
top ten eigenvalues by `eigenpairs` are timed beside as many products as these need, in one compiled loop
and in one interleaved run: what is above 1 is orthogonalisation, restarts and dispatch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _harness import Case, measure, table  # noqa: E402
from _report import Report, arguments, run  # noqa: E402

import statefulnn as nn  # noqa: E402
import statefulnn.functional as F  # noqa: E402
from statefulnn import curvature  # noqa: E402

K = 10


def network() -> nn.Module:
    """64-256-256-64-10: 99,530 parameters."""
    sizes = (64, 256, 256, 64)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def data() -> tuple[Any, Any]:
    """Images of classes that a network can tell apart."""
    keys = jax.random.split(jax.random.key(0), 2)
    y = jnp.arange(1797) % 10
    centres = jax.random.normal(keys[0], (10, 64))
    return centres[y] + 0.5 * jax.random.normal(keys[1], (1797, 64)), y


def trained(steps: int = 100) -> tuple[Callable, Any, Any]:
    """The network as a function, with parameters after some gradient descent, and the data."""
    nn.manual_seed(0)
    fn, params = nn.functionalize(network())
    x, y = data()

    @jax.jit
    def train(params):
        def step(_, params):
            grads = jax.grad(lambda p: F.cross_entropy(fn(p, x), y))(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

        return jax.lax.fori_loop(0, steps, step, params)

    return fn, train(params), (x, y)


MATRICES = {"hessian": curvature.hessian, "ggn": curvature.ggn}


def cases_of(name: str) -> tuple[list[Case], int, int]:
    """Return the products and the eigenvalues as cases, the number of products and of parameters."""
    fn, params, batch = trained()
    A = MATRICES[name]((fn, params), F.cross_entropy, batch)
    key = jax.random.key(1)
    products = int(curvature.eigenpairs(A, K, rng=key).products)

    @jax.jit
    def multiply(A, v):
        # Each product is of what came before, as in Lanczos.
        def step(_, v):
            v = A @ v
            return v / jnp.linalg.norm(v)

        return jax.lax.fori_loop(0, products, step, v)

    def eigenvalues():
        return curvature.eigenpairs(A, K, rng=key).values

    v = jax.random.normal(key, (A.shape[0],))
    cases = [
        Case(f"{products} products", lambda: multiply(A, v)),
        Case(f"top {K} eigenpairs", eigenvalues),
    ]
    check(A, eigenvalues())
    return cases, products, A.shape[0]


def check(A: Any, values: Any) -> None:
    """Raise unless the largest eigenvalue is what the power method finds."""
    v = jnp.ones(A.shape[0])
    for _ in range(200):
        v = A @ (v / jnp.linalg.norm(v))
    np.testing.assert_allclose(values[0], jnp.linalg.norm(v), rtol=1e-2)


def compare(name: str, report: Report, quick: bool) -> None:
    """Add the table of one kind of matrix."""
    cases, products, size = cases_of(name)
    timings = measure(cases, seconds=5 if quick else 25, description=name, burst_us=1.0, fewest=5)
    report.numbers[name] = {
        "parameters": size,
        "products": products,
        "timings": [t.row() for t in timings],
    }
    report.target(f"{name}: top {K} beside its products", timings[1].ratio_done, 1.2, "x")
    rows = [[t.label, f"{t.done / 1e3:.0f}", f"{t.ratio_done:.2f}x"] for t in timings]
    note = f"64-256-256-64-10, {size:,} parameters, 1,797 rows."
    report.section(f"Eigenvalues: {name}", table(["", "ms", "beside the products"], rows), note)


PARTS = {name: functools.partial(compare, name) for name in MATRICES}


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__ or "", list(PARTS)).parse_args(argv)
    return run(PARTS, options, title="Eigenvalues", mark="curvature", packages=())


if __name__ == "__main__":
    sys.exit(main())
