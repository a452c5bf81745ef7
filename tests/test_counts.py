"""What must not happen too often: traces, compilations, dispatches, living arrays, Python calls.

Counts and no times: they say the same on every machine.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import statefulnn as nn
import statefulnn.functional as F

pytestmark = pytest.mark.usefixtures("no_compilation_cache")


class Block(nn.Module):
    """Parameters, a buffer that a forward writes, and a nested container."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.temperature = 1.0
        self.register_buffer("calls", jnp.zeros((), jnp.float32))

    def forward(self, x: jax.Array) -> jax.Array:
        self.calls = self.calls + 1.0
        return self.layers(x) * self.temperature


class ReadOnly(nn.Module):
    """As `Block`, but a forward changes nothing."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: jax.Array) -> jax.Array:
        return self.layers(x)


class Momentum(nn.Module):
    """Gradient descent with momentum: its slots are buffers, the parameters are the model's boxes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = nn.Ref(model)
        for i, p in enumerate(model.parameters()):
            self.register_buffer(f"slot{i}", jnp.zeros_like(p.value))

    def step(self, grads: dict[str, jax.Array]) -> None:
        for i, (p, g) in enumerate(zip(self.model.parameters(), grads.values(), strict=True)):
            slot = 0.9 * getattr(self, f"slot{i}") + g
            setattr(self, f"slot{i}", slot)
            p.value = p.value - 0.01 * slot


def loss_of(model: nn.Module, x: jax.Array) -> jax.Array:
    return (model(x) ** 2).mean()


def train_step(model: nn.Module, optimizer: Any, x: jax.Array) -> jax.Array:
    loss, grads = nn.value_and_grad(loss_of)(model, x)
    optimizer.step(grads)
    return loss


@pytest.fixture
def x() -> jax.Array:
    return jnp.ones((2, 4))


# --------------------------------------------------------------------------------------------------
# Traces


def test_equal_models_share_one_trace(x):
    f = nn.jit(lambda model, x: model(x))
    for _ in range(5):
        f(Block(), x)
    assert f.trace_count == 1


def test_equal_models_share_one_trace_of_plain_jax_jit(x):
    traces = []

    @jax.jit
    def f(model, x):
        traces.append(1)
        return model(x)

    for _ in range(5):
        f(ReadOnly(), x)
    assert len(traces) == 1


def test_a_model_and_optimizer_rebuilt_every_epoch_share_one_trace(x):
    step = nn.jit(train_step)
    for _ in range(3):
        model = Block()
        optimizer = Momentum(model)
        for _ in range(2):
            step(model, optimizer, x)
    assert step.trace_count == 1


def test_an_optax_optimizer_rebuilt_around_one_transformation_shares_one_trace(x):
    import optax

    tx = optax.adam(1e-3)
    step = nn.jit(train_step)
    for _ in range(3):
        model = Block()
        step(model, nn.Optimizer(model, tx), x)
    assert step.trace_count == 1


def test_a_rebuilt_model_compiles_nothing(x):
    f = nn.jit(lambda model, x: model(x))
    f(Block(), x)
    model = Block()
    with compilations() as count:
        f(model, x)
    assert count() == 0


def test_writing_values_does_not_retrace(x):
    model = Block()
    compiled = nn.jit(model)
    compiled(x)
    model.layers[0].weight.value = jnp.zeros((4, 4))
    compiled(x)
    model.layers[0].weight.data = jnp.ones((4, 4))
    compiled(x)
    model.calls = jnp.full((), 7.0, jnp.float32)
    compiled(x)
    model.load_state_dict(Block().state_dict())
    compiled(x)
    assert compiled.trace_count == 1


def test_writing_a_weakly_typed_value_does_not_retrace(x):
    # jnp.full((), 7.0) is weakly typed, and JAX traces anew for that.
    model = Block()
    compiled = nn.jit(model)
    compiled(x)
    model.calls = jnp.full((), 7.0)
    compiled(x)
    assert compiled.trace_count == 1


def test_eval_and_back_traces_each_mode_once(x):
    model = Block()
    compiled = nn.jit(model)
    for _ in range(4):
        model.train()
        compiled(x)
        model.eval()
        compiled(x)
    assert compiled.trace_count == 2


def test_a_static_attribute_changed_and_restored_does_not_trace_again(x):
    model = Block()
    compiled = nn.jit(model)
    for temperature in (1.0, 2.0, 1.0, 2.0):
        model.temperature = temperature
        compiled(x)
    assert compiled.trace_count == 2


def test_assigning_what_is_there_already_does_not_trace_again(x):
    model = Block()
    compiled = nn.jit(model)
    for _ in range(3):
        model.temperature = 1.0
        model.train()
        model.layers[0].weight.requires_grad_(True)
        compiled(x)
    assert compiled.trace_count == 1


def test_a_lambda_written_anew_does_not_trace_again(x):
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Lambda(lambda v: v * 2.0))

    f = nn.jit(lambda model, x: model(x))
    for _ in range(4):
        f(build(), x)
    assert f.trace_count == 1


def test_a_lambda_that_closes_over_another_value_traces_again(x):
    # The counterpart of the test above: it would pass if functions were not compared at all.
    def build(factor: float) -> nn.Module:
        return nn.Lambda(lambda v: v * factor)

    f = nn.jit(lambda model, x: model(x))
    assert [float(f(build(c), x)[0, 0]) for c in (1.0, 2.0, 1.0, 2.0)] == [1.0, 2.0, 1.0, 2.0]
    assert f.trace_count == 2


def test_a_deep_copy_does_not_trace_again(x):
    model = Block()
    f = nn.jit(lambda model, x: model(x))
    f(model, x)
    f(copy.deepcopy(model), x)
    assert f.trace_count == 1


def test_random_masks_do_not_retrace(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    compiled = nn.jit(model)
    outputs = {compiled(x).tobytes() for _ in range(8)}
    assert len(outputs) > 1
    assert compiled.trace_count == 1


def test_a_module_from_compiled_code_does_not_trace_again(x):
    traces = []

    @jax.jit
    def f(model, x):
        traces.append(1)
        return model, model(x)

    model = ReadOnly()
    for _ in range(4):
        model, _ = f(model, x)
    assert len(traces) == 1


# --------------------------------------------------------------------------------------------------
# Compilations


@contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """Counts what XLA compiles inside the block."""
    found = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: len(found)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_step_on_a_mesh_of_one_device_compiles_once():
    with nn.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model = nn.materialize(nn.parallel.fully_shard(model, mesh))
    opt = nn.Optimizer(model, optax.adam(1e-3))

    @nn.jit
    def step(model, opt, x):
        opt.step(nn.grad(lambda m: (m(x) ** 2).mean())(model))

    x = nn.parallel.shard_batch(jnp.ones((2, 4)), mesh)
    step(model, opt, x)
    with compilations() as count:
        step(model, opt, x)
    assert count() == 0


def test_the_counter_of_compilations_counts():
    with compilations() as count:
        jax.jit(lambda v: v + 1)(jnp.ones(3))
    assert count() >= 1


def test_construction_compiles_nothing():
    with compilations() as count:
        for width in range(11, 51):
            nn.Linear(width, width + 1)
            nn.Conv1d(width, 3, 3)
            nn.LayerNorm(width)
    assert count() == 0


def test_normal_draws_compile_two_sizes():
    for n in (5, 5000):
        nn.Embedding(n, 1)
    with compilations() as count:
        for n in range(1, 40):
            nn.Embedding(331, n)
    assert count() == 0


def test_constructing_the_same_again_compiles_nothing():
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, 9),
            nn.LayerNorm(9),
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Embedding(7, 5),
        )

    build()
    with compilations() as count:
        build()
    assert count() == 0


# --------------------------------------------------------------------------------------------------
# Dispatches


def linear_call() -> tuple[Callable, tuple]:
    return F.linear, (jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.ones(4))


def layer_norm_call() -> tuple[Callable, tuple]:
    def layer_norm(x, weight, bias):
        return F.layer_norm(x, (3,), weight, bias)

    return layer_norm, (jnp.ones((2, 3)), jnp.ones(3), jnp.ones(3))


def gelu_call() -> tuple[Callable, tuple]:
    return F.gelu, (jnp.ones((2, 3)),)


def linear_module_call() -> tuple[Callable, tuple]:
    return nn.Linear(3, 4), (jnp.ones((2, 3)),)


def layer_norm_module_call() -> tuple[Callable, tuple]:
    return nn.LayerNorm(3), (jnp.ones((2, 3)),)


@pytest.mark.parametrize(
    "make", [linear_call, layer_norm_call, gelu_call, linear_module_call, layer_norm_module_call]
)
def test_an_eager_call_is_one_dispatch(make):
    function, args = make()
    # What runs op by op in eager mode is traced op by op here.
    equations = jax.make_jaxpr(lambda *args: function(*args))(*args).jaxpr.eqns
    assert [e.primitive.name for e in equations] == ["jit"]


# --------------------------------------------------------------------------------------------------
# Lifetimes: with the garbage collector off, only reference counts free anything


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def living(cls: type) -> int:
    """How many instances of a class exist."""
    return sum(type(o) is cls for o in gc.get_objects())


def _nn_jit_step() -> tuple[Callable[[], Any], tuple]:
    model = Block()
    optimizer = Momentum(model)
    step = nn.jit(train_step)
    x = jnp.ones((2, 4))
    return lambda: step(model, optimizer, x), (model, optimizer)


def _nn_jit_model() -> tuple[Callable[[], Any], tuple]:
    model = Block()
    compiled = nn.jit(model)
    x = jnp.ones((2, 4))
    return lambda: compiled(x), (model,)


def _jax_jit() -> tuple[Callable[[], Any], tuple]:
    model = ReadOnly()
    f = jax.jit(lambda model, x: model(x))
    x = jnp.ones((2, 4))
    return lambda: f(model, x), (model,)


def _jax_jit_fed_back() -> tuple[Callable[[], Any], tuple]:
    f = jax.jit(lambda model, x: (model, model(x)))
    x = jnp.ones((2, 4))
    state = [ReadOnly()]

    def call() -> Any:
        state[0], out = f(state[0], x)
        return out

    return call, ()


def _functional_call() -> tuple[Callable[[], Any], tuple]:
    model = ReadOnly()
    params = {name: p.value for name, p in model.named_parameters()}
    x = jnp.ones((2, 4))
    return lambda: nn.functional_call(model, params, (x,)), (model,)


def _functional_call_mutable() -> tuple[Callable[[], Any], tuple]:
    model = Block()
    params = {name: p.value for name, p in model.named_parameters()}
    x = jnp.ones((2, 4))
    return lambda: nn.functional_call(model, params, (x,), mutable=True), (model,)


def _eager_grad() -> tuple[Callable[[], Any], tuple]:
    model = Block()
    x = jnp.ones((2, 4))
    return lambda: nn.grad(loss_of)(model, x), (model,)


CALLS = [
    (_nn_jit_step, 1000),
    (_nn_jit_model, 1000),
    (_jax_jit, 1000),
    (_jax_jit_fed_back, 1000),
    (_functional_call, 1000),
    (_functional_call_mutable, 1000),
    # Eager differentiation linearizes anew each time: fewer calls show the same.
    (_eager_grad, 100),
]


@pytest.mark.parametrize(("make", "times"), CALLS, ids=[make.__name__ for make, _ in CALLS])
def test_calls_leave_no_array_and_no_clone_behind(no_collector, make, times):
    call, models = make()
    for _ in range(3):
        call()
    arrays, modules = len(jax.live_arrays()), living(Block) + living(ReadOnly)
    for _ in range(times):
        call()
    assert len(jax.live_arrays()) == arrays
    assert living(Block) + living(ReadOnly) == modules


@pytest.mark.parametrize("make", [make for make, _ in CALLS], ids=lambda make: make.__name__)
def test_models_die_by_reference_count(no_collector, make):
    make()[0]()  # constants of the process: default generator, cached scalars
    arrays = len(jax.live_arrays())
    call, models = make()
    call()
    references = [weakref.ref(m) for m in models]
    boxes = [weakref.ref(p) for m in models for p in m.parameters()]
    del call, models
    assert [r() for r in references] == [None] * len(references)
    assert [b() for b in boxes] == [None] * len(boxes)
    assert len(jax.live_arrays()) == arrays


def test_a_compiled_function_does_not_keep_its_arguments_alive(no_collector):
    step = nn.jit(train_step)
    model = Block()
    optimizer = Momentum(model)
    step(model, optimizer, jnp.ones((2, 4)))
    references = [weakref.ref(model), weakref.ref(optimizer)]
    del model, optimizer
    assert [r() for r in references] == [None, None]


def test_a_model_used_by_nobody_else_dies_after_an_exception(no_collector):
    model = Block()
    compiled = nn.jit(lambda model, x: model(x))
    with pytest.raises(Exception):  # noqa: B017  (whatever the matrix product says)
        compiled(model, jnp.ones((2, 5)))
    reference = weakref.ref(model)
    del model
    # The exception's traceback, which held the frames, is gone with pytest's context.
    assert reference() is None


# --------------------------------------------------------------------------------------------------
# Nothing on the hot path scales with the number of modules


class Part(nn.Module):
    """Some scalars."""

    def __init__(self, count: int) -> None:
        super().__init__()
        for i in range(count):
            setattr(self, f"p{i}", nn.Parameter(jnp.ones(())))

    def forward(self, x: jax.Array) -> jax.Array:
        for p in self.parameters():
            x = x + p.value
        return x


class Whole(nn.Module):
    """300 parameters and 30 buffers, spread over as many modules as asked for."""

    TENSORS = 300

    def __init__(self, modules: int, writes: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(self.TENSORS // modules) for _ in range(modules)])
        self.writes = writes
        for i in range(30):
            self.register_buffer(f"buffer{i}", jnp.zeros(()))

    def forward(self, x: jax.Array) -> jax.Array:
        for part in self.parts:
            x = part(x)
        if self.writes:
            for i in range(30):
                setattr(self, f"buffer{i}", x)
        return x


def python_calls(call: Callable[[], Any]) -> int:
    """How many Python functions and C functions one call enters."""
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


def _with_nn_jit(model: nn.Module) -> Callable[[], Any]:
    compiled, x = nn.jit(model), jnp.ones(())
    return lambda: compiled(x)


def _with_nn_jit_of_a_function(model: nn.Module) -> Callable[[], Any]:
    compiled, x = nn.jit(lambda models, x: models["a"](x)), jnp.ones(())
    return lambda: compiled({"a": model}, x)


def _with_jax_jit(model: nn.Module) -> Callable[[], Any]:
    compiled, x = jax.jit(lambda model, x: model(x)), jnp.ones(())
    return lambda: compiled(model, x)


@pytest.mark.parametrize(
    ("compile_it", "writes"),
    [
        (_with_nn_jit, False),
        (_with_nn_jit, True),
        (_with_nn_jit_of_a_function, False),
        (_with_nn_jit_of_a_function, True),
        (_with_jax_jit, False),
    ],
)
def test_a_compiled_call_enters_as_many_functions_with_10_modules_as_with_300(compile_it, writes):
    counts = []
    for modules in (10, 300):
        call = compile_it(Whole(modules, writes))
        for _ in range(3):
            call()
        counts.append(python_calls(call))
    assert counts[0] == counts[1]
    # Reading 330 boxes one by one in Python would show.
    if not writes:
        assert counts[0] < 60


def test_a_changed_static_attribute_is_walked_once():
    model = Whole(100, writes=False)
    call = _with_nn_jit(model)
    model.parts[0].eval()
    call()
    model.parts[0].train()
    call()
    call()
    usual = python_calls(call)
    model.parts[0].eval()
    assert python_calls(call) > usual + 100
    assert python_calls(call) < usual + 20
    assert python_calls(call) == usual


def test_a_change_in_another_model_is_looked_at_once_and_walks_nothing():
    model, other = Whole(100, writes=False), nn.Linear(2, 2)
    call = _with_nn_jit(model)
    for _ in range(3):
        call()
    usual = python_calls(call)
    other.eval()
    # Comparing the stamps of 100 modules is one expression, no call a module.
    assert python_calls(call) < usual + 20
    assert python_calls(call) == usual
