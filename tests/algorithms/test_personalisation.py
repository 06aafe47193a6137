"""Algorithms for models of clients' own, against their papers in NumPy."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedavg, fedrep, fedsgd, per_fedavg, pfedme
from fedexp.data import ClientBatching, FederatedSplits, fixed
from fedexp.engine import Packing, jit
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.tasks import Measure, classification
from fedexp.trainer import Experiment
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
from tests.support.normalised import Normalised, clients_of_other_scales

CLIENTS = range(len(linear.SIZES))
LANES = jit(
    Packing(lanes=3)
)  # What other strategies make of them, `tests/engine` compares with this.
IN_ORDER = ClientBatching(4, shuffle=False)
SIX = ClientBatching(6, shuffle=False)
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731

LAMBDA, THETA_RATE, ETA, K, BETA = 2.0, 0.03, 0.2, 3, 0.7


def personal_loss(algorithm, batching=IN_ORDER) -> float:
    """The loss over all test examples, each client measured in its own way, after the cohorts."""
    start = linear.task().init(jax.random.key(0), None)
    result = Experiment(
        FederatedSplits(linear.dataset(), linear.dataset(seed=1)),
        dataclasses.replace(linear.task(), init=lambda key, batch: start),
        algorithm,
        num_rounds=len(COHORTS),
        sampler=fixed(COHORTS),
        batching=batching,
        evaluations=[Evaluate(personalise=True, every=0)],
        observers=[],
    ).run()
    return result.metrics["test_personal/loss"]


def mean_loss(models) -> float:
    """What `personal_loss` is of clients with these parameters."""
    squares = []
    for client in CLIENTS:
        data = linear.dataset(seed=1).client(client)
        x = np.column_stack([data["x"], np.ones(len(data["y"]))])
        squares.extend((x @ models[client] - data["y"]) ** 2)
    return float(np.mean(squares))


def envelope(client: int, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A client's local round of pFedMe, Algorithm 1, from the server's parameters; (w, theta)."""
    w, theta = start.copy(), start.copy()
    for xb, yb in batches(client):
        for _ in range(K):
            theta = theta - THETA_RATE * (gradient(xb, yb, theta) + LAMBDA * (theta - w))
        w = w - ETA * LAMBDA * (w - theta)
    return w, theta


def moreau_envelopes(**kwargs):
    optimizers = optax.sgd(THETA_RATE), ETA, optax.sgd(BETA)
    return pfedme(linear.task(), LAMBDA, *optimizers, num_steps=K, **kwargs)


@pytest.fixture(scope="module")
def of_envelopes() -> np.ndarray:
    w = first()
    for cohort in COHORTS:
        w = (1 - BETA) * w + BETA * np.mean([envelope(client, w)[0] for client in cohort], axis=0)
    return w


def test_pfedme(of_envelopes):
    """T. Dinh et al. 2020, Algorithm 1."""
    _, output = run(moreau_envelopes(), LANES)
    close(vector(output.state.params), of_envelopes)


def test_pfedme_measures_clients_with_theta(of_envelopes):
    found = personal_loss(moreau_envelopes(personal_batching=IN_ORDER))
    own = mean_loss([envelope(client, of_envelopes)[1] for client in CLIENTS])
    assert found == pytest.approx(own, rel=1e-5)
    assert own < 0.9 * mean_loss([of_envelopes for _ in CLIENTS])


def test_pfedme_sends_the_statistics_of_theta():
    task, dataset = classification(Normalised(), num_classes=3), clients_of_other_scales()
    start = task.init(jax.random.key(0), dataset.slice(0, 1))
    result = Experiment(
        FederatedSplits(dataset, dataset),
        dataclasses.replace(task, init=lambda key, batch: start),
        pfedme(task, 1.0, optax.sgd(0.0), 1.0, optax.sgd(1.0), num_steps=1),
        num_rounds=1,
        sampler=fixed([range(4)]),
        batching=ClientBatching(16),
        evaluations=[],
        observers=[],
    ).run()
    layer = start["params"]["Dense_0"]
    hidden = [dataset.client(c)["x"] @ layer["kernel"] + layer["bias"] for c in range(4)]
    expected = np.mean([(1 + h.var(0)) / 2 for h in hidden], axis=0)
    found = result.params["batch_stats"]["BatchNorm_0"]["var"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def meta_learned(first_order: bool) -> np.ndarray:
    """Fallah et al. 2020, Algorithm 1, with the Hessian of least squares itself."""
    alpha, beta, w, parts = 0.05, 0.04, first(), 2 if first_order else 3
    for cohort in COHORTS:
        ends = []
        for client in cohort:
            y = w.copy()
            for xb, yb in batches(client, 6):
                (x0, y0), (x1, y1), (x2, _) = ((xb[i::parts], yb[i::parts]) for i in (0, 1, 2))
                if not len(y1):  # A batch of one example has nothing to descend.
                    continue
                g = gradient(x1, y1, y - alpha * gradient(x0, y0, y))
                hessian = 2 * x2.T @ x2 / max(len(x2), 1)
                y = y - beta * (g if first_order else g - alpha * hessian @ g)
            ends.append(y)
        w = np.mean(ends, axis=0)
    return w


def meta_learning(first_order: bool, **kwargs):
    optimizers = optax.sgd(0.04), optax.sgd(1.0)
    return per_fedavg(linear.task(), 0.05, *optimizers, first_order, delta=0.1, **kwargs)


@pytest.mark.parametrize("first_order", [True, False])
def test_per_fedavg(first_order):
    _, output = run(meta_learning(first_order), LANES, batching=SIX)
    expected = meta_learned(first_order)
    close(vector(output.state.params), expected)
    assert np.abs(expected - meta_learned(not first_order)).max() > 1e-3


def test_hessian_free_is_a_central_difference():
    """On |x theta - y|^3, whose gradient is no linear function."""
    delta, alpha, task = 0.5, 0.05, linear.task()

    def loss(outputs, batch):
        values, weights = task.loss(outputs, batch)
        return Measure(values**1.5, weights)

    def slope(x, y, theta):
        residual = x @ theta - y
        return 3 * x.T @ (residual * np.abs(residual)) / len(y)

    w, client = first(), 3
    (x, y), start = design(client), first()
    (x0, y0), (x1, y1), (x2, y2) = ((x[i::3], y[i::3]) for i in (0, 1, 2))
    g = slope(x1, y1, w - alpha * slope(x0, y0, w))
    curvature = (slope(x2, y2, w + delta * g) - slope(x2, y2, w - delta * g)) / (2 * delta)
    w = w - 0.01 * (g - alpha * curvature)
    cubic = dataclasses.replace(task, loss=loss)
    algorithm = per_fedavg(cubic, alpha, optax.sgd(0.01), optax.sgd(1.0), delta=delta)
    whole = ClientBatching(14, shuffle=False)
    _, output = run(algorithm, cohorts=[[client]], batching=whole, task=cubic)
    close(vector(output.state.params), w)
    assert np.abs(w - start).max() > 0.1


def test_per_fedavg_measures_clients_after_a_step():
    whole = ClientBatching(14, shuffle=False)
    found = personal_loss(meta_learning(True, adaptation=whole), SIX)
    w = meta_learned(True)
    own = [w - 0.05 * gradient(*design(client), w) for client in CLIENTS]
    assert found == pytest.approx(mean_loss(own), rel=1e-5)


def test_reptile_is_fedavg_whose_clients_count_alike():
    """Nichol et al. 2018, batched: phi moves by epsilon times the mean of W - phi, W after k steps."""
    epsilon, rate, k, phi = 0.6, 0.03, 5, first()
    for cohort in COHORTS:
        changes = []
        for client in cohort:
            x, y, theta = *design(client), phi.copy()
            rows = np.arange(k * 4) % len(y)
            for step in range(k):
                here = rows[4 * step : 4 * step + 4]
                theta -= rate * gradient(x[here], y[here], theta)
            changes.append(theta - phi)
        phi = phi + epsilon * np.mean(changes, axis=0)
    algorithm = fedavg(linear.task(), optax.sgd(rate), optax.sgd(epsilon), weigh_by="uniform")
    _, output = run(algorithm, batching=ClientBatching(4, local_steps=k, shuffle=False))
    close(vector(output.state.params), phi)


def representation() -> tuple[np.ndarray, np.ndarray]:
    """Collins et al. 2021, Algorithm 1: w is the representation, b the head; (w, every client's b)."""
    w, b = first()[:3], np.full(len(CLIENTS), first()[3])
    for cohort in COHORTS:
        ends = []
        for client in cohort:
            for _ in range(2):
                for xb, yb in batches(client, 3):
                    b[client] -= 0.1 * gradient(xb, yb, np.append(w, b[client]))[3]
            body = w.copy()
            for xb, yb in batches(client):
                body -= 0.05 * gradient(xb, yb, np.append(body, b[client]))[:3]
            ends.append(body)
        w = np.mean(ends, axis=0)
    return w, b


def representing(head: str = "^b$"):
    optimizers = optax.sgd(0.1), optax.sgd(0.05), optax.sgd(1.0)
    twice = ClientBatching(3, local_epochs=2, shuffle=False)
    return fedrep(linear.task(), head, *optimizers, twice)


def test_fedrep():
    engine, output = run(representing(), LANES)
    w, b = representation()
    close(output.state.params["w"], w)
    close(client_states(engine).own["b"], b)
    assert np.ptp(b) > 0.1


def test_fedrep_measures_clients_with_their_heads():
    w, b = representation()
    own = [np.append(w, b[client]) for client in CLIENTS]
    assert personal_loss(representing()) == pytest.approx(mean_loss(own), rel=1e-5)


@pytest.mark.parametrize("weigh_by", ["examples", "uniform"])
def test_fedsgd(weigh_by):
    """McMahan et al. 2017: w moves by -eta sum_k n_k / n g_k, whatever the batches."""
    w, velocity = first(), np.zeros(4)
    for cohort in COHORTS:
        weights = [linear.SIZES[c] if weigh_by == "examples" else 1 for c in cohort]
        grads = [gradient(*design(client), w) for client in cohort]
        velocity = 0.5 * velocity + np.average(grads, axis=0, weights=weights)
        w = w - 0.1 * velocity
    algorithm = fedsgd(linear.task(), optax.sgd(0.1, momentum=0.5), weigh_by=weigh_by)
    _, output = run(algorithm, LANES, batching=ClientBatching(4))
    close(vector(output.state.params), w)


def test_fedsgd_measures_at_the_server_s_parameters():
    everyone = [list(CLIENTS)]
    algorithm = fedsgd(linear.task(), optax.sgd(0.1))
    _, output = run(algorithm, cohorts=everyone, batching=ClientBatching(2))
    rows = [design(client) for client in CLIENTS]
    squares = np.concatenate([(x @ first() - y) ** 2 for x, y in rows])
    loss = output.metrics["train/loss"]
    assert float(loss.values / loss.weights) == pytest.approx(squares.mean(), rel=1e-5)


@pytest.mark.parametrize(
    "algorithm",
    [moreau_envelopes(), meta_learning(False), representing()],
    ids=["pfedme", "per_fedavg", "fedrep"],
)
def test_a_round_without_clients_changes_nothing(algorithm):
    _, before = run(algorithm, cohorts=[[3]])
    _, after = run(algorithm, cohorts=[[3], []])
    close(vector(after.state.params), vector(before.state.params))


SGD = optax.sgd(0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda task: pfedme(task, 0.0, SGD, 0.1, SGD),
            r"pfedme.lambda_ must be positive, got 0.0",
        ),
        (lambda task: pfedme(task, 1.0, SGD, -1.0, SGD), "client_learning_rate must be positive"),
        (lambda task: pfedme(task, 1.0, SGD, 0.1, SGD, 0), "pfedme.num_steps must be at least 1"),
        (
            lambda task: per_fedavg(task, 0.0, SGD, SGD),
            "per_fedavg.adaptation_rate must be positive",
        ),
        (
            lambda task: per_fedavg(task, 0.1, SGD, SGD, delta=0.0),
            "per_fedavg.delta must be positive",
        ),
        (lambda task: fedsgd(task, SGD, weigh_by="size"), "weigh_by must be 'examples'"),
        (lambda task: run(representing("haed")), "'haed' matches none of the parameters"),
        (lambda task: run(representing("b|w")), "none is left to travel"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make(linear.task())
