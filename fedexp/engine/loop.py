"""The round engine: a cohort's local training as one compiled loop over lanes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedexp.contracts import Clients, ClientWork
from fedexp.data import Batch
from fedexp.engine.schedule import Schedule
from fedexp.streams import Stream, derive

PyTree = Any


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

    The loop over steps holds nothing but `work.step`. Carries are made and finished between segments, so
    the passes over the parameters that `init` and `finish` cost are paid per client, not per step.

    A single lane has one whole client a segment, so no carry passes on to the next one, and its carry
    has no axis of lanes, for which XLA would copy the parameters in every step.
    """
    schedule, examples, clients = part
    num_slots, num_lanes = schedule.slots.shape
    several = num_lanes > 1
    over_lanes = jax.vmap if several else lambda function: function
    if not several:
        schedule = schedule.without_lanes()
    init = over_lanes(lambda client: work.init(shared, as_given(client)))
    step = over_lanes(lambda carry, batch, key: work.step(shared, carry, batch, key))
    finish = over_lanes(lambda carry, client: work.finish(shared, carry, as_given(client)))

    def lane_clients(slots: jax.Array) -> Clients:
        return jax.tree.map(lambda leaf: jnp.take(leaf, slots, axis=0, mode="clip"), clients)

    def segment(s, state):
        carry, total, each = state
        begin, end = schedule.bounds[s], schedule.bounds[s + 1]
        slots, starts, ends = schedule.slots[s], schedule.starts[s], schedule.ends[s]
        client = lane_clients(slots)
        parents = over_lanes(step_keys)(client)

        def one_step(t, carry):
            keys = over_lanes(jax.random.fold_in)(parents, t - starts)

            def of_size(size):
                rows = schedule.rows[t, ..., :size]
                return lambda carry: step(carry, take_batch(examples, rows), keys)

            return jax.lax.switch(schedule.widths[t], [*map(of_size, batch_sizes)], carry)

        fresh = init(client)
        carry = _select(starts == begin, fresh, carry) if several else fresh
        carry = jax.lax.fori_loop(begin, end, one_step, carry)
        lane_total, lane_each = finish(carry, client)
        if several:
            ended = _select(ends, lane_total, jax.tree.map(jnp.zeros_like, lane_total))
            lane_total = jax.tree.map(lambda leaf: leaf.sum(axis=0), ended)
        total = jax.tree.map(jnp.add, total, lane_total)
        slots = jnp.where(ends, slots, num_slots)
        each = jax.tree.map(
            lambda all_, leaf: all_.at[slots].set(leaf, mode="drop"), each, lane_each
        )
        return carry if several else None, total, each

    client = jax.eval_shape(lambda: lane_clients(schedule.slots[0]))
    carry = jax.eval_shape(init, client)
    total, each = jax.eval_shape(finish, carry, client)

    def zeros(leaf, *axes):  # Without the lanes of `finish`.
        return jnp.zeros((*axes, *leaf.shape[several:]), leaf.dtype)

    state = (
        _zeros(carry) if several else None,
        jax.tree.map(zeros, total),
        jax.tree.map(lambda leaf: zeros(leaf, num_slots), each),
    )
    _, total, each = jax.lax.fori_loop(0, schedule.num_segments, segment, state)
    return total, each


def _select(chosen: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Per lane `new` where `chosen` (L,), else `old`."""

    def select(new_leaf, old_leaf):
        return jnp.where(chosen.reshape(-1, *[1] * (new_leaf.ndim - 1)), new_leaf, old_leaf)

    return jax.tree.map(select, new, old)


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
