from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedexp.data.dataset import FederatedDataset
from fedexp.errors import UserError
from fedexp.evaluators import Evaluator
from fedexp.models.tabular import LinearModel
from fedexp.tasks import cox, mean_loss

RNG = np.random.default_rng(0)
SIZE = 40
# Few different times and scores, so that there are ties of both.
BATCH = {
    "x": RNG.integers(-2, 3, (SIZE, 2)).astype(np.float32),
    "event": RNG.integers(0, 2, SIZE).astype(np.int32),
    "time": RNG.integers(1, 15, SIZE).astype(np.float32),
}
PARAMS = {"Dense_0": {"kernel": np.array([[0.5], [0.25]], np.float32), "bias": np.ones(1, "f")}}
SCORES = BATCH["x"].astype(np.float64) @ [0.5, 0.25]


def partial_likelihood(rows: np.ndarray) -> float:
    """Breslow's, negative, over the number of rows; subject by subject."""
    score, event, time = SCORES[rows], BATCH["event"][rows], BATCH["time"][rows]
    terms = [
        s - np.log(np.exp(score[time >= t]).sum())
        for s, e, t in zip(score, event, time, strict=True)
        if e
    ]
    return -np.sum(terms) / len(rows)


def concordance(rows: np.ndarray) -> float:
    """Harrell's, pair by pair: an event at the time of a censoring came first."""
    right = pairs = 0.0
    for i, j in itertools.permutations(rows, 2):
        (e, t), (f, u) = ((BATCH["event"][k], BATCH["time"][k]) for k in (i, j))
        if e and (t < u or (t == u and not f)):
            pairs += 1
            right += 1.0 if SCORES[i] > SCORES[j] else 0.5 if SCORES[i] == SCORES[j] else 0.0
    return right / pairs


@pytest.mark.parametrize("real", [SIZE, 25])
def test_loss_and_c_index_are_those_of_their_definitions(real):
    mask = RNG.permutation(np.arange(SIZE) < real)
    rows = np.flatnonzero(mask)
    # Padding is copies of real rows.
    batch = {
        name: values[np.where(mask, np.arange(SIZE), rows[0])] for name, values in BATCH.items()
    }
    loss, sums = mean_loss(cox(LinearModel()), PARAMS, batch, jnp.asarray(mask), None)
    np.testing.assert_allclose(loss, partial_likelihood(rows), rtol=1e-5)
    assert sums["loss"].weights == real
    index = sums["c_index"].values / sums["c_index"].weights
    np.testing.assert_allclose(index, concordance(rows), rtol=1e-6)


def test_padding_alone_has_no_gradient():
    def loss(params):
        return mean_loss(cox(LinearModel()), params, BATCH, jnp.zeros(SIZE, bool), None)[0]

    value, grads = jax.value_and_grad(loss)(PARAMS)
    assert value == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_an_evaluation_of_one_batch_compares_all_pairs():
    data = FederatedDataset(BATCH, np.array([0, 15, SIZE]), np.array(["a", "b"]))
    task = cox(LinearModel())
    found = Evaluator(task, data, batch_size=1000)(PARAMS).metrics
    np.testing.assert_allclose(found["c_index"], concordance(np.arange(SIZE)), rtol=1e-6)
    np.testing.assert_allclose(found["loss"], partial_likelihood(np.arange(SIZE)), rtol=1e-5)


def test_events_are_zero_or_one():
    data = FederatedDataset(
        BATCH | {"event": BATCH["event"] + 1}, np.array([0, SIZE]), np.array(["a"])
    )
    with pytest.raises(UserError, match="'event' must have ids in"):
        cox(LinearModel()).check(data)
