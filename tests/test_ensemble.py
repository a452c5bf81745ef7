"""Ensembles: n members in one module are what n modules in a loop are."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import sys
import warnings

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
from statefulnn.ensemble import Ensemble, per_member
from tests.devices import run_on_devices
from tests.precision import in_float64


class Net(nn.Module):
    """Three classes of two numbers, with running statistics and dropout."""

    # A bias before a batch norm has a gradient of rounding errors, which Adam would blow up.

    def __init__(self, dropout: float = 0.3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))


def tiny() -> nn.Module:
    return nn.Linear(2, 3, bias=False)


class Flagged(nn.Module):
    """Takes things that are no arrays."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x, mask=None, *, twice=False):
        x = self.fc(x) if mask is None else self.fc(x) * mask
        return 2 * x if twice else x


def some(make, n: int) -> Ensemble:
    """Return an ensemble of models built one by one, which compiles nothing."""
    return nn.Ensemble.of([make() for _ in range(n)])


def arrays(module: nn.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in nn.split(module)[1]]


def assert_same(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    names = nn.split(a)[0].leaf_names
    for name, x, y in zip(names, arrays(a), arrays(b), strict=True):
        if tolerance:
            np.testing.assert_allclose(x, y, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)


def explained(error: pytest.ExceptionInfo) -> str:
    """Return the message, which has three parts."""
    text = str(error.value)
    assert "\n  Why: " in text and "\n  Instead: " in text
    return text


X = jax.random.normal(jax.random.key(10), (16, 2))
Y = jax.random.randint(jax.random.key(11), (16,), 0, 3)


# --------------------------------------------------------------------------------------------------
# Building


def initialised_by_hand() -> nn.Module:
    layer = nn.Linear(3, 4)
    nn.init.xavier_normal_(layer.weight)
    nn.init.trunc_normal_(layer.bias, std=0.1)
    return layer


def drawn_with_jax() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.weight.value = jax.random.laplace(nn.next_key(), (4, 3))
    return layer


def of_another_version() -> nn.Module:
    with nn.init.version("2026.1"):
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


MEMBERS = [
    Net,
    initialised_by_hand,
    drawn_with_jax,
    pytest.param(of_another_version, marks=pytest.mark.long),
    pytest.param(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Embedding(5, 2)),
        marks=pytest.mark.long,
        id="convolution",
    ),
    pytest.param(lambda: nn.LSTM(3, 4), marks=pytest.mark.long, id="LSTM"),
    pytest.param(lambda: nn.MultiheadAttention(4, 2), marks=pytest.mark.long, id="attention"),
    lambda: nn.Linear(3, 4, dtype=jnp.bfloat16),
]


@pytest.mark.parametrize("make", MEMBERS, ids=lambda m: m.__name__)
def test_a_member_starts_as_it_does_when_it_is_built_alone(make):
    key = jax.random.key(3)
    ensemble = nn.Ensemble(make, 3, rng=key)
    for i in range(3):
        with nn.rng_scope(jax.random.fold_in(key, i)):
            alone = make()
        member = ensemble.member(i)
        assert nn.split(member)[0] is nn.split(alone)[0]  # structure, mode, version
        assert_same(member, alone)
    first = next(iter(ensemble.parameters())).value
    assert not np.array_equal(first[0], first[1])


def test_float64_members_start_as_they_do_alone():
    with in_float64():
        make, key = lambda: nn.Linear(3, 4, dtype=jnp.float64), jax.random.key(3)
        ensemble = nn.Ensemble(make, 2, rng=key)
        assert ensemble.stack.weight.dtype == jnp.float64
        with nn.rng_scope(jax.random.fold_in(key, 1)):
            assert_same(ensemble.member(1), make())


def test_500_members_take_one_compilation(no_compilation_cache):
    nn.Ensemble(Net, 2)  # what any first use compiles
    compiled = []

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        ensemble = nn.Ensemble(Net, 500)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1
    assert len(ensemble) == 500
    assert len(np.unique(ensemble.stack.head.weight.value[:, 0, 0])) == 500


def test_a_larger_ensemble_begins_with_the_smaller_one():
    small, large = nn.Ensemble(tiny, 2, rng=5), nn.Ensemble(tiny, 4, rng=5)
    for i in range(2):
        assert_same(small.member(i), large.member(i))


def test_without_a_key_members_follow_the_generator_in_force():
    nn.manual_seed(1)
    first, second = nn.Ensemble(tiny, 2), nn.Ensemble(tiny, 2)
    nn.manual_seed(1)
    again = nn.Ensemble(tiny, 2)
    assert_same(first, again)
    assert not np.array_equal(arrays(first)[0], arrays(second)[0])
    nn.manual_seed(1)
    assert_same(first, nn.Ensemble(tiny, 2, rng=nn.next_key()))


def test_a_key_may_be_typed_raw_or_an_integer():
    ensembles = [
        nn.Ensemble(tiny, 2, rng=rng) for rng in (jax.random.key(7), jax.random.PRNGKey(7), 7)
    ]
    for other in ensembles[1:]:
        assert_same(ensembles[0], other)


@pytest.mark.parametrize("rng", ["seed", 1.5, jax.random.split(jax.random.key(0), 2), np.ones(2)])
def test_what_is_no_key_is_refused(rng):
    with pytest.raises(TypeError):
        nn.Ensemble(tiny, 2, rng=rng)


def test_ties_frozen_parameters_and_hidden_buffers_stay_what_they_are():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.b.bias.requires_grad_(False)
            self.register_buffer("hidden", jnp.ones(2), persistent=False)

    ensemble = nn.Ensemble(Tied, 4)
    assert ensemble.stack.a.weight is ensemble.stack.b.weight
    assert not ensemble.stack.b.bias.requires_grad
    assert ensemble.stack.hidden.shape == (4, 2)
    names = ["stack.a.weight", "stack.a.bias", "stack.b.weight", "stack.b.bias"]
    assert list(ensemble.state_dict()) == names
    member = ensemble.member(2)
    assert member.a.weight is member.b.weight


def test_a_generator_of_a_member_is_its_own():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = nn.Generator(nn.next_key())
            self.scale = nn.Parameter(jnp.ones(()))

        def forward(self, x):
            return x + self.scale * jax.random.normal(self.generator.next_key(), x.shape)

    ensemble = nn.Ensemble(Noisy, 3, rng=0)
    first, second = ensemble(jnp.zeros(4)), ensemble(jnp.zeros(4))
    assert (
        len(np.unique(np.concatenate([first, second]))) == 24
    )  # other numbers for each, each time
    with nn.rng_scope(jax.random.fold_in(jax.random.key(0), 1)):
        alone = Noisy()
    np.testing.assert_array_equal([alone(jnp.zeros(4)), alone(jnp.zeros(4))], [first[1], second[1]])


def test_an_ensemble_may_be_built_inside_compiled_code():
    ensemble = nn.jit(lambda: nn.Ensemble(tiny, 3, rng=0))()
    assert_same(ensemble, nn.Ensemble(tiny, 3, rng=0))
    assert ensemble(X).shape == (3, 16, 3)

    @nn.jit
    def build_and_call(x):
        ensemble = nn.Ensemble(
            lambda: nn.Sequential(tiny(), nn.BatchNorm1d(3)), 3
        )  # of the generator in force, which goes on
        return ensemble(x), ensemble.stack[1].running_mean

    (a, means), (b, _) = build_and_call(X), build_and_call(X)
    assert means.shape == (3, 3) and np.all(np.asarray(means))
    assert not np.array_equal(a, b)


def test_members_may_start_from_values_that_exist():
    pretrained = nn.Linear(2, 4)

    def make():
        member = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
        member[0].weight.value = pretrained.weight + 0.0
        return member

    ensemble = nn.Ensemble(make, 3)
    for i in range(3):
        np.testing.assert_array_equal(ensemble.stack[0].weight[i], pretrained.weight)
    assert not np.array_equal(ensemble.stack[1].weight[0], ensemble.stack[1].weight[1])
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # the code that read it ran once and has no old value to keep
        pretrained.weight.value = jnp.zeros((4, 2))


def test_an_attribute_of_an_unknown_class_does_not_count_as_another_structure():
    class Settings:
        pass

    def make():
        member = nn.Linear(2, 2)
        member.settings = Settings()
        return member

    assert len(nn.Ensemble(make, 2)) == 2


def test_members_are_put_where_a_block_says():
    device = jax.devices("cpu")[0]
    with nn.device(device):
        ensemble = nn.Ensemble(tiny, 2)
    assert all(
        p.devices() == {device} and p.committed
        for p in map(nn.Parameter.data.fget, ensemble.parameters())
    )


# ---- what cannot be built


def structure_by_draw() -> nn.Module:
    width = 3 if float(jax.random.uniform(nn.next_key())) < 0.5 else 4
    return nn.Linear(2, width)


def numpy_of_a_draw() -> nn.Module:
    layer = nn.Linear(2, 3)
    layer.weight.value = np.asarray(layer.weight) * 2
    return layer


def branch_on_a_draw() -> nn.Module:
    layer = nn.Linear(2, 3)
    if layer.weight.value[0, 0] > 0:
        layer.weight.value = -layer.weight
    return layer


@pytest.mark.parametrize("make", [structure_by_draw, numpy_of_a_draw, branch_on_a_draw])
def test_a_member_whose_structure_depends_on_its_draw_is_refused(make):
    with pytest.raises(ValueError, match="looks at the values it draws") as error:
        nn.Ensemble(make, 3)
    assert "nn.Ensemble.of([make_member() for _ in range(n)])" in explained(error)
    models = [make() for _ in range(2)]  # the way out that the message names
    if make is not structure_by_draw:
        assert len(nn.Ensemble.of(models)) == 2


def drawn_by_numpy() -> nn.Module:
    layer = nn.Linear(2, 3)
    layer.bias.value = np.random.randn(3).astype(np.float32)
    return layer


def seeded_by_the_system() -> nn.Module:
    layer = nn.Linear(2, 3)
    layer.generator = nn.Generator()
    return layer


@pytest.mark.parametrize(
    ("make", "name"), [(drawn_by_numpy, "bias"), (seeded_by_the_system, "generator")]
)
def test_draws_that_would_be_the_same_in_all_members_are_refused(make, name):
    with pytest.raises(ValueError, match=f"draw '{name}' from somewhere else") as error:
        nn.Ensemble(make, 3)
    assert "nn.next_key()" in explained(error)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2, random.randrange(1, 10**6)),
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout(random.random())),
    ],
)
def test_another_structure_at_each_call_is_refused(make):
    with pytest.raises(ValueError, match="another structure at each call") as error:
        nn.Ensemble(make, 3)
    assert " became " in explained(error)


def test_what_builds_no_member_is_refused():
    for wrong in (nn.Linear(2, 2), "Linear", None):
        with pytest.raises(TypeError, match="the first argument builds a member") as error:
            nn.Ensemble(wrong, 3)
        assert "nn.Ensemble.of(models)" in explained(error)
    with pytest.raises(TypeError, match="returned the class Linear") as error:
        nn.Ensemble(lambda: nn.Linear, 3)
    explained(error)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="returns one Linear at each call") as error:
        nn.Ensemble(lambda: model, 3)
    assert "nn.Ensemble.of([model] * n)" in explained(error)


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_member_is_refused(n):
    with pytest.raises(ValueError, match=f"of {n} members") as error:
        nn.Ensemble(plain, n)
    explained(error)
    with pytest.raises(TypeError):
        nn.Ensemble(plain, 2.5)


def test_members_without_numbers_are_refused():
    with pytest.raises(UninitializedParameterError, match="without a shape") as error:
        nn.Ensemble(lambda: nn.LazyLinear(3), 2)
    explained(error)
    with nn.device("meta"), pytest.raises(UninitializedParameterError, match="meta device"):
        nn.Ensemble(plain, 2)
    with pytest.raises(UninitializedParameterError, match="meta device"):
        nn.Ensemble(lambda: nn.Linear(2, 2, device="meta"), 2)
    with pytest.raises(UninitializedParameterError):
        nn.Ensemble.of([nn.LazyLinear(3)] * 2)
    with pytest.raises(ValueError, match="neither parameters nor buffers") as error:
        nn.Ensemble(nn.ReLU, 2)
    explained(error)


# ---- of models


def test_models_that_exist_become_members():
    models = [Net() for _ in range(3)]
    ensemble = nn.Ensemble.of(models)
    for i, model in enumerate(models):
        assert_same(ensemble.member(i), model)
    models[0].head.bias.value = jnp.full(3, 9.0)
    assert not np.any(np.asarray(ensemble.stack.head.bias) == 9.0)  # copied


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="of no models"):
        nn.Ensemble.of([])
    with pytest.raises(TypeError, match="of the class Net"):
        nn.Ensemble.of([Net])
    with pytest.raises(
        ValueError, match=r"number 1 against number 0 \(.*training: True became False"
    ):
        nn.Ensemble.of([plain(), plain().eval()])
    a, b = nn.Module(), nn.Module()
    a.p, b.p = nn.Parameter(jnp.ones(2)), nn.Parameter(jnp.ones(3))
    with pytest.raises(ShapeError, match=r"'p' differ: float32\[3\] in number 1"):
        nn.Ensemble.of([a, b])
    b.p = nn.Parameter(jnp.ones(2, jnp.bfloat16))
    with pytest.raises(DtypeError, match=r"'p' differ: bfloat16\[2\] in number 1") as error:
        nn.Ensemble.of([a, b])
    explained(error)


# --------------------------------------------------------------------------------------------------
# Calls


def torch_net() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )


def our_net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def as_numpy(state: dict) -> dict:
    return {name: tensor.numpy() for name, tensor in state.items()}


def test_a_call_is_that_of_torch_func():
    theirs = [torch_net().eval() for _ in range(4)]
    ours = some(our_net, 4).eval()
    ours.load_state_dict([as_numpy(model.state_dict()) for model in theirs])
    params, buffers = torch.func.stack_module_state(theirs)
    x = np.array(X)

    def call(params, buffers, x):
        return torch.func.functional_call(theirs[0], (params, buffers), (x,))

    shared = torch.func.vmap(call, in_dims=(0, 0, None))(params, buffers, torch.tensor(x))
    np.testing.assert_allclose(ours(X), shared.detach(), rtol=1e-5, atol=1e-6)
    own = np.stack([x * i for i in range(4)])
    each = torch.func.vmap(call)(params, buffers, torch.tensor(own))
    np.testing.assert_allclose(
        ours(jnp.asarray(own), in_axes=0), each.detach(), rtol=1e-5, atol=1e-6
    )
    for name, value in {**params, **buffers}.items():
        np.testing.assert_array_equal(ours.state_dict()[f"stack.{name}"], value.detach().numpy())


def test_each_member_keeps_statistics_of_its_own_as_separate_torch_models_do():
    theirs = [torch_net() for _ in range(3)]
    ours = some(our_net, 3)
    ours.load_state_dict([as_numpy(model.state_dict()) for model in theirs])
    xs = np.random.randn(2, 3, 16, 2).astype(np.float32) * np.array([1, 2, 3])[
        :, None, None
    ].astype("f")
    step = nn.jit(lambda ensemble, x: ensemble(x, in_axes=0))
    for x in xs:
        out = step(ours, jnp.asarray(x))
        for i, model in enumerate(theirs):
            reference = model(torch.tensor(x[i])).detach()
            np.testing.assert_allclose(out[i], reference, rtol=1e-4, atol=1e-5)
    for own, model in zip(ours.state_dicts(), theirs, strict=True):
        for name, value in as_numpy(model.state_dict()).items():
            np.testing.assert_allclose(own[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(ours.stack[1].num_batches_tracked, [2, 2, 2])


def test_dropout_masks_differ_between_members_and_are_those_of_their_keys():
    ensemble = some(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1)), 3)
    masks = lambda: ensemble.map(lambda member, x: member[0](x), jnp.ones(200)) > 0
    nn.manual_seed(4)
    first, second = np.asarray(masks()), np.asarray(masks())
    for a, b in itertools.combinations([*first, *second], 2):
        assert 0.3 < (a == b).mean() < 0.7
    nn.manual_seed(4)
    key = nn.next_key()
    for i, own in enumerate(jax.random.split(key, 3)):
        with nn.rng_scope(own):
            np.testing.assert_array_equal(first[i], ensemble.member(i)[0](jnp.ones(200)) > 0)
    ensemble.eval()
    assert masks().all()


def test_inputs_may_be_anything_a_member_takes():
    ensemble = some(Flagged, 3)
    out = np.asarray(ensemble(X))
    np.testing.assert_array_equal(ensemble(X, None), out)
    np.testing.assert_array_equal(ensemble(X, twice=True), 2 * out)
    masks = jnp.arange(3.0)
    np.testing.assert_allclose(
        ensemble(X, masks, in_axes=(None, 0)), out * np.arange(3.0)[:, None, None]
    )
    last = jnp.stack([X, 2 * X, 3 * X], axis=-1)
    np.testing.assert_allclose(
        ensemble(last, in_axes=-1), ensemble(jnp.stack([X, 2 * X, 3 * X]), in_axes=0)
    )
    pair = {"a": jnp.ones((3, 4, 2)), "b": jnp.ones((4, 2))}
    both = ensemble.map(lambda m, d: m(d["a"]) - m(d["b"]), pair, in_axes=({"a": 0, "b": None},))
    np.testing.assert_array_equal(both, np.zeros((3, 4, 2)))


def test_an_empty_batch_gives_empty_outputs():
    ensemble = some(plain, 3)
    x = jnp.zeros((0, 2))
    assert ensemble(x).shape == (3, 0, 3)
    assert ensemble.vote(x).shape == ensemble.disagreement(x).shape == (0,)


@pytest.mark.parametrize(
    ("shape", "in_axes", "said"),
    [
        ((4, 16, 2), 0, r"input 0 of shape \(4, 16, 2\) and in_axes 0"),
        ((3, 16, 2), 1, r"in_axes 1 for it"),
        ((16, 2), (2,), r"in_axes 2 for it"),
        ((), 0, r"input 0 of shape \(\)"),
    ],
)
def test_data_without_the_axis_of_the_members_is_refused(shape, in_axes, said):
    with pytest.raises(ShapeError, match=said) as error:
        some(plain, 3)(jnp.ones(shape), in_axes=in_axes)
    assert "of 3 members" in explained(error)


def test_in_axes_have_one_entry_for_each_input():
    with pytest.raises(ValueError, match="in_axes of length 2 and 1 inputs") as error:
        some(plain, 3)(X, in_axes=(0, None))
    explained(error)


def test_what_a_function_writes_to_its_member_is_kept():
    ensemble = some(plain, 3)

    def fill(member, value):
        member[0].bias.value = jnp.full(8, value)

    nn.jit(lambda e, v: e.map(fill, v, in_axes=0))(ensemble, jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(ensemble.stack[0].bias[:, 0], [1, 2, 3])


def test_apply_draws_anew_for_each_member_by_the_members_shapes():
    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")

    ensemble = some(lambda: nn.Linear(600, 20), 4)
    assert nn.Sequential(ensemble).apply(init)[0] is ensemble
    weights = np.asarray(ensemble.stack.weight)
    # U(±√(6 / fan_in)); of the stack (4, 20, 600) the fan would be 12,000.
    assert 0.095 < weights.max() < 0.1 and len(np.unique(weights)) > 10_000
    with pytest.raises(StructureChangeError) as error:
        some(Net, 2).apply(lambda m: setattr(m, "p", 0.5))
    assert "ensemble.stack.modules()" in "".join(error.value.__notes__)


def test_outputs_of_submodules_are_captured_in_the_function_of_a_member():
    ensemble = some(plain, 3)
    _, inner = ensemble.map(lambda member, x: nn.capture(member, "0")(x), X)
    assert inner["0"].shape == (3, 16, 8)


# --------------------------------------------------------------------------------------------------
# Mean, vote, disagreement: on members that put out given numbers


class Fixed(nn.Module):
    """Puts out its parameter."""

    def __init__(self, out):
        super().__init__()
        self.out = nn.Parameter(jnp.asarray(out))

    def forward(self):
        return self.out + 0


def fixed(outputs) -> Ensemble:
    return nn.Ensemble.of([Fixed(out) for out in outputs])


def logits_of(classes: np.ndarray, count: int) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


def test_vote_is_the_mode_as_torch_has_it_ties_included():
    classes = np.random.default_rng(0).integers(0, 4, (6, 200))
    vote = fixed(logits_of(classes, 4)).vote()
    np.testing.assert_array_equal(vote, torch.mode(torch.tensor(classes), dim=0).values)
    assert vote.dtype == jnp.int32
    tied = fixed(logits_of(np.array([[2], [1], [2], [1], [0]]), 4))
    assert tied.vote().tolist() == [1]


def test_disagreement_is_the_share_of_pairs():
    classes = np.random.default_rng(0).integers(0, 3, (5, 50))
    pairs = [a != b for a, b in itertools.combinations(classes, 2)]
    np.testing.assert_allclose(
        fixed(logits_of(classes, 3)).disagreement(), np.mean(pairs, 0), rtol=1e-6
    )


def test_mean_and_variance_are_numpys():
    outputs = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    ensemble = fixed(outputs)
    np.testing.assert_allclose(ensemble.mean(), outputs.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ensemble.variance(), outputs.var(0), rtol=1e-5, atol=1e-6)
    probabilities = torch.softmax(torch.tensor(outputs), -1)
    np.testing.assert_allclose(ensemble.mean(of=jax.nn.softmax), probabilities.mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        ensemble.variance(of=jax.nn.softmax),
        probabilities.var(0, correction=0),
        rtol=1e-4,
        atol=1e-7,
    )


def test_classes_may_be_on_any_axis():
    classes = np.random.default_rng(0).integers(0, 3, (5, 2, 4))
    images = np.moveaxis(logits_of(classes, 3), -1, 2)  # (members, N, classes, W)
    expected = torch.mode(torch.tensor(classes), dim=0).values
    for dim in (1, -2):
        np.testing.assert_array_equal(fixed(images).vote(dim=dim), expected)
        np.testing.assert_array_equal(
            fixed(images).disagreement(dim=dim), fixed(logits_of(classes, 3)).disagreement()
        )


def test_a_member_that_puts_out_no_numbers_has_no_vote():
    good = logits_of(np.array([[2, 2], [1, 1], [1, 2]]), 3)
    diverged = np.full((1, 2, 3), np.nan, np.float32)
    with_one = fixed([*good, *diverged, *diverged, *diverged])
    np.testing.assert_array_equal(with_one.vote(), fixed(good).vote())
    np.testing.assert_array_equal(with_one.disagreement(), fixed(good).disagreement())
    none = fixed([*diverged, *diverged])
    assert none.vote().tolist() == [-1, -1]
    assert np.isnan(none.disagreement()).all()
    assert np.isnan(with_one.mean()).all()  # a mean shows it


def test_votes_need_classes_and_disagreement_two_members():
    with pytest.raises(ShapeError, match="nothing to choose") as error:
        fixed(np.ones((3, 4, 1), np.float32)).vote()
    explained(error)
    with pytest.raises(ShapeError, match="no axis -1 of classes"):
        fixed(np.ones(3, np.float32)).vote()
    with pytest.raises(ShapeError, match="no axis 2 of classes"):
        fixed(np.ones((3, 4, 5), np.float32)).disagreement(dim=2)
    with pytest.raises(ShapeError, match="put out a tuple"):
        some(lambda: nn.LSTM(2, 3), 2).vote(X)
    with pytest.raises(ValueError, match="of 1 member") as error:
        fixed(np.ones((1, 4, 5), np.float32)).disagreement()
    explained(error)


def test_summaries_work_in_compiled_code_and_in_bfloat16():
    ensemble = some(tiny, 4).bfloat16()
    x = X.astype(jnp.bfloat16)
    summary = lambda e, x: (e.mean(x), e.variance(x), e.vote(x), e.disagreement(x))
    for eager, compiled in zip(summary(ensemble, x), nn.jit(summary)(ensemble, x), strict=True):
        assert eager.dtype == compiled.dtype
        np.testing.assert_allclose(
            eager.astype(jnp.float32), compiled.astype(jnp.float32), rtol=0.02, atol=0.02
        )


# --------------------------------------------------------------------------------------------------
# A module like any other


def test_calls_do_not_retrace():
    ensemble = some(Net, 3)
    step = nn.jit(lambda e, x: e(x))
    for _ in range(3):
        step(ensemble, X)
    step(some(Net, 3), X)
    assert step.trace_count == 1
    compiled = ensemble.eval().compile()
    np.testing.assert_allclose(compiled(X), step(ensemble, X), rtol=1e-5, atol=1e-6)
    assert step.trace_count == 2


def test_it_becomes_a_pure_function():
    ensemble = some(Net, 3)
    before = arrays(ensemble)
    fn, params, state = nn.functionalize(ensemble, mutable=True)
    assert params["stack.head.weight"].shape == (3, 3, 8)
    key = jax.random.key(0)
    out, state = jax.jit(lambda p, s, x: fn(p, s, x, rng=key))(params, state, X)
    assert out.shape == (3, 16, 3)
    assert state["stack.body.1.num_batches_tracked"].tolist() == [1, 1, 1]
    for a, b in zip(before, arrays(ensemble), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_is_a_pytree_whose_members_can_be_picked():
    ensemble = some(Net, 4).eval()
    kept = jax.tree.map(lambda v: v[jnp.array([3, 1])], ensemble)
    assert len(kept) == 2
    np.testing.assert_allclose(kept(X), ensemble(X)[jnp.array([3, 1])], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(lambda e, x: e(x))(ensemble, X), ensemble(X), rtol=1e-5, atol=1e-6
    )


def test_copies_and_pickles_are_equal_and_independent():
    ensemble = some(Net, 3).eval()
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert_same(ensemble, other)
        other.stack.head.bias.value = jnp.ones((3, 3))
        assert not np.array_equal(other(X), ensemble(X))
        assert len(other) == 3 and not other.stack.training


def test_a_member_is_a_copy_with_names_and_mode_of_its_own():
    ensemble = some(Net, 3).eval()
    member = ensemble.member(1)
    assert type(member) is Net and not member.training
    np.testing.assert_allclose(member(X), ensemble(X)[1], rtol=1e-5, atol=1e-6)
    member.head.bias.value = jnp.ones(3)
    assert not np.any(np.asarray(ensemble.stack.head.bias) == 1)
    with pytest.raises(ShapeError, match="'head.bias'"):
        member.head.bias.value = jnp.ones(4)
    with pytest.raises(ShapeError, match="'stack.head.bias'"):
        ensemble.stack.head.bias.value = jnp.ones(4)
    assert_same(ensemble.member(-1), ensemble.member(2))
    for wrong in (3, -4):
        with pytest.raises(IndexError, match=f"member {wrong} of an Ensemble of 3") as error:
            ensemble.member(wrong)
        explained(error)


def test_modes_dtypes_freezing_and_repr_are_those_of_all_members():
    ensemble = some(Net, 3)
    assert ensemble.train().stack.body[3].training and not ensemble.eval().stack.body[3].training
    assert {p.dtype for p in ensemble.to(jnp.bfloat16).parameters()} == {jnp.dtype(jnp.bfloat16)}
    ensemble.stack.body.requires_grad_(False)
    grads = jax.eval_shape(nn.grad(lambda e: e(X.astype(jnp.bfloat16)).sum()), ensemble)
    assert {name: (g.shape, g.dtype.name) for name, g in grads.items()} == {
        "stack.head.weight": ((3, 3, 8), "bfloat16"),
        "stack.head.bias": ((3, 3), "bfloat16"),
    }
    assert repr(ensemble).startswith("Ensemble(\n  n=3\n  (stack): Net(")
    assert len(ensemble) == 3


# --------------------------------------------------------------------------------------------------
# State dicts


def test_state_dicts_are_stacked_or_one_for_each_member():
    ensemble = some(Net, 3)
    stacked, each = ensemble.state_dict(), ensemble.state_dicts()
    assert list(stacked) == [f"stack.{name}" for name in Net().state_dict()]
    for i, own in enumerate(each):
        alone = Net()
        alone.load_state_dict(own)
        assert_same(alone, ensemble.member(i))
        assert own._metadata == alone.state_dict()._metadata
        for name, value in own.items():
            np.testing.assert_array_equal(value, stacked[f"stack.{name}"][i])


def test_both_kinds_of_state_dict_load():
    source = some(Net, 3)
    for state in (
        source.state_dict(),
        source.state_dicts(),
        tuple(source.member(i).state_dict() for i in range(3)),
        [{k: np.asarray(v) for k, v in d.items()} for d in source.state_dicts()],
    ):
        ensemble = some(Net, 3)
        assert str(ensemble.load_state_dict(state)) == "<All keys matched successfully>"
        assert_same(ensemble, source)


def test_a_model_around_it_saves_and_loads_it():
    make = lambda: nn.Sequential(nn.Linear(2, 2), some(plain, 3))
    source, other = make(), make()
    other.load_state_dict(source.state_dict())
    assert_same(source, other)
    assert "1.stack.0.weight" in source.state_dict()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d[:2], r"loaded 2 state dicts \(OrderedDict\) into an Ensemble of 3"),
        (lambda d: [*d[:2], 5], r"\(OrderedDict, int\)"),
        (lambda d: [*d[:2], {}], r"number 2 against number 0 \('0.bias', "),
        (
            lambda d: [*d[:2], {**d[2], "0.bias": jnp.ones(9)}],
            r"'0.bias' has the shapes \[\(8,\), \(9,\)",
        ),
        (lambda d: [{**e, "more": jnp.ones(1)} for e in d], r'Unexpected key.*"stack.more"'),
        (lambda d: d[0], "Missing key"),
    ],
)
def test_state_dicts_that_do_not_fit_change_nothing(change, said):
    ensemble = some(plain, 3)
    before = arrays(ensemble)
    with pytest.raises(StateDictError, match=said) as error:
        ensemble.load_state_dict(change(some(plain, 3).state_dicts()))
    explained(error)
    for a, b in zip(before, arrays(ensemble), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_member_loads_alone():
    ensemble, model = some(Net, 3), Net()
    others = [ensemble.member(i) for i in (0, 2)]
    ensemble.load_member(1, model.state_dict())
    assert_same(ensemble.member(1), model)
    for i, other in zip((0, 2), others, strict=True):
        assert_same(ensemble.member(i), other)
    ensemble.load_member(-1, {"head.bias": np.ones(3, np.float32)}, strict=False)
    assert ensemble.stack.head.bias[2].tolist() == [1, 1, 1]
    with pytest.raises(StateDictError, match="Missing key"):
        ensemble.load_member(0, {})
    with pytest.raises(IndexError):
        ensemble.load_member(3, model.state_dict())


# --------------------------------------------------------------------------------------------------
# Training: the oracle is a loop over separate models


def cross_entropy(member, x, y):
    return F.cross_entropy(member(x), y)


@nn.jit
def train_step(ensemble, opt, xs, ys):
    def loss(ensemble):
        losses = ensemble.map(cross_entropy, xs, ys, in_axes=0)
        return losses.sum(), losses

    (_, losses), grads = nn.value_and_grad(loss, has_aux=True)(ensemble)
    opt.step(grads)
    return losses


@nn.jit
def train_one(model, opt, x, y):
    loss, grads = nn.value_and_grad(cross_entropy)(model, x, y)
    opt.step(grads)
    return loss


def batches(members: int, steps: int, size: int = 8) -> list:
    """Return for each step the batches of each member: another order for each."""
    orders = np.stack([np.random.default_rng(i).permutation(len(X)) for i in range(members)])
    found = []
    for step in range(steps):
        chosen = np.roll(orders, step * size, axis=1)[:, :size]
        found.append((X[chosen], Y[chosen]))
    return found


def clipped(rate):
    return optax.chain(optax.clip_by_global_norm(0.05), optax.adam(rate))


RATES = jnp.array([1e-3, 1e-2, 1e-1])


@pytest.mark.parametrize(
    ("tx", "of_member"),
    [
        pytest.param(lambda: optax.adam(1e-2), lambda i: optax.adam(1e-2), marks=pytest.mark.long),
        (lambda: per_member(clipped, rate=RATES[1:]), lambda i: clipped(float(RATES[i + 1]))),
        pytest.param(
            lambda: optax.sgd(0.1, momentum=0.9),
            lambda i: optax.sgd(0.1, momentum=0.9),
            marks=pytest.mark.long,
        ),
        pytest.param(
            lambda: per_member(clipped(1e-2)), lambda i: clipped(1e-2), marks=pytest.mark.long
        ),
        pytest.param(
            lambda: per_member(optax.lamb(1e-2)), lambda i: optax.lamb(1e-2), marks=pytest.mark.long
        ),
    ],
    ids=["adam", "rates", "momentum", "clipped", "lamb"],
)
def test_training_together_is_training_one_by_one(tx, of_member):
    ensemble = some(Net, 2)
    models = [ensemble.member(i) for i in range(2)]
    opt = nn.Optimizer(ensemble, tx())
    opts = [nn.Optimizer(model, of_member(i)) for i, model in enumerate(models)]
    for step, (xs, ys) in enumerate(batches(2, 5)):
        nn.manual_seed(step)
        losses = train_step(ensemble, opt, xs, ys)
        nn.manual_seed(step)
        keys = jax.random.split(nn.next_key(), 2)
        for i, model in enumerate(models):
            with nn.rng_scope(keys[i]):
                loss = train_one(model, opts[i], xs[i], ys[i])
            np.testing.assert_allclose(losses[i], loss, rtol=1e-4, atol=1e-5)
    for i, model in enumerate(models):
        assert_same(ensemble.member(i), model, rtol=1e-4, atol=1e-5)
        for name, slot in opts[i].state_dict().items():
            head, *rest = name.split(".")
            ours = opt.state_dict()[".".join([head, "stack", *rest]) if rest else name]
            if ours.ndim > slot.ndim:  # adam's count is one for all
                ours = ours[i]
            np.testing.assert_allclose(ours, slot, rtol=1e-3, atol=1e-6, err_msg=name)


def test_training_is_that_of_separate_torch_models():
    theirs = [torch_net() for _ in range(3)]
    ensemble = some(our_net, 3)
    ensemble.load_state_dict([as_numpy(model.state_dict()) for model in theirs])
    make = lambda rate: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(rate, momentum=0.9))
    opt = nn.Optimizer(ensemble, per_member(make, rate=jnp.array([0.01, 0.1, 1.0])))
    torch_opts = [
        torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        for model, rate in zip(theirs, (0.01, 0.1, 1.0), strict=True)
    ]
    for xs, ys in batches(3, 5):
        losses = train_step(ensemble, opt, xs, ys)
        for i, (model, torch_opt) in enumerate(zip(theirs, torch_opts, strict=True)):
            torch_opt.zero_grad()
            x, y = torch.tensor(np.array(xs[i])), torch.tensor(np.array(ys[i])).long()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            torch_opt.step()
            np.testing.assert_allclose(losses[i], loss.item(), rtol=1e-4, atol=1e-5)
    for own, model in zip(ensemble.state_dicts(), theirs, strict=True):
        for name, value in as_numpy(model.state_dict()).items():
            np.testing.assert_allclose(own[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_members_do_not_feel_each_other():
    ensemble = some(Net, 3)
    other = copy.deepcopy(ensemble)
    make = lambda e: nn.Optimizer(e, per_member(clipped(1e-2)))
    xs, ys = batches(3, 1)[0]
    for e, data in ((ensemble, xs), (other, xs.at[1].multiply(100.0))):
        nn.manual_seed(0)
        opt = make(e)
        for _ in range(2):
            train_step(e, opt, data, ys)
    for i in (0, 2):
        assert_same(ensemble.member(i), other.member(i))
    assert not np.array_equal(arrays(ensemble.member(1))[0], arrays(other.member(1))[0])


def test_training_does_not_retrace():
    step = nn.jit(train_step.__wrapped__)
    for _ in range(2):
        ensemble = some(Net, 3)
        opt = nn.Optimizer(ensemble, per_member(optax.adam, learning_rate=RATES))
        for xs, ys in batches(3, 2):
            step(ensemble, opt, xs, ys)
        opt.learning_rate = opt.learning_rate / 2
        step(ensemble, opt, xs, ys)
    assert step.trace_count == 1


SPREAD = """
import copy, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import statefulnn as nn
from statefulnn.ensemble import per_member

one = nn.Ensemble.of([nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)) for _ in range(4)])
two = copy.deepcopy(one).to(NamedSharding(Mesh(jax.devices(), ("members",)), PartitionSpec("members")))

@nn.jit
def step(ensemble, opt, x):
    grads = nn.grad(lambda e: (e(x) ** 2).sum())(ensemble)
    opt.step(grads)

for ensemble in (one, two):
    nn.manual_seed(0)
    opt = nn.Optimizer(ensemble, per_member(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))))
    for _ in range(3):
        step(ensemble, opt, jnp.ones((5, 2)))
weights = two.stack[0].weight.value
assert len(weights.devices()) == 2 and weights.addressable_shards[0].data.shape == (2, 3, 2)
np.testing.assert_allclose(weights, one.stack[0].weight.value, rtol=1e-5)
"""


@pytest.mark.long
def test_members_may_be_spread_over_devices():
    run_on_devices(2, SPREAD)


# --------------------------------------------------------------------------------------------------
# per_member


def one_parameter(n: int) -> tuple:
    return {"w": jnp.zeros((n, 2))}, {"w": jnp.ones((n, 2))}


def test_rates_are_state_that_can_be_read_written_and_saved():
    ensemble = some(plain, 3)
    make = lambda: nn.Optimizer(ensemble, per_member(optax.sgd, learning_rate=RATES))
    opt = make()
    np.testing.assert_array_equal(opt.learning_rate, RATES)
    opt.learning_rate = jnp.array([0.0, 0.0, 0.5])
    other = make()
    other.load_state_dict(opt.state_dict())
    before = ensemble.stack[2].bias.value
    grads = {name: jnp.ones_like(p.value) for name, p in ensemble.named_parameters()}
    other.step(grads)
    np.testing.assert_allclose(
        before - ensemble.stack[2].bias.value,
        np.array([[0.0], [0.0], [0.5]]) * np.ones(3),
        atol=1e-6,
    )


def test_several_hyperparameters_schedules_and_flags_may_be_given():
    params, grads = one_parameter(2)
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    tx = per_member(
        lambda scale, schedule, on: optax.chain(
            optax.scale(scale),
            optax.scale_by_learning_rate(schedule),
            optax.scale(2.0 if on else 1.0),
        ),
        scale=np.array([1.0, 10.0], np.float32),
        schedule=schedule,
        on=True,
    )
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(grads, state, params)
        expected = -2 * (1 - step / 10) * np.array([[1, 1], [10, 10]])
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)


@pytest.mark.long
def test_extra_arguments_are_per_member_where_they_are_arrays():
    params, grads = one_parameter(2)
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.0, atol=1e-6)
    tx = per_member(optax.chain(optax.sgd(1.0), plateau))
    state = tx.init(params)
    alone = optax.chain(optax.sgd(1.0), plateau)
    one = {"w": jnp.ones(2)}
    states = [alone.init(one) for _ in range(2)]
    together, by_itself = jax.jit(tx.update), jax.jit(alone.update)
    for step in range(6):
        values = jnp.array([1.0 / (step + 1), 1.0])  # the first goes on falling
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes, nn.Optimizer lets it
            updates, state = together(grads, state, params, value=values)
        for i in range(2):
            with jax.numpy_dtype_promotion("standard"):
                theirs, states[i] = by_itself(one, states[i], one, value=values[i])
            np.testing.assert_allclose(updates["w"][i], theirs["w"])
    assert float(updates["w"][0, 0]) != float(updates["w"][1, 0])


def test_each_member_is_clipped_by_its_own_norm():
    grads = {"a": jnp.array([[3.0, 4.0], [0.3, 0.4]]), "b": jnp.array([0.0, 0.0])}
    tx = per_member(optax.clip_by_global_norm(1.0))
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))  # without parameters, as optax allows
    np.testing.assert_allclose(updates["a"], [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)
    together, _ = jax.jit(optax.clip_by_global_norm(1.0).update)(grads, optax.EmptyState())
    assert float(together["a"][1, 0]) < 0.1  # what per_member is there to prevent


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((optax.adam,), {}, "with a function\n"),
        ((optax.adam,), {"learning_rate": 1e-3}, "without an array among them"),
        ((optax.adam,), {"learning_rate": [1e-3, 1e-2]}, "a list as 'learning_rate'"),
        ((optax.adam,), {"learning_rate": RATES, "b1": [0.9, 0.8, 0.7]}, "a list as 'b1'"),
        ((optax.adam(1e-3),), {"learning_rate": RATES}, "has its own"),
        ((5,), {}, "a int"),
    ],
)
def test_what_per_member_cannot_map_is_refused(arguments, options, said):
    with pytest.raises(TypeError, match=said) as error:
        per_member(*arguments, **options)
    explained(error)


def test_per_member_refuses_what_has_no_axis_of_members():
    ensemble = some(plain, 3)
    with pytest.raises(
        ShapeError, match=r"hyperparameter 'rate' of shape \(4,\) for 3 members"
    ) as error:
        nn.Optimizer(ensemble, per_member(clipped, rate=jnp.ones(4)))
    explained(error)
    both = nn.Sequential(ensemble, nn.Linear(5, 7))
    with pytest.raises(ShapeError, match=r"parameter '1.bias' of shape \(7,\) for 3 members"):
        nn.Optimizer(both, per_member(optax.adam(1e-3)))
    scalar = nn.Module()
    scalar.p = nn.Parameter(jnp.ones(()))
    with pytest.raises(ShapeError, match=r"parameter 'p' of shape \(\)"):
        nn.Optimizer(scalar, per_member(optax.adam(1e-3)))
    tx = per_member(lambda rate: rate, rate=RATES)
    with pytest.raises(TypeError, match="with a function that returned"):
        nn.Optimizer(ensemble, tx)
    opt = nn.Optimizer(ensemble, per_member(optax.sgd(1.0)))
    grads = {name: p.value for name, p in ensemble.named_parameters()}
    with pytest.raises(ShapeError, match=r"extra argument '0' of shape \(2,\) for 3 members"):
        opt.step(grads, value=jnp.ones(2))


def test_without_optax_per_member_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ImportError, match="pip install optax") as error:
        per_member(None)
    explained(error)
