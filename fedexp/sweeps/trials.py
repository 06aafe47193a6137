"""Trials: the points of a sweep, the runs of each, their folders and commands, and what came out."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import filelock

from fedexp import paths
from fedexp.errors import UserError
from fedexp.sweeps.space import Bindings

LOG = "log.txt"
PRUNED = "pruned.txt"  # In a run's folder: it is to end, for its evaluations.
_FAILED = "failed.txt"


class Run(NamedTuple):
    """A run of fedexp.main.

    Attributes:
      trial: the number of its point.
      folder: its workdir.
      seed: its own; None if it is the experiment's.
      arguments: of the command, but for the workdir.
    """

    trial: int
    folder: Path
    seed: int | None
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """What runs it, now and by hand."""
        return [sys.executable, "-m", "fedexp.main", *self.arguments, f"--workdir={self.folder}"]

    def given(self, flag: str) -> list[str]:
        """The values of a flag, as '--gin_param='."""
        return [one.removeprefix(flag) for one in self.arguments if one.startswith(flag)]

    def shown(self, environment: Mapping[str, str]) -> str:
        """The command as a shell takes it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


class Trial(NamedTuple):
    """A point, and a run for each of its seeds."""

    number: int
    bindings: Bindings
    runs: Sequence[Run]


class Outcome(NamedTuple):
    """What is known of a run.

    Attributes:
      state: 'finished', 'failed', or 'open' if there is something to do.
      value: of the sweep's metric.
      error: one line.
    """

    state: Literal["finished", "failed", "open"]
    value: float | None = None
    error: str | None = None


class Folders:
    """Where the runs of a sweep are, and what their commands are.

    Args:
      workdir: of the sweep.
      gin_files: of the experiment.
      gin_params: of the experiment, before those of a point.
      seeds: of each point's runs; None is the experiment's.
    """

    def __init__(
        self,
        workdir: Path,
        gin_files: Sequence[str],
        gin_params: Sequence[str],
        seeds: Sequence[int | None],
    ):
        self.workdir = workdir
        self._arguments = [
            *(f"--gin_file={file}" for file in gin_files),
            *(f"--gin_param={param}" for param in gin_params),
        ]
        self.seeds = seeds

    def trial(self, number: int, bindings: Bindings) -> Trial:
        """A point's trial."""
        return Trial(number, bindings, [self._run(number, bindings, seed) for seed in self.seeds])

    def _run(self, number: int, bindings: Bindings, seed: int | None) -> Run:
        folder = self.workdir / "trials" / f"{number:03d}"
        bound = dict(bindings)
        if seed is not None:
            folder /= f"seed_{seed}"
            bound["train.seed"] = str(seed)
        varied = (f"--gin_param={name} = {value}" for name, value in bound.items())
        return Run(number, folder, seed, (*self._arguments, *varied))


def number_of(folder: Path) -> int:
    """The trial of a run's folder."""
    return int((folder.parent if folder.name.startswith("seed_") else folder).name)


def outcome(run: Run, metric: str) -> Outcome:
    """What a run's folder tells."""
    try:
        found = json.loads((run.folder / "final.json").read_text())["metrics"]
        if metric not in found:
            return Outcome("failed", None, f"{run.folder}/final.json has no metric {metric!r}")
        return Outcome("finished", float(found[metric]))
    except FileNotFoundError:
        pass
    except (ValueError, LookupError, TypeError) as error:
        return Outcome("failed", None, f"{run.folder}/final.json cannot be read: {error!r}")
    try:
        return Outcome("failed", None, (run.folder / _FAILED).read_text().strip())
    except FileNotFoundError:
        return Outcome("open")


def is_over(folder: Path) -> bool:
    """Whether a run has nothing left to do: it has a result, or failed, or was pruned among others."""
    return any((folder / name).exists() for name in ("final.json", _FAILED, PRUNED))


def note_failure(run: Run, error: str) -> None:
    """Keeps a run's error line until the sweep is started again."""
    paths.write(run.folder / _FAILED, f"{error}\n")


def forget_failure(run: Run) -> None:
    """Has a failed run tried again."""
    paths.delete(run.folder / _FAILED)


def error_line(log: Path, start: int, folder: Path, how: str) -> str:
    """The one line that says why a run has failed.

    Args:
      log: what it has printed.
      start: where in it this attempt begins.
      folder: the run's; of several runs' log, its own lines name it.
      how: what is said if it tells nothing.
    """
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    refusals = [line for line in lines if line.startswith("error: ")]
    own = [line for line in refusals if line.startswith(f"error: {folder}: ")]
    if own or refusals:
        return (own or refusals)[-1].removeprefix("error: ").removeprefix(f"{folder}: ")
    begun = [i for i, line in enumerate(lines) if line.startswith("Traceback ")]
    if begun:
        raised = [line for line in lines[begun[-1] + 1 :] if re.match(r"\S", line)]
        return raised[0] if raised else how
    return how


def evaluations(run: Run, metric: str, name: str) -> Iterator[tuple[int, float]]:
    """(round, value) of the evaluations so far, from a run's JSON lines."""
    try:
        lines = (run.folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return
    for line in lines:
        if line.endswith("\n") and f'"{metric}"' in line:
            row = json.loads(line)
            yield int(row["round"]), float(row[metric])


class Claims:
    """Which trials this process has taken, of all that work on one sweep: locks that end with it.

    Args:
      workdir: of the sweep, on a file system that all of them reach.
    """

    def __init__(self, workdir: Path):
        self._folder = workdir / "claims"
        self._held: dict[int, filelock.BaseFileLock] = {}
        try:
            os.makedirs(self._folder, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
        self.choosing = filelock.FileLock(self._folder / "choosing.lock")

    def take(self, number: int) -> bool:
        """Takes a trial unless another process has it, or this one."""
        if number in self._held:
            return False
        lock = filelock.FileLock(self._folder / f"{number:03d}.lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            return False
        self._held[number] = lock
        return True

    def release(self, number: int) -> None:
        """Gives it back."""
        self._held.pop(number).release()


class Source(Protocol):
    """Says which trial comes next."""

    def next(self) -> Trial | None:
        """Takes the next trial that has something to do and is nobody's; None if there is none now."""
        ...

    def heard(self, trial: Trial, told: Sequence[tuple[int, float]]) -> bool:
        """Hears of evaluations of a trial; returns whether it should be stopped."""
        ...

    def done(self, trial: Trial, outcomes: Sequence[Outcome]) -> None:
        """Is told that all runs of a trial have ended, and gives the trial back."""
        ...

    def known(self) -> Sequence[tuple[Trial, bool]]:
        """All trials so far or to come, and whether each was stopped for its evaluations."""
        ...

    @property
    def total(self) -> int:
        """How many trials there will be."""
        ...


class Listed:
    """The trials of a list: a grid, or random draws.

    Args:
      trials: all of them.
      metric: of the sweep.
      claims: of this process.
    """

    def __init__(self, trials: Sequence[Trial], metric: str, claims: Claims):
        self._trials = trials
        self._metric = metric
        self._claims = claims
        for trial in trials:
            if self._claims.take(trial.number):
                for run in trial.runs:
                    forget_failure(run)
                self._claims.release(trial.number)

    def next(self) -> Trial | None:
        """The first one that is open, and nobody's."""
        for trial in self._trials:
            if self._is_open(trial) and self._claims.take(trial.number):
                if self._is_open(trial):  # Another process may have done it meanwhile.
                    return trial
                self._claims.release(trial.number)
        return None

    def _is_open(self, trial: Trial) -> bool:
        return any(outcome(run, self._metric).state == "open" for run in trial.runs)

    def heard(self, trial: Trial, told: Sequence[tuple[int, float]]) -> bool:
        """Never stops one."""
        return False

    def done(self, trial: Trial, outcomes: Sequence[Outcome]) -> None:
        """Gives it back."""
        self._claims.release(trial.number)

    def known(self) -> Sequence[tuple[Trial, bool]]:
        """All of them."""
        return [(trial, False) for trial in self._trials]

    @property
    def total(self) -> int:
        """How many there are."""
        return len(self._trials)
