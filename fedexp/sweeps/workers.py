"""Local processes that do a sweep's runs: each has its share of the cores and the GPUs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fedexp import children, paths
from fedexp.errors import UserError
from fedexp.sweeps.trials import LOG, Run, Trial

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
    """A program under way.

    Attributes:
      runs: whose it is.
      log: what it prints.
      place: where.
      child: its process.
      log_start: where in its log this attempt begins.
    """

    runs: Sequence[Run]
    log: Path
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


class Batches(NamedTuple):
    """Which runs are one program.

    Attributes:
      most: runs of one.
      apart: bindings that must be the same in all.
    """

    most: int = 1
    apart: Sequence[str] = ()

    def kind(self, run: Run, trial: Trial) -> tuple[Any, ...]:
        """What runs of one program have in common."""
        return run.seed, *(trial.bindings.get(name) for name in self.apart)


def start(runs: Sequence[Run], place: Place, workdir: Path) -> Worker:
    """Starts a program, in a session of its own: a terminal's Ctrl-C reaches only us.

    Args:
      runs: that it does; several are vmapped.
      place: where.
      workdir: of the sweep, for the checkpoints of several.

    Raises:
      UserError: a folder cannot be written to.
    """
    folder, command = runs[0].folder, runs[0].command
    if len(runs) > 1:
        folder = workdir / "together" / _name(runs)
        command = [sys.executable, "-m", "fedexp.sweeps.vmapped", str(folder / "runs.json")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if len(runs) > 1:
            paths.write(folder / "runs.json", json.dumps(_described(runs, folder), indent=1) + "\n")
        with open(folder / LOG, "ab") as log:
            log_start = log.tell()
            child = subprocess.Popen(
                children.settled(command, place.cores),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(place.environment),
                start_new_session=True,
            )
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; free space there") from error
    return Worker(runs, folder / LOG, place, child, log_start)


def _name(runs: Sequence[Run]) -> str:
    """A folder's name that other runs do not have: their checkpoints would be of no use."""
    of_all = hashlib.sha256("\n".join(str(run.folder) for run in runs).encode()).hexdigest()
    return f"{runs[0].trial:03d}_and_{len(runs) - 1}_more_{of_all[:8]}"


def _described(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """What `vmapped` is told."""
    return {
        "gin_files": runs[0].given("--gin_file="),
        "gin_params": [],
        "workdir": str(folder),
        "runs": [
            {"workdir": str(run.folder), "gin_params": run.given("--gin_param=")} for run in runs
        ],
    }
