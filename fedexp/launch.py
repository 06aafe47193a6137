"""Starts one fedexp run as several processes on this machine.

fedexp launch --processes=2 -- --gin_file=quickstart.gin --workdir=runs/two
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from fedexp import children

_COLOURS = (36, 33, 35, 32, 34, 31)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, and returns the run's exit code."""
    parser = argparse.ArgumentParser(
        prog="fedexp launch",
        usage="%(prog)s [--processes=N] [--grace=SECONDS] -- ARGUMENTS OF fedexp.main\n"
        "       %(prog)s --files",
        description="Starts one fedexp run as several processes on this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument(
        "--grace",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="how long after a failure the others may take to end (default: %(default)g)",
    )
    parser.add_argument(
        "--files",
        action="store_true",
        help="print the folder of slurm.sh, kubernetes.yaml and kubernetes_sweep.yaml, and start nothing",
    )
    parser.add_argument("fedexp_arguments", nargs="*", help="passed on to every process")
    options = parser.parse_args(arguments)
    if options.files:
        print(files())
        return 0
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    if not 0 <= options.grace < float("inf"):
        parser.error(f"--grace must be a number of seconds, got {options.grace}")
    command = [sys.executable, "-m", "fedexp.main", *options.fedexp_arguments]
    return launch(command, options.processes, grace=options.grace)


def files() -> Path:
    """The folder with what Slurm and Kubernetes are given: in the package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "launch_files"
    return inside if inside.is_dir() else package.parent / "launch"


def launch(command: Sequence[str], processes: int, *, grace: float = 15.0) -> int:
    """Runs a command as the processes of one multi-process JAX run, until all have ended.

    Each process has `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` set. Their
    lines go to this process's stdout and stderr behind a prefix, such as `[0] `. SIGINT and SIGTERM
    are passed on to all, a second one kills them; when one fails, the others are ended. They do not
    outlive this process, however it ends.

    Args:
      command: the program's path and its arguments, the same for every process.
      processes: how many to start.
      grace: seconds between the SIGTERM that follows a failure, and SIGKILL.

    Returns:
      The exit code of the process that failed first (128 + the signal if one ended it), or 0. After
      a passed-on signal, 128 + that signal unless something else failed.

    Raises:
      OSError: no process can be started.
      ValueError: not called from the main thread, the only one that receives signals.
    """
    address = f"localhost:{_free_port()}"
    run = _Run(grace)
    with children.incoming_signals() as incoming, selectors.DefaultSelector() as selector:
        selector.register(incoming, selectors.EVENT_READ)
        try:
            for index in range(processes):
                child = run.processes[index] = _start(command, address, processes, index)
                for pipe, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                    assert pipe is not None  # Which `_start` asks for.
                    relay = _Relay(pipe, sink.fileno(), _prefix(index, sink))
                    selector.register(pipe, selectors.EVENT_READ, relay)
            return _supervise(run, selector, incoming)
        finally:
            run.kill()
            for child in run.processes.values():
                child.wait()


def _start(
    command: Sequence[str], address: str, processes: int, index: int
) -> subprocess.Popen[bytes]:
    """Starts one process, in a session of its own: a terminal's Ctrl-C reaches only us."""
    joining = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        children.settled(command),
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | joining,
        start_new_session=True,
    )


def _supervise(run: _Run, selector: selectors.BaseSelector, incoming: socket.socket) -> int:
    """Passes on lines and signals until every process has ended; returns the run's exit code."""
    while True:
        # What ended processes wrote is in the pipes already, and can be read without waiting.
        ready = selector.select(run.patience() if run.processes else 0)
        if not ready and not run.processes:
            return run.failed or run.stopped
        for key, _ in ready:
            if key.fileobj is incoming:
                for number in incoming.recv(64):
                    if number in children.STOPS:
                        run.stop(number)
                continue
            try:
                if not key.data.copy():
                    selector.unregister(key.fileobj)
                    key.data.pipe.close()
            except BrokenPipeError:  # Nobody reads our output any more.
                if run.told is None:
                    run.stop(signal.SIGTERM)
        run.reap()
        run.enforce()


@dataclasses.dataclass
class _Run:
    """The processes that have not ended, what they were told, and how the others ended.

    fedexp obeys a first signal with a checkpoint and a second one at once, so `told` is sent once.
    """

    grace: float
    processes: dict[int, subprocess.Popen[bytes]] = dataclasses.field(default_factory=dict)
    told: int | None = None
    killed: bool = False
    deadline: float | None = None
    failed: int = 0  # The exit code of the first failure.
    stopped: int = 0  # The exit code of those that ended as they were told to.

    def stop(self, number: int) -> None:
        """Passes a signal on, or kills, where one was sent already."""
        if self.told is None:
            self.told = number
            _say(f"{signal.Signals(number).name} passed on; a second one kills")
            self.send(number)
        else:
            _say(f"killing {self}")
            self.kill()

    def reap(self) -> None:
        """Takes out what has ended, and has the others end after the first failure."""
        for index in [
            index for index, child in self.processes.items() if children.has_ended(child)
        ]:
            code = children.reap(self.processes.pop(index))
            if code == 0 or self.failed:
                continue
            if self.told is not None and (self.killed or code == 128 + self.told):
                self.stopped = 128 + self.told
                continue
            self.failed = code
            self.deadline = time.monotonic() + self.grace
            others = f"; ending {self}" if self.processes else ""
            _say(f"process {index} failed first, {children.how(code)}{others}")
            if self.told is None:
                self.told = signal.SIGTERM
                self.send(self.told)

    def patience(self) -> float | None:
        """The seconds until `enforce` has something to do; None for ever."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def enforce(self) -> None:
        """Kills what is still running at the deadline."""
        if self.processes and self.patience() == 0:
            _say(f"{self} did not end within {self.grace:g} s; killing")
            self.kill()

    def send(self, number: int) -> None:
        for child in self.processes.values():
            children.signal_group(child, number)

    def kill(self) -> None:
        self.killed = True
        self.deadline = None
        self.send(signal.SIGKILL)

    def __str__(self) -> str:
        return "process " + ", ".join(map(str, self.processes))


@dataclasses.dataclass
class _Relay:
    """Copies a pipe to a file descriptor, line by line, each line behind a prefix."""

    pipe: IO[bytes]
    sink: int
    prefix: bytes
    _rest: bytes = b""

    def copy(self) -> bool:
        """Copies what can be read now; False at the end."""
        chunk = os.read(self.pipe.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if not chunk and self._rest:
            lines, self._rest = [self._rest], b""
        _write(self.sink, b"".join(self.prefix + line + b"\n" for line in lines))
        return bool(chunk)


def _write(descriptor: int, text: bytes) -> None:
    while text:
        text = text[os.write(descriptor, text) :]


def _say(message: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        _write(sys.stderr.fileno(), f"launch: {message}\n".encode())


def _prefix(index: int, sink: IO[str]) -> bytes:
    plain = f"[{index}] "
    if not sink.isatty() or os.environ.get("NO_COLOR"):
        return plain.encode()
    return f"\033[{_COLOURS[index % len(_COLOURS)]}m{plain}\033[0m".encode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
