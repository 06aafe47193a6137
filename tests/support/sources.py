"""A source for conversions that worker processes can import, and that can go wrong."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Clients:
    """Client i is called c{i:03} and has sizes[i] rows.

    Attributes:
      sizes: rows of each client.
      odd_shape_from: the first client whose rows have another shape.
      kill_at: the client at which the reading process kills itself; -1 is before the first.
      seconds: how long a client takes.
      num_ids: how many clients it says there are, if others than it has.
    """

    sizes: tuple[int, ...]
    odd_shape_from: int | None = None
    kill_at: int | None = None
    seconds: float = 0.0
    num_ids: int | None = None

    def client_ids(self) -> list[str]:
        if self.kill_at == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        return [f"c{i:03}" for i in range(self.num_ids or len(self.sizes))]

    def read(self, client_ids: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        for client_id in client_ids:
            yield self.client(int(client_id[1:]))

    def client(self, i: int) -> dict[str, np.ndarray]:
        if i == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        odd = self.odd_shape_from is not None and i >= self.odd_shape_from
        x = np.random.default_rng(i).integers(0, 1000, (self.sizes[i], 4 if odd else 3), np.uint16)
        return {"x": x, "odd/name é": x[:, 0].astype(">i4"), "y": x.sum(axis=1) / 7}


@dataclasses.dataclass(frozen=True)
class Noted(Clients):
    """Leaves a file in `folder` for every client that is read, in whatever process."""

    folder: str = ""

    def client(self, i: int) -> dict[str, np.ndarray]:
        open(os.path.join(self.folder, str(i)), "x").close()
        return super().client(i)


@dataclasses.dataclass(frozen=True)
class Imports:
    """One client, whose only row tells whether the process that reads it has imported JAX."""

    def client_ids(self) -> list[str]:
        return ["only"]

    def read(self, client_ids: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        for _ in client_ids:
            print("what a source prints does no harm")
            yield {"jax": np.array(["jax" in sys.modules]), "pid": np.array([os.getpid()])}
