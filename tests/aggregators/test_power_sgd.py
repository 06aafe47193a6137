"""PowerSGD against NumPy, and against the best that its rank allows."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedexp.aggregators import (
    chain,
    clip_by_norm,
    ef21,
    error_feedback,
    mean,
    power_sgd,
    quantize,
    top_k,
)
from fedexp.contracts import Aggregator, Update
from fedexp.errors import UserError

RANK = 2
# A convolution of 3 x 2 x 2 -> 9, a layer, two that factors would not make smaller, a vector.
SHAPES = {"conv": (3, 2, 2, 9), "dense": (7, 8), "small": (4, 4), "bias": (9,), "scale": ()}
BITS = 32 * (RANK * (12 + 9) + RANK * (7 + 8) + 16 + 9 + 1)


def update(seed: int, rank: int | None = None) -> dict[str, np.ndarray]:
    """Random arrays; matrices of a rank, if one is given."""
    rng = np.random.default_rng(seed)
    value = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name in ("conv", "dense") if rank else ():
        rows, columns = matrix(value, name).shape
        product = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
        value[name] = product.reshape(SHAPES[name]).astype(np.float32)
    return value


def matrix(value, name: str) -> np.ndarray:
    """As PowerSGD's authors flatten a layer, but for their order of axes."""
    return np.asarray(value[name], np.float64).reshape(-1, SHAPES[name][-1])


def send(aggregator: Aggregator):
    """A compiled round of an aggregator: (state, values of clients, their states) -> the same, and bits."""

    @jax.jit
    def a_round(state, values, kept):
        def one(value, own):
            return aggregator.client(state, Update(value, jnp.float32(1)), own, jax.random.key(0))

        sent = jax.vmap(one)(values, kept)
        total = jax.tree.map(lambda leaf: leaf.sum(axis=0), sent.total)
        cohort = types.SimpleNamespace(size=jnp.int32(len(sent.bits)), population=len(sent.bits))
        result = aggregator.server(state, total, sent.each, None, cohort, jax.random.key(0))
        return result.update, result.state, sent.state, sent.bits

    return a_round


def stacked(values: list) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *values)


def factors(state) -> list[np.ndarray]:
    """The shared Q of 'conv' and of 'dense', from a chain's state."""
    return [np.asarray(factor, np.float64) for factor in state[0]]


@pytest.mark.parametrize("feedback", [False, True])
def test_rounds_equal_numpy(feedback):
    link = power_sgd(RANK)
    aggregator = chain(error_feedback(link) if feedback else link, mean())
    state = aggregator.init(update(0))
    shared = dict(zip(("conv", "dense"), factors(state), strict=True))
    kept = None
    if feedback:
        own = aggregator.init_client(update(0))
        kept = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), own)
    memory = {name: np.zeros((3, *matrix(update(0), name).shape)) for name in shared}
    a_round = send(aggregator)
    for number in range(3):
        values = [update(10 * number + i) for i in range(3)]
        found, state, kept, bits = a_round(state, stacked(values), kept)
        assert (bits == BITS).all()
        for name in SHAPES:
            if name not in shared:
                expected = np.mean([value[name] for value in values], axis=0)
                np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
                continue
            products = []
            for i, value in enumerate(values):
                m = matrix(value, name) + feedback * memory[name][i]
                p = np.linalg.qr(m @ shared[name])[0]
                products.append(p @ (p.T @ m))
                memory[name][i] = m - products[-1]
            aggregate = np.mean(products, axis=0)
            np.testing.assert_allclose(matrix(found, name), aggregate, rtol=1e-4, atol=1e-5)
            shared[name] = aggregate.T @ np.linalg.qr(aggregate @ shared[name])[0]


def test_what_has_the_rank_is_sent_exactly():
    value = update(1, rank=RANK)
    aggregator = chain(power_sgd(RANK), mean())
    found, *_ = send(aggregator)(aggregator.init(value), stacked([value]), None)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], value[name], rtol=1e-4, atol=1e-5)
    aggregator = chain(power_sgd(100), mean())
    found, state, _, bits = send(aggregator)(aggregator.init(value), stacked([value]), None)
    jax.tree.map(np.testing.assert_array_equal, found, value)
    assert state[0] == () and bits[0] == 32 * (108 + 56 + 16 + 9 + 1)


def test_a_warm_start_comes_to_the_best_of_this_rank():
    """Iterations never grow the error, and end at that of the singular values that are left out."""
    value = update(2)
    aggregator = chain(power_sgd(RANK), mean())
    state, a_round = aggregator.init(value), send(aggregator)
    errors = []
    for _ in range(60):
        found, state, *_ = a_round(state, stacked([value]), None)
        errors.append(
            [np.linalg.norm(matrix(found, n) - matrix(value, n)) for n in ("conv", "dense")]
        )
    for name, of_rounds in zip(("conv", "dense"), np.transpose(errors), strict=True):
        singular = np.linalg.svd(matrix(value, name), compute_uv=False)
        best = np.sqrt((singular[RANK:] ** 2).sum())
        assert (np.diff(of_rounds) <= 1e-4).all()
        assert of_rounds[0] > 1.05 * best and best * (1 - 1e-5) <= of_rounds[-1] <= 1.01 * best


def test_nobody_leaves_the_factors_as_they_were():
    aggregator = power_sgd(RANK)
    state = aggregator.init(update(0))
    cohort = types.SimpleNamespace(size=jnp.int32(0))
    nothing = jax.tree.map(jnp.zeros_like, update(0))
    after = aggregator.server(state, (), (), nothing, cohort, None).state
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert not np.allclose(power_sgd(RANK, seed=1).init(update(0))[0], state[0])


@pytest.mark.parametrize(
    "links",
    [
        [quantize(16), power_sgd(RANK)],
        [power_sgd(RANK), clip_by_norm(0.1)],
        [ef21(power_sgd(RANK))],
    ],
)
def test_chains_count_the_factors(links):
    aggregator = chain(*links, mean())
    value, kept = update(0), None
    if aggregator.init_client:
        kept = jax.tree.map(lambda leaf: leaf[None], aggregator.init_client(value))
    *_, bits = send(aggregator)(aggregator.init(value), stacked([value]), kept)
    assert bits[0] == BITS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: power_sgd(0), "power_sgd.rank must be at least 1, got 0"),
        (lambda: [power_sgd(), quantize()], "or power_sgd, must be the last that compresses"),
        (lambda: [power_sgd(), top_k(0.5, False)], "must be the last that compresses"),
        (lambda: [quantize(4, "entropy"), power_sgd()], "must be the last that compresses"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        aggregator = chain(*make(), mean())
        send(aggregator)(aggregator.init(update(0)), stacked([update(0)]), None)
