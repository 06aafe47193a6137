"""Which values a device can hold as they are.

JAX makes 32 bits of 64: without a check 4294967303 would become 7, and 1e300 infinite.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Small enough for the processor's cache, which makes a pass over float32 run at 10 GB/s.
_BLOCK = 1 << 18
# What JAX makes of a dtype, by its name.
NARROW = {"int64": np.int32, "uint64": np.uint32, "float64": np.float32, "complex128": np.complex64}


def first_unfit(array: np.ndarray) -> tuple[int, str] | None:
    """The first row with a value that does not fit, and what is wrong with it; None if all fit.

    Arrays of small integers and booleans are not looked at.
    """
    dtype = array.dtype
    if dtype.kind not in "biufc" and dtype.isbuiltin != 2:  # 2 is bfloat16 and its like.
        return (
            0,
            f"the dtype is {dtype}, which no device can hold; make numbers of it, or leave it out",
        )
    if dtype.kind == "b" or (dtype.kind in "iu" and dtype.itemsize <= 4):
        return None
    rows = max(1, _BLOCK * len(array) // max(array.size, 1))
    for start in range(0, len(array), rows):
        block = array[start : start + rows]
        unfit = _unfit(block)
        if unfit.any():
            place = tuple(np.argwhere(unfit)[0])
            return start + int(place[0]), _reason(block[place])
    return None


def _unfit(values: np.ndarray) -> np.ndarray:
    narrow = NARROW.get(values.dtype.name, values.dtype)
    if values.dtype.kind in "iu":
        limits = np.iinfo(narrow)
        return (values < limits.min) | (values > limits.max)
    with np.errstate(over="ignore"):
        return ~np.isfinite(values.astype(narrow, copy=False))


def _reason(culprit: Any) -> str:
    if not np.isfinite(culprit):
        return f"the value {culprit} is not finite; replace it, or leave the example out"
    return (
        f"the value {culprit} does not fit {np.dtype(NARROW[culprit.dtype.name])}, which devices compute "
        "with; scale it, number it anew, or leave it out"
    )
