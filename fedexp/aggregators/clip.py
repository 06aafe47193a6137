"""Client updates of bounded norm."""

from __future__ import annotations

from typing import Any

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.contracts import Aggregated, Aggregator, PyTree, Sent
from fedexp.errors import check


def clipped(value: PyTree, norm: Any) -> tuple[PyTree, jax.Array]:
    """A value scaled down to an L2 norm over all its arrays, if its own is larger; and its own."""
    length = optax.tree.norm(value)
    factor = jnp.minimum(1.0, norm / jnp.maximum(length, 1e-12))
    return jax.tree.map(lambda leaf: factor * leaf, value), length


@gin.configurable
def clip_by_norm(norm: float = gin.REQUIRED) -> Aggregator:
    """Scales every update of a larger L2 norm, over all its arrays, down to `norm`.

    So do McMahan et al. 2018 (arXiv:1710.06963) before noise, and Sun et al. 2019 (arXiv:1911.07963) against
    attackers. `aggregate/clipped_fraction` is the share of the cohort whose update was scaled.

    Args:
      norm: the largest that stays as it is, positive.

    Raises:
      UserError: a norm that is not positive.
    """
    check(norm > 0, f"clip_by_norm.norm must be positive, got {norm}")

    def client(state, update, client_state, key):
        del client_state, key
        value, length = clipped(update.value, norm)
        return Sent(update._replace(value=value), total=(length > norm).astype(jnp.float32))

    def server(state, total, each, later, cohort, key):
        del each, key
        return Aggregated(later, state, {"clipped_fraction": total / jnp.maximum(cohort.size, 1)})

    return Aggregator(client, server, bound=norm)
