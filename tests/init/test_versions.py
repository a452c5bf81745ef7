"""Versions of the initial values: which is in force, what modules remember, each rule by its variance."""

from __future__ import annotations

import math
import statistics
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn


@pytest.fixture(autouse=True)
def seeded():
    nn.manual_seed(0)
    yield
    nn.init.set_version("torch")


# --------------------------------------------------------------------------------------------------
# Which version is in force


def test_torchs_formulas_are_the_default() -> None:
    assert nn.init.get_version() == "torch"
    assert nn.Linear(2, 3).init_version == "torch"


def test_a_block_sets_the_version_and_restores_it() -> None:
    with nn.init.version("2026.1"):
        assert nn.Linear(2, 3).init_version == "2026.1"
        with nn.init.version("torch"):
            assert nn.Linear(2, 3).init_version == "torch"
        assert nn.init.get_version() == "2026.1"
    assert nn.init.get_version() == "torch"


def test_a_block_that_raises_restores_the_version() -> None:
    with pytest.raises(ZeroDivisionError), nn.init.version("2026.1"):
        1 / 0
    assert nn.init.get_version() == "torch"


def test_set_version_holds_in_other_threads_and_a_block_does_not() -> None:
    seen = []
    look = lambda: seen.append(nn.Linear(1, 1).init_version)
    nn.init.set_version("2026.1")
    with nn.init.version("torch"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
    assert seen == ["2026.1", "torch"]


@pytest.mark.parametrize("name", ["2025", "", "gpt2", "torch+relu", "2026.1+cube"])
def test_an_unknown_version_is_refused_and_changes_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="Instead: "):
        nn.init.set_version(name)
    with pytest.raises(ValueError, match="Why: "), nn.init.version(name):
        pass
    assert nn.init.get_version() == "torch"


def test_a_module_is_reset_by_the_version_it_was_built_with() -> None:
    with nn.init.version("2026.1"):
        new = nn.Linear(4, 64)
    old = nn.Linear(4, 64)
    old.reset_parameters()
    with nn.init.version("2026.1"):
        old.reset_parameters()
    new.reset_parameters()
    assert (np.asarray(new.bias) == 0).all()
    assert (np.asarray(old.bias) != 0).any()


def test_a_module_of_the_users_remembers_the_version_too() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(jnp.zeros((3, 5)))
            self.reset_parameters()

        def reset_parameters(self) -> None:
            nn.init.rules(self).linear(self.weight, None, "linear")

    with nn.init.version("2026.1"):
        mine = Mine()
    assert mine.init_version == "2026.1"
    assert float(abs(mine.weight.value).max()) > 1 / math.sqrt(5)  # beyond torch's bound


def test_the_version_travels_in_the_metadata_and_never_as_a_key() -> None:
    with nn.init.version("2026.1"):
        model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    old = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    state = model.state_dict()
    assert list(state) == list(old.state_dict())
    assert state._metadata["0"] == {"version": 1, "init_version": "2026.1"}
    assert old.state_dict()._metadata["0"] == {"version": 1}
    theirs = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    tensors = {k: torch.as_tensor(np.array(v)) for k, v in state.items()}
    theirs.load_state_dict(tensors)


def test_loading_leaves_the_version_of_the_module() -> None:
    with nn.init.version("2026.1"):
        state = nn.Linear(2, 3).state_dict()
    layer = nn.Linear(2, 3)
    layer.load_state_dict(state)
    assert layer.init_version == "torch"


def test_models_of_two_versions_share_compiled_code_with_their_equals() -> None:
    traces = []

    @nn.jit
    def step(model, x):
        traces.append(model.init_version)
        return model(x)

    x = jnp.ones((1, 2))
    for _ in range(2):
        step(nn.Linear(2, 3), x)
        with nn.init.version("2026.1"):
            step(nn.Linear(2, 3), x)
    assert traces == ["torch", "2026.1"]


@pytest.mark.parametrize("name", ["torch", "2026.1", "2026.1+gelu", "gpt2", "vit", "resnet", "mup"])
def test_describe_prints_rules_and_sources(name: str, capsys) -> None:
    nn.init.describe(name)
    text = capsys.readouterr().out
    assert text.startswith(name + ": ")
    if name == "2026.1":
        assert text.count("Source: ") == 8
        assert "He et al. 2015" in text
    with pytest.raises(ValueError, match="versions are"):
        nn.init.describe("2019")


# --------------------------------------------------------------------------------------------------
# The rules of 2026.1: variances against the formula


def variance_is(box, wanted: float) -> None:
    values = np.asarray(box, np.float64).ravel()
    assert abs(values.mean()) < 5 * math.sqrt(wanted / values.size)
    # A uniform's fourth moment is 1.8 variances squared.
    assert abs(values.var() / wanted - 1) < 5 * math.sqrt(0.8 / values.size) + 1e-6


def zero(box) -> None:
    assert (np.asarray(box) == 0).all()


@pytest.mark.parametrize("gain", ["relu", "gelu", "silu", "tanh", "linear", "selu"])
def test_linear_keeps_the_second_moment_through_a_nonlinearity(gain: str) -> None:
    functions = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
        "linear": lambda z: z,
        "selu": torch.selu,
    }
    torch.manual_seed(0)
    z = torch.randn(2_000_000, dtype=torch.float64)
    second = float((functions[gain](z) ** 2).mean())
    with nn.init.version(f"2026.1+{gain}"):
        layer = nn.Linear(300, 700)
    values = np.asarray(layer.weight, np.float64)
    np.testing.assert_allclose(values.var(), 1 / second / 300, rtol=0.01)
    zero(layer.bias)


@pytest.mark.parametrize(
    ("layer", "args", "kwargs", "fan_in"),
    [
        ("Linear", (64, 500), {}, 64),
        ("Conv1d", (32, 100, 5), {}, 160),
        ("Conv2d", (32, 100, 3), {"groups": 4}, 72),
        ("Conv3d", (16, 40, 3), {}, 432),
        ("ConvTranspose2d", (64, 16, 4), {"stride": 2}, 64 * 16 / 4),
        ("ConvTranspose1d", (64, 32, 3), {"groups": 2}, 32 * 3),
    ],
)
def test_weights_have_two_over_fan_in_and_biases_are_zero(layer, args, kwargs, fan_in) -> None:
    with nn.init.version("2026.1"):
        built = getattr(nn, layer)(*args, **kwargs)
    variance_is(built.weight, 2 / fan_in)
    zero(built.bias)


def test_transposed_convolution_keeps_the_size_of_signals() -> None:
    with nn.init.version("2026.1+linear"):
        layer = nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1)
    x = np.random.default_rng(0).standard_normal((4, 128, 16, 16)).astype(np.float32)
    inner = np.asarray(layer(jnp.asarray(x)))[:, :, 2:-2, 2:-2]
    assert abs(inner.var() - 1) < 0.05


def test_bilinear_keeps_the_size_of_signals() -> None:
    with nn.init.version("2026.1"):
        layer = nn.Bilinear(40, 50, 300)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((400, n)), jnp.float32) for n in (40, 50))
    assert abs(float(layer(a, b).var()) - 1) < 0.15
    zero(layer.bias)


def test_rows_of_an_embedding_have_length_one() -> None:
    with nn.init.version("2026.1"):
        table = nn.Embedding(2000, 64, padding_idx=3).weight.value
    lengths = np.linalg.norm(np.asarray(table), axis=1)
    assert lengths[3] == 0
    assert abs(np.delete(lengths, 3).mean() - 1) < 0.02


@pytest.mark.parametrize("kdim", [None, 96])
def test_attention_has_one_over_fan_in_packed_or_not(kdim) -> None:
    with nn.init.version("2026.1"):
        layer = nn.MultiheadAttention(64, 4, kdim=kdim)
    if kdim is None:
        variance_is(layer.in_proj_weight, 1 / 64)
    else:
        variance_is(layer.q_proj_weight, 1 / 64)
        variance_is(layer.k_proj_weight, 1 / 96)
    variance_is(layer.out_proj.weight, 1 / 64)
    zero(layer.in_proj_bias)
    zero(layer.out_proj.bias)


@pytest.mark.parametrize(("layer", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrence_is_orthogonal_by_gate(layer: str, gates: int) -> None:
    with nn.init.version("2026.1"):
        built = getattr(nn, layer)(24, 32)
    hidden = np.asarray(built.weight_hh_l0).reshape(gates, 32, 32)
    for block in hidden:
        np.testing.assert_allclose(block @ block.T, np.eye(32), atol=1e-5)
    variance_is(built.weight_ih_l0, 2 / (24 + 32))
    zero(built.bias_hh_l0)
    bias = np.asarray(built.bias_ih_l0)
    forget = bias[32:64] if layer == "LSTM" else bias[:0]
    assert (forget == 1).all()
    assert bias.sum() == forget.size


def test_layers_of_a_stack_are_independent_in_2026_1_only() -> None:
    for version, same in (("torch", True), ("2026.1", False)):
        with nn.init.version(version):
            layer = nn.TransformerEncoderLayer(16, 2, 32)
            stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        first, second = (m.linear1.weight.value for m in stack.layers)
        assert bool((first == second).all()) is same


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_signals_and_gradients_keep_their_size_over_50_layers(kind: str) -> None:
    def build() -> nn.Module:
        layers = []
        for _ in range(50):
            if kind == "mlp":
                layers += [nn.Linear(256, 256), nn.ReLU()]
            else:
                layers += [nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"), nn.ReLU()]
        return nn.Sequential(*layers)

    shape = (16, 256) if kind == "mlp" else (2, 32, 12, 12)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)

    def sizes(model: nn.Module) -> tuple[float, float]:
        fn, params = nn.functionalize(model)
        out, pull = jax.vjp(lambda x: fn(params, x), x)  # eager: the code of a layer serves all
        noise = np.random.default_rng(1).standard_normal(out.shape)
        (slope,) = pull(jnp.asarray(noise, out.dtype))
        return float((out**2).mean()), float((slope**2).mean())

    with nn.init.version("2026.1"):
        out, slope = sizes(build())
    assert 0.05 < out < 20
    assert 0.05 < slope < 20
    out, slope = sizes(build())
    assert slope < 1e-20  # each layer of torch's divides the variance by 6


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_normal_values_are_those_of_a_lattice_without_its_ends(compiled: bool) -> None:
    # Every lattice point comes about four times: the inverse is infinite at -1, half a step below the first.
    def draw(key):
        with nn.rng_scope(key):
            return nn.init.normal_(nn.Parameter(jnp.zeros(1 << 25))).value

    values = (jax.jit(draw) if compiled else draw)(jax.random.key(0))
    last = -statistics.NormalDist().inv_cdf(0.5 / 2**23)
    np.testing.assert_allclose([values.min(), values.max()], [-last, last], rtol=1e-5)
