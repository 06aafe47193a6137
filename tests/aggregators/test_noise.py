"""Noise on updates: its deviation and correlation, and the clipping that adapts, against NumPy."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedexp.aggregators import (
    adaptive_clipping,
    banded_noise,
    clip_by_norm,
    gaussian_noise,
    local_noise,
    mean,
    power_sgd,
    tree_noise,
)
from fedexp.algorithms import fedavg
from fedexp.contracts import Clients, Cohort, Mechanism, Update
from fedexp.data import ClientBatching, poisson
from fedexp.engine import Engine, debug
from fedexp.errors import UserError
from tests.support import linear
from tests.support.clients import run

SIZE = 20_000  # Entries of an update whose deviations are measured.


def cohort(size: int, expected: float | None = None, population: int = 1000) -> Cohort:
    slots = max(size, 1)
    clients = Clients(jnp.arange(slots), jnp.ones(slots), jnp.ones(slots))
    key = jax.random.key(7)
    return Cohort(
        round=jnp.int32(0),
        size=jnp.int32(size),
        real=jnp.arange(slots) < size,
        clients=clients,
        key=key,
        aggregation_key=key,
        expected_size=float(expected or size),
        population=population,
    )


def rounds_of(link, number: int, size: int = 4, expected: float | None = None) -> np.ndarray:
    """What a link adds to the mean of updates that are zero, (rounds, SIZE)."""
    zero = {"a": jnp.zeros(SIZE)}
    state, added, of = link.init(zero), [], cohort(size, expected)
    server = jax.jit(lambda state, key: link.server(state, (), (), zero, of, key)[:2])
    for round_ in range(number):
        update, state = server(state, jax.random.key(100 + round_))
        added.append(np.asarray(update["a"], np.float64))
    return np.array(added)


def close(measured: float, expected: float, samples: int = SIZE) -> None:
    """To 4.5 deviations of a standard deviation that is estimated from so many numbers."""
    assert measured == pytest.approx(expected, rel=4.5 / np.sqrt(2 * samples))


def test_the_noise_of_a_cohort_that_is_simulated():
    link = gaussian_noise(2.0, 0.5, noise_cohort_size=100)
    close(rounds_of(link, 1).std(), 2.0 * 0.5 / 100)
    assert link.noise.mechanism(cohort(4)) == Mechanism(2.0, cohort_size=100)


def test_sums_over_rounds_have_the_noise_of_a_trees_best_estimate():
    """Of 2^l rounds the least squares estimate has variance 2^l / (2^(l + 1) - 1)."""

    def least_squares(level: int) -> float:
        leaves = 2**level
        nodes = [
            np.arange(leaves) // 2**low == place
            for low in range(level + 1)
            for place in range(leaves // 2**low)
        ]
        tree = np.array(nodes, float)
        total = np.ones(leaves)
        return float(total @ np.linalg.inv(tree.T @ tree) @ total)

    multiplier, norm = 3.0, 0.5
    added = rounds_of(tree_noise(multiplier, norm, num_rounds=16), 13)
    sums = added.cumsum(axis=0)
    for done in (1, 2, 3, 4, 6, 7, 8, 12, 13):
        levels = [level for level in range(5) if done >> level & 1]
        variance = sum(least_squares(level) for level in levels)
        close(sums[done - 1].std(), multiplier * norm / 4 * np.sqrt(variance))
    assert least_squares(3) == pytest.approx(8 / 15)
    # Sums of rounds 1 to 8 and 9 to 12 are other nodes'.
    later = sums[11] - sums[7]
    assert abs(np.corrcoef(later, sums[7])[0, 1]) < 4.5 / np.sqrt(SIZE)


def test_banded_noise_times_its_matrix_is_independent():
    multiplier, norm, bands, rounds = 2.0, 0.5, 3, 8
    link = banded_noise(multiplier, norm, num_rounds=rounds, bands=bands)
    coefficients = link.noise.mechanism(cohort(4)).coefficients
    assert len(coefficients) == bands and np.sum(np.square(coefficients)) == pytest.approx(1)
    assert all(a > b > 0 for a, b in itertools.pairwise(coefficients))
    matrix = sum(c * np.eye(rounds, k=-k) for k, c in enumerate(coefficients))
    added = rounds_of(link, rounds)
    white = matrix @ added
    close(white.std(), multiplier * norm / 4, white.size)
    correlations = np.corrcoef(white)[~np.eye(rounds, dtype=bool)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(SIZE)
    # It is what sums over rounds gain by.
    independent = rounds_of(gaussian_noise(multiplier, norm), rounds)
    ratio = added.sum(axis=0).std() / independent.sum(axis=0).std()
    assert ratio == pytest.approx(
        np.linalg.norm(np.linalg.inv(matrix).sum(axis=0)) / np.sqrt(rounds), rel=0.05
    )
    assert ratio < 0.8
    with pytest.raises(UserError, match="bands must be from 1 to num_rounds, 8, got 9"):
        banded_noise(1.0, 1.0, num_rounds=8, bands=9)


def test_clients_add_their_own_noise():
    link = local_noise(3.0, 0.5)
    value = {"a": jnp.full(SIZE, 0.25)}
    sent = [link.client((), Update(value, jnp.float32(9)), None, jax.random.key(i)) for i in (0, 1)]
    noises = [np.asarray(s.update.value["a"]) - 0.25 for s in sent]
    for noise in noises:
        close(noise.std(), 1.5)
    assert abs(np.corrcoef(*noises)[0, 1]) < 4.5 / np.sqrt(SIZE)
    assert sent[0].update.weight == 1
    assert link.noise.mechanism(cohort(4)) == Mechanism(3.0, "local")


def test_a_step_of_adaptive_clipping_by_hand():
    """Algorithm 1, with the noise on the count that the paper recommends."""
    z, clients, gamma, eta, first = 1.5, 40, 0.3, 0.4, 2.0
    link = adaptive_clipping(z, gamma, first, eta)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(clients, 5)) * rng.uniform(0.2, 2.0, size=(clients, 1))
    norms = np.linalg.norm(values, axis=1)
    clipped = values * np.minimum(1, first / norms)[:, None]
    norm = link.init({"a": jnp.zeros(5)})
    updates = [Update({"a": jnp.asarray(v, jnp.float32)}, jnp.float32(3)) for v in values]
    sent = [link.client(norm, update, None, None) for update in updates]
    for one, expected in zip(sent, clipped, strict=True):
        np.testing.assert_allclose(one.update.value["a"], expected, rtol=1e-5)
    total = sum(one.total for one in sent)
    assert total == np.sum(norms <= first) - clients / 2
    # Many rounds from the same state tell the noise of the count and of the updates.
    of, zero = cohort(clients), {"a": jnp.zeros(SIZE)}
    result = link.server(norm, total, (), zero, of, jax.random.key(1))
    count_noise = clients / 20
    of_updates = 1 / np.sqrt(1 / z**2 - 1 / (2 * count_noise) ** 2)
    close(np.std(result.update["a"]), of_updates * first / clients)
    assert result.metrics["noise_std"] == pytest.approx(of_updates * first / clients)

    def next_norm(seed):
        key = jax.random.key(seed)
        return link.server(norm, total, (), {"a": jnp.zeros(1)}, of, key).state

    norms_after = np.asarray(jax.jit(jax.vmap(next_norm))(jnp.arange(2000)), np.float64)
    shares = gamma - np.log(norms_after / first) / eta
    close(shares.std(), count_noise / clients, 2000)
    assert shares.mean() == pytest.approx(np.mean(norms <= first), abs=4.5 * 0.05 / 40)
    assert link.noise.mechanism(of) == Mechanism(z)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_goes_to_the_quantile(quantile):
    """From far below and far above, with noise (Andrew et al. 2021, Figure 2)."""
    rng, clients = np.random.default_rng(1), 200
    norms = rng.lognormal(sigma=1.0, size=clients)
    for first in (0.01, 50.0):
        link = adaptive_clipping(1.0, quantile, first, 0.2, count_noise=10.0)
        of, zero = cohort(clients), {"a": jnp.zeros(1)}

        def step(norm, key, link=link, of=of, zero=zero):
            total = jnp.sum((norms <= norm) - 0.5)
            return link.server(norm, total, (), zero, of, key).state, norm

        keys = jax.random.split(jax.random.key(3), 300)
        _, path = jax.lax.scan(step, jnp.float32(first), keys)
        settled = np.exp(np.log(path[150:]).mean())
        share = np.mean(norms <= settled)
        assert share == pytest.approx(quantile, abs=0.03)


def test_a_count_may_not_take_all_the_noise():
    link = adaptive_clipping(1.0, count_noise=0.5)
    with pytest.raises(UserError, match="count_noise = 0.5 must be more than half"):
        link.noise.mechanism(cohort(4))
    with pytest.raises(UserError, match="count_noise = 0.2 must be more than half"):
        adaptive_clipping(1.0).noise.mechanism(cohort(4))
    adaptive_clipping(1.0).noise.mechanism(cohort(100))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: adaptive_clipping(1.0, quantile=0.0), r"quantile must be in \(0, 1\]"),
        (lambda: adaptive_clipping(1.0, learning_rate=-1.0), "learning_rate must not be"),
        (lambda: adaptive_clipping(-1.0), "noise_multiplier must not be negative"),
        (lambda: tree_noise(1.0, 1.0, num_rounds=0), "num_rounds must be at least 1"),
        (lambda: local_noise(1.0, 0.0), "local_noise.norm must be positive"),
        (lambda: gaussian_noise(1.0, 1.0, 0), "noise_cohort_size must be positive"),
    ],
)
def test_numbers_out_of_range_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_what_clients_are_told_of_a_links_state_counts():
    """Besides the parameters, a float32 each: the clip, or a factor of a column for three rows."""
    task = linear.task()
    size = 4
    for links, more in (
        ([adaptive_clipping(1.0, count_noise=2.0), mean()], 1),
        ([clip_by_norm(1.0), mean()], 0),
        ([power_sgd(1), mean()], 0),
    ):
        algorithm = fedavg(task, optax.sgd(0.05), optax.sgd(1.0), aggregator=links)
        _, output = run(algorithm, None, [(0, 2, 3)])
        assert output.metrics["traffic/bits_down"] == 3 * 32 * (size + more)
    state = power_sgd(2).init({"w": jnp.zeros((5, 4)), "b": jnp.zeros(4)})
    told = power_sgd(2).told(state)
    assert sum(leaf.size for leaf in jax.tree.leaves(told)) == 2 * 4


@pytest.mark.parametrize(
    "links",
    [
        lambda: [clip_by_norm(0.5), gaussian_noise(1.0, 0.5), mean()],
        lambda: [clip_by_norm(0.5), tree_noise(1.0, 0.5, num_rounds=8), mean()],
        lambda: [adaptive_clipping(1.0, count_noise=2.0), mean()],
        lambda: [clip_by_norm(0.5), local_noise(1.0, 0.5), mean()],
    ],
)
def test_noise_is_drawn_with_keys_that_nothing_else_draws_with(links, monkeypatch):
    """Every key that normal numbers are drawn with, and every one that local steps are given."""
    used, steps = [], []
    draw = jax.random.normal

    def normal(key, shape=(), dtype=jnp.float32, **more):
        jax.debug.callback(lambda data: used.append(tuple(data.tolist())), jax.random.key_data(key))
        return draw(key, shape, dtype, **more)

    monkeypatch.setattr(jax.random, "normal", normal)
    task = linear.task()
    algorithm = fedavg(task, optax.sgd(0.05), optax.sgd(1.0), aggregator=links())
    params = task.init(jax.random.key(0), None)
    used.clear()
    inner = algorithm.round

    def round_(state, of, for_each_client):
        def watched(work, *args, **kwargs):
            def step(shared, carry, batch, key):
                steps.append(tuple(jax.random.key_data(key).tolist()))
                return work.step(shared, carry, batch, key)

            steps.extend(
                tuple(jax.random.key_data(k).tolist()) for k in (of.key, of.aggregation_key)
            )
            watched.calls = for_each_client.calls
            return for_each_client(work._replace(step=step), *args, **kwargs)

        watched.calls, watched.traffic = 0, for_each_client.traffic
        watched.releases = [None]
        return inner(state, of, watched)

    engine = Engine(
        debug(),
        algorithm.__class__(**{**vars(algorithm), "round": round_}),
        linear.dataset(),
        ClientBatching(4),
        params=params,
        cohort_size=3,
        seed=0,
    )
    state, sampler = engine.start(params), poisson(3)
    for number in range(5):
        cohort_ = sampler.sample(linear.dataset().client_ids, 0, number)
        state = engine.run(state, engine.prepare(number, cohort_)).state
    jax.effects_barrier()
    assert len(used) >= 5 and len(steps) > 5
    assert len(set(used)) == len(used) and not set(used) & set(steps)
