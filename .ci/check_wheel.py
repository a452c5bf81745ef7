"""Builds what is published, checks it, and tries the wheel in new environments, as a user has it.

    python .ci/check_wheel.py            the README with the extra `optim`, and the package without extras
    python .ci/check_wheel.py all        each extra alone as well; it downloads a few hundred MB

It needs `build` and `twine`, which the extra `dev` brings.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import textwrap
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 1_200_000
FOR_DEVELOPMENT = {"bench", "dev", "docs", "examples", "reference"}
START = "import jax, jax.numpy as jnp, numpy as np, statefulnn as nn\nx = jnp.ones((2, 3))\n"
# What an extra is for, run where nothing else is installed.
USES = {
    "": "nn.jit(nn.Linear(3, 4))(x)",
    "io": """
        nn.save(nn.Linear(3, 4), "layer.safetensors")
        nn.Linear(3, 4).load_state_dict(nn.load("layer.safetensors"))
    """,
    "checkpoints": """
        with nn.Checkpointer("run") as checkpointer:
            checkpointer.save(1, model=nn.Linear(3, 4))
    """,
    "torch": """
        import torch
        nn.bridge.torch.from_torch(torch.nn.Linear(3, 4), torch.zeros(2, 3))(x)
    """,
    "flax": """
        from flax import nnx
        nn.bridge.flax.from_nnx(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))(x)
    """,
    "equinox": """
        import equinox as eqx
        nn.bridge.equinox.from_equinox(eqx.nn.Linear(3, 4, key=jax.random.key(0)))(x[0])
    """,
    "haiku": "import statefulnn.bridge.haiku",
    "privacy": "nn.curvature.accounting",
    "onnx": "nn.export(nn.Linear(3, 4), x, 'layer.onnx', format='onnx')",
    "stablehlo": "nn.export(nn.Linear(3, 4), x, 'layer.jax', format='stablehlo')",
}


def run(*command: object, cwd: Path = ROOT) -> None:
    print("$", *(str(part)[:60].replace("\n", "; ") for part in command), flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def code_of_readme() -> str:
    """Return the Python of README.md in its order, as a program; what it shows of a session is a doctest."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    parts = [(ROOT / "tests" / "doctests.py").read_text(), "names = globals()"]
    for block in blocks:
        if ">>>" in block:
            flags = "doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE"
            parts += [
                f"test = doctest.DocTestParser().get_doctest({block!r}, names, 'README', None, 0)",
                f"runner = doctest.DocTestRunner(optionflags={flags})",
                "runner.run(test, clear_globs=False)",
                "assert not runner.failures",
                "names.update(test.globs)",
            ]
        else:
            parts.append(block)
    return "\n".join(parts)


def environment(folder: Path, wheel: Path, extra: str) -> Path:
    """Return the Python of a new environment that holds the wheel with one extra."""
    venv.create(folder)
    python = folder / "bin" / "python"
    oldest = sys.version_info[:2] == (3, 11)
    constraint = ["-c", ROOT / "requirements" / "oldest.txt"] if oldest else []
    wanted = f"{wheel}[{extra}]" if extra else wheel
    # This environment's pip is a new one, and Python compiles what is imported by itself.
    install = ["install", "-q", "--disable-pip-version-check", "--no-compile"]
    run(sys.executable, "-m", "pip", "--python", python, *install, *constraint, wanted)
    return python


def main(which: list[str]) -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"]) - FOR_DEVELOPMENT
    programs = {extra: START + textwrap.dedent(code) for extra, code in USES.items()}
    programs["optim"] = code_of_readme()
    assert set(programs) == extras | {""}, "each extra has a program that uses it"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist")
        run(sys.executable, "-m", "twine", "check", "--strict", *(folder / "dist").iterdir())
        (wheel,) = (folder / "dist").glob("*.whl")
        size = wheel.stat().st_size
        assert size < MOST_BYTES, f"the wheel has {size} bytes, and {MOST_BYTES} are the limit"
        for extra in sorted(programs) if which == ["all"] else ["", "optim"]:
            python = environment(folder / f"env-{extra}", wheel, extra)
            (folder / "empty").mkdir(exist_ok=True)
            run(python, "-I", "-c", programs[extra], cwd=folder / "empty")
            print(f"ok: the wheel {f'with {extra}' if extra else 'alone'}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
