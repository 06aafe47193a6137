"""Per-client algorithm state between rounds, kept on the host for the clients seen so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fedexp import kept
from fedexp.engine.state_store import InMemory, StateStore, name_of, processes_of
from fedexp.errors import UserError

PyTree = Any


class ClientStates:
    """Holds one pytree per client, in memory or in a store of files; clients never sampled cost nothing.

    Args:
      first: the state of a client that was never sampled, a pytree of arrays.
      clients: those of this process; others are not kept.
    """

    def __init__(self, first: PyTree, clients: range):
        self._clients = clients
        for leaf in jax.tree.leaves(first):
            if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
                raise UserError(
                    "a client's state holds a PRNG key; keep its jax.random.key_data, or draw from the "
                    "key that a client is given in every round"
                )
        leaves, self._treedef = jax.tree.flatten(jax.device_get(first))
        self._first = [np.asarray(leaf) for leaf in leaves]
        self._rows: InMemory | StateStore = InMemory()

    def gather(self, clients: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> PyTree:
        """Lays states out in a table.

        Args:
          clients: (n,) int, indices of clients.
          rows: (n,) int, where in the flattened table each of them goes.
          shape: of the table.

        Returns:
          A pytree of (*shape, ...); the table's other places hold a first state.
        """
        places = math.prod(shape)
        leaves = [np.empty((places, *first.shape), first.dtype) for first in self._first]
        parts, is_first = [_as_bytes(leaf) for leaf in leaves], np.ones(places, bool)
        for client, row in zip(clients.tolist(), rows.tolist(), strict=True):
            is_first[row] = not self._rows.read(client, [part[row] for part in parts])
        for leaf, first in zip(leaves, self._first, strict=True):
            leaf[is_first] = first
        return self._treedef.unflatten([leaf.reshape(*shape, *leaf.shape[1:]) for leaf in leaves])

    def scatter(self, clients: np.ndarray, rows: np.ndarray, table: PyTree) -> None:
        """Stores the given rows of `table`, a pytree of (places, ...)."""
        parts = [_as_bytes(np.asarray(leaf)) for leaf in jax.tree.leaves(table)]
        for client, row in zip(clients.tolist(), rows.tolist(), strict=True):
            self._rows.write(client, [part[row] for part in parts])

    def save(self) -> PyTree:
        """All states, of all processes: {'clients': (n,) int64, 'rows': [(n, ...)]}.

        With several processes, all must call this at the same time.
        """
        saved = self._saved(self._rows.clients())
        return saved if jax.process_count() == 1 else _of_all_processes(saved)

    def template(self) -> PyTree:
        """What stands for what `save` returns in a checkpoint, of however many clients."""
        rows = [kept.Rows(leaf.shape, leaf.dtype) for leaf in self._first]
        return {"clients": kept.Rows((), np.dtype(np.int64)), "rows": rows}

    def load(self, saved: PyTree) -> None:
        """Takes over what `save` returned, possibly on another number of processes."""
        if isinstance(self._rows, InMemory):
            self._rows = InMemory()
        rows = np.array(
            [row for row, i in enumerate(saved["clients"]) if int(i) in self._clients], int
        )
        self.scatter(saved["clients"][rows], rows, saved["rows"])

    def keep_in(self, stores: Path, round: int) -> StateStore:
        """Keeps states in a store of their own from now on, none so far.

        Args:
          stores: a folder that all processes share.
          round: which the run begins after.
        """
        self._rows = store = self._store(stores, name_of(round, jax.process_count()))
        store.clear()
        return store

    def restore(self, stores: Path, name: str, round: int, kept: Collection[int]) -> None:
        """Goes back to the states of a checkpoint, possibly of another number of processes.

        Args:
          stores: as in `keep_in`.
          name: that `commit` gave.
          round: of the checkpoint.
          kept: rounds of all complete checkpoints.

        Raises:
          OSError, ValueError: files that do not have all of it.
        """
        if processes_of(name) == jax.process_count():
            self._rows = store = self._store(stores, name)
            store.restore(round, kept)
        else:
            self.keep_in(stores, round).take(name, round)

    def commit(
        self, round: int, kept: Collection[int]
    ) -> tuple[PyTree, str | None, Callable[[], None] | None]:
        """What a checkpoint consists of.

        Args:
          round: of the checkpoint.
          kept: rounds of the other checkpoints that are complete.

        Returns:
          What it holds, like `save`: of nobody, if states are in a store. The store's name. What has to be
          called before the checkpoint is complete.
        """
        if isinstance(self._rows, InMemory):
            return self.save(), None, None
        nobody = self._saved(np.zeros(0, np.int64))
        return nobody, self._rows.name, self._rows.commit(round, kept)

    def _saved(self, clients: np.ndarray) -> PyTree:
        table = self.gather(clients, np.arange(len(clients)), (len(clients),))
        return {"clients": clients, "rows": jax.tree.leaves(table)}

    def _store(self, stores: Path, name: str) -> StateStore:
        row_bytes = sum(leaf.nbytes for leaf in self._first)
        return StateStore(stores, name, jax.process_index(), self._clients, row_bytes)


def _as_bytes(table: np.ndarray) -> np.ndarray:
    """A view of (n, ...) as (n, bytes) uint8."""
    size = math.prod(table.shape[1:])
    return np.ascontiguousarray(table).reshape(len(table), size).view(np.uint8)


def _of_all_processes(tree: PyTree) -> PyTree:
    """Concatenates arrays (n, ...) whose n differs between processes."""
    count = len(tree["clients"])
    counts = multihost_utils.process_allgather(np.int32(count))

    def gather(array: np.ndarray) -> np.ndarray:
        padded = np.zeros((counts.max(), *array.shape[1:]), array.dtype)
        padded[:count] = array
        # As bytes, because JAX would cut 64-bit numbers down to 32.
        parts = multihost_utils.process_allgather(padded.view(np.uint8))
        parts = [np.ascontiguousarray(part).view(array.dtype) for part in parts]
        return np.concatenate([part[:n] for part, n in zip(parts, counts, strict=True)])

    return jax.tree.map(gather, tree)
