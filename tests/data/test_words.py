"""Ids of words: Sent140 in LEAF's layout and in that of FedJAX's script, and words from a file."""

import collections
import json
import re
import sqlite3
import zlib
from typing import Any

import gin
import msgpack
import numpy as np
import pytest

from fedexp import config
from fedexp.data import csv, fedjax_sqlite, label_ids, leaf, word_ids
from fedexp.errors import UserError
from fedexp.trainer import Experiment

TRAIN = {
    "ann": [("Good morning, good people!", 1), ("I don't like rain", 0)],
    "bob": [("good good rain rain rain", 0)],
}
TEST = {"ann": [("good snow", 1)], "bob": [("", 0), ("Rain rain rain people", 0)]}


def _row(user: str, text: str) -> list[str]:
    """As LEAF's README has it; its data_to_json.py keeps the name of the part at the end."""
    return ["2087", "Sat May 16 23:58:44 UTC 2009", "NO_QUERY", user, text, "training"]


def _write(folder, part):
    users = {
        user: {"x": [_row(user, text) for text, _ in rows], "y": [label for _, label in rows]}
        for user, rows in part.items()
    }
    shard = {
        "users": list(users),
        "num_samples": [len(data["y"]) for data in users.values()],
        "user_data": users,
    }
    folder.mkdir()
    (folder / "all_data.json").write_text(json.dumps(shard))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    _write(tmp_path / "train", TRAIN)
    _write(tmp_path / "test", TEST)
    return tmp_path


def _read(folder, **arguments: Any):
    arguments = {"length": 4, "vocab_size": 5, "entry": 4} | arguments
    features = {
        "x": ("x", (), "object", word_ids(**arguments)),
        "y": ("y", (), "object", label_ids([0, 1])),
    }
    return leaf(f"{folder}/train", f"{folder}/test", features)


def test_the_words_are_those_of_the_training_tweets(folder):
    texts = [text.lower() for rows in TRAIN.values() for text, _ in rows]
    words = [re.findall(r"[\w']+|[.,!?;]", text) for text in texts]
    counts = collections.Counter(word for row in words for word in row)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:5]
    assert frequent == ["good", "rain", "!", ",", "don't"]
    expected = [[([*frequent, word].index(word) + 1) for word in row[:4]] for row in words]
    splits = _read(folder)
    assert splits.train.client_ids.tolist() == ["ann", "bob"]
    assert splits.train.features["x"].tolist() == expected
    assert splits.train.features["y"].tolist() == [1, 0, 0]
    assert splits.test.features["x"].tolist() == [[1, 6, 0, 0], [0] * 4, [2, 2, 2, 6]]
    assert splits.test.features["x"].dtype == np.uint16


def test_the_cache_knows_what_the_function_does(folder):
    (folder / "words.txt").write_text("rain 3\n\n Good 7\n")
    from_file = {"vocabulary": f"{folder}/words.txt", "vocab_size": 2}
    first = _read(folder, **from_file).train.features["x"]
    assert isinstance(first, np.memmap)
    assert first.tolist() == [[3, 3, 3, 3], [3, 3, 3, 1], [3, 3, 1, 1]]
    cased = _read(folder, **from_file, lowercase=False).train.features["x"]
    assert cased.tolist() == [[2, 3, 3, 3], [3, 3, 3, 1], [3, 3, 1, 1]]
    short = _read(folder, **from_file, length=2, pattern=r"\S+").train.features["x"]
    assert short.tolist() == [[3, 3], [3, 3], [3, 3]]
    (folder / "words.txt").write_text("people 1\nmorning 2\nother\n")
    assert _read(folder, **from_file).train.features["x"].tolist()[0] == [3, 2, 3, 3]


def test_sentences_have_a_begin_and_an_end(folder):
    rows = _read(folder, sentences=True).test.features["x"]
    assert rows.tolist() == [[7, 1, 6, 8, 0], [7, 8, 0, 0, 0], [7, 2, 2, 2, 6]]


def _pack(strings: np.ndarray) -> msgpack.ExtType:
    """As FedJAX's serialization module writes arrays of bytes, and of text, which it cannot read."""
    if strings.dtype == object:
        return msgpack.ExtType(4, msgpack.packb((strings.shape, strings.tolist())))
    return msgpack.ExtType(1, msgpack.packb((strings.shape, strings.dtype.name, strings.tobytes())))


def test_the_file_of_fedjax_scripts(folder):
    with sqlite3.connect(folder / "sent140.sqlite") as database:
        database.execute(
            "CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY, data BLOB, "
            "num_examples INTEGER NOT NULL)"
        )
        for user, rows in TRAIN.items():
            examples = {
                "tweet_text": np.array([text.lower().encode() for text, _ in rows], object),
                "tweet_sentiment": np.array([str(label).encode() for _, label in rows], object),
                "name": np.array([f"{user} é" for _ in rows]),
            }
            data = zlib.compress(msgpack.packb({name: _pack(a) for name, a in examples.items()}))
            database.execute(
                "INSERT INTO federated_data VALUES (?, ?, ?)", (user.encode(), data, len(rows))
            )
    features = {
        "x": ("tweet_text", (), "object", word_ids(3, 4)),
        "y": ("tweet_sentiment", (), "object", label_ids([b"0", b"1"])),
        "n": ("name", (), "object", word_ids(2, 3)),
    }
    train, test, _ = fedjax_sqlite(f"{folder}/sent140.sqlite", features=features, test_fraction=0.5)
    assert train.client_ids.tolist() == ["ann", "bob"] and test.client_ids.tolist() == ["ann"]
    rows = [
        (row, label)
        for part in (train, test)
        for row, label in zip(part.features["x"].tolist(), part.features["y"].tolist(), strict=True)
    ]
    # By frequency: good, rain, and of the others the first ones.
    assert sorted(rows) == [([1, 1, 2], 0), ([1, 5, 4], 1), ([5, 5, 5], 0)]
    # "é" comes three times, "ann" twice.
    assert train.features["n"].tolist() == [[2, 1], [3, 1]]


def test_tables_with_text(tmp_path):
    rows = ["ann,train,so so good", "bob,train,good", "ann,test,bad bad bad bad", "bob,test,so"]
    (tmp_path / "t.csv").write_text("user,part,text\n" + "\n".join(rows))
    features = {"x": ("text", (), "object", word_ids(3, 2))}
    splits = csv(str(tmp_path / "t.csv"), features, "user", split="part")
    assert splits.train.features["x"].tolist() == [[2, 2, 1], [1, 0, 0]]
    assert splits.test.features["x"].tolist() == [[3, 3, 3], [2, 0, 0]]
    (tmp_path / "test.csv").write_text("user,text\nann,bad so")
    (tmp_path / "train.csv").write_text("user,text\nann,so so good")
    paths = {"path": str(tmp_path / "train.csv"), "test_path": str(tmp_path / "test.csv")}
    features = {"x": ("text", (), "object", word_ids(3, 2))}
    assert csv(**paths, features=features, client="user").test.features["x"].tolist() == [[3, 1, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 50}, "vocab_size is 50, but there are 9 different words; bind it"),
        ({"entry": None}, r"all_data.json: client 'ann', feature 'x': .*'2087'.* is no text; bind word"),
        ({"entry": 6}, "is no text; bind word_ids.entry to the place"),
        ({"length": 0}, "word_ids.length must be at least 1, got 0"),
        ({"pattern": "("}, r"word_ids.pattern: '\(' is no regular expression: missing \)"),
        ({"pattern": "(a)b"}, r"word_ids.pattern: write \(\?:...\) for the groups in '\(a\)b'"),
        ({"vocabulary": "gone.txt"}, "no file gone.txt; correct the path"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        _read(folder, **arguments)


def test_labels_and_files_that_are_wrong(folder):
    path = folder / "train" / "all_data.json"
    shard = json.loads(path.read_text())
    for label in (4, ["0"]):
        shard["user_data"]["bob"]["y"] = [label]
        path.write_text(json.dumps(shard))
        message = (
            rf"all_data.json: client 'bob', feature 'y': the label {re.escape(repr(label))} is none"
        )
        with pytest.raises(UserError, match=message):
            _read(folder)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(UserError, match=r"all_data.json is not a shard of LEAF"):
        _read(folder)
    (folder / "words.txt").write_text("a\na\n")
    with pytest.raises(UserError, match=r"words.txt has 2 entries, 3 are asked for"):
        word_ids(2, 3, f"{folder}/words.txt")(np.array(["a"], object))
    with pytest.raises(UserError, match=r"words.txt has 'a' twice"):
        word_ids(2, 2, f"{folder}/words.txt")(np.array(["a"], object))
    with pytest.raises(
        UserError, match="word_ids has no words; bind word_ids.vocabulary to a file"
    ):
        word_ids(2, 2)(np.array(["a"], object))


def test_a_round_on_tweets(folder):
    overrides = [
        f"leaf.train_dir = '{folder}/train'",
        f"leaf.test_dir = '{folder}/test'",
        "word_ids.vocab_size = 5",
        "word_ids.length = 6",
        "LSTMClassifier.vocab_size = 9",
        "LSTMClassifier.hidden_size = 3",
        "train.num_rounds = 1",
    ]
    config.load(["sent140_fedavg.gin"], overrides)
    result = Experiment(observers=[]).run(overrides=overrides)
    assert 0 < result.metrics["test/loss"] < 2
    assert result.metrics["test/accuracy"] in np.arange(4) / np.float32(3)
    gin.clear_config()
