"""Client updates clipped around the last aggregate."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators.every_update import Updates, of_every_update
from fedexp.contracts import Aggregator
from fedexp.errors import check


@gin.configurable
def centred_clipping(radius: float = gin.REQUIRED, iterations: int = 1) -> Aggregator:
    """Learning from History (Karimireddy et al. 2021, arXiv:2012.10333, Algorithm 2).

    v <- v + mean_i (x_i - v) min(1, tau / |x_i - v|), from the aggregate v of the round before. Every
    client counts alike. It keeps all updates until the end of the round; `aggregate/clipped_fraction` is
    the share of them that the last iteration clipped.

    Args:
      radius: tau; the paper's experiments take 10 to 100.
      iterations: l; one is enough, says the paper, where v changes slowly.

    Raises:
      UserError: a radius that is not positive, or no iterations.
    """
    check(radius > 0, f"centred_clipping.radius must be positive, got {radius}")
    check(iterations >= 1, f"centred_clipping.iterations must be at least 1, got {iterations}")

    def rule(updates: Updates, centre):
        share = updates.real / jnp.maximum(updates.size, 1)

        def iterate(_, found):
            centre, _ = found
            distances = jnp.sqrt(updates.squared_distances_to(centre))
            weights = share * jnp.minimum(1, radius / jnp.maximum(distances, 1e-12))
            kept = 1 - weights.sum()
            centre = jax.tree.map(lambda v, x: kept * v + x, centre, updates.combined(weights))
            return centre, (share * (distances > radius)).sum()

        centre, clipped = jax.lax.fori_loop(0, iterations, iterate, (centre, jnp.float32(0)))
        return centre, centre, {"clipped_fraction": clipped}

    return of_every_update(rule, init=optax.tree.zeros_like)
