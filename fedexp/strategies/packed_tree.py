"""A tree of small arrays as one, because it is their number that a transfer to a device costs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

PyTree = Any
# Of every leaf its shape and dtype, without the axis of devices; and the tree's structure.
Layout = tuple[tuple[tuple[tuple[int, ...], np.dtype], ...], Any]


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
    def of(cls, trees: Sequence[PyTree]) -> PackedTree:
        """Packs D trees of NumPy arrays that are alike in all but their values."""
        structure = jax.tree.structure(trees[0])
        rows = [jax.tree.leaves(tree) for tree in trees]
        flat = [np.concatenate([leaf.ravel() for leaf in row], dtype=np.int32) for row in rows]
        layout = tuple((leaf.shape, leaf.dtype) for leaf in rows[0])
        return cls(np.stack(flat), (layout, structure))

    def unpack(self) -> PyTree:
        """The arrays of all trees, stacked: leaves (D, ...)."""
        shapes, structure = self.layout
        ends = np.cumsum([math.prod(shape) for shape, _ in shapes])
        parts = jax.numpy.split(self.flat, ends[:-1], axis=1)
        return structure.unflatten(
            part.reshape(len(part), *shape).astype(dtype)
            for part, (shape, dtype) in zip(parts, shapes, strict=True)
        )
