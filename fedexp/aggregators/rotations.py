"""Random rotations of whole updates, by blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedexp.aggregators.coding import Rotation
from fedexp.contracts import Code, PyTree, Update
from fedexp.errors import check
from fedexp.streams import Stream, derive

# A block's transform is a product with a matrix of at most this size along each of its axes.
_RADIX = 16


def hadamard(block: int) -> Rotation:
    """H D of every block: the Walsh-Hadamard matrix after random signs, which follow from a seed.

    A block is no longer than the update needs; the last one is filled up with zeros, which are sent, too.
    """

    def turning(blocks: jax.Array, key: jax.Array):
        sign = _random_signs(key, *blocks.shape)
        return walsh_hadamard(sign * blocks), lambda rows: sign * walsh_hadamard(rows)

    return _by_block(block, turning)


def uniform(block: int) -> Rotation:
    """A rotation drawn from all alike, the same for every block; as slow as a product with its matrix."""

    def turning(blocks: jax.Array, key: jax.Array):
        matrix, upper = jnp.linalg.qr(jax.random.normal(key, (blocks.shape[1],) * 2))
        matrix = matrix * jnp.sign(jnp.diagonal(upper))
        return blocks @ matrix, lambda rows: rows @ matrix.T

    return _by_block(block, turning)


def _by_block(block: int, turning: Callable) -> Rotation:
    check(block >= 2 and block & (block - 1) == 0, f"a block must be a power of 2, got {block}")

    def rotation(update: Update, key: jax.Array):
        why = "a rotation would fill what another link has left out; bind it before that one"
        check((update.code or Code()).support is None, why)
        flat, unravel = ravel_pytree(update.value)
        size = min(block, 2 ** math.ceil(math.log2(max(flat.size, 2))))
        blocks = jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size)
        turned, back = turning(blocks, derive(key, Stream.SERVER))

        def undone(rows: Sequence[jax.Array]) -> PyTree:
            return unravel(back(rows[0]).ravel()[: flat.size])

        return [turned], [jnp.ones(turned.shape, bool)], undone

    return rotation


def walsh_hadamard(blocks: jax.Array) -> jax.Array:
    """The orthonormal transform of every row of (n, b), b a power of two; its own inverse."""
    n, size = blocks.shape
    axes = []
    while math.prod(axes) < size:
        axes.append(min(_RADIX, size // math.prod(axes)))
    blocks = blocks.reshape(n, *axes)
    # A product takes the first axis and leaves it last: in the end all are in place.
    for length in axes:
        blocks = jnp.tensordot(blocks, _matrix(length), axes=(1, 0), precision="highest")
    return blocks.reshape(n, size)


def _random_signs(key: jax.Array, n: int, size: int) -> jax.Array:
    """(n, size) float32, of a random bit each; `jax.random.rademacher` takes 32, and most of the time."""
    words = jax.random.bits(key, (n, -(-size // 32), 1), jnp.uint32)
    bits = words >> jnp.arange(32, dtype=jnp.uint32) & 1
    return 1 - 2 * bits.reshape(n, -1)[:, :size].astype(jnp.float32)


def _matrix(size: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.float32))
    return matrix / np.float32(math.sqrt(size))
