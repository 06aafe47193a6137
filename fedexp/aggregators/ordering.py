"""Sorting what clients sent, entry by entry."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sort_clients(values: jax.Array) -> jax.Array:
    """Sorts every entry over clients, the least first; NaN counts as infinity.

    A bitonic network (Batcher 1968): log2(n) (log2(n) + 1) / 2 minima and maxima of whole arrays, which CPUs
    and accelerators vectorise. XLA's own sort compares element by element.

    Args:
      values: (clients, ...), of floats.

    Returns:
      The same shape, sorted along the first axis.
    """
    size, rest = values.shape[0], values.shape[1:]
    padded = 1 << (size - 1).bit_length()
    values = jnp.where(jnp.isnan(values), jnp.inf, values)
    values = jnp.pad(values, [(0, padded - size)] + [(0, 0)] * len(rest), constant_values=jnp.inf)
    length = 2
    while length <= padded:
        # Two sorted halves merge: first each with the other's mirror image, then ever closer ones.
        values = _exchange(values, length, mirrored=True)
        for apart in (length >> shift for shift in range(1, length.bit_length() - 1)):
            values = _exchange(values, apart, mirrored=False)
        length *= 2
    return values[:size]


def _exchange(values: jax.Array, length: int, mirrored: bool) -> jax.Array:
    """Of every `length` neighbours, minima into the first half and maxima into the second."""
    halves = values.reshape(-1, 2, length // 2, *values.shape[1:])
    first, second = halves[:, 0], halves[:, 1]
    if mirrored:
        second = second[:, ::-1]
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    if mirrored:
        high = high[:, ::-1]
    # Else a fusion of many stages would compute each anew for every entry of the next.
    return jax.lax.optimization_barrier(jnp.stack([low, high], axis=1).reshape(values.shape))
