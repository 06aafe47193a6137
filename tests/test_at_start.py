"""Evaluations of the initial parameters, as round 0."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedavg
from fedexp.checkpointing import Checkpointer, CheckpointPlan
from fedexp.data import uniform
from fedexp.evaluation import Evaluate
from fedexp.plots import curves
from fedexp.reporting import JsonLines, Observer, TensorBoard
from fedexp.session import Session
from fedexp.trainer import Experiment
from tests.support import linear
from tests.test_trainer import shown_scalars

TASK = linear.task()
ALGORITHM = fedavg(TASK, optax.sgd(0.05), optax.sgd(1.0))


def experiment(*more: Observer, at_start: bool = True, num_rounds: int = 2) -> Experiment:
    evaluations = [
        Evaluate(every=1, at_start=at_start, percentiles=[10]),
        Evaluate(split="train", every=1, clients="cohort", at_start=at_start),
    ]
    return Experiment(
        linear.splits(),
        TASK,
        ALGORITHM,
        num_rounds,
        uniform(3),
        evaluations=evaluations,
        checkpoints=CheckpointPlan(every=1, best_metric="test/mae"),
        observers=[TensorBoard(), JsonLines(), *more],
    )


def go(workdir, *more: Observer, **options):
    return experiment(*more, **options).run(workdir)


def lines(workdir):
    found = [json.loads(line) for line in (workdir / "rounds.jsonl").open()]
    return [{k: v for k, v in one.items() if not k.startswith("perf/")} for one in found]


def error(params):
    test = linear.splits().test.features
    return np.abs(test["x"] @ np.asarray(params["w"]) + np.asarray(params["b"]) - test["y"]).mean()


def test_initial_parameters_are_measured_and_nothing_else_changes(tmp_path):
    result, without = go(tmp_path / "with"), go(tmp_path / "without", at_start=False)
    first, *rest = result.history
    assert first["test/mae"] == pytest.approx(error(Session(experiment()).params), rel=1e-5)
    assert first["round"] == 0 and not any(name.startswith("train") for name in first)
    assert "test/mae/p10" in first
    jax.tree.map(np.testing.assert_array_equal, result.params, without.params)
    assert rest == without.history
    (at,) = curves([str(tmp_path / "with")], "round", "test/mae").values()
    assert at.x.tolist() == [row["round"] for row in result.history]
    assert at.mean.tolist() == [row["test/mae"] for row in result.history]
    shown = shown_scalars(tmp_path / "with")
    key = next(key for key in shown if str(key[0]) == "test" and key[1] == "mae")
    assert [step for step, _ in shown[key]] == [0, 1, 2]
    assert lines(tmp_path / "with")[0] == first


class Breaking(Observer):
    def round(self, report):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("before a checkpoint", marks=pytest.mark.slow),
        "in the first round's evaluation",
    ],
)
def test_it_is_told_once_where_a_run_goes_on(tmp_path, monkeypatch, moment):
    def cut(*args):
        raise KeyboardInterrupt

    whole = go(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "before a checkpoint":
            go(tmp_path / "parts", Breaking())
        patch.setattr(Checkpointer, "add", cut)
        go(tmp_path / "parts")
    parts = go(tmp_path / "parts")
    assert parts.history == whole.history
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    shown, expected = shown_scalars(tmp_path / "parts"), shown_scalars(tmp_path / "whole")
    assert shown.keys() == expected.keys()
    for tag, values in expected.items():
        np.testing.assert_equal(shown[tag], values)
