"""Pieces that algorithms with local training share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedexp.tasks import Measure, Task, with_derived

PyTree = Any


def zero_sums(task: Task) -> dict[str, Measure]:
    """Where the training metrics of a client start: the sums that `mean_loss` adds to."""
    return {name: Measure(jnp.zeros(()), jnp.zeros(())) for name in ("loss", *task.metrics)}


def round_metrics(
    task: Task,
    sums: dict[str, Measure],
    update_norms: jax.Array,
    update: PyTree,
) -> dict[str, jax.Array]:
    """Metrics of a round of local training.

    Args:
      task: what was trained on.
      sums: training metrics of each client, values and weights of shape (C,).
      update_norms: (C,) L2 norms of the client updates.
      update: the aggregate update.

    Returns:
      train/* over the cohort's examples, and clients/* with one value per client slot.
    """
    metrics = {}
    cohort = {name: Measure(*map(jnp.sum, measure)) for name, measure in sums.items()}
    for group, measures in (("train", cohort), ("clients", sums)):
        means = {
            name: values / jnp.maximum(weights, 1e-12)
            for name, (values, weights) in measures.items()
        }
        for name, value in with_derived(task, means).items():
            metrics[f"{group}/{name}"] = value
    metrics["clients/update_norm"] = update_norms
    metrics["train/update_norm"] = optax.tree.norm(update)
    return metrics
