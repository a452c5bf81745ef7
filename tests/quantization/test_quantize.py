"""nn.quantize: which layers, what they compute, what is stored and trained, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from statefulnn.utils import parametrizations, parametrize, prune
from tests.devices import failures_on_devices


class Conv1D(nn.Module):
    """GPT-2's linear layer: a kind that the package does not know."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(jax.random.normal(jax.random.key(0), (6, 5)))

    def forward(self, x):
        return x @ self.weight


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm((2, 8))
        self.mlp = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 3))

    def forward(self, x):
        return self.mlp(self.norm(x))


X = np.random.default_rng(0).normal(size=(4, 2, 8)).astype(np.float32)
IMAGES = np.random.default_rng(0).normal(size=(1, 4, 6, 6)).astype(np.float32)
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple]] = {
    "Linear": (lambda: nn.Linear(8, 5), (X,)),
    "Bilinear": (lambda: nn.Bilinear(8, 8, 5), (X, X)),
    "Embedding": (lambda: nn.Embedding(9, 5, padding_idx=0), (np.arange(9),)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 5), (np.arange(9)[None],)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (IMAGES,)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (IMAGES,)),
    "Conv1D": (Conv1D, (X[..., :6],)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_with_what_was_stored(kind):
    make, inputs = KINDS[kind]
    layer = make()
    plain = copy.deepcopy(layer)
    format = "int8" if kind in ("Conv2d", "ConvTranspose2d", "Linear") else "nf4"
    (row,) = nn.quantize(layer, None, format).layers
    assert isinstance(layer, type(plain)) and row.kind == kind and not layer.weight.weak_type
    lost = np.linalg.norm(plain.weight - layer.weight) / np.linalg.norm(plain.weight)
    np.testing.assert_allclose(row.error, lost, rtol=1e-4)
    assert 0 < lost < (0.02 if format == "int8" else 0.2)
    if format == "int8":  # a channel: what one output is computed from
        codes = np.asarray(layer.parametrizations.weight.original0)
        channels = codes.swapaxes(0, int(kind == "ConvTranspose2d"))
        assert (np.abs(channels.reshape(len(channels), -1)).max(1) == 127).all()
    plain.weight.value = layer.weight
    np.testing.assert_allclose(layer(*inputs), plain(*inputs), rtol=1e-6, atol=1e-6)


def test_a_report_counts_the_bytes_that_a_state_dict_holds():
    size = lambda model: sum(a.nbytes for a in model.state_dict().values())
    for format, most in [("nf4", 0.16), ("int8", 0.26)]:
        model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 128, bias=False))
        before = size(model)
        report = nn.quantize(model, "*", format)
        assert (report.before, report.after) == (before, size(model))
        assert report.after <= most * report.before
        assert report.frozen == ["0.weight", "1.weight"] and not list(model.parameters())
        assert "262,144" in str(report) and f"in {format}" in repr(report)
        assert "256 x 256" in report._repr_html_()
        # By count: codes, a byte for 64 numbers or a float for each row, and the constants of these.
        n, rows = 256 * 256 + 256 * 128, 256 + 128
        steps = 4 * (256 * 256 // 64 // 256 + 256 * 128 // 64 // 256 + 2)
        assert report.after == (n // 2 + n // 64 + steps if format == "nf4" else n + 4 * rows)


def test_a_pattern_chooses_matrices_and_no_norms():
    net = Net()
    assert nn.quantize(net, "mlp.*", "int8").frozen == ["mlp.0.weight", "mlp.2.weight"]
    assert isinstance(net.norm.weight, nn.Parameter)
    assert nn.quantize(Net(), "*", "int8").frozen == ["mlp.0.weight", "mlp.2.weight"]
    assert nn.quantize(Net(), ["mlp.2"]).frozen == ["mlp.2.weight"]
    assert nn.quantize(Net(), lambda name: name.endswith("0")).frozen == ["mlp.0.weight"]


def test_transformations_copies_and_files(tmp_path):
    net = Net()
    nn.quantize(net, "mlp.0", "nf4")
    nn.quantize(net, "mlp.2", "int8")
    want = net(X)
    close = lambda got: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    step = nn.jit(nn.grad(lambda net, x: (net(x) ** 2).sum()))
    assert sorted(step(net, X)) == ["mlp.0.bias", "mlp.2.bias", "norm.bias", "norm.weight"]
    fn, params = nn.functionalize(net)
    close(jax.jit(fn)(params, X))
    # The slope at an input is that of a plain model with the same weights.
    plain = Net()
    plain.load_state_dict(
        {k: v for k, v in net.state_dict().items() if "parametrizations" not in k}, strict=False
    )
    for i in (0, 2):
        plain.mlp[i].weight.value = net.mlp[i].weight
    slope = lambda model: jax.grad(lambda x: (model(x) ** 2).sum())(jnp.asarray(X))
    np.testing.assert_allclose(slope(net), slope(plain), rtol=1e-4, atol=1e-5)

    nn.save(net.state_dict(), tmp_path / "net.safetensors")
    other = Net()
    nn.quantize(other, "mlp.0", "nf4")
    nn.quantize(other, "mlp.2", "int8")
    other.load_state_dict(nn.load(tmp_path / "net.safetensors"))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), other):
        close(nn.jit(lambda m, x: m(x))(twin, X))
    low = copy.deepcopy(net).bfloat16()
    assert low.mlp[0].weight.dtype == low(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(low.mlp[0].weight.astype(float), net.mlp[0].weight, 0.02, 1e-3)


def test_a_stack_of_quantised_blocks_is_the_blocks_one_after_the_other():
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)]
    for block in blocks:
        nn.quantize(block, "0", "nf4")
        nn.quantize(block, "2", "int8")
    want = nn.Sequential(*copy.deepcopy(blocks))(X)
    stack = nn.LayerStack(blocks)
    np.testing.assert_allclose(nn.jit(lambda m, x: m(x))(stack, X), want, rtol=1e-5, atol=1e-6)
    assert stack[1][0].weight.shape == (8, 8)


class Added(nn.Module):
    """What an adapter of low rank adds to a weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(jnp.ones((2, 8))), nn.Parameter(jnp.zeros((5, 2)))

    def forward(self, weight):
        return weight + self.b @ self.a


def test_an_adapter_is_trained_on_top_of_codes():
    layer = nn.Linear(8, 5)
    nn.quantize(layer, None, "nf4")
    base = layer.weight
    parametrize.register_parametrization(layer, "weight", Added())
    layer.requires_grad_(False)
    adapter = layer.parametrizations.weight[1].requires_grad_(True)
    np.testing.assert_array_equal(layer.weight, base)
    grads = nn.grad(lambda m, x: m(x).sum())(layer, X)
    want = np.einsum("nti,ri->r", X, np.ones((2, 8)))
    prefix = "parametrizations.weight.1."
    assert sorted(grads) == [prefix + "a", prefix + "b"]
    np.testing.assert_allclose(grads[prefix + "b"], np.tile(want, (5, 1)), rtol=1e-5)
    adapter.b.value = jnp.ones((5, 2))
    np.testing.assert_allclose(layer.weight, base + 2, rtol=1e-6)


def test_an_assigned_weight_is_quantised_anew():
    layer = nn.Linear(64, 2)
    nn.quantize(layer, None, "nf4")
    layer.weight = jnp.full((2, 64), 3.0)
    np.testing.assert_allclose(layer.weight, 3.0, rtol=1e-6)
    with pytest.raises(nn.errors.ShapeError, match=r"\(64, 2\)"):
        layer.weight = jnp.ones((64, 2))


SHARDED = """
import jax, numpy as np, statefulnn as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
x = np.ones((2, 64), np.float32)
for axis in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(axis,))
    for form, spec in (("int8", P("d")), ("nf4", P("d")), ("nf4", P(None, "d"))):
        plain = nn.Linear(64, 8, bias=False)
        layer = nn.Linear(64, 8, bias=False)
        layer.weight.data = jax.device_put(plain.weight.value, NamedSharding(mesh, spec))
        nn.quantize(layer, None, form)
        nn.quantize(plain, None, form)
        np.testing.assert_allclose(layer.weight, plain.weight, rtol=1e-5, atol=1e-6)
        here = jax.device_put(x, NamedSharding(mesh, P()))
        out = nn.jit(lambda m, x: m(x))(layer, here)
        np.testing.assert_allclose(out, plain(x), rtol=1e-4, atol=1e-5)
        codes = layer.parametrizations.weight.original0
        assert form == "nf4" or not codes.sharding.is_fully_replicated
"""


def test_weights_on_a_mesh_are_quantised_there():
    assert failures_on_devices(2, {"sharded": SHARDED}) == {}


def refused(
    call: Callable[[], object], *parts: str, error: type[Exception] = nn.errors.ArgumentError
) -> None:
    with pytest.raises(error) as caught:
        call()
    for part in (*parts, "Why:", "Instead:"):
        assert part in str(caught.value)


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    model[1].weight = model[0].weight
    return model


def referred() -> nn.Sequential:
    model = tied()
    model[1] = nn.Linear(4, 8)
    model[2].table = nn.Ref(model[0].weight)
    return model


def with_layer(change: Callable[[nn.Module], object]) -> Callable[[], nn.Sequential]:
    def make() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        change(model[1])
        return model

    return make


def whole_numbers(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(jnp.ones((2, 8), jnp.int32), requires_grad=False)


BAD = {
    "tied": (tied, ("'0' is tied to '1.weight'", "'1' is tied to '0.weight'")),
    "referred": (referred, ("'0' is tied to 'table of Linear'",)),
    "twice": (with_layer(nn.quantize), ("'1' is quantised already",)),
    "weight norm": (with_layer(parametrizations.weight_norm), ("'1' is computed by",)),
    "pruned": (with_layer(lambda m: prune.l1_unstructured(m, "weight", 2)), ("is computed by",)),
    "integers": (with_layer(whole_numbers), ("'1' has dtype int32",)),
    "infinite": (with_layer(lambda m: m.weight.copy_(np.inf)), ("'1' has numbers that are not",)),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), ("max_norm=1.0",)),
    "stack": (
        lambda: nn.LayerStack([nn.Linear(2, 2), nn.Linear(2, 2)]),
        ("'0', '1' is stored in",),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_quantised_is_refused_with_names_and_nothing_is_changed(case):
    make, parts = BAD[case]
    model = make()
    before, shown = model.state_dict(), repr(model)
    refused(lambda: nn.quantize(model, "*", "int8"), *parts)
    after = model.state_dict()
    assert repr(model) == shown and list(after) == list(before)
    assert all(after[name] is before[name] for name in after)


def test_filters_formats_and_places_that_do_not_fit_are_refused():
    net = Net()
    unknown = nn.errors.UnknownNameError
    refused(lambda: nn.quantize(net, "decoder.*"), "decoder.*", error=unknown)
    refused(lambda: nn.quantize(net, "norm"), "'norm', a LayerNorm", error=unknown)
    refused(lambda: nn.quantize(net, "mlp"), "'mlp', a Sequential", '"mlp.*"', error=unknown)
    refused(lambda: nn.quantize(net, ["mlp.0", "mlp.1"]), "'mlp.1', a GELU", error=unknown)
    refused(lambda: nn.quantize(net, "mlp.*", "int4"), "'int4'", "'int8', 'nf4'")
    refused(lambda: nn.quantize([net]), "list")
    changed = nn.errors.StructureChangeError
    refused(lambda: nn.jit(lambda m: nn.quantize(m) and 0)(net), "traced", error=changed)
    lazy = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    refused(lambda: nn.quantize(lazy, "*"), "1.weight", error=nn.errors.UninitializedParameterError)
    with nn.device("meta"):
        meta = nn.Linear(2, 2)
    refused(lambda: nn.quantize(meta), "meta", error=nn.errors.UninitializedParameterError)
    for model in (net, lazy):
        assert not any("parametrizations" in name for name in model.state_dict())


@pytest.mark.parametrize("sizes", [(8, 16, 16, 8), (3, 5, 5, 3), (5, 3, 6, 3)], ids=str)
def test_codes_of_another_shape_do_not_load(sizes, tmp_path):
    layers = [nn.Linear(*pair, bias=False) for pair in (sizes[:2], sizes[2:])]
    for layer in layers:
        nn.quantize(layer, None, "nf4")
    with pytest.raises(nn.StateDictError, match="original[04]"):
        layers[1].load_state_dict(layers[0].state_dict())
    nn.save(layers[0], tmp_path / "codes.safetensors")
    again = nn.Linear(*sizes[:2], bias=False)
    nn.quantize(again, None, "nf4")
    again.load_state_dict(nn.load(tmp_path / "codes.safetensors"))
    np.testing.assert_array_equal(np.asarray(again.weight), np.asarray(layers[0].weight))


def test_no_sign_is_turned_round_beside_a_large_block():
    layer = nn.Linear(64, 200, bias=False)
    layer.weight.value = layer.weight.value.at[0].mul(1e4).at[1:100].mul(30.0)
    weight = np.asarray(layer.weight)
    nn.quantize(layer, None, "nf4")
    assert (np.asarray(layer.weight) * weight >= 0).all()


def test_members_of_an_ensemble_are_quantised_before():
    ensemble = nn.Ensemble(lambda: nn.Linear(8, 4), 2)
    refused(lambda: nn.quantize(ensemble), "has 3 axes", "nn.Ensemble.of(members)")
    members = [nn.Linear(8, 4) for _ in range(2)]
    for member in members:
        nn.quantize(member)
    x = np.ones((2, 8), np.float32)
    want = np.stack([member(x) for member in members])
    np.testing.assert_allclose(nn.Ensemble.of(members)(x), want, rtol=1e-5, atol=1e-6)
