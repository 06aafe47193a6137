"""Says what a run is doing before its first round, where that takes long."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from absl import logging

T = TypeVar("T")
_NOTHING: Any = object()
# Seconds for which nobody needs to be told.
AFTER = 5.0


@contextlib.contextmanager
def saying(what: str, say: Callable[[str], None] = logging.info) -> Iterator[None]:
    """Says what the body does if that takes long, and how long it took; nothing at a lower verbosity of absl.

    Args:
      what: as 'reading the data'.
      say: to whom.
    """
    begin = time.perf_counter()

    def tell(line: str) -> None:
        if logging.vlog_is_on(logging.INFO):
            say(line)

    late = threading.Timer(AFTER, tell, [f"{what} ..."])
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()
    seconds = time.perf_counter() - begin
    if seconds >= AFTER:
        tell(f"{what} took {seconds:.0f} s")


def saying_first(items: Iterator[T], what: str, say: Callable[[str], None]) -> Iterator[T]:
    """The items; says what is done for the first one, as `saying`."""
    with saying(what, say):
        first = next(items, _NOTHING)
    if first is not _NOTHING:
        yield first
        yield from items
