"""orthogonal, weight_norm and spectral_norm against torch."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from statefulnn.utils import parametrizations, parametrize
from tests.parity.oracle import array, close, same_class, sixty_four_bits
from tests.quick import diagonal, quickly
from tests.utils.twins import compare_calls, same_state, twins

MAPS = ["matrix_exp", "cayley", "householder"]
SHAPES = [(3, 5), (5, 3), (4, 4), (1, 3)]


def orthogonal(orthogonal_map, use_trivialization):
    return lambda library, layer: library.utils.parametrizations.orthogonal(
        layer, orthogonal_map=orthogonal_map, use_trivialization=use_trivialization
    )


def shifted(theirs, ours):
    """Move the originals away from where the maps are trivial, except signs on the diagonal."""
    for name, value in theirs.state_dict().items():
        if name.endswith("original"):
            step = np.tril(array(*value.shape, seed=5), -1) + np.triu(
                array(*value.shape, seed=6), 1
            )
            value += 0.5 * torch.as_tensor(step)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})


@pytest.mark.parametrize("trivial, shape, kind", diagonal(4, [True, False], SHAPES, [*MAPS, None]))
def test_orthogonal_is_torchs(kind, shape, trivial):
    theirs, ours = twins("Linear", shape, orthogonal(kind, trivial))
    same_state(ours, theirs)
    assert repr(ours) == repr(theirs)
    if kind is None or (kind == "matrix_exp" and not trivial):  # it takes long to compile
        close(ours.weight, theirs.weight, "weight", 1e-5)
        return
    shifted(theirs, ours)
    compare_calls(theirs, ours, array(6, shape[0]), 1, jitted=trivial)


@pytest.mark.parametrize("shape, kind", diagonal(2, SHAPES, MAPS))
def test_orthogonal_starts_where_the_weight_is_nearest(kind, shape):
    # Where all of the basis follows from the weight; the rest is drawn.
    weight = array(*reversed(shape))
    theirs, ours = torch.nn.Linear(*shape), nn.Linear(*shape)
    theirs.weight.data = torch.as_tensor(weight.copy())
    ours.weight.value = jnp.asarray(weight)
    torch.nn.utils.parametrizations.orthogonal(theirs, orthogonal_map=kind)
    parametrizations.orthogonal(ours, orthogonal_map=kind)
    close(ours.weight, theirs.weight, "weight", 1e-5)
    n, k = max(shape), min(shape)
    base = ours.parametrizations.weight[0].base
    np.testing.assert_allclose(base.T @ base, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(
        base[:, :k], theirs.parametrizations.weight[0].base[:, :k].numpy(), atol=1e-5
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reflections_start_where_torchs_do_without_trivialization(shape):
    weight = array(*reversed(shape), seed=2)
    theirs, ours = torch.nn.Linear(*shape), nn.Linear(*shape)
    theirs.weight.data = torch.as_tensor(weight.copy())
    ours.weight.value = jnp.asarray(weight)
    torch.nn.utils.parametrizations.orthogonal(
        theirs, orthogonal_map="householder", use_trivialization=False
    )
    parametrizations.orthogonal(ours, orthogonal_map="householder", use_trivialization=False)
    # Above the diagonal stands R, which the map does not read.
    low = np.tril if shape[0] <= shape[1] else np.triu
    close(
        low(ours.parametrizations.weight.original),
        low(theirs.parametrizations.weight.original.detach().numpy()),
        "original",
        1e-5,
    )
    close(ours.weight, theirs.weight, "weight", 1e-5)


def test_assigning_an_orthogonal_matrix_keeps_it():
    q = np.linalg.qr(array(4, 4))[0]
    for kind in ("matrix_exp", "cayley", "householder"):
        layer = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map=kind)
        layer.weight = jnp.asarray(q)
        np.testing.assert_allclose(layer.weight, q, atol=1e-6)
        assigned = jnp.asarray(array(4, 4, seed=8))
        nn.jit(lambda m, v: setattr(m, "weight", v))(layer, assigned)
        r = layer.weight.T @ assigned  # of assigned = QR
        np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-5)
        assert (np.diag(r) > 0).all()


@pytest.mark.parametrize("kind", MAPS)
def test_batches_of_matrices(kind):
    weights = array(2, 5, 3)
    theirs, ours = torch.nn.Module(), nn.Identity()
    theirs.w = torch.nn.Parameter(torch.as_tensor(weights.copy()))
    ours.w = nn.Parameter(jnp.asarray(weights))
    torch.nn.utils.parametrizations.orthogonal(theirs, "w", kind)
    parametrizations.orthogonal(ours, "w", kind)
    close(ours.w, theirs.w, "w", 1e-5)
    np.testing.assert_allclose(np.swapaxes(ours.w, 1, 2) @ ours.w, [np.eye(3)] * 2, atol=1e-5)


@pytest.mark.parametrize(
    "shape, kind, trivial",
    diagonal(3, [(4, 4), (5, 3), (3, 5)], ["matrix_exp", "cayley", None], [True, False]),
)
def test_complex_matrices_are_unitary(shape, kind, trivial):
    weight = (array(*shape) + 1j * array(*shape, seed=1)).astype(np.complex64)
    theirs, ours = torch.nn.Module(), nn.Identity()
    theirs.w = torch.nn.Parameter(torch.as_tensor(weight.copy()))
    ours.w = nn.Parameter(jnp.asarray(weight))
    torch.nn.utils.parametrizations.orthogonal(theirs, "w", kind, use_trivialization=trivial)
    parametrizations.orthogonal(ours, "w", kind, use_trivialization=trivial)
    close(np.real(ours.w), theirs.w.real, "real part", 2e-5)
    close(np.imag(ours.w), theirs.w.imag, "imaginary part", 2e-5)
    w = ours.w if shape[0] >= shape[1] else ours.w.T
    np.testing.assert_allclose(w.conj().T @ w, np.eye(min(shape)), atol=1e-5)


def test_orthogonal_in_float64():
    with sixty_four_bits():
        theirs = torch.nn.Linear(4, 4).double()
        ours = nn.Linear(4, 4, dtype=jnp.float64)
        for library, layer in ((torch.nn, theirs), (nn, ours)):
            library.utils.parametrizations.orthogonal(layer)
        original = array(4, 4).astype(np.float64)
        base = np.linalg.qr(array(4, 4, seed=4).astype(np.float64))[0]
        state = {
            "parametrizations.weight.original": original,
            "parametrizations.weight.0.base": base,
        }
        state["bias"] = array(4).astype(np.float64)
        theirs.load_state_dict({k: torch.as_tensor(v) for k, v in state.items()})
        ours.load_state_dict(state)
        close(ours.weight, theirs.weight, "weight", 1e-12)


@pytest.mark.parametrize("kind", MAPS)
def test_orthogonal_has_second_derivatives(kind):
    theirs, ours = twins("Linear", (3, 3), orthogonal(kind, True))
    shifted(theirs, ours)
    name = "parametrizations.weight.original"
    x, v = array(4, 3), array(3, 3, seed=9)

    parameter = theirs.parametrizations.weight.original
    (g,) = torch.autograd.grad(
        (theirs(torch.as_tensor(x)) ** 3).sum(), parameter, create_graph=True
    )
    wanted = torch.autograd.grad((g * torch.as_tensor(v)).sum(), parameter)[0]

    fn, params = nn.functionalize(ours)
    loss = lambda value: (fn({**params, name: value}, jnp.asarray(x)) ** 3).sum()
    got = quickly(jax.grad(lambda value: (jax.grad(loss)(value) * v).sum()))(params[name])
    close(got, wanted, "second derivative", 1e-4)


def test_orthogonal_misuse():
    cases = [
        lambda library, layer: library.utils.parametrizations.orthogonal(layer, "bias"),
        lambda library, layer: library.utils.parametrizations.orthogonal(layer, "nothing"),
        lambda library, layer: library.utils.parametrizations.orthogonal(layer, "weight", "foo"),
    ]
    for case in cases:
        with pytest.raises(ValueError) as theirs:
            case(torch.nn, torch.nn.Linear(3, 3))
        with pytest.raises(ValueError) as ours:
            case(nn, nn.Linear(3, 3))
        same_class(ours.value, theirs.value)
    layer = parametrizations.orthogonal(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="Expected a matrix"):
        layer.weight = jnp.ones((3, 2))
    layer = parametrizations.orthogonal(nn.Linear(3, 3), use_trivialization=False)
    with pytest.raises(NotImplementedError, match="not possible to assign"):
        layer.weight = jnp.eye(3)
    model = nn.Identity()
    model.w = nn.Parameter(jnp.ones((3, 3), jnp.complex64))
    with pytest.raises(ValueError, match="does not support complex"):
        parametrizations.orthogonal(model, "w", "householder")


def test_completing_a_basis_draws_from_the_generator_in_force():
    nn.manual_seed(3)
    first = parametrizations.orthogonal(nn.Linear(3, 5)).parametrizations.weight[0].base
    nn.manual_seed(3)
    second = parametrizations.orthogonal(nn.Linear(3, 5)).parametrizations.weight[0].base
    np.testing.assert_array_equal(first, second)


# Weight norm

LAYERS = [
    ("Linear", (4, 3), (5, 4)),
    ("Conv1d", (3, 4, 2), (2, 3, 6)),
    ("Conv2d", (3, 4, 2), (2, 3, 5, 5)),
    ("ConvTranspose2d", (3, 4, 2), (2, 3, 5, 5)),
    ("Embedding", (7, 3), None),
]


def every_other(rows):
    long = pytest.mark.long
    return [pytest.param(*row, marks=long if i % 2 else ()) for i, row in enumerate(rows)]


def dims(layer, args):
    return [*range(-1, getattr(nn, layer)(*args).weight.ndim), None, -2]


@pytest.mark.parametrize(
    ("layer", "args", "shape", "dim"),
    every_other([(*row, dim) for row in LAYERS[:4] for dim in dims(*row[:2])]),
)
def test_weight_norm_is_torchs(layer, args, shape, dim):
    change = lambda library, module: library.utils.parametrizations.weight_norm(module, dim=dim)
    theirs, ours = twins(layer, args, change)
    same_state(ours, theirs)
    assert repr(ours) == repr(theirs)
    compare_calls(theirs, ours, array(*shape), 1, jitted=dim == 0)
    weight = array(*ours.weight.shape, seed=4)
    with torch.no_grad():
        theirs.weight = torch.as_tensor(weight)
    ours.weight = jnp.asarray(weight)
    same_state(ours, theirs)


def test_weight_norm_of_an_embedding():
    change = lambda library, module: library.utils.parametrizations.weight_norm(module)
    theirs, ours = twins("Embedding", (7, 3), change)
    close(ours(jnp.array([1, 3])), theirs(torch.tensor([1, 3])), "output", 1e-5)


def test_weight_norm_in_low_precision():
    for dtype, torch_dtype in ((jnp.bfloat16, torch.bfloat16), (jnp.float16, torch.float16)):
        weight = torch.as_tensor(array(6, 9)).to(torch_dtype)
        theirs = torch.nn.Linear(9, 6).to(torch_dtype)
        theirs.weight.data = weight
        ours = nn.Linear(9, 6, dtype=dtype)
        ours.weight.value = jnp.asarray(weight.float().numpy(), dtype)
        torch.nn.utils.parametrizations.weight_norm(theirs)
        parametrizations.weight_norm(ours)
        assert ours.weight.dtype == dtype
        close(ours.weight, theirs.weight, "weight", 1e-2)


def test_checkpoints_of_the_older_form_load():
    old = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(old[0])
    state = {k: v.numpy() for k, v in old.state_dict().items()}
    assert "0.weight_g" in state
    ours = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    ours.load_state_dict(state)
    x = array(4, 3)
    close(ours(jnp.asarray(x)), old(torch.as_tensor(x)), "output", 1e-5)
    # A model that came out of a transformation loads them as well.
    clone = jax.tree.map(lambda v: 0 * v, ours)
    clone.load_state_dict(state)
    close(clone(jnp.asarray(x)), old(torch.as_tensor(x)), "output", 1e-5)


def test_weight_norm_of_no_such_axis():
    with pytest.raises(IndexError):
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3), dim=5)
    layer = nn.Linear(3, 3)
    with pytest.raises(IndexError, match="Dimension out of range"):
        parametrizations.weight_norm(layer, dim=5)
    assert list(layer.state_dict()) == ["weight", "bias"]


# Spectral norm


def spectral(**kwargs):
    return lambda library, layer: library.utils.parametrizations.spectral_norm(layer, **kwargs)


OPTIONS = [{}, {"n_power_iterations": 3}, {"dim": 1}, {"eps": 0.1}, {"dim": -1}]


@pytest.mark.parametrize(
    "row, options, training, jitted",
    diagonal(4, LAYERS[:4:3], OPTIONS, [False, True], [False, True]),
)
def test_spectral_norm_is_torchs(row, options, training, jitted):
    layer, args, shape = row
    theirs, ours = twins(layer, args, spectral(**options))
    theirs.train(training), ours.train(training)
    same_state(ours, theirs)
    assert repr(ours) == repr(theirs)
    compare_calls(theirs, ours, array(*shape), 3, jitted)


def test_spectral_norm_of_a_vector_and_of_a_buffer():
    theirs, ours = twins("BatchNorm1d", (4,), spectral())
    same_state(ours, theirs)
    compare_calls(theirs, ours, array(5, 4), 1, True)


def test_spectral_norm_takes_the_outputs_of_transposed_convolutions():
    ours = spectral()(nn, nn.ConvTranspose1d(3, 4, 2))
    assert ours.parametrizations.weight[0]._u.shape == (4,)


def test_spectral_norm_starts_near_the_largest_singular_value():
    weight = array(20, 30)
    layer = nn.Linear(30, 20)
    layer.weight.value = jnp.asarray(weight)
    spectral()(nn, layer)
    sigma = np.linalg.svd(weight, compute_uv=False)[0]
    layer.eval()
    np.testing.assert_allclose(layer.weight, weight / sigma, atol=2e-2)
    for _ in range(200):
        layer.train().weight
    np.testing.assert_allclose(layer.weight, weight / sigma, atol=1e-5)


def test_spectral_norm_iterates_once_a_reading_in_training_mode():
    layer = spectral()(nn, nn.Linear(3, 4))
    vectors = lambda model: model.parametrizations.weight[0]._u
    before = vectors(layer)
    layer.eval().weight
    assert vectors(layer) is before
    twin = copy.deepcopy(layer.train())
    layer.weight, layer.weight
    with parametrize.cached():
        twin.weight, twin.weight
    assert not np.array_equal(vectors(layer), vectors(twin))
    twin.weight
    np.testing.assert_array_equal(vectors(layer), vectors(twin))


def test_a_pure_call_returns_the_new_vectors():
    theirs, ours = twins("Linear", (3, 4), spectral())
    x = array(2, 3)
    before = dict(ours.named_buffers())
    out, state = nn.functional_call(ours, {}, jnp.asarray(x), mutable=True)
    close(out, theirs(torch.as_tensor(x)), "output", 1e-5)
    for name, value in theirs.named_buffers():
        close(state[name], value, name, 1e-5)
    assert all(ours.get_buffer(n) is v for n, v in before.items())
    with pytest.raises(nn.StateWriteError, match="_u"):
        nn.functional_call(ours, {}, jnp.asarray(x))
    nn.functional_call(ours.eval(), {}, jnp.asarray(x))


def test_spectral_norm_survives_copies_and_vmap():
    layer = spectral()(nn, nn.Linear(3, 4))
    twin = copy.deepcopy(layer)
    x = jnp.asarray(array(5, 3))
    np.testing.assert_array_equal(twin(x), layer(x))
    lanes = nn.vmap(lambda m, x: m(x), in_axes=(None, 0))(layer.eval(), x)
    np.testing.assert_allclose(lanes, layer(x), rtol=1e-5)


def test_removal_iterates_once_more_as_torchs():
    theirs, ours = twins("Linear", (3, 4), spectral())
    torch.nn.utils.parametrize.remove_parametrizations(theirs, "weight")
    parametrize.remove_parametrizations(ours, "weight")
    same_state(ours, theirs)


MISUSE = [
    ("bias", {"n_power_iterations": 0}),
    ("weight", {"n_power_iterations": -1}),
    ("nothing", {}),
    ("weight", {"dim": 2}),
    ("weight", {"dim": -3}),
]


@pytest.mark.parametrize(("name", "kwargs"), MISUSE, ids=str)
def test_spectral_norm_misuse(name, kwargs):
    change = spectral(name=name, **kwargs)
    with pytest.raises(Exception) as theirs:
        change(torch.nn, torch.nn.Linear(3, 3))
    with pytest.raises(Exception) as ours:
        change(nn, nn.Linear(3, 3))
    same_class(ours.value, theirs.value)


def test_chains_of_ready_made_parametrizations():
    def change(library, layer):
        ready = library.utils.parametrizations
        ready.weight_norm(layer)
        return ready.spectral_norm(layer)

    theirs, ours = twins("Linear", (4, 3), change)
    same_state(ours, theirs)
    compare_calls(theirs, ours, array(5, 4), 3, True)
