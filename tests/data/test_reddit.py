"""Reddit in LEAF's layout, from comments that the test cuts into pieces as LEAF's preprocess.py does."""

import collections
import json
from typing import Any

import gin
import numpy as np
import pytest

from fedexp import config
from fedexp.data import reddit
from fedexp.errors import UserError
from fedexp.trainer import Experiment

LENGTH = 4
COMMENTS = {
    "train": {"1": ["a b c d e", "b c"], "2": ["b a c"]},
    "test": {"1": ["a new b c"], "2": []},
    "val": {"1": ["c"], "2": ["b b b b"]},
}


def _pieces(tokens: list[str]) -> list[list[str]]:
    padded = tokens + ["<PAD>"] * (-len(tokens) % LENGTH)
    return [padded[i : i + LENGTH] for i in range(0, len(padded), LENGTH)]


def _user(comments: list[str]) -> dict[str, list]:
    x = [_pieces(["<BOS>", *comment.split(), "<EOS>"]) for comment in comments]
    y = [
        {
            "subreddit": "aww",
            "created_utc": 1512086400,
            "score": 2,
            "target_tokens": _pieces([*comment.split(), "<EOS>", "<PAD>"]),
            "count_tokens": [[1.0] * LENGTH for _ in pieces],
        }
        for comment, pieces in zip(comments, x, strict=True)
    ]
    return {"x": x, "y": y}


def _write(folder, part, change=lambda shard: None):
    users = COMMENTS[part]
    shard = {
        "users": list(users),
        # LEAF leaves here what a user has in all partitions together.
        "num_samples": [sum(len(COMMENTS[p][user]) for p in COMMENTS) for user in users],
        "user_data": {user: _user(comments) for user, comments in users.items()},
    }
    change(shard)
    (folder / part).mkdir(exist_ok=True)
    (folder / part / f"reddit_0_{part}.json").write_text(json.dumps(shard))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    for part in COMMENTS:
        _write(tmp_path, part)
    return tmp_path


def _read(folder, **arguments: Any):
    return reddit(f"{folder}/train", f"{folder}/test", **{"vocab_size": 3} | arguments)


def _expected(comment: str, words: list[str]) -> list[list[int]]:
    """Pieces that overlap by a token, of those that have something to predict."""
    size = len(words)
    ids = [words.index(word) + 1 if word in words else size + 1 for word in comment.split()]
    tokens = [size + 2, *ids, size + 3]
    rows = [tokens[i : i + LENGTH + 1] for i in range(0, len(tokens) - 1, LENGTH)]
    return [row + [0] * (LENGTH + 1 - len(row)) for row in rows]


def test_pieces_overlap_by_a_token(folder):
    said = " ".join(comment for comments in COMMENTS["train"].values() for comment in comments)
    counts = collections.Counter(said.split())
    words = sorted(counts, key=lambda word: (-counts[word], word))[:3]
    splits = _read(folder, validation_dir=f"{folder}/val")
    names = {"train": "train", "test": "test", "validation": "val"}
    for part, dataset in splits.present().items():
        users = {user: comments for user, comments in COMMENTS[names[part]].items() if comments}
        assert dataset.client_ids.tolist() == list(users)
        for user, examples in dataset.clients():
            expected = [row for comment in users[user] for row in _expected(comment, words)]
            assert examples["tokens"].tolist() == expected
            assert examples["tokens"].dtype == np.uint16
    assert splits.train.client_sizes.tolist() == [3, 1]


def test_words_from_a_file(folder):
    (folder / "words.txt").write_text("new 9\nb 8\n")
    tokens = _read(folder, vocab_size=2, vocabulary=f"{folder}/words.txt").test.features["tokens"]
    assert tokens.tolist() == [[4, 3, 1, 2, 3], [3, 5, 0, 0, 0]]


def _first(shard):
    return shard["user_data"]["1"]["x"][0][0], shard["user_data"]["1"]["y"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _first(s)[1].pop("target_tokens"), "KeyError: 'target_tokens'; LEAF's Reddit has"),
        (lambda s: _first(s)[1]["target_tokens"].pop(), "zip.* is shorter than"),
        (lambda s: _first(s)[0].reverse(), r"the target of \['c', 'b', 'a', '<BOS>'\] is \['a', 'b', "),
        (lambda s: _first(s)[0].__setitem__(0, 7), "the target of .7, 'a'"),
        (lambda s: s["user_data"]["1"].pop("x"), "KeyError: 'x'"),
        (lambda s: s["user_data"]["2"].update(x=[3], y=[{"target_tokens": []}]), "client '2': TypeErr"),
        (
            lambda s: s["user_data"]["2"].update(
                x=[[["a", "b"]]], y=[{"target_tokens": [["b", "<EOS>"]]}]
            ),
            "client '2': a piece has 2 tokens, others have 4; mend the file",
        ),
        (lambda s: s.pop("users"), "is not a shard of LEAF .KeyError: 'users'"),
    ],
)  # fmt: skip
def test_another_layout(folder, change, message):
    _write(folder, "train", change)
    with pytest.raises(UserError, match=r"train/reddit_0_train\.json.*" + message):
        _read(folder)


def test_what_else_is_refused(folder):
    with pytest.raises(UserError, match="reddit.vocab_size is 9, but there are 5 different words"):
        _read(folder, vocab_size=9)
    with pytest.raises(UserError, match="reddit.vocab_size must be at least 1, got 0"):
        _read(folder, vocab_size=0)
    with pytest.raises(UserError, match=r"no \*.json files in .*gone; correct the path to LEAF's"):
        reddit(f"{folder}/gone", f"{folder}/test")
    path = folder / "train" / "reddit_0_train.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(
        UserError, match=r"reddit_0_train.json is not a shard of LEAF .JSONDecodeEr"
    ):
        _read(folder)


@pytest.mark.parametrize("run", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_experiment_on_comments(folder, run):
    overrides = [
        f"reddit.train_dir = '{folder}/train'",
        f"reddit.test_dir = '{folder}/test'",
        f"reddit.validation_dir = '{folder}/val'",
        "reddit.vocab_size = 4",
        "LSTMLanguageModel.vocab_size = 8",
        "LSTMLanguageModel.hidden_size = 3",
        "LSTMLanguageModel.num_layers = 1",
        "uniform.cohort_size = 2",
        "train.num_rounds = 1",
    ]
    config.load(["reddit_fedavg.gin"], overrides)
    experiment = Experiment(observers=[])
    assert [each.split for each in experiment.evaluations] == ["validation", "test"]
    if run:
        result = experiment.run(overrides=overrides)
        assert 0 < result.metrics["test/loss"] < 20
        assert result.metrics["test/oov_rate"] == pytest.approx(1 / 5)
    gin.clear_config()
