"""Functions of functionalize, and what holds them, in pickles: other processes and joblib get them."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import cloudpickle
import jax
import jax.numpy as jnp
import joblib
import numpy as np
import pytest

import statefulnn as nn

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)


class Net(nn.Module):
    """Frozen and trained parameters, buffers, draws, a tie."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
        self.b.weight = self.a.weight
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.b.bias.requires_grad_(False)

    def forward(self, x):
        return self.drop(self.norm(self.a(x) * self.b(x)))

    def twice(self, x):
        return 2 * self.a(x)


def by_joblib(value):
    file = io.BytesIO()
    joblib.dump(value, file)
    file.seek(0)
    return joblib.load(file)


def by_cloudpickle(value):
    return pickle.loads(cloudpickle.dumps(value))


COPIES = {
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    "old pickle": lambda v: pickle.loads(pickle.dumps(v, protocol=2)),
    "cloudpickle": by_cloudpickle,
    "joblib": by_joblib,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("mutable", [False, True])
def test_a_functionalized_function_is_the_same_after_a_pickle(way, mutable):
    model = Net() if mutable else Net().eval()
    fn, *arrays = nn.functionalize(model, mutable=mutable)
    again = COPIES[way](fn)
    same(again(*arrays, X, rng=1), fn(*arrays, X, rng=1))
    assert again.moduledef is fn.moduledef
    assert (again.__name__, again.mutable) == ("Net.forward", mutable)
    same(again.in_mode(False)(*arrays, X), fn.in_mode(False)(*arrays, X))


def test_another_method_too():
    fn, params = nn.functionalize(Net(), method="twice")
    same(COPIES["pickle"](fn)(params, X), fn(params, X))


def test_the_numbers_that_each_call_is_given_are_not_in_the_pickle():
    fn, params = nn.functionalize(nn.Linear(1000, 1000))
    assert len(pickle.dumps(fn)) < 5_000
    frozen, _ = nn.functionalize(nn.Linear(1000, 1000).requires_grad_(False))
    assert len(pickle.dumps(frozen)) > 4_000_000


def test_the_function_of_an_ensemble():
    ensemble = nn.Ensemble(lambda: nn.Linear(3, 2), 4)
    fn, params = nn.functionalize(ensemble)
    same(COPIES["pickle"](fn)(params, X), fn(params, X))


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("form", ["module", "pair", "module and params"])
def test_a_laplace_posterior(way, form):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    fn, params = nn.functionalize(model)
    models = {"module": model, "pair": (fn, params), "module and params": (model, params)}
    y = jnp.zeros((6, 1))
    posterior = nn.curvature.Laplace.fit(models[form], X, y, likelihood="regression")
    same(tuple(COPIES[way](posterior).predict(X)), tuple(posterior.predict(X)))


def local_class():
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x):
            return self.layer(x)

    return Local


@pytest.mark.parametrize("held", ["function", "ensemble", "posterior"])
def test_a_class_that_is_local_to_a_function_is_named_unless_the_pickler_takes_it_along(held):
    local = local_class()
    model = nn.Ensemble(local, 2) if held == "ensemble" else nn.Sequential(local(), nn.Tanh())
    value, params = nn.functionalize(model)
    call = lambda fn: fn(params, X)
    if held == "posterior":
        pair = (value, params)
        value = nn.curvature.Laplace.fit(pair, X, jnp.zeros((6, 1)), likelihood="regression")
        call = lambda posterior: tuple(posterior.predict(X))
    message = r"(?s)<locals>.Local\n.*Why.*Instead: move class Local to the top.*cloudpickle"
    for dump in (pickle.dumps, lambda v: joblib.dump(v, io.BytesIO())):
        with pytest.raises(nn.PicklingError, match=message):
            dump({"value": value})
    same(call(by_cloudpickle(value)), call(value))
    same(call(copy.deepcopy(value)), call(value))


def test_a_statefulized_function_as_a_module():
    module = nn.statefulize(*nn.functionalize(Net(), mutable=True)).eval()
    same(COPIES["pickle"](module)(X), module(X))


def test_another_process_calls_it(tmp_path):
    fn, params = nn.functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
    (tmp_path / "fn.pickle").write_bytes(pickle.dumps((fn, params, X, fn(params, X))))
    code = (
        "import pickle, sys, numpy as np\n"
        "fn, params, x, y = pickle.load(open(sys.argv[1], 'rb'))\n"
        "np.testing.assert_allclose(fn(params, x), y, rtol=1e-6)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "fn.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
