"""Krum's choice, and the entries in it that most agree upon."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.every_update import Updates, along, of_every_update
from fedexp.aggregators.krum import best_first, krum_scores, squared_distances
from fedexp.aggregators.ordering import sort_clients
from fedexp.contracts import NOTHING, Aggregator
from fedexp.errors import check


@gin.configurable
def bulyan(num_attackers: int = gin.REQUIRED) -> Aggregator:
    """Bulyan with Krum (El Mhamdi et al. 2018, arXiv:1802.07927, Section 4).

    Krum selects n - 2 f of n clients one by one, each out of those that are left; every entry of the
    aggregate is the mean of the n - 4 f selected values nearest to their median. Every client counts alike.
    It keeps all updates until the end of the round.

    Args:
      num_attackers: f, the most attackers that a cohort may have.

    Raises:
      UserError: a negative number, or, from the round, a cohort of fewer than 4 f + 3 clients.
    """
    check(num_attackers >= 0, f"bulyan.num_attackers must not be negative, got {num_attackers}")

    def rule(updates: Updates, state):
        distances = squared_distances(updates)
        selected_size = jnp.maximum(updates.size - 2 * num_attackers, 1)

        def select(i: jax.Array, selected: jax.Array) -> jax.Array:
            left = updates.real & ~selected
            scores = krum_scores(distances, left, num_attackers)
            best = best_first(scores, updates.clients)[0]
            return selected.at[best].max((i < selected_size) & left[best])

        nobody = jnp.zeros_like(updates.real)
        selected = jax.lax.fori_loop(0, len(nobody), select, nobody)
        count = jnp.maximum(selected_size - 2 * num_attackers, 1)

        def of_entries(leaf: jax.Array) -> jax.Array:
            ordered = sort_clients(jnp.where(along(selected, leaf), leaf, jnp.inf))
            low, high = (selected_size - 1) // 2, selected_size // 2
            middle = (ordered[low] + ordered[high]) / 2
            # The nearest are neighbours in this order: a window whose ends are as near as can be.
            begin = jnp.arange(len(leaf))
            end = jnp.minimum(begin + count, len(leaf))
            distance = jnp.maximum(middle - ordered, ordered[end - 1] - middle)
            fits = along(begin + count <= selected_size, leaf)
            first = jnp.argmin(jnp.where(fits, distance, jnp.inf), axis=0)
            ranks = along(begin, leaf)
            nearest = (first <= ranks) & (ranks < first + count)
            total = jnp.where(nearest, ordered, 0).sum(axis=0)
            return jnp.where(updates.size > 0, total / count, 0)

        return jax.tree.map(of_entries, updates.values), state, NOTHING

    why = f"bulyan of {num_attackers} attackers"
    return of_every_update(rule, at_least=4 * num_attackers + 3, why=why)
