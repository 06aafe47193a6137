"""Updates in a few bits an entry, after a random rotation."""

from __future__ import annotations

import gin

from fedexp.aggregators.coding import Coding, quantizing
from fedexp.aggregators.quantize import uniform_levels
from fedexp.aggregators.rotations import hadamard
from fedexp.contracts import Aggregator
from fedexp.errors import check


@gin.configurable
def rotated_quantize(levels: int = 16, block: int = 2**15, coding: Coding = "fixed") -> Aggregator:
    """Stochastic rotated quantization (Suresh et al. 2017, arXiv:1611.00429, Section 3).

    `quantize` after a random Walsh-Hadamard rotation, which makes entries alike and so their range narrow.
    Each client has a rotation of its own, by a seed that the server knows.

    Args:
      levels: see `quantize`.
      block: entries that are rotated together, a power of two; each block has levels of its own. The paper
        rotates the whole vector: take one that is long enough. Short ones are faster and fill up less.
      coding: see `quantize`.

    Raises:
      UserError: fewer than 2 levels, a block that is no power of two, or an unknown coding.
    """
    check(levels >= 2, f"rotated_quantize.levels must be at least 2, got {levels}")
    return quantizing(uniform_levels(levels), levels, 2, coding, hadamard(block))
