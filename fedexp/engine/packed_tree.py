"""Trees of small arrays as one, because it is their number that transfers and calls cost."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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

    flat: Any
    layout: Layout

    @classmethod
    def of(cls, trees: Sequence[PyTree]) -> PackedTree:
        """Packs D trees of NumPy arrays that are alike in all but their values."""
        rows, (structure, *_) = zip(*map(jax.tree.flatten, trees), strict=True)
        flat = [np.concatenate([_as_int32(leaf) for leaf in row]) for row in rows]
        layout = tuple((leaf.shape, leaf.dtype) for leaf in rows[0])
        return cls(np.stack(flat), (layout, structure))

    def unpack(self) -> PyTree:
        """The arrays of all trees, stacked: leaves (D, ...)."""
        shapes, structure = self.layout
        ends = np.cumsum([math.prod(shape) for shape, _ in shapes])
        parts = jnp.split(self.flat, ends[:-1], axis=1)
        return structure.unflatten(
            _as_stored(part, dtype).reshape(len(part), *shape)
            for part, (shape, dtype) in zip(parts, shapes, strict=True)
        )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["flat"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True, eq=False)
class PackedMapping(Mapping[str, Any]):
    """Names and trees of arrays, for the way back from the devices: what is asked for is cut out.

    `jax.device_get` turns all of it to NumPy; before that, everything cut out is an operation of its own.
    To `jax.tree` its leaves are the packed arrays.

    Attributes:
      flat: dtype -> (n,) arrays of it, side by side.
      layout: of every array its dtype, begin, end and shape; and the structure of the whole.
    """

    flat: dict[str, jax.Array]
    layout: tuple[tuple[tuple[str, int, int, tuple[int, ...]], ...], Any]

    @classmethod
    def of(cls, mapping: Mapping[str, PyTree]) -> PackedMapping:
        """Packs arrays and numbers of any dtypes."""
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, dict(mapping)))
        parts: dict[str, list[jax.Array]] = {}
        places, ends = [], dict.fromkeys([str(leaf.dtype) for leaf in leaves], 0)
        for leaf in leaves:
            dtype = str(leaf.dtype)
            parts.setdefault(dtype, []).append(leaf.ravel())
            places.append((dtype, ends[dtype], ends[dtype] + leaf.size, leaf.shape))
            ends[dtype] += leaf.size
        flat = {dtype: jnp.concatenate(arrays) for dtype, arrays in parts.items()}
        return cls(flat, (tuple(places), structure))

    @functools.cached_property
    def _unpacked(self) -> dict[str, PyTree]:
        places, structure = self.layout
        return structure.unflatten(
            self.flat[dtype][begin:end].reshape(shape) for dtype, begin, end, shape in places
        )

    def __getitem__(self, name: str) -> PyTree:
        return self._unpacked[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._unpacked)

    def __len__(self) -> int:
        return len(self._unpacked)


def _as_int32(leaf: np.ndarray) -> np.ndarray:
    flat = leaf.ravel()
    return flat.view(np.int32) if flat.dtype == np.float32 else flat.astype(np.int32, copy=False)


def _as_stored(part: jax.Array, dtype: np.dtype) -> jax.Array:
    if dtype == np.float32:
        return jax.lax.bitcast_convert_type(part, np.float32)
    return part.astype(dtype)
