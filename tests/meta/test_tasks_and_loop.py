"""over_tasks, loop, and reports of what diverged."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
import statefulnn.functional as F
from tests.devices import run_on_devices


def test_results_are_the_mean_or_all_of_them():
    w, x = jnp.asarray(2.0), jnp.arange(5.0)
    f = lambda w, x: {"a": w * x, "b": x}
    mean = nn.meta.over_tasks(f)(w, x)
    assert float(mean["a"]) == 4.0 and float(mean["b"]) == 2.0
    every = nn.meta.over_tasks(f, reduce=None)(w, x)
    np.testing.assert_array_equal(every["a"], 2 * np.arange(5.0))


def test_aux_comes_back_for_every_task():
    value, aux = nn.meta.over_tasks(lambda w, x: (w * x, x + 1), has_aux=True)(3.0, jnp.arange(4.0))
    assert float(value) == 4.5
    assert aux.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_each_task_has_its_own_dropout_or_all_have_one():
    fn, params = nn.functionalize(nn.Dropout(0.5))
    one = lambda p, x, rng: fn(p, x, rng=rng)
    x = jnp.ones((6, 64))
    own = nn.meta.over_tasks(one, reduce=None)(params, x, rng=jax.random.key(0))
    assert len({tuple(np.asarray(v)) for v in own}) == 6
    same = nn.meta.over_tasks(one, reduce=None, randomness="same")(params, x, rng=0)
    assert len({tuple(np.asarray(v)) for v in same}) == 1


def test_inner_steps_draw_different_masks():
    fn, params = nn.functionalize(nn.Sequential(nn.Linear(50, 1, bias=False), nn.Dropout(0.5)))
    x = jnp.ones((40, 50))
    adapted = nn.meta.adapt(
        fn,
        params,
        lambda out, y: (out != 0).mean() + 0 * out.sum(),
        (x, None),
        lr=0.0,
        steps=6,
        rng=3,
    )
    assert len(set(np.asarray(adapted.losses).tolist())) > 1


def test_a_draw_without_a_key_is_an_error():
    fn, params = nn.functionalize(nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)))
    with pytest.raises(nn.MissingRngError):
        nn.meta.adapt(fn, params, F.mse_loss, (jnp.ones((2, 3)), jnp.ones((2, 1))), lr=0.1)


@pytest.mark.parametrize(
    "data, message",
    [
        (
            (jnp.ones((5, 2)), jnp.ones((4, 2))),
            r"argument 1 of shape \(5, 2\), argument 2 of shape",
        ),
        (
            ({"x": jnp.ones(3)}, jnp.ones(())),
            r"argument 1\['x'\] of shape \(3,\), argument 2 of shape \(\)",
        ),
        ((), "no data"),
    ],
)
def test_mismatched_task_batches_are_named(data, message):
    with pytest.raises(nn.ShapeError, match=message):
        nn.meta.over_tasks(lambda w, *data: w)(1.0, *data)


def test_no_tasks_at_all_are_no_report():
    out = nn.meta.over_tasks(lambda w, x: w * x, reduce=None)(1.0, jnp.zeros((0, 3)))
    assert out.shape == (0, 3)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.jit(jax.grad(f))])
def test_a_diverged_task_is_reported_with_its_index(wrap):
    def one_task(w, start):
        loss = lambda v: (w * v) ** 4
        return loss(nn.meta.adapt(None, start, loss, (), lr=0.5, steps=8).params)

    f = wrap(nn.meta.over_tasks(one_task))
    starts = jnp.array([0.1, 0.2, 50.0, 0.3])
    with pytest.warns(nn.errors.DivergenceWarning, match="task 2 of 4 diverged"):
        f(1.0, starts)
        jax.effects_barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(1.0, starts.at[2].set(0.1))
        jax.effects_barrier()


def test_report_false_is_silent():
    f = nn.meta.over_tasks(lambda w, x: x, report=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(f(1.0, jnp.array([1.0, np.nan])))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import statefulnn as nn, statefulnn.functional as F

assert len(jax.devices()) == 4
fn, params = nn.functionalize(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)))
def one(p, x, y):
    adapted = nn.meta.adapt(fn, p, F.mse_loss, (x, y), lr=0.1, steps=2)
    return F.mse_loss(fn(adapted.params, x), y), adapted.params
f = jax.jit(jax.grad(nn.meta.over_tasks(one, has_aux=True), has_aux=True))
rng = np.random.default_rng(0)
x, y = (jnp.asarray(rng.standard_normal((8, 3, 1)), jnp.float32) for _ in range(2))
mesh = Mesh(np.array(jax.devices()), ("tasks",))
placed = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("tasks")))
(grads, adapted), (wanted, _) = f(params, *placed), f(params, x, y)
for name, g in grads.items():
    np.testing.assert_allclose(g, wanted[name], rtol=1e-5, atol=1e-6)
    assert [s.data.shape[0] for s in adapted[name].addressable_shards] == [2, 2, 2, 2], name
text = f.lower(params, *placed).compile().as_text()
assert "all-reduce" in text and "all-to-all" not in text
# Every device adapts its own tasks: only what tells which of them diverged is gathered.
gathered = [line.split("all-gather(")[0] for line in text.splitlines() if " all-gather(" in line]
assert all("pred[" in line for line in gathered), gathered
"""


def test_tasks_over_devices_give_the_same_gradient_and_stay_where_they_are():
    run_on_devices(4, SHARDED)


# --------------------------------------------------------------------------------------------------
# The outer loop


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_loop_is_scan(chunk):
    step = lambda c, x: ({"w": c["w"] * 0.9 + x}, c["w"] - x)
    xs = jnp.arange(7.0)
    carry, outs = nn.meta.loop(step, {"w": 1.0}, xs, chunk=chunk)
    expected, ys = jax.lax.scan(step, {"w": jnp.asarray(1.0)}, xs)
    np.testing.assert_allclose(carry["w"], expected["w"], rtol=1e-6)
    np.testing.assert_allclose(outs, ys, rtol=1e-6)


def test_a_loop_compiles_its_step_once():
    traces = []

    def step(carry, x):
        traces.append(1)
        return carry + x, carry

    nn.meta.loop(step, 0.0, jnp.ones(40), chunk=10)
    assert len(traces) == 1


def test_length_alone_and_no_steps():
    carry, outs = nn.meta.loop(lambda c, x: (c + 1, c), 0.0, length=5)
    assert float(carry) == 5.0 and outs.tolist() == [0, 1, 2, 3, 4]
    carry, outs = nn.meta.loop(lambda c, x: (c + 1, c), 0.0, length=0)
    assert float(carry) == 0.0 and outs.shape == (0,)


def test_on_chunk_sees_progress_and_may_stop():
    seen = []

    def look(carry, outs, done):
        seen.append((float(carry), outs.tolist(), done))
        return done >= 4

    carry, outs = nn.meta.loop(lambda c, x: (c + 1, c), 0.0, length=9, chunk=2, on_chunk=look)
    assert seen == [(2.0, [0.0, 1.0], 2), (4.0, [2.0, 3.0], 4)]
    assert float(carry) == 4.0 and len(outs) == 4


def test_a_progress_bar_shows_the_label(capsys):
    nn.meta.loop(lambda c, x: (c, c), 0.0, length=3, progress="meta-training")
    assert "meta-training" in capsys.readouterr().err


def test_a_carry_that_is_no_longer_finite_is_named_once():
    step = lambda c, x: ({"w": c["w"] * 1e15, "n": c["n"] + 1}, None)
    start = {"w": jnp.asarray(1.0), "n": jnp.asarray(0)}
    with pytest.warns(nn.errors.DivergenceWarning, match=r"steps 2 to 4: \['w'\]") as said:
        nn.meta.loop(step, start, length=8, chunk=2)
    assert len(said) == 1


def test_bad_lengths_are_refused():
    step = lambda c, x: (c, c)
    for arguments in (
        {"xs": jnp.ones(3), "length": 4},
        {},
        {"xs": (jnp.ones(3), jnp.ones(2))},
    ):
        with pytest.raises(nn.ShapeError, match="number of steps"):
            nn.meta.loop(step, 0.0, **arguments)
    with pytest.raises(ValueError, match="chunk"):
        nn.meta.loop(step, 0.0, length=3, chunk=0)


# --------------------------------------------------------------------------------------------------
# Pieces of outer objectives


def test_reptile_s_gradient_is_the_way_back():
    params = {"w": jnp.asarray(1.0)}
    adapted = nn.meta.adapt(None, params, lambda p: p["w"] ** 2, (), lr=0.1, steps=3)
    grads = nn.meta.reptile_gradient(params, adapted.params)
    np.testing.assert_allclose(grads["w"], 1 - 0.8**3, rtol=1e-6)


def test_multi_step_weights_anneal_to_the_last_step():
    for progress in (0.0, 0.3, 1.0, 7.0):
        weights = np.asarray(nn.meta.multi_step_weights(5, progress))
        np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
        share = min(progress, 1.0)
        np.testing.assert_allclose(weights[:4], (1 - share) / 5, rtol=1e-6)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_the_mean_over_no_tasks_is_an_error(vectorize):
    mean = nn.meta.over_tasks(lambda w, x: (w * x).sum(), vectorize=vectorize)
    for function in (mean, jax.grad(mean)):
        with pytest.raises(nn.ShapeError, match="(?s)0 tasks.*reduce=None"):
            function(1.0, jnp.zeros((0, 3)))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_tasks_that_call_the_model_and_not_the_function_are_told_of(wrap):
    model = nn.Linear(3, 1)
    fn, params = nn.functionalize(model)
    data = jnp.ones((2, 4, 3))
    wrong = nn.meta.over_tasks(lambda params, x: (model(x) ** 2).mean())
    with pytest.warns(nn.UntrainedLeavesWarning, match="depends on none of the parameters"):
        grads = wrap(jax.grad(wrong))(params, data)
    assert not any(g.any() for g in grads.values())
    right = nn.meta.over_tasks(lambda params, x: (fn(params, x) ** 2).mean())
    assert wrap(jax.grad(right))(params, data)["weight"].any()  # and warns of nothing
    assert jax.grad(lambda scale: right(params, scale * data))(1.0) != 0
    assert float(wrong(params, data)) == pytest.approx(float(right(params, data)))
