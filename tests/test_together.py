"""Trials in one program leave what each leaves alone."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedavg, optimizers, scaffold
from fedexp.checkpointing import CheckpointPlan
from fedexp.data import ClientBatching, FederatedSplits, poisson, uniform
from fedexp.engine import Packing, jit
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.reporting import JsonLines, Observer, TensorBoard
from fedexp.together import Trial, run_together
from fedexp.trainer import Experiment
from tests.support import linear

TASK = linear.task()
NUMBERS = [
    {"client": 0.01, "server": 0.1},
    {"client": 0.05, "server": 0.1},
    {"client": 0.02, "server": 0.3},
]


def adam(numbers):
    return fedavg(TASK, optax.sgd(numbers["client"]), optimizers.adam(numbers["server"]))


def with_states(numbers):
    return scaffold(TASK, numbers["client"], optax.sgd(numbers["server"]))


def setup(**changes):
    given = {
        "algorithm": None,
        "num_rounds": 6,
        "sampler": uniform(3),
        "batching": ClientBatching(4),
        "strategy": jit(),
        "evaluations": [Evaluate(every=2), Evaluate(split="train", every=3)],
        "checkpoints": CheckpointPlan(every=2),
        "observers": [],
        "seed": 3,
    }
    splits = FederatedSplits(linear.dataset(), linear.dataset(seed=1))
    return Experiment(splits, TASK, **(given | changes))


def lines(workdir: Path) -> list[dict[str, float]]:
    """What `JsonLines` wrote, without times and what the program is like."""
    text = (workdir / "rounds.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def planned(folder: Path, numbers=NUMBERS, **more) -> list[Trial]:
    return [
        Trial(one, str(folder / str(i)), [JsonLines(), TensorBoard(), *more.values()])
        for i, one in enumerate(numbers)
    ]


@pytest.mark.parametrize("make", [adam, with_states])
def test_each_leaves_what_it_leaves_alone(tmp_path, make):
    common = {"evaluations": [dataclasses.replace(e, at_start=True) for e in setup().evaluations]}
    planned_ = planned(tmp_path)
    outcomes, stopped_by = run_together(setup(**common), make, planned_, tmp_path / "all")
    assert stopped_by is None and outcomes[0].history[0]["round"] == 0
    for i, numbers in enumerate(NUMBERS):
        alone = tmp_path / f"alone {i}"
        result = setup(algorithm=make(numbers), observers=[JsonLines()], **common).run(alone)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
        jax.tree.map(close, outcomes[i].params, result.params)
        expected = json.loads((alone / "final.json").read_text())
        found = json.loads((tmp_path / str(i) / "final.json").read_text())
        assert found.keys() == expected.keys()
        assert found["evaluations"] == expected["evaluations"]
        for one, other in [
            *zip(found["history"], expected["history"], strict=True),
            *zip(lines(tmp_path / str(i)), lines(alone), strict=True),
        ]:
            assert one == pytest.approx(other, rel=1e-5)
        assert list((tmp_path / str(i)).rglob("*tfevents*"))
    assert outcomes[0].history != outcomes[1].history


class Breaking(Observer):
    """Ends the process after a round, as far as anybody can tell."""

    def round(self, report):
        if report.number == 5:
            raise InterruptedError


@pytest.mark.slow
def test_they_go_on_where_they_were(tmp_path):
    whole, _ = run_together(setup(), with_states, planned(tmp_path / "whole"), tmp_path / "all")
    with pytest.raises(InterruptedError):
        run_together(
            setup(), with_states, planned(tmp_path, it=Breaking()), tmp_path / "interrupted"
        )
    assert not (tmp_path / "0" / "final.json").exists()
    again, _ = run_together(setup(), with_states, planned(tmp_path), tmp_path / "interrupted")
    for number, (one, other) in enumerate(zip(again, whole, strict=True)):
        assert one.history == other.history
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
        assert lines(tmp_path / str(number)) == lines(tmp_path / "whole" / str(number))
    done, _ = run_together(setup(), with_states, planned(tmp_path), tmp_path / "interrupted")
    assert [one.history for one in done] == [one.history for one in whole]


def test_one_that_diverges_is_given_up(tmp_path):
    numbers = [NUMBERS[0], {"client": 1e30, "server": 0.1}, NUMBERS[2]]
    outcomes, _ = run_together(setup(), adam, planned(tmp_path, numbers), tmp_path / "all")
    assert outcomes[0].error is None and outcomes[2].error is None
    assert "diverged" in str(outcomes[1].error)
    assert not (tmp_path / "1" / "final.json").exists()
    assert json.loads((tmp_path / "1" / "status.json").read_text())["state"] == "failed"
    expected, _ = run_together(setup(), adam, [Trial(NUMBERS[0]), Trial(NUMBERS[2])])
    for one, other in zip(outcomes[0].history, expected[0].history, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    again, _ = run_together(setup(), adam, planned(tmp_path, numbers), tmp_path / "all")
    assert again[1].error is not None and again[0].history == outcomes[0].history


def compare_with_alone(outcome, seed, numbers, **changes):
    alone = setup(algorithm=adam(numbers), seed=seed, **changes).run(None)
    assert len(outcome.history) == len(alone.history)
    for one, other in zip(outcome.history, alone.history, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, outcome.params, alone.params)


# Poisson's cohorts need other shapes for one seed than for another.
@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(uniform(3), id="uniform"),
        pytest.param(poisson(2.0), id="poisson", marks=pytest.mark.slow),
    ],
)
def test_seeds_have_cohorts_and_evaluations_of_their_own(tmp_path, sampler):
    changes = {"sampler": sampler, "evaluations": [Evaluate(every=2, clients=2)]}
    each = [(seed, numbers) for seed in (3, 8) for numbers in NUMBERS[:2]]
    trials = [Trial(numbers, seed=seed) for seed, numbers in each]
    outcomes, _ = run_together(setup(**changes), adam, trials)
    for outcome, (seed, numbers) in zip(outcomes, each, strict=True):
        compare_with_alone(outcome, seed, numbers, **changes)
    assert outcomes[0].history != outcomes[2].history


@pytest.mark.slow
def test_trials_that_differ_in_the_seed_alone_go_on_where_they_were(tmp_path):
    trials = [Trial({}, seed=seed) for seed in (3, 8)]
    stopping = [trials[0]._replace(observers=[Breaking()]), trials[1]]
    make = lambda _: adam(NUMBERS[0])  # noqa: E731
    with pytest.raises(InterruptedError):
        run_together(setup(), make, stopping, tmp_path)
    outcomes, _ = run_together(setup(), make, trials, tmp_path)
    assert {row["round"] for row in outcomes[1].history} == {2, 3, 4, 6}
    for outcome, seed in zip(outcomes, (3, 8), strict=True):
        compare_with_alone(outcome, seed, NUMBERS[0])


def test_seeds_cannot_be_together_where_clients_have_states():
    trials = [Trial(NUMBERS[0], seed=seed) for seed in (3, 8)]
    with pytest.raises(UserError, match="states of clients"):
        run_together(setup(), with_states, trials)
    away = jit(Packing(max_resident_bytes=0))
    with pytest.raises(UserError, match="stay on the devices"):
        run_together(setup(strategy=away), adam, trials)


class Counting(Observer):
    """Asks for the end after some rounds."""

    def __init__(self):
        self.number = 0

    def round(self, report):
        self.number = report.number

    def has_enough(self):
        return self.number == 3


def test_one_that_is_stopped_leaves_the_others_alone(tmp_path):
    counting = Counting()
    trials = planned(tmp_path, NUMBERS[:2])
    trials[1] = trials[1]._replace(observers=[counting], is_stopped=counting.has_enough)
    outcomes, _ = run_together(setup(), adam, trials, tmp_path / "all")
    assert counting.number == 3 and outcomes[1].error is None
    assert {row["round"] for row in outcomes[1].history} == {2, 3}
    assert json.loads((tmp_path / "1" / "status.json").read_text())["state"] == "stopped"
    assert not (tmp_path / "1" / "final.json").exists()
    compare_with_alone(outcomes[0], 3, NUMBERS[0])
    # Once all have ended, there is nothing to go on for.
    enough = [one._replace(is_stopped=lambda: True) for one in planned(tmp_path / "none")]
    outcomes, _ = run_together(setup(), adam, enough)
    assert not any(outcome.history for outcome in outcomes)


@pytest.mark.slow
def test_devices_have_a_share_of_the_trials_each():
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.spread"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == [0, 0, 1, 1, 2, 2]
    # Five trials on three devices, two seeds: each as alone on one device.
    assert len(found["alone"]) == len(found["together"]) == 10
    for one, other in zip(found["together"], found["alone"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_what_cannot_be_done_together_is_refused():
    own = dataclasses.replace(Evaluate(), personalise=True)
    with pytest.raises(UserError, match="one by one"):
        run_together(setup(evaluations=[own]), adam, [Trial(NUMBERS[0])])
