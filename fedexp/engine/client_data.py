"""The examples of all clients: joined over splits by client id, each owned by one process."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from fedexp.contracts import TRAIN
from fedexp.data import FederatedDataset
from fedexp.engine.placement import Placement

Examples = dict[str, jax.Array]


class ClientData:
    """All splits of a federated data set, seen from the clients of its training split.

    Each process owns a contiguous range of clients, of about as many training examples as every other's:
    it reads and holds no others.

    Args:
      splits: name -> data set; 'train' says which clients there are.
      placement: the devices.
      resident_bytes: splits that fit into this many bytes together stay on the devices, those that are
        asked for first.

    Attributes:
      client_ids: (num_clients,) str.
      borders: (processes + 1,) int64, where each process's range begins.
      local_clients: this process's.
    """

    def __init__(
        self, splits: Mapping[str, FederatedDataset], placement: Placement, resident_bytes: int
    ):
        train = splits[TRAIN]
        wanted = np.arange(placement.num_processes + 1) * train.num_examples
        wanted = wanted / placement.num_processes
        self.client_ids = train.client_ids
        self.borders = np.searchsorted(train.offsets, wanted).astype(np.int64)
        number = np.flatnonzero(np.unique(placement.processes) == jax.process_index())[0]
        self.local_clients = range(*self.borders[number : number + 2].tolist())
        self.placement = placement
        self._splits = splits
        self._budget = resident_bytes
        self._opened: dict[str, Split] = {}

    @property
    def num_clients(self) -> int:
        return len(self.client_ids)

    def owner(self, clients: np.ndarray) -> np.ndarray:
        """Which of the processes owns each client, counted from 0 among those that take part."""
        return np.searchsorted(self.borders, clients, side="right") - 1

    def names(self) -> list[str]:
        """The splits there are."""
        return list(self._splits)

    def split(self, name: str) -> Split:
        """A split, moved to the devices when it is first asked for, if it fits."""
        if name not in self._opened:
            self._opened[name] = split = Split(self._splits[name], self, self._budget)
            if split.resident is not None:
                self._budget -= split.nbytes
        return self._opened[name]


class Split:
    """One split's rows of every client.

    Attributes:
      sizes: (num_clients,) int64, examples of each client; 0 for one that the split does not have.
      resident: feature -> (D, rows, ...), the rows of every process's clients on its devices; None where
        they do not fit.
      nbytes: of one device's rows.
    """

    def __init__(self, dataset: FederatedDataset, data: ClientData, budget: int):
        self._dataset = dataset
        self._placement = data.placement
        self._firsts, self.sizes = dataset.rows_of(data.client_ids)
        ends = np.concatenate([[0], np.cumsum(self.sizes)])
        rows = int(np.diff(ends[data.borders]).max())  # The same on all processes: one program.
        self.nbytes = rows * dataset.nbytes // dataset.num_examples
        self.resident: Examples | None = None
        if self.nbytes <= budget:
            self._resident_firsts = ends[:-1] - ends[data.local_clients.start]
            self.resident = self._put(data.local_clients, rows)

    def resident_rows(self, clients: np.ndarray) -> np.ndarray:
        """Where each of this process's clients begins in the resident rows, (n,) int64."""
        return self._resident_firsts[clients]

    def gather(self, shares: list[tuple[np.ndarray, np.ndarray]], rows: int) -> Examples:
        """Copies the first examples of each device's clients side by side and starts their transfer.

        Args:
          shares: per device, its clients and how many examples of each.
          rows: examples to pad each device's to.
        """
        examples = self._zeros(len(shares), rows)
        for device, (clients, sizes) in enumerate(shares):
            self._dataset.prefetch(self._dataset.clients_of(self._firsts[clients[sizes > 0]]))
            ends = np.cumsum(sizes)
            for first, size, end in zip(self._firsts[clients], sizes, ends, strict=True):
                for name, array in self._dataset.slice(first, first + size).items():
                    examples[name][device, end - size : end] = array
        return self._placement.split(examples)

    def _put(self, clients: range, rows: int) -> Examples:
        """Copies of this process's clients' rows, one for each of its devices."""
        firsts, sizes = (
            self._firsts[clients.start : clients.stop],
            self.sizes[clients.start : clients.stop],
        )
        firsts, sizes = firsts[sizes > 0], sizes[sizes > 0]
        if len(sizes) and (firsts[1:] == (firsts + sizes)[:-1]).all():
            share = self._dataset.slice(firsts[0], firsts[-1] + sizes[-1])
        else:
            index = [np.arange(f, f + n) for f, n in zip(firsts, sizes, strict=True)]
            share = self._dataset.gather(np.concatenate([np.zeros(0, np.int64), *index]))

        def copies(array: np.ndarray) -> np.ndarray:
            if len(array) < rows:
                padding = np.zeros_like(array, shape=(rows - len(array), *array.shape[1:]))
                array = np.concatenate([array, padding])
            return np.broadcast_to(array, (len(self._placement.local), *array.shape))

        return self._placement.split(jax.tree.map(copies, share))

    def _zeros(self, devices: int, rows: int) -> dict[str, np.ndarray]:
        return {
            name: np.zeros((devices, rows, *array.shape[1:]), array.dtype)
            for name, array in self._dataset.features.items()
        }
