"""Canaries: an epsilon from below, under what the accountant says and above zero without noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm as normal

from fedexp.aggregators import canaries, clip_by_norm, gaussian_noise, mean
from fedexp.aggregators.canaries import direction, is_canary
from fedexp.algorithms import fedavg
from fedexp.auditing import audit, between_normals
from fedexp.data import ClientBatching, FederatedDataset, FederatedSplits, poisson
from fedexp.engine import jit
from fedexp.errors import UserError
from fedexp.privacy import Privacy
from fedexp.tasks import Measure, Task
from fedexp.trainer import Experiment

CLIENTS, SIZE, FRACTION, DELTA = 1200, 2000, 0.5, 1e-3


@pytest.fixture(scope="module")
def problem() -> tuple[FederatedSplits, Task]:
    rng = np.random.default_rng(0)
    clients = {
        f"c{i:03}": {
            "x": rng.normal(size=(1, 4)).astype(np.float32),
            "y": rng.normal(size=1).astype(np.float32),
        }
        for i in range(CLIENTS)
    }
    data = FederatedDataset.from_clients(clients)
    spread = jnp.asarray(rng.normal(size=(4, SIZE)), jnp.float32) / 50

    def apply(params, batch, key):
        return batch["x"] @ spread @ params["w"]

    def loss(outputs, batch):
        return Measure((outputs - batch["y"]) ** 2, jnp.ones_like(outputs))

    task = Task(lambda key, batch: {"w": jnp.zeros(SIZE)}, apply, loss, {})
    return FederatedSplits(data, data), task


def last_round(problem, multiplier: float):
    splits, task = problem
    links = [canaries(FRACTION, seed=3), clip_by_norm(1.0), gaussian_noise(multiplier, 1.0), mean()]
    algorithm = fedavg(task, optax.sgd(0.1), optax.sgd(1.0), aggregator=links)
    *_, last = Experiment(
        splits,
        task,
        algorithm,
        num_rounds=5,
        sampler=poisson(600),
        batching=ClientBatching(1),
        strategy=jit(),
        privacy=Privacy(delta=DELTA),
    ).rounds()
    return last


@pytest.mark.slow
def test_with_noise_it_is_below_what_the_accountant_says(problem):
    pytest.importorskip("dp_accounting")
    last = last_round(problem, 1.0)
    found = audit(last, FRACTION, 3, DELTA)
    assert 0 < found.epsilon < last.epsilon
    assert last.metrics["aggregate/canaries"] > 200
    noisier = last_round(problem, 20.0)
    assert audit(noisier, FRACTION, 3, DELTA).epsilon < found.epsilon


@pytest.mark.slow
def test_without_noise_it_is_far_above_zero(problem):
    last = last_round(problem, 0.0)
    found = audit(last, FRACTION, 3, DELTA)
    assert found.epsilon > 6 and found.cosines.mean() > 1.2 / np.sqrt(SIZE)
    # Directions that nobody has sent look like noise.
    others = audit(last, FRACTION, 4, DELTA)
    assert others.epsilon < 1 and abs(others.cosines.mean()) < 0.2 / np.sqrt(SIZE)
    with pytest.raises(UserError, match="two canaries or more, and there are 0"):
        audit(last, 0.0)


def test_between_normals_of_one_deviation_is_the_gaussian_mechanism():
    for distance in (0.5, 1.0, 4.0):
        epsilon = between_normals((0.0, 2.0), (2.0 * distance, 2.0), 1e-5)
        a, b = distance / 2, epsilon / distance
        left = normal.cdf(a - b) - np.exp(epsilon) * normal.cdf(-a - b)
        assert left == pytest.approx(1e-5, rel=0.01)
    assert between_normals((0.0, 1.0), (0.0, 1.0), 1e-9) == 0


def test_canaries_are_who_they_are_and_send_unit_vectors():
    clients = jnp.arange(4000)
    chosen = np.asarray(jax.vmap(lambda c: is_canary(c, 0.3, 1))(clients))
    assert abs(chosen.mean() - 0.3) < 4.5 * np.sqrt(0.21 / 4000)
    like = {"a": jnp.zeros((30, 20)), "b": jnp.zeros(400)}
    vectors = [
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(direction(like, c, 1))])
        for c in (0, 1)
    ]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert abs(vectors[0] @ vectors[1]) < 4.5 / np.sqrt(1000)
    with pytest.raises(UserError, match=r"canaries.fraction must be in \[0, 1\]"):
        canaries(1.5)
