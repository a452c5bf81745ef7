"""Parameter and Buffer: boxes that work wherever jnp takes an array."""

from __future__ import annotations

import copy
import operator
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from tests.precision import in_float64

A = np.asarray([[1.0, 2.0], [3.0, 4.0]], np.float32)
B = np.asarray([[2.0, 0.5], [1.0, 3.0]], np.float32)

BINARY = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    operator.matmul,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
    operator.eq,
    operator.ne,
]
UNARY = [operator.neg, operator.pos, operator.abs]


@pytest.mark.parametrize("box", [nn.Parameter, nn.Buffer])
@pytest.mark.parametrize("op", BINARY, ids=lambda f: f.__name__)
def test_binary_operators_give_plain_arrays_as_numpy_does(op, box):
    expected = op(A, B)
    pairs = [
        (box(jnp.asarray(A)), jnp.asarray(B)),
        (jnp.asarray(A), box(jnp.asarray(B))),
        (box(jnp.asarray(A)), box(jnp.asarray(B))),
        (box(jnp.asarray(A)), B),
    ]
    for left, right in pairs:
        out = op(left, right)
        assert isinstance(out, jax.Array)
        np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-6)


@pytest.mark.parametrize("op", BINARY[:7], ids=lambda f: f.__name__)
def test_operators_with_python_numbers_on_either_side(op):
    p = nn.Parameter(jnp.asarray(A))
    np.testing.assert_allclose(np.asarray(op(p, 2)), op(A, np.float32(2)), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(op(2.0, p)), op(np.float32(2), A), rtol=1e-6)
    assert op(p, 2.0).dtype == jnp.float32


@pytest.mark.parametrize("op", UNARY, ids=lambda f: f.__name__)
def test_unary_operators(op):
    np.testing.assert_array_equal(np.asarray(op(nn.Parameter(jnp.asarray(A)))), op(A))


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        (0, 1),
        slice(None),
        (slice(None), 0),
        None,
        ...,
        np.asarray([1, 0]),
        jnp.asarray([True, False]),
    ],
    ids=repr,
)
def test_indexing(index):
    out = nn.Parameter(jnp.asarray(A))[index]
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(
        np.asarray(out), A[np.asarray(index) if hasattr(index, "dtype") else index]
    )


FUNCTIONS = {
    "jnp.sum": lambda p: jnp.sum(p),
    "jnp.exp": lambda p: jnp.exp(p),
    "jnp.dot": lambda p: jnp.dot(p, p),
    "jnp.where": lambda p: jnp.where(p > 2, p, 0.0),
    "jnp.stack": lambda p: jnp.stack([p, p]),
    "jnp.concatenate": lambda p: jnp.concatenate([p, p]),
    "jnp.einsum": lambda p: jnp.einsum("ij,ij->i", p, p),
    "jnp.linalg.norm": lambda p: jnp.linalg.norm(p),
    "jnp.asarray": lambda p: jnp.asarray(p),
    "jax.nn.relu": lambda p: jax.nn.relu(p),
    "jax.nn.softmax": lambda p: jax.nn.softmax(p),
    "jax.nn.gelu": lambda p: jax.nn.gelu(p),
    "method sum": lambda p: p.sum(),
    "method reshape": lambda p: p.reshape(-1),
    "method astype": lambda p: p.astype(jnp.bfloat16),
    "T": lambda p: p.T,
    "at": lambda p: p.at[0, 0].set(9.0),
    "mean": lambda p: p.mean(axis=0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("jit", [False, True])
def test_jnp_functions_and_array_methods_take_a_box(name, jit):
    f = FUNCTIONS[name]
    p = nn.Parameter(jnp.asarray(A))
    out = (jax.jit(f) if jit else f)(p)
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(
        np.asarray(out, np.float32), np.asarray(f(jnp.asarray(A)), np.float32)
    )


def test_numpy_reads_a_box():
    p = nn.Parameter(jnp.asarray(A))
    np.testing.assert_array_equal(np.asarray(p), A)
    assert np.asarray(p, dtype=np.float64).dtype == np.float64
    assert float(np.sum(np.asarray(p))) == 10.0
    assert float(nn.Parameter(jnp.asarray(3.0))) == 3.0
    assert nn.Parameter(jnp.asarray(3.0)).item() == 3.0


def test_jax_lax_refuses_a_box_loudly_and_takes_its_value():
    p = nn.Parameter(jnp.asarray(A))
    with pytest.raises((TypeError, ValueError)):
        jax.lax.exp(p)
    np.testing.assert_allclose(np.asarray(jax.lax.exp(p.value)), np.exp(A), rtol=1e-6)


def test_shape_dtype_ndim_size_len_iter():
    p = nn.Parameter(jnp.asarray(A))
    assert (p.shape, p.dtype, p.ndim, p.size, len(p)) == ((2, 2), jnp.float32, 2, 4, 2)
    assert [row.shape for row in p] == [(2,), (2,)]


def test_data_is_another_name_of_value():
    p = nn.Parameter(jnp.zeros(2))
    p.data = jnp.ones(2)
    np.testing.assert_array_equal(np.asarray(p.value), [1.0, 1.0])
    p.value = jnp.full(2, 2.0)
    np.testing.assert_array_equal(np.asarray(p.data), [2.0, 2.0])


def test_a_box_is_a_pytree_of_one_leaf_that_keeps_its_class_and_flag():
    p = nn.Parameter(jnp.ones(2), requires_grad=False)
    assert len(jax.tree.leaves(p)) == 1
    q = jax.tree.map(lambda x: x + 1, p)
    assert type(q) is nn.Parameter
    assert not q.requires_grad
    np.testing.assert_array_equal(np.asarray(q), [2.0, 2.0])
    np.testing.assert_array_equal(np.asarray(p), [1.0, 1.0])


def test_a_box_goes_through_jit_and_grad_as_an_argument():
    p = nn.Parameter(jnp.asarray([1.0, 2.0]))
    g = jax.jit(jax.grad(lambda p: (p.value**2).sum()))(p)
    np.testing.assert_array_equal(np.asarray(g), [2.0, 4.0])


def test_equality_of_boxes_does_not_break_membership_by_identity():
    p, q = nn.Parameter(jnp.ones(2)), nn.Parameter(jnp.ones(2))
    assert {id(p), id(q)} == {id(x) for x in (p, q)}
    assert len({p, q, p}) == 2
    assert {p: 1}[p] == 1


def test_truth_of_a_box_is_that_of_its_array():
    assert bool(nn.Parameter(jnp.asarray(1.0)))
    assert not bool(nn.Parameter(jnp.asarray(0.0)))
    with pytest.raises((ValueError, TypeError)):
        bool(nn.Parameter(jnp.ones(2)))


@pytest.mark.parametrize(
    "make", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_a_copy_of_a_parameter_is_another_box_with_the_same_flag(make):
    p = nn.Parameter(jnp.ones(2), requires_grad=False)
    q = make(p)
    assert q is not p
    assert type(q) is nn.Parameter
    assert not q.requires_grad
    q.value = jnp.zeros(2)
    np.testing.assert_array_equal(np.asarray(p), [1.0, 1.0])


@pytest.mark.parametrize(
    "data",
    [jnp.arange(3), jnp.asarray([True]), jnp.arange(3, dtype=jnp.uint8)],
    ids=["int", "bool", "uint8"],
)
def test_integers_cannot_require_gradients(data):
    with pytest.raises(RuntimeError):
        nn.Parameter(data)
    assert nn.Parameter(data, requires_grad=False).dtype == data.dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_floating_and_complex_dtypes_are_kept(dtype):
    assert nn.Parameter(jnp.ones(2, dtype)).dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("bad", ["text", ..., None, {"a": 1}], ids=repr)
def test_what_is_no_array_is_refused(bad):
    with pytest.raises(TypeError):
        nn.Parameter(jnp.ones(2)).value = bad


def test_numpy_data_becomes_a_jax_array_and_is_copied():
    data = np.ones(2, np.float32)
    p = nn.Parameter(data)
    data[0] = 5
    assert isinstance(p.value, jax.Array)
    np.testing.assert_array_equal(np.asarray(p), [1.0, 1.0])


def test_a_parameter_of_a_parameter_is_no_alias():
    p = nn.Parameter(jnp.ones(2))
    q = nn.Parameter(p)
    q.value = jnp.zeros(2)
    np.testing.assert_array_equal(np.asarray(p), [1.0, 1.0])


def test_item_assignment_works_or_says_how():
    p = nn.Parameter(jnp.zeros(2))
    try:
        p[0] = 3.0
    except TypeError as error:
        assert ".at[" in str(error)
    else:
        np.testing.assert_array_equal(np.asarray(p), [3.0, 0.0])


def test_the_repr_says_parameter_and_shows_values():
    text = repr(nn.Parameter(jnp.asarray([1.5, 2.5])))
    assert text.startswith("Parameter")
    assert "1.5" in text


def test_another_shape_is_refused_by_value_and_taken_by_data():
    p = nn.Parameter(jnp.zeros(2))
    with pytest.raises(nn.ShapeError, match=r"\(3, 3\)"):
        p.value = jnp.zeros((3, 3))
    assert p.shape == (2,)
    p.data = jnp.zeros((3, 3))
    assert p.shape == (3, 3)


def test_a_weakly_typed_value_does_not_stay_weak():
    p = nn.Parameter(jnp.asarray(1.0))
    assert not p.value.weak_type
    p.value = jnp.asarray(2.0)
    assert not p.value.weak_type


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_integers_of_64_bits_that_jax_would_wrap_are_an_error_wherever_they_come_in(dtype):
    large = np.array([3, 1 << 40], dtype)
    module = nn.Module()
    module.register_buffer("count", jnp.zeros(2, "int32" if dtype == "int64" else "uint32"))

    def assign(value):
        module.count = value

    ways = {
        "nn.Buffer": nn.Buffer,
        "nn.Parameter": lambda v: nn.Parameter(v, requires_grad=False),
        "register_buffer": lambda v: module.register_buffer("other", v),
        "assignment": assign,
        "functional_call": lambda v: nn.functional_call(module, {"count": v}, method="modules"),
        "statefulize": lambda v: nn.statefulize(lambda params: 0, {"count": v}),
    }
    for name, way in ways.items():
        with pytest.raises(nn.DtypeError, match=r"1099511627776(.|\n)*jax_enable_x64") as info:
            way(large)
        assert "Why: " in str(info.value), name
    np.testing.assert_array_equal(module.count, [0, 0])
    module.count = np.array([3, 4], dtype)  # what fits is taken
    assert module.count.tolist() == [3, 4]
    with in_float64():
        assert nn.Buffer(large).value.tolist() == [3, 1 << 40]


def test_a_generator_takes_only_what_its_state_is():
    generator = nn.Generator(3)
    before = generator.get_state().tolist()
    for state in (
        np.arange(4),
        np.arange(4, dtype=np.int32),
        np.arange(3, dtype=np.uint32),
        [1, 2, 3, 4],
    ):
        with pytest.raises(nn.DtypeError, match=r"uint32\[4\]"):
            generator.set_state(state)
    assert generator.get_state().tolist() == before


@pytest.mark.parametrize(
    "index", [8, -9, (0, 3), np.array([0, -9]), (slice(None), [0, 3]), jnp.array([7, 8])], ids=repr
)
def test_a_write_out_of_range_is_an_error_as_in_numpy_and_not_dropped(index):
    p = nn.Parameter(jnp.zeros((8, 3)))
    for target in (np.zeros((8, 3)), p):
        with pytest.raises(IndexError, match="out of"):
            target[index] = 1.0
    assert not p.value.any()


def test_an_index_out_of_range_is_an_error_in_reads_and_compiled_writes():
    p = nn.Parameter(jnp.zeros((8, 3)))
    with pytest.raises(IndexError, match="with 8"):
        p[8]

    def write(m, i):
        m.weight[i], m.weight[1] = 1.0, 2.0  # the first is known only when it runs
        m.weight[8] = 3.0

    with pytest.raises(IndexError, match="with 8"):
        nn.jit(write)(nn.Linear(3, 8), 0)


@pytest.mark.parametrize("name", ["value", "data", "requires_grad"])
def test_what_only_a_parameter_has_cannot_be_set_on_a_buffer_or_a_computed_weight(name):
    norm = nn.BatchNorm1d(3)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 1))
    for array in (norm.running_mean, layer.weight, next(norm.buffers())):
        with pytest.raises(AttributeError, match="the write would be lost"):
            setattr(array, name, jnp.ones(3))
        assert not hasattr(array, name)
