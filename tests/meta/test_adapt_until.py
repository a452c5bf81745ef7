"""Inner loops that stop by themselves, beside loops of Python; and the messages of inner loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
import statefulnn.functional as F

FN, PARAMS = nn.functionalize(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.standard_normal((6, n)), jnp.float32) for n in (2, 1))
VALLEY = lambda w, scale: 0.5 * (scale * w**2).sum()


def valley(start, scale, **options):
    options = {"lr": 0.1, "steps": 200, **options}
    return nn.meta.adapt_until(None, start, VALLEY, (scale,), **options)


def steps_by_hand(scale, tol, most=200, lr=0.1):
    """Of ``w <- (1 - lr scale) w`` from 1, until the gradient in front of a step is small enough."""
    w, size, count = 1.0, np.inf, 0
    while count < most and size > tol:
        size = abs(scale * w)
        w, count = (1 - lr * scale) * w, count + 1
    return w, count


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_traced_number_of_steps_is_the_loop_with_that_number(wrap):
    after = wrap(lambda n: nn.meta.adapt_until(FN, PARAMS, F.mse_loss, (X, Y), lr=0.1, steps=n))
    for n in (1, 4, 9):
        found = after(jnp.asarray(n))
        expected = nn.meta.adapt(FN, PARAMS, F.mse_loss, (X, Y), lr=0.1, steps=n)
        assert int(found.steps) == n
        assert found.params.keys() == PARAMS.keys()
        for name, value in expected.params.items():
            np.testing.assert_allclose(found.params[name], value, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.loss, expected.losses[-1], rtol=1e-5)


def test_each_task_stops_at_its_tolerance():
    scales = [0.5, 1.0, 4.0]
    found = jax.jit(jax.vmap(lambda s: valley(jnp.ones(()), s, tol=1e-2)))(jnp.array(scales))
    for i, scale in enumerate(scales):
        w, count = steps_by_hand(scale, 1e-2)
        assert int(found.steps[i]) == count
        np.testing.assert_allclose(found.params[i], w, rtol=1e-5)
        assert float(found.gradient_norm[i]) <= 1e-2
    assert len(set(found.steps.tolist())) == 3


def test_each_task_has_its_number_of_steps():
    numbers = jnp.array([0, 3, 7])
    found = jax.vmap(lambda n: valley(jnp.ones(()), 1.0, steps=n))(numbers)
    np.testing.assert_allclose(found.params, 0.9 ** np.array([0, 3, 7]), rtol=1e-6)


@pytest.mark.parametrize("truncate", [None, 3])
def test_each_task_stops_early_and_returns_its_best(truncate):
    # From 1 downwards; what is validated is best at `aim`, and worse after that.
    aims = jnp.array([0.75, 0.5, 0.2])
    patience = 4

    def one(aim):
        validate = lambda w: jnp.abs(w - aim)
        return valley(jnp.ones(()), 1.0, validate=validate, patience=patience, truncate=truncate)

    found = jax.jit(jax.vmap(one))(aims)
    for i, aim in enumerate(aims):
        path = 0.9 ** np.arange(201)
        best = int(np.abs(path - float(aim)).argmin())
        assert int(found.steps[i]) == best
        np.testing.assert_allclose(found.params[i], path[best], rtol=1e-5)


def test_forward_mode_is_that_of_the_steps_taken():
    after = lambda scale: valley(jnp.ones(()), scale, tol=1e-2).params
    _, count = steps_by_hand(2.0, 1e-2)
    # (1 - 0.1 s)^n by s.
    expected = -0.1 * count * 0.8 ** (count - 1)
    in_turn = nn.meta.over_tasks(lambda _, scale: after(scale), vectorize="loop")
    for function in (after, lambda scale: in_turn(0.0, jnp.stack([scale, scale]))):
        np.testing.assert_allclose(jax.jacfwd(function)(2.0), expected, rtol=1e-4)


@pytest.mark.parametrize("truncate", [0, 1, 4, 20, 21, 500])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_truncated_gradients_are_those_of_the_last_steps(truncate, wrap):
    def after(start, scale):
        return valley(start, scale, tol=1e-2, truncate=truncate).params

    w, count = steps_by_hand(2.0, 1e-2)
    value, (by_start, by_scale) = wrap(jax.value_and_grad(after, (0, 1)))(jnp.ones(()), 2.0)
    last = min(truncate, count)
    kept = 0.8 ** (count - last)
    np.testing.assert_allclose(value, w, rtol=1e-5)
    np.testing.assert_allclose(by_start, 0.0 if truncate < count else 0.8**count, rtol=1e-4)
    np.testing.assert_allclose(by_scale, -0.1 * last * kept * 0.8 ** max(last - 1, 0), rtol=1e-4)


def test_truncated_gradients_of_tasks_that_stop_apart():
    scales = jnp.array([0.5, 1.0, 4.0])
    after = lambda s: valley(jnp.ones(()), s, tol=1e-2, truncate=5).params
    found = jax.vmap(jax.grad(after))(scales)
    for i, scale in enumerate([0.5, 1.0, 4.0]):
        count = steps_by_hand(scale, 1e-2)[1]
        factor = 1 - 0.1 * scale
        expected = -0.1 * 5 * factor ** (count - 5) * factor**4
        np.testing.assert_allclose(found[i], expected, rtol=1e-4)


def test_implicit_gradients_of_a_loop_that_stops():
    objective = lambda w, penalty: ((w - 1) ** 2).sum() + penalty * (w**2).sum()
    solver = lambda init, penalty: (
        nn.meta.adapt_until(None, init, objective, (penalty,), lr=0.2, steps=500, tol=1e-6).params
    )
    fit = nn.meta.implicit_gradient(solver, objective=objective)
    slope = jax.vmap(jax.grad(lambda penalty: fit(jnp.zeros(2), penalty).sum()))
    penalties = np.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(slope(jnp.asarray(penalties)), -2 / (1 + penalties) ** 2, rtol=1e-4)


def test_an_optimizer_a_filter_and_state_are_those_of_adapt():
    fn, params, state = nn.functionalize(
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), mutable=True
    )
    options = {"optimizer": nn.meta.adam(0.1), "only": ["1.*", "2.*"], "state": state}
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        found = nn.meta.adapt_until(fn, params, F.mse_loss, (X, Y), steps=7, **options)
        expected = nn.meta.adapt(fn, params, F.mse_loss, (X, Y), steps=7, **options)
    for ours, theirs in ((found.params, expected.params), (found.state, expected.state)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_numbers_that_are_not_finite_end_the_loop():
    with pytest.warns(nn.DivergenceWarning, match="adapt_until diverged"):
        found = nn.meta.adapt_until(None, 50.0, lambda w: w**4, (), lr=0.5, steps=10**6)
        jax.effects_barrier()
    assert int(found.steps) < 10


# --------------------------------------------------------------------------------------------------
# Bad input


def in_shards(f):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("tasks",))
    each = jax.sharding.PartitionSpec("tasks")
    mapped = jax.shard_map(jax.vmap(f), mesh=mesh, in_specs=each, out_specs=each, check_vma=False)
    return lambda w: mapped(w[None]).sum()


UNDER = {
    "nothing": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda w: jax.vmap(f)(w[None]).sum(),
    "over_tasks": lambda f: lambda w: nn.meta.over_tasks(f)(w, jnp.ones(2)),
    "a loop over tasks": lambda f: (
        lambda w: nn.meta.over_tasks(f, vectorize="loop")(w, jnp.ones(2))
    ),
    "scan": lambda f: lambda w: jax.lax.scan(lambda w, _: (f(w), None), w, length=2)[0],
    "checkpoint": jax.checkpoint,
    "shard_map": in_shards,
}


@pytest.mark.parametrize("under", UNDER)
def test_reverse_mode_without_truncation_is_refused_with_the_ways_out(under):
    after = UNDER[under](lambda w, scale=1.0: valley(w, scale).params)
    with pytest.raises(nn.NotDifferentiableError, match="(?s)truncate=k.*implicit_gradient"):
        jax.eval_shape(jax.grad(after), jnp.ones(()))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"steps": 0}, ValueError, "steps must be"),
        ({"steps": jnp.ones(3)}, TypeError, "steps of shape"),
        ({"steps": jnp.ones(())}, TypeError, "dtype float32"),
        ({"patience": 0}, ValueError, "patience"),
        ({"truncate": -1}, ValueError, "truncate"),
        ({"lr": nn.meta.PerStep(jnp.ones(3))}, TypeError, "PerStep"),
        ({"validate": lambda w: jnp.ones(2)}, TypeError, r"validate returned .* \(2,\)"),
    ],
)
def test_bad_input_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        valley(jnp.ones(()), 1.0, **changes)


@pytest.mark.parametrize("function", [nn.meta.adapt, nn.meta.adapt_until])
def test_data_as_separate_arguments_are_told_to_be_a_tuple(function):
    name = function.__name__
    with pytest.raises(TypeError, match=rf"(?s){name} was given its data as 2 .*\(x, y\)"):
        function(FN, PARAMS, F.mse_loss, X, Y, lr=0.1, steps=1)


def test_a_traced_number_of_steps_for_adapt_names_the_other_loop():
    with pytest.raises(TypeError, match=r"(?s)traced number of steps.*adapt_until"):
        jax.jit(lambda n: nn.meta.adapt(None, 1.0, lambda w: w**2, (), lr=0.1, steps=n).params)(3)


def test_a_keyword_for_an_implicit_solver_is_told_to_be_positional():
    fit = nn.meta.implicit_gradient(lambda init, a: a, fixed_point=lambda x, a: a)
    with pytest.raises(TypeError, match=r"(?s)with a= by name.*fit\(init, \.\.\., a\)"):
        fit(jnp.zeros(2), a=jnp.ones(2))


def test_a_long_loop_says_once_what_goes_wrong_in_each_of_its_steps():
    one = lambda w, x: jnp.sqrt(w - x)
    step = lambda w, _: (w - 1.0, nn.meta.over_tasks(one)(w, jnp.array([0.0, 2.0])))
    with pytest.warns(nn.DivergenceWarning, match="task 1 of 2 diverged") as said:
        nn.meta.loop(step, jnp.asarray(5.0), length=50, chunk=7)
        jax.effects_barrier()
    assert len(said) == 1


def descend(scale, **options):
    return nn.meta.adapt_until(
        None, jnp.ones(()), lambda w, scale: scale * w**2, (scale,), lr=0.25, **options
    )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_validation_of_nan_is_worse_than_any_number(wrap):
    # w halves in each step: 1, 1/2, 1/4, ...; it is validated from 1/2 on, down to 1/8.
    some = lambda w: jnp.where((w < 0.9) & (w > 0.1), w, jnp.nan)
    stopped = wrap(lambda s: descend(s, steps=20, validate=some, patience=2))(1.0)
    assert (int(stopped.steps), float(stopped.params)) == (3, 0.125)


def test_a_validation_without_a_finite_number_is_told_with_its_task():
    run = lambda scale, sign: descend(scale, steps=5, validate=lambda w: jnp.sqrt(sign * w))
    with pytest.warns(nn.DivergenceWarning, match=r"(?s)validate returned.*task 1 of 2.*Why"):
        jax.block_until_ready(jax.vmap(run)(jnp.ones(2), jnp.array([1.0, -1.0])))
        jax.effects_barrier()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_loop_that_diverges_is_told_with_its_task(wrap):
    run = wrap(jax.vmap(lambda scale: descend(scale, steps=3000).steps))
    with pytest.warns(
        nn.DivergenceWarning, match=r"(?s)adapt_until diverged in task 1 of 2.*Instead"
    ):
        jax.block_until_ready(run(jnp.array([1.0, 100.0])))
        jax.effects_barrier()
