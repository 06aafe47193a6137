"""A tree of small arrays as one, because it is their number that a transfer to a device costs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

PyTree = Any
# Of every leaf its shape but for the first axis, and its dtype; and the tree's structure.
Layout = tuple[tuple[tuple[tuple[int, ...], str], ...], Any]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["flat"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class PackedTree:
    """Arrays (D, ...) of int32 or bool, side by side.

    Attributes:
      flat: (D, n) int32.
      layout: what `unpack` needs to know; two trees of one layout share a compiled program.
    """

    flat: jax.Array
    layout: Layout

    @classmethod
    def of(cls, tree: PyTree) -> PackedTree:
        """Packs NumPy arrays whose first axes are equally long."""
        leaves, structure = jax.tree.flatten(tree)
        shapes = tuple((leaf.shape[1:], leaf.dtype.name) for leaf in leaves)
        flat = np.concatenate(
            [leaf.reshape(len(leaf), -1).astype(np.int32) for leaf in leaves], axis=1
        )
        return cls(flat, (shapes, structure))

    def unpack(self) -> PyTree:
        """The arrays as they were."""
        shapes, structure = self.layout
        ends = np.cumsum([math.prod(shape) for shape, _ in shapes])
        parts = jax.numpy.split(self.flat, ends[:-1], axis=1)
        return structure.unflatten(
            part.reshape(len(part), *shape).astype(dtype)
            for part, (shape, dtype) in zip(parts, shapes, strict=True)
        )
