"""The models for EMNIST of the federated-learning literature.

The classifiers map float images (B, 28, 28, 1) to logits (B, num_classes). Their kernels start
LeCun-normal and biases at zero, as in Flax and in FedJAX. (Keras' Glorot-uniform start, TensorFlow
Federated's, learns real digits less steadily under FedAvg with masked remainders: two points behind
after 100 rounds.)
"""

from __future__ import annotations

import functools

import gin
import jax
from flax import linen as nn

from fedexp.models.layers import Conv, Dense, Dropout, max_pool_2x2


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
        x = nn.relu(Dense(128)(x))
        x = Dropout(0.5)(x, deterministic=not train)
        return Dense(self.num_classes)(x)


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
            x = nn.relu(Dense(200)(x))
        return Dense(self.num_classes)(x)


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
        return Dense(self.num_classes)(x.reshape(x.shape[0], -1))


@gin.configurable
class EmnistAutoencoder(nn.Module):
    """The bottleneck autoencoder of Reddi et al. 2021 (arXiv:2003.00295), 2 837 314 parameters.

    Sigmoid layers of 1000, 500 and 250 units, a linear code, and back (Hinton & Salakhutdinov 2006).
    Kernels start Glorot-uniform, as in the code behind the published results.

    Attributes:
      code_size: units of the code.
    """

    code_size: int = 30

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images in [0, 1] of any shape (B, ...) to their reconstructions, of the same shape."""
        dense = functools.partial(Dense, kernel_init=nn.initializers.glorot_uniform())
        y = x.reshape(x.shape[0], -1)
        num_pixels = y.shape[1]
        for width in (1000, 500, 250):
            y = nn.sigmoid(dense(width)(y))
        y = dense(self.code_size)(y)
        for width in (250, 500, 1000, num_pixels):
            y = nn.sigmoid(dense(width)(y))
        return y.reshape(x.shape)
