"""An experiment's rounds, timed some at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any


class Rounds:
    """Rounds that others take turns with.

    Args:
      rounds: of an experiment; the first ones, which compile, are not timed.
      warm_up: how many.
      per_cohort: rounds that count as one.

    Attributes:
      last: the latest round.
    """

    def __init__(self, rounds: Iterator[Any], warm_up: int = 4, per_cohort: int = 1):
        self._rounds, self._per_cohort = rounds, per_cohort
        self.seconds(warm_up)

    def seconds(self, count: int) -> tuple[float, float]:
        """By the clock, and of all CPUs."""
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for _ in range(count * self._per_cohort):
            self.last = next(self._rounds)
        self.last.metrics  # noqa: B018  Waits for it.
        return time.perf_counter() - begin, time.process_time() - cpu_begin
