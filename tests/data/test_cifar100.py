"""Federated CIFAR-100 in TFF's layout, in files written by the test."""

from pathlib import Path

import gin
import h5py
import numpy as np
import pytest

from fedexp import config
from fedexp.data import cifar100, workers
from fedexp.errors import UserError
from fedexp.trainer import Experiment

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
LABELS = np.array([99, 0, 7])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    # Quicker; test_tff_hdf5.py has the worker process.
    monkeypatch.setattr(workers, "run", lambda what, function: function())


def write(folder: Path, images: np.ndarray = IMAGES, labels: np.ndarray = LABELS) -> str:
    """Training clients '2' (as given) and '10', and a test client '2' with other examples."""
    folder.mkdir()
    ordinary = {"image": IMAGES[:1, ::-1], "label": LABELS[:1]}
    given = {"image": images, "label": labels}
    for split, clients in {"train": {"2": given, "10": ordinary}, "test": {"2": ordinary}}.items():
        with h5py.File(folder / f"fed_cifar100_{split}.h5", "w") as file:
            for client, features in clients.items():
                group = file.create_group(f"examples/{client}")
                for name, array in features.items():
                    group[name] = array
                group["coarse_label"] = np.zeros(len(features["label"]), np.int64)
    return str(folder)


def test_images_and_fine_labels_by_client(tmp_path):
    train, test, _ = cifar100(write(tmp_path / "d"))
    assert train.client_ids.tolist() == ["10", "2"]
    assert test.client_ids.tolist() == ["2"]
    assert set(train.features) == {"x", "y"}
    assert (train.features["x"].dtype, train.features["y"].dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(train.client(1)["x"], IMAGES)
    np.testing.assert_array_equal(train.client(1)["y"], LABELS)
    np.testing.assert_array_equal(test.client(0)["x"], IMAGES[:1, ::-1])


@pytest.mark.parametrize(
    ("feature", "array", "message"),
    [
        ("labels", np.array([0, 100, 7]), r"'label': labels must be in \[0, 100\), got 0 to 100"),
        ("labels", np.array([0, -1, 7]), "got -1 to 7"),
        ("labels", LABELS[:, None], r"'label': the shape is \(3, 1\)"),
        ("images", IMAGES.astype(np.float32), "'image': the dtype is float32"),
        ("images", IMAGES[:, :28, :28], r"'image': the shape is \(3, 28, 28, 3\)"),
    ],
)
def test_another_layout_names_the_client(tmp_path, feature, array, message):
    with pytest.raises(UserError, match=rf"fed_cifar100_train\.h5: client '2'.*{message}"):
        cifar100(write(tmp_path / "d", **{feature: array}))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"expected fed_cifar100_train\.h5 and fed_cifar100_test"):
        cifar100(str(tmp_path))


@pytest.mark.slow
def test_the_published_experiment_runs_on_these_files(tmp_path):
    overrides = [
        f"cifar100.data_dir = '{write(tmp_path / 'd')}'",
        "train.num_rounds = 2",
        "uniform.cohort_size = 2",
        "ResNet18GroupNorm.stages = (1,)",
        "ResNet18GroupNorm.strides = (1,)",
        "ResNet18GroupNorm.width = 4",
        "auto.packing = @Packing()",
        "Packing.lanes = 2",
    ]
    gin.clear_config()
    try:
        config.load(["cifar100_fedadam.gin"], overrides)
        result = Experiment(observers=()).run(overrides=overrides)
    finally:
        gin.clear_config()
    assert result.params["Dense_0"]["kernel"].shape == (4, 100)
    assert np.any(result.params["Dense_0"]["bias"])
    assert np.isfinite(result.metrics["test/loss"])
    assert result.metrics["test/accuracy"] in (0, 1)  # There is one test image.
