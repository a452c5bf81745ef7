"""Under nn.vmap, the generator in force goes on where the lanes stopped, and gives no number twice."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import statefulnn as nn


def draw_twice(x):
    return x + jax.random.bits(nn.next_key()), x + jax.random.bits(nn.next_key())


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_no_number_of_a_lane_comes_again_after_the_call(randomness):
    nn.manual_seed(0)
    inside = nn.vmap(draw_twice, randomness=randomness)(np.zeros(3, np.uint32))
    after = [int(jax.random.bits(nn.next_key())) for _ in range(4)]
    assert not {int(v) for v in np.ravel(inside)} & set(after)


def test_lanes_that_draw_the_same_leave_the_stream_where_a_call_without_vmap_does():
    nn.manual_seed(0)
    alone = draw_twice(np.zeros((), np.uint32))
    state = nn.default_generator.get_state()
    nn.manual_seed(0)
    mapped = nn.vmap(draw_twice, randomness="same")(np.zeros(3, np.uint32))
    for one, lanes in zip(alone, mapped, strict=True):
        assert (np.asarray(lanes) == int(one)).all()
    assert (np.asarray(nn.default_generator.get_state()) == np.asarray(state)).all()
