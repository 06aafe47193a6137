"""No compilation: a Python loop whose tracebacks name the client and the step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np

from fedexp.algorithms.base import ClientWork
from fedexp.strategies.base import Strategy, refuse_processes
from fedexp.strategies.engine import DeviceWork, take_batch
from fedexp.strategies.placement import one_device

PyTree = Any


@gin.configurable
def debug() -> Strategy:
    """Runs a cohort client by client, eagerly, with the numbers of every other strategy.

    Use it to step through an algorithm with a debugger. It also stops at the first step that makes a
    carry not finite, where compiled strategies only see the round's sums.
    """
    refuse_processes("debug")
    return Strategy(one_device(), lanes=1, run_clients=_run_clients, compiled=False)


def _run_clients(
    work: ClientWork, shared: PyTree, part: DeviceWork, batch_sizes: Sequence[int]
) -> tuple[PyTree, PyTree]:
    schedule, examples, clients = part
    total, each = None, {}
    for segment in range(int(schedule.num_segments)):
        slot = int(schedule.slots[segment, 0])
        client = jax.tree.map(lambda leaf, slot=slot: leaf[slot], clients)
        with _note(f"at client {int(client.index)} of the data set"):
            carry = work.init(shared, client)
            begin, end = (int(schedule.bounds[segment + i]) for i in (0, 1))
            for t in range(begin, end):
                with _note(f"at local step {t - begin}"):
                    size = batch_sizes[int(schedule.widths[t])]
                    batch = take_batch(examples, schedule.rows[t, 0, :size])
                    key = jax.random.fold_in(client.key, t - begin)
                    carry = work.step(shared, carry, batch, key)
                    _check_finite(carry)
            client_total, each[slot] = work.finish(shared, carry, client)
        total = client_total if total is None else jax.tree.map(jnp.add, total, client_total)
    padding = jax.tree.map(jnp.zeros_like, next(iter(each.values())))
    rows = [each.get(slot, padding) for slot in range(len(schedule.slots))]
    return total, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


@contextlib.contextmanager
def _note(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def _check_finite(carry: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not np.isfinite(leaf).all():
            raise FloatingPointError(f"carry{jax.tree_util.keystr(path)} is not finite")
