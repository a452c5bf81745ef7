"""The digits example reaches its accuracy, by the model it describes."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

import digits_cnn
import statefulnn as nn

pytestmark = pytest.mark.compiled_with_care


def test_test_accuracy_is_at_least_98_percent(capsys):
    accuracy = digits_cnn.main([])
    assert accuracy >= 0.98
    assert f"{accuracy:.2%}" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 4))
def test_test_accuracy_does_not_hang_on_the_seed(seed):
    assert digits_cnn.main(["--seed", str(seed)]) >= 0.98


def test_split_is_fixed_and_disjoint():
    train_x, test_x, train_y, test_y = digits_cnn.load_data()
    assert train_x.shape == (1347, 1, 8, 8)
    assert test_x.shape == (450, 1, 8, 8)
    assert len(train_y) == 1347
    assert len(test_y) == 450
    again = digits_cnn.load_data()
    np.testing.assert_array_equal(test_x, again[1])
    assert 0.0 <= train_x.min() and train_x.max() == 1.0


def test_saved_weights_give_the_same_predictions(capsys):
    accuracy = digits_cnn.main(["--epochs", "1", "--save", "digits.npz"])
    model = digits_cnn.DigitsCNN().eval()
    with np.load("digits.npz") as saved:
        model.load_state_dict(dict(saved))
    _, test_x, _, test_y = digits_cnn.load_data()
    assert (np.asarray(digits_cnn.predict(model, test_x)) == test_y).mean() == accuracy


def test_train_step_changes_weights_statistics_slots_and_masks():
    model = digits_cnn.DigitsCNN()
    opt = nn.Optimizer(model, optax.adamw(1e-3))
    train_x, _, train_y, _ = digits_cnn.load_data()
    before = {**model.state_dict(), **{f"opt.{k}": v for k, v in opt.state_dict().items()}}
    key = np.array(nn.default_generator.get_state())
    digits_cnn.train_step(model, opt, train_x[:64], train_y[:64])
    after = {**model.state_dict(), **{f"opt.{k}": v for k, v in opt.state_dict().items()}}
    unchanged = [name for name in before if np.array_equal(before[name], after[name])]
    assert unchanged == []
    assert not np.array_equal(key, nn.default_generator.get_state())
    assert all(isinstance(p.value, jax.Array) for p in model.parameters())
