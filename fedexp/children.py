"""Processes that a launcher starts: they do not outlive it, and signals are passed on to them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence

# Those that ask a run to stop.
STOPS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # From linux/prctl.h.


def settled(command: Sequence[str], cores: Collection[int] | None = None) -> list[str]:
    """A command that dies with this process, even of SIGKILL, and keeps to some cores.

    It needs no `preexec_fn`, which is not safe where JAX has threads.

    Args:
      command: the program's path and its arguments.
      cores: that it may use; those of this process if None.
    """
    allowed = ",".join(map(str, sorted(cores or ())))
    return [sys.executable, "-m", "fedexp.children", str(os.getpid()), allowed, *command]


def _settle(launcher: str, cores: str, *command: str) -> None:
    """Becomes the command, or where only Linux could end it with the launcher, starts it and watches."""
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    if sys.platform != "linux":
        sys.exit(watch(int(launcher), command))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == int(launcher):  # Or it died before the kernel was asked.
        os.execv(command[0], command)


def watch(launcher: int, command: Sequence[str]) -> int:
    """Runs a command, and kills it when this process's parent has died; returns its exit code.

    Args:
      launcher: the parent.
      command: the program's path and its arguments.
    """
    for number in STOPS:  # The command, in the same group, has them, too.
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command)
    while os.getppid() == launcher:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return exit_code(child.wait(timeout=0.2))
    child.kill()
    return exit_code(child.wait())


def exit_code(returned: int) -> int:
    """What `Popen.wait` returned, as a shell has it: 128 + the signal that ended a process."""
    return returned if returned >= 0 else 128 - returned


def has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended; `reap` is to follow."""
    if not hasattr(os, "waitid"):  # On macOS, before Python 3.13, which has to reap it to know.
        return child.poll() is not None
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reap(child: subprocess.Popen[bytes]) -> int:
    """Kills what an ended process has left in its group, and returns its exit code."""
    # Until it is reaped, which `has_ended` does only on macOS, its group's number is no one else's.
    signal_group(child, signal.SIGKILL)
    return exit_code(child.wait())


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
