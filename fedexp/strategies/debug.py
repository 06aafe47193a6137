"""No compilation: a Python loop whose tracebacks name the client and the step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import gin
import jax
import jax.numpy as jnp
import numpy as np

from fedexp.strategies.engine import take_batch
from fedexp.strategies.runner import Runner


@gin.configurable
def debug():
    """Runs a cohort client by client, eagerly, with the numbers of every other strategy.

    Use it to step through an algorithm with a debugger. It also stops at the first step that makes a
    carry not finite, where compiled strategies only see the round's sums.
    """

    def bind(algorithm, dataset, batching, *, params, cohort_size, seed) -> Runner:
        def for_each_client(work, shared, cohort):
            schedule, examples = cohort.work
            total, each = None, []
            for segment in range(int(schedule.num_segments)):
                slot = int(schedule.slots[segment, 0])
                client = jax.tree.map(lambda leaf, slot=slot: leaf[slot], cohort.clients)
                name = f"client {str(dataset.client_ids[int(client.index)])!r}"
                with _notes(f"in round {int(cohort.round)}, {name}"):
                    carry = work.init(shared, client)
                    begin, end = (int(schedule.bounds[segment + i]) for i in (0, 1))
                    for t in range(begin, end):
                        with _notes(f"in local step {t - begin}"):
                            batch = take_batch(examples, schedule.rows[t, 0])
                            carry = work.step(
                                shared, carry, batch, jax.random.fold_in(client.key, t - begin)
                            )
                            _check_finite(carry)
                    client_total, client_each = work.finish(shared, carry, client)
                total = (
                    client_total if total is None else jax.tree.map(jnp.add, total, client_total)
                )
                each.append((slot, client_each))
            num_slots = schedule.slots.shape[0]
            rows = [row for _, row in sorted(each, key=lambda item: item[0])]
            rows += [jax.tree.map(jnp.zeros_like, rows[0])] * (num_slots - len(rows))
            return total, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

        return Runner(
            algorithm,
            dataset,
            batching,
            params=params,
            cohort_size=cohort_size,
            seed=seed,
            lanes=1,
            for_each_client=for_each_client,
            compiled=False,
        )

    return bind


@contextlib.contextmanager
def _notes(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def _check_finite(carry) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not np.isfinite(leaf).all():
            raise FloatingPointError(f"carry{jax.tree_util.keystr(path)} is not finite")
