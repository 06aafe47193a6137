"""Hugging Face's data sets, made here by its own library."""

import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from fedexp.data import dirichlet, huggingface
from fedexp.errors import UserError

FEATURES = {"x": "x", "y": "label"}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def _rows(size: int = 12, shift: int = 0) -> datasets.Dataset:
    features = datasets.Features(
        {
            "user": datasets.Value("string"),
            "x": datasets.Array2D((2, 2), "float32"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "text": datasets.Value("string"),
        }
    )
    rows = {
        "user": [f"u{i % 3}" for i in range(size)],
        "x": [[[i + shift, 0], [0, 1]] for i in range(size)],
        "label": [i % 2 for i in range(size)],
        "text": ["a" * i for i in range(size)],
    }
    return datasets.Dataset.from_dict(rows, features)


def _check(splits):
    assert splits.train.client_ids.tolist() == ["u0", "u1", "u2"]
    assert splits.train.client_sizes.tolist() == [4, 4, 4]
    x = splits.train.features["x"]
    assert x.shape == (12, 2, 2) and x[:, 0, 0].tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert splits.train.features["y"].tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1]
    assert splits.test.features["x"][:, 0, 0].tolist() == [100, 101, 102]


def test_loaded_data_sets_and_saved_ones(tmp_path):
    both = datasets.DatasetDict(train=_rows(), test=_rows(3, 100))
    _check(huggingface(both, FEATURES, "user"))
    both.save_to_disk(str(tmp_path / "saved"))
    _check(huggingface(str(tmp_path / "saved"), FEATURES, "user"))
    for name, rows in both.items():
        rows.to_parquet(str(tmp_path / "files" / f"{name}.parquet"))
    _check(huggingface(str(tmp_path / "files"), FEATURES, "user"))


def test_one_data_set_is_split_and_keeps_its_selection():
    rows = _rows(30).select(range(12))
    splits = huggingface(rows, FEATURES, "user", test_split=None, test_fraction=0.25)
    assert splits.test.client_sizes.tolist() == [1, 1, 1]
    splits = huggingface(rows, FEATURES, partition=dirichlet(2, 1.0), test_split=None)
    assert splits.train.client_ids.tolist() == ["0", "1"]


def test_text_and_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    for images in (list(map(str, paths)), [{"bytes": p.read_bytes()} for p in paths]):
        rows = datasets.Dataset.from_dict(
            {"user": ["a", "b"], "image": images, "text": ["hi", "you"]}
        )
        rows = rows.cast_column("image", datasets.Image())
        features = {
            "x": "image",
            "n": ("text", (), "object", lambda texts: np.array([len(text) for text in texts])),
        }
        both = datasets.DatasetDict(train=rows, test=rows)
        found = huggingface(both, features, "user").train.features
        np.testing.assert_array_equal(found["x"], pixels)
        assert found["n"].tolist() == [2, 3]


class ByLabel:
    """What a partitioner of flwr-datasets is: it is given a data set, once, and loads partitions."""

    def __init__(self, least: int = 0):
        self.least, self._dataset = least, None
        self.num_partitions = 2

    @property
    def dataset(self):
        return self._dataset

    @dataset.setter
    def dataset(self, value):
        if self._dataset is not None:
            raise ValueError("only once")
        self._dataset = value

    def load_partition(self, partition_id: int) -> datasets.Dataset:
        rows = self._dataset.filter(lambda row: row["label"] == partition_id)
        if len(rows) < self.least:
            raise ValueError("a partition is too small")
        return rows.select(range(len(rows) - 1))  # The last is nobody's.


def test_partitioners_of_flower():
    both = datasets.DatasetDict(train=_rows(), test=_rows(6, 100))
    for _ in range(2):
        splits = huggingface(both, FEATURES | {"all": ["label"]}, partition=ByLabel())
        assert splits.train.client_ids.tolist() == ["0", "1"]
        assert splits.train.features["x"][:, 0, 0].tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
        assert splits.test.features["x"][:, 0, 0].tolist() == [100, 102, 101, 103]
    with pytest.raises(UserError, match="partition: ByLabel: a partition is too small"):
        huggingface(both, FEATURES, partition=ByLabel(7))
    with pytest.raises(UserError, match="huggingface.client and a partition exclude each other"):
        huggingface(both, FEATURES, "user", ByLabel())


def test_what_the_documentation_shows_of_flower(capsys):
    pytest.importorskip("flwr_datasets", reason="it asks for older versions than other packages")
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    found = re.search(r"```python\n(import datasets.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert found
    exec(found[1], {})
    assert capsys.readouterr().out == found[2]


def test_mistakes(tmp_path):
    rows = _rows()
    with pytest.raises(UserError, match=r"no split 'test' in the Dataset; there are \['train'\]"):
        huggingface(rows, FEATURES, "user")
    with pytest.raises(UserError, match="no column 'who' in the Dataset, split 'train'; there are"):
        huggingface(rows, FEATURES, "who", test_split=None)
    with pytest.raises(
        UserError, match="split 'train', row 0, column 'text' is of the type string"
    ):
        huggingface(rows, {"x": "text"}, "user", test_split=None)
    with pytest.raises(UserError, match=r"no folder .*gone; correct huggingface\.dataset"):
        huggingface(str(tmp_path / "gone"), FEATURES, "user")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty cannot be read, or is damaged \("):
        huggingface(str(tmp_path / "empty"), FEATURES, "user")
    for wrong in (3, rows.to_iterable_dataset()):
        with pytest.raises(UserError, match="must be a folder, a Dataset or a DatasetDict, got "):
            huggingface(wrong, FEATURES, "user")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'fedexp\[huggingface\]'"):
        huggingface("folder", FEATURES, "user")
