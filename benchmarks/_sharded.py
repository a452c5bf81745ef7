"""For scale.py, on eight virtual devices: a step on a mesh beside the same step by hand with jax.jit.

The model is that of plan.py on 2 x 4 devices: layers split four ways, the rest and the batch two ways. By
hand it is a dict of the same arrays in the same places, `jax.lax.scan` over the blocks, and optax.
"""

from __future__ import annotations

import collections
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if __name__ == "__main__":  # before JAX is first used
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import plan  # noqa: E402
from _harness import Case, measure  # noqa: E402

import statefulnn as nn  # noqa: E402

Arrays = dict[str, Any]
LAYOUT = plan.Layout("both, 2 x 4", 2, 4, True)


def _norm(p: Arrays, name: str, x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def _linear(p: Arrays, name: str, x: jax.Array) -> jax.Array:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def loss_by_hand(params: Arrays, tokens: jax.Array, sizes: plan.Sizes, mesh: Any) -> jax.Array:
    """Return the loss of the model, written in jax.numpy."""
    blocks = {
        n.removeprefix("blocks.stack."): v for n, v in params.items() if n.startswith("blocks.")
    }
    free = jax.P.UNCONSTRAINED
    batch = jax.sharding.NamedSharding(mesh, jax.P("data", free, free))

    def block(x: jax.Array, p: Arrays) -> tuple[jax.Array, None]:
        x = jax.lax.with_sharding_constraint(x, batch)
        h, heads = _norm(p, "norm1", x), (*x.shape[:2], sizes.heads, -1)
        q, k, v = (_linear(p, name, h).reshape(heads).swapaxes(1, 2) for name in "qkv")
        scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        y = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)) @ v
        x = x + _linear(p, "o", y.swapaxes(1, 2).reshape(x.shape))
        h = jax.nn.gelu(_linear(p, "up", _norm(p, "norm2", x)), approximate=False)
        return x + _linear(p, "down", h), None

    x, _ = jax.lax.scan(block, params["embedding.weight"][tokens[:, :-1]], blocks)
    scores = jax.nn.log_softmax(_linear(params, "head", x))
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], -1).mean()


class Steps:
    """Both steps, from the same values.

    Attributes:
        ours, theirs: make a step and return the loss.
        programs: what each is compiled to.
        traces: returns how often ours was traced.
    """

    def __init__(self, sizes: plan.Sizes) -> None:
        nn.manual_seed(0)
        model = plan.GPT(sizes)
        mesh = LAYOUT.place(model)
        tx = optax.adam(1e-3)
        opt, step = nn.Optimizer(model, tx), nn.jit(plan.step)
        shape = (sizes.batch, sizes.length + 1)
        drawn = np.random.default_rng(0).integers(0, sizes.vocabulary, shape)
        tokens = nn.parallel.shard_batch(jnp.asarray(drawn, jnp.int32), mesh)
        params = {n: jnp.copy(p.value) for n, p in model.named_parameters()}
        everywhere = jax.sharding.NamedSharding(mesh, jax.P())
        place = lambda v: v if v.ndim else jax.device_put(v, everywhere)
        slots = jax.tree.map(place, tx.init(params))

        def by_hand(params: Arrays, slots: Any, tokens: jax.Array) -> Any:
            loss, grads = jax.value_and_grad(loss_by_hand)(params, tokens, sizes, mesh)
            updates, slots = tx.update(grads, slots, params)
            return loss, optax.apply_updates(params, updates), slots

        places = jax.tree.map(lambda v: v.sharding, (params, slots))
        compiled = jax.jit(by_hand, out_shardings=(None, *places))
        self.programs = {
            "nn.jit": step.lower(model, opt, tokens).compile(),
            "jax.jit": compiled.lower(params, slots, tokens).compile(),
        }
        self._state = params, slots
        self.traces: Callable[[], int] = lambda: step.trace_count
        self.ours = lambda: step(model, opt, tokens)

        def theirs() -> jax.Array:
            loss, *self._state = compiled(*self._state, tokens)
            return loss

        self.theirs = theirs

    def collectives(self) -> dict[str, collections.Counter[str]]:
        """Return how many numbers each program exchanges in a block and outside, by kind."""
        return {
            name: collections.Counter(
                {f"{kind} of {where}": n for (kind, where), n in counted.items()}
            )
            for name, program in self.programs.items()
            for counted in [plan.counted(plan.collectives(program.as_text()))]
        }


def main() -> int:
    """Measure, and print the numbers for scale.py."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    quick = "--quick" in sys.argv
    sizes = plan.Sizes() if quick else plan.Sizes(128, 8, 4, 512, 64, 16)
    steps = Steps(sizes)
    losses = [float(steps.ours()), float(steps.theirs())]
    timings = measure(
        [Case("jax.jit", steps.theirs), Case("nn.jit", steps.ours)],
        seconds=2.0 if quick else 20.0,
        description="steps on eight devices",
    )
    rows = [t.row() for t in timings]
    numbers = {"losses": losses, "collectives": steps.collectives(), "steps": rows}
    print(json.dumps(numbers | {"compilations": steps.traces()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
