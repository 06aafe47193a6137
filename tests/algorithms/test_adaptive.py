"""What changes as a run goes on: learning rates, mu, and the average that is evaluated."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import (
    ema,
    fedavg,
    fedper,
    fedprox,
    fedsgd,
    fine_tuning,
    hypcluster,
    scaffold,
    scheduled,
)
from fedexp.data import ClientBatching, FederatedSplits, Sample, Sampler, fixed
from fedexp.engine import Packing, jit, mesh
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.session import Session
from fedexp.trainer import Experiment
from tests.support import linear
from tests.support.clients import COHORTS, batches, client_states, first, gradient, run, vector

RATE = 0.05
STRATEGIES = [jit, lambda: jit(Packing(lanes=3))]
HALVED = optax.exponential_decay(1.0, transition_steps=1, decay_rate=0.5)
TASK = linear.task()
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731


def local(client: int, start: np.ndarray, rate=lambda step: RATE, pull=lambda y: 0.0) -> tuple:
    """A client's parameters after its steps, and its losses before each, weighed by examples."""
    y, losses = start.copy(), []
    for step, (xb, yb) in enumerate(batches(client)):
        losses.extend((xb @ y - yb) ** 2)
        y -= rate(step) * (gradient(xb, yb, y) + pull(y))
    return y, losses


def average(ends, cohort) -> np.ndarray:
    return np.average(ends, axis=0, weights=[linear.SIZES[c] for c in cohort])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_schedule_in_the_clients_optimizer_counts_local_steps(strategy):
    """It starts anew on every client: of 14 examples, steps 0 to 3 of each round."""
    theta = first()
    for cohort in COHORTS:
        ends = [local(c, theta, lambda step: RATE * 0.5**step)[0] for c in cohort]
        theta = average(ends, cohort)
    steps = optax.sgd(optax.exponential_decay(RATE, transition_steps=1, decay_rate=0.5))
    _, output = run(fedavg(TASK, steps, optax.sgd(1.0)), strategy())
    close(vector(output.state.params), theta)


def test_a_schedule_in_the_servers_optimizer_counts_rounds():
    theta = first()
    for number, cohort in enumerate(COHORTS):
        ends = [local(c, theta)[0] for c in cohort]
        theta = theta + 0.5**number * (average(ends, cohort) - theta)
    _, output = run(fedavg(TASK, optax.sgd(RATE), optax.sgd(HALVED)))
    close(vector(output.state.params), theta)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scaffold_takes_the_scheduled_rate_for_its_control_variates(strategy):
    """Karimireddy et al. 2020, Algorithm 1, option 2, with eta_l = RATE 0.5^r."""
    x, c, own = first(), np.zeros(4), np.zeros((len(linear.SIZES), 4))
    for number, cohort in enumerate(COHORTS):
        eta, ends, changes = RATE * 0.5**number, [], []
        for client in cohort:
            pull = c - own[client]
            y, _ = local(client, x, lambda step, eta=eta: eta, lambda y, pull=pull: pull)
            renewed = own[client] - c + (x - y) / (len(batches(client)) * eta)
            changes.append(renewed - own[client])
            own[client] = renewed
            ends.append(y)
        x = np.mean(ends, axis=0)
        c = c + np.sum(changes, axis=0) / len(linear.SIZES)
    engine, output = run(scheduled(TASK, lambda task: scaffold(task, RATE), HALVED), strategy())
    close(vector(output.state.params), x)
    states = client_states(engine).own.old
    close(np.column_stack([states["w"], states["b"]]), own)


def adaptive_mu(rounds: int, mu: float, step: float, patience: int, rate: float):
    """Li et al. 2020, Section 5.3, around Algorithm 2."""
    theta, loss, fallen, seen = first(), None, 0, []
    for number in range(rounds):
        cohort = COHORTS[number % len(COHORTS)]
        seen.append(mu)
        trained = [
            local(c, theta, lambda s: rate, lambda y, x=theta, mu=mu: mu * (y - x)) for c in cohort
        ]
        theta, before = average([end for end, _ in trained], cohort), loss
        loss = np.mean(np.concatenate([losses for _, losses in trained]))
        if before is not None and loss > before:
            mu, fallen = mu + step, 0
        elif before is not None:
            fallen += 1
            if fallen == patience:
                mu, fallen = max(mu - step, 0.0), 0
    return theta, seen


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mu_rises_and_falls_with_the_loss(strategy):
    rounds, settings = 14, (0.25, 0.1, 2)
    theta, seen = adaptive_mu(rounds, *settings, rate=RATE)
    assert len(set(np.round(seen, 6))) > 2
    assert any(np.diff(seen) > 0) and any(np.diff(seen) < 0)
    cohorts = [COHORTS[number % len(COHORTS)] for number in range(rounds)]
    mu, step, patience = settings
    algorithm = fedprox(
        TASK, mu, optax.sgd(RATE), optax.sgd(1.0), mu_step=step, mu_patience=patience
    )
    _, output = run(algorithm, strategy(), cohorts)
    close(vector(output.state.params), theta)
    assert output.metrics["train/mu"] == pytest.approx(seen[-1], rel=1e-5)


def test_an_empty_cohort_says_nothing_of_the_loss():
    algorithm = fedprox(TASK, 0.5, optax.sgd(RATE), optax.sgd(1.0), mu_step=0.1, mu_patience=1)
    cohorts = [(0, 1, 2, 3), (), (0, 1, 2, 3), (0, 1, 2, 3)]
    _, output = run(algorithm, cohorts=cohorts)
    assert output.state.mu == pytest.approx(0.5 - 2 * 0.1)


DECAY = 0.8


def averaged(thetas: list[np.ndarray]) -> np.ndarray:
    weights = DECAY ** np.arange(len(thetas))[::-1]
    return np.average(thetas, axis=0, weights=weights)


@pytest.mark.parametrize("strategy", [jit, mesh])
def test_the_average_is_evaluated_and_the_latest_trained(strategy):
    theta, thetas = first(), []
    for cohort in COHORTS:
        theta = average([local(c, theta)[0] for c in cohort], cohort)
        thetas.append(theta)
    algorithm = ema(TASK, fedavg(TASK, optax.sgd(RATE), optax.sgd(1.0)), DECAY)
    _, output = run(algorithm, strategy())
    close(vector(output.state.params), averaged(thetas))
    close(vector(output.state.trained.params), theta)
    assert np.abs(averaged(thetas) - theta).max() > 1e-2


def experiment(algorithm, *evaluations: Evaluate, rounds: int = 3, **options) -> Experiment:
    splits = FederatedSplits(linear.dataset(), linear.dataset(seed=1))
    return Experiment(
        splits,
        TASK,
        algorithm,
        rounds,
        batching=ClientBatching(4, shuffle=False),
        evaluations=list(evaluations),
        **({"observers": [], "sampler": fixed(COHORTS)} | options),
    )


PERSONAL = {
    "fedper": lambda task: fedper(task, optax.sgd(RATE), optax.sgd(1.0), local="^b$"),
    "hypcluster": lambda task: hypcluster(task, 2, optax.sgd(RATE), optax.sgd(1.0)),
    "frozen": lambda task: fedper(task, optax.sgd(RATE), optax.sgd(1.0), frozen="^b$"),
}


@pytest.mark.parametrize("name", PERSONAL)
def test_without_decay_the_average_is_the_latest_for_every_algorithm(name):
    """Personal models too; with a decay they are others."""
    evaluations = [Evaluate(every=0, prefix="it", personalise=name != "frozen")]
    plain = experiment(PERSONAL[name], *evaluations).run().metrics
    results = [
        experiment(lambda task, d=d: ema(task, PERSONAL[name], d), *evaluations).run().metrics
        for d in (0.0, 0.9)
    ]
    assert results[0] == pytest.approx(plain, rel=1e-5)
    assert results[1]["it/loss"] != pytest.approx(plain["it/loss"], rel=1e-3)


def test_fine_tuning_starts_from_the_average():
    tuning = Evaluate(
        every=0,
        personalise=lambda task: fine_tuning(task, optax.sgd(0.0), ClientBatching(4)),
    )
    algorithm = lambda task: ema(  # noqa: E731
        task, fedavg(task, optax.sgd(RATE), optax.sgd(1.0)), DECAY
    )
    metrics = experiment(algorithm, Evaluate(every=0), tuning).run().metrics
    assert metrics["test_personal/loss"] == pytest.approx(metrics["test/loss"], rel=1e-5)


def test_wrapped_algorithms_resume(tmp_path):
    def run_in(folder, rounds):
        algorithm = lambda task: ema(  # noqa: E731
            task,
            lambda task: scheduled(
                task,
                fedprox(task, 0.3, optax.sgd(RATE), optax.adam(0.1), mu_step=0.1, mu_patience=1),
                HALVED,
            ),
            DECAY,
        )
        return experiment(algorithm, Evaluate(), rounds=rounds).run(tmp_path / folder)

    whole = run_in("whole", 3)
    run_in("parts", 2)
    parts = run_in("parts", 3)
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert parts.metrics == whole.metrics


SGD = fedsgd(TASK, optax.sgd(1.0))


def with_rates(client_ids, seed, round):
    return Sample(np.arange(2), {"rate": np.full(2, 0.5, np.float32)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ema(TASK, PERSONAL["fedper"], 1.0), r"ema.decay must be in \[0, 1\), got 1.0"),
        (lambda: ema(TASK, PERSONAL["fedper"], -0.1), r"ema.decay must be in \[0, 1\), got -0.1"),
        (lambda: ema(TASK, lambda task: 3, 0.9), "must be, or make, an Algorithm; got 3"),
        (
            lambda: scheduled(TASK, ema(TASK, SGD, 0.9), HALVED),
            "scheduled.algorithm has no local training, whose rates .*; bind the schedule to",
        ),
        (
            lambda: Session(experiment(SGD, sampler=Sampler(2, with_rates))),
            "train.sampler gives clients a 'rate', but train.algorithm has no local training",
        ),
        (
            lambda: fedprox(TASK, 0.1, optax.sgd(1.0), optax.sgd(1.0), mu_step=-0.1),
            "fedprox.mu_step must not be negative",
        ),
        (
            lambda: fedprox(TASK, 0.1, optax.sgd(1.0), optax.sgd(1.0), mu_patience=0),
            "fedprox.mu_patience must be at least 1, got 0",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
