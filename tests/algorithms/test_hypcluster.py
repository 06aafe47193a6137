"""HypCluster against Mansour et al. 2020 in NumPy, and the evaluation of what clients choose."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import hypcluster
from fedexp.data import ClientBatching, FederatedDataset, FederatedSplits, fixed
from fedexp.engine import Packing, jit, mesh
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.trainer import Experiment
from tests.support import linear
from tests.support.clients import COHORTS, batches, design, first, gradient, run

RATE, K = 0.03, 3


def models_of(state) -> np.ndarray:
    return np.column_stack([state.models["w"], state.models["b"]]).astype(float)


@pytest.mark.parametrize("strategy", [jit, lambda: jit(Packing(lanes=3)), mesh])
def test_three_rounds_equal_numpy(strategy):
    algorithm = hypcluster(linear.task(), K, optax.sgd(RATE), optax.sgd(1.0), full_batch_size=5)
    engine, output = run(algorithm, strategy())
    models = models_of(engine.start(linear.task().init(jax.random.key(0), None)))
    np.testing.assert_allclose(models[0], first(), rtol=1e-6)
    np.testing.assert_allclose(np.sort(models), np.sort(models[[0, 0, 0]]), rtol=1e-6)  # Shuffled.
    assert np.ptp(models, axis=0).max() > 0.1
    for cohort in COHORTS:
        choices, ends = [], []
        for client in cohort:
            inputs, targets = design(client)
            losses = [np.mean((inputs @ model - targets) ** 2) for model in models]
            choices.append(int(np.argmin(losses)))
            y = models[choices[-1]].copy()
            for xb, yb in batches(client):
                y -= RATE * gradient(xb, yb, y)
            ends.append(y)
        sizes = np.array([linear.SIZES[c] for c in cohort])
        for number in set(choices):
            mine = np.array(choices) == number
            models[number] = np.average(np.array(ends)[mine], axis=0, weights=sizes[mine])
    np.testing.assert_allclose(models_of(output.state), models, rtol=1e-5, atol=1e-5)
    shares = [sizes[np.array(choices) == number].sum() / sizes.sum() for number in range(K)]
    found = [output.metrics[f"clusters/{number}"] for number in range(K)]
    np.testing.assert_allclose(found, shares, rtol=1e-6)


def test_two_kinds_of_clients_find_a_model_each():
    rng, clients = np.random.default_rng(0), {}
    for number in range(8):
        x = rng.normal(size=(20, 3)).astype(np.float32)
        true = np.array([2.0, -1.0, 0.5]) * (1 if number % 2 else -1)
        clients[f"client{number}"] = {"x": x, "y": (x @ true).astype(np.float32)}
    dataset = FederatedDataset.from_clients(clients)
    result = Experiment(
        FederatedSplits(dataset, dataset),
        linear.task(),
        hypcluster(linear.task(), 2, optax.sgd(0.1), optax.sgd(1.0)),
        num_rounds=10,
        sampler=fixed([range(8)]),
        batching=ClientBatching(4),
        evaluations=[Evaluate(), Evaluate(personalise=True)],
        observers=[],
    ).run()
    assert result.metrics["test_personal/loss"] < 1e-4 < 1 < result.metrics["test/loss"]


def trained_alone(client: int) -> np.ndarray:
    y = first()
    for xb, yb in batches(client):
        y -= RATE * gradient(xb, yb, y)
    return y


def test_models_start_far_apart_in_the_first_round_alone():
    """The greatest loss under the best model so far is the next client's to start one."""
    still = optax.sgd(RATE), optax.sgd(0.0)
    algorithm = hypcluster(linear.task(), K, *still, "kmeans++", full_batch_size=5)
    _, output = run(algorithm, jit(Packing(lanes=3)))
    models = models_of(output.state)
    candidates = np.array([trained_alone(client) for client in COHORTS[0]])
    chosen = [int(np.argmin(np.abs(candidates - models[0]).sum(axis=1)))]
    losses = np.full(len(candidates), np.inf)
    for _ in range(K - 1):
        for number, client in enumerate(COHORTS[0]):
            inputs, targets = design(client)
            loss = np.mean((inputs @ candidates[chosen[-1]] - targets) ** 2)
            losses[number] = min(losses[number], loss)
        losses[chosen] = -np.inf
        chosen.append(int(np.argmax(losses)))
    np.testing.assert_allclose(models, candidates[chosen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, "shuffled"), "num_clusters is 8, but there are 7 clients to cluster; lower it"),
        ((5, "kmeans++"), "takes 5 models from the clients of the first cohort, but .* draws 4"),
        ((2, "k-means"), "hypcluster.start must be 'shuffled' or 'kmeans\\+\\+', got 'k-means'"),
        ((0, "shuffled"), "num_clusters must be at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    number, start = arguments
    with pytest.raises(UserError, match=message):
        run(hypcluster(linear.task(), number, optax.sgd(0.1), optax.sgd(1.0), start))
