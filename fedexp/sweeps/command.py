"""A sweep from its command line to its table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from fedexp import paths
from fedexp.errors import UserError
from fedexp.sweeps import checking, description, identity, space, table
from fedexp.sweeps.description import Sweep
from fedexp.sweeps.results import Results
from fedexp.sweeps.running import Loop
from fedexp.sweeps.study import Asked
from fedexp.sweeps.trials import Claims, Folders, Listed, Source, Trial
from fedexp.sweeps.workers import Batches, Place, places


class Prepared(NamedTuple):
    """A sweep that can be.

    Attributes:
      sweep: what it is.
      folders: of its trials.
      points: all of them; with a study some that it might choose.
      described: what tells it from others.
      lines: name of the JSON lines in which evaluations are heard of; None if nothing is stopped for them.
      batches: which trials are one program.
    """

    sweep: Sweep
    folders: Folders
    points: Sequence[space.Bindings]
    described: identity.Description
    lines: str | None
    batches: Batches


def prepare(
    gin_files: Sequence[str],
    gin_params: Sequence[str],
    sweep_file: str,
    workdir: str,
    claim: bool = True,
    vmap_trials: int | Literal["auto"] = 1,
) -> Prepared:
    """Reads and checks a sweep, and makes its folder.

    Args:
      gin_files: of the experiment.
      gin_params: of the experiment.
      sweep_file: that binds `sweep`.
      workdir: of the sweep.
      claim: False only reads.
      vmap_trials: trials of one program, at most; 'auto' tries how many pay on this machine, once for a
        workdir.

    Raises:
      UserError: bad input.
    """
    if paths.is_remote(workdir):
        raise UserError(
            f"--workdir={workdir}: a sweep needs a folder of a file system, for its locks"
        )
    sweep, text = description.load(sweep_file)
    if sweep.seeds is not None and any(p.split("=")[0].strip() == "train.seed" for p in gin_params):
        raise UserError("--gin_param binds train.seed, and so does sweep.seeds; take one of them")
    if sweep.study is None:
        points = space.points(sweep.axes, sweep.num_points, sweep.seed)
    else:
        points = space.examples(sweep.axes)
    seeded = [dict(p, **_seed(sweep)) for p in points]
    prunes = sweep.study is not None and sweep.study.pruner is not None
    assert sweep.metric is not None
    tried = Path(workdir) / "vmap_trials.txt"  # So that programs that were cut short can go on.
    if vmap_trials == "auto" and tried.exists():
        vmap_trials = int(tried.read_text())
    told = checking.ask(
        gin_files, gin_params, seeded, sweep.metric, prunes, build=claim, most=vmap_trials
    )
    if told.observers is not None:
        gin_params = [*gin_params, f"train.observers = {told.observers}"]
    folders = Folders(Path(workdir), gin_files, gin_params, sweep.of_seeds)
    described = identity.Description(text, told.experiment)
    if claim:
        identity.claim(folders.workdir, described)
        if told.said:
            print(f"--vmap_trials=auto: {told.said}", file=sys.stderr)
            paths.write(tried, f"{told.most}\n")
    lines = told.lines if prunes else None
    batches = Batches(told.most, told.apart)
    return Prepared(sweep, folders, points, described, lines, batches)


def run(
    gin_files: Sequence[str],
    gin_params: Sequence[str],
    sweep_file: str,
    workdir: str,
    *,
    workers: int = 1,
    vmap_trials: int | Literal["auto"] = 1,
    dry_run: bool = False,
) -> int:
    """Does what a sweep has left to do, and prints its results.

    Args:
      gin_files: as in `prepare`.
      gin_params: likewise.
      sweep_file: likewise.
      workdir: likewise.
      vmap_trials: likewise.
      workers: programs at once.
      dry_run: only list trials and their commands.

    Returns:
      The exit code: 0, 1 if a trial has failed, or 128 + the signal that came.

    Raises:
      UserError: bad input, before the first trial.
    """
    prepared = prepare(gin_files, gin_params, sweep_file, workdir, not dry_run, vmap_trials)
    sweep, folders, points, described, lines, batches = prepared
    where = places(workers)
    if dry_run:
        if sweep.study is not None:
            print(f"the study chooses {sweep.num_points} trials as it goes; they would be such as")
        _list([folders.trial(i, bindings) for i, bindings in enumerate(points)], where[0])
        return 0
    claims = Claims(folders.workdir)
    source: Source
    if sweep.study is not None:
        source = Asked(sweep, described, folders, claims)
    else:
        trials = [folders.trial(i, bindings) for i, bindings in enumerate(points)]
        source = Listed(trials, str(sweep.metric), claims)
    try:
        results, stopped_by = Loop(sweep, source, folders, where, lines, batches).run()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write to --workdir={workdir}: {reason}; free space there"
        ) from error
    return _finish(results, stopped_by, where[0])


def _seed(sweep: Sweep) -> dict[str, str]:
    return {} if sweep.seeds is None else {"train.seed": str(sweep.of_seeds[0])}


def _list(trials: Sequence[Trial], place: Place) -> None:
    for trial in trials:
        print(f"# trial {trial.number:03d}: {space.in_words(trial.bindings)}")
        for one in trial.runs:
            print(one.shown(place.environment))


def _finish(results: Results, stopped_by: int | None, place: Place) -> int:
    table.print_results(results)
    failed = [
        (run, one.error)
        for row in results.rows
        for run, one in zip(row.trial.runs, row.outcomes, strict=True)
        if one.state == "failed"
    ]
    for run, error in failed:
        print(f"failed: {run.folder}: {error}\n  {run.shown(place.environment)}", file=sys.stderr)
    left = len(results.of("open"))
    if stopped_by is not None:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 128 + stopped_by
    if left:
        print(f"{left} trials are another process's", file=sys.stderr)
    return 1 if failed else 0
