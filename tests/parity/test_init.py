"""Initial values: distributions by bounds and moments, and the initialisers against torch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.random import threefry_2x32

import statefulnn as nn
from statefulnn.core import threefry
from tests.precision import in_float64
from tests.quick import diagonal, first

pytestmark = pytest.mark.compiled_with_care


@pytest.fixture(scope="module", autouse=True)
def _compiled_alike() -> None:
    # Eager draws are compiled as well. What other tests left is compiled with less care, and differs in the
    # last bit.
    jax.clear_caches()


# layer, arguments, parameter, and the distribution it starts from:
# ("uniform", bound), ("normal", std) or ("constant", value).
INITIAL = [
    ("Linear", (100, 300), {}, "weight", ("uniform", 1 / math.sqrt(100))),
    ("Linear", (100, 9000), {}, "bias", ("uniform", 1 / math.sqrt(100))),
    ("Conv1d", (16, 500, 5), {}, "weight", ("uniform", 1 / math.sqrt(16 * 5))),
    ("Conv2d", (16, 200, (3, 4)), {}, "weight", ("uniform", 1 / math.sqrt(16 * 12))),
    ("Conv2d", (16, 9000, 3), {}, "bias", ("uniform", 1 / math.sqrt(16 * 9))),
    ("Conv2d", (32, 400, 5), {"groups": 4}, "weight", ("uniform", 1 / math.sqrt(8 * 25))),
    ("Bilinear", (25, 40, 30), {}, "weight", ("uniform", 1 / math.sqrt(25))),
    ("Bilinear", (25, 2, 9000), {}, "bias", ("uniform", 1 / math.sqrt(25))),
    ("Embedding", (300, 100), {}, "weight", ("normal", 1.0)),
    ("MultiheadAttention", (96, 4), {}, "in_proj_weight", ("uniform", math.sqrt(6 / (4 * 96)))),
    ("MultiheadAttention", (96, 4), {}, "in_proj_bias", ("constant", 0.0)),
    ("MultiheadAttention", (96, 4), {}, "out_proj.weight", ("uniform", 1 / math.sqrt(96))),
    ("MultiheadAttention", (96, 4), {}, "out_proj.bias", ("constant", 0.0)),
    (
        "MultiheadAttention",
        (96, 4),
        {"kdim": 160},
        "k_proj_weight",
        ("uniform", math.sqrt(6 / (96 + 160))),
    ),
    (
        "MultiheadAttention",
        (96, 4),
        {"kdim": 160},
        "v_proj_weight",
        ("uniform", math.sqrt(6 / (96 + 96))),
    ),
    (
        "MultiheadAttention",
        (9000, 1),
        {"add_bias_kv": True, "kdim": 1, "vdim": 1, "bias": False, "device": "meta"},
        "bias_k",
        ("normal", math.sqrt(2 / (9000 + 9000))),
    ),
    ("BatchNorm1d", (7,), {}, "weight", ("constant", 1.0)),
    ("BatchNorm2d", (7,), {}, "bias", ("constant", 0.0)),
    ("LayerNorm", (7,), {}, "weight", ("constant", 1.0)),
    ("LayerNorm", (7,), {}, "bias", ("constant", 0.0)),
    ("RMSNorm", (7,), {}, "weight", ("constant", 1.0)),
]
INITIAL = [row for row in INITIAL if "device" not in row[2]]


def check_distribution(values: np.ndarray, distribution: tuple[str, float]) -> None:
    """Compare bounds and the first two moments, within five standard errors."""
    kind, scale = distribution
    values = np.asarray(values, np.float64).ravel()
    n = values.size
    if kind == "constant":
        assert (values == scale).all()
        return
    std = scale / math.sqrt(3) if kind == "uniform" else scale
    # The standard error of a variance is √((kurtosis - 1) / n) of it: 1.8 and 3.
    spread = math.sqrt((0.8 if kind == "uniform" else 2.0) / n)
    assert abs(values.mean()) < 5 * std / math.sqrt(n)
    assert abs(values.var() / std**2 - 1) < 5 * spread
    if kind == "uniform":
        # The largest of n draws falls short of the bound by about 1/n of it.
        assert scale * (1 - 20 / n) < np.abs(values).max() <= scale * (1 + 1e-6)


@pytest.mark.parametrize("library", ["statefulnn", "torch"])
@pytest.mark.parametrize(
    ("layer", "args", "kwargs", "name", "distribution"),
    INITIAL,
    ids=[f"{r[0]}.{r[3]}{r[2] or ''}" for r in INITIAL],
)
def test_layer_starts_from_torchs_distribution(
    library: str,
    layer: str,
    args: tuple,
    kwargs: dict,
    name: str,
    distribution: tuple[str, float],
) -> None:
    torch.manual_seed(0)
    module = getattr(nn if library == "statefulnn" else torch.nn, layer)(*args, **kwargs)
    value = module.get_parameter(name)
    value = value.detach().numpy() if library == "torch" else np.asarray(value)
    check_distribution(value, distribution)


def test_padding_row_starts_at_zero() -> None:
    weight = np.asarray(nn.Embedding(5, 3, padding_idx=-2).weight)
    assert (weight[3] == 0).all()
    assert (np.delete(weight, 3, 0) != 0).all()


FILLS = [
    ("uniform_", (), {"a": -2.0, "b": 3.0}),
    ("normal_", (), {"mean": 1.0, "std": 0.1}),
    ("trunc_normal_", (), {}),
    ("trunc_normal_", (), {"mean": 0.5, "std": 0.3, "a": 0.2, "b": 0.6}),
    ("trunc_normal_", (), {"std": 0.02}),
    ("xavier_uniform_", (), {"gain": 2.0}),
    ("xavier_normal_", (), {}),
    ("kaiming_uniform_", (), {"a": 0.3}),
    ("kaiming_uniform_", (), {"mode": "fan_out", "nonlinearity": "relu"}),
    ("kaiming_normal_", (), {}),
    ("kaiming_normal_", (), {"mode": "fan_out", "nonlinearity": "tanh"}),
    ("sparse_", (0.3,), {"std": 0.5}),
    ("orthogonal_", (), {"gain": 1.5}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), FILLS, ids=[f"{f[0]}{f[2]}" for f in FILLS])
def test_random_initialiser_has_torchs_moments(name: str, args: tuple, kwargs: dict) -> None:
    torch.manual_seed(0)
    shape = (200, 300)
    theirs = getattr(torch.nn.init, name)(torch.empty(shape), *args, **kwargs).numpy()
    nn.manual_seed(0)
    box = nn.Parameter(jnp.zeros(shape))
    assert getattr(nn.init, name)(box, *args, **kwargs) is box
    ours = np.asarray(box)
    std = theirs.std()
    error = 5 * std / math.sqrt(theirs.size)
    assert abs(ours.mean() - theirs.mean()) < 1.5 * error
    assert abs(ours.std() / std - 1) < 0.03
    # Quantiles tell distributions of equal moments apart. That of 60,000 normal draws at 0.02 has a
    # standard error of 0.012 std, and two of them are compared.
    q = np.linspace(0.02, 0.98, 25)
    assert np.abs(np.quantile(ours, q) - np.quantile(theirs, q)).max() < 0.06 * std


EXACT = [
    ("constant_", (4, 5), (0.3,), {}),
    ("ones_", (4, 5), (), {}),
    ("zeros_", (3,), (), {}),
    ("eye_", (3, 5), (), {}),
    ("dirac_", (4, 3, 3), (), {}),
    ("dirac_", (6, 2, 4, 3), (), {"groups": 3}),
    ("dirac_", (2, 5, 2, 3, 4), (), {}),
]


@pytest.mark.parametrize(("name", "shape", "args", "kwargs"), EXACT)
def test_fixed_initialiser_gives_torchs_values(
    name: str, shape: tuple, args: tuple, kwargs: dict
) -> None:
    theirs = getattr(torch.nn.init, name)(torch.full(shape, 7.0), *args, **kwargs)
    ours = getattr(nn.init, name)(nn.Parameter(jnp.full(shape, 7.0)), *args, **kwargs)
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 2, 3), (4, 4)])
def test_orthogonal_rows_or_columns_are_orthonormal(shape: tuple[int, ...]) -> None:
    matrix = np.asarray(nn.init.orthogonal_(nn.Parameter(jnp.zeros(shape)), gain=2.0))
    matrix = matrix.reshape(shape[0], -1)
    product = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(product, 4 * np.eye(len(product)), atol=1e-5)


def test_sparse_zeroes_the_same_share_of_every_column() -> None:
    ours = np.asarray(nn.init.sparse_(nn.Parameter(jnp.zeros((11, 6))), 0.25))
    assert ((ours == 0).sum(0) == math.ceil(0.25 * 11)).all()


@pytest.mark.parametrize(
    "name", "linear conv1d conv2d conv3d sigmoid tanh relu leaky_relu selu".split()
)
def test_gain_is_torchs(name: str) -> None:
    assert nn.init.calculate_gain(name) == pytest.approx(torch.nn.init.calculate_gain(name))


def test_gain_takes_the_slope_of_a_leaky_relu() -> None:
    wanted = torch.nn.init.calculate_gain("leaky_relu", 0.3)
    assert nn.init.calculate_gain("leaky_relu", 0.3) == pytest.approx(wanted)


ERRORS = [
    ("calculate_gain", ("unknown",)),
    ("calculate_gain", ("leaky_relu", True)),
    ("calculate_gain", ("leaky_relu", [1])),
    ("xavier_uniform_", ((3,),)),
    ("xavier_normal_", ((3,),)),
    ("kaiming_uniform_", ((3,),)),
    ("kaiming_normal_", ((3,),)),
    ("kaiming_uniform_", ((3, 4), 0, "fan_sideways")),
    ("orthogonal_", ((3,),)),
    ("eye_", ((3, 4, 5),)),
    ("dirac_", ((3, 4),)),
    ("dirac_", ((3, 4, 5), 2)),
    ("sparse_", ((3,), 0.5)),
    ("uniform_", ((3,), 2.0, 1.0)),
    ("normal_", ((3,), 0.0, -1.0)),
]


@pytest.mark.parametrize(("name", "args"), ERRORS)
def test_misuse_raises_torchs_class_and_writes_nothing(name: str, args: tuple) -> None:
    shaped = bool(args) and isinstance(args[0], tuple)
    with pytest.raises(Exception) as theirs:
        given = (torch.zeros(args[0]), *args[1:]) if shaped else args
        getattr(torch.nn.init, name)(*given)
    box = nn.Parameter(jnp.zeros(args[0])) if shaped else None
    with pytest.raises(type(theirs.value)):
        getattr(nn.init, name)(*((box, *args[1:]) if shaped else args))
    assert box is None or (np.asarray(box) == 0).all()


def test_array_in_place_of_a_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match=r"pass the Parameter: init\.uniform_\(module\.weight\)"):
        nn.init.uniform_(jnp.zeros(3))


def test_empty_parameter_warns_and_stays() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        nn.init.kaiming_uniform_(nn.Parameter(jnp.zeros((3, 0))))


def test_truncation_far_from_the_mean_warns() -> None:
    with pytest.warns(UserWarning, match="more than 2 std"):
        nn.init.trunc_normal_(nn.Parameter(jnp.zeros(3)), mean=9.0)


def test_generator_decides_the_values() -> None:
    def drawn(seed: int) -> np.ndarray:
        box = nn.Parameter(jnp.zeros((3, 4)))
        return np.asarray(nn.init.normal_(box, generator=nn.Generator(seed)))

    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert (drawn(1) != drawn(2)).any()


def drawn_with(key, draw, shape, dtype="float32"):
    """Draw a parameter's values from the stream of a key."""
    box = nn.Parameter(jnp.zeros(shape, dtype))
    with nn.rng_scope(key):
        draw(box)
    return box.value


DRAWS = {
    "uniform": lambda p: nn.init.uniform_(p),
    "symmetric": lambda p: nn.init.uniform_(p, -0.3, 0.3),
    "asymmetric": lambda p: nn.init.uniform_(p, -0.3, 0.7),
    "normal": lambda p: nn.init.normal_(p, 0.1, 0.02),
    "truncated": lambda p: nn.init.trunc_normal_(p),
    "truncated, small": lambda p: nn.init.trunc_normal_(p, std=0.02),
}


@pytest.mark.parametrize("shape", [(3, 5), (4096,), (4097,), (70, 1000), (3, 0), ()])
@pytest.mark.parametrize("draw", DRAWS)
def test_flat_draws_start_like_longer_ones(draw: str, shape: tuple[int, ...]) -> None:
    # What lets a parameter be drawn in parts, each where it is.
    key = jax.random.key(3)
    whole = drawn_with(key, DRAWS[draw], (1 << 17,))
    some = drawn_with(key, DRAWS[draw], shape)
    np.testing.assert_array_equal(some.ravel(), whole[: math.prod(shape)])


@pytest.mark.parametrize(
    "draw, shape, dtype",
    diagonal(
        4,
        list(DRAWS),
        [(37, 11), (5, 7, 3, 2), (300, 701), (), (0, 3)],
        ["float32", "bfloat16", "float16"],
    ),
)
def test_values_are_the_same_in_compiled_code(draw: str, shape: tuple, dtype: str) -> None:
    key = jax.random.key(5)
    eager = drawn_with(key, DRAWS[draw], shape, dtype)
    compiled = jax.jit(lambda key: drawn_with(key, DRAWS[draw], shape, dtype))(key)
    assert eager.dtype == compiled.dtype == dtype
    np.testing.assert_array_equal(eager, compiled)


@pytest.mark.parametrize("draw", first(2, ["uniform", "normal", "symmetric", "asymmetric"]))
def test_float64_values_are_the_same_in_compiled_code(draw: str) -> None:
    with in_float64():
        key = jax.random.key(5)
        eager = drawn_with(key, DRAWS[draw], (31, 7), "float64")
        compiled = jax.jit(lambda key: drawn_with(key, DRAWS[draw], (31, 7), "float64"))(key)
        # One rounding or two where XLA fuses a product with a sum.
        np.testing.assert_allclose(eager, compiled, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("shape", first(3, [(2, 3, 5), (), (0, 3), (5,), (3, 4), (7, 2, 2)]))
def test_words_in_compiled_code_are_those_of_their_positions(shape: tuple[int, ...]) -> None:
    key = (7, 8)
    pair = jnp.array(key, jnp.uint32)
    (one,), two = threefry.traced_words(pair, shape), threefry.traced_words(pair, shape, 2)
    for number, place in enumerate(np.ndindex(*shape)):
        assert int(one[place]) == threefry.block(key, (0, number // 2))[number % 2]
        assert tuple(int(w[place]) for w in two) == threefry.block(key, (0, number))


def test_an_array_that_32_bits_cannot_count_takes_other_blocks_in_each_part(monkeypatch) -> None:
    monkeypatch.setattr(threefry, "PART", 10)  # instead of 2**32
    (found,) = threefry.traced_words(jnp.array([7, 8], jnp.uint32), (2, 3, 4, 2))
    for a, b, c, d in np.ndindex(2, 3, 4, 2):
        number = 2 * c + d
        assert (
            int(found[a, b, c, d]) == threefry.block((7, 8), (3 * a + b, number // 2))[number % 2]
        )


def test_draws_on_the_host_are_threefry_as_in_jax_random() -> None:
    key = (123456789, 42)
    pairs = [threefry.block(key, (0, i)) for i in range(40)]
    ours = threefry.words(key, 79)
    np.testing.assert_array_equal(ours, np.array(pairs, np.uint32).reshape(-1)[:79])
    counters = jnp.stack([jnp.zeros(40, jnp.uint32), jnp.arange(40, dtype=jnp.uint32)])
    theirs = threefry_2x32(jnp.array(key, jnp.uint32), counters.reshape(-1))
    np.testing.assert_array_equal(np.array(pairs, np.uint32).T.reshape(-1), theirs)


def test_draws_of_several_threads_are_those_of_one() -> None:
    n = 1 << 18
    whole = threefry.words((7, 8), n)
    for at in (0, 1, 12_345, n - 1):
        assert whole[at] == threefry.block((7, 8), (0, at // 2))[at % 2]


def test_a_key_is_the_same_with_and_without_compiled_code() -> None:
    one, other = nn.Generator(11), nn.Generator(11)
    for _ in range(3):
        words = jax.random.key_data(one.next_key())
        assert tuple(int(w) for w in words) == other.next_words()
    np.testing.assert_array_equal(one.get_state(), other.get_state())


def test_construction_in_compiled_code_gives_the_eager_values() -> None:
    def weights(key):
        with nn.rng_scope(key):
            return nn.Linear(5, 3).state_dict()

    key = jax.random.key(0)
    eager, compiled = weights(key), jax.jit(weights)(key)
    for name in eager:
        np.testing.assert_array_equal(eager[name], compiled[name])


def test_float64_draws_use_all_their_bits() -> None:
    with in_float64():
        value = np.asarray(nn.init.uniform_(nn.Parameter(jnp.zeros(1000))))
        assert value.dtype == np.float64
        assert (value != value.astype(np.float32)).mean() > 0.9


def test_device_of_a_parameter_is_kept() -> None:
    device = jax.devices()[0]
    layer = nn.Linear(2, 3, device=device)
    assert layer.weight.value.committed
    assert layer.weight.value.devices() == {device}
    layer.reset_parameters()
    assert layer.weight.value.committed


@pytest.mark.parametrize("name", ["uniform", "normal", "eye", "xavier_uniform", "kaiming_normal"])
def test_a_deprecated_name_warns_as_torchs_and_does_the_same(name: str) -> None:
    theirs, ours = torch.zeros(4, 3), nn.Parameter(jnp.zeros((4, 3)))
    with pytest.warns(FutureWarning) as wanted:
        getattr(torch.nn.init, name)(theirs)
    with pytest.warns(FutureWarning) as given:
        assert getattr(nn.init, name)(ours) is ours
    assert str(given[0].message) == str(wanted[0].message)
    assert (np.asarray(ours) != 0).any()
