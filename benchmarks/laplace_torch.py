"""nn.curvature.Laplace beside laplace-torch, on scikit-learn's digits in double precision: do they agree?

    pip install laplace-torch scikit-learn
    python benchmarks/laplace_torch.py

A dense and a convolutional network, trained by torch; for each structure the largest differences of the
classes' probabilities, of the log evidence and of the covariance of the outputs.
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

TRAINED, TESTED, PRIOR, LIMIT = 1000, 300, 0.7, 1e-5
STRUCTURES = (("all", "kron"), ("last_layer", "kron"), ("last_layer", "full"), ("all", "diag"))


def network(library: Any, kind: str) -> Any:
    """A small network of either library's layers."""
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
    adam = torch.optim.Adam(theirs.parameters(), 1e-2)
    for _ in range(150):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(theirs(x), y).backward()
        adam.step()
    ours = network(nn, kind).to(jnp.float64)
    ours.load_state_dict({k: jnp.asarray(v.numpy()) for k, v in theirs.state_dict().items()})
    return theirs, ours


def differences(kind: str) -> Iterator[tuple[str, float, float, float]]:
    """Yield for each structure a label and the three largest differences, relative where they are large."""
    import torch
    from laplace import Laplace
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = x / 16
    inputs, labels = torch.tensor(x), torch.tensor(y)
    theirs, ours = trained(kind, inputs[:TRAINED], labels[:TRAINED])
    pairs = torch.utils.data.TensorDataset(inputs[:TRAINED], labels[:TRAINED])
    batches = torch.utils.data.DataLoader(pairs, batch_size=250)
    new = slice(TRAINED, TRAINED + TESTED)
    for subset, structure in STRUCTURES:
        reference = Laplace(
            theirs,
            "classification",
            subset_of_weights=subset,
            hessian_structure=structure,
            prior_precision=PRIOR,
        )
        reference.fit(batches)
        posterior = nn.curvature.Laplace.fit(
            ours,
            x[:TRAINED],
            y[:TRAINED],
            likelihood="classification",
            structure=structure,
            subset=subset,
            prior_precision=PRIOR,
            batch_size=250,
        )
        proba = reference(inputs[new], link_approx="probit").detach().numpy()
        evidence = float(reference.log_marginal_likelihood())
        covariance = reference._glm_predictive_distribution(inputs[new])[1].detach().numpy()
        own = posterior.functional(x[new], batch_size=100)[1]
        yield (
            f"{kind}, {subset}, {structure}",
            float(np.abs(posterior.predict_proba(x[new], batch_size=100) - proba).max()),
            abs(float(posterior.log_marginal_likelihood()) / evidence - 1),
            float(np.abs(own - covariance).max() / np.abs(covariance).max()),
        )


def main() -> int:
    import torch

    torch.set_default_dtype(torch.float64)
    jax.config.update("jax_enable_x64", True)
    rows = [row for kind in ("dense", "convolution") for row in differences(kind)]
    header = ["network, parameters, structure", "probabilities", "evidence", "covariance"]
    print(table(header, [[name, *(f"{v:.1e}" for v in values)] for name, *values in rows]))
    return int(any(value > LIMIT for _, *values in rows for value in values))


if __name__ == "__main__":
    sys.exit(main())
