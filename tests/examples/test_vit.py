"""What the vision transformer example adds to tests/examples/test_models.py."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import vit
from tests.examples.reference import SMALL


def test_names_of_the_first_version_load():
    # torchvision's vit_b_16-c867db91.pth has them.
    ours, _ = SMALL["vit"].pair()
    old = {
        k.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v
        for k, v in ours.state_dict().items()
    }
    assert sum("linear_" in k for k in old) == 8
    again = SMALL["vit"].ours()
    again.load_state_dict(old)
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value, ours.state_dict()[name])


def test_fresh_head_gives_zeros_as_torchvisions():
    model = SMALL["vit"].ours().eval()
    assert not np.asarray(model(jnp.ones((1, 3, 32, 32)))).any()


def test_images_of_another_size_are_refused():
    model = SMALL["vit"].ours()
    with pytest.raises(ValueError, match="48 x 32; this model is for 32"):
        model(jnp.ones((1, 3, 48, 32)))


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="image_size=30 is no multiple of patch_size=8"):
        vit.VisionTransformer(30, 8, 1, 1, 8, 8)
