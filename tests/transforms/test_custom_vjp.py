"""nn.custom_vjp beside jax.custom_vjp on explicit arrays, formulas and finite differences."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn

X = jnp.asarray([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])


class Counted(nn.Module):
    """tanh(x Wᵀ), counts its calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(jnp.asarray([[0.2, -0.4, 0.1], [0.7, 0.3, -0.2]]))
        self.register_buffer("calls", jnp.zeros((), jnp.int32))

    def forward(self, x):
        self.calls = self.calls + 1
        return jnp.tanh(x @ self.weight.T)


def rule(scale=1.0):
    """The model with its gradient by hand; `scale` makes it another one than JAX would compute."""

    @nn.custom_vjp
    def f(model, x):
        return model(x)

    def fwd(model, x):
        y = model(x)
        return y, (model, x, y)

    def bwd(residuals, g):
        model, x, y = residuals
        pulled = g * (1 - y**2)
        return {"weight": scale * pulled.T @ x}, scale * pulled @ model.weight

    f.defvjp(fwd, bwd)
    return f


def explicit(scale=1.0):
    """The same by jax.custom_vjp, on arrays."""

    @jax.custom_vjp
    def f(w, x):
        return jnp.tanh(x @ w.T)

    def fwd(w, x):
        y = f(w, x)
        return y, (w, x, y)

    def bwd(residuals, g):
        w, x, y = residuals
        pulled = g * (1 - y**2)
        return scale * pulled.T @ x, scale * pulled @ w

    f.defvjp(fwd, bwd)
    return f


def loss_of(f):
    return lambda model, x: jnp.sum(f(model, x) ** 3)


def close(got, expected):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=2e-6, atol=1e-7)


WRAPS = {
    "eager": lambda g: g,
    "nn.jit": nn.jit,
    "nn.remat inside nn.jit": lambda g: nn.jit(lambda m, x: nn.remat(g)(m, x)),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_gradients_are_those_of_jax_custom_vjp_and_writes_come_back_once(wrap):
    model = Counted()
    both = WRAPS[wrap](nn.value_and_grad(loss_of(rule(scale=2.0)), argnums=(0, 1)))
    expected = jax.value_and_grad(loss_of(explicit(scale=2.0)), argnums=(0, 1))
    for i in (1, 2):
        value, (of_model, of_x) = both(model, X)
        value_j, (of_w, of_x_j) = expected(model.weight.value, X)
        close(value, value_j)
        assert list(of_model) == ["weight"]
        close(of_model["weight"], of_w)
        close(of_x, of_x_j)
        assert int(model.calls) == i


@pytest.mark.parametrize("jit", [False, True])
def test_without_a_gradient_the_function_itself_runs_and_writes_once(jit):
    model = Counted()
    f = nn.jit(rule()) if jit else rule()
    close(f(model, X), np.tanh(np.asarray(X) @ np.asarray(model.weight).T))
    assert int(model.calls) == 1


def test_the_rule_of_the_model_s_own_gradient_agrees_with_finite_differences():
    model, direction = Counted(), jnp.asarray([[0.3, -0.7, 0.2], [-0.1, 0.4, 0.9]])
    grads = nn.grad(loss_of(rule()))(model, X)
    weight, eps = np.asarray(model.weight, np.float64), 1e-5

    def loss(w):
        return np.sum(np.tanh(np.asarray(X, np.float64) @ w.T) ** 3)

    step = eps * np.asarray(direction, np.float64)
    slope = (loss(weight + step) - loss(weight - step)) / (2 * eps)
    assert float(jnp.sum(grads["weight"] * direction)) == pytest.approx(slope, rel=1e-4)


def test_second_derivatives_differentiate_the_backward_pass():
    def squared(f):
        return lambda model, x: jnp.sum(nn.grad(loss_of(f))(model, x)["weight"] ** 2)

    def plain(w):
        return jnp.sum(jax.grad(lambda w: jnp.sum(jnp.tanh(X @ w.T) ** 3))(w) ** 2)

    model = Counted()
    expected = jax.grad(plain)(model.weight.value)
    for g in (nn.grad(squared(rule())), nn.jit(nn.grad(squared(rule())))):
        np.testing.assert_allclose(g(model, X)["weight"], expected, rtol=1e-4)


def test_jax_grad_over_arrays_with_the_model_from_outside():
    model = Counted()
    got = jax.grad(lambda x: loss_of(rule(2.0))(model, x))(X)
    close(got, jax.grad(lambda x: loss_of(explicit(2.0))(model.weight.value, x))(X))
    assert int(model.calls) == 1


@pytest.mark.parametrize("transform", [lambda g: g, jax.jit], ids=["eager", "jit"])
def test_jax_grad_over_the_parameters_of_a_pure_function(transform):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Counted()

        def forward(self, x):
            return rule(2.0)(self.inner, x)

    model = Outer()
    fn, params, state = nn.functionalize(model, mutable=True)

    def loss(params):
        out, new = fn(params, state, X)
        return jnp.sum(out**3), new

    grads, new = transform(jax.grad(loss, has_aux=True))(params)
    expected = jax.grad(loss_of(explicit(2.0)))(model.inner.weight.value, X)
    close(grads["inner.weight"], expected)
    assert int(new["inner.calls"]) == 1
    assert int(model.inner.calls) == 0


def test_jax_jit_of_a_read_only_module():
    @nn.custom_vjp
    def f(layer, x):
        return layer(x)

    f.defvjp(
        lambda layer, x: (layer(x), layer),
        lambda layer, g: (None, 7.0 * g @ layer.weight),
    )
    layer = nn.Linear(3, 2)
    got = jax.jit(jax.grad(lambda x, layer: f(layer, x).sum()))(X, layer)
    close(got, 7.0 * np.ones((2, 2)) @ np.asarray(layer.weight))


def test_lanes_that_share_a_module_write_it_once():
    model, xs = Counted(), X[:, None]
    ys = nn.vmap(rule(), in_axes=(None, 0))(model, xs)
    close(ys[:, 0], np.tanh(np.asarray(X) @ np.asarray(model.weight).T))
    assert int(model.calls) == 1

    of_sum = nn.grad(lambda m, xs: nn.vmap(loss_of(rule(2.0)), in_axes=(None, 0))(m, xs).sum())
    close(of_sum(model, xs)["weight"], jax.grad(loss_of(explicit(2.0)))(model.weight.value, X))
    assert int(model.calls) == 2

    of_each = nn.vmap(nn.grad(loss_of(rule(2.0))), in_axes=(None, 0))(model, xs)["weight"]
    expected = jax.vmap(jax.grad(loss_of(explicit(2.0))), (None, 0))(model.weight.value, xs)
    close(of_each, expected)
    assert int(model.calls) == 3


def test_what_is_written_passes_no_gradient():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(jnp.asarray(3.0))
            self.register_buffer("last", jnp.zeros(()))

        def forward(self, x):
            self.last = self.weight * x
            return self.weight * x

    f = nn.custom_vjp(lambda m, x: m(x))
    f.defvjp(lambda m, x: (m(x), x), lambda x, g: ({"weight": g * x}, None))
    model = Keeps()
    grads = nn.grad(lambda m, x: f(m, x) + 100.0 * m.last)(model, jnp.asarray(2.0))
    assert float(grads["weight"]) == 2.0
    assert float(model.last) == 6.0


# --------------------------------------------------------------------------------------------------
# What backward passes return


def linear_rule(entries):
    """y = x Wᵀ + b of a Linear; `entries(layer, x, g)` is what bwd returns."""
    f = nn.custom_vjp(lambda layer, x: layer(x))
    f.defvjp(lambda layer, x: (layer(x), (layer, x)), lambda res, g: entries(*res, g))
    return f


def test_missing_names_and_none_are_zeros():
    layer = nn.Linear(3, 2)
    for entry in (
        {"bias": jnp.asarray([1.0, 2.0])},
        {"bias": jnp.asarray([1.0, 2.0]), "weight": None},
    ):
        f = linear_rule(lambda layer, x, g, entry=entry: (entry, None))
        grads, of_x = nn.grad(lambda m, x, f=f: f(m, x).sum(), argnums=(0, 1))(layer, X)
        assert grads["bias"].tolist() == [1.0, 2.0]
        assert not np.any(grads["weight"]) and not np.any(of_x)
    f = linear_rule(lambda layer, x, g: (None, None))
    grads = nn.grad(lambda m, x: f(m, x).sum())(layer, X)
    assert not any(map(np.any, grads.values()))


def test_frozen_parameters_get_no_entry_as_in_nn_grad():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad = False
    f = linear_rule(lambda layer, x, g: ({"bias": g.sum(0)}, None))
    assert nn.grad(lambda m, x: f(m, x).sum())(layer, X)["bias"].tolist() == [2.0, 2.0]
    f = linear_rule(lambda layer, x, g: ({"weight": g.T @ x}, None))
    with pytest.raises(nn.UnknownNameError, match="'bias'"):
        nn.grad(lambda m, x: f(m, x).sum())(layer, X)


def test_a_parameter_that_two_arguments_share_gets_the_sum():
    f = nn.custom_vjp(lambda a, b: a.weight.sum() + 2.0 * b.weight.sum())
    f.defvjp(
        lambda a, b: (f(a, b), None),
        lambda _, g: ({"weight": jnp.full((2, 3), g)}, {"weight": jnp.full((2, 3), 2.0 * g)}),
    )
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.weight = a.weight
    both = nn.grad(lambda pair: f(pair[0], pair[1]))([a, b])
    assert both[0]["weight"].tolist() == [[3.0] * 3] * 2
    assert nn.grad(f)(a, a)["weight"].tolist() == [[3.0] * 3] * 2


def test_arguments_may_be_parameters_and_trees_of_modules_and_arrays():
    @nn.custom_vjp
    def f(p, parts):
        return p * parts["layer"].weight.sum() * parts["x"][0]

    def fwd(p, parts):
        return f(p, parts), (p.value, parts["layer"].weight.sum(), parts["x"][0])

    def bwd(residuals, g):
        p, w, x = residuals
        ones = jnp.ones((2, 3))
        return g * w * x, {"layer": {"weight": g * p * x * ones}, "x": (g * p * w, None)}

    f.defvjp(fwd, bwd)
    p, layer, x = nn.Parameter(jnp.asarray(2.0)), nn.Linear(3, 2), (jnp.asarray(5.0), jnp.ones(4))
    of_p, of_parts = nn.grad(f, argnums=(0, 1))(p, {"layer": layer, "x": x})
    w = np.asarray(layer.weight)
    close(of_p, w.sum() * 5)
    close(of_parts["layer"]["weight"], np.full((2, 3), 10.0))
    assert not np.any(of_parts["layer"]["bias"])
    close(of_parts["x"][0], 2 * w.sum())
    assert not np.any(of_parts["x"][1])


def test_nondiff_argnums_come_first_in_the_backward_pass():
    @nn.custom_vjp
    def plain(layer, x):
        return layer(x)

    def fwd(activation, layer, power, x):
        return activation(layer(x)) ** power, (layer, x)

    def bwd(activation, power, residuals, g):
        layer, x = residuals
        pulled = jax.grad(lambda y: jnp.sum(g * activation(y) ** power))(layer(x))
        return {"weight": pulled.T @ x, "bias": pulled.sum(0)}, pulled @ layer.weight

    f = nn.custom_vjp(
        lambda activation, layer, power, x: activation(layer(x)) ** power, nondiff_argnums=(0, 2)
    )
    f.defvjp(fwd, bwd)
    layer = nn.Linear(3, 2)
    for wrap in (lambda g: g, nn.jit):
        got = wrap(nn.grad(lambda m, x: f(jnp.sin, m, 3, x).sum()))(layer, X)
        expected = nn.grad(lambda m, x: (jnp.sin(m(x)) ** 3).sum())(layer, X)
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)
    with pytest.raises(TypeError, match="nondiff_argnums"):
        f(jnp.sin, layer, nn.Linear(1, 1), X)
    with pytest.raises(TypeError, match="nondiff_argnums"):
        jax.jit(lambda power: f(jnp.sin, layer, power, X))(3.0)


# --------------------------------------------------------------------------------------------------
# Modules and methods


def test_a_module_and_a_method_are_their_own_first_argument():
    layer = nn.Linear(3, 2)
    for of_what in (layer, layer.forward):
        f = nn.custom_vjp(of_what)
        f.defvjp(lambda m, x: (m.forward(x), x), lambda x, g: (None, 4.0 * jnp.ones_like(x)))
        close(f(X), layer(X))
        close(jax.grad(lambda x, f=f: f(x).sum())(X), np.full((2, 3), 4.0))
    model = Counted()
    f = nn.custom_vjp(model)
    f.defvjp(lambda m, x: (m(x), x), lambda x, g: (None, 4.0 * jnp.ones_like(x)))
    compiled = nn.jit(f)
    for _ in range(2):
        close(compiled(X), f(X))
    assert int(model.calls) == 4 and compiled.trace_count == 1


def test_as_a_decorator_of_forward():
    class Reversed(nn.Module):
        """x times w; gradients for x come with the other sign."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(jnp.asarray(2.0))

        @nn.custom_vjp
        def forward(self, x):
            return self.w * x

        forward.defvjp(
            lambda self, x: (self.w * x, (self, x)),
            lambda res, g: ({"w": jnp.sum(g * res[1])}, -g * res[0].w),
        )

    model = nn.Sequential(nn.Identity(), Reversed())
    close(model(X), 2 * X)
    for wrap in (lambda g: g, nn.jit):
        of_m, of_x = wrap(nn.grad(lambda m, x: m(x).sum(), argnums=(0, 1)))(model, X)
        close(of_m["1.w"], X.sum())
        close(of_x, np.full((2, 3), -2.0))
    close(nn.jit(model)(X), 2 * X)
    close(nn.jit(model[1].forward)(X), 2 * X)


def test_arguments_by_name_and_defaults():
    @nn.custom_vjp
    def f(layer, x, scale=2.0):
        return scale * layer(x)

    f.defvjp(
        lambda layer, x, scale: (f(layer, x, scale), x),
        lambda x, g: (None, jnp.zeros_like(x), jnp.sum(g)),
    )
    layer = nn.Linear(3, 2)
    close(f(layer, x=X), 2 * layer(X))
    close(jax.grad(lambda s: f(x=X, layer=layer, scale=s).sum())(1.0), 4.0)


def test_random_draws_are_carried_and_the_generator_advances_once():
    drop = nn.Dropout(0.5)
    f = nn.custom_vjp(lambda drop, x: drop(x))
    f.defvjp(lambda drop, x: (drop(x), x), lambda x, g: (None, g))
    x = jnp.ones((64,))
    for wrap in (lambda f: f, nn.jit):
        nn.manual_seed(0)
        expected = [
            nn.value_and_grad(lambda m, x: (m(x) * x).sum(), argnums=1)(drop, x)[0] for _ in "ab"
        ]
        nn.manual_seed(0)
        both = wrap(nn.value_and_grad(lambda m, x: (f(m, x) * x).sum(), argnums=1))
        got = [both(drop, x)[0] for _ in "ab"]
        close(jnp.stack(got), jnp.stack(expected))
        assert got[0] != got[1]


def test_compiled_once_and_nothing_of_the_model_is_kept():
    def run():
        model = Counted()
        step = nn.jit(nn.grad(loss_of(rule())))
        for _ in range(3):
            step(model, X)
        assert step.trace_count == 1
        assert int(model.calls) == 3
        return weakref.ref(model)

    gone = run()
    gc.collect()
    assert gone() is None


def test_no_tracer_stays_behind():
    with jax.checking_leaks():
        model = Counted()
        nn.jit(nn.grad(loss_of(rule())))(model, X)
    assert not isinstance(model._buffers["calls"].value, jax.core.Tracer)


# --------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("jit", [False, True])
def test_a_module_in_the_residuals_can_be_read_only(jit):
    f = linear_rule(lambda layer, x, g: (setattr(layer.weight, "value", layer.weight + 1), None))
    layer = nn.Linear(3, 2)
    before = np.asarray(layer.weight)
    g = nn.grad(lambda m, x: f(m, x).sum())
    with pytest.raises(nn.StateWriteError, match="'weight'(.|\n)*backward pass"):
        (nn.jit(g) if jit else g)(layer, X)
    np.testing.assert_array_equal(layer.weight, before)


WRONG = {
    "no tuple": (lambda layer, x, g: None, TypeError, "NoneType, and not 2 entries"),
    "too few": (lambda layer, x, g: (None,), TypeError, "tuple of length 1, and not 2 entries"),
    "an array for a module": (lambda layer, x, g: (g, None), nn.UnknownNameError, "for a module"),
    "an unknown name": (
        lambda layer, x, g: ({"wieght": g}, None),
        nn.UnknownNameError,
        r"returned \['wieght'\](.|\n)*\['weight', 'bias'\]",
    ),
    "a wrong shape": (
        lambda layer, x, g: ({"weight": g}, None),
        nn.ShapeError,
        r"float32\[2, 2\] for '\[0\].weight'(.|\n)*float32\[2, 3\]",
    ),
    "a wrong dtype": (
        lambda layer, x, g: (None, jnp.zeros((2, 3), jnp.float16)),
        nn.DtypeError,
        r"float16\[2, 3\] for an array argument",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_cotangents_are_errors_that_name_what_they_are_for(wrong):
    entries, error, text = WRONG[wrong]
    f = linear_rule(entries)
    with pytest.raises(error, match=text) as info:
        nn.grad(lambda m, x: f(m, x).sum(), argnums=(0, 1))(nn.Linear(3, 2), X)
    assert "Why: " in str(info.value) and "Instead: " in str(info.value)


def test_other_wrong_uses_say_what_to_do():
    f = nn.custom_vjp(lambda m, x: m(x))
    model = Counted()
    with pytest.raises(AttributeError, match="defvjp"):
        f(model, X)
    f.defvjp(lambda m, x: m(x), lambda res, g: (None, None))
    with pytest.raises(TypeError, match="return out, residuals"):
        nn.grad(loss_of(f))(model, X)
    f = nn.custom_vjp(lambda m, *, x: m(x))
    f.defvjp(lambda m, x: (m(x), None), lambda res, g: (None, None))
    with pytest.raises(TypeError, match="keyword-only"):
        f(model, x=X)
    f = nn.custom_vjp(lambda m, x: (m, m(x)))
    f.defvjp(lambda m, x: ((m, m(x)), None), lambda res, g: (None, None))
    with pytest.raises(TypeError, match="returned a module"):
        f(model, X)
    assert int(model.calls) == 0


def test_a_forward_pass_that_writes_something_else_is_an_error_where_both_run():
    f = nn.custom_vjp(lambda m, x: m(x))
    f.defvjp(lambda m, x: (jnp.tanh(x @ m.weight.T), None), lambda res, g: (None, None))
    model = Counted()
    with pytest.raises(nn.StateWriteError, match=r"calls' in only one of a function"):
        nn.grad(nn.jit(loss_of(f)))(model, X)
    assert int(model.calls) == 0


@pytest.mark.parametrize("where", ["function", "forward pass"])
def test_a_change_of_structure_raises(where):
    def changes(m, x):
        m.flag = 3
        return m(x)

    def keeps(m, x):
        return m(x)

    f = nn.custom_vjp(changes if where == "function" else keeps)
    fwd = changes if where == "forward pass" else keeps
    f.defvjp(lambda m, x: (fwd(m, x), x), lambda x, g: (None, None))
    model = Counted()
    with pytest.raises(nn.StructureChangeError, match="flag"):
        if where == "function":
            f(model, X)
        else:
            nn.grad(loss_of(f))(model, X)
    assert not hasattr(model, "flag") and int(model.calls) == 0


def test_a_model_from_outside_that_is_written_under_a_trace_is_a_leak():
    model, other = Counted(), Counted()

    def uses_other(m, x):
        other(x)
        return m(x)

    f = nn.custom_vjp(uses_other)
    f.defvjp(lambda m, x: (uses_other(m, x), x), lambda x, g: (None, None))
    with pytest.raises(nn.TraceLeakError, match="calls"):
        nn.jit(f)(model, X)
    assert int(other.calls) == 0 and int(model.calls) == 0


def clipped(call, weighs=None):
    """A rule whose functions call what they close over, or what they are given first."""
    f = nn.custom_vjp(lambda act, x: call(act, x), nondiff_argnums=0)
    bwd = lambda act, x, g: (jnp.clip(g if weighs is None else g * weighs(act, x), -1, 1),)
    f.defvjp(lambda act, x: (call(act, x), x), bwd)
    return f


CLOSING = {
    "argument": lambda m, x: clipped(lambda act, x: act(x))(lambda x: m(x), x),
    "method among the arguments": lambda m, x: clipped(lambda act, x: act(x))(m.forward, x),
    "function": lambda m, x: clipped(lambda act, x: m(x))(None, x),
    "backward pass": lambda m, x: clipped(lambda act, x: 2 * x, lambda act, x: m(x))(None, x),
    "argument, in the backward pass": lambda m, x: clipped(
        lambda act, x: 2 * x, lambda act, x: act(x)
    )(lambda x: m(x), x),
}


@pytest.mark.parametrize("transform", [lambda f: f, nn.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("use", CLOSING.values(), ids=CLOSING)
def test_closing_over_a_module_that_is_differentiated_is_refused(use, transform):
    layer, x = nn.Linear(3, 3), X
    loss = lambda m, x: (use(m, x) + m.bias).sum()
    with pytest.raises(nn.TraceLeakError) as caught:
        transform(nn.grad(loss, argnums=(0, 1)))(layer, x)
    assert "an nn.custom_vjp, or a function among its nondiff_argnums, used" in str(caught.value)
    assert "Instead: make it an argument, f(module, x)" in str(caught.value)


@pytest.mark.parametrize("transform", [lambda f: f, nn.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("use", CLOSING.values(), ids=CLOSING)
def test_closing_over_a_module_that_is_not_differentiated_is_allowed(use, transform):
    layer, x = nn.Linear(3, 3), X
    (out,) = transform(nn.vmap(lambda m, x: (use(m, x),), in_axes=(None, 0)))(layer, x)
    reads = use in list(CLOSING.values())[:3]
    np.testing.assert_allclose(out, layer(x) if reads else 2 * x, rtol=1e-6)
    slope = transform(nn.grad(lambda m, x: use(m, x).sum(), argnums=1))(layer, x)
    wanted = jnp.ones_like(x) if reads else jnp.clip(layer(x), -1, 1)
    np.testing.assert_allclose(slope, wanted, rtol=1e-6)
