"""How a client's examples become its local batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import gin
import numpy as np

from fedexp.errors import UserError


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ClientBatching:
    """Local training's passes over a client's examples.

    Either `local_epochs` passes, or `local_steps` full batches from as many reshuffled passes as they
    need.

    Attributes:
      batch_size: examples per local step.
      local_epochs: passes over the client's examples; ignored if local_steps is set.
      local_steps: batches per client, whatever its size.
      shuffle: reshuffle every pass.
      remainder: what becomes of examples that do not fill a batch. 'mask': each pass ends with a
        padded batch, a step on these examples alone (as in TensorFlow Federated); 'drop': a pass ends
        before them, but a client smaller than one batch keeps it; 'fill': passes follow one another
        without a seam, and the last batch is filled up from one pass more (as in FedJAX).
      max_examples: a client with more examples trains on its first ones, and weighs no more than these.

    Raises:
      UserError: a number below 1, or an unknown remainder.
    """

    batch_size: int = 20
    local_epochs: int = 1
    local_steps: int | None = None
    shuffle: bool = True
    remainder: Literal["mask", "drop", "fill"] = "mask"
    max_examples: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "local_epochs", "local_steps", "max_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"ClientBatching.{name} must be at least 1, got {value}")
        if self.remainder not in ("mask", "drop", "fill"):
            raise UserError(
                f"ClientBatching.remainder must be 'mask', 'drop' or 'fill', got {self.remainder!r}"
            )

    def used(self, sizes: np.ndarray) -> np.ndarray:
        """How many examples clients of these sizes train on; the other methods take these numbers."""
        return sizes if self.max_examples is None else np.minimum(sizes, self.max_examples)

    def num_steps(self, sizes: np.ndarray) -> np.ndarray:
        """Local steps of clients with the given numbers of examples, in the shape of `sizes`."""
        if self.local_steps is not None:
            return np.full_like(sizes, self.local_steps)
        if self.remainder == "fill":
            return -(-self.local_epochs * sizes // self.batch_size)
        return self.local_epochs * self._steps_per_epoch(sizes)

    def num_examples(self, sizes: np.ndarray) -> np.ndarray:
        """Examples that those clients train on, repetitions counted, in the shape of `sizes`."""
        if self.local_steps is None and self.remainder == "mask":
            return self.local_epochs * sizes
        full = self.num_steps(sizes) * self.batch_size
        if self.local_steps is None and self.remainder == "drop":
            return np.minimum(full, self.local_epochs * sizes)
        return full

    def fill_counts(self, sizes: np.ndarray) -> np.ndarray:
        """How many of those clients' batches hold r real examples, (batch_size + 1,) int64 over r."""
        partial = np.zeros(0, np.int64)
        if self.local_steps is None and self.remainder == "mask":
            partial = sizes % self.batch_size
        elif self.local_steps is None and self.remainder == "drop":
            partial = sizes[sizes < self.batch_size]
        counts = self.local_epochs * np.bincount(
            partial[partial > 0], minlength=self.batch_size + 1
        )
        counts[self.batch_size] = self.num_steps(sizes).sum() - counts.sum()
        return counts

    def _steps_per_epoch(self, sizes: np.ndarray) -> np.ndarray:
        if self.remainder == "drop":
            return np.maximum(sizes // self.batch_size, 1)
        return -(-sizes // self.batch_size)

    def order(self, size: int, seed: Sequence[int]) -> np.ndarray:
        """Draws which examples make up each batch of a client with `size` examples, from `seed`.

        Returns:
          (num_steps, batch_size) int64 positions in [0, size); -1 pads incomplete batches.
        """
        # Making a generator takes longer than all the rest.
        rng = np.random.default_rng(seed) if self.shuffle else None
        if self.local_steps is not None or self.remainder == "fill":
            positions = int(self.num_steps(np.int64(size))) * self.batch_size
            passes = [_one_pass(size, rng) for _ in range(-(-positions // size))]
            return np.concatenate(passes)[:positions].reshape(-1, self.batch_size)
        length = int(self._steps_per_epoch(np.int64(size))) * self.batch_size
        batches = np.full((self.local_epochs, length), -1)
        for epoch in batches:
            positions = _one_pass(size, rng)[:length]
            epoch[: len(positions)] = positions
        return batches.reshape(-1, self.batch_size)


def _one_pass(size: int, rng: np.random.Generator | None) -> np.ndarray:
    return np.arange(size) if rng is None else rng.permutation(size)
