"""The model of FLUTE's benchmark."""

from __future__ import annotations

import gin
import jax
from flax import linen as nn

from fedexp.models.tabular import LinearModel


@gin.configurable
class SigmoidLogistic(nn.Module):
    """FedML's and FLUTE's "logistic regression": sigmoids of ten linear units, taken for logits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, ...) to (B, 10)."""
        return nn.sigmoid(LinearModel(10)(x))
