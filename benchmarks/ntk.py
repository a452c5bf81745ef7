"""What an empirical tangent kernel costs: the three methods beside torch.func and plain JAX.

    python benchmarks/ntk.py --json results.json --markdown results.md
    python benchmarks/ntk.py --seconds 5 --only cnn

The CNN and the batches (20 and 5 images of 3 x 32 x 32) are those of torch's tutorial on neural tangent
kernels, and so are its two methods; plain JAX is the same contraction of Jacobians, written by hand.
Everybody computes the full kernel, in one interleaved run and with the same number of threads; what is
not installed is left out.
"""

from __future__ import annotations

import argparse
import json
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

import statefulnn as nn  # noqa: E402
import statefulnn.functional as F  # noqa: E402
from statefulnn import curvature  # noqa: E402

METHODS = ("jacobian", "products", "layers")


class TutorialCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)
        self.conv3, self.fc = nn.Conv2d(32, 32, 3), nn.Linear(21632, 10)

    def forward(self, x):  # (N, 3, 32, 32) -> (N, 10)
        x = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return self.fc(x.reshape(x.shape[0], -1))


def mlp(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


def sequence_model(width: int, outputs: int) -> nn.Module:
    """Layers on 16 positions, then an average."""
    layers = [nn.Linear(32, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Lambda(lambda h: h.mean(1)), nn.Linear(width, outputs))


# Name -> model, shapes of both sides, whether torch and plain JAX take part.
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], tuple, tuple, bool]] = {
    "cnn of torch's tutorial, C=10": (TutorialCNN, (20, 3, 32, 32), (5, 3, 32, 32), True),
    "mlp 64-256-256-1": (lambda: mlp(256, 1), (64, 64), (64, 64), False),
    "mlp 64-256-256-10": (lambda: mlp(256, 10), (32, 64), (32, 64), False),
    "mlp 64-256-256-100": (lambda: mlp(256, 100), (8, 64), (8, 64), False),
    "16 positions, 32-128-128-10": (
        lambda: sequence_model(128, 10),
        (16, 16, 32),
        (16, 16, 32),
        False,
    ),
}


def ours(model: nn.Module, x1: Any, x2: Any, method: str) -> Callable:
    kernel = nn.jit(lambda m, a, b: curvature.empirical_ntk(m, a, b, method=method))
    return lambda: kernel(model, x1, x2)


def plain_jax(model: nn.Module, x1: Any, x2: Any) -> Callable:
    params = {name: p.value for name, p in model.named_parameters()}

    def single(p, x):
        def conv(x, w, b):
            return jax.lax.conv(x, w, (1, 1), "VALID") + b[:, None, None]

        x = x[None]
        for i in (1, 2):
            x = jax.nn.relu(conv(x, p[f"conv{i}.weight"], p[f"conv{i}.bias"]))
        x = conv(x, p["conv3.weight"], p["conv3.bias"]).reshape(-1)
        return p["fc.weight"] @ x + p["fc.bias"]

    @jax.jit
    def kernel(p, x1, x2):
        j1, j2 = (jax.vmap(jax.jacrev(single), (None, 0))(p, x) for x in (x1, x2))
        flat = lambda j: j.reshape(*j.shape[:2], -1)
        parts = jax.tree.map(lambda a, b: jnp.einsum("Naf,Mbf->NMab", flat(a), flat(b)), j1, j2)
        return sum(jax.tree.leaves(parts))

    return lambda: kernel(params, x1, x2)


def torch_cases(model: nn.Module, x1: Any, x2: Any) -> list[Case]:
    try:
        import torch
    except ImportError:
        print("torch is left out: not installed", file=sys.stderr)
        return []
    func = torch.func

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 32, 3)
            self.conv3, self.fc = torch.nn.Conv2d(32, 32, 3), torch.nn.Linear(21632, 10)

        def forward(self, x):
            x = self.conv3(self.conv2(self.conv1(x).relu()).relu())
            return self.fc(x.flatten(1))

    net = Net()
    net.load_state_dict({n: torch.tensor(np.asarray(v)) for n, v in model.state_dict().items()})
    params = {n: p.detach() for n, p in net.named_parameters()}
    t1, t2 = (torch.tensor(np.asarray(x)) for x in (x1, x2))

    def single(p, x):
        return func.functional_call(net, p, (x.unsqueeze(0),)).squeeze(0)

    def contraction():
        j1, j2 = (func.vmap(func.jacrev(single), (None, 0))(params, x) for x in (t1, t2))
        pairs = ((j1[n].flatten(2), j2[n].flatten(2)) for n in params)
        return sum(torch.einsum("Naf,Mbf->NMab", a, b) for a, b in pairs)

    def entry(x1, x2):
        out, pull = func.vjp(lambda p: single(p, x1), params)

        def product(unit):
            return func.jvp(lambda p: single(p, x2), (params,), pull(unit))[1]

        return func.vmap(product)(torch.eye(out.numel()))

    def products():
        return func.vmap(func.vmap(entry, (None, 0)), (0, None))(t1, t2)

    return [
        Case("torch.func, jacobians", contraction, lambda: contraction().numpy()),
        Case("torch.func, products", products, lambda: products().numpy()),
    ]


def cases_of(name: str) -> list[Case]:
    make, first, second, all_of_them = PROBLEMS[name]
    nn.manual_seed(0)
    model = make()
    x1 = jax.random.normal(jax.random.key(0), first)
    x2 = jax.random.normal(jax.random.key(1), second)
    calls = {f"statefulnn, {m}": ours(model, x1, x2, m) for m in METHODS}
    if all_of_them:
        calls["jax by hand, jacobians"] = plain_jax(model, x1, x2)
    cases = [
        Case(label, call, lambda call=call: np.asarray(call())) for label, call in calls.items()
    ]
    if all_of_them:
        cases += torch_cases(model, x1, x2)
    check(cases)
    return cases


def check(cases: list[Case]) -> None:
    """Raise unless all kernels agree; what is wrong need not be timed."""
    want = cases[0].check()
    for case in cases[1:]:
        np.testing.assert_allclose(
            case.check(), want, rtol=1e-3, atol=1e-4 * np.abs(want).max(), err_msg=case.label
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Time every problem; print a table, return the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each problem, about")
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args(argv)
    names = [name for name in PROBLEMS if args.only in name]
    if not names:
        parser.error(f"--only {args.only!r} matches none of {', '.join(PROBLEMS)}")

    results: dict[str, Any] = {}
    rows = []
    for name in names:
        timings = measure(
            cases_of(name), seconds=args.seconds, description=name, burst_us=1.0, fewest=5
        )
        results[name] = [t.row() for t in timings]
        rows += [
            [f"{name}: {t.label}", f"{t.done / 1e3:.1f}", f"{t.ratio_done:.2f}"] for t in timings
        ]
    text = table(["problem: method", "ms", "beside jacobian"], rows)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(text + "\n")
    return results


if __name__ == "__main__":
    main()
