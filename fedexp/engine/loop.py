"""The round engine: a cohort's local training as one compiled loop over lanes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedexp.contracts import Clients, ClientWork
from fedexp.data import Batch
from fedexp.engine.schedule import Schedule
from fedexp.streams import Stream, derive

PyTree = Any
OVER_CLIENTS = "over_clients"  # The name of those loops, for who reads programs.


class DeviceWork(NamedTuple):
    """A device's share of a pass.

    Attributes:
      schedule: of its clients.
      examples: name -> (num_rows, ...), what `schedule.rows` points into.
      clients: its client slots; a client's `key` is the parent of all its keys.
    """

    schedule: Schedule
    examples: dict[str, jax.Array]
    clients: Clients


def as_given(client: Clients) -> Clients:
    """The client as `init` and `finish` see it, with a key to draw from."""
    return dataclasses.replace(client, key=derive(client.key, Stream.CLIENT))


def step_keys(client: Clients) -> jax.Array:
    """What `fold_in` of a local step's number makes the step's key of."""
    return jax.random.fold_in(client.key, int(Stream.STEP))


def take_batch(examples: dict[str, jax.Array], rows: Any) -> Batch:
    """Gathers the examples of `rows` (..., B) int32.

    Negative rows, behind all others, are padding: copies of the batch's first example, because garbage
    may be NaN, and a masked NaN still makes the gradient 0 * NaN.
    """
    mask = rows >= 0
    rows = jnp.where(mask, rows, jnp.maximum(rows[..., :1], 0))
    return Batch(
        {name: array.at[rows].get(mode="promise_in_bounds") for name, array in examples.items()},
        mask,
    )


def run_clients(
    work: ClientWork, shared: PyTree, part: DeviceWork, batch_sizes: Sequence[int]
) -> tuple[PyTree, PyTree]:
    """Runs `work` for the clients of one device; returns their (total, each).

    Args:
      work: what a client does.
      shared: what all of them are given.
      part: the device's share.
      batch_sizes: a step is compiled for each; `schedule.widths` tells which one to take.

    The loop over steps holds nothing but `work.step`. Carries are made and finished between segments, by a
    loop over the clients that begin or end there, so the passes over the parameters that `init` and `finish`
    cost are paid once a client.

    A single lane has one whole client a segment, so no carry passes on to the next one, and its carry
    has no axis of lanes, for which XLA would copy the parameters in every step.
    """
    schedule, examples, clients = part
    num_slots, num_lanes = schedule.slots.shape
    lanes = _Lanes(num_lanes)
    if num_lanes == 1:
        schedule = schedule.without_lanes()

    def clients_in(slots: jax.Array) -> Clients:
        return jax.tree.map(lambda leaf: jnp.take(leaf, slots, axis=0, mode="clip"), clients)

    def init(slot: jax.Array) -> PyTree:
        return work.init(shared, as_given(clients_in(slot)))

    def finish(slot: jax.Array, carry: PyTree) -> tuple[PyTree, PyTree]:
        return work.finish(shared, carry, as_given(clients_in(slot)))

    step = lanes.map(lambda carry, batch, key: work.step(shared, carry, batch, key))

    def segment(s, state):
        carries, total, each = state
        slots = schedule.slots[s]
        starts = jnp.take(schedule.starts, slots, mode="clip")
        parents = lanes.map(step_keys)(clients_in(slots))

        def begin_client(number, carries):
            slot = schedule.begins[number]
            return lanes.put(carries, schedule.lanes[slot], init(slot))

        def one_step(t, carries):
            keys = lanes.map(jax.random.fold_in)(parents, t - starts)

            def of_size(size):
                rows = schedule.rows[t, ..., :size]
                return lambda carries: step(carries, take_batch(examples, rows), keys)

            return jax.lax.switch(schedule.widths[t], [*map(of_size, batch_sizes)], carries)

        def end_client(number, results):
            slot, (total, each) = schedule.ends[number], results
            of_client, alone = finish(slot, lanes.take(carries, schedule.lanes[slot]))
            return jax.tree.map(jnp.add, total, of_client), _put(each, slot, alone)

        carries = lanes.loop(schedule.begun[s], schedule.begun[s + 1], begin_client, carries)
        carries = jax.lax.fori_loop(schedule.bounds[s], schedule.bounds[s + 1], one_step, carries)
        results = lanes.loop(schedule.ended[s], schedule.ended[s + 1], end_client, (total, each))
        return (carries if num_lanes > 1 else None, *results)

    carry = jax.eval_shape(init, schedule.begins[0])
    total, each = jax.eval_shape(finish, schedule.begins[0], carry)
    state = (
        _zeros(carry, num_lanes) if num_lanes > 1 else None,
        _zeros(total),
        _zeros(each, num_slots),
    )
    _, total, each = jax.lax.fori_loop(0, schedule.num_segments, segment, state)
    return total, each


class _Lanes(NamedTuple):
    """How carries of several lanes, (L, ...), are gone through; that of an only lane has no such axis."""

    count: int

    def map(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        return function if self.count == 1 else jax.vmap(function)

    def loop(self, begin: jax.Array, end: jax.Array, body: Any, state: PyTree) -> PyTree:
        """Over the clients that begin or end with a segment; in an only lane that is one."""
        if self.count == 1:
            return body(begin, state)
        with jax.named_scope(OVER_CLIENTS):
            return jax.lax.fori_loop(begin, end, body, state)

    def put(self, carries: PyTree, lane: jax.Array, carry: PyTree) -> PyTree:
        return carry if self.count == 1 else _put(carries, lane, carry)

    def take(self, carries: PyTree, lane: jax.Array) -> PyTree:
        return carries if self.count == 1 else jax.tree.map(lambda leaf: leaf[lane], carries)


def _put(rows: PyTree, index: jax.Array, row: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), rows, row)


def _zeros(shapes: PyTree, *axes: int) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros((*axes, *leaf.shape), leaf.dtype), shapes)
