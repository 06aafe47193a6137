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
    """Arrays (D, ...) of int32, float32 or bool, side by side.

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
        flat = [np.concatenate([_as_int32(leaf) for leaf in row]) for row in rows]
        layout = tuple((leaf.shape, leaf.dtype) for leaf in rows[0])
        return cls(np.stack(flat), (layout, structure))

    def unpack(self) -> PyTree:
        """The arrays of all trees, stacked: leaves (D, ...)."""
        shapes, structure = self.layout
        ends = np.cumsum([math.prod(shape) for shape, _ in shapes])
        parts = jax.numpy.split(self.flat, ends[:-1], axis=1)
        return structure.unflatten(
            _as_stored(part, dtype).reshape(len(part), *shape)
            for part, (shape, dtype) in zip(parts, shapes, strict=True)
        )


def _as_int32(leaf: np.ndarray) -> np.ndarray:
    flat = leaf.ravel()
    return flat.view(np.int32) if flat.dtype == np.float32 else flat.astype(np.int32, copy=False)


def _as_stored(part: jax.Array, dtype: np.dtype) -> jax.Array:
    if dtype == np.float32:
        return jax.lax.bitcast_convert_type(part, np.float32)
    return part.astype(dtype)
