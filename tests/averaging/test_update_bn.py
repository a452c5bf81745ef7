"""update_bn beside torch.optim.swa_utils.update_bn."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.optim import swa_utils

import statefulnn as nn

RNG = np.random.default_rng(0)
BATCHES = [
    RNG.normal(number, 1, size=(n, 2)).astype(np.float32) for number, n in enumerate((4, 4, 3))
]


def net(lib: Any = nn) -> Any:
    """Momenta of two kinds, a layer without statistics, and one in another mode than the rest."""
    model = lib.Sequential(
        lib.BatchNorm1d(2, momentum=0.3),
        lib.Sequential(lib.BatchNorm1d(2, momentum=None), lib.Tanh()),
        lib.BatchNorm1d(2, track_running_stats=False),
    )
    model.eval()
    model[1].train()
    return model


def settings(model: nn.Module) -> list[Any]:
    return [(m.training, getattr(m, "momentum", "none")) for m in model.modules()]


def assert_equal_statistics(ours: nn.Module, theirs: torch.nn.Module) -> None:
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[name], value.numpy(), 1e-5, 1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["arrays", "tuples", "tensors"])
def test_statistics_are_torchs(kind):
    ours, theirs = net(), net(torch.nn)
    theirs_loader = [torch.as_tensor(x) for x in BATCHES]
    loader: Any = {
        "arrays": map(jnp.asarray, BATCHES),
        "tuples": [(x, np.zeros(len(x))) for x in BATCHES],
        "tensors": [[t, t] for t in theirs_loader],
    }[kind]
    average = nn.AveragedModel(ours)
    before = settings(average)
    nn.update_bn(loader, average)
    swa_utils.update_bn(theirs_loader, theirs)
    assert_equal_statistics(average.module, theirs)
    assert settings(average) == before


def test_norms_in_a_stack_of_layers_take_plain_averages():
    stack = nn.LayerStack([nn.BatchNorm1d(2) for _ in range(2)])
    theirs = torch.nn.Sequential(*(torch.nn.BatchNorm1d(2) for _ in range(2)))
    nn.update_bn(BATCHES, stack)
    swa_utils.update_bn(map(torch.as_tensor, BATCHES), theirs)
    assert_equal_statistics(stack, theirs)
    assert [norm.momentum for norm in stack] == [0.1, 0.1] and hasattr(stack, "stack")


def test_a_failure_leaves_statistics_momenta_and_modes_as_they_were():
    model = net()
    nn.update_bn(BATCHES, model)
    state, before = model.state_dict(), settings(model)

    def failing():
        yield BATCHES[0]
        raise OSError("the disk is gone")

    used_up = iter(BATCHES)
    list(used_up)
    for loader, error, part in [
        (failing(), OSError, "the disk"),
        ([BATCHES[0], np.ones((2, 3), np.float32)], nn.errors.ShapeError, "3"),
        (used_up, ValueError, "may be used up"),
    ]:
        with pytest.raises(error, match=part):
            nn.update_bn(loader, model)
        assert settings(model) == before
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value, state[name], err_msg=name)


def test_a_model_without_batch_normalisation_does_not_ask_the_loader():
    nn.update_bn(map(pytest.fail, ["the loader was asked"]), nn.Linear(1, 1))
    with pytest.raises(nn.errors.ArgumentError, match="list"):
        nn.update_bn(nn.Linear(1, 1), [])
