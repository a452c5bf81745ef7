"""Models of the examples, beside torchvision's and transformers': names, files, numbers, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.examples import reference
from tests.examples.reference import FULL, SMALL, as_arrays, assert_close, from_torch, to_torch
from tests.quick import quickly

pytestmark = pytest.mark.compiled_with_care

# The others are of the same classes, or take long to compile.
MOST = ("bert", "gpt2", "resnet-bottleneck", "vit", "convnext", "lstm-tied")


def models(cases, quick):
    rows = [n if n in quick else pytest.param(n, marks=pytest.mark.long) for n in cases]
    return pytest.mark.parametrize("name", rows)


small = models(SMALL, MOST)
# Gradients through ReLU are compared in float64, in test_resnet.py.
# By default each model has its gradients compared once: of a batch here, or of each example below.
small_smooth = models([n for n in SMALL if "resnet" not in n], ("gpt2", "vit"))
small_without_images = models(SMALL, ("bert", "lstm-tied"))
full = models(FULL, ())


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def shapes(state: dict) -> dict:
    return {name: tuple(v.shape) for name, v in state.items()}


def plain(module, *inputs):
    return module(*inputs)


# --------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("name", FULL)
def test_full_size_names_order_shapes_and_counts_are_the_references(name):
    with nn.device("meta"):
        ours = FULL[name].ours()
    with torch.device("meta"):
        theirs = FULL[name].theirs()
    assert list(shapes(ours.state_dict()).items()) == list(shapes(theirs.state_dict()).items())
    count = sum(p.numel() for p in theirs.parameters())
    assert sum(p.size for p in ours.parameters()) == count


@small
def test_trainable_names_are_the_references(name):
    ours, theirs = SMALL[name].ours(), SMALL[name].theirs()
    expected = [n for n, p in theirs.named_parameters() if p.requires_grad]
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == expected


# The reference of the LSTM has torch's own initial values.
@models([n for n in SMALL if "lstm" not in n], MOST)
def test_fresh_weights_have_the_references_spread(name):
    ours, theirs = SMALL[name].ours(), SMALL[name].theirs()
    expected = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        if p.size >= 256:
            spread = float(np.asarray(p.value).std())
            assert spread == pytest.approx(from_torch(expected[key]).std(), rel=0.25, abs=1e-8), key


# --------------------------------------------------------------------------------------------------
# Files and numbers


@small
def test_files_written_by_the_reference_give_its_logits(name, tmp_path, rng):
    case = SMALL[name]
    theirs = case.reference()
    inputs = case.inputs(rng)
    expected = case.call(theirs, *inputs)
    call = quickly(plain)
    for kind in ("pth", "safetensors"):
        state = nn.load(reference.saved_by_torch(theirs, tmp_path, kind))
        ours = case.ours().eval()
        assert str(ours.load_state_dict(state)) == "<All keys matched successfully>"
        assert_close(case.our_output(call(ours, *as_arrays(inputs))), expected)


@full
def test_file_of_full_size_gives_the_references_logits(name, tmp_path, rng):
    case = FULL[name]
    theirs = case.reference()
    with nn.device("meta"):
        ours = case.ours().eval()
    state = nn.load(reference.saved_by_torch(theirs, tmp_path, "pth"))
    assert str(ours.load_state_dict(state, assign=True)) == "<All keys matched successfully>"
    inputs = case.inputs(rng)
    assert_close(case.our_output(nn.jit(ours)(*as_arrays(inputs))), case.call(theirs, *inputs))


@small
def test_reference_loads_what_ours_saved(name, tmp_path, rng):
    case = SMALL[name]
    ours = case.ours().eval()
    nn.save(ours, tmp_path / "model.safetensors")
    theirs, again = case.theirs().eval(), case.theirs().eval()
    missing, unexpected = reference.safetensors_torch.load_model(
        theirs, tmp_path / "model.safetensors"
    )
    assert not missing and not unexpected
    inputs = case.inputs(rng)
    expected = case.our_output(quickly(plain)(ours, *as_arrays(inputs)))
    assert_close(case.call(theirs, *inputs), np.asarray(expected))
    # By torch's own function, from the arrays by name.
    state = {k: torch.tensor(np.asarray(v)) for k, v in ours.state_dict().items()}
    again.load_state_dict(state, strict=True)
    assert_close(case.call(again, *inputs), np.asarray(expected))


def test_wrong_file_names_what_is_missing_and_changes_nothing(tmp_path):
    case = SMALL["vit"]
    ours = case.ours()
    before = {k: np.asarray(v) for k, v in ours.state_dict().items()}
    theirs = case.reference()
    state = nn.load(reference.saved_by_torch(theirs, tmp_path, "pth"))
    del state["encoder.layers.encoder_layer_1.mlp.3.bias"]
    with pytest.raises(nn.StateDictError, match=r"Missing.*encoder_layer_1\.mlp\.3\.bias"):
        ours.load_state_dict(state)
    for key, value in ours.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


# --------------------------------------------------------------------------------------------------
# Gradients and transformations


def gradients_of_the_reference(case, theirs, cotangent, inputs):
    (case.output(theirs(*map(to_torch, inputs))) * torch.tensor(cotangent)).sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    return {
        n: np.zeros(theirs.get_parameter(n).shape) if g is None else from_torch(g)
        for n, g in grads.items()
    }


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    largest = max(np.abs(g).max() for g in expected.values())
    for key, grad in found.items():
        # Some are 0 but for rounding: attention does not change with the bias of its keys.
        scale = max(np.abs(expected[key]).max(), 1e-2 * largest)
        assert_close(grad / scale, expected[key] / scale)


@small_smooth
def test_gradients_by_nn_grad_are_the_references(name, rng):
    case = SMALL[name]
    ours, theirs = case.pair()
    inputs = case.inputs(rng)
    cotangent = rng.normal(size=case.call(theirs, *inputs).shape).astype(np.float32)

    def gradients(model, *inputs):
        return nn.grad(lambda m: (case.our_output(m(*inputs)) * cotangent).sum())(model)

    grads = quickly(gradients)(ours, *as_arrays(inputs))
    assert_same_gradients(grads, gradients_of_the_reference(case, theirs, cotangent, inputs))


@models([n for n in SMALL if "resnet" not in n], ("bert", "lstm-tied"))
def test_gradients_of_each_example_by_vmap_add_up_to_the_references(name, rng):
    case = SMALL[name]
    ours, theirs = case.pair()
    inputs = case.inputs(rng)
    cotangent = rng.normal(size=case.call(theirs, *inputs).shape).astype(np.float32)
    axis = 1 if name.startswith("lstm") else 0  # which counts the examples
    fn, params = nn.functionalize(ours)

    def loss_of_one(params, cotangent, *inputs):
        out = case.our_output(fn(params, *(jnp.expand_dims(x, axis) for x in inputs)))
        return (out.squeeze(axis) * cotangent).sum()

    axes = (None, *(axis for _ in (cotangent, *inputs)))
    per_example = quickly(jax.vmap(jax.grad(loss_of_one), axes))
    grads = per_example(params, jnp.asarray(cotangent), *as_arrays(inputs))
    assert all(len(grad) == inputs[0].shape[axis] for grad in grads.values())
    sums = {key: np.asarray(grad).sum(0) for key, grad in grads.items()}
    assert_same_gradients(sums, gradients_of_the_reference(case, theirs, cotangent, inputs))


@small_without_images
def test_bfloat16_follows_the_reference_in_bfloat16(name, rng):
    case = SMALL[name]
    ours, theirs = case.pair()
    ours, theirs = ours.to(jnp.bfloat16), theirs.bfloat16()
    inputs = case.inputs(rng)
    low = [to_torch(x).bfloat16() if x.dtype == np.float32 else to_torch(x) for x in inputs]
    with torch.no_grad():
        expected = case.output(theirs(*low)).float().numpy()
    given = [
        jnp.asarray(x.float().numpy(), jnp.bfloat16)
        if x.is_floating_point()
        else jnp.asarray(x.numpy().astype(np.int32))
        for x in low
    ]
    out = case.our_output(quickly(plain)(ours, *given))
    assert out.dtype == jnp.bfloat16
    assert_close(out.astype(jnp.float32), expected, 0.05)


@small
def test_meta_model_takes_the_arrays_of_the_file_as_they_are(name, tmp_path, rng):
    case = SMALL[name]
    ours, _ = case.pair()
    nn.save(ours, tmp_path / "model.safetensors")
    state = nn.load(tmp_path / "model.safetensors")
    with nn.device("meta"):
        built = case.ours().eval()
    assert all(isinstance(v, jax.ShapeDtypeStruct) for v in built.state_dict().values())
    built.load_state_dict(state, assign=True)
    floats = [k for k, v in state.items() if v.dtype == np.float32]
    assert floats and all(built.state_dict()[k] is state[k] for k in floats)
    assert len(list(built.parameters())) == len(list(ours.parameters()))  # ties are ties
    inputs = as_arrays(case.inputs(rng))
    call = quickly(plain)
    np.testing.assert_array_equal(
        case.our_output(call(built, *inputs)), case.our_output(call(ours, *inputs))
    )


@small_without_images
def test_second_model_of_the_same_sizes_runs_the_same_compiled_code(name, rng):
    case = SMALL[name]
    inputs = as_arrays(case.inputs(rng))
    traces = []

    @nn.jit
    def call(model, *inputs):
        traces.append(None)
        return case.our_output(model(*inputs))

    call(case.ours().eval(), *inputs)
    call(case.ours().eval(), *inputs)
    assert len(traces) == 1
