"""Runs that end before their last round."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedavg
from fedexp.checkpointing import Checkpointer, CheckpointPlan
from fedexp.data import FederatedSplits, uniform
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.reporting import Observer
from fedexp.stopping import EarlyStopping
from fedexp.trainer import Experiment
from tests.support import linear

ROUNDS = 24
EVALUATIONS = (Evaluate(every=1, clients=3), Evaluate("train", every=0))


class Listener(Observer):
    def __init__(self):
        self.said = []

    def say(self, message):
        self.said.append(message)


def run(workdir=None, *, rounds=ROUNDS, listener=None, evaluations=EVALUATIONS, **options):
    options = {"checkpoints": CheckpointPlan(every=5), **options}
    return Experiment(
        FederatedSplits(linear.dataset(), linear.dataset(seed=1)),
        linear.task(),
        fedavg(linear.task(), optax.sgd(0.05), optax.adam(0.4)),
        rounds,
        uniform(4),
        evaluations=list(evaluations),
        observers=[listener or Listener()],
        **options,
    ).run(workdir)


def end_of(losses: list[float], patience: int, min_delta: float) -> tuple[int, int]:
    """The evaluation after which to stop, and the last one that improved; numbered from 1."""
    best, since = losses[0], 1
    for number, loss in enumerate(losses[1:], 2):
        if loss < best - min_delta:
            best, since = loss, number
        elif number - since == patience:
            return number, since
    raise AssertionError("it never stalls")


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """Of the sampled clients after each round but the last, which has one of all clients."""
    return [row["test/loss"] for row in run().history][:-1]


@pytest.mark.parametrize(("patience", "min_delta"), [(4, 0.0), (2, 1.0)])
def test_it_ends_when_the_metric_has_not_improved(losses, tmp_path, patience, min_delta):
    expected, since = end_of(losses, patience, min_delta)
    assert expected < ROUNDS - 1
    listener = Listener()
    result = run(tmp_path, listener=listener, stop=EarlyStopping(patience, min_delta))
    assert (result.rounds, result.stopped_by) == (expected, None)
    assert [row["test/loss"] for row in result.history[:-1]] == losses[: expected - 1]
    # The end is as of any run: all clients, and what is measured at the end only.
    assert result.metrics["test/loss"] != losses[expected - 1]
    assert "train_split/loss" in result.metrics
    final = json.loads((tmp_path / "final.json").read_text())
    assert final["rounds"] == expected
    assert final["history"] == result.history
    said, best = final["stopped_early"], losses[since - 1]
    assert f"early after round {expected}: " in said
    assert f"test/loss has not improved on {best:.6g}, of round {since}" in said
    assert listener.said[-1] == said
    checkpointer = Checkpointer(tmp_path / "checkpoints", best_metric="test/loss", best_mode="min")
    assert checkpointer.latest() == expected
    checkpointer.close()


def test_it_ends_when_the_metric_is_good_enough(losses):
    target = (losses[0] + min(losses)) / 2
    expected = next(number for number, loss in enumerate(losses, 1) if loss <= target)
    assert 1 < expected < len(losses)
    listener = Listener()
    result = run(listener=listener, stop=EarlyStopping(None, target=target))
    assert result.rounds == expected
    assert listener.said[-1].endswith(f"test/loss has reached {target:.6g}")


@pytest.mark.slow
def test_a_resumed_run_ends_where_one_in_one_piece_does(losses, tmp_path):
    stop = EarlyStopping(4)
    expected, _ = end_of(losses, 4, 0.0)
    whole = run(tmp_path / "whole", stop=stop)
    run(tmp_path / "parts", stop=stop, rounds=expected - 2)
    parts = run(tmp_path / "parts", stop=stop)
    # The last evaluation of the shorter run was of all clients.
    assert parts.rounds == whole.rounds == expected
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert parts.metrics == whole.metrics
    listener = Listener()
    again = run(tmp_path / "whole", stop=stop, listener=listener)
    assert (again.rounds, again.history) == (expected, whole.history)
    assert "stopped early" in listener.said[-1]
    # With more patience it goes on.
    assert run(tmp_path / "whole", stop=EarlyStopping(9)).rounds > expected


def test_a_run_that_does_not_stall_has_all_its_rounds(tmp_path):
    result = run(tmp_path, stop=EarlyStopping(ROUNDS))
    assert result.rounds == ROUNDS
    assert "stopped_early" not in json.loads((tmp_path / "final.json").read_text())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EarlyStopping(0), "early_stopping.patience must be a whole number, at least 1"),
        (lambda: EarlyStopping(2.5), "early_stopping.patience must be a whole number"),
        (lambda: EarlyStopping(None), "early_stopping needs a patience or a target"),
        (lambda: EarlyStopping(2, -1.0), "early_stopping.min_delta must be at least 0"),
        (lambda: EarlyStopping(2, float("nan")), "early_stopping.min_delta must be at least 0"),
        (
            lambda: run(stop=EarlyStopping(), checkpoints=CheckpointPlan(best_metric=None)),
            "train.stop watches CheckpointPlan.best_metric, and there is none",
        ),
        (
            lambda: run(stop=EarlyStopping(), evaluations=[Evaluate(every=0)]),
            "train.stop watches test/loss, which is measured at the end only",
        ),
    ],
)
def test_stopping_that_cannot_be_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
