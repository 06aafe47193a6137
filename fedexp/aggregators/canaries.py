"""Clients that send a known direction, to see what of it can be found again."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators.noising import PyTree, normal_like
from fedexp.contracts import Aggregated, Aggregator, Sent
from fedexp.errors import check
from fedexp.streams import Stream, derive


def is_canary(client: jax.Array, fraction: float, seed: int) -> jax.Array:
    """() bool, whether a client, by its row in the data set, is one; independent of all others."""
    key = derive(jax.random.key(seed), Stream.CANARIES)
    return jax.random.bernoulli(jax.random.fold_in(key, client), fraction)


def direction(like: PyTree, client: jax.Array, seed: int) -> PyTree:
    """The unit vector that a canary sends, uniform on the sphere, shaped like a tree."""
    key = derive(jax.random.key(seed), Stream.CANARIES, 1)
    drawn = normal_like(jax.random.fold_in(key, client), like)
    length = optax.tree.norm(drawn)
    return jax.tree.map(lambda leaf: leaf / length, drawn)


@gin.configurable
def canaries(fraction: float = gin.REQUIRED, seed: int = 0, norm: float = 1e6) -> Aggregator:
    """Replaces the updates of some clients by random directions (Andrew et al. 2023, arXiv:2302.03098).

    The first link of a chain with a clip and noise. What becomes of the directions tells how much of a client
    the noise really hides: `auditing.audit`, one training for many canaries.

    Args:
      fraction: of all clients that are canaries, on average.
      seed: of who is one, and of the directions.
      norm: of what they send, more than any clip lets through.

    Raises:
      UserError: a fraction outside [0, 1], or a norm that is not positive.
    """
    check((fraction >= 0) & (fraction <= 1), f"canaries.fraction must be in [0, 1], got {fraction}")
    check(norm > 0, f"canaries.norm must be positive, got {norm}")

    def client(state, update, client_state, key):
        del state, client_state, key
        chosen = is_canary(update.client, fraction, seed)
        value = jax.tree.map(
            lambda own, one: jnp.where(chosen, norm * one, own),
            *(update.value, direction(update.value, update.client, seed)),
        )
        return Sent(update._replace(value=value), total=chosen.astype(jnp.float32))

    def server(state, total, each, later, cohort, key):
        del each, cohort, key
        return Aggregated(later, state, {"canaries": total})

    return Aggregator(client, server)
