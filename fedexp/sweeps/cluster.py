"""A sweep by jobs of a cluster, through submitit: each is one more process that takes trials nobody has."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fedexp.errors import UserError
from fedexp.sweeps import command

HAS_SUBMITIT = importlib.util.find_spec("submitit") is not None
if TYPE_CHECKING or HAS_SUBMITIT:  # An extra.
    import submitit


class Part(NamedTuple):
    """One job's part of a sweep: what `command.run` is given, in the folder where it was submitted."""

    gin_files: Sequence[str]
    gin_params: Sequence[str]
    sweep_file: str
    workdir: str
    workers: int
    vmap_trials: int | Literal["auto"]
    folder: str

    def __call__(self) -> int:
        """Takes trials until none is left; the exit code is told as the job's result."""
        os.chdir(self.folder)
        return command.run(
            self.gin_files,
            self.gin_params,
            self.sweep_file,
            self.workdir,
            workers=self.workers,
            vmap_trials=self.vmap_trials,
        )

    def checkpoint(self) -> Any:
        """What submitit queues again where the job is preempted or out of time; trials have their own."""
        return submitit.helpers.DelayedSubmission(self)


def submit(part: Part, jobs: int, cluster: str | None, parameters: Sequence[str]) -> list[Any]:
    """Submits jobs that share a sweep.

    Args:
      part: of each.
      jobs: how many.
      cluster: 'slurm', or 'local' for processes of this machine; what submitit finds if None.
      parameters: of its executor, as 'slurm_partition=gpu'.

    Returns:
      submitit's jobs.

    Raises:
      UserError: submitit is missing, or refuses a parameter.
    """
    if not HAS_SUBMITIT:
        raise UserError("--jobs needs submitit: pip install 'fedexp[cluster]'")
    try:
        executor = submitit.AutoExecutor(Path(part.workdir) / "jobs", cluster=cluster)
        executor.update_parameters(name="sweep", **dict(map(_parameter, parameters)))
        with executor.batch() if executor.cluster == "slurm" else contextlib.nullcontext():
            return [executor.submit(part) for _ in range(jobs)]
    except (NameError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"submitit: {str(error).strip().splitlines()[0]}") from error


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--cluster_param={text} must be as 'slurm_partition=gpu'")
    with contextlib.suppress(ValueError, SyntaxError):
        return name.strip(), ast.literal_eval(value.strip())
    return name.strip(), value.strip()
