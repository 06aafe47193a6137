"""Updates in a few bits an entry."""

from __future__ import annotations

import math

import gin
import jax
import jax.numpy as jnp

from fedexp.contracts import Aggregated, Aggregator, Sent
from fedexp.errors import UserError


@gin.configurable
def quantize(levels: int = 256) -> Aggregator:
    """Uniform stochastic quantization (Suresh et al. 2017, arXiv:1611.00429, Section 2.2).

    An entry becomes one of the two nearest of `levels` values, evenly spaced between the least and the
    greatest entry of its array, at random such that its expectation is the entry. `aggregate/bits_up` counts,
    for the whole cohort, ceil(log2(levels)) bits an entry and two float32 an array.

    Raises:
      UserError: fewer than 2 levels.
    """
    if levels < 2:
        raise UserError(f"quantize.levels must be at least 2, got {levels}")

    def quantized(leaf: jax.Array, key: jax.Array) -> jax.Array:
        low, high = leaf.min(), leaf.max()
        step = (high - low) / (levels - 1)
        place = (leaf - low) / jnp.where(step > 0, step, 1)
        chosen = jnp.floor(place + jax.random.uniform(key, leaf.shape))
        return low + step * jnp.minimum(chosen, levels - 1)

    def client(state, update, client_state, key):
        del state, client_state
        leaves, structure = jax.tree.flatten(update.value)
        value = map(quantized, leaves, jax.random.split(key, len(leaves)))
        bits = sum(leaf.size * math.ceil(math.log2(levels)) + 2 * 32 for leaf in leaves)
        return Sent(update._replace(value=structure.unflatten(value)), total=jnp.float32(bits))

    def server(state, total, each, later, cohort, key):
        del each, cohort, key
        return Aggregated(later, state, {"bits_up": total})

    return Aggregator(client, server)
