"""Writes docs/benchmarks.md from the figures in benchmarks/results.

python -m benchmarks.page [PATH]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import fedjax_announcement, machine, scale_curves

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Written by `python -m benchmarks.page` from the files in [benchmarks/results](../benchmarks/results), which
have every single measurement, the versions and the settings. Change neither numbers nor text here.
[benchmarks/README.md](../benchmarks/README.md) tells how to run the benchmarks, also the comparison with
FedJAX and pfl-research."""

ANNOUNCEMENT = """## The figures of FedJAX's announcement

Means over rounds, with the minimum and the maximum, of `train` on the shipped gin files, timed as any run
times itself. In the images, what is extrapolated is hatched."""

SCALE = """## Scale

FedAvg; each point is a fresh process, and bars reach from the fastest round to the slowest. Peak memory is
the process's, with Python, JAX and compilation."""


def page(results: Path) -> str:
    """The page, of whatever has been measured."""
    parts = [HEAD]
    announced = {
        name: results / f"announcement_{name}.json" for name in fedjax_announcement.WORKLOADS
    }
    parts += section(ANNOUNCEMENT, announced, announcement)
    curves = {name: results / f"scale_{name}.json" for name in scale_curves.CURVES}
    parts += section(SCALE, curves, scale)
    return "\n\n".join(parts) + "\n"


def section(head: str, files: dict[str, Path], write) -> list[str]:
    found = [
        write(name, json.loads(path.read_text())) for name, path in files.items() if path.exists()
    ]
    return [head, *found] if found else []


def announcement(name: str, report: dict) -> str:
    title = fedjax_announcement.WORKLOADS[name].title
    remarks = "\n".join(f"- {line}" for line in fedjax_announcement.remarks(report))
    tables = "\n\n".join(
        f"{table.title}:\n\n{table.markdown()}" for table in fedjax_announcement.tables(report)
    )
    image = f"![{title}: bars and curve](images/announcement_{name}.png)"
    return f"### {title}\n\n{tables}\n\n{image}\n\n{remarks}"


def scale(name: str, report: dict) -> str:
    curve = scale_curves.CURVES[name]
    image = f"![{curve.title}](images/scale_{name}.png)"
    about = f"{machine.sentence(report['machine'])}; {report['date']}; seed {report['seed']}."
    heading = f"### Against {curve.label}"
    return f"{heading}\n\n{curve.sentence(report)}\n\n{image}\n\n{curve.title}. {about}"


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    path.write_text(page(RESULTS))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
