"""The reader of TFF's HDF5 layout, against files written by the test."""

import hashlib
import os
import re
import signal
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from fedexp.data import download, tff_hdf5
from fedexp.data.features import Feature
from fedexp.errors import UserError

FEATURES = {
    "x": Feature("pixels", (2, 3), np.float32, lambda rows: rows * 2),
    "y": Feature("label", (), np.integer, lambda rows: rows.astype(np.int32)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))


def _clients(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Not in sorted order."""
    rng = np.random.default_rng(seed)
    return {
        client_id: {
            "pixels": rng.normal(size=(size, 2, 3)).astype(np.float32),
            "label": rng.integers(0, 5, size),
            "unused": np.zeros(size),
        }
        for client_id, size in {"b": 4, "a10": 1, "c": 2, "a9": 3}.items()
    }


def _write(path: Path, clients: dict[str, dict[str, object]], root: str = "examples") -> Path:
    with h5py.File(path, "w") as file:
        file.create_group(root, track_order=True)
        for client_id, features in clients.items():
            group = file[root].create_group(client_id)
            for name, array in features.items():
                group.create_dataset(name, data=array)
    return path


def _with(client_id: str, **features: object) -> dict[str, dict[str, object]]:
    """The clients with one client's features replaced, or removed where None."""
    clients = _clients()
    changed = clients[client_id] | features
    clients[client_id] = {name: value for name, value in changed.items() if value is not None}
    return clients


def test_reads_clients_in_sorted_order(tmp_path):
    clients = _clients()
    dataset = tff_hdf5.read(_write(tmp_path / "a.h5", clients), FEATURES)
    assert dataset.client_ids.tolist() == ["a10", "a9", "b", "c"]
    assert dataset.client_sizes.tolist() == [1, 3, 4, 2]
    assert set(dataset.features) == {"x", "y"}
    for client_id, examples in dataset.clients():
        np.testing.assert_array_equal(examples["x"], clients[client_id]["pixels"] * 2)
        np.testing.assert_array_equal(examples["y"], clients[client_id]["label"])
        assert examples["x"].dtype == np.float32
        assert examples["y"].dtype == np.int32


def test_a_conversion_may_change_the_shape_of_a_row(tmp_path):
    feature = Feature("pixels", (2, 3), np.floating, lambda rows: rows.reshape(len(rows), 6)[:, :5])
    dataset = tff_hdf5.read(_write(tmp_path / "a.h5", _clients()), {"flat": feature})
    np.testing.assert_array_equal(
        dataset.client(2)["flat"], _clients()["b"]["pixels"].reshape(4, 6)[:, :5]
    )


def test_reads_strings_of_variable_length(tmp_path):
    clients = {"b": {"text": [b"to be", "ö".encode()]}, "a": {"text": [b"or not"]}}
    path = _write(tmp_path / "a.h5", {})
    with h5py.File(path, "a") as file:
        for client_id, features in clients.items():
            file["examples"].create_group(client_id).create_dataset(
                "text", data=features["text"], dtype=h5py.string_dtype()
            )
    dataset = tff_hdf5.read(path, {"s": Feature("text", (), object)})
    assert dataset.features["s"].tolist() == [b"or not", b"to be", "ö".encode()]


def test_clients_without_examples(tmp_path):
    nothing = {"pixels": np.zeros((0, 2, 3), np.float32), "label": np.zeros(0, np.int64)}
    path = _write(tmp_path / "a.h5", _with("a9", **nothing))
    with pytest.raises(
        UserError, match=r"a.h5: client 'a9' has no examples \(1 of 4.*drop_empty=True"
    ):
        tff_hdf5.read(path, FEATURES)
    assert tff_hdf5.read(path, FEATURES, drop_empty=True).client_ids.tolist() == ["a10", "b", "c"]
    for clients in ({}, {"a": nothing}):
        path = _write(tmp_path / "b.h5", clients)
        with pytest.raises(UserError, match=r"b.h5 has no client with examples"):
            tff_hdf5.read(path, FEATURES, drop_empty=True)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"label": None}, r"client 'c' has no feature 'label', only \['pixels', 'unused'\]"),
        (
            {"pixels": np.zeros((2, 3, 2), np.float32)},
            r"client 'c', feature 'pixels': the shape is \(2, 3, 2\), expected \(examples, 2, 3\)",
        ),
        ({"label": np.int64(3)}, r"client 'c', feature 'label': the shape is \(\), expected"),
        (
            {"pixels": np.zeros((2, 2, 3))},
            r"client 'c', feature 'pixels': the dtype is float64, expected float32",
        ),
        ({"label": np.zeros(2)}, r"'label': the dtype is float64, expected integer"),
        ({"label": np.zeros(3, int)}, r"'c' has features of different lengths: .*'label': 3"),
    ],
)
def test_a_wrong_client_is_named(tmp_path, features, message):
    path = _write(tmp_path / "a.h5", _with("c", **features))
    with pytest.raises(UserError, match=r"a\.h5: " + ".*" + message):
        tff_hdf5.read(path, FEATURES)


def test_a_feature_that_is_a_group_is_no_feature(tmp_path):
    path = _write(tmp_path / "a.h5", _with("c", label=None))
    with h5py.File(path, "a") as file:
        file["examples/c"].create_group("label")
    with pytest.raises(UserError, match="client 'c' has no feature 'label'"):
        tff_hdf5.read(path, FEATURES)


def test_refused_values_name_the_client(tmp_path):
    def refuse(rows):
        if len(rows) == 3:
            raise UserError("too hot")
        return rows

    feature = Feature("label", (), np.integer, refuse)
    with pytest.raises(UserError, match=r"a\.h5: client 'a9', feature 'label': too hot"):
        tff_hdf5.read(_write(tmp_path / "a.h5", _clients()), {"y": feature})


@pytest.mark.parametrize("error", [KeyError("no such word"), RuntimeError("x"), OSError("y")])
def test_what_a_users_function_raises_is_no_damage(tmp_path, error):
    def broken(values):
        if len(values if isinstance(values, np.ndarray) else values["x"]) == 3:
            raise error
        return values

    path = _write(tmp_path / "a.h5", _clients())
    features = {"x": Feature("label", (), np.integer, broken)}
    with pytest.raises(type(error)) as caught:
        tff_hdf5.read(path, features)
    assert caught.value is error
    assert error.__notes__ == [f"reading {path}: client 'a9', feature 'label'"]
    del error.__notes__
    for source in (
        tff_hdf5.Source(path, features, dict),
        tff_hdf5.Source(path, {"x": Feature("label", (), np.integer)}, broken),
    ):
        with pytest.raises(type(error)) as caught:
            list(source.read(["a10", "a9"]))
        assert caught.value is error
        assert error.__notes__.pop().startswith(f"reading {path}: client 'a9'")


def test_what_encode_refuses_names_the_client(tmp_path):
    def refuse(examples):
        raise UserError("too hot")

    source = tff_hdf5.Source(_write(tmp_path / "a.h5", _clients()), FEATURES, refuse)
    with pytest.raises(UserError, match=r"a\.h5: client 'a9': too hot"):
        list(source.read(["a9"]))


@pytest.mark.parametrize("damage", ["clients", "rows"])
def test_damage_that_a_source_meets(tmp_path, damage):
    path = _write(tmp_path / "a.h5", _clients())
    source = tff_hdf5.Source(path, FEATURES, dict)
    with pytest.raises(UserError, match=r"a\.h5 is damaged or not an HDF5 file"):
        list(source.read(["gone"]))
    path.write_bytes(path.read_bytes().replace(b"SNOD", b"XXXX").replace(b"TREE", b"XXXX"))
    with pytest.raises(UserError, match=r"a\.h5 is damaged or not an HDF5 file"):
        source.client_ids() if damage == "clients" else list(source.read(["a9"]))


@pytest.mark.parametrize(
    "convert",
    [lambda rows: rows.astype(f"i{8 if len(rows) == 3 else 4}"), lambda rows: rows[:, None, :1]],
)
def test_rows_of_another_kind_name_the_client(tmp_path, convert):
    clients = _with("a9", label=np.zeros((3, 2), int))
    for client_id, size in {"a10": 1, "b": 4, "c": 2}.items():
        clients[client_id]["label"] = np.zeros((size, 2), int)
    seen = []

    def made(rows):
        seen.append(rows)
        return rows.astype(np.int32) if len(seen) == 1 else convert(rows)

    path = _write(tmp_path / "a.h5", clients)
    with pytest.raises(UserError, match=r"client 'a9', feature 'label': `convert` made int64 of"):
        tff_hdf5.read(path, {"y": Feature("label", (2,), np.integer, made)})


def test_another_layout(tmp_path):
    path = _write(tmp_path / "a.h5", _clients(), root="data")
    with pytest.raises(UserError, match=r"a.h5 has no group 'examples' at its root but \['data'\]"):
        tff_hdf5.read(path, FEATURES)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["examples/label"] = np.zeros(3)
    with pytest.raises(UserError, match="client 'label' is an array, not a group"):
        tff_hdf5.read(tmp_path / "b.h5", FEATURES)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["examples"] = np.zeros(3)
    with pytest.raises(UserError, match="no group 'examples'"):
        tff_hdf5.read(tmp_path / "c.h5", FEATURES)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no file .*gone\.h5"):
        tff_hdf5.read(tmp_path / "gone.h5", FEATURES)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"<html>log in first</html>",
        lambda content: b"",
        lambda content: content.replace(b"SNOD", b"XXXX").replace(b"TREE", b"XXXX"),
    ],
    ids=["truncated", "html", "empty", "corrupt"],
)
def test_a_damaged_file(tmp_path, damage):
    path = _write(tmp_path / "a.h5", _clients())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.h5 is damaged or not an HDF5 file"):
        tff_hdf5.read(path, FEATURES)


def _write_splits(folder: Path) -> None:
    folder.mkdir()
    _write(folder / "toy_train.h5", _clients(0))
    _write(folder / "toy_test.h5", _clients(1))


def _load(**options):
    return tff_hdf5.load_splits("toy", FEATURES, **{"version": 1, "sha256": "0" * 64} | options)


def test_load_splits_from_a_folder_packs_once(tmp_path, monkeypatch):
    _write_splits(tmp_path / "data")
    for _ in range(2):
        splits = _load(data_dir=str(tmp_path / "data"))
        for seed, dataset in enumerate(splits.present().values()):
            np.testing.assert_array_equal(dataset.client(2)["y"], _clients(seed)["b"]["label"])
            assert isinstance(dataset.features["x"], np.memmap)
        monkeypatch.setattr(tff_hdf5, "read", None)  # The second time, nothing is read.


def test_a_file_that_crashes_the_library_is_one_line(tmp_path):
    _write_splits(tmp_path / "data")
    crash = Feature("label", (), np.integer, lambda rows: os.kill(os.getpid(), signal.SIGSEGV))
    with pytest.raises(
        UserError, match=r"toy_train\.h5 and .*toy_test\.h5: .* exit code -11, a crash"
    ):
        tff_hdf5.load_splits(
            "toy", {"y": crash}, version=1, sha256="", data_dir=str(tmp_path / "data")
        )


def test_load_splits_sees_an_edited_file(tmp_path):
    _write_splits(tmp_path / "data")
    _load(data_dir=str(tmp_path / "data"))
    _write(tmp_path / "data" / "toy_train.h5", {"only": _clients()["b"]})
    assert _load(data_dir=str(tmp_path / "data")).train.client_ids.tolist() == ["only"]


def test_load_splits_says_what_it_expected_and_found(tmp_path):
    folder = tmp_path / "data"
    with pytest.raises(UserError, match=r"expected toy_train.h5 and toy_test.h5 in .*not a folder"):
        _load(data_dir=str(folder))
    folder.mkdir()
    with pytest.raises(UserError, match=r"found nothing; correct data_dir"):
        _load(data_dir=str(folder))
    for name in ("toy_train.h5", "other.txt"):
        (folder / name).write_text("")
    with pytest.raises(UserError, match=r"expected toy_test.h5 in .*found other.txt, toy_train.h5"):
        _load(data_dir=str(folder))


def test_load_splits_downloads_the_published_archive(tmp_path, monkeypatch):
    _write_splits(tmp_path / "data")
    with tarfile.open(tmp_path / "toy.tar.bz2", "w:bz2") as tar:
        for name in ("toy_train.h5", "toy_test.h5"):
            tar.add(tmp_path / "data" / name, name)
    sha256 = hashlib.sha256((tmp_path / "toy.tar.bz2").read_bytes()).hexdigest()
    monkeypatch.setattr(tff_hdf5, "_URL", tmp_path.as_uri() + "/")
    for _ in range(2):
        splits = _load(sha256=sha256)
        np.testing.assert_array_equal(splits.test.client(3)["y"], _clients(1)["c"]["label"])
        monkeypatch.setattr(download, "download", None)  # The second time, nothing is fetched.
    assert not list((tmp_path / "cache").glob("extract-*"))


def test_load_splits_offline_says_what_to_fetch_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(tff_hdf5, "_URL", (tmp_path / "gone").as_uri() + "/")
    monkeypatch.setattr(download, "_RETRY_DELAYS_S", ())
    target = tmp_path / "cache" / "toy.tar.bz2"
    with pytest.raises(UserError, match=re.escape(f"by hand and put it at {target}")):
        _load()
