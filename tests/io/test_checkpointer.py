"""nn.Checkpointer: a run that was interrupted goes on as the one that was not, bit by bit."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefulnn as nn
from tests.devices import run_on_devices
from tests.io.fuzzing import Fuzzer, changed_tree, dumps, run_fuzz
from tests.precision import in_float64
from tests.quick import diagonal

ROOT = Path(__file__).resolve().parents[2]
X = jnp.asarray(np.random.default_rng(0).standard_normal((32, 4)), jnp.float32)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1)
    )


ADAM = optax.adamw(1e-2)


@nn.jit
def train_step(model, opt, x):
    loss, grads = nn.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
    opt.step(grads)
    return loss


def run_of(model: nn.Module):
    opt = nn.Optimizer(model, ADAM)
    order = nn.Generator(7)  # of the data

    def advance() -> float:
        rows = jax.random.permutation(order.next_key(), 32)[:8]
        return float(train_step(model, opt, X[rows]))

    return opt, order, advance


def same(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    for name in a:
        left, right = a[name], b[name]
        assert left.dtype == right.dtype and left.shape == right.shape, name
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=name)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_losses_after_a_restore_are_those_of_the_run_without_one(asynchronous, tmp_path):
    nn.manual_seed(1)
    model = network()
    opt, order, advance = run_of(model)
    with nn.Checkpointer(tmp_path, asynchronous=asynchronous) as checkpointer:
        for _ in range(3):
            advance()
        checkpointer.save(
            3, model=model, opt=opt, masks=nn.default_generator, order=order, extra={"epoch": 2}
        )
        after = [advance() for _ in range(4)]

        nn.manual_seed(99)
        model = network()
        opt, order, advance = run_of(model)
        advance()
        done = checkpointer.restore(model=model, opt=opt, masks=nn.default_generator, order=order)
    assert done.step == 3 and done.data == {"extra": {"epoch": 2}} and not done.report
    assert [advance() for _ in range(4)] == after


@pytest.mark.parametrize("size", [3, 300_000])
def test_steps_after_saving_do_not_change_what_is_saved(size, tmp_path):
    model = nn.Linear(size, 1, bias=False)

    def change(model):
        model.weight.value = model.weight.value * 2 + 1

    step = nn.jit(change, donate=0)  # its memory is used again at once
    step(model)
    want = []
    with nn.Checkpointer(tmp_path, keep_last=None) as checkpointer:
        for number in range(4):
            want.append(np.array(model.weight))
            checkpointer.save(number, model=model)
            for _ in range(3):
                step(model)
        for number in range(4):
            checkpointer.restore(number, model=model)
            np.testing.assert_array_equal(model.weight, want[number])


def test_numpy_arrays_and_data_are_copied_when_they_are_saved(tmp_path):
    array, data = np.arange(1_000_000), {"seen": [1]}
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, arrays={"a": array}, data=data)
        array[:] = 0
        data["seen"].append(2)
        found = checkpointer.restore().data
    np.testing.assert_array_equal(found["arrays"]["a"], np.arange(1_000_000))
    assert found["data"] == {"seen": [1]}


class Everything(nn.Module):
    """One of each kind of thing that a step may change, or that is odd to store."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.empty = nn.Linear(2, 2), nn.Identity()
        self.first.bias = nn.Parameter(self.first.bias.value, requires_grad=False)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.first.weight
        for dtype in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int4"):
            self.register_buffer(f"a_{dtype}", jnp.ones(3, jnp.dtype(dtype)))
        self.register_buffer("complex_", jnp.full((2,), 1 + 2j))
        self.register_buffer("nothing", jnp.zeros((0, 3)))
        self.register_buffer("key", jax.random.key(5))
        self.register_buffer("keys", jax.random.split(jax.random.key(5, impl="rbg"), 3))
        self.register_buffer("passing", jnp.arange(3.0), persistent=False)
        self.drop = nn.Dropout(0.5)
        self.generator = nn.Generator(3)
        self.weights = nn.ParameterDict({"a": jnp.ones(1), "b_c": jnp.zeros(2)})


def test_every_kind_of_array_comes_back(tmp_path):
    model = Everything()
    model.generator.next_key()
    want, state = model.state_dict(), np.asarray(model.generator.state)
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, model=model)
        other = Everything()
        other.load_state_dict({n: v * 0 for n, v in want.items() if "key" not in n}, strict=False)
        other.key = jax.random.key(0)
        other.passing = jnp.zeros(3)
        checkpointer.restore(model=other)
    same(other.state_dict(), want)
    np.testing.assert_array_equal(other.passing, np.arange(3.0))
    np.testing.assert_array_equal(other.generator.state, state)
    assert other.tied.weight is other.first.weight and not other.first.bias.requires_grad
    assert str(jax.random.key_impl(other.keys)) == "rbg"


def test_names_with_dots_and_slashes_do_not_meet(tmp_path):
    names = ["a", "a.b", "a/b", "a/b.c", "a/0", "a..b", "é ~[0]", ".", "a b", "%2F", "a.zarray"]
    arrays = {name: jnp.full(2, float(i)) for i, name in enumerate(names)}
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, first=arrays, a={"b": jnp.ones(3)})
        found = checkpointer.restore().data
    same(found["first"], arrays)
    assert found["a"]["b"].shape == (3,)


def test_64_bits_come_back_where_jax_has_none(tmp_path):
    state = {"a": np.arange(3), "b": np.arange(3.0), "c": np.int64(2**40), "d": jnp.ones(2)}
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state=state)
        found = checkpointer.restore().data["state"]
    same(found, state)
    assert isinstance(found["d"], jax.Array) and isinstance(found["a"], np.ndarray)


def test_x64_models_are_kept(tmp_path):
    with in_float64():
        model, other = nn.Linear(2, 3, dtype=jnp.float64), nn.Linear(2, 3, dtype=jnp.float64)
        with nn.Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(0, model=model)
            checkpointer.restore(model=other)
        same(other.state_dict(), model.state_dict())
    with pytest.raises(nn.StateDictError, match="retyped: model.weight: float64 -> float32"):
        nn.Checkpointer(tmp_path).restore(model=nn.Linear(2, 3))


def test_ensembles_modules_without_arrays_and_objects_of_others_are_saved(tmp_path):
    class Loader:
        position = 3

        def state_dict(self):
            return {"position": self.position, "seen": np.arange(2)}

        def load_state_dict(self, state):
            self.position, self.seen = state["position"], state["seen"]

    ensemble = nn.Ensemble(lambda: nn.Linear(2, 3), 4)
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, ensemble=ensemble, empty=nn.ReLU(), loader=Loader())
        checkpointer.save(1, empty=nn.ReLU())
        other, loader = nn.Ensemble(lambda: nn.Linear(2, 3), 4), Loader()
        loader.position = 0
        checkpointer.restore(0, ensemble=other, empty=nn.ReLU(), loader=loader)
        assert checkpointer.restore(1, empty=nn.ReLU()).step == 1
    same(other.state_dict(), ensemble.state_dict())
    assert loader.position == 3 and loader.seen.tolist() == [0, 1]


# --------------------------------------------------------------------------------------------------
# Which steps


def test_the_last_and_the_best_steps_are_kept(tmp_path):
    losses = {1: 0.5, 2: 0.1, 3: 0.4, 4: float("nan"), 5: 0.3, 6: 0.6, 7: 0.7}
    model = nn.Linear(1, 1)
    with nn.Checkpointer(tmp_path, keep_last=2, keep_best=2) as checkpointer:
        assert checkpointer.latest_step() is None and checkpointer.best_step() is None
        for step, loss in losses.items():
            assert checkpointer.save(step, metrics={"loss": loss, "other": 1}, model=model)
        assert checkpointer.steps() == [2, 5, 6, 7]
        assert len(list(tmp_path.glob("[0-9]*"))) == 4
        assert checkpointer.latest_step() == 7 and checkpointer.best_step() == 2
        assert checkpointer.metrics(5) == {"loss": 0.3, "other": 1.0}
        assert checkpointer.restore("best", model=model).step == 2
        assert checkpointer.restore("last", model=model).metrics == {"loss": 0.7, "other": 1.0}
    # A process that comes later knows the metrics of the steps before.
    with nn.Checkpointer(tmp_path, keep_last=1, keep_best=1) as checkpointer:
        checkpointer.save(8, metrics={"loss": jnp.float32(0.2)}, model=model)
        assert checkpointer.steps() == [2, 8]
    with nn.Checkpointer(tmp_path, best_mode="max") as checkpointer:
        assert checkpointer.best_step() == 8
    with nn.Checkpointer(tmp_path, best_by="accuracy") as checkpointer:
        assert checkpointer.best_step() is None
        with pytest.raises(nn.CheckpointError, match="no step has the metric 'accuracy'"):
            checkpointer.restore("best", model=model)


def test_steps_between_are_left_out(tmp_path):
    with nn.Checkpointer(tmp_path, save_every=5) as checkpointer:
        saved = [s for s in range(12) if checkpointer.save(s, model=nn.Linear(1, 1))]
        assert saved == checkpointer.steps() == [0, 5, 10]
        assert checkpointer.save(11, model=nn.Linear(1, 1), force=True)
        assert checkpointer.latest_step() == 11


def test_a_step_is_never_overwritten_and_going_back_is_said(tmp_path):
    model = nn.Linear(1, 1)
    with nn.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, model=model)
        for step in (3, 2):
            with pytest.raises(nn.CheckpointError, match=r"which has step 3(.|\n)*delete\(3\)"):
                checkpointer.save(step, model=model)
        checkpointer.delete(3)
        checkpointer.delete(2)
        checkpointer.save(2, model=nn.Linear(1, 1))
        assert checkpointer.steps() == [1, 2]
        with pytest.raises(nn.CheckpointError, match=r"asked for step 3(.|\n)*it has 1, 2"):
            checkpointer.delete(3)
        with pytest.raises(TypeError, match="numbered from 0"):
            checkpointer.save(-1, model=model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"best_mode": "large"},
        {"keep_last": 0},
        {"save_every": 0},
        {"keep_best": -1},
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=str(list(wrong)[0])):
        nn.Checkpointer(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_looking_makes_no_folder(tmp_path):
    checkpointer = nn.Checkpointer(tmp_path / "new")
    assert checkpointer.steps() == []
    with pytest.raises(nn.CheckpointError, match="it has none"):
        checkpointer.restore()
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------
# What does not fit


def test_all_differences_are_reported_and_nothing_is_changed(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    opt = nn.Optimizer(model, optax.adam(0.1))
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, model=model, opt=opt, order=nn.Generator(1))
        order = nn.Generator(0)
        other = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 5))
        other[1].bfloat16()
        other.append(nn.Linear(1, 1))
        opt = nn.Optimizer(other, optax.adam(0.1))
        before = {**other.state_dict(), **opt.state_dict()}
        with pytest.raises(nn.StateDictError) as raised:
            checkpointer.restore(model=other, opt=opt, order=order, ema=nn.Linear(1, 1))
        text = str(raised.value)
        for line in (
            "missing: ema",
            "under the names they were saved by: model, opt, order",
            "missing: model.3.weight",
            "missing: opt.mu.3.bias",
            "unexpected: model.0.bias",
            "unexpected: opt.nu.0.bias",
            "reshaped: model.2.weight: (1, 3) -> (5, 3)",
            "retyped: model.1.running_mean: float32 -> bfloat16",
            "nothing was changed",
            "strict=False",
        ):
            assert line in text
        same({**other.state_dict(), **opt.state_dict()}, before)
        np.testing.assert_array_equal(order.state, nn.Generator(0).state)

        report = checkpointer.restore(model=other, opt=opt, order=order, strict=False).report
        assert "model.0.bias" in report.unexpected and "model.3.bias" in report.missing
        np.testing.assert_array_equal(other[0].weight, model[0].weight)
        np.testing.assert_array_equal(
            other[1].running_var, model[1].running_var.astype(jnp.bfloat16)
        )
        np.testing.assert_array_equal(other[2].weight, before["2.weight"])
        np.testing.assert_array_equal(order.state, nn.Generator(1).state)


def test_parameters_tied_on_one_side_only_are_reported(tmp_path):
    def pair(tied: bool) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        if tied:
            model[1].weight = model[0].weight
        else:
            model[1].weight.value = model[0].weight.value  # one array in two boxes is no tie
        return model

    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, model=pair(False))
        checkpointer.save(1, model=pair(True))
        for step, tied, text in [
            (0, True, "retied: model.1.weight: of its own -> tied to 0.weight"),
            (1, False, "retied: model.1.weight: tied to 0.weight -> of its own"),
        ]:
            with pytest.raises(nn.StateDictError, match=text):
                checkpointer.restore(step, model=pair(tied))
            assert checkpointer.restore(step, model=pair(not tied)).step == step


def test_other_kinds_of_numbers_do_not_fit(tmp_path):
    def holding(value) -> nn.Module:
        module = nn.Module()
        module.register_buffer("a", value)
        return module

    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, model=holding(jnp.full(2, 1.5)))
        other = holding(jnp.arange(2))
        report = checkpointer.restore(model=other, strict=False).report
        assert report.retyped == ["model.a: float32 -> int32"] and other.a.tolist() == [0, 1]
        half = holding(jnp.zeros(2, jnp.float16))
        checkpointer.restore(model=half, strict=False)
        assert half.a.dtype == jnp.float16 and half.a.tolist() == [1.5, 1.5]


def test_an_error_in_one_object_puts_the_others_back(tmp_path):
    class Stubborn:
        def state_dict(self):
            return {"a": 1}

        def load_state_dict(self, state):
            if self.armed:
                raise RuntimeError("no")

        armed = False

    model, order = nn.Linear(2, 3), nn.Generator(0)
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, model=model, order=order, last=Stubborn())
        other, generator, last = nn.Linear(2, 3), nn.Generator(5), Stubborn()
        before = other.state_dict()
        last.armed = True
        with pytest.raises(RuntimeError, match="no"):
            checkpointer.restore(model=other, order=generator, last=last)
    same(other.state_dict(), before)
    np.testing.assert_array_equal(generator.state, nn.Generator(5).state)


def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path):
    with nn.device("meta"):
        shapes = nn.Linear(2, 2)
    with nn.Checkpointer(tmp_path) as checkpointer:
        for name, bad, text in [
            ("model", shapes, "'model.weight'(.|\n)*meta device"),
            ("model", nn.LazyLinear(3), "'model.weight'(.|\n)*no shape yet"),
            ("tree", {"a": [jnp.ones(2)]}, "'tree.a'(.|\n)*type list"),
            ("thing", object(), "'thing'(.|\n)*type object"),
            ("a.b", {"c": 1}, "the name 'a.b'"),
        ]:
            with pytest.raises(nn.CheckpointError, match=text):
                checkpointer.save(0, **{name: bad})
        with pytest.raises(nn.CheckpointError, match="saved metrics(.|\n)*'loss'"):
            best = nn.Checkpointer(tmp_path, keep_best=1)
            best.save(0, metrics={"accuracy": 1}, model=nn.Linear(1, 1))
        assert checkpointer.steps() == []


def test_objects_of_another_kind_are_refused(tmp_path):
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, model=nn.Linear(1, 1), order=nn.Generator(0), extra={"epoch": 1})
        for name, obj, text in [
            ("order", nn.Linear(1, 1), "a generator was saved"),
            ("model", nn.Generator(0), "a state dict was saved"),
            ("extra", {"epoch": 0}, r"data\['extra'\]"),
        ]:
            with pytest.raises(nn.CheckpointError, match=text):
                checkpointer.restore(**{name: obj})


def test_only_some_objects_may_be_restored(tmp_path):
    model = nn.Linear(2, 3)
    opt = nn.Optimizer(model, optax.adam(0.1))
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, model=model, opt=opt)
        other = nn.Linear(2, 3)
        assert checkpointer.restore(model=other).data == {}  # nothing else is read
    same(other.state_dict(), model.state_dict())


# --------------------------------------------------------------------------------------------------
# Errors, processes


def test_an_error_of_the_background_is_raised_at_the_next_call(tmp_path, monkeypatch):
    model = nn.Linear(300, 300)
    checkpointer = nn.Checkpointer(tmp_path)
    checkpointer.save(0, model=model)
    checkpointer.wait()
    import orbax.checkpoint as ocp

    async def full(*_, **__):
        await asyncio.sleep(0.2)  # when `save` has returned
        raise OSError("No space left on device")

    handler: Any = ocp.JsonCheckpointHandler
    for call in ("wait", "save", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(handler, "_save_fn", full)
            checkpointer.save(1, model=model)
            with pytest.raises(nn.CheckpointError, match="No space left(.|\n)*complete"):
                if call == "save":
                    checkpointer.save(2, model=model)
                else:
                    getattr(checkpointer, call)()
                checkpointer.save(1, model=model)  # the step that failed is not there
                with pytest.raises(nn.CheckpointError):
                    checkpointer.wait()
        assert checkpointer.steps() == [0]
    checkpointer.save(1, model=model)
    assert checkpointer.steps() == [0, 1]
    checkpointer.close()


def test_two_writers_of_one_folder_are_refused_and_a_reader_is_not(tmp_path):
    model = nn.Linear(1, 1)
    with nn.Checkpointer(tmp_path) as first, nn.Checkpointer(tmp_path) as second:
        first.save(0, model=model)
        first.wait()
        assert second.restore(model=model).step == 0
        with pytest.raises(nn.CheckpointError, match=f"where process {os.getpid()} saves"):
            second.save(1, model=model)
        first.save(1, model=model)
        first.close()
        assert second.steps() == [0, 1]
        second.save(2, model=model)


def test_damaged_steps_are_an_error_that_names_the_step(tmp_path):
    model = nn.Linear(64, 64)
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, model=model)
    before = model.state_dict()
    for file in (tmp_path / "3" / "arrays").rglob("d/*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(nn.CheckpointError, match="could not read step 3"):
        nn.Checkpointer(tmp_path).restore(model=model)
    same(model.state_dict(), before)


def test_a_folder_of_others_is_refused(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave({"a": jnp.ones(2)}))
        manager.wait_until_finished()
    with pytest.raises(nn.CheckpointError, match="step 0"):
        nn.Checkpointer(tmp_path).restore()


def program(body: str) -> str:
    return (
        "import sys, os, jax, jax.numpy as jnp, numpy as np, optax\n"
        "import statefulnn as nn\n"
        f"folder = sys.argv[1]\n{body}"
    )


def start(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


def test_nothing_is_printed_and_the_end_of_the_program_waits(tmp_path):
    code = program(
        "import logging\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "logging.getLogger('jax').setLevel(logging.ERROR)\n"
        "model = nn.Linear(2000, 2000)\n"
        "checkpointer = nn.Checkpointer(folder)\n"
        "for step in range(3):\n"
        "    checkpointer.save(step, model=model)\n"
        "checkpointer.restore(model=model)\n"
        "checkpointer.save(3, model=model)\n"
    )
    process = start(code, str(tmp_path))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "" and err == ""
    assert nn.Checkpointer(tmp_path).latest_step() == 3


# Every array of a step is full of the number of the step.
WRITER = program(
    "model = nn.Linear(300, 300)\n"
    "checkpointer = nn.Checkpointer(folder, keep_last=2)\n"
    "step = checkpointer.latest_step()\n"
    "step = first = 0 if step is None else step + 1\n"
    "while True:\n"
    "    model.weight.value = jnp.full((300, 300), float(step))\n"
    "    model.bias.value = jnp.full((300,), float(step))\n"
    "    checkpointer.save(step, model=model, extra={'step': step})\n"
    "    if step == first:\n"
    "        checkpointer.wait()\n"
    "        print('ready', flush=True)\n"
    "    step += 1\n"
)


def check_kills(folder: Path, kills: int) -> None:
    model = nn.Linear(300, 300)
    last = -1
    for _ in range(kills):
        process = start(WRITER, str(folder))
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        checkpointer = nn.Checkpointer(folder)
        for step in checkpointer.steps():
            done = checkpointer.restore(step, model=model)
            assert done.data["extra"]["step"] == step
            assert set(np.unique(model.weight)) | set(np.unique(model.bias)) == {step}
        latest = checkpointer.latest_step()
        assert latest is not None and latest > last
        last = latest
    with nn.Checkpointer(folder) as checkpointer:  # and the next writer cleans up
        checkpointer.save(last + 1, model=model)
    assert sorted(p.name for p in folder.iterdir() if not p.name.isdigit()) == [".lock"]


def test_a_process_killed_while_it_saves_leaves_whole_steps(tmp_path):
    check_kills(tmp_path, 1)


def test_a_step_that_is_being_deleted_is_none(tmp_path, monkeypatch):
    model = nn.Linear(1, 1)
    with monkeypatch.context() as patch, nn.Checkpointer(tmp_path, keep_last=1) as checkpointer:
        patch.setattr(checkpointer, "_sweep", lambda: None)  # killed before
        for step in range(3):
            checkpointer.save(step, model=model)
        assert checkpointer.steps() == [2]
    assert len(list(tmp_path.glob(".deleted/*"))) == 2
    with nn.Checkpointer(tmp_path, keep_last=1) as checkpointer:
        assert checkpointer.steps() == [2]
        checkpointer.save(3, model=model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "3"]


@pytest.mark.long
def test_many_processes_killed_while_they_save_leave_whole_steps(tmp_path):
    check_kills(tmp_path, 60)


def test_a_fresh_process_goes_on_as_the_one_before(tmp_path, monkeypatch, capsys):
    code = program(
        "model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))\n"
        "opt = nn.Optimizer(model, optax.sgd(1e-3, momentum=0.9))\n"
        "x = jnp.arange(32.0).reshape(8, 4)\n"
        "@nn.jit\n"
        "def step(model, opt):\n"
        "    loss, grads = nn.value_and_grad(lambda m: (m(x) ** 2).mean())(model)\n"
        "    opt.step(grads)\n"
        "    return loss\n"
        "things = {'model': model, 'opt': opt, 'masks': nn.default_generator}\n"
        "with nn.Checkpointer(folder) as checkpointer:\n"
        "    if sys.argv[2] == 'goes on':\n"
        "        checkpointer.restore(**things)\n"
        "    else:\n"
        "        for _ in range(3):\n"
        "            step(model, opt)\n"
        "        checkpointer.save(3, **things)\n"
        "print([float(step(model, opt)).hex() for _ in range(4)])\n"
    )
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), "begins"])
    exec(code, {"__name__": "__main__"})
    out, err = start(code, str(tmp_path), "goes on").communicate(timeout=120)
    assert not err, err
    assert out == capsys.readouterr().out and "0x" in out


# --------------------------------------------------------------------------------------------------
# Shardings

SHARDED = """
import jax, jax.numpy as jnp, numpy as np, statefulnn as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((jax.device_count(),), ("d",))
model = nn.Linear(8, 16)
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (4, 2),
        pytest.param(8, 8, marks=pytest.mark.long),
        pytest.param(8, 1, marks=pytest.mark.long),
        pytest.param(1, 8, marks=pytest.mark.long),
    ],
)
def test_arrays_go_to_other_shardings_and_other_numbers_of_devices(before, after, tmp_path):
    save = SHARDED + (
        "model.weight.value = jax.device_put(jnp.arange(128.0).reshape(16, 8), "
        "NamedSharding(mesh, P('d')))\n"
        f"with nn.Checkpointer({str(tmp_path)!r}) as c:\n"
        "    c.save(0, model=model)\n"
    )
    restore = SHARDED + (
        "sharding = NamedSharding(mesh, P(None, 'd'))\n"
        "model.weight.value = jax.device_put(jnp.zeros((16, 8)), sharding)\n"
        f"c = nn.Checkpointer({str(tmp_path)!r})\n"
        "c.restore(model=model)\n"
        "w = model.weight.value\n"
        "assert w.sharding == sharding, w.sharding\n"
        "assert not model.bias.value.committed\n"
        "np.testing.assert_array_equal(w, np.arange(128.0).reshape(16, 8))\n"
        "spread = NamedSharding(mesh, P('d'))\n"
        "c.restore(model=model, device=lambda name, shape: spread if name == 'model.weight' else None)\n"
        "assert model.weight.value.sharding == spread\n"
        "c.restore(model=model, device=jax.devices()[-1])\n"
        "assert model.weight.value.devices() == {jax.devices()[-1]}\n"
        "with nn.device('meta'):\n"
        "    model = nn.Linear(8, 16)\n"
        "c.restore(model=model, device=NamedSharding(mesh, P()))\n"
        "np.testing.assert_array_equal(model.weight, np.arange(128.0).reshape(16, 8))\n"
        "assert len(model.weight.value.devices()) == jax.device_count()\n"
    )
    run_on_devices(before, save)
    run_on_devices(after, restore)


# --------------------------------------------------------------------------------------------------
# Forked processes, file systems without locks

FORKED = program(
    "import time, warnings\n"
    "warnings.simplefilter('ignore')  # JAX warns of every fork\n"
    "model = nn.Linear(2, 2)\n"
    "if sys.argv[2] == 'before':\n"
    "    checkpointer = nn.Checkpointer(folder)\n"
    "else:\n"
    "    checkpointer = nn.Checkpointer(folder)\n"
    "    checkpointer.save(0, model=model)\n"
    "    checkpointer.wait()\n"
    "if os.fork() == 0:\n"
    "    time.sleep(3600)\n"
    "if sys.argv[2] == 'before':\n"
    "    checkpointer.save(0, model=model)\n"
    "    checkpointer.wait()\n"
    "print('ready', flush=True)\n"
    "if sys.stdin.readline().strip() == 'close':\n"
    "    checkpointer.close()\n"
    "    print('closed', flush=True)\n"
    "    sys.stdin.readline()\n"
)


@pytest.mark.parametrize("order, end", diagonal(2, ["before", "after"], ["close", "kill"]))
def test_a_folder_is_free_when_its_run_ends_though_a_forked_worker_lives(order, end, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", FORKED, str(tmp_path), order],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        with nn.Checkpointer(tmp_path) as checkpointer:
            with pytest.raises(nn.CheckpointError, match=f"where process {process.pid} saves"):
                checkpointer.save(1, model=nn.Linear(2, 2))
            if end == "close":
                process.stdin.write("close\n")
                process.stdin.flush()
                assert process.stdout.readline() == "closed\n"
            else:
                process.kill()
                process.wait()
            checkpointer.save(1, model=nn.Linear(2, 2))
            assert checkpointer.steps() == [0, 1]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_forked_child_leaves_the_run_to_its_parent(tmp_path):
    code = program(
        "import warnings\n"
        "warnings.simplefilter('ignore')  # JAX warns of every fork\n"
        "model = nn.Linear(300, 300)\n"
        "checkpointer = nn.Checkpointer(folder, keep_last=None)\n"
        "checkpointer.save(0, model=model, extra={'epoch': 3})\n"
        "checkpointer.wait()\n"
        "checkpointer.save(1, model=model)\n"
        "checkpointer.wait()\n"  # what threads of the parent hold while they write stays held in a child
        "os.makedirs(folder + '/.deleted/7')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        checkpointer.save(9, a=1)\n"
        "    except nn.CheckpointError as error:\n"
        "        refused = f'where process {os.getppid()} saves' in str(error)\n"
        "    checkpointer.close()\n"
        "    os._exit(3 if refused and os.path.exists(folder + '/.deleted/7') else 4)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3\n"
        "try:\n"
        "    nn.Checkpointer(folder).save(2, model=model)\n"
        "except nn.CheckpointError:\n"
        "    checkpointer.save(2, model=model)\n"
        "print(checkpointer.steps())\n"
    )
    out, err = start(code, str(tmp_path)).communicate(timeout=600)
    assert out == "[0, 1, 2]\n" and not err, err


def test_without_locks_a_run_is_saved_with_a_warning(tmp_path, monkeypatch):
    from statefulnn.io import _locks

    def refuse(_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(_locks, "_lock", refuse)
    with nn.Checkpointer(tmp_path, keep_last=1) as checkpointer:
        with pytest.warns(UserWarning, match="without locks"):
            checkpointer.save(0, model=nn.Linear(1, 1))
        checkpointer.save(1, model=nn.Linear(1, 1))
        with pytest.raises(nn.CheckpointError, match=f"where process {os.getpid()} saves"):
            nn.Checkpointer(tmp_path).save(2, model=nn.Linear(1, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "1"]


# --------------------------------------------------------------------------------------------------
# Folders of strangers


class Strange(Fuzzer):
    """Steps whose notes, or metrics, something else wrote."""

    def setup(self) -> None:
        self.model, self.order = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Generator(0)
        self.model[1].weight = self.model[1].bias
        self.model.keys = nn.Buffer(jax.random.split(jax.random.key(0), 2), persistent=False)
        self.model.masks = nn.Generator(5)
        with nn.Checkpointer(self.folder) as checkpointer:
            checkpointer.save(
                0,
                metrics={"loss": 0.5},
                model=self.model,
                order=self.order,
                extra={"epoch": [1, {"a": None}]},
                table={"a": np.arange(3), "b": np.zeros((0, 2)), "c": "text"},
            )
        self.files = [self.folder / "0/statefulnn/metadata", self.folder / "0/metrics/metrics"]
        self.honest = [file.read_text() for file in self.files]
        self.load(self.folder)

    def write(self, random: random.Random) -> tuple[Path, str]:
        for file, text in zip(self.files, self.honest, strict=True):
            file.write_text(text)
        which = random.random() < 0.1
        tree, change = changed_tree(json.loads(self.honest[which]), random)
        self.files[which].write_text(dumps(tree))
        return self.folder, ascii(f"{self.files[which].name}: {change}")

    def load(self, path: Path) -> None:
        checkpointer = nn.Checkpointer(path, keep_best=1)
        assert checkpointer.steps() == [0]
        checkpointer.best_step()
        before = self.held()
        try:
            done = checkpointer.restore(
                0,
                model=self.model,
                order=self.order,
                device=lambda name, shape: None,
                strict=False,
            )
            assert all(type(v) is float for v in done.metrics.values())
            json.dumps([done.data.get("extra"), str(done.report)])
        except BaseException:
            after = self.held()
            for left, right in zip(before, after, strict=True):
                np.testing.assert_array_equal(left, right)
            raise

    def held(self) -> list[np.ndarray]:
        state = [*self.model.state_dict().values(), jax.random.key_data(self.model.keys)]
        return [np.array(v) for v in (*state, self.model.masks.state, self.order.state)]

    def outcome(self, error: Exception, path: Path) -> str | None:
        if type(error) is nn.StateDictError:
            return "StateDictError"
        return super().outcome(error, path)


@pytest.mark.parametrize("count", [40, pytest.param(10_000, marks=pytest.mark.long)])
def test_notes_that_something_else_wrote_are_read_or_refused(count):
    outcomes = run_fuzz("tests.io.test_checkpointer:Strange", count=count, seed=1)
    assert outcomes["loaded"] > count / 50 and outcomes["CheckpointError"] > count / 2, outcomes


def changed_notes(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "0" / "statefulnn" / "metadata"
    notes = json.loads(path.read_text())
    change(notes)
    path.write_text(json.dumps(notes))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda n: n.pop("metrics"), "the notes is"),
        (lambda n: n["metrics"].update(loss="low"), r"metrics\['loss'\] is 'low'"),
        (lambda n: n["objects"]["model"].update(kind="modules"), "of kind 'modules'"),
        (lambda n: n["objects"]["model"].pop("ties"), "model is"),
        (lambda n: n["objects"]["model"]["ties"].update(bias="gone"), "ties"),
        (lambda n: n["objects"]["model"]["order"].append("more"), "each name once"),
        (lambda n: n["objects"]["model"]["specs"].update(bias=["object", [1]]), "specs"),
        (lambda n: n["objects"]["model"]["specs"].update(bias=["f4,f4", [1]]), "specs"),
        (lambda n: n["objects"]["model"]["specs"].update(bias=["float32", [1] * 65]), "specs"),
        (lambda n: n["objects"]["model"]["specs"].update(bias=["float32", [2**61, 4]]), "specs"),
        (lambda n: n["objects"]["model"]["specs"].update(bias=["float32", [True]]), "specs"),
        (lambda n: n["objects"]["model"]["modules"].update(a={"version": "2"}), "a version"),
        (lambda n: n["objects"]["order"].update(state=[1, 2, 3, 2**32]), "four words"),
        (lambda n: n["objects"]["order"].update(more=1), "order is"),
        (lambda n: n["objects"].update({"a.b": {"kind": "plain", "value": 1}}), "without dots"),
        (lambda n: n["objects"]["table"]["specs"].update(a=["int64", [4]]), "'table.a'"),
        (lambda n: n["objects"]["table"]["specs"].update(a=["int32", [3]]), "'table.a'"),
    ],
)
def test_notes_that_are_wrong_are_an_error_that_says_where(change, text, tmp_path):
    model, order = nn.Linear(1, 1), nn.Generator(0)
    with nn.Checkpointer(tmp_path) as checkpointer:
        table = {"a": np.arange(3)}
        checkpointer.save(0, metrics={"loss": 1}, model=model, order=order, table=table)
        checkpointer.wait()
        changed_notes(tmp_path, change)
        before = model.state_dict()
        with pytest.raises(nn.CheckpointError, match=text):
            checkpointer.restore(model=model, order=order)
        same(model.state_dict(), before)


@pytest.mark.parametrize(
    "file",
    ["statefulnn/metadata", "metrics/metrics", "_CHECKPOINT_METADATA", "arrays/_METADATA"],
)
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "nothing"])
def test_a_step_with_something_else_for_a_file_is_an_error_and_nobody_waits(file, kind, tmp_path):
    model = nn.Linear(1, 1)
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, metrics={"loss": 1}, model=model)
    path = tmp_path / "0" / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    other = nn.Linear(1, 1)
    before = other.state_dict()
    try:
        nn.Checkpointer(tmp_path).restore(model=other)
    except nn.CheckpointError:
        same(other.state_dict(), before)
    else:  # the file is not needed
        assert kind in ("folder", "nothing") and file != "statefulnn/metadata"
        same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_lock_that_is_no_file_is_an_error_and_what_it_leads_to_stays(kind, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    other.write_text("kept")
    if kind == "pipe":
        os.mkfifo(folder / ".lock")
    else:
        (folder / ".lock").symlink_to(other)
    with pytest.raises(nn.CheckpointError, match=r"lock the folder(.|\n)*\.lock"):
        nn.Checkpointer(folder).save(0, model=nn.Linear(1, 1))
    assert other.read_text() == "kept"


def test_integers_that_do_not_fit_are_an_error_that_names_them(tmp_path):
    def holding(values: Any, dtype: Any) -> nn.Module:
        module = nn.Module()
        module.register_buffer("count", jnp.asarray(values, dtype))
        return module

    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, model=holding([-3, 300], jnp.int32), wide={"count": np.array([2**40])})
        for dtype in (jnp.int8, jnp.uint8, jnp.uint32, jnp.uint16):
            other = holding([5, 6], dtype)
            name = jnp.dtype(dtype).name
            with pytest.raises(
                nn.StateDictError, match=rf"'model.count' of int32 (.|\n)*{name}(.|\n)*-3 to 300"
            ):
                checkpointer.restore(model=other, strict=False)
            assert other.count.tolist() == [5, 6]
        other = holding([5, 6], jnp.int16)
        checkpointer.restore(model=other, strict=False)
        assert other.count.dtype == jnp.int16 and other.count.tolist() == [-3, 300]

    with in_float64(), nn.Checkpointer(tmp_path / "wide") as checkpointer:
        checkpointer.save(0, small=holding([7], jnp.int64), large=holding([2**40], jnp.int64))
    other = holding([5], jnp.int32)
    nn.Checkpointer(tmp_path / "wide").restore(small=other, strict=False)
    assert other.count.tolist() == [7]
    with pytest.raises(nn.StateDictError, match=r"'large.count' of int64(.|\n)*jax_enable_x64"):
        nn.Checkpointer(tmp_path / "wide").restore(small=other, large=other, strict=False)


def test_arrays_of_dtypes_that_no_file_has_are_named_when_they_are_saved(tmp_path):
    checkpointer = nn.Checkpointer(tmp_path)
    for array in (np.array(["a"]), np.array([object()]), np.array([1], "M8[s]")):
        with pytest.raises(nn.CheckpointError, match="'table.a'(.|\n)*of dtype"):
            checkpointer.save(0, table={"a": array})
    assert list(tmp_path.iterdir()) == []


def test_orbax_is_imported_when_a_checkpointer_is_made():
    code = (
        "import sys, statefulnn as nn\n"
        "nn.save, nn.Checkpointer\n"
        "assert not [m for m in sys.modules if m.startswith('orbax')]\n"
        "sys.modules['orbax.checkpoint'] = None\n"
        "try:\n"
        "    nn.Checkpointer('x')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    out, err = start(code).communicate(timeout=60)
    assert "pip install orbax-checkpoint" in out, err


def test_threads_may_look_while_one_saves(tmp_path):
    model = nn.Linear(200, 200)
    errors = []
    with nn.Checkpointer(tmp_path, keep_last=None) as checkpointer:
        checkpointer.save(0, model=model)
        checkpointer.wait()

        def look():
            reader = nn.Checkpointer(tmp_path, keep_last=None)
            try:
                for _ in range(5):
                    reader.restore(model=nn.Linear(200, 200))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()
        for step in range(1, 6):
            checkpointer.save(step, model=model)
        for thread in threads:
            thread.join()
    assert errors == []


def test_the_notes_are_json_that_others_can_read(tmp_path):
    with nn.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, model=nn.Linear(2, 3), metrics={"loss": 1.5})
    notes = json.loads((tmp_path / "0" / "statefulnn" / "metadata").read_text())
    assert notes["objects"]["model"]["specs"]["weight"] == ["float32", [3, 2]]
    assert notes["metrics"] == {"loss": 1.5}


def test_an_array_that_is_larger_than_its_notes_say_is_refused_before_it_is_read(
    tmp_path, monkeypatch
):
    import orbax.checkpoint
    import tensorstore

    model = nn.Linear(3, 4)
    with nn.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, model=model)
    base = {"driver": "ocdbt", "base": f"file://{tmp_path}/run/1/arrays/"}
    metadata = {
        "shape": [9_000_000, 3],
        "chunks": [9_000_000, 3],
        "dtype": "<f4",
        "fill_value": None,
    }
    metadata |= {"compressor": {"id": "zstd", "level": 1}, "dimension_separator": "."}
    spec = {"driver": "zarr", "kvstore": {**base, "path": "model.weight/"}, "metadata": metadata}
    opened = tensorstore.open({**spec, "create": True, "delete_existing": True}).result()
    opened.write(np.zeros((9_000_000, 3), "f4")).result()
    read = lambda *_, **__: pytest.fail("the array was read")
    monkeypatch.setattr(orbax.checkpoint.CheckpointManager, "restore", read)
    with pytest.raises(nn.CheckpointError, match=r"shape \(9000000, 3\)(.|\n)*shape \(4, 3\)"):
        nn.Checkpointer(tmp_path / "run").restore(model=model)


def test_objects_without_names_are_told_to_have_some(tmp_path):
    model = nn.Linear(1, 1)
    with nn.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(nn.ArgumentError, match=r"save\(step, model=model, opt=opt\)"):
            checkpointer.save(0, model)  # pyright: ignore[reportArgumentType]
        assert checkpointer.steps() == []


@pytest.mark.parametrize("name", ["run.ckpt", "run.ckpt/steps"])
def test_a_file_in_place_of_the_folder_is_refused_at_once(tmp_path, name):
    (tmp_path / "run.ckpt").write_bytes(b"weights")
    with pytest.raises(
        nn.CheckpointError, match=r"run.ckpt is a file(.|\n)*Instead: nn.Checkpointer"
    ):
        nn.Checkpointer(tmp_path / name)


def test_objects_without_a_step_are_told_how_a_step_is_saved(tmp_path):
    with nn.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(nn.ArgumentError, match=r"save\(step, model=model, opt=opt\)"):
            checkpointer.save(model=nn.Linear(2, 2))
        assert checkpointer.latest_step() is None
