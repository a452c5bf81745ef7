"""weight_norm and spectral_norm in their older forms, against torch and under the transforms."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.parity.oracle import array, close, same_class
from tests.quick import diagonal
from tests.utils.twins import compare_calls, same_state, twins

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")

ROWS = [
    ("Linear", (4, 3), (5, 4)),
    ("Conv2d", (3, 4, 2), (2, 3, 5, 5)),
    ("ConvTranspose2d", (3, 4, 2), (2, 3, 5, 5)),
]


def weight_norm(**kwargs):
    return lambda library, layer: library.utils.weight_norm(layer, **kwargs)


def spectral_norm(**kwargs):
    return lambda library, layer: library.utils.spectral_norm(layer, **kwargs)


@pytest.mark.parametrize("row, dim, jitted", diagonal(4, ROWS, [0, 1, None, -1], [False, True]))
def test_weight_norm_is_torchs(row, dim, jitted):
    layer, args, shape = row
    theirs, ours = twins(layer, args, weight_norm(dim=dim))
    same_state(ours, theirs)
    assert repr(ours) == repr(theirs)
    compare_calls(theirs, ours, array(*shape), 1, jitted)
    torch.nn.utils.remove_weight_norm(theirs)
    nn.utils.remove_weight_norm(ours)
    same_state(ours, theirs)
    assert type(ours) is getattr(nn, layer)


def test_the_first_values_are_torchs():
    weight = array(3, 4)
    theirs, ours = torch.nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.weight.data = torch.as_tensor(weight)
    ours.weight.value = jnp.asarray(weight)
    ours.bias.value = jnp.asarray(theirs.bias.detach().numpy())
    same_state(weight_norm()(nn, ours), weight_norm()(torch.nn, theirs))


@pytest.mark.parametrize(
    "row, options, training, jitted",
    diagonal(
        4,
        ROWS,
        [{}, {"n_power_iterations": 3}, {"dim": 1}, {"eps": 0.1}],
        [False, True],
        [False, True],
    ),
)
def test_spectral_norm_is_torchs(row, options, training, jitted):
    layer, args, shape = row
    theirs, ours = twins(layer, args, spectral_norm(**options))
    theirs.train(training), ours.train(training)
    same_state(ours, theirs)
    assert repr(ours) == repr(theirs)
    compare_calls(theirs, ours, array(*shape), 3, jitted)
    torch.nn.utils.remove_spectral_norm(theirs)
    nn.utils.remove_spectral_norm(ours)
    same_state(ours, theirs)
    assert type(ours) is getattr(nn, layer)
    assert not ours._forward_pre_hooks


def test_the_parameter_keeps_its_identity_under_spectral_norm():
    layer = nn.Linear(3, 3)
    box = layer.weight
    spectral_norm()(nn, layer)
    assert layer.weight_orig is box
    np.testing.assert_allclose(np.linalg.norm(layer.weight_u), 1, rtol=1e-6)


@pytest.mark.parametrize("args", [(3, 5), (4, 3)])
def test_state_dicts_of_the_oldest_form_load(args):
    theirs, ours = twins("Linear", args, spectral_norm())
    theirs(torch.as_tensor(array(5, args[0])))  # u is that of the weight from here on
    state = theirs.state_dict()
    del state["weight_v"]
    state["weight"] = theirs.weight.detach()
    state._metadata[""].pop("spectral_norm")
    expected = torch.nn.utils.spectral_norm(torch.nn.Linear(*args))
    given = {k: v.clone() for k, v in state.items()}
    expected.load_state_dict(given)
    given = {k: v.numpy() for k, v in state.items()}
    ours.load_state_dict(given)
    if args[1] > args[0]:  # else torch inverts a singular matrix
        close(ours.weight_v, expected.weight_v, "v", 1e-4)
    forward = ours.weight_orig @ ours.weight_v
    np.testing.assert_allclose(forward / np.linalg.norm(forward), ours.weight_u, atol=1e-2)
    close(ours.weight, state["weight"], "weight", 1e-4)
    del given["weight_u"]
    with pytest.raises(RuntimeError, match="Missing key.*weight_u"):
        ours.load_state_dict(given)


def test_a_state_dict_without_metadata_is_taken_for_the_present_form():
    theirs, ours = twins("Linear", (4, 3), spectral_norm())
    ours.load_state_dict(dict(ours.state_dict()))
    same_state(ours, theirs)


def test_both_on_one_layer_and_metadata_of_two():
    def change(library, layer):
        library.utils.spectral_norm(layer, "weight_ih")
        library.utils.weight_norm(layer, "weight_hh")
        return library.utils.spectral_norm(layer, "weight_hh_v")

    theirs = change(torch.nn, torch.nn.RNNCell(3, 3))
    ours = change(nn, nn.RNNCell(3, 3))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    metadata = {"version": 1, "spectral_norm": {"weight_ih.version": 1, "weight_hh_v.version": 1}}
    assert ours.state_dict()._metadata[""] == dict(theirs.state_dict()._metadata[""]) == metadata


CHANGES = {"weight_norm": weight_norm(), "spectral_norm": spectral_norm()}


@pytest.mark.parametrize("change", CHANGES)
def test_transforms(change):
    build = lambda: CHANGES[change](nn, nn.Linear(4, 3))
    layer, x = build(), jnp.asarray(array(5, 4))
    assert nn.split(layer)[0] is nn.split(build())[0]
    layer.eval()
    out = layer(x)
    np.testing.assert_allclose(nn.jit(layer)(x), out, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(layer, x), out, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(layer)(x), out, rtol=1e-5)
    fn, params = nn.functionalize(layer)
    np.testing.assert_allclose(jax.jit(fn)(params, x), out, rtol=1e-5)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        nn.merge(*nn.split(layer)),
    ):
        assert type(twin) is type(layer)
        np.testing.assert_allclose(twin(x), out, rtol=1e-6)
        getattr(nn.utils, f"remove_{change}")(twin)
        np.testing.assert_allclose(twin(x), out, rtol=1e-5)
    for box in (*layer._parameters.values(), *layer._buffers.values()):
        assert box is None or not isinstance(box._value, jax.core.Tracer)


def test_spectral_norm_in_pure_calls():
    theirs, ours = twins("Linear", (4, 3), spectral_norm())
    x = array(5, 4)
    out, state = nn.functional_call(ours, {}, jnp.asarray(x), mutable=True)
    close(out, theirs(torch.as_tensor(x)), "output", 1e-5)
    for name, value in theirs.named_buffers():
        close(state[name], value, name, 1e-5)
    with pytest.raises(nn.StateWriteError):
        nn.functional_call(ours, {}, jnp.asarray(x))


def test_the_weight_follows_its_parameters_at_once():
    layer = weight_norm()(nn, nn.Linear(4, 3))
    before = layer.weight
    layer.weight_g.value *= 2
    np.testing.assert_allclose(layer.weight, 2 * before, rtol=1e-6)
    with pytest.raises(nn.RegistrationError, match="computed each time"):
        layer.weight = before


MISUSE = {
    "twice": lambda u, layer, n: getattr(u, n)(getattr(u, n)(layer)),
    "no such parameter": lambda u, layer, n: getattr(u, n)(layer, "nothing"),
    "removed without": lambda u, layer, n: getattr(u, f"remove_{n}")(layer),
    "no such axis": lambda u, layer, n: getattr(u, n)(layer, dim=4),
    "no iteration": lambda u, layer, n: u.spectral_norm(layer, n_power_iterations=0),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("case", MISUSE)
def test_misuse_raises_what_torch_raises(case, name):
    with pytest.raises(Exception) as theirs:
        MISUSE[case](torch.nn.utils, torch.nn.Linear(3, 3), name)
    with pytest.raises(Exception) as ours:
        MISUSE[case](nn.utils, nn.Linear(3, 3), name)
    if isinstance(theirs.value, (KeyError, AttributeError)):
        builtin = KeyError if isinstance(theirs.value, KeyError) else AttributeError
        assert isinstance(ours.value, builtin)
        assert "Instead: " in str(ours.value)
    else:
        same_class(ours.value, theirs.value)


def test_an_absent_parameter_is_refused():
    for name in CHANGES:
        with pytest.raises(ValueError, match="is None"):
            CHANGES[name](nn, nn.Linear(3, 3, bias=False)) and getattr(nn.utils, name)(
                nn.Linear(3, 3, bias=False), "bias"
            )


def test_weight_norm_warns_as_torchs():
    with pytest.warns(FutureWarning, match="parametrizations.weight_norm"):
        nn.utils.weight_norm(nn.Linear(2, 2))
