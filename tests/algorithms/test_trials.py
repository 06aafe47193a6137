"""Trials in one program have the numbers that they have alone."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import apfl, fedavg, mime, optimizers, scaffold
from fedexp.algorithms.trials import trial, trials
from fedexp.data import ClientBatching, FederatedSplits, fixed
from fedexp.engine import Packing, jit, mesh
from fedexp.evaluation import Evaluate
from fedexp.trainer import Experiment
from tests.support import linear
from tests.support.clients import COHORTS

RATES = np.array([0.01, 0.03, 0.05], np.float32)
START = linear.task().init(jax.random.key(0), None)
TASK = dataclasses.replace(linear.task(), init=lambda key, batch: START)
ALGORITHMS = {
    "fedadam": lambda rate: fedavg(TASK, optax.sgd(rate), optimizers.adam(rate)),
    "scaffold": lambda rate: scaffold(TASK, rate),
    "apfl": lambda rate: apfl(TASK, optax.sgd(rate), optax.sgd(1.0), rate, rate),
    "mime": lambda rate: mime(TASK, optax.sgd(rate, momentum=0.5)),
}


def experiment(algorithm, strategy, evaluations):
    return Experiment(
        FederatedSplits(linear.dataset(), linear.dataset(seed=1)),
        TASK,
        algorithm,
        num_rounds=3,
        sampler=fixed(COHORTS),
        batching=ClientBatching(4),
        strategy=strategy,
        evaluations=evaluations,
        observers=[],
    )


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("fedadam", jit),
        ("mime", mesh),
        ("scaffold", lambda: mesh(Packing(lanes=3))),
        ("apfl", lambda: jit(Packing(lanes=3))),
    ],
)
def test_trials_together_are_trials_alone(name, strategy):
    make = ALGORITHMS[name]
    evaluations = [Evaluate(prefix=f"trial{i}", personalise=trial(i)) for i in range(len(RATES))]
    together = experiment(trials(make, RATES), strategy(), evaluations)
    *_, last = together.rounds()
    results, losses = last.evaluate(), []
    for i, rate in enumerate(RATES):
        *_, alone = experiment(make(float(rate)), strategy(), [Evaluate()]).rounds()
        close = lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)  # noqa: E731
        jax.tree.map(close, last.params, alone.params)
        losses.append(alone.metrics["train/loss"])
        assert last.metrics[f"train/loss/{i}"] == pytest.approx(losses[-1], rel=1e-5)
        np.testing.assert_allclose(
            last.per_client[f"clients/loss/{i}"], alone.per_client["clients/loss"], rtol=1e-5
        )
        test_loss = alone.evaluate()["test/loss"]
        assert results[f"trial{i}/loss"] == pytest.approx(test_loss, rel=1e-5)
    assert np.ptp(losses) > 1e-3
