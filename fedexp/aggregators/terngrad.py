"""Updates of three values."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.coding import Coding, quantizing
from fedexp.contracts import Aggregator
from fedexp.errors import check


@gin.configurable
def terngrad(clip_deviations: float | None = 2.5, coding: Coding = "fixed") -> Aggregator:
    """TernGrad (Wen et al. 2017, arXiv:1705.07878, Equations 1 to 3 and, for the clipping, 14).

    An entry x of an array becomes s sign(x) with probability |x| / s, and else 0, where s is the largest
    magnitude in it: unbiased, but for the clipping.

    Args:
      clip_deviations: entries are first clipped to so many standard deviations of their array; None for not.
      coding: 'fixed', 2 bits an entry, or 'entropy'.

    Raises:
      UserError: deviations that are not positive, or an unknown coding.
    """
    check(
        clip_deviations is None or clip_deviations > 0,
        f"terngrad.clip_deviations must be positive or None, got {clip_deviations}",
    )

    def quantizer(values: jax.Array, mask: jax.Array, key: jax.Array):
        if clip_deviations is not None:
            bound = clip_deviations * jnp.std(values, where=mask)
            values = jnp.clip(values, -bound, bound)
        largest = jnp.where(mask, jnp.abs(values), 0).max()
        chance = jnp.abs(values) / jnp.maximum(largest, 1e-30)
        sign = jnp.sign(values) * (jax.random.uniform(key, values.shape) < chance)
        return largest * sign, sign.astype(jnp.int32) + 1

    return quantizing(quantizer, 3, 1, coding)
