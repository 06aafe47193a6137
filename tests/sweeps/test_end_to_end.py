"""Sweeps of real runs: what they leave is what the printed commands give by hand."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import sweep

REPOSITORY = Path(__file__).parent.parent.parent
SWEEP = """
sweep.axes = [@axis()]
sweep.metric = 'test/mae'
sweep.direction = 'minimize'
sweep.seeds = [3]
axis.binding = 'server/adam.learning_rate'
axis.values = [0.01, 0.1]
"""
PRUNED = """
sweep.num_points = 2
sweep.study = @study()
study.sampler = @RandomSampler()
RandomSampler.seed = 0  # The second value first, then the other.
study.pruner = @MedianPruner()
MedianPruner.n_startup_trials = 1
"""


def command(folder: Path, text: str, *more: str) -> list[str]:
    folder.with_suffix(".gin").write_text(text)
    experiment = [f"--gin_file={REPOSITORY}/tests/support/linear.gin", *more]
    return [*experiment, f"--sweep={folder.with_suffix('.gin')}", f"--workdir={folder}"]


@pytest.mark.slow
def test_trials_are_the_runs_that_their_commands_make(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY)
    folder = tmp_path / "runs"
    given = command(folder, SWEEP)
    assert sweep.main([*given, "--dry_run"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("#")]
    assert sweep.main(given) == 0
    assert len(lines) == 2
    by_hand = [word.replace(str(folder), f"{tmp_path}/by_hand") for word in shlex.split(lines[1])]
    assert subprocess.run(by_hand, capture_output=True).returncode == 0
    left, made = (
        json.loads((root / "trials/001/seed_3/final.json").read_text())["history"]
        for root in (folder, tmp_path / "by_hand")
    )
    assert left == made
    config = (folder / "trials/001/seed_3/config.gin").read_text()
    assert "server/adam.learning_rate = 0.1\n" in config and "train.seed = 3\n" in config
    assert not any(name in config for name in ("sweep", "axis", "observers"))


@pytest.mark.slow
def test_a_run_that_does_worse_is_pruned_by_its_evaluations(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(REPOSITORY)
    folder = tmp_path / "runs"
    many = ["train.num_rounds = 2000", "evaluate.every = 50", "CheckpointPlan.every = 500"]
    text = SWEEP.replace("0.01", "1e-5") + PRUNED
    # The first trial goes its way to the end; the other one's model hardly moves.
    assert sweep.main(command(folder, text, *(f"--gin_param={one}" for one in many))) == 0
    found = {
        trial["bindings"]["server/adam.learning_rate"]: trial
        for trial in json.loads((folder / "sweep.json").read_text())["trials"]
    }
    assert found["0.1"]["state"] == "finished" and found["1e-05"]["state"] == "pruned"
    pruned = Path(found["1e-05"]["runs"][0]["folder"])
    rounds = [json.loads(line)["round"] for line in (pruned / "rounds.jsonl").open()]
    assert rounds[-1] < 2000 and not (pruned / "final.json").exists()
    assert "SIGTERM: stopping after this round" in (pruned / "log.txt").read_text()


TOGETHER = (
    SWEEP.replace("[@axis()]", "[@axis(), @client/axis(), @size/axis()]")
    + """
client/axis.binding = 'client/sgd.learning_rate'
client/axis.values = [0.02, 1e30]
size/axis.binding = 'uniform.cohort_size'
size/axis.values = [3, 4]
"""
)


@pytest.mark.slow
def test_trials_in_one_program_are_those_one_by_one(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY)
    found = {}
    for name, more in {"one by one": [], "together": ["--vmap_trials=16"]}.items():
        folder = tmp_path / name
        given = command(folder, TOGETHER, "--gin_param=runtime.num_cpu_devices = 1")
        assert sweep.main([*given, *more]) == 1  # Half of them diverge.
        found[name] = json.loads((folder / "sweep.json").read_text())["trials"]
    # A program for each size of the cohort, for it is no number that can be vmapped.
    programs = [*(tmp_path / "together" / "together").iterdir()]
    assert sorted(len(json.loads((p / "runs.json").read_text())["runs"]) for p in programs) == [
        4,
        4,
    ]
    states = [trial["state"] for trial in found["together"]]
    assert states.count("finished") == states.count("failed") == 4
    for one, other in zip(found["together"], found["one by one"], strict=True):
        assert one["bindings"] == other["bindings"] and one["state"] == other["state"]
        if one["state"] == "finished":
            value, expected = (trial["runs"][0]["value"] for trial in (one, other))
            assert value == pytest.approx(expected, rel=1e-5)
        else:
            assert "diverged" in one["runs"][0]["error"]
    assert "The run diverged" in capfd.readouterr().err


def test_trials_in_one_program_are_not_pruned(tmp_path, monkeypatch, capfd):
    pytest.importorskip("optuna")
    monkeypatch.chdir(REPOSITORY)
    given = command(tmp_path / "runs", SWEEP + PRUNED)
    assert sweep.main([*given, "--vmap_trials=2"]) == 2
    assert capfd.readouterr().err.startswith("error: --vmap_trials: a pruner stops single trials")
