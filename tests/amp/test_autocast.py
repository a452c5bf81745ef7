"""nn.amp.autocast as a block, as a decorator, and what compiled code and gradients see of it."""

from __future__ import annotations

import inspect
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
import statefulnn.functional as F
from tests.precision import in_float64

LOW, WIDE = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
EPS = float(jnp.finfo(jnp.bfloat16).eps)
x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


def dtype_here() -> np.dtype:
    return F.linear(x, jnp.ones((2, 3))).dtype


def test_a_block_ends_and_an_inner_one_switches_it_off_and_changes_it():
    with nn.amp.autocast():
        assert dtype_here() == LOW
        with nn.amp.autocast(enabled=False):
            assert dtype_here() == WIDE
            with nn.amp.autocast(jnp.float16):
                assert dtype_here() == jnp.float16
        assert dtype_here() == LOW
    assert dtype_here() == WIDE


def test_one_object_opens_several_blocks():
    block = nn.amp.autocast()
    with block:
        with block:
            assert dtype_here() == LOW
        assert dtype_here() == LOW
    assert dtype_here() == WIDE


def test_an_exception_closes_the_block():
    with pytest.raises(ZeroDivisionError), nn.amp.autocast():
        1 / 0
    assert dtype_here() == WIDE

    @nn.amp.autocast()
    def fails():
        F.linear(x, jnp.ones((2, 5)))

    with pytest.raises(nn.ShapeError):
        fails()
    assert dtype_here() == WIDE


def test_it_holds_for_one_thread():
    block, met = nn.amp.autocast(), []
    entered, seen = threading.Event(), threading.Event()

    def other() -> None:
        met.append(dtype_here())
        with block:
            entered.set()
            seen.wait()
            met.append(dtype_here())
        met.append(dtype_here())

    with block:
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
    here = dtype_here()
    seen.set()
    thread.join()
    assert met == [WIDE, LOW, WIDE]
    assert here == WIDE


def test_a_decorated_function_and_a_decorated_forward_run_in_a_block():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        @nn.amp.autocast()
        def forward(self, x):
            return self.fc(x)

    @nn.amp.autocast(jnp.float16)
    def named() -> np.dtype:
        return dtype_here()

    assert named() == jnp.float16
    assert named.__name__ == "named"
    assert Net()(x).dtype == LOW
    assert nn.jit(Net())(x).dtype == LOW


@pytest.mark.parametrize("compiled", [nn.jit, jax.jit], ids=["nn.jit", "jax.jit"])
def test_compiled_code_sees_a_change_and_is_compiled_once_for_each(compiled):
    traces = []

    @compiled
    def forward(model, x):
        traces.append(None)
        return model(x)

    model = nn.Linear(3, 2)
    for _ in range(3):
        assert forward(model, x).dtype == WIDE
        with nn.amp.autocast():
            assert forward(model, x).dtype == LOW
    assert len(traces) == 2


def test_casts_are_part_of_the_traced_code_one_for_each_array():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def by_hand(params, x):
        low = {name: p.astype(LOW) for name, p in params.items()}
        h = jnp.tanh(x.astype(LOW) @ low["0.weight"].T + low["0.bias"])
        return h @ low["2.weight"].T + low["2.bias"]

    call, params = nn.functionalize(model)
    with nn.amp.autocast():
        found = jax.jit(jax.vjp, static_argnums=0).lower(call, params, x).as_text()
    expected = jax.jit(jax.vjp, static_argnums=0).lower(by_hand, params, x).as_text()
    assert found.count("stablehlo.convert") == expected.count("stablehlo.convert") > 0


def test_without_a_block_the_traced_code_is_that_of_the_function_itself():
    expected = str(jax.make_jaxpr(F.mse_loss.__wrapped__)(x, x))
    assert str(jax.make_jaxpr(F.mse_loss)(x, x)) == expected
    with nn.amp.autocast(enabled=False):
        assert str(jax.make_jaxpr(F.mse_loss)(x, x)) == expected


def torch_net() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False),  # which the norm would take out again
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 16, 8),
        torch.nn.LayerNorm(8),
        torch.nn.Linear(8, 5),
    )


def our_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 5),
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nn.jit"])
def test_loss_gradients_and_state_of_a_step_are_those_of_torch(compiled):
    torch.manual_seed(0)
    theirs, ours = torch_net(), our_net()
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    images = np.random.default_rng(1).normal(size=(8, 3, 6, 6)).astype(np.float32)
    labels = np.arange(8) % 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.nn.functional.cross_entropy(
            theirs(torch.as_tensor(images)), torch.as_tensor(labels)
        )
    expected.backward()

    def step(model, images):
        def loss_fn(model):
            with nn.amp.autocast():
                return F.cross_entropy(model(images), labels)

        return nn.value_and_grad(loss_fn)(model)

    loss, grads = (nn.jit(step) if compiled else step)(ours, jnp.asarray(images))
    assert loss.dtype == WIDE
    # Seven layers, each of which rounds what goes through it, there and back.
    np.testing.assert_allclose(float(loss), expected.item(), rtol=7 * EPS)
    for name, p in theirs.named_parameters():
        assert grads[name].dtype == WIDE
        size = float(p.grad.abs().max())
        np.testing.assert_allclose(grads[name], p.grad.numpy(), rtol=0, atol=14 * EPS * size)
    for name, buffer in theirs.named_buffers():
        found = ours.get_buffer(name)
        assert str(found.dtype) == str(buffer.dtype)[6:].replace("int64", "int32")
        np.testing.assert_allclose(found, buffer.numpy(), rtol=4 * EPS, atol=EPS)


LAYERS = {
    "RNN": ((3, 4), (5, 2, 3)),
    "LSTM": ((3, 4), (5, 2, 3)),
    "GRU": ((3, 4), (5, 2, 3)),
    "RNNCell": ((3, 4), (2, 3)),
    "LSTMCell": ((3, 4), (2, 3)),
    "GRUCell": ((3, 4), (2, 3)),
    "ConvTranspose1d": ((3, 4, 3), (2, 3, 6)),
    "Conv1d": ((3, 4, 3), (2, 3, 6)),
    "PReLU": ((3,), (2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_run_low_give_what_torch_gives_in_bfloat16(name):
    sizes, shape = LAYERS[name]
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*sizes)
    ours = getattr(nn, name)(*sizes)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    given = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = theirs.bfloat16()(torch.as_tensor(given).bfloat16())
    with nn.amp.autocast():
        found = ours(jnp.asarray(given))
    for a, b in zip(jax.tree.leaves(found), flattened(expected), strict=True):
        assert a.dtype == LOW
        size = float(b.detach().float().abs().max())
        # A state is rounded after each of five steps in torch, and here too.
        np.testing.assert_allclose(
            np.asarray(a, np.float32), b.detach().float().numpy(), rtol=0, atol=8 * EPS * size
        )


def flattened(out):
    return [out] if isinstance(out, torch.Tensor) else [t for part in out for t in flattened(part)]


def test_a_state_in_float32_enters_a_recurrent_layer_in_low_precision():
    layer, state = nn.LSTM(3, 4), (jnp.ones((1, 2, 4)), jnp.ones((1, 2, 4)))
    with nn.amp.autocast():
        out, (h, c) = layer(jnp.ones((5, 2, 3)), state)
    assert {out.dtype, h.dtype, c.dtype} == {LOW}
    assert (
        nn.grad(lambda m: m(jnp.ones((5, 2, 3)), state)[0].sum())(layer)["weight_hh_l0"].dtype
        == WIDE
    )


def test_attention_runs_low_and_shares_the_projection_of_one_input():
    attention, given = nn.MultiheadAttention(8, 2), jnp.ones((3, 2, 8))
    with nn.amp.autocast():
        out, weights = attention(given, given, given)
        low = jax.jit(lambda m, g: m(g, g, g)[0]).lower(attention, given).as_text()
    wide = jax.jit(lambda m, g: m(g, g, g)[0]).lower(attention, given).as_text()
    assert out.dtype == weights.dtype == LOW
    assert low.count("stablehlo.dot_general") == wide.count("stablehlo.dot_general")


@pytest.mark.parametrize("options", [None, nn.LinearCrossEntropyOptions(batch_chunk_size=2)])
@pytest.mark.parametrize("dtype", [LOW, WIDE], ids=str)
def test_a_linear_cross_entropy_multiplies_low_and_sums_in_float32(dtype, options):
    table, target, weight = jnp.asarray(np.eye(5, 3), WIDE), jnp.arange(4), jnp.arange(1.0, 6.0)
    given = torch.as_tensor(x.tolist()).to(torch.bfloat16 if dtype == LOW else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.nn.functional.linear_cross_entropy(
            given,
            torch.as_tensor(table.tolist()),
            torch.as_tensor(target.tolist()),
            weight=torch.as_tensor(weight.tolist()),
        )
    with nn.amp.autocast():
        found = F.linear_cross_entropy(
            x.astype(dtype), table, target, weight=weight, options=options
        )
    assert found.dtype == WIDE
    # The table holds ones and zeros, so that products are exact: only the loss's own sums differ.
    np.testing.assert_allclose(float(found), expected.item(), rtol=1e-6)


def test_an_adaptive_softmax_takes_low_inputs_and_gives_float32():
    layer = nn.AdaptiveLogSoftmaxWithLoss(3, 6, [2, 4])
    target = jnp.asarray([0, 2, 4, 5])
    low = x.astype(LOW)
    with nn.amp.autocast():
        out, loss = layer(low, target)
    expected, mean = layer(low.astype(WIDE), target)
    assert out.dtype == loss.dtype == WIDE
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(loss, mean)


def test_float64_is_left_as_it_is_as_in_torch():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear = torch.nn.functional.linear(torch.ones(4, 3).double(), torch.ones(2, 3).double())
        softmax = torch.nn.functional.cross_entropy(
            torch.ones(4, 3).double(), torch.zeros(4).long()
        )
    with in_float64(), nn.amp.autocast():
        wide = jnp.ones((4, 3), jnp.float64)
        assert str(F.linear(wide, jnp.ones((2, 3), jnp.float64)).dtype) == str(linear.dtype)[6:]
        assert str(F.cross_entropy(wide, jnp.zeros(4, int)).dtype) == str(softmax.dtype)[6:]


def test_float64_beside_float32_raises_as_it_does_in_torch():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="same dtype"),
    ):
        torch.nn.functional.linear(torch.ones(4, 3).double(), torch.ones(2, 3))
    with in_float64(), nn.amp.autocast(), pytest.raises(nn.DtypeError, match="float64"):
        F.linear(jnp.ones((4, 3), jnp.float64), jnp.ones((2, 3), jnp.float32))


def test_integers_booleans_and_numpy_arrays_are_taken():
    with nn.amp.autocast():
        assert F.linear(np.ones((4, 3), np.float32), np.ones((2, 3), np.float32)).dtype == LOW
        q = jnp.ones((1, 2, 4, 8))
        mask = jnp.tril(jnp.ones((4, 4), bool))
        assert F.scaled_dot_product_attention(q, q, q, mask).dtype == LOW
        assert F.embedding(jnp.arange(3), jnp.ones((4, 2))).dtype == WIDE


def test_a_transform_inside_of_a_block_sees_it():
    model = nn.Linear(3, 2)
    with nn.amp.autocast():
        assert nn.remat(model)(x).dtype == LOW
        assert nn.vmap(lambda m, row: m(row), in_axes=(None, 0))(model, x).dtype == LOW
        out = nn.scan(lambda carry, row: (carry, model(row)), 0, x)[1]
    assert out.dtype == LOW


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32, jnp.float64, bool], ids=str)
def test_another_dtype_is_refused_with_what_to_write(dtype):
    with pytest.raises(nn.DtypeError) as error:
        nn.amp.autocast(dtype)
    assert "nn.amp.autocast(jnp.bfloat16)" in str(error.value)
    assert "enabled=False" in str(error.value)


def test_a_device_and_a_decorated_module_are_refused():
    with pytest.raises(nn.ArgumentError, match=r"nn.amp.autocast\(jnp.bfloat16\)"):
        nn.amp.autocast("cuda")
    with pytest.raises(nn.ArgumentError, match=r"with nn.amp.autocast\(\): model\(x\)"):
        nn.amp.autocast()(nn.Linear(2, 2))


def test_a_transformer_layer_is_that_of_torch():
    torch.manual_seed(0)
    theirs = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    ours = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    given = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    mask = np.triu(np.full((5, 5), -np.inf, np.float32), 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = theirs(torch.as_tensor(given), torch.as_tensor(mask)).float().detach().numpy()
    # The sums of residuals are JAX's own, which promotes as torch does unless it is told not to.
    with nn.amp.autocast(), jax.numpy_dtype_promotion("standard"):
        found = ours(jnp.asarray(given), jnp.asarray(mask))
    assert found.dtype == WIDE
    # Two norms with numbers up to 3 come behind each other; torch's own results are low on CPU.
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 * EPS)


def test_values_are_still_looked_at():
    with nn.amp.autocast(), pytest.raises(IndexError):
        F.cross_entropy(x, jnp.asarray([0, 1, 2, 3]))


def test_a_function_with_a_rule_is_pickled_by_its_name_and_has_its_own_signature():
    assert pickle.loads(pickle.dumps(F.softplus)) is F.softplus
    assert inspect.signature(F.softmax) == inspect.signature(F.softmax.__wrapped__)
    with pytest.raises(TypeError, match="unexpected keyword argument 'axis'"):
        F.softmax(x, axis=1)


def test_a_warning_points_at_the_line_of_the_user():
    with pytest.warns(UserWarning, match="Implicit dimension") as found:
        F.softmax(x)
    assert found[0].filename == __file__
    with nn.amp.autocast(), pytest.warns(UserWarning, match="Implicit dimension") as found:
        F.softmax(x)
    assert found[0].filename == __file__


def test_casts_of_layers_are_traced_with_them_once_for_each_shape():
    model = nn.Sequential(
        *(layer for _ in range(5) for layer in (nn.Linear(3, 3), nn.LayerNorm(3)))
    )
    call, params = nn.functionalize(model)
    with nn.amp.autocast():
        traced = jax.make_jaxpr(call)(params, x)
    # At the top there are calls of the layers' functions alone; equal ones are one.
    assert {e.primitive.name for e in traced.eqns} == {"jit"}
    assert len(traced.eqns) == 10
    assert len({id(e.params["jaxpr"]) for e in traced.eqns}) == 2


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("cuda", jnp.bfloat16), {}),
        (("cuda:0",), {"dtype": jnp.float16}),
        ((), {"device_type": "cpu"}),
    ],
)
def test_the_device_that_torch_wants_first_is_left_out(given, named):
    with pytest.raises(
        nn.ArgumentError, match=r"(?s)given a device.*nn.amp.autocast\(jnp.bfloat16\)"
    ):
        nn.amp.autocast(*given, **named)
