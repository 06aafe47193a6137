"""Clients that train from parameters the server has meanwhile moved on from: past versions, and staleness."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp

from fedexp.algorithms.local import PyTree, Shared, Trained
from fedexp.contracts import Algorithm, Clients, ClientWork, Update
from fedexp.errors import UserError, check

# Server steps since a client fetched its parameters, () int32 -> what its update is multiplied by.
StalenessWeight = Callable[[jax.Array], jax.Array]


@gin.configurable
def constant_weight() -> StalenessWeight:
    """1, however stale (Xie et al. 2019, arXiv:1903.03934, Section 5)."""
    return lambda staleness: jnp.ones_like(staleness, jnp.float32)


@gin.configurable
def polynomial_weight(a: float = 0.5) -> StalenessWeight:
    """(staleness + 1)^-a (the same); of the default a, FedBuff's 1 / sqrt(1 + staleness).

    Args:
      a: not negative; 0 is 1 for all.
    """
    check(a >= 0, f"polynomial_weight.a must not be negative, got {a}")
    return lambda staleness: (staleness + 1.0) ** -a


@gin.configurable
def hinge_weight(a: float = 10.0, b: int = 4) -> StalenessWeight:
    """1 up to a staleness of b, and 1 / (a (staleness - b) + 1) beyond (the same).

    Args:
      a: not negative; 0 is 1 for all.
      b: rounds, not negative.
    """
    check(a >= 0, f"hinge_weight.a must not be negative, got {a}")
    check(b >= 0, f"hinge_weight.b must not be negative, got {b}")
    return lambda staleness: 1 / (a * jnp.maximum(staleness - b, 0.0) + 1)


class VersionedState(NamedTuple):
    """A server's state, and its parameters of late.

    Attributes:
      server: the state, with an attribute `params`.
      versions: pytree of (max_staleness + 1, ...); the parameters after t steps are in row
        t % (max_staleness + 1).
    """

    server: Any
    versions: PyTree

    @property
    def params(self) -> PyTree:
        """The newest version."""
        return self.server.params


def fetched(shared: Shared, client: Clients) -> PyTree:
    """The parameters that a client has fetched, for work that `keeping_versions` is made of."""
    return jax.tree.map(lambda versions: versions[client.inputs["version"]], shared.extra)


def weighed_by_staleness(work: ClientWork, weight: StalenessWeight) -> ClientWork:
    """Multiplies what clients send by the weight of their staleness; those too stale send nothing."""

    def finish(shared: Shared, carry: PyTree, client: Clients) -> tuple[Update, Trained]:
        update, kept = work.finish(shared, carry, client)
        factor, on_time = weight(client.inputs["staleness"]), client.inputs["on_time"]
        value = jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), update.value)
        weight_, kept = jax.tree.map(
            lambda leaf: jnp.where(on_time, leaf, jnp.zeros_like(leaf)), (update.weight, kept)
        )
        return Update(value, weight_), kept

    return work._replace(finish=finish)


def keeping_versions(name: str, algorithm: Algorithm, max_staleness: int) -> Algorithm:
    """What `averaging` makes of work of `fetched` parameters, with these parameters at hand.

    Args:
      name: of the algorithm, for messages.
      algorithm: its round takes the versions for a fourth argument.
      max_staleness: updates staler than this are discarded.

    Raises:
      UserError: a negative max_staleness.
    """
    if max_staleness < 0:
        raise UserError(f"{name}.max_staleness must not be negative, got {max_staleness}")
    untold = (
        f"{name} must be told how stale each client is, as @asynchronous() does; bind "
        "train.sampler to it"
    )
    run: Any = algorithm.round
    rows = max_staleness + 1

    def init(params, key):
        versions = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape)), params)
        return VersionedState(algorithm.init(params, key), versions)

    def round_(state, cohort, for_each_client):
        staleness = cohort.clients.inputs["staleness"]
        on_time = staleness <= max_staleness
        cohort = cohort.with_inputs(version=(cohort.round - staleness) % rows, on_time=on_time)
        for_each_client.traffic.untold(state.versions)  # Each fetches one, as long as `params`.
        output = run(state.server, cohort, for_each_client, state.versions)
        row = (cohort.round + 1) % rows
        versions = jax.tree.map(
            lambda old, new: old.at[row].set(new), state.versions, output.state.params
        )
        return output._replace(
            state=VersionedState(output.state, versions),
            metrics={**output.metrics, "train/discarded": jnp.sum(cohort.real & ~on_time)},
            per_client={**output.per_client, "clients/staleness": staleness.astype(jnp.float32)},
        )

    needs = {"staleness": untold}
    return dataclasses.replace(algorithm, init=init, round=round_, needs=needs)
