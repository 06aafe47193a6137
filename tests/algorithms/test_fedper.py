"""Models of which only a part travels, against NumPy."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedper
from fedexp.algorithms.parts import merge, split
from fedexp.data import ClientBatching
from fedexp.engine import Engine, Packing, jit, mesh
from fedexp.errors import UserError
from fedexp.tasks import classification
from tests.support import linear
from tests.support.clients import COHORTS, batches, client_states, first, gradient, run, vector
from tests.support.normalised import Normalised, clients_of_other_scales

RATE = 0.05
STRATEGIES = [jit, lambda: jit(Packing(lanes=3))]


def reference(local: bool, frozen: bool) -> tuple[np.ndarray, np.ndarray]:
    """(travelling w and the server's b, every client's own b); b is local or frozen."""
    theta, own = first(), np.full(len(linear.SIZES), first()[3])
    for cohort in COHORTS:
        after = []
        for client in cohort:
            y = theta.copy()
            y[3] = own[client] if local else theta[3]
            for xb, yb in batches(client):
                g = gradient(xb, yb, y)
                g[3] = 0 if frozen else g[3]
                y -= RATE * g
            own[client] = y[3]
            after.append(y[:3])
        theta[:3] = np.average(after, axis=0, weights=[linear.SIZES[c] for c in cohort])
    return theta, own


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_local_stays_with_its_client(strategy):
    algorithm = fedper(linear.task(), optax.sgd(RATE), optax.sgd(1.0), local="^b$")
    engine, output = run(algorithm, strategy())
    theta, own = reference(local=True, frozen=False)
    np.testing.assert_allclose(vector(output.state.params), theta, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(client_states(engine).own["b"], own, rtol=1e-5, atol=1e-5)
    assert np.ptp(own) > 0.1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_frozen_is_neither_trained_nor_copied(strategy):
    algorithm = fedper(linear.task(), optax.sgd(RATE), optax.sgd(1.0), frozen="^b$")
    params = linear.task().init(jax.random.key(0), None)
    engine = Engine(
        strategy(),
        algorithm,
        linear.dataset(),
        ClientBatching(4, shuffle=False),
        params=params,
        cohort_size=4,
        seed=0,
    )
    state = engine.start(params)
    given = state.frozen["b"]
    for number, cohort in enumerate(COHORTS):
        state = engine.run(state, engine.prepare(number, np.array(cohort))).state
        assert state.frozen["b"] is given
    theta, _ = reference(local=False, frozen=True)
    np.testing.assert_allclose(vector(state.params), theta, rtol=1e-5, atol=1e-5)
    assert engine.client_states is None


@pytest.mark.parametrize("strategy", [jit, lambda: jit(Packing(lanes=3)), mesh])
def test_fedbn_keeps_normalisation_and_its_statistics_local(strategy):
    """Li et al. 2021: a client's statistics are those of its own inputs; nothing of them travels."""
    task, dataset = classification(Normalised(), num_classes=3), clients_of_other_scales()
    params = task.init(jax.random.key(0), dataset.slice(0, 1))
    algorithm = fedper(task, optax.sgd(0.01), optax.sgd(1.0), local="BatchNorm")
    engine = Engine(
        strategy(), algorithm, dataset, ClientBatching(4), params=params, cohort_size=4, seed=0
    )
    state = engine.start(params)
    for number in range(6):
        state = engine.run(state, engine.prepare(number, np.arange(4))).state
    everyone = np.arange(4)
    own = engine.client_states.gather(everyone, everyone, (4,)).own
    spread = np.asarray(own["batch_stats"]["BatchNorm_0"]["var"]).mean(axis=1)
    assert (spread[1:] > 3 * spread[:-1]).all()
    first_ones = params["batch_stats"]["BatchNorm_0"]["var"]
    np.testing.assert_array_equal(state.params["batch_stats"]["BatchNorm_0"]["var"], first_ones)
    moved = state.params["params"]["Dense_1"]["kernel"] - params["params"]["Dense_1"]["kernel"]
    assert np.abs(moved).max() > 1e-3


def test_parts_come_together_again():
    tree = {"body": {"kernel": 1, "bias": 2}, "head": {"kernel": 3}}
    parts = split(tree, local="head", frozen="bias")
    assert jax.tree.leaves(parts.travelling) == [1]
    assert jax.tree.leaves(parts.local) == [3]
    assert jax.tree.leaves(parts.frozen) == [2]
    assert merge(*parts) == tree


@pytest.mark.parametrize(
    ("local", "frozen", "message"),
    [
        ("haed", None, "'haed' matches none of the parameters; the parameters are b, w"),
        ("b", "b", "match the same parameters"),
        ("b|w", None, "none is left to travel"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(local, frozen, message):
    algorithm = fedper(linear.task(), optax.sgd(RATE), optax.sgd(1.0), local=local, frozen=frozen)
    with pytest.raises(UserError, match=message):
        run(algorithm)
