"""Converted modules exported with sizes that have names: files beside torch, and every operator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch import nn as tnn

import statefulnn as nn
from statefulnn.bridge.torch import from_torch
from statefulnn.bridge.torch.operators import OPERATORS, find
from tests.bridge.test_torch_operators import CASES, array

torch.manual_seed(0)


class Of(tnn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def creation(x):
    n, m = x.shape
    out = [torch.arange(m), torch.arange(1, m + 1, dtype=torch.float32), torch.arange(0, 2 * m, 2)]
    out += [torch.arange(m - 1, -1, -1), torch.zeros(n, m), torch.ones(m, 2), torch.full((n,), m)]
    out += [torch.full((2,), 1.5), torch.eye(m), x.new_zeros(m), x.new_full((n, 2), 3.0)]
    out += [torch.zeros_like(x), torch.scalar_tensor(m), torch.tensor(n), torch.diag_embed(x)]
    return out + [torch.tril(torch.ones(m, m, dtype=torch.bool)), torch.empty(m).fill_(3)]


def views(x):
    n, m = x.shape
    out = [x[:, 1:], x[:, :-1], x[:, ::2], x[:, -2:], x[:, -1], x[:, m - 1], x.reshape(-1)]
    out += [x.view(n, 1, m), x.expand(3, n, m), x.unflatten(1, (m, 1)), x.flip(1), x.roll(1, 1)]
    out += [x.repeat(1, 2), x.repeat_interleave(2, 1), x.tile(2, 1), x.unfold(1, 2, 1)]
    out += [*torch.cat([x, x], 1).chunk(2, 1), *torch.cat([x, x], 1).split(m, 1)]
    out += [x.narrow(1, 1, m - 1), torch.as_strided(x, (n,), (m,)), (x @ x.t()).diagonal()]
    out += [
        *torch.stack([x, x], 1).unbind(1),
        x.movedim(0, 1),
        TF.pad(x, (1, 2)),
        TF.pad(x, (0, m)),
    ]
    return out + list(torch.meshgrid(torch.arange(n), torch.arange(m), indexing="ij"))


def places(x):
    n, m = x.shape
    zero, one = torch.zeros_like(x, dtype=torch.long), torch.ones_like(x, dtype=torch.long)
    out = [x[:, torch.arange(m) - 1], x[torch.arange(n)[:, None], torch.arange(m)[None]]]
    out += [x.gather(1, zero), x.scatter(1, zero, 1.0), x.scatter_add(1, one, x)]
    out += [x.index_select(1, torch.tensor([1, 0])), TF.embedding(torch.arange(m), torch.eye(9))]
    out += [TF.one_hot(torch.arange(n) % 3, 4), torch.bucketize(x, torch.tensor([0.0, 1.0]))]
    out += [torch.searchsorted(x.sort(1).values, x), x.index_fill(1, torch.tensor([0]), 2.0)]
    return out + [x.masked_fill(x > 0, 0.0), torch.where(x > 0, x, 0)]


def reductions(x):
    n, m = x.shape
    out = [
        x.sum(),
        x.mean(1),
        x.var(1),
        x.std(0, unbiased=False),
        x.amax(1),
        *x.max(1),
        x.argmin(1),
    ]
    out += [x.cumsum(1), *x.cummax(1), *x.sort(1), *x.topk(2, 1), *x.topk(2, 1, largest=False)]
    out += [*x.median(1), x.logsumexp(1), x.softmax(1), x.norm(), x.prod(1), x.any(1), x.diff()]
    out += [x.count_nonzero(), x.logcumsumexp(1), *torch.var_mean(x, 1), x.numel(), m * x, x / m]
    return out + [x * m**-0.5, x + n / 2, x * torch.sym_max(n, m), torch.sym_min(n, m)]


def in_place(x):
    n, m = x.shape
    y = x.clone()
    y[:, 0] = 1
    y[:, 1:] += 2
    y[:, -1] = x[:, 0]
    y.t()[0].add_(1)
    y.view(-1)[0] = 7
    y[torch.arange(n), 0] = 5.0
    y[x > 2] = 0.0
    z = torch.zeros(n, m + 2)
    z[:, 1:-1] = y
    z[:, :m] += x
    return y, z


def layers(x):
    q = x[:, None, :, None]
    out = [x @ x.t(), torch.einsum("bt,ct->bc", x, x), TF.layer_norm(x, (x.shape[1],)), TF.gelu(x)]
    out += [TF.conv1d(x[:, None], torch.ones(2, 1, 3), padding=1), TF.cosine_similarity(x, x + 1)]
    out += [TF.scaled_dot_product_attention(q, q, q, is_causal=True), TF.normalize(x)]
    out += [TF.group_norm(x[:, None], 1), TF.mse_loss(x, x * 2)]
    return out + [TF.cross_entropy(x, torch.zeros(x.shape[0], dtype=torch.long))]


GROUPS = [creation, views, places, reductions, in_place, layers]


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(g, marks=(pytest.mark.long,) if g in (places, reductions) else ())
        for g in GROUPS
    ],
    ids=lambda g: g.__name__,
)
def test_a_file_with_named_sizes_computes_what_torch_does(group, tmp_path):
    x, theirs = torch.randn(4, 6), Of(group)
    ours = from_torch(theirs, x)
    path = tmp_path / "exported"
    nn.export(ours, jnp.asarray(x.numpy()), path, shapes={"x": "b, t"}, constraints=["t >= 4"])
    loaded = nn.load_exported(path)
    for given in (x, torch.randn(3, 5)):
        wanted = [t.numpy() if torch.is_tensor(t) else t for t in theirs(given)]
        for run in (ours, loaded):
            for a, b in zip(run(jnp.asarray(given.numpy())), wanted, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# What jax.export cannot lower for a size that has a name, or a case that has no meaning then.
FIXED = {
    "view": "3 does not divide any number",
    "chunk": "how many pieces there are depends on the size",
    "diagonal": "which of two sizes is smaller is not known",
    "scatter.src": "the index is smaller than the source",
    "scatter_add": "the index is smaller than the source",
    "scatter_reduce.two": "the index is smaller than the source",
    "glu": "the size has to be even",
    "conv2d": "channels belong to the weight",
    "conv_transpose2d.input": "channels belong to the weight",
    "layer_norm": "the normalised size belongs to the layer",
    "group_norm": "channels are divided into groups",
    "native_layer_norm": "the normalised size belongs to the layer",
    "native_group_norm": "channels are divided into groups",
    "_pdist_forward": "how many pairs there are is counted while tracing",
    "_fft_r2c": "XLA's transforms have fixed lengths",
    "_fft_c2r": "XLA's transforms have fixed lengths",
    "avg_pool2d": "windows that the border cuts are counted",
    "upsample_bilinear2d.vec": "a factor is no whole number",
    "adaptive_avg_pool2d": "windows differ in size",
}


def _exports(case, axis):
    """Export an operator whose arrays have a named size where they have the first one's."""
    name, args, *rest = case
    kwargs = rest[0] if rest else {}
    leaves, structure = jax.tree.flatten(list(map(array, args)), is_leaf=lambda x: x is None)
    held = [x for x in leaves if hasattr(x, "shape")]
    first = next((x for x in held if x.ndim > axis and x.shape[axis] > 1), None)
    if first is None:
        return
    (named,) = jax.export.symbolic_shape("t", constraints=["t >= 3"])
    shapes = [tuple(named if n == first.shape[axis] else n for n in x.shape) for x in held]
    named_kwargs = {
        k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else array(v)
        for k, v in kwargs.items()
    }

    def run(*given):
        rest = iter(given)
        full = [next(rest) if hasattr(x, "shape") else x for x in leaves]
        entry = find(name if "." in name else f"{name}.default")
        out = OPERATORS[entry](*jax.tree.unflatten(structure, full), **named_kwargs)
        return out if isinstance(out, (tuple, list)) or hasattr(out, "shape") else out[0]

    specs = [jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(shapes, held, strict=True)]
    jax.export.export(jax.jit(run))(*specs)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64:UserWarning")  # JAX's own
@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in (1, 2))])
def test_every_operator_takes_sizes_that_have_names(part):
    failed = {}
    for case in CASES[part::3]:
        for axis in (0, 1):
            try:
                _exports(case, axis)
            except Exception as error:
                failed.setdefault(case[0], str(error).splitlines()[0])
    assert {name: why for name, why in failed.items() if name not in FIXED} == {}


def test_what_the_code_relied_on_is_asked_for_as_a_constraint(tmp_path):
    class Longer(tnn.Module):
        def forward(self, x):
            x = x[:, :-1] if x.shape[1] > 4 else x
            return x.reshape(x.shape[0], -1) * (2 if x.shape[0] * 3 // x.shape[0] == 3 else 1)

    ours = from_torch(Longer(), torch.randn(3, 6))
    x, path = jnp.ones((3, 6)), tmp_path / "exported"
    with pytest.raises(nn.ShapeError, match="traced for sizes with t > 4") as error:
        nn.export(ours, x, path, shapes={"x": "b, t"})
    assert "constraints=('t >= 5',)" in str(error.value)
    nn.export(ours, x, path, shapes={"args[0]": "b, t"}, constraints=["t >= 5"])
    assert nn.load_exported(path)(jnp.ones((2, 8))).shape == (2, 7)


def test_an_error_of_an_operator_names_it_and_its_line(tmp_path):
    pool = from_torch(Of(lambda x: TF.interpolate(x[:, None], scale_factor=2.0)), torch.randn(3, 6))
    with pytest.raises(
        nn.ShapeError, match="at upsample_nearest1d in Of, File .*test_torch_named"
    ) as error:
        nn.export(pool, jnp.ones((3, 6)), tmp_path / "exported", shapes={"x": "b, t"})
    assert "constraints" not in str(error.value)
