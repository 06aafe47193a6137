"""Several rounds in one dispatch are the rounds that they would be one by one."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedavg, fedper, scaffold
from fedexp.data import ClientBatching, FederatedSplits, uniform
from fedexp.engine import Packing, jit
from fedexp.errors import UserError
from fedexp.several import several
from fedexp.trainer import Experiment
from tests.support import linear

TASK = linear.task()
ALGORITHMS = {
    "fedavg": fedavg(TASK, optax.sgd(0.03), optax.adam(0.1)),
    "states of clients": scaffold(TASK, 0.03),
    "what is local": fedper(TASK, optax.sgd(0.03), optax.sgd(1.0), local="^b$"),
    "what is frozen": fedper(TASK, optax.sgd(0.03), optax.sgd(1.0), frozen="^b$"),
}


def experiment(algorithm, strategy=None, num_rounds=7):
    return Experiment(
        FederatedSplits(linear.dataset(), linear.dataset(seed=1)),
        TASK,
        algorithm,
        num_rounds,
        uniform(3),
        batching=ClientBatching(4),
        strategy=strategy or jit(Packing(lanes=2)),
        observers=[],
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_they_equal_rounds_one_by_one(name):
    alone, losses = experiment(ALGORITHMS[name]), []
    for last in alone.rounds():
        losses.append(last.metrics["train/loss"])
    numbers, found = [], []
    for dispatch in several(alone, 3):
        numbers.append(dispatch.number)
        found.extend(dispatch.metrics["train/loss"])
        last_seen = dispatch
        if dispatch.number == 6:
            break
    for dispatch in several(alone, 3, after=last_seen):
        numbers.append(dispatch.number)
        found.extend(dispatch.metrics["train/loss"])
    assert numbers == [3, 6, 7]
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, dispatch.params, last.params)
    assert dispatch.evaluate() == pytest.approx(last.evaluate(), rel=1e-5)
    assert dispatch.per_client["clients/loss"] == pytest.approx(last.per_client["clients/loss"])
    states = [r.session.engine.client_states for r in (dispatch, last)]
    if states[0] is not None:
        jax.tree.map(close, *(one.save() for one in states))
        assert len(states[0].save()["clients"]) > 3


@pytest.mark.parametrize(
    ("strategy", "per_dispatch", "message"),
    [
        (jit(), 0, "at least one round, got per_dispatch=0"),
        (jit(Packing(max_resident_bytes=0)), 2, "a single device that holds all data"),
    ],
)
def test_what_cannot_be_is_refused(strategy, per_dispatch, message):
    with pytest.raises(UserError, match=message):
        list(several(experiment(ALGORITHMS["fedavg"], strategy), per_dispatch))
