"""Stack Overflow's readers, on small files in TFF's layout."""

import hashlib
import json
import tarfile
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedexp.data import download, stackoverflow, stackoverflow_nwp, stackoverflow_tags
from fedexp.errors import UserError

FILES = ("stackoverflow_train.h5", "stackoverflow_test.h5", "stackoverflow_held_out.h5")
Posts = list[tuple[str, str, str]]
TRAIN = {
    "20": [("the dog ran", "a dog", "java|c"), ("zebra dog the the", "", "php")],
    "100": [("a", "the the", "c#|java|html|c|sql")],
}
TEST = {"20": [("dog dog", "ran", "java")]}
HELDOUT = {"31": [("ran", "ran", "c")]}
# Ids: the 1, dog 2, a 3; outside 4, begin 5, end 6. Tags: java 0, c# 1, c 2.
WORDS = "the 9\ndog 8\na 3\nran 2\n"
TAGS = {"c": 3, "java": 8, "html": 1, "c#": 5, "sql": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _write_h5(path: Path, clients: dict[str, Posts]) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("examples")
        for client_id, posts in clients.items():
            group = file["examples"].create_group(client_id)
            for i, name in enumerate(("tokens", "title", "tags")):
                data = [post[i].encode() for post in posts]
                group.create_dataset(name, data=data, dtype=h5py.string_dtype())
            for name in ("creation_date", "type"):
                group.create_dataset(name, data=[b"x"] * len(posts), dtype=h5py.string_dtype())
            group.create_dataset("score", data=np.zeros(len(posts), np.int64))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, clients in zip(FILES, (TRAIN, TEST, HELDOUT), strict=True):
        _write_h5(folder / name, clients)
    (folder / "stackoverflow.word_count").write_text(WORDS)
    (folder / "stackoverflow.tag_count").write_text(json.dumps(TAGS))
    return folder


def _nwp(folder, **options):
    arguments = {"vocab_size": 3, "train_length": 3, "test_length": 2, "num_workers": 0}
    return stackoverflow_nwp(None if folder is None else str(folder), **arguments | options)


def _tags(folder, **options):
    arguments = {"vocab_size": 3, "num_tags": 3, "max_words": 4, "num_workers": 0} | options
    return stackoverflow_tags(str(folder), **arguments)


def test_next_word_prediction_worked_by_hand(folder):
    train, test, _ = _nwp(folder)
    assert train.client_ids.tolist() == ["100", "20"]  # In ascending order of the strings.
    assert train.client(0)["tokens"].tolist() == [[5, 3, 6, 0]]
    assert train.client(1)["tokens"].tolist() == [[5, 1, 2, 4], [5, 4, 2, 1]]
    assert train.features["tokens"].dtype == np.uint16
    assert test.client_ids.tolist() == ["20"]
    assert test.features["tokens"].tolist() == [[5, 2, 2]]


def test_tag_prediction_worked_by_hand(folder):
    train, test, _ = _tags(folder)
    assert {name: array.dtype.name for name, array in train.features.items()} == {
        "words": "uint16",
        "num_words": "uint16",
        "tags": "int16",
    }
    assert {name: array.tolist() for name, array in train.client(0).items()} == {
        "words": [[1, 1, 3, 0]],
        "num_words": [3],
        "tags": [[1, 0, 2, -1, -1]],
    }
    assert {name: array.tolist() for name, array in train.client(1).items()} == {
        "words": [[3, 2, 1, 2], [2, 1, 1, 0]],  # The title first; 'ran' and 'zebra' have no id.
        "num_words": [5, 4],
        "tags": [[0, 2, -1, -1, -1], [-1] * 5],
    }
    assert test.features["words"].tolist() == [[2, 2, 0, 0]]


def test_words_beyond_the_width_are_counted(folder):
    train, *_ = _tags(folder, max_words=2)
    assert train.client(1)["words"].tolist() == [[3, 2], [2, 1]]
    assert train.client(1)["num_words"].tolist() == [5, 4]


def test_bags_of_words_are_the_published_ones(folder):
    """Against the definition: the mean of one-hot vectors, the bucket for other words cut off."""
    train, *_ = _tags(folder, max_words=16)
    vocabulary = ["the", "dog", "a"]
    rows = 0
    for client_id, examples in train.clients():
        for words, count, post in zip(
            examples["words"], examples["num_words"], TRAIN[client_id], strict=True
        ):
            text = f"{post[0]} {post[1]}".split()
            expected = np.mean([[word == known for known in vocabulary] for word in text], axis=0)
            found = np.bincount(words, minlength=4)[1:4] / count
            np.testing.assert_allclose(found, expected)
            rows += 1
    assert rows == 3


def test_heldout_users_instead_of_test(folder):
    for name in ("stackoverflow_test.h5", "stackoverflow.tag_count"):
        (folder / name).unlink()  # Not needed.
    assert _nwp(folder, evaluate_on="heldout").test.client_ids.tolist() == ["31"]
    with pytest.raises(UserError, match="evaluate_on must be 'test' or 'heldout', got 'dev'"):
        _nwp(folder, evaluate_on="dev")


def test_partitions_are_converted_once_each(folder, monkeypatch):
    _nwp(folder)
    made = []
    source = stackoverflow.tff_hdf5.Source
    monkeypatch.setattr(
        stackoverflow.tff_hdf5,
        "Source",
        lambda path, *args: made.append(path.name) or source(path, *args),
    )
    _nwp(folder)
    assert made == []
    _nwp(folder, evaluate_on="heldout")
    assert made == [FILES[2]]
    _nwp(folder, test_length=3)
    assert made[1:] == [FILES[1]]
    (folder / "stackoverflow.word_count").write_text("other 3\n" + WORDS)
    _nwp(folder)
    assert made[2:] == list(FILES[:2])


@settings(max_examples=15)
@given(
    st.dictionaries(
        st.text("0123456789", min_size=1, max_size=3),
        st.lists(st.text("a bcz", max_size=9), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 4),
)
def test_conversion_equals_a_plain_loop(clients, length):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in FILES[:2]:
            posts = {cid: [(text, "", "") for text in texts] for cid, texts in clients.items()}
            _write_h5(folder / file, posts)
        (folder / "stackoverflow.word_count").write_text("b 2\na 1\n")
        train, *_ = _nwp(folder, vocab_size=2, train_length=length)
        assert train.client_ids.tolist() == sorted(clients)
        for client_id, examples in train.clients():
            expected = []
            for text in clients[client_id]:
                row = [4, *({"b": 1, "a": 2}.get(word, 3) for word in text.split(" ")), 5]
                expected.append((row + [0] * length)[: length + 1])
            assert examples["tokens"].tolist() == expected


def test_missing_files_are_named(folder):
    (folder / "stackoverflow_train.h5").unlink()
    (folder / "stackoverflow.word_count").unlink()
    message = (
        r"expected stackoverflow_train.h5, stackoverflow.word_count in .*correct data_dir, extract "
        r"https://.*/stackoverflow.tar.bz2 and https://.*/stackoverflow.word_count.tar.bz2 there"
    )
    with pytest.raises(UserError, match=message):
        _nwp(folder)
    with pytest.raises(UserError, match=r"expected .* in .*gone"):
        _nwp(folder / "gone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"train\.h5: client '20' has no feature 'tokens', only \["),
        (np.zeros(2), "client '20', feature 'tokens': the dtype is float64, expected object"),
        (np.array([b"a", b"b"]), r"client '20', feature 'tokens': the dtype is \|S1"),
        ([[b"a"], [b"b"]], r"client '20', feature 'tokens': the shape is \(2, 1\)"),
        ([], r"train\.h5: client '20' has no examples"),
    ],
)
@pytest.mark.parametrize("load", [_nwp, _tags])
def test_another_layout_names_client_and_feature(folder, change, message, load):
    with h5py.File(folder / "stackoverflow_train.h5", "a") as file:
        group = file["examples/20"]
        del group["tokens"]
        if isinstance(change, list):
            group.create_dataset("tokens", data=np.array(change, object), dtype=h5py.string_dtype())
            if not change:
                for name in ("title", "tags"):
                    del group[name]
                    group.create_dataset(name, (0,), dtype=h5py.string_dtype())
        elif change is not None:
            group["tokens"] = change
    with pytest.raises(UserError, match=message):
        load(folder)


def test_arrays_of_variable_length_are_no_strings(folder):
    with h5py.File(folder / "stackoverflow_train.h5", "a") as file:
        del file["examples/20/tokens"]
        file["examples/20"].create_dataset("tokens", (2,), dtype=h5py.vlen_dtype(np.int32))
    with pytest.raises(UserError, match="client '20', feature 'tokens': the dtype is object"):
        _nwp(folder)


def test_a_file_that_is_not_hdf5(folder):
    (folder / "stackoverflow_train.h5").write_text("<html>log in first</html>")
    with pytest.raises(UserError, match=r"train\.h5 is damaged or not an HDF5 file"):
        _nwp(folder)


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        (_nwp, {"vocab_size": 0}, "vocab_size must be at least 1"),
        (_nwp, {"test_length": 0}, "test_length must be at least 1"),
        (_nwp, {"vocab_size": 5}, "word_count has 4 entries, 5 are asked for"),
        (_tags, {"max_words": 0}, "max_words must be at least 1"),
        (_tags, {"vocab_size": 1 << 16}, "vocab_size must be at most 65535"),
        (_tags, {"num_tags": 1 << 15}, "num_tags must be at most 32767"),
        (_tags, {"num_tags": 6}, "tag_count has 5 entries, 6 are asked for"),
    ],
)
def test_arguments_out_of_range(folder, load, options, message):
    with pytest.raises(UserError, match=message):
        load(folder, **options)


def test_downloads_the_published_archives(folder, cache, tmp_path, monkeypatch):
    published = {}
    for archive, names in (
        ("stackoverflow.tar.bz2", FILES),
        ("stackoverflow.word_count.tar.bz2", ["stackoverflow.word_count"]),
    ):
        with tarfile.open(tmp_path / archive, "w:bz2") as tar:
            for name in names:
                tar.add(folder / name, name)
        sha256 = hashlib.sha256((tmp_path / archive).read_bytes()).hexdigest()
        published |= dict.fromkeys(names, (archive, sha256))
    monkeypatch.setattr(stackoverflow, "_PUBLISHED", published)
    monkeypatch.setattr(stackoverflow, "_URL", tmp_path.as_uri() + "/")
    expected = _nwp(folder)
    for _ in range(2):
        for found, wanted in zip(_nwp(None)[:2], expected[:2], strict=True):
            np.testing.assert_array_equal(found.features["tokens"], wanted.features["tokens"])
        # The second time nothing is fetched, and what was fetched may be gone.
        monkeypatch.setattr(download, "download", None)
        for name in (*FILES, "stackoverflow.word_count"):
            (cache / "stackoverflow" / name).unlink(missing_ok=True)
