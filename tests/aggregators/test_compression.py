"""Compressors against their papers: values, expectations, error bounds, and bits to the last one."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedexp.aggregators import (
    chain,
    clip_by_norm,
    drive,
    ef21,
    error_feedback,
    half_precision,
    mean,
    qsgd,
    quantize,
    random_k,
    rotated_quantize,
    signs,
    terngrad,
    top_k,
)
from fedexp.aggregators.coding import entropy_bits
from fedexp.aggregators.rotations import _random_signs, walsh_hadamard
from fedexp.algorithms import fedavg, hypcluster, scaffold
from fedexp.contracts import Aggregator, Update
from fedexp.engine import Packing, jit
from fedexp.errors import UserError
from tests.support import linear
from tests.support.clients import batches, first, gradient, run, vector

RATE, DRAWS = 0.05, 600
A, B = 40, 24  # Entries of the two arrays of an update.


def update(seed: int = 0) -> np.ndarray:
    """Entries of two arrays, of different scales; one is zero."""
    values = np.random.default_rng(seed).normal(size=A + B).astype(np.float32)
    values[A:] *= 10
    values[3] = 0
    return values


def tree(values) -> dict[str, jax.Array]:
    return {"a": jnp.asarray(values[:A]).reshape(8, 5), "b": jnp.asarray(values[A:])}


def sent(links: list[Aggregator], values: np.ndarray, draws: int = DRAWS):
    """(draws, entries) what a chain decodes one client's update to, and the bits of each draw."""
    aggregator = chain(*links, mean())
    state = aggregator.init(tree(values))

    def one(key):
        result = aggregator.client(state, Update(tree(values), jnp.float32(1)), None, key)
        (value, _) = result.total[-1]
        return jnp.concatenate([value["a"].ravel(), value["b"]]), result.bits

    found, bits = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), draws))
    return np.asarray(found, np.float64), np.asarray(bits)


def check_unbiased(found: np.ndarray, values: np.ndarray) -> None:
    """The mean of the draws is the update, within 5 of its own standard deviations."""
    deviation = found.std(axis=0) / math.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - values) <= 5 * deviation + 1e-5)


def squared_error(found: np.ndarray, values: np.ndarray) -> float:
    return ((found - values) ** 2).sum(axis=1).mean()


@pytest.mark.parametrize("levels", [2, 5, 16])
def test_quantize(levels):
    """Theorem 2 of Suresh et al.: an error of at most d (max - min)^2 / (4 (k - 1)^2) an array."""
    values = update()
    found, bits = sent([quantize(levels)], values)
    check_unbiased(found, values)
    ranges = np.array([np.ptp(part) for part in (values[:A], values[A:])])
    steps = ranges / (levels - 1)
    assert np.abs(found - values).max() <= steps.max() * (1 + 1e-5)
    assert squared_error(found, values) <= (np.array([A, B]) * steps**2).sum() / 4
    assert (bits == (A + B) * math.ceil(math.log2(levels)) + 2 * 64).all()


def test_qsgd():
    """Lemma 3.1 of Alistarh et al.: an error of at most min(n / s^2, sqrt(n) / s) |v|^2 an array."""
    values, s = update(), 3
    found, bits = sent([qsgd(s, "fixed")], values)
    check_unbiased(found, values)
    parts = (slice(0, A), slice(A, None))
    norms = [np.linalg.norm(values[part]) for part in parts]
    for part, norm in zip(parts, norms, strict=True):
        size = len(values[part])
        bound = min(size / s**2, math.sqrt(size) / s) * norm**2
        assert squared_error(found[:, part], values[part]) <= bound
        levels = found[:, part] * s / norm
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
        assert (levels * values[part] >= 0).all() and np.abs(levels).max() <= s
    assert (bits == (A + B) * 3 + 2 * 32).all()


@pytest.mark.parametrize("deviations", [None, 1.0])
def test_terngrad(deviations):
    values = update()
    clipped = values.copy()
    for part in (slice(0, A), slice(A, None)):
        if deviations:
            bound = deviations * values[part].std()
            clipped[part] = np.clip(values[part], -bound, bound)
        allowed = np.abs(clipped[part]).max() * np.array([-1, 0, 1])
        found, bits = sent([terngrad(deviations)], values)
        assert np.isclose(found[:, part][..., None], allowed, rtol=1e-5).any(axis=-1).all()
    check_unbiased(found, clipped)
    assert (bits == (A + B) * 2 + 2 * 32).all()


@pytest.mark.parametrize("scaled", [True, False])
def test_signs(scaled):
    values = update()
    found, bits = sent([signs(scaled)], values, draws=1)
    scale = np.repeat([np.abs(values[:A]).mean(), np.abs(values[A:]).mean()], [A, B])
    expected = np.where(values < 0, -1, 1) * (scale if scaled else 1)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    assert bits[0] == A + B + (64 if scaled else 0)


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision(dtype, precision):
    values = update()
    found, bits = sent([half_precision(dtype)], values, draws=1)
    assert np.abs(found[0] - values).max() > 0
    assert (np.abs(found[0] - values) <= precision * np.abs(values) * 1.001).all()
    assert bits[0] == (A + B) * 16


def test_random_k():
    values, count = update(), math.ceil(0.2 * (A + B))
    found, bits = sent([random_k(0.2)], values)
    check_unbiased(found, values)
    assert ((found != 0).sum(axis=1) <= count).all()
    assert (bits == 32 * count).all()
    found, _ = sent([random_k(0.2, unbiased=False)], values)
    assert np.all((found == 0) | np.isclose(found, values, rtol=1e-6))
    assert ((found[:, 3:4] == values[3]) & ((found != 0).sum(axis=1) >= count - 1)[:, None]).all()


def test_the_transform_is_hadamards():
    for size in (2, 8, 32, 64, 2048):
        matrix = np.ones((1, 1))
        while len(matrix) < size:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        values = np.random.default_rng(size).normal(size=(3, size))
        found = walsh_hadamard(jnp.asarray(values, jnp.float32))
        np.testing.assert_allclose(found, values @ matrix / math.sqrt(size), atol=1e-5)
        np.testing.assert_allclose(walsh_hadamard(found), values, atol=1e-5)


@pytest.mark.parametrize("block", [16, 2**15])
def test_rotated_quantize(block):
    """It pays where few entries are large: Theorem 3 of Suresh et al. has log d in place of d."""
    values, levels = update() / 10, 4
    values[7], values[20] = 50, -50
    found, bits = sent([rotated_quantize(levels, block)], values)
    check_unbiased(found, values)
    plain, _ = sent([quantize(levels)], values)
    assert squared_error(found, values) < 0.3 * squared_error(plain, values)
    blocks = math.ceil((A + B) / min(block, 64))
    assert (bits == (A + B) * 2 + blocks * 64).all()


@pytest.mark.parametrize("structured", [True, False])
def test_drive(structured):
    """Section 4 of Vargaftik et al.: the error over |x|^2 tends to pi / 2 - 1 = 0.57."""
    values = update()
    found, bits = sent([drive(64, structured)], values, draws=4000)
    ratio = squared_error(found, values) / (values**2).sum()
    assert ratio == pytest.approx(math.pi / 2 - 1, abs=0.06)
    if not structured:  # Theorem 3 is about uniform rotations.
        check_unbiased(found, values)
    assert (bits == A + B + 32).all()
    # A draw is the update, rotated, as signs of one length, and rotated back: of this length.
    norms = (values**2).sum() / np.linalg.norm(found, axis=1)
    assert (norms <= np.linalg.norm(values) * (1 + 1e-4)).all()


def arithmetic_bits(symbols: np.ndarray) -> float:
    """FedJAX's arithmetic_encoding_num_bits, but for the 64 bits of two floats that it counts in."""
    _, counts = np.unique(symbols, return_counts=True)
    share = counts / counts.sum()
    kinds, total = len(counts), counts.sum()
    entropy = -(share * np.log2(share)).sum()
    return kinds * np.log2(np.e * (total + kinds) / kinds) + total * entropy + 2


def test_entropy_bits_are_fedjaxs():
    symbols = np.random.default_rng(0).integers(0, 7, 500) ** 2
    everywhere = jnp.ones(500, bool)
    assert entropy_bits(symbols, everywhere, 50) == pytest.approx(arithmetic_bits(symbols), 1e-5)
    mask = np.arange(500) % 3 == 0
    assert entropy_bits(symbols, mask, 50) == pytest.approx(arithmetic_bits(symbols[mask]), 1e-5)
    # What FedJAX's function returned for these vectors, head of July 2025.
    rng = np.random.default_rng(0)
    for drawn, bits in (
        ([0, 0, 0, 1, 1, 2, -1, 0, 3, 0], 100.7479248046875),
        (rng.integers(-3, 4, size=1000), 2929.0302734375),
        (rng.geometric(0.3, size=5000), 14955.9736328125),
    ):
        places = np.asarray(drawn) - np.min(drawn)
        found = entropy_bits(places, jnp.ones(len(places), bool), 64)
        assert found + 64 == pytest.approx(bits, rel=2e-6)


@pytest.mark.parametrize(
    ("link", "scales"),
    [(quantize(8, "entropy"), 2), (qsgd(2), 1), (terngrad(coding="entropy"), 1)],
)
def test_entropy_codes_are_counted_as_drawn(link, scales):
    values = update()
    found, bits = sent([link], values, draws=20)
    for value, counted in zip(found, bits, strict=True):
        parts = [arithmetic_bits(part) for part in (value[:A], value[A:])]
        assert counted == pytest.approx(sum(parts) + 2 * 32 * scales, rel=1e-5)


COUNT = math.ceil(0.25 * (A + B))
INDEX = math.ceil(math.log2(A + B))


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ([], 32 * (A + B)),
        ([clip_by_norm(0.1)], 32 * (A + B)),
        ([top_k(0.25, False)], COUNT * (32 + INDEX)),
        ([top_k(0.25, False), quantize(16)], COUNT * (4 + INDEX) + 2 * 64),
        ([quantize(16), top_k(0.25, False)], COUNT * (4 + INDEX) + 2 * 64),
        ([random_k(0.25), half_precision(), clip_by_norm(0.1)], COUNT * 16),
        ([half_precision(), signs()], A + B + 2 * 32),
        ([quantize(16), quantize(4)], 2 * (A + B) + 2 * 64),
        ([rotated_quantize(4, 16), top_k(0.25, False)], COUNT * (2 + INDEX) + 4 * 64),
    ],
)
def test_chains_count_what_is_sent_in_the_end(links, expected):
    _, bits = sent(links, update(), draws=1)
    assert bits[0] == expected


def test_what_is_not_sent_stays_zero():
    values = update()
    values[A:] /= 10
    for link in (quantize(4), qsgd(2), signs(), terngrad()):
        found, _ = sent([top_k(0.25, False), link], values, draws=3)
        largest = np.argsort(-np.abs(values))[:COUNT]
        assert (np.delete(found, largest, axis=1) == 0).all()
    found, _ = sent([top_k(0.25, False), quantize(2)], values, draws=1)
    for part in (largest[largest < A], largest[largest >= A]):
        extremes = [values[part].min(), values[part].max()]
        assert np.isclose(found[0][part][:, None], extremes, rtol=1e-5).any(axis=1).all()


COHORTS = [(0, 2, 3), (0, 3, 5), (0, 2, 5)]


def updates(cohort, theta: np.ndarray) -> dict[int, np.ndarray]:
    """The client updates of one round of local SGD from theta."""
    changes = {}
    for client in cohort:
        local = theta.copy()
        for x, y in batches(client):
            local -= RATE * gradient(x, y, local)
        changes[client] = local - theta
    return changes


def moved(links, strategy=None) -> tuple[np.ndarray, dict]:
    algorithm = fedavg(
        linear.task(), optax.sgd(RATE), optax.sgd(1.0), aggregator=links, weigh_by="uniform"
    )
    _, output = run(algorithm, strategy, COHORTS)
    return vector(output.state.params) - first(), output.metrics


def scaled_signs(value: np.ndarray) -> np.ndarray:
    """Of the arrays w (3,) and b (1,), each by its own mean magnitude."""
    scale = np.repeat([np.abs(value[:3]).mean(), np.abs(value[3])], [3, 1])
    return scale * np.where(value < 0, -1, 1)


def test_error_feedback_of_signs_equals_numpy():
    theta, memory = first(), np.zeros((7, 4))
    for cohort in COHORTS:
        changes = []
        for client, change in updates(cohort, theta).items():
            value = change + memory[client]
            changes.append(scaled_signs(value))
            memory[client] = value - changes[-1]
        theta = theta + np.mean(changes, axis=0)
    for strategy in (jit(), jit(Packing(lanes=3))):
        found, metrics = moved([error_feedback(signs()), mean()], strategy)
        np.testing.assert_allclose(found, theta - first(), rtol=1e-5, atol=1e-6)
        assert metrics["traffic/bits_up"] == 3 * (4 + 2 * 32)


def test_ef21_equals_numpy():
    theta, known, total = first(), np.zeros((7, 4)), np.zeros(4)
    for cohort in COHORTS:
        for client, change in updates(cohort, theta).items():
            difference = change - known[client]
            compressed = np.zeros(4)
            largest = np.argsort(-np.abs(difference))[:2]
            compressed[largest] = difference[largest]
            known[client] += compressed
        total = known.mean(axis=0)
        theta = theta + total
    for strategy in (jit(), jit(Packing(lanes=3))):
        found, metrics = moved([ef21(top_k(0.5, False)), mean()], strategy)
        np.testing.assert_allclose(found, theta - first(), rtol=1e-5, atol=1e-6)
        assert metrics["traffic/bits_up"] == 3 * 2 * (32 + 2)


def test_a_majority_vote():
    theta = first()
    for cohort in COHORTS:
        votes = [np.where(change < 0, -1, 1) for change in updates(cohort, theta).values()]
        theta = theta + np.sign(np.sum(votes, axis=0))
    found, _ = moved([signs(scaled=False, majority_vote=True), mean()])
    np.testing.assert_allclose(found, theta - first(), rtol=1e-5)


@pytest.mark.parametrize("option", [1, 2])
def test_scaffold_is_counted_too(option):
    algorithm = scaffold(linear.task(), RATE, option=option, aggregator=[quantize(16), mean()])
    _, output = run(algorithm, None, COHORTS)
    assert output.metrics["traffic/bits_up"] == 3 * 2 * (4 * 4 + 2 * 64)
    # Parameters and the server's control variate, once.
    assert output.metrics["traffic/bits_down"] == 3 * 32 * (4 + 4)


def test_what_needs_no_aggregator_is_counted_too():
    _, output = run(fedavg(linear.task(), optax.sgd(RATE), optax.sgd(1.0)), None, COHORTS)
    assert output.metrics["traffic/bits_up"] == output.metrics["traffic/bits_down"] == 3 * 32 * 4
    algorithm = hypcluster(linear.task(), 2, optax.sgd(RATE), optax.sgd(1.0))
    _, output = run(algorithm, None, COHORTS)
    assert output.metrics["traffic/bits_down"] >= 3 * 2 * 32 * 4  # Both models.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantize(1), "quantize.levels must be at least 2, got 1"),
        (lambda: quantize(4, "huffman"), "coding must be 'fixed' or 'entropy', got 'huffman'"),
        (lambda: rotated_quantize(1), "rotated_quantize.levels must be at least 2"),
        (lambda: rotated_quantize(4, 100), "a block must be a power of 2, got 100"),
        (lambda: qsgd(0), "qsgd.levels must be at least 1"),
        (lambda: terngrad(0.0), "terngrad.clip_deviations must be positive or None, got 0.0"),
        (lambda: signs(True, True), "a majority vote has no scale; bind scaled=False"),
        (lambda: top_k(0.0), r"top_k.fraction must be in \(0, 1\], got 0.0"),
        (lambda: random_k(1.5), r"random_k.fraction must be in \(0, 1\], got 1.5"),
        (
            lambda: error_feedback(top_k()),
            "must be a link that keeps nothing .* error_feedback = F",
        ),
        (lambda: ef21(mean()), "ef21.compressor must be a link"),
        (lambda: sent([qsgd(), top_k(0.5, False)], update()), "must be the last that compresses"),
        (lambda: sent([top_k(0.5, False), drive()], update()), "bind it before that one"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("size", [4, 64])
def test_rotations_begin_with_fair_signs(size):
    sign = np.asarray(_random_signs(jax.random.key(0), 6400, size))
    assert sign.shape == (6400, size) and set(np.unique(sign)) == {-1, 1}
    assert np.abs(sign.mean(axis=0)).max() < 5 / math.sqrt(6400)
    products = sign[:, :1] * sign[:, 1:]
    assert np.abs(products.mean(axis=0)).max() < 5 / math.sqrt(6400)
