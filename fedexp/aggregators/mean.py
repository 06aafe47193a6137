"""The weighted mean of client updates."""

from __future__ import annotations

from typing import Literal

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.base import Aggregator
from fedexp.errors import UserError


@gin.configurable
def mean(weighting: Literal["examples", "uniform"] = "examples") -> Aggregator:
    """The mean over the cohort.

    Args:
      weighting: 'examples' weighs a client by its number of examples (McMahan et al. 2017,
        arXiv:1602.05629), or by what else the algorithm says; 'uniform' counts every client alike.

    Raises:
      UserError: any other weighting.
    """
    if weighting not in ("examples", "uniform"):
        raise UserError(f"mean.weighting must be 'examples' or 'uniform', got {weighting!r}")

    def client(update, weight, key):
        del key
        weight = jnp.float32(1) if weighting == "uniform" else weight.astype(jnp.float32)
        return jax.tree.map(lambda leaf: weight * leaf, update), weight

    def server(total, key):
        del key
        weighted, weight = total
        return jax.tree.map(lambda leaf: leaf / jnp.maximum(weight, 1e-12), weighted)

    return Aggregator(client, server)
