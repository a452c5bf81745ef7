"""NNX modules as ours and ours as NNX's; NNX's own calls are the oracle."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statefulnn as nn
from statefulnn.bridge.flax import from_nnx, nnx_module, to_nnx

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
KEY = jax.random.key(3)


class Counter(nnx.Variable):
    """A Variable of the user's own type."""


class Net(nnx.Module):
    """Lists, a layer under two names, a tied kernel, statistics, draws and a counter."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.noise = nnx.Dropout(0.2, rngs=rngs)
        self.tied = self.layers[0].kernel
        self.shared = self.layers[1]
        self.calls = Counter(jnp.zeros((), jnp.int32))
        self.width = 4

    def __call__(self, x):
        self.calls.set_value(self.calls.get_value() + 1)
        x = self.drop(self.norm(self.layers[0](x)))
        return self.noise(self.shared(self.layers[1](x))) @ self.tied.get_value()


def seeded(module: Net, key) -> Net:
    """Give the streams of a module the keys that the bridge gives them."""
    for i, (path, _) in enumerate(nnx.to_flat_state(nnx.state(module, nnx.RngKey))):
        stream = module
        for part in path[:-1]:
            stream = getattr(stream, part)
        stream.key.set_value(jax.random.fold_in(key, i))
        stream.count.set_value(jnp.zeros_like(stream.count.get_value()))
    return module


def net() -> Net:
    return Net(nnx.Rngs(0))


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a, b)


def values(module, kind):
    return nnx.to_pure_dict(nnx.state(module, kind))


# --------------------------------------------------------------------------------------------------
# NNX's modules as ours


def test_params_are_parameters_other_variables_are_buffers_and_streams_are_neither():
    model = from_nnx(net())
    # What is in several places has the first of its names in alphabetical order.
    assert {n for n, _ in model.named_parameters()} == {
        *(f"layers.{i}.{n}" for i in (0, 1) for n in ("kernel", "bias")),
        *("norm.bias", "norm.scale"),
    }
    assert {n for n, _ in model.named_buffers()} == {"norm.mean", "norm.var", "calls"}


def test_outputs_and_state_are_nnx_s_with_the_same_keys():
    module = net()
    model = from_nnx(module)
    step = nn.jit(model)
    for key in jax.random.split(KEY, 3):
        expected = seeded(module, key)(X)
        same(step(X, rng=key), expected)
        same(values(nnx_module(model), nnx.BatchStat), values(module, nnx.BatchStat))
    assert step.trace_count == 1 and int(model.calls) == 3
    model.eval(), module.eval()
    same(model(X), module(X))


def test_training_gives_the_losses_of_nnx_s_own_loop():
    module = net()
    model = from_nnx(module)
    tx = optax.sgd(0.05, momentum=0.9)
    optimizer, theirs = nn.Optimizer(model, tx), nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nn.jit
    def step(model, optimizer, key):
        value, grads = nn.value_and_grad(lambda m: (m(X, rng=key) ** 2).mean())(model)
        optimizer.step(grads)
        return value

    @nnx.jit
    def their_step(module, optimizer):
        value, grads = nnx.value_and_grad(lambda m: (m(X) ** 2).mean())(module)
        optimizer.update(module, grads)
        return value

    for key in jax.random.split(KEY, 5):
        expected = their_step(seeded(module, key), theirs)
        np.testing.assert_allclose(float(step(model, optimizer, key)), float(expected), rtol=1e-5)
    assert step.trace_count == 1
    same(values(nnx_module(model), nnx.Param), values(module, nnx.Param))


def test_the_module_itself_is_not_touched():
    module = net()
    before = jax.tree.leaves(nnx.state(module))
    model = from_nnx(module)
    model(X)
    model.eval()(X)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(module)), strict=True))
    assert module.drop.deterministic is False


def test_train_and_eval_are_nnx_s_and_compile_once_each():
    model = from_nnx(net())
    step = nn.jit(model)
    for _ in range(2):
        step(X)
        step(X)
        model.eval()
        assert (step(X) == step(X)).all() and nnx_module(model).drop.deterministic
        model.train()
    assert step.trace_count == 2
    module = net()
    module.eval()
    assert from_nnx(module).training is False
    module.drop.deterministic = False  # one part in another mode stays so
    assert (np.asarray(from_nnx(module)(X)) != np.asarray(from_nnx(module).eval()(X))).any()


def test_an_argument_that_says_the_mode_follows_it():
    class Asked(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs

        def __call__(self, x, *, train):
            return x + jax.random.normal(self.rngs(), x.shape) if train else x

    model = from_nnx(Asked(nnx.Rngs(0)))
    assert (np.asarray(model(X)) != X).any()
    assert (np.asarray(model.eval()(X)) == X).all()


def test_masks_advance_and_pure_calls_take_a_key():
    model = from_nnx(net())
    step = nn.jit(model)
    assert (step(X) != step(X)).any()
    fn, params, state = nn.functionalize(model, mutable=True)
    a, b = fn(params, state, X, rng=KEY)[0], fn(params, state, X, rng=KEY)[0]
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    with pytest.raises(nn.MissingRngError, match="(?s)Net drew random numbers.*Rngs.*rng=key"):
        fn(params, state, X)
    with pytest.raises(nn.StateWriteError, match="calls|norm.mean"):
        nn.functional_call(model, {}, X, rng=KEY)


def test_a_module_without_streams_leaves_the_generator_alone():
    module = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    model = from_nnx(module)
    before = np.asarray(nn.get_rng_state())
    same(jax.jit(model)(X), module(X))
    np.testing.assert_array_equal(np.asarray(nn.get_rng_state()), before)
    ours = nn.grad(lambda m: (m(X) ** 2).sum())(model)
    theirs = nnx.grad(lambda m: (m(X) ** 2).sum())(module)
    same(ours["kernel"], theirs["kernel"].get_value())


def test_a_filter_says_what_trains():
    class Adapter(nnx.Variable):
        pass

    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.base = nnx.Linear(4, 4, rngs=rngs)
            self.scale = Adapter(jnp.ones(4))

        def __call__(self, x):
            return self.base(x) * self.scale.get_value()

    model = from_nnx(Adapted(nnx.Rngs(0)), params=Adapter)
    assert [n for n, _ in model.named_parameters()] == ["scale"]
    assert nn.grad(lambda m: m(X).sum())(model).keys() == {"scale"}


def test_raw_arrays_and_variables_of_trees_are_buffers():
    class Odd(nnx.Module):
        def __init__(self):
            self.tree = Counter({"a": jnp.ones(4), "b": [jnp.zeros(4)]})
            self.array = jnp.ones(4)

        def __call__(self, x):
            tree = self.tree.get_value()
            return x * tree["a"] + tree["b"][0] + self.array

    model = from_nnx(Odd())
    assert set(model.state_dict()) == {"tree.a", "tree.b.0", "array"}
    same(model(X), X + 1)


@pytest.mark.parametrize(
    "body, error, says",
    [
        (lambda m: setattr(m, "width", 5), nn.StructureChangeError, "changed more than the values"),
        (
            lambda m: setattr(m, "new", nnx.Param(jnp.ones(2))),
            nn.StructureChangeError,
            "a new Variable",
        ),
        (
            lambda m: m.w.set_value(m.w.get_value() + 1),
            nn.StateWriteError,
            "changed a parameter.*params=",
        ),
    ],
)
def test_changes_that_a_pure_function_cannot_give_back_are_errors(body, error, says):
    class Changes(nnx.Module):
        def __init__(self):
            self.w, self.width = nnx.Param(jnp.ones(2)), 4

        def __call__(self, x):
            body(self)
            return x

    model = from_nnx(Changes())
    with pytest.raises(error, match=f"(?s){says}"):
        model(X)
    with pytest.raises(error):
        nn.jit(model)(X)
    assert float(model.w[0]) == 1 and nnx_module(model).width == 4


def test_a_module_without_modes_may_not_change_or_draw_in_evaluation():
    class Counts(nnx.Module):
        def __init__(self):
            self.calls = Counter(jnp.zeros(()))

        def __call__(self, x):
            self.calls.set_value(self.calls.get_value() + 1)
            return x

    model = from_nnx(Counts())
    model(X)
    with pytest.raises(nn.StateWriteError, match="(?s)Counts changed.*evaluation.*mode=None"):
        model.eval()(X)
    always = from_nnx(Counts(), mode=None).eval()
    always(X)
    assert int(always.calls) == 1

    class Draws(nnx.Module):
        def __init__(self):
            self.rngs = nnx.Rngs(0)

        def __call__(self, x):
            return x + jax.random.normal(self.rngs(), x.shape)

    with pytest.raises(nn.MissingRngError, match="(?s)Draws drew.*evaluation mode"):
        from_nnx(Draws()).eval()(X)


def test_intermediates_are_dropped():
    class Sows(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(4))

        def __call__(self, x):
            self.kept = nnx.Intermediate(x)
            return x * self.w.get_value()

    model = from_nnx(Sows())
    model(X)
    assert set(model.state_dict()) == {"w"}


def test_a_copy_shares_compiled_code_and_files_keep_the_values(tmp_path):
    model = from_nnx(net()).eval()
    twin = copy.deepcopy(model)
    step = nn.jit(lambda m, x: m(x))
    same(step(model, X), step(twin, X))
    assert step.trace_count == 1
    nn.save(model, tmp_path / "net.safetensors")
    other = from_nnx(Net(nnx.Rngs(9))).eval()
    other.load_state_dict(nn.load(tmp_path / "net.safetensors"))
    # Both called twice: the counter is state.
    assert int(other.calls) == int(model.calls)
    same(step(other, X), step(model, X))


def test_modules_that_were_built_alike_share_compiled_code_and_stack():
    models = [from_nnx(Net(nnx.Rngs(i))).eval() for i in range(2)]
    step = nn.jit(lambda m, x: m(x))
    outs = [step(m, X) for m in models]
    assert step.trace_count == 1 and (outs[0] != outs[1]).any()


def test_streams_that_were_split_keep_their_shape():
    class Many(nnx.Module):
        def __init__(self, rngs):
            self.streams = nnx.Rngs(0).split(3)

        def __call__(self, x):
            keys = nnx.vmap(lambda rngs: rngs.default())(self.streams)
            return x + jax.vmap(lambda k: jax.random.normal(k, x.shape))(keys).sum(0)

    model = from_nnx(Many(nnx.Rngs(0)))
    step = nn.jit(model)
    assert (step(X) != step(X)).any()


def test_wrong_arguments_are_told():
    with pytest.raises(TypeError, match="(?s)from_nnx with an object of type Linear.*from_linen"):
        from_nnx(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="nnx_module with an object of type Linear"):
        nnx_module(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="to_nnx with an object of type Net"):
        to_nnx(net())


# --------------------------------------------------------------------------------------------------
# Our modules as NNX's


def ours() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[2].bias.requires_grad_(False)
    return model


def test_nnx_trains_it_as_we_do():
    mine = ours()
    module = to_nnx(mine)
    tx = optax.sgd(0.1)
    optimizer, theirs = nn.Optimizer(mine, tx), nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nn.jit
    def step(model, optimizer):
        value, grads = nn.value_and_grad(lambda m: (m(X) ** 2).mean())(model)
        optimizer.step(grads)
        return value

    @nnx.jit
    def their_step(module, optimizer):
        value, grads = nnx.value_and_grad(lambda m: (m(X) ** 2).mean())(module)
        optimizer.update(module, grads)
        return value

    for _ in range(4):
        value = their_step(module, theirs)
        np.testing.assert_allclose(float(step(mine, optimizer)), float(value), rtol=1e-5)
    norm = getattr(module, "1")
    assert isinstance(norm.running_mean, nnx.BatchStat) and isinstance(norm.weight, nnx.Param)
    assert not isinstance(getattr(module, "2").bias, nnx.Param)
    same(norm.running_mean.get_value(), np.asarray(mine[1].running_mean))
    module.eval(), mine.eval()
    same(module(X), mine(X))


def test_keys_come_from_rngs_or_the_call():
    module = to_nnx(nn.Dropout(0.5), rngs=nnx.Rngs(0))
    call = nnx.jit(lambda m: m(X))
    assert (call(module) != call(module)).any()
    with pytest.raises(nn.MissingRngError):
        to_nnx(nn.Dropout(0.5))(X)
    same(to_nnx(nn.Dropout(0.5))(X, rng=KEY), nn.functional_call(nn.Dropout(0.5), {}, X, rng=KEY))


def test_names_that_nnx_needs_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.perturb = nn.Linear(1, 1)

    with pytest.raises(nn.RegistrationError, match="(?s)'perturb.weight'.*'perturb' already"):
        to_nnx(Odd())


def test_there_and_back():
    mine = ours()
    back = from_nnx(to_nnx(mine))
    assert set(back.state_dict()) == set(mine.state_dict())
    for model in (mine, back):
        model(X)
        model.eval()
    same(back(X), mine(X))
    theirs = from_nnx(net()).eval()
    again = to_nnx(theirs)
    same(again(X), theirs(X))
