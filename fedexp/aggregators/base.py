"""What an aggregator is: what happens to client updates on their way to the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any


class Aggregator(NamedTuple):
    """Reduces the cohort's client updates to one update, through sums only.

    Attributes:
      client: (update, weight, key) -> contribution, a pytree that is summed over the cohort. The weight
        is the client's number of examples, or what else the algorithm weighs by.
      server: (summed contributions, key) -> the aggregate update, shaped like one client's.
    """

    client: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    server: Callable[[PyTree, jax.Array], PyTree]
