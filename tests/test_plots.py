"""Accuracy against what it cost, from the final.json of runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedexp import plots
from fedexp.runs import Curve

# Evaluations of different rhythms; the second round's measured something else.
HISTORY = [
    {
        "round": 10 * i,
        "train/loss": 1.0 / i,
        **({} if i == 2 else {"test/accuracy": 0.2 * i}),
        "traffic/total_bits_up": 1e6 * i,
        "traffic/total_bits_down": 3e6 * i,
        "simulated/seconds": 2.5 * i,
        "privacy/epsilon": 0.1 * i,
    }
    for i in (1, 2, 3)
]


@pytest.fixture
def run(tmp_path):
    def make(name: str, rows=HISTORY) -> str:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "final.json").write_text(json.dumps({"history": rows}))
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ("round", [10, 30]),
        ("bits", [4e6, 12e6]),
        ("bits_up", [1e6, 3e6]),
        ("seconds", [2.5, 7.5]),
        ("epsilon", [0.1, 0.3]),
    ],
)
def test_a_curve_has_the_evaluations_of_the_metric(run, x, expected):
    (found,) = plots.curves([run("one")], x, "test/accuracy").values()
    assert found.x == pytest.approx(expected)
    assert found.mean == pytest.approx([0.2, 0.6])


@pytest.mark.parametrize(
    ("name", "begin", "options"),
    [
        ("plot.png", b"\x89PNG", ["--x=bits"]),
        ("plot.pdf", b"%PDF", ["--x=bits_up", "--log"]),
        ("plot.svg", b"<?xml", []),
    ],
)
def test_runs_are_drawn(run, tmp_path, capsys, name, begin, options):
    out = tmp_path / name
    run("all/a"), run("all/b")
    assert plots.main([str(tmp_path / "all"), f"--out={out}", *options]) == 0
    assert out.read_bytes().startswith(begin) and capsys.readouterr().out == f"{out}\n"
    rising, falling = np.asarray([0.0, 1.0]), np.asarray([1.0, 0.0])
    one = plots.draw({"a": Curve(rising, rising, rising, rising)}, "round", "test/accuracy")
    assert one != plots.draw(
        {"a": Curve(rising, falling, falling, falling)}, "round", "test/accuracy"
    )


def test_runs_that_differ_in_seeds_are_a_curve_with_a_band(run):
    folders = []
    for rate in (1, 2):
        for seed in (0, 1):
            rows = [{"round": r, "test/accuracy": rate * r + 10 * seed} for r in (1, 2)]
            folders.append(run(f"{rate}/{seed}", rows))
            for name in ("config.gin", "operative_config.gin"):
                text = f"sgd.learning_rate = {rate}\ntrain.seed = {seed}\n"
                (Path(folders[-1]) / name).write_text(text)
    found = plots.curves(folders, "round", "test/accuracy")
    assert list(found) == ["learning_rate=1", "learning_rate=2"]
    curve = found["learning_rate=2"]
    assert curve.mean == pytest.approx([7, 9])  # 2 r, and 2 r + 10 of the other seed.
    assert curve.low == pytest.approx([2, 4]) and curve.high == pytest.approx([12, 14])


def test_runs_are_told_apart():
    assert plots.labels(["x/a", "x/b/"]) == ["a", "b"]
    assert plots.labels(["x/a", "y/a"]) == ["x/a", "y/a"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (None, [], "final.json: there is none; a run writes it after its last round"),
        ("{", [], "final.json cannot be read as fedexp's: "),
        ("[]", [], "final.json cannot be read as fedexp's: "),
        (
            HISTORY,
            ["--metric=test/acuracy"],
            "has no 'test/acuracy' in its history; there is test/acc",
        ),
        ([], [], "has no 'test/accuracy' in its history"),
        ([{"round": 1, "test/accuracy": 0.1}], ["--x=epsilon"], "has no 'privacy/epsilon'"),
        (
            [{"round": 1, "test/accuracy": 0.1, "privacy/epsilon": float("inf")}],
            ["--x=epsilon"],
            "has no evaluation with both test/accuracy and privacy/epsilon",
        ),
        (HISTORY, ["--out=plot.jpg"], "--out=plot.jpg must end in png or pdf or svg"),
        (HISTORY, ["--out=nowhere/plot.png"], "cannot write nowhere/plot.png: No such file"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, monkeypatch, rows, options, message):
    monkeypatch.chdir(tmp_path)
    folder = run("one", [] if rows is None or isinstance(rows, str) else rows)
    if rows is None:
        (tmp_path / "one" / "final.json").unlink()
    elif isinstance(rows, str):
        (tmp_path / "one" / "final.json").write_text(rows)
    assert plots.main([folder, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "plot.png").exists()
