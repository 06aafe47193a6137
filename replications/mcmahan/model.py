"""The CNN of McMahan et al. 2017."""

from __future__ import annotations

import gin
import jax
from flax import linen as nn

from fedexp.models.layers import Conv, Dense, max_pool_2x2


@gin.configurable
class MnistCNN(nn.Module):
    """Two 5 x 5 convolutions, each with a maximum of 2 x 2, and 512 units: 1,663,370 parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, 28, 28) or (B, 28, 28, 1) to logits (B, 10)."""
        x = x.reshape(-1, 28, 28, 1)
        for channels in (32, 64):
            x = max_pool_2x2(nn.relu(Conv(channels, (5, 5), padding="SAME")(x)))
        x = nn.relu(Dense(512)(x.reshape(x.shape[0], -1)))
        return Dense(10)(x)
