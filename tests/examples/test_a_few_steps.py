"""Each of these examples runs to its end after a few steps; how well it learns, its own long tests say."""

from __future__ import annotations

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

# The least that goes through all of a program.
FEW = {
    "char_transformer": "--steps 2 --batch-size 8",
    "diffusion_digits": "--steps 5 --batch-size 16 --drawn 20",
    "diffusion_moons": "--steps 10",
    "dqn_gridworld": "--steps 20",
    "ensemble_gap": "--steps 5 --members 2",
    "ensemble_spirals": "--epochs 2 --members 3 --no-timing",
    "gan_ring": "--steps 10",
    "hpo_logistic": "--steps 2",
    "maml_reptile": "--steps 3",
    "maml_sinusoid": "--steps 20",
    "mislabelled_digits": "--steps 10",
    "neural_ode": "--steps 2 --lengths 16 32",
    "per_sample_gradients": "--epochs 1 --plain-epochs 3",
    "pinn_burgers": "--steps 5 --points 50",
    "seq2seq_dates": "--steps 2 --batch-size 8",
}

# Their loops are long even so.
WITH_CARE = {"per_sample_gradients"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.compiled_with_care if name in WITH_CARE else ())
        for name in FEW
    ],
)
def test_it_prints_finite_numbers_and_saves_a_picture(name, capsys):
    picture = Path("pictures") / f"{name}.png"
    found = importlib.import_module(name).main([*FEW[name].split(), "--picture", str(picture)])
    numbers = jax.tree.leaves(found)
    assert numbers and all(np.isfinite(number).all() for number in numbers)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"picture: {picture}" in capsys.readouterr().out
