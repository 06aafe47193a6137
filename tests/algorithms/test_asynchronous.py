"""FedBuff and FedAsync against their papers in NumPy, with an event queue of the test's own."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import Algorithm, ema, fedasync, fedavg, fedbuff
from fedexp.algorithms.versions import constant_weight, hinge_weight, polynomial_weight
from fedexp.data import (
    SECONDS,
    ClientBatching,
    Clock,
    FederatedSplits,
    Sampler,
    asynchronous,
    hold_out,
    synchronous,
    uniform,
)
from fedexp.data.clock import exponential, lognormal
from fedexp.engine import Packing, jit
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.session import Session
from fedexp.streams import Stream, derive
from fedexp.trainer import Experiment
from tests.support import linear
from tests.support.clients import batches, gradient, vector

RATE, ROUNDS = 0.03, 9
# The two slowest become stale; no two ever finish together.
DURATIONS = (1.0, 2.31, 0.73, 9.17, 1.91, 3.37, 0.47)
CONSTANT, POLYNOMIAL = lambda t: 1.0, lambda t: (1 + t) ** -0.5
HINGE = lambda t: 1.0 if t <= 2 else 1 / (3.0 * (t - 2) + 1)  # noqa: E731


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "clock.csv"
    rows = [f"client{client},{seconds}" for client, seconds in enumerate(DURATIONS)]
    path.write_text("\n".join(["client,seconds", *rows]))
    return str(path)


def arrivals(per_step: int) -> list[list[tuple[int, int]]]:
    """(client, version fetched) of every server step; whoever has reported sets out after it."""
    finish = {client: (seconds, 0) for client, seconds in enumerate(DURATIONS)}
    steps = []
    for version in range(1, ROUNDS + 1):
        step = []
        for _ in range(per_step):
            client = min(finish, key=finish.__getitem__)
            now, fetched = finish.pop(client)
            step.append((client, fetched))
        steps.append(step)
        finish |= {client: (now + DURATIONS[client], version) for client, _ in step}
    return steps


def trained(client: int, start: np.ndarray, rho: float = 0.0) -> np.ndarray:
    y = start.copy()
    for xb, yb in batches(client):
        y -= RATE * (gradient(xb, yb, y) + rho * (y - start))
    return y


def first() -> np.ndarray:
    """Where an experiment of seed 0 begins."""
    return vector(linear.task().init(derive(jax.random.key(0), Stream.PARAMETERS), None))


def experiment(algorithm: Algorithm, sampler: Sampler, strategy=None, **more) -> Experiment:
    more = {
        "num_rounds": ROUNDS,
        "batching": ClientBatching(4, shuffle=False),
        "evaluations": [Evaluate(every=0)],
        "observers": [],
    } | more
    return Experiment(
        FederatedSplits(linear.dataset(), linear.dataset(seed=1)),
        linear.task(),
        algorithm,
        sampler=sampler,
        strategy=strategy or jit(),
        **more,
    )


def last(experiment: Experiment):
    *_, round_ = experiment.rounds()
    return round_


@pytest.mark.parametrize(
    ("strategy", "weight", "factor", "most"),
    [
        (jit, None, POLYNOMIAL, 50),
        (lambda: jit(Packing(lanes=3)), hinge_weight(3.0, 2), HINGE, 3),
    ],
)
def test_fedbuff(table, strategy, weight, factor, most):
    """Nguyen et al. 2022, Algorithm 1, with K = 3 and a server's learning rate of 0.8."""
    xs, discarded = [first()], []
    for version, step in enumerate(arrivals(3)):
        taken = [(c, v) for c, v in step if version - v <= most]
        changes = [factor(version - v) * (trained(c, xs[v]) - xs[v]) for c, v in taken]
        xs.append(xs[-1] + 0.8 * np.mean(changes, axis=0))
        discarded.append(len(step) - len(taken))
    assert sum(discarded) == (most == 3)
    algorithm = fedbuff(linear.task(), optax.sgd(RATE), optax.sgd(0.8), weight, most)
    sampler = asynchronous(Clock(table=table), len(DURATIONS), 3)
    rounds = list(experiment(algorithm, sampler, strategy()).rounds())
    np.testing.assert_allclose(vector(rounds[-1].params), xs[-1], rtol=1e-5, atol=1e-5)
    assert [round_.metrics["train/discarded"] for round_ in rounds] == discarded
    assert rounds[0].metrics["traffic/bits_down"] == 3 * 32 * 4  # One version each.


@pytest.mark.parametrize(
    ("strategy", "weight", "factor", "rho"),
    [
        (jit, None, POLYNOMIAL, 0.0),
        (jit, constant_weight(), CONSTANT, 0.5),
        (lambda: jit(Packing(lanes=2)), hinge_weight(3.0, 2), HINGE, 0.5),
    ],
)
def test_fedasync(table, strategy, weight, factor, rho):
    """Xie et al. 2019, Algorithm 1."""
    xs, alpha = [first()], 0.6
    for version, [(client, fetched)] in enumerate(arrivals(1)):
        mixed = alpha * factor(version - fetched)
        xs.append((1 - mixed) * xs[-1] + mixed * trained(client, xs[fetched], rho))
    algorithm = fedasync(linear.task(), alpha, optax.sgd(RATE), rho, weight)
    sampler = asynchronous(Clock(table=table), len(DURATIONS), 1)
    round_ = last(experiment(algorithm, sampler, strategy()))
    np.testing.assert_allclose(vector(round_.params), xs[-1], rtol=1e-5, atol=1e-5)


def test_a_resumed_run_is_the_one_that_was_not_interrupted(tmp_path):
    """The server's past versions and the clock go on where they were."""
    clock = Clock(seconds_per_example=lognormal(0.1), variation=exponential(), drop_out=0.2)

    def run(folder: str, num_rounds: int):
        algorithm = fedbuff(linear.task(), optax.sgd(RATE), optax.sgd(0.8))
        options = {"num_rounds": num_rounds, "evaluations": [Evaluate(every=2)]}
        return experiment(algorithm, asynchronous(clock, 5, 2), **options).run(tmp_path / folder)

    whole = run("whole", 8)
    run("parts", 4)
    parts = run("parts", 8)
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert parts.history == whole.history
    seconds = [row[SECONDS] for row in whole.history]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3]


def test_any_algorithm_runs_on_the_clock():
    """A client takes a second for each of its examples in both epochs, and no more than ten."""
    clock = Clock(seconds_per_example=1.0, seconds=0.0)
    algorithm = fedavg(linear.task(), optax.sgd(RATE), optax.sgd(1.0))
    batching = ClientBatching(4, local_epochs=2, max_examples=10)
    round_ = last(experiment(algorithm, synchronous(clock, 7), num_rounds=2, batching=batching))
    assert round_.metrics[SECONDS] == 40.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda task, sgd: fedbuff(task, sgd, sgd, max_staleness=-1), "fedbuff.max_staleness must"),
        (lambda task, sgd: fedasync(task, 0.0, sgd), r"fedasync.alpha must be in \(0, 1\], got 0"),
        (lambda task, sgd: fedasync(task, 1.0, sgd, rho=-1.0), "fedasync.rho must not be negative"),
        (lambda task, sgd: polynomial_weight(-1.0), "polynomial_weight.a must not be negative"),
        (lambda task, sgd: hinge_weight(-1.0), "hinge_weight.a must not be negative"),
        (lambda task, sgd: hinge_weight(1.0, -1), "hinge_weight.b must not be negative"),
        (
            lambda task, sgd: Session(experiment(fedbuff(task, sgd, sgd), uniform(3))),
            "fedbuff must be told how stale each client is, as @asynchronous",
        ),
        (
            lambda task, sgd: Session(
                experiment(ema(task, fedasync(task, 1.0, sgd), 0.5), hold_out(uniform(3), 0.3))
            ),
            "fedasync must be told how stale",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make(linear.task(), optax.sgd(RATE))
