"""Accuracy against what it cost, from the final.json of runs."""

from __future__ import annotations

import json

import pytest

from fedexp import plots

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
    found = plots.points(run("one"), x, "test/accuracy")
    assert [point[0] for point in found] == pytest.approx(expected)
    assert [point[1] for point in found] == pytest.approx([0.2, 0.6])


@pytest.mark.parametrize("options", [["--x=bits"], ["--x=bits_up", "--log"], []])
def test_runs_are_drawn(run, tmp_path, capsys, options):
    out = tmp_path / "plot.png"
    assert plots.main([run("a"), run("b"), f"--out={out}", *options]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out == f"{out}\n"
    one = plots.draw({"a": [(0, 0), (1, 1)]}, "round", "test/accuracy")
    assert one != plots.draw({"a": [(0, 1), (1, 0)]}, "round", "test/accuracy")


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
