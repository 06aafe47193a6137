"""Per-client algorithm state between rounds, kept on the host for the clients seen so far."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fedexp.errors import UserError

PyTree = Any


class ClientStates:
    """Holds one pytree per client; clients never sampled cost nothing.

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
        self._rows: dict[int, list[np.ndarray]] = {}

    def gather(self, clients: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> PyTree:
        """Lays states out in a table.

        Args:
          clients: (n,) int, indices of clients.
          rows: (n,) int, where in the flattened table each of them goes.
          shape: of the table.

        Returns:
          A pytree of (*shape, ...); the table's other places hold a first state.
        """
        table = [self._first] * int(np.prod(shape))
        for client, row in zip(clients, rows, strict=True):
            table[row] = self._rows.get(int(client), self._first)
        leaves = [np.stack(leaf) for leaf in zip(*table, strict=True)]
        return self._treedef.unflatten([leaf.reshape(*shape, *leaf.shape[1:]) for leaf in leaves])

    def scatter(self, clients: np.ndarray, rows: np.ndarray, table: PyTree) -> None:
        """Stores the given rows of `table`, a pytree of (places, ...)."""
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(table)]
        for client, row in zip(clients, rows, strict=True):
            self._rows[int(client)] = [leaf[row].copy() for leaf in leaves]

    def save(self) -> PyTree:
        """What a checkpoint holds, of all processes: {'clients': (n,) int64, 'rows': [(n, ...)]}.

        With several processes, all must call this at the same time.
        """
        clients = np.array(sorted(self._rows), np.int64)
        rows = [self._rows[int(client)] for client in clients]
        stacked = [
            np.stack([row[i] for row in rows]) if rows else np.zeros((0, *first.shape), first.dtype)
            for i, first in enumerate(self._first)
        ]
        saved = {"clients": clients, "rows": stacked}
        return saved if jax.process_count() == 1 else _of_all_processes(saved)

    def template(self) -> PyTree:
        """The shapes and dtypes of what `save` returns; None stands for the clients seen by then."""
        rows = [jax.ShapeDtypeStruct((None, *leaf.shape), leaf.dtype) for leaf in self._first]
        return {"clients": jax.ShapeDtypeStruct((None,), np.int64), "rows": rows}

    def load(self, saved: PyTree) -> None:
        """Takes over what `save` returned, possibly on another number of processes."""
        self._rows = {}
        rows = np.array(
            [row for row, i in enumerate(saved["clients"]) if int(i) in self._clients], int
        )
        self.scatter(saved["clients"][rows], rows, saved["rows"])


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
