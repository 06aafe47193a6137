"""The coordinate-wise trimmed mean of client updates."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.every_update import Updates, along, of_every_update
from fedexp.aggregators.ordering import sort_clients
from fedexp.contracts import NOTHING, Aggregator
from fedexp.errors import check


@gin.configurable
def trimmed_mean(fraction: float = gin.REQUIRED) -> Aggregator:
    """The mean of every entry without its extremes (Yin et al. 2018, arXiv:1803.01498, Definition 2).

    Every client counts alike. It keeps all updates until the end of the round.

    Args:
      fraction: beta of the paper, left out at either end; rounded down to clients.

    Raises:
      UserError: a fraction outside [0, 1/2).
    """
    check(0 <= fraction < 0.5, f"trimmed_mean.fraction must be in [0, 0.5), got {fraction}")

    def rule(updates: Updates, state):
        trimmed = jnp.floor(fraction * updates.size + 1e-6).astype(jnp.int32)
        rank = jnp.arange(len(updates.real))
        kept = (rank >= trimmed) & (rank < updates.size - trimmed)

        def of_entries(leaf: jax.Array) -> jax.Array:
            ordered = jnp.where(along(kept, leaf), sort_clients(leaf), 0)
            return ordered.sum(axis=0) / jnp.maximum(kept.sum(), 1)

        return jax.tree.map(of_entries, updates.where_real(jnp.inf)), state, NOTHING

    return of_every_update(rule)
