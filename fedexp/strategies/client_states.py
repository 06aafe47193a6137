"""Per-client algorithm state between rounds, kept on the host for the clients seen so far."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

PyTree = Any


class ClientStates:
    """Holds one pytree per client; clients never sampled cost nothing.

    Args:
      first: the state of a client that was never sampled, a pytree of arrays.
    """

    def __init__(self, first: PyTree):
        leaves, self._treedef = jax.tree.flatten(first)
        self._first = [np.asarray(leaf) for leaf in leaves]
        self._rows: dict[int, list[np.ndarray]] = {}

    def gather(self, clients: np.ndarray, slots: int) -> PyTree:
        """States of the given clients, pytree of (slots, ...); padded slots hold a first state."""
        rows = [self._rows.get(int(client), self._first) for client in clients]
        rows += [self._first] * (slots - len(rows))
        return self._treedef.unflatten([np.stack(leaf) for leaf in zip(*rows, strict=True)])

    def scatter(self, clients: np.ndarray, states: PyTree) -> None:
        """Stores rows 0..len(clients) of `states`, pytree of (slots, ...)."""
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(states)]
        for slot, client in enumerate(clients):
            self._rows[int(client)] = [leaf[slot].copy() for leaf in leaves]

    def save(self) -> PyTree:
        """What a checkpoint holds: {'clients': (n,) int64, 'rows': pytree of (n, ...)}."""
        clients = np.array(sorted(self._rows), np.int64)
        return {"clients": clients, "rows": jax.tree.leaves(self.gather(clients, len(clients)))}

    def template(self) -> PyTree:
        """The shapes and dtypes of what `save` returns; None stands for the clients seen by then."""
        rows = [jax.ShapeDtypeStruct((None, *leaf.shape), leaf.dtype) for leaf in self._first]
        return {"clients": jax.ShapeDtypeStruct((None,), np.int64), "rows": rows}

    def load(self, saved: PyTree) -> None:
        """Takes over what `save` returned."""
        self._rows = {}
        self.scatter(saved["clients"], saved["rows"])
