"""Each function of F under autocast beside torch's, on CPU and, by tensors without data, on CUDA."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import statefulnn as nn
import statefulnn.functional as F
from statefulnn.functional import _autocast as lists

EPS = float(jnp.finfo(jnp.bfloat16).eps)


def numbers(*shape: int) -> np.ndarray:
    # In (0, 1), where every loss is defined; the same ones for each call.
    return np.random.default_rng(sum(shape)).uniform(0.1, 0.9, shape).astype(np.float32)


def classes(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape) % 3


X, Y, IMAGES = numbers(4, 6), numbers(6, 4).T.copy(), numbers(2, 4, 6, 6)
ONE, NONE = np.ones(4, np.float32), np.zeros(4, np.float32)
LAST, HEADS, TRIPLE = numbers(6), numbers(2, 2, 4, 8), numbers(3, 2, 8)
NORM = {"normalized_shape": (6,), "weight": LAST}
# What `pad` and its like take beside their input.
CASES: dict[str, tuple[tuple, dict[str, Any]]] = {
    "affine_grid": ((numbers(2, 2, 3),), {"size": (2, 1, 4, 4), "align_corners": False}),
    "batch_norm": ((IMAGES, NONE, ONE, ONE, NONE), {"training": False}),
    "bilinear": ((X, Y, numbers(3, 6, 6)), {}),
    "channel_shuffle": ((IMAGES, 2), {}),
    "conv_tbc": ((numbers(5, 2, 4), numbers(3, 4, 6), LAST), {}),
    "cosine_embedding_loss": ((X, Y, ONE), {}),
    "cross_entropy": ((X, classes(4)), {}),
    "ctc_loss": (
        (numbers(5, 2, 4), classes(2, 2) + 1, np.array([5, 5]), np.array([2, 2])),
        {},
    ),
    "embedding": ((classes(3), X), {}),
    "embedding_bag": ((classes(3, 2), X), {}),
    "fold": ((numbers(2, 8, 4), (3, 3), 2), {}),
    "gaussian_nll_loss": ((X, Y, numbers(4, 6)), {}),
    "grid_sample": ((IMAGES, numbers(2, 3, 3, 2)), {"align_corners": False}),
    "group_norm": ((IMAGES, 2, ONE, NONE), {}),
    "instance_norm": ((IMAGES,), {}),
    "interpolate": ((IMAGES,), {"scale_factor": 2, "mode": "bilinear"}),
    "layer_norm": ((X,), {**NORM, "bias": LAST}),
    "linear": ((X, numbers(3, 6), numbers(3)), {}),
    "linear_cross_entropy": ((X, numbers(3, 6), classes(4)), {}),
    "local_response_norm": ((IMAGES, 2), {}),
    "margin_ranking_loss": ((X, Y, np.ones((4, 6), np.float32)), {}),
    "multi_head_attention_forward": (
        (TRIPLE, TRIPLE, TRIPLE, 8, 2, numbers(24, 8), numbers(24), None, None, False, 0.0)
        + (numbers(8, 8), numbers(8)),
        {"need_weights": False},
    ),
    "multi_margin_loss": ((X, classes(4)), {}),
    "multilabel_margin_loss": ((X, classes(4, 6)), {}),
    "native_channel_shuffle": ((IMAGES, 2), {}),
    "nll_loss": ((X, classes(4)), {}),
    "pad": ((IMAGES, (1, 1)), {}),
    "pixel_shuffle": ((IMAGES, 2), {}),
    "pixel_unshuffle": ((IMAGES, 2), {}),
    "prelu": ((X - 0.5, LAST), {}),
    "rms_norm": ((X,), NORM),
    "scaled_dot_product_attention": ((HEADS, HEADS + 0.1, HEADS - 0.1), {}),
    "threshold": ((X, 0.5, 0.0), {}),
    "triplet_margin_loss": ((X, Y, numbers(4, 6) / 2), {}),
    "triplet_margin_with_distance_loss": ((X, Y, numbers(4, 6) / 2), {}),
    "unfold": ((IMAGES, 2), {}),
    "upsample": ((IMAGES,), {"scale_factor": 2}),
    "upsample_bilinear": ((IMAGES,), {"scale_factor": 2}),
    "upsample_nearest": ((IMAGES,), {"scale_factor": 2}),
}
OF_ONE = """celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish normalize
    pdist relu relu6 rrelu selu sigmoid silu softplus softshrink softsign tanh tanhshrink dropout
    alpha_dropout feature_alpha_dropout"""
OF_TWO = """binary_cross_entropy binary_cross_entropy_with_logits cosine_similarity hinge_embedding_loss
    huber_loss kl_div l1_loss mse_loss multilabel_soft_margin_loss pairwise_distance poisson_nll_loss
    smooth_l1_loss soft_margin_loss"""
CASES |= {name: ((X,), {"training": False} if "drop" in name else {}) for name in OF_ONE.split()}
CASES |= {name: ((X, Y), {}) for name in OF_TWO.split()}
CASES |= {name: ((X,), {"dim": -1}) for name in ("softmax", "softmin", "log_softmax")}
for n in (1, 2, 3):
    x, kernel = numbers(2, 4, *(6,) * n), (3,) * n
    CASES[f"conv{n}d"] = (x, numbers(5, 4, *kernel), numbers(5)), {}
    CASES[f"conv_transpose{n}d"] = (x, numbers(4, 5, *kernel), numbers(5)), {}
    CASES[f"dropout{n}d"] = (x,), {"training": False}
    CASES[f"lp_pool{n}d"] = (x, 2, 2), {}
    for name in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool"):
        CASES[f"{name}{n}d"] = (x, 2), {}

# Of these torch has no kernel for tensors of CUDA that hold nothing, and CPU's answer stands for it.
WITHOUT_CUDA = {"batch_norm", "ctc_loss", "grid_sample", "unfold"}
# torch refuses it on CUDA, in any autocast: in float16 its logarithm overflows. In float32 nothing does.
REFUSED_ON_CUDA = {"binary_cross_entropy"}
# torch's answer for it depends on a kernel of CUDA too, for mixed arguments.
WITHOUT_CUDA |= {"multi_head_attention_forward"} | REFUSED_ON_CUDA
# No case of its own: random, of a family that has one, or without a floating result.
FAMILIES = ("max_unpool", "fractional_max_pool", "flatten", "unflatten", "one_hot", "grouped_mm")


def cast_some(args: Any, which: str) -> Any:
    """Return a function's arguments with the first floating array in bfloat16, all of them, or none."""
    met = False

    def one(a: Any) -> Any:
        nonlocal met
        low = isinstance(a, np.ndarray) and a.dtype == np.float32
        low = low and (which == "low" or (which == "first low" and not met))
        met = met or (isinstance(a, np.ndarray) and a.dtype == np.float32)
        return a.astype(jnp.bfloat16) if low else a

    args, kwargs = args
    return tuple(map(one, args)), {k: one(v) for k, v in kwargs.items()}


def tensor(a: Any, device: str) -> Any:
    if not isinstance(a, np.ndarray):
        return a
    if device == "cuda":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(a.dtype.name)
        return torch.empty(a.shape, dtype=dtype or torch.int64, device="cuda")
    if a.dtype == jnp.bfloat16:
        return torch.as_tensor(a.astype(np.float32)).bfloat16()
    return torch.as_tensor(a)


def gaussian_nll_loss(x: torch.Tensor, y: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    # torch's looks at the numbers of the variance, which tensors without data do not have.
    return 0.5 * (torch.log(var) + (x - y) ** 2 / var).mean()


@contextlib.contextmanager
def as_on(device: str) -> Iterator[None]:
    """Switch torch's autocast on; for CUDA with tensors that have no data, which need no GPU."""
    if device == "off":
        yield
        return
    if device == "cpu":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
        return
    with FakeTensorMode():
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


def theirs(name: str, which: str, device: str) -> torch.Tensor:
    args, kwargs = cast_some(CASES[name], which)
    with as_on(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = [tensor(a, device) for a in args]
        kwargs = {k: tensor(v, device) for k, v in kwargs.items()}
        formula = device == "cuda" and name == "gaussian_nll_loss"
        function = gaussian_nll_loss if formula else getattr(torch.nn.functional, name)
        out = function(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def ours(name: str, which: str) -> jax.Array:
    args, kwargs = cast_some(CASES[name], which)
    with nn.amp.autocast(jnp.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = getattr(F, name)(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("which", ["float32", "low", "first low"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_result_has_the_dtype_of_torch_on_cuda(name, which):
    if name in ("embedding", "embedding_bag", "batch_norm", "affine_grid") and which != "float32":
        which = "low"  # of their floating arrays one is the table, and the statistics are float32
    device = "cpu" if name in WITHOUT_CUDA else "cuda"
    if (name, which) == ("grid_sample", "low"):
        expected = (
            "bfloat16"  # the widest of its arguments; CPU has no such kernel, and takes float32
        )
    else:
        expected = str(theirs(name, which, device).dtype).removeprefix("torch.")
    assert str(ours(name, which).dtype) == expected


@pytest.mark.parametrize("which", ["float32", "low"])
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"pdist", "affine_grid"}))
def test_the_result_has_the_numbers_of_torch(name, which):
    # On CPU torch makes a low product of `bilinear`, which on CUDA promotes its arguments.
    expected = theirs(name, which, "off" if name == "bilinear" else "cpu")
    found = ours(name, which)
    size = float(expected.float().abs().max())
    # Products of bfloat16 numbers are summed in float32 and rounded once, in both; attention rounds queries,
    # weights and values as well. What stays in float32 differs by float32's rounding alone.
    low = which == "low" or name in lists.LOW or name == "linear_cross_entropy"
    tolerance = (8 if "attention" in name else 2) * EPS if low else 1e-5
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected.double().numpy(), rtol=0, atol=tolerance * size
    )


def test_every_function_is_in_exactly_one_list():
    each = [lists.LOW, lists.FLOAT32, lists.PROMOTE, lists.AS_GIVEN]
    for name in F.__all__:
        assert sum(name in names for names in each) == 1, name
    assert frozenset().union(*each) == set(F.__all__)


def test_every_function_with_a_rule_is_held_against_torch():
    untested = (lists.LOW | lists.FLOAT32 | lists.PROMOTE) - CASES.keys()
    assert untested == {"gumbel_softmax"}  # random: below
    with nn.amp.autocast():
        drawn = F.gumbel_softmax(jnp.ones((2, 3), jnp.bfloat16), rng=jax.random.key(0))
    assert drawn.dtype == jnp.float32
    with as_on("cuda"):
        drawn = torch.nn.functional.gumbel_softmax(torch.empty(2, 3, device="cuda").bfloat16())
    assert drawn.dtype == torch.float32


def test_the_rest_takes_what_it_is_given():
    of_others = {name.removesuffix("_").removesuffix("_with_indices") for name in lists.AS_GIVEN}
    of_others = {name.removesuffix("_with_stats") for name in of_others}
    assert all(name in CASES or name.startswith(FAMILIES) for name in of_others)


@pytest.mark.parametrize(
    ("name", "function", "gates", "states"),
    [("RNNCell", "rnn_tanh_cell", 1, 1), ("LSTMCell", "lstm_cell", 4, 2)],
    ids=["RNNCell", "LSTMCell"],
)
def test_the_states_of_a_cell_have_the_dtype_of_torch_on_cuda(name, function, gates, states):
    with as_on("cuda"), torch.no_grad():
        given = [torch.empty(s, device="cuda") for s in ((2, 3), (gates * 4, 3), (gates * 4, 4))]
        bias = [torch.empty(gates * 4, device="cuda")] * 2
        h = torch.empty(2, 4, device="cuda")
        state = h if states == 1 else (h, h)
        expected = getattr(torch, function)(given[0], state, *given[1:], *bias)
    with nn.amp.autocast():
        found = getattr(nn, name)(3, 4)(numbers(2, 3))
    expected = [expected] if states == 1 else expected
    assert [f"torch.{a.dtype}" for a in jax.tree.leaves(found)] == [str(t.dtype) for t in expected]
