"""nn.save under kills, forks, links, full disks and other writers: whole files, and nothing beside them."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import statefulnn as nn
from statefulnn.io import _atomic, _locks, _sharded

ROOT = Path(__file__).resolve().parents[2]
LONG = 600  # seconds: machines may be ten times slower than this one


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=LONG)
    assert process.returncode == 0, err
    return out


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def live(folder: Path) -> list[str]:
    """The index of a folder and the files that it names."""
    index = json.loads((folder / _sharded.INDEX).read_text())
    return sorted({_sharded.INDEX, *index["weight_map"].values()})


# Every array of one save is full of one number.
WRITER = """
import sys, os, numpy as np, statefulnn as nn
path, size, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
size = None if size == 'single' else int(size)
print('ready', flush=True)
while True:
    nn.save({f'a{i}': np.full(20_000, number) for i in range(6)}, path, max_shard_size=size)
    number += 1
"""


def number_in(path: Path) -> int:
    found = {int(v) for a in nn.load(path).values() for v in np.unique(np.asarray(a))}
    assert len(found) == 1, f"a mix of {found}"
    return found.pop()


def check_kills(folder: Path, size: int | None, kills: int) -> None:
    path = folder if size else folder / "model.safetensors"
    seed = random.Random(kills)
    nn.save({f"a{i}": np.full(20_000, -1) for i in range(6)}, path, max_shard_size=size)
    left = 0
    for i in range(kills):
        process = start(WRITER, path, size or "single", 1000 * i)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(seed.uniform(0, 0.1))
        process.kill()
        process.communicate()
        number_in(path)
        expected = live(folder) if size else ["model.safetensors"]
        left += names(folder) != expected
    nn.save({f"a{i}": np.full(20_000, -2) for i in range(6)}, path, max_shard_size=size)
    assert number_in(path) == -2
    assert names(folder) == (live(folder) if size else ["model.safetensors"])
    if kills > 20:
        assert left, "no kill hit a save"


@pytest.mark.parametrize("size", [None, 200_000])
def test_a_save_leaves_the_live_files_alone_where_others_were_killed(size, tmp_path):
    check_kills(tmp_path, size, 2)


@pytest.mark.long
@pytest.mark.parametrize("size", [None, 200_000])
def test_a_save_leaves_the_live_files_alone_where_many_were_killed(size, tmp_path):
    check_kills(tmp_path, size, 40)


# Runs a save up to the n-th call of a function of os, and is killed there.
KILLED_AT = """
import sys, os, signal, numpy as np, statefulnn as nn
path, size, function, n = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
size = None if size == 'single' else int(size)
state = {f'a{i}': np.full(20_000, 7) for i in range(6)}
calls = 0
plain = getattr(os, function)
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **kwargs)
setattr(os, function, counted)
nn.save(state, path, max_shard_size=size)
setattr(os, function, plain)
print(calls)
"""


@pytest.mark.parametrize(
    ("size", "function", "at"),
    [
        (None, "open", 1),
        (None, "replace", 1),
        (200_000, "fsync", 2),
        (200_000, "replace", 7),  # of the index
        (200_000, "unlink", 4),
        *(
            pytest.param(*point, marks=pytest.mark.long)
            for point in [
                (None, "fsync", 1),
                (None, "unlink", 1),
                (200_000, "replace", 2),
                (200_000, "unlink", 1),
            ]
        ),
    ],
)
def test_a_save_killed_at_any_point_leaves_nothing_for_the_second_one_after_it(
    size, function, at, tmp_path
):
    path = tmp_path if size else tmp_path / "model.safetensors"
    before = {f"a{i}": np.full(20_000, 1) for i in range(6)}
    if size:  # of another library
        foreign = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for file in foreign:
            nn.save({f"a{i}": before[f"a{i}"] for i in range(6)}, tmp_path / file)
        places = {f"a{i}": foreign[i % 2] for i in range(6)}
        (tmp_path / _sharded.INDEX).write_text(json.dumps({"weight_map": places}))
    else:
        nn.save(before, path)
    process = start(KILLED_AT, path, size or "single", function, at)
    out, err = process.communicate(timeout=LONG)
    assert process.returncode == -signal.SIGKILL, (out, err)
    assert number_in(path) in (1, 7)
    nn.save({"b": np.full(20_000, 3)}, path, max_shard_size=size)
    assert number_in(path) == 3
    assert names(tmp_path) == (live(tmp_path) if size else ["model.safetensors"])


def check_writers(folder: Path, seconds: float) -> None:
    writers = [start(WRITER, folder, 200_000, 10**6 * i) for i in range(3)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    whole = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end or not whole:
        try:
            number_in(folder)
            whole += 1
        except (nn.CheckpointError, FileNotFoundError):
            pass  # the files of an index were replaced after it was read
        assert all(w.poll() is None for w in writers), [
            w.communicate() for w in writers if w.poll()
        ]
    for writer in writers:
        writer.kill()
        writer.communicate()
    nn.save({"a": np.full(3, -2)}, folder, max_shard_size=10)
    assert number_in(folder) == -2 and names(folder) == live(folder)


def test_writers_at_once_disturb_neither_each_other_nor_a_reader(tmp_path):
    check_writers(tmp_path, 1)


@pytest.mark.long
def test_writers_at_once_disturb_nobody_for_a_long_time(tmp_path):
    check_writers(tmp_path, 60)


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.long)])
def test_writers_that_end_leave_the_files_of_the_last_one(rounds, tmp_path):
    code = WRITER.replace("while True:", f"for _ in range({rounds}):")
    writers = [start(code, tmp_path, 200_000, 10**6 * i) for i in range(3)]
    for writer in writers:
        finished(writer)
    number_in(tmp_path)
    assert names(tmp_path) == live(tmp_path)


def test_files_of_a_save_that_goes_on_are_not_swept_and_those_of_others_neither(tmp_path):
    nn.save({"a": np.ones(3)}, tmp_path, max_shard_size=10)
    run, lock = _locks.marked(lambda run: tmp_path / f".model-{run}.saving")
    mine = [f"model-{run}-00001-of-00002.safetensors", f".model-{run}.tmp"]
    foreign = [
        "model-00001-of-00002.safetensors",
        "model-0123456-00001-of-00002.safetensors",
        "x.tmp",
    ]
    for file in mine + foreign:
        (tmp_path / file).touch()
    code = (
        "import sys, numpy as np, statefulnn as nn\n"
        "nn.save({'a': np.ones(3)}, sys.argv[1], max_shard_size=9)"
    )
    for save in (
        lambda: finished(start(code, tmp_path)),
        lambda: nn.save({"a": np.ones(3)}, tmp_path, max_shard_size=10),
    ):
        save()
        assert set(mine + foreign) < set(names(tmp_path))
    lock.close()  # and the marker stays, as that of a process that was killed
    nn.save({"a": np.ones(3)}, tmp_path, max_shard_size=10)
    assert names(tmp_path) == sorted([*live(tmp_path), *foreign])


def test_a_folder_whose_index_cannot_be_read_keeps_its_files(tmp_path):
    nn.save({"a": np.ones(3)}, tmp_path, max_shard_size=10)
    (shard,) = set(live(tmp_path)) - {_sharded.INDEX}
    for text in ('{"weight_map": ', "[]", '{"weight_map": {"a": 1}}'):
        (tmp_path / _sharded.INDEX).write_text(text)
        _sharded._sweep(tmp_path)
        assert names(tmp_path) == sorted([shard, _sharded.INDEX])
    nn.save({"a": np.ones(3)}, tmp_path, max_shard_size=10)
    assert names(tmp_path) == live(tmp_path)


def test_without_locks_files_are_saved_and_nothing_of_others_is_swept(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(_locks, "_lock", refuse)
    other = [".model-01234567.saving", "model-01234567-00001-of-00001.safetensors"]
    for file in other:
        (tmp_path / file).touch()
    for value in (1, 2):
        nn.save({"a": np.full(3, value)}, tmp_path, max_shard_size=10)
        assert number_in(tmp_path) == value
    assert names(tmp_path) == sorted([*other, *live(tmp_path)])


def test_what_is_no_file_is_left_alone_by_a_sweep(tmp_path):
    os.mkfifo(tmp_path / ".model-01234567.saving")
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / ".model-76543210.saving").symlink_to("elsewhere")
    nn.save({"a": np.ones(3)}, tmp_path, max_shard_size=10)
    nn.save({"a": np.ones(3)}, tmp_path, max_shard_size=10)
    assert number_in(tmp_path) == 1 and (tmp_path / "elsewhere").read_text() == "kept"


@pytest.mark.parametrize("size", [None, 10])
def test_others_may_read_a_new_file_if_they_may_read_new_files_of_the_user(size, tmp_path):
    path = tmp_path if size else tmp_path / "model.safetensors"
    before = os.umask(0o027)
    try:
        nn.save({"a": np.ones(3)}, path, max_shard_size=size)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in names(tmp_path)} == {0o640}
    file = tmp_path / (_sharded.INDEX if size else "model.safetensors")
    file.chmod(0o604)
    nn.save({"a": np.ones(3)}, path, max_shard_size=size)
    assert stat.S_IMODE(file.stat().st_mode) == 0o604


# --------------------------------------------------------------------------------------------------
# Links


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_saving_through_a_link_replaces_what_it_leads_to(there, relative, tmp_path):
    store, view = tmp_path / "store", tmp_path / "view"
    store.mkdir(), view.mkdir()
    target, link = store / "weights", view / "model.safetensors"
    link.symlink_to(Path("../store/weights") if relative else target)
    if there:
        nn.save({"a": np.zeros(2)}, target)
    nn.save({"a": np.ones(2)}, link)
    assert link.is_symlink() and not target.is_symlink()
    assert number_in(target) == number_in(link) == 1
    assert names(store) == ["weights"] and names(view) == ["model.safetensors"]


def test_links_to_links_and_to_folders_are_kept(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "folder").symlink_to("store")
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to("folder/weights")
    nn.save({"a": np.ones(2)}, tmp_path / "first")
    assert names(tmp_path / "store") == ["weights"] and number_in(tmp_path / "first") == 1
    assert names(tmp_path) == ["first", "folder", "second", "store"]
    nn.save({"a": np.ones(2)}, tmp_path / "folder", max_shard_size=10)
    assert (tmp_path / "folder").is_symlink() and number_in(tmp_path / "store") == 1


@pytest.mark.parametrize("size", [None, 10])
def test_a_cache_of_the_hub_stays_one(size, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    file = "model-00001-of-00001.safetensors" if size else "model.safetensors"
    nn.save({"a": np.zeros(2)}, blobs / "abc")
    (snapshot / file).symlink_to("../../blobs/abc")
    index = snapshot / _sharded.INDEX
    if size:
        (blobs / "def").write_text(json.dumps({"weight_map": {"a": file}}))
        index.symlink_to("../../blobs/def")
    path = snapshot if size else snapshot / file
    assert number_in(path) == 0
    nn.save({"a": np.ones(2)}, path, max_shard_size=size)
    assert number_in(path) == 1
    assert (index if size else snapshot / file).is_symlink()
    assert names(blobs) == (["abc", "def"] if size else ["abc"])
    assert names(snapshot) == (live(snapshot) if size else [file])


def test_links_in_a_circle_are_an_error_and_stay(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=f"{tmp_path}/a") as raised:
        nn.save({"a": np.ones(2)}, tmp_path / "a")
    assert raised.value.errno == errno.ELOOP and names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a").is_symlink()


# --------------------------------------------------------------------------------------------------
# Errors of the system


def check_error(save: Callable[[], None], kind: type[OSError], number: int, path: Path) -> str:
    with pytest.raises(kind) as raised:
        save()
    text = str(raised.value)
    assert raised.value.errno == number and raised.value.filename == str(path)
    assert str(path) in text and ".tmp" not in text and ".saving" not in text
    return text


def test_a_missing_folder_is_named(tmp_path):
    path = tmp_path / "no" / "way" / "model.safetensors"
    save = lambda: nn.save({"a": np.ones(2)}, path)
    text = check_error(save, FileNotFoundError, errno.ENOENT, path)
    assert f"No folder {str(tmp_path / 'no')!r}" in text and "makedirs" in text
    (tmp_path / "no" / "way").mkdir(parents=True)
    save()
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "x")
    text = check_error(
        lambda: nn.save({"a": np.ones(2)}, tmp_path / "link"),
        FileNotFoundError,
        errno.ENOENT,
        tmp_path / "link",
    )
    assert f"No folder {str(tmp_path / 'gone')!r}" in text


@pytest.mark.parametrize("size", [None, 10])
def test_a_path_below_a_file_is_an_error_that_names_it(size, tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(NotADirectoryError, match=str(tmp_path / "file")):
            nn.save({"a": np.ones(2)}, path, max_shard_size=size)
    assert (tmp_path / "file").read_text() == "kept"


def test_what_a_file_cannot_replace_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind, number in [
        ("pipe", OSError, errno.EINVAL),
        ("folder", IsADirectoryError, errno.EISDIR),
    ]:
        path = tmp_path / name
        check_error(lambda path=path: nn.save({"a": np.ones(2)}, path), kind, number, path)
    assert names(tmp_path) == ["folder", "pipe"] and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("size", [None, 10])
@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EACCES, PermissionError), (errno.EROFS, OSError), (errno.ENOSPC, OSError)],
)
def test_a_folder_that_cannot_be_written_is_an_error_with_the_path(
    number, kind, size, tmp_path, monkeypatch
):
    path = tmp_path if size else tmp_path / "model.safetensors"
    plain = os.open

    def refusing(name, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(name))
        return plain(name, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        check_error(
            lambda: nn.save({"a": np.ones(2)}, path, max_shard_size=size), kind, number, path
        )
    assert names(tmp_path) == []


FULL = """
import resource, signal, sys, numpy as np, statefulnn as nn
path, size = sys.argv[1], None if sys.argv[2] == 'single' else int(sys.argv[2])
nn.save({'a': np.ones(3)}, path, max_shard_size=size)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    nn.save({'b': np.zeros(9), 'a': np.zeros(30_000)}, path, max_shard_size=size)
except OSError as error:
    print(type(error).__name__, error.errno, error.filename, '|', error)
"""


@pytest.mark.parametrize("size", [None, 100])
def test_a_file_that_finds_no_room_leaves_the_old_ones_as_they_were(size, tmp_path):
    path = tmp_path if size else tmp_path / "model.safetensors"
    out = finished(start(FULL, path, size or "single"))
    assert out.startswith(f"OSError {errno.EFBIG} {path} | ") and ".tmp" not in out
    assert number_in(path) == 1
    assert names(tmp_path) == (live(tmp_path) if size else ["model.safetensors"])


def test_errors_of_the_library_that_writes_become_those_of_the_system(tmp_path):
    path = tmp_path / "x"
    for number, kind in [(28, OSError), (13, PermissionError), (5, OSError)]:
        with pytest.raises(kind) as raised, _atomic.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")
        assert raised.value.errno == number and raised.value.filename == str(path)
    with pytest.raises(RuntimeError, match="another"), _atomic.replacing(path):
        raise RuntimeError("another")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["m" * 255, "é" * 127, "a b [x]*.safetensors", ".hidden"])
def test_every_name_that_a_file_may_have_can_be_saved_to(name, tmp_path):
    for value in (1, 2):
        nn.save({"a": np.full(2, value)}, tmp_path / name)
        assert number_in(tmp_path / name) == value and names(tmp_path) == [name]


def test_an_error_between_shards_leaves_the_old_ones_as_they_were(tmp_path, monkeypatch):
    nn.save({"a": np.full(3, 1)}, tmp_path, max_shard_size=10)
    before = names(tmp_path)
    plain = os.replace
    for failing in range(1, 4):
        calls = []

        def replace(source, target, calls=calls, failing=failing):
            calls.append(target)
            if len(calls) == failing:
                raise KeyboardInterrupt
            plain(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", replace)
            nn.save({"a": np.ones(3), "b": np.ones(3)}, tmp_path, max_shard_size=10)
        assert names(tmp_path) == before and number_in(tmp_path) == 1


def test_an_error_after_the_index_was_replaced_keeps_the_new_files(tmp_path, monkeypatch):
    nn.save({"a": np.full(3, 1)}, tmp_path, max_shard_size=10)
    plain = os.replace

    def replace(source, target):
        plain(source, target)
        if Path(target).name == _sharded.INDEX:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        nn.save({"a": np.full(3, 2)}, tmp_path, max_shard_size=10)
    assert number_in(tmp_path) == 2 and names(tmp_path) == live(tmp_path)


# --------------------------------------------------------------------------------------------------
# Locks and forks

FORKED = """
import os, sys, time, warnings
warnings.simplefilter('ignore')  # JAX warns of every fork
from pathlib import Path
from statefulnn.io._locks import LockFile
lock = LockFile(Path(sys.argv[1]), os.O_CREAT)
assert lock.take()
ready, tell = os.pipe()
if os.fork() == 0:
    lock.close()  # of the parent, which keeps it
    os.write(tell, b'x')
    time.sleep(3600)
os.read(ready, 1)
other = LockFile(Path(sys.argv[1]))
assert other.take() is False
print('ready', flush=True)
if sys.stdin.readline().strip() == 'close':
    lock.close()
    print('closed', flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_lock_goes_with_its_owner_though_a_forked_child_lives_on(end, tmp_path):
    path = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", FORKED, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        lock = _locks.LockFile(path)
        assert lock.take() is False
        if end == "close":
            process.stdin.write("close\n")
            process.stdin.flush()
            assert process.stdout.readline() == "closed\n"
        else:
            process.kill()
            process.wait()
            assert not select.select([process.stdout], [], [], 0)[0]  # the child has it open still
        assert lock.take() is True
        lock.close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_two_locks_in_one_process_exclude_each_other(tmp_path):
    first, second = (_locks.LockFile(tmp_path / "lock", os.O_CREAT) for _ in range(2))
    assert first.take() is True and second.take() is False
    first.close()
    assert second.take() is True
    second.close()


def test_nothing_is_left_of_the_names_of_temporary_files_after_saves_in_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def save(i: int) -> None:
        nn.save({"a": np.full(1000, i)}, tmp_path / "model.safetensors")
        nn.save({"a": np.full(1000, i), "b": np.full(1000, i)}, tmp_path, max_shard_size=1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(40)))
    assert number_in(tmp_path / "model.safetensors") in range(40)
    assert names(tmp_path) == sorted([*live(tmp_path), "model.safetensors"])
    assert not [n for n in names(tmp_path) if re.search("tmp|saving", n)]
