"""What a compressor has left out, remembered for the next time."""

from __future__ import annotations

import dataclasses

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.contracts import Aggregator
from fedexp.errors import check
from fedexp.promises import kept_client


@gin.configurable
def error_feedback(compressor: Aggregator = gin.REQUIRED) -> Aggregator:
    """A client adds to its update what was lost of those before (Karimireddy et al. 2019, arXiv:1901.09847).

    Algorithm 2 of the paper, with the client's change for the step: a state per client, of the model's size.

    Args:
      compressor: a link without a client state, as @top_k() with `error_feedback = False`, or @signs().

    Raises:
      UserError: a compressor that keeps a client state, or makes one update of many.
    """
    check_compressor("error_feedback", compressor)

    def client(state, update, memory, key):
        whole = update._replace(value=jax.tree.map(jnp.add, update.value, memory))
        sent = kept_client(compressor, state, whole, None, key)
        assert sent.update is not None
        rest = jax.tree.map(jnp.subtract, whole.value, sent.update.value)
        return sent._replace(state=rest)

    return dataclasses.replace(compressor, client=client, init_client=optax.tree.zeros_like)


def check_compressor(name: str, compressor: Aggregator) -> None:
    """Refuses what cannot be wrapped.

    Raises:
      UserError: a compressor that keeps a client state, makes one update of many, or adds noise.
    """
    check(
        compressor.init_client is None and not compressor.reduces,
        f"{name}.compressor must be a link that keeps nothing for a client, as @random_k(); of top_k, "
        "bind error_feedback = False",
    )
    check(
        compressor.noise is None, f"{name}.compressor may not be noise, which would be sent later"
    )
