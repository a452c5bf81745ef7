"""docs/coming-to-higher-order.md: its lines are counted, and its scripts compute what torch computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch.func import functional_call

import statefulnn as nn
from tests.test_docs import ROOT, blocks
from tests.test_readability import code_lines

PAGE = ROOT / "docs" / "coming-to-higher-order.md"
CODE = blocks(PAGE)
NUMBERS = range(1, len(CODE) // 2 + 1)
ROW = re.compile(r"^\| (\d+) \| [^|]+ \| [^|]+ \| (\d+) \| (\d+) \|$", re.M)

Weights = dict[str, np.ndarray]


def theirs(number: int) -> str:
    return CODE[2 * number - 2][2]


def ours(number: int) -> str:
    return CODE[2 * number - 1][2]


def run(code: str, after: str, then: Callable[[Any], Any]) -> dict[str, Any]:
    """Run a script, and call a function with what the line that starts with `after` has made."""
    line = re.search(rf"^{after} = .*$", code, re.M)
    assert line is not None, f"no line makes {after}"
    names: dict[str, Any] = {"__name__": "__main__", "then": then}
    with jax.numpy_dtype_promotion("standard"):  # a reader's setting
        exec(code[: line.end()] + f"\nthen({after})" + code[line.end() :], names)
    return names


def run_ours(number: int, weights: Any, after: str = "model") -> dict[str, Any]:
    return run(ours(number), after, lambda model: model.load_state_dict(weights))


def run_theirs(number: int, after: str = "model") -> tuple[dict[str, Any], Any]:
    """Run the script of torch; return its names, and the weights it began with."""

    def copies(model: torch.nn.Module) -> Weights:
        return {name: v.detach().numpy().copy() for name, v in model.state_dict().items()}

    torch.manual_seed(0)
    found: list[Any] = []
    names = run(
        theirs(number),
        after,
        lambda made: found.append([copies(m) for m in made] if after == "models" else copies(made)),
    )
    return names, found[0]


def close(a: Any, b: Any, rtol: float) -> None:
    """Compare with a tolerance relative to the largest entry."""
    a, b = np.asarray(a), np.asarray(b.detach() if isinstance(b, torch.Tensor) else b)
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


# --------------------------------------------------------------------------------------------------
# The page


def test_each_script_is_there_twice_and_only_ours_runs_by_itself():
    assert len(CODE) == 16
    for number in NUMBERS:
        (_, flags, there), (_, ours_flags, here) = CODE[2 * number - 2], CODE[2 * number - 1]
        assert "no-run" in flags and "import statefulnn" not in there
        assert "no-run" not in ours_flags and "import statefulnn as nn" in here
        # Each is complete: it imports what it uses, and takes nothing from the block before.
        assert there.startswith(("import ", "from ")) and here.startswith(("import ", "from "))


def test_the_table_has_the_lines_of_the_scripts():
    rows = [tuple(map(int, row)) for row in ROW.findall(PAGE.read_text())]
    assert rows == [(n, len(code_lines(theirs(n))), len(code_lines(ours(n)))) for n in NUMBERS]


def test_the_lines_of_both_sides_are_as_long():
    for _, _, code in CODE:
        assert max(map(len, code.splitlines())) <= 100 and ";" not in code


# --------------------------------------------------------------------------------------------------
# Scripts 1 to 5, beside plain torch in double precision


def network(*layers: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, torch.Tensor], Weights]:
    """Return a network, its parameters in double precision, and as arrays."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*layers)
    weights = {name: v.detach().numpy().copy() for name, v in model.state_dict().items()}
    params = {name: torch.tensor(v, dtype=torch.float64) for name, v in weights.items()}
    return model, {name: p.requires_grad_() for name, p in params.items()}, weights


def small(hidden: int, activation: type[torch.nn.Module]) -> tuple:
    return network(torch.nn.Linear(1, hidden), activation(), torch.nn.Linear(hidden, 1))


def double(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def mse(model: torch.nn.Module, params: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((functional_call(model, params, (x,)) - y) ** 2).mean()


@pytest.mark.parametrize(("number", "adapted"), [(1, ""), (3, "2.")], ids=["MAML", "ANIL"])
def test_maml_and_anil_have_the_meta_gradient_of_torch(number, adapted):
    model, params, weights = small(40, torch.nn.ReLU)
    script = run_ours(number, weights)
    losses = []
    for x, y in zip(double(script["x"]), double(script["y"]), strict=True):
        task = dict(params)
        for _ in range(3):
            chosen = {name: p for name, p in task.items() if name.startswith(adapted)}
            loss = mse(model, task, x[::2], y[::2])
            grads = torch.autograd.grad(loss, list(chosen.values()), create_graph=True)
            task |= {name: p - 0.01 * g for (name, p), g in zip(chosen.items(), grads, strict=True)}
        losses.append(mse(model, task, x[1::2], y[1::2]))
    meta_loss = torch.stack(losses).mean()
    grads = torch.autograd.grad(meta_loss, list(params.values()))
    close(script["meta_loss"], meta_loss, 1e-6)
    for name, grad in zip(params, grads, strict=True):
        close(script["grads"][name], grad, 1e-5)
        # Adam's first step goes by its rate, against the sign.
        moved = np.asarray(script["params"][name]) - weights[name]
        large = np.abs(grad.numpy()) > 1e-4
        np.testing.assert_allclose(moved[large], -1e-3 * np.sign(grad.numpy()[large]), atol=2e-6)


def test_the_rate_inside_adam_has_the_gradient_of_torch():
    model, params, weights = small(40, torch.nn.Tanh)
    script = run_ours(2, weights)
    x, y = double(script["x"]), double(script["y"])
    log_lr = torch.tensor(-5.0, dtype=torch.float64, requires_grad=True)
    task = dict(params)
    mean = {name: torch.zeros_like(p) for name, p in params.items()}
    square = dict(mean)
    for step in range(1, 4):
        grads = torch.autograd.grad(
            mse(model, task, x[::2], y[::2]), list(task.values()), create_graph=True
        )
        for name, g in zip(params, grads, strict=True):
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            root = (square[name] / (1 - 0.999**step) + 1e-8).sqrt() + 1e-8
            task[name] = task[name] - log_lr.exp() * mean[name] / (1 - 0.9**step) / root
    meta_loss = mse(model, task, x[1::2], y[1::2])
    by_rate, *grads = torch.autograd.grad(meta_loss, [log_lr, *params.values()])
    close(script["meta_loss"], meta_loss, 1e-5)
    close(script["grads"]["log_lr"], by_rate, 1e-4)
    for name, grad in zip(params, grads, strict=True):
        close(script["grads"]["params"][name], grad, 1e-3)


def test_the_implicit_gradient_is_that_of_a_dense_linear_system():
    model, params, weights = small(20, torch.nn.Tanh)
    script = run_ours(4, weights)
    start = torch.cat([p.detach().flatten() for p in params.values()])
    sizes, shapes = [p.numel() for p in params.values()], [p.shape for p in params.values()]

    def by_name(flat: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = [p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        return dict(zip(params, parts, strict=True))

    losses, gradient = [], torch.zeros_like(start)
    tasks = list(zip(double(script["x"]), double(script["y"]), strict=True))
    for x, y in tasks:

        def inner(flat: torch.Tensor, x=x, y=y) -> torch.Tensor:
            return mse(model, by_name(flat), x[::2], y[::2]) + ((flat - start) ** 2).sum()

        def outer(flat: torch.Tensor, x=x, y=y) -> torch.Tensor:
            return mse(model, by_name(flat), x[1::2], y[1::2])

        solution = start
        for _ in range(100):
            solution = solution - 0.1 * torch.func.grad(inner)(solution)
        # Of the distance the mixed second derivative is -2, so d solution / d start = 2 / H.
        hessian = torch.func.jacrev(torch.func.grad(inner))(solution)
        gradient += 2 * torch.linalg.solve(hessian, torch.func.grad(outer)(solution)) / len(tasks)
        losses.append(outer(solution))
    close(script["meta_loss"], torch.stack(losses).mean(), 1e-5)
    for name, grad in by_name(gradient).items():
        close(script["grads"][name], grad, 1e-4)


def test_labels_are_weighed_as_by_the_same_loops_in_torch():
    model, params, weights = network(torch.nn.Linear(1, 2))
    script = run_ours(5, {name[2:]: v for name, v in weights.items()})
    x, labels = double(script["x"]), torch.tensor(np.asarray(script["y"]), dtype=torch.int64)
    x_clean = double(script["x_clean"])
    clean = torch.tensor(np.asarray(script["y_clean"]), dtype=torch.int64)
    logits = torch.zeros(100, dtype=torch.float64, requires_grad=True)
    opt, losses = torch.optim.Adam([logits], lr=0.3), []

    def cross_entropy(params: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = functional_call(model, params, (x,))
        return torch.nn.functional.cross_entropy(out, y, reduction="none")

    for _ in range(40):
        for _ in range(5):
            loss = (logits.sigmoid() * cross_entropy(params, x, labels)).mean()
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {n: p - 0.5 * g for (n, p), g in zip(params.items(), grads, strict=True)}
        outer = cross_entropy(params, x_clean, clean).mean()
        (logits.grad,) = torch.autograd.grad(outer, [logits])
        opt.step()
        losses.append(outer.item())
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
    close(script["losses"], losses, 1e-4)
    close(script["logits"], logits, 1e-3)
    wrong = np.arange(100) % 4 == 0
    trust = np.asarray(jax.nn.sigmoid(script["logits"]))
    assert trust[wrong].mean() < 0.1 and trust[~wrong].mean() > 0.8


# --------------------------------------------------------------------------------------------------
# Scripts 6 to 8, beside the scripts of torch.func on the page


def test_gradients_of_examples_are_those_of_the_other_script():
    there, weights = run_theirs(6)
    here = run_ours(6, weights)
    assert here["per_sample_grads"].keys() == there["per_sample_grads"].keys()
    for name, grads in there["per_sample_grads"].items():
        close(here["per_sample_grads"][name], grads, 1e-5)


def test_the_ensemble_predicts_what_the_other_script_does():
    there, weights = run_theirs(7, after="models")
    here = run_ours(7, weights, after="ensemble")
    close(here["mean"], there["mean"], 1e-4)
    close(here["variance"], there["variance"], 1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own jvp
def test_kernel_and_hessian_product_are_those_of_the_other_script():
    there, weights = run_theirs(8)
    here = run_ours(8, weights)
    close(here["ntk"], there["ntk"], 1e-5)
    for name, product in there["hvp"].items():
        close(here["hvp"][name], product, 1e-5)


# --------------------------------------------------------------------------------------------------
# What the page says of both sides, and no other test does


def test_the_hessian_product_of_an_lstm_is_that_of_finite_differences():
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(3, 4, batch_first=True).double()
    model = nn.LSTM(3, 4, batch_first=True)
    model.load_state_dict({name: v.numpy() for name, v in theirs.state_dict().items()})
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    vector = {name: torch.randn_like(p) for name, p in theirs.named_parameters()}

    def gradient(step: float) -> tuple[torch.Tensor, ...]:
        params = {n: p.detach() + step * vector[n] for n, p in theirs.named_parameters()}
        params = {name: p.requires_grad_() for name, p in params.items()}
        loss = (functional_call(theirs, params, (x,))[0] ** 2).mean()
        return torch.autograd.grad(loss, list(params.values()))

    inputs = x.float().numpy()
    product = nn.func.hvp(
        lambda m: (m(inputs)[0] ** 2).mean(),
        (model,),
        {name: v.float().numpy() for name, v in vector.items()},
    )
    for name, up, down in zip(vector, gradient(1e-4), gradient(-1e-4), strict=True):
        close(product[name], (up - down) / 2e-4, 1e-4)
