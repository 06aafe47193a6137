"""One bit an entry, after a random rotation."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.aggregators.coding import quantizing
from fedexp.aggregators.rotations import hadamard, uniform
from fedexp.contracts import Aggregator


@gin.configurable
def drive(block: int = 2**15, structured: bool = True) -> Aggregator:
    """DRIVE and structured DRIVE (Vargaftik et al. 2021, arXiv:2105.08339, Algorithm 1 and Section 5).

    The signs of the rotated entries y, times |y|_2^2 / |y|_1, which makes the expectation over uniform
    rotations the update itself (Theorem 3). A float32 a block, and one bit an entry. Each client has a
    rotation of its own, by a seed that the server knows.

    Args:
      block: entries that are rotated together, a power of two; the paper rotates the whole vector.
      structured: rotate by a Walsh-Hadamard matrix after random signs; else uniformly, which needs a matrix
        of block x block, and is slow beyond a thousand.

    Raises:
      UserError: a block that is no power of two.
    """

    def quantizer(values: jax.Array, mask: jax.Array, key: jax.Array):
        del mask, key
        scale = (values**2).sum() / jnp.maximum(jnp.abs(values).sum(), 1e-30)
        sign = jnp.where(values < 0, -1.0, 1.0)
        return scale * sign, (sign > 0).astype(jnp.int32)

    return quantizing(quantizer, 2, 1, rotation=(hadamard if structured else uniform)(block))
