"""The same small model, forward and train step, in every library that is compared.

The model is the sum of `n // 2` layers `x * scale + shift`, each with two vectors of size 8, so
that next to nothing is computed and the time of a call is close to the time of its dispatch; `n`
counts the parameter tensors. (A sum and not a chain: XLA fuses the backward pass of a long
elementwise chain into code that grows with the square of its length.) The train step is the mean
squared error, its gradient, and Adam: `3 n + 1` arrays go in and come out (parameters, both
moments, the step counter). Nothing is donated.

Every case has a `check` that gives the output of the forward, or a parameter after some steps: the
runner compares them, so that no contender computes something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _harness import Case

SIZE = 8
BATCH = 4
LEARNING_RATE = 1e-3
B1, B2, EPS = 0.9, 0.999, 1e-8


def initial_values(n: int) -> list[np.ndarray]:
    """The parameters of the model: scale, shift, scale, shift, ..., each (SIZE,)."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(n // 2):
        values.append(rng.uniform(0.98, 1.02, SIZE).astype(np.float32))
        values.append(rng.uniform(-0.01, 0.01, SIZE).astype(np.float32))
    return values


def batch() -> tuple[jax.Array, jax.Array]:
    """One input and one target, both (BATCH, SIZE)."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(BATCH, SIZE)).astype(np.float32)
    y = rng.normal(size=(BATCH, SIZE)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(y)


def mean_squared_error(out: jax.Array, y: jax.Array) -> jax.Array:
    """The loss of every contender: a scalar."""
    return jnp.mean((out - y) ** 2)


def adam(
    params: list[Any], grads: list[Any], mu: list[Any], nu: list[Any], count: Any
) -> tuple[list[Any], list[Any], list[Any], Any]:
    """One step of Adam over flat lists (Kingma and Ba 2014, algorithm 1, as optax.adam computes it)."""
    count = count + 1
    steps = count.astype(jnp.float32)
    correct1, correct2 = 1 - B1**steps, 1 - B2**steps
    mu = [B1 * m + (1 - B1) * g for m, g in zip(mu, grads, strict=True)]
    nu = [B2 * v + (1 - B2) * g**2 for v, g in zip(nu, grads, strict=True)]
    params = [
        p - LEARNING_RATE * (m / correct1) / (jnp.sqrt(v / correct2) + EPS)
        for p, m, v in zip(params, mu, nu, strict=True)
    ]
    return params, mu, nu, count


def flat_forward(params: list[Any], x: jax.Array) -> jax.Array:
    """The model as a plain function of a flat list."""
    out = x
    for i in range(0, len(params), 2):
        out = out + (x * params[i] + params[i + 1])
    return out


def nested_values(n: int) -> dict[str, dict[str, jax.Array]]:
    """The parameters of the model as a dict of dicts."""
    values = initial_values(n)
    return {
        f"layer{i}": {"scale": jnp.asarray(values[2 * i]), "shift": jnp.asarray(values[2 * i + 1])}
        for i in range(n // 2)
    }


def nested_forward(params: dict[str, dict[str, Any]], x: jax.Array) -> jax.Array:
    """The model as a plain function of a dict of dicts."""
    out = x
    for layer in params.values():
        out = out + (x * layer["scale"] + layer["shift"])
    return out


class _Fed:
    """Holds what one call hands to the next; `call` costs one Python frame, as every other case."""

    def __init__(self, step: Callable[..., Any], state: Any, *args: Any) -> None:
        self.step, self.state, self.args = step, state, args

    def call(self) -> Any:
        self.state, out = self.step(self.state, *self.args)
        return out


# ------------------------------------------------------------------------------------------ raw JAX


def _flat_forward_case(label: str, n: int) -> Case:
    x, _ = batch()
    params = [jnp.asarray(v) for v in initial_values(n)]
    # A function of its own a case: jax.jit shares its cache between wrappers of one function.
    jitted = jax.jit(lambda params, x: flat_forward(params, x))
    return Case(label, lambda: jitted(params, x), check=lambda: jitted(params, x))


def _flat_step_case(label: str, n: int) -> Case:
    x, y = batch()
    params = [jnp.asarray(v) for v in initial_values(n)]
    slots = [jnp.zeros_like(p) for p in params]

    def step(leaves: list[Any], x: jax.Array, y: jax.Array) -> tuple[list[Any], jax.Array]:
        params, mu, nu, count = leaves[:n], leaves[n : 2 * n], leaves[2 * n : 3 * n], leaves[-1]
        loss, grads = jax.value_and_grad(lambda p: mean_squared_error(flat_forward(p, x), y))(
            params
        )
        params, mu, nu, count = adam(params, grads, mu, nu, count)
        return [*params, *mu, *nu, count], loss

    state = [*params, *slots, *[jnp.zeros_like(p) for p in params], jnp.zeros((), jnp.int32)]
    fed = _Fed(jax.jit(step), state, x, y)
    return Case(label, fed.call, check=lambda: fed.state[0])


def raw_forward(n: int) -> list[Case]:
    """`jax.jit` over a flat list (twice: the second shows the noise) and over a nested dict."""
    x, _ = batch()
    nested = nested_values(n)
    jitted = jax.jit(lambda params, x: nested_forward(params, x))
    return [
        _flat_forward_case("jax.jit, flat list", n),
        _flat_forward_case("jax.jit, flat list, again", n),
        Case("jax.jit, nested dict", lambda: jitted(nested, x), check=lambda: jitted(nested, x)),
    ]


def raw_step(n: int) -> list[Case]:
    """The train step over a flat list with hand-written Adam (twice), over a nested dict with optax."""
    cases = [
        _flat_step_case("jax.jit, flat list", n),
        _flat_step_case("jax.jit, flat list, again", n),
    ]
    import optax

    x, y = batch()
    params = nested_values(n)
    tx = optax.adam(LEARNING_RATE, B1, B2, EPS)

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, slots = state
        loss, grads = jax.value_and_grad(lambda p: mean_squared_error(nested_forward(p, x), y))(
            params
        )
        updates, slots = tx.update(grads, slots, params)
        return (optax.apply_updates(params, updates), slots), loss

    fed = _Fed(jax.jit(step), (params, tx.init(params)), x, y)
    cases.append(
        Case("jax.jit, nested dict, optax", fed.call, lambda: fed.state[0]["layer0"]["scale"])
    )
    return cases


def raw_feedback(n: int) -> list[Case]:
    """`(params, output)` returned and fed back, over a flat list (twice)."""
    cases = []
    for label in ("jax.jit, flat list", "jax.jit, flat list, again"):
        x, _ = batch()
        fed = _Fed(
            jax.jit(lambda params, x: (params, flat_forward(params, x))),
            [jnp.asarray(v) for v in initial_values(n)],
            x,
        )
        cases.append(Case(label, fed.call, fed.call))
    return cases


# --------------------------------------------------------------------------------------- statefulnn


def _statefulnn_net(n: int) -> Any:
    import statefulnn as nn

    class ScaleShift(nn.Module):
        def __init__(self, scale: np.ndarray, shift: np.ndarray) -> None:
            super().__init__()
            self.scale = nn.Parameter(jnp.asarray(scale))
            self.shift = nn.Parameter(jnp.asarray(shift))

        def forward(self, x: jax.Array) -> jax.Array:
            return x * self.scale + self.shift

    class Net(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            values = initial_values(n)
            self.layers = nn.ModuleList([ScaleShift(*values[i : i + 2]) for i in range(0, n, 2)])

        def forward(self, x: jax.Array) -> jax.Array:
            out = x
            for layer in self.layers:
                out = out + layer(x)
            return out

    return Net(n)


def statefulnn_forward(n: int) -> list[Case]:
    """`nn.jit` on the model and on a function of it, and plain `jax.jit` on the model."""
    import statefulnn as nn

    x, _ = batch()
    model = _statefulnn_net(n)
    compiled_model = nn.jit(model)
    compiled = nn.jit(lambda model, x: model(x))
    plain = jax.jit(lambda model, x: model(x))
    return [
        Case("nn.jit(model)(x)", lambda: compiled_model(x), lambda: compiled_model(x)),
        Case("nn.jit(f)(model, x)", lambda: compiled(model, x), lambda: compiled(model, x)),
        Case("jax.jit(f)(model, x)", lambda: plain(model, x), lambda: plain(model, x)),
    ]


def statefulnn_step(n: int) -> list[Case]:
    """`nn.jit` with Adam written as a Module and with `nn.Optimizer`; plain `jax.jit` with optax."""
    import optax

    import statefulnn as nn

    x, y = batch()

    class Adam(nn.Module):
        """The slots are buffers; the parameters are the model's own boxes."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = nn.Ref(model)
            for i, p in enumerate(model.parameters()):
                self.register_buffer(f"mu{i}", jnp.zeros_like(p.value))
                self.register_buffer(f"nu{i}", jnp.zeros_like(p.value))
            self.register_buffer("count", jnp.zeros((), jnp.int32))

        def step(self, grads: dict[str, Any]) -> None:
            params = list(self.model.parameters())
            indices = range(len(params))
            values, mu, nu, self.count = adam(
                [p.value for p in params],
                list(grads.values()),
                [getattr(self, f"mu{i}") for i in indices],
                [getattr(self, f"nu{i}") for i in indices],
                self.count,
            )
            for i in indices:
                params[i].value = values[i]
                setattr(self, f"mu{i}", mu[i])
                setattr(self, f"nu{i}", nu[i])

    def train_step(model: Any, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, grads = nn.value_and_grad(lambda m: mean_squared_error(m(x), y))(model)
        optimizer.step(grads)
        return loss

    def first(model: Any) -> Callable[[], Any]:
        return lambda: next(iter(model.parameters())).value

    def stateful(label: str, optimizer_of: Callable[[Any], Any]) -> Case:
        model = _statefulnn_net(n)
        optimizer = optimizer_of(model)
        step = nn.jit(train_step)
        return Case(label, lambda: step(model, optimizer, x, y), first(model))

    tx = optax.adam(LEARNING_RATE, B1, B2, EPS)

    def plain_step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        model, slots = state
        loss, grads = jax.value_and_grad(lambda m: mean_squared_error(m(x), y))(model)
        updates, slots = tx.update(grads, slots, model)
        return (optax.apply_updates(model, updates), slots), loss

    model = _statefulnn_net(n)
    fed = _Fed(jax.jit(plain_step), (model, tx.init(model)), x, y)
    return [
        stateful("nn.jit, hand-written Adam", Adam),
        stateful("nn.jit, nn.Optimizer", lambda m: nn.Optimizer(m, tx)),
        Case("jax.jit, model and optax slots", fed.call, lambda: first(fed.state[0])()),
    ]


def statefulnn_feedback(n: int) -> list[Case]:
    """`jax.jit(lambda m, x: (m, m(x)))`, the module that comes out fed back in."""
    x, _ = batch()
    fed = _Fed(jax.jit(lambda model, x: (model, model(x))), _statefulnn_net(n), x)
    return [Case("jax.jit(lambda m, x: (m, m(x)))", fed.call, fed.call)]


# ----------------------------------------------------------------------------------------- flax.nnx


def _nnx_net(n: int) -> Any:
    from flax import nnx

    class ScaleShift(nnx.Module):
        def __init__(self, scale: np.ndarray, shift: np.ndarray) -> None:
            self.scale = nnx.Param(jnp.asarray(scale))
            self.shift = nnx.Param(jnp.asarray(shift))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.scale[...] + self.shift[...]

    class Net(nnx.Module):
        def __init__(self, n: int) -> None:
            values = initial_values(n)
            self.layers = nnx.List([ScaleShift(*values[i : i + 2]) for i in range(0, n, 2)])

        def __call__(self, x: jax.Array) -> jax.Array:
            out = x
            for layer in self.layers:
                out = out + layer(x)
            return out

    return Net(n)


def nnx_forward(n: int) -> list[Case]:
    """`nnx.jit` as it comes, and `nnx.jit_partial(graph=False)`, its fastest path."""
    from flax import nnx

    x, _ = batch()
    model = _nnx_net(n)
    compiled = nnx.jit(lambda model, x: model(x))
    partial = nnx.jit_partial(lambda model, x: model(x), model, graph=False)
    return [
        Case("flax.nnx.jit", lambda: compiled(model, x), lambda: compiled(model, x)),
        Case("nnx.jit_partial", lambda: partial(x), lambda: partial(x)),
    ]


def nnx_step(n: int) -> list[Case]:
    """The step of flax's own documentation: `nnx.value_and_grad` and `nnx.Optimizer` around optax."""
    import optax
    from flax import nnx

    x, y = batch()

    def train_step(model: Any, optimizer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda m: mean_squared_error(m(x), y))(model)
        optimizer.update(model, grads)
        return loss

    def pair() -> tuple[Any, Any]:
        model = _nnx_net(n)
        tx = optax.adam(LEARNING_RATE, B1, B2, EPS)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    model, optimizer = pair()
    compiled = nnx.jit(train_step)
    bound_model, bound_optimizer = pair()
    partial = nnx.jit_partial(train_step, bound_model, bound_optimizer, graph=False)
    return [
        Case(
            "flax.nnx.jit",
            lambda: compiled(model, optimizer, x, y),
            lambda: model.layers[0].scale[...],
        ),
        Case("nnx.jit_partial", lambda: partial(x, y), lambda: bound_model.layers[0].scale[...]),
    ]


# ------------------------------------------------------------------------------------------ equinox


def _equinox_net(n: int) -> Any:
    import equinox as eqx

    class ScaleShift(eqx.Module):
        scale: jax.Array
        shift: jax.Array

        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.scale + self.shift

    class Net(eqx.Module):
        layers: tuple[ScaleShift, ...]

        def __call__(self, x: jax.Array) -> jax.Array:
            out = x
            for layer in self.layers:
                out = out + layer(x)
            return out

    values = initial_values(n)
    return Net(
        tuple(
            ScaleShift(jnp.asarray(values[i]), jnp.asarray(values[i + 1])) for i in range(0, n, 2)
        )
    )


def equinox_forward(n: int) -> list[Case]:
    """`equinox.filter_jit` on a function of the model."""
    import equinox as eqx

    x, _ = batch()
    model = _equinox_net(n)
    compiled = eqx.filter_jit(lambda model, x: model(x))
    return [Case("equinox.filter_jit", lambda: compiled(model, x), lambda: compiled(model, x))]


def equinox_step(n: int) -> list[Case]:
    """The step of equinox's own documentation, with optax."""
    import equinox as eqx
    import optax

    x, y = batch()
    tx = optax.adam(LEARNING_RATE, B1, B2, EPS)

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        model, slots = state
        loss, grads = eqx.filter_value_and_grad(lambda m: mean_squared_error(m(x), y))(model)
        updates, slots = tx.update(grads, slots, model)
        return (eqx.apply_updates(model, updates), slots), loss

    model = _equinox_net(n)
    slots = tx.init(eqx.filter(model, eqx.is_inexact_array))
    fed = _Fed(eqx.filter_jit(step), (model, slots), x, y)
    return [Case("equinox.filter_jit", fed.call, lambda: fed.state[0].layers[0].scale)]


FORWARD = [raw_forward, statefulnn_forward, nnx_forward, equinox_forward]
STEP = [raw_step, statefulnn_step, nnx_step, equinox_step]
FEEDBACK = [raw_feedback, statefulnn_feedback]
