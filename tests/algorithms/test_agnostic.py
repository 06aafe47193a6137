"""Agnostic federated averaging against Ro et al. 2021, Algorithm 1, in NumPy."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import agnostic
from fedexp.data import ClientBatching, FederatedDataset
from fedexp.engine import Engine, Packing, jit, mesh
from fedexp.errors import UserError
from tests.support import linear
from tests.support.clients import COHORTS, first, vector

RATE, DOMAIN_RATE, K = 0.05, 0.2, 3


def dataset() -> FederatedDataset:
    rng, clients = np.random.default_rng(1), {}
    for name, data in linear.dataset().clients():
        clients[name] = {**data, "domain": rng.integers(0, K, len(data["y"])).astype(np.int32)}
    return FederatedDataset.from_clients(clients)


def projected(point: np.ndarray) -> np.ndarray:
    """Onto the simplex, by bisection on the threshold (Held et al. 1974)."""
    low, high = point.min() - 1, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(point - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(point - low, 0)


def reference(update: str, window: int) -> tuple[np.ndarray, np.ndarray]:
    x, weights, counts = first(), np.full(K, 1 / K), [np.ones(K)] * window
    for cohort in COHORTS:
        alpha = weights / np.mean(counts, axis=0)
        ends, betas = [], []
        losses, examples = np.zeros(K), np.zeros(K)
        for client in cohort:
            data = dataset().client(client)
            rows = np.column_stack([data["x"].astype(float), np.ones(len(data["y"]))])
            targets, domains = data["y"].astype(float), np.eye(K)[data["domain"]]
            losses += (rows @ x - targets) ** 2 @ domains
            examples += domains.sum(axis=0)
            beta, y = (domains @ alpha).sum(), x.copy()
            for begin in range(0, len(targets), 4):
                part = slice(begin, begin + 4)
                residuals = rows[part] @ y - targets[part]
                y -= RATE * 2 * rows[part].T @ (residuals * (domains[part] @ alpha)) / beta
            ends.append(y)
            betas.append(beta)
        x = np.average(ends, axis=0, weights=betas)
        losses /= np.maximum(examples, 1)
        if update == "exponentiated":
            weights = weights * np.exp(DOMAIN_RATE * losses)
            weights /= weights.sum()
        elif update == "projected":
            weights = projected(weights + DOMAIN_RATE * losses)
        counts = [*counts[1:], examples]
    return x, weights


@pytest.mark.parametrize(
    ("strategy", "update", "window"),
    [
        (jit, "exponentiated", 1),
        (lambda: jit(Packing(lanes=3)), "exponentiated", 2),
        (lambda: mesh(Packing(lanes=2)), "projected", 2),
        (jit, "none", 1),
    ],
)
def test_three_rounds_equal_numpy(strategy, update, window):
    task = linear.task()
    params = task.init(jax.random.key(0), None)
    algorithm = agnostic(
        task,
        K,
        optax.sgd(RATE),
        optax.sgd(1.0),
        DOMAIN_RATE,
        update=update,
        window=window,
        full_batch_size=5,
    )
    engine = Engine(
        strategy(),
        algorithm,
        dataset(),
        ClientBatching(4, shuffle=False),
        params=params,
        cohort_size=4,
        seed=0,
    )
    state = engine.start(params)
    for number, cohort in enumerate(COHORTS):
        state = engine.run(state, engine.prepare(number, np.array(cohort))).state
    x, weights = reference(update, window)
    np.testing.assert_allclose(vector(state.params), x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.domain_weights, weights, rtol=1e-5, atol=1e-6)
    found = algorithm.report(jax.device_get(state), 3)
    assert found == {f"domains/{d}": pytest.approx(w, rel=1e-5) for d, w in enumerate(weights)}
    assert (np.ptp(weights) > 0.01) == (update != "none")


def test_an_unknown_update_is_refused():
    with pytest.raises(UserError, match="'exponentiated', 'projected' or 'none', got 'eg'"):
        agnostic(linear.task(), K, optax.sgd(0.1), optax.sgd(1.0), 0.1, update="eg")


@pytest.mark.parametrize(
    ("num_domains", "feature", "message"),
    [
        (
            2,
            "domain",
            r"'domain' must have ids in \[0, 2\), got 0 to 2; set agnostic.num_domains to fit",
        ),
        (3, "origin", "agnostic needs the features 'origin', the data set lacks 'origin'"),
        (3, "y", "feature 'y' must hold integers in 1 dimensions, got float32"),
    ],
)
def test_domains_that_have_no_weight_are_refused(num_domains, feature, message):
    task = linear.task()
    params = task.init(jax.random.key(0), None)
    sgd = optax.sgd(0.1)
    algorithm = agnostic(task, num_domains, sgd, sgd, DOMAIN_RATE, domain=feature)
    with pytest.raises(UserError, match=message):
        Engine(jit(), algorithm, dataset(), ClientBatching(), params=params, cohort_size=4, seed=0)
