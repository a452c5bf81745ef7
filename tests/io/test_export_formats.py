"""nn.export as StableHLO and ONNX: what other programs compute from the file is what the module computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnx
import onnxruntime
import pytest
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters.mlir import make_ir_context

import resnet
import statefulnn as nn


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def image_model() -> nn.Module:
    """Of what jax2onnx does not convert by itself there is a padding of arrays with a batch of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 5),
    ).eval()


class Tagger(nn.Module):
    """A loop from the end, attention, tied weights, a keyword input and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.rnn = nn.GRU(8, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, mask=None):
        hidden = self.rnn(self.encoder(self.embed(ids)))[0]
        return {"logits": self.head(hidden), "hidden": hidden * mask[..., None]}


def run_onnx(path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Return the outputs by their names."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it speaks of constants in loops that nothing reads
    session = onnxruntime.InferenceSession(path, options)
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def close(given: object, wanted: object) -> None:
    np.testing.assert_allclose(np.asarray(given), np.asarray(wanted), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# ONNX


def test_onnxruntime_computes_what_the_module_computes_for_a_batch_of_any_size(tmp_path):
    model = image_model()
    nn.export(model, floats(2, 3, 8, 8), tmp_path / "m.onnx", format="onnx")
    for batch in (1, 3):
        x = floats(batch, 3, 8, 8)
        got = run_onnx(tmp_path / "m.onnx", input=x)
        assert list(got) == ["output"]
        close(got["output"], model(x))


def test_several_dimensions_have_names_and_inputs_and_outputs_too(tmp_path):
    model = Tagger().eval()
    ids, mask = np.arange(10, dtype=np.int32).reshape(2, 5), np.ones((2, 5), np.float32)
    shapes = {"ids": "b, t", "mask": "b, t"}
    path = tmp_path / "m.onnx"
    nn.export(model, ids, path, format="onnx", kwargs={"mask": mask}, shapes=shapes)
    for shape in ((1, 3), (3, 6)):
        given, kept = np.resize(ids, shape), np.resize(np.float32([0, 1]), shape)
        got = run_onnx(path, ids=given, mask=kept)
        wanted = model(given, mask=kept)
        assert sorted(got) == ["output.hidden", "output.logits"]
        close(got["output.hidden"], wanted["hidden"])
        close(got["output.logits"], wanted["logits"])
    (first, *_) = onnx.load(path).graph.input
    assert [d.dim_param for d in first.type.tensor_type.shape.dim] == ["b", "t"]


def test_weights_are_initializers_under_their_names_each_once(tmp_path):
    model = Tagger().eval()
    kwargs = {"mask": np.ones((2, 5), np.float32)}
    given = np.zeros((2, 5), np.int32)
    nn.export(
        model, given, tmp_path / "m.onnx", format="onnx", kwargs=kwargs, metadata={"epoch": "3"}
    )
    graph = onnx.load(tmp_path / "m.onnx")
    held = {i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer}
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(held[name], parameter)
    assert "head.weight" not in held
    assert {p.key: p.value for p in graph.metadata_props} == {"epoch": "3"}


class Factor(nn.Module):
    def forward(self, x):
        return jnp.linalg.cholesky(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), Factor()])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def test_a_primitive_that_onnx_lacks_is_named_with_its_module_and_nothing_is_written(
    tmp_path, capfd
):
    model = nn.Sequential(nn.Linear(3, 3), Net())
    (tmp_path / "m.onnx").write_bytes(b"before")
    with pytest.raises(nn.CheckpointError, match=r"'cholesky' in 1/blocks\.1") as error:
        nn.export(model, floats(2, 3, 3), tmp_path / "m.onnx", format="onnx")
    assert "'dot_general'" not in str(error.value) and "batch=None" in str(error.value)
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("m.onnx", b"before")]
    assert capfd.readouterr() == ("", "")


def test_a_length_that_has_to_be_a_number_is_answered_with_the_shape(tmp_path):
    class Flat(nn.Module):
        def forward(self, x):
            return x.reshape(len(x), -1)

    with pytest.raises(nn.ShapeError, match=r"x\.shape\[0\] in place of len\(x\)"):
        nn.export(Flat(), floats(2, 3, 4), tmp_path / "m.onnx", format="onnx")


def test_one_name_for_a_weight_and_an_input_is_refused(tmp_path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(jnp.ones(3))

        def forward(self, scale):
            return self.scale * scale

    with pytest.raises(nn.CheckpointError, match="two 'scale'"):
        nn.export(Named(), floats(2, 3), tmp_path / "m.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_products_of_each_with_each_and_outputs_that_are_one_array_are_written(tmp_path):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(jnp.arange(3.0))

        def forward(self, x, y):
            product = jnp.einsum("bi,jb->bij", x, y)
            return x, self.scale, product, product, jnp.einsum("i,j->ij", self.scale, self.scale)

    model, x, y = Outer(), floats(2, 3), floats(4, 2)
    nn.export(model, (x, y), tmp_path / "m.onnx", format="onnx", batch=None)
    got = run_onnx(tmp_path / "m.onnx", x=x, y=y)
    assert list(got) == [f"output.{i}" for i in range(5)]
    for one, wanted in zip(got.values(), model(x, y), strict=True):
        close(one, wanted)


def test_a_file_that_would_compute_something_else_is_not_written(tmp_path, monkeypatch):
    class Minus(nn.Module):
        def forward(self, x):
            return -x

    def wrong(f, *args, **kwargs):
        return convert(lambda x: [y + 1 for y in f(x)], *args, **kwargs)

    convert = jax2onnx.to_onnx
    monkeypatch.setattr(jax2onnx, "to_onnx", wrong)
    with pytest.raises(nn.CheckpointError, match="another 'output' in onnxruntime"):
        nn.export(Minus(), floats(2, 3), tmp_path / "m.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["onnx", "jax2onnx", "onnxruntime"])
def test_a_missing_library_is_an_error_that_names_the_extra(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r'pip install "statefulnn\[onnx\]"'):
        nn.export(nn.Linear(3, 2), floats(2, 3), tmp_path / "m.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_resnet_runs_in_onnxruntime(tmp_path):
    model = resnet.resnet18().eval()
    nn.export(model, floats(2, 3, 64, 64), tmp_path / "m.onnx", format="onnx")
    x = floats(3, 3, 64, 64)
    close(run_onnx(tmp_path / "m.onnx", x=x)["output"], nn.jit(model)(x))


# --------------------------------------------------------------------------------------------------
# StableHLO


def read_module(path: Path) -> ir.Module:
    """Return the module of a file as text or as bytecode, read by StableHLO's own functions."""
    context = make_ir_context()
    if path.suffix == ".mlir":
        return ir.Module.parse(path.read_text(), context)
    return stablehlo.deserialize_portable_artifact(context, path.read_bytes())


@pytest.mark.parametrize("ending", [".mlir", ".mlirbc"])
def test_the_interpreter_of_stablehlo_computes_what_the_module_computes(ending, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval()
    x = floats(2, 3)
    path = tmp_path / f"m{ending}"
    nn.export(model, x, path, format="stablehlo", batch=None)
    module = read_module(path)
    with module.context:
        (got,) = stablehlo.eval_module(module, [ir.DenseElementsAttr.get(x)])
        close(np.array(ir.DenseElementsAttr(got)), model(x))


def test_text_says_which_dimensions_have_any_size(tmp_path):
    model = image_model()
    nn.export(model, floats(2, 3, 8, 8), tmp_path / "m.mlir", format="stablehlo")
    assert "@main(%arg0: tensor<?x3x8x8xf32>" in (tmp_path / "m.mlir").read_text()


def test_jax_alone_runs_the_artifact_for_any_size_with_its_derivative(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, *, scale):
            return {"y": self.linear(x["a"]) * scale[:, None], "x": x["a"]}

    model = Two()
    kwargs = {"scale": floats(2)}
    path = tmp_path / "m.jax"
    nn.export(model, {"a": floats(2, 3)}, path, format="stablehlo", kwargs=kwargs, vjp_order=1)
    a, scale = floats(5, 3), floats(5)
    np.savez(tmp_path / "given.npz", a=a, scale=scale)
    program = """
import sys
import jax, jax.export, numpy as np
read = jax.export.deserialize(bytearray(open("m.jax", "rb").read()))
given = np.load("given.npz")
out = read.call({"a": given["a"]}, scale=given["scale"])
grad = jax.grad(lambda a: read.call({"a": a}, scale=given["scale"])["y"].sum())(given["a"])
np.savez("out.npz", y=out["y"], x=out["x"], grad=grad)
assert "statefulnn" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=600)
    with np.load(tmp_path / "out.npz") as got:
        close(got["y"], model({"a": a}, scale=scale)["y"])
        np.testing.assert_array_equal(got["x"], a)
        close(got["grad"], scale[:, None] * np.asarray(model.linear.weight).sum(0))


# --------------------------------------------------------------------------------------------------
# All formats


FILES = {"statefulnn": "m", "stablehlo": "m.jax", "onnx": "m.onnx"}


@pytest.mark.parametrize("format", FILES)
def test_an_exported_model_is_what_it_was_and_runs_and_learns(format, tmp_path):
    model, x = image_model(), floats(2, 3, 8, 8)
    before = {name: np.array(value) for name, value in model.state_dict().items()}
    twin = image_model()
    twin.load_state_dict(before)
    jax.clear_caches()  # the export is the first to trace the layers
    nn.export(model, x, tmp_path / FILES[format], format=format)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert not model.training
    given = floats(3, 3, 8, 8)
    got = model(given), nn.jit(model)(given), nn.grad(lambda m: m(given).sum())(model)
    model.train()(given)
    jax.clear_caches()
    wanted = twin(given), nn.jit(twin)(given), nn.grad(lambda m: m(given).sum())(twin)
    twin.train()(given)
    jax.tree.map(close, got, wanted)
    left = [n for n, f in vars(jnp).items() if getattr(f, "__module__", "").startswith("jax2onnx")]
    assert left == []
    close(model[1].running_mean, twin[1].running_mean)


@pytest.mark.parametrize("format", FILES)
def test_dropout_in_training_mode_is_refused_by_each_format(format, tmp_path):
    with pytest.raises(nn.MissingRngError):
        nn.export(nn.Dropout(), floats(2, 3), tmp_path / FILES[format], format=format)
    with pytest.raises(nn.StateWriteError):
        nn.export(nn.BatchNorm1d(3), floats(2, 3), tmp_path / FILES[format], format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "file", "message"),
    [
        ({"format": "tflite"}, "m", "'statefulnn', 'stablehlo', 'onnx'"),
        ({"format": "stablehlo"}, "m.bin", r"\.mlir \(text\), \.mlirbc"),
        ({"format": "stablehlo", "vjp_order": 1}, "m.mlir", r"vjp_order=1(.|\n)*'m\.jax'"),
        ({"format": "stablehlo", "platforms": ("cpu", "cuda")}, "m.mlir", "for one platform"),
        ({"format": "stablehlo", "rng": True}, "m.mlir", "rng=True(.|\n)*format='statefulnn'"),
        ({"format": "stablehlo", "metadata": {"a": "b"}}, "m.jax", "metadata="),
        ({"format": "onnx", "mutable": True}, "m.onnx", "mutable=True"),
        ({"format": "onnx", "platforms": ("cpu",)}, "m.onnx", "platforms="),
        ({"format": "onnx", "methods": ("forward", "extra_repr")}, "m.onnx", "methods="),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("m") else None,
)
def test_what_a_format_has_no_place_for_is_refused(settings, file, message, tmp_path):
    with pytest.raises(nn.CheckpointError, match=message):
        nn.export(nn.Linear(3, 2), floats(2, 3), tmp_path / file, **settings)
    assert list(tmp_path.iterdir()) == []
