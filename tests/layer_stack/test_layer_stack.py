"""LayerStack: one loop over stored layers is what a list of them is, ours and torch's."""

from __future__ import annotations

import copy
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import statefulnn as nn
import statefulnn.functional as F
from statefulnn.core.errors import (
    DtypeError,
    ShapeError,
    StateDictError,
    StructureChangeError,
    UninitializedParameterError,
)
from tests.layer_stack.blocks import (
    LABELS,
    SIZE,
    Block,
    Model,
    TorchBlock,
    check_gradients,
    close,
    inputs,
    listed,
    loss_of,
    stacked,
    train_step,
)


@pytest.fixture
def x():
    return inputs()


# --------------------------------------------------------------------------------------------------
# The same as a list


def test_a_stack_computes_what_torchs_list_does_and_updates_its_statistics(x):
    theirs = torch.nn.ModuleList([TorchBlock() for _ in range(4)])
    ours = nn.LayerStack([Block() for _ in range(4)])
    ours.load_state_dict({k: v.detach().numpy() for k, v in theirs.state_dict().items()})
    expected = torch.from_numpy(np.array(x))
    for block in theirs:
        expected = block(expected)
    np.testing.assert_allclose(ours(x), expected.detach(), rtol=1e-5, atol=1e-5)
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(state[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_list_and_a_function_with_a_number_start_with_the_values_of_a_module_list():
    model = listed()
    close(model.state_dict(), stacked().state_dict(), 0)
    with nn.rng_scope(jax.random.key(0)):
        built = Model(nn.LayerStack(Block, 4))
    close(model.state_dict(), built.state_dict(), 0)


def test_training_with_dropout_follows_that_of_a_list(x):
    losses = []
    models = listed(p=0.3), stacked(p=0.3)
    for model in models:
        nn.manual_seed(3)
        opt, step = nn.Optimizer(model, optax.adamw(1e-2)), nn.jit(train_step)
        losses.append([float(step(model, opt, x)) for _ in range(4)])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    close(models[0].state_dict(), models[1].state_dict(), 1e-3)


def test_gradients_are_those_of_a_list_whatever_is_recomputed_or_unrolled(x):
    nn.manual_seed(5)
    expected = nn.grad(loss_of)(listed(p=0.3), x)
    policy = jax.checkpoint_policies.dots_saveable
    for options in ({}, {"remat": True}, {"remat": policy}, {"unroll": 3}):
        nn.manual_seed(5)
        check_gradients(expected, nn.grad(loss_of)(stacked(p=0.3, **options), x))


def test_each_layer_drops_other_entries(x):
    blocks = nn.LayerStack([nn.Dropout(0.5) for _ in range(3)])
    outputs = nn.capture(blocks)(jnp.ones((8, 64)))[1]
    kept = [np.asarray(outputs[str(i)]) != 0 for i in range(3)]
    assert kept[0].sum() > kept[1].sum() > kept[2].sum() > 0  # one mask would drop nothing more


def test_further_arguments_are_the_same_for_all_layers_and_other_outputs_come_back_stacked(x):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(SIZE, SIZE)

        def forward(self, x, scale, counter, *, negate=False):
            counter.n = counter.n + 1
            y = self.fc(x) * scale
            return (-y if negate else y), y.sum(), {"mean": y.mean(0)}

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = nn.Buffer(jnp.zeros((), jnp.int32))

    blocks, counter = nn.LayerStack(Scaled, 3), Counter()
    y, sums, parts = blocks(x, jnp.float32(2.0), counter, negate=True)
    expected, totals, means = x, [], []
    other = Counter()
    for layer in blocks:
        expected, total, part = layer(expected, jnp.float32(2.0), other, negate=True)
        totals.append(total)
        means.append(part["mean"])
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    np.testing.assert_allclose(sums, jnp.stack(totals), rtol=1e-5)
    np.testing.assert_allclose(parts["mean"], jnp.stack(means), rtol=1e-5, atol=1e-6)
    assert int(counter.n) == int(other.n) == 3


def test_buffers_that_differ_by_layer_are_entries_of_one_array(x):
    class Scaled(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.rate = nn.Buffer(jnp.float32(rate), persistent=False)

        def forward(self, x):
            return x * self.rate

    blocks = nn.LayerStack([Scaled(r) for r in (1.0, 2.0, 5.0)])
    np.testing.assert_allclose(blocks(x), 10 * x, rtol=1e-6)
    assert list(blocks.state_dict()) == []
    assert blocks.stack.rate.shape == (3,)


def test_one_layer_works(x):
    close(listed(1).state_dict(), stacked(1).state_dict(), 0)
    np.testing.assert_allclose(listed(1)(x), stacked(1)(x), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Compiled once


def lowered(count, x):
    model = stacked(count)
    return nn.jit(nn.grad(loss_of)).lower(model, x).as_text()


def test_compiled_code_does_not_grow_with_the_number_of_layers(x):
    few, many = (lowered(count, x) for count in (4, 24))
    assert len(few.splitlines()) == len(many.splitlines())
    assert re.sub(r"\d+", "", few) == re.sub(r"\d+", "", many)


def test_a_block_is_traced_as_often_for_many_layers_as_for_few(x, no_compilation_cache):
    calls = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(SIZE, SIZE)

        def forward(self, x):
            calls.append(1)
            return self.fc(x)

    counts = []
    for number in (2, 12):
        calls.clear()
        blocks = nn.LayerStack(Counting, number)
        compiled = nn.jit(blocks)
        compiled(x)
        counts.append(len(calls))
        compiled(x)
        assert len(calls) == counts[-1]
    assert counts[0] == counts[1] == 2  # once to see what it writes, once for the loop
    calls.clear()
    for scale in (1, 2, 3):  # eager calls run what the first one has compiled
        blocks(scale * x)
    assert len(calls) == 2


# --------------------------------------------------------------------------------------------------
# Layers


def test_a_layer_reads_and_writes_its_part():
    blocks = stacked().blocks
    new = jnp.ones((SIZE, SIZE))
    blocks[1].fc.weight.value = new
    assert (blocks.stack.fc.weight[1] == new).all()
    assert (blocks.stack.fc.weight[2] != new).any()
    blocks.stack.fc.weight.value = blocks.stack.fc.weight * 3
    assert (blocks[1].fc.weight == 3).all()
    blocks[-1].bn.running_mean = jnp.full(SIZE, 7.0)
    assert (blocks.stack.bn.running_mean[3] == 7).all()
    blocks[0].fc.weight[0, 0] = 9.0
    assert blocks.stack.fc.weight[0, 0, 0] == 9


def test_layers_have_the_class_of_the_block_and_stay_the_same_objects():
    made = [Block() for _ in range(3)]
    blocks = nn.LayerStack(made)
    assert all(a is b for a, b in zip(blocks, made, strict=True))
    assert len(blocks) == 3 and blocks[-1] is made[2] and made[1] in blocks
    assert [m is made[i + 1] for i, m in enumerate(blocks[1:])] == [True, True]
    with pytest.raises(IndexError, match="layer 3 of a LayerStack of 3"):
        blocks[3]


def test_names_are_those_of_a_list_and_parameters_are_stored_ones():
    a, b = listed(), stacked()
    assert [n for n, _ in a.named_modules()] == [n for n, _ in b.named_modules()]
    assert [n for n, _ in b.blocks.named_children()] == ["0", "1", "2", "3"]
    names = [n for n, _ in b.blocks[0].named_parameters()]
    assert [n for n, _ in b.blocks.named_parameters()] == [f"stack.{n}" for n in names]
    assert b.get_submodule("blocks.2.fc") is b.blocks[2].fc
    assert b.get_parameter("blocks.2.fc.weight") is b.blocks[2].fc.weight
    assert sum(p.size for p in a.parameters()) == sum(p.size for p in b.parameters())
    assert repr(a).replace("ModuleList", "LayerStack") == repr(b)


def test_a_layer_is_called_alone_and_one_by_one_as_in_a_list(x):
    def one_by_one(model, x):
        for block in model.blocks:
            x = block(x)
        return x

    a, b = listed(), stacked()
    for function in (one_by_one, nn.jit(one_by_one)):
        np.testing.assert_allclose(function(a, x), function(b, x), rtol=1e-5, atol=1e-5)
        close(a.state_dict(), b.state_dict())
    np.testing.assert_allclose(nn.jit(a.blocks[2])(x), nn.jit(b.blocks[2])(x), rtol=1e-5, atol=1e-5)
    close(a.state_dict(), b.state_dict())


def test_compiled_code_writes_to_a_layer():
    blocks = stacked().blocks

    @nn.jit
    def double(module):
        module.fc.weight.value = module.fc.weight * 2

    before = blocks.stack.fc.weight.value
    double(blocks[2])
    nn.jit(lambda blocks: double(blocks[1]))(blocks)
    expected = before * jnp.array([1.0, 2, 2, 1])[:, None, None]
    np.testing.assert_allclose(blocks.stack.fc.weight, expected)


def test_a_layer_beside_its_stack_in_one_call_is_refused(x):
    model = stacked()
    with pytest.raises(StructureChangeError, match="stand for parts of"):
        nn.jit(lambda model, layer: layer(model.blocks(x)))(model, model.blocks[1])


# --------------------------------------------------------------------------------------------------
# Modes, frozen layers, hooks


def test_frozen_layers_do_not_move_and_have_no_slots(x):
    a, b = listed(), stacked()
    for model in (a, b):
        for block in model.blocks[:2]:
            block.requires_grad_(False)
        opt = nn.Optimizer(model, optax.adamw(1e-2, weight_decay=0.5))
        before = model.state_dict()
        for _ in range(3):
            nn.jit(train_step)(model, opt, x)
        for name in ("blocks.0.fc.weight", "blocks.1.norm.weight"):
            assert (model.state_dict()[name] == before[name]).all()
        assert (model.state_dict()["blocks.2.fc.weight"] != before["blocks.2.fc.weight"]).any()
    close(a.state_dict(), b.state_dict(), 1e-3)
    slots = [n for n in opt.state_dict() if n.startswith("mu.blocks")]
    assert slots and all(n.startswith("mu.blocks.2-3.") for n in slots)
    b.requires_grad_(True)
    assert {n.split(".")[1] for n, _ in b.named_parameters() if n.startswith("b")} == {"stack"}
    assert all(p.requires_grad for p in b.blocks[0].parameters())


def test_layers_in_another_mode_share_the_storage_and_keep_the_optimizer(x):
    a, b = listed(), stacked()
    for model in (a, b):
        opt = nn.Optimizer(model, optax.sgd(1e-2))
        for block in model.blocks[1:3]:
            block.eval()
        before = model.state_dict()
        nn.jit(train_step)(model, opt, x)
        after = model.state_dict()
        for i, moved in enumerate((True, False, False, True)):
            name = f"blocks.{i}.bn.running_mean"
            assert (after[name] != before[name]).any() == moved
        model.eval()
        nn.jit(model)(x)
        model.train()
        nn.jit(train_step)(model, opt, x)
        assert model.blocks[1].bn.training
    close(a.state_dict(), b.state_dict(), 1e-4)


def test_hooks_of_a_layer_run_for_that_layer_alone(x):
    outputs = []
    for model in (listed(), stacked()):
        seen = []
        model.blocks[2].fc.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        handle = model.blocks[1].register_forward_hook(lambda m, args, out: out * 2)
        y = model(x)
        assert len(seen) == 1
        handle.remove()
        outputs.append((y, seen[0], model(x)))
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_backward_hooks_of_a_layer_change_its_gradient(x):
    gradients = []
    for model in (listed(), stacked()):
        model.blocks[1].fc.register_full_backward_hook(lambda m, into, out: (into[0] * 3,))
        gradients.append(nn.jit(nn.grad(loss_of))(model, x))
    check_gradients(*gradients)


def test_capture_names_outputs_and_their_gradients_by_layer(x):
    a, b = listed(), stacked()
    outputs = nn.capture(b)(x)[1]
    outputs.pop("blocks")
    close(nn.capture(a)(x)[1], outputs)
    results = []
    for model in (a, b):
        out, _, backward = nn.capture(model, ["blocks.2.fc", "blocks.0"], grads=True)(x)
        results.append(backward(jnp.ones_like(out)))
    close(*results, 1e-4)


def test_a_mode_that_traced_code_changes_is_refused(x):
    with pytest.raises(StructureChangeError):
        nn.jit(lambda model: model.blocks[1].eval())(stacked())


# --------------------------------------------------------------------------------------------------
# State


def test_loading_is_all_or_nothing_and_names_layers():
    model = stacked()
    before, given = model.state_dict(), listed().state_dict()
    del given["blocks.2.fc.weight"]
    given["blocks.9.fc.weight"] = jnp.ones(2)
    given["blocks.1.norm.bias"] = jnp.ones(3)
    given["blocks.0.norm.bias"] = jnp.full(SIZE, 5.0)
    with pytest.raises(StateDictError) as error:
        model.load_state_dict(given)
    for text in ('Missing key(s) in state_dict: "blocks.2.fc.weight"', '"blocks.9.fc.weight"'):
        assert text in str(error.value)
    assert "size mismatch for blocks.1.norm.bias" in str(error.value)
    close(before, model.state_dict(), 0)
    del given["blocks.1.norm.bias"]
    result = model.load_state_dict(given, strict=False)
    assert result.missing_keys == ["blocks.2.fc.weight", "blocks.1.norm.bias"][::-1]
    assert (model.blocks.stack.norm.bias[0] == 5).all()


def test_files_and_checkpoints_go_both_ways(tmp_path):
    a, b = listed(), stacked()
    a.blocks[1].fc.weight.value = a.blocks[1].fc.weight * 2
    nn.save(a.state_dict(), tmp_path / "list.safetensors")
    b.load_state_dict(nn.load(tmp_path / "list.safetensors"))
    close(a.state_dict(), b.state_dict(), 0)
    nn.save(b.state_dict(), tmp_path / "stack.safetensors")
    c = listed()
    c.load_state_dict(nn.load(tmp_path / "stack.safetensors"))
    close(c.state_dict(), a.state_dict(), 0)

    opt = nn.Optimizer(b, optax.adam(1e-2))
    checkpointer = nn.Checkpointer(tmp_path / "run")
    checkpointer.save(1, model=b, opt=opt)
    before = b.state_dict()
    for block in b.blocks:
        block.fc.weight.value = block.fc.weight * 0
    checkpointer.restore(model=b, opt=opt)
    close(before, b.state_dict(), 0)


def test_copies_are_independent(x):
    model = stacked().eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_allclose(twin(x), model(x), rtol=1e-6)
        twin.blocks[1].fc.weight.value = twin.blocks[1].fc.weight * 0
    layer = copy.deepcopy(model.blocks[0])
    layer.fc.weight.value = layer.fc.weight * 0
    close(listed().state_dict(), model.state_dict(), 0)


def test_casts_reach_the_layers_and_one_cast_layer_is_stored_apart(x):
    a, b = listed().eval().bfloat16(), stacked().eval().bfloat16()
    half = x.astype(jnp.bfloat16)
    np.testing.assert_allclose(np.float32(a(half)), np.float32(b(half)), rtol=2e-2, atol=2e-2)
    assert b.blocks[1].fc.weight.dtype == jnp.bfloat16
    b.blocks[2].to(jnp.float32)
    assert b.blocks[2].fc.weight.dtype == jnp.float32
    assert {p.dtype.name for _, p in b.blocks.named_parameters()} == {"bfloat16", "float32"}
    assert len(b.state_dict()) == len(a.state_dict())


def test_models_without_numbers_get_those_of_a_list():
    with nn.rng_scope(jax.random.key(0)), nn.device("meta"):
        model = Model(nn.LayerStack(Block, 3))
    with nn.rng_scope(jax.random.key(7)):
        nn.materialize(model)
    with nn.device("meta"):
        other = Model(nn.ModuleList([Block() for _ in range(3)]))
    with nn.rng_scope(jax.random.key(7)):
        nn.materialize(other)
    close(other.state_dict(), model.state_dict(), 0)
    empty = stacked(3).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    close(empty.state_dict(), model.state_dict(), 0)


def test_apply_sees_the_modules_of_each_layer():
    model = stacked()

    def zero(module):
        if isinstance(module, nn.Linear):
            assert module.weight.ndim == 2
            nn.init.zeros_(module.weight)

    model.apply(zero)
    assert not model.blocks.stack.fc.weight.value.any()


# --------------------------------------------------------------------------------------------------
# Ties, other lists


def test_a_module_that_all_layers_share_is_stored_once(x):
    class Tied(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.fc, self.shared = nn.Linear(SIZE, SIZE), shared

        def forward(self, x):
            return x + self.fc(self.shared(x))

    def build(stack):
        with nn.rng_scope(jax.random.key(0)):
            shared = nn.Linear(SIZE, SIZE)
            blocks = [Tied(shared) for _ in range(3)]
        model = Model(nn.LayerStack(blocks) if stack else nn.ModuleList(blocks))
        model.head = shared
        return model

    a, b = build(False), build(True)
    assert list(a.state_dict()) == list(b.state_dict())
    assert b.blocks[1].shared is b.head
    assert b.blocks.stack.shared.weight.shape == (SIZE, SIZE)
    gradients = [nn.grad(lambda m: m(x).sum())(m) for m in (a, b)]
    assert "blocks.stack.shared.weight" not in gradients[1]
    check_gradients(*gradients)
    same = nn.Linear(SIZE, SIZE)
    # Numbers near 1 and sums of other orders: one near 0 has the error of the others.
    np.testing.assert_allclose(
        nn.LayerStack([same] * 3)(x), same(same(same(x))), rtol=1e-5, atol=1e-6
    )


def test_a_list_becomes_a_stack_in_place_and_back(x):
    model = listed()
    expected, names = copy.deepcopy(model)(x), list(model.state_dict())
    blocks = list(model.blocks)
    stack = nn.LayerStack.of(model, "blocks")
    assert model.blocks is stack and list(stack) == blocks
    assert list(model.state_dict()) == names
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    state = model.state_dict()
    model.blocks = model.blocks.unstack()
    assert [type(m) for m in (model.blocks, model.blocks[0])] == [nn.ModuleList, Block]
    close(state, model.state_dict(), 0)
    model.blocks[0].fc.weight.value = model.blocks[0].fc.weight * 2
    assert (model.state_dict()["blocks.1.fc.weight"] == state["blocks.1.fc.weight"]).all()
    assert len([n for n, _ in model.named_parameters()]) == 22


def test_a_converted_sequential_becomes_a_stack(x):
    theirs = torch.nn.Sequential(*[torch.nn.Linear(SIZE, SIZE) for _ in range(3)])
    model = nn.Sequential(nn.bridge.torch.from_torch(theirs))
    nn.LayerStack.of(model, "0")
    expected = theirs(torch.from_numpy(np.array(x))).detach()
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_can_be_exchanged(x):
    a, b = listed(), stacked()
    other = nn.Linear(SIZE, SIZE)
    for model in (a, b):
        model.set_submodule("blocks.1", copy.deepcopy(other))
    np.testing.assert_allclose(a(x), b(x), rtol=1e-5, atol=1e-5)
    close(a.state_dict(), b.state_dict())
    assert isinstance(b.blocks[1], nn.Linear)


# --------------------------------------------------------------------------------------------------
# Inside transformations


def test_pure_functions_and_gradients_of_single_examples_are_those_of_a_list(x):
    results = []
    for model in (listed().eval(), stacked().eval()):
        fn, params = nn.functionalize(model)

        def loss(params, x, label, fn=fn):
            return F.cross_entropy(fn(params, x[None]), label[None])

        results.append(jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, LABELS))
        given = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        np.testing.assert_allclose(nn.functional_call(model, given, (x,)), model(x), rtol=1e-5)
    per_example = {k: jnp.moveaxis(v, 0, -1) for k, v in results[0].items()}
    moved = {k: jnp.moveaxis(v, 0, -1) for k, v in results[1].items()}
    check_gradients(per_example, moved)


def test_meta_learning_differentiates_through_the_inner_steps(x):
    results = []
    for model in (listed().eval(), stacked().eval()):
        fn, params = nn.functionalize(model)

        def outer(params, fn=fn):
            adapted = nn.meta.adapt(fn, params, F.cross_entropy, (x, LABELS), steps=2, lr=0.1)
            return F.cross_entropy(fn(adapted.params, x), LABELS)

        results.append(jax.grad(outer)(params))
    check_gradients(*results)


def test_ensembles_of_stacks_and_stacked_state(x):
    ensemble = nn.Ensemble(lambda: Model(nn.LayerStack(Block, 3)), 2).eval()
    members = [ensemble.member(i) for i in range(2)]
    np.testing.assert_allclose(
        ensemble(x), jnp.stack([m(x) for m in members]), rtol=1e-4, atol=1e-5
    )
    state = ensemble.state_dict()
    assert state["stack.blocks.2.fc.weight"].shape == (2, SIZE, SIZE)
    np.testing.assert_array_equal(
        state["stack.blocks.2.fc.weight"][1], members[1].blocks[2].fc.weight
    )
    ensemble.load_state_dict({k: v * 0 for k, v in state.items()})
    assert not ensemble.stack.blocks.stack.fc.weight.value.any()
    models = [stacked(3).eval() for _ in range(2)]
    params, buffers = nn.stack_module_state(models)
    out = jax.vmap(lambda p, b: nn.functional_call(models[0], (p, b), (x,)))(params, buffers)
    np.testing.assert_allclose(out, jnp.stack([m(x) for m in models]), rtol=1e-4, atol=1e-5)


def test_vmap_and_raw_transformations_take_a_stack(x):
    model = stacked().eval()
    expected = listed().eval()(x)
    one = lambda model, x: model(x[None])[0]
    for out in (
        nn.vmap(one, in_axes=(None, 0))(model, x),
        jax.vmap(one, (None, 0))(model, x),
        jax.jit(lambda model, x: model(x))(model, x),
        jax.jit(lambda model, x: model.blocks[3](model.blocks[:3][0](x)) * 0)(model, x).sum()
        + expected,
    ):
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_export_writes_a_stack(x, tmp_path):
    model = stacked().eval()
    nn.export(model, x, tmp_path / "model")
    np.testing.assert_allclose(
        nn.load_exported(tmp_path / "model")(x), model(x), rtol=1e-5, atol=1e-5
    )


def test_summaries_show_layers(x):
    text = str(nn.summary(stacked(), x))
    assert "(not called)" not in text
    assert sum(p.size for p in listed().parameters()) == sum(p.size for p in stacked().parameters())


# --------------------------------------------------------------------------------------------------
# Refusals


def test_unlike_blocks_are_refused_with_the_first_difference():
    class Rated(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.p = p

    with pytest.raises(
        StructureChangeError, match=r"(?s)'p' of block 0.*block 1, 0.0 became 0.1.*Buffer"
    ):
        nn.LayerStack([Rated(0.1 * i) for i in range(3)])
    with pytest.raises(StructureChangeError, match="class Linear became"):
        nn.LayerStack([nn.Linear(2, 2), nn.LayerNorm(2)])
    with pytest.raises(StructureChangeError, match=r"'out_features' of block 1.*2 became 3"):
        nn.LayerStack([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3)])

    class Holder(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.w = nn.Parameter(value)

    with pytest.raises(
        ShapeError, match=r"'w' is float32\[2\] in block 0 and float32\[3\] in block 1"
    ):
        nn.LayerStack([Holder(jnp.ones(2)), Holder(jnp.ones(3))])
    with pytest.raises(DtypeError, match="bfloat16"):
        nn.LayerStack([Holder(jnp.ones(2)), Holder(jnp.ones(2, jnp.bfloat16))])
    shared = nn.Linear(2, 2)
    with pytest.raises(StructureChangeError, match="some share 'weight' and block 2"):
        nn.LayerStack([shared, shared, nn.Linear(2, 2)])


def test_no_blocks_and_other_things_are_refused():
    for given in ([], ()):
        with pytest.raises(ValueError, match="a LayerStack of no blocks"):
            nn.LayerStack(given)
    with pytest.raises(ValueError, match="a LayerStack of 0 blocks"):
        nn.LayerStack(Block, 0)
    for given in (3, Block(), [Block(), "block"], Block):
        with pytest.raises(TypeError, match="made a LayerStack of"):
            nn.LayerStack(given)
    with pytest.raises(UninitializedParameterError, match="no shape yet"):
        nn.LayerStack([nn.LazyLinear(2), nn.LazyLinear(2)])
    stack = nn.LayerStack([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(StructureChangeError, match="a layer of another one"):
        nn.LayerStack(list(stack))
    with pytest.raises(TypeError, match=r"remat='all'"):
        nn.LayerStack(Block, 2, remat="all")
    with pytest.raises(TypeError, match=r"which is a Linear"):
        nn.LayerStack.of(listed(), "head")
    model = listed()
    model.blocks.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(StructureChangeError, match="a ModuleList with hooks"):
        nn.LayerStack.of(model, "blocks")


def test_a_layer_that_changes_the_dtype_is_refused_with_what_to_do():
    blocks = nn.LayerStack([nn.Lambda(lambda x: x.astype(jnp.float32)) for _ in range(2)])
    with pytest.raises(StructureChangeError) as error:
        blocks(jnp.ones((1, 2), jnp.bfloat16))
    assert "carry" in str(error.value)
    assert any("Cast before the stack" in note for note in error.value.__notes__)
