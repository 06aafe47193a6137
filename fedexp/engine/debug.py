"""No compilation: a Python loop whose tracebacks name the client and the step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedexp.contracts import ClientWork
from fedexp.engine import loop
from fedexp.engine.loop import DeviceWork, as_given, step_keys, take_batch

PyTree = Any


def run_clients(
    work: ClientWork, shared: PyTree, part: DeviceWork, batch_sizes: Sequence[int]
) -> tuple[PyTree, PyTree]:
    """Does what `loop.run_clients` does, eagerly."""
    schedule, examples, clients = part
    total, each = None, {}
    if not int(schedule.num_segments):  # No client: only tracing tells what it would have returned.
        shapes = jax.eval_shape(lambda: loop.run_clients(work, shared, part, batch_sizes))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    for segment in range(int(schedule.num_segments)):
        slot = int(schedule.slots[segment, 0])
        client = jax.tree.map(lambda leaf, slot=slot: leaf[slot], clients)
        with _note(f"at client {int(client.index)} of the data set"):
            carry = work.init(shared, as_given(client))
            begin, end = (int(schedule.bounds[segment + i]) for i in (0, 1))
            for t in range(begin, end):
                with _note(f"at local step {t - begin}"):
                    size = batch_sizes[int(schedule.widths[t])]
                    batch = take_batch(examples, schedule.rows[t, 0, :size])
                    key = jax.random.fold_in(step_keys(client), t - begin)
                    carry = work.step(shared, carry, batch, key)
                    _check_finite(carry)
            client_total, each[slot] = work.finish(shared, carry, as_given(client))
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
