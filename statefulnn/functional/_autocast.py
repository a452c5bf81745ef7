"""Which functions run in low precision under `nn.amp.autocast`, and which stay in float32.

The lists are torch's for CUDA. A function without a rule takes what it is given. What a model calls often,
and what layers call directly, has its rule where it is defined, inside of what is compiled for each shape: a
cast is then traced once and not at every call. Any other public function gets it where
`functional/__init__.py` is imported.

The dtype in force is a context of JAX's own: `jax.jit` compiles for each value of it.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from statefulnn.core.parameter import ArrayBox

_F = TypeVar("_F", bound=Callable)

# The dtype that functions of the first list run in; None where autocast is off.
dtype_in_force = jax.make_user_context(default_value=None)

# What is open in any thread: while nothing is, a call need not ask for the dtype.
open_blocks: set[object] = set()


class Rule(enum.Enum):
    """What becomes of a function's floating arrays: float64 is always left as it is."""

    LOW = "cast to the dtype in force"
    FLOAT32 = "cast to float32"
    PROMOTE = "cast to the widest among them"


LOW = frozenset(
    """conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d linear
    multi_head_attention_forward prelu scaled_dot_product_attention""".split()
)

FLOAT32 = frozenset(
    """binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cosine_similarity
    cross_entropy ctc_loss gaussian_nll_loss group_norm gumbel_softmax hinge_embedding_loss huber_loss
    interpolate kl_div l1_loss layer_norm local_response_norm log_softmax lp_pool1d lp_pool2d lp_pool3d
    margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss
    nll_loss normalize pairwise_distance pdist poisson_nll_loss rms_norm smooth_l1_loss soft_margin_loss
    softmax softmin softplus triplet_margin_loss triplet_margin_with_distance_loss upsample
    upsample_bilinear upsample_nearest""".split()
)

PROMOTE = frozenset("bilinear grid_sample".split())

# `linear_cross_entropy` has a rule for each of its two halves: see there.
AS_GIVEN = frozenset(
    """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool1d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices
    adaptive_max_pool3d adaptive_max_pool3d_with_indices affine_grid alpha_dropout avg_pool1d avg_pool2d
    avg_pool3d batch_norm batch_norm_with_stats celu celu_ channel_shuffle dropout dropout1d dropout2d
    dropout3d elu elu_ embedding embedding_bag feature_alpha_dropout flatten fold fractional_max_pool2d
    fractional_max_pool2d_with_indices fractional_max_pool3d fractional_max_pool3d_with_indices gelu glu
    grouped_mm hardshrink hardsigmoid hardswish hardtanh hardtanh_ instance_norm instance_norm_with_stats
    leaky_relu leaky_relu_ linear_cross_entropy logsigmoid max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool1d max_unpool2d max_unpool3d mish
    native_channel_shuffle one_hot pad pixel_shuffle pixel_unshuffle relu relu6 relu_ rrelu rrelu_ selu
    selu_ sigmoid silu softshrink softsign tanh tanhshrink threshold threshold_ unflatten unfold""".split()
)

_WHERE_DEFINED = frozenset(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d group_norm layer_norm linear
    multi_head_attention_forward prelu rms_norm scaled_dot_product_attention""".split()
)

# Arguments that are numbers even where they are given as arrays: the share that dropout drops.
_KEPT = frozenset({"p"})


def _casts(value: object) -> bool:
    if not isinstance(value, (ArrayBox, jax.Array, np.ndarray)):
        return False
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return False
    return jax.dtypes.canonicalize_dtype(value.dtype) != np.float64


def _arrays(value: object) -> list[Any]:
    """Return the arrays in an argument that are cast, those of boxes and of numpy among them."""
    if isinstance(value, (tuple, list, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return [x for part in parts for x in _arrays(part)]
    return [value] if _casts(value) else []


def _cast(value: object, dtype: np.dtype, done: dict[int, Any]) -> Any:
    """Cast the arrays in an argument; what is one array in several of them stays one."""
    if isinstance(value, (tuple, list)):
        parts = (_cast(part, dtype, done) for part in value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: _cast(part, dtype, done) for name, part in value.items()}
    if not _casts(value):
        return value
    if id(value) not in done:
        x = value.__jax_array__() if isinstance(value, ArrayBox) else jnp.asarray(value)
        done[id(value)] = x if x.dtype == dtype else x.astype(dtype)
    return done[id(value)]


def _dtype_of(rule: Rule, low: np.dtype, arguments: Sequence[object]) -> np.dtype:
    if rule is Rule.PROMOTE:
        dtypes = {np.dtype(x.dtype) for x in _arrays(arguments)}
        if len(dtypes) == 1:
            return dtypes.pop()
    return low if rule is Rule.LOW else np.dtype(np.float32)


def ruled(rule: Rule) -> Callable[[_F], _F]:
    """Return a decorator: the function's arrays are cast by a rule, where autocast is on."""

    def decorate(fun: _F) -> _F:
        code = fun.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]

        def cast(*args: Any, **kwargs: Any) -> Any:
            low = dtype_in_force.value
            if low is None:
                return fun(*args, **kwargs)
            # Off inside: what the function is made of has been cast, and its compiled parts are the same ones
            # that run without autocast.
            with dtype_in_force(None):
                dtype = _dtype_of(rule, low, [*args, *kwargs.values()])
                done: dict[int, Any] = {}
                args = tuple(
                    a if name in _KEPT else _cast(a, dtype, done)
                    for name, a in zip(names, args, strict=False)
                )
                return fun(*args, **{k: _cast(v, dtype, done) for k, v in kwargs.items()})

        return _choosing(fun, cast)

    return decorate


def _choosing(fun: Any, cast: Callable) -> Any:
    """Return a function of the same arguments that calls `fun`, or `cast` while a block is open.

    It is made of text, as those of dataclasses are: with ``*args`` every call of every layer would take 4%
    longer, and so it takes 1%.
    """
    code = fun.__code__
    positional, keywords = (
        code.co_varnames[: code.co_argcount],
        code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount],
    )
    parameters = ", ".join([*positional, *(["*", *keywords] if keywords else [])])
    arguments = ", ".join([*positional, *(f"{name}={name}" for name in keywords)])
    source = f"lambda {parameters}: (_cast_ if _open_ else _plain_)({arguments})"
    names = {"_cast_": cast, "_plain_": fun, "_open_": open_blocks, "__name__": __name__}
    wrapper = eval(compile(source, __file__, "eval"), names)
    wrapper.__defaults__, wrapper.__kwdefaults__ = fun.__defaults__, fun.__kwdefaults__
    return functools.update_wrapper(wrapper, fun)


def product_of_loss(*arrays: Any) -> tuple[tuple[Any, ...], np.dtype | None]:
    """Cast what a product is made of whose result goes into a loss, for functions that do both.

    Returns:
        the arrays, and the dtype of the loss: None where autocast does not change it.
    """
    low = dtype_in_force.value
    if low is None or not all(x is None or _casts(x) for x in arrays):
        return arrays, None
    return tuple(None if x is None else x.astype(low) for x in arrays), np.dtype(np.float32)


def apply_rules(namespace: dict[str, Any], package: str) -> None:
    """Put the functions of a package's namespace under the rules of the lists."""
    for rule, names in ((Rule.LOW, LOW), (Rule.FLOAT32, FLOAT32), (Rule.PROMOTE, PROMOTE)):
        for name in sorted(names - _WHERE_DEFINED):
            function = ruled(rule)(namespace[name])
            function.__module__ = package  # where pickle finds it
            namespace[name] = function
