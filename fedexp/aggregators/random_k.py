"""Entries of an update at random."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.sparse import sending
from fedexp.contracts import Aggregator
from fedexp.errors import check


@gin.configurable
def random_k(fraction: float = 0.01, unbiased: bool = True) -> Aggregator:
    """Sends a random subset of the entries, over all arrays together, and zeros for the others.

    A random mask (Konecny et al. 2016, arXiv:1610.05492, Section 3): the server knows the client's seed, so
    that no index is sent.

    Args:
      fraction: of the entries, rounded up; each client draws its own.
      unbiased: multiplies them by entries / sent, so that their expectation is the update. With
        `error_feedback` or `ef21` they must be sent as they are.

    Raises:
      UserError: a fraction outside (0, 1].
    """
    check(0 < fraction <= 1, f"random_k.fraction must be in (0, 1], got {fraction}")

    def select(flat: jax.Array, count: int, key: jax.Array):
        # As floats, whose order is that of their bits: XLA's top_k is quick for these alone.
        bits = jax.random.bits(key, flat.shape, jnp.uint32) >> 2
        index = jax.lax.top_k(jax.lax.bitcast_convert_type(bits, jnp.float32), count)[1]
        return index, flat[index] * (flat.size / count if unbiased else 1)

    return sending(select, fraction, lambda size: 0)
