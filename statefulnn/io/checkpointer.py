"""nn.Checkpointer: the steps of a training run in a folder, written in the background by orbax.

Each step is a folder that gets its name when it is complete. In it are the item ``arrays``, as orbax writes
a tree of object -> name -> array, and the item ``statefulnn``, JSON about the rest (`io._snapshot`).
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Never

import jax
import numpy as np
from jax.experimental import multihost_utils

from statefulnn.core.errors import ArgumentError, CheckpointError, StateDictError, explain
from statefulnn.core.extras import import_extra
from statefulnn.core.placement import DeviceLike
from statefulnn.core.tracebacks import shortened
from statefulnn.io._locks import LockFile
from statefulnn.io._run_arrays import arrays_of, check_shapes
from statefulnn.io._run_folder import check_files, close_at_exit, lock_of, silence
from statefulnn.io._run_notes import FORMAT, is_number, read_notes
from statefulnn.io._snapshot import (
    Report,
    compared,
    data_of,
    put_back,
    taken,
)

ARRAYS, NOTES, DELETED = "arrays", "statefulnn", ".deleted"


_inherited: list[Any] = []


@dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` returns.

    Attributes:
        step: the step it was saved at.
        metrics: the metrics saved with it.
        data: name -> what was saved as data: numbers, texts, lists, dicts, also dicts of arrays.
        report: what did not fit; empty unless ``strict=False``.
    """

    step: int
    metrics: dict[str, float]
    data: dict[str, Any]
    report: Report = field(default_factory=Report)


class Checkpointer:
    """Saves a training run step by step, in the background, and continues it exactly.

    Args:
        folder: where the steps are; it is made at the first save.
        keep_last: how many of the last steps to keep; None for all.
        keep_best: how many of the best steps to keep beside them.
        best_by: the name of the metric that says which are best.
        best_mode: "min" if small is good, "max" if large is.
        asynchronous: whether `save` returns when the arrays are copied, and files are written behind it.
        save_every: `save` does nothing at steps that are no multiple of this.

    Raises:
        ImportError: if orbax is not installed (extra ``checkpoints``).
        ValueError: for settings that contradict each other.

    Source: ``orbax.checkpoint.CheckpointManager``.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax, statefulnn as nn
        >>> model = nn.Linear(3, 1)
        >>> opt = nn.Optimizer(model, optax.adam(1e-2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with nn.Checkpointer(folder, keep_last=2) as checkpointer:
        ...         for step in range(5):
        ...             opt.step({"weight": jnp.ones((1, 3)), "bias": jnp.ones(1)})
        ...             _ = checkpointer.save(step, model=model, opt=opt, extra={"epoch": step})
        ...         done = checkpointer.restore(model=model, opt=opt)
        ...     done.step, done.data["extra"], int(opt.state_dict()["count"])
        (4, {'epoch': 4}, 5)
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep_last: int | None = 3,
        keep_best: int = 0,
        best_by: str = "loss",
        best_mode: str = "min",
        asynchronous: bool = True,
        save_every: int = 1,
    ) -> None:
        if best_mode not in ("min", "max"):
            raise ValueError(
                explain(
                    f"made nn.Checkpointer(best_mode={best_mode!r})",
                    "a metric is good when it is small, or when it is large",
                    "best_mode='min' or 'max'",
                )
            )
        if save_every < 1 or keep_best < 0 or (keep_last is not None and keep_last + keep_best < 1):
            raise ValueError(
                explain(
                    f"made nn.Checkpointer({keep_last=}, {keep_best=}, {save_every=})",
                    "it would keep no step, or save at none",
                    "keep_last=3, or None for all; save_every=1",
                )
            )
        self.folder = Path(folder).absolute()
        blocking = next((p for p in (self.folder, *self.folder.parents) if p.exists()), self.folder)
        if blocking.exists() and not blocking.is_dir():
            raise CheckpointError(
                explain(
                    f"made nn.Checkpointer({str(folder)!r}), and {blocking} is a file",
                    "each step is a folder in the folder of the run",
                    "nn.Checkpointer('a folder'), which is made if it is missing; nn.load(path) reads a "
                    "file of one model",
                )
            )
        self.keep_last, self.keep_best, self.save_every = keep_last, keep_best, save_every
        self.best_by, self.best_mode, self.asynchronous = best_by, best_mode, asynchronous
        self._orbax = import_extra(
            "orbax.checkpoint", "orbax-checkpoint", "made an nn.Checkpointer", "writes the steps"
        )
        silence()
        self._opened: Any = None
        self._lock: LockFile | None = None  # of the first of several processes
        self._writes = False
        self._process = os.getpid()

    # ----------------------------------------------------------------------------------------------
    # Saving

    @shortened
    def save(
        self,
        step: int,
        *unnamed: Never,
        metrics: Mapping[str, object] | None = None,
        force: bool = False,
        **objects: object,
    ) -> bool:
        """Save objects by name, as they are at this moment.

        Steps only grow. The step before is waited for; if it could not be written, its error is raised here.

        Args:
            step: the number of the step.
            unnamed: nothing; for the message where objects have no names.
            metrics: numbers by name, for `best_step`.
            force: whether to save at a step that is no multiple of `save_every`.
            objects: modules, optimizers and whatever has ``state_dict`` and ``load_state_dict``; generators;
                dicts of arrays by name; plain data. Of modules also the buffers that are not persistent,
                and their generators.

        Returns:
            whether the step is saved.

        Raises:
            CheckpointError: for what cannot be saved, for a step that is not after the last one, and if
                another process writes to the folder. Nothing is written then.
        """
        if unnamed:
            raise ArgumentError(
                explain(
                    f"saved {len(unnamed)} objects without names",
                    "objects are saved, and found again, by name",
                    "checkpointer.save(step, model=model, opt=opt)",
                )
            )
        step = _integer(step)
        if step % self.save_every and not force:
            return False
        numbers = self._numbers(metrics)
        arrays: dict[str, dict[str, Any]] = {}
        notes: dict[str, Any] = {}
        for label, obj in objects.items():
            if not label.isidentifier():
                raise CheckpointError(
                    explain(
                        f"saved an object under the name {label!r}",
                        "arrays are stored as object.name",
                        "a name without dots: model=model",
                    )
                )
            found, notes[label] = taken(label, obj)
            if found:
                arrays[label] = found
        self._own()
        manager = self._manager()
        self.wait()
        self._sweep()
        self._check_growing(step)
        args = self._orbax.args
        content = {"format": FORMAT, "objects": notes, "metrics": numbers}
        items = {NOTES: args.JsonSave(content)}
        if arrays:
            items[ARRAYS] = args.PyTreeSave(arrays)
        with self._surfacing(f"save step {step}"):
            manager.save(step, args=args.Composite(**items), metrics=numbers or None, force=True)
        return True

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            CheckpointError: if it could not be written.
        """
        self._notice_fork()
        if self._opened is None:
            return
        try:
            with self._surfacing("write a step"):
                self._opened.wait_until_finished()
        except CheckpointError:
            with contextlib.suppress(Exception):
                self._opened.reload()  # orbax counts the step that failed
            raise

    def close(self) -> None:
        """Wait, and let go of the folder; a closed Checkpointer opens again when it is used.

        In a forked process it does nothing: what is open is the parent's.

        Raises:
            CheckpointError: if the last step could not be written.
        """
        try:
            self.wait()
        finally:
            manager, self._opened = self._opened, None
            if manager is not None:
                with contextlib.suppress(Exception):  # `wait` has raised what there was
                    manager.close()
            self._writes = False
            if self._lock is not None:
                self._sweep()
                self._lock.close()
                self._lock = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------------
    # Looking

    def steps(self) -> list[int]:
        """Return the steps that are complete, in order."""
        self.wait()
        if not self.folder.is_dir():
            return []
        with self._surfacing("look for steps"):
            manager = self._manager()
            check_files(self.folder)
            manager.reload()
            return sorted(manager.all_steps())

    def latest_step(self) -> int | None:
        """Return the last step, None if there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Return the step with the best metric, the last of equal ones; None if no step has it."""
        found = [(self._score(self._notes(s)["metrics"]), s) for s in self.steps()]
        return max((f for f in found if f[0] is not None), default=(None, None))[1]

    def metrics(self, step: int) -> dict[str, float]:
        """Return the metrics that were saved with a step."""
        return dict(self._notes(self._found(step))["metrics"])

    def delete(self, step: int) -> None:
        """Remove a step, such as those after the one to go back to.

        Raises:
            CheckpointError: if there is none, or another process writes to the folder.
        """
        step = self._found(step)
        self._own()
        with self._surfacing(f"delete step {step}"):
            self._manager().delete(step)
        self._sweep()

    # ----------------------------------------------------------------------------------------------
    # Restoring

    @shortened
    def restore(
        self,
        step: int | str | None = None,
        *,
        device: DeviceLike | Callable[[str, tuple[int, ...]], DeviceLike] | None = None,
        strict: bool = True,
        **objects: object,
    ) -> Restored:
        """Put what was saved back into objects, in place.

        Names, shapes, dtypes and ties of all objects are compared before anything is changed. Arrays go
        where those they replace are: each device reads its own part of the file.

        Args:
            step: a number, "last" or "best"; None for the last.
            device: where arrays go instead: a device, its name, a ``Sharding``, or a function of
                ``"object.name"`` and shape that returns one.
            strict: whether what differs is an error; otherwise what fits is restored.
            objects: what to restore, under the names it was saved under.

        Returns:
            the step, its metrics, and the data that were saved beside objects.

        Raises:
            StateDictError: for names, shapes, dtypes or ties that differ; nothing is changed.
            CheckpointError: if there is no such step, or it cannot be read.
        """
        step = self._found(step)
        content = self._notes(step)
        notes = content["objects"]
        report = Report()
        for label, obj in objects.items():
            if label not in notes:
                report.missing.append(label)
            else:
                compared(label, obj, notes[label], report)
        if strict and report:
            advice = "build the objects as they were"
            if any(label not in notes for label in objects):
                advice = f"restore them under the names they were saved by: {', '.join(notes)}"
            raise StateDictError(
                explain(
                    f"restored step {step} of {self.folder}, which differs (saved -> present):\n{report}",
                    "restoring some of it would continue another run; nothing was changed",
                    f"{advice}; or restore(..., strict=False), which restores what fits and returns the "
                    "rest as .report",
                )
            )
        arrays = self._arrays(step, notes, objects, device)
        undo: list[Callable[[], None]] = []
        try:
            for label, obj in objects.items():
                if label in notes:
                    undo.append(put_back(obj, notes[label], arrays.get(label, {})))
        except BaseException:
            for back in reversed(undo):
                back()
            raise
        data = {
            label: data_of(note, arrays.get(label, {}))
            for label, note in notes.items()
            if note["kind"] in ("plain", "dict")
        }
        return Restored(step, dict(content["metrics"]), data, report)

    def _arrays(
        self, step: int, notes: Mapping[str, Any], objects: Mapping[str, Any], device: object
    ) -> dict[str, dict[str, Any]]:
        def read(tree: object) -> Any:
            args = self._orbax.args
            # Only what the tree names is read; its leaves say how.
            item = jax.tree_util.tree_map(
                lambda _: 0, tree, is_leaf=lambda v: isinstance(v, self._orbax.RestoreArgs)
            )
            wanted = args.PyTreeRestore(item=item, restore_args=tree, partial_restore=True)
            with self._surfacing(f"read step {step}"):
                check_files(self.folder, step)
                arrays = self.folder / str(step) / ARRAYS
                held = self._orbax.PyTreeCheckpointHandler().metadata(arrays)
                check_shapes(notes, item, getattr(held, "tree", held))
                return self._manager().restore(step, args=args.Composite(**{ARRAYS: wanted}))[
                    ARRAYS
                ]

        return arrays_of(notes, objects, device, self._orbax, read)

    # ----------------------------------------------------------------------------------------------
    # The folder

    def _manager(self) -> Any:
        if self._opened is None:
            orbax, policies = self._orbax, self._orbax.checkpoint_managers
            best = policies.BestN(
                get_metric_fn=self._rank,
                n=self.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            kept = [policies.LatestN(self.keep_last)] + [best] * (self.keep_best > 0)
            options = orbax.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=self._rank,  # so that metrics are written, and read again
                best_mode="max",
                enable_async_checkpointing=self.asynchronous,
                # A step that is being deleted would look complete: it is moved away first, then swept away.
                todelete_subdir=DELETED,
                # What a killed process left; a living one holds the lock, which the first process takes.
                cleanup_tmp_directories=self._writes
                and (self._lock is None or bool(self._lock.held)),
            )
            with self._surfacing("open the folder"):
                if self.folder.is_dir():
                    check_files(self.folder)
                self._opened = orbax.CheckpointManager(self.folder, options=options)
            close_at_exit(self)
        return self._opened

    def _notice_fork(self) -> None:
        """Forget in a forked process what is the parent's: its lock, and what its threads write."""
        if self._process != os.getpid():
            self._process = os.getpid()
            _inherited.append(
                self._opened
            )  # what it does when it goes would wait for those threads
            self._opened, self._lock, self._writes = None, None, False

    def _own(self) -> None:
        """Take the folder for writing, or raise if another one writes there."""
        self._notice_fork()
        if self._writes:
            return
        error = None
        if jax.process_index() == 0:
            try:
                with self._surfacing("lock the folder"):
                    self._lock = lock_of(self.folder)
            except CheckpointError as raised:
                error = raised
        # All processes stop: else the others would wait for this one where orbax opens.
        stopped = error is not None
        if jax.process_count() > 1:
            stopped = bool(multihost_utils.broadcast_one_to_all(np.asarray(stopped)))
        if stopped:
            raise error or CheckpointError(
                explain(
                    f"saved to {self.folder} from process {jax.process_index()} of several",
                    "the first process could not take the folder",
                    "look at the error of process 0",
                )
            )
        self._writes = True
        if self._opened is not None:
            # It was opened for reading; opened again, it cleans up what a killed process left. All processes
            # do so, since they wait for each other where orbax opens and closes.
            self._opened.close()
            self._opened = None

    def _sweep(self) -> None:
        """Remove the steps that were moved away to be deleted."""
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def _check_growing(self, step: int) -> None:
        last = max(self._manager().all_steps(), default=None)
        if last is not None and step <= last:
            raise CheckpointError(
                explain(
                    f"saved step {step} to {self.folder}, which has step {last}",
                    "steps only grow, and none is overwritten",
                    f"a later step; to go back, delete those after it first: checkpointer.delete({last})",
                )
            )

    def _found(self, step: int | str | None) -> int:
        steps = self.steps()
        if isinstance(step, str) and step not in ("last", "best"):
            raise ValueError(
                explain(
                    f"asked for the step {step!r}",
                    "it has no such name",
                    "a number, 'last' or 'best'",
                )
            )
        if step == "best":
            found = self.best_step()
            if found is None and steps:
                raise CheckpointError(
                    explain(
                        f"asked for the best step of {self.folder}",
                        f"no step has the metric {self.best_by!r}",
                        f"save(step, metrics={{{self.best_by!r}: value}}, ...), and "
                        "Checkpointer(best_by=...) of that name",
                    )
                )
        else:
            found = max(steps, default=None) if step in (None, "last") else _integer(step)
        if found not in steps:
            have = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise CheckpointError(
                explain(
                    f"asked for step {step} of {self.folder}",
                    have,
                    "one of checkpointer.steps(); latest_step() is None where there is none",
                )
            )
        assert found is not None
        return found

    def _notes(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step) / NOTES / "metadata"
        with self._surfacing(f"read step {step}"):
            content = read_notes(path) if path.parent.is_dir() else None
        if content is None:
            raise CheckpointError(
                explain(
                    f"read step {step} of {self.folder}",
                    "nn.Checkpointer did not write it, or a newer one did",
                    "another folder, or a newer statefulnn",
                )
            )
        return content

    def _numbers(self, metrics: Mapping[str, Any] | None) -> dict[str, float]:
        numbers = {str(k): float(v) for k, v in (metrics or {}).items()}
        if metrics is not None and self.keep_best and self.best_by not in numbers:
            raise CheckpointError(
                explain(
                    f"saved metrics {sorted(numbers)}",
                    f"the best steps are kept by {self.best_by!r}",
                    f"metrics={{{self.best_by!r}: value}}, or Checkpointer(best_by=...)",
                )
            )
        return numbers

    def _score(self, metrics: Mapping[str, float] | None) -> Any:
        """Return what is large for a good step; None without the metric."""
        value = metrics.get(self.best_by) if isinstance(metrics, Mapping) else None
        if not is_number(value):  # orbax hands on what a file says
            return None
        value = value if self.best_mode == "max" else -value
        return -math.inf if math.isnan(value) else value

    def _rank(self, metrics: Mapping[str, float]) -> float:
        score = self._score(metrics)
        return -math.inf if score is None else score

    @contextlib.contextmanager
    def _surfacing(self, doing: str) -> Iterator[None]:
        """Turn errors of orbax into ours."""
        try:
            yield
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:
            raise CheckpointError(
                explain(
                    f"could not {doing} in {self.folder}",
                    f"{type(error).__name__}: {str(error)[:2000]}",
                    "look at the disk and the folder; steps that are complete are as they were: "
                    "checkpointer.steps()",
                )
            ) from error

    def __repr__(self) -> str:
        return f"Checkpointer({str(self.folder)!r}, keep_last={self.keep_last}, keep_best={self.keep_best})"


def _integer(step: Any) -> int:
    if isinstance(step, bool) or not hasattr(step, "__index__") or step.__index__() < 0:
        raise TypeError(
            explain(f"used {step!r} as a step", "steps are numbered from 0", "save(step, ...)")
        )
    return step.__index__()
