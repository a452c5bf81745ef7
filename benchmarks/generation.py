"""Tokens a second of examples/gpt2.py beside those of transformers' `generate`, the same weights in both.

    python benchmarks/generation.py --json results.json --markdown results.md
    python benchmarks/generation.py --quick
    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/generation.py    # one core each, on a busy machine

A GPT-2 with random weights, no download. Both answer the same prompts of several lengths and add as many
tokens to each. Greedy tokens are compared before anything is timed; no number holds compilation. Needs
the extras `bench` and `reference`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from _harness import Case, measure, table  # noqa: E402
from _report import Report, arguments, run  # noqa: E402

import statefulnn as nn  # noqa: E402
from tests.examples import reference  # noqa: E402

SIZES = {"vocab_size": 8000, "n_positions": 256, "n_embd": 256, "n_layer": 4, "n_head": 8}
SMALL = {"vocab_size": 500, "n_positions": 96, "n_embd": 64, "n_layer": 2, "n_head": 4}
# libgomp's threads spin for up to some milliseconds after torch's last parallel loop.
PAUSE = 0.01


def pair(sizes: dict[str, int]) -> tuple[nn.Module, Any]:
    """Return ours and transformers' with its weights; neither ends before the last token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    given: dict[str, Any] = {**sizes, "eos_token_id": None, "bos_token_id": None}
    theirs = GPT2LMHeadModel(GPT2Config(**given, initializer_range=0.2)).eval()
    ours = reference.gpt2.GPT2LMHeadModel(reference.gpt2.GPT2Config(**sizes, eos_token_id=None))
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    return ours.eval(), theirs


def prompts(rows: int, length: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts whose lengths go down to half of the longest, and their mask."""
    ids = np.random.default_rng(0).integers(1, vocab_size, (rows, length)).astype(np.int32)
    lengths = np.linspace(length, length // 2, rows).astype(int)
    mask = (np.arange(length) >= length - lengths[:, None]).astype(np.int32)
    return ids * mask, mask


def cases(rows: int, options: dict[str, Any], quick: bool) -> tuple[list[Case], int]:
    """Return transformers' call, which is the baseline, ours, and how many tokens each adds."""
    sizes = SMALL if quick else SIZES
    ours, theirs = pair(sizes)
    length, new = (8, 16) if quick else (32, 128)
    ids, mask = prompts(rows, length, sizes["vocab_size"])
    given = {"max_new_tokens": new, "do_sample": bool(options), **options}
    torch_ids, torch_mask = (torch.tensor(x.astype(np.int64)) for x in (ids, mask))
    jax_ids, jax_mask = jnp.asarray(ids), jnp.asarray(mask)

    def call_theirs() -> Any:
        with torch.inference_mode():
            return theirs.generate(torch_ids, attention_mask=torch_mask, pad_token_id=0, **given)

    call_ours = lambda: reference.gpt2.generate(ours, jax_ids, jax_mask, **given)
    if not options:
        np.testing.assert_array_equal(np.asarray(call_ours()), call_theirs().numpy())
    return [Case("transformers", call_theirs), Case("examples/gpt2.py", call_ours)], rows * new


def part(rows: int, name: str, options: dict[str, Any]) -> Callable[[Report, bool], None]:
    """Return a part that times both in interleaved rounds."""

    def measured(report: Report, quick: bool) -> None:
        both, tokens = cases(rows, options, quick)
        title = f"{name}, {rows} prompt{'s' * (rows > 1)}"
        timings = measure(
            both, seconds=1 if quick else 15, description=title, fewest=3, pause=PAUSE
        )
        report.numbers[title] = [t.row() for t in timings]
        table_rows = [
            [t.label, f"{tokens / t.done * 1e6:.0f}", f"{1 / t.ratio_done:.2f}x"] for t in timings
        ]
        report.section(title, table(["", "tokens a second", "ratio"], table_rows))
        report.target(f"{title}: time beside transformers'", timings[1].ratio_done, 1.0, "x")

    return measured


PARTS: dict[str, Callable[[Report, bool], None]] = {
    "one": part(1, "Greedy", {}),
    "batch": part(8, "Greedy", {}),
    "sampled": part(8, "Sampling, top-k and top-p", {"top_k": 50, "top_p": 0.9}),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 if a target was missed and `--strict` was given."""
    options = arguments(__doc__ or "", list(PARTS)).parse_args(argv)
    packages = ["statefulnn", "transformers"]
    return run(PARTS, options, title="Generation", mark="generation", packages=packages)


if __name__ == "__main__":
    sys.exit(main())
