"""nn.shard_map on eight devices beside the same computation on one, and on a mesh of one device."""

from __future__ import annotations

import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import statefulnn as nn
from tests.devices import failures_on_devices

HEADER = textwrap.dedent("""
    import warnings
    warnings.simplefilter("error")
    import jax, jax.numpy as jnp, numpy as np, optax, pytest
    from jax.experimental import checkify
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    import statefulnn as nn
    mesh = Mesh(np.array(jax.devices()), ("d",))
    assert mesh.size == 8
    everywhere = NamedSharding(mesh, P())
    def close(got, expected, rtol=1e-5):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=rtol, atol=1e-6)
""")

mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
everywhere = NamedSharding(mesh, P())


def close(got, expected, rtol=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=rtol, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Programs that need several devices: they run in one process that has eight


def batch_norm_over_all_devices_is_that_of_the_whole_batch():
    def network(norm):
        nn.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 1))

    x = jax.random.normal(jax.random.key(0), (32, 3))
    for wrap in (lambda f: f, nn.jit):
        one = network(nn.BatchNorm1d(4))
        many = network(nn.SyncBatchNorm(4, axis_name="d")).to(everywhere)
        f = wrap(
            nn.shard_map(lambda m, x: m(x), mesh=mesh, in_specs=(None, P("d")), out_specs=P("d"))
        )
        for calls in (1, 2):
            close(f(many, x), one(x))
            close(many[1].running_mean, one[1].running_mean)
            close(many[1].running_var, one[1].running_var)
            assert int(many[1].num_batches_tracked) == calls
        assert many[1].running_mean.sharding.is_fully_replicated
        assert getattr(f, "trace_count", 1) == 1

    # Without the axis each device has another mean: that is found, whether compiled or not.
    apart = network(nn.BatchNorm1d(4))
    before = np.asarray(apart[1].running_mean)
    for wrap in (lambda f: f, nn.jit):
        f = nn.shard_map(lambda m, x: m(x), mesh=mesh, in_specs=(None, P("d")), out_specs=P("d"))
        with pytest.raises(
            nn.StateWriteError, match=r"running_mean' under nn.shard_map(.|\n)*pmean"
        ):
            wrap(f)(apart, x)
        np.testing.assert_array_equal(apart[1].running_mean, before)
    apart.eval()
    close(nn.shard_map(apart, mesh=mesh, in_specs=P("d"), out_specs=P("d"))(x), apart(x))


def gradients_and_training_steps_are_those_of_one_device():
    x = jax.random.normal(jax.random.key(0), (16, 3))
    y = jnp.sin(x[:, :1])

    def network():
        nn.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        return model, nn.Optimizer(model, optax.adam(0.05))

    def loss(model, x, y):
        return jnp.mean((model(x) - y) ** 2)

    def mean_loss(model, x, y):
        return jax.lax.pmean(loss(model, x, y), "d")

    specs = {"mesh": mesh, "in_specs": (None, P("d"), P("d")), "out_specs": P()}
    model, _ = network()
    expected = nn.grad(loss)(model, x, y)
    inside = nn.shard_map(nn.grad(mean_loss), **specs)
    outside = nn.grad(nn.shard_map(mean_loss, **specs))
    for g in (inside, nn.jit(outside)):
        got = g(model, x, y)
        assert got.keys() == expected.keys()
        for name in expected:
            close(got[name], expected[name])

    def step(loss):
        def run(model, opt, x, y):
            value, grads = nn.value_and_grad(loss)(model, x, y)
            opt.step(grads)
            return value

        return run

    alone, together = network(), tuple(m.to(everywhere) for m in network())
    one = nn.jit(step(loss))
    specs["in_specs"] = (None, None, P("d"), P("d"))
    many = nn.jit(nn.shard_map(step(mean_loss), **specs))
    for _ in range(5):
        close(many(*together, x, y), one(*alone, x, y))
    for name, p in alone[0].named_parameters():
        close(together[0].get_parameter(name), p, rtol=1e-4)
    assert many.trace_count == 1
    close(jax.grad(lambda x: outside_sum(model, x))(x), jax.grad(lambda x: model(x).sum())(x))


def checks_and_backward_passes_of_one_s_own_run_on_each_device():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(jnp.asarray(3.0))
            self.register_buffer("calls", jnp.zeros((), jnp.int32))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.w * jnp.log(x)

    model, x = Log(), jnp.arange(1.0, 17.0)
    specs = {"mesh": mesh, "in_specs": (None, P("d"))}
    f = nn.checkify(
        nn.shard_map(lambda m, x: m(x), out_specs=P("d"), **specs), errors=checkify.nan_checks
    )
    for wrap in (lambda f: f, nn.jit):
        err, out = wrap(f)(model, x)
        err.throw()
        close(out, 3 * np.log(x))
        err, _ = wrap(f)(model, x - 5)
        assert "nan generated by primitive: log" in err.get()
    assert int(model.calls) == 4

    own = nn.custom_vjp(lambda m, x: m(x))
    own.defvjp(  # the cotangent of what is replicated is equal on all devices: a sum over them
        lambda m, x: (m(x), x),
        lambda x, g: ({"w": jax.lax.psum(2.0 * jnp.sum(g * jnp.log(x)), "d")}, None),
    )

    def loss(m, x):
        return jax.lax.pmean(own(m, x).mean(), "d")

    inside = nn.shard_map(nn.grad(loss), out_specs=P(), **specs)
    outside = nn.grad(nn.shard_map(loss, out_specs=P(), **specs))
    for g in (inside, outside, nn.jit(inside), nn.jit(outside)):
        close(g(model, x)["w"], 2 * np.log(x).mean())
    assert int(model.calls) == 8


def outside_sum(model, x):
    f = nn.shard_map(lambda m, x: m(x), mesh=mesh, in_specs=(None, P("d")), out_specs=P("d"))
    return f(model, x).sum()


def what_is_spread_stays_spread_and_is_found_by_name():
    x = jax.random.normal(jax.random.key(0), (4, 16))

    def column(layer, x):
        """Each device has some of the outputs."""
        assert layer.weight.shape == (1, 16) and layer.bias.shape == (1,)
        layer.bias.value = layer.bias + jax.lax.axis_index("d")
        return layer(x)

    specs = (
        {"*": P("d")},
        {"weight": P("d"), "bias": P("d")},
        P("d"),
        {"*weight": P("d"), "b*": P("d")},
    )
    for spec in specs:
        layer = nn.Linear(16, 8)
        bias = np.asarray(layer.bias)
        expected = layer(x) + np.arange(8.0)
        f = nn.shard_map(column, mesh=mesh, in_specs=(spec, None), out_specs=P(None, "d"))
        close(f(layer, x), expected)
        close(layer.bias, bias + np.arange(8.0))
        assert layer.bias.value.sharding.spec == P("d")
        if spec is specs[0]:
            close(nn.jit(f)(layer, x), expected + np.arange(8.0))

    def row(layer, x):
        """Each device has some of the inputs."""
        return jax.lax.psum(x @ layer.weight.T, "d") + layer.bias

    layer = nn.Linear(16, 8)
    f = nn.shard_map(
        row, mesh=mesh, in_specs=({"weight": P(None, "d")}, P(None, "d")), out_specs=P()
    )
    close(f(layer, x), layer(x))
    loss = lambda f: lambda m, x: jnp.sum(f(m, x) ** 2)
    got, expected = (nn.jit(nn.grad(loss(g)))(layer, x) for g in (f, lambda m, x: m(x)))
    for name in expected:
        close(got[name], expected[name], rtol=1e-4)

    both = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    f = nn.shard_map(
        lambda pair, x: [m.weight.shape for m in pair[0]] and pair[0][0].weight.sum(keepdims=True),
        mesh=mesh,
        in_specs=(({"0.weight": P("d")}, {"k": P("d")}), None),
        out_specs=P("d"),
    )
    got = f((both, {"k": jnp.ones(8)}), x)
    close(got[:, 0], both[0].weight.sum(1))


def devices_draw_other_numbers_unless_told_otherwise():
    drop, x = nn.Dropout(0.5), jnp.ones((8, 64))
    for wrap in (lambda f: f, nn.jit):
        for randomness in ("different", "same"):
            f = wrap(
                nn.shard_map(
                    lambda m, x: m(x),
                    mesh=mesh,
                    in_specs=(None, P("d")),
                    out_specs=P("d"),
                    randomness=randomness,
                )
            )
            nn.set_rng_state(jax.device_put(nn.manual_seed(0).get_state(), everywhere))
            first, second = np.asarray(f(drop, x)), np.asarray(f(drop, x))
            masks = {row.tobytes() for row in (*first, *second)}
            assert len(masks) == (16 if randomness == "different" else 2)
            assert getattr(f, "trace_count", 1) == 1
            nn.manual_seed(0)
            np.testing.assert_array_equal(f(drop, x), first)
            np.testing.assert_array_equal(f(drop, x), second)
            if randomness == "same":
                nn.manual_seed(0)
                np.testing.assert_array_equal(first[0], drop(x[0]))

    def writes_noise(m, x):
        m.running_mean = jax.random.normal(nn.next_key(), (2,))
        return x

    norm = nn.BatchNorm1d(2)
    given = {"mesh": mesh, "in_specs": (None, P("d")), "out_specs": P("d")}
    with pytest.raises(nn.StateWriteError, match="running_mean"):
        nn.shard_map(writes_noise, **given)(norm, x)
    nn.shard_map(writes_noise, randomness="same", **given)(norm, x)
    assert np.any(norm.running_mean)


def two_axes_and_a_mesh_from_the_context():
    grid = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    x = jax.random.normal(jax.random.key(0), (8, 6))
    layer = nn.Linear(6, 4)

    def forward(layer, x):
        return layer(x)

    given = {"in_specs": (P("model"), P("data")), "out_specs": P("data", "model")}
    close(nn.shard_map(forward, mesh=grid, **given)(layer, x), layer(x))
    drop = nn.Dropout(0.5)
    given["in_specs"] = (None, P("data", "model"))
    masks = nn.shard_map(forward, mesh=grid, **given)(drop, jnp.ones((4, 64)))
    assert len({half.tobytes() for row in np.asarray(masks) for half in np.split(row, 2)}) == 8

    # Axes of a kind that says where arrays are in their types; the mesh comes from the context.
    explicit = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    norm, plain = nn.SyncBatchNorm(6, axis_name="d"), nn.BatchNorm1d(6)
    with jax.set_mesh(explicit):
        f = nn.shard_map(forward, in_specs=(None, P("d")), out_specs=P("d"))
        spread = jax.device_put(x, NamedSharding(explicit, P("d")))
        close(f(norm, spread), plain(x))
        close(nn.jit(f)(norm, spread), plain(x))
        assert (
            len(np.unique(np.asarray(f(drop, jax.reshard(jnp.ones((8, 32)), P("d")))), axis=0)) == 8
        )
    close(norm.running_var, plain.running_var)


def gradients_of_examples_and_tasks_are_not_mixed_over_the_devices():
    nn.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    fn, params = nn.functionalize(model)
    x, y = jax.random.normal(jax.random.key(0), (16, 3)), jnp.arange(16) % 2
    entropy = nn.functional.cross_entropy

    def loss(model, x, y):
        return entropy(model(x[None])[0], y)

    def private(model, x, y):
        given = {"lot_size": 1, "has_norms": True}
        both = [
            nn.curvature.dp_gradients(loss, 0.5, 0.0, clipping=c, **given)(model, x, y)
            for c in ("per_example", "ghost")
        ]
        sums = [jax.tree.map(lambda g: jax.lax.psum(g, "d"), g) for g, _ in both]
        return sums, [norms for _, norms in both], nn.func.per_sample_grad(loss)(model, x, y)

    given = {"mesh": mesh, "in_specs": (P(), P("d"), P("d"))}
    spread = nn.shard_map(private, out_specs=(P(), P("d"), P("d")), **given)
    sums, norms, found = nn.jit(spread)(model, x, y)

    by_hand = jax.grad(lambda p, x, y: entropy(fn(p, x[None])[0], y))
    each = jax.jit(jax.vmap(by_hand, (None, 0, 0)))(params, x, y)
    each = {name: np.asarray(g) for name, g in each.items()}
    lengths = np.sqrt(sum(np.square(g).reshape(16, -1).sum(1) for g in each.values()))
    for got, length in zip(sums, norms, strict=True):
        close(length, lengths)
        for name, g in each.items():
            close(got[name], np.tensordot(1 / np.maximum(1, lengths / 0.5), g, 1))
    for name, g in each.items():
        close(found[name], g)

    def task(params, x, y):
        adapted = nn.meta.adapt(fn, params, entropy, (x, y), lr=0.5, steps=2)
        return entropy(fn(adapted.params, x), y)

    def on_devices(params, x, y):
        value, gradients = jax.value_and_grad(nn.meta.over_tasks(task))(params, x, y)
        # What is equal on all devices has the sum over them as its gradient.
        return jax.lax.pmean(value, "d"), jax.tree.map(lambda g: g / 8, gradients)

    tasks = x.reshape(8, 2, 3), y.reshape(8, 2)
    value, gradients = jax.jit(jax.shard_map(on_devices, out_specs=P(), **given))(params, *tasks)
    of_each = jax.jit(jax.vmap(jax.value_and_grad(task), (None, 0, 0)))
    values, gradients_of_each = of_each(params, *tasks)
    close(value, np.mean(values))
    for name, g in gradients_of_each.items():
        close(gradients[name], np.mean(g, 0))


PROGRAMS = [
    batch_norm_over_all_devices_is_that_of_the_whole_batch,
    gradients_and_training_steps_are_those_of_one_device,
    checks_and_backward_passes_of_one_s_own_run_on_each_device,
    what_is_spread_stays_spread_and_is_found_by_name,
    devices_draw_other_numbers_unless_told_otherwise,
    two_axes_and_a_mesh_from_the_context,
    gradients_of_examples_and_tasks_are_not_mixed_over_the_devices,
]


@pytest.fixture(scope="module")
def failures():
    source = lambda f: "\n".join([inspect.getsource(f), f"{f.__name__}()\n"])
    head = HEADER + inspect.getsource(outside_sum)
    return failures_on_devices(8, {f.__name__: head + source(f) for f in PROGRAMS})


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_on_eight_devices(program, failures):
    assert program.__name__ not in failures, failures[program.__name__]


# --------------------------------------------------------------------------------------------------
# On one device


def test_on_one_device_it_is_the_plain_call():
    x = jnp.asarray([[1.0, 2.0], [3.0, 5.0]])
    for wrap in (lambda f: f, nn.jit):
        norm, plain = nn.SyncBatchNorm(2, axis_name="d"), nn.BatchNorm1d(2)
        f = wrap(nn.shard_map(norm, mesh=mesh, in_specs=P("d"), out_specs=P("d")))
        close(f(x), plain(x))
        close(norm.running_mean, plain.running_mean)
        assert int(norm.num_batches_tracked) == 1
    norm = nn.BatchNorm1d(2)  # on one device its own mean is that of all
    nn.shard_map(norm.forward, mesh=mesh, in_specs=(P("d"),), out_specs=P("d"))(x)
    close(norm.running_mean, plain.running_mean)


def test_as_a_decorator_and_with_nothing_to_write():
    @nn.shard_map(mesh=mesh, in_specs=(None, P("d")), out_specs=P())
    def total(layer, x):
        return jax.lax.psum(layer(x).sum(), "d")

    layer, x = nn.Linear(2, 3), jnp.ones((4, 2))
    close(total(layer, x), layer(x).sum())
    close(jax.jit(total)(layer, x), layer(x).sum())
    with pytest.raises(nn.StateWriteError, match="running_mean"):
        norm = nn.BatchNorm1d(2)
        jax.jit(
            nn.shard_map(lambda m, x: m(x), mesh=mesh, in_specs=(None, P("d")), out_specs=P("d"))
        )(norm, x)


def test_a_tied_parameter_has_one_spec_and_comes_back_once():
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    b.weight = a.weight

    def doubles(a, b):
        assert a.weight is b.weight
        a.weight.value = 2 * a.weight
        return b.weight.value

    given = {"mesh": mesh, "out_specs": P("d")}
    before = np.asarray(a.weight)
    close(nn.shard_map(doubles, in_specs=(P("d"), P("d")), **given)(a, b), 2 * before)
    close(b.weight, 2 * before)
    assert a.weight is b.weight
    with pytest.raises(ValueError, match=r"P\(\) for '\[0\].weight'"):
        nn.shard_map(doubles, in_specs=(P("d"), None), **given)(a, b)


WRONG = {
    "an unknown name": (({"wieght": P("d")}, None), nn.UnknownNameError, "did you mean 'weight'"),
    "a pattern that matches nothing": (
        ({"head.*": P()}, None),
        nn.UnknownNameError,
        "the names are 'weight', 'bias'",
    ),
    "two patterns that contradict": (
        ({"*": P("d"), "bias": P()}, None),
        ValueError,
        "an array has one spec",
    ),
    "too few entries": ((None,), ValueError, "one entry for each positional argument"),
    "too many axes": ((P("d", None), None), ValueError, r"'\[0\].bias'\] is P\('d', None\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_specs_that_do_not_fit_are_errors_that_name_the_array(wrong):
    specs, error, text = WRONG[wrong]
    f = nn.shard_map(lambda m, x: m(x), mesh=mesh, in_specs=specs, out_specs=P())
    with pytest.raises(error, match=text):
        f(nn.Linear(2, 2), jnp.ones((4, 2)))


def test_modules_do_not_come_out_and_structure_does_not_change():
    layer, x = nn.Linear(2, 2), jnp.ones((4, 2))

    def run(f):
        return nn.shard_map(f, mesh=mesh, in_specs=(None, P("d")), out_specs=P("d"))(layer, x)

    for out in (lambda m, x: (m, m(x)), lambda m, x: m.weight):
        with pytest.raises(TypeError, match="(?s)returned a module, or a box.*p.value"):
            run(out)
    with pytest.raises(nn.StructureChangeError, match="flag"):
        run(lambda m, x: (setattr(m, "flag", 1), m(x))[1])
    other = nn.BatchNorm1d(2)
    with pytest.raises(nn.TraceLeakError, match="running_mean"):
        run(lambda m, x: other(x))
    assert not hasattr(layer, "flag") and not np.any(other.running_mean)
    with pytest.raises(ValueError, match="randomness"):
        nn.shard_map(layer, mesh=mesh, in_specs=P(), out_specs=P(), randomness="other")
