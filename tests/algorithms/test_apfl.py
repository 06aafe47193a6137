"""APFL against Deng et al. 2020, Algorithm 1, in NumPy, and the evaluation of its mixtures."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import apfl
from fedexp.data import ClientBatching, FederatedSplits, fixed
from fedexp.engine import Engine, Packing, jit
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.tasks import classification
from fedexp.trainer import Experiment
from tests.support import linear
from tests.support.clients import (
    COHORTS,
    batches,
    client_states,
    first,
    gradient,
    run,
    vector,
)
from tests.support.normalised import Normalised, clients_of_other_scales

RATE, ALPHA_RATE, ALPHA = 0.05, 0.02, 0.3


def reference(per_layer: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(w, every client's v, its alpha of each entry) after the cohorts; clients weighed by examples."""
    w = first()
    v = np.tile(w, (len(linear.SIZES), 1))
    alpha = np.full_like(v, ALPHA)
    for cohort in COHORTS:
        after, weights = [], []
        for client in cohort:
            local = w.copy()
            for x, y in batches(client):
                mixed = gradient(x, y, alpha[client] * v[client] + (1 - alpha[client]) * local)
                slope = (v[client] - local) * mixed
                layers = [[0, 1, 2], [3]] if per_layer else [[0, 1, 2, 3]]
                for layer in layers:
                    slope[layer] = slope[layer].sum()
                own = gradient(x, y, local)
                v[client] = v[client] - RATE * alpha[client] * mixed
                alpha[client] = np.clip(alpha[client] - ALPHA_RATE * slope, 0, 1)
                local -= RATE * own
            after.append(local)
            weights.append(linear.SIZES[client])
        w = np.average(after, axis=0, weights=weights)
    return w, v, alpha


def algorithm(per_layer: bool = False):
    sgd = optax.sgd(RATE)
    return apfl(linear.task(), sgd, optax.sgd(1.0), ALPHA, ALPHA_RATE, per_layer)


@pytest.mark.parametrize(
    ("strategy", "per_layer"), [(jit, False), (lambda: jit(Packing(lanes=3)), True)]
)
def test_three_rounds_equal_numpy(strategy, per_layer):
    engine, output = run(algorithm(per_layer), strategy())
    w, v, alpha = reference(per_layer)
    assert not np.allclose(alpha, ALPHA)
    np.testing.assert_allclose(vector(output.state.params), w, rtol=1e-5, atol=1e-5)
    states = client_states(engine).own
    np.testing.assert_allclose(states["v"]["w"], v[:, :3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(states["v"]["b"], v[:, 3], rtol=1e-4, atol=1e-5)
    found = states["alpha"] if per_layer else {"w": states["alpha"], "b": states["alpha"]}
    np.testing.assert_allclose(found["w"], alpha[:, 0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["b"], alpha[:, 3], rtol=1e-4, atol=1e-6)
    assert np.allclose(found["w"], found["b"]) != per_layer


def test_personalised_evaluation_measures_each_client_with_its_mixture():
    start = linear.task().init(jax.random.key(0), None)
    result = Experiment(
        FederatedSplits(linear.dataset(), linear.dataset(seed=1)),
        dataclasses.replace(linear.task(), init=lambda key, batch: start),
        algorithm(),
        num_rounds=3,
        sampler=fixed(COHORTS),
        batching=ClientBatching(4, shuffle=False),
        evaluations=[Evaluate(), Evaluate(personalise=True)],
        observers=[],
    ).run()
    w, v, alpha = reference()
    squares = [], []
    for client in range(len(linear.SIZES)):
        data = linear.dataset(seed=1).client(client)
        x = np.column_stack([data["x"], np.ones(len(data["y"]))])
        for into, theta in zip(
            squares, (w, alpha[client] * v[client] + (1 - alpha[client]) * w), strict=True
        ):
            into.extend((x @ theta - data["y"]) ** 2)
    assert result.metrics["test/loss"] == pytest.approx(np.mean(squares[0]), rel=1e-4)
    assert result.metrics["test_personal/loss"] == pytest.approx(np.mean(squares[1]), rel=1e-4)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_an_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(UserError, match=r"apfl.alpha must be in \[0, 1\]"):
        apfl(linear.task(), optax.sgd(0.1), optax.sgd(1.0), alpha)


def test_the_local_model_s_statistics_are_those_of_the_client_s_own_mixture():
    task, dataset = classification(Normalised(), num_classes=3), clients_of_other_scales()
    params = task.init(jax.random.key(0), dataset.slice(0, 1))
    engine = Engine(
        jit(Packing(lanes=3)),
        apfl(task, optax.sgd(0.0), optax.sgd(1.0)),
        dataset,
        ClientBatching(16),
        params=params,
        cohort_size=4,
        seed=0,
    )
    state = engine.run(engine.start(params), engine.prepare(0, np.arange(4))).state
    layer, everyone = params["params"]["Dense_0"], np.arange(4)
    own = engine.client_states.gather(everyone, everyone, (4,)).own
    hidden = [dataset.client(c)["x"] @ layer["kernel"] + layer["bias"] for c in everyone]
    expected = [(1 + h.var(0)) / 2 for h in hidden]
    np.testing.assert_allclose(own["batch_stats"]["BatchNorm_0"]["var"], expected, rtol=1e-4)
    mean = state.params["batch_stats"]["BatchNorm_0"]["var"]
    np.testing.assert_allclose(mean, np.mean(expected, axis=0), rtol=1e-4)
