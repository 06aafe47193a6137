"""Runs one experiment many times: over grids, random draws or a study of Optuna, and over seeds.

fedexp sweep --gin_file=emnist_fedadam.gin --sweep=reddi_grid.gin --workdir=runs/grid

The same command goes on where it was stopped; given several times at once, on this or on other machines that
reach the workdir, each takes trials that no other has.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, and returns the exit code.

    0: all trials have a result or were pruned; 1: some have failed; 2: bad input; 128 + a signal that
    stopped the sweep.
    """
    parser = argparse.ArgumentParser(
        prog="fedexp sweep",
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
    parser.add_argument("--workers", type=int, default=1, help="programs at once (default: 1)")
    parser.add_argument(
        "--vmap_trials",
        type=lambda given: given if given == "auto" else int(given),
        default=1,
        help="trials in one program, of those that differ in numbers of the algorithm and seeds only "
        "(default: 1); 'auto' tries how many pay",
    )
    parser.add_argument(
        "--jobs", type=int, help="jobs of a cluster that share the sweep, by submitit"
    )
    parser.add_argument("--cluster", help="slurm or local; what submitit finds if none")
    parser.add_argument(
        "--cluster_param", action="append", default=[], help="of submitit, as slurm_partition=gpu"
    )
    parser.add_argument("--dry_run", action="store_true", help="lists trials and their commands")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    if options.vmap_trials != "auto" and options.vmap_trials < 1:
        parser.error(f"--vmap_trials must be at least 1, got {options.vmap_trials}")
    if options.jobs is not None and (options.jobs < 1 or options.dry_run):
        parser.error("--jobs must be at least 1, and goes without --dry_run")
    if options.jobs is None and (options.cluster or options.cluster_param):
        parser.error("--cluster and --cluster_param need --jobs")

    from fedexp.errors import UserError
    from fedexp.sweeps import command

    given = (options.gin_file, options.gin_param, options.sweep, options.workdir)
    try:
        if options.jobs is not None:
            return _submit(given, options)
        return command.run(
            *given,
            workers=options.workers,
            vmap_trials=options.vmap_trials,
            dry_run=options.dry_run,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # Before the first trial.
        print("interrupted", file=sys.stderr)
        return 130


def _submit(given: tuple[Any, Any, Any, Any], options: argparse.Namespace) -> int:
    """Submits jobs, once a mistake would have been found; waits for those of this machine."""
    from fedexp.sweeps import cluster, command

    # Each job tries for itself how many trials pay.
    command.prepare(*given, vmap_trials=2 if options.vmap_trials == "auto" else options.vmap_trials)
    part = cluster.Part(*given, options.workers, options.vmap_trials, os.getcwd())
    jobs = cluster.submit(part, options.jobs, options.cluster, options.cluster_param)
    for job in jobs:
        print(f"job {job.job_id}: {job.paths.stdout}")
    return max(job.result() for job in jobs) if options.cluster == "local" else 0


if __name__ == "__main__":
    sys.exit(main())
