"""Runs one kind of trial, prints a table of its outcomes, and writes them to benchmarks/results.

    python -m benchmarks.trials {files,bindings,kills} [--help]

Each is a module of this name beside this one, with `add_arguments(parser)` and `run(args)`.
"""

from __future__ import annotations

import argparse
import importlib
import sys

TRIALS = {
    "files": "damages the files of all readers, and reads them",
    "bindings": "mutates the bindings of the shipped configs, and starts them",
    "kills": "kills runs, and starts them again",
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.trials", description=__doc__)
    parser.add_argument("trial", choices=TRIALS, help="; ".join(map(": ".join, TRIALS.items())))
    if not argv or argv[0] not in TRIALS:
        parser.parse_args(argv[:1])
    name = argv[0]
    trial = importlib.import_module(f"benchmarks.trials.{name}")
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.trials {name}", description=trial.__doc__
    )
    trial.add_arguments(parser)
    trial.run(parser.parse_args(argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
