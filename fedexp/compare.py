"""Compares runs: the bindings in which they differ, and what came out, side by side.

    python -m fedexp.compare RUN... --metrics=test/accuracy,test/loss --sort=test/accuracy --csv=runs.csv

A run is a workdir with a `final.json`, or a folder of such.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from fedexp import paths
from fedexp.errors import UserError
from fedexp.plots import history, labels

_UNBOUND = ""


class Run(NamedTuple):
    """A finished run.

    Attributes:
      path: its workdir.
      bindings: name -> value, as Gin writes both; what is in force and nobody bound included.
      metrics: of its last evaluations.
    """

    path: str
    bindings: Mapping[str, str]
    metrics: Mapping[str, float]


def found_in(path: str) -> list[str]:
    """The workdirs of finished runs that a path is, or has below it; itself if there is none."""
    if paths.is_remote(path) or os.path.exists(os.path.join(path, "final.json")):
        return [path]
    below = sorted(folder for folder, _, files in os.walk(path) if "final.json" in files)
    return below or [path]


def read(path: str) -> Run:
    """A run from its workdir.

    Raises:
      UserError: it has no `final.json`, or no config.
    """
    rows = history(path)
    try:
        text = "".join(
            paths.read_text(os.path.join(path, name))
            for name in ("operative_config.gin", "config.gin")
        )
    except OSError as error:
        raise UserError(f"{path} has no config to compare: {error}") from error
    lines = text.replace("\\\n", " ").splitlines()
    pairs = (line.split(" = ", 1) for line in lines if " = " in line and not line.startswith("#"))
    bindings = {name: " ".join(value.split()) for name, value in pairs}
    return Run(path, bindings, rows[-1] if rows else {})


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of bindings that are not the same in all runs, sorted."""
    names = sorted({name for run in runs for name in run.bindings})
    return [name for name in names if len({run.bindings.get(name, _UNBOUND) for run in runs}) > 1]


def rows(runs: Sequence[Run], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(header, one row a run): its label, what is its own in the config, and its metrics."""
    bound = differing(runs)
    header = ["run", *bound, *metrics]
    table = [
        [
            label,
            *(run.bindings.get(name, _UNBOUND) for name in bound),
            *(f"{run.metrics[name]:.6g}" if name in run.metrics else "" for name in metrics),
        ]
        for label, run in zip(labels([run.path for run in runs]), runs, strict=True)
    ]
    return header, table


def _chosen(given: str | None, runs: Sequence[Run]) -> list[str]:
    known = {name: None for run in runs for name in run.metrics}
    if given is None:
        return [name for name in known if not name.startswith(("train/", "traffic/"))]
    wanted = given.split(",")
    for name in wanted:
        if name not in known:
            raise UserError(f"no run has the metric {name!r}; there are {', '.join(known)}")
    return wanted


def _as_csv(header: list[str], table: list[list[str]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([header, *table])
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison; an error is one line, and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fedexp.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs, or folders of workdirs")
    parser.add_argument("--metrics", help="names with commas between; all of evaluations if none")
    parser.add_argument("--sort", help="the metric by which runs are sorted, the largest first")
    parser.add_argument("--csv", help="a file to write the same to")
    given = parser.parse_args(arguments)
    try:
        runs = [read(path) for given_path in given.runs for path in found_in(given_path)]
        if given.sort is not None:
            _chosen(given.sort, runs)
            runs.sort(key=lambda run: -run.metrics.get(given.sort, -float("inf")))
        header, table = rows(runs, _chosen(given.metrics, runs))
        shown = Table(*header)
        for row in table:
            shown.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 240).print(shown)
        if given.csv is not None:
            try:
                paths.write(given.csv, _as_csv(header, table))
            except OSError as error:
                raise UserError(f"cannot write {given.csv}: {error.strerror or error}") from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
