"""Noise that every client adds to its own update."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.noising import check_noise, normal_like
from fedexp.contracts import Aggregated, Aggregator, Mechanism, Noise, Sent


@gin.configurable
def local_noise(noise_multiplier: float = gin.REQUIRED, norm: float = gin.REQUIRED) -> Aggregator:
    """Local differential privacy by Gaussian noise (Dwork & Roth 2014, Appendix A; as pfl-research has it).

    A link after `clip_by_norm(norm)`, whatever follows: the server itself cannot tell what a client has sent.
    Every client counts alike. Its epsilon is that of one client against the server, who knows when it takes
    part: two updates are up to 2 norm apart, and no sampling amplifies.

    Args:
      noise_multiplier: standard deviation over the norm.
      norm: of the clip before it.

    Raises:
      UserError: a negative multiplier, or a norm that is not positive.
    """
    check_noise("local_noise", noise_multiplier, norm)

    def client(state, update, client_state, key):
        del state, client_state
        noise = normal_like(key, update.value)
        std = noise_multiplier * norm
        value = jax.tree.map(lambda leaf, drawn: leaf + std * drawn, update.value, noise)
        return Sent(update._replace(value=value, weight=jnp.float32(1)))

    def server(state, total, each, later, cohort, key):
        del total, each, cohort, key
        return Aggregated(later, state)

    def mechanism(cohort):
        del cohort
        return Mechanism(noise_multiplier, "local")

    return Aggregator(client, server, noise=Noise(mechanism, norm, on_sum=False))
