"""The hypernetwork writes weights that fit tasks it has not seen, and the target runs with them."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import hypernetwork as example
from tests.precision import in_float64
from tests.quick import quickly

pytestmark = pytest.mark.compiled_with_care


def best_average():
    """The error, on the tasks that judge, of the best function for all tasks together.

    It is their mean, E[y | x] = -(2 / pi) E[A] cos x, for the phase is uniform in [0, pi].
    """
    x, y = map(np.asarray, example.sample_tasks(jax.random.key(2017), 200, example.POINTS + 100))
    mean = -2 / np.pi * 2.55 * np.cos(x)
    return np.mean(((y - mean) ** 2)[:, example.POINTS :])


def tasks(count=3, points=20, seed=1):
    return example.sample_tasks(jax.random.key(seed), count, points)


def some_hypernetwork(seed=2):
    # Other than the initial one, which gives every task nearly the same weights.
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(p) + 0.1 * rng.normal(size=p.shape).astype(np.float32)
        for name, p in example.hyper_initial.items()
    }


def test_a_short_run_beats_networks_without_a_hypernetwork_and_saves_a_picture(capsys):
    errors = example.main(["--steps", "800", "--picture", "pictures/hyper.png"])
    hyper, rivals = errors["hypernetwork"].mean(), [errors[w] for w in list(example.WAYS)[1:]]
    assert hyper < 1.0
    assert all(hyper < 0.5 * rival.mean() for rival in rivals)
    assert errors["all tasks"].mean() == pytest.approx(best_average(), rel=0.1)
    assert Path("pictures/hyper.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert all(f"{error.mean():.3f}" in printed for error in errors.values())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_the_full_run_reaches_its_error_with_any_seed(seed):
    errors = example.main(["--seed", str(seed)])
    hyper = errors["hypernetwork"]
    assert hyper.mean() < 0.04 and np.median(hyper) < 0.02
    assert all(hyper.mean() < 0.05 * errors[w].mean() for w in list(example.WAYS)[1:])
    assert errors["all tasks"].mean() == pytest.approx(best_average(), rel=0.05)


def test_written_weights_have_the_names_and_shapes_of_the_target():
    x, y = tasks()
    written = jax.vmap(example.write, in_axes=(None, 0, 0))(some_hypernetwork(), x, y)
    assert {n: w.shape for n, w in written.items()} == {
        n: (3, *p.shape) for n, p in example.initial.items()
    }


def test_every_task_starts_with_the_weights_of_the_target():
    x, y = tasks(1)
    written = example.write(example.hyper_initial, x[0], y[0])
    for name, p in example.initial.items():
        np.testing.assert_allclose(written[name], p, atol=0.02)
        assert not np.array_equal(written[name], p)


def by_hand(hyper, x, y, new):
    """Both networks as products of matrices; the weights cut from one vector, by sorted name."""

    def linear(name, v):
        return v @ hyper[f"{name}.weight"].T + hyper[f"{name}.bias"]

    h = np.maximum(linear("points.0", np.concatenate([x, y], 1)), 0)
    h = np.maximum(linear("points.2", h), 0).mean(0)
    flat, weights = linear("head", np.maximum(linear("task.0", h), 0)), {}
    for name in sorted(example.initial):
        shape = example.initial[name].shape
        size = int(np.prod(shape))
        weights[name], flat = flat[:size].reshape(shape), flat[size:]
    v = np.maximum(new @ weights["fc1.weight"].T + weights["fc1.bias"], 0)
    v = np.maximum(v @ weights["fc2.weight"].T + weights["fc2.bias"], 0)
    return v @ weights["out.weight"].T + weights["out.bias"]


def test_the_loss_is_the_one_written_by_hand():
    x, y = map(np.asarray, tasks())
    hyper = some_hypernetwork()
    double = {n: np.asarray(p, np.float64) for n, p in hyper.items()}
    want = [
        np.mean((by_hand(double, a[:10], b[:10], a[10:]) - b[10:]) ** 2)
        for a, b in zip(x, y, strict=True)
    ]
    got = jax.vmap(example.hyper_loss, in_axes=(None, 0, 0))(hyper, x, y)
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_gradient_is_that_of_finite_differences():
    with in_float64():
        x, y = (np.asarray(v[0], np.float64) for v in tasks(1))
        hyper = {n: np.asarray(p, np.float64) for n, p in some_hypernetwork().items()}
        rng = np.random.default_rng(0)
        toward = {n: rng.normal(size=p.shape) for n, p in hyper.items()}
        loss = quickly(jax.value_and_grad(example.hyper_loss))
        grads = loss(hyper, x, y)[1]
        slope = sum((np.asarray(grads[n]) * toward[n]).sum() for n in hyper)
        step = 1e-7  # short of the kinks of ReLU
        up, down = (
            loss({n: hyper[n] + h * toward[n] for n in hyper}, x, y)[0] for h in (step, -step)
        )
        numeric = (up - down) / (2 * step)
        assert slope == pytest.approx(float(numeric), rel=1e-5)


def test_the_order_of_the_points_does_not_matter_but_their_values_do():
    (x,), (y,) = tasks(1, 10)
    hyper = some_hypernetwork()
    order = np.random.default_rng(0).permutation(10)
    one, other = example.write(hyper, x, y), example.write(hyper, x[order], y[order])
    mixed = example.write(hyper, x, y[order])
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-4)
        assert np.abs(one[name] - mixed[name]).max() > 1e-2


def test_tasks_are_sines_within_the_ranges():
    x, y = map(np.asarray, tasks(500, 50))
    assert -5 <= x.min() < -4.9 and 4.9 < x.max() <= 5
    # A sin(x - phase) = a sin x + b cos x: a linear fit finds amplitude and phase of each task.
    found = []
    for xt, yt in zip(x[:, :, 0], y[:, :, 0], strict=True):
        basis = np.stack([np.sin(xt), np.cos(xt)], 1)
        (a, b), residual, *_ = np.linalg.lstsq(basis, yt, rcond=None)
        assert residual[0] < 1e-6
        found.append((np.hypot(a, b), np.arctan2(-b, a)))
    amplitude, phase = np.array(found).T
    assert 0.099 <= amplitude.min() < 0.2 and 4.9 < amplitude.max() <= 5.001
    assert -1e-3 <= phase.min() < 0.05 and 3.09 < phase.max() <= np.pi + 1e-3
