"""nn.curvature.Laplace beside laplace-torch, on data of scikit-learn in double precision: do they agree?

    pip install laplace-torch scikit-learn
    python benchmarks/laplace_torch.py

A dense and a convolutional network on the digits, and a dense one on the diabetes set, trained by torch. The
largest differences for each structure: of what is predicted (probabilities of classes, variances of targets),
of the log evidence and of the covariance of the outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _harness import table  # noqa: E402

import statefulnn as nn  # noqa: E402

PRIOR, NOISE, LIMIT = 0.7, 0.6, 1e-5
SIZES = {"digits": (1000, 300), "diabetes": (300, 142)}  # of what is learned, and of what is new
STRUCTURES = (("all", "kron"), ("last_layer", "kron"), ("last_layer", "full"), ("all", "diag"))


def network(library: Any, kind: str) -> Any:
    """A small network of either library's layers."""
    if kind == "diabetes":
        return library.Sequential(library.Linear(10, 50), library.Tanh(), library.Linear(50, 1))
    if kind == "dense":
        return library.Sequential(library.Linear(64, 32), library.Tanh(), library.Linear(32, 10))
    return library.Sequential(
        library.Unflatten(1, (1, 8, 8)),
        library.Conv2d(1, 4, 3),
        library.Tanh(),
        library.Conv2d(4, 6, 3, stride=2, padding=1),
        library.Tanh(),
        library.Flatten(),
        library.Linear(54, 10),
    )


def trained(kind: str, x: Any, y: Any) -> tuple[Any, Any]:
    """Torch's network after 150 steps of Adam, and ours with its weights."""
    import torch

    torch.manual_seed(0)
    theirs = network(torch.nn, kind)
    functions = torch.nn.functional
    loss = functions.mse_loss if kind == "diabetes" else functions.cross_entropy
    adam = torch.optim.Adam(theirs.parameters(), 1e-2)
    for _ in range(150):
        adam.zero_grad()
        loss(theirs(x), y).backward()
        adam.step()
    ours = network(nn, kind).to(jnp.float64)
    ours.load_state_dict({k: jnp.asarray(v.numpy()) for k, v in theirs.state_dict().items()})
    return theirs, ours


def load(kind: str) -> tuple[Any, Any]:
    """Inputs and labels, or targets (N, 1)."""
    from sklearn.datasets import load_diabetes, load_digits

    if kind != "diabetes":
        x, y = load_digits(return_X_y=True)
        return x / 16, y
    x, y = load_diabetes(return_X_y=True)
    return x / x.std(0), ((y - y.mean()) / y.std())[:, None]


def differences(kind: str) -> Iterator[tuple[str, float, float, float]]:
    """Yield for each structure a label and the three largest differences, relative where they are large."""
    import torch
    from laplace import Laplace

    x, y = load(kind)
    regression = kind == "diabetes"
    likelihood = "regression" if regression else "classification"
    size, tested = SIZES["diabetes" if regression else "digits"]
    inputs, targets = torch.tensor(x), torch.tensor(y)
    theirs, ours = trained(kind, inputs[:size], targets[:size])
    pairs = torch.utils.data.TensorDataset(inputs[:size], targets[:size])
    batches = torch.utils.data.DataLoader(pairs, batch_size=250)
    new = slice(size, size + tested)
    for subset, structure in STRUCTURES:
        reference = Laplace(
            theirs,
            likelihood,
            subset_of_weights=subset,
            hessian_structure=structure,
            prior_precision=PRIOR,
            **({"sigma_noise": NOISE} if regression else {}),
        )
        reference.fit(batches)
        posterior = nn.curvature.Laplace.fit(
            ours,
            x[:size],
            y[:size],
            likelihood=likelihood,
            structure=structure,
            subset=subset,
            prior_precision=PRIOR,
            sigma=NOISE if regression else 1.0,
            batch_size=250,
        )
        covariance = reference._glm_predictive_distribution(inputs[new])[1].detach().numpy()
        if regression:
            predicted = posterior.predict(x[new])[1] - (covariance[..., 0] + NOISE**2)
        else:
            proba = reference(inputs[new], link_approx="probit").detach().numpy()
            predicted = posterior.predict_proba(x[new], batch_size=100) - proba
        evidence = float(reference.log_marginal_likelihood())
        own = posterior.functional(x[new], batch_size=100)[1]
        yield (
            f"{kind}, {subset}, {structure}",
            float(np.abs(predicted).max()),
            abs(float(posterior.log_marginal_likelihood()) / evidence - 1),
            float(np.abs(own - covariance).max() / np.abs(covariance).max()),
        )


def main() -> int:
    import torch

    torch.set_default_dtype(torch.float64)
    jax.config.update("jax_enable_x64", True)
    nn.set_default_dtype(jnp.float64)
    rows = [row for kind in ("dense", "convolution", "diabetes") for row in differences(kind)]
    header = ["network, parameters, structure", "predictions", "evidence", "covariance"]
    print(table(header, [[name, *(f"{v:.1e}" for v in values)] for name, *values in rows]))
    return int(any(value > LIMIT for _, *values in rows for value in values))


if __name__ == "__main__":
    sys.exit(main())
