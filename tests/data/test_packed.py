"""Packed data sets."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedexp.data import packed
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.errors import UserError
from tests.support.disk import assert_safe, recorded


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
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


def test_write_refuses_an_existing_folder_and_objects(tmp_path):
    packed.write(tmp_path / "a", _splits())
    with pytest.raises(UserError, match="exists already"):
        packed.write(tmp_path / "a", _splits())
    text = FederatedDataset({"s": np.array(["a", b"b"], object)}, [0, 2], ["c"])
    with pytest.raises(UserError, match="'s' of 'train' holds Python objects"):
        packed.write(tmp_path / "b", FederatedSplits(text, text))
    assert not (tmp_path / "b").exists()


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
    ["train/feature_0.npy", "test/feature_1.npy", "test/offsets.npy", "train/client_ids.npy"],
)
def test_verify_names_a_file_of_which_a_bit_is_wrong(tmp_path, name):
    packed.write(tmp_path / "a", _splits())
    packed.verify(tmp_path / "a")
    packed.verify(tmp_path / "a" / "train")
    content = bytearray((tmp_path / "a" / name).read_bytes())
    content[-4] ^= 1
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged: its SHA-256 is"):
        packed.verify(tmp_path / "a")


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


def test_load_or_build_builds_once_per_key(cache):
    seeds = []

    def load(seed: int) -> FederatedSplits:
        def build():
            seeds.append(seed)
            return _splits(seed)

        return packed.load_or_build("name", {"seed": seed, "version": 1}, build)

    for seed in (0, 1, 0, 1):
        _assert_equal(load(seed), _splits(seed))
    assert seeds == [0, 1]
    assert len([p for p in (cache / "packed").iterdir() if p.is_dir()]) == 2


def test_a_failed_build_is_tried_again(cache):
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
