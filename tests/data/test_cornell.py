"""The Cornell movie dialogs, from a small file in the published layout."""

import collections

import gin
import numpy as np
import pytest

from fedexp import config
from fedexp.data import cornell, cornell_movie_dialogs
from fedexp.errors import UserError
from fedexp.trainer import Experiment

LINES = [
    ("L1045", "u0", "m0", "BIANCA", "They do not!"),
    ("L1044", "u2", "m0", "CAMERON", "They do to!"),
    ("L985", "u0", "m0", "BIANCA", "I hope so."),
    ("L984", "u2", "m0", "CAMERON", "She okay?"),
    ("L925", "u0", "m0", "BIANCA", "..."),
    ("L924", "u2", "m0", "CAMERON", "Wow caf\xe9 -- they do"),
    ("L872", "u10", "m1", "A B", "BIANCA CONTINUED: no"),
    ("L871", "u10", "m1", "A B", "No."),
    ("L870", "u0", "m0", "BIANCA", "<i>They</i> \x85 do 2,000.50 of 3"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    _write(tmp_path, LINES)
    return tmp_path


def _write(folder, lines):
    text = "".join(" +++$+++ ".join(line) + "\n" for line in lines)
    (folder / "movie_lines.txt").write_bytes(text.encode("iso-8859-1"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trigger-happy?", "trigger-happy"),
        ("Thank God! If I had to hear one more story...", "thank god if i had to hear one more story"),
        (
            "Pi is 3.14 and pi day is in 10      months.",
            "pi is <NUMERIC> and pi day is in <NUMERIC> months",
        ),
        ("I have 50,000.00 dollars right now.", "i have <NUMERIC> dollars right now"),
        ("This is a double--hyphen!", "this is a double hyphen"),
        ("I..do...not......know.....", "i do not know"),
        ("<u>These are</u> HTML and <b>bold</b> tags.", "these are html and bold tags"),
        ("the 3rd at 12:30", "the <NUMERIC> rd at <NUMERIC> :30"),
    ],
)  # fmt: skip
def test_lines_are_normalized_as_by_fedjax(text, expected):
    """Of its data_to_sqlite_test.py; the last is what its regular expressions come to."""
    assert cornell.normalized(text) == expected


def _sentences(splits, words):
    """Client -> the lines of both partitions, each as its words."""
    names = {number: word for number, word in enumerate(words, start=1)} | {len(words) + 1: "?"}
    found = collections.defaultdict(list)
    for part in (splits.train, splits.test):
        for client, examples in part.clients():
            for row in examples["tokens"].tolist():
                assert row[0] == len(words) + 2
                found[client].append(" ".join(names.get(i, "") for i in row[1:]).strip())
    return {client: sorted(lines) for client, lines in found.items()}


def test_characters_say_their_lines(folder):
    (folder / "vocab.txt").write_text(" they\n \n do\n to\n i\n not\n café\n", encoding="utf-8")
    splits = cornell_movie_dialogs(
        str(folder), 6, str(folder / "vocab.txt"), length=4, test_fraction=0.3
    )
    assert splits.train.client_ids.tolist() == ["u0", "u10", "u2"]
    assert splits.train.client_sizes.tolist() == [2, 1, 2]
    assert splits.test.client_ids.tolist() == ["u0", "u2"]
    words = ["they", "do", "to", "i", "not", "café"]
    assert _sentences(splits, words) == {
        "u0": sorted(["they do not", "i ? ?", "they do ? ?"]),
        "u2": sorted(["they do to", "? ?", "? café they do"]),
        "u10": ["?"],
    }
    short = cornell_movie_dialogs(str(folder), 6, str(folder / "vocab.txt"), length=5)
    ends = [row for row in short.train.features["tokens"].tolist() if row[:3] == [8, 7, 9]]
    assert ends == [[8, 7, 9, 0, 0, 0]]  # "no".


def test_words_are_those_of_the_training_lines(folder):
    """One that only the test has gets no id, whichever line that is."""
    splits = cornell_movie_dialogs(str(folder), 2, test_fraction=0.3)
    said = collections.Counter(splits.train.features["tokens"].ravel().tolist())
    assert said[1] >= said[2] >= 1 and set(said) == {0, 1, 2, 3, 4, 5}
    assert isinstance(splits.train.features["tokens"], np.memmap)


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ([*LINES, LINES[0][:4]], {}, r"movie_lines.txt, line 10: expected line, .* got 4 fields; ext"),
        ([*LINES, (*LINES[0], "x")], {}, "line 10: .* got 6 fields"),
        ([], {}, r"movie_lines.txt has no lines; extract http"),
        (LINES, {"vocab_size": 99}, r"vocab_size is 99, but there are \d+ different words"),
        (LINES, {"length": 0}, "cornell_movie_dialogs.length must be at least 1, got 0"),
        (LINES, {"test_fraction": 1.0}, "fraction must be between 0 and 1"),
        (LINES, {"data_dir": "gone"}, "expected movie_lines.txt in gone; correct cornell_movie_dial"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(folder, lines, arguments, message):
    _write(folder, lines)
    with pytest.raises(UserError, match=message):
        cornell_movie_dialogs(**{"data_dir": str(folder), "vocab_size": 2} | arguments)


@pytest.mark.parametrize("run", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_experiment_on_characters(folder, run):
    overrides = [
        f"cornell_movie_dialogs.data_dir = '{folder}'",
        "cornell_movie_dialogs.vocab_size = 4",
        "cornell_movie_dialogs.test_fraction = 0.3",
        "LSTMLanguageModel.vocab_size = 8",
        "LSTMLanguageModel.hidden_size = 3",
        "LSTMLanguageModel.projection_size = None",
        "uniform.cohort_size = 2",
        "train.num_rounds = 1",
    ]
    config.load(["cornell_fedavg.gin"], overrides)
    experiment = Experiment(observers=[])
    assert experiment.dataset.train.num_clients == 3
    if run:
        assert 0 < experiment.run(overrides=overrides).metrics["test/loss"] < 10
    gin.clear_config()
