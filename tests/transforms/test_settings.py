"""nn.jit compiles for what is in force around it: initialisation version, default dtype, kernels."""

from __future__ import annotations

import asyncio
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn
from statefulnn.attention import SDPBackend, sdpa_kernel
from statefulnn.core.construction import settings
from statefulnn.core.stamps import clock


@pytest.fixture(autouse=True)
def _first_version():
    yield
    nn.init.set_version("torch")


class Builds(nn.Module):
    """A module that builds a layer in its forward, by the version in force there."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(jnp.ones(()))

    def forward(self, x):
        layer = nn.Linear(3, 3)
        return x * self.scale + float(layer.init_version == "2026.1"), layer.bias.value


NEW = {"method": lambda m: nn.jit(m), "function": lambda m: nn.jit(lambda m, x: m(x))}


def is_new(out) -> bool:
    """Say whether the version was the new one, whose biases are 0; both agree."""
    flag, bias = out
    assert bool(flag) == (not np.asarray(bias).any())
    return bool(flag)


@pytest.mark.parametrize("how", NEW)
def test_a_compiled_function_builds_by_the_version_around_each_call(how) -> None:
    model = Builds()
    compiled = NEW[how](model)
    args = (0.0,) if how == "method" else (model, 0.0)
    met = [is_new(compiled(*args))]
    for _ in range(3):
        with nn.init.version("2026.1"):
            met += [is_new(compiled(*args)), is_new(compiled(*args))]
        met.append(is_new(compiled(*args)))
    assert met == [False, *[True, True, False] * 3]
    assert compiled.trace_count == 2
    nn.init.set_version("2026.1")
    assert is_new(compiled(*args))
    nn.init.set_version("torch")
    assert not is_new(compiled(*args))
    with nn.init.version("torch"):
        assert not is_new(compiled(*args))
    assert compiled.trace_count == 2


def test_a_compiled_function_without_modules_follows_as_well() -> None:
    compiled = nn.jit(lambda x: x + float(nn.Linear(2, 2).init_version == "2026.1"))
    out = [float(compiled(1.0))]
    nn.init.set_version("2026.1")
    out.append(float(compiled(1.0)))
    assert out == [1.0, 2.0]


def test_static_arguments_and_settings_are_told_apart() -> None:
    compiled = nn.jit(
        lambda n, x: x * n + float(nn.Linear(2, 2).init_version == "2026.1"), static_argnums=0
    )
    out = []
    for name in ("torch", "2026.1", "torch"):
        with nn.init.version(name):
            out += [float(compiled(n, 1.0)) for n in (2, 3)]
    assert out == [2.0, 3.0, 3.0, 4.0, 2.0, 3.0]
    assert compiled.trace_count == 4


def test_kernels_of_attention_are_those_allowed_around_each_call() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = jnp.ones((2, 3, 8))
    compiled = nn.jit(lambda m, x: m(x, x, x, need_weights=False)[0])
    wanted = compiled(model, x)
    for _ in range(2):
        # cuDNN's kernel is none for the CPU, so that attention has no kernel at all.
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError, match="kernel"):
            compiled(model, x)
        with sdpa_kernel(SDPBackend.MATH):
            np.testing.assert_allclose(compiled(model, x), wanted, rtol=1e-6)
        np.testing.assert_allclose(compiled(model, x), wanted, rtol=1e-6)


def test_each_thread_has_the_version_of_its_own_block() -> None:
    model = Builds()
    compiled = nn.jit(lambda m, x: m(x))
    assert not is_new(compiled(model, 0.0))
    inside, outside, found = threading.Event(), threading.Event(), []

    def run() -> None:
        with nn.init.version("2026.1"):
            try:
                found.append(is_new(compiled(model, 0.0)))
            finally:
                inside.set()
            outside.wait()
            found.append(is_new(compiled(model, 0.0)))

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait()
    try:
        here = [is_new(compiled(model, 0.0)) for _ in range(2)]
    finally:
        outside.set()
    thread.join()
    assert found == [True, True]
    assert here == [False, False]
    assert not is_new(compiled(model, 0.0))


def test_each_task_has_the_version_of_its_own_block() -> None:
    model = Builds()
    compiled = nn.jit(lambda m, x: m(x))

    async def run(name: str) -> list[bool]:
        found = []
        with nn.init.version(name):
            for _ in range(3):
                found.append(is_new(compiled(model, 0.0)))
                await asyncio.sleep(0)
        return found

    async def both() -> list[list[bool]]:
        return [*await asyncio.gather(run("torch"), run("2026.1"))]

    assert asyncio.run(both()) == [[False] * 3, [True] * 3]


def test_a_call_looks_at_the_settings_only_where_they_have_been_set(monkeypatch) -> None:
    model = Builds()
    compiled = nn.jit(lambda m, x: m(x))
    looks, now = [], settings()
    monkeypatch.setattr("statefulnn.core.plan.settings", lambda: looks.append(1) or now)
    compiled(model, 0.0)
    compiled(model, 0.0)
    looks.clear()
    for _ in range(5):
        compiled(model, 0.0)
    assert not looks
    with nn.init.version("torch"):
        for _ in range(5):
            compiled(model, 0.0)
    assert len(looks) == 5
    assert not clock.blocks


def test_a_block_that_fails_is_closed() -> None:
    with pytest.raises(ZeroDivisionError), nn.init.version("2026.1"):
        raise ZeroDivisionError
    assert not clock.blocks
    assert nn.init.get_version() == "torch"


def test_a_setting_does_not_make_modules_be_walked_anew(monkeypatch) -> None:
    model = nn.Linear(3, 3)
    compiled = nn.jit(lambda m, x: m(x))
    x = jnp.ones(3)
    walks = []
    build_plan = nn.transforms.dispatch.build_plan
    monkeypatch.setattr(
        "statefulnn.transforms.dispatch.build_plan",
        lambda roots: walks.append(1) or build_plan(roots),
    )
    for _ in range(4):
        compiled(model, x)
        with nn.init.version("2026.1"):
            compiled(model, x)
    assert len(walks) == 2


def test_layers_are_float32_until_another_default_is_set_also_in_compiled_code():
    # As in torch: its default does not follow from what dtypes there are.
    built = nn.jit(lambda: nn.Linear(2, 3).weight.value)
    with jax.enable_x64(True):
        assert (
            built().dtype
            == nn.Linear(2, 3).weight.dtype
            == nn.LazyLinear(3).weight.dtype
            == "float32"
        )
        assert nn.BatchNorm1d(2).running_mean.dtype == "float32"
        with nn.default_dtype(jnp.float64):
            assert built().dtype == nn.Linear(2, 3).weight.dtype == "float64"
            assert nn.Linear(2, 3, dtype=jnp.float32).weight.dtype == "float32"
        assert built().dtype == "float32"
    nn.set_default_dtype(jnp.bfloat16)
    try:
        assert nn.get_default_dtype() == built().dtype == nn.Linear(2, 3).weight.dtype == "bfloat16"
        torch.set_default_dtype(torch.bfloat16)
        assert torch.nn.Linear(2, 3).weight.dtype == torch.bfloat16
    finally:
        nn.set_default_dtype(jnp.float32)
        torch.set_default_dtype(torch.float32)


def test_a_default_that_is_no_floating_dtype_or_not_enabled_is_refused():
    with pytest.raises(nn.DtypeError, match=r"nn.set_default_dtype\(jnp.bfloat16\)"):
        nn.set_default_dtype(jnp.int32)
    with pytest.raises(nn.DtypeError, match="jax_enable_x64"):
        nn.set_default_dtype("float64")
    with pytest.raises(nn.DtypeError, match="jax_enable_x64"), nn.default_dtype(jnp.float64):
        pass
    assert nn.get_default_dtype() == "float32"
