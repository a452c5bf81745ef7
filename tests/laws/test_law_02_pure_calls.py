"""Law 2: functional_call and functionalize never touch the module; reentrant and thread-safe."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefulnn as nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray([2.0, 3.0]))
        self.register_buffer("total", jnp.zeros(()))
        self.fail = False

    def forward(self, x):
        y = x * self.w
        self.total = self.total + y.sum()
        if self.fail:
            raise ValueError("in the middle")
        return y


class ReadOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(jnp.asarray([2.0, 3.0]))

    def forward(self, x):
        return x * self.w


def fingerprint(m):
    """Identity of every box and of the array inside it, and all statics."""
    return (
        [(n, id(b), id(b.value)) for n, b in m._parameters.items()],
        [(n, id(b), id(b.value)) for n, b in m._buffers.items()],
        sorted(k for k in m.__dict__ if not k.startswith("_")),
        m.training,
    )


X = jnp.asarray([1.0, 10.0])
PARAMS = {"w": jnp.asarray([5.0, 7.0])}


def pure(m, params, x=X, **kw):
    return nn.functional_call(m, params, (x,), mutable=True, **kw)


CALLS = {
    "functional_call": lambda m: pure(m, PARAMS),
    "functional_call with state": lambda m: pure(m, {**PARAMS, "total": jnp.ones(())}),
    "functionalize": lambda m: nn.functionalize(m, mutable=True)[0](
        PARAMS, {"total": jnp.zeros(())}, X
    ),
    "under jax.jit": lambda m: jax.jit(lambda p: pure(m, p))(PARAMS),
    "under jax.grad": lambda m: jax.grad(lambda p: pure(m, p)[0].sum())(PARAMS),
    "under jax.vmap": lambda m: jax.vmap(lambda x: pure(m, PARAMS, x))(jnp.stack([X, X])),
    "under lax.scan": lambda m: jax.lax.scan(
        lambda c, x: (c + pure(m, PARAMS, x)[0], None), jnp.zeros(2), jnp.stack([X, X])
    ),
    "under jax.jvp": lambda m: jax.jvp(lambda p: pure(m, p)[0], (PARAMS,), (PARAMS,)),
    "under nn.jit": lambda m: nn.jit(lambda p: pure(m, p))(PARAMS),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_pure_call_leaves_the_module_untouched(call):
    m = Net()
    before = fingerprint(m)
    CALLS[call](m)
    assert fingerprint(m) == before


@pytest.mark.parametrize("call", CALLS)
def test_a_pure_call_that_raises_in_the_middle_leaves_the_module_untouched(call):
    m = Net()
    m.fail = True
    before = fingerprint(m)
    with pytest.raises(ValueError, match="in the middle"):
        CALLS[call](m)
    assert fingerprint(m) == before
    m.fail = False
    np.testing.assert_array_equal(np.asarray(m(X)), [2.0, 30.0])


def test_the_result_and_the_new_state_are_right():
    out, state = pure(Net(), {**PARAMS, "total": jnp.asarray(1.0)})
    np.testing.assert_array_equal(np.asarray(out), [5.0, 70.0])
    assert list(state) == ["total"]
    assert float(state["total"]) == 76.0


def test_the_given_dict_is_not_written_to():
    given = {**PARAMS, "total": jnp.zeros(())}
    before = {k: id(v) for k, v in given.items()}
    pure(Net(), given)
    assert {k: id(v) for k, v in given.items()} == before
    assert float(given["total"]) == 0


@pytest.mark.parametrize("api", ["functional_call", "functionalize"])
def test_a_state_write_without_mutable_raises_and_names_the_buffer(api):
    m = Net()
    before = fingerprint(m)
    with pytest.raises(nn.StateWriteError, match="total"):
        if api == "functional_call":
            nn.functional_call(m, PARAMS, (X,))
        else:
            fn, params = nn.functionalize(m)
            fn(params, X)
    assert fingerprint(m) == before


def test_a_parameter_write_inside_a_pure_call_raises():
    class Clips(ReadOnly):
        def forward(self, x):
            self.w.value = jnp.clip(self.w.value, 0, 1)
            return x * self.w

    m = Clips()
    for mutable in (False, True):
        with pytest.raises(nn.StatefulnnError, match="w"):
            nn.functional_call(m, PARAMS, (X,), mutable=mutable)
    np.testing.assert_array_equal(np.asarray(m.w), [2.0, 3.0])


def test_a_python_counter_in_forward_does_not_leak_into_the_module():
    class Counts(ReadOnly):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.w

    m = Counts()
    with pytest.raises(nn.StatefulnnError, match="calls"):
        nn.functional_call(m, PARAMS, (X,))
    assert m.calls == 0
    assert "calls" not in m.__dict__


def test_an_inner_loop_inside_an_outer_call_on_the_same_module():
    """d/dw of (w - a * g(w)) * x with g from a pure call on the same module, inside its forward."""

    class Meta(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(jnp.asarray(2.0))
            self.adapt = True

        def forward(self, x):
            if not self.adapt:
                return self.w * x
            inner = jax.grad(
                lambda p: nn.functional_call(self, p, (x,), method="plain").sum() ** 2
            )({"w": self.w.value})
            return nn.functional_call(self, {"w": self.w - 0.1 * inner["w"]}, (x,), method="plain")

        def plain(self, x):
            return self.w * x

    m = Meta()
    x = jnp.asarray(3.0)
    grad = jax.grad(lambda p: nn.functional_call(m, p, (x,)))({"w": m.w.value})["w"]
    # adapted = w - 0.1 * 2 w x^2; out = adapted * x
    assert float(m(x)) == pytest.approx(float((2 - 0.2 * 2 * 9) * 3), rel=1e-5)
    assert float(grad) == pytest.approx((1 - 0.2 * 9) * 3, rel=1e-5)
    assert float(m.w) == 2.0


def test_calls_nest_on_one_module_with_different_parameters():
    m = ReadOnly()

    def outer(p):
        inner = nn.functional_call(m, {"w": p["w"] * 0}, (X,))
        middle = nn.functional_call(m, p, (X,))
        return inner + middle + m(X)

    np.testing.assert_array_equal(
        np.asarray(outer(PARAMS)), np.asarray(X * (5 + 0)) * [1, 7 / 5] + np.asarray(m(X))
    )


def test_eight_threads_call_one_module_with_their_own_parameters():
    m = Net()
    before = fingerprint(m)
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        results = []
        for j in range(10):
            w = jnp.asarray([float(i), float(j)])
            out, state = pure(m, {"w": w, "total": jnp.asarray(float(i))})
            results.append((out, state["total"], i, j))
        return results

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(8)):
            for out, total, i, j in results:
                np.testing.assert_array_equal(np.asarray(out), [i, 10 * j])
                assert float(total) == i + i + 10 * j
    assert fingerprint(m) == before


def test_threads_that_trace_at_once_do_not_mix():
    m = ReadOnly()

    def work(i):
        f = jax.jit(lambda p: nn.functional_call(m, p, (X,)) * i)
        return f({"w": jnp.full(2, float(i))})

    with ThreadPoolExecutor(4) as pool:
        for i, out in enumerate(pool.map(work, range(8))):
            np.testing.assert_array_equal(np.asarray(out), np.asarray(X) * i * i)


def test_the_gradient_reaches_the_given_arrays_as_in_torch_func():
    import torch

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([2.0, 3.0]))

        def forward(self, x):
            return x * self.w

    given = torch.tensor([5.0, 7.0], requires_grad=True)
    module = Theirs()
    out = torch.func.functional_call(module, {"w": given}, (torch.tensor([1.0, 10.0]),))
    (out**2).sum().backward()
    assert module.w.grad is None
    ours = jax.grad(lambda p: (nn.functional_call(ReadOnly(), p, (X,)) ** 2).sum())(PARAMS)
    np.testing.assert_allclose(np.asarray(ours["w"]), given.grad.numpy())


def test_a_generator_forward_can_be_consumed_lazily_or_raises():
    class Yields(ReadOnly):
        def forward(self, x):
            yield x * self.w
            yield x * self.w * 2

    m = Yields()
    before = fingerprint(m)
    try:
        outs = [np.asarray(o) for o in nn.functional_call(m, PARAMS, (X,))]
    except nn.StatefulnnError:
        pass
    else:
        np.testing.assert_array_equal(outs[0], [5.0, 70.0])
        np.testing.assert_array_equal(outs[1], [10.0, 140.0])
    assert fingerprint(m) == before


def test_other_methods_can_be_called():
    class TwoWays(ReadOnly):
        def encode(self, x, *, shift):
            return x * self.w + shift

    m = TwoWays()
    out = nn.functional_call(m, PARAMS, (X,), {"shift": 1.0}, method="encode")
    fn, params = nn.functionalize(m, method="encode")
    np.testing.assert_array_equal(np.asarray(out), [6.0, 71.0])
    np.testing.assert_array_equal(np.asarray(fn(params, X, shift=1.0)), [3.0, 31.0])


def test_functionalize_snapshots_its_params():
    m = ReadOnly()
    fn, params = nn.functionalize(m)
    m.w.value = jnp.zeros(2)
    np.testing.assert_array_equal(np.asarray(params["w"]), [2.0, 3.0])
    np.testing.assert_array_equal(np.asarray(fn(params, X)), [2.0, 30.0])
