"""nn.capture(..., grads=True): gradients with respect to the outputs of submodules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.precision import in_float64

X = np.random.default_rng(0).standard_normal((6, 2, 8, 8)).astype(np.float32)
COTANGENT = np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)


def classifier(library: Any) -> Any:
    """A convolutional net with statistics; the same convolution is used twice."""

    class Net(library.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = library.nn.Conv2d(2, 4, 3, padding=1)
            self.body = library.nn.Sequential(
                library.nn.Conv2d(4, 4, 3, padding=1), library.nn.Tanh()
            )
            self.norm = library.nn.BatchNorm2d(4)
            self.head = library.nn.Linear(4, 5)

        def forward(self, x):
            x = self.body(self.norm(self.body(self.stem(x))))
            return self.head(x.mean((2, 3)))

    return Net()


class Ours:
    nn = nn


def twins() -> tuple[Any, Any]:
    """Return our net and torch's, with equal values."""
    torch.manual_seed(0)
    theirs = classifier(torch)
    ours = classifier(Ours)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    return ours, theirs


def of_torch(model: Any, names: list[str], x: Any = X, cotangent: Any = COTANGENT) -> Any:
    """Return the gradients with respect to the outputs of submodules, by name, by call."""
    outputs: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: (out.retain_grad(), outputs[name].append(out))[1]
        )
    out = model(torch.tensor(x, requires_grad=True))
    (out * torch.tensor(cotangent)).sum().backward()
    return {name: [y.grad.numpy() for y in ys] for name, ys in outputs.items()}


def assert_close(ours: dict, theirs: dict) -> None:
    """Compare gradients by name; several calls are a tuple."""
    assert ours.keys() == theirs.keys()
    for name, gradients in theirs.items():
        mine = ours[name] if isinstance(ours[name], tuple) else (ours[name],)
        assert len(mine) == len(gradients), name
        for a, b in zip(mine, gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)


NAMES = ["stem", "body", "body.0", "norm", "head"]


@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.long)])
def test_gradients_are_torchs_and_state_is_written_once(compiled):
    ours, theirs = twins()

    def step(model, x):
        out, outputs, backward = nn.capture(model, NAMES, grads=True)(x)
        return outputs, backward(jnp.asarray(COTANGENT))

    outputs, grads = (nn.jit(step) if compiled else step)(ours, jnp.asarray(X))
    assert_close(grads, of_torch(theirs, NAMES))
    assert isinstance(outputs["body"], tuple)
    assert jax.tree.map(jnp.shape, outputs) == jax.tree.map(jnp.shape, grads)
    for name, buffer in theirs.named_buffers():
        np.testing.assert_allclose(ours.get_buffer(name), buffer.numpy(), rtol=1e-5, atol=1e-6)
    assert int(ours.norm.num_batches_tracked) == 1


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def test_out_and_outputs_are_those_without_gradients():
    m = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    x = jnp.ones((4, 2))
    nn.manual_seed(3)
    out, outputs, _ = nn.capture(m, grads=True)(x)
    after = nn.get_rng_state()
    nn.manual_seed(3)
    plain, wanted = nn.capture(m)(x)
    np.testing.assert_array_equal(out, plain)
    np.testing.assert_array_equal(after, nn.get_rng_state())
    assert outputs.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(outputs[name], value)


def test_the_sign_of_zeros_survives():
    m = nn.Sequential(nn.Identity())
    out, outputs, _ = nn.capture(m, grads=True)(jnp.asarray([-0.0, 0.0]))
    assert np.signbit(out).tolist() == [True, False]
    assert np.signbit(outputs["0"]).tolist() == [True, False]


def test_backward_may_be_called_several_times_and_not_at_all():
    m = mlp()
    out, _, backward = nn.capture(m, "1", grads=True)(jnp.ones((4, 2)))
    once = backward(jnp.ones_like(out))["1"]
    np.testing.assert_allclose(backward(2 * jnp.ones_like(out))["1"], 2 * once)
    np.testing.assert_allclose(once, np.broadcast_to(np.asarray(m[2].weight), (4, 3)))


def test_vmap_over_tasks_is_a_loop_over_tasks():
    m = mlp()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 2)), jnp.float32)

    def of_task(x):
        out, outputs, backward = nn.capture(m, ["0", "1"], grads=True)(x)
        return backward(2 * out)

    together = jax.jit(jax.vmap(of_task))(x)
    for i in range(3):
        y = jnp.tanh(x[i] @ m[0].weight.T + m[0].bias)
        slope = 2 * (y @ m[2].weight.T + m[2].bias) @ m[2].weight.value
        np.testing.assert_allclose(together["1"][i], slope, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(together["0"][i], slope * (1 - y**2), rtol=1e-4, atol=1e-6)


def test_captured_gradients_are_differentiable():
    # The gradient of a penalty on the gradient at a hidden layer; torch's with create_graph.
    theirs = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    ours = mlp()
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    x = np.asarray([[0.3, -0.7], [1.0, 0.2]], np.float32)
    hidden = theirs[0](torch.tensor(x))
    out = theirs[2](theirs[1](hidden))
    (slope,) = torch.autograd.grad((out**3).sum(), hidden, create_graph=True)
    ((slope**2).sum() + out.sum()).backward()

    def penalty(model, x):
        out, _, backward = nn.capture(model, ["0"], grads=True)(x)
        return (backward(3 * out**2)["0"] ** 2).sum() + out.sum()

    grads = nn.jit(nn.grad(penalty))(ours, jnp.asarray(x))
    for name, p in theirs.named_parameters():
        np.testing.assert_allclose(grads[name], p.grad.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_pure_call_may_capture():
    m = mlp()

    class Saliency(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = m

        def forward(self, x):
            out, _, backward = nn.capture(self.model, ["1"], grads=True)(x)
            return backward(jnp.ones_like(out))["1"]

    fn, params = nn.functionalize(Saliency())
    doubled = jax.tree.map(lambda p: 2 * p, params)
    got = jax.jit(fn)(doubled, jnp.ones((4, 2)))
    np.testing.assert_allclose(got, np.broadcast_to(2 * np.asarray(m[2].weight), (4, 3)))


def test_forward_mode_may_differentiate_captured_gradients():
    m = mlp()

    def slope(x):
        out, _, backward = nn.capture(m, ["1"], grads=True)(x)
        return backward(out)["1"]

    x = jnp.asarray([0.3, -0.7])
    both = jax.jit(lambda x: (jax.jacfwd(slope)(x), jax.jacrev(slope)(x)))
    np.testing.assert_allclose(*both(x), rtol=1e-5, atol=1e-6)


class Mixed(nn.Module):
    def forward(self, x):
        return jnp.argmax(x, -1), (2 * x, None)


class Indices(nn.Module):
    def forward(self, x):
        return jnp.argmax(x, -1)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixed = Mixed()
        self.indices = Indices()
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        self.indices(x)
        i, (y, _) = self.mixed(x)
        return {"i": i, "y": 3 * y, "name": "around"}


def test_integers_have_no_gradient():
    out, outputs, backward = nn.capture(Around(), grads=True)(jnp.ones((4, 2)))
    assert out["name"] == "around"
    assert out["i"].dtype == jnp.int32
    assert set(outputs) == {"mixed", "indices"}
    grads = backward({"i": None, "y": jnp.ones((4, 2)), "name": None})
    assert set(grads) == {"mixed"}
    index, (y, nothing) = grads["mixed"]
    assert index is None and nothing is None
    np.testing.assert_array_equal(y, 3 * np.ones((4, 2)))


def test_a_cotangent_for_integers_is_ignored_and_none_is_zero():
    out, _, backward = nn.capture(Around(), "mixed", grads=True)(jnp.ones((4, 2)))
    y = lambda cotangent: np.asarray(backward(cotangent)["mixed"][1][0])
    np.testing.assert_array_equal(y(out), 3 * np.asarray(out["y"]))
    np.testing.assert_array_equal(y({"i": out["i"], "y": None, "name": ""}), np.zeros((4, 2)))


def test_packed_sequences():
    m = nn.Sequential(nn.LSTM(2, 3))
    packed = nn.utils.rnn.pack_padded_sequence(jnp.ones((4, 2, 2)), [4, 3])
    out, outputs, backward = nn.capture(m, "0", grads=True)(packed)
    grads = backward((out[0], None))["0"]
    np.testing.assert_array_equal(grads[0].data, out[0].data)
    assert not any(np.any(g) for g in jax.tree.leaves(grads[1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_gradients_have_the_dtype_of_the_outputs(dtype):
    with in_float64(dtype == "float64"):
        m = mlp().to(jnp.dtype(dtype))
        out, _, backward = nn.capture(m, "1", grads=True)(jnp.ones((1, 2), dtype))
        grads = backward(jnp.ones_like(out))
        assert grads["1"].dtype == dtype
        np.testing.assert_array_equal(grads["1"][0], m[2].weight[0])


def test_an_empty_batch():
    out, _, backward = nn.capture(mlp(), "1", grads=True)(jnp.ones((0, 2)))
    assert backward(out)["1"].shape == (0, 3)


def test_a_number_is_a_cotangent_of_a_scalar_of_any_dtype():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Identity()

        def forward(self, x):
            return self.part(x).sum()

    for dtype in ("float32", "bfloat16"):
        _, _, backward = nn.capture(Sum(), grads=True)(jnp.ones(3, dtype))
        np.testing.assert_array_equal(backward(2.0)["part"], 2 * jnp.ones(3, dtype))


# --------------------------------------------------------------------------------------------------
# Beside hooks


def test_hooks_fire_and_the_gradient_is_the_one_that_arrives():
    m = mlp()
    fired = []
    m[0].register_forward_hook(lambda m, args, out: out[:2])  # another shape than forward's
    m[1].register_full_backward_pre_hook(lambda m, go: (10 * go[0],))
    m[2].register_full_backward_hook(lambda m, gi, go: fired.append(gi[0].shape))
    out, outputs, backward = nn.capture(m, grads=True)(jnp.ones((4, 2)))
    grads = backward(jnp.ones_like(out))
    assert fired == [(2, 3)]
    w = np.broadcast_to(np.asarray(m[2].weight), (2, 3))
    np.testing.assert_allclose(grads["1"], w, rtol=1e-6)
    np.testing.assert_allclose(grads["0"], 10 * w * (1 - outputs["1"] ** 2), rtol=1e-5)


def test_it_leaves_the_module_as_it_was_also_after_an_error():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            self.norm(x)
            raise ValueError("later")

    m = Fails()
    before = nn.split(m)
    with pytest.raises(ValueError, match="later"):
        nn.capture(m, grads=True)(jnp.ones((3, 2)))
    after = nn.split(m)
    assert after[0] is before[0]
    assert all(a is b for a, b in zip(after[1], before[1], strict=True))
    seen = []
    m.norm.register_forward_hook(lambda *a: seen.append(1))
    m.norm(jnp.ones((3, 2)))
    assert seen == [1]


def test_forward_may_look_at_values():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(2, 2)
            self.register_buffer("calls", jnp.zeros((), jnp.int32))

        def forward(self, x):
            self.calls = self.calls + 1
            y = self.part(x)
            return 2 * y if float(x.sum()) > 0 else y

    m = Looks()
    out, _, backward = nn.capture(m, grads=True)(jnp.ones((1, 2)))
    np.testing.assert_array_equal(backward(jnp.ones_like(out))["part"], [[2.0, 2.0]])
    assert int(m.calls) == 1


def test_keyword_arguments_of_any_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Identity()

        def forward(self, x, module, names):
            return self.part(x) * module * names

    _, _, backward = nn.capture(Named(), grads=True)(jnp.ones(2), module=2.0, names=jnp.ones(2))
    np.testing.assert_array_equal(backward(jnp.ones(2))["part"], [2.0, 2.0])


def test_another_method_and_a_parameter_as_the_output():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(jnp.arange(3.0))

        def forward(self):
            return self.w

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = Weights()

        def energy(self, x):
            return (self.weights() * x).sum()

    x = jnp.asarray([1.0, 2.0, 3.0])
    out, outputs, backward = nn.capture(Uses(), "weights", method="energy", grads=True)(x)
    assert float(out) == 8.0
    np.testing.assert_array_equal(outputs["weights"], [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(backward(1.0)["weights"], x)


def test_compiled_capture_is_traced_once():
    m = mlp()
    step = nn.jit(lambda m, x: nn.capture(m, "1", grads=True)(x)[2](jnp.ones((4, 1))))
    for _ in range(3):
        step(m, jnp.ones((4, 2)))
    assert step.trace_count == 1


# --------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("cotangent", "error", "says"),
    [
        (np.ones((4, 2), np.float32), nn.errors.ShapeError, r"shape \(4, 2\)"),
        (1.0, nn.errors.ShapeError, r"shape \(\)"),
        (jnp.ones((4, 1), jnp.bfloat16), nn.errors.DtypeError, "dtype bfloat16"),
        (jnp.ones((4, 1), jnp.int32), nn.errors.DtypeError, "dtype int32"),
        ((jnp.ones((4, 1)),), TypeError, "type tuple"),
        ({"out": jnp.ones((4, 1))}, TypeError, "type dict"),
        ("ones", TypeError, "type str"),
    ],
    ids=["shape", "scalar", "dtype", "integers", "tuple", "dict", "text"],
)
def test_a_cotangent_that_does_not_fit_is_an_error(cotangent, error, says):
    _, _, backward = nn.capture(mlp(), "1", grads=True)(jnp.ones((4, 2)))
    with pytest.raises(error, match=f"{says}[\\s\\S]*Why: [\\s\\S]*Instead: "):
        backward(cotangent)


def test_a_cotangent_with_an_array_for_a_whole_tuple_is_an_error():
    m = nn.Sequential(nn.LSTM(2, 3))
    out, _, backward = nn.capture(m, grads=True)(jnp.ones((4, 1, 2)))
    with pytest.raises(TypeError, match="structure"):
        backward((out[0], out[0]))


def test_an_output_that_holds_a_module_is_an_error():
    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(2, 2)

        def forward(self, x):
            return self.part(x), self.part

    with pytest.raises(TypeError, match="module[\\s\\S]*Instead: "):
        nn.capture(Gives(), grads=True)(jnp.ones((1, 2)))


@pytest.mark.parametrize("names", [["nowhere"], [""], [], "0.weight"])
def test_unknown_names_are_an_error(names):
    with pytest.raises(nn.errors.UnknownNameError, match="'0', '1', '2'"):
        nn.capture(mlp(), names, grads=True)


def inside(transform):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer = nn.Linear(2, 2)
            self.part = nn.Tanh()

        def forward(self, x):
            return transform(self.part, self.outer(x))

    return Inside()


def step(carry, _):
    m, x = carry
    return (m, m(x)), None


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize(
    "transform",
    [
        lambda m, x: jax.vmap(lambda x: m(x))(x),
        lambda m, x: jax.checkpoint(lambda x: m(x))(x),
        lambda m, x: jax.lax.scan(lambda x, _: (m(x), None), x, None, 2)[0],
        lambda m, x: jax.grad(lambda x: m(x).sum())(x),
        lambda m, x: jax.jit(lambda x: m(x))(x),
        lambda m, x: nn.vmap(m)(x),
        lambda m, x: nn.remat(m)(x),
        lambda m, x: nn.jit(m)(x),
        lambda m, x: nn.scan(step, (m, x), length=2)[0][1],
    ],
    ids="vmap-checkpoint-scan-grad-jit-nn.vmap-nn.remat-nn.jit-nn.scan".split("-"),
)
def test_a_submodule_inside_an_inner_transformation_is_an_error(transform, grads):
    with pytest.raises(nn.errors.TraceLeakError, match="'part'[\\s\\S]*Why: [\\s\\S]*Instead: "):
        nn.capture(inside(transform), ["part"], grads=grads)(jnp.ones((3, 2)))


def test_names_outside_of_it_are_captured_through_an_inner_transformation():
    m = inside(lambda m, x: jax.vmap(lambda x: m(x))(x))
    out, outputs, backward = nn.capture(m, ["outer"], grads=True)(jnp.ones((3, 2)))
    grads = backward(jnp.ones_like(out))
    np.testing.assert_allclose(grads["outer"], 1 - np.tanh(outputs["outer"]) ** 2, rtol=1e-5)


def test_a_read_only_clone_refuses_the_state_that_would_be_lost():
    m = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(nn.errors.StateWriteError):
        jax.jit(lambda m, x: nn.capture(m, grads=True)(x)[0])(m, jnp.ones((3, 2)))
    with pytest.raises(nn.errors.TraceLeakError):
        jax.jit(lambda x: nn.capture(m, grads=True)(x)[0])(jnp.ones((3, 2)))


def test_random_numbers_are_refused_where_all_lanes_would_get_the_same():
    m = nn.Sequential(nn.Dropout(0.5))
    with pytest.raises(nn.errors.MissingRngError):
        jax.vmap(lambda x: nn.capture(m, grads=True)(x)[0])(jnp.ones((2, 8)))
