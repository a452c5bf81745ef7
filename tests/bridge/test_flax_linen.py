"""Linen modules as ours and ours as Linen's; Flax's own init and apply are the oracle."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import statefulnn as nn
from statefulnn import bridge
from statefulnn.bridge.flax import from_linen, linen_variables, to_linen

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
KEY = jax.random.key(3)


class Net(linen.Module):
    """Parameters, statistics and draws; `train` says the mode."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(5)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(2)(x)


@functools.cache
def variables_of_net():
    return Net().init(jax.random.key(0), X, train=False)


def bridged(**options) -> nn.Module:
    return from_linen(Net(), variables_of_net(), **options)


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a, b)


# --------------------------------------------------------------------------------------------------
# Linen's modules as ours


def test_parameters_have_linen_s_names_and_the_other_collections_are_buffers():
    model = bridged()
    assert [n for n, _ in model.named_parameters()] == [
        *("Dense_0.kernel", "Dense_0.bias", "BatchNorm_0.scale", "BatchNorm_0.bias"),
        *("Dense_1.kernel", "Dense_1.bias"),
    ]
    assert [n for n, _ in model.named_buffers()] == ["BatchNorm_0.mean", "BatchNorm_0.var"]
    assert model.Dense_0.kernel.shape == (4, 5)


@pytest.mark.parametrize("key", [jax.random.PRNGKey(7), 7])
def test_a_key_initialises_as_init_does(key):
    model = from_linen(Net(), key, X)
    same(linen_variables(model), Net().init(jax.random.key(7), X, train=False))


@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_and_state_are_those_of_apply_with_the_same_keys(compiled):
    model, variables = bridged(), variables_of_net()
    call = nn.jit(model) if compiled else model
    for key in jax.random.split(KEY, 3):
        expected, new = Net().apply(
            variables, X, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        same(call(X, rng=key), expected)
        variables = {**variables, **new}
        same(linen_variables(model), variables)
    model.eval()
    same(call(X), Net().apply(variables, X, train=False))


def test_training_gives_the_losses_of_flax_s_own_loop():
    model = bridged()
    y = jnp.ones((6, 2))
    optimizer = nn.Optimizer(model, optax.sgd(0.1, momentum=0.9))
    tx = optax.sgd(0.1, momentum=0.9)

    @nn.jit
    def ours(model, optimizer, key):
        value, grads = nn.value_and_grad(lambda m: ((m(X, rng=key) - y) ** 2).mean())(model)
        optimizer.step(grads)
        return value

    @jax.jit
    def theirs(variables, opt_state, key):
        def loss(params):
            out, new = Net().apply(
                {**variables, "params": params},
                X,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return ((out - y) ** 2).mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return value, {"params": params, **new}, opt_state

    variables, opt_state = variables_of_net(), tx.init(variables_of_net()["params"])
    for key in jax.random.split(KEY, 6):
        value, variables, opt_state = theirs(variables, opt_state, key)
        np.testing.assert_allclose(float(ours(model, optimizer, key)), float(value), rtol=1e-5)
    assert ours.trace_count == 1
    same(linen_variables(model), variables)


def files_entered(call):
    """Return the files of the Python functions that a call enters."""
    files = set()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, arg: files.add(frame.f_code.co_filename))
    try:
        call()
    finally:
        sys.setprofile(before)
    return files


def test_compiled_calls_enter_neither_the_bridge_nor_flax():
    folders = tuple(os.path.dirname(module.__file__) for module in (flax, bridge))

    def foreign(call):
        return [file for file in files_entered(call) if file.startswith(folders)]

    model = bridged()
    step = nn.jit(model)
    assert foreign(lambda: step(X))  # compiling does
    assert not foreign(lambda: [step(X) for _ in range(3)])
    assert step.trace_count == 1


def test_masks_advance_in_compiled_calls_and_follow_the_seed():
    model = bridged()
    step = nn.jit(model)
    nn.manual_seed(0)
    first, second = step(X), step(X)
    assert (first != second).any()
    model = bridged()
    nn.manual_seed(0)
    np.testing.assert_array_equal(np.asarray(nn.jit(model)(X)), np.asarray(first))


def test_pure_calls_take_a_key_and_give_back_the_state():
    model = bridged()
    fn, params, state = nn.functionalize(model, mutable=True)
    out, new = fn(params, state, X, rng=KEY)
    again, _ = fn(params, state, X, rng=KEY)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(again))
    assert (new["BatchNorm_0.mean"] != state["BatchNorm_0.mean"]).any()
    assert (model.BatchNorm_0.mean == state["BatchNorm_0.mean"]).all()
    with pytest.raises(nn.StateWriteError, match="BatchNorm_0.mean"):
        nn.functional_call(model, {}, X, rng=KEY)
    with pytest.raises(nn.MissingRngError, match="(?s)Net drew random numbers.*dropout.*rng=key"):
        fn(params, state, X)
    model.eval()
    pure, params = nn.functionalize(model)
    per_example = jax.vmap(jax.grad(lambda p, x: pure(p, x[None]).sum()), (None, 0))(params, X)
    assert per_example["Dense_0.kernel"].shape == (6, 4, 5)


def test_lanes_of_nn_vmap_draw_different_masks():
    model = from_linen(linen.Dropout(0.5), {})
    out = nn.vmap(model, in_axes=None, axis_size=2)(jnp.ones(64))
    assert (out[0] != out[1]).any()


def test_a_copy_is_a_model_of_its_own_that_shares_compiled_code(tmp_path):
    model = bridged().eval()
    twin = copy.deepcopy(model)
    step = nn.jit(lambda m, x: m(x))
    same(step(model, X), step(twin, X))
    assert step.trace_count == 1
    with_zeros = {n: jnp.zeros_like(v) for n, v in model.state_dict().items()}
    twin.load_state_dict(with_zeros)
    assert (np.asarray(model.Dense_0.kernel) != 0).any()
    nn.save(model, tmp_path / "net.safetensors")
    twin.load_state_dict(nn.load(tmp_path / "net.safetensors"))
    same(twin(X), model(X))


# --------------------------------------------------------------------------------------------------
# The mode


def asking(name: str, training: bool) -> linen.Module:
    """Return a dropout with an argument of a name, which is `training` in training mode."""
    code = f"""
class Asked(linen.Module):
    @linen.compact
    def __call__(self, x, {name}=None):
        return linen.Dropout(0.5)(x, deterministic={name} is not {training})
"""
    scope = {"linen": linen, "__name__": __name__}
    exec(code, scope)
    return scope["Asked"]()


@pytest.mark.parametrize(
    "name, training",
    [("train", True), ("training", True), ("is_training", True)]
    + [("deterministic", False), ("use_running_average", False), ("inference", False)],
)
def test_the_argument_that_says_the_mode_follows_train_and_eval(name, training):
    module = asking(name, training)
    model = from_linen(module, {})
    expected = module.apply({}, X, rngs={"dropout": KEY}, **{name: training})
    np.testing.assert_array_equal(np.asarray(model(X, rng=KEY)), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(model.eval()(X)), X)
    by_position = model(X, training, rng=KEY)  # what the call says wins
    by_name = model(X, rng=KEY, **{name: training})
    np.testing.assert_array_equal(np.asarray(by_position), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(by_name), np.asarray(expected))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_field_that_says_the_mode_follows_it_too(deterministic):
    model = from_linen(linen.Dropout(0.5, deterministic=deterministic), {})
    assert model.training is not deterministic
    assert (np.asarray(model.train()(X)) != X).any()
    assert (np.asarray(model.eval()(X)) == X).all()


def test_a_module_that_cannot_be_told_the_mode_says_so_in_evaluation():
    drop = linen.Sequential([linen.Dense(3), linen.Dropout(0.5, deterministic=False)])
    model = from_linen(drop, drop.init({"params": KEY, "dropout": KEY}, X))
    assert model(X).shape == (6, 3)
    model.eval()
    with pytest.raises(nn.MissingRngError, match="(?s)Sequential drew.*evaluation mode.*mode=None"):
        model(X)
    norm = linen.Sequential([linen.BatchNorm(use_running_average=False)])
    model = from_linen(norm, KEY, X)
    model(X)
    with pytest.raises(nn.StateWriteError, match="(?s)Sequential changed.*evaluation.*mode=lambda"):
        model.eval()(X)


def test_the_mode_can_be_said_by_hand_or_be_declared_to_be_none():
    class Odd(linen.Module):
        @linen.compact
        def __call__(self, x, phase):
            return linen.Dropout(0.5, deterministic=phase == "test")(x)

    model = from_linen(Odd(), {}, mode=lambda train: {"phase": "train" if train else "test"})
    assert (np.asarray(model(X)) != X).any()
    assert (np.asarray(model.eval()(X)) == X).all()
    always = from_linen(linen.Sequential([linen.Dropout(0.5, deterministic=False)]), {}, mode=None)
    assert (np.asarray(always.eval()(X)) != X).any()
    with pytest.raises(TypeError, match="(?s)mode='train'.*mode=lambda training"):
        bridged(mode="train")


# --------------------------------------------------------------------------------------------------
# What Linen can do


def test_random_streams_have_names():
    class Noisy(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.Dropout(0.5, deterministic=not train)(x)
            return x + jax.random.normal(self.make_rng("noise"), x.shape)

    model = from_linen(Noisy(), {}, rngs=("dropout", "noise"))
    keys = dict(zip(("dropout", "noise"), jax.random.split(KEY, 2), strict=True))
    np.testing.assert_array_equal(
        np.asarray(model(X, rng=KEY)), np.asarray(Noisy().apply({}, X, train=True, rngs=keys))
    )
    with pytest.raises(nn.MissingRngError, match="(?s)noise.*rngs=\\('dropout', 'noise'\\)"):
        from_linen(Noisy(), {})(X)


def test_a_module_without_streams_leaves_the_generator_alone():
    model = from_linen(linen.Dense(2), KEY, X, rngs=())
    before = np.asarray(nn.get_rng_state())
    model(X)
    np.testing.assert_array_equal(np.asarray(nn.get_rng_state()), before)


class Several(linen.Module):
    """Two collections with the names of parameters, and one with names of its own."""

    @linen.compact
    def __call__(self, x):
        kernel = self.param("kernel", linen.initializers.ones, (4,))
        count = self.variable("counters", "count", lambda: jnp.zeros((), jnp.int32))
        memory = self.variable("cache", "kernel", lambda: jnp.zeros(4))
        if not self.is_initializing():
            count.value += 1
            memory.value = x.mean(0)
        return x * kernel + memory.value


def test_every_collection_is_state_and_names_that_clash_get_the_collection_in_front():
    model = from_linen(Several(), KEY, X, mode=None)
    assert sorted(model.state_dict()) == ["cache.kernel", "count", "kernel"]
    variables = Several().init(KEY, X)
    for _ in range(2):
        expected, new = Several().apply(variables, X, mutable=["cache", "counters"])
        same(model(X), expected)
        variables = {**variables, **new}
    assert int(model.count) == 2
    same(linen_variables(model), variables)


def test_lifted_and_shared_modules():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            x = linen.remat(linen.Dense)(4)(x)
            x = linen.Dropout(0.5, deterministic=False)(x)
            return linen.BatchNorm(use_running_average=False)(x), None

    class Deep(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            shared = linen.Dense(4, name="shared")
            x, _ = linen.scan(
                Block,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True, "dropout": True},
                length=3,
            )()(shared(x), None)
            return shared(x)

    variables = jax.jit(lambda: Deep().init({"params": KEY, "dropout": KEY}, X, train=True))()
    model = from_linen(Deep(), variables)
    assert dict(model.named_parameters())["ScanBlock_0.CheckpointDense_0.kernel"].shape == (3, 4, 4)
    assert sum(n.startswith("shared") for n in model.state_dict()) == 2

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def theirs(params):
        given = {**variables, "params": params}
        out, new = Deep().apply(given, X, True, rngs={"dropout": KEY}, mutable=["batch_stats"])
        return (out**2).sum(), new

    ours = nn.jit(nn.value_and_grad(lambda m: (m(X, rng=KEY) ** 2).sum()))
    (value, grads), ((expected, new), expected_grads) = ours(model), theirs(variables["params"])
    np.testing.assert_allclose(float(value), float(expected), rtol=1e-5)
    same(grads["shared.kernel"], expected_grads["shared"]["kernel"])
    same(linen_variables(model), {**variables, **new})


def test_partitioned_parameters_keep_their_boxes_out_of_the_names():
    init = linen.with_partitioning(linen.initializers.ones, ("data", None))
    dense = linen.Dense(3, kernel_init=init)
    model = from_linen(dense, KEY, X)
    assert [n for n, _ in model.named_parameters()] == ["kernel", "bias"]
    theirs = linen_variables(model)["params"]["kernel"]
    assert isinstance(theirs, linen.Partitioned) and theirs.names == ("data", None)
    same(model(X), dense.apply(dense.init(KEY, X), X))


def test_another_method_and_a_frozen_dict():
    class Coder(linen.Module):
        def setup(self):
            self.encoder, self.decoder = linen.Dense(3), linen.Dense(4)

        def __call__(self, x):
            return self.decoder(self.encoder(x))

        def encode(self, x):
            return self.encoder(x)

    variables = Coder().init(KEY, X)
    model = from_linen(Coder(), linen.FrozenDict(variables), method="encode")
    same(model(X), Coder().apply(variables, X, method="encode"))


def test_names_that_every_module_has_get_an_underscore():
    class Odd(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(2, name="forward")(x)

    model = from_linen(Odd(), KEY, X)
    assert list(model.state_dict()) == ["forward_.kernel", "forward_.bias"]
    same(model(X), Odd().apply(Odd().init(KEY, X), X))


def test_low_precision_and_empty_batches():
    dense = linen.Dense(2, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    model = from_linen(dense, KEY, X)
    out = nn.jit(model)(jnp.zeros((0, 4), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16 and out.shape == (0, 2)


def test_a_bridged_module_is_part_of_a_model():
    model = nn.Sequential(nn.Linear(4, 4), bridged(), nn.Linear(2, 1))
    assert "1.Dense_0.kernel" in model.state_dict()
    step = nn.jit(nn.grad(lambda m: m(X).sum()))
    assert "1.BatchNorm_0.scale" in step(model) and step.trace_count == 1
    assert model.eval()[1].training is False
    assert jax.jit(model)(X).shape == (6, 1)


def test_it_is_pickled_with_its_linen_module():
    model = from_linen(linen.Dropout(0.5), {})
    twin = pickle.loads(pickle.dumps(model))
    step = nn.jit(lambda m, key: m(X, rng=key))
    same(step(model, KEY), step(twin, KEY))
    assert step.trace_count == 1


def test_modules_that_only_seem_equal_are_told_apart():
    class Scale(linen.Module):
        by: float

        def __call__(self, x):
            return x / self.by

    outs = [from_linen(Scale(by), {}, rngs=())(jnp.ones(())) for by in (0.0, -0.0)]
    assert [float(o) for o in outs] == [np.inf, -np.inf]


def test_modules_that_were_built_alike_make_an_ensemble():
    ensemble = nn.Ensemble.of([from_linen(linen.Dense(2), i, X) for i in range(3)])
    out = ensemble(X)
    expected = [linen.Dense(2).init_with_output(jax.random.key(i), X)[0] for i in range(3)]
    same(out, jnp.stack(expected))
    built = nn.Ensemble(lambda: from_linen(linen.Dense(2), nn.next_key(), X), 2)
    assert built(X).shape == (2, 6, 2)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((linen.Dense, {}), "type type.*instance of flax.linen.Module"),
        ((nn.Linear(1, 1), {}), "type Linear.*it takes a Linen module"),
        ((linen.Dense(2), None), "variables of type NoneType.*module.init"),
        ((linen.Dense(2), {"params": {}}, X), "and inputs.*from_linen\\(module, key, x\\)"),
    ],
)
def test_wrong_arguments_are_told(arguments, says):
    with pytest.raises(TypeError, match=f"(?s){says}"):
        from_linen(*arguments)


def test_variables_that_are_no_arrays_are_refused_by_name():
    with pytest.raises(nn.RegistrationError, match="str under 'a.b'"):
        from_linen(linen.Dense(2), {"params": {"a": {"b": "text"}}})
    with pytest.raises(TypeError, match="(?s)linen_variables.*type Linear.*from_linen returned"):
        linen_variables(nn.Linear(1, 1))


# --------------------------------------------------------------------------------------------------
# Our modules as Linen's


class Ours(nn.Module):
    """Ties, a frozen parameter, statistics and draws."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.fc.weight
        self.again.bias.requires_grad_(False)

    def forward(self, x):
        return self.again(self.drop(self.norm(self.fc(x))))


def test_init_gives_the_module_s_own_arrays_in_nested_dicts():
    ours = Ours()
    variables = to_linen(ours).init(KEY, X)
    assert set(variables) == {"params", "batch_stats"}
    assert set(variables["params"]) == {"fc", "norm"}
    assert set(variables["batch_stats"]) == {"norm", "again"}  # the frozen bias is state
    np.testing.assert_array_equal(variables["params"]["fc"]["weight"], np.asarray(ours.fc.weight))
    assert int(variables["batch_stats"]["norm"]["num_batches_tracked"]) == 0


def test_apply_runs_the_module_with_its_state_and_keys():
    ours = Ours()
    module = to_linen(ours)
    variables = module.init(KEY, X)
    out, new = module.apply(variables, X, rngs={"dropout": KEY}, mutable=["batch_stats"])
    again = module.apply(variables, X, rngs={"dropout": KEY}, mutable=["batch_stats"])[0]
    np.testing.assert_array_equal(out, again)
    ours(X)
    np.testing.assert_array_equal(
        new["batch_stats"]["norm"]["running_mean"], np.asarray(ours.norm.running_mean)
    )
    evaluated = module.apply({**variables, **new}, X, train=False)
    same(evaluated, ours.eval()(X))


def test_flax_trains_it_as_we_do():
    ours = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    module = to_linen(ours)
    variables = module.init(KEY, X)
    tx = optax.sgd(0.1)
    opt_state, optimizer = tx.init(variables["params"]), nn.Optimizer(ours, optax.sgd(0.1))

    @jax.jit
    def theirs(variables, opt_state):
        def loss(params):
            out, new = module.apply({**variables, "params": params}, X, mutable=["batch_stats"])
            return (out**2).mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state)
        return (
            value,
            {"params": optax.apply_updates(variables["params"], updates), **new},
            opt_state,
        )

    mean_square = nn.jit(nn.value_and_grad(lambda m: (m(X) ** 2).mean()))
    for _ in range(4):
        value, variables, opt_state = theirs(variables, opt_state)
        mine, grads = mean_square(ours)
        optimizer.step(grads)
        np.testing.assert_allclose(float(value), float(mine), rtol=1e-5)


def test_it_is_a_part_of_a_linen_model():
    class Outer(linen.Module):
        def setup(self):
            self.inner = to_linen(Ours())

        def __call__(self, x, train):
            return self.inner(x, train=train)

    variables = Outer().init(KEY, X, train=False)
    assert set(variables["params"]["inner"]) == {"fc", "norm"}
    out = Outer().apply(variables, X, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"])
    assert out[0].shape == (6, 4)


def test_a_call_without_what_it_needs_is_an_error():
    module = to_linen(Ours())
    variables = module.init(KEY, X)
    with pytest.raises(nn.MissingRngError, match="rng=key"):
        module.apply(variables, X, mutable=["batch_stats"])
    with pytest.raises(Exception, match="batch_stats"):  # Flax's own: the collection is immutable
        module.apply(variables, X, rngs={"dropout": KEY})
    with pytest.raises(TypeError, match="to_linen with an object of type Dense"):
        to_linen(linen.Dense(2))


def test_there_and_back():
    ours = Ours()
    module = to_linen(ours)
    back = from_linen(module, module.init(KEY, X))
    assert set(back.state_dict()) == set(ours.state_dict()) - {"again.weight"}
    for model in (back, ours):
        model(X)
        model.eval()
    same(back(X), ours(X))
    theirs = bridged()
    again = to_linen(theirs)
    out = again.apply(again.init(KEY, X), X, train=False)
    same(out, Net().apply(variables_of_net(), X, train=False))
