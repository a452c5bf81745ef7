"""register_parametrization and its relatives against torch, and under this package's transforms."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from statefulnn.utils import parametrize
from tests.parity.oracle import array, close, same_class
from tests.quick import diagonal
from tests.utils.twins import compare_calls, same_state, twins


class Symmetric(nn.Module):
    def forward(self, x):
        return jnp.triu(x) + jnp.triu(x, 1).T

    def right_inverse(self, a):
        return jnp.triu(a)


class TorchSymmetric(torch.nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T

    def right_inverse(self, a):
        return a.triu()


class Double(nn.Module):
    """No right inverse."""

    def forward(self, x):
        return 2 * x


class TorchDouble(torch.nn.Module):
    def forward(self, x):
        return 2 * x


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(jnp.full((1,), 3.0))

    def forward(self, x):
        return x * self.scale

    def right_inverse(self, x):
        return x / self.scale


class TorchScale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x):
        return x * self.scale

    def right_inverse(self, x):
        return x / self.scale


class RankOne(nn.Module):
    def forward(self, x, y):
        return x[..., :, None] @ y[..., None, :]

    def right_inverse(self, z):
        u, s, vh = jnp.linalg.svd(z, full_matrices=False)
        root = jnp.sqrt(s[..., 0])
        return u[..., :, 0] * root, vh[..., 0, :] * root


class TorchRankOne(torch.nn.Module):
    def forward(self, x, y):
        return x.unsqueeze(-1) @ y.unsqueeze(-2)

    def right_inverse(self, z):
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        root = s[..., 0].sqrt()
        return u[..., :, 0] * root, vh[..., 0, :] * root


PAIRS = {
    "symmetric": (Symmetric, TorchSymmetric),
    "double": (Double, TorchDouble),
    "scale": (Scale, TorchScale),
    "rank one": (RankOne, TorchRankOne),
}


def add(*kinds, name="weight", **kwargs):
    """A change that registers these kinds, one after the other."""

    def change(library, layer):
        for kind in kinds:
            made = PAIRS[kind][library is torch.nn]()
            library.utils.parametrize.register_parametrization(layer, name, made, **kwargs)

    return change


CHAINS = [
    ("symmetric",),
    ("double",),
    ("scale",),
    ("rank one",),
    ("symmetric", "scale"),
    ("rank one", "double", "scale"),
]


@pytest.mark.parametrize("kinds, jitted", diagonal(2, CHAINS, [False, True]))
def test_outputs_and_gradients_are_torchs(kinds, jitted):
    theirs, ours = twins("Linear", (4, 4), add(*kinds))
    same_state(ours, theirs)
    assert repr(ours) == repr(theirs).replace("Torch", "")
    compare_calls(theirs, ours, array(5, 4), 2, jitted)


@pytest.mark.parametrize("kinds", CHAINS, ids="+".join)
def test_the_originals_are_those_that_the_right_inverse_gives(kinds):
    weight = array(4, 4)
    theirs, ours = torch.nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.weight.data = torch.as_tensor(weight.copy())
    ours.weight.value = jnp.asarray(weight)
    before = ours.weight
    add(*kinds)(torch.nn, theirs)
    add(*kinds)(nn, ours)
    wanted = theirs.parametrizations.weight.state_dict()
    got = ours.parametrizations.weight.state_dict()
    assert list(got) == list(wanted)
    # The two singular vectors may change sign together.
    for name, value in wanted.items():
        sign = np.abs if "original0" in wanted else np.asarray
        close(sign(got[name]), sign(value.numpy()), name, 1e-5)
    close(ours.weight, theirs.weight, "weight", 1e-5)
    if "original" in wanted:
        assert ours.parametrizations.weight.original is before  # an optimizer still knows it


@pytest.mark.parametrize(
    "kinds", [("symmetric",), ("scale",), ("symmetric", "scale"), ("rank one",)]
)
def test_assigning_writes_the_originals(kinds):
    theirs, ours = twins("Linear", (4, 4), add(*kinds))
    value = array(4, 4, seed=3)
    value = value + value.T
    box = next(iter(ours.parametrizations.weight._parameters.values()))
    with torch.no_grad():
        theirs.weight = torch.as_tensor(value)
    ours.weight = jnp.asarray(value)
    close(ours.weight, theirs.weight, "weight", 1e-5)
    assert next(iter(ours.parametrizations.weight._parameters.values())) is box


def test_buffers_are_parametrized_too():
    theirs, ours = twins("BatchNorm1d", (3,), add("double", name="running_mean"))
    same_state(ours, theirs)
    assert list(dict(ours.named_buffers())) == list(dict(theirs.named_buffers()))
    theirs.eval(), ours.eval()
    compare_calls(theirs, ours, array(5, 3), 1, True)


@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("kinds", [("symmetric",), ("double", "scale")])
def test_removal_gives_back_a_plain_layer(kinds, leave):
    theirs, ours = twins("Linear", (4, 4), add(*kinds))
    box = ours.parametrizations.weight.original
    for library, layer in ((torch.nn, theirs), (nn, ours)):
        utils = library.utils.parametrize
        assert utils.remove_parametrizations(layer, "weight", leave_parametrized=leave) is layer
        assert not utils.is_parametrized(layer)
        assert type(layer) is library.Linear
    assert ours.weight is box
    assert repr(ours) == repr(theirs)
    same_state(ours, theirs)


def test_removal_of_several_originals_makes_a_new_parameter():
    theirs, ours = twins("Linear", (4, 4), add("rank one"))
    torch.nn.utils.parametrize.remove_parametrizations(theirs, "weight")
    parametrize.remove_parametrizations(ours, "weight")
    same_state(ours, theirs)
    assert isinstance(ours.weight, nn.Parameter)


def test_two_parametrized_tensors_come_and_go_one_by_one():
    theirs, ours = twins("Linear", (4, 4), add("double"))
    add("double", name="bias")(torch.nn, theirs)
    add("double", name="bias")(nn, ours)
    same_state(ours, theirs)
    for library, layer in ((torch.nn, theirs), (nn, ours)):
        library.utils.parametrize.remove_parametrizations(layer, "weight")
    same_state(ours, theirs)
    assert type(ours).__name__ == type(theirs).__name__ == "ParametrizedLinear"
    assert parametrize.is_parametrized(ours, "bias")
    assert not parametrize.is_parametrized(ours, "weight")
    assert parametrize.type_before_parametrizations(ours) is nn.Linear


@pytest.mark.parametrize("kinds", [("scale",), ("symmetric", "scale"), ("rank one",)])
def test_transfer_shares_parametrizations_and_originals(kinds):
    theirs, ours = twins("Linear", (4, 4), add(*kinds))
    for library, layer in ((torch.nn, theirs), (nn, ours)):
        other = library.Linear(4, 4)
        out = library.utils.parametrize.transfer_parametrizations_and_params(layer, other)
        assert out is other
        assert out.parametrizations.weight[0] is layer.parametrizations.weight[0]
        assert (
            dict(out.parametrizations.weight.named_parameters()).keys()
            == dict(layer.parametrizations.weight.named_parameters()).keys()
        )
        pairs = zip(
            out.parametrizations.weight.parameters(),
            layer.parametrizations.weight.parameters(),
            strict=True,
        )
        assert all(a is b for a, b in pairs)


def test_transfer_makes_a_tensor_that_is_not_there():
    _, ours = twins("Linear", (4, 4), add("scale"))
    other = nn.Identity()
    parametrize.transfer_parametrizations_and_params(ours, other, "weight")
    np.testing.assert_allclose(other.weight, ours.weight, rtol=1e-6)
    assert type(other).__name__ == "ParametrizedIdentity"


# Under the package's transforms


def layer(*kinds):
    model = nn.Linear(4, 4)
    add(*(kinds or ("symmetric",)))(nn, model)
    return model


X = jnp.asarray(array(5, 4))


def test_equal_models_share_their_static_half():
    first, second = layer("symmetric", "scale"), layer("symmetric", "scale")
    assert type(first) is type(second)
    assert nn.split(first)[0] is nn.split(second)[0]
    assert nn.split(first)[0] is not nn.split(layer("symmetric"))[0]


def test_equal_models_compile_once():
    traces = []

    @nn.jit
    def call(model, x):
        traces.append(1)
        return model(x)

    for _ in range(3):
        call(layer(), X)
    assert len(traces) == 1


def test_registration_and_removal_are_seen_by_the_next_compiled_call():
    call = nn.jit(lambda model, x: model(x))
    model = nn.Linear(4, 4)
    for change in (
        lambda: None,
        lambda: add("double")(nn, model),
        lambda: add("scale")(nn, model),
        lambda: parametrize.remove_parametrizations(model, "weight", leave_parametrized=False),
    ):
        change()
        np.testing.assert_allclose(call(model, X), model(X), rtol=1e-6)


def test_plain_jax_transforms_take_parametrized_modules():
    model = layer("symmetric", "scale")
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(model, X), model(X), rtol=1e-6)
    grads = jax.grad(lambda m: (m(X) ** 2).sum())(model)
    named = nn.grad(lambda m: (m(X) ** 2).sum())(model)
    assert type(grads) is type(model)
    for name, g in grads.named_parameters():
        np.testing.assert_allclose(g, named[name], rtol=1e-5)
    lanes = jax.vmap(lambda m, x: m(x), in_axes=(None, 0))(model, X)
    np.testing.assert_allclose(lanes, model(X), rtol=1e-5)
    doubled = jax.tree.map(lambda v: 2 * v, model)
    np.testing.assert_allclose(doubled.weight, 4 * model.weight, rtol=1e-6)


def test_stacked_models_run_under_vmap():
    models = [layer() for _ in range(3)]
    params, buffers = nn.stack_module_state(models)
    out = jax.vmap(lambda p: nn.functional_call(models[0], (p, buffers), X))(params)
    for i, model in enumerate(models):
        np.testing.assert_allclose(out[i], model(X), rtol=1e-5)


def test_a_pure_call_takes_the_original_as_it_is():
    model = layer("symmetric")
    before = model.parametrizations.weight.original.value
    given = jnp.asarray(array(4, 4, seed=7))  # not triangular: right_inverse would change it
    out = nn.functional_call(model, {"parametrizations.weight.original": given}, X)
    weight = jnp.triu(given) + jnp.triu(given, 1).T
    np.testing.assert_allclose(out, X @ weight.T + model.bias, rtol=1e-5)
    assert model.parametrizations.weight.original.value is before
    fn, params = nn.functionalize(model)
    assert list(params) == ["bias", "parametrizations.weight.original"]
    np.testing.assert_allclose(
        fn({**params, "parametrizations.weight.original": given}, X), out, rtol=1e-6
    )


def test_a_pure_call_does_not_know_the_computed_name():
    with pytest.raises(nn.UnknownNameError, match="unknown names: 'weight'"):
        nn.functional_call(layer(), {"weight": jnp.ones((4, 4))}, X)


def test_assigning_inside_a_compiled_call_is_written_back():
    model = layer("symmetric")

    @nn.jit
    def assign(model, value):
        model.weight = value
        return model.weight

    out = assign(model, jnp.eye(4))
    np.testing.assert_array_equal(out, np.eye(4))
    np.testing.assert_array_equal(model.weight, np.eye(4))
    with pytest.raises(nn.StateWriteError):
        jax.jit(lambda m: setattr(m, "weight", jnp.eye(4)))(model)
    with pytest.raises(nn.TraceLeakError):
        jax.jit(lambda v: setattr(model, "weight", v))(jnp.eye(4))


def test_registering_inside_a_trace_raises():
    model = nn.Linear(4, 4)

    def trace(x):
        add("double")(nn, model)
        return x

    with pytest.raises(nn.TraceLeakError):
        jax.jit(trace)(X)
    assert type(model) is nn.Linear
    assert not isinstance(model.weight.value, jax.core.Tracer)
    with pytest.raises(nn.StructureChangeError):
        nn.jit(lambda m: add("double")(nn, m))(model)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: nn.merge(*nn.split(m))],
    ids=["deepcopy", "pickle", "merge"],
)
def test_copies_compute_the_same_and_share_nothing(copied):
    model = layer("rank one", "scale")
    twin = copied(model)
    assert type(twin) is type(model)
    np.testing.assert_array_equal(twin.weight, model.weight)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert nn.split(twin)[0] is nn.split(model)[0]
    twin.parametrizations.weight.original0.value *= 2
    assert not np.allclose(twin.weight, model.weight)
    parametrize.remove_parametrizations(twin, "weight")
    assert type(twin) is nn.Linear
    assert parametrize.is_parametrized(model, "weight")


def test_tied_weights_stay_tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    add("symmetric")(nn, first)
    add("scale")(nn, second)
    assert first.parametrizations.weight.original is second.parametrizations.weight.original
    grads = nn.jit(nn.grad(lambda m: (m(X) ** 2).sum()))(model)
    assert [n for n in grads if n.endswith("original")] == ["0.parametrizations.weight.original"]

    def loss(value):
        symmetric = jnp.triu(value) + jnp.triu(value, 1).T
        out = (X @ symmetric.T + first.bias.value) @ (3 * value).T + second.bias.value
        return (out**2).sum()

    wanted = jax.grad(loss)(first.parametrizations.weight.original.value)
    np.testing.assert_allclose(grads["0.parametrizations.weight.original"], wanted, rtol=1e-4)


def test_models_die_by_reference_count():
    model = layer("symmetric")
    with parametrize.cached():
        model(X)
        nn.grad(lambda m: m(X).sum())(model)
        gone = weakref.ref(model)
        gc.disable()
        try:
            del model
            assert gone() is None
        finally:
            gc.enable()


# The cache


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return 2 * x


@pytest.fixture
def counting():
    Counting.calls = 0
    model = nn.Linear(4, 4)
    parametrize.register_parametrization(model, "weight", Counting(), unsafe=True)
    return model


def test_cached_computes_once_and_forgets(counting):
    with parametrize.cached():
        with parametrize.cached():
            assert counting.weight is counting.weight
        counting(X)
        assert Counting.calls == 1
    counting.weight
    assert Counting.calls == 2
    with parametrize.cached():
        counting.weight
    assert Counting.calls == 3


def test_cached_sees_new_values(counting):
    with parametrize.cached():
        before = counting.weight
        counting.parametrizations.weight.original.value *= 2
        np.testing.assert_array_equal(counting.weight, 2 * before)


def test_cached_keeps_no_tracer(counting):
    loss = lambda m, x: (m(x) + m(x)).sum()
    wanted = nn.grad(loss)(counting, X)
    Counting.calls = 0
    with jax.checking_leaks(), parametrize.cached():
        for transform in (lambda f: f, nn.jit):
            got = transform(nn.grad(loss))(counting, X)
            for name in wanted:
                np.testing.assert_allclose(got[name], wanted[name], rtol=1e-6)
        counting.weight
        jax.jit(lambda x: counting(x))(X)
        lanes = jax.vmap(counting)(X)
        np.testing.assert_allclose(lanes, counting(X), rtol=1e-5)


def test_cached_inside_a_compiled_function_holds_inside_it(counting):
    @nn.jit
    def call(model, x):
        with parametrize.cached():
            return model(model(x))

    out = call(counting, X)
    assert Counting.calls == 1
    np.testing.assert_allclose(out, counting(counting(X)), rtol=1e-5)


def test_cached_around_a_compiled_call_does_not_change_what_is_compiled(counting):
    call = nn.jit(lambda model, x: model(model(x)))
    with parametrize.cached():
        call(counting, X)
    assert Counting.calls == 2


# Misuse


class Returns(nn.Module):
    def __init__(self, forward=lambda x: x, inverse=None):
        super().__init__()
        self.f, self.inverse = forward, inverse

    def forward(self, *x):
        return self.f(*x)

    def right_inverse(self, x):
        if self.inverse is None:
            raise NotImplementedError
        return self.inverse(x)


class TorchReturns(torch.nn.Module):
    def __init__(self, forward=lambda x: x, inverse=None):
        super().__init__()
        self.f, self.inverse = forward, inverse

    def forward(self, *x):
        return self.f(*x)

    def right_inverse(self, x):
        if self.inverse is None:
            raise NotImplementedError
        return self.inverse(x)


MISUSE = {
    "no such name": ("nothing", {}, {}),
    "forward changes the shape": ("weight", {"forward": lambda x: x[:2]}, {}),
    "forward gives no array": ("weight", {"forward": lambda x: "x"}, {}),
    "right_inverse gives no array": ("weight", {"inverse": lambda x: None}, {}),
    "right_inverse gives no arrays": ("weight", {"inverse": lambda x: (None, None)}, {}),
}


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("case", MISUSE)
def test_misuse_raises_what_torch_raises(case, chained):
    name, kwargs, options = MISUSE[case]
    theirs, ours = torch.nn.Linear(4, 4), nn.Linear(4, 4)
    if chained:
        add("double")(torch.nn, theirs)
        add("double")(nn, ours)
    state = list(ours.state_dict())
    with pytest.raises(Exception) as their_error:
        torch.nn.utils.parametrize.register_parametrization(
            theirs, name, TorchReturns(**kwargs), **options
        )
    with pytest.raises(Exception) as our_error:
        parametrize.register_parametrization(ours, name, Returns(**kwargs), **options)
    same_class(our_error.value, their_error.value)
    assert list(ours.state_dict()) == state


@pytest.mark.parametrize("chained", [False, True])
def test_the_dtype_may_not_change(chained):
    ours, theirs = nn.Linear(4, 4), torch.nn.Linear(4, 4)
    if chained:
        add("double")(torch.nn, theirs)
        add("double")(nn, ours)
    for kwargs, torch_kwargs in (
        ({"forward": lambda x: x.astype(jnp.bfloat16)}, {"forward": lambda x: x.bfloat16()}),
        ({"inverse": lambda x: x.astype(jnp.bfloat16)}, {"inverse": lambda x: x.bfloat16()}),
    ):
        with pytest.raises(ValueError) as their_error:
            torch.nn.utils.parametrize.register_parametrization(
                theirs, "weight", TorchReturns(**torch_kwargs)
            )
        with pytest.raises(ValueError) as our_error:
            parametrize.register_parametrization(ours, "weight", Returns(**kwargs))
        same_class(our_error.value, their_error.value)


def test_unsafe_lets_shape_and_dtype_change():
    theirs, ours = torch.nn.Linear(4, 4), nn.Linear(4, 4)
    torch.nn.utils.parametrize.register_parametrization(
        theirs, "weight", TorchReturns(lambda x: x[:2].bfloat16()), unsafe=True
    )
    parametrize.register_parametrization(
        ours, "weight", Returns(lambda x: x[:2].astype(jnp.bfloat16)), unsafe=True
    )
    assert ours.weight.shape == tuple(theirs.weight.shape)
    assert ours.weight.dtype == jnp.bfloat16
    assert ours.parametrizations.weight.unsafe == theirs.parametrizations.weight.unsafe


def test_a_tensor_without_right_inverse_is_not_assigned():
    ours, theirs = layer("double"), torch.nn.Linear(4, 4)
    add("double")(torch.nn, theirs)
    with pytest.raises(RuntimeError) as their_error:
        theirs.weight = torch.ones(4, 4)
    with pytest.raises(RuntimeError) as our_error:
        ours.weight = jnp.ones((4, 4))
    same_class(our_error.value, their_error.value)


def test_wrong_values_are_not_assigned():
    ours = layer("symmetric")
    before = ours.weight
    for value, error in (
        (jnp.ones((4, 3)), ValueError),
        (jnp.ones((4, 4), jnp.bfloat16), ValueError),
        (None, TypeError),
        ([1.0], TypeError),
    ):
        with pytest.raises(error, match="Instead: "):
            ours.weight = value
    with pytest.raises(KeyError, match="already exists"):
        ours.weight = nn.Parameter(jnp.ones((4, 4)))
    with pytest.raises(KeyError, match="already exists"):
        ours.register_parameter("weight", nn.Parameter(jnp.ones((4, 4))))
    np.testing.assert_array_equal(ours.weight, before)


def test_removal_of_what_is_not_parametrized_raises():
    for library, model in ((torch.nn, torch.nn.Linear(2, 2)), (nn, nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="does not have a parametrization"):
            library.utils.parametrize.remove_parametrizations(model, "weight")
    model = layer("rank one")
    with pytest.raises(ValueError, match="sequence of tensors"):
        parametrize.remove_parametrizations(model, "weight", leave_parametrized=False)
    assert parametrize.is_parametrized(model, "weight")


def test_an_attribute_error_inside_a_parametrization_is_not_swallowed():
    class Wrong(nn.Module):
        def forward(self, x):
            return self.missing * x

    model = nn.Linear(2, 2)
    parametrize.register_parametrization(model, "weight", Wrong(), unsafe=True)
    with pytest.raises(RuntimeError, match="no attribute 'missing'"):
        model(jnp.ones((1, 2)))


def test_only_modules_are_parametrizations():
    with pytest.raises(TypeError, match="Lambda"):
        parametrize.register_parametrization(nn.Linear(2, 2), "weight", lambda x: x)
