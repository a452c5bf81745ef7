"""Recurrent layers: packed sequences, derivatives of every order, dropout, what is compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from statefulnn.functional.recurrent import recurrent
from tests.parity.oracle import Case, array, close, flat, pair, to_jax, to_torch
from tests.precision import in_float64
from tests.quick import QUICKLY, quickly

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

LENGTHS = [4, 7, 1, 4]
PADDED = array(7, 4, 5)  # (T, N, F)


def packed_pair(sort: bool = True) -> tuple[Any, Any]:
    """Pack the same sequences in both libraries."""
    lengths = sorted(LENGTHS, reverse=True) if sort else LENGTHS
    theirs = torch.nn.utils.rnn.pack_padded_sequence(
        torch.as_tensor(PADDED), torch.tensor(lengths), enforce_sorted=sort
    )
    ours = nn.utils.rnn.pack_padded_sequence(jnp.asarray(PADDED), lengths, enforce_sorted=sort)
    return theirs, ours


def state(layer: str, directions: int, layers: int, out: int = 6) -> Any:
    h = array(directions * layers, 4, out, seed=1)
    return (h, array(directions * layers, 4, 6, seed=2)) if layer == "LSTM" else h


# --------------------------------------------------------------------------------------------------
# Packed sequences


@pytest.mark.parametrize(
    "jitted", [pytest.param(False, marks=pytest.mark.long), True], ids=["eager", "jit"]
)
@pytest.mark.parametrize(
    "layer, kwargs, sort, first",
    [
        ("RNN", {"bidirectional": True}, False, True),
        ("RNN", {"nonlinearity": "relu"}, True, True),
        ("LSTM", {}, True, False),
        ("LSTM", {"bidirectional": True, "num_layers": 2, "proj_size": 3}, False, True),
        ("GRU", {"bidirectional": True, "num_layers": 2, "bias": False}, False, True),
        ("GRU", {"batch_first": True}, False, False),
    ],
)
def test_packed_sequences_give_torchs_outputs_states_and_gradients(
    layer: str, kwargs: dict[str, Any], sort: bool, first: bool, jitted: bool
) -> None:
    theirs, ours = pair(Case(layer, (5, 6), kwargs))
    t_packed, packed = packed_pair(sort)
    directions = 2 if kwargs.get("bidirectional") else 1
    out = kwargs.get("proj_size", 6)
    hx = state(layer, directions, kwargs.get("num_layers", 1), out) if first else None

    t_hx = to_torch(hx)
    t_arrays = [t_packed.data.requires_grad_(True), *(x.requires_grad_(True) for x in flat(t_hx))]
    t_out, t_state = theirs(t_packed, t_hx)
    wanted = [t_out.data, *flat(t_state)]
    cotangents = [array(*x.shape, seed=50 + i) for i, x in enumerate(wanted)]
    sum((x * torch.as_tensor(c)).sum() for x, c in zip(wanted, cotangents, strict=True)).backward()

    def loss(model: nn.Module, data: Any, hx: Any) -> Any:
        out, last = model(packed._replace(data=data), hx)
        got = [out.data, *flat(last)]
        return sum((x * c).sum() for x, c in zip(got, cotangents, strict=True)), (out, last)

    step = nn.value_and_grad(loss, argnums=(0, 1, 2) if first else (0, 1), has_aux=True)
    step = nn.jit(step, compiler_options=QUICKLY) if jitted else step
    (_, (out, last)), grads = step(ours, packed.data, to_jax(hx))
    assert isinstance(out, nn.utils.rnn.PackedSequence)
    np.testing.assert_array_equal(out.batch_sizes, t_out.batch_sizes.numpy())
    if not sort:
        np.testing.assert_array_equal(out.sorted_indices, t_out.sorted_indices.numpy())
        np.testing.assert_array_equal(out.unsorted_indices, t_out.unsorted_indices.numpy())
    for a, b in zip([out.data, *flat(last)], wanted, strict=True):
        close(a, b, "output", 2e-5)
    for name, p in theirs.named_parameters():
        close(grads[0][name], p.grad, name, 1e-4)
    for a, b in zip(flat(grads[1:]), t_arrays, strict=True):
        close(a, b.grad, "gradient of an input", 1e-4)


@pytest.mark.parametrize(
    "layer, kwargs",
    [
        ("RNN", {"bidirectional": True}),
        ("LSTM", {"bidirectional": True, "num_layers": 2, "proj_size": 3}),
        ("GRU", {"bidirectional": True, "num_layers": 2, "batch_first": True}),
    ],
)
def test_traced_lengths_give_what_torch_gives_for_packed_sequences(
    layer: str, kwargs: dict[str, Any]
) -> None:
    theirs, ours = pair(Case(layer, (5, 6), kwargs))
    first = kwargs.get("batch_first", False)
    hx = state(layer, 2, kwargs.get("num_layers", 1), kwargs.get("proj_size", 6))
    given = PADDED.swapaxes(0, 1) if first else PADDED

    @nn.jit
    def step(model: nn.Module, x: Any, hx: Any, lengths: Any, cotangents: Any) -> Any:
        def loss(model: nn.Module, x: Any, hx: Any) -> Any:
            out, last = model(x, hx, lengths=lengths)
            got = [out, *flat(last)]
            return sum((a * c).sum() for a, c in zip(got, cotangents, strict=True)), got

        return nn.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(model, x, hx)

    for lengths in (LENGTHS, [7, 2, 6, 1]):
        t_x = torch.as_tensor(given).clone().requires_grad_(True)
        t_hx = to_torch(hx)
        arrays = [t_x, *(x.requires_grad_(True) for x in flat(t_hx))]
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            t_x, torch.tensor(lengths), batch_first=first, enforce_sorted=False
        )
        out, last = theirs(packed, t_hx)
        out, _ = torch.nn.utils.rnn.pad_packed_sequence(out, batch_first=first, total_length=7)
        wanted = [out, *flat(last)]
        cotangents = [array(*x.shape, seed=50 + i) for i, x in enumerate(wanted)]
        theirs.zero_grad()
        sum(
            (x * torch.as_tensor(c)).sum() for x, c in zip(wanted, cotangents, strict=True)
        ).backward()

        # What lies beyond a length is not looked at: not a number there changes nothing.
        beyond = np.arange(7)[:, None] >= np.array(lengths)
        x = np.where((beyond.T if first else beyond)[:, :, None], np.nan, given)
        (_, got), grads = step(ours, jnp.asarray(x), to_jax(hx), jnp.array(lengths), cotangents)
        for a, b in zip(got, wanted, strict=True):
            close(a, b, "output", 2e-5)
        for name, p in theirs.named_parameters():
            close(grads[0][name], p.grad, name, 1e-4)
        for a, b in zip(flat(grads[1:]), arrays, strict=True):
            close(a, b.grad, "gradient of an input", 1e-4)
    assert step.trace_count == 1


def test_a_sequence_of_length_zero_keeps_its_first_state() -> None:
    gru, h = nn.GRU(5, 6), jnp.asarray(array(1, 4, 6))
    out, last = gru(jnp.asarray(PADDED), h, lengths=[0, 7, 0, 1])
    np.testing.assert_array_equal(last[0, ::2], h[0, ::2])
    np.testing.assert_array_equal(out[:, ::2], jnp.zeros((7, 2, 6)))


@pytest.mark.parametrize(
    "input, lengths, error, words",
    [
        ((7, 4, 5), [7, 8, 1, 2], RuntimeError, "lengths from 1 to 8"),
        ((7, 4, 5), np.array([7, -1, 1, 2]), RuntimeError, "lengths from 0 to 7"),
        ((7, 4, 5), [7, 8, 1], nn.ShapeError, "one length for each of 4 sequences"),
        ((7, 4, 5), jnp.ones(4), nn.DtypeError, "lengths.astype"),
        ((7, 5), [7], nn.ShapeError, r"input\[:, None\]"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    input: tuple[int, ...], lengths: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        nn.GRU(5, 6)(jnp.ones(input), lengths=lengths)


def test_lengths_are_not_given_twice() -> None:
    with pytest.raises(TypeError, match="a PackedSequence knows its lengths"):
        nn.GRU(5, 6)(packed_pair()[1], lengths=jnp.array(LENGTHS))


def test_packed_sequences_in_low_precision_and_in_float64() -> None:
    _, packed = packed_pair()
    for dtype in ("bfloat16", "float16"):
        layer = nn.GRU(5, 6, bidirectional=True).to(jnp.dtype(dtype))
        out, last = layer(packed.to(jnp.dtype(dtype)))
        assert out.data.dtype == last.dtype == dtype
        single, _ = layer.float()(packed)
        close(out.data.astype(jnp.float32), torch.tensor(np.asarray(single.data)), dtype, 3e-2)


def test_what_lies_beyond_a_length_has_no_influence() -> None:
    # A network that explodes: what it would do in the padding must not make NaN out of a gradient of 0.
    layer = nn.RNN(1, 1, nonlinearity="relu", bias=False)
    layer.weight_hh_l0.value = jnp.full((1, 1), 1e6)
    layer.weight_ih_l0.value = jnp.ones((1, 1))
    long, short = jnp.zeros((20, 1)), jnp.ones((2, 1))

    def loss(model: nn.Module) -> Any:
        return model(nn.utils.rnn.pack_sequence([long, short]))[0].data.sum()

    # The short one gives w_ih and w_ih (1 + w_hh), whose derivatives are 2 + w_hh and w_ih.
    grads = nn.grad(loss)(layer)
    np.testing.assert_allclose(grads["weight_ih_l0"], [[2 + 1e6]], rtol=1e-6)
    np.testing.assert_allclose(grads["weight_hh_l0"], [[1.0]], rtol=1e-6)


def test_packed_sequences_pass_through_jit_and_vmap() -> None:
    _, packed = packed_pair(sort=False)
    layer = nn.LSTM(5, 6)
    out, (h, c) = layer(packed)
    compiled, (h2, c2) = jax.jit(lambda m, p: m(p))(layer, packed)
    assert type(compiled) is nn.utils.rnn.PackedSequence
    np.testing.assert_array_equal(compiled.batch_sizes, out.batch_sizes)
    for a, b in ((compiled.data, out.data), (h2, h), (c2, c)):
        np.testing.assert_allclose(a, b, atol=1e-6)

    both = packed._replace(data=jnp.stack([packed.data, 2 * packed.data]))
    axes = jax.tree.map(lambda _: None, packed)._replace(data=0)
    fn, params = nn.functionalize(layer)
    many = jax.vmap(lambda p: fn(params, p)[0].data, in_axes=(axes,))(both)
    np.testing.assert_allclose(many[0], out.data, atol=1e-6)
    np.testing.assert_allclose(many[1], layer(both._replace(data=both.data[1]))[0].data, atol=1e-6)


def test_another_set_of_lengths_with_the_same_sizes_shares_the_compiled_network() -> None:
    layer, pack = nn.LSTM(5, 6), nn.utils.rnn.pack_padded_sequence
    x = jnp.asarray(PADDED)
    import statefulnn.functional.recurrent as module

    layer(pack(x, [7, 5, 2, 1]))
    before = module._network._cache_size()
    layer(pack(x, [7, 3, 3, 2]))
    layer(pack(x, [7, 7, 7, 7]))
    assert module._network._cache_size() == before


def test_packed_data_must_have_two_axes() -> None:
    packed = nn.utils.rnn.pack_sequence([jnp.ones(3), jnp.ones(2)])
    with pytest.raises(RuntimeError, match=r"(?s)dimensions.*Instead"):
        nn.RNN(1, 2)(packed)


# --------------------------------------------------------------------------------------------------
# Derivatives


def arrays_of(
    layer: str, dtype: str = "float32", **kwargs: Any
) -> tuple[Any, list[Any], list[Any]]:
    """Return a layer's pure function of arrays, the arrays in JAX, and in torch."""
    theirs, ours = pair(Case(layer, (3, 4), kwargs), dtype)
    x, h = array(5, 2, 3), array(2 if kwargs.get("bidirectional") else 1, 2, 4, seed=1)
    fn, params = nn.functionalize(ours)
    names = list(params)

    def pure(x: Any, h: Any, *values: Any) -> Any:
        hx = (h, h) if layer == "LSTM" else h
        return fn(dict(zip(names, values, strict=True)), x, hx)[0]

    def torch_pure(x: Any, h: Any, *values: Any) -> Any:
        hx = (h, h) if layer == "LSTM" else h
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(theirs, state, (x, hx))[0]

    ours_in = [to_jax(x, dtype), to_jax(h, dtype), *params.values()]
    state = dict(theirs.named_parameters())
    theirs_in = [to_torch(x, dtype), to_torch(h, dtype), *(state[n].detach() for n in names)]
    return (pure, torch_pure), ours_in, theirs_in


KINDS = [
    pytest.param("RNN", {}, marks=pytest.mark.long),
    pytest.param("RNN", {"nonlinearity": "relu"}, marks=pytest.mark.long),
    ("LSTM", {"bidirectional": True}),
    ("GRU", {}),
]


@pytest.mark.parametrize("layer, kwargs", KINDS, ids=str)
def test_forward_mode_agrees_with_differences_and_with_reverse_mode(
    layer: str, kwargs: Any
) -> None:
    with in_float64():
        (pure, _), at, _ = arrays_of(layer, "float64", **kwargs)
        along = [jnp.asarray(array(*x.shape, seed=7 + i), x.dtype) for i, x in enumerate(at)]
        step = 1e-6
        moved = lambda t: [x + t * d for x, d in zip(at, along, strict=True)]
        value = quickly(pure)
        out, pushed = quickly(lambda at, along: jax.jvp(pure, at, along))(at, along)
        slope = (value(*moved(step)) - value(*moved(-step))) / (2 * step)
        np.testing.assert_allclose(pushed, slope, atol=1e-7)
        cotangent = jnp.asarray(array(*out.shape, seed=3), out.dtype)
        pulled = quickly(lambda c: jax.vjp(pure, *at)[1](c))(cotangent)
        inner = sum((a * b).sum() for a, b in zip(pulled, along, strict=True))
        np.testing.assert_allclose(inner, (cotangent * pushed).sum(), rtol=1e-10)


@pytest.mark.parametrize("layer, kwargs", KINDS, ids=str)
def test_second_derivatives_of_all_arguments_agree_with_torch(layer: str, kwargs: Any) -> None:
    with in_float64():
        (pure, torch_pure), at, t_at = arrays_of(layer, "float64", **kwargs)
        along = [array(*x.shape, seed=7 + i).astype("float64") for i, x in enumerate(at)]
        cube = lambda *args: (pure(*args) ** 3).sum()
        grad = jax.grad(cube, argnums=tuple(range(len(at))))
        product = lambda at, along: jax.jvp(grad, at, along)[1]
        forward_over_reverse = quickly(product)(at, [jnp.asarray(d) for d in along])
        dot = lambda *args: sum((g * d).sum() for g, d in zip(grad(*args), along, strict=True))
        reverse_over_reverse = quickly(jax.grad(dot, argnums=tuple(range(len(at)))))(*at)

        t_at = [x.clone().requires_grad_(True) for x in t_at]
        slopes = torch.autograd.grad((torch_pure(*t_at) ** 3).sum(), t_at, create_graph=True)
        inner = sum((g * torch.as_tensor(d)).sum() for g, d in zip(slopes, along, strict=True))
        wanted = torch.autograd.grad(inner, t_at)
        for got in (forward_over_reverse, reverse_over_reverse):
            for a, b in zip(got, wanted, strict=True):
                close(a, b, "second derivative", 1e-9)


def test_hessian_and_gradients_per_example() -> None:
    (pure, _), at, _ = arrays_of("GRU")
    loss = lambda x: (pure(x, *at[1:]) ** 2).sum()
    hessian = quickly(jax.hessian(loss))(at[0]).reshape(30, 30)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-5)
    direction = jnp.asarray(array(5, 2, 3, seed=3))
    product = quickly(lambda x, d: jax.jvp(jax.grad(loss), (x,), (d,))[1])(at[0], direction)
    np.testing.assert_allclose(hessian @ direction.reshape(-1), product.reshape(-1), atol=1e-5)

    one = lambda x, h, *weights: (pure(x[:, None], h[:, None], *weights) ** 2).sum()
    axes = (1, 1, *[None] * (len(at) - 2))
    each = quickly(jax.vmap(jax.grad(one, argnums=2), in_axes=axes))(*at)
    whole = quickly(jax.grad(lambda *args: (pure(*args) ** 2).sum(), argnums=2))(*at)
    np.testing.assert_allclose(each.sum(0), whole, atol=1e-4)


def _scan_carries(jaxpr: Any) -> list[tuple[int, ...]]:
    shapes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            body = equation.params["jaxpr"]
            outs = zip(equation.outvars, getattr(body, "jaxpr", body).outvars, strict=True)
            # What a scan stacks has one axis more than what its body returns; a carry has the same.
            shapes += [v.aval.shape for v, inner in outs if v.aval.shape == inner.aval.shape]
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda v: hasattr(v, "jaxpr") or hasattr(v, "eqns"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                shapes += _scan_carries(inner)
    return shapes


@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU"])
def test_no_gradient_of_weights_is_added_up_step_by_step(layer: str) -> None:
    fn, params = nn.functionalize(getattr(nn, layer)(3, 4))
    loss = lambda p, x: fn(p, x)[0].sum()
    carries = _scan_carries(jax.make_jaxpr(jax.grad(loss))(params, jnp.ones((9, 2, 3))).jaxpr)
    assert carries
    assert set(carries) <= {(2, 4), ()}


# --------------------------------------------------------------------------------------------------
# Dropout


def _masks(model: nn.Module, x: Any) -> np.ndarray:
    """Run two layers that pass on what they get: the output is the mask between them."""
    for name, p in model.named_parameters():
        p.value = jnp.eye(p.shape[0]) if name.startswith("weight_ih") else jnp.zeros_like(p.value)
    return np.asarray(model(x)[0])


def test_dropout_between_layers_keeps_the_right_share_and_scales() -> None:
    model = nn.RNN(20, 20, 2, nonlinearity="relu", dropout=0.3)
    nn.manual_seed(0)
    out = _masks(model, jnp.ones((50, 40, 20)))
    n = out.size
    np.testing.assert_allclose(out[out != 0], 1 / 0.7, rtol=1e-6)
    assert abs((out != 0).mean() - 0.7) < 5 * np.sqrt(0.3 * 0.7 / n)
    # Each step, sequence and feature is drawn for itself.
    for axis in range(3):
        assert (np.diff(out, axis=axis) != 0).any()
    assert (_masks(model, jnp.ones((50, 40, 20))) != out).any()
    nn.manual_seed(0)
    np.testing.assert_array_equal(_masks(model, jnp.ones((50, 40, 20))), out)
    model.eval()
    np.testing.assert_array_equal(_masks(model, jnp.ones((50, 40, 20))), 1.0)


def test_dropout_differs_between_layers_and_leaves_the_last_one_alone() -> None:
    model = nn.RNN(20, 20, 3, nonlinearity="relu", dropout=0.5)
    out = _masks(model, jnp.ones((50, 40, 20)))
    # Two masks: a quarter remains, four times as large.
    assert set(np.unique(out)) == {0.0, 4.0}
    assert abs((out != 0).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / out.size)


def test_dropout_advances_under_nn_jit_and_needs_a_key_in_pure_code() -> None:
    model = nn.GRU(3, 4, 2, dropout=0.5)
    x = jnp.ones((5, 2, 3))
    run = nn.jit(lambda m, x: m(x)[0])
    assert (run(model, x) != run(model, x)).any()
    assert run.trace_count == 1
    with pytest.raises(nn.MissingRngError):
        nn.functional_call(model, {}, x)
    key = jax.random.key(0)
    a, b = (nn.functional_call(model, {}, x, rng=key)[0] for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    before = np.asarray(nn.get_rng_state())
    x = jnp.ones((5, 2, 3))
    start = nn.get_rng_state()
    with pytest.warns(UserWarning, match=r"(?s)num_layers=1.*Instead"):
        single = nn.LSTM(3, 4, dropout=0.5)
    layers = [single, nn.LSTM(3, 4, 2), nn.LSTM(3, 4, 2, dropout=0.5).eval()]
    nn.set_rng_state(start)
    for layer in layers:
        layer(x)
    np.testing.assert_array_equal(np.asarray(nn.get_rng_state()), before)


# --------------------------------------------------------------------------------------------------
# The object


def test_initial_values_are_uniform_within_the_root_of_the_hidden_size() -> None:
    for model in (nn.LSTM(3, 64, 2, proj_size=30), nn.GRU(3, 64), nn.RNN(3, 64), nn.GRUCell(3, 64)):
        values = np.concatenate([np.asarray(p).ravel() for p in model.parameters()])
        assert np.abs(values).max() <= 1 / 8
        ranks = np.sort(values) * 4 + 0.5  # uniform on 0 .. 1
        steps = (np.arange(values.size) + 0.5) / values.size
        assert np.abs(ranks - steps).max() < 1.95 / np.sqrt(values.size)  # Kolmogorov, p = 0.001


def test_weights_are_listed_as_in_torch() -> None:
    kwargs = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
    ours, theirs = nn.LSTM(3, 4, **kwargs), torch.nn.LSTM(3, 4, **kwargs)
    assert ours._flat_weights_names == theirs._flat_weights_names
    shapes = [[tuple(p.shape) for p in layer] for layer in ours.all_weights]
    assert shapes == [[tuple(p.shape) for p in layer] for layer in theirs.all_weights]
    assert ours.all_weights[0][0] is ours.weight_ih_l0
    ours.flatten_parameters()


def test_a_weight_that_is_replaced_is_used() -> None:
    layer = nn.GRU(3, 4)
    x = jnp.ones((5, 2, 3))
    before = layer(x)[0]
    layer.weight_ih_l0 = nn.Parameter(2 * layer.weight_ih_l0.value)
    assert (layer(x)[0] != before).any()


@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU"])
def test_dtypes_that_differ_are_refused_as_in_torch(layer: str) -> None:
    half = torch.ones(2, 4, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype"):
        getattr(torch.nn, layer)(3, 5)(half)
    with pytest.raises(
        ValueError, match=r"(?s)dtype.*input\.astype\(jnp\.float32\).*module\.to\(jnp\.bfloat16\)"
    ):
        getattr(nn, layer)(3, 5)(jnp.ones((2, 4, 3), jnp.bfloat16))
    state = jnp.ones((1, 4, 5), jnp.bfloat16)
    with pytest.raises(nn.DtypeError, match=r"(?s)hx.*bfloat16"):
        getattr(nn, layer)(3, 5)(jnp.ones((2, 4, 3)), (state, state) if layer == "LSTM" else state)


@pytest.mark.parametrize("hx", [(jnp.ones((1, 2, 4)),), jnp.ones((1, 2, 4))], ids=["one", "array"])
def test_the_state_of_an_lstm_is_a_pair(hx: Any) -> None:
    with pytest.raises(nn.DtypeError, match=r"(?s)pair.*hx=\(h, c\)"):
        nn.LSTM(3, 4)(jnp.ones((5, 2, 3)), hx)


def test_gradients_reach_both_states_of_an_lstm() -> None:
    theirs, ours = pair(Case("LSTM", (5, 6, 2), {"proj_size": 4}))
    x, hx = array(7, 3, 5), (array(2, 3, 4), array(2, 3, 6))
    t_hx = [s.requires_grad_(True) for s in to_torch(hx)]
    out, (h, c) = theirs(torch.as_tensor(x), tuple(t_hx))
    ((out**2).sum() + (h**3).sum() + (c**3).sum()).backward()

    def loss(hx: Any) -> Any:
        out, (h, c) = ours(jnp.asarray(x), hx)
        return (out**2).sum() + (h**3).sum() + (c**3).sum()

    for a, b in zip(jax.grad(loss)(to_jax(hx)), t_hx, strict=True):
        close(a, b.grad, "gradient of a state", 1e-4)


# --------------------------------------------------------------------------------------------------
# What is compiled


@pytest.mark.parametrize("mode, gates", [("RNN_RELU", 1), ("LSTM", 4), ("GRU", 3)])
def test_a_network_is_one_compiled_call_whose_size_is_independent_of_the_steps(
    mode: str, gates: int
) -> None:
    layer = {"weight_ih": jnp.ones((gates * 4, 3)), "weight_hh": jnp.ones((gates * 4, 4))}
    layer |= {"bias_ih": None, "bias_hh": None, "weight_hr": None}
    traced = lambda steps: jax.make_jaxpr(lambda x: recurrent(mode, x, None, [layer]))(
        jnp.ones((steps, 2, 3))
    )
    assert [e.primitive.name for e in traced(50).eqns] == ["jit"]
    count = lambda steps: str(traced(steps)).count("\n")
    assert count(50) == count(500)


def test_a_cell_repeated_over_time_is_the_layer() -> None:
    for layer, cell in (("RNN", "RNNCell"), ("LSTM", "LSTMCell"), ("GRU", "GRUCell")):
        whole, one = getattr(nn, layer)(3, 4), getattr(nn, cell)(3, 4)
        one.load_state_dict({k.removesuffix("_l0"): v for k, v in whole.state_dict().items()})
        x, hx = jnp.asarray(array(6, 2, 3)), None
        out, last = whole(x)
        for t in range(6):
            hx = one(x[t], hx)
            np.testing.assert_allclose(flat(hx)[0], out[t], atol=1e-6)
        for a, b in zip(flat(hx), flat(last), strict=True):
            np.testing.assert_allclose(a, b[0], atol=1e-6)
