"""nn.jit(f).lower(...).compile(): the compiled object does what the jitted function does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn

X = jnp.arange(24.0).reshape(8, 3) / 10


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, value), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        np.testing.assert_array_equal(np.asarray(value), np.asarray(other), err_msg=name)


def train_step(model, opt, x):
    loss, grads = nn.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
    opt.step(grads)
    return loss


@pytest.mark.parametrize("donate", [(), (0, 1)], ids=["kept", "donated"])
def test_a_training_step_writes_back_what_the_jitted_one_writes(donate):
    nn.manual_seed(0)
    model = network()
    nn.manual_seed(0)
    twin = network()  # of arrays of its own: donated ones are gone
    opt, other = (nn.Optimizer(m, optax.sgd(0.1, momentum=0.9)) for m in (model, twin))
    step = nn.jit(train_step, donate=donate)
    compiled = step.lower(model, opt, X).compile()
    jitted = nn.jit(train_step)
    for _ in range(3):
        nn.manual_seed(3)  # the same masks in both
        loss = compiled(model, opt, X)
        nn.manual_seed(3)
        np.testing.assert_array_equal(loss, jitted(twin, other, X))
    same(model, twin)
    same(opt, other)
    assert int(model[1].num_batches_tracked) == 3
    assert step.trace_count == 1


def test_masks_advance_from_call_to_call():
    drop = nn.Dropout(0.5)
    compiled = nn.jit(drop).lower(jnp.ones(64)).compile()
    first, second = compiled(jnp.ones(64)), compiled(jnp.ones(64))
    assert not (first == second).all()


def test_another_equal_model_may_be_passed_and_is_the_one_that_changes():
    model, twin = network(), network()
    compiled = nn.jit(lambda m, x: m(x).sum()).lower(model, X).compile()
    compiled(twin, X)
    assert int(twin[1].num_batches_tracked) == 1 and int(model[1].num_batches_tracked) == 0


def test_shared_modules_and_ties_are_one():
    shared = nn.BatchNorm1d(3)
    compiled = nn.jit(lambda a, b, x: a(b(x))).lower(shared, shared, X).compile()
    compiled(shared, shared, X)
    assert int(shared.num_batches_tracked) == 2
    with pytest.raises(TypeError, match="with other arguments"):
        compiled(shared, nn.BatchNorm1d(3), X)


def test_modules_in_the_output_are_the_caller_s_own():
    model = network().eval()
    compiled = nn.jit(lambda m, x: {"model": m, "out": m(x)}).lower(model, X).compile()
    assert compiled(model, X)["model"] is model


def test_static_arguments_are_compiled_in_and_compared():
    model = nn.Linear(3, 4)
    scaled = nn.jit(lambda m, x, scale: m(x) * scale, static_argnames=("scale",))
    compiled = scaled.lower(model, X, scale=2.0).compile()
    np.testing.assert_array_equal(compiled(model, X, scale=2.0), nn.jit(model)(X) * 2)
    with pytest.raises(TypeError, match="another value of the static argument 'scale'") as raised:
        compiled(model, X, scale=3.0)
    assert "f.lower(...).compile()" in str(raised.value)


def test_shapes_are_enough_to_lower():
    with nn.device("meta"):
        model = nn.Linear(1000, 1000)
    spec = jax.ShapeDtypeStruct((8, 1000), jnp.float32)
    lowered = nn.jit(model).lower(spec)
    assert lowered.out_info.shape == (8, 1000) and "dot_general" in lowered.as_text()
    compiled = lowered.compile()
    assert compiled.cost_analysis()["flops"] >= 2 * 8 * 1000 * 1000
    assert compiled.memory_analysis().argument_size_in_bytes == 4 * (1000 * 1000 + 1000 + 8 * 1000)
    real = nn.Linear(1000, 1000)
    whole = nn.jit(lambda m, x: m(x)).lower(model, spec).compile()
    x = jnp.ones((8, 1000))
    np.testing.assert_array_equal(whole(real, x), nn.jit(real)(x))


def test_other_shapes_dtypes_and_structures_are_named():
    model = network().eval()
    compiled = nn.jit(lambda m, x: m(x)).lower(model, X).compile()
    with pytest.raises(TypeError, match=r"argument 0: float32\[8, 3\] -> float32\[4, 3\]"):
        compiled(model, X[:4])
    with pytest.raises(TypeError, match=r"argument 0: float32\[8, 3\] -> bfloat16\[8, 3\]"):
        compiled(model, X.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match=r"'\[0\].0.weight': float32\[4, 3\] -> bfloat16\[4, 3\]"):
        compiled(network().eval().bfloat16(), X)
    with pytest.raises(TypeError, match="the arguments: "):
        compiled(model, x=X)
    with pytest.raises(TypeError, match="training: False became True"):
        compiled(model.train(), X)
    assert int(model[1].num_batches_tracked) == 0


def test_a_cleared_cache_changes_nothing():
    model = nn.Linear(3, 4)
    jitted = nn.jit(model)
    compiled = jitted.lower(X).compile()
    jitted.clear_cache()
    np.testing.assert_array_equal(compiled(X), jitted(X))


def test_an_error_of_the_call_leaves_the_model_as_it_was():
    model = network()
    before = model.state_dict()
    compiled = nn.jit(lambda m, x: m(x), donate=0).lower(model, X).compile()
    with pytest.raises(TypeError):
        compiled(model, X[:2])
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    compiled(model, X)
    assert int(model[1].num_batches_tracked) == 1
