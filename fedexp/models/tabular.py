"""Models of feature vectors."""

from __future__ import annotations

from collections.abc import Sequence

import gin
import jax
import jax.numpy as jnp
from flax import linen as nn

from fedexp.models.layers import Dense


def _dense(num_outputs: int, x: jax.Array) -> jax.Array:
    """Maps (B, d) to (B, num_outputs) by a layer of the calling module, which starts as PyTorch's do."""
    bound = x.shape[1] ** -0.5

    def start(
        key: jax.Array, shape: Sequence[int], dtype: jax.typing.DTypeLike = jnp.float32
    ) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return Dense(num_outputs, kernel_init=start, bias_init=start)(x)


@gin.configurable
class LinearModel(nn.Module):
    """One linear layer, as for regression or a log hazard.

    Kernel and bias start as in PyTorch, from U(-1/sqrt(d), 1/sqrt(d)) for d inputs (FLamby, arXiv:2210.04620,
    trains from there).

    Attributes:
      num_outputs: how many numbers it returns.
    """

    num_outputs: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, ...) to (B, num_outputs)."""
        return _dense(self.num_outputs, x.reshape(x.shape[0], -1))


@gin.configurable
class BinaryLogistic(nn.Module):
    """Logistic regression of two classes: the logit of class 1, class 0 having 0.

    Under softmax that is one sigmoid unit and its binary cross-entropy. It starts as `LinearModel` does.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, ...) to logits (B, 2)."""
        logit = _dense(1, x.reshape(x.shape[0], -1))
        return jnp.concatenate([jnp.zeros_like(logit), logit], axis=1)


@gin.configurable
class DenseClassifier(nn.Module):
    """Hidden layers with ReLU, and logits; without hidden layers multinomial logistic regression.

    Kernels start LeCun-normal and biases at zero.

    Attributes:
      num_classes: number of logits.
      hidden: units of each hidden layer.
    """

    num_classes: int
    hidden: Sequence[int] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, ...) to logits (B, num_classes)."""
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(Dense(width)(x))
        return Dense(self.num_classes)(x)
