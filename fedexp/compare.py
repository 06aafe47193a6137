"""Compares runs: the bindings in which they differ, and what came out, side by side.

    python -m fedexp.compare RUN... --metrics=test/accuracy,test/loss --sort=test/accuracy --csv=runs.csv
    python -m fedexp.compare RUN... --html=report.html

A run is a workdir with a `final.json`, or a folder of such. Runs that differ in `train.seed` alone are one
setting, of which a second table has means and standard deviations.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from fedexp import environment, paths, shown
from fedexp.errors import UserError
from fedexp.plots import labels
from fedexp.progress import of_evaluations
from fedexp.runs import UNBOUND, Run, Setting, differing, found_in, read, settings


def rows(runs: Sequence[Run], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(header, one row a run): its label, what is its own in the config, and its metrics."""
    bound = differing(runs)
    header = ["run", *bound, *metrics]
    table = [
        [
            label,
            *(run.bindings.get(name, UNBOUND) for name in bound),
            *(f"{run.metrics[name]:.6g}" if name in run.metrics else "" for name in metrics),
        ]
        for label, run in zip(labels([run.path for run in runs]), runs, strict=True)
    ]
    return header, table


def over_seeds(
    found: Sequence[Setting], metrics: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """(header, one row a setting): its bindings, how many runs it has, and means with standard deviations."""

    def cell(values: np.ndarray) -> str:
        spread = f" ± {values.std(ddof=1):.2g}" if len(set(values)) > 1 else ""
        return f"{values.mean():.6g}{spread}" if len(values) else ""

    header = [*found[0].bindings, "runs", *metrics]
    table = [
        [*one.bindings.values(), str(len(one.runs)), *(cell(one.last(name)) for name in metrics)]
        for one in found
    ]
    return header, table


def run_on_others(runs: Sequence[Run]) -> list[str]:
    """A line for each device, version or commit that is not the same in all runs that have kept it."""
    found = {
        label: kept
        for label, run in zip(labels([run.path for run in runs]), runs, strict=True)
        if (kept := environment.texts(environment.last(run.path)))
    }
    lines = []
    for name in dict.fromkeys(name for kept in found.values() for name in kept):
        groups: dict[str, list[str]] = {}
        for label, kept in found.items():
            groups.setdefault(kept.get(name, "none"), []).append(label)
        if len(groups) > 1:
            parts = [f"{value} ({shown.names(of)})" for value, of in groups.items()]
            lines.append(f"{name} differs: {'; '.join(parts)}")
    return lines


def _chosen(given: str | None, runs: Sequence[Run]) -> list[str]:
    known = {name: None for run in runs for name in run.metrics}
    if given is None:
        return [name for name in known if not name.startswith(("train/", "traffic/"))]
    wanted = given.split(",")
    for name in wanted:
        if name not in known:
            raise UserError(f"no run has the metric {name!r}; there are {', '.join(known)}")
    return wanted


def _or_last(value: float | None) -> float:
    """What a value is sorted by, the largest first."""
    return -float("inf") if value is None else value


def _shown(header: list[str], table: list[list[str]], title: str | None = None) -> Table:
    made = Table(*header, title=title)
    for row in table:
        made.add_row(*row)
    return made


def _write(path: str, content: str) -> None:
    try:
        paths.write(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


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
    parser.add_argument("--csv", help="a file to write a row a run to")
    parser.add_argument("--html", help="a file to write a report with plots to; it needs plotly")
    given = parser.parse_args(arguments)
    try:
        runs = [read(path) for given_path in given.runs for path in found_in(given_path)]
        if given.sort is not None:
            _chosen(given.sort, runs)
            runs.sort(key=lambda run: -_or_last(run.metrics.get(given.sort)))
        metrics = _chosen(given.metrics, runs)
        header, table = rows(runs, metrics)
        console = Console(width=None if sys.stdout.isatty() else 240)
        console.print(_shown(header, table))
        found = settings(runs)
        if given.sort is not None:
            found.sort(key=lambda one: -_or_last(one.mean(given.sort)))
        if len(found) < len(runs):
            console.print(_shown(*over_seeds(found, metrics), title="over seeds"))
        for line in run_on_others(runs):
            console.print(line, highlight=False)
        if given.csv is not None:
            _write(given.csv, _as_csv(header, table))
        if given.html is not None:
            from fedexp import report

            drawn = metrics if given.metrics else of_evaluations(metrics) or metrics
            names = labels([run.path for run in runs])
            _write(given.html, report.page(runs, names, drawn))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
