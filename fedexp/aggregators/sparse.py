"""What links share that send some of an update's entries."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedexp.aggregators.coding import open_code, passing
from fedexp.contracts import Aggregator, Sent

# (entries (n,), how many, key) -> (their indices, their values).
Selection = Callable[[jax.Array, int, jax.Array], tuple[jax.Array, jax.Array]]


def sending(
    select: Selection, fraction: float, bits_of_index: Callable[[int], float]
) -> Aggregator:
    """A link that sends a fraction of the entries, over all arrays together, and zeros for the others.

    Args:
      select: chooses them.
      fraction: of the entries, rounded up.
      bits_of_index: (entries of the update) -> bits for the index of each that is sent.
    """

    def client(state, update, client_state, key):
        del state, client_state
        code = open_code(update)
        flat, unravel = ravel_pytree(update.value)
        count = math.ceil(fraction * flat.size)
        index, values = select(flat, count, key)
        value = unravel(jnp.zeros_like(flat).at[index].set(values))
        sent = jax.tree.map(lambda leaf: leaf > 0, unravel(jnp.zeros_like(flat).at[index].set(1.0)))
        code = code._replace(indices=bits_of_index(flat.size) * count, sent=count, support=sent)
        return Sent(update._replace(value=value, code=code))

    return Aggregator(client, passing)
