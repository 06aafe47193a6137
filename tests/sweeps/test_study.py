"""Studies of Optuna over the stand-in for fedexp.main."""

from __future__ import annotations

import pytest

from fedexp.sweeps.space import Axis, random_integer, random_log_uniform, random_uniform
from fedexp.sweeps.study import distribution
from tests.support.tensorboard import eventually
from tests.sweeps import stub
from tests.sweeps.test_running import PATIENCE, begun, given, start, table

optuna = pytest.importorskip("optuna")

STUDY = """
sweep.axes = [@axis()]
sweep.metric = 'test/score'
sweep.direction = 'maximize'
sweep.seeds = 2
sweep.num_points = {count}
sweep.study = @study()
axis.binding = 'task.x'
axis.values = {values}
{more}
"""
UNIFORM = "random_uniform.low = 0.0\nrandom_uniform.high = 3.0\n"
# Of two values it draws the second one first, and then the other.
BOTH = "study.sampler = @RandomSampler()\nRandomSampler.seed = 0\n"


def study(folder):
    return optuna.load_study(study_name="fedexp", storage=f"sqlite:///{folder}/study.db")


def test_an_axis_is_a_distribution():
    known = optuna.distributions
    for values, expected in (
        ([3, 5, 7], known.CategoricalDistribution([0, 1, 2])),
        (random_uniform(0.5, 2.0), known.FloatDistribution(0.5, 2.0)),
        (random_log_uniform(0.1, 2.0), known.FloatDistribution(0.1, 2.0, log=True)),
        (random_integer(1, 9), known.IntDistribution(1, 9)),
    ):
        assert distribution(Axis("a.x", values)) == expected


def test_the_mean_over_seeds_is_told_and_the_study_goes_on(tmp_path):
    folder = tmp_path / "runs"
    for count in (2, 4):  # More points may be asked for later.
        text = STUDY.format(count=count, values="@random_uniform()", more=UNIFORM)
        assert stub.sweep(given(folder, "--workers=2", text=text)) == 0
        rows = table(folder)
        told = [(trial.params["task.x"], trial.value) for trial in study(folder).trials]
        assert len(rows) == len(told) == count
        for row, (x, value) in zip(rows, told, strict=True):
            assert float(row["task.x"]) == pytest.approx(x, rel=1e-6)
            assert value == pytest.approx(4 * x + 0.05, rel=1e-6)
    assert len({x for x, _ in told}) == 4


def test_a_pruned_trial_is_stopped_and_its_other_seeds_are_not_begun(tmp_path):
    folder = tmp_path / "runs"
    # After a round the metric is x: below 2.5 a trial is pruned; this one would go on for ever.
    pruner = "study.pruner = @ThresholdPruner()\nThresholdPruner.lower = 2.5\n"
    text = STUDY.format(count=2, values="[2, 3]", more=BOTH + pruner)
    assert stub.sweep(given(folder, "--gin_param=task.mode = 'hangs'", text=text)) == 0
    states = {row["task.x"]: row["state"] for row in table(folder)}
    assert states == {"2": "pruned", "3": "finished"}
    assert begun(folder) == ["seed_0 0", "seed_0 0", "seed_1 0"]
    by_state = {trial.state.name: trial for trial in study(folder).trials}
    assert by_state["PRUNED"].intermediate_values == {1: 2.0}
    assert by_state["COMPLETE"].value == pytest.approx(12.05)


def test_a_failed_trial_is_told_as_failed(tmp_path, capfd):
    folder = tmp_path / "runs"
    text = STUDY.format(count=2, values="[2, 3]", more=BOTH)
    assert stub.sweep(given(folder, "--gin_param=task.mode = 'refused'", text=text)) == 1
    assert sorted(trial.state.name for trial in study(folder).trials) == ["COMPLETE", "FAIL"]
    assert "task.x must not be 2" in capfd.readouterr().err
    before = begun(folder)
    assert stub.sweep(given(folder, "--gin_param=task.mode = 'refused'", text=text)) == 1
    assert begun(folder) == before


@pytest.mark.slow
def test_killed_it_chooses_as_it_would_have(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    text = STUDY.format(count=3, values="@random_uniform()", more=UNIFORM)
    slow = "--gin_param=task.pause = 0.2"
    assert stub.sweep(given(whole, slow, text=text)) == 0
    sweep = start(cut, slow, text=text)
    eventually((cut / "trials" / "001" / "seed_1" / "checkpoint").exists, timeout=PATIENCE)
    sweep.kill()
    sweep.communicate()
    assert [trial.state.name for trial in study(cut).trials] == ["COMPLETE", "RUNNING"]
    assert stub.sweep(given(cut, slow, text=text)) == 0
    assert (cut / "sweep.csv").read_text() == (whole / "sweep.csv").read_text()
    assert begun(cut)[-1] != "seed_1 0"  # The run that was killed went on from its checkpoint.
