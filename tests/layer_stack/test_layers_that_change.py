"""Layers that are changed one by one: what is stored follows, whatever holds the stack."""

from __future__ import annotations

import copy
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
from statefulnn.core.errors import StateWriteError
from tests.layer_stack.blocks import SIZE, Block, Model, close, inputs, listed, stacked, train_step


class LoRA(nn.Module):
    """A frozen layer and a change of rank 2 beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(jax.random.normal(nn.next_key(), (2, SIZE)))
        self.b = nn.Parameter(jnp.ones((SIZE, 2)))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def frozen(model):
    return [name for name, p in model.named_parameters() if not p.requires_grad]


def test_adapters_in_all_layers_are_stored_as_one_and_train_alone():
    a, b = listed(), stacked()
    weight = b.blocks.stack.fc.weight
    for model in (a, b):
        nn.manual_seed(3)
        for block in model.blocks:
            block.fc = LoRA(block.fc)
    assert frozen(b) == ["blocks.stack.fc.base.weight"]
    assert b.blocks.stack.fc.base.weight is weight  # nothing was copied
    assert b.blocks.stack.fc.a.shape == (4, 2, SIZE)
    for model in (a, b):
        opt = nn.Optimizer(model, optax.adam(1e-2))
        nn.jit(train_step)(model, opt, inputs())
        assert not any("base" in name for name in opt.state_dict())
    close(a.state_dict(), b.state_dict(), 1e-4)


def test_an_adapter_in_one_layer_is_stored_apart():
    a, b = listed(), stacked()
    for model in (a, b):
        nn.manual_seed(3)
        model.blocks[1].fc = LoRA(model.blocks[1].fc)
    np.testing.assert_allclose(a(inputs()), b(inputs()), rtol=1e-5, atol=1e-5)
    assert frozen(b) == ["blocks.1-1.fc.base.weight"]
    close(a.state_dict(), b.state_dict())


def test_parametrized_layers_are_those_of_a_list():
    a, b = listed(), stacked()
    for model in (a, b):
        for block in model.blocks:
            nn.utils.parametrizations.weight_norm(block.fc)
    np.testing.assert_allclose(a(inputs()), b(inputs()), rtol=1e-5, atol=1e-5)
    close(a.state_dict(), b.state_dict())


class Outer(nn.Module):
    def __init__(self, container):
        super().__init__()
        self.inner = container([Block() for _ in range(2)])

    def forward(self, x):
        return self.inner(x)


def test_stacks_of_stacks_are_lists_of_lists():
    a = Model(nn.ModuleList([Outer(lambda blocks: nn.Sequential(*blocks)) for _ in range(3)]))
    b = Model(nn.LayerStack([Outer(nn.LayerStack) for _ in range(3)]))
    b.load_state_dict(a.state_dict())
    for run in (lambda m: m, nn.jit):
        np.testing.assert_allclose(run(a)(inputs()), run(b)(inputs()), rtol=1e-4, atol=1e-5)
        close(a.state_dict(), b.state_dict())
    assert b.blocks.stack.inner.stack.fc.weight.shape == (3, 2, SIZE, SIZE)
    b.blocks[1].inner[0].fc.weight.value = jnp.zeros((SIZE, SIZE))
    assert not b.blocks.stack.inner.stack.fc.weight[1, 0].any()
    assert b.blocks.stack.inner.stack.fc.weight[1, 1].any()
    b.blocks[1].inner[0].requires_grad_(False)
    assert len(frozen(b)) == 5 and all(".inner.0-0." in name for name in frozen(b))
    close(copy.deepcopy(b).state_dict(), b.state_dict())


def test_layers_follow_what_is_changed_in_the_stored_block():
    blocks = stacked().blocks
    held = blocks[1].drop
    blocks.stack.drop.p = 0.25
    assert blocks[1].drop is held and held.p == 0.25
    blocks.stack.requires_grad_(False)
    assert not blocks[0].fc.weight.requires_grad
    blocks[2].drop.p = 0.5
    assert [layer.drop.p for layer in blocks] == [0.25, 0.25, 0.5, 0.25]
    blocks(inputs())
    assert [name for name, _ in blocks.named_parameters()][0] == "stack.norm.weight"


def test_stacks_that_compiled_code_builds_or_returns_are_whole():
    make = nn.jit(lambda: Model(nn.LayerStack(Block, 3)))
    nn.manual_seed(0)
    model = make()
    nn.manual_seed(0)
    close(Model(nn.LayerStack(Block, 3)).state_dict(), model.state_dict())
    model.blocks[1].fc.weight.value = jnp.zeros((SIZE, SIZE))
    returned, _ = nn.jit(lambda model: (model, model(inputs())))(model)
    assert returned is model
    for twin in (jax.jit(lambda model: model)(model), jax.tree.map(lambda v: v, model)):
        assert not twin.blocks[1].fc.weight.value.any()
        close(model.state_dict(), twin.state_dict(), 0)


def test_donated_stacks_leave_layers_and_state_dicts_usable():
    model = stacked()
    opt = nn.Optimizer(model, optax.adam(1e-2))
    before = model.state_dict()
    step = nn.jit(train_step, donate=(0, 1))
    for _ in range(2):
        step(model, opt, inputs())
        model.blocks[2].fc.weight.value = model.blocks[2].fc.weight * 2
    close(listed().state_dict(), before, 0)
    assert np.isfinite(model.blocks[2].fc.weight).all()


def test_values_of_layers_change_without_a_compilation():
    model = stacked()
    compiled = nn.jit(lambda model, x: model(x))
    compiled(model, inputs())
    for block in model.blocks:
        block.fc.weight.value = block.fc.weight * 2
    compiled(model, inputs())
    model.load_state_dict(listed().state_dict())
    compiled(model, inputs())
    compiled(stacked(), inputs())
    assert compiled.trace_count == 1


def test_layers_changed_before_a_trace_are_stored_with_numbers_by_it():
    model, expected = stacked().eval(), listed().eval()(inputs())
    for block in model.blocks[:2]:
        block.requires_grad_(False)
    compiled = jax.jit(lambda x: model(x))  # a closure: the trace is the first to look
    np.testing.assert_allclose(compiled(inputs()), expected, rtol=1e-5, atol=1e-5)
    assert len(frozen(model)) == 5
    close(listed().state_dict(), model.state_dict(), 0)


def test_a_stack_that_was_taken_apart_says_so_when_it_is_called():
    blocks = stacked().blocks
    assert len(blocks.unstack()) == 4 and len(blocks) == 0
    with pytest.raises(ValueError, match="without layers"):
        blocks(inputs())


def test_an_optimizer_of_one_layer_trains_that_layer_alone():
    a, b = listed(), stacked()

    def step(layer, opt):
        opt.step(nn.grad(lambda layer: (layer(inputs()) ** 2).sum())(layer))

    for model in (a, b):
        opt = nn.Optimizer(model.blocks[1], optax.adam(1e-2))
        step(model.blocks[1], opt)
        nn.jit(step)(model.blocks[1], opt)
    close(a.state_dict(), b.state_dict(), 1e-4)


def test_a_write_that_would_be_lost_is_refused_with_the_name_of_the_layer():
    model = stacked()
    with pytest.raises(StateWriteError, match=r"'blocks\.1\.bn\.running_mean' \(Buffer\)"):
        jax.jit(lambda model: model.blocks[1](inputs()))(model)
    assert np.isfinite(model.blocks[1].bn.running_mean).all()


def test_blocks_without_arrays_are_counted_too():
    blocks = nn.LayerStack([nn.ReLU() for _ in range(3)])
    assert len(blocks) == 3 and list(blocks.state_dict()) == []
    np.testing.assert_array_equal(nn.jit(blocks)(inputs()), jax.nn.relu(inputs()))


def test_a_stack_dies_by_reference_count():
    model = stacked()
    model(inputs())
    references = [weakref.ref(part) for part in (model, model.blocks, model.blocks[0])]
    gc.disable()
    try:
        del model
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()
