"""How a client's examples become its local batches."""

from __future__ import annotations

import dataclasses

import gin
import numpy as np

from fedexp.errors import UserError


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ClientBatching:
    """Local training's passes over a client's examples.

    Either `local_epochs` passes, each cut into batches on its own (the last one is padded and masked),
    or `local_steps` full batches drawn from as many reshuffled passes as they need.

    Attributes:
      batch_size: examples per local step.
      local_epochs: passes over the client's examples; ignored if local_steps is set.
      local_steps: batches per client, whatever its size.
      shuffle: reshuffle every pass.
      drop_remainder: drop the last, incomplete batch of a pass; a client smaller than one batch keeps it.

    Raises:
      UserError: a value below 1.
    """

    batch_size: int = 20
    local_epochs: int = 1
    local_steps: int | None = None
    shuffle: bool = True
    drop_remainder: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "local_epochs", "local_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"ClientBatching.{name} must be at least 1, got {value}")

    def num_steps(self, sizes: np.ndarray) -> np.ndarray:
        """Local steps of clients with the given numbers of examples, in the shape of `sizes`."""
        if self.local_steps is not None:
            return np.full_like(sizes, self.local_steps)
        return self.local_epochs * self._steps_per_epoch(sizes)

    def _steps_per_epoch(self, sizes: np.ndarray) -> np.ndarray:
        if self.drop_remainder:
            return np.maximum(sizes // self.batch_size, 1)
        return -(-sizes // self.batch_size)

    def order(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Draws which examples make up each batch of a client with `size` examples.

        Returns:
          (num_steps, batch_size) int64 positions in [0, size); -1 pads incomplete batches.
        """
        if self.local_steps is not None:
            positions = self.local_steps * self.batch_size
            passes = [self._one_pass(size, rng) for _ in range(-(-positions // size))]
            return np.concatenate(passes)[:positions].reshape(-1, self.batch_size)
        length = int(self._steps_per_epoch(np.int64(size))) * self.batch_size
        batches = np.full((self.local_epochs, length), -1)
        for epoch in batches:
            positions = self._one_pass(size, rng)[:length]
            epoch[: len(positions)] = positions
        return batches.reshape(-1, self.batch_size)

    def _one_pass(self, size: int, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(size) if self.shuffle else np.arange(size)
