"""LEAF's model for CelebA."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
from flax import linen as nn

from fedexp.models.layers import Conv, Dense, max_pool_2x2


@gin.configurable
class CelebaCNN(nn.Module):
    """Four blocks of convolution, batch normalisation, pooling and ReLU (LEAF, arXiv:1812.01097, its code).

    31 202 parameters for two classes and images of 84 x 84. LEAF evaluates with the statistics of each batch;
    here evaluation has running ones, which are averaged over clients as parameters are.

    Attributes:
      num_classes: number of logits.
      momentum: of the running statistics, what they keep in a step.
    """

    num_classes: int = 2
    momentum: float = 0.9

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
    ) -> jax.Array:
        """Maps float images (B, H, W, C) to logits (B, num_classes).

        Args:
          x: the images.
          train: whether to normalise with the batch's statistics.
          mask: (B,) bool, the images that count in these; all if None.
        """
        mask = None if mask is None else mask[:, None, None, None]
        for _ in range(4):
            norm = nn.BatchNorm(not train, momentum=self.momentum, epsilon=1e-3)
            x = norm(Conv(32, (3, 3))(x), mask=mask)
            odd = [(0, size % 2) for size in x.shape[1:3]]
            x = jnp.pad(x, [(0, 0), *odd, (0, 0)], mode="edge")  # What 'SAME' amounts to.
            x = nn.relu(max_pool_2x2(x))
        return Dense(self.num_classes)(x.reshape(len(x), -1))
