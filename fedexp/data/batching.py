"""How a client's examples become its local batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import gin
import numpy as np

from fedexp.errors import UserError

# Of one client in one round: their row numbers alone take 8 bytes each.
_MOST_PLACES = 2**28


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
      UserError: a number out of range, or an unknown remainder.
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
            if value is not None and not 1 <= value < 2**31:
                raise UserError(f"ClientBatching.{name} must be from 1 to 2**31 - 1, got {value}")
        if self.remainder not in ("mask", "drop", "fill"):
            raise UserError(
                f"ClientBatching.remainder must be 'mask', 'drop' or 'fill', got {self.remainder!r}"
            )

    def limited(self, sizes: np.ndarray) -> np.ndarray:
        """How many examples of clients of these sizes count; the other methods take these numbers."""
        return sizes if self.max_examples is None else np.minimum(sizes, self.max_examples)

    def fitted(self, sizes: np.ndarray) -> ClientBatching:
        """The same batches of clients of these sizes, with no places that none of them can fill.

        Raises:
          UserError: batches for which there are not enough examples, or not enough memory.
        """
        fitted, total = self, int(sizes.sum())
        if self.local_steps is None and self.remainder != "fill":
            fitted = dataclasses.replace(self, batch_size=min(self.batch_size, int(sizes.max())))
        elif self.batch_size > total:
            raise UserError(
                f"ClientBatching.batch_size is {self.batch_size}, and all clients together have {total} "
                "examples to fill a batch with; lower it"
            )
        places = int(fitted.num_steps(sizes).max()) * fitted.batch_size
        if places > _MOST_PLACES:
            raise UserError(
                f"one client would train on {places:,} examples a round, repetitions counted; lower "
                "ClientBatching.local_epochs, local_steps or batch_size"
            )
        return fitted

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

    def order(
        self, sizes: np.ndarray, firsts: np.ndarray, seeds: Sequence[Sequence[int]] | np.ndarray
    ) -> np.ndarray:
        """Draws which examples make up each batch of each client of a cohort.

        Args:
          sizes: (C,) int64, how many examples a client trains on.
          firsts: (C,) int64, the row of its first one.
          seeds: C seeds of the order of its examples; not looked at unless it is shuffled.

        Returns:
          (num_steps of all, batch_size) int64 rows, a client's batches behind those of the client before;
          -1 pads incomplete batches.
        """
        steps = self.num_steps(sizes)
        client = np.repeat(np.arange(len(sizes)), steps)
        step = consecutive(np.zeros_like(steps), steps)
        places, size = np.arange(self.batch_size), sizes[client, None]
        if self.local_steps is not None or self.remainder == "fill":
            passes = -(-steps * self.batch_size // sizes)
            pass_, position = np.divmod(step[:, None] * self.batch_size + places, size)
        else:
            passes = np.full_like(steps, self.local_epochs)
            pass_, step = np.divmod(step, self._steps_per_epoch(sizes)[client])
            pass_, position = pass_[:, None], step[:, None] * self.batch_size + places
        real = position < size
        if self.shuffle:
            begins = np.cumsum(passes * sizes) - passes * sizes
            positions = _permutations(sizes.tolist(), passes.tolist(), seeds)
            position = positions[np.where(real, begins[client, None] + pass_ * size + position, 0)]
        return np.where(real, firsts[client, None] + position, -1)


def _permutations(
    sizes: Sequence[int], passes: Sequence[int], seeds: Sequence[Sequence[int]] | np.ndarray
) -> np.ndarray:
    """Each client's passes over its examples, one after another."""
    drawn = [np.zeros(0, np.int64)]  # There may be no client.
    for size, number, seed in zip(sizes, passes, seeds, strict=True):
        rng = np.random.default_rng(seed)
        drawn += [rng.permutation(size) for _ in range(number)]
    return np.concatenate(drawn)


def consecutive(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`counts[i]` consecutive numbers from `firsts[i]`, for all i one after another, int64."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - ends + counts, counts)
