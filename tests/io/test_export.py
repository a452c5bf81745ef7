"""nn.export and nn.load_exported: what the module computes, the file computes, without the module."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import statefulnn as nn
from statefulnn.io import exported
from tests.io.mutations import for_mutations
from tests.precision import in_float64


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def image_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4, 2),
    ).eval()


class Language(nn.Module):
    """Tied, with two methods, keyword inputs and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", jnp.full((), 2.0), persistent=False)

    def encode(self, ids):
        return self.norm(self.embed(ids)) * self.scale

    def forward(self, ids, mask=None):
        hidden = self.encode(ids)
        if mask is not None:
            hidden = hidden * mask[..., None]
        return {"logits": self.head(hidden), "hidden": hidden}


IDS = np.arange(10, dtype=np.int32).reshape(2, 5)


# A jitted module is one program, as the exported one is: the same numbers, bit by bit.
@pytest.mark.parametrize(
    ("model", "inputs", "shapes"),
    [
        (image_model, (floats(2, 3, 8, 8),), None),
        (lambda: nn.LSTM(3, 4, batch_first=True).eval(), (floats(2, 5, 3),), {"input": "b, t, 3"}),
        pytest.param(
            lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
            (floats(2, 5, 8),),
            {"src": "b, t, 8"},
            marks=pytest.mark.long,
        ),
        (Language, (IDS, np.ones((2, 5), np.float32)), {"ids": "b, t", "mask": "b, t"}),
    ],
    ids=["convolutional", "recurrent", "transformer", "tied"],
)
def test_the_outputs_are_those_of_the_module_for_any_size(model, inputs, shapes, tmp_path):
    model = model()
    nn.export(model, inputs, tmp_path / "m", shapes=shapes)
    loaded = nn.load_exported(tmp_path / "m")
    for batch in (1, 7):
        given = [np.resize(x, (batch, *x.shape[1:])) for x in inputs]
        want, got = nn.jit(model)(*given), loaded(*given)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    if shapes:
        given = [x[:, :3] for x in inputs]
        jax.tree.map(np.testing.assert_array_equal, loaded(*given), nn.jit(model)(*given))


# How a convolution is computed hangs on sizes, also on that of the batch where it is known.
LAYERS = {
    "patches": (lambda: nn.Conv2d(3, 8, 4, stride=4), (3, 16, 16)),
    "many taps": (lambda: nn.Conv2d(8, 8, 7, padding=3, groups=8), (8, 14, 14)),
    "wide border": (lambda: nn.Conv2d(3, 8, 3, padding=2), (3, 8, 8)),
    "small image": (lambda: nn.Conv2d(3, 8, 5, padding=2), (3, 2, 2)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 8, 8)),
    "one axis": (lambda: nn.Conv2d(4, 8, (3, 1)), (4, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 8, 4, 2, 1), (3, 8, 8)),
    "3d": (lambda: nn.Conv3d(2, 4, 3, padding=1), (2, 5, 5, 5)),
}


@pytest.mark.parametrize(("layer", "sizes"), LAYERS.values(), ids=LAYERS)
def test_each_way_of_a_convolution_takes_a_batch_of_any_size(layer, sizes, tmp_path):
    layer = layer()
    nn.export(layer, jax.ShapeDtypeStruct((2, *sizes), jnp.float32), tmp_path / "m")
    loaded = nn.load_exported(tmp_path / "m")
    for batch in (1, 5):
        x = floats(batch, *sizes)
        np.testing.assert_allclose(loaded(x), layer(x), rtol=1e-4, atol=1e-5)


ANY_SIZE = {
    "step": (lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1), 2),
    "one point": (lambda: nn.Conv2d(4, 4, 1), 2),
    "one axis": (lambda: nn.Conv1d(4, 4, 5, padding=2), 1),
    "3d": (lambda: nn.Conv3d(4, 4, 3, stride=2, padding=1), 3),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1), 2),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), 2),
}


@pytest.mark.parametrize(("layer", "axes"), ANY_SIZE.values(), ids=ANY_SIZE)
def test_a_convolution_takes_images_of_any_size(layer, axes, tmp_path):
    layer, names = layer(), ", ".join("dhw"[:axes])
    shape = jax.ShapeDtypeStruct((2, 4, *(9,) * axes), jnp.float32)
    nn.export(layer, shape, tmp_path / "m", shapes={"input": f"b, 4, {names}"})
    loaded = nn.load_exported(tmp_path / "m")
    for size in (5, 8):
        x = floats(3, 4, *range(size, size + axes))
        np.testing.assert_allclose(loaded(x), layer(x), rtol=1e-4, atol=1e-5)


def test_a_comparison_that_sizes_do_not_decide_names_both_answers(tmp_path):
    layer = nn.Conv1d(4, 4, 5, padding=2, padding_mode="reflect")
    with pytest.raises(nn.ShapeError) as caught:
        nn.export(layer, floats(2, 4, 9), tmp_path / "m", shapes={"input": "b, 4, n"})
    answers = re.findall(r"constraints=(\('n [<>]= \d',\))", str(caught.value))
    assert answers == ["('n >= 3',)", "('n <= 2',)"]
    options = {"shapes": {"input": "b, 4, n"}, "constraints": ast.literal_eval(answers[0])}
    nn.export(layer, floats(2, 4, 9), tmp_path / "m", **options)
    x = floats(2, 4, 3)
    np.testing.assert_allclose(nn.load_exported(tmp_path / "m")(x), layer(x), rtol=1e-4, atol=1e-5)


def test_one_text_for_all_shapes_is_refused_with_the_dict_to_write(tmp_path):
    with pytest.raises(TypeError, match=r"shapes=\{'input': 'b, 3'\}"):
        nn.export(nn.Linear(3, 2), floats(4, 3), tmp_path / "m", shapes="b, 3")


def test_shapes_are_enough_and_may_have_names_already(tmp_path):
    model = nn.Linear(3, 2)
    nn.export(model, jax.ShapeDtypeStruct((1, 3), jnp.float32), tmp_path / "a")
    b, t = jax.export.symbolic_shape("b, t")
    nn.export(model, jax.ShapeDtypeStruct((b, t, 3), jnp.float32), tmp_path / "b")
    assert nn.load_exported(tmp_path / "a")(floats(4, 3)).shape == (4, 2)
    assert nn.load_exported(tmp_path / "b")(floats(4, 5, 3)).shape == (4, 5, 2)


def test_fixed_shapes_are_fixed(tmp_path):
    nn.export(nn.Linear(3, 2), floats(4, 3), tmp_path / "m", batch=None)
    loaded = nn.load_exported(tmp_path / "m")
    assert loaded.methods["forward"].inputs == {"input": "float32[4, 3]"}
    with pytest.raises(ValueError, match=r"exported as float32\[4, 3\]"):
        loaded(floats(5, 3))


def test_methods_and_functions_have_inputs_of_their_own(tmp_path):
    model = Language()
    mask = np.ones((2, 5), np.float32)
    methods = {
        "forward": {"kwargs": {"mask": mask}},
        "encode": {},
        "nearest": {
            "function": lambda model, vectors, *, k: model.head(vectors).argsort(-1)[..., -2:] + k,
            "inputs": floats(4, 8),
            "kwargs": {"k": np.int32(1)},
        },
    }
    nn.export(model, IDS, tmp_path / "m", methods=methods)
    loaded = nn.load_exported(tmp_path / "m")
    assert list(loaded.methods) == ["forward", "encode", "nearest"]
    np.testing.assert_array_equal(loaded.encode(IDS), nn.jit(model.encode)(IDS))
    want = nn.jit(model)(IDS, mask)
    jax.tree.map(np.testing.assert_array_equal, loaded(IDS, mask=mask), want)
    jax.tree.map(np.testing.assert_array_equal, loaded(mask=mask, ids=IDS), want)
    vectors = floats(4, 8)
    near = np.asarray(model.head(vectors)).argsort(-1)[..., -2:]
    np.testing.assert_array_equal(loaded.nearest(vectors, k=3), near + 3)
    with pytest.raises(AttributeError, match="no attribute or method 'decode'"):
        loaded.decode


Pair = namedtuple("Pair", ["first", "second"])


def test_containers_go_in_and_come_out(tmp_path):
    class Containers(nn.Module):
        def forward(self, batch, *more, **named):
            x, (y, nothing) = batch["x"], batch["rest"]
            assert nothing is None
            total = sum((*more, *named.values()), x + y)
            return Pair([x, None], ({4: total, 3: 1.5}, total.sum()))

    x = floats(2, 3)
    batch = {"x": x, "rest": (x, None)}
    nn.export(Containers(), (batch, x, x), tmp_path / "m", kwargs={"z": x})
    loaded = nn.load_exported(tmp_path / "m")
    labels = ["batch['rest'][0]", "batch['x']", "more[0]", "more[1]", "z"]
    assert list(loaded.methods["forward"].inputs) == labels
    out = loaded(batch, x, x, z=x)
    assert type(out).__name__ == "Pair" and out._fields == Pair._fields
    assert out.first[1] is None and set(out.second[0]) == {3, 4}
    np.testing.assert_allclose(out.second[0][4], 5 * x, rtol=1e-6)
    assert out.second[0][3] == 1.5
    for wrong, text in [
        ({"x": x}, r"'batch' with 'x'.*\n.*a dict with 'rest', 'x'"),
        ({"x": x, "rest": (x,)}, r"\"batch\['rest'\]\" with 1 items"),
        ({"x": x, "rest": [x, None]}, "of type list|with list"),
        ({"x": x, "rest": (x, x)}, "None"),
        ({"x": 3, "rest": (x, None)}, r"batch\['x'\].* is of type int"),
    ]:
        with pytest.raises(TypeError, match=text):
            loaded(wrong, x, x, z=x)
    with pytest.raises(TypeError, match="was given no 'z'"):
        loaded(batch, x, x)
    with pytest.raises(TypeError, match="an input 'w'"):
        loaded(batch, x, x, z=x, w=x)
    with pytest.raises(TypeError, match=r"4 positional inputs\n  Why: it takes at most 3"):
        loaded(batch, x, x, x, z=x)


def test_inputs_that_do_not_fit_are_named(tmp_path):
    shapes = {"ids": "b, t", "mask": "b, t"}
    nn.export(Language(), (IDS, np.ones((2, 5), np.float32)), tmp_path / "m", shapes=shapes)
    loaded = nn.load_exported(tmp_path / "m")
    mask = np.ones((2, 5), np.float32)
    with pytest.raises(ValueError, match=r"'mask' has shape \(3, 5\)\n.*and here b = 2"):
        loaded(IDS, np.ones((3, 5), np.float32))
    with pytest.raises(ValueError, match=r"'ids' has shape \(0, 5\)(.|\n)*any size from 1"):
        loaded(IDS[:0], mask[:0])
    with pytest.raises(ValueError, match=r"'ids' has shape \(2,\)"):
        loaded(IDS[:, 0], mask)
    with pytest.raises(TypeError, match=r"dtype float32\n.*int32\[b, t\]\n.*astype\('int32'\)"):
        loaded(mask, mask)
    with pytest.raises(TypeError, match="the input 'ids' twice"):
        loaded(IDS, mask, ids=IDS)
    with pytest.raises(TypeError, match="is of type list"):
        loaded(IDS.tolist(), mask)
    # numpy's 64 bits are taken as by every function of JAX
    assert loaded(IDS.astype(np.int64), mask.astype(np.float64))["logits"].shape == (2, 5, 11)


# --------------------------------------------------------------------------------------------------
# Randomness and state


def test_training_mode_is_refused_or_asked_for(tmp_path):
    model = image_model().train()
    x = floats(4, 3, 8, 8)
    with pytest.raises(
        nn.MissingRngError, match=r"draws random.*\n.*\n.*eval\(\) before.*rng=True"
    ):
        nn.export(model, x, tmp_path / "m")
    with pytest.raises(nn.StateWriteError, match=r"'1.running_mean'.*\n.*\n.*eval.*mutable=True"):
        nn.export(model, x, tmp_path / "m", rng=True, batch=None)
    assert not (tmp_path / "m").exists()
    assert int(model[1].num_batches_tracked) == 0
    # Drawing asks whether 32 bits can count the numbers.
    nn.export(model, x, tmp_path / "m", rng=True, mutable=True, constraints=["b <= 1024"])
    loaded = nn.load_exported(tmp_path / "m")
    key = jax.random.key(3)
    out, state = loaded(x, rng=key)
    call = jax.jit(lambda m, x: nn.functional_call(m, {}, x, rng=key, mutable=True))
    want, new = call(model, x)
    np.testing.assert_allclose(out, want, rtol=1e-6)
    assert set(state) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"} == set(new)
    for name, value in state.items():
        np.testing.assert_allclose(value, new[name], rtol=1e-6)
    assert int(loaded.params["1.num_batches_tracked"]) == 0  # pure
    loaded.load_state_dict(state, strict=False)
    assert int(loaded(x, rng=0)[1]["1.num_batches_tracked"]) == 2
    np.testing.assert_array_equal(loaded(x, rng=key)[0], loaded(x, rng=jax.random.key_data(key))[0])
    with pytest.raises(TypeError, match="without rng"):
        loaded(x)
    with pytest.raises(TypeError, match=r"rng of uint32\[3\]"):
        loaded(x, rng=np.zeros(3, np.uint32))


def test_a_generator_of_the_module_s_own_follows_the_key(tmp_path):
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = nn.Generator(0)

        def forward(self, x):
            return x + jax.random.normal(self.generator.next_key(), x.shape)

    model, x = Noise(), jnp.zeros((4, 2))
    with pytest.raises(nn.MissingRngError):
        nn.export(model, x, tmp_path / "m")
    nn.export(model, x, tmp_path / "m", rng=True, batch=None)
    loaded, key = nn.load_exported(tmp_path / "m"), jax.random.key(1)
    np.testing.assert_allclose(
        loaded(x, rng=key), nn.functional_call(model, {}, x, rng=key), rtol=1e-6
    )


# --------------------------------------------------------------------------------------------------
# Weights and gradients


def test_weights_are_arrays_of_a_safetensors_file_with_ties_once(tmp_path):
    model = Language()
    nn.export(model, IDS, tmp_path / "m", metadata={"license": "MIT"})
    size = sum(v.nbytes for v in (model.embed.weight.value, model.norm.weight.value)) + 32 + 4
    program = jax.export.export(jax.jit(model), platforms=("cpu", "cuda"))(IDS)
    assert (tmp_path / "m").stat().st_size < size + 2 * len(program.mlir_module_serialized) + 4000
    held = safetensors.numpy.load_file(tmp_path / "m")
    np.testing.assert_array_equal(held["embed.weight"], model.embed.weight)
    assert "head.weight" not in held and "scale" in held
    loaded = nn.load_exported(tmp_path / "m")
    assert dict(loaded.ties) == {"head.weight": "embed.weight"}
    assert loaded.metadata == {"license": "MIT"}
    assert set(loaded.params) == {"embed.weight", "norm.weight", "norm.bias", "scale"}
    state = nn.load(tmp_path / "m", names=list(model.state_dict()))
    assert str(Language().load_state_dict(state)) == "<All keys matched successfully>"


def test_weights_are_no_constants_of_the_program(tmp_path):
    model = nn.Linear(300, 300)
    nn.export(model, floats(2, 300), tmp_path / "m")
    weights = 4 * (300 * 300 + 300)
    assert weights < (tmp_path / "m").stat().st_size < weights + 8000


def test_weights_are_replaced_by_name(tmp_path):
    model, other = Language(), Language()
    nn.export(model, IDS, tmp_path / "m")
    loaded = nn.load_exported(tmp_path / "m")
    before = dict(loaded.params)
    state = {**other.state_dict(), "scale": other.scale}
    del state["embed.weight"]  # it is there as head.weight
    assert loaded.load_state_dict(state) == []
    jax.tree.map(np.testing.assert_array_equal, loaded(IDS), nn.jit(other)(IDS))
    for bad, error, text in [
        ({"nom.weight": before["scale"]}, KeyError, "nom.weight"),
        ({"norm.weight": np.ones(9, np.float32)}, ValueError, r"'norm.weight' has shape \(9,\)"),
        ({"norm.weight": np.ones(8, np.float16)}, TypeError, "astype"),
        ({"norm.weight": before["norm.weight"]}, KeyError, "not given 'embed.weight', 'norm.bias'"),
        (
            {"embed.weight": before["embed.weight"], "head.weight": before["embed.weight"] + 1},
            ValueError,
            "different arrays",
        ),
    ]:
        with pytest.raises(error, match=text):
            loaded.load_state_dict(bad)
        jax.tree.map(np.testing.assert_array_equal, loaded(IDS), nn.jit(other)(IDS))
    assert loaded.load_state_dict({"scale": before["scale"]}, strict=False) == [
        "embed.weight",
        "norm.weight",
        "norm.bias",
    ]
    with pytest.raises(TypeError):
        loaded.params["scale"] = 3


def test_gradients_are_those_of_the_module(tmp_path):
    model = nn.Sequential(nn.Conv1d(3, 2, 1), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(8, 2))
    model, x = model.eval(), floats(2, 3, 4)
    nn.export(model, x, tmp_path / "m", vjp_order=1)
    loaded = nn.load_exported(tmp_path / "m")
    fn, params = loaded.functionalize()
    pure, own = nn.functionalize(model)
    assert set(params) == set(own)

    def gradient(f, params, x):
        return jax.grad(lambda p, x: (f(p, x) ** 2).sum(), argnums=(0, 1))(params, x)

    got, want = gradient(fn, params, jnp.asarray(x)), gradient(pure, own, jnp.asarray(x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)
    got = jax.jit(lambda p, x: gradient(fn, p, x))(params, jnp.asarray(x))  # also inside of jit
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)
    with pytest.raises(TypeError, match="derivative 2 of 'forward'"):
        jax.grad(lambda p: gradient(fn, p, jnp.asarray(x))[0]["3.bias"].sum())(params)
    with pytest.raises(KeyError, match="'7.bias'"):
        fn({"7.bias": params["3.bias"]}, x)


def test_second_derivatives_are_those_of_the_module(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 3), nn.Tanh())
    ids = np.array([0, 3, 3], np.int32)
    nn.export(model, ids, tmp_path / "m", vjp_order=2, platforms=("cpu",))
    fn, params = nn.load_exported(tmp_path / "m").functionalize()
    pure, _ = nn.functionalize(model)

    def product(f):  # Hessian times vector, as a gradient of a gradient
        inner = jax.grad(lambda p: (f(p, ids) ** 3).sum())
        return jax.grad(lambda p: sum(v.sum() for v in jax.tree.leaves(inner(p))))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        product(fn),
        product(pure),
    )


def test_a_file_without_derivatives_says_so(tmp_path):
    nn.export(nn.Linear(3, 2), floats(2, 3), tmp_path / "m")
    fn, params = nn.load_exported(tmp_path / "m").functionalize()
    with pytest.raises(TypeError, match=r"vjp_order=0\n  Instead: nn.export\(..., vjp_order=1\)"):
        jax.grad(lambda p: fn(p, floats(2, 3)).sum())(params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_kept(dtype, tmp_path):
    model = nn.Linear(3, 2).to(dtype=jnp.dtype(dtype))
    x = jnp.ones((2, 3), dtype)
    nn.export(model, x, tmp_path / "m")
    loaded = nn.load_exported(tmp_path / "m")
    assert loaded.params["weight"].dtype == dtype and loaded(x).dtype == dtype
    np.testing.assert_array_equal(loaded(x), nn.jit(model)(x))


def test_64_bits_are_kept_or_refused(tmp_path):
    with in_float64():
        model = nn.Linear(3, 2, dtype=jnp.float64)
        x = jnp.ones((2, 3))
        nn.export(model, x, tmp_path / "m")
        np.testing.assert_array_equal(nn.load_exported(tmp_path / "m")(x), nn.jit(model)(x))
    with pytest.raises(RuntimeError, match=r"'weight' has dtype float64(.|\n)*jax_enable_x64"):
        nn.load_exported(tmp_path / "m")


# --------------------------------------------------------------------------------------------------
# What cannot be exported


def test_a_model_that_needs_numbers_as_sizes_is_told_what_would_help(tmp_path):
    class Picky(nn.Module):
        def forward(self, x):
            return x[:, :4] if x.shape[1] >= 4 else x

    x = floats(2, 6)
    with pytest.raises(
        nn.ShapeError, match=r"x of \(b, t\)(.|\n)*'t' >= '4'(.|\n)*t >= 4"
    ) as error:
        nn.export(Picky(), x, tmp_path / "m", shapes={"x": "b, t"})
    assert "batch=None" in str(error.value)
    nn.export(Picky(), x, tmp_path / "m", shapes={"x": "b, t"}, constraints=["t >= 4"])
    loaded = nn.load_exported(tmp_path / "m")
    np.testing.assert_array_equal(loaded(floats(3, 9)), floats(3, 9)[:, :4])
    with pytest.raises(ValueError, match="t >= 4|4"):
        loaded(floats(3, 2))


def test_an_error_of_the_model_is_the_model_s(tmp_path):
    with pytest.raises(nn.ShapeError, match=r"\(2, 4\)"):
        nn.export(nn.Linear(3, 2), floats(2, 4), tmp_path / "m")


def test_what_is_no_array_is_refused_with_its_name(tmp_path):
    x = floats(2, 3)

    class Odd(nn.Module):
        def forward(self, x, scale=1.0):
            return {"a": x * scale, "b": "text"}

    class Held(nn.Module):
        def forward(self, x):
            return self

    with pytest.raises(TypeError, match=r"'scale' of 'forward' of type float(.|\n)*scale=2.0"):
        nn.export(Odd(), (x, 2.0), tmp_path / "m")
    with pytest.raises(nn.CheckpointError, match=r"output\['b'\] is of type str"):
        nn.export(Odd(), x, tmp_path / "m")
    with pytest.raises(nn.CheckpointError, match="returns a module"):
        nn.export(Held(), x, tmp_path / "m")
    with pytest.raises(TypeError, match="dtype key"):
        nn.export(Odd(), (x, jax.random.key(0)), tmp_path / "m")
    with pytest.raises(TypeError, match=r"3 inputs(.|\n)*too many positional arguments"):
        nn.export(Odd(), (x, x, x), tmp_path / "m")
    with pytest.raises(AttributeError, match="the method 'decode'"):
        nn.export(Odd(), x, tmp_path / "m", methods="decode")
    with pytest.raises(TypeError, match="the setting 'input' of method 'forward'"):
        nn.export(Odd(), x, tmp_path / "m", methods={"forward": {"input": x}})
    with pytest.raises(TypeError, match="shapes of 'y'(.|\n)*its inputs are 'x'"):
        nn.export(Odd(), x, tmp_path / "m", shapes={"y": "b"})
    with pytest.raises(nn.ShapeError, match="'b, c, d'"):
        nn.export(nn.Linear(3, 2), x, tmp_path / "m", shapes={"input": "b, c, d"})
    with pytest.raises(nn.CheckpointError, match="metadata are texts"):
        nn.export(nn.Linear(3, 2), x, tmp_path / "m", metadata={"epoch": 3})
    with nn.device("meta"), pytest.raises(nn.UninitializedParameterError, match="meta device"):
        nn.export(nn.Linear(3, 2), x, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_arrays_without_elements_and_modules_without_arrays_are_kept(tmp_path):
    model = nn.Linear(0, 2)
    nn.export(model, np.zeros((2, 0), np.float32), tmp_path / "m")
    np.testing.assert_array_equal(
        nn.load_exported(tmp_path / "m")(np.zeros((3, 0), np.float32)),
        nn.jit(model)(jnp.zeros((3, 0))),
    )
    nn.export(nn.ReLU(), floats(2, 3), tmp_path / "m")
    assert float(nn.load_exported(tmp_path / "m")(floats(2, 3)).min()) == 0


def test_a_parameter_may_be_returned(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(jnp.arange(3.0))

        def forward(self, x):
            return self.weight, x

    nn.export(Own(), floats(2, 3), tmp_path / "m")
    np.testing.assert_array_equal(nn.load_exported(tmp_path / "m")(floats(2, 3))[0], np.arange(3.0))


def test_the_file_before_stays_after_an_error(tmp_path):
    nn.export(nn.Linear(3, 2), floats(2, 3), tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(nn.MissingRngError):
        nn.export(nn.Dropout(), floats(2, 3), tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --------------------------------------------------------------------------------------------------
# The file alone, and damaged files


def test_it_runs_where_neither_the_class_nor_the_package_is(tmp_path):
    model = Language()
    (tmp_path / "alone").mkdir()
    nn.export(model, IDS, tmp_path / "alone" / "m", shapes={"ids": "b, t"}, vjp_order=1)
    shutil.copy(Path(exported.__file__), tmp_path / "alone" / "exported.py")
    want = nn.jit(model)(IDS)
    np.save(tmp_path / "alone" / "want.npy", want["logits"])
    code = (
        "import sys, numpy as np, jax\n"
        "sys.modules.update(statefulnn=None, safetensors=None)  # as if they were not installed\n"
        "from exported import load_exported\n"
        "loaded = load_exported('m')\n"
        "ids = np.arange(10, dtype=np.int32).reshape(2, 5)\n"
        "np.testing.assert_array_equal(loaded(ids)['logits'], np.load('want.npy'))\n"
        "fn, params = loaded.functionalize()\n"
        "grads = jax.grad(lambda p: fn(p, ids)['logits'].sum())(params)\n"
        "assert grads['embed.weight'].shape == (11, 8)\n"
        "print(loaded.describe())\n"
    )
    (tmp_path / "alone" / "run.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "run.py"],
        cwd=tmp_path / "alone",
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "forward(ids: int32[b, t]) -> {" in done.stdout and "for cpu, cuda" in done.stdout


@pytest.fixture
def small(tmp_path):
    nn.export(nn.Linear(3, 2), floats(2, 3), tmp_path / "m")
    return tmp_path / "m"


def test_damaged_and_other_files_are_refused(small, tmp_path):
    whole = small.read_bytes()
    for content, text in [
        (b"", "at byte 0: a header of 0 bytes in a file of 0"),
        (whole[:5], "at byte 0"),
        (whole[:100], "at byte 0: a header of"),
        (whole[:-1], "is cut off"),
        (whole + b"\0", "1 bytes more"),
        (b"\xff" * 8 + whole[8:], "at byte 0"),
        (b"PK\x03\x04" + whole, "at byte 0"),
    ]:
        small.write_bytes(content)
        with pytest.raises(nn.CheckpointError, match=text):
            nn.load_exported(small)
        with pytest.raises(exported.DamagedFileError):
            exported.load_exported(small)
    nn.save(nn.Linear(3, 2), tmp_path / "state")
    with pytest.raises(nn.CheckpointError, match="nn.load reads state dicts"):
        nn.load_exported(tmp_path / "state")
    with pytest.raises(FileNotFoundError):
        nn.load_exported(tmp_path / "none")


def check_mutations(small: Path, examples: int) -> None:
    whole = small.read_bytes()
    want = np.asarray(nn.load_exported(small)(floats(2, 3)))

    def check(content: bytes) -> None:
        small.write_bytes(content)
        try:
            loaded = nn.load_exported(small)
        except nn.CheckpointError:
            return
        # Only what does not matter was changed: blanks, the notes of nn.load.
        np.testing.assert_array_equal(loaded(floats(2, 3)), want)

    header = int.from_bytes(whole[:8], "little")
    for_mutations(whole, 8 + header, examples, check)


def test_a_file_changed_anywhere_is_refused_or_computes_the_same(small):
    check_mutations(small, 150)


@pytest.mark.long
def test_many_files_changed_anywhere_are_refused_or_compute_the_same(small):
    check_mutations(small, 5000)


def test_every_flipped_bit_of_program_and_weights_is_seen(small):
    whole = small.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for at in np.linspace(begin, len(whole) - 1, 60).astype(int):
        content = bytearray(whole)
        content[at] ^= 1 << (at % 8)
        small.write_bytes(bytes(content))
        with pytest.raises(nn.CheckpointError, match="with other bytes than written"):
            nn.load_exported(small)


def test_platforms_are_those_asked_for(tmp_path):
    nn.export(nn.Linear(3, 2), floats(2, 3), tmp_path / "m", platforms=("cuda",))
    loaded = nn.load_exported(tmp_path / "m")
    assert loaded.platforms == ("cuda",)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="cuda"):
            loaded(floats(2, 3))


def test_weights_go_where_they_are_sent(small):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = nn.load_exported(small, device=sharding)
    assert loaded.params["weight"].sharding == sharding
    with pytest.raises(ValueError, match="meta"):
        nn.load_exported(small, device="meta")
