"""Says how runs go: a line each, with its round, speed, time left and last metrics.

    python -m fedexp.status WORKDIR... --watch

A workdir may also be a folder of such, as of a sweep. A run is `starting`, `running`, `finished`,
`stopped` by a signal, `failed` with its error, or has `died` without a word, as by SIGKILL or a power cut.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedexp import environment, paths, pulse, shown
from fedexp.errors import UserError
from fedexp.progress import describe, of_evaluations
from fedexp.sole_use import is_held

_RUNS = (pulse.NAME, "final.json")
_HAVE_NO_RUNS = {"checkpoints", "client_states", "plugins"}
_MOST_METRICS = 3
# Signs of life that a bucket's run may miss before it is taken for dead.
_MISSED = 4
# Seconds and rounds without news, from which on it is worth a word.
_STILL, _ROUNDS = 120.0, 5
_COLOURS = {"running": "green", "finished": "blue", "failed": "red", "died": "red"}


class Status(NamedTuple):
    """How a run goes.

    Attributes:
      path: its workdir.
      state: 'starting', 'running', 'finished', 'stopped', 'failed' or 'died'.
      round: finished rounds.
      rounds: in total; None if nobody has said it.
      speed: rounds per second since its first one, evaluations included; None if there were too few.
      left: seconds that are left at this speed, of a run that is running.
      metrics: of the last evaluations.
      why: the line that says why it ended, or ''.
      where: its latest start's host, devices and versions in a line, or ''.
    """

    path: str
    state: str
    round: int
    rounds: int | None
    speed: float | None
    left: float | None
    metrics: Mapping[str, float]
    why: str
    where: str


def found_in(path: str) -> list[str]:
    """The workdirs that a path is, or has below it.

    Raises:
      UserError: there is none.
    """
    try:
        if paths.is_remote(path):
            files = [os.path.split(name) for name in paths.find(path)]
            found = {os.path.join(path, folder) for folder, name in files if name in _RUNS}
        else:
            found = set(_folders(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not found:
        raise UserError(f"no run has begun in {path}, or below it")
    return sorted(folder.rstrip("/") for folder in found)


def status(workdir: str) -> Status:
    """How the run in a workdir goes, by its `status.json` or, of an older fedexp, its `final.json`."""
    told = pulse.read(workdir) or _of_final(workdir)
    state, number, rounds = told.get("state", "died"), told.get("round", 0), told.get("rounds")
    speed, why = told.get("rounds_per_second"), told.get("why", "")
    if state in ("starting", "running"):
        now = time.time()
        is_silent = (
            paths.is_remote(workdir) and now - told.get("updated", 0.0) > _MISSED * pulse.BEAT
        )
        if is_silent or not is_held(workdir):
            state = "died"
        patience = max(_STILL, _ROUNDS / speed if speed else 0.0)
        if state != "died" and (still := now - told.get("moved", now)) > patience:
            why = f"no news for {_time(still)}"
    left = (rounds - number) / speed if state == "running" and speed and rounds else None
    where = environment.line(environment.last(workdir))
    return Status(workdir, state, number, rounds, speed, left, told.get("metrics", {}), why, where)


def lines(runs: Sequence[Status]) -> list[list[str]]:
    """A row of texts a run: its path, state, round, speed, time left, what else there is to say, where."""
    return [
        [
            run.path,
            run.state,
            f"{run.round}/{'?' if run.rounds is None else run.rounds}",
            "" if run.speed is None else f"{run.speed:.3g}/s",
            "" if run.left is None else _time(run.left),
            "  ".join(filter(None, [describe(_shown(run.metrics)), run.why])),
            run.where,
        ]
        for run in runs
    ]


def table(runs: Sequence[Status]) -> Table:
    """The same for a terminal, without the folder that all runs are in; below is where they are."""
    made = Table(box=SIMPLE_HEAD, caption_justify="left")
    made.add_column("run", overflow="fold")
    made.add_column("state")
    for name in ("round", "speed", "left"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("")
    places: dict[str, list[str]] = {}
    for run, name, row in zip(runs, _below([run.path for run in runs]), lines(runs), strict=True):
        made.add_row(name, *row[1:-1], style=_COLOURS.get(run.state, ""))
        places.setdefault(run.where, []).append(name)
    if len(places) == 1:
        made.caption = next(iter(places))
    else:
        made.caption = "\n".join(
            f"{shown.names(of)}: {where}" for where, of in places.items() if where
        )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table in a terminal, tab-separated lines elsewhere; an error is one line, and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fedexp.status",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "workdirs", nargs="+", metavar="WORKDIR", help="workdirs, or folders of such"
    )
    parser.add_argument("--watch", action="store_true", help="look again until Ctrl-C")
    parser.add_argument("--every", type=float, default=2.0, help="seconds of --watch; default: 2")
    given = parser.parse_args(arguments)

    def look() -> list[Status]:
        return [status(run) for path in given.workdirs for run in found_in(path)]

    console = Console(highlight=False)
    try:
        if not console.is_terminal:
            _print(look())
            while given.watch:
                time.sleep(given.every)
                print()
                _print(look())
        elif given.watch:
            with Live(table(look()), console=console, auto_refresh=False) as live:
                while True:
                    time.sleep(given.every)
                    live.update(table(look()), refresh=True)
        else:
            console.print(table(look()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def _folders(path: str) -> Iterator[str]:
    for folder, below, files in os.walk(path):
        below[:] = [name for name in below if name not in _HAVE_NO_RUNS]
        if not set(_RUNS).isdisjoint(files):
            yield folder


def _below(runs: Sequence[str]) -> list[str]:
    """Paths from the folder that has all of them."""
    try:
        base = os.path.commonpath([os.path.dirname(run) for run in runs])
    except ValueError:  # Some are relative, others are not.
        return list(runs)
    return [os.path.relpath(run, base) for run in runs]


def _of_final(workdir: str) -> dict[str, Any]:
    """What a run has left that ended before there was a `status.json`."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        final = json.loads(paths.read_text(os.path.join(workdir, "final.json")))
        told = {"state": "finished", "round": final["rounds"], "rounds": final["rounds"]}
        return {**told, "metrics": final["metrics"], "why": final.get("stopped_early", "")}
    return {}


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The first few of what evaluations measured as a whole."""
    return {name: metrics[name] for name in of_evaluations(metrics)[:_MOST_METRICS]}


def _time(seconds: float) -> str:
    """'1 d 02:03:04', '2:03:04' or '3:04'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _print(runs: Sequence[Status]) -> None:
    for row in lines(runs):
        print("\t".join(row))


if __name__ == "__main__":
    sys.exit(main())
