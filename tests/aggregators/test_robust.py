"""Robust rules against NumPy, on updates of any kind and through whole rounds."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedexp.aggregators import (
    a_little_is_enough,
    attacked,
    bulyan,
    centred_clipping,
    clip_by_norm,
    coordinate_median,
    gaussian_attack,
    geometric_median,
    krum,
    mean,
    sign_flip,
    trimmed_mean,
)
from fedexp.aggregators.ordering import sort_clients
from fedexp.algorithms import fedavg
from fedexp.contracts import Clients, Cohort, Update
from fedexp.data import FederatedDataset, FederatedSplits, flipped_labels
from fedexp.data.attackers import is_attacker
from fedexp.engine import Packing, jit
from fedexp.errors import UserError
from tests.support import linear
from tests.support.clients import batches, first, gradient, run, vector

SIZE = 11


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 33])
def test_clients_are_sorted_like_numpy_s(size):
    values = np.random.default_rng(size).normal(size=(size, 3, 5)).astype(np.float32)
    values[values > 1.5] = np.inf
    values[values < -1.5] = -np.inf
    values[0, 0] = np.nan
    expected = np.sort(np.where(np.isnan(values), np.inf, values), axis=0)
    np.testing.assert_array_equal(jax.jit(sort_clients)(values), expected)


def points(seed: int = 0, size: int = SIZE) -> np.ndarray:
    """Updates of which two are far off, (clients, 6) float64."""
    values = np.random.default_rng(seed).normal(size=(size, 6))
    values[1] += 30
    values[4] -= 50
    return values


def aggregated(aggregator, values: np.ndarray, state=None):
    """The rule's answer to updates that lie in a table with empty slots; and its next state."""
    slots = len(values) + 3
    real = np.zeros(slots, bool)
    real[np.random.default_rng(1).choice(slots, len(values), replace=False)] = True
    table = np.zeros((slots, 6), np.float32)
    table[real] = values
    none = jnp.zeros(slots, jnp.int32)
    cohort = Cohort(
        jnp.int32(0),
        jnp.int32(len(values)),
        jnp.asarray(real),
        Clients(none, none, none),
        jax.random.key(0),
        jax.random.key(1),
        expected_size=len(values),
        population=100,
    )

    def tree(rows):  # Of two leaves, one with two axes.
        return {"a": rows[..., :4].reshape(*rows.shape[:-1], 2, 2), "b": rows[..., 4:]}

    state = aggregator.init(tree(table[0])) if state is None else state
    send = jax.vmap(lambda row: aggregator.client(state, Update(tree(row), 1.0), None, None).each)
    each = send(jnp.asarray(table))

    @jax.jit
    def server():
        result = aggregator.server(state, (), each, None, cohort, None)
        return result._replace(metrics=dict(result.metrics))

    result = server()
    value = np.concatenate([np.ravel(result.update["a"]), result.update["b"]])
    return value, result.state, result.metrics


def distances(values: np.ndarray) -> np.ndarray:
    return ((values[:, None] - values[None]) ** 2).sum(axis=2)


def krum_choice(values: np.ndarray, f: int) -> int:
    """The client with the lowest score, from the definition."""
    scores = [
        sum(sorted(np.delete(row, i))[: max(len(values) - f - 2, 1)])
        for i, row in enumerate(distances(values))
    ]
    return int(np.argmin(scores))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.45])
@pytest.mark.parametrize("size", [10, 11])
def test_trimmed_mean(fraction, size):
    values = points(size=size)
    cut = int(fraction * size + 1e-6)
    expected = np.sort(values, axis=0)[cut : size - cut].mean(axis=0)
    found, _, _ = aggregated(trimmed_mean(fraction), values)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_krum_selects_the_lowest_scores(seed):
    values, f = points(seed), 2
    found, _, _ = aggregated(krum(f), values)
    np.testing.assert_allclose(found, values[krum_choice(values, f)], rtol=1e-6)
    scores = [
        sum(sorted(np.delete(row, i))[: SIZE - f - 2]) for i, row in enumerate(distances(values))
    ]
    expected = values[np.argsort(scores)[:5]].mean(axis=0)
    found, _, _ = aggregated(krum(f, num_selected=5), values)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [11, 12])
def test_bulyan_is_krum_again_and_again_and_then_a_trimmed_mean(seed, size):
    values, f = points(seed, size), 2
    left, selected = list(range(size)), []
    while len(selected) < size - 2 * f:
        selected.append(left.pop(krum_choice(values[left], f)))
    chosen = values[selected]
    nearest = np.argsort(np.abs(chosen - np.median(chosen, axis=0)), axis=0)[: size - 4 * f]
    expected = np.take_along_axis(chosen, nearest, axis=0).mean(axis=0)
    found, _, _ = aggregated(bulyan(f), values)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_geometric_median_has_the_least_summed_distance():
    values = points()
    found, _, metrics = aggregated(geometric_median(iterations=200), values)

    def summed(point):
        return np.linalg.norm(values - point, axis=1).sum()

    assert summed(found) < summed(values.mean(axis=0)) * 0.9
    for axis, step in itertools.product(range(6), (-1e-2, 1e-2)):
        assert summed(found) < summed(found + step * np.eye(6)[axis])
    assert metrics["distance"] == pytest.approx(summed(found) / SIZE, rel=1e-5)
    # One iteration by hand.
    mean = values.mean(axis=0)
    weights = 1 / np.linalg.norm(values - mean, axis=1)
    found, _, _ = aggregated(geometric_median(iterations=1), values)
    np.testing.assert_allclose(found, weights @ values / weights.sum(), rtol=1e-5)


def test_centred_clipping_starts_where_it_ended():
    state, centre, radius = None, np.zeros(6), 4.0
    aggregator = centred_clipping(radius, iterations=2)
    for seed in range(3):
        values = points(seed)
        for _ in range(2):
            away = values - centre
            length = np.linalg.norm(away, axis=1)
            centre = centre + (away * np.minimum(1, radius / length)[:, None]).mean(axis=0)
        found, state, metrics = aggregated(aggregator, values, state)
        np.testing.assert_allclose(found, centre, rtol=1e-4, atol=1e-5)
        assert metrics["clipped_fraction"] == pytest.approx((length > radius).mean())


RULES = {
    "trimmed_mean": trimmed_mean(0.25),
    "krum": krum(0, num_selected=2),
    "bulyan": bulyan(0),
    "geometric_median": geometric_median(),
    "centred_clipping": centred_clipping(0.1),
}


@pytest.mark.parametrize("name", RULES)
def test_rounds_are_alike_wherever_they_run(name):
    def moved(strategy, cohorts):
        algorithm = fedavg(linear.task(), optax.sgd(0.05), optax.sgd(1.0), aggregator=RULES[name])
        _, output = run(algorithm, strategy, cohorts)
        return vector(output.state.params) - first()

    cohorts = [(0, 2, 3, 5), (6, 5, 2, 1)]
    one = moved(jit(), cohorts)
    np.testing.assert_allclose(moved(jit(Packing(lanes=3)), cohorts), one, rtol=1e-5, atol=1e-6)
    nobody = moved(jit(), [*cohorts, ()])
    assert np.isfinite(nobody).all()
    if name != "centred_clipping":  # Which goes on by its last aggregate.
        np.testing.assert_allclose(nobody, one, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trimmed_mean(0.5), r"trimmed_mean.fraction must be in \[0, 0.5\), got 0.5"),
        (lambda: krum(-1), "krum.num_attackers must not be negative"),
        (lambda: krum(1, 0), "krum.num_selected must be at least 1"),
        (lambda: bulyan(-1), "bulyan.num_attackers must not be negative"),
        (lambda: geometric_median(0), "geometric_median.iterations must be at least 1"),
        (lambda: geometric_median(3, 0.0), "geometric_median.smoothing must be positive"),
        (lambda: centred_clipping(0.0), "centred_clipping.radius must be positive"),
        (lambda: centred_clipping(1.0, 0), "centred_clipping.iterations must be at least 1"),
        (
            lambda: aggregated(krum(5), points()),
            "krum of 5 attackers needs a cohort of at least 13",
        ),
        (lambda: aggregated(bulyan(3), points()), "bulyan of 3 attackers needs .* at least 15"),
    ],
)
def test_what_a_rule_cannot_bear_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


COHORT = (0, 1, 2, 3, 5, 6)


def attackers(fraction: float, seed: int = 0) -> set[int]:
    return {c for c in COHORT if is_attacker(c, fraction, seed)}


def updates_of(cohort) -> np.ndarray:
    """The client updates of a round of local SGD from the first parameters."""
    changes = []
    for client in cohort:
        local = first()
        for x, y in batches(client):
            local -= 0.05 * gradient(x, y, local)
        changes.append(local - first())
    return np.array(changes)


@pytest.mark.parametrize("strategy", [jit(), jit(Packing(lanes=3))])
def test_attacks_change_the_updates_of_attackers_alone(strategy):
    theirs = [i for i, c in enumerate(COHORT) if c in attackers(0.5, seed=3)]
    assert theirs == [2, 3]
    honest = updates_of(COHORT)

    def moved(attack, rule):
        aggregator = attacked(rule, attack, fraction=0.5, seed=3)
        algorithm = fedavg(linear.task(), optax.sgd(0.05), optax.sgd(1.0), aggregator, "uniform")
        _, output = run(algorithm, strategy, [COHORT])
        assert output.metrics["aggregate/attackers"] == len(theirs)
        return vector(output.state.params) - first()

    flipped = honest.copy()
    flipped[theirs] *= -3
    small = honest.copy()
    small[theirs] = honest[theirs].mean(axis=0) - 1.5 * honest[theirs].std(axis=0)
    for attack, expected in ((sign_flip(3.0), flipped), (a_little_is_enough(1.5), small)):
        np.testing.assert_allclose(moved(attack, None), expected.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            moved(attack, coordinate_median()), np.median(expected, axis=0), rtol=1e-5, atol=1e-6
        )
    # Within the rule, after clipping; what is clipped is what attackers send.
    norms = np.linalg.norm(flipped, axis=1)
    clipped = flipped * np.minimum(1, 0.5 / norms)[:, None]
    found = moved(sign_flip(3.0), [clip_by_norm(0.5), mean()])
    np.testing.assert_allclose(found, clipped.mean(axis=0), rtol=1e-5, atol=1e-6)
    noisy = moved(gaussian_attack(0.01), None) - np.delete(honest, theirs, axis=0).sum(axis=0) / 6
    assert 0 < np.abs(noisy).max() < 0.05


def test_attackers_are_the_same_whatever_they_do():
    train = linear.dataset()
    features = {"y": np.arange(train.num_examples) % 5}
    data = FederatedDataset(features, train.offsets, train.client_ids)
    flipped = flipped_labels(FederatedSplits(data, data), 0.5, num_classes=5)
    for client in range(train.num_clients):
        label, before = flipped.train.client(client)["y"], data.client(client)["y"]
        expected = 4 - before if is_attacker(client, 0.5, 0) else before
        np.testing.assert_array_equal(label, expected)
    np.testing.assert_array_equal(flipped.test.features["y"], features["y"])
    share = np.mean([is_attacker(client, 0.3, 1) for client in range(400)])
    assert abs(share - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / 400)


def test_attackers_hardly_move_a_rule_that_holds():
    """Two of eleven updates are far off: a mean is drawn away, no rule is."""
    values = points()
    honest = np.delete(values, [1, 4], axis=0).mean(axis=0)
    rules = [trimmed_mean(0.2), krum(2), bulyan(2), geometric_median(), coordinate_median()]
    away = [np.linalg.norm(aggregated(rule, values)[0] - honest) for rule in rules]
    assert max(away) < 2.5 < np.linalg.norm(values.mean(axis=0) - honest)
