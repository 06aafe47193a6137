"""Magnitudes in a few levels, relative to an array's norm."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.coding import Coding, quantizing, stochastic_round
from fedexp.contracts import Aggregator
from fedexp.errors import check


@gin.configurable
def qsgd(levels: int = 4, coding: Coding = "entropy") -> Aggregator:
    """QSGD (Alistarh et al. 2017, arXiv:1610.02132, Section 3.1).

    An entry x of an array v becomes |v| sign(x) l / s, with l one of the two integers nearest to s |x| / |v|,
    at random such that its expectation is x. Most are zero, so that the code matters.

    Args:
      levels: s; 1 has {-1, 0, 1} times the norm.
      coding: 'entropy', where the paper has Elias codes, or 'fixed', ceil(log2(2 s + 1)) bits an entry.

    Raises:
      UserError: no levels, or an unknown coding.
    """
    check(levels >= 1, f"qsgd.levels must be at least 1, got {levels}")

    def quantizer(values: jax.Array, mask: jax.Array, key: jax.Array):
        norm = jnp.sqrt(jnp.where(mask, values**2, 0).sum())
        place = levels * jnp.abs(values) / jnp.maximum(norm, 1e-30)
        level = jnp.sign(values) * jnp.minimum(stochastic_round(place, key), levels)
        return norm * level / levels, level.astype(jnp.int32) + levels

    return quantizing(quantizer, 2 * levels + 1, 1, coding)
