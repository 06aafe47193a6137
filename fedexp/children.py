"""Processes that a launcher starts: they do not outlive it, and signals are passed on to them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence

# Those that ask a run to stop.
STOPS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # From linux/prctl.h.


def die_with(launcher: int) -> Callable[[], None] | None:
    """What a child does first: it asks Linux for SIGKILL when the launcher dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # It died before the kernel was asked.
            os.kill(os.getpid(), signal.SIGKILL)

    return arm


def settled(command: Sequence[str], cores: Collection[int] | None) -> list[str]:
    """A command that dies with this process and keeps to some cores.

    It needs no `preexec_fn`, which is not safe where JAX has threads.

    Args:
      command: the program's path and its arguments.
      cores: that it may use; those of this process if None.
    """
    allowed = ",".join(map(str, sorted(cores or ())))
    return [sys.executable, "-m", "fedexp.children", str(os.getpid()), allowed, *command]


def _settle(launcher: str, cores: str, *command: str) -> None:
    """Becomes the command."""
    if arm := die_with(int(launcher)):
        arm()
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    os.execv(command[0], command)


def has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended; `reap` is to follow."""
    if not hasattr(os, "waitid"):  # On macOS, before Python 3.13, which has to reap it to know.
        return child.poll() is not None
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reap(child: subprocess.Popen[bytes]) -> int:
    """Kills what an ended process has left in its group, and returns its exit code."""
    # Until it is reaped, which `has_ended` does only on macOS, its group's number is no one else's.
    signal_group(child, signal.SIGKILL)
    code = child.wait()
    return code if code >= 0 else 128 - code


def signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to a process, started in a session of its own, and to what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


@contextlib.contextmanager
def incoming_signals() -> Iterator[socket.socket]:
    """Yields a socket that receives a byte, its number, for every SIGINT, SIGTERM and SIGCHLD."""
    receiver, sender = socket.socketpair()
    with receiver, sender:
        receiver.setblocking(False)
        sender.setblocking(False)
        handlers = {n: signal.signal(n, lambda *_: None) for n in (*STOPS, signal.SIGCHLD)}
        wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            yield receiver
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def how(code: int) -> str:
    """An exit code in words."""
    ended_by = f" ({signal.strsignal(code - 128)})" if code - 128 in signal.valid_signals() else ""
    return f"with exit code {code}{ended_by}"


if __name__ == "__main__":
    _settle(*sys.argv[1:])
