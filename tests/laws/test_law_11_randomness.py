"""Law 11: randomness is explicit where it must be, convenient where it can be."""

from __future__ import annotations

import copy
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from statefulnn.core.generator import next_key


class Noise(nn.Module):
    """Uniform noise from the generator in force: what Dropout does."""

    def forward(self, x):
        if not self.training:
            return x
        return x + jax.random.uniform(next_key(), x.shape)


class OwnNoise(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.generator = nn.Generator(seed)
        self.shift = nn.Parameter(jnp.zeros(()))

    def forward(self, x):
        return x + self.shift + jax.random.uniform(self.generator.next_key(), x.shape)


X = jnp.zeros(16)


def draw(m=None, x=X):
    return np.asarray((m or Noise())(x))


def test_a_seed_makes_eager_draws_reproducible():
    nn.manual_seed(3)
    first = draw(), draw()
    nn.manual_seed(3)
    again = draw(), draw()
    nn.manual_seed(4)
    other = draw()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other)


@pytest.mark.parametrize("model", [Noise, OwnNoise], ids=lambda c: c.__name__)
def test_nn_jit_draws_anew_at_each_call_without_a_retrace(model):
    m = model()
    f = nn.jit(lambda m, x: m(x))
    draws = [np.asarray(f(m, X)) for _ in range(4)]
    for i in range(4):
        for j in range(i):
            assert not np.array_equal(draws[i], draws[j])
    assert f.trace_count == 1


@pytest.mark.parametrize("model", [Noise, OwnNoise], ids=lambda c: c.__name__)
def test_compiled_and_eager_draws_are_one_stream(model):
    nn.manual_seed(0)
    m = model()
    eager = [draw(m) for _ in range(3)]
    nn.manual_seed(0)
    m = model()
    f = nn.jit(lambda m, x: m(x))
    mixed = [np.asarray(f(m, X)), draw(m), np.asarray(f(m, X))]
    np.testing.assert_array_equal(eager, mixed)


@pytest.mark.parametrize("wrap", [nn.jit, nn.grad, nn.remat, nn.value_and_grad])
def test_after_a_failed_call_the_stream_is_where_it_was(wrap):
    m = OwnNoise()
    before = np.asarray(nn.default_generator.get_state()), np.asarray(m.generator.get_state())

    def f(m, x):
        m(x)
        Noise()(x)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        wrap(f)(m, X)
    after = np.asarray(nn.default_generator.get_state()), np.asarray(m.generator.get_state())
    np.testing.assert_array_equal(before, after)
    draw()


PURE = {
    "functional_call": lambda m, **kw: nn.functional_call(m, {}, (X,), **kw),
    "functionalize": lambda m, **kw: nn.functionalize(m)[0]({}, X, **kw),
    "functional_call under jit": lambda m, **kw: jax.jit(
        lambda x: nn.functional_call(m, {}, (x,), **kw)
    )(X),
    "functional_call under grad": lambda m, **kw: jax.grad(
        lambda x: nn.functional_call(m, {}, (x,), **kw).sum()
    )(X),
}


@pytest.mark.parametrize("how", PURE)
def test_a_draw_in_a_pure_call_without_a_key_raises(how):
    before = np.asarray(nn.default_generator.get_state())
    with pytest.raises(nn.MissingRngError, match="rng="):
        PURE[how](Noise())
    np.testing.assert_array_equal(np.asarray(nn.default_generator.get_state()), before)


@pytest.mark.parametrize("how", PURE)
def test_in_eval_mode_no_key_is_needed(how):
    PURE[how](Noise().eval())


@pytest.mark.parametrize("how", [h for h in PURE if "grad" not in h])
def test_a_pure_call_is_a_function_of_its_key(how, key):
    m = Noise()
    before = np.asarray(nn.default_generator.get_state())
    first, again = (np.asarray(PURE[how](m, rng=key)) for _ in range(2))
    other = np.asarray(PURE[how](m, rng=jax.random.key(99)))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(np.asarray(nn.default_generator.get_state()), before)


def test_two_draws_in_one_pure_call_differ(key):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Noise(), Noise()

        def forward(self, x):
            return self.a(x), self.b(x)

    a, b = nn.functional_call(Two(), {}, (X,), rng=key)
    assert not np.array_equal(np.asarray(a), np.asarray(b))


def test_typed_and_raw_keys_are_taken(key):
    raw = jax.random.key_data(key)
    a = np.asarray(nn.functional_call(Noise(), {}, (X,), rng=key))
    b = np.asarray(nn.functional_call(Noise(), {}, (X,), rng=raw))
    np.testing.assert_array_equal(a, b)


def test_a_traced_key_works_under_jit_and_vmap(key):
    m = Noise()
    keys = jax.random.split(key, 3)
    out = jax.jit(jax.vmap(lambda k: nn.functional_call(m, {}, (X,), rng=k)))(keys)
    one = nn.functional_call(m, {}, (X,), rng=keys[1])
    np.testing.assert_array_equal(np.asarray(out[1]), np.asarray(one))
    assert not np.array_equal(np.asarray(out[0]), np.asarray(out[1]))


ILLEGAL = {
    "jax.jit": lambda f: jax.jit(f)(X),
    "jax.vmap": lambda f: jax.vmap(f)(jnp.zeros((3, 2))),
    "lax.scan": lambda f: jax.lax.scan(lambda c, _: (f(c), None), X, None, length=2),
    "lax.cond": lambda f: jax.lax.cond(True, f, f, X),
    "lax.map": lambda f: jax.lax.map(f, jnp.zeros((3, 2))),
    "lax.fori_loop": lambda f: jax.lax.fori_loop(0, 2, lambda i, c: f(c), X),
    "jax.checkpoint": lambda f: jax.checkpoint(f)(X),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x: f(x).sum()))(jnp.zeros((3, 2))),
    "grad of vmap": lambda f: jax.grad(lambda x: jax.vmap(f)(x).sum())(jnp.zeros((3, 2))),
    "vmap inside nn.jit": lambda f: nn.jit(lambda x: jax.vmap(f)(x))(jnp.zeros((3, 2))),
    "scan inside nn.jit": lambda f: nn.jit(
        lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)
    )(X),
    "jax.jit inside nn.jit": lambda f: nn.jit(lambda x: jax.jit(f)(x))(X),
}


@pytest.mark.parametrize("how", ILLEGAL)
def test_a_draw_from_the_default_generator_where_it_cannot_advance_raises(how):
    before = np.asarray(nn.default_generator.get_state())
    with pytest.raises(nn.MissingRngError):
        ILLEGAL[how](Noise())
    np.testing.assert_array_equal(np.asarray(nn.default_generator.get_state()), before)
    draw()


@pytest.mark.parametrize("how", ["jax.vmap", "lax.scan", "lax.cond", "jax.checkpoint", "jax.jit"])
def test_a_draw_from_an_outside_module_s_own_generator_raises_too(how):
    m = OwnNoise()
    before = np.asarray(m.generator.get_state())
    with pytest.raises(nn.StatefulnnError):
        ILLEGAL[how](m)
    np.testing.assert_array_equal(np.asarray(m.generator.get_state()), before)


LEGAL = {
    "jax.grad": lambda f: jax.grad(lambda x: f(x).sum())(X),
    "jax.jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "jax.vjp": lambda f: jax.vjp(f, X)[0],
    "grad of grad": lambda f: jax.grad(lambda x: jax.grad(lambda x: (f(x) ** 2).sum())(x).sum())(X),
    "grad inside nn.jit": lambda f: nn.jit(lambda x: jax.grad(lambda x: f(x).sum())(x))(X),
}


@pytest.mark.parametrize("how", LEGAL)
def test_a_draw_under_an_autodiff_trace_advances_the_stream_by_one(how):
    nn.manual_seed(5)
    draw()
    expected = np.asarray(nn.default_generator.get_state())
    nn.manual_seed(5)
    LEGAL[how](Noise())
    np.testing.assert_array_equal(np.asarray(nn.default_generator.get_state()), expected)


def vmapped(randomness):
    return np.asarray(
        nn.vmap(lambda m, x: m(x), in_axes=(None, 0), randomness=randomness)(
            Noise(), jnp.zeros((3, 8))
        )
    )


def test_nn_vmap_gives_each_lane_its_own_numbers_by_default():
    out = np.asarray(nn.vmap(lambda m, x: m(x), in_axes=(None, 0))(Noise(), jnp.zeros((3, 8))))
    assert len({tuple(row) for row in out}) == 3


def test_nn_vmap_same_gives_every_lane_the_same_numbers():
    out = vmapped("same")
    assert len({tuple(row) for row in out}) == 1
    assert not np.array_equal(out, vmapped("same"))


def test_nn_vmap_error_forbids_drawing():
    with pytest.raises((nn.MissingRngError, RuntimeError)):
        vmapped("error")


def test_nn_vmap_refuses_another_word():
    with pytest.raises(ValueError, match="sometimes"):
        vmapped("sometimes")


def test_nn_vmap_advances_the_stream():
    assert not np.array_equal(vmapped("different"), vmapped("different"))


def test_nn_scan_draws_anew_in_each_step():
    _, ys = nn.scan(lambda m, x: (m, m(x)), Noise(), jnp.zeros((4, 8)))
    assert len({tuple(row) for row in np.asarray(ys)}) == 4


def test_nn_remat_draws_the_same_numbers_in_the_recomputation():
    """With y = x * u and loss sum(y^2) / 2: d/dx = x * u^2, so value and gradient must share u."""

    class Times(nn.Module):
        def forward(self, x):
            return x * jax.random.uniform(next_key(), x.shape)

    x = jnp.ones(8)
    m = Times()

    def loss(x):
        return 0.5 * jnp.sum(nn.remat(lambda m, x: m(x))(m, x) ** 2)

    value, grad = jax.value_and_grad(loss)(x)
    np.testing.assert_allclose(float(value), 0.5 * float(jnp.sum(grad)), rtol=1e-5)


def test_rng_scope_sets_the_stream_and_ends_with_the_block(key):
    before = np.asarray(nn.default_generator.get_state())
    with nn.rng_scope(key):
        first = draw(), draw()
    with nn.rng_scope(key):
        again = draw(), draw()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    np.testing.assert_array_equal(np.asarray(nn.default_generator.get_state()), before)


def test_rng_scope_ends_after_an_exception(key):
    before = np.asarray(nn.default_generator.get_state())
    with pytest.raises(ValueError), nn.rng_scope(key):
        raise ValueError
    draw()
    assert not np.array_equal(np.asarray(nn.default_generator.get_state()), before)


def test_rng_scope_nests(key):
    with nn.rng_scope(key):
        first = draw()
        with nn.rng_scope(jax.random.key(7)):
            draw()
        second = draw()
    with nn.rng_scope(key):
        np.testing.assert_array_equal(draw(), first)
        np.testing.assert_array_equal(draw(), second)


def test_rng_scope_with_a_traced_key_makes_draws_legal_under_raw_transforms(key):
    def f(k):
        with nn.rng_scope(k):
            return Noise()(X)

    eager = np.asarray(f(key))
    np.testing.assert_array_equal(np.asarray(jax.jit(f)(key)), eager)
    keys = jax.random.split(key, 3)
    out = np.asarray(jax.vmap(f)(keys))
    assert len({tuple(row) for row in out}) == 3


def test_rng_scope_is_of_one_thread(key):
    results = {}

    def work(i):
        with nn.rng_scope(jax.random.key(i)):
            results[i] = [draw() for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        with nn.rng_scope(jax.random.key(i)):
            np.testing.assert_array_equal([draw() for _ in range(3)], results[i])


def test_generators_follow_seed_and_state():
    a, b = nn.Generator(3), nn.Generator(3)
    assert np.array_equal(jax.random.key_data(a.next_key()), jax.random.key_data(b.next_key()))
    state = a.get_state()
    first = jax.random.key_data(a.next_key())
    a.set_state(state)
    np.testing.assert_array_equal(jax.random.key_data(a.next_key()), first)
    assert a.manual_seed(5) is a
    assert a.initial_seed() == 5


def test_keys_of_a_stream_are_all_different_and_well_spread():
    g = nn.Generator(0)
    keys = {tuple(np.asarray(jax.random.key_data(g.next_key())).tolist()) for _ in range(200)}
    assert len(keys) == 200
    values = np.asarray([jax.random.uniform(nn.Generator(s).next_key()) for s in range(64)])
    assert abs(values.mean() - 0.5) < 0.15  # 4 sigma of the mean of 64 uniforms


def test_deepcopy_and_pickle_continue_the_same_stream():
    m = OwnNoise()
    draw(m)
    copies = copy.deepcopy(m.generator), pickle.loads(pickle.dumps(m.generator))
    expected = jax.random.key_data(m.generator.next_key())
    for g in copies:
        np.testing.assert_array_equal(jax.random.key_data(g.next_key()), expected)


def test_members_built_by_nn_vmap_differ():
    def build(seed):
        return jax.random.normal(next_key(), (3,))

    members = np.asarray(nn.vmap(build)(jnp.arange(4)))
    assert len({tuple(row) for row in members}) == 4


def test_a_draw_under_raw_vmap_over_a_constructor_raises():
    with pytest.raises(nn.MissingRngError):
        jax.vmap(lambda i: jax.random.normal(next_key(), (3,)))(jnp.arange(4))


def test_a_key_of_the_wrong_kind_is_an_error():
    for wrong in ("text", 1.5, jnp.ones(3)):
        with pytest.raises((TypeError, ValueError, nn.StatefulnnError)):
            nn.functional_call(Noise(), {}, (X,), rng=wrong)


def test_a_stateful_transform_inside_raw_vmap_may_not_draw_from_outside():
    # The draw itself is legal where it happens; putting the generator back is what all lanes would share.
    drop = nn.Dropout(0.5)
    for inner in (
        lambda x: nn.grad(lambda x: drop(x).sum())(x),
        lambda x: nn.remat(lambda m, x: m(x))(drop, x),
        lambda x: nn.scan(lambda c, _: (c, drop(c)), x, length=2)[1],
    ):
        with pytest.raises(nn.MissingRngError):
            jax.vmap(inner)(jnp.ones((3, 4)))


def test_inside_of_a_compiled_function_the_default_generator_is_the_one_in_force():
    @nn.jit
    def f(x):
        before = nn.get_rng_state()
        _ = nn.next_key()
        return before, nn.get_rng_state()

    for seed in (3, 4):
        nn.manual_seed(seed)
        expected = np.asarray(nn.get_rng_state())
        before, after = f(X)
        np.testing.assert_array_equal(np.asarray(before), expected)
        np.testing.assert_array_equal(np.asarray(after), np.asarray(nn.get_rng_state()))
    assert f.trace_count == 1


def test_a_seed_that_is_set_inside_of_a_compiled_function_is_kept():
    nn.jit(lambda x: (nn.manual_seed(7), x)[1])(X)
    state = np.asarray(nn.get_rng_state())
    nn.manual_seed(7)
    np.testing.assert_array_equal(state, np.asarray(nn.get_rng_state()))


def test_the_seed_of_an_argument_is_not_known():
    with pytest.raises(nn.MissingRngError, match="get_state"):
        nn.jit(lambda x: x * nn.initial_seed())(X)


@pytest.mark.parametrize("compiled", [nn.jit, jax.jit], ids=["nn.jit", "jax.jit"])
@pytest.mark.parametrize("change", ["manual_seed", "set_state", "next_key"])
@pytest.mark.parametrize("read", ["get_state", "initial_seed"])
def test_a_state_that_became_a_constant_is_said_when_it_changes(read, change, compiled):
    g = nn.Generator(1)
    compiled(lambda x: x * jnp.sum(jnp.asarray(getattr(g, read)(), X.dtype)))(X)
    other = np.asarray(nn.Generator(2).get_state())
    with pytest.warns(nn.StaleCaptureWarning):
        getattr(g, change)(*{"manual_seed": (2,), "set_state": (other,)}.get(change, ()))
