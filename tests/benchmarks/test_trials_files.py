"""A sample of the trials of damaged files; `python -m benchmarks.trials files` does 20,000."""

import collections
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import trials
from benchmarks.trials import files

# The others need TensorFlow, or a process of their own.
KINDS = ("npz", "packed", "conversion", "leaf", "fedjax_sqlite", "vocabulary")


@pytest.mark.parametrize("name", KINDS)
def test_no_damage_is_a_traceback_or_overlooked(name, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", "set by each trial")
    monkeypatch.setattr(files.paths, "sync", lambda path: None)
    outcomes = collections.Counter()
    for number in range(25):
        outcome, message = files.trial(files.KINDS[name], 1, number)
        assert outcome not in files.BAD, message
        outcomes[outcome] += 1
    assert outcomes[files.LINE] > 0 or name == "conversion"  # It begins again instead.
    assert outcomes[files.DIFFERS] == 0 or name not in ("packed", "conversion")


@pytest.mark.parametrize("name", KINDS)
def test_undamaged_files_are_read_as_they_were_written(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "cache"))
    kind = files.KINDS[name]
    (tmp_path / "data").mkdir()
    kind.write(tmp_path / "data")
    found = kind.read(tmp_path / "data")
    if name == "vocabulary":
        assert found == [b"the", b"of", "naïve".encode(), b"to", b"python", b"jax", b"c"]
    elif name == "npz":
        rows = np.concatenate([e["x"] for _, e in found.train.clients()])
        expected = files.PARTITIONS["train"].features["x"]
        np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(expected, axis=0))
    else:
        assert found.train.fingerprint() == files.PARTITIONS["train"].fingerprint()
        x = found.train.features["x"]
        np.testing.assert_array_equal(x, files.PARTITIONS["train"].features["x"])


def _write(folder):
    (folder / "file").write_text("some text")


def _read(folder):
    return (folder / "file").read_bytes()


def _crash_if_damaged(folder):
    if _read(folder) != b"some text":
        os.abort()


def _hang_if_damaged(folder):
    while _read(folder) != b"some text":
        pass


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (_crash_if_damaged, files.CRASH),
        (_hang_if_damaged, files.HANG),
        (_read, files.WRONG),
    ],
)
def test_a_crash_a_hang_and_silence_are_told_apart(read, outcome, monkeypatch):
    monkeypatch.setattr(files, "LIMIT_S", 0.5)
    found = files.trials(files.Kind("text", _write, read, checksummed=True), 2, seed=0)
    assert found["outcomes"][outcome] == 2


def test_outcomes_name_no_folder_of_the_machine(tmp_path):
    here, installed = Path(trials.__file__), Path(sys.prefix) / "lib" / "jax.py"
    said = f'File "{here}", line 1; File "{installed}"; {tmp_path}/run1 ended'
    trials.save(tmp_path / "out.json", {"said": said})
    text = json.loads((tmp_path / "out.json").read_text())["said"]
    assert 'File "benchmarks/trials/__init__.py", line 1' in text and "lib/jax.py" in text
    assert not any(str(folder) in text for folder in (here.parents[2], sys.prefix, tmp_path))
