"""Draws a metric of finished runs against what it cost.

    python -m fedexp.plots RUN... --x=bits --metric=test/accuracy --out=plot.png

A run is a workdir with a `final.json`, or a folder of such. Runs that differ in `train.seed` alone are one
curve, their mean, with a band from the least to the greatest. `--x` is one of

    round     rounds
    bits      that all clients have sent and been told so far; bits_up, that they have sent
    seconds   of the simulated clock
    epsilon   of the privacy that has been spent
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Mapping, Sequence

from fedexp import paths
from fedexp.errors import UserError, check
from fedexp.runs import AXES, Curve, found_in, read, settings

FORMATS = ("png", "pdf", "svg")


def curves(runs: Sequence[str], x: str, metric: str) -> dict[str, Curve]:
    """A label -> its curve, for every setting: of runs that differ in nothing but their seeds.

    Args:
      runs: workdirs of finished runs, or folders of them.
      x: a name of `AXES`.
      metric: of evaluations.

    Raises:
      UserError: a run has no such history, or those of a setting no evaluation in common.
    """
    found = [read(path) for given in runs for path in found_in(given)]
    for run in found:
        for name in (metric, *AXES[x][1]):
            run.check_has(name)
    of = settings(found)
    names = labels([run.path for run in found])
    if len(of) < len(found):
        names = [one.label for one in of]
    drawn = {}
    for name, one in zip(names, of, strict=True):
        drawn[name] = one.curve(x, metric)
        if drawn[name] is None:
            which = one.runs[0].path if len(one.runs) == 1 else name
            both = " and ".join((metric, *AXES[x][1]))
            raise UserError(f"{which} has no evaluation with both {both}")
    return drawn


def draw(
    curves: Mapping[str, Curve], x: str, metric: str, log: bool = False, format: str = "png"
) -> bytes:
    """A picture of a curve a setting, with a band from the least to the greatest of its runs.

    Args:
      curves: label -> curve.
      x: a name of `AXES`.
      metric: that the curves are of.
      log: whether the horizontal axis is logarithmic.
      format: one of `FORMATS`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4.5), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    for label, curve in curves.items():
        (line,) = axes.plot(curve.x, curve.mean, marker=".", label=label)
        axes.fill_between(curve.x, curve.low, curve.high, alpha=0.2, color=line.get_color())
    axes.set_xlabel(AXES[x][0])
    axes.set_ylabel(metric)
    if log:
        axes.set_xscale("log")
    elif x.startswith("bits"):
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format=format)
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
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs, or folders of workdirs")
    parser.add_argument("--x", choices=AXES, default="round", help="default: round")
    parser.add_argument("--metric", default="test/accuracy", help="default: test/accuracy")
    parser.add_argument(
        "--out",
        default="plot.png",
        help="a file that ends in .png, .pdf or .svg; default: plot.png",
    )
    parser.add_argument("--log", action="store_true", help="a logarithmic axis")
    given = parser.parse_args(arguments)
    try:
        format = os.path.splitext(given.out)[1].removeprefix(".").lower()
        check(format in FORMATS, f"--out={given.out} must end in {' or '.join(FORMATS)}")
        picture = draw(
            curves(given.runs, given.x, given.metric), given.x, given.metric, given.log, format
        )
        try:
            paths.write(given.out, picture)
        except OSError as error:
            raise UserError(f"cannot write {given.out}: {error.strerror or error}") from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
