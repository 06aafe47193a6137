"""Local processes that do a sweep's runs: each has its share of the cores and the GPUs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from fedexp import children
from fedexp.errors import UserError
from fedexp.sweeps.trials import LOG, Run

T = TypeVar("T")
# Of a GPU's memory, all that runs on it may have together.
_GPU_MEMORY = 0.9


class Place(NamedTuple):
    """Where one run after another is done.

    Attributes:
      cores: that it may use; all of this process's if None.
      environment: variables that say so to JAX.
    """

    cores: frozenset[int] | None
    environment: Mapping[str, str]


class Worker(NamedTuple):
    """A run under way.

    Attributes:
      run: which.
      place: where.
      child: its process.
      log_start: where in its log this attempt begins.
    """

    run: Run
    place: Place
    child: subprocess.Popen[bytes]
    log_start: int


def places(
    count: int, cores: Sequence[int] | None = None, gpus: Sequence[str] | None = None
) -> list[Place]:
    """Divides this machine.

    Args:
      count: of places.
      cores: to divide; those that this process may use, if None.
      gpus: to divide; those that this process may use, if None.
    """
    cores = _cores() if cores is None else cores
    gpus = _gpus() if gpus is None else gpus
    return [_place(i, count, cores, gpus) for i in range(count)]


def _place(number: int, count: int, cores: Sequence[int], gpus: Sequence[str]) -> Place:
    """A single place has everything, as a run by hand has."""
    if count == 1:
        return Place(None, {})
    environment = {}
    mine = _share(number, count, cores)
    if cores:
        environment["PJRT_NPROC"] = str(len(mine))
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(_share(number, count, gpus))
        if count > len(gpus) and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
            share = _GPU_MEMORY / -(-count // len(gpus))
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{share:.3f}"
    return Place(frozenset(mine) or None, environment)


def _share(number: int, count: int, things: Sequence[T]) -> Sequence[T]:
    """Neighbours, as equally many as can be; of fewer things than places, one that others have, too."""
    if not things or count > len(things):
        return things[number % len(things) :][:1] if things else things
    return things[number * len(things) // count : (number + 1) * len(things) // count]


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _gpus() -> list[str]:
    """NVIDIA's by number, or as CUDA_VISIBLE_DEVICES has them; JAX is not asked, who would hold them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [one for one in given.split(",") if one.strip()]
    return [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def start(run: Run, place: Place) -> Worker:
    """Starts a run, in a session of its own: a terminal's Ctrl-C reaches only us.

    Raises:
      UserError: its folder cannot be written to.
    """
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.folder / LOG, "ab") as log:
            log_start = log.tell()
            child = subprocess.Popen(
                children.settled(run.command, place.cores),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(place.environment),
                start_new_session=True,
            )
    except OSError as error:
        raise UserError(f"cannot write {run.folder}: {error.strerror}; free space there") from error
    return Worker(run, place, child, log_start)
