"""Higher-order training beside torch.func, torch.compile, higher, TorchOpt and hand-written JAX, in one run.

    python benchmarks/higher_order.py --json results.json --markdown docs/benchmarks.md
    python benchmarks/higher_order.py --quick
    python benchmarks/higher_order.py --only maml ensemble

The parts: a meta-step of second-order MAML on sinusoids (25 tasks, 10 points, network 1-40-40-1); a whole
training run of it; hyperparameter optimisation; memory and time of 400 unrolled steps; gradients of each
example of a CNN; 100 small networks in one step. What is not installed is left out, with a line that says
so. torch.compile needs a C++ compiler and takes minutes to compile: `--no-compile` leaves it out.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from _harness import Case, Timing, measure, table  # noqa: E402
from _report import Report, arguments, run, uninstalled  # noqa: E402

import statefulnn as nn  # noqa: E402
import statefulnn.functional as F  # noqa: E402

TASKS, POINTS, INNER_LR, CHUNK = 25, 10, 0.01, 64
OPTIONAL = ("torch", "higher", "torchopt")
options: Any = None  # the command line


def torch_threads(count: int) -> None:
    """Give torch as many threads: one for small networks, where two are slower."""
    if not uninstalled(["torch"]):
        import torch

        torch.set_num_threads(count)


def has(report: Report, *names: str) -> bool:
    """Whether packages can be imported; says once which cannot."""
    missing = uninstalled(names)
    for name, error in missing.items():
        report.leave_out(f"{name} is left out: {error}")
    return not missing


def section(report: Report, title: str, timings: list[Timing], note: str) -> dict[str, Timing]:
    """Add a table of timings, with times beside the first."""
    rows = [
        [t.label, f"{t.done / 1e3:.2f}", f"{t.ratio_done:.2f}x", str(t.rounds)] for t in timings
    ]
    report.section(title, table(["", "ms", "beside the first", "rounds"], rows), note)
    report.numbers[title] = [t.row() for t in timings]
    return {t.label: t for t in timings}


# --------------------------------------------------------------------------------------------------
# A meta-step of MAML


def sinusoids(seed: int, count: int | None = None) -> list[np.ndarray]:
    """Support x and y, query x and y, each (tasks, points, 1), with a leading `count` if given."""
    rng = np.random.default_rng(seed)
    lead = (TASKS,) if count is None else (count, TASKS)
    amplitude = rng.uniform(0.1, 5.0, (*lead, 1, 1))
    phase = rng.uniform(0, np.pi, (*lead, 1, 1))
    x = rng.uniform(-5, 5, (*lead, 2 * POINTS, 1))
    y = amplitude * np.sin(x - phase)
    parts = x[..., :POINTS, :], y[..., :POINTS, :], x[..., POINTS:, :], y[..., POINTS:, :]
    return [p.astype(np.float32) for p in parts]


def weights() -> dict[str, np.ndarray]:
    """The weights everybody starts from, by torch's names."""
    rng = np.random.default_rng(0)
    shapes = {"0": (40, 1), "2": (40, 40), "4": (1, 40)}
    found = {}
    for name, shape in shapes.items():
        bound = 1 / np.sqrt(shape[1])
        found[f"{name}.weight"] = rng.uniform(-bound, bound, shape).astype(np.float32)
        found[f"{name}.bias"] = rng.uniform(-bound, bound, shape[0]).astype(np.float32)
    return found


def network(library: Any) -> Any:
    """The network, of either library's layers."""
    return library.Sequential(
        library.Linear(1, 40),
        library.ReLU(),
        library.Linear(40, 40),
        library.ReLU(),
        library.Linear(40, 1),
    )


def torch_network() -> Any:
    import torch

    model = network(torch.nn)
    model.load_state_dict({k: torch.tensor(v) for k, v in weights().items()})
    return model


def ours(inner_steps: int, report_diverged: bool) -> tuple[Callable, dict]:
    """The meta-loss by nn.meta, and its parameters."""
    model = network(nn)
    model.load_state_dict(weights())
    fn, params = nn.functionalize(model)

    def one_task(params, x, y, xq, yq):
        adapted = nn.meta.adapt(fn, params, F.mse_loss, (x, y), lr=INNER_LR, steps=inner_steps)
        return F.mse_loss(fn(adapted.params, xq), yq)

    return nn.meta.over_tasks(one_task, report=report_diverged), params


def raw(inner_steps: int) -> tuple[Callable, dict]:
    """The same by hand, on arrays."""
    params = {name: jnp.asarray(value) for name, value in weights().items()}

    def mse(p, x, y):
        h = jnp.maximum(x @ p["0.weight"].T + p["0.bias"], 0)
        h = jnp.maximum(h @ p["2.weight"].T + p["2.bias"], 0)
        return ((h @ p["4.weight"].T + p["4.bias"] - y) ** 2).mean()

    def one_task(p, x, y, xq, yq):
        for _ in range(inner_steps):
            grads = jax.grad(mse)(p, x, y)
            p = jax.tree.map(lambda a, b: a - INNER_LR * b, p, grads)
        return mse(p, xq, yq)

    def loss(p, *data):
        return jax.vmap(one_task, (None, 0, 0, 0, 0))(p, *data).mean()

    return loss, params


def meta_step(loss: Callable, params: dict) -> tuple[Callable, tuple]:
    """A step of Adam on a meta-loss: (carry, data) -> (carry, loss), and its first carry."""
    tx = optax.adam(1e-3)

    def step(carry, data):
        params, slots = carry
        value, grads = jax.value_and_grad(loss)(params, *data)
        updates, slots = tx.update(grads, slots)
        return (optax.apply_updates(params, updates), slots), value

    return step, (params, tx.init(params))


def torch_step(inner_steps: int, compiled: bool) -> Callable:
    """A meta-step by torch.func, eager or compiled."""
    import torch
    from torch.func import functional_call, grad, grad_and_value, vmap

    model = torch_network()
    params = {n: p.detach() for n, p in model.named_parameters()}
    mse = torch.nn.functional.mse_loss

    def one_task(params, x, y, xq, yq):
        def inner(p):
            return mse(functional_call(model, p, (x,)), y)

        for _ in range(inner_steps):
            grads = grad(inner)(params)
            params = {n: p - INNER_LR * grads[n] for n, p in params.items()}
        return mse(functional_call(model, params, (xq,)), yq)

    def loss(params, *data):
        return vmap(one_task, (None, 0, 0, 0, 0))(params, *data).mean()

    gradient = grad_and_value(loss)
    if compiled:
        gradient = torch.compile(gradient)
    leaves = {n: p.clone() for n, p in params.items()}
    adam = torch.optim.Adam(list(leaves.values()), lr=1e-3, foreach=True)
    data = [torch.tensor(v) for v in sinusoids(0)]

    def step():
        grads, value = gradient(leaves, *data)
        for n, p in leaves.items():
            p.grad = grads[n]
        adam.step()
        return value

    return step


def higher_step(inner_steps: int) -> Callable:
    """A meta-step by higher: a loop over tasks."""
    import higher
    import torch

    model = torch_network()
    mse = torch.nn.functional.mse_loss
    inner = torch.optim.SGD(model.parameters(), lr=INNER_LR)
    outer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = [torch.tensor(v) for v in sinusoids(0)]

    def step():
        outer.zero_grad()
        for x, y, xq, yq in zip(*data, strict=True):
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (f, opt):
                for _ in range(inner_steps):
                    opt.step(mse(f(x), y))
                (mse(f(xq), yq) / TASKS).backward()
        outer.step()

    return step


def torchopt_step(inner_steps: int) -> Callable:
    """A meta-step by TorchOpt: a loop over tasks."""
    import torch
    import torchopt

    model = torch_network()
    mse = torch.nn.functional.mse_loss
    inner = torchopt.MetaSGD(model, lr=INNER_LR)
    outer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = [torch.tensor(v) for v in sinusoids(0)]

    def step():
        outer.zero_grad()
        start = torchopt.extract_state_dict(model, by="reference")
        slots = torchopt.extract_state_dict(inner, by="reference")
        for x, y, xq, yq in zip(*data, strict=True):
            for _ in range(inner_steps):
                inner.step(mse(model(x), y))
            (mse(model(xq), yq) / TASKS).backward()
            torchopt.recover_state_dict(model, start)
            torchopt.recover_state_dict(inner, slots)
        outer.step()

    return step


def part_maml(report: Report, quick: bool) -> None:
    """Meta-steps at 1 and 5 inner steps."""
    torch_threads(1)
    for inner_steps in (1,) if quick else (1, 5):
        data = [jnp.asarray(v) for v in sinusoids(0)]
        many = [jnp.asarray(v) for v in sinusoids(1, CHUNK)]
        cases, labels = [], {}

        def single(label, loss_and_params, cases=cases, data=data):
            step, carry = meta_step(*loss_and_params)
            compiled = jax.jit(step)
            cases.append(
                Case(label, lambda: compiled(carry, data), lambda: compiled(carry, data)[1])
            )

        def chunk(label, loss_and_params, cases=cases, many=many):
            step, carry = meta_step(*loss_and_params)
            compiled = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))
            cases.append(Case(label, lambda: compiled(carry, many)))
            return step, carry

        single("jax.jit by hand", raw(inner_steps))
        single("statefulnn, report=False", ours(inner_steps, False))
        single("statefulnn", ours(inner_steps, True))
        chunk(f"lax.scan by hand, {CHUNK} steps", raw(inner_steps))
        chunk(f"nn.meta in one scan, {CHUNK} steps", ours(inner_steps, True))
        if has(report, "torch"):
            cases.append(Case("torch.func, eager", torch_step(inner_steps, False)))
            if not options.no_compile and not quick:
                try:
                    compiled = torch_step(inner_steps, True)
                    compiled()
                    cases.append(Case("torch.compile(vmap(grad))", compiled))
                except Exception as error:  # it needs a C++ compiler
                    report.leave_out(f"torch.compile is left out: {type(error).__name__}")
            if has(report, "higher"):
                cases.append(Case("higher, loop over tasks", higher_step(inner_steps)))
            if has(report, "torchopt"):
                cases.append(Case("TorchOpt, loop over tasks", torchopt_step(inner_steps)))
        timings = measure(
            cases,
            seconds=3 if quick else 60,
            description=f"MAML, {inner_steps}",
            fewest=7,
            pause=0.01,
        )
        labels = section(
            report,
            f"MAML meta-step, inner steps: {inner_steps}",
            timings,
            f"{TASKS} tasks, {POINTS} points, 1-40-40-1, second order, Adam outside.",
        )

        def beside(a: str, b: str, labels=labels) -> float | None:
            if a not in labels or b not in labels:
                return None
            return labels[a].done / labels[b].done

        what = f"MAML, {inner_steps} inner:"
        mine, scan = "statefulnn, report=False", f"nn.meta in one scan, {CHUNK} steps"
        report.target(
            f"{what} meta-step beside jax.jit by hand", labels[mine].ratio_done, 1.05, "x"
        )
        by_hand = beside(scan, f"lax.scan by hand, {CHUNK} steps")
        report.target(f"{what} in a scan, beside lax.scan by hand", by_hand, 1.05, "x")
        report.target(
            f"{what} meta-step beside torch.func", beside(mine, "torch.func, eager"), 1 / 8, "x"
        )
        if inner_steps == 1 and not options.no_compile:
            other = beside(mine, "torch.compile(vmap(grad))")
            report.target(f"{what} meta-step beside torch.compile", other, 1 / 1.8, "x")
            other = beside(scan, "torch.compile(vmap(grad))")
            other = None if other is None else other / CHUNK
            report.target(
                f"{what} a step of nn.meta.loop beside torch.compile", other, 1 / 2.5, "x"
            )


# --------------------------------------------------------------------------------------------------
# A meta-step of MAML on pictures

WAYS, SHOTS, QUERIES, CNN_TASKS, CNN_STEPS = 5, 1, 15, 4, 5


def four_blocks(library: Any) -> Any:
    """The network of MAML's experiments on Omniglot: four blocks of 32 channels."""
    layers, channels = [], 1
    for _ in range(4):
        layers += [
            library.Conv2d(channels, 32, 3, padding=1),
            library.BatchNorm2d(32, track_running_stats=False),
            library.ReLU(),
            library.MaxPool2d(2),
        ]
        channels = 32
    return library.Sequential(*layers, library.Flatten(), library.Linear(32, WAYS))


def part_maml_cnn(report: Report, quick: bool) -> None:
    """The gradient of a meta-step through five inner steps of a CNN with BatchNorm, four tasks."""
    torch_threads(os.cpu_count() or 1)
    rng = np.random.default_rng(0)
    data = []
    for count in (WAYS * SHOTS, WAYS * QUERIES):
        data.append(rng.standard_normal((CNN_TASKS, count, 1, 28, 28)).astype(np.float32))
        data.append(np.tile(np.arange(count) % WAYS, (CNN_TASKS, 1)))
    model = four_blocks(nn)
    fn, params = nn.functionalize(model)

    def one_task(params, x, y, xq, yq):
        adapted = nn.meta.adapt(
            fn, params, F.cross_entropy, (x, y), lr=INNER_LR, steps=1 if quick else CNN_STEPS
        )
        return F.cross_entropy(fn(adapted.params, xq), yq)

    cases, first = [], []
    for label, way in (("nn.meta", "auto"), ("nn.meta, vectorize='vmap'", "vmap")):
        step = jax.jit(jax.value_and_grad(nn.meta.over_tasks(one_task, vectorize=way)))
        start = time.perf_counter()
        jax.block_until_ready(step(params, *data))
        first.append([label, f"{time.perf_counter() - start:.1f}"])
        cases.append(Case(label, lambda step=step: step(params, *data)))
    if has(report, "torch"):
        import torch
        from torch.func import functional_call, grad, grad_and_value, vmap

        theirs = four_blocks(torch.nn)
        theirs.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in params.items()})
        tp = {n: p.detach() for n, p in theirs.named_parameters()}
        entropy = torch.nn.functional.cross_entropy

        def torch_task(p, x, y, xq, yq):
            for _ in range(1 if quick else CNN_STEPS):
                grads = grad(lambda p: entropy(functional_call(theirs, p, (x,)), y))(p)
                p = {n: v - INNER_LR * grads[n] for n, v in p.items()}
            return entropy(functional_call(theirs, p, (xq,)), yq)

        td = [torch.tensor(v) for v in data]
        gradient = grad_and_value(lambda p, *d: vmap(torch_task, (None, 0, 0, 0, 0))(p, *d).mean())
        expected, loss = gradient(tp, *td)
        found_loss, found = step(params, *data)
        np.testing.assert_allclose(float(found_loss), float(loss), rtol=1e-3)
        for name in expected:  # maxima that differ in the last bit go other ways
            np.testing.assert_allclose(found[name], expected[name].numpy(), atol=0.05)
        cases.insert(0, Case("torch.func, eager", lambda: gradient(tp, *td)))
    labels = section(
        report,
        "MAML meta-step of a CNN",
        measure(cases, seconds=5 if quick else 60, description="MAML CNN", fewest=7, pause=0.05),
        f"Four blocks of 32 channels with BatchNorm, 28x28, {CNN_TASKS} tasks, {WAYS} ways, {SHOTS} shot, "
        f"{QUERIES} queries a way, {CNN_STEPS} inner steps, second order, without the outer optimizer.",
    )
    report.section("Its first result", table(["", "seconds"], first), "Compilation included.")
    if "torch.func, eager" in labels:
        report.target(
            "MAML CNN: meta-step beside torch.func", labels["nn.meta"].ratio_done, 1.0, "x"
        )
    report.target("MAML CNN: first result", float(first[0][1]), 15, " s")


# --------------------------------------------------------------------------------------------------
# Whole runs


def part_training(report: Report, quick: bool) -> None:
    """MAML as in the paper: 70,000 meta-steps, tested on new tasks."""
    import maml_sinusoid

    steps, seeds = (2000, [0]) if quick else (70_000, [0, 1, 2])
    rows, slowest = [], 0.0
    bands = [(0.55, 0.95), (0.28, 0.70), (0.25, 0.65)]
    for name in ("MAML", "pretrained"):
        for seed in seeds:
            start = time.perf_counter()
            meta = jax.block_until_ready(maml_sinusoid.train(name, steps, seed))
            seconds = time.perf_counter() - start
            error = np.asarray(maml_sinusoid.evaluate(name, meta, tasks=6000)).mean(0)
            shown = error[maml_sinusoid.SHOWN]
            rows.append([f"{name}, seed {seed}", *(f"{v:.3f}" for v in shown), f"{seconds:.0f}"])
            if name == "MAML":
                slowest = max(slowest, seconds)
                for count, value, (low, high) in zip(
                    maml_sinusoid.SHOWN, shown, bands, strict=True
                ):
                    outside = max(low - value, value - high, 0.0)
                    what = f"MAML, seed {seed}, MSE after {count}: outside {low}-{high} by"
                    report.target(what, outside, 0.0, "")
            else:
                outside = max(2.2 - shown.min(), shown.max() - 2.6, 0.0)
                report.target(f"pretrained, seed {seed}: outside 2.2-2.6 by", outside, 0.05, "")
    report.section(
        f"MAML on sinusoids, {steps} meta-steps",
        table(["MSE after gradient steps:", *map(str, maml_sinusoid.SHOWN), "seconds"], rows),
        "5 points given, 6,000 new tasks; `examples/maml_sinusoid.py`.",
    )
    report.target(f"{steps} meta-steps of MAML", slowest, 120, " s")


def part_hpo(report: Report, quick: bool) -> None:
    """One penalty a weight, 1000 outer steps."""
    import hpo_logistic

    rows = []
    for way in hpo_logistic.FITS:
        hpo_logistic.optimise(way, 250, progress=False)
        start = time.perf_counter()
        _, losses = hpo_logistic.optimise(way, 250 if quick else 1000, progress=False)
        seconds = time.perf_counter() - start
        rows.append([way, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", f"{seconds:.2f}"])
        if way == "truncated":
            report.target("hpo_logistic, 1000 outer steps", seconds, 3, " s")
            if not quick:
                away = 1e4 * abs(losses[-1] - 0.28051)
                report.target("hpo_logistic, 1e4 times its distance from .28051", away, 1, "")
    report.section(
        "Hyperparameter optimisation",
        table(["", "loss before", "after", "seconds"], rows),
        "`examples/hpo_logistic.py`, compilation included.",
    )


def part_unroll(report: Report, quick: bool) -> None:
    """Memory and time of a gradient through 400 steps."""
    import long_unroll

    found = long_unroll.memory_and_time(100 if quick else 400)
    rows = [
        [name, f"{r['memory'] / 1e6:.2f}", f"{r['time']:.2f}x", f"{r['error']:.1e}"]
        for name, r in found.items()
    ]
    report.section(
        "A gradient through 400 steps",
        table(["checkpoint", "temporary MB", "time", "difference"], rows),
        "`examples/long_unroll.py`; a network 1-32-32-1 on 64 points.",
    )
    memory = found["sqrt"]["memory"] / found["none"]["memory"]
    report.target("sqrt checkpoints: memory beside none", memory, 0.1, "x")
    report.target("sqrt checkpoints: time beside none", found["sqrt"]["time"], 1.4, "x")
    report.target("sqrt checkpoints: 1e6 times the difference", found["sqrt"]["error"] * 1e6, 1, "")


# --------------------------------------------------------------------------------------------------
# Gradients of each example


def cnn(lib: Any, function: Any) -> Any:
    """The network of torch.func's tutorial on per-sample gradients."""

    class CNN(lib.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = lib.Conv2d(1, 32, 3, 1), lib.Conv2d(32, 64, 3, 1)
            self.fc1, self.fc2 = lib.Linear(9216, 128), lib.Linear(128, 10)

        def forward(self, x):
            x = function.relu(self.conv2(function.relu(self.conv1(x))))
            x = function.max_pool2d(x, 2).reshape(x.shape[0], -1)
            return function.log_softmax(self.fc2(function.relu(self.fc1(x))), -1)

    return CNN()


def part_per_sample(report: Report, quick: bool) -> None:
    """Per-sample gradients of a CNN, batch 64."""
    torch_threads(os.cpu_count() or 1)
    batch = 8 if quick else 64
    rng = np.random.default_rng(0)
    xs = rng.standard_normal((batch, 1, 28, 28)).astype(np.float32)
    ys = rng.integers(0, 10, batch)
    model = cnn(nn, F)
    fn, params = nn.functionalize(model)
    x, y = jnp.asarray(xs), jnp.asarray(ys)
    loss = lambda p, x, y: F.nll_loss(fn(p, x[None]), y[None])

    def plain(p, x, y):
        conv = functools.partial(
            jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID"
        )
        h = jnp.maximum(conv(x[None], p["conv1.weight"]) + p["conv1.bias"][:, None, None], 0)
        h = jnp.maximum(conv(h, p["conv2.weight"]) + p["conv2.bias"][:, None, None], 0)
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        h = jnp.maximum(p["fc1.weight"] @ h.reshape(-1) + p["fc1.bias"], 0)
        return -jax.nn.log_softmax(p["fc2.weight"] @ h + p["fc2.bias"])[y]

    mine = jax.jit(nn.func.per_sample_grad(loss))
    by_hand = jax.jit(jax.vmap(jax.grad(plain), (None, 0, 0)))
    cases = [
        Case("nn.func.per_sample_grad", lambda: mine(params, x, y)),
        Case("jax.vmap(jax.grad) by hand", lambda: by_hand(params, x, y)),
    ]
    if has(report, "torch"):
        import torch

        theirs = cnn(torch.nn, torch.nn.functional)
        theirs.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in params.items()})
        tp = {n: p.detach() for n, p in theirs.named_parameters()}
        tx, ty = torch.tensor(xs), torch.tensor(ys).long()

        def torch_loss(p, x, y):
            out = torch.func.functional_call(theirs, p, (x[None],))
            return torch.nn.functional.nll_loss(out, y[None])

        each = torch.func.vmap(torch.func.grad(torch_loss), (None, 0, 0))
        expected = each(tp, tx, ty)
        found = mine(params, x, y)
        for name in expected:  # a ReLU at zero may differ
            np.testing.assert_allclose(found[name], expected[name].numpy(), atol=0.05)
        cases.insert(0, Case("torch vmap(grad)", lambda: each(tp, tx, ty)))

        def one_by_one():
            for i in range(batch):
                theirs.zero_grad()
                torch.nn.functional.nll_loss(theirs(tx[i : i + 1]), ty[i : i + 1]).backward()

        cases.append(Case("torch, one by one", one_by_one))
    labels = section(
        report,
        "Gradients of each example",
        measure(cases, seconds=3 if quick else 30, description="per sample", fewest=9, pause=0.05),
        f"CNN 1-32-64, 9216-128-10, images 28x28, batch {batch}.",
    )
    if "torch vmap(grad)" in labels:
        ratio = labels["nn.func.per_sample_grad"].ratio_done
        report.target("gradients of each example beside torch's vmap(grad)", ratio, 1.0, "x")


# --------------------------------------------------------------------------------------------------
# Many small networks


def part_ensemble(report: Report, quick: bool) -> None:
    """A train step of 100 MLPs 2-32-2, each on its batch."""
    torch_threads(1)
    n, batch = (10 if quick else 100), 64
    rng = np.random.default_rng(0)
    xs = rng.standard_normal((n, batch, 2)).astype(np.float32)
    ys = rng.integers(0, 2, (n, batch))
    make = lambda: nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    ensemble = nn.Ensemble(make, n)
    optimizer = nn.Optimizer(ensemble, optax.sgd(0.05))
    x, y = jnp.asarray(xs), jnp.asarray(ys)

    @nn.jit
    def step(ensemble, optimizer, x, y):
        losses = lambda e: e.map(lambda m, x, y: F.cross_entropy(m(x), y), x, y, in_axes=0).sum()
        loss, grads = nn.value_and_grad(losses)(ensemble)
        optimizer.step(grads)
        return loss

    cases = [Case("nn.Ensemble, one step", lambda: step(ensemble, optimizer, x, y))]
    if has(report, "torch"):
        import torch

        class Net(torch.nn.Sequential):
            def __init__(self):
                super().__init__(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))

        models = [Net() for _ in range(n)]
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in models]
        tx, ty = torch.tensor(xs), torch.tensor(ys).long()
        cross_entropy = torch.nn.functional.cross_entropy

        def loop():
            for i, (m, o) in enumerate(zip(models, optimizers, strict=True)):
                o.zero_grad()
                cross_entropy(m(tx[i]), ty[i]).backward()
                o.step()

        params, buffers = torch.func.stack_module_state([Net() for _ in range(n)])
        leaves = {k: v.detach() for k, v in params.items()}
        one = lambda p, x, y: cross_entropy(torch.func.functional_call(models[0], p, (x,)), y)
        gradient = torch.func.vmap(torch.func.grad(one))

        def together():
            grads = gradient(leaves, tx, ty)
            for k, p in leaves.items():
                p.sub_(grads[k], alpha=0.05)

        cases += [Case("torch, a loop", loop), Case("torch, vmap(grad)", together)]
    labels = section(
        report,
        f"A train step of {n} small networks",
        measure(cases, seconds=3 if quick else 20, description="ensemble", fewest=9, pause=0.01),
        f"2-32-2, batches of {batch}, SGD.",
    )
    if "torch, a loop" in labels:
        ratio = 1 / labels["torch, a loop"].ratio_done
        report.target(f"{n} networks in one step beside a torch loop", ratio, 1 / 15, "x")


PARTS = {
    "maml": part_maml,
    "maml_cnn": part_maml_cnn,
    "training": part_training,
    "hpo": part_hpo,
    "unroll": part_unroll,
    "per_sample": part_per_sample,
    "ensemble": part_ensemble,
}


def main(argv: list[str] | None = None) -> int:
    global options
    parser = arguments(__doc__ or "", list(PARTS))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(argv)
    return run(
        PARTS,
        options,
        title="Higher-order training",
        mark="higher_order",
        packages=OPTIONAL,
    )


if __name__ == "__main__":
    sys.exit(main())
