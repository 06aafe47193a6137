"""The updates that are nearest to most others."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.every_update import Updates, of_every_update
from fedexp.contracts import NOTHING, Aggregator
from fedexp.errors import check


@gin.configurable
def krum(num_attackers: int = gin.REQUIRED, num_selected: int = 1) -> Aggregator:
    """Krum and multi-Krum (Blanchard et al. 2017, arXiv:1703.02757, Sections 4 and 5).

    A client's score is the sum of squared distances from its update to the n - f - 2 nearest others, of n
    clients and f attackers; the mean of the updates with the lowest scores is the aggregate. Every
    client counts alike. It keeps all updates until the end of the round.

    Args:
      num_attackers: f, the most attackers that a cohort may have.
      num_selected: m, updates that are averaged; 1 is Krum, more are multi-Krum.

    Raises:
      UserError: a negative number of attackers, nobody to select, or, from the round, a cohort of fewer than
        2 f + 3 clients, for which the paper guarantees nothing, or of fewer than are selected.
    """
    check(num_attackers >= 0, f"krum.num_attackers must not be negative, got {num_attackers}")
    check(num_selected >= 1, f"krum.num_selected must be at least 1, got {num_selected}")

    def rule(updates: Updates, state):
        scores = krum_scores(squared_distances(updates), updates.real, num_attackers)
        rank = jnp.argsort(best_first(scores, updates.clients))
        chosen = updates.real & (rank < num_selected)
        mean = updates.combined(chosen / jnp.maximum(chosen.sum(), 1))
        return mean, state, NOTHING

    at_least = max(2 * num_attackers + 3, num_selected)
    return of_every_update(rule, at_least=at_least, why=f"krum of {num_attackers} attackers")


def squared_distances(updates: Updates) -> jax.Array:
    """(C, C) squared distances between updates, by their inner products."""
    mean = updates.combined(updates.real / jnp.maximum(updates.size, 1))
    centred = [
        (leaf - one).reshape(len(leaf), -1)
        for leaf, one in zip(jax.tree.leaves(updates.values), jax.tree.leaves(mean), strict=True)
    ]
    products = jnp.stack([jnp.dot(rows, rows.T, precision="highest") for rows in centred])
    products = products.sum(axis=0)
    norms, products = jnp.diagonal(products), (products + products.T) / 2
    return jnp.maximum(norms[:, None] + norms[None] - 2 * products, 0)


def best_first(scores: jax.Array, clients: jax.Array) -> jax.Array:
    """(C,) rows by their scores; of two that are each other's nearest, the lower client comes first."""
    return jnp.lexsort((clients, scores))


def krum_scores(distances: jax.Array, among: jax.Array, num_attackers: int) -> jax.Array:
    """(C,) sums of squared distances to the nearest others; infinite for those who are not among them."""
    count = jnp.maximum(among.sum() - num_attackers - 2, 1)
    others = among[:, None] & among[None] & ~jnp.eye(len(among), dtype=bool)
    nearest = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
    taken = (jnp.arange(len(among)) < count) & jnp.isfinite(nearest)
    return jnp.where(among, jnp.where(taken, nearest, 0).sum(axis=1), jnp.inf)
