"""The geometric median of client updates."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.every_update import Updates, of_every_update
from fedexp.contracts import Aggregator
from fedexp.errors import check


@gin.configurable
def geometric_median(iterations: int = 8, smoothing: float = 1e-6) -> Aggregator:
    """RFA: the point of least summed distance to the updates (Pillutla et al. 2019, arXiv:1912.13445).

    By smoothed Weiszfeld iterations (Algorithm 2) from the mean. Every client counts alike. It keeps all
    updates until the end of the round. `aggregate/distance` is the updates' mean distance to it.

    Args:
      iterations: the paper's figures take 3 or so; each costs as much as a mean.
      smoothing: nu, the least distance that is divided by.

    Raises:
      UserError: no iterations, or smoothing that is not positive.
    """
    check(iterations >= 1, f"geometric_median.iterations must be at least 1, got {iterations}")
    check(smoothing > 0, f"geometric_median.smoothing must be positive, got {smoothing}")

    def rule(updates: Updates, state):
        def distances(point) -> jax.Array:
            return jnp.sqrt(updates.squared_distances_to(point))

        def iterate(_, point):
            weights = updates.real / jnp.maximum(distances(point), smoothing)
            return updates.combined(weights / jnp.maximum(weights.sum(), 1e-12))

        mean = updates.combined(updates.real / jnp.maximum(updates.size, 1))
        median = jax.lax.fori_loop(0, iterations, iterate, mean)
        distance = (updates.real * distances(median)).sum() / jnp.maximum(updates.size, 1)
        return median, state, {"distance": distance}

    return of_every_update(rule)
