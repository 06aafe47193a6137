from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedexp.errors import UserError
from fedexp.tasks.base import Measure, add_by_segment, confusion_counts, masked_sums
from fedexp.tasks.metrics import accuracy, cross_entropy, top_k_accuracy

RNG = np.random.default_rng(0)
LOGITS = RNG.integers(0, 4, (200, 7)).astype(np.float32)  # Few values: most rows hold ties.
LABELS = RNG.integers(0, 7, 200).astype(np.int32)


def test_accuracy_with_ties():
    measure = accuracy()(jnp.asarray(LOGITS), {"y": LABELS})
    np.testing.assert_array_equal(measure.values, np.argmax(LOGITS, 1) == LABELS)
    np.testing.assert_array_equal(measure.weights, np.ones(200))
    assert measure.values.dtype == measure.weights.dtype == jnp.float32


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_top_k_with_ties(k):
    best = np.argsort(-LOGITS, axis=1, kind="stable")[:, :k]
    expected = (best == LABELS[:, None]).any(1)
    values = top_k_accuracy(k)(jnp.asarray(LOGITS), {"y": LABELS}).values
    np.testing.assert_array_equal(values, expected)


def test_top_k_counts_no_nan():
    logits = jnp.array([[jnp.nan, jnp.nan, jnp.nan], [0.0, 1.0, jnp.nan]])
    values = top_k_accuracy(2)(logits, {"y": jnp.array([0, 0])}).values
    np.testing.assert_array_equal(values, [0, 0])


def test_more_than_there_are_classes_is_refused():
    with pytest.raises(UserError, match="top_k_accuracy.k is 4, but there are 3 classes"):
        top_k_accuracy(4)(jnp.zeros((2, 3)), {"y": jnp.array([0, 0])})


def test_top_k_refuses_zero():
    with pytest.raises(UserError, match=r"top_k_accuracy\.k must be at least 1, got 0"):
        top_k_accuracy(0)


def test_cross_entropy():
    logits = RNG.normal(0, 30, (50, 7)).astype(np.float32)
    labels = RNG.integers(0, 7, 50)
    exact = logits.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    expected = np.log(np.exp(exact).sum(1)) - exact[np.arange(50), labels]
    measure = cross_entropy()(jnp.asarray(logits), {"y": jnp.asarray(labels)})
    np.testing.assert_allclose(measure.values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", [accuracy(), top_k_accuracy(2), cross_entropy()])
def test_sequences_weigh_their_length(metric):
    """(B, T, K) logits give, per example, the sums of the T predictions."""
    logits, labels = LOGITS.reshape(20, 10, 7), LABELS.reshape(20, 10)
    sequence = metric(jnp.asarray(logits), {"y": labels})
    flat = metric(jnp.asarray(LOGITS), {"y": LABELS})
    np.testing.assert_allclose(sequence.values, flat.values.reshape(20, 10).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(sequence.weights, np.full(20, 10))


def test_masked_sums_and_sums_by_segment():
    values, weights = RNG.normal(size=(2, 30)).astype(np.float32)
    mask, segments = RNG.random(30) < 0.6, RNG.integers(0, 6, 30)
    values[~mask] = np.nan
    total = masked_sums(Measure(jnp.asarray(values), jnp.asarray(weights)), mask)
    np.testing.assert_allclose(total.values, values[mask].sum(), rtol=1e-5)
    np.testing.assert_allclose(total.weights, weights[mask].sum(), rtol=1e-5)
    sums = Measure(jnp.ones(5), jnp.zeros(5))
    measure = Measure(jnp.asarray(values), jnp.asarray(weights))
    each = add_by_segment(sums, measure, mask, segments)
    for segment in range(5):  # Segment 5 is outside and left out.
        rows = mask & (segments == segment)
        np.testing.assert_allclose(each.values[segment], 1 + values[rows].sum(), rtol=1e-4)
        np.testing.assert_allclose(each.weights[segment], weights[rows].sum(), rtol=1e-4, atol=1e-6)
    assert each.values.shape == (5,)


def test_sums_over_batches_equal_sums_over_all():
    measure = cross_entropy()(jnp.asarray(LOGITS), {"y": LABELS})
    whole = masked_sums(measure, np.ones(200, bool))
    parts = [
        masked_sums(jax.tree.map(lambda a, i=i: a[i : i + 50], measure), np.ones(50, bool))
        for i in range(0, 200, 50)
    ]
    np.testing.assert_allclose(sum(p.values for p in parts), whole.values, rtol=1e-5)
    assert sum(p.weights for p in parts) == whole.weights == 200


def test_confusion_counts():
    predictions, mask = RNG.integers(0, 7, 200), RNG.random(200) < 0.7
    expected = np.zeros((7, 7), np.int32)
    for label, prediction in zip(LABELS[mask], predictions[mask], strict=True):
        expected[label, prediction] += 1
    counts = confusion_counts(jnp.asarray(LABELS), jnp.asarray(predictions), mask, 7)
    np.testing.assert_array_equal(counts, expected)
    assert counts.dtype == jnp.int32


def test_confusion_counts_leaves_strangers_out():
    labels, predictions = jnp.array([-1, 0, 3, 1, 1]), jnp.array([0, -2, 0, 9, 2])
    counts = confusion_counts(labels, predictions, jnp.ones(5, bool), 3)
    np.testing.assert_array_equal(counts, [[0, 0, 0], [0, 0, 1], [0, 0, 0]])
