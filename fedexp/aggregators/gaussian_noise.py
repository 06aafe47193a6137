"""Gaussian noise on the sum of client updates."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.contracts import Aggregated, Aggregator, Sent
from fedexp.errors import check


@gin.configurable
def gaussian_noise(
    noise_multiplier: float = gin.REQUIRED, norm: float = gin.REQUIRED
) -> Aggregator:
    """The Gaussian mechanism of DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963, Algorithm 1, f_f).

    A link between `clip_by_norm(norm)`, which bounds what one client adds, and `mean()`. Every client counts
    alike, whatever the algorithm says, and the sum of updates plus noise of standard deviation
    noise_multiplier x norm is divided by the expected size of the cohort, since the real one would tell who
    took part. `aggregate/noise_std` is the noise's standard deviation in an entry of the aggregate.

    Raises:
      UserError: a negative multiplier, or a norm that is not positive.
    """
    check(
        noise_multiplier >= 0,
        f"gaussian_noise.noise_multiplier must not be negative, got {noise_multiplier}",
    )
    check(norm > 0, f"gaussian_noise.norm must be positive, got {norm}")

    def client(state, update, client_state, key):
        del state, client_state, key
        return Sent(update._replace(weight=jnp.float32(1)))

    def server(state, total, each, later, cohort, key):
        del total, each
        std = noise_multiplier * norm / cohort.expected_size
        leaves, structure = jax.tree.flatten(later)
        noisy = [
            cohort.size / cohort.expected_size * leaf + std * jax.random.normal(one, leaf.shape)
            for leaf, one in zip(leaves, jax.random.split(key, len(leaves)), strict=True)
        ]
        return Aggregated(structure.unflatten(noisy), state, {"noise_std": jnp.float32(std)})

    return Aggregator(client, server, private=True)
