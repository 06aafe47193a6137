"""The one way in which algorithms use an aggregator."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedexp.contracts import (
    TRAIN,
    Aggregator,
    Clients,
    ClientWork,
    Cohort,
    ForEachClient,
    Metrics,
    Release,
)
from fedexp.promises import check_like, kept_client, kept_server, kept_update, name_of
from fedexp.streams import Stream, derive

PyTree = Any


class ClientState(NamedTuple):
    """What is kept for a client between rounds: by the algorithm itself, and by its aggregator."""

    own: PyTree
    aggregator: PyTree


class Aggregation(NamedTuple):
    """What becomes of a cohort's updates.

    Attributes:
      update: the aggregate, shaped like one client's `Update.value`.
      size: () clients that it is the mean of; as many as are expected, where the real number is hidden.
      each: pytree of (C, ...), what the work's `finish` kept of each client.
      state: the aggregator's next state.
      client_states: pytree of (C, ...), the aggregator's next state of each client, or None.
      metrics: 'aggregate/<name>' -> metric of the round.
      per_client: 'clients/<name>' -> (C,) metric of each client.
    """

    update: PyTree
    size: jax.Array
    each: PyTree
    state: PyTree
    client_states: PyTree
    metrics: Metrics
    per_client: Metrics

    def states(self, own: PyTree = None) -> ClientState | None:
        """The cohort's next client states, `own` being the algorithm's; for `RoundOutput`."""
        if own is None and self.client_states is None:
            return None
        return ClientState(own, self.client_states)


def init_client(
    aggregator: Aggregator,
    own: Callable[[PyTree], PyTree] | None = None,
    sent: Callable[[PyTree], PyTree] = lambda params: params,
) -> Callable[[PyTree], ClientState] | None:
    """What `Algorithm.init_client` is, for an algorithm that uses `aggregate`.

    Args:
      aggregator: may keep states of clients itself.
      own: params -> the algorithm's first state of a client; None if it keeps none.
      sent: params -> a tree like the values of client updates.
    """
    of_aggregator = aggregator.init_client
    if own is None and of_aggregator is None:
        return None
    return lambda params: ClientState(
        own(params) if own else None, of_aggregator(sent(params)) if of_aggregator else None
    )


def aggregate(
    for_each_client: ForEachClient,
    aggregator: Aggregator,
    state: PyTree,
    work: ClientWork,
    shared: PyTree,
    cohort: Cohort,
    pass_: str = TRAIN,
) -> Aggregation:
    """Runs `work` for every client, and its updates through the aggregator.

    Args:
      for_each_client: of the round.
      aggregator: what happens to the updates.
      state: its state, which the algorithm keeps in its server state.
      work: its `finish` returns (Update, each).
      shared: what every client can read.
      cohort: of the round.
      pass_: what the work goes through.
    """

    sent_value: list[PyTree] = []  # Of one client, as it was traced; its shapes are looked at.

    def own(client: Clients) -> Clients:
        return dataclasses.replace(client, key=derive(client.key, Stream.CLIENT))

    @functools.wraps(work.init)
    def init(shared: PyTree, client: Clients) -> PyTree:
        return work.init(shared[0], own(client))

    @functools.wraps(work.step)
    def step(shared: PyTree, carry: PyTree, *batch: Any) -> PyTree:
        return work.step(shared[0], carry, *batch)

    @functools.wraps(work.finish)
    def finish(shared: PyTree, carry: PyTree, client: Clients) -> tuple[PyTree, PyTree]:
        finished = work.finish(shared[0], carry, own(client))
        update, each = kept_update(work.finish, finished)
        sent_value[:] = [update.value]
        update = update._replace(client=client.index)
        kept = client.state.aggregator if aggregator.init_client else None
        key = derive(client.key, Stream.AGGREGATION)
        sent = kept_client(aggregator, shared[1], update, kept, key)
        return (sent.total, sent.bits), (each, sent.each, sent.state, dict(sent.metrics))

    key = derive(cohort.aggregation_key, Stream.AGGREGATION, for_each_client.calls)
    (total, bits), (each, of_clients, client_states, per_client) = for_each_client(
        ClientWork(init, step, finish), (shared, state), cohort, pass_, counted=False
    )
    for_each_client.traffic.down((shared, aggregator.told(state)))
    for_each_client.traffic.up(bits)
    size, noise = cohort.size, aggregator.noise
    if noise is not None:
        for_each_client.releases[-1] = Release("updates", noise.mechanism(cohort))
        size = cohort.as_expected().size if noise.on_sum else size
    result = kept_server(aggregator, state, total, of_clients, None, cohort, key)
    who = f"Aggregator.server, {name_of(aggregator.server)}, must return an update like a client's"
    check_like(result.update, sent_value[0], who, dtypes=False)
    return Aggregation(
        result.update,
        size,
        each,
        result.state,
        client_states,
        {f"aggregate/{name}": value for name, value in result.metrics.items()},
        {f"clients/{name}": value for name, value in per_client.items()},
    )
