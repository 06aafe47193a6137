"""Metrics of logits against the integer labels in feature 'y'.

Logits are (B, K) with labels (B,), or (B, ..., K) with (B, ...): an example then weighs as many
predictions as it holds. One's own metric is a function of (outputs, batch) as these are:

>>> logits, batch = jnp.array([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]]), {"y": jnp.array([1, 1, 0])}
>>> accuracy()(logits, batch)
Measure(values=Array([1., 0., 1.], dtype=float32), weights=Array([1., 1., 1.], dtype=float32))
"""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.errors import UserError
from fedexp.tasks.base import Features, Measure, Metric


@gin.configurable
def accuracy() -> Metric:
    """The fraction of labels with the highest logit; of equal logits the first counts as highest."""
    # Not by argmax, which XLA does not vectorise: it keeps an index beside each value.
    return top_k_accuracy(1)


@gin.configurable
def top_k_accuracy(k: int = 5) -> Metric:
    """The fraction of labels among the k highest logits; of equal logits the first rank higher.

    A label whose logit is NaN is never among them.

    Args:
      k: from 1 to the number of classes.

    Raises:
      UserError: k is below 1; from the metric, it is greater than the number of classes.
    """
    if k < 1:
        raise UserError(f"top_k_accuracy.k must be at least 1, got {k}")

    def metric(logits: jax.Array, batch: Features) -> Measure:
        if k > logits.shape[-1]:
            raise UserError(f"top_k_accuracy.k is {k}, but there are {logits.shape[-1]} classes")
        label, own = batch["y"][..., None], _of_label(logits, batch)[..., None]
        earlier = jnp.arange(logits.shape[-1]) < label
        ahead = ~(logits <= own) | ((logits == own) & earlier)
        return _measure(ahead.sum(-1) < k)

    return metric


@gin.configurable
def cross_entropy() -> Metric:
    """The negative log-likelihood of the labels, in nats."""

    def metric(logits: jax.Array, batch: Features) -> Measure:
        logits = logits.astype(jnp.float32)
        return _measure(jax.nn.logsumexp(logits, axis=-1) - _of_label(logits, batch))

    return metric


def _of_label(logits: jax.Array, batch: Features) -> jax.Array:
    """Each label's own logit."""
    # Not a gather: its gradient, a scatter, costs as much as all else in a logistic regression.
    is_label = jnp.arange(logits.shape[-1]) == batch["y"][..., None]
    return jnp.where(is_label, logits, 0).sum(-1)


def _measure(values: jax.Array) -> Measure:
    """Per-prediction values (B, ...), each of weight 1, as one Measure per example."""
    values = values.reshape(values.shape[0], -1).astype(jnp.float32)
    return Measure(values.sum(-1), jnp.full(values.shape[0], values.shape[1], jnp.float32))
