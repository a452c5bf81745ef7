"""Operators of ATen: each row is a function of torch's, run there and as a converted graph."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import statefulnn as nn
from statefulnn.bridge.torch import from_torch, operators
from statefulnn.bridge.torch.operators import OPERATORS, find
from tests.bridge.beside_torch import beside, same
from tests.quick import QUICKLY

GENERATOR = torch.Generator().manual_seed(0)

X = torch.tensor([[1.5, -2.0, 0.0], [float("nan"), 3.25, -0.5]])
Y = torch.tensor([[0.5, 2.0, -3.0], [1.0, -0.25, 4.0]])
N = torch.tensor([[7, -7, 3], [-3, 0, 5]])
J = torch.tensor([[2, 2, -2], [-2, 4, 3]])
B = torch.tensor([[True, False, True], [False, False, True]])
P = Y.abs() + 0.1
E = torch.zeros(0, 3)


def array(x):
    if isinstance(x, torch.Tensor):
        values = x.numpy() if x.dtype != torch.bfloat16 else x.float().numpy()
        dtype = str(x.dtype).removeprefix("torch.")
        return jnp.asarray(values, jax.dtypes.canonicalize_dtype(jnp.dtype(dtype)))
    return [array(v) for v in x] if isinstance(x, list) else x


def check(name, *args, tolerance=2e-6, **kwargs):
    """Call an overload of ATen and our entry for it."""
    packet, _, overload = name.partition(".")
    theirs = getattr(getattr(torch.ops.aten, packet), overload or "default")
    entry = find(name if overload else f"{name}.default")
    assert entry is not None, name
    wanted = theirs(*args, **kwargs)
    dtypes = {
        k: str(v).removeprefix("torch.") for k, v in kwargs.items() if isinstance(v, torch.dtype)
    }
    got = OPERATORS[entry](*map(array, args), **{k: array(v) for k, v in kwargs.items()} | dtypes)
    several = isinstance(wanted, (tuple, list))
    for a, b in zip(got if several else [got], wanted if several else [wanted], strict=True):
        if a is None or b is None:  # a gradient that nobody asked for
            assert a is b, name
            continue
        dtype = jax.dtypes.canonicalize_dtype(jnp.dtype(str(b.dtype).removeprefix("torch.")))
        assert a.dtype == dtype, f"{name}: {a.dtype}, torch has {b.dtype}"
        assert a.shape == tuple(b.shape), name
        b = b.float() if b.dtype == torch.bfloat16 else b
        np.testing.assert_allclose(
            np.asarray(a, np.float64 if a.dtype != jnp.complex64 else None), b.numpy(),
            rtol=tolerance, atol=tolerance, err_msg=name,
        )  # fmt: skip


ARITHMETIC = (
    "add.Tensor sub.Tensor mul.Tensor div.Tensor remainder.Tensor fmod.Tensor maximum minimum"
)
ARITHMETIC += " eq.Tensor ne.Tensor lt.Tensor ge.Tensor pow.Tensor_Tensor atan2 floor_divide"
DTYPES = ["bool", "uint8", "int32", "int64", "bfloat16", "float16", "float32"]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(ARITHMETIC.split()[:12]),
    a=st.sampled_from(DTYPES),
    b=st.sampled_from(DTYPES),
    shapes=st.sampled_from([((2, 3), (3,)), ((), (2,)), ((2,), ()), ((0, 3), (1, 3)), ((), ())]),
)
def test_promotion_of_arrays_is_torchs(name, a, b, shapes):
    if name == "sub.Tensor" and "bool" in (a, b) or {a, b} == {"bool"}:
        return  # torch has none, or another one, for truth values
    rng = np.random.default_rng(0)
    low = 0 if name in ("remainder.Tensor", "fmod.Tensor") else -1
    one, other = (torch.as_tensor(rng.integers(low + 1, 5, s)) for s in shapes)
    check(name, one.to(getattr(torch, a)), (other + 1).to(getattr(torch, b)), tolerance=1e-2)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(
        ["add.Scalar", "mul.Scalar", "div.Scalar", "gt.Scalar", "remainder.Scalar"]
    ),
    dtype=st.sampled_from(DTYPES[1:]),
    number=st.sampled_from([2, 3, 2.5, 1.0]),
    shape=st.sampled_from([(2, 3), (), (0,)]),
)
def test_promotion_of_numbers_is_torchs(name, dtype, number, shape):
    values = torch.as_tensor(np.random.default_rng(0).integers(0, 5, shape)).to(
        getattr(torch, dtype)
    )
    check(name, values, number, tolerance=1e-2)


CASES = [
    *[(n, (X, Y)) for n in ARITHMETIC.split() if n not in ("pow.Tensor_Tensor",)],
    *[(n, (N, J)) for n in ARITHMETIC.split() if n not in ("pow.Tensor_Tensor", "div.Tensor")],
    ("pow.Tensor_Tensor", (P, Y)),
    ("pow.Tensor_Scalar", (X, 2)),
    ("pow.Tensor_Scalar", (P, 0.5)),
    ("pow.Tensor_Scalar", (P, -1.5)),
    ("pow.Scalar", (2.0, Y)),
    ("pow.Tensor_Scalar", (N, 2)),
    ("div.Tensor_mode", (X, Y), {"rounding_mode": "floor"}),
    ("div.Tensor_mode", (X, Y), {"rounding_mode": "trunc"}),
    ("div.Tensor_mode", (N, J), {"rounding_mode": "floor"}),
    ("div.Tensor_mode", (N, J), {"rounding_mode": "trunc"}),
    ("div.Tensor", (N, J)),
    ("add.Tensor", (X, Y), {"alpha": 2}),
    ("add.Tensor", (B, B)),
    ("mul.Tensor", (B, B)),
    ("rsub.Scalar", (X, 1)),
    ("bitwise_and.Tensor", (N, J)),
    ("bitwise_not", (N,)),
    ("bitwise_not", (B,)),
    ("logical_and", (X, Y)),
    ("logical_not", (X,)),
    ("where.self", (B, X, Y)),
    ("masked_fill.Scalar", (X, B, 7.0)),
    ("clamp", (X, -1, 2)),
    ("clamp", (X,), {"max": 0.5}),
    ("clamp.Tensor", (Y, X.nan_to_num() - 1, None)),
    ("lerp.Scalar", (X, Y, 0.3)),
    ("addcmul", (X, Y, Y), {"value": 2}),
    ("addcdiv", (X, Y, P)),
    ("isclose", (X, X)),
    *[
        (n, (Y,))
        for n in "exp expm1 sin cos tanh sigmoid erf abs neg sign floor ceil trunc round frac".split()
    ],
    *[(n, (P,)) for n in "log log2 log1p sqrt rsqrt reciprocal lgamma".split()],
    *[(n, (N,)) for n in "exp sqrt abs neg sign floor round sigmoid".split() if n != "sqrt"],
    *[(n, (X,)) for n in "isnan isinf isfinite nan_to_num abs relu".split()],
    ("round.decimals", (Y * 1.2345,), {"decimals": 2}),
    ("logit", (torch.tensor([0.2, 0.7]), 0.3)),
    # reductions
    *[(f"{n}.dim", (X, [1], True)) for n in ("mean",)],
    ("sum", (N,)),
    ("sum", (B,)),
    ("sum.dim_IntList", (X, [-1])),
    ("sum.dim_IntList", (X, None, True)),
    ("sum.dim_IntList", (E, [0])),
    ("sum", (N,), {"dtype": torch.float32}),
    ("mean", (Y,)),
    ("mean.dim", (E, [1])),
    ("prod.dim_int", (Y, -1, True)),
    ("prod", (E,)),
    ("var.correction", (Y, [1])),
    ("var.correction", (Y, [-1]), {"correction": 0, "keepdim": True}),
    ("var.dim", (Y, [0], False)),
    ("std.correction", (Y,)),
    ("std.dim", (Y, [1], True, True)),
    ("var_mean.correction", (Y, [1])),
    ("var.correction", (Y[:1], [0])),
    ("amax", (X, [1])),
    ("amin", (X, [-2, -1], True)),
    ("max", (Y,)),
    ("max.dim", (X, -1)),
    ("min.dim", (Y, 0, True)),
    ("max.dim", (B.int(), 1)),
    ("argmax", (X, 1)),
    ("argmax", (X,)),
    ("argmin", (Y, -1, True)),
    ("any", (B,)),
    ("any.dim", (X, 1)),
    ("all.dim", (B, -1, True)),
    ("all", (torch.zeros(0),)),
    ("any", (torch.zeros(0),)),
    ("count_nonzero", (Y,)),
    ("logsumexp", (Y, [1], True)),
    ("linalg_vector_norm", (Y, 2, [1])),
    ("linalg_vector_norm", (Y, 1)),
    ("linalg_vector_norm", (Y, float("inf"), [0])),
    ("linalg_vector_norm", (Y, 3, [1], True)),
    ("cumsum", (N, -1)),
    ("cumsum", (B, 0)),
    ("cumprod", (Y, 1)),
    ("cummax", (Y, 1)),
    ("cummin", (N, 0)),
    ("logcumsumexp", (Y, -1)),
    ("sort", (Y, 0)),
    ("sort", (Y, -1, True)),
    ("sort.stable", (J,), {"stable": True, "dim": 1, "descending": True}),
    ("argsort", (Y,)),
    ("topk", (Y, 2)),
    ("topk", (Y, 1, 0, False)),
    ("median.dim", (Y, 1)),
    ("diff", (Y,)),
    # shapes
    ("view", (Y, [3, -1])),
    ("permute", (Y, [1, 0])),
    ("transpose.int", (Y, 0, -1)),
    ("unsqueeze", (Y, -1)),
    ("squeeze.dim", (Y[:1], 0)),
    ("squeeze.dim", (Y, 0)),
    ("squeeze", (Y[None],)),
    ("squeeze.dims", (Y[None], [0, 1])),
    ("expand", (Y[:1], [4, -1])),
    ("slice.Tensor", (Y, 1, -2, 9223372036854775807)),
    ("slice.Tensor", (Y, -1, 0, 3, 2)),
    ("select.int", (Y, -1, -2)),
    ("split.Tensor", (Y, 2, 1)),
    ("split_with_sizes", (Y, [1, 2], -1)),
    ("chunk", (torch.arange(7.0), 3)),
    ("unbind.int", (Y, 1)),
    ("diagonal", (Y, 1)),
    ("unfold", (Y, 1, 2, 1)),
    ("flatten.using_ints", (Y[None], 1)),
    ("unflatten.int", (Y, 1, [3, -1])),
    ("cat", ([Y, E, torch.zeros(0)], 0)),
    ("cat", ([N, Y],)),
    ("stack", ([Y, X], -1)),
    ("flip", (Y, [-1])),
    ("roll", (Y, [1], [-1])),
    ("roll", (Y, [2])),
    ("repeat", (Y, [2, 1, 3])),
    ("repeat_interleave.self_int", (Y, 2, 1)),
    ("tril", (Y, -1)),
    ("triu", (Y, 1)),
    ("as_strided", (torch.arange(6.0), [2, 3], [1, 2], 0)),
    ("movedim.int", (Y, 0, 1)),
    ("constant_pad_nd", (Y, [1, -1], 2.0)),
    # creation
    ("arange", (5,)),
    ("arange.start_step", (1, 8, 3)),
    ("arange.start_step", (0.0, 1.0, 0.25)),
    ("full", ([2], 3)),
    ("full", ([2], 3.5)),
    ("zeros", ([2, 0],)),
    ("ones_like", (N,)),
    ("full_like", (N, 2)),
    ("new_zeros", (Y, [2])),
    ("linspace", (0, 1, 5)),
    ("eye", (3,)),
    ("diag_embed", (Y, 1)),
    ("scalar_tensor", (2.0,)),
    # indices
    ("index.Tensor", (Y, [torch.tensor([1, 0]), torch.tensor([-1, 2])])),
    ("index.Tensor", (Y, [None, torch.tensor([0, 0])])),
    (
        "index_put",
        (Y, [torch.tensor([0, 0]), torch.tensor([1, 1])], torch.tensor([1.0, 2.0]), True),
    ),
    ("index_put", (Y, [B], torch.tensor(5.0))),
    ("index_select", (Y, -1, torch.tensor([2, 0]))),
    ("gather", (Y, 1, torch.tensor([[0, 2], [1, 1]]))),
    ("gather", (Y, 0, torch.tensor([[1, 0]]))),
    ("scatter.src", (Y, 1, torch.tensor([[2, 0]]), X.nan_to_num())),
    ("scatter.value", (Y, 0, torch.tensor([[1, 0, 1]]), 9.0)),
    ("scatter_add", (Y, 1, torch.tensor([[0, 0], [1, 2]]), P)),
    ("index_add", (Y, 0, torch.tensor([0, 0]), P), {"alpha": 2}),
    *[
        ("scatter_reduce.two", (Y, 1, torch.tensor([[0, 0], [1, 2]]), P, r), {"include_self": s})
        for r in ("sum", "prod", "mean", "amax", "amin")
        for s in (True, False)
    ],
    ("slice_scatter", (Y, torch.zeros(2, 1), 1, 1, 2)),
    ("select_scatter", (Y, torch.zeros(3), 0, -1)),
    ("index_fill.int_Scalar", (Y, 1, torch.tensor([0]), 4.0)),
    ("index_copy", (Y, 0, torch.tensor([1]), P[:1])),
    ("searchsorted.Tensor", (torch.tensor([0.0, 1, 2]), Y)),
    ("bucketize.Tensor", (Y, torch.tensor([0.0, 1])), {"right": True}),
    # products
    ("mm", (Y, Y.T.contiguous())),
    ("addmm", (torch.ones(2), Y, P.T.contiguous()), {"beta": 2, "alpha": 0.5}),
    ("matmul", (Y, torch.ones(3))),
    ("bmm", (Y[None], P.T[None].contiguous())),
    ("dot", (Y[0], P[0])),
    ("outer", (Y[0], P[1])),
    (
        "baddbmm",
        (torch.full((1, 2, 2), float("nan")), Y[None], P.T[None].contiguous()),
        {"beta": 0},
    ),
    ("einsum", ("ij,kj->ik", [Y, P])),
    ("cdist", (Y, P)),
    ("cdist", (Y, P, 1.0)),
    ("linalg_inv", (torch.eye(3) * 2,)),
    ("_weight_norm", (Y, P[:, :1], 0)),
    ("linalg_matrix_exp", (torch.tensor([[0.0, 1.0], [-1.0, 0.5]]),)),
    ("linalg_solve_triangular", (torch.eye(2) + 1, P[:, :2].contiguous()), {"upper": True}),
    ("_cdist_forward", (Y, P, 2.0, None)),
    ("_pdist_forward", (Y, 2.0)),
    ("_fft_r2c", (Y, [1], 0, True)),
    ("_fft_c2r", (torch.complex(Y, P), [1], 2, 5)),
    (
        "_grouped_mm",
        (
            torch.randint(-2, 3, (5, 8)).bfloat16(),
            torch.randint(-2, 3, (3, 8, 8)).bfloat16(),
            torch.tensor([2, 2, 5], dtype=torch.int32),
        ),
    ),
    ("masked_scatter", (Y, B, P)),
    ("histc", (Y, 4, -3, 4)),
    ("histc", (P, 3)),
    ("native_layer_norm", (Y, [3], None, None, 1e-5)),
    ("native_group_norm", (torch.randn(2, 4, 3), None, None, 2, 4, 3, 2, 1e-5)),
    # network
    ("softmax.int", (Y, -1)),
    ("log_softmax.int", (Y, 0, torch.float32)),
    ("_safe_softmax", (torch.full((2, 2), -float("inf")), 1)),
    ("elu", (Y, 0.5)),
    ("elu", (Y, 1.6, 1.05, 0.9)),
    ("leaky_relu", (Y, 0.2)),
    ("hardtanh", (Y, -1, 1)),
    ("gelu", (Y,)),
    ("gelu", (Y,), {"approximate": "tanh"}),
    ("glu", (torch.cat([Y, P], 1),)),
    ("softplus", (Y,)),
    ("log_sigmoid", (Y,)),
    ("max_pool2d", (torch.randn(1, 1, 4, 4), [2, 2])),
    ("avg_pool2d", (torch.randn(1, 1, 4, 4), [2, 2], [], [1, 1], False, False)),
    ("adaptive_avg_pool2d", (torch.randn(1, 2, 5, 4), [2, 2])),
    ("upsample_nearest2d.vec", (torch.randn(1, 1, 2, 3), [4, 6], None)),
    ("upsample_bilinear2d.vec", (torch.randn(1, 1, 2, 3), None, False, [2.0, 2.0])),
    ("upsample_bicubic2d.vec", (torch.randn(1, 1, 4, 4), [6, 7], True, None)),
    ("pad", (torch.randn(1, 2, 4), [1, 2], "reflect")),
    ("conv2d", (torch.randn(1, 2, 5, 5), torch.randn(4, 1, 3, 3), None, [2, 2], [1, 1], [1, 1], 2)),
    ("conv2d.padding", (torch.randn(1, 2, 5, 5), torch.randn(4, 2, 3, 3), None, [1, 1], "same")),
    (
        "conv_transpose2d.input",
        (torch.randn(1, 2, 3, 3), torch.randn(2, 1, 2, 2), None, [2, 2], [0, 0], [1, 1]),
    ),
    (
        "batch_norm",
        (torch.randn(4, 3), None, None, torch.zeros(3), torch.ones(3), False, 0.1, 1e-5, False),
    ),
    ("layer_norm", (Y, [3])),
    ("group_norm", (torch.randn(2, 4, 3), 2)),
    ("embedding", (Y, torch.tensor([[1, 0]]))),
    ("cross_entropy_loss", (Y, torch.tensor([0, 2]))),
    ("nll_loss_nd", (Y, torch.tensor([0, 2]), None, 2)),
    ("mse_loss", (Y, P)),
    ("smooth_l1_loss", (Y, P, 0, 0.5)),
    ("binary_cross_entropy_with_logits", (Y, P / 5)),
    (
        "scaled_dot_product_attention",
        (torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)),
    ),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=(pytest.mark.long,) if i % 3 else ()) for i, c in enumerate(CASES)],
    ids=lambda c: c[0],
)
def test_an_operator_computes_what_torch_does(case):
    name, args, *rest = case
    check(name, *args, tolerance=2e-5, **(rest[0] if rest else {}))


def test_every_entry_is_a_name_of_torchs():
    ours = {
        "assign",
        "unseen",
        "own_gradient",
        "put_view",
        "getitem",
        "stop_gradient",
        "batch_norm.updating",
        "instance_norm.updating",
        "_native_batch_norm_legit.updating",
    }
    assert set(operators()) == set(OPERATORS)
    unknown = []
    for name in operators():
        packet = name.split(".")[0]
        if name in ours or name.startswith(("math.", "torch.ops.higher_order.")) or "::" in name:
            continue
        if not any(
            hasattr(torch.ops.aten, p)
            for p in (packet, packet + "_", f"__{packet}__", f"__i{packet}__")
        ):
            unknown.append(name)
    assert not unknown


def test_composite_operators_are_taken_apart():
    class Composite(torch.nn.Module):
        def forward(self, x, y):
            loss = torch.nn.functional
            losses = loss.triplet_margin_loss(x, y, x.flip(0)) + loss.poisson_nll_loss(x, y)
            losses = losses + loss.cosine_embedding_loss(x, y, torch.ones(len(x)))
            z = x.clone()
            z.fill_diagonal_(3.0)
            return losses, torch.inner(x, y), torch.fft.fftshift(x), loss.pairwise_distance(x, y), z

    x, y = (torch.rand(4, 4, generator=GENERATOR) for _ in range(2))
    beside(Composite(), x, y)


def test_products_of_vectors_conjugate_the_first():
    c, d = torch.complex(Y[:, :2], P[:, :2]), torch.complex(P[:, :2], Y[:, :2])
    check("linalg_vecdot", c, d, dim=-1)
    check("linalg_vecdot", Y, P, dim=0)
    check("vdot", c[0], d[0])
    check("dot", c[0], d[0])


# Core operators without an entry, and why; docs/from-torch.md has the same list.
WITHOUT = {
    "_local_scalar_dense": "a number of Python's made of an array",
    "nonzero": "the size of its result depends on numbers",
    "resize_": "it changes the shape of a tensor that others see; reshape and pad are there",
}
# Their results are numbers that follow from sizes: a graph has these, and no such operator.
SIZES = {"sym_numel", "sym_size", "sym_stride", "sym_storage_offset", "sym_is_contiguous"}


def test_every_core_operator_of_torchs_has_an_entry_or_a_reason():
    names = {
        n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n[:6] == "aten::"
    }
    core = {
        f"{name}.{overload}"
        for name in {n.partition(".")[0] for n in names}
        for overload in getattr(getattr(torch.ops.aten, name), "overloads", list)()
        if torch.Tag.core in getattr(getattr(torch.ops.aten, name), overload).tags
    }
    assert len(core) > 150
    without = {name.split(".")[0] for name in core if find(name) is None}
    assert without == set(WITHOUT) | SIZES
    page = (Path(__file__).parents[2] / "docs" / "from-torch.md").read_text()
    assert [name for name in WITHOUT if f"`{name}`" not in page] == []


class Sized(torch.nn.Module):
    def forward(self, x):
        aten = torch.ops.aten
        assert aten.sym_is_contiguous(x)
        last = aten.sym_size.int(x, 1) + aten.sym_stride.int(x, 0) + aten.sym_storage_offset(x)
        return x * last + aten.sym_numel(x)


def test_operators_whose_results_are_sizes_become_numbers():
    beside(Sized(), torch.randn(4, 3), others=((torch.randn(5, 6),),))


class NativeBatchNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        given = (None, None, self.mean, self.var, self.training, 0.1, 1e-5)
        return torch.ops.aten._native_batch_norm_legit(x, *given)


@pytest.mark.parametrize("training", [True, False])
def test_the_core_operator_of_batch_normalisation_writes_running_statistics(training):
    theirs, x = NativeBatchNorm().train(training), torch.randn(4, 3, generator=GENERATOR)
    ours = from_torch(theirs, x)
    same(ours(jnp.asarray(x.numpy())), theirs(x))
    same([ours.mean, ours.var], [theirs.mean, theirs.var])


def image(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def gradients():
    """Rows of operators that compute gradients: the values between are those of torch's forward."""
    x, w, normal = image(2, 4, 5, 6), torch.rand(4) + 0.5, torch.ops.aten
    pooled, indices = normal.max_pool2d_with_indices(x, [3, 2], [2, 2], [1, 1])
    _, mean, inverse = normal.native_group_norm(x, w, None, 2, 4, 30, 2, 1e-5)
    _, of_rows, inverses = normal.native_layer_norm(x, [5, 6], None, None, 1e-5)
    weight, ids = torch.rand(5, 6), torch.tensor([[1, 0, 1], [2, 4, 1]])
    every, some = [True] * 3, [True, False, False]
    yield "_adaptive_avg_pool2d_backward", (image(2, 4, 2, 3), x)
    yield "avg_pool2d_backward", (image(2, 4, 2, 3), x, [2, 2], [2, 2], [0, 0], False, True, None)
    yield "avg_pool2d_backward", (image(2, 4, 3, 4), x, [2, 2], [2, 2], [1, 1], False, False, None)
    how = ([3, 2], [2, 2], [1, 1], [1, 1], False, indices)
    yield "max_pool2d_with_indices_backward", (image(*pooled.shape), x, *how)
    conv = ([2, 2], [1, 1], [1, 1], False, [0, 0], 2)
    yield "convolution_backward", (image(2, 6, 3, 3), x, image(6, 2, 3, 3), [6], *conv, every)
    conv = ([1], [0], [1], True, [0], 1)
    yield (
        "convolution_backward",
        (image(2, 3, 7), x[:, :, 0], image(4, 3, 2), [3], *conv, every),
    )
    yield "embedding_dense_backward", (image(2, 3, 4), ids, 5, 1, False)
    yield "embedding_dense_backward", (image(2, 3, 4), ids, 5, -1, True)
    yield (
        "native_layer_norm_backward",
        (x, -x * x, [5, 6], of_rows, inverses, weight, weight, every),
    )
    yield (
        "native_layer_norm_backward",
        (x, -x, [5, 6], of_rows, inverses, None, None, some),
    )
    yield "native_group_norm_backward", (x, -x * x, mean, inverse, w, 2, 4, 30, 2, every)
    yield (
        "native_group_norm_backward",
        (x, -x, mean, inverse, None, 2, 4, 30, 2, some),
    )


@pytest.mark.parametrize("row", list(gradients()), ids=lambda row: row[0])
def test_gradients_that_are_operators_are_those_of_torch(row):
    name, args = row
    check(name, *args, tolerance=2e-5)


def test_random_operators_draw_from_the_generator():
    nn.manual_seed(0)
    draw = lambda: OPERATORS["randn_like"](jnp.ones(1000))
    a, b = draw(), draw()
    assert not np.array_equal(a, b) and abs(float(a.std()) - 1) < 0.1
    kept = OPERATORS["bernoulli.p"](jnp.ones(10000), 0.3)
    assert abs(float(kept.mean()) - 0.3) < 0.03


def test_truth_values_as_indices_are_refused():
    with pytest.raises(nn.ShapeError, match="depends on the numbers") as error:
        OPERATORS["index"](jnp.ones(3), [jnp.ones(3, bool)])
    assert "torch.where" in str(error.value)


# --------------------------------------------------------------------------------------------------
# Functions of torch, several to a module, with their gradients: what torch has and few use

_A = torch.randn(4, 6, generator=GENERATOR)
_SIGNAL = torch.randn(40, generator=GENERATOR)
_WINDOW = torch.hann_window
_HOLES = lambda x: torch.where(x > 0.5, torch.nan, x)
FUNCTIONS = {
    "windows": [
        lambda x: x * torch.hann_window(6) + torch.hann_window(6, periodic=False),
        lambda x: x * torch.hamming_window(6) + torch.hamming_window(6, False, 0.5, 0.4),
        lambda x: x * torch.blackman_window(6) + torch.bartlett_window(6),
        lambda x: x * torch.bartlett_window(6, periodic=False) + torch.hann_window(1),
        lambda x: x * torch.kaiser_window(6) + torch.kaiser_window(6, False, 4.0),
        lambda x: x * torch.hann_window(x.shape[1]),
        lambda x: x * torch.fft.fftfreq(6, d=0.5) + torch.fft.fftfreq(6),
        lambda x: x[:, :4] * torch.fft.rfftfreq(6),
        lambda x: x * torch.logspace(0, 2, 6) + torch.logspace(0, 2, 6, base=2.0),
        lambda x: x[torch.tril_indices(4, 4)[0]] + x[torch.triu_indices(4, 4, -1)[1, :10]],
    ],
    "ranks": [
        torch.median,
        lambda x: torch.median(_HOLES(x)),
        lambda x: torch.median(_HOLES(x), 1)[0],
        lambda x: torch.nanmedian(_HOLES(x)),
        lambda x: tuple(torch.nanmedian(_HOLES(x), 1)),
        lambda x: tuple(torch.kthvalue(x, 2, 1)),
        lambda x: tuple(torch.kthvalue(x, 2, 0, True)),
        lambda x: torch.mode(x.round(), 0)[0],
        lambda x: tuple(torch.mode((x * 2).long(), 1)),
        lambda x: torch.mode((x * 2).long(), 0, True)[0],
    ],
    "quantiles": [
        lambda x: torch.quantile(x, 0.3),
        lambda x: torch.quantile(x, torch.tensor([0.1, 0.5, 0.9]), 1, True),
        lambda x: torch.quantile(x, torch.tensor([0.1, 0.5]), keepdim=True),
        *[
            lambda x, kind=kind: torch.quantile(x, 0.3, 1, interpolation=kind)
            for kind in ("nearest", "lower", "higher", "midpoint")
        ],
        lambda x: torch.quantile(_HOLES(x), 0.35, 1),
        lambda x: torch.nanquantile(_HOLES(x), torch.tensor([0.35, 0.7])),
    ],
    "special": [
        lambda x: torch.i0(x) + torch.special.i0e(x) + torch.special.i1(x) + torch.special.i1e(x),
        lambda x: torch.special.ndtri(x.sigmoid()) + torch.special.log_ndtr(x),
        lambda x: torch.polygamma(1, x.abs() + 0.3) + torch.polygamma(2, x.abs() + 1),
        lambda x: torch.special.zeta(x.detach().abs() + 1.5, 2.0),
        lambda x: torch.special.gammainc(x.detach().abs() + 0.1, x.abs() + 0.3),
        lambda x: torch.special.gammaincc(x.detach().abs() + 0.1, x.abs() + 0.3),
        lambda x: torch.frexp(x.detach())[1],
        lambda x: torch.nextafter(x.detach(), x.detach() + 1),
        lambda x: torch.lcm((x * 9).long(), (x * 5).long().flip(0)),
        lambda x: torch.heaviside(x.detach().round(), torch.tensor(0.5)),
        lambda x: torch.mvlgamma(x.abs() + 2, 2) + torch.special.ndtr(x),
        lambda x: torch.special.entr(x.abs()) + torch.special.xlog1py(x, x.abs()),
        lambda x: torch.ldexp(x, torch.tensor(3)) + torch.logaddexp2(x, x + 1),
    ],
    "places": [
        lambda x: torch.diagonal_scatter(x, x[0, :4], 1) + torch.diagonal_copy(x, 1).sum(),
        lambda x: torch.diagonal_scatter(x, x[0, :3], -1),
        lambda x: torch.put(x, torch.tensor([0, 3]), x[0, :2]),
        lambda x: torch.index_reduce(x, 0, torch.tensor([0, 1, 1, 0]), x + 1, "prod"),
        lambda x: torch.index_reduce(x, 1, torch.tensor([0, 1, 1, 0, 5, 2]), x, "mean"),
        lambda x: torch.scatter_reduce(x, 0, (x * 0).long(), x + 1, "prod"),
        lambda x: torch.scatter_reduce(x, 0, (x * 0).long(), x, "prod", include_self=False),
        # one zero, and two of them
        lambda x: torch.scatter_reduce(
            x * 0 + 2,
            1,
            torch.tensor([[0, 0, 0, 1, 1, 1]] * 4),
            x * torch.tensor([0.0, 1, 1, 0, 0, 1]),
            "prod",
        ),
        lambda x: torch.isin((x * 3).long(), torch.tensor([1, -1])) & torch.isin(2, (x * 3).long()),
        lambda x: torch.searchsorted(x[0].sort()[0], 0.5) + torch.bucketize(0.5, x[1].sort()[0]),
        lambda x: torch.slice_copy(x, 1, 0, 3) + torch.unfold_copy(x, 1, 3, 3)[:, 0],
        lambda x: torch.view_copy(x, (6, 4)),
        lambda x: F.max_unpool2d(*F.max_pool2d(x.view(1, 1, 4, 6), 2, return_indices=True), 2),
        lambda x: F.max_unpool1d(*F.max_pool1d(x[None], 2, return_indices=True), 2),
    ],
    "matrices": [
        lambda x: torch.addr(x, x[:, 0], x[0], beta=0.5, alpha=2.0),
        lambda x: torch.renorm(x, 2, 0, 1.0) + torch.renorm(x, 1, 1, 1.0),
        lambda x: torch.dist(x, x * 2, 3),
        lambda x: torch.linalg.svdvals(x) + torch.linalg.cond(x[:, :4]),
        lambda x: torch.linalg.pinv(x),
        lambda x: torch.linalg.matrix_norm(x, "nuc"),
        lambda x: torch.linalg.lu_factor(x[:, :4])[0],
        lambda x: torch.linalg.tensorinv(x[:, :4].reshape(2, 2, 4), 2),
        lambda x: torch.linalg.tensorsolve(x[:, :4], x[:, 0]) + torch.logdet(x @ x.T),
        lambda x: torch.cholesky_solve(x, torch.linalg.cholesky(x @ x.T + torch.eye(4))),
        lambda x: torch.cholesky_inverse(torch.linalg.cholesky(x @ x.T + torch.eye(4))),
        lambda x: torch.block_diag(x, x[0], x),
        lambda x: torch.trapezoid(x, dx=0.3) + torch.cumulative_trapezoid(x, dim=0).sum(),
        lambda x: torch.cartesian_prod(x[0], x[1]),
    ],
    "losses": [
        lambda x: F.soft_margin_loss(x, x.detach().sign()),
        lambda x: F.multi_margin_loss(x, torch.tensor([1, 2, 0, 0])),
    ],
}
_SPECTRUM = {
    "n_fft": 16,
    "hop_length": 4,
    "return_complex": True,
}
SIGNALS = [
    lambda x: torch.stft(x, **_SPECTRUM, window=_WINDOW(16)).abs(),
    lambda x: torch.stft(x, **_SPECTRUM, win_length=12, window=_WINDOW(12), normalized=True).real,
    lambda x: torch.istft(torch.stft(x, **_SPECTRUM, window=_WINDOW(16)), 16, 4, window=_WINDOW(16)),
    lambda x: torch.istft(
        torch.stft(x.reshape(2, 20), **_SPECTRUM, window=_WINDOW(16), normalized=True, onesided=False),
        16, 4, window=_WINDOW(16), normalized=True, onesided=False, length=18,
    ),
    lambda x: torch.istft(
        torch.stft(x, 8, 4, center=False, window=_WINDOW(8) + 0.1, return_complex=True),
        8, 4, window=_WINDOW(8) + 0.1, center=False,
    ),
    lambda x: torch.istft(
        torch.stft(x, **_SPECTRUM, win_length=12, window=torch.ones(12)), 16, 4, 12,
        window=torch.ones(12),
    ),
]  # fmt: skip


def beside_with_gradients(functions, x):
    """Compare a module that calls all functions with the functions, and the gradients by its input."""

    class Calls(torch.nn.Module):
        def forward(self, x):
            return [function(x) for function in functions]

    ours, given = from_torch(Calls(), x), jnp.asarray(x.numpy())
    x = x.clone().requires_grad_()
    theirs = [torch.utils._pytree.tree_leaves(function(x)) for function in functions]
    trained = [[t.requires_grad for t in leaves] for leaves in theirs]

    def loss(x):
        found = [jax.tree.leaves(out) for out in ours(x)]
        pairs = zip(found, trained, strict=True)
        chosen = [y for ys, ones in pairs for y, one in zip(ys, ones, strict=True) if one]
        return sum(jnp.sum(jnp.square(jnp.where(jnp.isnan(y), 0.0, y))) for y in chosen), found

    gradient, found = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICKLY)(given)
    same(found, theirs, 2e-5)
    total = [
        t.nan_to_num(0.0).square().sum() for leaves in theirs for t in leaves if t.requires_grad
    ]
    sum(total).backward()
    scale = float(x.grad.abs().max())
    np.testing.assert_allclose(gradient / scale, x.grad / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_that_few_use_and_their_gradients_are_torchs(kind):
    beside_with_gradients(FUNCTIONS[kind], _A)


def test_spectra_of_short_times_and_the_way_back_are_torchs():
    beside_with_gradients(SIGNALS, _SIGNAL)
