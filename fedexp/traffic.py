"""How many bits go between the server and the clients of a round."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


class Traffic:
    """Counts the bits of a round's calls, outside of loops, while it is traced.

    What clients can read counts once a round, however many calls it is given to. What they report beside
    what is summed over the cohort, as losses, does not count.

    Args:
      size: () int32, clients of the cohort.
    """

    def __init__(self, size: jax.Array) -> None:
        self._size = size
        self._up = jnp.float32(0)
        self._up_by_each = self._down = 0.0
        self._known: list[Any] = []

    def down(self, shared: PyTree) -> None:
        """Every client is told this."""
        for leaf in jax.tree.leaves(shared):
            if not any(leaf is known for known in self._known):
                self._known.append(leaf)
                self._down += bits_of(leaf)

    def untold(self, shared: PyTree) -> None:
        """Of this, clients are told nothing that is not counted elsewhere."""
        self._known += jax.tree.leaves(shared)

    def up(self, bits: jax.Array | float) -> None:
        """The clients together send so much."""
        self._up += bits

    def up_by_each(self, sent: PyTree) -> None:
        """Every client sends something like this."""
        self._up_by_each += sum(map(bits_of, jax.tree.leaves(sent)))

    def metrics(self) -> dict[str, jax.Array]:
        """'traffic/bits_up' and 'traffic/bits_down' of the round, () float32: seven digits."""
        size = self._size.astype(jnp.float32)
        return {
            "traffic/bits_up": self._up + size * self._up_by_each,
            "traffic/bits_down": size * self._down,
        }


def bits_of(leaf: Any) -> float:
    """Bits of an array, uncompressed."""
    dtype = jnp.result_type(leaf)
    itemsize = 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize
    return float(8 * itemsize * np.prod(jnp.shape(leaf)))
