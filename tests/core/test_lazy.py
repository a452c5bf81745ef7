"""Lazy layers: torch's life cycle, shapes without arithmetic, and nothing half done."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn

LAZY = [
    ("LazyLinear", (4,), {}, (2, 3), "Linear"),
    ("LazyLinear", (4,), {"bias": False}, (3,), "Linear"),
    ("LazyConv1d", (6, 3), {}, (2, 4, 9), "Conv1d"),
    ("LazyConv2d", (6, 3), {"groups": 2, "padding": 1}, (2, 4, 9, 9), "Conv2d"),
    ("LazyConv2d", (6, 3), {"bias": False}, (4, 9, 9), "Conv2d"),
    ("LazyConv3d", (6, 2), {}, (2, 4, 4, 4, 4), "Conv3d"),
    ("LazyConvTranspose1d", (6, 3), {"stride": 2}, (2, 4, 9), "ConvTranspose1d"),
    ("LazyConvTranspose2d", (6, 3), {"groups": 2}, (2, 4, 5, 5), "ConvTranspose2d"),
    ("LazyConvTranspose3d", (6, 2), {}, (2, 4, 3, 3, 3), "ConvTranspose3d"),
    ("LazyBatchNorm1d", (), {}, (5, 4), "BatchNorm1d"),
    ("LazyBatchNorm1d", (), {"affine": False}, (5, 4, 3), "BatchNorm1d"),
    ("LazyBatchNorm2d", (), {"track_running_stats": False}, (5, 4, 3, 3), "BatchNorm2d"),
    ("LazyBatchNorm3d", (), {}, (5, 4, 3, 3, 3), "BatchNorm3d"),
    ("LazyInstanceNorm1d", (), {"affine": True}, (5, 4, 3), "InstanceNorm1d"),
    ("LazyInstanceNorm2d", (), {"track_running_stats": True}, (5, 4, 3, 3), "InstanceNorm2d"),
    ("LazyInstanceNorm3d", (), {"affine": True}, (5, 4, 3, 3, 3), "InstanceNorm3d"),
]


def built(name: str, args: tuple, kwargs: dict) -> tuple[torch.nn.Module, nn.Module]:
    return getattr(torch.nn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("name", "args", "kwargs", "shape", "becomes"), LAZY)
def test_the_first_call_makes_an_ordinary_layer(name, args, kwargs, shape, becomes) -> None:
    theirs, ours = built(name, args, kwargs)
    assert repr(ours) == repr(theirs)
    assert ours.has_uninitialized_params() == theirs.has_uninitialized_params()
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    theirs(torch.as_tensor(x))
    ours(jnp.asarray(x))
    assert type(ours) is getattr(nn, becomes)
    assert repr(ours) == repr(theirs)
    expected = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == expected
    ours.load_state_dict({k: np.asarray(v) for k, v in theirs.state_dict().items()})
    theirs.eval()
    ours.eval()
    np.testing.assert_allclose(
        ours(jnp.asarray(x)), theirs(torch.as_tensor(x)).detach().numpy(), atol=2e-5
    )


@pytest.mark.parametrize(("name", "args", "kwargs", "shape", "becomes"), LAZY)
def test_materialize_makes_the_same_without_calling(name, args, kwargs, shape, becomes) -> None:
    called = getattr(nn, name)(*args, **kwargs)
    inferred = getattr(nn, name)(*args, **kwargs)
    nn.manual_seed(0)
    called(jnp.ones(shape))
    nn.manual_seed(0)
    nn.materialize(inferred, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert type(inferred) is type(called) is getattr(nn, becomes)
    parameters = dict(called.named_parameters())
    for key, p in inferred.named_parameters():
        np.testing.assert_array_equal(p, parameters[key])
    for key, b in inferred.named_buffers():
        if key.endswith("num_batches_tracked"):
            assert int(b) == 0  # nothing ran


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.LazyConv2d(8, 3)
        self.norm = nn.LazyBatchNorm2d()
        self.drop = nn.Dropout(0.5)
        self.head = nn.LazyLinear(10)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x))).reshape(x.shape[0], -1))


def test_materialize_infers_a_model_with_state_and_randomness_without_arithmetic() -> None:
    model = nn.materialize(Net(), jax.ShapeDtypeStruct((2, 3, 6, 6), jnp.float32))
    assert model.conv.weight.shape == (8, 3, 3, 3)
    assert model.head.weight.shape == (10, 8 * 16)
    assert int(model.norm.num_batches_tracked) == 0
    assert (np.asarray(model.norm.running_mean) == 0).all()
    assert nn.jit(model)(jnp.ones((2, 3, 6, 6))).shape == (2, 10)


def test_a_failed_materialize_changes_nothing() -> None:
    class Broken(Net):
        def forward(self, x):
            super().forward(x)
            raise ZeroDivisionError

    model = Broken()
    with pytest.raises(ZeroDivisionError):
        nn.materialize(model, jnp.ones((2, 3, 6, 6)))
    assert type(model.conv) is nn.LazyConv2d
    assert model.conv.has_uninitialized_params()
    assert model.conv.in_channels == 0


def test_a_lazy_layer_that_is_not_reached_is_named() -> None:
    class Half(Net):
        def forward(self, x):
            return self.conv(x)

    model = Half()
    with pytest.raises(nn.UninitializedParameterError, match="'norm'"):
        nn.materialize(model, jnp.ones((2, 3, 6, 6)))
    assert type(model.conv) is nn.LazyConv2d


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: nn.jit(m)(x),
        lambda m, x: jax.jit(lambda x: m(x))(x),
        lambda m, x: jax.jit(lambda m, x: m(x))(m, x),
        lambda m, x: nn.functional_call(m, {}, x),
        lambda m, x: nn.functionalize(m),
        lambda m, x: nn.split(m),
        lambda m, x: m.head.weight + 1,
        lambda m, x: jnp.sum(m.head.weight),
        lambda m, x: m.head.weight.shape,
    ],
)
def test_using_it_before_says_what_to_do(use) -> None:
    model = nn.Sequential()
    model.head = nn.LazyLinear(3)
    with pytest.raises(nn.UninitializedParameterError, match=r"nn\.materialize"):
        use(model, jnp.ones((2, 4)))
    assert type(model.head) is nn.LazyLinear
    assert model.head.in_features == 0
    assert model(jnp.ones((2, 4))).shape == (2, 3)


def test_bad_input_to_a_lazy_layer_changes_nothing() -> None:
    for layer, x in (
        (nn.LazyConv2d(6, 3), jnp.ones((2, 3))),
        (nn.LazyConv2d(6, 3, groups=2), jnp.ones((2, 3, 5, 5))),
        (nn.LazyLinear(3), jnp.ones(())),
        (nn.LazyBatchNorm1d(), jnp.ones((2, 3, 5, 5))),
    ):
        with pytest.raises(ValueError, match="Instead: "):
            layer(x)
        assert layer.has_uninitialized_params()
        assert type(layer).__name__.startswith("Lazy")


def test_a_state_dict_gives_shapes_to_lazy_parameters() -> None:
    state = nn.Linear(5, 3).state_dict()
    layer = nn.LazyLinear(3)
    layer.load_state_dict(state)
    np.testing.assert_array_equal(layer.weight, state["weight"])
    layer(jnp.ones((1, 5)))
    assert type(layer) is nn.Linear
    assert layer.in_features == 5
    np.testing.assert_array_equal(layer.weight, state["weight"])


def test_a_failed_load_leaves_lazy_parameters_lazy() -> None:
    layer = nn.LazyLinear(3)
    with pytest.raises(nn.StateDictError):
        layer.load_state_dict({"weight": np.ones((3, 5), np.float32), "stranger": np.ones(1)})
    assert layer.has_uninitialized_params()
    assert nn.parameter.is_lazy(layer.weight)


def test_lazy_and_initialised_state_dicts_do_not_mix_silently() -> None:
    lazy = nn.LazyLinear(3).state_dict()
    assert nn.parameter.is_lazy(lazy["weight"])
    with pytest.raises(nn.StateDictError, match="no shape"):
        nn.Linear(5, 3).load_state_dict(lazy)
    nn.LazyLinear(3).load_state_dict(lazy)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_lazy_models_are_copied_as_lazy(copied) -> None:
    layer = nn.LazyLinear(3, dtype=jnp.bfloat16)
    other = copied(layer)
    assert other(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.has_uninitialized_params()
    assert nn.Sequential(other)[0].weight.shape == (3, 4)


def test_dtype_and_device_hold_for_what_is_made_later() -> None:
    layer = nn.LazyLinear(3).to(jnp.bfloat16)
    layer(jnp.ones((2, 4), jnp.bfloat16))
    assert layer.weight.dtype == jnp.bfloat16
    device = jax.devices()[0]
    layer = nn.LazyLinear(3, device=device)
    layer(jnp.ones((2, 4)))
    assert layer.weight.value.committed


def test_a_lazy_module_of_the_users() -> None:
    class LazyScale(nn.modules.lazy.LazyModuleMixin, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.UninitializedParameter()

        def initialize_parameters(self, x) -> None:
            self.weight.materialize(x.shape[-1:])
            nn.init.ones_(self.weight)

        def forward(self, x):
            return x * self.weight

    scale = LazyScale()
    np.testing.assert_array_equal(scale(jnp.arange(3.0)), [0, 1, 2])
    assert type(scale) is LazyScale
    scale.weight.value = scale.weight.value * 2
    np.testing.assert_array_equal(scale(jnp.arange(3.0)), [0, 2, 4])


def test_compiled_code_follows_the_change_of_class() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    model(jnp.ones((1, 2)))
    traces = []

    @nn.jit
    def run(m, x):
        traces.append(type(m[0]))
        return m(x)

    run(model, jnp.ones((1, 2)))
    run(nn.Sequential(nn.Linear(2, 3)), jnp.ones((1, 2)))
    assert traces == [nn.Linear]


def test_a_first_call_in_compiled_code_says_to_call_it_once_before():
    model = nn.Sequential(nn.LazyLinear(3))
    model.load_state_dict(nn.Sequential(nn.Linear(4, 3)).state_dict())
    call = lambda m, x: m(x)
    for wrap in (nn.jit, nn.grad):
        with pytest.raises(
            nn.StructureChangeError, match=r"(?s)Instead: call the model once.*model\(x\)"
        ):
            wrap(lambda m, x: call(m, x).sum())(model, jnp.ones((2, 4)))
    model(jnp.ones((2, 4)))
    assert nn.jit(call)(model, jnp.ones((2, 4))).shape == (2, 3)
