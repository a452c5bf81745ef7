"""The tangent kernel: three methods against torch.func and formulas, and what they refuse."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
import statefulnn.functional as F
from statefulnn import curvature
from statefulnn.core.errors import DtypeError, MissingRngError, ShapeError, StateWriteError
from tests.precision import in_float64
from tests.quick import QUICKLY, quickly

METHODS = ["jacobian", "products", "layers"]


def compiled(model, *inputs, **options):
    kernel = lambda model, *xs: curvature.empirical_ntk(model, *xs, **options)
    return nn.jit(kernel, compiler_options=QUICKLY)(model, *inputs)


# The kernel as in torch's tutorial on neural tangent kernels.


def torch_by_jacobians(net, x1, x2):
    params = {name: p.detach() for name, p in net.named_parameters()}

    def single(params, x):
        return torch.func.functional_call(net, params, (x.unsqueeze(0),)).squeeze(0)

    def jacobians(x):
        j = torch.func.vmap(torch.func.jacrev(single), (None, 0))(params, x)
        return [v.flatten(2) for v in j.values()]

    pairs = zip(jacobians(x1), jacobians(x2), strict=True)
    return sum(torch.einsum("Naf,Mbf->NMab", a, b) for a, b in pairs).numpy()


def torch_by_products(net, x1, x2):
    params = {name: p.detach() for name, p in net.named_parameters()}

    def entry(x1, x2):
        def single(x):
            return lambda p: torch.func.functional_call(net, p, (x.unsqueeze(0),)).squeeze(0)

        out, pull = torch.func.vjp(single(x2), params)

        def column(unit):
            return torch.func.jvp(single(x1), (params,), pull(unit))[1]

        return torch.func.vmap(column)(torch.eye(out.numel())).T

    over_x2 = torch.func.vmap(entry, (None, 0))
    return torch.func.vmap(over_x2, (0, None))(x1, x2).numpy()


def twins(ours, theirs):
    """Give a torch model the weights of ours."""
    state = {name: torch.tensor(np.asarray(v)) for name, v in ours.state_dict().items()}
    theirs.load_state_dict(state)
    return ours, theirs


def a_cnn(nn):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, (3, 1), padding="same", dilation=(2, 1), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_kernel_of_a_cnn_is_that_of_torch(method):
    ours, theirs = twins(a_cnn(nn), a_cnn(torch.nn))
    x1, x2 = (np.random.randn(n, 3, 8, 8).astype(np.float32) for n in (4, 3))
    want = torch_by_jacobians(theirs, torch.tensor(x1), torch.tensor(x2))
    scale = np.abs(want).max()
    other = torch_by_products(theirs, torch.tensor(x1), torch.tensor(x2))
    np.testing.assert_allclose(other, want, atol=1e-5 * scale)
    got = compiled(ours, x1, x2, method=method)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("method", METHODS)
def test_kernel_of_a_linear_model_is_the_inner_product_plus_one(method):
    x1, x2 = jax.random.normal(jax.random.key(0), (5, 7)), jnp.ones((3, 7))
    kernel = curvature.empirical_ntk(nn.Linear(7, 4), x1, x2, method=method)
    want = (x1 @ x2.T + 1)[:, :, None, None] * jnp.eye(4)
    np.testing.assert_allclose(kernel, want, rtol=1e-5, atol=1e-5)


class Everything(nn.Module):
    """Layers of all kinds of use: tied, called twice, in a scan, read from outside, subclassed."""

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.twice = nn.Linear(6, 6)
        self.shared = nn.Linear(6, 6, bias=False)
        self.also_shared = self.shared
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.shared.weight
        self.read = nn.Linear(6, 6)
        self.doubled = Everything.Doubled(6, 6)
        self.in_scan = nn.Linear(6, 6)
        self.by_keyword = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.grouped = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.circular = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")
        self.unused = nn.Linear(3, 3)
        self.hooked = nn.Linear(6, 6)
        self.hooked.register_forward_hook(lambda module, args, out: out * 3)
        self.steps = nn.Parameter(jnp.array([1.0, 0.5]))

    def forward(self, x):  # (N, 5, 4) -> (N, 6)
        h = self.embed(x)  # (N, 5, 6): five positions
        h = jnp.tanh(self.twice(jnp.tanh(self.twice(h))))
        h = self.norm(self.also_shared(self.tied(h)) + self.shared(h))
        h = h + self.read(h) @ self.read.weight.value
        h = self.by_keyword(input=self.hooked(self.doubled(h)))
        weight, bias = self.in_scan.weight.value, self.in_scan.bias.value
        h = jax.lax.scan(lambda h, s: (s * (h @ weight.T + bias), None), h, self.steps.value)[0]
        h = self.circular(self.grouped(jnp.swapaxes(h, 1, 2)))  # (N, 6, 5)
        return jnp.tanh(h).mean(-1)


@functools.cache
def everything():
    """The model, two batches, and the kernel by the Jacobian of whole batches in forward mode."""
    nn.manual_seed(0)
    model = Everything()
    x1, x2 = (jax.random.normal(jax.random.key(i), (n, 5, 4)) for i, n in ((0, 3), (1, 2)))
    fn, params = nn.functionalize(model)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    both = jnp.concatenate([x1, x2])
    j = quickly(jax.jacfwd(lambda flat: fn(unravel(flat), both)))(flat)
    return model, x1, x2, jnp.einsum("acp,bdp->abcd", j[:3], j[3:])


@pytest.mark.parametrize(
    "method, outputs",
    [
        ("layers", "full"),
        pytest.param("layers", "diagonal", marks=pytest.mark.long),
        pytest.param("layers", "trace", marks=pytest.mark.long),
        pytest.param("jacobian", "full", marks=pytest.mark.long),
        pytest.param("products", "full", marks=pytest.mark.long),
    ],
)
def test_any_use_of_a_weight_counts(method, outputs):
    model, x1, x2, full = everything()
    want = {
        "full": full,
        "diagonal": jnp.einsum("abcc->abc", full),
        "trace": jnp.einsum("abcc->ab", full),
    }[outputs]
    got = compiled(model, x1, x2, method=method, outputs=outputs)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * float(jnp.abs(want).max()))


class InScan(nn.Module):
    def __init__(self):
        super().__init__()
        self.step = nn.Linear(3, 3)

    def forward(self, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(self.step(h)), None), x, length=3)[0]


def test_a_layer_called_inside_a_scan_counts():
    model, x = InScan(), jax.random.normal(jax.random.key(0), (4, 3))
    a, b = (compiled(model, x, method=m) for m in ("layers", "jacobian"))
    net = [torch.tensor(np.asarray(p.value), requires_grad=True) for p in model.parameters()]

    def single(weight, bias, x):
        for _ in range(3):
            x = torch.tanh(x @ weight.T + bias)
        return x

    def jacobian(x):
        parts = torch.autograd.functional.jacobian(lambda w, b: single(w, b, x), tuple(net))
        return torch.cat([p.flatten(1) for p in parts], 1)

    j = torch.stack([jacobian(row) for row in torch.tensor(np.asarray(x))])
    want = torch.einsum("acp,bdp->abcd", j, j).detach().numpy()
    np.testing.assert_allclose(a, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(b, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method, outputs, size",
    [("jacobian", "full", 3), ("products", "trace", 4), ("layers", "full", 1)],
)
def test_blocks_give_the_same_kernel(method, outputs, size):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x1, x2 = (jax.random.normal(jax.random.key(i), (n, 3)) for i, n in ((0, 7), (1, 4)))
    whole = compiled(model, x1, x2, method=method, outputs=outputs)
    got = compiled(model, x1, x2, method=method, outputs=outputs, batch_size=size)
    np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_set_of_inputs_stands_for_both(method):
    model, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), jnp.eye(4, 3)
    kernel = compiled(model, x, method=method)
    np.testing.assert_allclose(kernel, compiled(model, x, x, method=method), rtol=1e-6)
    np.testing.assert_allclose(kernel, kernel.transpose(1, 0, 3, 2), rtol=1e-5)
    matrix = kernel.transpose(0, 2, 1, 3).reshape(8, 8)
    assert np.linalg.eigvalsh(matrix).min() > -1e-4  # a Gram matrix


def test_three_forms_of_a_model_give_one_kernel():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), jnp.eye(4, 3)
    fn, params = nn.functionalize(model)
    want = curvature.empirical_ntk(model, x)
    np.testing.assert_allclose(curvature.empirical_ntk((fn, params), x), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(curvature.empirical_ntk((model, params), x), want, rtol=1e-5)


def test_the_method_is_chosen_by_what_it_is_given():
    def forms_jacobian(model):
        traced = jax.make_jaxpr(lambda x: curvature.empirical_ntk(model, x))(jnp.ones((4, 64)))
        return "f32[4,50,3200]" in str(traced)  # (examples, outputs, weights)

    model = nn.Linear(64, 50)
    assert forms_jacobian(nn.functionalize(model))
    assert not forms_jacobian(model) and not forms_jacobian((model, nn.functionalize(model)[1]))


def test_some_of_the_parameters_give_their_part_of_the_kernel():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), jnp.eye(4, 3)
    last = {name: p.value for name, p in model.named_parameters() if name.startswith("2.")}
    hidden = jnp.tanh(model[0](x))
    for method in METHODS:
        kernel = curvature.empirical_ntk((model, last), x, method=method, outputs="trace")
        np.testing.assert_allclose(kernel, hidden @ hidden.T + 1, rtol=1e-5)


def test_frozen_parameters_do_not_count():
    model, x = nn.Linear(3, 1), jnp.eye(4, 3)
    model.bias.requires_grad_(False)
    for method in METHODS:
        kernel = curvature.empirical_ntk(model, x, method=method, outputs="trace")
        np.testing.assert_allclose(kernel, x @ x.T, atol=1e-6)


def test_outputs_keep_their_axes():
    scalar = (lambda p, x: x @ p["w"], {"w": jnp.ones(3)})
    assert curvature.empirical_ntk(scalar, jnp.ones((4, 3)), jnp.ones((2, 3))).shape == (4, 2)
    square = (lambda p, x: p["w"] * x[:, :, None], {"w": jnp.ones((1, 3, 2))})
    for outputs, tail in (("full", (3, 2, 3, 2)), ("diagonal", (3, 2)), ("trace", ())):
        kernel = curvature.empirical_ntk(square, jnp.ones((4, 3)), outputs=outputs)
        assert kernel.shape == (4, 4, *tail)


def test_a_tuple_is_several_inputs():
    model = nn.Bilinear(2, 3, 1)
    a, b = (
        jax.random.normal(jax.random.key(0), (4, 2)),
        jax.random.normal(jax.random.key(1), (4, 3)),
    )
    kernel = curvature.empirical_ntk(model, (a, b), outputs="trace")
    np.testing.assert_allclose(kernel, (a @ a.T) * (b @ b.T) + 1, rtol=1e-5, atol=1e-5)


def test_examples_are_seen_one_by_one():
    # The mean over a batch of one is the example itself.
    fn = lambda p, x: p["w"] * (x - x.mean(0))
    kernel = curvature.empirical_ntk((fn, {"w": jnp.ones(())}), jnp.arange(3.0)[:, None])
    np.testing.assert_array_equal(kernel, jnp.zeros((3, 3, 1, 1)))


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_summed_in_float32(method):
    model = nn.Linear(4096, 1, dtype=jnp.bfloat16)
    x = jnp.ones((2, 4096), jnp.bfloat16)
    kernel = curvature.empirical_ntk(model, x, outputs="trace", method=method)
    # bfloat16 itself holds 4097 as 4096; products pass the sum through the model, in its dtype.
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(kernel, 4097, rtol=0 if method != "products" else 1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_kernel_in_double_precision(method):
    with in_float64():
        model = nn.Sequential(
            nn.Linear(3, 4, dtype=jnp.float64), nn.Tanh(), nn.Linear(4, 2, dtype=jnp.float64)
        )
        x = jax.random.normal(jax.random.key(0), (3, 3), jnp.float64)
        kernel = curvature.empirical_ntk(model, x, method=method)
        assert kernel.dtype == jnp.float64
        fn, params = nn.functionalize(model)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        step = 1e-6 * np.eye(flat.size)
        j = np.stack(
            [(fn(unravel(flat + s), x) - fn(unravel(flat - s), x)) / 2e-6 for s in step], -1
        )
        np.testing.assert_allclose(kernel, np.einsum("acp,bdp->abcd", j, j), rtol=1e-7, atol=1e-8)


def test_kernel_is_differentiable_and_maps_over_models():
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), jnp.eye(3, 2)
    fn, params = nn.functionalize(model)
    gradients = []
    for method in ("jacobian", "layers"):
        of = lambda p, method=method: curvature.empirical_ntk((model, p), x, method=method).sum()
        gradients.append(jax.jit(jax.grad(of))(params))
    step = 1e-2
    for name, index in (("0.weight", (1, 0)), ("2.weight", (0, 2))):
        ends = [
            curvature.empirical_ntk((fn, {**params, name: params[name].at[index].add(s)}), x).sum()
            for s in (step, -step)
        ]
        for g in gradients:
            np.testing.assert_allclose(g[name][index], (ends[0] - ends[1]) / (2 * step), rtol=1e-2)
    models = [nn.Linear(2, 1) for _ in range(3)]
    stacked, _ = nn.stack_module_state(models)
    kernels = jax.vmap(lambda p: curvature.empirical_ntk((models[0], p), x))(stacked)
    np.testing.assert_allclose(kernels[2], curvature.empirical_ntk(models[2], x), rtol=1e-6)


def test_module_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).eval()
    before = {name: np.asarray(v) for name, v in model.state_dict().items()}
    step = nn.jit(lambda m, x: m(x))
    step(model, jnp.ones((2, 2)))
    curvature.empirical_ntk(model, jnp.ones((2, 2)), method="layers")
    step(model, jnp.ones((2, 2)))
    assert step.trace_count == 1
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_in_training_mode_is_refused(method):
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Flatten())
    with pytest.raises(StateWriteError, match="running_mean|num_batches_tracked"):
        curvature.empirical_ntk(model, jnp.ones((2, 2, 4)), method=method)
    assert int(model[1].num_batches_tracked) == 0
    kernel = curvature.empirical_ntk(model.eval(), jnp.ones((2, 2, 4)), method=method)
    assert kernel.shape == (2, 2, 12, 12)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_needs_a_key(method):
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    with pytest.raises(MissingRngError):
        curvature.empirical_ntk(model, jnp.ones((2, 2)), method=method)


def test_a_key_fixes_the_mask():
    fn, params = nn.functionalize(nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5)))
    with_key = functools.partial(fn, rng=jax.random.key(0))
    kernel = curvature.empirical_ntk((with_key, params), jnp.zeros((2, 2)), outputs="diagonal")
    assert set(np.unique(kernel)) == {0.0, 4.0}  # (1 / 0.5)², the bias alone
    np.testing.assert_array_equal(kernel[0, 0], kernel[0, 1])


def test_wrong_arguments_are_named():
    model, x = nn.Linear(3, 2), jnp.ones((4, 3))
    fn, params = nn.functionalize(model)
    ntk = curvature.empirical_ntk
    for options, text in (
        ({"method": "jacobians"}, "method='jacobians'"),
        ({"outputs": "all"}, "outputs='all'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
    ):
        with pytest.raises(ValueError, match=text):
            ntk(model, x, **options)
    with pytest.raises(TypeError, match="was given a function"):
        ntk((fn, params), x, method="layers")
    with pytest.raises(TypeError, match="given function as its model"):
        ntk(fn, x)
    with pytest.raises(TypeError, match="tuple of 3"):
        ntk(nn.functionalize(model, mutable=True), x)
    with pytest.raises(TypeError, match="found by name"):
        ntk((model, [1, 2]), x)
    with pytest.raises(ShapeError, match="0 examples"):
        ntk(model, x[:0])
    with pytest.raises(ShapeError, match="0 examples"):
        ntk(model, x, x[:0])
    with pytest.raises(ShapeError, match="examples of shapes"):
        ntk((lambda p, x: x.sum() * p["w"][None], {"w": jnp.ones(())}), x, jnp.ones((4, 2)))
    with pytest.raises(ShapeError, match="as data"):
        ntk(model, 1.0)
    with pytest.raises(ShapeError, match="one N"):
        ntk(nn.Bilinear(3, 3, 1), (x, x[:2]))
    with pytest.raises(ShapeError, match="output of type tuple"):
        ntk((lambda p, x: (p["w"], x), {"w": jnp.ones(())}), x)
    with pytest.raises(ShapeError, match=r"output of shape \(\)"):
        ntk((lambda p, x: p["w"], {"w": jnp.ones(())}), x)
    with pytest.raises(DtypeError, match="output of dtype int32"):
        ntk((lambda p, x: x.argmax(-1), {"w": jnp.ones(())}), x)
    with pytest.raises(DtypeError, match="parameter 'n' of dtype int32"):
        ntk((lambda p, x: x, {"n": jnp.ones((), jnp.int32)}), x)
    with pytest.raises(nn.UnusedModuleError, match="without trainable parameters"):
        ntk(nn.ReLU(), x)


def test_backward_hooks_are_refused_by_forward_mode_only():
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), jnp.eye(2)
    want = curvature.empirical_ntk(model, x)
    model[0].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    with pytest.raises(TypeError, match="forward.mode"):
        curvature.empirical_ntk(model, x, method="products")
    np.testing.assert_allclose(curvature.empirical_ntk(model, x, method="layers"), want, rtol=1e-6)


def test_unbatched_calls_and_functional_use_inside_forward():
    class PerExample(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv1d(2, 3, 2), nn.Linear(3, 2)

        def forward(self, x):  # (N, 2, 4)
            rows = [self.out(jnp.tanh(self.conv(row)).sum(-1)) for row in x]
            return jnp.stack(rows) + F.linear(jnp.ones((1, 3)), self.out.weight)

    model, x = PerExample(), jax.random.normal(jax.random.key(0), (3, 2, 4))
    got = curvature.empirical_ntk(model, x, method="layers")
    fn, params = nn.functionalize(model)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    j = jax.jit(jax.jacfwd(lambda flat: fn(unravel(flat), x)))(flat)
    np.testing.assert_allclose(got, jnp.einsum("acp,bdp->abcd", j, j), rtol=1e-4, atol=1e-5)
