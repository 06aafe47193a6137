"""The coordinate-wise median of client updates."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.ordering import sort_clients
from fedexp.contracts import Aggregated, Aggregator, Sent


@gin.configurable
def coordinate_median() -> Aggregator:
    """The median of every entry over the cohort (Yin et al. 2018, arXiv:1803.01498, Definition 1).

    Every client counts alike; of an even number, the mean of the two in the middle. It keeps all updates
    until the end of the round: the memory of as many models as the cohort has clients.
    """

    def client(state, update, client_state, key):
        del state, client_state, key
        return Sent(each=update.value)

    def server(state, total, each, later, cohort, key):
        del total, later, key
        size = cohort.real.sum()

        def median(values: jax.Array) -> jax.Array:
            real = cohort.real.reshape(-1, *[1] * (values.ndim - 1))
            ordered = sort_clients(jnp.where(real, values, jnp.inf))
            low, high = jnp.maximum(size - 1, 0) // 2, size // 2
            middle = (ordered[low] + ordered[high]) / 2
            return jnp.where(size > 0, middle, 0)

        return Aggregated(jax.tree.map(median, each), state)

    return Aggregator(client, server, reduces=True)
