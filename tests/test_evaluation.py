"""Evaluation against NumPy over the whole set at once."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from fedexp import evaluators
from fedexp.algorithms import fedavg
from fedexp.data import FederatedDataset, FederatedSplits, uniform
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate, Evaluator
from fedexp.session import Session, Setup
from fedexp.tasks import classification
from tests.support import linear

NUM_CLASSES = 4


def classes_by_client(sizes=(5, 1, 12, 3)) -> FederatedDataset:
    rng = np.random.default_rng(0)
    return FederatedDataset.from_clients(
        {
            f"c{i}": {
                "x": rng.normal(size=(size, 6)).astype(np.float32),
                "y": rng.integers(0, NUM_CLASSES, size).astype(np.int32),
            }
            for i, size in enumerate(sizes)
        }
    )


# An example has 28 bytes.
@pytest.mark.parametrize(
    ("batch_size", "bytes_at_once", "chunks"),
    [(1, 60, 11), (4, 1, 6), (4, 260, 3), (4, 10**6, 1), (7, 450, 2), (500, 10**6, 1)],
)
def test_metrics_per_client_and_confusion_equal_numpy(
    batch_size, bytes_at_once, chunks, monkeypatch
):
    monkeypatch.setattr(evaluators, "_CHUNK_BYTES", bytes_at_once)
    dataset = classes_by_client()
    task = classification(nn.Dense(NUM_CLASSES), num_classes=NUM_CLASSES)
    params = task.init(jax.random.key(1), dataset.slice(0, 1))
    evaluator = Evaluator(task, dataset, batch_size)
    assert evaluator.num_chunks == chunks
    evaluator(jax.tree.map(np.zeros_like, params))  # Which leaves nothing behind.
    result = evaluator(params)

    x, y = dataset.features["x"].astype(float), dataset.features["y"]
    logits = x @ np.asarray(params["kernel"], float) + np.asarray(params["bias"], float)
    loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
    correct = logits.argmax(axis=1) == y
    assert result.metrics["loss"] == pytest.approx(loss.mean(), rel=1e-5)
    assert result.metrics["accuracy"] == pytest.approx(correct.mean(), rel=1e-6)
    for i in range(dataset.num_clients):
        own = slice(dataset.offsets[i], dataset.offsets[i + 1])
        assert result.per_client["accuracy"][i] == pytest.approx(correct[own].mean(), rel=1e-6)
        assert result.per_client["loss"][i] == pytest.approx(loss[own].mean(), rel=1e-5)
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    np.add.at(confusion, (y, logits.argmax(axis=1)), 1)
    np.testing.assert_array_equal(result.confusion, confusion)


def test_tasks_without_classes_have_no_confusion():
    task = linear.task()
    params = task.init(jax.random.key(0), None)
    assert Evaluator(task, linear.dataset())(params).confusion is None


def test_a_sample_of_clients_is_the_same_every_time():
    def losses(clients, full):
        task = linear.task()
        setup = Setup(
            FederatedSplits(linear.dataset(), linear.dataset(seed=1)),
            task,
            fedavg(task, optax.sgd(0.1), optax.sgd(1.0)),
            sampler=uniform(3),
            evaluations=[Evaluate(clients=clients)],
            seed=4,
        )
        session = Session(setup)
        return session.evaluate(session.first, [0], full)["test"].per_client["loss"]

    first, second, everyone = losses(3, False), losses(3, False), losses(None, False)
    assert first.shape == (3,)
    np.testing.assert_array_equal(first, second)
    assert np.isin(first, everyone).all()
    for clients, full in ((99, False), (3, True)):
        np.testing.assert_array_equal(losses(clients, full), everyone)


def test_what_nothing_has_weight_in_is_left_out():
    """As after an empty cohort: a loss of 0 would be the best of all."""
    splits = FederatedSplits(linear.dataset(), linear.dataset(seed=1))
    task = linear.task()
    task = dataclasses.replace(task, derived={"root": lambda means: means["loss"] ** 0.5})
    algorithm = fedavg(task, optax.sgd(0.1), optax.sgd(1.0))
    plan = Evaluate("train", clients="cohort")
    session = Session(Setup(splits, task, algorithm, sampler=uniform(3), evaluations=[plan]))
    assert session.first.prepared is None
    nobody = session.evaluate(session.first, [0], True)[plan.name]
    assert nobody.metrics == {}
    assert {name: len(values) for name, values in nobody.per_client.items()} == {
        name: 0 for name in ("loss", "mae", "root")
    }
    first = next(session.rounds(session.first))
    assert session.evaluate(first, [0], True)[plan.name].metrics.keys() == {"loss", "mae", "root"}


@pytest.mark.parametrize(
    "field",
    [
        {"every": -1},
        {"batch_size": 0},
        {"clients": 0},
        {"clients": "everybody"},
        {"split": "training"},
    ],
)
def test_plans_out_of_range_are_refused(field):
    with pytest.raises(UserError, match=next(iter(field))):
        Evaluate(**field)
