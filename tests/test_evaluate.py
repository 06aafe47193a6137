"""Evaluating what a run has saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gin
import numpy as np
import pytest

from fedexp import config, evaluate
from fedexp.data import FederatedSplits
from fedexp.trainer import Experiment
from tests.support import linear

REPOSITORY = Path(__file__).parent.parent
LINEAR = str(REPOSITORY / "tests/support/linear.gin")
DITTO = [
    "train.algorithm = @ditto",
    "ditto.client_optimizer = @client/sgd()",
    "ditto.server_optimizer = @server/adam()",
    "ditto.lambda_ = 0.5",
    "train.evaluations = [@evaluate(), @personal/evaluate()]",
    "personal/evaluate.personalise = True",
]


@gin.configurable
def fewer_to_train(splits: FederatedSplits) -> FederatedSplits:
    return FederatedSplits(splits.train.select_clients(range(5)), splits.test)


def trained(workdir: Path, *params: str) -> dict[str, Any]:
    """A run's `final.json`."""
    config.load([LINEAR], [*params, "train.observers = []"])
    config.prepare_workdir(workdir)
    Experiment().run(workdir)
    gin.clear_config()
    return json.loads((workdir / "final.json").read_text())


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """The workdir of a run of one round."""
    workdir = tmp_path_factory.mktemp("short")
    trained(workdir, "train.num_rounds = 1")
    return workdir


def evaluated(workdir: Path, *arguments: str) -> dict[str, Any]:
    """What is in `evaluation.json`, after which everything else is what it was."""
    before = contents(workdir)
    assert evaluate.main([str(workdir), *arguments]) == 0
    gin.clear_config()
    assert contents(workdir) == before
    return json.loads((workdir / evaluate.NAME).read_text())


def contents(workdir: Path) -> dict[Path, tuple[int, bytes]]:
    files = [path for path in workdir.rglob("*") if path.is_file() and path.name != evaluate.NAME]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def of_groups(row: dict[str, float], *groups: str) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.split("/")[0] in groups}


def test_the_latest_and_the_best_are_what_the_run_has_measured(tmp_path, capsys):
    """With clients' own parameters, whose states lie in the workdir's store."""
    more = ["evaluate.every = 1", "train.num_rounds = 2", "CheckpointPlan.keep = 1"]
    final = trained(tmp_path, *DITTO, *more, "CheckpointPlan.best_mode = 'max'")
    latest = evaluated(tmp_path, "--latest")
    assert latest["metrics"] == of_groups(final["metrics"], "test", "test_personal")
    assert latest["evaluations"] == final["evaluations"]
    assert (latest["round"], latest["best_by"]) == (2, None)
    shown = capsys.readouterr().out
    assert "What was measured after round 2" in shown and "of the latest" in shown
    best = evaluated(tmp_path)
    row = max(final["history"], key=lambda row: row["test/mae"])
    assert row["round"] == best["round"] == 1 and best["best_by"] == "test/mae"
    assert best["metrics"] == of_groups(row, "test", "test_personal")


def test_other_evaluations_than_the_runs(tmp_path):
    trained(tmp_path, "train.num_rounds = 3")
    found = evaluated(
        tmp_path,
        "--latest",
        "--gin_param=train.evaluations = [@evaluate(), @tuned/evaluate()]",
        "--gin_param=evaluate.split = 'train'",
        "--gin_param=tuned/evaluate.personalise = @fine_tuning",
        "--gin_param=fine_tuning.optimizer = @client/sgd()",
    )
    groups = {one["name"]: one for one in found["evaluations"]}
    assert list(groups) == ["train_split", "train_split_personal"]
    assert groups["train_split"]["num_examples"] == sum(linear.SIZES)
    train = linear.dataset().features
    from fedexp import load_params

    params = load_params(tmp_path, best=False)
    error = train["x"] @ params["w"] + params["b"] - train["y"]
    assert found["metrics"]["train_split/mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert found["metrics"]["train_split_personal/loss"] < found["metrics"]["train_split/loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no"], "there is no folder no"),
        ([".", "--gin_param=evaluate.splt = 'train'"], "Did you mean 'split'?"),
        ([".", "--gin_param=evaluate.split = 'validation'"], "the data have none"),
        ([".", "--gin_param=train.evaluations = []"], "train.evaluations is empty"),
        ([".", "--gin_param=client/adam.learning_rate = 0.5"], "has no effect"),
        ([".", "--gin_param=train.algorithm = @scaffold", *(
            f"--gin_param=scaffold.{name}" for name in
            ("client_learning_rate = 0.1", "server_optimizer = @server/adam()")
        )], "is of another experiment"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(short, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(short)
    assert evaluate.main(["--latest", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (short / evaluate.NAME).exists()


def test_a_run_on_virtual_devices_is_built_again(tmp_path):
    trained(tmp_path, "train.num_rounds = 1", "runtime.num_cpu_devices = 2")
    command = [sys.executable, "-m", "fedexp.evaluate", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_clients_than_the_runs_are_said(short, capsys):
    evaluated(short)
    assert "other clients or examples" not in capsys.readouterr().err
    fewer = ["train.dataset = @fewer_to_train()", "fewer_to_train.splits = @linear_splits()"]
    evaluated(short, *(f"--gin_param={param}" for param in fewer))
    err = capsys.readouterr().err
    assert "the train split has other clients or examples" in err and "the test split" not in err


def test_a_run_without_gin_is_told(short, tmp_path, capsys):
    shutil.copytree(short / "checkpoints", tmp_path / "checkpoints")
    assert evaluate.main([str(tmp_path)]) == 2
    assert "has no config.gin" in capsys.readouterr().err


def test_the_command_knows_it():
    script = Path(sys.executable).parent / "fedexp"
    done = subprocess.run([script, "evaluate", "--help"], capture_output=True, text=True)
    assert "--latest" in done.stdout, done.stderr
