"""Packed data sets."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedexp import cache
from fedexp.data import packed
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.errors import UserError
from tests.support.disk import assert_safe, recorded


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _splits(seed: int = 0) -> FederatedSplits:
    rng = np.random.default_rng(seed)

    def dataset(sizes: list[int]) -> FederatedDataset:
        return FederatedDataset(
            {
                "x": rng.integers(0, 256, (sum(sizes), 4, 3), np.uint8),
                "odd/name ü": rng.normal(size=sum(sizes)).astype(np.float32),
            },
            np.cumsum([0, *sizes]),
            np.array([f"client/{i}é" for i in range(len(sizes))]),
        )

    return FederatedSplits(dataset([3, 1, 2]), dataset([1, 1]))


def _assert_equal(found: FederatedSplits, expected: FederatedSplits) -> None:
    assert list(found.present()) == list(expected.present())
    for a, b in zip(found.present().values(), expected.present().values(), strict=True):
        assert list(a.features) == list(b.features)
        for name in b.features:
            assert a.features[name].dtype == b.features[name].dtype
            np.testing.assert_array_equal(a.features[name], b.features[name])
        np.testing.assert_array_equal(a.offsets, b.offsets)
        np.testing.assert_array_equal(a.client_ids, b.client_ids)


def test_reads_back_what_it_wrote_memory_mapped(tmp_path):
    packed.write(tmp_path / "a" / "b", _splits())
    found = packed.read(tmp_path / "a" / "b")
    _assert_equal(found, _splits())
    assert isinstance(found.train.features["x"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found.train.features["x"][0] = 0
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_write_refuses_an_existing_folder(tmp_path):
    packed.write(tmp_path / "a", _splits())
    with pytest.raises(UserError, match="exists already"):
        packed.write(tmp_path / "a", _splits())


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    save, calls = np.save, []

    def full_disk(path, array):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save(path, array)

    monkeypatch.setattr(packed.np, "save", full_disk)
    with pytest.raises(UserError, match=r"No space left.*FEDEXP_CACHE"):
        packed.write(tmp_path / "a", _splits())
    assert not list(tmp_path.iterdir())


def test_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = recorded(monkeypatch)
    packed.write(tmp_path / "a", _splits())
    assert_safe(done, tmp_path / "a")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "train" / "index.json").unlink(),
        lambda folder: (folder / "train" / "index.json").write_text("{"),
        lambda folder: (folder / "train" / "index.json").write_text("[]"),
        lambda folder: (folder / "test" / "index.json").write_text('{"format": 0}'),
        lambda folder: (folder / "train" / "feature_0.npy").unlink(),
        lambda folder: (folder / "test" / "offsets.npy").write_bytes(b""),
        lambda folder: (folder / "train" / "feature_0.npy").open("r+b").truncate(140),
        lambda folder: (folder / "train" / "feature_0.npy").open("ab").write(b"x"),
        lambda folder: (folder / "train" / "offsets.npy").write_bytes(
            b"\0" * (folder / "train" / "offsets.npy").stat().st_size
        ),
    ],
)
def test_a_damaged_folder_is_a_user_error(tmp_path, damage):
    packed.write(tmp_path / "a", _splits())
    damage(tmp_path / "a")
    for check in (packed.read, packed.verify):
        with pytest.raises(
            UserError, match=r"a is not a complete packed data set .*delete the folder"
        ):
            check(tmp_path / "a")


def test_a_file_of_the_wrong_size_is_named_when_opened(tmp_path):
    packed.write(tmp_path / "a", _splits())
    path = tmp_path / "a" / "train" / "feature_1.npy"
    size = path.stat().st_size
    path.open("r+b").truncate(size - 1)
    with pytest.raises(
        UserError, match=rf"train/feature_1.npy has {size - 1} bytes, expected {size}"
    ):
        packed.read(tmp_path / "a")


@pytest.mark.parametrize(
    "name",
    [
        "train/feature_0.npy",
        "test/feature_1.npy",
        "test/offsets.npy",
        "train/client_ids.npy",
        "train/checksums.npy",
        "test/index.json",
    ],
)
def test_a_file_of_the_right_size_of_which_a_bit_is_wrong_is_named(tmp_path, name):
    packed.write(tmp_path / "a", _splits())
    packed.verify(tmp_path / "a")
    packed.verify(tmp_path / "a" / "train")
    content = bytearray((tmp_path / "a" / name).read_bytes())
    content[-4] ^= 1
    (tmp_path / "a" / name).write_bytes(content)
    for check in (packed.read, packed.verify):
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            check(tmp_path / "a")


def test_a_renamed_feature_is_seen(tmp_path):
    packed.write(tmp_path / "a", _splits())
    index = tmp_path / "a" / "train" / "index.json"
    index.write_text(index.read_text().replace('"x"', '"y"'))
    with pytest.raises(UserError, match="index.json is damaged"):
        packed.read(tmp_path / "a")


def test_opening_compares_other_parts_of_a_large_file_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_SAMPLE", 2)
    size = 5 * packed._BLOCK
    dataset = FederatedDataset({"x": np.zeros(size, np.uint8)}, [0, size], ["c"])
    packed.write(tmp_path / "a", FederatedSplits(dataset, dataset))
    with (tmp_path / "a" / "test" / "feature_0.npy").open("r+b") as file:
        file.seek(3 * packed._BLOCK)
        file.write(b"x")
    packed.random.seed(0)
    found = []
    for _ in range(30):
        try:
            packed.read(tmp_path / "a")
            found.append(False)
        except UserError:
            found.append(True)
    assert 0 < sum(found) < 30  # 2 of 6 blocks at a time.
    with pytest.raises(UserError, match="test/feature_0.npy is damaged"):
        packed.verify(tmp_path / "a")


_KILLED = """
import os, signal, sys
from pathlib import Path
from fedexp import cache

with cache.scratch(Path(sys.argv[1]), "extract-") as folder:
    (folder / "large").write_text("much")
    print(folder.name, flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def test_what_killed_preparations_leave_goes_with_the_next(tmp_path):
    def start(how: str) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED, tmp_path, how],
            cwd=Path(packed.__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return process, process.stdout.readline().strip()

    (tmp_path / "extract-of-an-older-version").mkdir()
    (tmp_path / "else").mkdir()
    living, in_use = start("live")
    dead, left = start("kill")
    dead.wait(timeout=60)
    assert (tmp_path / left / "large").exists()
    with cache.scratch(tmp_path, "extract-") as folder:
        assert {path.name for path in tmp_path.iterdir()} == {"else", in_use, folder.name}
        assert (tmp_path / in_use / "large").exists()
    living.communicate("", timeout=60)
    assert {path.name for path in tmp_path.iterdir()} == {"else"}


def test_a_read_only_cache_serves_what_it_holds(cache_folder, monkeypatch):
    packed.load_or_build("name", {}, _splits)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # As root, modes do not bind.
    monkeypatch.setattr(cache, "lock", None)
    _assert_equal(packed.load_or_build("name", {}, _splits), _splits())
    with pytest.raises(UserError, match="is read-only.*FEDEXP_CACHE"):
        packed.load_or_build("another", {}, _splits)


def test_reads_a_single_data_set(tmp_path):
    packed.write(tmp_path / "a", _splits())
    _assert_equal(
        FederatedSplits(
            *(packed.read_dataset(tmp_path / "a" / split) for split in ("train", "test"))
        ),
        _splits(),
    )


def test_a_validation_partition_comes_back(tmp_path):
    splits = _splits()._replace(validation=_splits(1).test)
    packed.write(tmp_path / "a", splits)
    _assert_equal(packed.read(tmp_path / "a"), splits)
    packed.verify(tmp_path / "a")
    (tmp_path / "a" / "validation" / "offsets.npy").write_bytes(b"")
    for check in (packed.read, packed.verify):
        with pytest.raises(UserError, match=r"validation/offsets.npy has 0 bytes"):
            check(tmp_path / "a")


def test_load_or_build_builds_once_per_key(cache_folder):
    seeds = []

    def load(seed: int) -> FederatedSplits:
        def build():
            seeds.append(seed)
            return _splits(seed)

        return packed.load_or_build("name", {"seed": seed, "version": 1}, build)

    for seed in (0, 1, 0, 1):
        _assert_equal(load(seed), _splits(seed))
    assert seeds == [0, 1]
    assert len([p for p in (cache_folder / "packed").iterdir() if p.is_dir()]) == 2


def test_a_failed_build_is_tried_again(cache_folder):
    with pytest.raises(UserError, match="no luck"):
        packed.load_or_build("name", {}, lambda: (_ for _ in ()).throw(UserError("no luck")))
    _assert_equal(packed.load_or_build("name", {}, _splits), _splits())


def test_fingerprint_changes_with_the_file(tmp_path):
    (tmp_path / "a").write_text("one")
    before = packed.fingerprint(tmp_path / "a")
    assert packed.fingerprint(tmp_path / "a") == before
    (tmp_path / "a").write_text("three")
    assert packed.fingerprint(tmp_path / "a") != before


_PROGRAM = """
import sys, time
import numpy as np
from fedexp import cache
from fedexp.data import packed
from fedexp.data.dataset import FederatedDataset, FederatedSplits

def build():
    with open(sys.argv[1], "a") as file:
        file.write("built ")
    time.sleep(0.5)  # Long enough for the other process to ask too.
    dataset = FederatedDataset({"x": np.arange(3)}, [0, 3], ["c"])
    return FederatedSplits(dataset, dataset)

print(packed.load_or_build("name", {}, build).train.features["x"])
"""


def test_two_processes_build_once(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, tmp_path / "log"],
            cwd=Path(packed.__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.strip() == "[0 1 2]"
    assert (tmp_path / "log").read_text() == "built "
