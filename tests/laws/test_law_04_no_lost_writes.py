"""Law 4: no write is lost silently: clones of raw transforms are read-only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn
from statefulnn.core.generator import next_key


class Norm(nn.Module):
    """Running mean, as BatchNorm."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(jnp.ones(2))
        self.register_buffer("running_mean", jnp.zeros(2))
        self.window = 3

    def forward(self, x):
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * x
        return (x - self.running_mean) * self.scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm()
        self.history = []

    def forward(self, x):
        return self.norm(x)


X = jnp.asarray([1.0, 2.0])


def warned(run):
    """Take a gradient of the whole module, which has a place for the running mean: that warns."""

    def run_and_see(f, m):
        with pytest.warns(nn.UntrainedLeavesWarning, match="running_mean"):
            return run(f, m)

    return run_and_see


RAW = {
    "jit": lambda f, m: jax.jit(f)(m),
    "grad": warned(lambda f, m: jax.grad(lambda m: (f(m), m.norm.scale.value.sum())[1])(m)),
    "vmap": lambda f, m: jax.vmap(lambda m: (f(m), m.norm.scale.value)[1])(
        jax.tree.map(lambda a: jnp.stack([a, a]), m)
    ),
    "vmap, in_axes None": lambda f, m: jax.vmap(lambda m, x: (f(m), x)[1], in_axes=(None, 0))(
        m, jnp.ones(3)
    ),
    "checkpoint": lambda f, m: jax.checkpoint(lambda m: (f(m), X)[1])(m),
    "checkpoint under grad": warned(
        lambda f, m: jax.grad(jax.checkpoint(lambda m: (f(m), m.norm.scale.value.sum())[1]))(m)
    ),
    "scan, as carry": lambda f, m: jax.lax.scan(
        lambda m, _: (f(m), (m, None))[1], m, None, length=2
    ),
    "cond": lambda f, m: jax.lax.cond(True, lambda m: (f(m), X)[1], lambda m: X, m),
    "jvp": lambda f, m: jax.jvp(lambda m: (f(m), m.norm.scale.value)[1], (m,), (m,)),
    "vjp": warned(lambda f, m: jax.vjp(lambda m: (f(m), m.norm.scale.value)[1], m)),
    "eval_shape": lambda f, m: jax.eval_shape(lambda m: (f(m), X)[1], m),
    "make_jaxpr": lambda f, m: jax.make_jaxpr(lambda m: (f(m), X)[1])(m),
    "jit of vmap": lambda f, m: jax.jit(lambda m: jax.vmap(lambda x: (f(m), x)[1])(jnp.ones(2)))(m),
}


def _write_static(m):
    m.norm.window = 4


def _new_static(m):
    m.norm.note = "seen"


def _write_buffer(m):
    m.norm.running_mean = X


def _write_parameter(m):
    m.norm.scale.value = X


def _write_data(m):
    m.norm.scale.data = X


def _write_item(m):
    m.norm.scale[0] = 5.0


def _augmented(m):
    m.norm.scale.value += 1.0


def _delete(m):
    del m.norm.window


def _new_parameter(m):
    m.norm.shift = nn.Parameter(jnp.zeros(2))


def _replace_parameter(m):
    m.norm.scale = nn.Parameter(jnp.zeros(2))


def _new_buffer(m):
    m.norm.register_buffer("count", jnp.zeros(()))


def _new_child(m):
    m.norm.inner = nn.Module()


def _none_child(m):
    m.norm = None


WRITES = {
    "forward in training mode": (lambda m: m(X), "norm.running_mean"),
    "buffer": (_write_buffer, "norm.running_mean"),
    "parameter": (_write_parameter, "norm.scale"),
    "parameter data": (_write_data, "norm.scale"),
    "augmented": (_augmented, "norm.scale"),
    "static": (_write_static, "window"),
    "new static": (_new_static, "note"),
    "delete": (_delete, "window"),
    "eval": (lambda m: m.eval(), "training"),
    "requires_grad_": (lambda m: m.requires_grad_(False), "scale"),
    "new parameter": (_new_parameter, "shift"),
    "replaced parameter": (_replace_parameter, "scale"),
    "new buffer": (_new_buffer, "count"),
    "new child": (_new_child, "inner"),
    "child to None": (_none_child, "norm"),
    "hook": (lambda m: m.norm.register_forward_hook(lambda *a: None), ""),
    "half": (lambda m: m.half(), "norm"),
    "load_state_dict": (lambda m: m.load_state_dict(Net().state_dict()), "norm"),
}


@pytest.mark.parametrize("raw", RAW)
def test_a_norm_in_training_mode_under_a_raw_transform_raises(raw):
    m = Net()
    with pytest.raises(nn.StateWriteError, match="running_mean"):
        RAW[raw](lambda m: m(X), m)
    np.testing.assert_array_equal(np.asarray(m.norm.running_mean), [0.0, 0.0])


@pytest.mark.parametrize("raw", RAW)
def test_the_same_norm_in_eval_mode_is_fine(raw):
    RAW[raw](lambda m: m(X), Net().eval())


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("raw", ["jit", "grad", "vmap, in_axes None"])
def test_every_kind_of_write_raises_and_names_its_target(raw, write):
    m = Net()
    before = repr(m), dict(vars(m.norm)), [id(p.value) for p in m.parameters()]
    action, name = WRITES[write]
    with pytest.raises(nn.StateWriteError) as info:
        RAW[raw](action, m)
    assert name in str(info.value)
    assert before == (repr(m), dict(vars(m.norm)), [id(p.value) for p in m.parameters()])


@pytest.mark.parametrize(
    "way_out", ["nn.jit", "functionalize", "mutable=True", "eval()", "nn.mutable"]
)
def test_the_message_names_the_ways_out(way_out):
    with pytest.raises(nn.StateWriteError) as info:
        jax.jit(lambda m: m(X))(Net())
    assert way_out in str(info.value)


def test_jax_jit_of_the_model_itself_raises_too():
    m = Net()
    with pytest.raises(nn.StatefulnnError):
        jax.jit(m)(X)
    np.testing.assert_array_equal(np.asarray(m.norm.running_mean), [0.0, 0.0])


def test_an_in_place_change_of_a_list_on_a_read_only_clone_does_not_reach_the_user():
    m = Net()
    try:
        jax.jit(lambda m: (m.history.append(1), X)[1])(m)
    except nn.StatefulnnError:
        pass
    assert m.history == []


def test_a_write_that_changes_nothing_is_no_write():
    m = Net().eval()
    jax.jit(lambda m: m.eval()(X))(m)
    m.train()
    jax.jit(lambda m: (m.train(), X)[1])(m)


def test_a_draw_inside_a_module_s_own_generator_under_raw_jit_raises():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = nn.Generator(0)

        def forward(self, x):
            return x + jax.random.normal(self.generator.next_key(), x.shape)

    m = Noise()
    before = np.asarray(m.generator.get_state())
    with pytest.raises((nn.StateWriteError, nn.MissingRngError)):
        jax.jit(lambda m, x: m(x))(m, X)
    np.testing.assert_array_equal(np.asarray(m.generator.get_state()), before)


def test_a_draw_from_the_default_generator_under_raw_jit_raises():
    with pytest.raises(nn.MissingRngError):
        jax.jit(lambda x: x + jax.random.normal(next_key(), x.shape))(X)


def test_nn_mutable_makes_the_write_legal_and_the_result_carries_it():
    @jax.jit
    def f(m, x):
        m = nn.mutable(m)
        y = m(x)
        m.eval()
        return y, m

    m = Net()
    y, new = f(m, X)
    np.testing.assert_allclose(np.asarray(new.norm.running_mean), 0.1 * np.asarray(X))
    np.testing.assert_allclose(np.asarray(y), 0.9 * np.asarray(X))
    assert not new.training
    assert m.training
    np.testing.assert_array_equal(np.asarray(m.norm.running_mean), [0.0, 0.0])


def test_a_result_of_a_raw_transform_can_be_written_outside():
    new = jax.jit(lambda m: m)(Net())
    new(X)
    new.eval()
    np.testing.assert_allclose(np.asarray(new.norm.running_mean), 0.1 * np.asarray(X))


def test_a_clone_made_outside_any_trace_can_be_written():
    new = jax.tree.map(lambda x: x, Net())
    new(X)
    np.testing.assert_allclose(np.asarray(new.norm.running_mean), 0.1 * np.asarray(X))


def test_a_clone_made_by_our_own_merge_inside_a_trace_can_be_written():
    moduledef, leaves = nn.split(Net())

    @jax.jit
    def f(leaves, x):
        m = nn.merge(moduledef, leaves)
        return m(x), nn.split(m)[1]

    y, new = f(leaves, X)
    np.testing.assert_allclose(
        np.asarray(nn.merge(moduledef, new).norm.running_mean), 0.1 * np.asarray(X)
    )
    np.testing.assert_allclose(np.asarray(y), 0.9 * np.asarray(X))


def test_a_module_built_inside_a_raw_trace_can_be_written_there():
    @jax.jit
    def f(x):
        m = Net()
        m(x)
        return m.norm.running_mean

    np.testing.assert_allclose(np.asarray(f(X)), 0.1 * np.asarray(X))


def test_a_deepcopy_of_a_read_only_clone_inside_the_trace_loses_nothing_silently():
    import copy

    def f(m, x):
        c = copy.deepcopy(m)
        c(x)
        return c.norm.running_mean

    # The copy is the user's own object: what it is written is in what the function returns.
    try:
        out = jax.jit(f)(Net(), X)
    except nn.StatefulnnError:
        return
    np.testing.assert_allclose(np.asarray(out), 0.1 * np.asarray(X))


def test_the_same_function_raises_again_at_the_second_call():
    f = jax.jit(lambda m: m(X))
    for _ in range(2):
        with pytest.raises(nn.StateWriteError):
            f(Net())


def test_a_swallowed_error_leaves_the_clone_as_it_was():
    @jax.jit
    def f(m):
        try:
            m.norm.running_mean = X
        except nn.StateWriteError:
            pass
        return m.norm.running_mean

    np.testing.assert_array_equal(np.asarray(f(Net())), [0.0, 0.0])
