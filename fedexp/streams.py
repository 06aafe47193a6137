"""Where every random number of a run comes from: one table of streams.

    root = jax.random.key(seed)
    PARAMETERS, 0                    initial parameters
    SERVER, 0                        first states of the algorithm and its aggregator
    ROUND, r                         nothing is drawn from it
        SERVER, 0                    the server's own choices, `cohort.key`
        AGGREGATION, k               the server half of the k-th `aggregate`
        CALL, k                      the k-th `for_each_client` of the round; nothing is drawn from it
            CLIENT, client           nothing is drawn from it
                STEP, t              local step t: what a task is given
                    DROPOUT, AUGMENT 0
                CLIENT, 0            `client.key` in `init` and `finish`
                    CLIENT, AGGREGATION 0   instead, inside `aggregate`
    AGGREGATION, i                   of a seed of its own: the first factor of PowerSGD's matrix i
    ATTACKERS, 0                     of a seed of its own: who attacks
        client                       that it does
    CANARIES, 0 and 1                of a seed of its own: who is a canary, and directions
        client                       of one
    EVALUATION, number               as the root, for what an evaluation draws in its rounds

A key is either drawn from or parent of others, never both: `jax.random.split(key, n)[i]` is
`fold_in(key, i)`, so whoever is handed a key may split it without meeting another stream.
NumPy's draws on the host (SAMPLING, ORDER, EVALUATION, HELD_OUT, CLOCK) start from (stream, seed, *indices).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax


class Stream(enum.IntEnum):
    """What is drawn; see the table above."""

    PARAMETERS = 0
    SERVER = 1
    SAMPLING = 2
    ORDER = 3
    ROUND = 4
    CALL = 5
    CLIENT = 6
    STEP = 7
    AGGREGATION = 8
    EVALUATION = 9
    DROPOUT = 10
    AUGMENT = 11
    HELD_OUT = 12
    CLOCK = 13
    ATTACKERS = 14
    CANARIES = 15


def derive(key: jax.Array, stream: Stream, index: int | jax.Array = 0) -> jax.Array:
    """The key of number `index` in a stream of `key`, which must not be drawn from itself."""
    import jax  # Not above: processes that convert data do without.

    return jax.random.fold_in(jax.random.fold_in(key, int(stream)), index)


def generator(stream: Stream, seed: int, *indices: int) -> np.random.Generator:
    """A NumPy generator for draws on the host."""
    return np.random.default_rng([int(stream), seed, *indices])
