"""Settings of the test session: no implicit promotion of dtypes, a fixed seed, names for docstrings."""

from __future__ import annotations

import collections
import contextlib
import gc
import hashlib
import importlib.metadata
import os
import pathlib
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import statefulnn as nn
import statefulnn.functional as F
import tests.doctests  # noqa: F401

# Most programs of the tests run once: XLA takes little trouble over them, also in the processes that tests
# start, and somewhat more where a test says so. On a newer JAX the sample runs what users run.
HURRIED = importlib.metadata.version("jaxlib").startswith("0.10.")
if HURRIED:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    QUICKLY = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", QUICKLY)

# The workers of pytest fill the cores: threads of torch and numpy in each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# JAX makes a context of MLIR for each program, which loads all dialects: a tenth of the time of these tests,
# most of whose programs are tiny. So many programs share one here; a new one frees what the last ones held.
PROGRAMS_OF_A_CONTEXT = 64
if HURRIED:
    from jax._src.interpreters import mlir

    def _shared_contexts(make: Callable[[], Any]) -> Callable[[], Any]:
        local = threading.local()

        def make_ir_context() -> Any:
            with contextlib.suppress(ValueError):  # where no program is being made
                # Inside of another program, this one would become a part.
                if mlir.ir.InsertionPoint.current:
                    return make()
            local.left = getattr(local, "left", 0) - 1
            if local.left < 0:
                local.context, local.left = make(), PROGRAMS_OF_A_CONTEXT
            return local.context

        return make_ir_context

    mlir.make_ir_context = _shared_contexts(mlir.make_ir_context)

# Python and pytest compile what is imported for the first time, and write it for the next process. So every
# other worker collects from the other end, and finds half of it there.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
FROM_THE_END = int(WORKER.removeprefix("gw") or 0) % 2 == 1

# Mixing dtypes by accident is an error in the package's own code.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Parity with torch is checked in float32: a GPU would otherwise multiply matrices in TensorFloat-32.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-nth", type=int, default=1, metavar="N", help="run one test in N of each file"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()  # nothing that is imported is garbage
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if FROM_THE_END and isinstance(collector, pytest.Session | pytest.Directory):
        report.result.reverse()
    return report


@pytest.hookimpl(trylast=True)  # of what `-m` and `-k` have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a sample of each file's tests, at least one, which the names alone choose."""
    step = config.getoption("--every-nth")
    files = collections.defaultdict(list)
    for item in sorted(items, key=lambda item: hashlib.sha256(item.nodeid.encode()).digest()):
        files[item.path].append(item)
    kept = {item for tests in files.values() for item in tests[::step]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
    if WORKER:
        items.sort(key=lambda item: item.path)  # the same order in all workers


def pytest_runtest_setup(item: pytest.Item) -> None:
    with_care = any(map(item.get_closest_marker, ("compiled_with_care", "long")))
    jax.config.update("jax_disable_most_optimizations", HURRIED and not with_care)


def _keep_compiled_code(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # JAX looks at the setting once


@pytest.fixture
def no_compilation_cache() -> Iterator[None]:
    """Nothing compiled is read from files: for tests that count compilations."""
    before = jax.config.jax_enable_compilation_cache
    _keep_compiled_code(False)
    yield
    _keep_compiled_code(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    nn.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    # Compiled code and its caches are millions of objects, which no collection needs to look at again.
    gc.freeze()


# Linux gives a process 65,530 areas of memory. Each compiled program takes a few, and whoever asks for one
# area too many crashes.
MOST_AREAS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """Let go of compiled code between two files when there is much of it."""
    yield
    areas = pathlib.Path("/proc/self/maps")
    if areas.exists() and areas.read_bytes().count(b"\n") > MOST_AREAS:
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()


@pytest.fixture
def key() -> jax.Array:
    """A random key."""
    return jax.random.key(0)


@pytest.fixture(autouse=True)
def _names_in_docstrings(doctest_namespace: dict) -> None:
    # The imports every example would start with.
    doctest_namespace.update(nn=nn, F=F, jax=jax, jnp=jnp, np=np)
