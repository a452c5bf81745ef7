"""nn.Optimizer against optax on a plain dict of arrays, and against torch."""

from __future__ import annotations

import copy
import gc
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import statefulnn as nn
from tests.quick import diagonal


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(3, 4)
        self.fc2 = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc2(jnp.tanh(self.fc1(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(jnp.tanh(self.a(x)))


X = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
Y = np.linspace(1, -1, 10, dtype=np.float32).reshape(5, 2)


def loss_of(model):
    return ((model(X) - Y) ** 2).mean()


def values(model) -> dict[str, np.ndarray]:
    return {name: np.array(p) for name, p in model.named_parameters()}


def some_grads(model, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=p.shape).astype(np.float32))
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def raw(x):
    """Return the words of a random key, and any other array as it is."""
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def assert_close(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], err_msg=name, **tolerance)


TRANSFORMATIONS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw_schedule": lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "multi_transform": lambda: optax.multi_transform(
        {"w": optax.adam(1e-2), "b": optax.set_to_zero()},
        lambda params: {name: "w" if name.endswith("weight") else "b" for name in params},
    ),
    "mask": lambda: optax.adamw(
        1e-2, mask=lambda params: {name: p.ndim > 1 for name, p in params.items()}
    ),
    "lion": lambda: optax.lion(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name, how", diagonal(2, list(TRANSFORMATIONS), ["eager", "nn.jit"]))
def test_steps_are_those_of_optax_on_a_plain_dict(name, how):
    make, compiled = TRANSFORMATIONS[name], how == "nn.jit"
    model = Net()
    params = {name: p.value for name, p in model.named_parameters()}
    opt = nn.Optimizer(model, make())
    step = nn.jit(lambda opt, grads: opt.step(grads)) if compiled else nn.Optimizer.step

    with jax.numpy_dtype_promotion("standard"):
        tx = make()
        state = tx.init(params)
        for i in range(3):
            grads = some_grads(model, i)
            step(opt, grads)
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
    assert_close(values(model), params, rtol=2e-6, atol=1e-7)
    ours, theirs = jax.tree.leaves(opt.state), jax.tree.leaves(state)
    assert jax.tree.structure(opt.state) == jax.tree.structure(state)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(raw(a), raw(b), rtol=2e-6, atol=1e-7)


def test_training_follows_torch():
    model = Net()
    reference = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    names = dict(
        zip(
            ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"],
            reference.parameters(),
            strict=True,
        )
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            names[name].copy_(torch.tensor(np.array(p)))
    opt = nn.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1))
    torch_opt = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)

    @nn.jit
    def train_step(model, opt):
        loss, grads = nn.value_and_grad(loss_of)(model)
        opt.step(grads)
        return loss

    for _ in range(20):
        ours = train_step(model, opt)
        torch_opt.zero_grad()
        theirs = ((reference(torch.tensor(X)) - torch.tensor(Y)) ** 2).mean()
        theirs.backward()
        torch_opt.step()
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4)
    assert_close(
        values(model), {n: p.detach().numpy() for n, p in names.items()}, rtol=1e-4, atol=1e-5
    )
    assert train_step.trace_count == 1


def test_slots_are_buffers_named_after_optax_fields_and_parameters():
    opt = nn.Optimizer(Net(), optax.adam(1e-3))
    parameters = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    expected = {"count"} | {f"{slot}.{p}" for slot in ("mu", "nu") for p in parameters}
    assert {name for name, _ in opt.named_buffers()} == expected
    assert set(opt.state_dict()) == expected
    assert opt.get_buffer("mu.fc1.weight").shape == (4, 3)


def test_two_counters_keep_their_position_in_the_chain():
    opt = nn.Optimizer(Net(), optax.adam(optax.linear_schedule(1e-3, 0.0, 10)))
    counters = {name for name, _ in opt.named_buffers() if "count" in name}
    assert counters == {"0.count", "1.count"}


def test_the_module_is_referred_to_and_not_owned():
    model = Net()
    opt = nn.Optimizer(model, optax.adam(1e-3))
    assert opt.module is model
    assert list(opt.parameters()) == []
    assert model not in set(opt.modules())


def test_frozen_parameters_get_no_slot_no_update_and_no_decay():
    model = Net()
    model.fc1.requires_grad_(False)
    before = values(model)
    opt = nn.Optimizer(model, optax.adamw(1e-1, weight_decay=0.5))
    assert not [name for name, _ in opt.named_buffers() if "fc1" in name]

    @nn.jit
    def train_step(model, opt):
        opt.step(nn.grad(loss_of)(model))

    for _ in range(3):
        train_step(model, opt)
    after = values(model)
    for name in before:
        same = np.array_equal(before[name], after[name])
        assert same == name.startswith("fc1"), name


def test_a_tied_parameter_has_one_slot_and_moves_once():
    model = Tied()
    opt = nn.Optimizer(model, optax.sgd(0.5, momentum=0.9))
    assert [name for name, _ in opt.named_buffers()] == ["trace.a.weight"]
    before = np.array(model.a.weight)
    grads = nn.grad(lambda m: m(X).sum())(model)
    assert list(grads) == ["a.weight"]
    opt.step(grads)
    np.testing.assert_allclose(
        model.a.weight, before - 0.5 * np.array(grads["a.weight"]), rtol=1e-6
    )
    assert model.b.weight is model.a.weight


def test_the_box_stays_the_same_box():
    model = Net()
    weight = model.fc1.weight
    nn.Optimizer(model, optax.sgd(0.1)).step(some_grads(model))
    assert model.fc1.weight is weight


@pytest.mark.parametrize("change", [True, False], ids=["unfrozen", "frozen"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nn.jit"])
def test_freezing_after_construction_is_an_error(change, compiled):
    model = Net()
    model.fc1.bias.requires_grad_(not change)
    opt = nn.Optimizer(model, optax.adam(1e-3))
    step = nn.jit(lambda opt, grads: opt.step(grads)) if compiled else nn.Optimizer.step
    step(opt, some_grads(model))
    model.fc1.bias.requires_grad_(change)
    before = values(model)
    with pytest.raises(nn.StructureChangeError, match=r"'fc1\.bias'") as info:
        step(opt, some_grads(model))
    assert ("trainable since then" if change else "no longer trainable") in str(info.value)
    assert "opt.adapt()" in str(info.value)
    assert_close(values(model), before)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (
            lambda g: g.pop("fc1.bias"),
            nn.UnknownNameError,
            ["no gradient for 'fc1.bias'", "nn.value_and_grad"],
        ),
        (lambda g: g.update(fc3=0.0), nn.UnknownNameError, ["unknown names 'fc3'", "fc1.weight"]),
        (
            lambda g: g.update({"fc1.bias": jnp.zeros((1, 4))}),
            nn.ShapeError,
            ["(1, 4)", "'fc1.bias'", "grads['fc1.bias'].reshape((4,))"],
        ),
        (
            lambda g: g.update({"fc1.bias": jnp.zeros((9, 4))}),
            nn.ShapeError,
            ["(9, 4)", "'fc1.bias'", "grads['fc1.bias'].mean(0)"],
        ),
        (
            lambda g: g.update({"fc1.bias": jnp.zeros(7)}),
            nn.ShapeError,
            ["(7,)", "'fc1.bias'", "a gradient of shape (4,)"],
        ),
        (
            lambda g: g.update({"fc1.bias": jnp.zeros(4, jnp.float16)}),
            nn.DtypeError,
            ["float16", "float32", "astype"],
        ),
        (
            lambda g: g.update({"fc1.bias": None}),
            TypeError,
            ["NoneType", "'fc1.bias'", "jnp.zeros((4,), jnp.float32)"],
        ),
    ],
    ids=["missing", "unknown", "shape", "one each", "other size", "dtype", "none"],
)
def test_gradients_that_do_not_fit_are_refused_and_change_nothing(spoil, error, words):
    model = Net()
    opt = nn.Optimizer(model, optax.adam(1e-3))
    grads = some_grads(model)
    spoil(grads)
    before, slots = values(model), {n: np.array(b) for n, b in opt.named_buffers()}
    with pytest.raises(error) as info:
        opt.step(grads)
    for word in words:
        assert word in str(info.value)
    assert_close(values(model), before)
    assert_close({n: np.array(b) for n, b in opt.named_buffers()}, slots)


def test_gradients_that_are_no_mapping_are_refused():
    opt = nn.Optimizer(Net(), optax.adam(1e-3))
    with pytest.raises(TypeError, match="matched to parameters by name"):
        opt.step([jnp.zeros(3)])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrong", [optax.adam, 1e-3, optax.MultiSteps(optax.sgd(0.1), 2), None])
def test_what_is_no_transformation_is_refused(wrong):
    with pytest.raises(TypeError, match=r"(?s)optax transformation.*optax\.adam\(1e-3\)"):
        nn.Optimizer(Net(), wrong)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"nn\.Optimizer\(model, "):
        nn.Optimizer({"w": jnp.ones(3)}, optax.adam(1e-3))  # pyright: ignore[reportArgumentType]


def test_a_module_with_nothing_to_train_is_refused():
    with pytest.raises(nn.UnknownNameError, match=r"requires_grad_\(True\)"):
        nn.Optimizer(Net().requires_grad_(False), optax.adam(1e-3))


def test_state_dict_round_trip_continues_the_run():
    model = Net()
    opt = nn.Optimizer(model, optax.adam(1e-1))
    opt.step(some_grads(model, 0))
    weights, slots = model.state_dict(), opt.state_dict()
    opt.step(some_grads(model, 1))
    expected = values(model)

    resumed = Net()
    resumed.load_state_dict(weights)
    resumed_opt = nn.Optimizer(resumed, optax.adam(1e-1))
    resumed_opt.load_state_dict(slots)
    resumed_opt.step(some_grads(model, 1))
    assert_close(values(resumed), expected)


def test_a_state_dict_is_a_snapshot():
    model = Net()
    opt = nn.Optimizer(model, optax.adam(1e-1))
    slots = opt.state_dict()
    opt.step(some_grads(model))
    assert int(slots["count"]) == 0


def test_state_dict_of_another_transformation_is_refused():
    slots = nn.Optimizer(Net(), optax.sgd(0.1, momentum=0.9)).state_dict()
    with pytest.raises(nn.StateDictError, match=r"mu\.fc1\.weight"):
        nn.Optimizer(Net(), optax.adam(0.1)).load_state_dict(slots)


def test_leaves_that_are_no_arrays_survive():
    class Marked(dict):
        pass

    jax.tree_util.register_pytree_node(
        Marked,
        lambda d: (tuple(d.values()), tuple(d)),
        lambda keys, v: Marked(zip(keys, v, strict=True)),
    )

    def init(params):
        return Marked(label="kept", count=0, slot=params)

    def update(grads, state, params=None):
        assert state["label"] == "kept"
        return grads, Marked(state, count=state["count"] + 1, slot=grads)

    model = Net()
    opt = nn.Optimizer(model, optax.GradientTransformation(init, update))
    step = nn.jit(lambda opt, grads: opt.step(grads))
    for i in range(2):
        step(opt, some_grads(model, i))
    opt.step(some_grads(model, 2))
    assert opt.state["label"] == "kept"
    assert int(opt.state["count"]) == 3
    assert step.trace_count == 1


def test_slots_that_start_as_the_parameters_are_copies():
    # optax.lookahead and schedule-free methods begin with the parameters themselves.
    def init(params):
        return params

    def update(grads, state, params=None):
        return grads, state

    model = Net()
    opt = nn.Optimizer(model, optax.GradientTransformation(init, update))
    arrays = [p.value for p in model.parameters()] + list(opt.buffers())
    assert len({a.unsafe_buffer_pointer() for a in arrays}) == len(arrays)


def test_injected_hyperparameters_are_buffers_that_can_be_set():
    model = Net()
    opt = nn.Optimizer(model, optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    step = nn.jit(lambda opt, grads: opt.step(grads))
    for rate in (0.5, 0.25):
        opt.hyperparams.learning_rate = jnp.asarray(rate)
        before, grads = values(model), some_grads(model)
        step(opt, grads)
        expected = {n: v - rate * np.array(grads[n]) for n, v in before.items()}
        assert_close(values(model), expected, rtol=1e-6, atol=1e-7)
    assert step.trace_count == 1


def test_extra_arguments_reach_the_transformation():
    plateau = optax.contrib.reduce_on_plateau(factor=0.1, patience=1, cooldown=0)
    model = Net()
    opt = nn.Optimizer(model, optax.chain(optax.sgd(1.0), plateau))
    zeros = {name: jnp.zeros_like(g) for name, g in some_grads(model).items()}
    for _ in range(5):
        opt.step(zeros, value=jnp.asarray(1.0))
    assert float(optax.tree.get(opt.state, "scale")) < 1.0


def test_equal_optimizers_share_compiled_code():
    step = nn.jit(lambda model, opt: opt.step(nn.grad(loss_of)(model)))
    for _ in range(3):
        model = Net()
        step(model, nn.Optimizer(model, optax.adam(1e-3)))
    assert step.trace_count == 1
    model = Net()
    step(model, nn.Optimizer(model, optax.adam(1e-2)))  # the rate is part of the code
    assert step.trace_count == 2


def test_an_eager_step_traces_the_transformation_once():
    traced = []

    def update(grads, state, params=None):
        traced.append(1)
        return jax.tree.map(lambda g: -g, grads), state

    model = Net()
    opt = nn.Optimizer(model, optax.GradientTransformation(lambda params: (), update))
    for i in range(3):
        opt.step(some_grads(model, i))
    assert len(traced) == 1


def test_the_optimizer_alone_may_be_the_argument():
    model = Net()
    opt = nn.Optimizer(model, optax.sgd(0.1))
    twin = copy.deepcopy(model)
    nn.jit(lambda opt: opt.step(nn.grad(loss_of)(opt.module)))(opt)
    nn.Optimizer(twin, optax.sgd(0.1)).step(nn.grad(loss_of)(twin))
    assert_close(values(model), values(twin), rtol=1e-6)


def test_a_deep_copied_pair_trains_on_its_own():
    model = Net()
    opt = nn.Optimizer(model, optax.adam(1e-1))
    opt.step(some_grads(model))  # with a compiled step in place
    twin, twin_opt = copy.deepcopy((model, opt))
    assert twin_opt.module is twin
    before = values(model)
    twin_opt.step(some_grads(model))
    assert_close(values(model), before)
    assert not np.array_equal(before["fc1.weight"], values(twin)["fc1.weight"])
    assert int(opt.get_buffer("count")) == 1
    assert int(twin_opt.get_buffer("count")) == 2


def test_an_optimizer_dies_by_reference_count():
    gc.collect()
    gc.disable()
    try:
        model = Net()
        opt = nn.Optimizer(model, optax.adam(1e-3))
        step = nn.jit(lambda model, opt: opt.step(nn.grad(loss_of)(model)))
        step(model, opt)
        opt.step(some_grads(model))
        before = len(jax.live_arrays())
        slots = len(list(opt.buffers()))
        del opt
        assert len(jax.live_arrays()) <= before - slots
    finally:
        gc.enable()


def test_names_of_the_module_may_be_those_of_methods():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.step_ = nn.Linear(2, 2)
            self.register_parameter("state_", nn.Parameter(jnp.ones(2)))

        def forward(self, x):
            return self.step_(x) * self.state_.value

    def init(params):
        return {"step": jnp.zeros(()), "module": params}

    def update(grads, state, params=None):
        return grads, {"step": state["step"] + 1, "module": state["module"]}

    model = Odd()
    opt = nn.Optimizer(model, optax.GradientTransformation(init, update))
    opt.step({n: jnp.zeros(p.shape) for n, p in model.named_parameters()})
    assert opt.module is model
    assert float(opt.state["step"]) == 1.0
    assert "module.state_" in opt.state_dict()


def test_bfloat16_parameters_stay_bfloat16():
    model = Net().bfloat16()
    opt = nn.Optimizer(model, optax.adamw(1e-2))
    opt.step({name: jnp.ones_like(p.value) for name, p in model.named_parameters()})
    assert {p.dtype for p in model.parameters()} == {jnp.dtype(jnp.bfloat16)}


def test_repr_is_one_line():
    assert repr(nn.Optimizer(Net(), optax.adam(1e-3))) == "Optimizer(Net, 4 trainable parameters)"


def square(seed: int = 0) -> nn.Sequential:
    nn.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def length(model):
    return sum((p.value**2).sum() for p in model.parameters())


def replace_parameter(model, opt):
    model[1].weight = nn.Parameter(jnp.zeros((3, 3)))


def replace_module(model, opt):
    model[1] = nn.Linear(3, 3)


def replace_by_another_shape(model, opt):
    model[1] = nn.Linear(3, 1)


def replace_frozen(model, opt):
    model[1].weight = nn.Parameter(jnp.zeros((3, 3)), requires_grad=False)


def make_tie(model, opt):
    model[1].weight = model[0].weight


def exchange(model, opt):
    model[0].weight, model[1].weight = model[1].weight, model[0].weight


def swap_model(model, opt):
    opt.module = nn.Ref(copy.deepcopy(model))


def swap_owned_model(model, opt):
    opt.module = copy.deepcopy(model)


REPLACEMENTS = {
    replace_parameter: "replaced by another Parameter: '1.weight')",
    replace_module: "replaced by another Parameter: '1.weight', '1.bias')",
    replace_by_another_shape: "replaced by another Parameter: '1.weight', '1.bias')",
    replace_frozen: "no longer trainable: '1.weight')",
    make_tie: "no longer trainable: '1.weight')",
    exchange: "replaced by another Parameter: '0.weight', '1.weight')",
    swap_model: "replaced by another Parameter: '0.weight', '0.bias', '1.weight', '1.bias')",
    swap_owned_model: "replaced by another Parameter: '0.weight', '0.bias', '1.weight', '1.bias')",
}


@pytest.mark.parametrize(
    "replace, how",
    diagonal(2, list(REPLACEMENTS), ["eager", "nn.jit", "optimizer alone", "donated"]),
)
def test_a_parameter_replaced_after_construction_is_an_error(replace, how):
    def train_step(model, opt):
        opt.step(nn.grad(length)(model))

    steps = {
        "eager": train_step,
        "nn.jit": nn.jit(train_step),
        "optimizer alone": lambda _, opt: of_optimizer(opt),
        "donated": nn.jit(train_step, donate=(0, 1)),
    }
    of_optimizer = nn.jit(lambda opt: train_step(opt.module, opt))
    model = square()
    opt = nn.Optimizer(model, optax.adam(1e-2))
    steps[how](model, opt)
    replace(model, opt)
    before = values(model), values(opt.module), {n: np.array(b) for n, b in opt.named_buffers()}
    with pytest.raises(nn.StructureChangeError) as info:
        steps[how](model, opt)
    assert REPLACEMENTS[replace] in str(info.value)
    assert "opt.adapt()" in str(info.value)
    after = values(model), values(opt.module), {n: np.array(b) for n, b in opt.named_buffers()}
    for a, b in zip(before, after, strict=True):
        assert_close(a, b)
    opt.adapt()  # the remedy
    steps[how](opt.module, opt)


def test_a_broken_tie_is_an_error():
    model = Tied()
    opt = nn.Optimizer(model, optax.adam(1e-2))
    model.b.weight = nn.Parameter(model.a.weight.value)
    with pytest.raises(nn.StructureChangeError, match=r"trainable since then: 'b\.weight'"):
        opt.step(some_grads(model))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "nn.jit"])
def test_a_parameter_of_another_shape_in_its_old_box_is_an_error(compiled):
    model = square()
    opt = nn.Optimizer(model, optax.sgd(0.1, momentum=0.9))
    step = nn.jit(lambda opt, grads: opt.step(grads)) if compiled else nn.Optimizer.step
    step(opt, some_grads(model))
    model[1].bias.data = jnp.zeros((2, 3))
    with pytest.raises(nn.StructureChangeError, match="of another shape: '1.bias'"):
        step(opt, some_grads(model))
    assert opt.get_buffer("trace.1.bias").shape == (3,)


def loaded_by_assignment(model, opt):
    model.load_state_dict(square(1).state_dict(), assign=True)
    return model, opt


def through_a_raw_jit(model, opt):
    opt = jax.jit(lambda opt: opt)(opt)
    return opt.module, opt


KEEPING = {
    "cast": lambda model, opt: (model.bfloat16(), opt),
    "moved": lambda model, opt: (model.to("cpu"), opt),
    "emptied": lambda model, opt: (model.to_empty(device="cpu"), opt),
    "loaded": loaded_by_assignment,
    "frozen and unfrozen": lambda model, opt: (
        model.requires_grad_(False).requires_grad_(True),
        opt,
    ),
    "copied": lambda model, opt: copy.deepcopy((model, opt)),
    "copied alone": lambda model, opt: ((twin := copy.deepcopy(opt)).module, twin),
    "through a raw jax.jit": through_a_raw_jit,
    "split and merged": lambda model, opt: (
        (twin := nn.merge(*nn.split(opt))).module,
        twin,
    ),
}


@pytest.mark.parametrize("keep", KEEPING)
def test_what_keeps_the_boxes_keeps_the_optimizer(keep):
    model = square()
    opt = nn.Optimizer(model, optax.adam(1e-2))
    step = nn.jit(lambda model, opt: opt.step(nn.grad(length)(model)))
    step(model, opt)
    keys = list(opt.state_dict())
    model, opt = KEEPING[keep](model, opt)
    assert opt.module is model
    assert list(opt.state_dict()) == keys
    before = values(model)
    step(model, opt)
    opt.step(nn.grad(length)(model))
    assert int(opt.get_buffer("count")) == 3
    assert not np.array_equal(before["0.weight"], values(model)["0.weight"])


def test_an_optimizer_of_a_transformation_that_can_be_pickled_refers_to_its_parameters_afterwards():
    model = square()
    tx = optax.GradientTransformation(no_slots, steepest)
    model, opt = pickle.loads(pickle.dumps((model, nn.Optimizer(model, tx))))
    opt.step(some_grads(model))
    model[1] = nn.Linear(3, 3)
    with pytest.raises(nn.StructureChangeError, match=r"'1\.weight'"):
        opt.step(some_grads(model))


def no_slots(params):
    return ()


def steepest(grads, state, params=None):
    return jax.tree.map(jnp.negative, grads), state


def test_references_to_the_parameters_are_no_further_leaves():
    model = square()
    opt = nn.Optimizer(model, optax.adam(1e-2))
    slots = 2 * len(list(model.parameters())) + 1
    assert len(jax.tree.leaves(opt)) == len(list(model.parameters())) + slots
    assert list(opt.parameters()) == []


EQUAL_WHEN_REBUILT = {
    "adamw": lambda: optax.adamw(1e-2),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "multi_transform": lambda: optax.multi_transform(
        {"slow": optax.sgd(1e-3), "fast": optax.adam(1e-2)},
        {"0.weight": "slow", "0.bias": "fast", "1.weight": "slow", "1.bias": "fast"},
    ),
    "multi_transform_of_a_function": lambda: optax.multi_transform(
        {"slow": optax.sgd(1e-3), "fast": optax.adam(1e-2)},
        lambda params: {name: "slow" if "weight" in name else "fast" for name in params},
    ),
    "partition": lambda: optax.partition(
        {"slow": optax.sgd(1e-3), "still": optax.set_to_zero()},
        {"0.weight": "slow", "0.bias": "still", "1.weight": "slow", "1.bias": "still"},
    ),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "masked_by_a_dict": lambda: optax.masked(
        optax.adam(1e-2), {"0.weight": True, "0.bias": False, "1.weight": True, "1.bias": False}
    ),
    "decay_masked_by_a_dict": lambda: optax.adamw(
        1e-2, mask={"0.weight": True, "0.bias": False, "1.weight": True, "1.bias": False}
    ),
    "decay_masked_by_a_function": lambda: optax.adamw(
        1e-2, mask=lambda params: {name: p.ndim > 1 for name, p in params.items()}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "inject_a_schedule": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(1e-2, 0.0, 10)
    ),
    "schedule": lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
    "joined_schedules": lambda: optax.sgd(
        optax.join_schedules([optax.constant_schedule(0.1), optax.constant_schedule(0.01)], [5])
    ),
    "piecewise_schedule": lambda: optax.sgd(optax.piecewise_constant_schedule(0.1, {5: 0.1})),
    "flatten": lambda: optax.flatten(optax.adam(1e-2)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
}


@pytest.mark.parametrize("name", diagonal(2, list(EQUAL_WHEN_REBUILT)))
def test_an_equal_transformation_built_again_compiles_nothing(name):
    def step(opt, grads):
        opt.step(grads)

    compiled = nn.jit(step)
    for _ in range(3):
        model = square()
        compiled(nn.Optimizer(model, EQUAL_WHEN_REBUILT[name]()), some_grads(model))
    assert compiled.trace_count == 1


DIFFERENT = {
    "mask": lambda flag: optax.masked(optax.adam(1e-2), dict.fromkeys(NAMES, flag)),
    "labels": lambda flag: optax.partition(
        {True: optax.sgd(1e-3), False: optax.sgd(1e-2)}, dict.fromkeys(NAMES, flag)
    ),
    "inner_rate": lambda flag: optax.partition(
        {"all": optax.sgd(1e-3 if flag else 1e-2)}, dict.fromkeys(NAMES, "all")
    ),
    "period": lambda flag: optax.MultiSteps(
        optax.adam(1e-2), 2 if flag else 3
    ).gradient_transformation(),
    "schedule": lambda flag: optax.sgd(
        optax.piecewise_constant_schedule(0.1, {1 if flag else 2: 0.1})
    ),
    "function": lambda flag: optax.adamw(
        1e-2, mask=lambda params: {name: (p.ndim > 1) is flag for name, p in params.items()}
    ),
}
NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("name", diagonal(2, list(DIFFERENT)))
def test_a_different_transformation_of_the_same_make_takes_its_own_steps(name):
    for flag in (True, False):
        model = square()
        params = {name: p.value for name, p in model.named_parameters()}
        opt, tx = nn.Optimizer(model, DIFFERENT[name](flag)), DIFFERENT[name](flag)
        with jax.numpy_dtype_promotion("standard"):
            state = tx.init(params)
            for i in range(3):
                grads = some_grads(model, i)
                opt.step(grads)
                updates, state = jax.jit(tx.update)(grads, state, params)
                params = optax.apply_updates(params, updates)
        assert_close(values(model), params, rtol=2e-6, atol=1e-7)


def test_gradients_of_another_module_are_told_of():
    # A model that is built anew, with the optimizer of the one before, learns nothing.
    old, x = nn.Linear(3, 1), jnp.ones((2, 3))
    opt = nn.Optimizer(old, optax.sgd(0.1))
    loss = lambda m: (m(x) ** 2).sum()

    @nn.jit
    def step(model, opt):
        opt.step(nn.grad(loss)(model))

    eagerly = lambda model, opt: opt.step(nn.grad(loss)(model))
    for run in (step, eagerly):
        run(old, opt)  # warnings are errors
    for run, new in (
        (step, nn.Linear(3, 1)),
        (eagerly, nn.Linear(3, 1)),
        (eagerly, copy.deepcopy(old)),
    ):
        with pytest.warns(nn.OtherModuleWarning, match="the other one learns nothing") as told:
            run(new, opt)
        assert told[0].filename == __file__


def test_gradients_of_unknown_origin_or_of_two_modules_in_turn_are_nobody_s_business():
    x = jnp.ones((2, 3))
    models = [nn.Linear(3, 1), nn.Linear(3, 1)]
    opts = [nn.Optimizer(m, optax.sgd(0.1)) for m in models]
    grads = [nn.grad(lambda m: m(x).sum())(m) for m in models]
    for opt, found in zip(opts, grads, strict=True):
        opt.step(found)
    opts[0].step(jax.tree.map(jnp.add, *grads))
    opts[0].step(nn.jit(nn.grad(lambda m: m(x).sum()))(models[1]))


# --------------------------------------------------------------------------------------------------
# An optimizer that is built in the function it steps in


MOMENTUM = optax.sgd(0.1, momentum=0.9)


def grads_of(model, x):
    return nn.grad(lambda m: (m(x) ** 2).mean())(model)


def stepped(model, x, times=1):
    opt = nn.Optimizer(model, MOMENTUM)
    for _ in range(times):
        opt.step(grads_of(model, x))
    return opt


def in_a_scan(model, x):
    opt = nn.Optimizer(model, MOMENTUM)

    def body(carry, _):
        model, opt = carry
        opt.step(grads_of(model, x))
        return carry, None

    nn.scan(body, (model, opt), None, length=2)


def of_a_copy(model, x):
    copied = copy.deepcopy(model)
    stepped(copied, x)
    return copied(x)


def without_slots(model, x):
    nn.Optimizer(model, optax.sgd(0.1)).step(grads_of(model, x))


def anew_in_each_step(model, x):
    def body(model, _):
        stepped(model, x)
        return model, None

    nn.scan(body, model, None, length=2)


DROPS = {
    "one step": lambda model, x: stepped(model, x) and None,
    "a scan that builds it anew": anew_in_each_step,
}
KEEPS = {
    "several inner steps": lambda model, x: stepped(model, x, times=2) and None,
    "its state returned": lambda model, x: stepped(model, x).state,
    "its state dict returned": lambda model, x: stepped(model, x).state_dict(),
    "steps in a scan": in_a_scan,
    "a copy that is dropped too": of_a_copy,
    "no slots": without_slots,
}


@pytest.mark.parametrize("how", DROPS)
def test_slots_that_a_compiled_step_drops_are_refused(how):
    model, x = nn.Linear(3, 2), jnp.ones((4, 3))
    before = np.array(model.weight)
    with pytest.raises(nn.StateWriteError, match="slots, such as momentum, begin anew"):
        nn.jit(DROPS[how])(model, x)
    np.testing.assert_array_equal(model.weight, before)


@pytest.mark.parametrize("how", KEEPS)
def test_an_optimizer_that_is_built_where_it_steps_may_be_meant(how):
    compiled, by_hand, x = nn.Linear(3, 2), nn.Linear(3, 2), jnp.ones((4, 3))
    by_hand.load_state_dict(compiled.state_dict())
    nn.jit(KEEPS[how])(compiled, x)
    KEEPS[how](by_hand, x)
    np.testing.assert_allclose(compiled.weight, by_hand.weight, rtol=1e-5)
