"""nn.meta.adapt: inner loops against torch.func, finite differences and loops written by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import statefulnn as nn
import statefulnn.functional as F
from tests.precision import in_float64
from tests.quick import diagonal, first, quickly

K = 6


@pytest.fixture
def standard_promotion():
    """optax relies on JAX's own promotion of dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(lib):
    return lib.Sequential(
        lib.Linear(1, 8), lib.Tanh(), lib.Linear(8, 8), lib.Tanh(), lib.Linear(8, 1)
    )


def twins():
    torch.manual_seed(0)
    theirs, ours = network(torch.nn), network(nn)
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    return ours, theirs


def data(seed=0, tasks=None):
    rng = np.random.default_rng(seed)
    lead = () if tasks is None else (tasks,)
    return [rng.standard_normal((*lead, K, 1)).astype(np.float32) for _ in range(4)]


def torch_meta_gradient(model, task, steps, lr, first_order=False, only=lambda n: True):
    """Second-order MAML by torch.func."""
    from torch.func import functional_call, grad

    x, y, xq, yq = map(torch.tensor, task)
    start = {n: p.detach() for n, p in model.named_parameters()}

    def mse(params, x, y):
        return ((functional_call(model, params, (x,)) - y) ** 2).mean()

    def outer(start):
        params = dict(start)
        for _ in range(steps):
            grads = grad(mse)(params, x, y)
            if first_order:
                grads = {n: g.detach() for n, g in grads.items()}
            params = {n: p - lr * grads[n] if only(n) else p for n, p in params.items()}
        return mse(params, xq, yq)

    from torch.func import grad_and_value

    if first_order:  # detach is no function of torch.func: the tape does it
        leaves = {n: p.clone().requires_grad_() for n, p in start.items()}
        params = dict(leaves)
        for _ in range(steps):
            now = dict(params)
            value = mse(now, x, y)
            grads = torch.autograd.grad(value, list(now.values()), retain_graph=True)
            params = {n: p - lr * g.detach() for (n, p), g in zip(now.items(), grads, strict=True)}
        value = mse(params, xq, yq)
        grads = torch.autograd.grad(value, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True)), value
    return grad_and_value(outer)(start)


def our_meta_gradient(model, task, wrap=quickly, **options):
    fn, params = nn.functionalize(model)

    def outer(params, x, y, xq, yq):
        adapted = nn.meta.adapt(fn, params, F.mse_loss, (x, y), **options)
        return F.mse_loss(fn(adapted.params, xq), yq)

    return wrap(jax.value_and_grad(outer))(params, *task)


def agree(ours, theirs, rtol=1e-5, atol=1e-6):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name].numpy(), rtol=rtol, atol=atol, err_msg=name)


# --------------------------------------------------------------------------------------------------
# The gradient


@pytest.mark.parametrize(
    "steps, checkpoint",
    [
        pytest.param(1, "none", marks=pytest.mark.long),
        (3, "none"),
        (8, "none"),
        (8, "all"),
        (8, "sqrt"),
    ],
)
def test_the_meta_gradient_is_torch_s(steps, checkpoint):
    ours, theirs = twins()
    task = data()
    value, grads = our_meta_gradient(ours, task, lr=0.1, steps=steps, checkpoint=checkpoint)
    expected, loss = torch_meta_gradient(theirs, task, steps, 0.1)
    np.testing.assert_allclose(value, loss.detach().numpy(), rtol=1e-5)
    agree(grads, expected)


def test_it_is_the_same_outside_of_jit():
    ours, theirs = twins()
    task = data()
    _, grads = our_meta_gradient(ours, task, wrap=lambda f: f, lr=0.1, steps=1)
    agree(grads, torch_meta_gradient(theirs, task, 1, 0.1)[0])


def test_first_order_takes_the_inner_gradients_as_constants():
    ours, theirs = twins()
    task = data()
    _, grads = our_meta_gradient(ours, task, lr=0.1, steps=3, first_order=True)
    agree(grads, torch_meta_gradient(theirs, task, 3, 0.1, first_order=True)[0])
    _, second = our_meta_gradient(ours, task, lr=0.1, steps=3)
    assert float(jnp.abs(second["0.weight"] - grads["0.weight"]).max()) > 1e-3


def test_a_filter_adapts_some_and_the_others_still_get_a_gradient():
    ours, theirs = twins()
    task = data()
    _, grads = our_meta_gradient(ours, task, lr=0.1, steps=2, only="4.*")
    expected, _ = torch_meta_gradient(theirs, task, 2, 0.1, only=lambda n: n.startswith("4."))
    agree(grads, expected)


@pytest.mark.parametrize(
    "only",
    ["b.*", "b*", "b.weight|b.bias", ["b.weight", "b.bias"], lambda name: name[0] == "b"],
)
def test_a_filter_is_a_pattern_a_list_or_a_function(only):
    params = {n: jnp.ones(()) for n in ("a.weight", "b.weight", "b.bias")}
    loss = lambda p: sum(p.values())
    adapted = nn.meta.adapt(None, params, loss, (), lr=0.5, only=only)
    assert {n: float(v) for n, v in adapted.params.items()} == {
        "a.weight": 1.0,
        "b.weight": 0.5,
        "b.bias": 0.5,
    }


def test_tasks_in_parallel_are_the_mean_over_tasks():
    ours, theirs = twins()
    tasks = data(tasks=5)
    fn, params = nn.functionalize(ours)

    def one_task(params, x, y, xq, yq):
        adapted = nn.meta.adapt(fn, params, F.mse_loss, (x, y), lr=0.1, steps=2)
        return F.mse_loss(fn(adapted.params, xq), yq)

    grads = quickly(jax.grad(nn.meta.over_tasks(one_task)))(params, *tasks)
    each = [torch_meta_gradient(theirs, [t[i] for t in tasks], 2, 0.1)[0] for i in range(5)]
    agree(grads, {n: sum(e[n] for e in each) / 5 for n in grads})


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"lr": 0.1}, id="gd", marks=pytest.mark.long),
        pytest.param(
            {"lr": 0.5, "optimizer": nn.meta.adam(0.05)}, id="adam", marks=pytest.mark.long
        ),
        pytest.param(
            {"optimizer": optax.sgd(0.1, momentum=0.9), "checkpoint": "sqrt"},
            id="momentum",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {
                "optimizer": optax.chain(
                    optax.clip_by_global_norm(0.5), optax.adamw(0.05, eps_root=1e-8)
                )
            },
            id="clipped adamw",
        ),
    ],
)
def test_float64_finite_differences_agree(options, standard_promotion):
    with in_float64():
        fn, params = nn.functionalize(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)))
        params = {n: jnp.asarray(p, jnp.float64) for n, p in params.items()}
        x, y, xq, yq = (jnp.asarray(v, jnp.float64) for v in data())

        def outer(params):
            adapted = nn.meta.adapt(fn, params, F.mse_loss, (x, y), steps=7, **options)
            return F.mse_loss(fn(adapted.params, xq), yq)

        both = quickly(jax.value_and_grad(outer))
        grads = both(params)[1]
        keys = jax.random.split(jax.random.key(0), len(params))
        way = {
            n: jax.random.normal(k, p.shape, p.dtype)
            for k, (n, p) in zip(keys, params.items(), strict=True)
        }
        at = lambda t: both({n: p + t * way[n] for n, p in params.items()})[0]
        h = 1e-4
        slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        found = sum((grads[n] * way[n]).sum() for n in params)
        np.testing.assert_allclose(found, slope, rtol=1e-6, atol=1e-8)


def test_learning_rates_get_gradients_of_their_own_shapes():
    fn, params = nn.functionalize(nn.Linear(2, 1, bias=False))
    x, y = jnp.array([[1.0, 2.0]]), jnp.array([[0.0]])

    def after(lr):
        adapted = nn.meta.adapt(
            fn, params, lambda out, y: 0.5 * ((out - y) ** 2).sum(), (x, y), lr=lr
        )
        return (adapted.params["weight"] * jnp.array([[3.0, 5.0]])).sum()

    lr = nn.meta.learning_rates(params, 0.1)
    grads = jax.grad(after)(lr)
    error = float((params["weight"] * jnp.array([[1.0, 2.0]])).sum())
    # w - lr * error * x, weighted by (3, 5).
    np.testing.assert_allclose(grads["weight"], -error * np.array([[3.0, 10.0]]), rtol=1e-5)
    assert grads["weight"].shape == (1, 2)
    whole = jax.grad(after)(0.1)
    np.testing.assert_allclose(whole, -error * 13.0, rtol=1e-5)
    scalar = jax.grad(after)(nn.meta.learning_rates(params, 0.1, each="array"))
    assert scalar["weight"].shape == ()


def test_a_learning_rate_of_each_step_is_used_in_its_step():
    fn, params = nn.functionalize(nn.Linear(1, 1, bias=False))
    x, y = jnp.ones((1, 1)), jnp.zeros((1, 1))
    rates = [0.1, 0.2, 0.3, 0.05, 0.01, 0.4, 0.25]
    half_square = lambda out, y: 0.5 * ((out - y) ** 2).sum()
    for lr in (
        nn.meta.PerStep(jnp.array(rates)),
        {"weight": nn.meta.PerStep(jnp.array(rates))},
    ):
        adapted = jax.jit(
            lambda lr: nn.meta.adapt(fn, params, half_square, (x, y), lr=lr, steps=7)
        )(lr)
        expected = float(params["weight"][0, 0]) * np.prod(1 - np.array(rates))
        np.testing.assert_allclose(adapted.params["weight"][0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("steps, last", [(4, 3), (9, 3), (19, 9)])
def test_truncation_differentiates_the_last_steps_only(steps, last):
    # w <- w - lr * w, n times; by the rate, through the last k steps: w_(n-k) (1 - lr)^k.
    start = jnp.asarray(2.0)

    def after(start, lr):
        return nn.meta.adapt(
            None, start, lambda w: 0.5 * w**2, (), lr=lr, steps=steps, truncate=last
        ).params

    value = after(start, 0.1)
    np.testing.assert_allclose(value, 2.0 * 0.9**steps, rtol=1e-5)
    by_start, by_rate = jax.grad(after, (0, 1))(start, 0.1)
    assert float(by_start) == 0.0
    kept = 2.0 * 0.9 ** (steps - last)
    np.testing.assert_allclose(by_rate, -last * kept * 0.9 ** (last - 1), rtol=1e-5)


def test_truncation_longer_than_the_loop_changes_nothing():
    f = lambda w, k: (
        nn.meta.adapt(None, w, lambda w: 0.5 * w**2, (), lr=0.1, steps=4, truncate=k).params
    )
    np.testing.assert_allclose(jax.grad(f)(1.0, 100), 0.9**4, rtol=1e-6)
    assert float(jax.grad(f)(1.0, 0)) == 0.0


def test_square_root_checkpoints_keep_a_tenth_of_the_memory():
    model = nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    fn, params = nn.functionalize(model)
    x, y = jnp.ones((50, 1)), jnp.zeros((50, 1))
    used, grads = {}, {}
    for checkpoint in ("none", "sqrt"):

        def outer(params, checkpoint=checkpoint):
            adapted = nn.meta.adapt(
                fn, params, F.mse_loss, (x, y), lr=0.01, steps=400, checkpoint=checkpoint
            )
            return adapted.losses[-1]

        compiled = quickly(jax.grad(outer)).lower(params).compile()
        used[checkpoint] = compiled.memory_analysis().temp_size_in_bytes
        grads[checkpoint] = compiled(params)
    assert used["sqrt"] * 10 < used["none"]
    for name in params:
        np.testing.assert_allclose(
            grads["sqrt"][name], grads["none"][name], rtol=1e-6, atol=1e-9, err_msg=name
        )


def small_cnn():
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    x, y = jnp.ones((5, 1, 16, 16)), jnp.arange(5)
    return nn.Sequential(*layers, nn.Linear(8 * 8 * 8, 5)), F.cross_entropy, (x, y)


def wide_mlp():
    layers = nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
    return nn.Sequential(*layers), F.mse_loss, (jnp.ones((20, 16)), jnp.zeros((20, 4)))


@pytest.mark.parametrize("make, steps", diagonal(2, [small_cnn, wide_mlp], [25, 100]))
def test_square_root_checkpoints_need_the_least_memory(make, steps):
    model, loss, data = make()
    fn, params = nn.functionalize(model)
    used = {}
    for checkpoint in ("none", "all", "sqrt"):
        after = lambda p, checkpoint=checkpoint: nn.meta.adapt(
            fn, p, loss, data, lr=0.01, steps=steps, checkpoint=checkpoint
        ).losses[-1]
        compiled = quickly(jax.grad(after)).lower(params).compile()
        used[checkpoint] = compiled.memory_analysis().temp_size_in_bytes
    assert used["sqrt"] <= 1.2 * min(used.values()), used
    assert used["sqrt"] * 2 < used["none"], used


@pytest.mark.parametrize("steps", [8, 9])
def test_what_checkpoints_compute_again_is_counted(steps):
    calls = [0]

    def one(_):
        calls[0] += 1
        return np.float32(1)

    def inner(w):
        number = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(one, number, jax.lax.stop_gradient(w)) * w**2

    # Three to a chunk: each step once on the way there, and once on the way back; those of all chunks but
    # the last once more.
    again = {"none": 0, "all": steps, "sqrt": steps + 6}
    for checkpoint, more in again.items():
        after = lambda w, how=checkpoint: nn.meta.adapt(
            None, w, inner, (), lr=0.1, steps=steps, checkpoint=how, unroll=0
        )
        calls[0] = 0
        quickly(jax.grad(lambda w: after(w).params))(jnp.float32(1)).block_until_ready()  # noqa: B023
        assert calls[0] == steps + more, checkpoint


def test_compiled_code_does_not_grow_with_the_steps():
    fn, params = nn.functionalize(network(nn))
    x, y = jnp.ones((K, 1)), jnp.zeros((K, 1))
    sizes = {}
    for steps in (10, 1000):
        f = jax.grad(
            lambda p, steps=steps: nn.meta.adapt(
                fn, p, F.mse_loss, (x, y), lr=0.01, steps=steps
            ).losses[-1]
        )
        sizes[steps] = len(str(jax.make_jaxpr(f)(params)))
    assert abs(sizes[1000] - sizes[10]) < 0.02 * sizes[10]


@pytest.mark.parametrize(
    "steps, options, loops", [(5, {}, 0), (6, {}, 1), (3, {"unroll": 0}, 1), (9, {"unroll": 9}, 0)]
)
def test_unroll_says_how_many_steps_are_compiled_without_a_loop(steps, options, loops):
    adapt = lambda p, **options: call(params=p, steps=steps, **options).params["weight"]
    params = LINEAR[1]
    assert str(jax.make_jaxpr(lambda p: adapt(p, **options))(params)).count(" scan[") == loops
    np.testing.assert_allclose(adapt(params, **options), adapt(params), rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# What comes back


@pytest.mark.parametrize("steps", [2, 7])
def test_losses_and_path_are_those_of_a_loop_by_hand(steps):
    fn, params = nn.functionalize(network(nn))
    x, y, _, _ = map(jnp.asarray, data())
    adapted = nn.meta.adapt(fn, params, F.mse_loss, (x, y), lr=0.1, steps=steps, keep_path=True)
    now, slope = params, quickly(jax.value_and_grad(lambda p: F.mse_loss(fn(p, x), y)))
    for i in range(steps):
        for name in params:
            np.testing.assert_allclose(adapted.path[name][i], now[name], rtol=1e-5, atol=1e-6)
        value, grads = slope(now)
        np.testing.assert_allclose(adapted.losses[i], value, rtol=1e-5)
        now = {n: p - 0.1 * grads[n] for n, p in now.items()}
    for name in params:
        np.testing.assert_allclose(adapted.params[name], now[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(adapted.path[name][-1], adapted.params[name])
    assert list(adapted.params) == list(params)


def test_the_parameters_of_a_module_may_be_given_as_they_are():
    model = nn.Linear(2, 1)
    fn, params = nn.functionalize(model)
    data = jnp.ones((3, 2)), jnp.zeros((3, 1))
    found = nn.meta.adapt(fn, dict(model.named_parameters()), F.mse_loss, data, lr=0.1)
    expected = nn.meta.adapt(fn, params, F.mse_loss, data, lr=0.1)
    for name, value in found.params.items():
        assert type(value) is type(expected.params[name])
        np.testing.assert_array_equal(value, expected.params[name])


def test_each_step_may_have_its_batch():
    fn, params = nn.functionalize(nn.Linear(1, 1, bias=False))
    xs = jnp.arange(1.0, 8.0).reshape(7, 1, 1)
    loss = lambda out, y: (out - y).sum()
    adapted = nn.meta.adapt(
        fn, params, loss, (xs, jnp.zeros((7, 1, 1))), lr=1.0, steps=7, batches=True
    )
    np.testing.assert_allclose(adapted.params["weight"] - params["weight"], -28.0, rtol=1e-6)


def test_an_objective_without_a_model_takes_any_pytree():
    params = (jnp.asarray(1.0), [jnp.asarray(2.0)])
    adapted = nn.meta.adapt(
        None, params, lambda p, scale: scale * (p[0] ** 2 + p[1][0] ** 2), (0.5,), lr=0.1, steps=6
    )
    np.testing.assert_allclose(adapted.params[0], 0.9**6, rtol=1e-5)
    np.testing.assert_allclose(adapted.params[1][0], 2 * 0.9**6, rtol=1e-5)


def six_steps_of_torch_s_adam():
    """On the sum of squares, from (1, -2)."""
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        (w**2).sum().backward()
        optimizer.step()
    return w.detach().numpy()


def test_the_optimizer_is_optax_s(standard_promotion):
    params = {"w": jnp.array([1.0, -2.0])}
    loss = lambda p: (p["w"] ** 2).sum()
    adapted = nn.meta.adapt(
        None, params, loss, (), optimizer=optax.adam(0.1, eps_root=1e-8), steps=6
    )
    np.testing.assert_allclose(adapted.params["w"], six_steps_of_torch_s_adam(), rtol=1e-5)


@pytest.mark.parametrize("pieces", first(1, [(2, 2, 2), (1, 5), (3, 3)]))
def test_an_inner_loop_in_pieces_hands_on_the_slots(pieces, standard_promotion):
    loss = lambda p: (p["w"] ** 2).sum()
    params, slots = {"w": jnp.array([1.0, -2.0])}, None
    for steps in pieces:
        params, *_, slots = nn.meta.adapt(
            None, params, loss, (), optimizer=nn.meta.adam(0.1), slots=slots, steps=steps
        )
    np.testing.assert_allclose(params["w"], six_steps_of_torch_s_adam(), rtol=1e-5)


def test_slots_get_a_gradient():
    """The momentum that an inner loop starts with can be learned: w - lr * 0.9 * trace - ..."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    params = {"w": jnp.array(2.0)}

    def after(trace):
        slots = optimizer.init(params)
        slots = (slots[0]._replace(trace={"w": trace}), *slots[1:])
        loss = lambda p: 3.0 * p["w"]
        return nn.meta.adapt(None, params, loss, (), optimizer=optimizer, slots=slots).params["w"]

    np.testing.assert_allclose(jax.grad(after)(jnp.array(1.0)), -0.1 * 0.9, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays(dtype):
    fn, params = nn.functionalize(nn.Linear(2, 1))
    params = {n: p.astype(dtype) for n, p in params.items()}
    x, y = jnp.ones((3, 2), dtype), jnp.zeros((3, 1), dtype)
    for lr in (0.1, nn.meta.learning_rates(params, 0.1), jnp.asarray(0.1)):
        adapted = nn.meta.adapt(fn, params, F.mse_loss, (x, y), lr=lr, steps=7)
        assert {p.dtype for p in adapted.params.values()} == {jnp.dtype(dtype)}


def test_tied_parameters_move_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    fn, params = nn.functionalize(Tied())
    assert list(params) == ["a.weight"]
    x = jnp.eye(3)
    grads = jax.grad(
        lambda p: nn.meta.adapt(fn, p, F.mse_loss, (x, x), lr=0.1, steps=2).losses[-1]
    )(params)

    def by_hand(w):
        loss = lambda w: ((x @ w.T @ w.T - x) ** 2).mean()
        return loss(w - 0.1 * jax.grad(loss)(w))

    np.testing.assert_allclose(
        grads["a.weight"], jax.grad(by_hand)(params["a.weight"]), rtol=1e-4, atol=1e-6
    )


def test_the_module_is_never_touched():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = {k: np.array(v) for k, v in model.state_dict().items()}
    fn, params, state = nn.functionalize(model, mutable=True)
    nn.meta.adapt(fn, params, F.mse_loss, (jnp.eye(2), jnp.eye(2)), lr=0.1, steps=3, state=state)
    for k, v in model.state_dict().items():
        np.testing.assert_array_equal(v, before[k])


# --------------------------------------------------------------------------------------------------
# Bad input


LINEAR = nn.functionalize(nn.Linear(2, 1))
MUTABLE = nn.functionalize(nn.BatchNorm1d(2), mutable=True)[0]


def call(**changes):
    options = {
        "fn": LINEAR[0],
        "params": LINEAR[1],
        "loss": F.mse_loss,
        "data": (jnp.ones((3, 2)), jnp.zeros((3, 1))),
        "lr": 0.1,
        **changes,
    }
    positional = [options.pop(n) for n in ("fn", "params", "loss", "data")]
    return nn.meta.adapt(*positional, **options)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"lr": None}, TypeError, "without a learning rate"),
        ({"loss": lambda out, y: out}, TypeError, r"inner loss is of shape \(3, 1\)"),
        ({"loss": lambda out, y: jnp.int32(3)}, TypeError, "inner loss is of shape .* int32"),
        ({"only": "head.*"}, KeyError, r"'head\.\*', of which there is none"),
        ({"only": ["weight", "scale"]}, KeyError, "'scale', of which there is none"),
        ({"only": lambda name: False}, KeyError, "a filter that chooses nothing"),
        ({"only": 3}, TypeError, "a filter of type int"),
        ({"lr": {"weight": 0.1}}, KeyError, r"without \['bias'\]"),
        ({"lr": {"weight": 0.1, "bias": 0.1, "x": 1.0}}, KeyError, r"for \['x'\]"),
        ({"lr": {"weight": jnp.ones(5), "bias": 0.1}}, (ValueError, RuntimeError), "."),
        ({"fn": nn.Linear(2, 1)}, TypeError, "a Linear as fn"),
        ({"params": nn.Linear(2, 1)}, TypeError, "a Linear as params"),
        ({"data": ()}, TypeError, "given no data"),
        ({"lr": "0.1"}, TypeError, "lr is a number"),
        ({"steps": 0}, ValueError, "steps must be a positive integer, got 0"),
        ({"steps": True}, ValueError, "steps must be a positive integer"),
        ({"checkpoint": "some"}, ValueError, "checkpoint must be one of"),
        ({"truncate": -1}, ValueError, "truncate must be"),
        ({"data": jnp.ones((3, 2))}, TypeError, "pass a tuple"),
        ({"data": (jnp.ones((0, 2)), jnp.zeros((0, 1)))}, nn.ShapeError, "batch of 0 examples"),
        (
            {"data": (jnp.ones((5, 0, 2)), jnp.zeros((5, 0, 1))), "batches": True, "steps": 5},
            nn.ShapeError,
            "batch of 0 examples",
        ),
        ({"batches": True, "steps": 5}, nn.ShapeError, r"data\[0\] of shape \(3, 2\)"),
        ({"lr": nn.meta.PerStep(jnp.ones(3)), "steps": 5}, nn.ShapeError, "3 rows for 5 steps"),
        ({"unroll": -1}, ValueError, "unroll must be"),
        ({"rng": "a"}, TypeError, "as a random key or seed"),
        ({"state": {}}, TypeError, "given state for a function that takes none"),
        ({"fn": MUTABLE}, TypeError, "given no state for a function that takes it"),
        ({"slots": {"mu": 0.0}, "optimizer": optax.sgd(0.1)}, nn.ShapeError, "slots"),
        ({"slots": {"mu": 0.0}}, nn.ShapeError, "slots"),
        ({"optimizer": "adam"}, TypeError, "optimizer of type str"),
        ({"optimizer": optax.adam(0.1)}, ValueError, "not finite"),
        ({"optimizer": optax.sign_sgd(0.1)}, ValueError, "zero everywhere"),
    ],
)
def test_bad_input_is_refused(changes, error, message, standard_promotion):
    with pytest.raises(error, match=message):
        call(**changes)


def test_an_optimizer_that_is_not_differentiable_is_fine_in_first_order(standard_promotion):
    for optimizer in (optax.adam(0.1), optax.sign_sgd(0.1)):
        adapted = call(optimizer=optimizer, lr=None, first_order=True)
        assert jnp.isfinite(adapted.params["weight"]).all()


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1),
        optax.adam(0.1, eps_root=1e-8),
        optax.adamw(0.1, eps_root=1e-8),
        optax.chain(optax.clip(1.0), optax.sgd(0.1)),
        optax.sgd(optax.cosine_decay_schedule(0.1, 10)),
    ],
)
def test_smooth_optimizers_pass_the_check(optimizer, standard_promotion):
    assert jnp.isfinite(call(optimizer=optimizer, lr=None, steps=2).params["weight"]).all()


def test_a_traced_learning_rate_inside_an_optax_optimizer_gets_its_gradient(standard_promotion):
    def after(rate):
        return nn.meta.adapt(
            None, 1.0, lambda w: 0.5 * w**2, (), optimizer=optax.sgd(rate), steps=2
        ).params

    np.testing.assert_allclose(jax.jit(jax.grad(after))(0.1), -2 * 0.9, rtol=1e-5)


def test_adam_has_no_nan_where_gradients_are_zero(standard_promotion):
    # A ReLU that is off: its weights get a gradient of zero at every step.
    w = {"off": jnp.array([-1.0, -2.0]), "on": jnp.array([1.0])}
    loss = lambda p: jax.nn.relu(p["off"]).sum() + (p["on"] ** 2).sum()

    def outer(w):
        adapted = nn.meta.adapt(None, w, loss, (), optimizer=nn.meta.adam(0.1), steps=10)
        return loss(adapted.params)

    grads = quickly(jax.grad(outer))(w)
    assert all(bool(jnp.isfinite(g).all()) for g in grads.values())
    with pytest.raises(ValueError, match="eps_root"):
        nn.meta.adam(0.1, eps_root=0.0)


def test_parameters_that_are_not_floating_are_named():
    with pytest.raises(nn.DtypeError, match=r"params\['n'\] of dtype int32"):
        nn.meta.adapt(
            None,
            {"w": jnp.ones(2), "n": jnp.ones((), jnp.int32)},
            lambda p: p["w"].sum(),
            (),
            lr=0.1,
        )


def test_a_filter_keeps_integers_out():
    params = {"w": jnp.ones(2), "n": jnp.ones((), jnp.int32)}
    adapted = nn.meta.adapt(None, params, lambda p: p["w"].sum(), (), lr=0.5, only="w")
    assert adapted.params["w"].tolist() == [0.5, 0.5]
    assert adapted.params["n"].dtype == jnp.int32


@pytest.mark.parametrize(
    ("shape", "lr"),
    [
        ((), jnp.full(3, 0.1)),
        ((1,), jnp.full(3, 0.1)),
        ((2,), jnp.full(3, 0.1)),
        ((1,), {"w": jnp.full((3, 1), 0.1)}),
        ((), nn.meta.PerStep(jnp.full((2, 3), 0.1))),
        ((1,), {"w": nn.meta.PerStep(jnp.full((2, 3), 0.1))}),
    ],
    ids=["scalar", "one", "two", "named", "rows", "named-rows"],
)
def test_a_learning_rate_that_would_change_a_shape_is_an_error(shape, lr):
    params = {"w": jnp.ones(shape)}
    with pytest.raises(
        nn.ShapeError, match=r"learning rate of shape \(3,.*\['w'\](?s:.*)has shape"
    ):
        nn.meta.adapt(None, params, lambda p: (p["w"] ** 2).sum(), (), lr=lr, steps=2)


def test_a_tree_of_learning_rates_has_the_shapes_of_the_parameters():
    objective = lambda p: (p[0] ** 2).sum() + p[1] ** 2
    start = (jnp.ones(2), jnp.ones(()))
    run = lambda lr: nn.meta.adapt(None, start, objective, (), lr=lr).params
    np.testing.assert_allclose(run((jnp.array([0.1, 0.2]), 0.3))[0], [0.8, 0.6], rtol=1e-6)
    with pytest.raises(nn.ShapeError, match=r"params\[1\]"):
        run((0.1, jnp.ones(2)))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.lbfgs(),
        optax.polyak_sgd(),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    ],
    ids=["lbfgs", "polyak", "plateau"],
)
def test_an_optimizer_that_asks_for_the_loss_is_told_what_adapt_passes(optimizer):
    with pytest.raises(TypeError, match="(?s)'value'.*Why.*gradients, state, params.*Instead"):
        nn.meta.adapt(None, jnp.ones(2), lambda w: (w**2).sum(), (), optimizer=optimizer)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
        pytest.param(optax.lars(0.1), marks=pytest.mark.long),
        pytest.param(optax.contrib.dog(), marks=pytest.mark.long),
    ],
    ids=["adaptive_grad_clip", "lars", "dog"],
)
def test_an_optimizer_without_a_slope_at_zero_is_refused(optimizer):
    loss = lambda p: (p["w"] ** 2).sum() + (p["b"] ** 2).sum()
    run = lambda p, **options: nn.meta.adapt(
        None, p, loss, (), optimizer=optimizer, steps=2, **options
    )
    params = {"w": jnp.ones(2), "b": jnp.zeros(3)}
    with pytest.raises(nn.NotDifferentiableError, match="parameter is zero"):
        run(params)
    assert run(params, first_order=True).params["b"].shape == (3,)


def test_the_rate_of_an_injected_adam_may_be_traced():
    def end(rate):
        optimizer = optax.inject_hyperparams(nn.meta.adam)(rate)
        return nn.meta.adapt(
            None, jnp.ones(()), lambda w: w**2, (), optimizer=optimizer, steps=2
        ).params

    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer
        both = quickly(jax.value_and_grad(end))
        numeric = (both(0.101)[0] - both(0.099)[0]) / 0.002
        np.testing.assert_allclose(both(0.1)[1], numeric, rtol=1e-3)
