"""nn.scan over stacks of modules, against a Python loop over the modules one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn

N = 4
X = jnp.asarray([[0.3, -0.2], [0.1, 0.8], [-0.5, 0.4]])


class Layer(nn.Module):
    """A parameter, a buffer that a forward writes, and one that it does not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("seen", jnp.zeros(()))
        self.register_buffer("scale", jnp.asarray(0.7))

    def forward(self, x):
        self.seen = self.seen + x.sum()
        return jnp.tanh(self.linear(x)) * self.scale + self.seen * 0.01


class Tied(nn.Module):
    """One parameter under two names, and a submodule that sits in two places."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = self.a
        self.w = self.a.weight

    def forward(self, x):
        self.w.value = self.w * 0.5
        return self.b(self.a(x))


def layers_of(make, n=N):
    return [make() for _ in range(n)]


def stack(layers):
    return jax.tree.map(lambda *v: jnp.stack(v), *layers)


def assert_stack(stacked, layers):
    assert stacked.state_dict().keys() == layers[0].state_dict().keys()
    for name, value in stacked.state_dict().items():
        expected = [layer.state_dict()[name] for layer in layers]
        np.testing.assert_allclose(value, np.stack(expected), rtol=1e-5, atol=1e-6, err_msg=name)


def in_turn(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def scanned(layers, x, **options):
    return nn.scan(lambda x, layer: (layer(x), None), x, layers, **options)[0]


LAYERS = {
    "buffers": Layer,
    "BatchNorm": lambda: nn.BatchNorm1d(2),
    "ties": Tied,
    "Sequential": lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Tanh()),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("wrap", [None, nn.jit], ids=["eager", "nn.jit"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_a_scan_over_a_stack_of_layers_is_the_loop_over_the_layers(make, wrap, reverse):
    layers = layers_of(make)
    stacked = stack(layers)
    f = lambda layers, x: scanned(layers, x, reverse=reverse)
    out = (f if wrap is None else wrap(f))(stacked, X)
    expected = in_turn(layers[::-1] if reverse else layers, X)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert_stack(stacked, layers)


def test_the_stack_may_come_from_nn_vmap():
    stacked = nn.vmap(Layer, axis_size=N)()
    layers = [jax.tree.map(lambda v, i=i: v[i], stacked) for i in range(N)]
    np.testing.assert_allclose(scanned(stacked, X), in_turn(layers, X), rtol=1e-5)
    assert_stack(stacked, layers)


@pytest.mark.parametrize("unroll", [2, N])
def test_unrolled_steps_write_the_same(unroll):
    layers = layers_of(Layer)
    stacked = stack(layers)
    out = scanned(stacked, X, unroll=unroll)
    np.testing.assert_allclose(out, in_turn(layers, X), rtol=1e-5)
    assert_stack(stacked, layers)


def test_stacks_and_arrays_are_stepped_over_together():
    layers, shifts = layers_of(Layer), jnp.arange(4.0)
    stacked = stack(layers)
    step = lambda x, by: (by["layer"](x) + by["shift"], by["shift"])
    out, ys = nn.scan(step, X, {"shift": shifts, "layer": stacked})
    x = X
    for layer, shift in zip(layers, shifts, strict=True):
        x = layer(x) + shift
    np.testing.assert_allclose(out, x, rtol=1e-5)
    np.testing.assert_array_equal(ys, shifts)
    assert_stack(stacked, layers)


def test_a_module_in_the_carry_and_another_in_xs_are_both_written():
    layers, norm, other = layers_of(Layer), nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    stacked = stack(layers)

    def step(carry, layer):
        norm, x = carry
        return (norm, norm(layer(x))), None

    (again, out), _ = nn.scan(step, (norm, X), stacked)
    x = X
    for layer in layers:
        x = other(layer(x))
    assert again is norm
    np.testing.assert_allclose(out, x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_mean, other.running_mean, rtol=1e-4, atol=1e-6)
    assert int(norm.num_batches_tracked) == N
    assert_stack(stacked, layers)


def test_a_training_step_of_each_layer_in_a_scan():
    layers = layers_of(lambda: nn.Linear(2, 1))
    stacked = stack(layers)

    def train(total, layer):
        loss, grads = nn.value_and_grad(lambda m: (m(X) ** 2).mean())(layer)
        for name, p in layer.named_parameters():
            p.value = p - 0.1 * grads[name]
        return total + loss, None

    total, _ = nn.jit(lambda layers: nn.scan(train, jnp.zeros(()), layers))(stacked)
    expected = sum(train(jnp.zeros(()), layer)[0] for layer in layers)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert_stack(stacked, layers)


def test_the_gradient_of_a_stack_is_the_stack_of_the_gradients():
    layers = layers_of(Layer)
    stacked = stack(layers)
    got = nn.grad(lambda layers, x: (scanned(layers, x) ** 2).sum())(stacked, X)

    def loss(params, x):
        for w, b in params:
            x = jnp.tanh(x @ w.T + b) * 0.7 + x.sum() * 0.01
        return (x**2).sum()

    params = [(layer.linear.weight.value, layer.linear.bias.value) for layer in layers]
    expected = jax.grad(loss)(params, X)
    for i, name in enumerate(["linear.weight", "linear.bias"]):
        np.testing.assert_allclose(got[name], np.stack([g[i] for g in expected]), rtol=1e-4)
    assert float(jnp.abs(stacked.seen).min()) > 0


def test_lanes_of_nn_vmap_scan_their_own_stacks():
    lanes = [layers_of(Layer) for _ in range(3)]
    stacks = stack([stack(layers) for layers in lanes])
    xs = jnp.stack([X, X + 1, X * 2])
    out = nn.vmap(scanned)(stacks, xs)
    for i, layers in enumerate(lanes):
        np.testing.assert_allclose(out[i], in_turn(layers, xs[i]), rtol=1e-5)
        assert_stack(jax.tree.map(lambda v, i=i: v[i], stacks), layers)


def test_a_scan_in_a_scan_goes_over_a_stack_of_stacks():
    blocks = [layers_of(Layer, 2) for _ in range(3)]
    stacked = stack([stack(layers) for layers in blocks])
    f = nn.jit(lambda blocks, x: nn.scan(lambda x, b: (scanned(b, x), None), x, blocks)[0])
    out = f(stacked, X)
    x = X
    for layers in blocks:
        x = in_turn(layers, x)
    np.testing.assert_allclose(out, x, rtol=1e-5)
    for i, layers in enumerate(blocks):
        assert_stack(jax.tree.map(lambda v, i=i: v[i], stacked), layers)
    assert f.trace_count == 1


def test_remat_around_a_step_changes_no_number():
    layers = layers_of(Layer)
    one, two = stack(layers), stack(layers)
    step = lambda x, layer: (layer(x), None)
    loss = lambda f: lambda layers: nn.scan(f, X, layers)[0].sum()
    a = nn.grad(loss(step))(one)
    b = nn.grad(loss(nn.remat(step)))(two)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    np.testing.assert_allclose(one.seen, two.seen, rtol=1e-6)


def test_dropout_in_stacked_layers_differs_from_step_to_step_and_call_to_call():
    drop = nn.Dropout(0.5)
    layers = nn.vmap(lambda: nn.Linear(2, 2), axis_size=N)()

    @nn.jit
    def f(drop, layers, x):
        def step(drop, layer):
            return drop, drop(jnp.ones(64)) + layer.weight.sum() * 0

        return nn.scan(step, drop, layers)[1]

    a, b = np.asarray(f(drop, layers, X)), np.asarray(f(drop, layers, X))
    masks = {row.tobytes() for row in (*a, *b)}
    assert len(masks) == 2 * N
    assert f.trace_count == 1


class Noisy(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.generator = nn.Generator(seed)

    def forward(self, x):
        return x + jax.random.normal(self.generator.next_key(), x.shape)


def test_stacked_generators_are_streams_of_their_own():
    layers = [Noisy(seed) for seed in range(N)]
    stacked = stack(layers)
    for _ in range(2):
        _, ys = nn.scan(lambda c, layer: (c, layer(jnp.zeros(3))), None, stacked)
        expected = [layer(jnp.zeros(3)) for layer in layers]
        np.testing.assert_allclose(ys, np.stack(expected), rtol=1e-6)
    np.testing.assert_array_equal(
        stacked.generator.state, np.stack([layer.generator.state for layer in layers])
    )


def test_a_generator_that_was_not_stacked_is_one_stream():
    noisy, again = Noisy(), Noisy()
    _, ys = nn.scan(lambda c, by: (c, by[0](by[1])), None, (noisy, jnp.zeros((N, 3))))
    np.testing.assert_allclose(ys, np.stack([again(jnp.zeros(3)) for _ in range(N)]), rtol=1e-6)


def test_a_slice_that_is_an_output_comes_back_as_the_caller_s_stack():
    layers = layers_of(Layer)
    stacked = stack(layers)

    def step(x, layer):
        return layer(x), {"layer": layer, "x": x, "inner": layer.linear}

    for wrap in (lambda f: f, nn.jit):
        _, ys = wrap(lambda s: nn.scan(step, X, s))(stacked)
        assert ys["layer"] is stacked
        assert ys["inner"] is stacked.linear
        assert ys["x"].shape == (N, *X.shape)


def test_a_carried_module_among_the_outputs_is_a_stack_of_what_it_was():
    counter = Layer()
    xs = jnp.asarray([1.0, 2.0, 3.0])

    def step(m, x):
        m(jnp.full(2, x))
        return m, m

    again, ys = nn.scan(step, counter, xs)
    assert again is counter and ys is not counter
    np.testing.assert_allclose(ys.seen, [2.0, 6.0, 12.0])
    np.testing.assert_allclose(ys.linear.weight, np.stack([counter.linear.weight] * 3))
    assert float(counter.seen) == 12.0


def test_a_module_built_in_a_step_comes_back_as_a_stack():
    def step(c, x):
        m = nn.Linear(1, 1)
        m.weight.value = x * m.weight * 0 + x
        return c, m

    _, made = nn.scan(step, None, jnp.asarray([1.0, 2.0]))
    np.testing.assert_array_equal(made.weight, [[[1.0]], [[2.0]]])


def test_no_steps_change_nothing_and_give_empty_outputs():
    stacked = jax.tree.map(lambda v: v[:0], stack(layers_of(Layer)))
    norm = nn.BatchNorm1d(2)
    for wrap in (lambda f: f, nn.jit):
        f = lambda s, m: nn.scan(lambda m, layer: (m, m(layer(X))), m, s)
        again, ys = wrap(f)(stacked, norm)
        assert again is norm
        assert ys.shape == (0, *X.shape)
        assert int(norm.num_batches_tracked) == 0
        assert stacked.linear.weight.shape == (0, 2, 2)


def test_a_module_may_be_the_step_itself():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(jnp.asarray(0.5))
            self.register_buffer("steps", jnp.zeros((), jnp.int32))

        def forward(self, h, x):
            self.steps = self.steps + 1
            h = jnp.tanh(self.w * h + x)
            return h, h

    cell = Cell()
    xs = jnp.asarray([0.1, -0.4, 0.7])
    for f in (cell, cell.forward):
        h, ys = nn.scan(f, jnp.zeros(()), xs)
        expected = np.zeros((), np.float32)
        for x in np.asarray(xs):
            expected = np.tanh(np.float32(0.5) * expected + x)
        np.testing.assert_allclose(h, expected, rtol=1e-5)
        assert ys.shape == (3,)
    assert int(cell.steps) == 6


def test_compiled_code_is_traced_once_and_the_stack_may_be_donated():
    layers = layers_of(Layer)
    stacked, kept = stack(layers), stack(layers)
    f = nn.jit(scanned, donate=0)
    for _ in range(3):
        out = f(stacked, X)
        expected = nn.jit(scanned)(kept, X)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert f.trace_count == 1
    np.testing.assert_allclose(stacked.seen, kept.seen, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# What is refused


def test_a_module_that_is_carried_and_sliced_is_refused_by_name():
    stacked = stack(layers_of(Layer))
    with pytest.raises(nn.ShapeError, match=r"linear\.weight.* in its carry and in its xs"):
        nn.scan(lambda c, x: (c, None), stacked, stacked)
    with pytest.raises(nn.ShapeError, match=r"weight.* in its carry and in its xs"):
        nn.scan(lambda c, x: (c, None), stacked.linear, stacked)


def test_a_parameter_that_two_modules_share_cannot_be_carried_and_sliced():
    stacked, carried = stack(layers_of(Layer)), nn.Linear(2, 2)
    carried.weight = stacked.linear.weight
    with pytest.raises(nn.ShapeError, match="cannot be both"):
        nn.scan(lambda c, x: (c, None), carried, stacked)


def test_a_module_that_is_no_stack_is_refused_by_name():
    with pytest.raises(
        nn.ShapeError, match=r"no axis \('\[0\]\.num_batches_tracked' of shape \(\)"
    ):
        nn.scan(lambda c, m: (c, None), None, nn.BatchNorm1d(2))
    with pytest.raises(nn.ShapeError, match=r"0 \(an array.*, 4 \('\[0\]\.weight' of shape"):
        nn.scan(lambda c, by: (c, None), None, (nn.Linear(3, 4), jnp.ones(0)))


def test_a_buffer_whose_type_changes_is_refused_by_name():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", jnp.zeros((), jnp.int32))

        def forward(self, x):
            self.count = self.count + 1.0 * x.sum()
            return x

    with jax.numpy_dtype_promotion("standard"):
        m = Grows()
        with pytest.raises(nn.StructureChangeError, match=r"count' float32\[\].*was int32\[\]"):
            nn.scan(lambda m, x: (m, m(x)), m, X)
        assert m.count.dtype == jnp.int32
        stacked = stack([m, m])
        with pytest.raises(nn.StructureChangeError, match="count"):
            nn.scan(lambda c, m: (c, m(X)), None, stacked)
        assert stacked.count.dtype == jnp.int32


def test_a_slice_whose_structure_changes_raises_and_leaves_the_stack():
    stacked = stack(layers_of(Layer))

    def step(c, layer):
        layer.eval()
        return c, None

    with pytest.raises(nn.StructureChangeError, match="training"):
        nn.scan(step, None, stacked)
    assert stacked.training


def test_a_write_to_a_module_from_outside_raises():
    stacked, outside = stack(layers_of(Layer)), Layer()
    with pytest.raises(nn.TraceLeakError, match="seen"):
        nn.scan(lambda x, layer: (layer(outside(x)), None), X, stacked)
    assert float(outside.seen) == 0
    np.testing.assert_array_equal(stacked.seen, np.zeros(N))


def test_under_a_raw_jax_jit_layers_are_read_and_a_write_raises():
    layers = layers_of(lambda: nn.Linear(2, 2))
    np.testing.assert_allclose(
        jax.jit(scanned)(stack(layers), X), in_turn(layers, X), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(nn.StateWriteError, match="seen"):
        jax.jit(scanned)(stack(layers_of(Layer)), X)


def test_under_a_raw_jax_jit_a_mutable_copy_is_written_and_returned():
    layers = layers_of(Layer)

    @jax.jit
    def f(stacked, x):
        stacked = nn.mutable(stacked)
        return stacked, scanned(stacked, x)

    stacked, out = f(stack(layers), X)
    np.testing.assert_allclose(out, in_turn(layers, X), rtol=1e-5)
    assert_stack(stacked, layers)


def test_a_step_that_writes_more_when_it_is_traced_again_is_refused():
    calls = []

    def step(m, x):
        calls.append(x)
        if len(calls) > 1:
            m.seen = m.seen + 1
        return m, x

    m = Layer()
    with pytest.raises(nn.StateWriteError, match="seen"):
        nn.scan(step, m, jnp.ones(3))
    assert float(m.seen) == 0
