"""JAX's runtime: virtual CPU devices, compiled programs kept, joining the processes of a run."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

import gin
import jax
from jax._src import distributed

from fedexp import cache
from fedexp.errors import UserError

_MAX_CACHE_BYTES = 1 << 30
# A cohort of ten has no clients for many more.
_MOST_CORES = 8
# sysexits.h's EX_TEMPFAIL: nothing is wrong with the input, trying again may succeed.
EXIT_LOST = 75
_lost_after = 30
_BEATS = 10  # In that time.
# What Gloo, NCCL and JAX's coordination service say of a connection that has ended.
_SIGNS_OF_A_LOST_PROCESS = (
    "Gloo",
    "NCCL",
    "coordination service",
    "CoordinationService",
    "heartbeat",
    "another task died",
    "UNAVAILABLE:",
    "DEADLINE_EXCEEDED:",
    "Connection reset by peer",
    "Connection closed by peer",
    "Socket closed",
)


@gin.configurable("runtime")
def start(
    num_cpu_devices: int | Literal["cores"] | None = None,
    lost_after_seconds: int = 30,
    join_seconds: int = 300,
    keep_compiled: bool = True,
) -> None:
    """Starts JAX, before anything asks it for devices.

    A process joins others if `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` are set. In a Slurm step of several tasks, on a TPU slice of several hosts, and
    where `FEDEXP_DISTRIBUTED` is 'auto', JAX finds these out by itself. They are not bindings, because
    they are not part of the experiment.

    Args:
      num_cpu_devices: virtual CPU devices of this process, to try several devices on any machine;
        'cores' for one on each core that it may use, up to 8. That is faster for models whose operations
        are too small to be worth sharing among cores, such as small LSTMs.
      lost_after_seconds: silence after which a process is taken for lost, and the run ends.
      join_seconds: how long to wait for the other processes.
      keep_compiled: keep compiled programs in the cache folder, for later runs of the same shapes.

    Raises:
      UserError: variables that are missing or wrong.
      SystemExit: JAX refuses to join. If the others do not come in time, JAX itself aborts.
    """
    if num_cpu_devices == "cores":
        num_cpu_devices = min(_cores(), _MOST_CORES)
    if num_cpu_devices is not None:
        if not isinstance(num_cpu_devices, int) or num_cpu_devices < 1:
            raise UserError(
                "runtime.num_cpu_devices must be a number of at least 1, 'cores' or None, got "
                f"{num_cpu_devices!r}"
            )
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    if keep_compiled and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        _keep_compiled_programs()
    arguments = _from_environment()
    if arguments is None:
        return
    # JAX aborts when it loses a process; its message should not drown in our stacks.
    faulthandler.disable()
    global _lost_after
    _lost_after = lost_after_seconds
    try:
        jax.distributed.initialize(
            **arguments,
            # JAX counts from the last heartbeat, one in half of the time; our one line should come first.
            heartbeat_timeout_seconds=3 * lost_after_seconds,
            initialization_timeout=join_seconds,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        exit_process(f"error: cannot join the other processes: {_first_line(error)}", EXIT_LOST)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Not on macOS.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_compiled_programs() -> None:
    try:
        folder = cache.folder() / "compiled"
    except UserError:  # Nothing but time depends on it.
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MAX_CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def leaving_a_broken_group(way_on: Callable[[], str]) -> Iterator[None]:
    """Ends this process when it cannot go on with the others, as when one of them is lost.

    An orderly end would wait for the lost process at the next barrier.

    Args:
      way_on: how the run can go on.
    """
    if jax.process_count() == 1:
        yield
        return
    over = threading.Event()
    if distributed.global_state.client is not None:
        threading.Thread(target=_watch_others, args=(over, way_on), daemon=True).start()
    try:
        yield
    except Exception as error:
        if is_about_others(error):
            _leave_the_others(f"is lost ({_first_line(error)})", way_on)
        if isinstance(error, UserError):  # Met by all processes in the same round.
            raise
        traceback.print_exc()
        exit_process("error: this process cannot go on", 1)
    finally:
        over.set()


def _leave_the_others(what: str, way_on: Callable[[], str]) -> NoReturn:
    message = f"error: another process {what}; on as many processes as there are now, {way_on()}"
    exit_process(message, EXIT_LOST)


class _Beats:
    """Tells the other processes that this one is alive, and counts for how long they have told nothing.

    JAX does so as well, but aborts: the callback that it has for that raises std::bad_cast (0.10.2).

    Attributes:
      count: exchanges so far.
      silent: process -> exchanges since it was last heard of; those never heard of are not in it.
    """

    def __init__(self) -> None:
        # There is no public way to the store that the processes share.
        state = distributed.global_state
        self._client: Any = state.client
        self._me = state.process_id
        self._others = [one for one in range(state.num_processes or 1) if one != self._me]
        self._heard: dict[int, str] = {}
        self.count = 0
        self.silent: dict[int, int] = {}

    def exchange(self) -> None:
        """Writes, and reads what the others have written; does not return while their store is silent."""
        self._client.key_value_set(f"fedexp/{self._me}", str(self.count), allow_overwrite=True)
        for other in self._others:
            try:
                heard = self._client.key_value_try_get(f"fedexp/{other}")
            except jax.errors.JaxRuntimeError:  # It has not written yet.
                continue
            same = self._heard.get(other) == heard
            self.silent[other] = self.silent.get(other, 0) + 1 if same else 0
            self._heard[other] = heard
        self.count += 1


def _watch_others(over: threading.Event, way_on: Callable[[], str]) -> None:
    """Ends this process when another one, or the one that keeps the store, has been silent for too long.

    It counts its own pauses, not seconds: a process that was stopped itself should blame nobody.
    """
    beats, pause = _Beats(), _lost_after / _BEATS

    def beat() -> None:  # Until the process ends: others may be busy for longer.
        while True:
            beats.exchange()
            time.sleep(pause)

    threading.Thread(target=beat, daemon=True).start()
    before = still = 0
    while not over.wait(pause):
        before, still = beats.count, still + 1 if beats.count == before else 0
        if max([still, *beats.silent.values()]) > _BEATS:
            _leave_the_others(f"has been silent for {_lost_after} s", way_on)


def is_about_others(error: BaseException | None) -> bool:
    """Whether an error tells of another process, rather than of this one's own memory or program."""
    while error is not None:
        if any(sign in str(error).lower() for sign in ("resource_exhausted", "out of memory")):
            return False  # Also where a library of communication says so.
        if any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PROCESS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def stop_signals(say: Callable[[str], None]) -> Iterator[Callable[[], int | None]]:
    """Yields a function that tells which of SIGINT and SIGTERM has asked the run to stop, if any.

    A second signal ends the run at once, but what was told to observers reaches them.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        for again in before:
            signal.signal(again, leave)
        say(f"{signal.Signals(number).name}: stopping after this round")

    def leave(number: int, frame: Any) -> None:
        """Unwinds the stack, so that everything is flushed on the way out."""
        if frame.f_code.co_name == "_xla_gc_callback":  # JAX's, in which what is raised is lost.
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            signal.signal(number, signal.SIG_DFL)
            sys.exit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def exit_process(message: str, code: int) -> NoReturn:
    """Prints `message` on stderr and exits; of several processes, without waiting for the others."""
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _from_environment() -> dict[str, Any] | None:
    """Arguments for jax.distributed.initialize; None for a run of one process."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return {} if _in_a_cluster() else None
    try:
        return {
            "coordinator_address": found["JAX_COORDINATOR_ADDRESS"],
            "num_processes": int(found["JAX_NUM_PROCESSES"]),
            "process_id": int(found["JAX_PROCESS_ID"]),
            "cluster_detection_method": "deactivate",
        }
    except (KeyError, ValueError) as error:
        raise UserError(
            f"a run of several processes needs {', '.join(names)}, the last two as numbers; "
            f"this environment has {found}"
        ) from error


def _in_a_cluster() -> bool:
    """Whether this is one of several processes of a kind that JAX can tell about."""
    return (
        os.environ.get("FEDEXP_DISTRIBUTED") == "auto"
        or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    )
