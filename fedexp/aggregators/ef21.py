"""Compressed differences from what the server knows of a client already."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators.error_feedback import check_compressor
from fedexp.contracts import Aggregated, Aggregator
from fedexp.promises import kept_client


@gin.configurable
def ef21(compressor: Aggregator = gin.REQUIRED) -> Aggregator:
    """EF21 with partial participation (Fatkhullin et al. 2021, arXiv:2110.03294, Algorithm 2).

    Client i sends c_i = C(x_i - g_i) of its update x_i, and both sides set g_i <- g_i + c_i; the aggregate is
    the mean g of all g_i, of those who were not sampled too. Richtarik et al. 2021 (arXiv:2106.05203) is the
    case in which all take part. Every client counts alike. A state per client, of the model's size.

    Args:
      compressor: a contraction, as @top_k() with `error_feedback = False`, or @random_k() with
        `unbiased = False`.

    Raises:
      UserError: a compressor that keeps a client state, or makes one update of many.
    """
    check_compressor("ef21", compressor)

    def init(value):
        return compressor.init(value), optax.tree.zeros_like(value)

    def client(state, update, known, key):
        difference = jax.tree.map(jnp.subtract, update.value, known)
        update = update._replace(value=difference, weight=jnp.float32(1))
        sent = kept_client(compressor, state[0], update, None, key)
        assert sent.update is not None
        return sent._replace(state=jax.tree.map(jnp.add, known, sent.update.value))

    def server(state, total, each, later, cohort, key):
        own, mean = state
        result = compressor.server(own, total, each, later, cohort, key)
        share = cohort.size / cohort.population
        mean = jax.tree.map(lambda g, c: g + share * c, mean, result.update)
        return Aggregated(mean, (result.state, mean), result.metrics)

    return Aggregator(
        client, server, init, optax.tree.zeros_like, lambda state: compressor.told(state[0])
    )
