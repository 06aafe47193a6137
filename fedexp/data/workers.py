"""Worker processes: for what takes long, and for what may end the process that does it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing.resource_tracker
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from fedexp.errors import UserError

Submit = Callable[..., concurrent.futures.Future]
T = TypeVar("T")

# CPU time that a library may take for one reading, see `limited`.
LIMIT_S = 60.0
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}

_in_worker = False


@contextlib.contextmanager
def pool(
    what: str, num_workers: int, initializer: Callable[..., None] | None = None, *initargs: object
) -> Iterator[Submit]:
    """Yields submit(function, *args) -> future, which runs functions in processes of their own.

    They import neither the main module nor JAX, leave Ctrl-C to this process, and end with it.

    Args:
      what: what they do, for error messages.
      num_workers: how many processes.
      initializer: called first in each of them.
      *initargs: its arguments.

    Raises:
      UserError: a worker was killed or crashed.
    """
    import loky  # Its workers, unlike multiprocessing's, do not import the main module.

    def submit(function: Callable, *args: object) -> concurrent.futures.Future:
        try:
            return starter.submit(executor.submit, function, *args).result()
        except loky.BrokenProcessPool as error:  # What was submitted before may be done.
            future = concurrent.futures.Future()
            future.set_exception(error)
            return future

    with contextlib.ExitStack() as stack:
        executor = loky.ProcessPoolExecutor(
            num_workers, initializer=_begin, initargs=(os.getpid(), initializer, initargs)
        )
        stack.callback(executor.shutdown, kill_workers=True)
        # Ctrl-C is for the main thread alone: what this thread starts inherits that it is blocked.
        starter = stack.enter_context(
            concurrent.futures.ThreadPoolExecutor(1, initializer=_block_interrupts)
        )
        try:
            yield submit
        except loky.process_executor.TerminatedWorkerError as error:
            raise UserError(f"{what}: {_what_ended_it(str(error))}") from error


def run(what: str, function: Callable[..., T], *args: object) -> T:
    """Calls a function in a process of its own, which it may crash.

    Args:
      what: what it does, for error messages.
      function: to be called.
      *args: its arguments.

    Raises:
      UserError: it did, or was ended by `limited`; otherwise whatever it raises.
    """
    with pool(what, 1) as submit:
        return submit(function, *args).result()


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends a worker in which the body takes more than LIMIT_S of CPU time, even inside of a C library.

    Outside of workers there is no limit.
    """
    if not _in_worker:
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _what_ended_it(error: str) -> str:
    codes = re.findall(r"\((-?\d+)\)", error)
    signals = {-int(code) for code in codes}
    if signal.SIGPROF in signals:
        return (
            f"it took more than {LIMIT_S:.0f} s of CPU time at one place, so the file is probably damaged; "
            "get it again"
        )
    ended = f"a worker process ended with exit code {', '.join(codes) or 'unknown'}, "
    if signals & _CRASHES:
        return f"{ended}a crash: the file is probably damaged; get it again"
    return (
        f"{ended}perhaps for lack of memory; run again, with a smaller num_workers where there is one: a "
        "conversion goes on where it stopped"
    )


def _block_interrupts() -> None:
    from loky.backend import resource_tracker

    # Both trackers unblock the signal in the thread that starts them, so they are started first.
    resource_tracker.ensure_running()
    multiprocessing.resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _begin(parent: int, initializer: Callable[..., None] | None, initargs: tuple) -> None:
    global _in_worker
    _in_worker = True
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with(parent: int) -> None:
    """Ends this worker soon after its parent, which may be killed without a chance to say so."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
