"""Files of torch.save that hold more than tensors: what is built, and what stands in for the rest."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import enum
import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import statefulnn as nn

PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3, 4, 5])
FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


class Colour(enum.Enum):
    RED = 1


# Early releases of Python 3.11 pickle a member as one of its class, by its name; others by its value.
RED = (f"{__name__}.Colour", (1,))
if Colour.RED.__reduce_ex__(2)[0] is getattr:
    RED = (f"{__name__}.Colour.RED", None)


class Outer:
    class Inner:
        def __init__(self, a):
            self.a = a


@dataclasses.dataclass
class Config:
    lr: float
    inner: object = None


class Named(dict):
    pass


class Steps(list):
    pass


class Kept(torch.Tensor):
    pass


def saved(content, path, protocol=2, new=True):
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    return path


def stands_for(value, name):
    assert type(value) is nn.io.Placeholder and value.name == name
    assert len(repr(value)) < 500 and name in repr(value)
    return value


@FORMATS
@PROTOCOLS
def test_weights_load_beside_foreign_objects(protocol, new, tmp_path):
    weights = {"a": torch.randn(2, 3), "b": torch.arange(4)}
    content = {"state_dict": weights, "hyper_parameters": argparse.Namespace(lr=0.1, layers=[2, 3])}
    content |= {"score": np.float64(0.5), "colour": Colour.RED, "config": Config(0.2)}
    found = nn.load(saved(content, tmp_path / "x", protocol, new))
    for name, tensor in weights.items():
        np.testing.assert_array_equal(np.asarray(found["state_dict"][name]), tensor.numpy())
    space = stands_for(found["hyper_parameters"], "argparse.Namespace")
    assert space.state == {"lr": 0.1, "layers": [2, 3]}
    assert found["score"] == 0.5 and type(found["score"]) is np.float64
    assert stands_for(found["colour"], RED[0]).args == RED[1]
    assert stands_for(found["config"], f"{__name__}.Config").state == {"lr": 0.2, "inner": None}


@PROTOCOLS
@pytest.mark.parametrize(
    "value",
    [
        np.float32(1.5),
        np.int64(-3),
        np.bool_(True),
        np.complex128(1 - 2j),
        np.str_("hé"),
        np.bytes_(b"ab"),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(3.5),
        np.empty((0, 3), np.float16),
        np.array(["a", "bcd"]),
        1 + 2j,
        collections.Counter("abca"),
        collections.defaultdict(list, a=[1]),
        frozenset([1, "a", None]),
        {2.5, b"x"},
        bytearray(b"xyz"),
        b"",
        np.dtype("<f4"),
        {np.int64(3): "a", (1, "b"): "c", ((1, 2), "x"): 0, 1j: 1, 1 << 100: 2, np.str_("n"): 3},
        {frozenset([1]): 2, pathlib.PurePosixPath("/a/b"): 3},
        {(i, j): i * j for i in range(30) for j in range(30)},
    ],
    ids=lambda v: type(v).__name__,
)
def test_values_of_python_and_numpy_come_back_as_they_were(value, protocol, tmp_path):
    found = nn.load(saved({"value": value, "w": torch.ones(1)}, tmp_path / "x", protocol))["value"]
    assert type(found) is type(value)
    if isinstance(value, (np.ndarray, np.generic)):
        assert found.dtype == value.dtype and found.shape == value.shape
        np.testing.assert_array_equal(found, value)
    else:
        assert found == value


@FORMATS
@PROTOCOLS
def test_a_class_in_a_class_has_its_full_name_in_each_protocol(protocol, new, tmp_path):
    found = nn.load(saved([Outer.Inner, Outer.Inner(2)], tmp_path / "x", protocol, new))
    assert stands_for(found[0], f"{__name__}.Outer.Inner").args is None
    assert stands_for(found[1], f"{__name__}.Outer.Inner").state == {"a": 2}


def test_what_asks_for_a_member_of_something_else_is_no_name(tmp_path):
    class Odd:
        def __init__(self, *of):
            self.of = of

        def __reduce__(self):
            return getattr, self.of

    for of in [(Colour, "name", 3), ([1], "append"), (Config(1.0), "lr")]:
        torch.save(Odd(*of), tmp_path / "x", pickle_protocol=2)
        assert stands_for(nn.load(tmp_path / "x"), "__builtin__.getattr").args[1] == of[1]


def test_keys_that_are_no_scalars_are_stood_in_for(tmp_path):
    deep = ((((1,),),),)
    content = {
        Colour.RED: 1,
        deep: 2,
        torch.Tensor: 3,
        tuple(range(40)): torch.ones(2),
        torch.ones(1): 4,
    }
    found = nn.load(saved(content, tmp_path / "x"))
    keys = list(found)
    assert (keys[0].name, keys[0].args) == RED
    assert keys[1].args == (deep,) and keys[2].name == "torch.Tensor"
    assert keys[3].args == (tuple(range(40)),) and found[keys[3]].tolist() == [1.0, 1.0]
    assert keys[4].args[0].tolist() == [1.0]
    with pytest.raises(nn.CheckpointError):
        nn.load(tmp_path / "x", strict=True)


@PROTOCOLS
def test_paths_are_kept_and_touch_no_disk(protocol, tmp_path):
    path = saved([pathlib.Path("/data/x y"), pathlib.PurePosixPath("a")], tmp_path / "x", protocol)
    assert nn.load(path) == [pathlib.PurePosixPath("/data/x y"), pathlib.PurePosixPath("a")]
    assert not hasattr(nn.load(path)[0], "exists")


def test_a_missing_key_of_a_defaultdict_is_missing(tmp_path):
    found = nn.load(saved(collections.defaultdict(list, a=[torch.ones(2)]), tmp_path / "x"))
    assert found["a"][0].tolist() == [1.0, 1.0]
    with pytest.raises(KeyError):
        found["b"]


@FORMATS
def test_tensors_with_attributes_load_and_those_of_a_foreign_class_are_in_a_placeholder(
    new, tmp_path
):
    tagged = torch.randn(3)
    tagged.tag = "hello"
    parameter = torch.nn.Parameter(torch.randn(2))
    parameter.tag = 3
    kept = torch.ones(2).as_subclass(Kept)
    kept.tag = "mine"
    content = {"tagged": tagged, "parameter": parameter, "kept": kept}
    found = nn.load(saved(content, tmp_path / "x", new=new))
    np.testing.assert_array_equal(np.asarray(found["tagged"]), tagged.numpy())
    np.testing.assert_array_equal(np.asarray(found["parameter"]), parameter.detach().numpy())
    stand = stands_for(found["kept"], f"{__name__}.Kept")
    assert stand.args[0].tolist() == [1.0, 1.0] and stand.state == {"tag": "mine"}


def test_what_a_placeholder_holds_is_made_of_arrays_too(tmp_path):
    held = Config(0.1, inner=[torch.ones(2), {"deep": (torch.zeros(3), torch.float32)}])
    named, steps = Named(a=torch.ones(4)), Steps([torch.ones(1), 2])
    found = nn.load(saved([held, named, steps], tmp_path / "x"))
    inner = found[0].state["inner"]
    assert inner[0].tolist() == [1.0, 1.0]
    assert inner[1]["deep"][0].shape == (3,) and inner[1]["deep"][1] == np.dtype("float32")
    assert found[1].content["a"].shape == (4,)
    assert found[2].content[0].shape == (1,) and found[2].content[1] == 2


def test_objects_that_refer_to_each_other_load(tmp_path):
    first, second = Config(1.0), Config(2.0)
    first.inner, second.inner = second, [first, torch.ones(2)]
    found = nn.load(saved({"first": first, "w": torch.zeros(2)}, tmp_path / "x"))
    other = found["first"].state["inner"]
    assert other.state["inner"][0] is found["first"]
    assert other.state["inner"][1].tolist() == [1.0, 1.0]
    assert len(repr(found["first"])) < 500
    copied = copy.deepcopy(found["first"])
    assert copied.state["inner"].state["inner"][0] is copied
    assert pickle.loads(pickle.dumps(found["first"])).state["lr"] == 1.0


def test_what_is_not_strided_memory_stands_beside_what_is(tmp_path):
    content = {"sparse": torch.eye(2).to_sparse(), "meta": torch.empty(3, device="meta")}
    content |= {"objects": np.array([1, "a"], object), "fields": np.zeros(2, [("a", "i4")])}
    content |= {"model": torch.nn.Linear(2, 2), "w": torch.ones(2)}
    content |= {"optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])}
    found = nn.load(saved(content, tmp_path / "x"))
    assert found["w"].tolist() == [1.0, 1.0]
    stands_for(found["sparse"], "torch._utils._rebuild_sparse_tensor")
    assert found["model"].state["_parameters"]["weight"].shape == (2, 2)
    assert found["optimizer"].state["defaults"]["lr"] == 1e-3
    for name in ("meta", "objects", "fields"):
        assert isinstance(found[name], nn.io.Placeholder)


def test_a_placeholder_says_what_it_is_where_it_is_used(tmp_path):
    content = {"w": argparse.Namespace(lr=0.1)}
    found = nn.load(saved(content, tmp_path / "x"))
    for use in (np.asarray, jnp.asarray, lambda v: jnp.zeros(2) + v, lambda v: v()):
        with pytest.raises(
            nn.CheckpointError, match=r"Placeholder\('argparse.Namespace'(.|\n)*Why:"
        ):
            use(found["w"])
    with pytest.raises(AttributeError, match=r"\.state\['lr'\]"):
        found["w"].lr
    with pytest.raises(nn.StateDictError, match="Placeholder"):
        nn.Linear(1, 2).load_state_dict({"weight": found["w"], "bias": jnp.zeros(2)})
    with pytest.raises(nn.CheckpointError, match="'w'"):
        nn.save(found, tmp_path / "y")
    assert found["w"] != nn.io.Placeholder("argparse.Namespace", ()) and {found["w"]: 1}


class Evil:
    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


@FORMATS
def test_nothing_that_a_file_names_is_imported(new, tmp_path):
    (tmp_path / "poison.py").write_text("raise SystemExit('imported')")
    pickled = b"\x80\x02cpoison\nThing\n)\x81."
    content = {"w": torch.ones(1), "evil": Evil(exec, "raise SystemExit")}
    found = nn.load(saved(content, tmp_path / "x", new=new))
    assert found["w"].tolist() == [1.0] and found["evil"].args == ("raise SystemExit",)
    torch.save({"w": 1}, tmp_path / "y")
    from tests.io.test_torch_files import archive

    archive(tmp_path / "z", pickled)
    sys.path.insert(0, str(tmp_path))
    try:
        stands_for(nn.load(tmp_path / "z"), "poison.Thing")
        assert "poison" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))


@FORMATS
def test_conjugated_and_negated_views_are_what_torch_says(new, tmp_path):
    whole = torch.randn(3, 4, dtype=torch.complex64)
    content = {
        "conj": whole.conj(),
        "turned": whole.t().conj(),
        "negated": torch.randn(2, dtype=torch.complex64).conj().imag,
        "both": torch._neg_view(whole.conj()),
        "plain": whole,
    }
    path = saved(content, tmp_path / "x", new=new)
    for mmap in (False, True):
        found = nn.load(path, mmap=mmap)
        for name, tensor in content.items():
            expected = tensor.resolve_conj().resolve_neg().numpy()
            np.testing.assert_array_equal(np.asarray(found[name]), expected, err_msg=name)
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spread = nn.load(path, device=placed)["conj"]
    np.testing.assert_array_equal(np.asarray(spread), whole.conj().resolve_conj().numpy())


@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"])
def test_the_rarer_floats_of_8_bits_are_read_and_written(dtype, tmp_path):
    tensor = torch.tensor([1, 2, 4, 0.5]).to(getattr(torch, dtype))
    found = nn.load(saved({"w": tensor}, tmp_path / "x"))["w"]
    assert str(found.dtype) == dtype
    np.testing.assert_array_equal(np.asarray(found).astype("f4"), tensor.float().numpy())
    nn.save({"w": found}, tmp_path / "y")
    import safetensors.torch

    theirs = safetensors.torch.load_file(tmp_path / "y")["w"]
    assert theirs.dtype == tensor.dtype and torch.equal(theirs.float(), tensor.float())
    safetensors.torch.save_file({"w": tensor, "v": torch.ones(3)}, tmp_path / "z")
    np.testing.assert_array_equal(np.asarray(nn.load(tmp_path / "z")["w"]), np.asarray(found))


def test_names_in_nested_contents_reach_the_device_function(tmp_path):
    path = saved({"model": {"a": torch.ones(2)}, "list": [torch.zeros(1)]}, tmp_path / "x")
    asked = {}
    found = nn.load(path, device=lambda name, shape: asked.setdefault(name, shape) and None)
    assert asked == {"model.a": (2,), "list.0": (1,)}
    assert found["model"]["a"].shape == (2,)
