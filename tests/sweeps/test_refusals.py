"""Mistakes are told in one line, with exit code 2, before the first trial."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fedexp import paths, sweep
from fedexp.sweeps import checking, study
from tests.sweeps import stub
from tests.sweeps.test_running import given

REPOSITORY = Path(__file__).parent.parent.parent
LINEAR = f"--gin_file={REPOSITORY}/tests/support/linear.gin"
SWEEP = """
sweep.axes = [@axis()]
sweep.metric = 'test/mae'
sweep.direction = 'minimize'
axis.binding = 'client/sgd.learning_rate'
axis.values = [0.1, 0.2]
"""
STUDY = """
sweep.study = @study()
sweep.num_points = 2
"""
PRUNED = f"{STUDY}\nstudy.pruner = @MedianPruner()\n"


@pytest.fixture(autouse=True)
def checked_here(monkeypatch):
    """The check of trials runs in this process, which has imported what it needs."""

    def ask(gin_files, gin_params, points, *rest, **named):
        texts = [[f"{name} = {value}" for name, value in point.items()] for point in points]
        return checking._check(gin_files, gin_params, texts, *rest, **named)

    monkeypatch.setattr(checking, "ask", ask)


def refusal(capsys, folder: Path, *arguments: str, text: str = SWEEP) -> str:
    """The one line of a sweep that must be refused, and has no trials."""
    file = folder.with_suffix(".gin")
    file.write_text(text)
    command = [LINEAR, f"--sweep={file}", f"--workdir={folder}", *arguments]
    assert sweep.main(command) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith(("I1", "W1"))]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), err
    assert not [*folder.rglob("log.txt")]
    return lines[0]


def test_a_binding_that_nobody_uses(tmp_path, capsys):
    text = SWEEP.replace("client/sgd", "client/adam")
    line = refusal(capsys, tmp_path / "runs", text=text)
    assert "client/adam.learning_rate = 0.1 has no effect" in line


def test_a_binding_that_nobody_knows_by_the_process_that_checks(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    text = SWEEP.replace("learning_rate", "learing_rate")
    assert "Did you mean 'learning_rate'?" in refusal(capsys, tmp_path / "runs", text=text)


def test_a_value_that_does_not_fit_is_found_in_any_trial(tmp_path, capsys):
    text = SWEEP.replace("0.2]", "'fast']")
    assert "client/sgd.learning_rate = 'fast' must be" in refusal(capsys, tmp_path / "a", text=text)


def test_an_empty_grid(tmp_path, capsys):
    text = SWEEP.replace("[0.1, 0.2]", "[]")
    line = refusal(capsys, tmp_path / "runs", text=text)
    assert "axis.values of client/sgd.learning_rate is empty" in line


def test_the_same_trial_twice(tmp_path, capsys):
    text = SWEEP.replace("0.2]", "0.1]")
    line = refusal(capsys, tmp_path / "runs", text=text)
    assert "trials 0 and 1 would be the same, client/sgd.learning_rate = 0.1" in line


def test_two_runs_of_one_folder(tmp_path, capsys):
    line = refusal(capsys, tmp_path / "runs", text=f"{SWEEP}\nsweep.seeds = [1, 2, 1]")
    assert "sweep.seeds has 1 twice" in line


def test_a_metric_that_no_evaluation_gives(tmp_path, capsys):
    line = refusal(capsys, tmp_path / "runs", text=SWEEP.replace("test/mae", "test/mea"))
    assert "no evaluation gives it. Did you mean 'test/mae'? There are test/loss, test/mae" in line


def test_a_pruner_whose_metric_comes_with_the_end(tmp_path, capsys):
    text = SWEEP + PRUNED
    line = refusal(capsys, tmp_path / "runs", "--gin_param=evaluate.every = 0", text=text)
    assert "study.pruner needs 'test/mae' before a trial's last round, 12" in line


def test_a_sweep_of_another_description(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fedexp.sweeps.running.Loop.run", lambda _: 1 / 0)  # Just before it.
        with pytest.raises(ZeroDivisionError):
            file = tmp_path / "a.gin"
            file.write_text(SWEEP)
            sweep.main([LINEAR, f"--sweep={file}", f"--workdir={tmp_path}/a"])
    line = refusal(capsys, tmp_path / "a", text=SWEEP.replace("0.2]", "0.3]"))
    assert "axis.values: [0.1, 0.2] -> [0.1, 0.3]. Choose another --workdir" in line
    line = refusal(capsys, tmp_path / "a", "--gin_param=train.num_rounds = 3")
    assert "train.num_rounds: 12 -> 3" in line


def test_a_study_of_another_description(tmp_path, capsys):
    pytest.importorskip("optuna")
    storage = f"{STUDY}study.storage = 'sqlite:///{tmp_path}/shared.db'\n"
    assert stub.sweep(given(tmp_path / "a", text=_of_stub("[1, 2]") + storage)) == 0
    capsys.readouterr()
    assert stub.sweep(given(tmp_path / "b", text=_of_stub("[1, 3]") + storage)) == 2
    line = capsys.readouterr().err
    assert "the study 'fedexp' is of another sweep: axis.values: [1, 2] -> [1, 3]" in line


def _of_stub(values: str) -> str:
    text = SWEEP.replace("client/sgd.learning_rate", "task.x").replace("test/mae", "test/score")
    return text.replace("[0.1, 0.2]", values)


@pytest.mark.parametrize("name", ["description.json", "sweep.json"])
def test_a_full_disk(tmp_path, capsys, monkeypatch, name):
    write = paths.write

    def full(path, content):
        if os.path.basename(path) == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(paths, "write", full)
    assert stub.sweep(given(tmp_path / "runs", text=_of_stub("[1, 2]"))) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: cannot write ") and line.count("\n") == 1
    assert "No space left on device; free space there" in line


def test_a_database_that_is_not_there(tmp_path, capsys):
    pytest.importorskip("optuna")
    storage = f"{STUDY}study.storage = 'sqlite:///{tmp_path}/nowhere/shared.db'\n"
    assert stub.sweep(given(tmp_path / "a", text=_of_stub("[1, 2]") + storage)) == 2
    assert "unable to open database file" in capsys.readouterr().err


def test_no_optuna(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "HAS_OPTUNA", False)
    line = refusal(capsys, tmp_path / "runs", text=SWEEP + STUDY)
    assert line.endswith("sweep.study needs Optuna: pip install 'fedexp[sweeps]'")


def test_a_folder_of_a_run(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "operative_config.gin").write_text("")
    assert "holds a run, and no sweep" in refusal(capsys, tmp_path / "runs")


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("sweep.metric = 'a'", [], "sweep.axes is not bound"),
        (SWEEP.replace("sweep.metric = 'test/mae'", ""), [], "sweep.metric is not bound"),
        (SWEEP.replace("sweep.direction = 'minimize'", ""), [], "sweep.direction is not bound"),
        (SWEEP.replace("'minimize'", "'min'"), [], "must be 'maximize' or 'minimize'"),
        (f"{SWEEP}\nsweep.seeds = 0", [], "sweep.seeds must be at least 1"),
        (f"{SWEEP}\nsweep.num_points = 0", [], "sweep.num_points must be at least 1"),
        (f"{SWEEP}\nsweep.study = @study()", [], "how many trials the study has"),
        (f"{SWEEP}\ntrain.num_rounds = 3", [], "is part of the experiment"),
        (f"{SWEEP}\nlog_grid.low = 0.1", [], "has no effect: the sweep never uses it"),
        (SWEEP.replace("[@axis()]", "[@axis(), @axis()]"), [], "two axes bind client/sgd"),
        (f"{SWEEP}\nsweep.seeds = 2", ["--gin_param=train.seed = 1"], "take one of them"),
        (
            SWEEP.replace("client/sgd.learning_rate", "train.seed") + "\nsweep.seeds = 2",
            [],
            "take one",
        ),
        (SWEEP + STUDY + "\nstudy.sampler = @MedianPruner()", [], "one of Optuna's samplers"),
    ],
)
def test_a_sweep_that_says_too_little_or_too_much(tmp_path, capsys, text, arguments, message):
    assert message in refusal(capsys, tmp_path / "runs", *arguments, text=text)


def test_files_and_folders_that_cannot_be(tmp_path, capsys):
    assert sweep.main(["--sweep=nowhere.gin", f"--workdir={tmp_path}/a"]) == 2
    line = capsys.readouterr().err
    assert "there is no nowhere.gin" in line and "quick_grid.gin" in line
    assert sweep.main(["--sweep=quick_grid.gin", "--workdir=s3://bucket/a"]) == 2
    assert "a sweep needs a folder of a file system" in capsys.readouterr().err
