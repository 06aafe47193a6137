"""Runs one experiment many times: over grids, random draws or a study of Optuna, and over seeds.

python -m launch.sweep --gin_file=emnist_fedadam.gin --sweep=reddi_grid.gin --workdir=runs/grid

The same command goes on where it was stopped; given several times at once, on this or on other machines that
reach the workdir, each takes trials that no other has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, and returns the exit code.

    0: all trials have a result or were pruned; 1: some have failed; 2: bad input; 128 + a signal that
    stopped the sweep.
    """
    parser = argparse.ArgumentParser(
        prog="python -m launch.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gin_file", action="append", default=[], help="of the experiment")
    parser.add_argument(
        "--gin_param", action="append", default=[], help="of the experiment, for all trials"
    )
    parser.add_argument("--sweep", required=True, help="Gin file that binds `sweep`")
    parser.add_argument("--workdir", required=True, help="folder of the sweep and of its trials")
    parser.add_argument("--workers", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--dry_run", action="store_true", help="lists trials and their commands")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")

    from fedexp.errors import UserError
    from fedexp.sweeps import command

    try:
        return command.run(
            options.gin_file,
            options.gin_param,
            options.sweep,
            options.workdir,
            workers=options.workers,
            dry_run=options.dry_run,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # Before the first trial.
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
