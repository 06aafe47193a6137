"""The largest entries of an update, with the rest remembered for the next time."""

from __future__ import annotations

import math

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.error_feedback import error_feedback as with_feedback
from fedexp.aggregators.sparse import sending
from fedexp.contracts import Aggregator
from fedexp.errors import check


@gin.configurable
def top_k(fraction: float = 0.01, error_feedback: bool = True) -> Aggregator:
    """Sends the entries of largest magnitude, over all arrays together, and zeros for the others.

    With error feedback a client adds to its update what it has not sent before (Stich et al. 2018,
    arXiv:1809.07599, Algorithm 1): see `error_feedback`. Each entry takes ceil(log2(entries)) bits for its
    index.

    Args:
      fraction: of the entries, rounded up.
      error_feedback: whether clients remember what they have not sent.

    Raises:
      UserError: a fraction outside (0, 1].
    """
    check(0 < fraction <= 1, f"top_k.fraction must be in (0, 1], got {fraction}")

    def select(flat: jax.Array, count: int, key: jax.Array):
        del key
        _, index = jax.lax.top_k(jnp.abs(flat), count)
        return index, flat[index]

    link = sending(select, fraction, lambda size: math.ceil(math.log2(max(size, 2))))
    return with_feedback(link) if error_feedback else link
