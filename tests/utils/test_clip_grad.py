"""Gradient clipping against torch, in both forms."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.parity.oracle import array, close, sixty_four_bits
from tests.quick import diagonal

ORDERS = [2.0, 1, 0.5, 0, 1.5, math.inf, "inf", -1, -math.inf]
GRADS = {
    "some": [array(3, 4), array(5, seed=1) * 3, array(2, 2, 2, seed=2)],
    "small": [array(3) * 1e-3],
    "zeros": [np.zeros(3, np.float32), np.zeros((2, 2), np.float32)],
    "one zero": [np.array([0, 2, 0, -3], np.float32), np.zeros(2, np.float32)],
    "scalar": [np.float32(-7).reshape(())],
    "inf": [np.array([1, np.inf], np.float32), array(3)],
    "nan": [np.array([1, np.nan], np.float32), array(3)],
}
# Every order once with zeros and once without; the others with every kind of gradient.
CASES = diagonal(2, ["some", "one zero"], ORDERS) + diagonal(
    2, [name for name in GRADS if name not in ("some", "one zero")], [2.0, math.inf]
)
UTILS = nn.utils


def parameters(grads):
    """The same parameters in both libraries, one of them without a gradient."""
    theirs = [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads] + [
        torch.nn.Parameter(torch.zeros(2))
    ]
    ours = [nn.Parameter(jnp.zeros(g.shape)) for g in grads] + [nn.Parameter(jnp.zeros(2))]
    for a, b, g in zip(theirs, ours, grads, strict=False):
        a.grad, b.grad = torch.as_tensor(g.copy()), jnp.asarray(g)
    return theirs, ours


def same_grads(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            close(a.grad, b.grad, "grad", 1e-5)


@pytest.mark.parametrize(("name", "order"), CASES)
def test_clip_grad_norm(name, order):
    for max_norm in (0.5, 1e6, 0, np.float32(2)):
        theirs, ours = parameters(GRADS[name])
        wanted = torch.nn.utils.clip_grad_norm_(theirs, max_norm, order)
        close(UTILS.clip_grad_norm_(ours, max_norm, order), wanted, "norm", 1e-5)
        same_grads(ours, theirs)


@pytest.mark.parametrize(("name", "order"), CASES)
def test_get_total_norm_and_clip_grads_with_norm(name, order):
    grads = GRADS[name]
    wanted = torch.nn.utils.get_total_norm([torch.as_tensor(g) for g in grads], order)
    for given in (
        [jnp.asarray(g) for g in grads],
        (jnp.asarray(g) for g in grads),
        {str(i): g for i, g in enumerate(grads)},
        [nn.Buffer(g) for g in grads],
    ):
        close(UTILS.get_total_norm(given, order), wanted, "norm", 1e-5)
    theirs, ours = parameters(grads)
    torch.nn.utils.clip_grads_with_norm_(theirs, 1.5, wanted)
    assert UTILS.clip_grads_with_norm_(ours, 1.5, jnp.asarray(wanted.numpy())) is None
    same_grads(ours, theirs)


@pytest.mark.parametrize("name", GRADS)
def test_clip_grad_value(name):
    for limit in (1.0, 0.1, 0):
        theirs, ours = parameters(GRADS[name])
        torch.nn.utils.clip_grad_value_(theirs, limit)
        assert UTILS.clip_grad_value_(ours, limit) is None
        same_grads(ours, theirs)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", GRADS)
def test_trees_of_gradients_are_returned(name, jitted):
    theirs, _ = parameters(GRADS[name])
    made = lambda: {"a": [jnp.asarray(g) for g in GRADS[name]], "b": ()}  # a new one for each call
    tree = made()
    wrap = jax.jit if jitted else lambda f: f
    clipped, norm = wrap(UTILS.clip_grad_norm_)(tree, 0.5)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    close(norm, wanted, "norm", 1e-5)
    assert jax.tree.structure(clipped) == jax.tree.structure(tree)
    again = wrap(UTILS.clip_grads_with_norm_)(made(), 0.5, norm)
    for out in (clipped, again):
        for a, b in zip(jax.tree.leaves(out), theirs, strict=False):
            close(a, b.grad, "grad", 1e-5)
    theirs, _ = parameters(GRADS[name])
    torch.nn.utils.clip_grad_value_(theirs, 0.5)
    for a, b in zip(
        jax.tree.leaves(wrap(UTILS.clip_grad_value_)(made(), 0.5)), theirs, strict=False
    ):
        close(a, b.grad, "grad", 1e-5)


def test_gradients_of_nn_grad_under_jit():
    model = nn.Linear(3, 2)

    @nn.jit
    def step(model, x):
        return UTILS.clip_grad_norm_(nn.grad(lambda m: (m(x) ** 2).sum())(model), 0.1)

    clipped, norm = step(model, jnp.ones((4, 3)))
    assert set(clipped) == {"weight", "bias"}
    np.testing.assert_allclose(UTILS.get_total_norm(clipped), 0.1, rtol=1e-4)
    assert norm > 0.1


def test_one_parameter_and_generators():
    theirs, ours = parameters([array(3)])
    torch.nn.utils.clip_grad_norm_(theirs[0], 0.1)
    UTILS.clip_grad_norm_(ours[0], 0.1)
    same_grads(ours, theirs)
    torch.nn.utils.clip_grad_norm_((p for p in theirs), 0.01)
    UTILS.clip_grad_norm_((p for p in ours), 0.01)
    same_grads(ours, theirs)
    torch.nn.utils.clip_grad_value_((p for p in theirs), 0.001)
    UTILS.clip_grad_value_((p for p in ours), 0.001)
    same_grads(ours, theirs)


def test_nothing_to_clip():
    for utils in (torch.nn.utils, UTILS):
        assert float(utils.clip_grad_norm_([], 1.0)) == 0.0
        assert float(utils.get_total_norm([])) == 0.0
        with pytest.warns(UserWarning, match="empty generator"):
            assert float(utils.clip_grad_norm_((p for p in []), 1.0)) == 0.0
        assert utils.clip_grads_with_norm_([], 1.0, 2.0) is None
    clipped, norm = UTILS.clip_grad_norm_({}, 1.0)
    assert clipped == {} and float(norm) == 0.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_and_mixtures(dtype):
    for dtypes in ((dtype, dtype), (dtype, "float32")):
        theirs = [
            torch.as_tensor(array(40, seed=i)).to(getattr(torch, d)) for i, d in enumerate(dtypes)
        ]
        ours = [jnp.asarray(t.float().numpy(), d) for t, d in zip(theirs, dtypes, strict=True)]
        for order in (2, 1, math.inf, 3):
            wanted = torch.nn.utils.get_total_norm(theirs, order)
            norm = UTILS.get_total_norm(ours, order)
            assert str(norm.dtype) == str(wanted.dtype).removeprefix("torch.")
            close(norm, wanted, "norm", 1e-2)
        clipped, _ = UTILS.clip_grad_norm_(ours, 1.0)
        assert [g.dtype for g in clipped] == [g.dtype for g in ours]


def test_float64():
    with sixty_four_bits():
        g = np.random.default_rng(0).standard_normal(50)
        wanted = torch.nn.utils.get_total_norm([torch.as_tensor(g)], 3)
        clipped, norm = UTILS.clip_grad_norm_({"g": jnp.asarray(g)}, 0.7, 3)
        close(norm, wanted, "norm", 1e-13)
        assert clipped["g"].dtype == jnp.float64
        p = torch.nn.Parameter(torch.as_tensor(g))
        p.grad = torch.as_tensor(g)
        torch.nn.utils.clip_grad_norm_([p], 0.7, 3)
        close(clipped["g"], p.grad, "grad", 1e-13)


def test_complex_gradients():
    g = (array(4) + 1j * array(4, seed=1)).astype(np.complex64)
    wanted = torch.nn.utils.get_total_norm([torch.as_tensor(g)])
    clipped, norm = UTILS.clip_grad_norm_([jnp.asarray(g)], 0.1)
    close(norm, wanted, "norm", 1e-5)
    np.testing.assert_allclose(clipped[0], g * (0.1 / float(wanted)), rtol=1e-4)


@pytest.mark.parametrize("name", ["inf", "nan"])
def test_error_if_nonfinite(name):
    theirs, ours = parameters(GRADS[name])
    before = ours[0].grad
    for utils, given in ((torch.nn.utils, theirs), (UTILS, ours)):
        with pytest.raises(RuntimeError, match="is non-finite"):
            utils.clip_grad_norm_(given, 1.0, error_if_nonfinite=True)
    assert ours[0].grad is before
    with pytest.raises(RuntimeError, match="is non-finite"):
        UTILS.get_total_norm(GRADS[name], error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="while the function is traced"):
        jax.jit(lambda g: UTILS.clip_grad_norm_(g, 1.0, error_if_nonfinite=True))({"g": before})


def test_another_limit_does_not_compile_again():
    from statefulnn.utils import clip_grad

    grads = {"g": jnp.ones(17)}
    UTILS.clip_grad_norm_(grads, 1.0)
    size = clip_grad._scaled_with_norm._cache_size()
    for limit in (2, 0.5, np.float32(3)):
        UTILS.clip_grad_norm_(grads, limit)
    assert clip_grad._scaled_with_norm._cache_size() == size


@pytest.mark.parametrize(
    "given",
    [
        nn.Linear(2, 2),
        [nn.Linear(2, 2)],
        3,
        [1.0, 2.0],
        {"weight": nn.Parameter(jnp.ones(2))},
        {"weight": jnp.ones(2, jnp.int32)},
        "text",
    ],
    ids=lambda x: type(x).__name__,
)
def test_something_else_raises(given):
    for call in (
        lambda: UTILS.clip_grad_norm_(given, 1.0),
        lambda: UTILS.clip_grad_value_(given, 1.0),
        lambda: UTILS.clip_grads_with_norm_(given, 1.0, 1.0),
    ):
        with pytest.raises(TypeError, match="Instead: "):
            call()


def test_no_tracer_is_kept_in_grad():
    _, ours = parameters([array(3)])

    def trace(x):
        ours[0].grad = x
        return UTILS.clip_grad_norm_(ours, 0.1)

    with pytest.raises(nn.TraceLeakError):
        jax.jit(trace)(jnp.ones(3))


def test_the_deprecated_name():
    theirs, ours = parameters([array(3)])
    with pytest.warns(FutureWarning):
        torch.nn.utils.clip_grad_norm(theirs, 0.1)
    with pytest.warns(FutureWarning, match="clip_grad_norm_"):
        UTILS.clip_grad_norm(ours, 0.1)
    same_grads(ours, theirs)


def test_a_dict_of_gradients_is_clipped_in_place_and_keeps_its_order():
    # As torch's line is written: its result is not taken.
    grads = nn.grad(lambda m: (m(jnp.ones((2, 3))) ** 2).sum() * 100)(nn.Linear(3, 2))
    names, before = list(grads), dict(grads)
    clipped, norm = nn.utils.clip_grad_norm_(grads, 1.0)
    assert clipped is grads and list(grads) == names == ["weight", "bias"]
    assert norm > 1
    np.testing.assert_allclose(nn.utils.get_total_norm(grads), 1.0, rtol=1e-5)
    np.testing.assert_allclose(grads["bias"], before["bias"] / norm, rtol=1e-5)
    assert nn.utils.clip_grad_value_(grads, 1e-3) is grads
    assert max(float(jnp.abs(g).max()) for g in grads.values()) <= np.float32(1e-3)


def test_parameters_of_which_none_has_a_gradient_are_told_of():
    with pytest.warns(UserWarning, match=r"clip_grad_norm_\(grads, 1.0\)"):
        assert float(nn.utils.clip_grad_norm_(nn.Linear(3, 2).parameters(), 1.0)) == 0.0


def test_dicts_in_a_tuple_take_the_clipped_gradients():
    pair = ({"w": jnp.array([3.0])}, {"w": jnp.array([4.0])})  # as argnums=(0, 1) gives them
    clipped, _ = nn.utils.clip_grad_norm_(pair, 1.0)
    assert pair[0]["w"] is clipped[0]["w"] and pair[1]["w"] is clipped[1]["w"]
    np.testing.assert_allclose([pair[0]["w"][0], pair[1]["w"][0]], [0.6, 0.8], rtol=1e-5)


@pytest.mark.parametrize("view", [dict.values, lambda grads: (g for g in grads.values())])
def test_gradients_that_nothing_holds_are_refused(view):
    for clip in (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_):
        with pytest.raises(TypeError, match="the dict itself and not its values"):
            clip(view({"w": jnp.array([3.0])}), 1.0)
