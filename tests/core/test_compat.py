"""A JAX whose private attributes have other names: the numbers are the same, fewer checks are made.

The subprocess imports JAX through a loader that renames an attribute in JAX's own source, as a later JAX
might. The oracle is the same program on JAX as it is.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import statefulnn as nn
from statefulnn.core import compat

RENAMING = """
import importlib.machinery, re, sys

class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        source = self.get_data(self.path).decode()
        renamed = re.sub(rf"\\b{sys.argv[1]}\\b", "renamed_" + sys.argv[1], source)
        return compile(renamed, self.path, "exec", dont_inherit=True)

class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name.partition(".")[0] != "jax":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec

if len(sys.argv) > 1:
    sys.meta_path.insert(0, Finder)
"""

PROGRAM = """
import json, warnings
import jax, jax.numpy as jnp, numpy as np, optax

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import statefulnn as nn
warnings.simplefilter("error")


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", jnp.zeros(()))
        self.register_buffer("seen", jnp.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        if self.training:
            self.seen = x.sum()
        return x * self.calls


def refused(f, *args):
    try:
        f(*args)
    except Exception as error:
        return type(error).__name__
    return "nothing"


nn.manual_seed(0)
numbers, refusals = {}, {}
x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
opt = nn.Optimizer(model, optax.adam(1e-2))


def step(model, opt, x):
    loss, grads = nn.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
    opt.step(grads)
    return loss


compiled = nn.jit(step)
numbers["losses"] = [compiled(model, opt, x) for _ in range(3)] + [step(model, opt, x)]
numbers["trained"] = model.state_dict()

stack = jax.tree.map(lambda *v: jnp.stack(v), *[Counter() for _ in range(3)])
numbers["mapped module"] = nn.vmap(Counter.__call__)(stack, x[:3]), stack.state_dict()
shared = Counter().eval()
each = nn.vmap(Counter.__call__, in_axes=(None, 0))
numbers["shared module"] = each(shared, x), shared.state_dict()
numbers["vmap in vmap"] = nn.jit(nn.vmap(each, in_axes=(None, 0)))(shared, x), shared.state_dict()
refusals["lanes that differ"] = refused(each, Counter(), x)
numbers["dropout in lanes"] = nn.vmap(nn.Dropout.__call__, in_axes=(None, 0))(nn.Dropout(0.5), x)
out, captured = nn.jit(lambda m, x: nn.grad(lambda m: nn.capture(m)(x)[0].sum())(m))(
    model.eval(), x
), nn.capture(model)(x)[1]
numbers["capture"] = out, captured

outer = Counter()
refusals["traced value to an outer module"] = refused(jax.grad(lambda x: outer(x).sum()), x)
refusals["write under jit"] = refused(jax.jit(lambda x: outer(x)), x)
refusals["raw transformation"] = refused(jax.vmap(lambda m, x: m(x), (None, 0)), outer, x)
refusals["draw in raw vmap"] = refused(jax.vmap(nn.Dropout(0.5)), x)
refusals["draw in raw jit"] = refused(jax.jit(nn.Dropout(0.5)), x)
kept = []
nn.jit(lambda m: kept.append(m) or m.calls)(outer)
refusals["module of an ended trace"] = refused(kept[0].eval)
plain = jax.tree.map(lambda v: np.asarray(v).tolist(), numbers)
print(json.dumps([plain, refusals, [[w.category.__name__, str(w.message)] for w in caught]]))
"""


@functools.cache
def ran(*renamed: str) -> Any:
    """Run the program, with attributes of JAX's renamed; return numbers, refusals and warnings."""
    text = textwrap.dedent(RENAMING) + textwrap.dedent(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-c", text, *renamed], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("renamed", "unchecked"),
    [("parent_trace", "laws 4, 5, 6, 11"), ("_trace", "law 5")],
)
def test_without_a_private_attribute_a_model_trains_to_the_same_numbers_and_one_warning_says_so(
    renamed, unchecked
):
    numbers, refusals, caught = ran(renamed)
    expected_numbers, expected_refusals, nothing = ran()
    assert numbers == expected_numbers
    assert refusals == expected_refusals
    assert nothing == []
    ((category, message),) = caught
    assert category == "RuntimeWarning"
    assert renamed in message and unchecked in message


def test_what_is_refused_with_all_attributes_is_refused_by_the_right_error():
    assert ran()[1] == {
        "lanes that differ": "StateWriteError",
        "traced value to an outer module": "TraceLeakError",
        "write under jit": "TraceLeakError",
        "raw transformation": "StateWriteError",
        "draw in raw vmap": "MissingRngError",
        "draw in raw jit": "MissingRngError",
        "module of an ended trace": "TraceLeakError",
    }


@pytest.fixture
def probed_again():
    """Forget what kinds of traces there are, before a test and after it."""
    probes = (compat._met, compat._kinds, compat._modes)
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("another signature")


def test_a_transformation_that_cannot_be_probed_costs_checks_and_no_program(
    monkeypatch, probed_again
):
    probes = [(k, m, _refuse if k == "autodiff" else t) for k, m, t in compat._TRANSFORMATIONS]
    monkeypatch.setattr(compat, "_TRANSFORMATIONS", probes)
    with pytest.warns(RuntimeWarning, match="of what kind a trace is .autodiff: TypeError"):
        assert compat.kind(object()) == "unknown"
    x = jnp.ones((4, 3))
    layer = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    assert jax.grad(lambda x: layer[1](x).sum())(x).shape == x.shape
    grads = nn.grad(lambda m: m(x).sum())(layer)
    assert set(grads) == {"0.weight", "0.bias"}
    with pytest.raises(nn.errors.MissingRngError):
        jax.vmap(layer[1])(x)  # of a kind that is known


def test_without_a_way_to_probe_there_is_one_warning(monkeypatch, probed_again):
    monkeypatch.setattr(jax, "ensure_compile_time_eval", _refuse)
    with pytest.warns(RuntimeWarning, match="autodiff, batch, staged") as caught:
        kinds = [compat.kind(object()), compat.kind(compat.EAGER), compat.kind(object())]
    assert kinds == ["unknown", "eager", "unknown"]
    assert len(caught) == 1
    assert not compat.is_forward_mode(object())
