"""The signs of an update's entries."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.coding import quantizing
from fedexp.contracts import Aggregated, Aggregator
from fedexp.errors import check


@gin.configurable
def signs(scaled: bool = True, majority_vote: bool = False) -> Aggregator:
    """One bit an entry: signSGD (Bernstein et al. 2018, arXiv:1802.04434, Algorithms 1 and 2).

    Without scales an entry becomes 1 or -1, and the server's learning rate says how far it goes. Scaled by
    the mean magnitude of its array, a float32 each, it is what Karimireddy et al. 2019 (arXiv:1901.09847)
    take with error feedback: `error_feedback.compressor = @signs()`.

    Args:
      scaled: by the mean magnitude.
      majority_vote: the aggregate is 1 or -1 for every entry, by the clients' weighted majority.

    Raises:
      UserError: scaled votes.
    """
    check(not (scaled and majority_vote), "signs: a majority vote has no scale; bind scaled=False")

    def quantizer(values: jax.Array, mask: jax.Array, key: jax.Array):
        del key
        sign = jnp.where(values < 0, -1.0, 1.0)
        scale = jnp.mean(jnp.abs(values), where=mask) if scaled else 1.0
        return scale * sign, (sign > 0).astype(jnp.int32)

    def vote(state, total, each, later, cohort, key):
        del total, each, cohort, key
        return Aggregated(jax.tree.map(jnp.sign, later), state)

    link = quantizing(quantizer, 2, int(scaled))
    return Aggregator(link.client, vote if majority_vote else link.server)
