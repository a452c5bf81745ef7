"""What the ConvNeXt example adds to tests/examples/test_models.py: blocks that some images skip."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import convnext
import statefulnn as nn
from tests.examples.reference import SMALL, torchvision
from tests.quick import quickly


def test_each_image_skips_a_block_or_takes_it_scaled():
    block = convnext.CNBlock(4, layer_scale=0.5, stochastic_depth_prob=0.25)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(400, 4, 3, 3)), jnp.float32)
    kept = np.asarray(block.eval()(x) - x)
    given = np.asarray(block.train()(x) - x)
    taken = np.abs(given).reshape(400, -1).max(1) > 1e-6
    np.testing.assert_allclose(given[taken], kept[taken] / 0.75, atol=1e-5)
    assert 0.15 < 1 - taken.mean() < 0.35


def test_probability_to_skip_grows_as_in_torchvision():
    with nn.device("meta"):
        ours = convnext.convnext_tiny()
    found = [m.stochastic_depth_prob for m in ours.modules() if isinstance(m, convnext.CNBlock)]
    theirs = torchvision.models.convnext_tiny()
    blocks = torchvision.models.convnext.CNBlock
    expected = [m.stochastic_depth.p for m in theirs.modules() if isinstance(m, blocks)]
    assert found == pytest.approx(expected)


def test_training_and_eval_mode_agree_where_nothing_is_skipped():
    ours, _ = SMALL["convnext"].pair()
    x = jnp.ones((1, 3, 32, 32))
    call = quickly(lambda model, x: model(x))
    np.testing.assert_allclose(call(ours.train(), x), call(ours.eval(), x), rtol=1e-6)
