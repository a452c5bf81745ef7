"""Traps that are silent in the libraries users come from: here each works as meant, or raises.

Each was seen to give neither an error nor a warning in Flax NNX, Equinox, Keras, torchax, torch.func
or torch.nn; they are numbered in the order in which they were collected.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
from statefulnn.core.generator import next_key


class Affine(nn.Module):
    def __init__(self, n_in=2, n_out=2, value=1.0):
        super().__init__()
        self.weight = nn.Parameter(jnp.full((n_out, n_in), value))
        self.bias = nn.Parameter(jnp.zeros(n_out))

    def forward(self, x):
        return x @ self.weight.value.T + self.bias


class Norm(nn.Module):
    def __init__(self, n=2):
        super().__init__()
        self.scale = nn.Parameter(jnp.ones(n))
        self.register_buffer("running_mean", jnp.zeros(n))

    def forward(self, x):
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0)
            return (x - x.mean(0)) * self.scale
        return (x - self.running_mean) * self.scale


class Drop(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        keep = jax.random.bernoulli(next_key(), 1 - self.p, x.shape)
        return jnp.where(keep, x / (1 - self.p), 0.0)


X = jnp.asarray([[1.0, 2.0], [3.0, 6.0]])


def mse(m, x=X):
    return jnp.mean(m(x) ** 2)


def test_trap_01_a_raw_jit_train_step_that_updates_in_place_raises():
    m = Affine()

    @jax.jit
    def step(m):
        value, grads = jax.value_and_grad(mse)(m)
        m.weight.value = m.weight - 0.1 * grads.weight
        return value

    with pytest.raises(nn.StateWriteError, match="weight"):
        step(m)


def test_trap_01_with_nn_jit_and_an_optimizer_the_loss_goes_down():
    m = Affine()
    opt = nn.Optimizer(m, optax.adam(0.05))

    @nn.jit
    def step(m, opt):
        value, grads = nn.value_and_grad(mse)(m)
        opt.step(grads)
        return value

    losses = [float(step(m, opt)) for _ in range(5)]
    assert all(b < a for a, b in zip(losses, losses[1:], strict=False))
    # the first Adam step moves every weight by the learning rate, against the gradient's sign
    again = Affine()
    nn.jit(step)(again, nn.Optimizer(again, optax.adam(0.05)))
    np.testing.assert_allclose(np.asarray(again.weight), 0.95, rtol=1e-4)


@pytest.mark.parametrize(
    "raw",
    [
        lambda m: jax.jit(lambda m, x: m(x))(m, X),
        pytest.param(
            lambda m: jax.grad(mse)(m),
            marks=pytest.mark.filterwarnings("ignore::statefulnn.UntrainedLeavesWarning"),
        ),
        lambda m: jax.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, X[None]),
        lambda m: jax.checkpoint(lambda m, x: m(x))(m, X),
    ],
    ids=["jit", "grad", "vmap", "checkpoint"],
)
def test_trap_02_running_statistics_are_never_left_behind_silently(raw):
    with pytest.raises(nn.StateWriteError, match="running_mean"):
        raw(Norm())


@pytest.mark.parametrize("wrap", [nn.jit, nn.remat])
def test_trap_02_running_statistics_change_under_the_stateful_transforms(wrap):
    m = Norm()
    wrap(lambda m, x: m(x))(m, X)
    np.testing.assert_allclose(np.asarray(m.running_mean), [0.2, 0.4], rtol=1e-6)


def test_trap_03_dropout_in_raw_jit_raises_and_in_nn_jit_draws_new_masks():
    m = Drop()
    x = jnp.ones(64)
    with pytest.raises(nn.MissingRngError):
        jax.jit(lambda m, x: m(x))(m, x)
    f = nn.jit(lambda m, x: m(x))
    assert not np.array_equal(np.asarray(f(m, x)), np.asarray(f(m, x)))


def test_trap_04_maml_with_functionalize_leaves_the_meta_parameters_alone():
    m = Affine()
    fn, params = nn.functionalize(m)

    def adapted_loss(params):
        grads = jax.grad(lambda p: jnp.mean(fn(p, X) ** 2))(params)
        fast = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
        return jnp.mean(fn(fast, X) ** 2)

    grads = jax.grad(adapted_loss)(params)
    np.testing.assert_array_equal(np.asarray(m.weight), np.ones((2, 2)))
    eps = 1e-2
    shifted = [{**params, "bias": params["bias"] + s * jnp.asarray([eps, 0.0])} for s in (1, -1)]
    numeric = (adapted_loss(shifted[0]) - adapted_loss(shifted[1])) / (2 * eps)
    np.testing.assert_allclose(float(grads["bias"][0]), float(numeric), rtol=1e-2)


def test_trap_04_an_in_place_inner_step_under_a_raw_outer_gradient_raises():
    m = Affine()

    def outer(scale):
        grads = nn.grad(lambda m: scale * mse(m))(m)
        m.weight.value = m.weight - 0.1 * grads["weight"]
        return mse(m)

    with pytest.raises(nn.TraceLeakError, match="weight"):
        jax.grad(outer)(1.0)
    np.testing.assert_array_equal(np.asarray(m.weight), np.ones((2, 2)))


@pytest.mark.parametrize(
    "snapshot",
    [
        lambda m: m.state_dict(),
        lambda m: nn.functionalize(m)[1],
        lambda m: dict(enumerate(nn.split(m)[1])),
        lambda m: jax.tree.map(lambda x: x, m).state_dict(),
    ],
    ids=["state_dict", "functionalize", "split", "tree.map"],
)
def test_trap_05_a_snapshot_does_not_follow_the_live_model(snapshot):
    m = Affine()
    best = snapshot(m)
    before = {k: np.array(v) for k, v in best.items()}
    m.weight.value = m.weight * 2
    nn.jit(lambda m: setattr(m.bias, "value", m.bias + 1))(m)
    for k, v in best.items():
        np.testing.assert_array_equal(np.asarray(v), before[k])


def test_trap_06_assigning_an_array_over_a_parameter_raises():
    m = Affine()
    with pytest.raises(TypeError, match="weight"):
        m.weight = m.weight * 0.9
    assert isinstance(m.weight, nn.Parameter)


def test_trap_07_a_jitted_closure_warns_when_the_weights_change():
    m = Affine()
    f = jax.jit(lambda x: m(x))
    f(X)
    with pytest.warns(nn.StaleCaptureWarning, match="weight"):
        m.weight.value = m.weight * 2


def test_trap_07_a_jitted_closure_is_not_left_in_the_old_mode_in_silence():
    m = Drop()
    m.eval()
    m.scale = 1.0
    f = jax.jit(lambda x: m(x))
    np.testing.assert_array_equal(np.asarray(f(X)), np.asarray(X))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            m.train()
            f(X)
        except nn.StatefulnnError:
            return
    assert caught


def test_trap_08_a_loss_that_reads_the_outer_model_raises():
    m = Affine()
    with pytest.raises(nn.UnusedModuleError):
        nn.grad(lambda model: mse(m))(m)


@pytest.mark.parametrize("kind", ["list", "dict", "object"])
@pytest.mark.parametrize("jit", [nn.jit, jax.jit], ids=["nn.jit", "jax.jit"])
def test_trap_09_a_changed_list_dict_or_config_is_seen(jit, kind):
    import dataclasses

    @dataclasses.dataclass
    class Config:
        factor: float = 1.0

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"list": [1.0], "dict": {"k": 1.0}, "object": Config()}[kind]

        def forward(self, x):
            c = self.config
            return x * (c[0] if kind == "list" else c["k"] if kind == "dict" else c.factor)

    m = Net()
    f = jit(lambda m, x: m(x))
    f(m, X)
    if kind == "list":
        m.config[0] = 3.0
    elif kind == "dict":
        m.config["k"] = 3.0
    else:
        m.config.factor = 3.0
    np.testing.assert_array_equal(np.asarray(f(m, X)), 3 * np.asarray(X))


def test_trap_10_modules_appended_to_a_plain_list_raise():
    m = Affine()
    m.layers = []
    m.layers.append(Affine())
    with pytest.raises(nn.RegistrationError, match="layers"):
        nn.Optimizer(m, optax.sgd(0.1))
    with pytest.raises(nn.RegistrationError, match="layers"):
        nn.split(m)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("bias"),
        lambda s: s.update(extra=jnp.ones(1)),
        lambda s: s.update(weight=jnp.ones((3, 3))),
        lambda s: s.update(weight=jnp.ones((2, 2), jnp.complex64)),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_trap_11_a_checkpoint_that_does_not_fit_raises(change):
    m = Affine()
    state = m.state_dict()
    change(state)
    with pytest.raises(nn.StateDictError):
        m.load_state_dict(state)


def test_trap_12_tied_weights_stay_tied_and_count_once():
    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Affine()
            self.b = Affine()
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    m = Auto()
    for again in (jax.tree.map(lambda x: x, m), jax.jit(lambda m: m)(m), jax.grad(mse)(m)):
        assert again.a.weight is again.b.weight
        assert len(jax.tree.leaves(again)) == 3


@pytest.mark.parametrize("how", ["nn.vmap", "jax.vmap"])
def test_trap_13_an_ensemble_built_by_vmapping_the_constructor_has_different_members(how):
    def build(i):
        return jax.random.normal(next_key(), (4,))

    try:
        members = (nn.vmap if how == "nn.vmap" else jax.vmap)(build)(jnp.arange(3))
    except nn.MissingRngError:
        assert how == "jax.vmap"
    else:
        assert len({tuple(r) for r in np.asarray(members)}) == 3


def test_trap_14_dropout_over_a_vmapped_batch_has_a_mask_for_each_row():
    x = jnp.ones((4, 32))
    m = Drop()
    with pytest.raises(nn.MissingRngError):
        jax.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, x)
    out = np.asarray(nn.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, x))
    assert len({tuple(r) for r in out}) == 4


def test_trap_15_a_number_that_changes_at_every_step_warns_and_is_named():
    m = Drop()
    m.eval()
    f = nn.jit(lambda m, x: m(x))
    with pytest.warns(nn.RetraceWarning, match="'?p'?"):
        for i in range(12):
            m.p = 0.01 * i
            f(m, X)


def test_trap_16_equal_models_optimizers_and_lambdas_compile_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = Affine()
            self.act = lambda x: jnp.tanh(x)

        def forward(self, x):
            return self.act(self.fc(x))

    @nn.jit
    def step(m, opt, x):
        opt.step(nn.grad(lambda m: jnp.mean(m(x) ** 2))(m))

    for _ in range(3):
        m = Net()
        step(m, nn.Optimizer(m, optax.adam(0.1)), X)
    assert step.trace_count == 1


@pytest.mark.parametrize("jit", [nn.jit, jax.jit], ids=["nn.jit", "jax.jit"])
@pytest.mark.parametrize(
    "change", [lambda m: m.eval(), lambda m: setattr(m, "note", 1)], ids=["eval", "attribute"]
)
def test_trap_17_eval_or_a_new_attribute_inside_a_compiled_function_raises(jit, change):
    m = Drop()
    with pytest.raises(nn.StatefulnnError):
        jit(lambda m: (change(m), X)[1])(m)
    assert m.training
    assert not hasattr(m, "note")


def test_trap_18_a_gradient_does_not_contain_the_statistics():
    m = Norm()
    assert list(nn.grad(mse)(m)) == ["scale"]
    assert list(nn.functionalize(m)[1]) == ["scale"]


def test_trap_19_a_gradient_of_nothing_raises():
    m = Affine().requires_grad_(False)
    with pytest.raises((nn.StatefulnnError, ValueError)):
        nn.grad(mse)(m)


def test_trap_19_an_optimizer_of_nothing_raises():
    with pytest.raises((nn.StatefulnnError, ValueError)):
        nn.Optimizer(Affine().requires_grad_(False), optax.sgd(0.1))


def test_trap_20_one_layer_under_two_attributes_is_one_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Affine()
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    m = Net()
    opt = nn.Optimizer(m, optax.sgd(0.01))
    for _ in range(2):
        nn.jit(lambda m, opt: opt.step(nn.grad(mse)(m)))(m, opt)
    assert m.first is m.second
    clone = nn.merge(*nn.split(m))
    assert clone.first.weight is clone.second.weight
    again = Net()
    again.load_state_dict(m.state_dict())
    np.testing.assert_array_equal(np.asarray(again.second.weight), np.asarray(m.first.weight))


def test_trap_21_reordered_fields_load_by_name_and_renamed_ones_raise():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Affine(value=1.0), Affine(value=2.0)

    class Reordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = Affine(value=0.0), Affine(value=0.0)

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = Affine(), Affine()

    m = Reordered()
    m.load_state_dict(One().state_dict())
    assert float(m.a.weight[0, 0]) == 1.0
    assert float(m.b.weight[0, 0]) == 2.0
    with pytest.raises(nn.StateDictError, match=r"c\.weight"):
        Renamed().load_state_dict(One().state_dict())


def test_trap_22_a_checkpoint_does_not_overwrite_rate_or_mode():
    source, target = Drop(0.1), Drop(0.7).eval()
    target.load_state_dict(source.state_dict())
    assert target.p == 0.7
    assert not target.training


@pytest.mark.parametrize("frozen", ["buffer", "parameter"])
def test_trap_23_weight_decay_does_not_move_what_is_not_trained(frozen):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(jnp.ones(2))
            if frozen == "buffer":
                self.register_buffer("fixed", jnp.ones(2))
            else:
                self.fixed = nn.Parameter(jnp.ones(2), requires_grad=False)

        def forward(self, x):
            return x * self.w + self.fixed

    m = Net()
    opt = nn.Optimizer(m, optax.adamw(0.1, weight_decay=0.5))
    opt.step(nn.grad(mse)(m))
    np.testing.assert_array_equal(np.asarray(m.fixed), [1.0, 1.0])
    assert not np.array_equal(np.asarray(m.w), [1.0, 1.0])


def test_trap_24_integer_weights_cannot_be_trainable():
    with pytest.raises(RuntimeError):
        nn.Parameter(jnp.arange(3))


def test_trap_25_a_layer_in_the_closure_of_a_function_attribute_raises():
    m = nn.Module()
    layer = Affine()
    with pytest.raises(nn.RegistrationError):
        m.head = lambda x: layer(x)
        nn.split(m)


def test_trap_26_a_functional_call_with_a_shared_submodule_leaves_the_module_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Affine()
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    m = Net()
    box, value = m.first.weight, m.first.weight.value
    out = nn.functional_call(m, {"second.weight": jnp.zeros((2, 2))}, (X,))
    np.testing.assert_array_equal(np.asarray(out), np.zeros((2, 2)))
    assert m.first.weight is box
    assert box.value is value


def test_trap_27_a_buffer_that_forward_reassigns_comes_back_or_raises():
    m = Norm()
    state = {"scale": jnp.ones(2), "running_mean": jnp.ones(2)}
    with pytest.raises(nn.StateWriteError, match="running_mean"):
        nn.functional_call(m, state, (X,))
    _, new = nn.functional_call(m, state, (X,), mutable=True)
    np.testing.assert_allclose(np.asarray(new["running_mean"]), [1.1, 1.3], rtol=1e-6)


def test_trap_28_a_typo_in_a_name_raises():
    with pytest.raises(nn.UnknownNameError, match="wieght"):
        nn.functional_call(Affine(), {"wieght": jnp.ones((2, 2))}, (X,))


def test_trap_29_a_python_counter_in_forward_does_not_leak():
    class Net(Affine):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    m = Net()
    with pytest.raises(nn.StatefulnnError, match="calls"):
        nn.functional_call(m, {}, (X,))
    assert m.calls == 0


def test_trap_30_a_hook_that_stores_its_output_under_vmap_raises():
    m = Affine()
    m.register_forward_hook(lambda m, args, out: setattr(m, "activation", out))
    for vmap in (jax.vmap, nn.vmap):
        with pytest.raises(nn.StatefulnnError, match="activation"):
            vmap(m)(X)
        assert not hasattr(m, "activation")


def test_trap_31_backward_hooks_work_under_grad():
    seen = []
    m = Affine()
    m.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].shape))
    nn.grad(mse)(m)
    jax.grad(lambda p: jnp.mean(nn.functional_call(m, p, (X,)) ** 2))(nn.functionalize(m)[1])
    assert seen == [(2, 2), (2, 2)]


def test_trap_32_jax_jit_of_a_model_leaves_no_tracer_behind():
    m = Norm()
    with pytest.raises(nn.StatefulnnError):
        jax.jit(m)(X)
    assert not any(isinstance(b, jax.core.Tracer) for b in m.buffers())
    m.eval()
    np.testing.assert_array_equal(np.asarray(jax.jit(m)(X)), np.asarray(X))


def test_trap_33_arrays_are_matched_by_name_never_by_position():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(jnp.zeros(2))
            self.b = nn.Parameter(jnp.ones(2))

        def forward(self, x):
            return self.a + 10 * self.b

    given = {"b": jnp.full(2, 2.0), "a": jnp.full(2, 1.0)}
    np.testing.assert_array_equal(np.asarray(nn.functional_call(Net(), given, (X,))), [21.0, 21.0])
    with pytest.raises(TypeError):
        nn.functional_call(Net(), list(given.values()), (X,))


def test_trap_34_running_statistics_update_in_eager_code():
    m = Norm()
    m(X)
    np.testing.assert_allclose(np.asarray(m.running_mean), [0.2, 0.4], rtol=1e-6)


def test_trap_35_a_plain_list_of_modules_raises():
    with pytest.raises(nn.RegistrationError, match="layers"):
        nn.Module().layers = [Affine(), Affine()]


def test_trap_36_audit_lists_unused_frozen_and_zero_gradient_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Affine()
            self.w = nn.Parameter(jnp.ones(2))
            self.never = nn.Parameter(jnp.ones(2))
            self.frozen = nn.Parameter(jnp.ones(2), requires_grad=False)
            self.dead = nn.Parameter(jnp.ones(2))

        def forward(self, x):
            out = self.mlp(x)  # computed and overwritten
            out = self.w * x + self.frozen
            return out + 0.0 * self.dead

    report = nn.audit(Net(), X)
    assert report.frozen == ["frozen"]
    assert "never" in report.unused
    silent = {*report.unused, *report.zero_grad}
    assert {"mlp.weight", "mlp.bias", "never", "dead"} <= silent
    assert "w" not in silent
