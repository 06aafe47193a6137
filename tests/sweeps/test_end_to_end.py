"""Sweeps of real runs: what they leave is what the printed commands give by hand."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedexp import sweep

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


@pytest.mark.slow
def test_seeds_are_in_one_program_if_there_is_room(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    text = SWEEP.replace("[3]", "[3, 4]").replace("[0.01, 0.1]", "[0.1]")
    found = {}
    for name, more in {"one by one": [], "together": ["--vmap_trials=3"]}.items():
        folder = tmp_path / name
        given = command(folder, text, "--gin_param=runtime.num_cpu_devices = 1")
        assert sweep.main([*given, *more]) == 0
        trials = json.loads((folder / "sweep.json").read_text())["trials"]
        found[name] = [run["value"] for trial in trials for run in trial["runs"]]
    (program,) = (tmp_path / "together" / "together").iterdir()
    runs = json.loads((program / "runs.json").read_text())["runs"]
    assert [Path(run["workdir"]).name for run in runs] == ["seed_3", "seed_4"]
    assert found["together"] == pytest.approx(found["one by one"], rel=1e-5)
    for seed in (3, 4):
        of_seed = tmp_path / "together/trials/000" / f"seed_{seed}" / "operative_config.gin"
        assert f"train.seed = {seed}\n" in of_seed.read_text()
        assert "server/adam.learning_rate = 0.1\n" in of_seed.read_text()


@pytest.mark.slow
def test_a_trial_is_pruned_within_its_program_which_goes_on_when_it_was_killed(
    tmp_path, monkeypatch
):
    pytest.importorskip("optuna")
    monkeypatch.chdir(REPOSITORY)
    folder = tmp_path / "runs"
    text = SWEEP.replace("0.01", "1e-5") + PRUNED.split("study.pruner")[0]
    text += """
study.pruner = @SuccessiveHalvingPruner()
SuccessiveHalvingPruner.min_resource = 50
SuccessiveHalvingPruner.reduction_factor = 2
"""
    many = ["train.num_rounds = 4000", "evaluate.every = 50", "CheckpointPlan.every = 50"]
    given = command(folder, text, *(f"--gin_param={one}" for one in many), "--vmap_trials=2")
    sweeping = subprocess.Popen([sys.executable, "-m", "launch.sweep", *given])
    marks = []
    while not (marks := [*folder.glob("trials/*/seed_3/pruned.txt")]):
        assert sweeping.poll() is None
        time.sleep(0.1)
    checkpoints = [*folder.glob("together/*/checkpoints/[1-9]*")]
    sweeping.kill()
    sweeping.wait()
    (pruned,) = (mark.parent for mark in marks)
    (other,) = (path for path in folder.glob("trials/*/seed_3") if path != pruned)
    assert checkpoints and not (other / "final.json").exists()
    first = (other / "rounds.jsonl").read_text().splitlines()[0]
    assert sweep.main(given) == 0
    assert len([*folder.glob("together/*/runs.json")]) == 1
    lines = (other / "rounds.jsonl").read_text().splitlines()
    assert lines[0] == first and json.loads(lines[-1])["round"] == 4000  # Not begun again.
    last = json.loads((pruned / "rounds.jsonl").read_text().splitlines()[-1])
    assert last["round"] < 4000 and not (pruned / "final.json").exists()
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["finished", "pruned"]


@pytest.mark.slow
def test_how_many_trials_pay_is_tried(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY)
    given = command(tmp_path / "runs", SWEEP, "--vmap_trials=auto")
    assert sweep.main(given) == 0
    said = capfd.readouterr().err
    found = re.search(r"--vmap_trials=auto: ([12]) trials in a program; .* of 1, .* of 2", said)
    assert found is not None
    assert (tmp_path / "runs" / "vmap_trials.txt").read_text() == f"{found[1]}\n"
    assert sweep.main(given) == 0
    assert "auto" not in capfd.readouterr().err  # Not tried again.
