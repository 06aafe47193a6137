"""Updates in a few bits an entry."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.coding import Coding, quantizing, stochastic_round
from fedexp.contracts import Aggregator
from fedexp.errors import check


@gin.configurable
def quantize(levels: int = 256, coding: Coding = "fixed") -> Aggregator:
    """Uniform stochastic quantization (Suresh et al. 2017, arXiv:1611.00429, Section 2.2).

    An entry becomes one of the two nearest of `levels` values, evenly spaced between the least and the
    greatest entry of its array, at random such that its expectation is the entry. Two float32 an array say
    where these are.

    Args:
      levels: 2 is binary quantization.
      coding: 'fixed', ceil(log2(levels)) bits an entry, or 'entropy' (Section 4 of the paper).

    Raises:
      UserError: fewer than 2 levels, or an unknown coding.
    """
    check(levels >= 2, f"quantize.levels must be at least 2, got {levels}")
    return quantizing(uniform_levels(levels), levels, 2, coding)


def uniform_levels(levels: int):
    """The quantizer of one array."""

    def quantizer(values: jax.Array, mask: jax.Array, key: jax.Array):
        low = jnp.where(mask, values, jnp.inf).min()
        high = jnp.where(mask, values, -jnp.inf).max()
        step = (high - low) / (levels - 1)
        place = (values - low) / jnp.where(step > 0, step, 1)
        symbols = jnp.clip(stochastic_round(place, key), 0, levels - 1)
        return low + step * symbols, symbols

    return quantizer
