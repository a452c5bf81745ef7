"""Files of torch.save, read without torch: the oracle is torch.load."""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import textwrap
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
import torch

import statefulnn as nn
from tests.io.mutations import for_mutations

FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def agree(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        assert tuple(theirs.shape) == ours.shape
        assert str(theirs.dtype) == f"torch.{ours.dtype}"
        wide = theirs.detach().to(torch.complex128 if theirs.is_complex() else torch.float64)
        np.testing.assert_array_equal(np.asarray(ours).astype(wide.numpy().dtype), wide.numpy())
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            agree(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            agree(a, b)
    elif isinstance(theirs, torch.dtype):
        assert str(theirs) == f"torch.{ours}"
    elif isinstance(theirs, torch.device):
        assert ours == str(theirs)
    else:
        assert type(ours) is type(theirs) and ours == theirs


def checkpoint():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 2, 5, 5)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


BASE = torch.arange(24.0).reshape(4, 6)
CONTENTS = {
    "a checkpoint": checkpoint(),
    "one tensor": torch.randn(3),
    "a parameter": torch.nn.Parameter(torch.randn(2, 2)),
    "a scalar and nothing": {"a": torch.tensor(1.5), "b": torch.ones(0, 3), "c": torch.ones(3, 0)},
    "views": {
        "t": BASE.t(),
        "part": BASE[1:3, ::2],
        "row": BASE[2],
        "wide": torch.ones(1).expand(5, 4),
    },
    "dtypes": {
        str(d): torch.tensor([0, 1, 2]).to(d)
        for d in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        + (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
        + (torch.complex128,)
    },
    "newer dtypes": {
        str(d): torch.tensor([0, 1, 2]).to(d)
        for d in (torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.float8_e5m2)
    },
    "plain data": {"a": [1, 2.5, None, True, "x", b"yz", (1, (2,)), {3, 4}], 5: {"deep": [[]]}},
    "things of torch": {
        "dtype": torch.float32,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
    },
    "ordered": collections.OrderedDict(b=torch.ones(1), a=1),
}


# torch itself cannot read newer dtypes from a legacy file.
@pytest.mark.parametrize(
    "name, new", [(n, new) for n in CONTENTS for new in (True, False) if new or n != "newer dtypes"]
)
def test_it_reads_what_torch_reads(name, new, tmp_path):
    torch.save(CONTENTS[name], tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    agree(nn.load(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=False))


@FORMATS
def test_a_nested_checkpoint_with_a_prefix_loads_into_a_model(new, tmp_path):
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = {f"module.{n}": v for n, v in theirs.state_dict().items()}
    torch.save({"model": state}, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    found = nn.load(tmp_path / "x.pth")["model"]
    nn.utils.consume_prefix_in_state_dict_if_present(found, "module.")
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert str(model.load_state_dict(found)) == "<All keys matched successfully>"
    for n, v in theirs.state_dict().items():
        np.testing.assert_array_equal(np.asarray(model.state_dict()[n]), v.numpy())


@FORMATS
def test_versions_and_ties_are_kept(new, tmp_path):
    theirs = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3)
    )
    theirs[2].weight = theirs[0].weight
    torch.save(theirs.state_dict(), tmp_path / "x", _use_new_zipfile_serialization=new)
    found = nn.load(tmp_path / "x")
    assert found._metadata == theirs.state_dict()._metadata
    assert found["2.weight"] is found["0.weight"]
    assert isinstance(found["0.weight"], jax.Array)


def test_names_and_places(tmp_path):
    torch.save({"a": torch.ones(2), "b": torch.zeros(3), "n": 4}, tmp_path / "x")
    assert list(nn.load(tmp_path / "x", names=["b"])) == ["b"]
    cpu = jax.devices("cpu")[0]
    found = nn.load(tmp_path / "x", device=lambda name, shape: cpu)
    assert found["a"].devices() == {cpu} and found["n"] == 4
    assert nn.load(tmp_path / "x", device="meta")["b"].shape == (3,)
    torch.save([torch.ones(2)], tmp_path / "y")
    with pytest.raises(TypeError, match="holds no dict by name, but list"):
        nn.load(tmp_path / "y", names=["a"])


def test_torch_is_not_needed(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x")
    code = """
        import sys
        sys.modules["torch"] = None
        import statefulnn as nn
        assert nn.load(sys.argv[1])["a"].tolist() == [1.0, 1.0]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "x")], check=True)


# --------------------------------------------------------------------------------------------------
# Files that are not what they should be


class Evil:
    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


class Other:
    pass


@FORMATS
@pytest.mark.parametrize(
    "thing, name",
    [
        (Evil(os.system, "touch hacked"), "posix.system"),
        (Evil(eval, "open('hacked', 'w')"), "builtins.eval|__builtin__.eval"),
        (Evil(exec, "open('hacked', 'w')"), "exec"),
        (Evil(getattr, "x", "join"), "getattr"),
        (np.float64(3.0), "numpy"),
        (Other(), "Other"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_is_not_data_is_refused_by_name(thing, name, new, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": thing}, "x", _use_new_zipfile_serialization=new)
    with pytest.raises(nn.CheckpointError, match=name) as info:
        nn.load("x", strict=True)
    assert "only tensors, numbers, texts" in str(info.value)
    assert nn.load("x")["a"].tolist() == [1.0, 1.0]  # what is beside it is read
    assert os.listdir() == ["x"]


def archive(path, pickled, **entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        z.writestr("a/data.pkl", pickled)
        for name, content in entries.items():
            z.writestr(f"a/{name.replace('__', '/')}", content)


TENSOR = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ%bK\x00(%bt(%bt\x89)tR."
)


def tensor(size, stride, offset=b""):
    number = lambda v: b"\x8a\x08" + struct.pack("<q", v)
    body = TENSOR % (offset, b"".join(map(number, size)), b"".join(map(number, stride)))
    return body


PICKLES = {
    "nothing": (b"", "pickle exhausted before seeing STOP"),
    "cut off": (b"\x80\x02}q", "a pickle of tensors"),
    "an unknown code": (b"\x80\x02\xff.", "a pickle of tensors"),
    "a huge memo": (b"\x80\x02]r\xff\xff\xff\x7f.", None),
    "a huge bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "a pickle of tensors"),
    "a huge text": (b"\x80\x02X\xff\xff\xff\x7f.", "a pickle of tensors"),
    "a huge frame": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".", "a pickle of tensors"),
    "a state for a function": (
        b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00aK\x01sb.",
        "a pickle of tensors",
    ),
    "a protocol to come": (b"\x80\x09.", "unsupported pickle protocol"),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", "holds itself"),
    "a tensor beyond its storage": (tensor([5], [1]), "one that fits into the 4 elements"),
    "a stride beyond its storage": (tensor([2, 2], [3, 1]), "one that fits into the 4 elements"),
    "a negative stride": (tensor([2], [-1]), "negative"),
    "a tensor of any size": (tensor([1 << 40], [0]), "would take more than 64 MiB of memory"),
    "size and stride that differ": (tensor([2, 2], [1]), "differ in length"),
    "no storage": (TENSOR.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009") % (b"", b"K\x04", b"K\x01"),
                   "no storage '9'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["a huge text", "a huge frame", "a huge bytearray", "a huge memo"])
def test_a_legacy_file_takes_no_memory_for_what_it_claims(name, tmp_path):
    content = io.BytesIO()
    torch.save([], content, _use_new_zipfile_serialization=False)
    head = content.getvalue().split(b"]q\x00.")[0].rpartition(b"\x80\x02")[0]
    (tmp_path / "x").write_bytes(head + PICKLES[name][0])
    tracemalloc.start()
    with pytest.raises(nn.CheckpointError, match="a pickle of tensors"):
        nn.load(tmp_path / "x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000


@pytest.mark.parametrize("name", PICKLES)
def test_a_damaged_pickle_is_refused(name, tmp_path):
    content, message = PICKLES[name]
    archive(tmp_path / "x", content, data__0=b"\0" * 16, byteorder=b"little")
    tracemalloc.start()
    if message is None:  # strange, and harmless
        assert nn.load(tmp_path / "x") == []
    else:
        with pytest.raises(nn.CheckpointError, match=re.escape(message)):
            nn.load(tmp_path / "x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000


def test_the_tensor_they_are_made_of_is_whole(tmp_path):
    archive(tmp_path / "x", tensor([2, 2], [2, 1]), data__0=np.arange(4, dtype="f4").tobytes())
    assert nn.load(tmp_path / "x").tolist() == [[0, 1], [2, 3]]


@FORMATS
def test_with_strict_storages_and_sets_of_tensors_are_refused(new, tmp_path):
    for content, message in (
        ({"a": torch.ones(2).untyped_storage()}, "a storage as data"),
        ({"a": {torch.ones(2)}}, "a key of type Tensor"),
        ({torch.ones(2): 1}, "a key of type Tensor"),
    ):
        torch.save(content, tmp_path / "x", _use_new_zipfile_serialization=new)
        with pytest.raises(nn.CheckpointError, match=message):
            nn.load(tmp_path / "x", strict=True)
    torch.save([torch.Size], tmp_path / "x", _use_new_zipfile_serialization=new)
    with pytest.raises(nn.CheckpointError, match="a function or class as data"):
        nn.load(tmp_path / "x", strict=True)


def test_depth_is_no_matter(tmp_path):
    archive(tmp_path / "x", b"\x80\x02" + b"(" * 50_000 + b"l" * 50_000 + b".")
    found = nn.load(tmp_path / "x")
    for _ in range(49_999):
        (found,) = found
    assert found == []


def test_archives_that_are_not_checkpoints(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as z:
        z.writestr("a/readme", "hello")
    with pytest.raises(nn.CheckpointError, match="0 entries data.pkl"):
        nn.load(tmp_path / "x")
    archive(tmp_path / "t", b"\x80\x02].", **{"constants.pkl": b""})
    with pytest.raises(nn.CheckpointError, match="TorchScript"):
        nn.load(tmp_path / "t")
    archive(tmp_path / "b", b"\x80\x02].", byteorder=b"big")
    with pytest.raises(nn.CheckpointError, match="big-endian"):
        nn.load(tmp_path / "b")
    with zipfile.ZipFile(tmp_path / "c", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/data.pkl", b"\x80\x02]." + b" " * 1000)
    with pytest.raises(nn.CheckpointError, match="compressed"):
        nn.load(tmp_path / "c")
    (tmp_path / "p").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(
        nn.CheckpointError, match=r"pickle that torch.save did not write(.|\n)*pickle.load"
    ):
        nn.load(tmp_path / "p")


# --------------------------------------------------------------------------------------------------
# The tar format of torch 0.1.9 and older, which torch reads and does not write


OLD_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.int64: torch.LongStorage,
}


def tar_of(state: dict[str, torch.Tensor], path, views=(), **changes):
    """Write a state dict as torch 0.1 did: storages, tensors that refer to them, and the pickle.

    A view is ``(key, key of the storage, offset, length)``; tensors of that storage then refer to the view.
    """
    storages, described = io.BytesIO(), io.BytesIO()
    roots = {t.untyped_storage().data_ptr(): t for t in state.values()}
    pickle.dump(len(roots), storages, protocol=2)
    for key, t in roots.items():
        pickle.dump((key, "cpu", OLD_STORAGES[t.dtype]), storages, protocol=2)
        data = bytes(t.untyped_storage().tolist())
        storages.write(struct.pack("<q", len(data) // t.element_size()) + data)
    pickle.dump(list(views), storages, protocol=2)
    pickle.dump(len(state), described, protocol=2)
    for number, t in enumerate(state.values(), 100):
        key = t.untyped_storage().data_ptr()
        key = next((v[0] for v in views if v[1] == key), key)
        pickle.dump((number, key, torch.FloatTensor), described, protocol=2)
        numbers = (*t.shape, *t.stride(), t.storage_offset())
        described.write(struct.pack(f"<ii{len(numbers)}q", t.dim(), 0, *numbers))
    main = io.BytesIO()
    stands = {name: Evil(dict) for name in state}
    numbers = {id(stand): str(i) for i, stand in enumerate(stands.values(), 100)}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return numbers.get(id(obj))

    Pickler(main, protocol=2).dump(collections.OrderedDict(stands))
    files = {"storages": storages, "tensors": described, "pickle": main}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            content = changes.get(name, content.getvalue())
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def old_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return {
        "weight": base,
        "part": base[1:3, ::2],
        "turned": base.t(),
        "double": torch.randn(3).double(),
        "count": torch.tensor([7]),
        "nothing": torch.randn(0, 2),
    }


# torch unpacks such a file without a filter, of which Python 3.12 and 3.13 warn.
torch_unpacks = pytest.mark.filterwarnings(
    "ignore:Python 3.14 will, by default, filter:DeprecationWarning"
)


@torch_unpacks
def test_the_tar_format_is_read_as_torch_reads_it(tmp_path):
    tar_of(old_state(), tmp_path / "x.pt")
    ours, theirs = nn.load(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=False)
    agree(ours, theirs)
    agree(ours, old_state())


@torch_unpacks
def test_a_view_of_a_storage_in_a_tar_file(tmp_path):
    whole = torch.arange(10.0)
    key = whole.untyped_storage().data_ptr()
    tar_of({"a": whole[:3]}, tmp_path / "x", views=[(5, key, 2, 4)])
    agree(nn.load(tmp_path / "x"), torch.load(tmp_path / "x", weights_only=False))
    assert nn.load(tmp_path / "x")["a"].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"views": [(5, 0, 0, 4)]}, "a part of a storage"),
        ({"views": [(5, 0, 0, -4)]}, "a part of a storage"),
        ({"storages": pickle.dumps(1, 2)}, "a pickle of tensors"),
        ({"storages": pickle.dumps("x", 2)}, "str in the pickle"),
        ({"storages": pickle.dumps(1, 2) + pickle.dumps((1, "cpu", 5), 2)}, "a storage of no type"),
        ({"tensors": pickle.dumps(1, 2) + pickle.dumps((0, 99, 0), 2)}, "one of a storage"),
        ({"pickle": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00trueR."}, "a call without a tuple"),
        ({"pickle": b"\x80\x02X\x01\x00\x00\x009Q."}, "KeyError"),
    ],
)
def test_a_damaged_tar_file_is_refused(changes, message, tmp_path):
    tar_of({"a": torch.ones(3)}, tmp_path / "x", **changes)
    with pytest.raises(nn.CheckpointError, match=re.escape(message)):
        nn.load(tmp_path / "x")


def test_an_archive_of_something_else_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("readme"))
    with pytest.raises(nn.CheckpointError, match="a tar archive that torch.save did not write"):
        nn.load(tmp_path / "x")
    content = bytearray((tmp_path / "x").read_bytes())
    content[0] ^= 1
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(nn.CheckpointError, match="a header that is damaged"):
        nn.load(tmp_path / "x")


def fuzz(path, format, examples):
    if format == "tar":
        tar_of(old_state(), path)
    else:
        state = checkpoint()["model"]
        torch.save(state, path, _use_new_zipfile_serialization=format == "zip")

    def check(content):
        path.write_bytes(content)
        try:
            nn.load(path)
        except nn.CheckpointError:
            pass

    for_mutations(path.read_bytes(), 1500, examples, check)


ALL_FORMATS = pytest.mark.parametrize("format", ["zip", "legacy", "tar"])


@ALL_FORMATS
def test_mutated_files_load_or_are_refused(format, tmp_path):
    fuzz(tmp_path / "x", format, 200)


@pytest.mark.long
@ALL_FORMATS
def test_ten_thousand_mutated_files_load_or_are_refused(format, tmp_path):
    fuzz(tmp_path / "x", format, 10_000)
