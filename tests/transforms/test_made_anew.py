"""nn.jit made anew: the same function compiles once, another one never gives the first one's result."""

from __future__ import annotations

import functools
import gc
import types
import warnings
import weakref

import jax
import jax.numpy as jnp
import pytest

import statefulnn as nn

X = jnp.ones((2, 2))
SCALE = 1.0
TRACES = []


def doubled(m, x):
    TRACES.append(x.shape)
    return 2 * m(x)


def test_one_function_or_model_compiles_once_however_often_nn_jit_is_called():
    model = nn.Linear(2, 2)
    TRACES.clear()
    for _ in range(20):
        assert jnp.allclose(nn.jit(doubled)(model, X), 2 * model(X), atol=1e-6)
    assert len(TRACES) == 1
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(x.shape)
            return super().forward(x)

    counted = Counted(2, 2)
    for _ in range(20):
        nn.jit(counted)(X)
    assert len(calls) == 1


def test_functions_of_one_code_give_their_own_results():
    def scaled(k):
        def f(x):
            return x * f.k

        f.k = k
        return f

    assert [float(nn.jit(scaled(k))(X)[0, 0]) for k in (1.0, 2.0, 3.0)] == [1.0, 2.0, 3.0]
    assert [float(nn.jit(lambda x, k=k: x * k)(X)[0, 0]) for k in (1.0, 2.0)] == [1.0, 2.0]
    held = {"k": 1.0}
    results = []
    for held["k"] in (1.0, 2.0):
        results.append(float(nn.jit(lambda x: x * held["k"])(X)[0, 0]))
    assert results == [1.0, 2.0]


def test_a_global_or_an_import_that_has_changed_is_read_by_the_next_function(monkeypatch):
    module = types.ModuleType("settings_of_a_test")
    monkeypatch.setitem(__import__("sys").modules, "settings_of_a_test", module)

    class Net(nn.Module):
        def forward(self, x):
            return x * SCALE

    def fresh():
        def f(m, x):
            import settings_of_a_test

            return m(x) * settings_of_a_test.S

        return nn.jit(f)

    results = []
    for scale, module.S in ((1.0, 1.0), (2.0, 1.0), (2.0, 3.0)):
        monkeypatch.setitem(globals(), "SCALE", scale)
        results.append(float(fresh()(Net(), X)[0, 0]))
    assert results == [1.0, 2.0, 6.0]


def test_attributes_of_a_function_that_a_model_holds_count():
    def activation(k):
        def f(x):
            return x * f.k

        f.k = k
        return f

    class Net(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, x):
            return self.f(x)

    compiled = nn.jit(lambda m, x: m(x))
    one, two = Net(activation(1.0)), Net(activation(2.0))
    assert [float(compiled(m, X)[0, 0]) for m in (one, two)] == [1.0, 2.0]
    one.f.k = 5.0
    assert float(compiled(one, X)[0, 0]) == 5.0


@pytest.mark.parametrize("wrap", [nn.vmap, nn.remat, jax.vmap], ids=["vmap", "remat", "jax.vmap"])
def test_models_die_although_functions_of_them_were_compiled(wrap):
    dead = []
    for _ in range(5):
        model = nn.Linear(2, 2)
        nn.jit(wrap(lambda x, model=model: model(x)))(X)
        dead.append(weakref.ref(model))
        del model
    gc.collect()
    assert [r() for r in dead] == [None] * 5


def test_functions_thrown_away_again_and_again_are_named():
    model = nn.Linear(2, 2)
    shift = [1.0]
    with pytest.warns(nn.errors.RetraceWarning, match="'f'.*anew 9 times\\n.*Why:.*\\n.*Instead:"):
        for _ in range(9):

            def f(m, x):
                return m(x) + shift[0]

            nn.jit(f)(model, X)
    with pytest.warns(nn.errors.RetraceWarning, match="anew 9 times"):
        for _ in range(9):
            nn.jit(functools.partial(lambda d, m, x: m(x) * d["a"], {"a": 2.0}))(model, X)


def test_functions_for_other_models_are_compiled_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fold in range(12):
            model, settings = nn.Linear(2, 2), {"fold": fold}
            nn.jit(lambda m, x, settings=settings: m(x) * settings["fold"])(model, X)
            nn.jit(lambda x, model=model: model(x))(X)
            del model
