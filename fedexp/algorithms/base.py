"""What an algorithm is: the work of one client, and what the server does with the sums over a cohort."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from fedexp.data import Batch

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clients:
    """The clients of a cohort; with the leading axis taken off, one of them.

    Attributes:
      index: (C,) int32, the client's row in the data set.
      num_examples: (C,) int32; 0 marks a padded slot, which does no work.
      num_steps: (C,) int32, local steps this round.
      key: (C,) PRNG keys, derived from (seed, round, client).
      state: pytree of (C, ...), the state the algorithm keeps for each client between rounds, or None.
    """

    index: jax.Array
    num_examples: jax.Array
    num_steps: jax.Array
    key: jax.Array
    state: PyTree = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cohort:
    """The clients sampled for a round, as an algorithm sees them.

    Attributes:
      round: () int32, counted from 0.
      key: PRNG key of the round, for the server's own random choices.
      size: () int32, sampled clients; `clients` may be padded beyond it.
      population: clients in the data set.
      clients: the clients, C slots.
    """

    round: jax.Array
    key: jax.Array
    size: jax.Array
    clients: Clients
    population: int = dataclasses.field(metadata={"static": True})


class ClientWork(NamedTuple):
    """What one client does, as three pure functions.

    Attributes:
      init: (shared, client) -> carry, before the client's first batch.
      step: (shared, carry, batch, key) -> carry, for every batch; `batch.mask` marks the real examples.
      finish: (shared, carry, client) -> (total, each): `total` is summed over the cohort, `each` is
        kept per client.
    """

    init: Callable[[PyTree, Clients], PyTree]
    step: Callable[[PyTree, PyTree, Batch, jax.Array], PyTree]
    finish: Callable[[PyTree, PyTree, Clients], tuple[PyTree, PyTree]]


class ForEachClient(Protocol):
    """Runs `work` for every client of the cohort, wherever the strategy places them.

    Returns (total, each): the sum over the cohort, and (C, ...) arrays with one row per client slot
    (zeros in padded slots). `shared` is what every client can read: parameters, the round, a learning rate.
    """

    def __call__(
        self, work: ClientWork, shared: PyTree, cohort: Cohort
    ) -> tuple[PyTree, PyTree]: ...


class RoundOutput(NamedTuple):
    """What a round leaves behind.

    Attributes:
      server_state: the next round's server state.
      metrics: name -> scalar, or (C,) array with one value per client slot.
      client_states: pytree of (C, ...), the cohort's new client states, or None.
    """

    server_state: PyTree
    metrics: Mapping[str, jax.Array]
    client_states: PyTree = None


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A federated algorithm.

    Attributes:
      init: params -> server state, a pytree with an attribute `params`.
      round: (server_state, cohort, for_each_client) -> RoundOutput.
      init_client_state: params -> one client's first state; None for algorithms without client state.
    """

    init: Callable[[PyTree], PyTree]
    round: Callable[[PyTree, Cohort, ForEachClient], RoundOutput]
    init_client_state: Callable[[PyTree], PyTree] | None = None
