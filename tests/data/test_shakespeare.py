"""Federated Shakespeare: sequences worked out by hand, errors, and the real roles."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from fedexp.data import shakespeare, workers
from fedexp.data.shakespeare import BOS, CHARACTERS, EOS, OOV, PAD
from fedexp.errors import UserError

DATA = Path(os.environ.get("FEDEXP_TEST_DATA", "")) / "shakespeare"
needs_data = pytest.mark.skipif(
    "FEDEXP_TEST_DATA" not in os.environ or not DATA.is_dir(),
    reason="needs FEDEXP_TEST_DATA, a folder with shakespeare/",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    # Quicker; test_tff_hdf5.py has the worker process.
    monkeypatch.setattr(workers, "run", lambda what, function: function())


def _write(folder: Path, roles: dict[str, list[bytes]], dtype=None) -> str:
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        with h5py.File(folder / f"shakespeare_{split}.h5", "w") as file:
            for role, snippets in roles.items():
                file.create_dataset(
                    f"examples/{role}/snippets",
                    data=np.array(snippets, object if dtype is None else dtype),
                    dtype=h5py.string_dtype() if dtype is None else dtype,
                )
    return str(folder)


def _decode(row: np.ndarray) -> bytes:
    """The bytes of a row's characters, by the vocabulary's definition."""
    assert (row != OOV).all()
    return bytes(CHARACTERS[i - 1] for i in row if 1 <= i <= len(CHARACTERS))


def test_the_published_ids():
    assert (PAD, OOV, BOS, EOS) == (0, 87, 88, 89)
    assert len(set(CHARACTERS)) == 86


def test_sequences_worked_out_by_hand(tmp_path):
    # d, h, l, p, t, x are the first six characters; 0xc3 is in no vocabulary.
    folder = _write(tmp_path / "d", {"A": [b"dh", b"dhlptx", b""], "B": [b"\xc3x", b"lptd"]})
    train, test, _ = shakespeare(data_dir=folder, sequence_length=3)
    for dataset in (train, test):
        assert list(dataset.features) == ["tokens"]
        assert dataset.features["tokens"].dtype == np.uint8
        assert dataset.client_ids.tolist() == ["A", "B"]
        assert dataset.client(0)["tokens"].tolist() == [
            [88, 1, 2, 89],  # Fits exactly.
            [88, 1, 2, 3],
            [4, 5, 6, 89],
            [88, 89, 0, 0],
        ]
        assert dataset.client(1)["tokens"].tolist() == [
            [88, 87, 6, 89],
            [88, 3, 4, 5],
            [1, 89, 0, 0],  # Padded.
        ]


def test_another_sequence_length_is_another_cache_entry(tmp_path):
    folder = _write(tmp_path / "d", {"A": [b"dhl"]})
    for length in (3, 9, 3):
        tokens = shakespeare(data_dir=folder, sequence_length=length).train.features["tokens"]
        assert tokens.shape[1] == length + 1
        assert _decode(tokens.ravel()) == b"dhl"


@pytest.mark.parametrize("length", [0, -1, 80.0])
def test_sequence_length_must_be_positive(length):
    with pytest.raises(UserError, match="sequence_length must be a whole number above 0"):
        shakespeare(data_dir="nowhere", sequence_length=length)


def test_snippets_must_be_strings(tmp_path):
    folder = _write(tmp_path / "d", {"A": [1, 2]}, np.int64)
    with pytest.raises(UserError, match=r"client 'A', feature 'snippets': the dtype is int64"):
        shakespeare(data_dir=folder)


def test_drop_empty(tmp_path):
    folder = _write(tmp_path / "d", {"A": [], "B": [b"dh"]})
    with pytest.raises(UserError, match=r"client 'A' has no examples .*drop_empty=True"):
        shakespeare(data_dir=folder)
    train, *_ = shakespeare(data_dir=folder, drop_empty=True)
    assert train.client_ids.tolist() == ["B"]


def test_missing_files_name_the_archive(tmp_path):
    with pytest.raises(UserError, match=r"shakespeare_train.h5.*shakespeare.tar.bz2"):
        shakespeare(data_dir=str(tmp_path))


@needs_data
def test_real_roles():
    splits = shakespeare(data_dir=str(DATA))
    assert [split.num_clients for split in splits.present().values()] == [245, 245]
    for name, dataset in splits.present().items():
        tokens = dataset.features["tokens"]
        assert (tokens == OOV).sum() == 0
        with h5py.File(DATA / f"shakespeare_{name}.h5") as file:
            for index in (0, 100, 244):
                snippets = file["examples"][str(dataset.client_ids[index])]["snippets"][:]
                rows = dataset.client(index)["tokens"]
                assert rows.shape == (sum(-(-(len(s) + 2) // 81) for s in snippets), 81)
                assert _decode(rows.ravel()) == b"".join(snippets)
                assert (rows[:, 0] == BOS).sum() == (rows == EOS).sum() == len(snippets)
    assert (splits.train.num_examples, splits.test.num_examples) == (13245, 3293)
