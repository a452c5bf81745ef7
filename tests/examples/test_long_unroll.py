"""The long unroll: memory of checkpoints, directions of cheaper gradients, a schedule that helps."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import long_unroll
import statefulnn.functional as F
from tests.quick import quickly


def test_checkpoints_save_memory_and_change_no_gradient():
    table = long_unroll.memory_and_time(steps=100)
    assert table["sqrt"]["memory"] * 4 < table["none"]["memory"]
    for checkpoint in ("all", "sqrt"):
        assert table[checkpoint]["error"] < 1e-4


def test_the_gradient_of_the_schedule_is_that_of_a_loop_by_hand():
    steps = 12

    def by_hand(knots):
        lr, params = long_unroll.rates(knots, steps), long_unroll.initial
        loss = lambda p: F.mse_loss(long_unroll.fn(p, long_unroll.X), long_unroll.Y)

        def step(params, lr):
            grads = jax.grad(loss)(params)
            return {n: p - lr * grads[n] for n, p in params.items()}, None

        return loss(jax.lax.scan(step, params, lr)[0])

    expected = quickly(jax.grad(by_hand))(long_unroll.START)
    found = quickly(jax.grad(partial(long_unroll.trained_loss, steps=steps)))(long_unroll.START)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert float(jnp.abs(expected).max()) > 0


@pytest.mark.long
def test_the_full_run(capsys):
    found = long_unroll.main(["--picture", "p/unroll.png"])
    sqrt = found["table"]["sqrt"]
    assert sqrt["memory"] * 10 < found["table"]["none"]["memory"]
    assert sqrt["error"] < 1e-5
    assert found["learned"] < 0.95 * found["constant"]
    cosines = found["cosines"]
    assert cosines["ES, 64 pairs"] > 0.9
    assert cosines["PES, 256 pairs"] > 0.9
    assert cosines["last 10 steps"] < cosines["last 100 steps"] < 0.9
    assert Path("p/unroll.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "cosine" in capsys.readouterr().out
