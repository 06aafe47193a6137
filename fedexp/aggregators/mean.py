"""The weighted mean of client updates."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.contracts import Aggregated, Aggregator, Sent


@gin.configurable
def mean() -> Aggregator:
    """The mean over the cohort (McMahan et al. 2017, arXiv:1602.05629).

    What a client counts for is the algorithm's say, as `fedavg.weigh_by`. Without clients it is zero.
    """

    def client(state, update, client_state, key):
        del state, client_state, key
        weight = update.weight.astype(jnp.float32)
        return Sent(total=(jax.tree.map(lambda leaf: weight * leaf, update.value), weight))

    def server(state, total, each, later, cohort, key):
        del each, later, cohort, key
        weighted, weight = total
        weight = jnp.maximum(weight, 1e-12)
        return Aggregated(jax.tree.map(lambda leaf: leaf / weight, weighted), state)

    return Aggregator(client, server, reduces=True, averages=True)
