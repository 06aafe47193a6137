"""Runs side by side: the bindings that differ, and the metrics."""

from __future__ import annotations

import csv
import json

import pytest

from fedexp import compare


@pytest.fixture
def runs(tmp_path):
    """Three finished runs in a folder, one without bindings of its own, and one that is not finished."""
    for name, rate, bound, accuracy in (
        ("a", "0.1", True, 0.5),
        ("b", "0.01", True, 0.75),
        ("c", "0.1", False, 0.25),
    ):
        folder = tmp_path / "sweep" / name
        folder.mkdir(parents=True)
        operative = (
            f"# Parameters for sgd:\nsgd.learning_rate = {rate}\ntrain.num_rounds = \\\n    9\n"
        )
        (folder / "operative_config.gin").write_text(operative)
        (folder / "config.gin").write_text(f"sgd.learning_rate = {rate}\n" if bound else "")
        row = {"round": 9, "test/accuracy": accuracy, "train/loss": 1.0}
        (folder / "final.json").write_text(json.dumps({"history": [{"round": 1}, row]}))
    (tmp_path / "sweep" / "unfinished").mkdir()
    return tmp_path / "sweep"


def test_a_folder_of_runs_is_compared_and_sorted(runs, tmp_path, capsys):
    output = tmp_path / "runs.csv"
    assert compare.main([str(runs), "--sort=test/accuracy", f"--csv={output}"]) == 0
    with open(output, encoding="utf-8") as file:
        found = list(csv.reader(file))
    assert found == [
        ["run", "sgd.learning_rate", "round", "test/accuracy"],
        ["b", "0.01", "9", "0.75"],
        ["a", "0.1", "9", "0.5"],
        ["c", "0.1", "9", "0.25"],
    ]
    shown = capsys.readouterr().out
    assert shown.index("0.75") < shown.index("0.25") and "num_rounds" not in shown


def test_a_run_in_python_stands_beside_the_others(runs, tmp_path, capsys):
    for name in ("config.gin", "operative_config.gin"):
        (runs / "c" / name).unlink()
    output = tmp_path / "runs.csv"
    assert compare.main([str(runs), f"--csv={output}"]) == 0
    with open(output, encoding="utf-8") as file:
        found = list(csv.reader(file))
    assert found == [
        ["run", "sgd.learning_rate", "workdir", "round", "test/accuracy"],
        ["a", "0.1", "", "9", "0.5"],
        ["b", "0.01", "", "9", "0.75"],
        ["c", "", str(runs / "c"), "9", "0.25"],
    ]
    assert "over seeds" not in capsys.readouterr().out


def test_chosen_metrics_of_chosen_runs(runs, capsys):
    chosen = [str(runs / "a"), str(runs / "c"), "--metrics=train/loss"]
    assert compare.main(chosen) == 0
    shown = capsys.readouterr().out
    assert "train/loss" in shown and "accuracy" not in shown and "learning_rate" not in shown


def test_what_runs_have_run_on_is_said_where_it_differs(runs, capsys):
    for name, jax, head in (("a", "0.10.0", "1" * 40), ("b", "0.10.1", "1" * 40 + "-dirty")):
        entry = {
            "host": name,
            "devices": {"cpu": 1},
            "versions": {"fedexp": "0.1.0", "jax": jax, "numpy": "2.3"},
            "commits": {"fedexp": head, "folder": None},
        }
        earlier = entry | {"devices": {"gpu": 8}}
        (runs / name / "environment.json").write_text(json.dumps([earlier, entry]))
    assert compare.main([str(runs)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "differs" in line] == [
        f"fedexp differs: 0.1.0 at {'1' * 10} (a); 0.1.0 at {'1' * 10}-dirty (b)",
        "jax differs: 0.10.0 (a); 0.10.1 (b)",
    ]
    assert compare.main([str(runs / "a"), str(runs / "c")]) == 0
    assert "differs" not in capsys.readouterr().out


def test_seeds_are_summed_up(runs, capsys):
    accuracies = {"x": (0.2, 0.4, 0.9), "y": (0.6,)}
    for name, of_seeds in accuracies.items():
        for seed, accuracy in enumerate(of_seeds):
            folder = runs / f"{name}{seed}"
            folder.mkdir()
            config = f"f.name = '{name}'\ntrain.seed = {seed}\n"
            (folder / "operative_config.gin").write_text(config)
            (folder / "config.gin").write_text("")
            history = [{"round": 3, "test/accuracy": accuracy}]
            (folder / "final.json").write_text(json.dumps({"history": history}))
    chosen = [str(runs / name) for name in ("x0", "x1", "x2", "y0")]
    assert compare.main([*chosen, "--sort=test/accuracy"]) == 0
    shown = capsys.readouterr().out
    summed = shown[shown.index("over seeds") :]
    cells = [
        [c.strip() for c in line.split("│")[1:-1]] for line in summed.splitlines() if "│" in line
    ]
    mean = (0.2 + 0.4 + 0.9) / 3
    std = (((0.2 - mean) ** 2 + (0.4 - mean) ** 2 + (0.9 - mean) ** 2) / 2) ** 0.5
    assert cells == [["'y'", "1", "3", "0.6"], ["'x'", "3", "3", f"{mean:.6g} ± {std:.2g}"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unfinished"], "unfinished/final.json: there is none"),
        (["a", "--metrics=test/acuracy"], "no run has the metric 'test/acuracy'; there are round"),
        (["a", "--sort=loss"], "no run has the metric 'loss'"),
        (["a", "--csv=/dev/null/x.csv"], "cannot write /dev/null/x.csv"),
        (["a", "--html=/dev/null/x.html"], "cannot write /dev/null/x.html"),
    ],
)
def test_mistakes_are_one_line(runs, arguments, message, capsys):
    assert compare.main([str(runs / arguments[0]), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
