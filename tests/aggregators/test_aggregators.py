"""Every aggregator against NumPy, alone and in chains, through whole rounds of an algorithm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedexp.aggregators import (
    as_aggregator,
    chain,
    clip_by_norm,
    coordinate_median,
    gaussian_noise,
    mean,
    quantize,
    top_k,
)
from fedexp.algorithms import fedavg
from fedexp.contracts import Aggregated, Aggregator, Sent, Update
from fedexp.data import ClientBatching
from fedexp.engine import Engine, Packing, jit
from fedexp.errors import UserError
from tests.support import linear
from tests.support.clients import batches, first, gradient, run, vector

COHORT, RATE = (0, 2, 3, 5), 0.05


def updates(cohort=COHORT, theta=None) -> np.ndarray:
    """The client updates of one round of local SGD from theta, (clients, 4) float64."""
    theta = first() if theta is None else theta
    changes = []
    for client in cohort:
        local = theta.copy()
        for x, y in batches(client):
            local -= RATE * gradient(x, y, local)
        changes.append(local - theta)
    return np.array(changes)


def one_round(aggregator, strategy=None, cohort=COHORT, weigh_by="uniform", cohorts=None):
    """(what the aggregate moved the parameters by, the output) of rounds with server SGD(1.0)."""
    task = linear.task()
    algorithm = fedavg(
        task, optax.sgd(RATE), optax.sgd(1.0), aggregator=aggregator, weigh_by=weigh_by
    )
    engine, output = run(algorithm, strategy, cohorts or [cohort])
    return vector(output.state.params) - first(), output, engine


# The equality tests hold all other strategies to these.
STRATEGIES = {"one lane": jit, "three lanes": lambda: jit(Packing(lanes=3))}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clip_by_norm_scales_longer_updates_down(strategy):
    expected = updates()
    norms = np.linalg.norm(expected, axis=1)
    bound = np.median(norms)
    clipped = expected * np.minimum(1, bound / norms)[:, None]
    moved, output, _ = one_round([clip_by_norm(bound), mean()], STRATEGIES[strategy]())
    np.testing.assert_allclose(moved, clipped.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert output.metrics["aggregate/clipped_fraction"] == (norms > bound).mean() == 0.5


@pytest.mark.parametrize(
    ("strategy", "cohort"),
    [
        ("three lanes", COHORT),
        ("three lanes", (0, 2, 3)),
        *(("one lane", c) for c in [(0,), (0, 3), range(7)]),
    ],
)
def test_coordinate_median_equals_numpy(strategy, cohort):
    moved, _, _ = one_round(coordinate_median(), STRATEGIES[strategy](), tuple(cohort))
    np.testing.assert_allclose(moved, np.median(updates(cohort), axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregator", [mean(), coordinate_median()])
def test_nobody_changes_nothing(aggregator):
    moved, *_ = one_round(aggregator, cohorts=[(0, 1), ()])
    np.testing.assert_allclose(moved, one_round(aggregator, cohort=(0, 1))[0], rtol=1e-6)
    assert np.isfinite(moved).all()


def largest(values: np.ndarray, count: int) -> np.ndarray:
    kept = np.zeros_like(values)
    index = np.argsort(-np.abs(values))[:count]
    kept[index] = values[index]
    return kept


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("error_feedback", [True, False])
def test_top_k_remembers_what_it_has_not_sent(strategy, error_feedback):
    """Stich et al. 2018, Algorithm 1, client by client; 2 of 4 entries."""
    theta, memory = first(), np.zeros((len(linear.SIZES), 4))
    cohorts = [(0, 2, 3), (0, 3, 5), (0, 2, 5)]
    for cohort in cohorts:
        sent = []
        for client, update in zip(cohort, updates(cohort, theta), strict=True):
            value = update + memory[client]
            sent.append(largest(value, 2))
            if error_feedback:
                memory[client] = value - sent[-1]
        theta = theta + np.mean(sent, axis=0)
    aggregator = [top_k(0.5, error_feedback), mean()]
    moved, output, engine = one_round(aggregator, STRATEGIES[strategy](), cohorts=cohorts)
    np.testing.assert_allclose(moved, theta - first(), rtol=1e-5, atol=1e-6)
    assert output.metrics["traffic/bits_up"] == 3 * 2 * (32 + 2)
    if not error_feedback:
        assert engine.client_states is None
        return
    everyone = np.arange(len(linear.SIZES))
    states = engine.client_states.gather(everyone, everyone, (7,)).aggregator[0]
    np.testing.assert_allclose(states["w"], memory[:, :3], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(states["b"], memory[:, 3], rtol=1e-4, atol=1e-6)


def send(aggregator: Aggregator, value, seed: int, client_state=None) -> Sent:
    update = Update({"a": jnp.asarray(value, jnp.float32)}, jnp.float32(1))
    state = aggregator.init(update.value)
    return aggregator.client(state, update, client_state, jax.random.key(seed))


def test_quantization_is_unbiased_and_within_a_step():
    value = np.random.default_rng(0).normal(size=50)
    aggregator, levels = quantize(5), 5
    step = (value.max() - value.min()) / (levels - 1)
    many = jax.jit(jax.vmap(lambda seed: send(aggregator, value, seed).update.value["a"]))
    sent = np.asarray(many(np.arange(400)))
    assert np.abs(sent - value).max() < step * (1 + 1e-5)
    places = (sent - value.min()) / step
    np.testing.assert_allclose(places, np.round(places), atol=1e-4)
    # A draw's standard deviation is at most half a step.
    assert np.abs(sent.mean(axis=0) - value).max() < 4.5 * step / 2 / np.sqrt(len(sent))
    np.testing.assert_array_equal(
        send(aggregator, np.full(3, 0.7), 0).update.value["a"], np.float32(0.7)
    )


def test_the_sum_is_divided_by_the_expected_number_of_clients():
    """f_f of DP-FedAvg without its noise; the second cohort is half as large as expected."""
    norm = 0.5
    theta = first()
    for cohort in (COHORT, (0, 3)):
        raw = updates(cohort, theta)
        clipped = raw * np.minimum(1, norm / np.linalg.norm(raw, axis=1))[:, None]
        theta = theta + clipped.sum(axis=0) / len(COHORT)
    aggregator = [clip_by_norm(norm), gaussian_noise(0.0, norm), mean()]
    moved, _, _ = one_round(aggregator, cohorts=[COHORT, (0, 3)], weigh_by="examples")
    np.testing.assert_allclose(moved, theta - first(), rtol=1e-5, atol=1e-6)


def test_noise_has_the_stated_deviation_with_and_without_clients():
    task, multiplier, norm, rounds = linear.task(), 0.8, 0.5, 300
    aggregator = [clip_by_norm(norm), gaussian_noise(multiplier, norm), mean()]
    algorithm = fedavg(task, optax.sgd(0.0), optax.sgd(1.0), aggregator=aggregator)
    params = task.init(jax.random.key(0), None)
    batching = ClientBatching(4)
    engine = Engine(
        jit(), algorithm, linear.dataset(), batching, params=params, cohort_size=4, seed=0
    )
    state, path = engine.start(params), [first()]
    for number in range(rounds):
        cohort = np.arange(4 * (number % 2))
        output = engine.run(state, engine.prepare(number, cohort))
        state = output.state
        path.append(vector(state.params))
    std = multiplier * norm / 4
    assert output.metrics["aggregate/noise_std"] == pytest.approx(std)
    for noise in (np.diff(path, axis=0)[::2], np.diff(path, axis=0)[1::2]):
        assert noise.std() == pytest.approx(std, rel=4.5 / np.sqrt(2 * noise.size))
        assert np.abs(noise.mean(axis=0)).max() < 4.5 * std / np.sqrt(len(noise))
        assert len(np.unique(noise)) == noise.size


def test_chains_run_from_left_to_right_and_back_with_states_and_metrics_of_their_own():
    """Each link multiplies by its number on the client and adds it on the server."""

    def link(number: float) -> Aggregator:
        def client(state, update, client_state, key):
            value = jax.tree.map(lambda leaf: leaf * number, update.value)
            rounds = None if client_state is None else client_state + 1
            return Sent(
                update._replace(value=value), state=rounds, metrics={f"from{number}": state}
            )

        def server(state, total, each, later, cohort, key):
            later = jax.tree.map(lambda leaf: leaf + number, later)
            return Aggregated(later, state + 1, {f"count{number}": state + 1})

        return Aggregator(
            client,
            server,
            init=lambda value: jnp.float32(number),
            init_client=(lambda value: jnp.int32(0)) if number == 3.0 else None,
        )

    moved, output, engine = one_round([link(2.0), link(3.0), mean()], cohorts=[COHORT])
    np.testing.assert_allclose(moved, 6 * updates().mean(axis=0) + 5, rtol=1e-5, atol=1e-5)
    assert output.metrics["aggregate/count2.0"] == 3 and output.metrics["aggregate/count3.0"] == 4
    assert output.state.aggregator == (3.0, 4.0, ())
    assert (output.per_client["clients/from3.0"][:4] == 3).all()
    everyone = np.arange(7)
    counts = engine.client_states.gather(everyone, everyone, (7,)).aggregator[1]
    assert counts.tolist() == [1, 0, 1, 1, 0, 1, 0]


def test_a_chain_in_a_chain_draws_other_numbers():
    """The same link twice, once nested, must not repeat its noise."""
    drawn = []

    def noisy() -> Aggregator:
        def client(state, update, client_state, key):
            drawn.append(jax.random.uniform(key))
            return Sent(update)

        return Aggregator(client, lambda state, total, each, later, *_: Aggregated(later, state))

    nested = chain(noisy(), mean())
    both = chain(noisy(), nested)
    send(both, np.ones(2), 0)
    assert len(set(map(float, drawn))) == 2


@pytest.mark.parametrize(
    "links", [(), (clip_by_norm(1.0),), (mean(), clip_by_norm(1.0)), (mean(), mean())]
)
def test_a_chain_reduces_once_and_last(links):
    with pytest.raises(UserError, match="the last link of a chain, and no other"):
        chain(*links)


def test_an_aggregator_alone_makes_one_update_of_many():
    with pytest.raises(
        UserError, match=r"clip_by_norm.*have `reduces=True`; or put mean\(\) behind"
    ):
        as_aggregator(clip_by_norm(1.0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: clip_by_norm(0.0), "clip_by_norm.norm must be positive, got 0.0"),
        (lambda: gaussian_noise(-1.0, 1.0), "noise_multiplier must not be negative"),
        (lambda: gaussian_noise(1.0, -1.0), "gaussian_noise.norm must be positive"),
        (lambda: top_k(0.0), r"top_k.fraction must be in \(0, 1\], got 0.0"),
        (lambda: top_k(1.5), r"top_k.fraction must be in \(0, 1\], got 1.5"),
        (lambda: quantize(1), "quantize.levels must be at least 2, got 1"),
    ],
)
def test_numbers_out_of_range_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
