"""Floating-point operations: beside formulas, torch's counter and XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import statefulnn as nn
import statefulnn.functional as F
from tests.inspect.models import image


def flops(module, *inputs):
    return nn.summary(module, *inputs).total.flops


def torch_s(module, *shapes):
    with FlopCounterMode(display=False) as counter:
        module(*(torch.zeros(shape) for shape in shapes))
    return counter.get_total_flops()


def test_a_linear_layer_is_a_product_and_a_sum():
    assert flops(nn.Linear(8, 16, bias=False), image(4, 8)) == 2 * 4 * 8 * 16
    assert flops(nn.Linear(8, 16), image(4, 8)) == 2 * 4 * 8 * 16 + 4 * 16


@pytest.mark.parametrize(
    ("name", "args", "options", "shape"),
    [
        ("Linear", (8, 16), {}, (4, 8)),
        ("Conv1d", (4, 6, 3), {"stride": 2, "padding": 1}, (2, 4, 9)),
        ("Conv2d", (4, 6, 3), {"groups": 2}, (2, 4, 9, 8)),
        ("Conv2d", (4, 8, (3, 1)), {"dilation": 2}, (1, 4, 9, 8)),
        ("Conv3d", (2, 3, 2), {}, (1, 2, 4, 5, 6)),
        ("ConvTranspose2d", (4, 6, 3), {"stride": 2}, (2, 4, 5, 5)),
    ],
    ids=str,
)
def test_products_and_convolutions_are_what_torch_counts(name, args, options, shape):
    ours = getattr(nn, name)(*args, bias=False, **options)
    theirs = getattr(torch.nn, name)(*args, bias=False, **options)
    assert flops(ours, image(*shape)) == torch_s(theirs, shape)


def test_attention_is_two_products_beside_what_each_score_costs():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    batch, heads, length, size = 2, 3, 16, 8
    q = image(batch, heads, length, size)
    products = 2 * 2 * batch * heads * length * length * size
    scores = batch * heads * length * length
    # A softmax subtracts, takes the exponential, divides and reduces twice; the scale is one more product.
    assert products + 5 * scores <= flops(Attention(), q, q, q) <= products + 8 * scores


def test_the_count_is_xla_s_where_there_is_no_loop():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

        def forward(self, x):
            return jnp.sum(jnp.exp(-self.layers(x)), axis=1)

    net = Net()
    fn, params = nn.functionalize(net)
    lowered = jax.jit(fn).lower(params, image(5, 8))
    xla = lowered.cost_analysis()
    assert flops(net, image(5, 8)) == xla["flops"] + xla["transcendentals"]


def test_a_scan_counts_each_of_its_steps():
    lstm = nn.LSTM(4, 8)
    first, second, third = (flops(lstm, image(steps, 2, 4)) for steps in (10, 20, 30))
    assert third - second == second - first
    products = (
        2 * 2 * (4 * 8) * (4 + 8)
    )  # of a step: 4 gates of 8, from 4 inputs and 8 hidden, batch of 2
    assert products < (second - first) / 10 < 1.5 * products


def test_of_branches_the_dearest_counts():
    class Branches(nn.Module):
        def forward(self, x):
            return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    cost = flops(Branches(), image(6, 6))
    assert 2 * 2 * 6**3 <= cost <= 2 * 2 * 6**3 + 1  # and one comparison


def test_what_moves_numbers_or_counts_integers_costs_nothing():
    class Moves(nn.Module):
        def forward(self, x):
            index = jnp.arange(3, dtype=jnp.int32) * 2 + 1
            return jnp.concatenate([x.T.reshape(2, -1)[:, index], jnp.zeros((2, 1))], 1)

    assert flops(Moves(), image(4, 5)) == 0


def test_parts_add_up_to_the_whole():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.GELU())
    rows = {row.path: row for row in nn.summary(model, image(3, 4)).rows}
    assert rows[""].flops == rows["0"].flops + rows["1"].flops + rows["2"].flops
    assert rows["1"].flops == rows["1.0"].flops + rows["1.1"].flops
    assert np.isfinite(rows[""].flops)
