"""Every layer against torch: outputs, buffers after the call, gradients; training and evaluation, eager
and compiled, in float32, float64 and low precision; second derivatives; vmap. The rows are in
tests/parity/rows: to cover another option, add one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.parity.oracle import (
    Case,
    array,
    compare,
    is_float,
    pair,
    same_class,
    sixty_four_bits,
    to_jax,
    to_torch,
)
from tests.parity.table import (
    LAYER_MISUSE,
    LAYERS,
    ONE_OF_EACH,
    TORCH_WARNS,
    representative,
    thinned,
)
from tests.quick import QUICKLY

pytestmark = TORCH_WARNS


@pytest.mark.parametrize(
    "jitted", [True, pytest.param(False, marks=pytest.mark.long)], ids=["jit", "eager"]
)
@pytest.mark.parametrize("case", thinned(LAYERS))
def test_layer_computes_what_torch_does(case: Case, jitted: bool) -> None:
    for training in (True, False) if case.modes else (True,):
        compare(case, training, jitted)


# In eager code: the same kernels, each compiled by itself. One row tells whether a layer calls them rightly.
@pytest.mark.parametrize("case", representative(ONE_OF_EACH, 0, 4))
def test_layer_computes_what_torch_does_in_float64(case: Case) -> None:
    with sixty_four_bits():
        compare(case, True, False, "float64")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.long)])
@pytest.mark.parametrize("case", representative((c for c in ONE_OF_EACH if not c.no_low), 1, 4))
def test_layer_computes_what_torch_does_in_low_precision(case: Case, dtype: str) -> None:
    compare(case, True, True, dtype)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_layer_reads_like_torchs(case: Case) -> None:
    theirs, ours = pair(case)
    # torch names a private subclass of Linear inside attention.
    assert repr(ours) == repr(theirs).replace("NonDynamicallyQuantizableLinear", "Linear")


def _first(out):
    return out[0] if isinstance(out, (tuple, list)) else out


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("case", representative((c for c in ONE_OF_EACH if not c.no_second), 2, 4))
def test_second_derivatives_agree_with_torch(case: Case) -> None:
    # A Hessian-vector product of the sum of cubes, so that linear layers count as well.
    theirs, ours = pair(case)
    given = to_torch(case.inputs)
    call = {k: to_torch(v) for k, v in case.call.items()}
    wanted_of = [i for i, x in enumerate(given) if isinstance(x, torch.Tensor) and is_float(x)][:1]
    assert wanted_of, "no floating input: give a reason in no_second"
    (at,) = wanted_of
    x = given[at].requires_grad_(True)
    direction = array(*x.shape, seed=9)
    out = _first(theirs(*[y.clone() if isinstance(y, torch.Tensor) else y for y in given], **call))
    (slope,) = torch.autograd.grad((out**3).sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad((slope * torch.as_tensor(direction)).sum(), x)

    inputs = list(to_jax(case.inputs))
    ours_call = {k: to_jax(v) for k, v in case.call.items()}
    fn, params, state = nn.functionalize(ours, mutable=True)

    def loss_of(x):
        args = [*inputs[:at], x, *inputs[at + 1 :]]
        return (_first(fn(params, state, *args, **ours_call)[0]) ** 3).sum()

    product = lambda x, v: jax.jvp(jax.grad(loss_of), (x,), (v,))[1]
    got = jax.jit(product, compiler_options=QUICKLY)(inputs[at], jnp.asarray(direction))
    scale = max(1.0, float(wanted.abs().max()))
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4 * scale * case.tolerance)


@pytest.mark.parametrize("case", representative((c for c in ONE_OF_EACH if not c.no_vmap), 3, 4))
def test_vmap_over_examples_is_a_loop_over_examples(case: Case) -> None:
    _, ours = pair(case)
    fn, params, state = nn.functionalize(ours, mutable=True)
    keywords = {k: to_jax(v) for k, v in case.call.items()}
    inputs = to_jax(case.inputs)
    second = jax.tree.map(lambda x: x * 0.5 if is_float(x) else x[::-1] if x.ndim else x, inputs)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), inputs, second)
    call = lambda *x: fn(params, state, *x, **keywords)[0]
    together = jax.jit(jax.vmap(call), compiler_options=QUICKLY)(*both)
    for i, given in enumerate((inputs, second)):
        alone = call(*given)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, atol=2e-5 * case.tolerance)


@pytest.mark.parametrize("case", LAYER_MISUSE, ids=str)
def test_misuse_of_a_layer_raises_torchs_class(case: Case) -> None:
    def run(library, convert):
        layer = getattr(library, case.layer)(
            *convert(case.args), **{k: convert(v) for k, v in case.kwargs.items()}
        )
        layer(*convert(case.inputs), **{k: convert(v) for k, v in case.call.items()})

    with pytest.raises(Exception) as theirs:
        run(torch.nn, to_torch)
    with pytest.raises(Exception) as ours:
        run(nn, to_jax)
    same_class(ours.value, theirs.value)
