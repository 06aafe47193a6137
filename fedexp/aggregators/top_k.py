"""The largest entries of an update, with the rest remembered for the next time."""

from __future__ import annotations

import math

import gin
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedexp.contracts import Aggregated, Aggregator, Sent
from fedexp.errors import UserError


@gin.configurable
def top_k(fraction: float = 0.01, error_feedback: bool = True) -> Aggregator:
    """Sends the entries of largest magnitude, over all arrays together, and zeros for the others.

    With error feedback a client adds to its update what it has not sent before (Stich et al. 2018,
    arXiv:1809.07599, Algorithm 1; Karimireddy et al. 2019, arXiv:1901.09847): a state per client, of the
    model's size. `aggregate/bits_up` counts, for the whole cohort, a float32 and the index of each entry.

    Args:
      fraction: of the entries, rounded up.
      error_feedback: whether clients remember what they have not sent.

    Raises:
      UserError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"top_k.fraction must be in (0, 1], got {fraction}")

    def client(state, update, client_state, key):
        del state, key
        value = update.value
        if error_feedback:
            value = jax.tree.map(jnp.add, value, client_state)
        flat, unravel = ravel_pytree(value)
        count = math.ceil(fraction * flat.size)
        _, index = jax.lax.top_k(jnp.abs(flat), count)
        sent = unravel(jnp.zeros_like(flat).at[index].set(flat[index]))
        rest = jax.tree.map(jnp.subtract, value, sent) if error_feedback else None
        bits = count * (32 + math.ceil(math.log2(max(flat.size, 2))))
        return Sent(update._replace(value=sent), total=jnp.float32(bits), state=rest)

    def server(state, total, each, later, cohort, key):
        del each, cohort, key
        return Aggregated(later, state, {"bits_up": total})

    init_client = optax.tree.zeros_like if error_feedback else None
    return Aggregator(client, server, init_client=init_client)
