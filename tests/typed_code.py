"""Code as users write it, with the types that a checker is to see; `test_types.py` has it checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np

import statefulnn as nn
import statefulnn.functional as F
from statefulnn.meta import adapt

MYPY = False  # mypy takes it for True: what it cannot see

# Names, also those that are imported when they are first used.
assert callable(nn.map) and callable(nn.save) and callable(nn.meta.adapt) and callable(adapt)
assert (
    issubclass(nn.Ensemble, nn.Module)
    and nn.io
    and nn.bridge
    and callable(nn.curvature.ggn)
    and callable(nn.func.jvp)
)
assert callable(nn.utils.parametrize.register_parametrization) and callable(F.relu)

# A parameter is an array.
p = nn.Parameter(jnp.ones((3, 2)))
assert_type(-p, jax.Array)
assert_type(2 * p, jax.Array)
assert_type(p + 1.0, jax.Array)
assert_type(p @ p.T, jax.Array)
assert_type(p[0], jax.Array)
assert_type(+p, jax.Array)
assert_type(abs(p), jax.Array)
assert_type(round(p), jax.Array)
assert_type(p.T, jax.Array)
assert_type(p.mT, jax.Array)
assert_type(p.real, jax.Array)
assert_type(p.imag, jax.Array)
assert_type(p.conj(), jax.Array)
assert_type(p.copy(), jax.Array)
assert_type(p.flatten(), jax.Array)
assert_type(p.ravel(), jax.Array)
assert_type(p.repeat(2, axis=0), jax.Array)
assert_type(p.reshape(2, 3), jax.Array)
assert_type(p.reshape((2, 3)), jax.Array)
assert_type(p.round(1), jax.Array)
assert_type(p.squeeze(), jax.Array)
assert_type(p.swapaxes(0, 1), jax.Array)
assert_type(p.take(jnp.array([0]), axis=0), jax.Array)
assert_type(p.transpose(1, 0), jax.Array)
assert_type(p.view(jnp.int32), jax.Array)
assert_type(p.block_until_ready(), jax.Array)
assert_type(p.value, jax.Array)
assert_type(p.sum(), jax.Array)
assert_type(p.shape, tuple[int, ...])
assert_type(jnp.sum(p), jax.Array)
assert_type(jax.nn.relu(p), jax.Array)
assert_type(jnp.where(p > 0, p, 0.0), jax.Array)
p[0] = 3.0
p.value = p * 2
p *= 2.0
assert_type(p, nn.Parameter)
array: jax.Array = p
assert np.asarray(p).shape == p.shape and float(p.mean()) and len(p) == 3


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2, width)
        self.scale = nn.Parameter(jnp.ones(width))
        self.twin = nn.Ref(self.inner)

    def forward(self, x: jax.Array, *, double: bool = False) -> jax.Array:
        return self.inner(x) * self.scale * jnp.where(double, 2.0, 1.0) + self.twin(x)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Buffer(jnp.zeros((), jnp.int32))

    def forward(self, x):
        self.calls = self.calls + 1
        return x


# A call is typed by forward.
net, x = Net(4), jnp.ones((5, 2))
assert_type(net(x, double=True), jax.Array)
assert_type(net.train().eval(), Net)
if not MYPY:
    assert_type(net.twin, nn.Linear)
for name, parameter in net.named_parameters():
    assert_type(name, str)
    assert_type(parameter, nn.Parameter)
model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1)))
model[1][1].weight.value = model[1][1].weight * 0.5


# Transforms keep the arguments, and the results where they are known.
def loss_fn(net: Net, x: jax.Array, weight: float = 1.0) -> jax.Array:
    return net(x).sum() * weight


assert_type(nn.jit(loss_fn)(net, x, weight=2.0), jax.Array)
assert_type(nn.jit(net)(x, double=True), jax.Array)
assert_type(nn.remat(loss_fn)(net, x), jax.Array)
loss, gradients = nn.value_and_grad(loss_fn)(net, x, weight=2.0)
assert_type(loss, jax.Array)
norm = sum((g**2).sum() for g in gradients.values())
gradients = nn.grad(loss_fn)(net, x)
gradients["scale"] * 2


@nn.jit
def step(net: Net, x: jax.Array) -> float:
    return float(x.shape[0])


@nn.jit(static_argnames="n", donate=0)
def repeat(net: Net, x: jax.Array, n: int) -> jax.Array:
    return net(x) * n


assert_type(step(net, x), float)
assert_type(repeat(nn.mutable(net), x, n=2), jax.Array)
assert_type(step.trace_count, int)


class Trainer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(2)

    @nn.jit
    def step(self, x: jax.Array, rate: float = 0.1) -> jax.Array:
        return self.net(x)


assert_type(Trainer().step(x, rate=0.2), jax.Array)


def with_aux(net: Net, x: jax.Array) -> tuple[jax.Array, dict[str, int]]:
    return net(x).sum(), {"n": 1}


(loss, aux), gradients = nn.value_and_grad(with_aux, has_aux=True)(net, x)
assert_type(loss, jax.Array)
assert_type(aux, dict[str, int])
gradients, aux = nn.grad(with_aux, has_aux=True)(net, x)
assert_type(aux, dict[str, int])
a_gradient: jax.Array = nn.grad(lambda x: x.sum())(x)

fn, params = nn.functionalize(net)
assert_type(params, dict[str, jax.Array])
assert_type(fn(params, x, rng=jax.random.key(0)), jax.Array)
fn2, params, state = nn.functionalize(net, mutable=True)
out, state = fn2(params, state, x)
assert_type(out, jax.Array)
per_example: Callable[..., Any] = nn.vmap(loss_fn, in_axes=(None, 0))
assert_type(nn.vmap(loss_fn, in_axes=(None, 0))(net, x[:, None]), jax.Array)
seen = {nn.Parameter(jnp.ones(1)), net.inner}
for q in net.parameters():
    assert_type(q.requires_grad_(False), nn.Parameter)
assert_type(nn.materialize(model), nn.Sequential)
assert_type(nn.utils.skip_init(nn.Linear, 2, 3), nn.Linear)

# Layers and functions say what they give.
assert_type(nn.Identity()("x"), str)
assert_type(F.mse_loss(x, x), jax.Array)
outputs, weights = nn.MultiheadAttention(2, 1)(x, x, x)
assert_type(outputs, jax.Array)
assert_type(weights, jax.Array | None)
steps, (h, c) = nn.LSTM(2, 3)(x)
assert_type(steps, jax.Array)
assert_type(h, jax.Array)
steps, h = nn.jit(nn.GRU(2, 3))(x)
assert_type(h, jax.Array)
packed, (h, c) = nn.LSTM(2, 3)(nn.utils.rnn.pack_sequence([x, x[:3]]))
assert_type(packed, nn.utils.rnn.PackedSequence)
assert_type(nn.init.zeros_(p), nn.Parameter)


def without_types(model, x):
    """As most code is: what nothing is known of may be compiled and called."""
    return nn.jit(model)(x)[0]
