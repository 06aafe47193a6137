"""SCAFFOLD, both options, against Karimireddy et al. 2020, Algorithm 1, in NumPy."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import scaffold
from fedexp.data.batching import ClientBatching
from fedexp.engine import Engine, Packing, debug, jit
from fedexp.errors import UserError
from tests.support import linear

COHORTS = [np.array([0, 2, 3]), np.array([2, 3, 6]), np.array([0, 3, 5]), np.array([0, 2, 6])]
BATCH_SIZE, CLIENT_LR, SERVER_LR = 4, 0.05, 0.8


def design(client):
    data = linear.dataset().client(client)
    x = np.column_stack([data["x"].astype(float), np.ones(len(data["y"]))])
    return x, data["y"].astype(float)


def gradient(x, y, theta):
    return 2 * x.T @ (x @ theta - y) / len(y)


def reference(option):
    first = linear.task().init(jax.random.key(0), None)
    theta = np.concatenate([np.asarray(first["w"], np.float64), [0.0]])
    population = len(linear.SIZES)
    server_control = np.zeros_like(theta)
    controls = np.zeros((population, len(theta)))
    for cohort in COHORTS:
        updates, changes = [], []
        for client in cohort:
            x, y = design(client)
            local, steps = theta.copy(), 0
            for begin in range(0, len(y), BATCH_SIZE):
                batch = slice(begin, begin + BATCH_SIZE)
                direction = gradient(x[batch], y[batch], local)
                local -= CLIENT_LR * (direction - controls[client] + server_control)
                steps += 1
            if option == 1:
                renewed = gradient(x, y, theta)
            else:
                drift = (theta - local) / (steps * CLIENT_LR)
                renewed = controls[client] - server_control + drift
            updates.append(local - theta)
            changes.append(renewed - controls[client])
            controls[client] = renewed
        theta = theta + SERVER_LR * np.mean(updates, axis=0)
        server_control = server_control + len(cohort) / population * np.mean(changes, axis=0)
    return theta, server_control, controls


def run(strategy, option, batching):
    """The server's state after the cohorts, and every client's control variate."""
    task = linear.task()
    algorithm = scaffold(task, CLIENT_LR, optax.sgd(SERVER_LR), option=option, full_batch_size=5)
    params = task.init(jax.random.key(0), None)
    engine = Engine(
        strategy, algorithm, linear.dataset(), batching, params=params, cohort_size=3, seed=0
    )
    state, before = engine.start(params), []
    for number, cohort in enumerate(COHORTS):
        before.append(jax.device_get(state.params))
        state = engine.run(state, engine.prepare(number, cohort)).state
    everyone = np.arange(len(linear.SIZES))
    states = engine.client_states.gather(everyone, everyone, (len(everyone),))
    return state, states.own.old, before


@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("strategy", [debug(), *(jit(Packing(lanes=lanes)) for lanes in (1, 2, 4))])
def test_four_rounds_equal_numpy(option, strategy):
    state, found, _ = run(strategy, option, ClientBatching(BATCH_SIZE, shuffle=False))
    theta, server_control, controls = reference(option)
    np.testing.assert_allclose(state.params["w"], theta[:-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.params["b"], theta[-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.control["w"], server_control[:-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["w"], controls[:, :-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", [debug(), jit(Packing(lanes=2))])
@pytest.mark.parametrize(
    "batching",
    [
        ClientBatching(BATCH_SIZE, local_steps=3),
        ClientBatching(BATCH_SIZE, remainder="drop"),
        ClientBatching(BATCH_SIZE, remainder="fill"),
        ClientBatching(BATCH_SIZE, local_epochs=3),
    ],
)
def test_option_1_takes_every_example_once_whatever_the_local_steps(batching, strategy):
    state, found, before = run(strategy, 1, batching)
    last_round = {client: round_ for round_, cohort in enumerate(COHORTS) for client in cohort}
    expected = np.zeros((len(linear.SIZES), linear.DIMENSION + 1))
    for client, round_ in last_round.items():
        params = before[round_]
        expected[client] = gradient(*design(client), np.append(params["w"], params["b"]))
    np.testing.assert_allclose(found["w"], expected[:, :-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["b"], expected[:, -1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.control["w"], expected[:, :-1].mean(0), rtol=1e-4, atol=1e-5)


def test_option_1_goes_no_further_than_max_examples():
    _, found, before = run(jit(), 1, ClientBatching(BATCH_SIZE, max_examples=6))
    x, y = design(3)
    params = before[2]  # The last round with client 3.
    expected = gradient(x[:6], y[:6], np.append(params["w"], params["b"]))
    np.testing.assert_allclose(found["w"][3], expected[:-1], rtol=1e-4, atol=1e-5)


def test_unknown_option_is_refused():
    with pytest.raises(UserError, match="option must be 1 or 2, got 3"):
        scaffold(linear.task(), 0.1, option=3)


def test_negative_learning_rate_is_refused():
    with pytest.raises(UserError, match="client_learning_rate must be positive, got -0.1"):
        scaffold(linear.task(), -0.1)
