"""Local processes that do a sweep's runs: each has its share of the cores and the GPUs."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fedexp import children, paths
from fedexp.errors import UserError
from fedexp.sweeps.trials import LOG, PRUNED, Run, Trial, is_over

T = TypeVar("T")
_RUNS = "runs.json"
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
      is_together: whether it is one of several, although perhaps the others are over.
      log: what it prints.
      place: where.
      child: its process.
      log_start: where in its log this attempt begins.
    """

    runs: Sequence[Run]
    is_together: bool
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
      apart: bindings that must be the same in all; with 'train.seed' among them, that as well.
    """

    most: int = 1
    apart: Sequence[str] = ()

    def kind(self, run: Run, trial: Trial) -> tuple[Any, ...]:
        """What runs of one seed and one program have in common."""
        return run.seed, *(trial.bindings.get(name) for name in self.apart)

    def other_seeds(self, runs: Sequence[Run], waiting: Sequence[Run]) -> list[Run]:
        """The waiting runs of the same trials with other seeds, as far as there is room: seed after seed."""
        seeds = dict.fromkeys(run.seed for run in waiting)
        found: list[Run] = []
        for seed in () if "train.seed" in self.apart else seeds:
            of_seed = {run.trial: run for run in waiting if run.seed == seed}
            room = self.most - len(runs) - len(found)
            if len(runs) <= room and all(run.trial in of_seed for run in runs):
                found += [of_seed[run.trial] for run in runs]
        return found


def start(runs: Sequence[Run], place: Place, workdir: Path) -> Worker:
    """Starts a program, in a session of its own: a terminal's Ctrl-C reaches only us.

    Args:
      runs: that it does; several are vmapped.
      place: where.
      workdir: of the sweep, for the checkpoints of several.

    Raises:
      UserError: a folder cannot be written to.
    """
    cut, open_runs = cut_short(workdir, runs[0])
    goes_on = cut is not None and open_runs == {run.folder for run in runs}
    is_together = goes_on or len(runs) > 1
    folder, command = runs[0].folder, runs[0].command
    if is_together:
        folder = cut if cut and goes_on else workdir / "together" / _name(runs)
        command = [sys.executable, "-m", "fedexp.sweeps.vmapped", str(folder / _RUNS)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_together and not goes_on:
            paths.write(folder / _RUNS, json.dumps(_described(runs, folder), indent=1) + "\n")
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
    return Worker(runs, is_together, folder / LOG, place, child, log_start)


def cut_short(workdir: Path, run: Run) -> tuple[Path | None, set[Path]]:
    """Of the program of several that had a run last, if it did not come to its end: its folder, and those of
    its runs that are not over."""
    files = (workdir / "together").glob(f"*/{_RUNS}")
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        folders = {Path(one["workdir"]) for one in json.loads(file.read_text())["runs"]}
        if run.folder in folders:
            has_ended = any((folder / "final.json").exists() for folder in folders)
            open_ones = {folder for folder in folders if not is_over(folder)}
            return (None, set()) if has_ended else (file.parent, open_ones)
    return None, set()


def prune(worker: Worker, trial: int) -> None:
    """Has a trial's runs end; of several in a program the others go on."""
    for run in worker.runs:
        if run.trial == trial and worker.is_together:
            run.folder.mkdir(parents=True, exist_ok=True)
            paths.write(run.folder / PRUNED, "")
        elif run.trial == trial:
            children.signal_group(worker.child, signal.SIGTERM)


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
