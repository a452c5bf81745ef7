"""A language model on many devices: a GPT learns the source code of Python's standard library, byte by byte.

The mesh, the precision and the number of blocks are flags; a run that stopped goes on where it was, on
another mesh too. About three minutes on two cores.

    python examples/train_lm.py
    python examples/train_lm.py --data 4 --model 2 --virtual 8    # eight devices that share this CPU
    python examples/train_lm.py --layers 12 --width 768 --heads 12 --context 1024 --batch 64 --accumulate 8

Several processes: start the same command in each, with COORDINATOR=host:port, PROCESSES and PROCESS set.
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from matplotlib.figure import Figure
from tqdm import tqdm

import statefulnn as nn
import statefulnn.functional as F

VOCABULARY = 256  # bytes


# --------------------------------------------------------------------------------------------------
# The text


def read_text(most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the standard library's source as bytes, at most so many: to train on, and to test on."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts)
    # An order that mixes the packages, the same in every process.
    files.sort(key=lambda p: zlib.crc32(str(p.relative_to(folder)).encode()))
    parts, size = [], 0
    for file in files:
        if size >= most:
            break
        parts.append(file.read_bytes())
        size += len(parts[-1])
    text = np.frombuffer(b"".join(parts)[:most], np.uint8)
    held_out = len(text) // 20
    return text[:-held_out], text[-held_out:]


def batch_of(text: np.ndarray, step: int, batch: int, context: int, seed: int) -> np.ndarray:
    """Return the batch of a step, ``(batch, context + 1)``: a function of the step, so runs can go on."""
    starts = np.random.default_rng([seed, step]).integers(len(text) - context, size=batch)
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


# --------------------------------------------------------------------------------------------------
# The model


class Attention(nn.Module):
    """Causal attention of several heads; queries, keys and values lie apart, so that heads can be split."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: jax.Array) -> jax.Array:
        B, T, C = x.shape

        def split(y: jax.Array) -> jax.Array:  # (B, T, C) -> (B, H, T, D)
            return y.reshape(B, T, self.heads, C // self.heads).swapaxes(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.swapaxes(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: jax.Array) -> jax.Array:
        x = x + self.dropout(self.attn(self.norm1(x)))
        y = F.gelu(self.up_proj(self.norm2(x)), approximate="tanh")
        return x + self.dropout(self.down_proj(y))


class GPT(nn.Module):
    """Bytes ``(B, T)`` to logits ``(B, T, 256)``."""

    def __init__(
        self, layers: int, width: int, heads: int, context: int, dropout: float, remat: bool
    ):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.LayerStack(lambda: Block(width, heads, dropout), layers, remat=remat)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("weight") and "norm" not in name:
                last = (
                    "o_proj" in name or "down_proj" in name
                )  # two to a block add up along the depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


# How the model is split over the axis "model": heads and hidden units.
STYLES = {
    "*.q_proj": nn.parallel.ColwiseParallel(),
    "*.k_proj": nn.parallel.ColwiseParallel(),
    "*.v_proj": nn.parallel.ColwiseParallel(),
    "*.o_proj": nn.parallel.RowwiseParallel(),
    "*.up_proj": nn.parallel.ColwiseParallel(),
    "*.down_proj": nn.parallel.RowwiseParallel(),
}


def build(args: argparse.Namespace, mesh: Mesh) -> tuple[GPT, nn.Optimizer]:
    """Build model and optimizer, each number on its device from the start."""
    with nn.device("meta"):
        model = GPT(
            args.layers, args.width, args.heads, args.context, args.dropout, remat=args.remat
        )
    model = nn.parallel.parallelize_module(model, mesh, STYLES)
    model = nn.parallel.fully_shard(model, mesh)
    nn.materialize(model)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.lr, args.warmup, args.steps, args.lr / 10
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=decays),
    )
    return model, nn.Optimizer(model, tx)


def decays(params: dict) -> dict:
    """Say which parameters decay: matrices, and neither biases nor norms."""
    return {name: name.endswith("weight") and "norm" not in name for name in params}


# --------------------------------------------------------------------------------------------------
# Training


def loss_of(model: nn.Module, tokens: jax.Array, dtype: str) -> jax.Array:
    with nn.amp.autocast(jnp.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.astype(jnp.float32).swapaxes(1, 2), tokens[:, 1:])


@nn.jit(static_argnames="dtype", donate=("model", "opt"))
def train_step(model: nn.Module, opt: nn.Optimizer, tokens: jax.Array, *, dtype: str) -> jax.Array:
    """One update from bytes ``(batch / parts, parts, context + 1)``; the parts go through one by one."""

    def part(total: dict, tokens: jax.Array) -> tuple[dict, jax.Array]:
        loss, grads = nn.value_and_grad(loss_of)(model, tokens, dtype)
        return jax.tree.map(jnp.add, total, grads), loss

    zeros = {name: jnp.zeros_like(p.value) for name, p in model.named_parameters()}
    total, losses = nn.scan(part, zeros, tokens.swapaxes(0, 1))
    opt.step(jax.tree.map(lambda g: g / len(losses), total))
    return losses.mean()


@nn.jit(static_argnames="dtype")
def test_loss(model: nn.Module, tokens: jax.Array, *, dtype: str) -> jax.Array:
    return loss_of(model, tokens, dtype)


def flops_of_step(args: argparse.Namespace, model: nn.Module) -> float:
    """Return the multiplications and additions of one step: forward, and backward with twice as many."""
    matrices = sum(
        p.size
        for name, p in model.named_parameters()
        if name.endswith("weight") and "norm" not in name and name not in TABLES
    )
    attention = args.layers * args.width * args.context  # causal: half of the products of all pairs
    return 6 * (matrices + attention) * args.batch * args.context


TABLES = ("tokens.weight", "positions.weight")  # looked up, not multiplied


def measured_peak(mesh: Mesh, dtype: str) -> float:
    """Return the multiplications and additions a second that the mesh reaches on large products."""
    size, rows = 1024, 1024 * mesh.size
    place = jax.NamedSharding(mesh, jax.P(mesh.axis_names, None))
    a = jax.device_put(jnp.ones((rows, size), dtype), place)
    b = jax.device_put(jnp.ones((size, size), dtype), jax.NamedSharding(mesh, jax.P()))
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, b))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(product(a, b))
        seconds.append(time.perf_counter() - start)
    return 2 * rows * size * size / min(seconds)


def evaluate(model: nn.Module, text: np.ndarray, args: argparse.Namespace, mesh: Mesh) -> float:
    """Return the loss on held-out text, in nats a byte."""
    model.eval()
    losses = []
    for i in range(args.eval_batches):
        tokens = batch_of(text, i, args.batch // args.accumulate, args.context, seed=1)
        tokens = nn.parallel.shard_batch(jnp.asarray(tokens), mesh)
        losses.append(test_loss(model, tokens, dtype=args.dtype))
    model.train()
    return float(np.mean([float(loss) for loss in losses]))


@nn.jit(static_argnames="length")
def sample(model: nn.Module, prompt: jax.Array, *, length: int, temperature: float) -> jax.Array:
    """Continue bytes ``(T,)`` to `length` of them; the whole text goes through the model for each byte."""
    start = prompt.shape[0]
    tokens = jnp.zeros((1, length), jnp.int32).at[0, :start].set(prompt)

    def add(i: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = jax.lax.dynamic_index_in_dim(model(tokens)[0], i - 1, keepdims=False)
        return tokens.at[0, i].set(jax.random.categorical(nn.next_key(), logits / temperature))

    return nn.fori_loop(start, length, add, tokens)[0]


def draw(losses: list[float], tests: dict[int, float], file: Path) -> None:
    """Save a picture of the losses."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(losses, lw=0.8, label="training")
    axis.plot(list(tests), list(tests.values()), "o-", label="held out")
    axis.set(xlabel="step", ylabel="nats a byte")
    axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


# --------------------------------------------------------------------------------------------------
# The program


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_argument_group("the model")
    size.add_argument("--layers", type=int, default=4)
    size.add_argument("--width", type=int, default=128)
    size.add_argument("--heads", type=int, default=4)
    size.add_argument("--context", type=int, default=128)
    size.add_argument("--dropout", type=float, default=0.0)
    size.add_argument("--remat", action="store_true", help="compute blocks again, for memory")
    run = parser.add_argument_group("the run")
    run.add_argument("--steps", type=int, default=300)
    run.add_argument("--stop", type=int, help="end at this step, and go on with another run")
    run.add_argument("--batch", type=int, default=16, help="sequences a step, on all devices")
    run.add_argument("--accumulate", type=int, default=1, help="parts that a step goes through")
    run.add_argument("--lr", type=float, default=2e-3)
    run.add_argument("--warmup", type=int, default=20)
    run.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--text", type=int, default=4_000_000, help="bytes of text")
    run.add_argument("--eval-every", type=int, default=100)
    run.add_argument("--eval-batches", type=int, default=8)
    where = parser.add_argument_group("devices and files")
    where.add_argument("--data", type=int, help="devices along the batch; all that are left")
    where.add_argument("--model", type=int, default=1, help="devices that share heads and units")
    where.add_argument("--virtual", type=int, help="how many devices the CPU is to look like")
    where.add_argument("--folder", type=Path, default=Path("out/train_lm"), help="checkpoints")
    where.add_argument("--save-every", type=int, default=100)
    where.add_argument("--picture", type=Path, default=Path("out/train_lm.png"))
    where.add_argument("--prompt", default="def main(")
    args = parser.parse_args(argv)
    if args.width % args.heads or args.heads % args.model or args.batch % args.accumulate:
        parser.error("heads divide the width, --model the heads, and --accumulate the batch")
    return args


def mesh_of(args: argparse.Namespace) -> Mesh:
    """Join the other processes, if there are any, and return the mesh of all devices."""
    if args.virtual:
        jax.config.update("jax_num_cpu_devices", args.virtual)
    if "PROCESSES" in os.environ:
        jax.distributed.initialize(
            os.environ["COORDINATOR"], int(os.environ["PROCESSES"]), int(os.environ["PROCESS"])
        )
    data = args.data or jax.device_count() // args.model
    shape = (data, args.model)
    return nn.parallel.init_device_mesh(
        jax.default_backend(), shape, mesh_dim_names=("data", "model")
    )


def train(
    args: argparse.Namespace,
    mesh: Mesh,
    model: GPT,
    opt: nn.Optimizer,
    checkpointer: nn.Checkpointer,
    texts: tuple[np.ndarray, np.ndarray],
) -> tuple[list[float], dict[int, float]]:
    """Train from the last checkpoint on; return the losses, and those on held-out text by step."""
    first, losses, tests = 0, [], {}
    if checkpointer.latest_step() is not None:
        restored = checkpointer.restore(model=model, opt=opt, masks=nn.default_generator)
        first, losses = restored.step, restored.data["extra"]["losses"]
        tests = {int(i): loss for i, loss in restored.data["extra"]["tests"].items()}
    last = min(args.steps, args.stop or args.steps)
    if first >= last:
        return losses, tests
    flops, peak = flops_of_step(args, model), measured_peak(mesh, args.dtype)
    parts = args.accumulate
    bar = tqdm(range(first, last), desc="train", unit="step", disable=jax.process_index() > 0)
    began, timed, waiting = 0.0, 0, []
    for step in bar:
        tokens = jnp.asarray(batch_of(texts[0], step, args.batch, args.context, args.seed))
        tokens = tokens.reshape(-1, parts, args.context + 1)  # (batch / parts, parts, context + 1)
        tokens = nn.parallel.shard_batch(tokens, mesh)
        waiting.append(train_step(model, opt, tokens, dtype=args.dtype))
        done = step + 1
        tests_now = done % args.eval_every == 0 or done == last
        saves_now = done % args.save_every == 0 or done == last
        # The loss of the step before is there: nobody waits. A first step compiles, and is not timed.
        while len(waiting) > (0 if tests_now or saves_now or step == first else 1):
            losses.append(float(waiting.pop(0)))
        if began and timed:
            rate = timed / (time.perf_counter() - began)
            bar.set_postfix_str(
                f"loss {losses[-1]:.3f}, {rate * args.batch * args.context:,.0f} bytes/s, "
                f"{rate * flops / peak:.0%} of the peak"
            )
        timed += 1
        if tests_now:
            tests[done] = evaluate(model, texts[1], args, mesh)
        if saves_now:
            extra = {"losses": losses, "tests": {str(i): loss for i, loss in tests.items()}}
            checkpointer.save(done, model=model, opt=opt, masks=nn.default_generator, extra=extra)
        if step == first or tests_now or saves_now:
            began, timed = time.perf_counter(), 0
    return losses, tests


def main(argv: list[str] | None = None) -> list[float]:
    """Train from where the last run ended, write a sample and a picture; return the losses."""
    args = arguments(argv)
    mesh = mesh_of(args)
    texts = read_text(args.text)
    nn.manual_seed(args.seed)
    model, opt = build(args, mesh)
    chief = jax.process_index() == 0
    say = print if chief else (lambda *_: None)
    count = sum(p.size for p in model.parameters())
    say(f"{count:,} parameters on a mesh of {dict(mesh.shape)}; {len(texts[0]):,} bytes of text")
    with nn.Checkpointer(args.folder, keep_last=2) as checkpointer:
        before = checkpointer.latest_step()
        if before is not None:
            say(f"goes on at step {before}")
        losses, tests = train(args, mesh, model, opt, checkpointer, texts)

    test = tests[max(tests)]
    say(f"held-out loss {test:.3f} nats a byte, {test / math.log(2):.2f} bits")
    prompt = jnp.asarray(list(args.prompt.encode()))
    length = min(args.context, len(prompt) + 200)
    written = sample(model.eval(), prompt, length=length, temperature=0.8)
    if chief:
        print(bytes(np.asarray(written).astype(np.uint8)).decode(errors="replace"))
        draw(losses, tests, args.picture)
        print(f"picture: {args.picture}")
    return losses


if __name__ == "__main__":
    main()
