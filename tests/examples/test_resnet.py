"""The ResNet example trains as torchvision's does: batch statistics, running statistics, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import resnet
import statefulnn as nn
from tests.examples.reference import (
    FULL,
    SMALL,
    assert_close,
    from_torch,
    saved_by_torch,
    torchvision,
)
from tests.precision import in_float64
from tests.quick import QUICKLY, quickly


@pytest.mark.parametrize(
    "training",
    [pytest.param(True, id="train"), pytest.param(False, id="eval", marks=pytest.mark.long)],
)
@pytest.mark.parametrize(
    "case",
    [
        SMALL["resnet-basic"],
        pytest.param(SMALL["resnet-bottleneck"], marks=pytest.mark.long),
        pytest.param(FULL["resnet18"], marks=pytest.mark.long),
        pytest.param(FULL["resnet50"], marks=pytest.mark.long),
    ],
    ids=["basic", "bottleneck", "resnet18", "resnet50"],
)
def test_outputs_statistics_and_gradients_are_torchvisions(case, training):
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(4, 3, 64, 64)), rng.integers(0, 10, 4)
    ours, theirs = case.pair()
    # In float32 the gradients of torchvision itself are off by a tenth now and then, since rounding
    # moves an input of a ReLU across 0.
    with in_float64():
        fn, params, state = nn.functionalize(ours.double().train(training), mutable=True)

        def loss_of(params, state, x):
            out, state = fn(params, state, x)
            loss = -jax.nn.log_softmax(out)[np.arange(4), labels].mean()
            return loss, (out, state)

        step = quickly(jax.grad(loss_of, has_aux=True))
        grads, (out, state) = jax.device_get(step(params, state, jnp.asarray(x)))
    expected = theirs.double().train(training)(torch.tensor(x))
    torch.nn.functional.cross_entropy(expected, torch.tensor(labels)).backward()

    assert_close(out, from_torch(expected), 1e-9)
    buffers = dict(theirs.named_buffers())
    assert state.keys() == buffers.keys()
    for name, value in state.items():
        assert_close(value, from_torch(buffers[name]), 1e-9)
    assert int(state["bn1.num_batches_tracked"]) == 3 + training  # the pair starts from 3
    assert grads.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        scale = float(p.grad.abs().max())
        assert_close(grads[name] / scale, from_torch(p.grad) / scale, 1e-8)


def test_training_mode_in_float32_updates_the_statistics_in_place():
    ours, theirs = SMALL["resnet-bottleneck"].pair()
    x = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    out = nn.jit(ours.train(), compiler_options=QUICKLY)(x)
    expected = theirs.train()(torch.tensor(x))
    assert_close(out, from_torch(expected), 1e-3)
    state = ours.state_dict()
    for name, buffer in theirs.named_buffers():
        assert_close(state[name], from_torch(buffer))


def test_running_statistics_matter_in_eval_mode():
    ours, _ = SMALL["resnet-bottleneck"].pair()
    x = jnp.ones((1, 3, 32, 32))
    call = quickly(lambda model, x: model(x))
    before = call(ours, x)
    state = {k: v for k, v in ours.state_dict().items() if k.endswith("running_mean")}
    ours.load_state_dict({k: v + 0.1 for k, v in state.items()}, strict=False)
    assert not np.allclose(before, call(ours, x), rtol=1e-2)


@pytest.mark.parametrize("seed", range(3))
def test_fresh_models_hold_finite_numbers(seed):
    nn.manual_seed(seed)
    for name, value in resnet.resnet18().state_dict().items():
        assert np.isfinite(np.asarray(value)).all(), name


def test_pictures_are_prepared_as_torchvision_does(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 417, 3)).astype(np.uint8)
    path = tmp_path / "picture.png"
    image.fromarray(pixels).save(path)
    presets = torchvision.transforms._presets.ImageClassification(crop_size=224, antialias=True)
    expected = presets(image.open(path)).numpy()[None]
    np.testing.assert_allclose(resnet.read_image(str(path)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "layers", [[1, 1, 1, 1], pytest.param([2, 2, 2, 2], marks=pytest.mark.long)], ids=str
)
def test_program_classifies_with_torchvisions_file(layers, tmp_path, capsys):
    torch.manual_seed(0)
    theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, layers)
    archs = {"small": lambda: resnet.ResNet(resnet.BasicBlock, layers)}
    if sum(layers) == 8:
        archs["small"] = resnet.ARCHS["resnet18"]
    path = saved_by_torch(theirs, tmp_path, "pth")
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"kind {i}" for i in range(1000)))
    probabilities = resnet.classify(
        resnet.__doc__,
        archs,
        ["--arch", "small", "--weights", str(path), "--labels", str(labels)],
    )
    with torch.no_grad():
        logits = theirs.eval()(torch.tensor(resnet.read_image(None)))
    np.testing.assert_allclose(probabilities, torch.softmax(logits, 1)[0], atol=1e-5)
    out = capsys.readouterr().out
    assert f"{sum(p.numel() for p in theirs.parameters()):,} parameters" in out
    assert f"kind {probabilities.argmax()}\n" in out
