"""The models for EMNIST of the federated-learning literature.

All map float images (B, 28, 28, 1) to logits (B, num_classes). Kernels start LeCun-normal and biases
at zero, as in Flax and in FedJAX. (Keras' Glorot-uniform start, TensorFlow Federated's, learns
real digits less steadily under FedAvg with masked remainders: two points behind after 100 rounds.)
"""

from __future__ import annotations

import gin
import jax
from flax import linen as nn

from fedexp.models.layers import Conv, Dropout, max_pool_2x2


@gin.configurable
class EmnistCNN(nn.Module):
    """The convolutional network of Reddi et al. 2021 (arXiv:2003.00295, table 4).

    1 206 590 parameters for 62 classes, 1 199 882 for 10. Training needs the rng 'dropout'.

    Attributes:
      num_classes: number of logits.
    """

    num_classes: int = 62

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (B, 28, 28, 1) to (B, num_classes); `train` switches dropout on."""
        x = nn.relu(Conv(32, (3, 3), padding="VALID")(x))
        x = nn.relu(Conv(64, (3, 3), padding="VALID")(x))
        x = Dropout(0.25)(max_pool_2x2(x), deterministic=not train)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(128)(x))
        x = Dropout(0.5)(x, deterministic=not train)
        return nn.Dense(self.num_classes)(x)


@gin.configurable
class EmnistDense(nn.Module):
    """Two hidden layers of 200 units, the "2NN" of McMahan et al. 2017 (arXiv:1602.05629).

    209 662 parameters for 62 classes, 199 210 for 10.

    Attributes:
      num_classes: number of logits.
    """

    num_classes: int = 62

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, 28, 28, 1) to (B, num_classes)."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(200)(x))
        return nn.Dense(self.num_classes)(x)


@gin.configurable
class EmnistLogistic(nn.Module):
    """Multinomial logistic regression: 48 670 parameters for 62 classes, 7 850 for 10.

    Attributes:
      num_classes: number of logits.
    """

    num_classes: int = 62

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, 28, 28, 1) to (B, num_classes)."""
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))
