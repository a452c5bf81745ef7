"""Every layer against torch: outputs, buffers after the call, gradients; training and evaluation, eager
and compiled, in float32, float64 and bfloat16. To cover another option, add a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.parity.oracle import Case, array, compare, integers, pair, sixty_four_bits

X = array(4, 6)
IMAGE = array(2, 4, 7, 8)
ONE = array(4, 7, 8)  # an image without a batch axis
SERIES = array(2, 4, 9)
LOGITS = array(5, 3)
CLASSES = integers(3, 5)
PIXELS = array(2, 3, 4, 2)
LABELS = integers(3, 2, 4, 2)
PROBABILITIES = np.exp(array(5, 3, seed=1)) / np.exp(array(5, 3, seed=1)).sum(1, keepdims=True)
WEIGHT = np.array([0.5, 2.0, 1.5], np.float32)
SOME_IGNORED = np.array([0, -100, 2, -100, 1])

LINEAR = [
    Case("Identity", (3,), {}, (X,)),
    Case("Linear", (6, 3), {}, (X,)),
    Case("Linear", (6, 3), {"bias": False}, (X,)),
    Case("Linear", (6, 3), {}, (array(6),), note="one example"),
    Case("Linear", (6, 3), {}, (array(2, 5, 6),), note="two batch axes"),
    Case("Linear", (6, 3), {}, (array(0, 6),), note="no examples"),
    Case("Linear", (0, 3), {}, (array(4, 0),), note="no features"),
    Case("Bilinear", (6, 5, 3), {}, (X, array(4, 5))),
    Case("Bilinear", (6, 5, 3), {"bias": False}, (array(6), array(5)), note="one example"),
    Case("Bilinear", (6, 5, 3), {}, (array(2, 3, 6), array(2, 3, 5)), note="two batch axes"),
    Case("Bilinear", (6, 5, 3), {}, (array(0, 6), array(0, 5)), note="no examples"),
    Case("Flatten", (), {}, (IMAGE,)),
    Case("Flatten", (0, 1), {}, (IMAGE,)),
    Case("Flatten", (2, -2), {}, (IMAGE,)),
]

EMBEDDING = [
    Case("Embedding", (7, 3), {}, (integers(7, 4, 2),)),
    Case("Embedding", (7, 3), {}, (integers(7),), note="one index"),
    Case("Embedding", (7, 3), {}, (integers(7, 0),), note="no indices"),
    Case("Embedding", (7, 3), {"padding_idx": 2}, (integers(7, 9),)),
    Case("Embedding", (7, 3), {"padding_idx": -1}, (integers(7, 9),)),
    Case("Embedding", (7, 3), {"scale_grad_by_freq": True}, (integers(7, 20),)),
    Case("Embedding", (7, 3), {"max_norm": 1.0}, (integers(7, 5),)),
    Case("Embedding", (7, 3), {"max_norm": 0.7, "norm_type": 1.0}, (integers(7, 5),)),
]

CONV = [
    Case("Conv1d", (4, 6, 3), {}, (SERIES,)),
    Case("Conv1d", (4, 6, 3), {}, (array(4, 9),), note="one example"),
    Case("Conv1d", (4, 6, 4), {"padding": "same"}, (SERIES,)),
    Case("Conv1d", (4, 6, 4), {"padding": "valid", "stride": 2}, (SERIES,)),
    Case("Conv1d", (4, 6, 3), {"padding": 2, "dilation": 2, "groups": 2}, (SERIES,)),
    Case("Conv1d", (4, 8, 3), {"padding": 1, "stride": 2, "groups": 4}, (SERIES,)),
    Case("Conv1d", (4, 6, 3), {"padding": 2, "padding_mode": "reflect"}, (SERIES,)),
    Case("Conv1d", (4, 6, 3), {"padding": "same", "padding_mode": "circular"}, (SERIES,)),
    Case("Conv1d", (4, 6, 1), {}, (SERIES,)),
    Case("Conv2d", (4, 6, 3), {}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {}, (ONE,), note="one example"),
    Case("Conv2d", (4, 6, 3), {}, (array(0, 4, 7, 8),), note="no examples"),
    Case("Conv2d", (4, 6, (3, 2)), {"bias": False, "stride": (2, 1), "padding": (0, 1)}, (IMAGE,)),
    Case("Conv2d", (4, 6, (4, 3)), {"padding": "same", "dilation": (1, 2)}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"padding": "valid"}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"groups": 2, "padding": 1}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"groups": 2, "stride": 2, "dilation": 2}, (IMAGE,)),
    Case("Conv2d", (4, 4, 3), {"groups": 4, "padding": 1}, (IMAGE,)),
    Case("Conv2d", (4, 12, (3, 5)), {"groups": 4, "stride": (1, 2), "padding": 2}, (IMAGE,)),
    Case("Conv2d", (4, 4, 3), {"groups": 4, "dilation": 2, "padding": (2, 1)}, (IMAGE,)),
    Case("Conv2d", (4, 4, 3), {"groups": 4}, (array(0, 4, 7, 8),), note="no examples"),
    Case("Conv2d", (4, 4, 3), {"groups": 4, "padding": "same"}, (ONE,), note="one example"),
    Case("Conv2d", (4, 6, 1), {}, (IMAGE,)),
    Case("Conv2d", (4, 6, 1), {"stride": 2, "padding": 1}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"padding": (1, 2), "padding_mode": "reflect"}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"padding": (1, 2), "padding_mode": "replicate"}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"padding": (1, 2), "padding_mode": "circular"}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"padding": "same", "padding_mode": "replicate"}, (IMAGE,)),
    Case("Conv2d", (1, 2, 3), {}, (array(2, 1, 5, 5),), note="one channel"),
]

TIES = np.zeros((1, 2, 6, 6), np.float32)

POOLING = [
    Case("MaxPool2d", (2,), {}, (IMAGE,)),
    Case("MaxPool2d", (2,), {}, (ONE,), note="one example"),
    Case("MaxPool2d", (2,), {}, (array(0, 4, 7, 8),), note="no examples"),
    Case("MaxPool2d", (2,), {}, (TIES,), note="ties"),
    Case("MaxPool2d", (3, 2, 1), {}, (TIES,), note="ties"),
    Case("MaxPool2d", (3,), {"stride": 2, "padding": 1}, (IMAGE,)),
    Case("MaxPool2d", ((3, 2),), {"stride": (1, 2), "padding": (1, 0)}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"dilation": 2, "stride": 1}, (IMAGE,)),
    Case("MaxPool2d", (3,), {"dilation": (1, 2), "padding": 1}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"ceil_mode": True}, (IMAGE,)),
    Case("MaxPool2d", (3,), {"stride": 3, "padding": 1, "ceil_mode": True}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"stride": 4, "padding": 1, "ceil_mode": True}, (IMAGE,)),
    Case("MaxPool2d", (2,), {"return_indices": True}, (IMAGE,)),
    Case("MaxPool2d", (3, 2, 1), {"return_indices": True}, (IMAGE,)),
    Case("MaxPool2d", (3, 2, 1), {"return_indices": True}, (TIES,), note="ties"),
    Case(
        "MaxPool2d",
        (3, 2, 1),
        {"return_indices": True},
        (np.full((1, 1, 5, 5), -np.inf, np.float32),),
        note="all -inf",
    ),
    Case("MaxPool2d", (9, 3, 4), {}, (array(2, 3, 12, 11),), note="large window"),
    Case("MaxPool2d", (9, 3, 4), {"return_indices": True}, (array(2, 3, 12, 11),), note="large"),
    Case("MaxPool2d", (9, 3, 4), {}, (np.zeros((1, 1, 12, 12), np.float32),), note="large, ties"),
    Case("AvgPool2d", (2,), {}, (IMAGE,)),
    Case("AvgPool2d", (2,), {}, (ONE,), note="one example"),
    Case("AvgPool2d", ((3, 2),), {"stride": (2, 1), "padding": 1}, (IMAGE,)),
    Case("AvgPool2d", (3, 2, 1), {"count_include_pad": False}, (IMAGE,)),
    Case("AvgPool2d", (3, 2, 1), {"ceil_mode": True}, (IMAGE,)),
    Case("AvgPool2d", (3, 2, 1), {"ceil_mode": True, "count_include_pad": False}, (IMAGE,)),
    Case("AvgPool2d", (2, 3, 1), {"ceil_mode": True, "divisor_override": 3}, (IMAGE,)),
    Case("AvgPool2d", (9, 2, 4), {}, (array(2, 3, 12, 11),), note="large window"),
    Case("AdaptiveAvgPool2d", (1,), {}, (IMAGE,)),
    Case("AdaptiveAvgPool2d", ((7, 4),), {}, (IMAGE,)),
    Case("AdaptiveAvgPool2d", ((3, 5),), {}, (IMAGE,)),
    Case("AdaptiveAvgPool2d", ((10, 11),), {}, (IMAGE,), note="larger than the input"),
    Case("AdaptiveAvgPool2d", ((None, 3),), {}, (ONE,), note="one example"),
    Case("AdaptiveAvgPool2d", (2,), {}, (array(0, 4, 7, 8),), note="no examples"),
]

NORMALIZATION = [
    Case("BatchNorm1d", (6,), {}, (X,)),
    Case("BatchNorm1d", (4,), {}, (SERIES,)),
    Case("BatchNorm1d", (6,), {"affine": False}, (X,)),
    Case("BatchNorm1d", (6,), {"bias": False}, (X,)),
    Case("BatchNorm1d", (6,), {"momentum": None}, (X,)),
    Case("BatchNorm1d", (6,), {"momentum": 0.0}, (X,)),
    Case("BatchNorm1d", (6,), {"momentum": 0.7, "eps": 0.1}, (X,)),
    Case("BatchNorm1d", (6,), {"track_running_stats": False}, (X,)),
    Case("BatchNorm1d", (6,), {}, (array(0, 6),), note="no examples"),
    Case("BatchNorm2d", (4,), {}, (IMAGE,)),
    Case("BatchNorm2d", (4,), {"affine": False, "track_running_stats": False}, (IMAGE,)),
    Case("BatchNorm2d", (4,), {}, (IMAGE * 3 + 50,), note="far from zero", tolerance=30),
    Case("LayerNorm", (6,), {}, (X,)),
    Case("LayerNorm", ((7, 8),), {"eps": 0.1}, (IMAGE,)),
    Case("LayerNorm", (6,), {"bias": False}, (X,)),
    Case("LayerNorm", (6,), {"elementwise_affine": False}, (X,)),
    Case("LayerNorm", (6,), {}, (array(0, 6),), note="no examples"),
    Case("RMSNorm", (6,), {}, (X,)),
    Case("RMSNorm", (6,), {}, (X * 1e-4,), note="small", tolerance=10),
    Case("RMSNorm", ((7, 8),), {"eps": 0.1}, (IMAGE,)),
    Case("RMSNorm", (6,), {"elementwise_affine": False}, (X,)),
]

SPECIAL = np.array([-30.0, -3.0, -0.5, -0.0, 0.0, 0.5, 3.0, 30.0], np.float32)

ACTIVATION = [
    Case("ReLU", (), {}, (SPECIAL,)),
    Case("ReLU", (), {"inplace": True}, (X,)),
    Case("GELU", (), {}, (SPECIAL,)),
    Case("GELU", (), {"approximate": "tanh"}, (SPECIAL,)),
    Case("SiLU", (), {}, (SPECIAL,)),
    Case("Tanh", (), {}, (SPECIAL,)),
    Case("Sigmoid", (), {}, (SPECIAL,)),
    Case("Softmax", (), {"dim": 1}, (X,)),
    Case("Softmax", (), {"dim": -3}, (IMAGE,)),
    Case("Softmax", (), {"dim": 0}, (SPECIAL * 10,)),
    Case("Softmax", (), {"dim": 0}, (array(),), note="a scalar"),
    Case("Softmax", (), {"dim": 1}, (array(3, 0),), note="no classes"),
    Case("Softmax", (), {"dim": 0}, (np.array([-np.inf, -np.inf], np.float32),), note="all -inf"),
    Case("Dropout", (0.0,), {}, (X,)),
    Case("Dropout", (1.0,), {}, (X,)),
]

LOSS = [
    Case("MSELoss", (), {}, (X, array(4, 6, seed=1))),
    Case("MSELoss", (), {"reduction": "sum"}, (X, array(4, 6, seed=1))),
    Case("MSELoss", (), {"reduction": "none"}, (X, array(4, 6, seed=1))),
    *[
        Case("CrossEntropyLoss", (), {**options, "reduction": reduction}, inputs, note=note)
        for reduction in ("mean", "sum", "none")
        for options in ({}, {"weight": WEIGHT}, {"label_smoothing": 0.2, "weight": WEIGHT})
        for inputs, note in (
            ((LOGITS, CLASSES), "classes"),
            ((LOGITS, PROBABILITIES.astype("float32")), "probabilities"),
            ((PIXELS, LABELS), "pixels"),
        )
    ],
    Case("CrossEntropyLoss", (), {"label_smoothing": 0.3}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {}, (LOGITS, SOME_IGNORED), note="some ignored"),
    Case(
        "CrossEntropyLoss",
        (),
        {"weight": WEIGHT, "label_smoothing": 0.1},
        (LOGITS, SOME_IGNORED),
        note="some ignored",
    ),
    Case("CrossEntropyLoss", (), {"ignore_index": 1}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {"ignore_index": 1, "reduction": "none"}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {}, (array(3), np.array(2)), note="one example"),
    Case("CrossEntropyLoss", (), {}, (array(3), np.ones(3, np.float32) / 3), note="one, soft"),
    Case("CrossEntropyLoss", (), {}, (LOGITS * 1000, CLASSES), note="large logits"),
    Case("CrossEntropyLoss", (), {"reduction": "sum"}, (array(0, 3), integers(3, 0)), note="empty"),
    Case("CrossEntropyLoss", (), {"size_average": False}, (LOGITS, CLASSES)),
    Case("CrossEntropyLoss", (), {"reduce": False}, (LOGITS, CLASSES)),
]

QUERY, KEY, VALUE = array(5, 3, 8), array(6, 3, 8, seed=1), array(6, 3, 8, seed=2)
BATCH_FIRST = tuple(np.ascontiguousarray(x.swapaxes(0, 1)) for x in (QUERY, KEY, VALUE))
UNBATCHED = (QUERY[:, 0], KEY[:, 0], VALUE[:, 0])
SELF = (QUERY, QUERY, QUERY)
CAUSAL = np.triu(np.ones((5, 5), bool), 1)
BOOL_MASK = np.random.default_rng(0).random((5, 6)) < 0.3
BOOL_MASK[:, 0] = False
PER_HEAD = np.random.default_rng(1).random((6, 5, 6)) < 0.3
PER_HEAD[:, :, 0] = False
FLOAT_MASK = array(5, 6, seed=3)
PADDING = np.zeros((3, 6), bool)
PADDING[0, 4:] = PADDING[2, 1] = True
FLOAT_PADDING = np.where(PADDING, -np.inf, 0).astype(np.float32)


def attention(inputs: tuple = (QUERY, KEY, VALUE), note: str = "", **kwargs: object) -> Case:
    """Make a case from options of the constructor and of the call."""
    names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    call = {k: kwargs.pop(k) for k in names if k in kwargs}
    shown = ", ".join(f"{k}={'array' if isinstance(v, np.ndarray) else v}" for k, v in call.items())
    return Case("MultiheadAttention", (8, 2), kwargs, inputs, call, f"{note} {shown}".strip())


ATTENTION = [
    attention(),
    attention(need_weights=False),
    attention(average_attn_weights=False),
    attention(SELF, "self"),
    attention(BATCH_FIRST, batch_first=True),
    attention(BATCH_FIRST, batch_first=True, average_attn_weights=False),
    attention(UNBATCHED, "one example"),
    attention(UNBATCHED, "one example", batch_first=True, key_padding_mask=PADDING[0]),
    attention(UNBATCHED, "one example", average_attn_weights=False, attn_mask=BOOL_MASK),
    attention(bias=False),
    attention(add_bias_kv=True),
    attention(add_zero_attn=True),
    attention(add_bias_kv=True, add_zero_attn=True, attn_mask=BOOL_MASK, key_padding_mask=PADDING),
    attention(add_bias_kv=True, attn_mask=FLOAT_MASK, need_weights=False),
    attention((QUERY, array(6, 3, 5), array(6, 3, 7)), kdim=5, vdim=7),
    attention((QUERY, array(6, 3, 5), VALUE), kdim=5, bias=False, need_weights=False),
    attention(attn_mask=BOOL_MASK),
    attention(attn_mask=BOOL_MASK, need_weights=False),
    attention(attn_mask=FLOAT_MASK),
    attention(attn_mask=FLOAT_MASK, need_weights=False),
    attention(attn_mask=PER_HEAD),
    attention(attn_mask=PER_HEAD, need_weights=False, key_padding_mask=PADDING),
    attention(key_padding_mask=PADDING),
    attention(key_padding_mask=PADDING, need_weights=False),
    attention(key_padding_mask=FLOAT_PADDING, attn_mask=FLOAT_MASK),
    attention(SELF, "self", attn_mask=CAUSAL, is_causal=True),
    attention(SELF, "self", attn_mask=CAUSAL, is_causal=True, need_weights=False),
    attention(key_padding_mask=np.ones((3, 6), bool), note="all masked"),
]

CASES = [
    *LINEAR,
    *EMBEDDING,
    *CONV,
    *POOLING,
    *NORMALIZATION,
    *ACTIVATION,
    *LOSS,
    *ATTENTION,
]
# torch's code for evaluation without gradients is another one; its gradient path is the reference.
HAS_MODES = ("BatchNorm1d", "BatchNorm2d", "Dropout")


def _one_of_each() -> list[Case]:
    seen: dict[str, Case] = {}
    for case in CASES:
        if all(0 not in x.shape for x in case.inputs):
            seen.setdefault(case.layer, case)
    return list(seen.values())


ONE_OF_EACH = _one_of_each()


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_computes_what_torch_does(case: Case, jitted: bool) -> None:
    # Without nn.jit a gradient runs the same kernels, each compiled by itself: once a layer is enough.
    gradients = jitted or case in ONE_OF_EACH
    for training in (True, False) if case.layer in HAS_MODES else (True,):
        compare(case, training, jitted, gradients=gradients)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_layer_computes_what_torch_does_in_float64(case: Case) -> None:
    with sixty_four_bits():
        compare(case, True, False, "float64")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_layer_computes_what_torch_does_in_low_precision(case: Case, dtype: str) -> None:
    compare(case, True, False, dtype)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_layer_reads_like_torchs(case: Case) -> None:
    theirs, ours = pair(case)
    # torch names a private subclass of Linear inside attention.
    assert repr(ours) == repr(theirs).replace("NonDynamicallyQuantizableLinear", "Linear")


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
def test_batch_norm_statistics_agree_over_several_batches(momentum: float | None) -> None:
    case = Case("BatchNorm2d", (4,), {"momentum": momentum})
    theirs, ours = pair(case)
    step = nn.jit(lambda model, x: model(x))
    for seed in range(4):
        x = array(3, 4, 5, 5, seed=seed)
        theirs(torch.as_tensor(x))
        step(ours, jnp.asarray(x))
    for name, value in theirs.named_buffers():
        np.testing.assert_allclose(ours.get_buffer(name), value.numpy(), rtol=1e-5, atol=1e-7)
    assert int(ours.num_batches_tracked) == 4


def test_batch_norm_state_without_a_version_counts_from_zero() -> None:
    old = {k: np.ones(3, np.float32) for k in ("weight", "bias", "running_mean", "running_var")}
    theirs, ours = torch.nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    theirs.load_state_dict({k: torch.as_tensor(v) for k, v in old.items()})
    ours.load_state_dict(old)
    assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked) == 0


def test_batch_norm_state_carries_its_version() -> None:
    assert nn.BatchNorm1d(3).state_dict()._metadata[""]["version"] == 2


def test_max_norm_shrinks_rows_in_the_table_as_torch_does() -> None:
    theirs, ours = pair(Case("Embedding", (7, 3), {"max_norm": 0.5}))
    index = integers(7, 3)
    theirs(torch.as_tensor(index))
    ours(jnp.asarray(index, jnp.int32))
    np.testing.assert_allclose(ours.weight.value, theirs.weight.detach().numpy(), rtol=1e-5)


SMOOTH = [
    Case("Linear", (6, 3), {}, (X,)),
    Case("Bilinear", (6, 5, 3), {}, (X, array(4, 5))),
    Case("Conv2d", (4, 4, 3), {"groups": 4, "padding": 1}, (IMAGE,)),
    Case("Conv2d", (4, 6, 3), {"groups": 2}, (IMAGE,)),
    Case("Conv2d", (4, 6, 1), {}, (IMAGE,)),
    Case("MaxPool2d", (3, 2, 1), {}, (IMAGE,)),
    Case("MaxPool2d", (9, 3, 4), {}, (array(2, 3, 12, 11),), note="large window"),
    Case("AvgPool2d", (3, 2, 1), {}, (IMAGE,)),
    Case("AvgPool2d", (9, 2, 4), {}, (array(2, 3, 12, 11),), note="large window"),
    Case("AdaptiveAvgPool2d", ((3, 5),), {}, (IMAGE,)),
    Case("BatchNorm1d", (6,), {}, (X,)),
    Case("LayerNorm", (6,), {}, (X,)),
    Case("RMSNorm", (6,), {}, (X,)),
    Case("GELU", (), {}, (X,)),
    Case("SiLU", (), {}, (X,)),
    Case("ReLU", (), {}, (X,)),
    Case("Tanh", (), {}, (X,)),
    Case("Sigmoid", (), {}, (X,)),
    Case("Softmax", (), {"dim": 1}, (X,)),
    Case("MSELoss", (), {}, (X, array(4, 6, seed=1))),
    Case("CrossEntropyLoss", (), {"label_smoothing": 0.1}, (LOGITS, CLASSES)),
    attention(SELF, "self"),
]


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_second_derivatives_agree_with_torch(case: Case) -> None:
    theirs, ours = pair(case)
    inputs = [torch.as_tensor(x.copy()) for x in case.inputs]
    x = inputs[0].requires_grad_(True)
    direction = array(*x.shape, seed=9)

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    # A Hessian-vector product of the sum of cubes, so that linear layers count as well.
    loss = (first(theirs(*[x, *inputs[1:]])) ** 3).sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (wanted,) = torch.autograd.grad((slope * torch.as_tensor(direction)).sum(), x)

    rest = [jnp.asarray(v, jax.dtypes.canonicalize_dtype(v.dtype)) for v in case.inputs[1:]]
    fn, params, state = nn.functionalize(ours, mutable=True)
    loss_of = lambda x: (first(fn(params, state, x, *rest)[0]) ** 3).sum()
    x0 = jnp.asarray(case.inputs[0])
    _, got = jax.jvp(jax.grad(loss_of), (x0,), (jnp.asarray(direction),))
    scale = max(1.0, float(wanted.abs().max()))
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4 * scale)


@pytest.mark.parametrize(
    "case", [c for c in SMOOTH if c.layer not in ("BatchNorm1d", "CrossEntropyLoss")], ids=str
)
def test_vmap_over_examples_is_a_loop_over_examples(case: Case) -> None:
    _, ours = pair(case)
    fn, params, state = nn.functionalize(ours, mutable=True)
    inputs = [jnp.stack([jnp.asarray(x), jnp.asarray(x) * 0.5]) for x in case.inputs]
    call = lambda *x: fn(params, state, *x)[0]
    together = jax.vmap(call)(*inputs)
    for i in range(2):
        alone = call(*[x[i] for x in inputs])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, atol=2e-5)
