"""What rules share that look at all updates of a cohort at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedexp.contracts import Aggregated, Aggregator, Cohort, Metrics, PyTree, Sent
from fedexp.errors import UserError


class Updates(NamedTuple):
    """A cohort's updates; the memory of as many models as it has clients.

    Attributes:
      values: a pytree of (C, ...), zeros in rows that are no clients.
      real: (C,) bool, the rows that are.
      size: () int32, how many.
      clients: (C,) int32, whose they are: what breaks ties, because slots depend on lanes and devices.
    """

    values: PyTree
    real: jax.Array
    size: jax.Array
    clients: jax.Array

    def where_real(self, instead: float) -> PyTree:
        """The values, with a number in the rows that are no clients."""
        return jax.tree.map(
            lambda leaf: jnp.where(along(self.real, leaf), leaf, instead), self.values
        )

    def combined(self, weights: jax.Array) -> PyTree:
        """The sum of the updates, each times its weight (C,)."""
        return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), self.values)

    def squared_distances_to(self, point: PyTree) -> jax.Array:
        """(C,) squared L2 distances, over all arrays."""
        differences = jax.tree.map(lambda leaf, one: (leaf - one) ** 2, self.values, point)
        sums = [leaf.reshape(len(leaf), -1).sum(axis=1) for leaf in jax.tree.leaves(differences)]
        return jnp.stack(sums).sum(axis=0)


def along(rows: jax.Array, leaf: jax.Array) -> jax.Array:
    """One number a row, in a shape that goes with a leaf of (C, ...)."""
    return rows.reshape(-1, *[1] * (leaf.ndim - 1))


def of_every_update(
    rule: Callable[[Updates, PyTree], tuple[PyTree, PyTree, Metrics]],
    init: Callable[[PyTree], PyTree] = lambda value: (),
    at_least: int = 1,
    why: str = "",
) -> Aggregator:
    """Makes an aggregator of a rule, in which every client counts alike.

    Args:
      rule: (updates, state) -> (aggregate, next state, metrics); without clients the aggregate is zero.
      init: a value like one client's -> first state.
      at_least: clients that the rule needs.
      why: what it needs them for, for whoever samples fewer.
    """

    def client(state, update, client_state, key):
        del state, client_state, key
        return Sent(each=update.value)

    def server(state, total, each, later, cohort: Cohort, key):
        del total, later, key
        if cohort.expected_size < at_least:
            raise UserError(
                f"{why} needs a cohort of at least {at_least}, and the sampler draws "
                f"{cohort.expected_size:g}"
            )
        updates = Updates(each, cohort.real, cohort.real.sum(), cohort.clients.index)
        value, state, metrics = rule(updates, state)
        return Aggregated(value, state, metrics)

    return Aggregator(client, server, init, reduces=True)
