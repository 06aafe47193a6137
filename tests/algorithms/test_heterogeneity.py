"""Algorithms for clients that differ, against their papers in NumPy."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import ditto, feddyn, fednova, q_fedavg
from fedexp.data import ClientBatching
from fedexp.engine import Packing, jit
from fedexp.errors import UserError
from tests.support import linear
from tests.support.clients import (
    COHORTS,
    batches,
    client_states,
    design,
    first,
    gradient,
    run,
    vector,
)

RATE, CLIENTS = 0.03, len(linear.SIZES)
STRATEGIES = [jit, lambda: jit(Packing(lanes=3))]
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731


def trained(
    client: int, start: np.ndarray, momentum: float = 0.0
) -> tuple[np.ndarray, list[float]]:
    """A client's parameters after its local steps, and what each of these weighs its gradient by."""
    y, velocity, weights = start.copy(), np.zeros(4), []
    for xb, yb in batches(client):
        velocity = momentum * velocity + gradient(xb, yb, y)
        y -= RATE * velocity
        weights = [
            w + momentum**age for age, w in zip(range(len(weights), 0, -1), weights, strict=True)
        ]
        weights.append(1.0)
    return y, weights


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("momentum", [None, 0.7])
def test_fednova(strategy, momentum):
    """Wang et al. 2020, Equation 10: x moves by -tau_eff sum_i p_i eta d_i, d_i = G_i a_i / |a_i|_1."""
    x = first()
    for cohort in COHORTS:
        share = np.array([linear.SIZES[c] for c in cohort]) / sum(linear.SIZES[c] for c in cohort)
        ends, weights = zip(*(trained(c, x, momentum or 0.0) for c in cohort), strict=True)
        norms = np.array([sum(w) for w in weights])
        directions = np.array([(y - x) / norm for y, norm in zip(ends, norms, strict=True)])
        x = x + (share @ norms) * share @ directions
    algorithm = fednova(linear.task(), RATE, optax.sgd(1.0), momentum)
    _, output = run(algorithm, strategy())
    close(vector(output.state.params), x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_feddyn(strategy):
    """Acar et al. 2021, Algorithm 1, with local SGD for its argmin."""
    alpha, x, h, own = 0.4, first(), np.zeros(4), np.zeros((CLIENTS, 4))
    for cohort in COHORTS:
        ends = []
        for client in cohort:
            y = x.copy()
            for xb, yb in batches(client):
                y -= RATE * (gradient(xb, yb, y) - own[client] + alpha * (y - x))
            own[client] -= alpha * (y - x)
            ends.append(y)
        h = h - alpha / CLIENTS * sum(y - x for y in ends)
        x = np.mean(ends, axis=0) - h / alpha
    engine, output = run(feddyn(linear.task(), alpha, optax.sgd(RATE)), strategy())
    close(vector(output.state.params), x)
    close(vector(output.state.h), h)
    states = client_states(engine).own
    close(np.column_stack([states["w"], states["b"]]), own)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("q", [0.0, 0.5, 2.0])
def test_q_fedavg(strategy, q):
    """Li et al. 2020, Algorithm 2."""
    x, scale = first(), 1 / RATE
    for cohort in COHORTS:
        changes, weights = [], []
        for client in cohort:
            inputs, targets = design(client)
            loss = np.mean((inputs @ x - targets) ** 2)
            change = scale * (x - trained(client, x)[0])
            changes.append(loss**q * change)
            weights.append(q * loss ** (q - 1) * change @ change + scale * loss**q)
        x = x - np.sum(changes, axis=0) / np.sum(weights)
    algorithm = q_fedavg(linear.task(), q, RATE, full_batch_size=5)
    batching = ClientBatching(4, shuffle=False)
    _, output = run(algorithm, strategy(), batching=batching)
    close(vector(output.state.params), x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ditto(strategy):
    """Li et al. 2021, Algorithm 1; the personal steps are on the batches of the others."""
    factor, w, v = 0.7, first(), np.tile(first(), (CLIENTS, 1))
    for cohort in COHORTS:
        ends = []
        for client in cohort:
            for xb, yb in batches(client):
                v[client] -= RATE * (gradient(xb, yb, v[client]) + factor * (v[client] - w))
            ends.append(trained(client, w)[0])
        w = np.average(ends, axis=0, weights=[linear.SIZES[c] for c in cohort])
    algorithm = ditto(linear.task(), factor, optax.sgd(RATE), optax.sgd(1.0))
    engine, output = run(algorithm, strategy())
    close(vector(output.state.params), w)
    states = client_states(engine).own
    close(np.column_stack([states["w"], states["b"]]), v)
    client = jax.tree.map(lambda leaf: leaf[2], client_states(engine))
    assert vector(client.own) == pytest.approx(v[2], rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fednova(linear.task(), 0.1, optax.sgd(1.0), 1.0), r"momentum must be in \[0, 1\)"),
        (lambda: feddyn(linear.task(), 0.0, optax.sgd(0.1)), "alpha must be positive, got 0.0"),
        (lambda: q_fedavg(linear.task(), -1.0, 0.1), "q must not be negative, got -1.0"),
        (lambda: ditto(linear.task(), -1.0, optax.sgd(0.1), optax.sgd(1.0)), "lambda_ must not be"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
