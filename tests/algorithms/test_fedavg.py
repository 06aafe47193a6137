"""FedAvg and its server optimizers against the papers' pseudo-code in NumPy."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedavg, fedprox, optimizers, scheduled
from fedexp.contracts import Aggregated, Aggregator, Sent
from fedexp.data.batching import ClientBatching
from fedexp.engine import Engine, Packing, debug, jit
from fedexp.errors import UserError
from fedexp.tasks import Measure
from tests.support import linear
from tests.support.measured import numbers

ROUNDS, BATCH_SIZE, CLIENT_LR, SERVER_LR, EPS = 3, 4, 0.05, 0.1, 1e-3
COHORTS = [np.array([0, 2, 3, 5]), np.array([1, 3, 4, 6]), np.array([0, 1, 2, 6])]
BATCHING = ClientBatching(BATCH_SIZE, local_epochs=2, shuffle=False)


def run(algorithm, strategy, *, task=None, rounds=ROUNDS, batching=BATCHING, seed=0):
    """Runs the cohorts; returns final params as float64 NumPy and the last round's metrics."""
    task = task or linear.task()
    params = task.init(jax.random.key(0), None)
    engine = Engine(
        strategy, algorithm, linear.dataset(), batching, params=params, cohort_size=4, seed=seed
    )
    state = engine.start(params)
    for number in range(rounds):
        prepared = engine.prepare(number, COHORTS[number])
        output = engine.run(state, prepared)
        state = output.state
    params = {name: np.asarray(leaf, np.float64) for name, leaf in state.params.items()}
    return params, numbers(output, prepared)


def reference(server_step, *, weigh_by="examples", mu=0.0, client_lr=lambda r: CLIENT_LR):
    """Reddi et al. 2021, Algorithm 1, on least squares; theta = (w, b) as one float64 vector."""
    data = linear.dataset()
    first = linear.task().init(jax.random.key(0), None)
    theta = np.concatenate([np.asarray(first["w"], np.float64), [0.0]])
    for number in range(ROUNDS):
        updates, weights = [], []
        for client in COHORTS[number]:
            x, y = data.client(client)["x"].astype(float), data.client(client)["y"].astype(float)
            x = np.column_stack([x, np.ones(len(y))])
            local = theta.copy()
            for _ in range(2):
                for begin in range(0, len(y), BATCH_SIZE):
                    xb, yb = x[begin : begin + BATCH_SIZE], y[begin : begin + BATCH_SIZE]
                    gradient = 2 * xb.T @ (xb @ local - yb) / len(yb)
                    gradient += mu * (local - theta)
                    local -= client_lr(number) * gradient
            updates.append(local - theta)
            weights.append(len(y) if weigh_by == "examples" else 1)
        theta = server_step(theta, np.average(updates, axis=0, weights=weights))
    return {"w": theta[:-1], "b": theta[-1]}


def server_sgd(theta, delta):
    return theta + 1.0 * delta


def algorithm_2(kind, b1, b2, v0=0.0):
    """The server step of Algorithm 2; Delta is the mean update, which is ascended."""
    moments = {"m": 0.0, "v": v0}

    def step(theta, delta):
        m = b1 * moments["m"] + (1 - b1) * delta
        v = moments["v"] + np.zeros_like(delta)
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "yogi":
            v = v - (1 - b2) * delta**2 * np.sign(v - delta**2)
        else:
            v = b2 * v + (1 - b2) * delta**2
        moments.update(m=m, v=v)
        return theta + SERVER_LR * m / (np.sqrt(v) + EPS)

    return step


STRATEGIES = {"debug": debug(), **{f"lanes={n}": jit(Packing(lanes=n)) for n in (1, 2, 5)}}
SERVERS = {
    "fedavg": (optax.sgd(1.0), lambda: server_sgd),
    "fedadagrad": (
        optimizers.adagrad(SERVER_LR, eps=EPS),
        lambda: algorithm_2("adagrad", 0.0, None),
    ),
    "fedadam": (
        optimizers.adam(SERVER_LR, b2=0.99, eps=EPS, bias_correction=False),
        lambda: algorithm_2("adam", 0.9, 0.99),
    ),
    "fedyogi": (
        optimizers.yogi(SERVER_LR, eps=EPS, initial_accumulator_value=0.5),
        lambda: algorithm_2("yogi", 0.9, 0.99, v0=0.5),
    ),
}


def assert_same(params, expected):
    for name in expected:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("server", SERVERS)
def test_three_rounds_equal_numpy(server, strategy):
    optimizer, step = SERVERS[server]
    algorithm = fedavg(linear.task(), optax.sgd(CLIENT_LR), optimizer)
    params, _ = run(algorithm, STRATEGIES[strategy])
    assert_same(params, reference(step()))


@pytest.mark.parametrize("weigh_by", ["examples", "uniform"])
def test_weighting(weigh_by):
    algorithm = fedavg(linear.task(), optax.sgd(CLIENT_LR), optax.sgd(1.0), weigh_by=weigh_by)
    params, _ = run(algorithm, jit(Packing(lanes=2)))
    assert_same(params, reference(server_sgd, weigh_by=weigh_by))


def test_proximal_term():
    algorithm = fedprox(linear.task(), 0.7, optax.sgd(CLIENT_LR), optax.sgd(1.0))
    params, _ = run(algorithm, jit(Packing(lanes=1)))
    assert_same(params, reference(server_sgd, mu=0.7))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_schedule_of_rounds_is_a_factor_on_the_clients_rate(strategy):
    algorithm = scheduled(
        linear.task(),
        fedavg(linear.task(), optax.sgd(CLIENT_LR), optax.sgd(1.0)),
        optax.exponential_decay(1.0, transition_steps=1, decay_rate=0.5),
    )
    params, _ = run(algorithm, STRATEGIES[strategy])
    assert_same(params, reference(server_sgd, client_lr=lambda r: CLIENT_LR * 0.5**r))


@pytest.mark.parametrize("strategy", ["lanes=1", "lanes=2", "lanes=5"])
def test_random_choices_do_not_depend_on_the_strategy(strategy):
    task = linear.task(noise=0.3)
    algorithm = fedavg(task, optax.adam(CLIENT_LR), optax.adam(SERVER_LR))
    batching = ClientBatching(BATCH_SIZE, local_epochs=2)
    expected, expected_metrics = run(algorithm, debug(), task=task, batching=batching)
    params, metrics = run(algorithm, STRATEGIES[strategy], task=task, batching=batching)
    assert_same(params, expected)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    other_seed, _ = run(algorithm, jit(Packing(lanes=1)), task=task, batching=batching, seed=1)
    assert np.abs(other_seed["w"] - expected["w"]).max() > 1e-4


def test_round_metrics_are_of_the_cohort_alone():
    """With a learning rate of zero the training metrics are those of the initial parameters."""
    algorithm = fedavg(linear.task(), optax.sgd(0.0), optax.sgd(1.0))
    _, metrics = run(algorithm, jit(Packing(lanes=2)), rounds=1)
    first = linear.task().init(jax.random.key(0), None)
    data = linear.dataset()
    losses = []
    for client in COHORTS[0]:
        x, y = data.client(client).values()
        losses.append((x @ np.asarray(first["w"]) - y) ** 2)
    assert metrics["train/loss"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
    np.testing.assert_allclose(metrics["clients/loss"], [loss.mean() for loss in losses], rtol=1e-5)
    assert (metrics["clients/update_norm"] == 0).all()


def test_adam_with_bias_correction_is_optax_adam():
    grads = {"a": np.array([0.3, -2.0], np.float32)}
    ours, theirs = optimizers.adam(0.1), optax.adam(0.1)
    update, _ = ours.update(grads, ours.init(grads))
    expected, _ = theirs.update(grads, theirs.init(grads))
    np.testing.assert_array_equal(update["a"], expected["a"])


def test_parameters_without_gradient_stay_put_when_eps_is_zero():
    optimizer = optimizers.adagrad(0.1, eps=0.0)
    grads = {"a": np.array([0.0, 1.0], np.float32)}
    update, _ = optimizer.update(grads, optimizer.init(grads))
    np.testing.assert_allclose(update["a"], [0.0, -0.1], rtol=1e-6)


@pytest.mark.parametrize("rate", [-0.1, float("nan")])
def test_negative_learning_rate_is_refused(rate):
    with pytest.raises(UserError, match="adam.learning_rate must not be negative"):
        optimizers.adam(rate)


def test_negative_proximal_term_is_refused():
    with pytest.raises(UserError, match="fedprox.mu must not be negative"):
        fedprox(linear.task(), -1.0, optax.sgd(0.1), optax.sgd(1.0))


def test_weighing_by_tokens_gives_the_aggregator_the_weights_in_the_loss():
    """The aggregator here returns the sum of the weights that it gets as the update."""
    task = linear.task()

    def loss(outputs, batch):
        counted = 1.0 + (batch["y"] > 0)
        return Measure(counted * (outputs - batch["y"]) ** 2, counted)

    def client(state, update, client_state, key):
        return Sent(total=jax.tree.map(lambda leaf: 0 * leaf + update.weight, update.value))

    aggregator = Aggregator(
        client,
        server=lambda state, total, each, later, cohort, key: Aggregated(total),
        reduces=True,
    )
    weighted = dataclasses.replace(task, loss=loss)
    algorithm = fedavg(
        weighted, optax.sgd(1e-3), optax.sgd(1.0), aggregator=aggregator, weigh_by="tokens"
    )
    params, _ = run(algorithm, jit(Packing(lanes=2)), task=weighted, rounds=1)
    clients = [linear.dataset().client(client)["y"] for client in COHORTS[0]]
    tokens = sum(len(y) + (y > 0).sum() for y in clients)
    assert params["b"] == BATCHING.local_epochs * tokens


def test_unknown_weighting_is_refused():
    with pytest.raises(UserError, match="'examples', 'tokens' or 'uniform', got 'words'"):
        fedavg(linear.task(), optax.sgd(1.0), optax.sgd(1.0), weigh_by="words")


def test_gradients_are_clipped_over_all_arrays_before_the_step():
    optimizer = optimizers.clip_gradients(optax.sgd(0.5), norm=5.0)
    for scale, kept in ((1.0, 0.5), (0.1, 1.0)):  # Of the norms 10 and 1.
        gradients = {"a": np.float32([6 * scale, 0]), "b": np.float32([-8 * scale])}
        updates, _ = optimizer.update(gradients, optimizer.init(gradients))
        for name, gradient in gradients.items():
            np.testing.assert_allclose(updates[name], -0.5 * kept * gradient, rtol=1e-6)
    with pytest.raises(UserError, match=r"clip_gradients\.norm must be positive"):
        optimizers.clip_gradients(optax.sgd(0.5), norm=0.0)
