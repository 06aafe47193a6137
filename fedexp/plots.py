"""Draws a metric of finished runs against what it cost.

    python -m fedexp.plots RUN... --x=bits --metric=test/accuracy --out=plot.png

A run is a workdir with a `final.json`, whose history has a point for every evaluation. `--x` is one of

    round     rounds
    bits      that all clients have sent and been told so far; bits_up, that they have sent
    seconds   of the simulated clock
    epsilon   of the privacy that has been spent
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence

from fedexp import paths
from fedexp.data import SECONDS
from fedexp.errors import UserError

# Axis -> its label, and the numbers of the history whose sum it is.
AXES = {
    "round": ("rounds", ("round",)),
    "bits": ("bits, up and down", ("traffic/total_bits_up", "traffic/total_bits_down")),
    "bits_up": ("bits, up", ("traffic/total_bits_up",)),
    "seconds": ("simulated seconds", (SECONDS,)),
    "epsilon": ("privacy spent, epsilon", ("privacy/epsilon",)),
}

Points = list[tuple[float, float]]


def history(run: str) -> list[Mapping[str, float]]:
    """The rows of a finished run.

    Raises:
      UserError: it has no `final.json`, or another program's.
    """
    path = os.path.join(run, "final.json")
    try:
        return list(json.loads(paths.read_text(path))["history"])
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is none; a run writes it after its last round") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be read as fedexp's: {error!r}") from error


def points(run: str, x: str, metric: str) -> Points:
    """(x, metric) at the evaluations of a run that measured both.

    Raises:
      UserError: none did, or there is no history to read.
    """
    rows = history(run)
    _, summed = AXES[x]
    for name in (metric, *summed):
        if not any(name in row for row in rows):
            known = sorted({name for row in rows for name in row})
            close = difflib.get_close_matches(name, known, n=3) or known
            raise UserError(f"{run} has no {name!r} in its history; there is {', '.join(close)}")
    found = [
        (float(sum(row[name] for name in summed)), float(row[metric]))
        for row in rows
        if {metric, *summed} <= row.keys()
    ]
    finite = [point for point in found if all(map(math.isfinite, point))]
    if not finite:
        raise UserError(f"{run} has no evaluation with both {metric} and {' and '.join(summed)}")
    return finite


def draw(curves: Mapping[str, Points], x: str, metric: str, log: bool = False) -> bytes:
    """A PNG of one curve a run.

    Args:
      curves: a run's label -> its points.
      x: a name of `AXES`.
      metric: that the points have.
      log: whether the horizontal axis is logarithmic.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, of_run in curves.items():
        axes.plot(*zip(*of_run, strict=True), marker=".", label=label)
    axes.set_xlabel(AXES[x][0])
    axes.set_ylabel(metric)
    if log:
        axes.set_xscale("log")
    elif x.startswith("bits"):
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def labels(runs: Sequence[str]) -> list[str]:
    """The runs' names: their last folders, or all of their paths where these are not told apart."""
    short = [os.path.basename(os.path.normpath(run)) for run in runs]
    return short if len(set(short)) == len(short) else list(runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws; an error is one line, and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fedexp.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs of finished runs")
    parser.add_argument("--x", choices=AXES, default="round", help="default: round")
    parser.add_argument("--metric", default="test/accuracy", help="default: test/accuracy")
    parser.add_argument("--out", default="plot.png", help="default: plot.png")
    parser.add_argument("--log", action="store_true", help="a logarithmic axis")
    given = parser.parse_args(arguments)
    try:
        curves = {
            label: points(run, given.x, given.metric)
            for label, run in zip(labels(given.runs), given.runs, strict=True)
        }
        try:
            paths.write(given.out, draw(curves, given.x, given.metric, given.log))
        except OSError as error:
            raise UserError(f"cannot write {given.out}: {error.strerror or error}") from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
