"""Federated EMNIST: synthetic files for every error, and real files in TFF's layout."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from fedexp.data import emnist, workers
from fedexp.errors import UserError

DATA = Path(os.environ.get("FEDEXP_TEST_DATA", "")) / "mnist_by_writer"
needs_data = pytest.mark.skipif(
    "FEDEXP_TEST_DATA" not in os.environ or not DATA.is_dir(),
    reason="needs FEDEXP_TEST_DATA, a folder with mnist_by_writer/",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    # Quicker; test_tff_hdf5.py has the worker process.
    monkeypatch.setattr(workers, "run", lambda what, function: function())


def _write(folder: Path, name: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Both splits, each with the client 'f0' holding the given examples and an ordinary 'f1'."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        with h5py.File(folder / f"{name}_{split}.h5", "w") as file:
            file["examples/f0/pixels"], file["examples/f0/label"] = pixels, labels
            file["examples/f1/pixels"] = np.ones((1, 28, 28), np.float32)
            file["examples/f1/label"] = np.zeros(1, np.int32)


def test_pixels_survive_the_way_to_uint8_and_back(tmp_path):
    levels = np.resize(np.arange(256, dtype=np.uint8), (2, 28, 28))
    labels = np.array([61, 36], np.int32)
    _write(tmp_path / "d", "fed_emnist", levels.astype(np.float32) / np.float32(255), labels)
    train, test, _ = emnist(data_dir=str(tmp_path / "d"))
    for dataset in (train, test):
        assert dataset.client_ids.tolist() == ["f0", "f1"]
        assert dataset.features["x"].dtype == np.uint8
        assert dataset.features["y"].dtype == np.int32
        np.testing.assert_array_equal(dataset.client(0)["x"], levels)
        np.testing.assert_array_equal(dataset.client(0)["y"], labels)
        assert (dataset.client(1)["x"] == 255).all()


def test_pixels_are_rounded_to_the_nearest_level(tmp_path):
    pixels = np.full((1, 28, 28), 10.6 / 255, np.float32)
    pixels[0, :14] = 10.4 / 255
    _write(tmp_path / "d", "fed_emnist", pixels, np.zeros(1, np.int32))
    train, *_ = emnist(data_dir=str(tmp_path / "d"))
    assert (train.client(0)["x"][0, :14] == 10).all()
    assert (train.client(0)["x"][0, 14:] == 11).all()


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, np.nan])
def test_pixels_out_of_range_name_the_client(tmp_path, value):
    pixels = np.ones((2, 28, 28), np.float32)
    pixels[1, 3, 4] = value
    _write(tmp_path / "d", "fed_emnist", pixels, np.zeros(2, np.int32))
    with pytest.raises(UserError, match=r"train\.h5: client 'f0', feature 'pixels': .*in \[0, 1\]"):
        emnist(data_dir=str(tmp_path / "d"))


def test_pixels_must_be_float32(tmp_path):
    _write(tmp_path / "d", "fed_emnist", np.ones((1, 28, 28), np.uint8), np.zeros(1, np.int32))
    with pytest.raises(UserError, match=r"client 'f0', feature 'pixels': the dtype is uint8"):
        emnist(data_dir=str(tmp_path / "d"))


@pytest.mark.parametrize(("only_digits", "label"), [(False, 62), (False, -1), (True, 10)])
def test_labels_out_of_range_name_the_client(tmp_path, only_digits, label):
    name = "fed_emnist_digitsonly" if only_digits else "fed_emnist"
    labels = np.array([label], np.int32)
    _write(tmp_path / "d", name, np.ones((1, 28, 28), np.float32), labels)
    with pytest.raises(UserError, match=r"client 'f0', feature 'label': .*got .*only_digits"):
        emnist(only_digits=only_digits, data_dir=str(tmp_path / "d"))


def test_the_other_variant_in_the_folder_is_listed(tmp_path):
    labels = np.zeros(1, np.int32)
    _write(tmp_path / "d", "fed_emnist_digitsonly", np.ones((1, 28, 28), np.float32), labels)
    with pytest.raises(UserError, match=r"expected fed_emnist_train.h5.*found fed_emnist_digitson"):
        emnist(data_dir=str(tmp_path / "d"))


def test_drop_empty(tmp_path):
    empty = np.zeros((0, 28, 28), np.float32), np.zeros(0, np.int32)
    _write(tmp_path / "d", "fed_emnist", *empty)
    with pytest.raises(UserError, match=r"'f0' has no examples .*drop_empty=True"):
        emnist(data_dir=str(tmp_path / "d"))
    train, *_ = emnist(data_dir=str(tmp_path / "d"), drop_empty=True)
    assert train.client_ids.tolist() == ["f1"]


@needs_data
def test_real_writers():
    train, test, _ = emnist(only_digits=True, data_dir=str(DATA))
    assert (train.num_clients, train.num_examples, test.num_examples) == (297, 8122, 1878)
    assert train.client_ids.tolist() == sorted(train.client_ids)
    assert test.client_ids.tolist() == train.client_ids.tolist()
    for split, dataset in (("train", train), ("test", test)):
        with h5py.File(DATA / f"fed_emnist_digitsonly_{split}.h5") as file:
            for index in (0, 100, 296):
                group = file["examples"][str(dataset.client_ids[index])]
                examples = dataset.client(index)
                np.testing.assert_array_equal(examples["y"], group["label"][:])
                np.testing.assert_allclose(examples["x"] / 255, group["pixels"][:], atol=0.5 / 255)
        corners = dataset.features["x"][:, ::27, ::27]
        assert (corners == 255).mean() > 0.99  # The background is white.
    assert set(np.unique(train.features["y"])) == set(range(10))
