"""One of several processes of a program: ``python worker.py INDEX COUNT PORT FOLDER WHAT``.

Four devices are shared by all processes. What is found out is written to ``FOLDER/WHAT.INDEX.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    INDEX, COUNT, PORT = map(int, sys.argv[1:4])
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = f"--xla_force_host_platform_device_count={4 // COUNT}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np
import optax

import statefulnn as nn
import statefulnn.functional as F
from statefulnn.io._run_folder import lock_of
from tests.parallel import programs

STEPS, KILLED_AT = 6, 3


class Net(nn.Module):
    """BatchNorm, whose state is that of the whole batch, and dropout, whose masks are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm = nn.Linear(6, 32), nn.BatchNorm1d(32)
        self.dropout, self.fc2 = nn.Dropout(0.3), nn.Linear(32, 1)

    def forward(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.dropout(F.relu(self.norm(self.fc1(x)))))


def data() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((8, 6)).astype(np.float32)


@nn.jit
def step(model: Any, opt: Any, x: jax.Array) -> jax.Array:
    loss, grads = nn.value_and_grad(lambda m: ((m(x) - x.sum(1, keepdims=True)) ** 2).mean())(model)
    opt.step(grads)
    return loss


def made(mesh: jax.sharding.Mesh | None) -> tuple[Any, Any]:
    """Build the model that is saved, split over a mesh or on one device, and seed its masks."""
    model = programs.built(Net)
    if mesh is not None:
        nn.parallel.fully_shard(model, mesh, min_size=32)
    opt = nn.Optimizer(model, optax.adam(1e-2))
    nn.manual_seed(1)
    return model, opt


def mine(batch: Any) -> Any:
    """Return the part of a batch that this process reads."""
    part = lambda x: np.split(x, jax.process_count())[jax.process_index()]
    return jax.tree.map(part, batch)


def trained(folder: Path, mesh: jax.sharding.Mesh, kill: bool) -> dict[int, float]:
    """Go on from the last step in the folder; return the losses by step."""
    model, opt = made(mesh)
    x = nn.parallel.shard_batch(mine(data()), mesh, parts=True)
    run = {"model": model, "opt": opt, "masks": nn.default_generator}
    found = {}
    with nn.Checkpointer(folder, keep_last=None) as checkpointer:
        start = 0
        if checkpointer.latest_step() is not None:
            start = checkpointer.restore(**run).step + 1
        for i in range(start, STEPS):
            found[i] = float(step(model, opt, x))
            checkpointer.save(i, **run)
            if kill and i == KILLED_AT and jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGKILL)  # while the step is written
    return found


def placements(mesh: jax.sharding.Mesh, everything: bool) -> dict[str, list[float]]:
    parallel = nn.parallel
    layers = lambda m: parallel.parallelize_module(m, mesh, programs.STYLES)
    shards = lambda m: parallel.fully_shard(m, mesh, min_size=64)
    ways = {"data": lambda m: parallel.data_parallel(m, mesh), "both": lambda m: shards(layers(m))}
    if everything:
        ways |= {"layers": layers, "shards": shards}
    batch = parallel.shard_batch(programs.batch(), mesh)
    out = {}
    for name, place in ways.items():
        model = place(programs.built())
        opt = programs.optimizer(model)
        out[name] = programs.losses(nn.jit(programs.train_step), model, opt, *batch)
    return out


def normalised(mesh: jax.sharding.Mesh) -> dict[str, list[float]]:
    """Return the running means of BatchNorm, and of SyncBatchNorm where devices see their parts only."""
    x = nn.parallel.shard_batch(mine(data()), mesh, parts=True)
    plain = nn.parallel.data_parallel(nn.BatchNorm1d(6), mesh)
    nn.jit(plain)(x)
    sync = nn.parallel.data_parallel(nn.SyncBatchNorm(6, axis_name="data"), mesh)
    specs = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P("data")}
    nn.jit(nn.shard_map(lambda m, x: m(x), mesh=mesh, **specs))(sync, x)
    return {k: np.asarray(m.running_mean).tolist() for k, m in (("plain", plain), ("sync", sync))}


def refused(folder: Path, mesh: jax.sharding.Mesh) -> str:
    model = nn.parallel.fully_shard(nn.Linear(32, 64), mesh)
    try:
        nn.save(model, folder / "whole.safetensors")
    except nn.CheckpointError as error:
        return str(error)
    return ""


def mixed(mesh: jax.sharding.Mesh) -> str:
    """Pass parts of a batch that several processes hold; return the error."""
    try:
        nn.parallel.shard_batch(mine(data()), mesh, axis="model", parts=True)
    except nn.ArgumentError as error:
        return str(error)
    return ""


def held_elsewhere(folder: Path, mesh: jax.sharding.Mesh) -> str:
    """Save to a folder that another Checkpointer of the first process holds; return the error."""
    model = nn.parallel.data_parallel(nn.Linear(2, 2), mesh)
    held = lock_of(folder / "held") if jax.process_index() == 0 else None
    try:
        nn.Checkpointer(folder / "held").save(0, model=model)
    except nn.CheckpointError as error:
        return str(error)
    finally:
        if held is not None:
            held.close()
    return ""


def main() -> None:
    folder, what = Path(sys.argv[4]), sys.argv[5]
    if COUNT > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{PORT}", COUNT, INDEX)
    assert jax.device_count() == 4 and jax.process_count() == COUNT
    wide = nn.parallel.init_device_mesh("cpu", (4,), mesh_dim_names=("data",))
    mesh = nn.parallel.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    found: dict[str, Any] = {}
    if what in ("steps", "everything"):
        found["losses"] = placements(mesh, what == "everything")
        found["means"] = normalised(wide)
        found["refused"] = [refused(folder, wide), held_elsewhere(folder, wide), mixed(mesh)]
    if what in ("steps", "everything", "killed", "restarted"):
        name = "run" if what in ("steps", "everything") else "killed"
        found["trained"] = trained(folder / name, wide, what == "killed")
    (folder / f"{what}.{INDEX}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
