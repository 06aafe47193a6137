"""SCAFFOLD, both options, against Karimireddy et al. 2020, Algorithm 1, in NumPy."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import scaffold
from fedexp.data.batching import ClientBatching
from fedexp.errors import UserError
from fedexp.strategies import Runner, debug, jit
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


@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("strategy", [debug(), jit(1), jit(2), jit(4)])
def test_four_rounds_equal_numpy(option, strategy):
    task = linear.task()
    algorithm = scaffold(task, CLIENT_LR, optax.sgd(SERVER_LR), option=option)
    params = task.init(jax.random.key(0), None)
    runner = Runner(
        strategy,
        algorithm,
        linear.dataset(),
        ClientBatching(BATCH_SIZE, shuffle=False),
        params=params,
        cohort_size=3,
        seed=0,
    )
    state = runner.start(params)
    for number, cohort in enumerate(COHORTS):
        state = runner.run(state, runner.prepare(number, cohort)).server_state

    theta, server_control, controls = reference(option)
    np.testing.assert_allclose(state.params["w"], theta[:-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.params["b"], theta[-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.control["w"], server_control[:-1], rtol=1e-5, atol=1e-5)
    everyone = np.arange(len(linear.SIZES))
    states = runner.client_states.gather(everyone, everyone, (len(everyone),))
    np.testing.assert_allclose(states["w"], controls[:, :-1], rtol=1e-4, atol=1e-5)


def test_unknown_option_is_refused():
    with pytest.raises(UserError, match="option must be 1 or 2, got 3"):
        scaffold(linear.task(), 0.1, option=3)


def test_negative_learning_rate_is_refused():
    with pytest.raises(UserError, match="client_learning_rate must be positive, got -0.1"):
        scaffold(linear.task(), -0.1)
