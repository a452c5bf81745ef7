"""Adapters on every kind of layer: what they compute, what is trained, and the way back."""

from __future__ import annotations

import copy
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
from statefulnn.utils import parametrize
from tests.lora.models import LAYERS, TOKENS, Conv1D, Squashed, filled, network

ALPHA, RANK = 3, 2


def close(a, b, rtol=1e-5, atol=2e-6):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


def by_hand(model, plain, scale):
    """Write weights with the changes of a model's adapters into a model without, by numpy."""
    state = {k: np.asarray(v) for k, v in model.state_dict().items()}
    result = {}
    for name, weight in plain.state_dict().items():
        layer, _, last = name.rpartition(".")
        beside, inside = f"{layer}.lora.default", f"{layer}.parametrizations.{last}.0.default"
        key = inside if f"{inside}.lora_A" in state else beside
        result[name] = np.asarray(weight)
        if f"{key}.lora_A" in state and "weight" in last:
            a, b = state[f"{key}.lora_A"], state[f"{key}.lora_B"]
            change = scale * np.einsum("or,ri->oi", b.reshape(b.shape[:2]), a.reshape(len(a), -1))
            if layer in ("emb", "c_attn"):
                change = change.T
            result[name] = result[name] + change.reshape(weight.shape)
    plain.load_state_dict(result)
    return plain


@pytest.fixture(scope="module")
def adapted():
    return filled(nn.lora.attach(network(lstm=False), LAYERS, rank=RANK, alpha=ALPHA))


def test_every_kind_of_layer_computes_the_formula():
    model = filled(nn.lora.attach(network(), f"{LAYERS}|lstm", rank=RANK, alpha=ALPHA))
    expected = by_hand(model, network(), ALPHA / RANK)(TOKENS)
    assert float(abs(expected - network()(TOKENS)).max()) > 1e-2
    close(model(TOKENS), expected)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 10


def test_every_transformation_computes_the_formula(adapted):
    expected = by_hand(adapted, network(lstm=False), ALPHA / RANK)(TOKENS)
    close(adapted(TOKENS), expected)
    close(nn.jit(adapted)(TOKENS), expected)
    fn, params = nn.functionalize(adapted)
    close(fn(params, TOKENS), expected)
    assert len(params) == 2 * 8 and all(".lora_" in name for name in params)
    close(nn.vmap(lambda m, x: m(x[None])[0], in_axes=(None, 0))(adapted, TOKENS), expected)


def test_an_adapter_starts_as_no_change_and_has_the_chosen_layers_alone():
    model = network(lstm=False)
    base = model(TOKENS)
    assert nn.lora.attach(model, "mlp.*|conv", rank=RANK) is model
    assert bool((model(TOKENS) == base).all())
    assert {n.split(".lora.")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "mlp.0",
        "mlp.2",
        "conv",
    }
    # The names of the base stay where an adapter is beside it: its checkpoints load.
    nn.lora.attach(model, "attn", rank=RANK, name="second")
    assert not model.load_state_dict(network(lstm=False).state_dict(), strict=False).unexpected_keys
    close(model(TOKENS), base)


def test_only_adapters_are_trained():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Squashed(4, 2))
    filled(nn.lora.attach(model, "*", rank=1))
    x = jax.random.normal(jax.random.key(0), (5, 3))
    report = nn.audit(model, x)
    names = [n for n, _ in model.named_parameters()]
    assert report.ok and report.used == [n for n in names if ".lora_" in n]
    assert report.frozen == [n for n in names if ".lora_" not in n]

    before = model.state_dict()
    step = nn.jit(lambda m, o: o.step(nn.grad(lambda m: (m(x) ** 2).sum())(m)))
    step(model, nn.Optimizer(model, optax.sgd(0.1)))
    moved = [n for n, v in model.state_dict().items() if bool((v != before[n]).any())]
    assert moved == report.used


def test_detach_gives_everything_back(adapted):
    model, plain = copy.deepcopy(adapted), network(lstm=False)
    nn.lora.detach(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(bool((v == model.state_dict()[n]).all()) for n, v in plain.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert nn.split(model)[0] == nn.split(plain)[0]


def test_what_was_frozen_before_stays_so_after_detach():
    model = network()
    model.fc.requires_grad_(False)
    nn.lora.attach(model, "fc|attn", rank=1)
    model.norm.requires_grad_(True)  # a head is trained beside the adapters
    nn.lora.attach(model, "fc", rank=1, name="second")
    nn.lora.detach(model, "default")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "fc.lora.second.lora_A",
        "fc.lora.second.lora_B",
    ]
    nn.lora.detach(model)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("variant", [(), "dora", "pissa"])
def test_merging_changes_no_output_and_can_be_undone(variant):
    layers = LAYERS if variant == "dora" else "fc|c_attn|attn"
    model = nn.lora.attach(network(lstm=False), layers, rank=RANK, alpha=ALPHA, variant=variant)
    if variant == "pissa":  # it starts as no change as well, by taking a part out of the weight
        close(model(TOKENS), network(lstm=False)(TOKENS), atol=1e-5)
        assert float(abs(model.fc.weight.value - network().fc.weight.value).max()) > 0.1
    filled(model)
    out, weight = model(TOKENS), model.fc.weight.value
    nn.lora.merge(model)
    close(model(TOKENS), out, atol=1e-5)
    assert bool((model.fc.weight.value != weight).any())
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(nn.StructureChangeError, match="while adapters are merged into 'emb|'fc"):
        nn.lora.merge(model)
    nn.lora.unmerge(model)
    close(model.fc.weight.value, weight)
    close(model(TOKENS), out, atol=1e-5)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n)
    with pytest.raises(nn.StructureChangeError, match="not merged"):
        nn.lora.unmerge(model)

    nn.lora.detach(model)
    for name, value in network(lstm=False).state_dict().items():
        close(model.state_dict()[name], value)


def test_merged_weights_stay_after_detach(adapted):
    model = copy.deepcopy(adapted)
    nn.lora.merge(model)
    nn.lora.detach(model)
    for name, value in by_hand(adapted, network(lstm=False), ALPHA / RANK).state_dict().items():
        close(model.state_dict()[name], value)


def test_rslora_divides_by_the_root_of_the_rank():
    model = nn.lora.attach(nn.Sequential(nn.Linear(6, 5)), "0", rank=4, alpha=3, variant="rslora")
    filled(model)
    a, b = model[0].lora["default"].lora_A, model[0].lora["default"].lora_B
    close(model[0].lora["default"].delta(model[0].weight.value), 3 / 2 * np.asarray(b) @ a)


def test_adapters_are_enabled_by_name_and_several_add_up():
    model = network(lstm=False)
    base = model(TOKENS)
    for name, layers in (("a", "fc|attn"), ("b", "fc|c_attn")):
        filled(nn.lora.attach(model, layers, rank=1, name=name), name)
    names = lambda: {
        n.rpartition(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad
    }
    assert names() == {"fc.lora.b", "c_attn.lora.b"}
    only_b = model(TOKENS)
    nn.lora.enable(model, "a")
    assert len(names()) == 3 and all(n.endswith(".a") for n in names())
    weight = model.fc.weight.value
    x = jnp.ones((2, 6))
    a, b = (model.fc.lora[n].delta(weight) for n in "ab")
    close(model.fc(x), x @ (weight + a).T + model.fc.bias)
    nn.lora.enable(model, ["a", "b"])
    close(model.fc(x), x @ (weight + a + b).T + model.fc.bias)
    assert len(names()) == 5
    nn.lora.disable(model)
    close(model(TOKENS), base)
    assert names() == set()
    nn.lora.enable(model, "b")
    close(model(TOKENS), only_b)


def test_a_block_without_adapters_works_in_compiled_code_and_after_an_error(adapted):
    base = network(lstm=False)(TOKENS)

    @nn.jit
    def both(model):
        with nn.lora.disabled(model):
            reference = model(TOKENS)
        return model(TOKENS), reference

    with_adapters, without = both(adapted)
    close(without, base)
    close(with_adapters, adapted(TOKENS))
    with pytest.raises(ZeroDivisionError), nn.lora.disabled(adapted):
        raise ZeroDivisionError
    close(adapted(TOKENS), with_adapters)
    grads = nn.grad(lambda m: both(m)[0].sum())(adapted)
    assert len(grads) == 16


def test_dropout_acts_on_the_input_of_the_adapter_in_training_alone():
    model = nn.Sequential(nn.Linear(400, 400), Conv1D(400, 400))
    nn.lora.attach(model, "*", rank=400, alpha=400, dropout=0.25)
    x = jnp.arange(1.0, 401)[None]
    for layer in model:
        plain = layer.eval()(x)
        for p in layer.lora["default"].parameters():
            p.value = jnp.eye(400)
        added = layer(x) - plain
        close(added, x, atol=1e-3)
        added = np.asarray(layer.train()(x) - plain) / np.asarray(x)
        dropped = abs(added) < 1e-3
        assert 0.1 < dropped.mean() < 0.4
        close(added[~dropped], 1 / 0.75, rtol=1e-3)


def test_a_subclass_with_a_forward_of_its_own_gets_the_change_in_its_weight():
    model = nn.Sequential(Squashed(4, 3))
    x = jax.random.normal(jax.random.key(0), (2, 4))
    filled(nn.lora.attach(model, "*", rank=2, alpha=ALPHA))
    adapter = model[0].parametrizations.weight[0]["default"]
    weight = model[0].parametrizations.weight.original.value
    changed = weight + ALPHA / 2 * np.asarray(adapter.lora_B) @ adapter.lora_A
    close(model[0].weight, changed)
    close(model(x), jnp.tanh(x) @ changed.T + model[0].bias)

    nn.lora.detach(model)
    filled(nn.lora.attach(model, "*", rank=2, alpha=ALPHA, variant=("dora", "rslora")))
    adapter = model[0].parametrizations.weight[0]["default"]
    changed = weight + ALPHA / 2**0.5 * np.asarray(adapter.lora_B) @ adapter.lora_A
    lengths = adapter.lora_magnitude / np.linalg.norm(changed, axis=1)
    close(model[0].weight, lengths[:, None] * changed)


def test_equal_blocks_with_adapters_go_into_a_stack_and_a_stack_takes_adapters():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
            self.fc.bias.requires_grad = False

        def forward(self, x):
            return x + self.attn(x, x, x)[0] + jnp.tanh(self.fc(x))

    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    model = nn.Sequential(nn.Sequential(*[Block() for _ in range(3)]))
    stacked = copy.deepcopy(model)
    filled(nn.lora.attach(model, "*.fc|*.attn", rank=RANK))
    out = model(x)

    nn.LayerStack.of(stacked, "0")
    base = stacked(x)
    nn.lora.attach(stacked, "*.fc|*.attn", rank=RANK)
    stacked.load_state_dict(model.state_dict())
    nn.LayerStack.of(model, "0")
    for those in (model, stacked):
        close(those(x), out)
        grads = nn.grad(lambda m: (m(x) ** 2).sum())(those)
        assert {n.rpartition("_")[0][-5:] for n in grads} == {".lora"} and len(grads) == 6
        assert grads["0.stack.fc.lora.default.lora_A"].shape == (3, RANK, 4)
        with nn.lora.disabled(those):
            close(those(x), base)
        nn.lora.merge(those)
        close(those(x), out)
        nn.lora.unmerge(those)
        nn.lora.detach(those)
        close(those(x), base)
        frozen = [n for n, p in those.named_parameters() if not p.requires_grad]
        assert frozen == ["0.stack.fc.bias"]


def test_copies_and_state_dicts_keep_adapters(adapted):
    out = adapted(TOKENS)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert nn.split(twin)[0] == nn.split(adapted)[0]
        close(twin(TOKENS), out)
    fresh = nn.lora.attach(network(lstm=False), LAYERS, rank=RANK, alpha=ALPHA)
    fresh.load_state_dict(adapted.state_dict())
    close(fresh(TOKENS), out)


def test_16_bit_layers_get_adapters_of_32_bits_as_in_peft():
    model = nn.Sequential(nn.Linear(8, 8, dtype=jnp.bfloat16))
    filled(nn.lora.attach(model, "0", rank=2))
    assert model[0].lora["default"].lora_A.dtype == jnp.float32
    out = model(jnp.ones((2, 8), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    nn.lora.merge(model)
    assert model[0].weight.dtype == jnp.bfloat16
    close(
        model(jnp.ones((2, 8), jnp.bfloat16)).astype(jnp.float32),
        out.astype(jnp.float32),
        0.05,
        0.1,
    )


class Times(nn.Module):
    def forward(self, codes):
        return codes.astype(jnp.float32) * 0.1


def test_a_base_that_is_stored_small_takes_adapters_beside_it():
    layer = nn.Linear(4, 4)
    del layer.weight
    layer.register_buffer("weight", jnp.arange(16, dtype=jnp.int8).reshape(4, 4))
    parametrize.register_parametrization(layer, "weight", Times(), unsafe=True)
    model, x = nn.Sequential(layer), jnp.ones((2, 4))
    base = model(x)
    filled(nn.lora.attach(model, "0", rank=2, variant="dora"))
    assert float(abs(model(x) - base).max()) > 0.01
    assert len(nn.grad(lambda m: m(x).sum())(model)) == 3
    with pytest.raises(nn.StructureChangeError, match="'0.weight'.*\n.*has to write it"):
        nn.lora.merge(model)
    nn.lora.detach(model)
    close(model(x), base)


def test_a_tied_weight_warns_and_is_not_merged():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match="'1.weight' is also '0.weight'"):
        nn.lora.attach(model, "1", rank=2)
    filled(model)
    out = model(jnp.arange(3))
    with pytest.raises(
        nn.StructureChangeError, match="several names: '1.weight' is also '0.weight'"
    ):
        nn.lora.merge(model)
    close(model(jnp.arange(3)), out)
    model[1].weight = nn.Parameter(model[1].weight.value)
    nn.lora.merge(model)
    close(model(jnp.arange(3)), out)


def test_a_layer_at_two_names_is_one_layer_and_no_tie():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    filled(nn.lora.attach(model, "2", rank=1))
    out = model(jnp.ones((1, 4)))
    nn.lora.merge(model)
    close(model(jnp.ones((1, 4))), out)


def products(function, *args):
    """Return the shapes of the results of all matrix products in a function."""
    text = str(jax.make_jaxpr(function)(*args))
    return [
        tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\] = dot_general", text)
    ]


def test_beside_a_layer_neither_its_weight_nor_the_gradient_of_it_is_computed():
    model, x = nn.Sequential(nn.Linear(12, 48), nn.Linear(48, 12)), jnp.ones((5, 12))
    forward = lambda model, x: nn.functionalize(model)[0](nn.functionalize(model)[1], x)
    base = products(forward, model, x)
    assert base == [(5, 48), (5, 12)]
    nn.lora.attach(model, "*", rank=2)
    assert sorted(products(forward, model, x)) == sorted([*base, (5, 2), (5, 48), (5, 2), (5, 12)])
    fn, params = nn.functionalize(model)
    backward = products(jax.grad(lambda p: fn(p, x).sum()), params)
    assert not {(12, 48), (48, 12)} & set(backward) and (2, 48) in backward
    nn.lora.merge(model)
    assert products(forward, model, x) == base


def test_gpt2_takes_adapters_by_the_names_of_its_layers():
    import gpt2

    config = gpt2.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = gpt2.GPT2LMHeadModel(config)
    nn.lora.attach(model, "*.attn.c_attn|*.mlp.*", rank=2, alpha=16, dropout=0.05)
    layers = {n.split(".lora.")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert layers == {
        f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")
    }
    assert all(model.get_submodule(n).lora.layout.transposed for n in layers)


def test_a_state_dict_of_pissa_gives_the_weight_back():
    model = nn.Sequential(nn.Linear(6, 4))
    weight = np.asarray(model[0].weight)
    other = nn.lora.attach(nn.Sequential(nn.Linear(6, 4)), "0", rank=2, variant="pissa")
    other.load_state_dict(nn.lora.attach(model, "0", rank=2, variant="pissa").state_dict())
    nn.lora.detach(other)
    close(other[0].weight, weight)


@pytest.mark.parametrize("layer", ["fc", "attn"])
def test_weights_of_a_base_do_not_load_into_pissa(layer):
    base = network(lstm=False).state_dict()
    model = nn.lora.attach(network(lstm=False), layer, rank=2, variant="pissa")
    before = model.state_dict()
    for strict in (True, False):
        with pytest.raises(
            nn.StateDictError, match=rf"(?s)'{layer}\..* whole.*load the base first"
        ):
            model.load_state_dict(base, strict=strict)
    for name, value in model.state_dict().items():
        assert (np.asarray(value) == np.asarray(before[name])).all()
    others = {n: v for n, v in base.items() if not n.startswith(f"{layer}.")}
    model.load_state_dict(others, strict=False)
    model.load_state_dict(before)


def test_a_merged_state_dict_fits_merged_models_alone():
    merged, plain = (
        filled(nn.lora.attach(nn.Sequential(nn.Linear(4, 3)), "0", rank=2)) for _ in range(2)
    )
    before = plain.state_dict()
    nn.lora.merge(merged)
    for source, target in ((merged, plain), (plain, merged)):
        with pytest.raises(nn.StateDictError, match="0.lora.is_merged"):
            target.load_state_dict(source.state_dict())
    nn.lora.merge(plain)
    nn.lora.unmerge(plain)
    assert list(plain.state_dict()) == list(before)


def test_an_adapter_named_twice_acts_once():
    model = nn.Sequential(nn.Linear(4, 3))
    for name in ("a", "b"):
        filled(nn.lora.attach(model, "0", rank=1, name=name), name)
    nn.lora.enable(model, ["a", "b"])
    out = model(jnp.ones((2, 4)))
    nn.lora.enable(model, ["a", "b", "b"])
    close(model(jnp.ones((2, 4))), out)


def test_members_of_an_ensemble_are_adapted_before():
    with pytest.raises(nn.ShapeError, match=r"shape \(2, 3, 4\)[\s\S]*nn.Ensemble.of"):
        nn.lora.attach(nn.Ensemble(lambda: nn.Linear(4, 3), 2), "*", rank=1)
    ensemble = nn.Ensemble.of([nn.lora.attach(nn.Linear(4, 3), "", rank=1) for _ in range(2)])
    filled(ensemble)
    x = jnp.ones((2, 4))
    close(ensemble(x), jnp.stack([ensemble.member(i)(x) for i in range(2)]))


def test_a_rank_of_one_layer_is_not_that_of_layers_whose_names_end_alike(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    base = copy.deepcopy(model)
    nn.lora.attach(model, "0|1.0", rank=1, name="a")
    nn.lora.attach(model, "0", rank=1, name="b")
    nn.lora.combine(model, {"a": 1.0, "b": 1.0}, name="c", how="cat")
    nn.lora.enable(model, "c")
    filled(model, "c")
    nn.lora.save(model, tmp_path, "c")
    nn.lora.load(base, tmp_path)
    close(base(jnp.ones((2, 4))), model(jnp.ones((2, 4))))


def test_a_layer_that_multiplies_from_the_right_takes_an_adapter_when_it_is_quantised():
    model = nn.Sequential(Conv1D(6, 4), Conv1D(6, 6))
    nn.quantize(model, "*", "int8")
    nn.lora.attach(model, "*", rank=2)
    filled(model)
    x = jnp.arange(8.0).reshape(2, 4)
    want = x
    for layer in model:
        a, b = (getattr(layer.lora["default"], f"lora_{n}").value for n in "AB")
        want = want @ (layer.weight + (b @ a).T * 4) + layer.bias  # alpha / rank is 4
    close(model(x), want, rtol=1e-4)
