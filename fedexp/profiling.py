"""Records rounds with JAX's profiler; TensorBoard shows where their time goes (docs/profiling.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TypeVar

import gin
import jax

from fedexp import paths
from fedexp.errors import UserError

Round = TypeVar("Round")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ProfilePlan:
    """Which rounds TensorBoard's profiler records.

    The first round of a run compiles, so a profile of it shows little else. Recording slows rounds down,
    and writing the record falls into the round after.

    Attributes:
      rounds: the first and the last one, counted from 1.

    Raises:
      UserError: not two numbers, or a last round before the first.
    """

    rounds: tuple[int, int] = (3, 5)

    def __post_init__(self) -> None:
        try:
            first, last = self.rounds
            valid = 1 <= first <= last
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise UserError(
                "ProfilePlan.rounds must be the first and the last round to record, as (3, 5), got "
                f"{self.rounds!r}"
            )

    def check(self, num_rounds: int, workdir: str | os.PathLike | None) -> None:
        """Raises UserError if there are no such rounds, or no place for the record."""
        if self.rounds[1] > num_rounds:
            raise UserError(
                f"ProfilePlan.rounds is {self.rounds}, but train.num_rounds is {num_rounds}"
            )
        if workdir is None:
            raise UserError("train.profile needs a --workdir to write to")


def recorded(
    rounds: Iterator[Round],
    plan: ProfilePlan,
    workdir: str | os.PathLike,
    *,
    done: int,
    wait: Callable[[], None],
) -> Generator[Round]:
    """Yields `rounds` as they come, and records those that are planned into `workdir`.

    Closing the generator ends a recording. After a resume, what is left of the planned rounds is recorded.

    Args:
      rounds: one item a round.
      plan: the rounds to record.
      workdir: of this machine, or a URL; the record goes to its folder plugins/profile.
      done: rounds before the first item.
      wait: returns after the rounds on their way, which would otherwise be recorded by half.
    """
    first, last = plan.rounds
    with contextlib.ExitStack() as recording:
        for number, item in enumerate(rounds, done + 1):
            if number == max(first, done + 1) and number <= last:
                wait()
                recording.enter_context(_trace(workdir))
            with jax.profiler.StepTraceAnnotation("round", step_num=number):
                yield item
            if number == last:
                wait()
                recording.close()


@contextlib.contextmanager
def _trace(workdir: str | os.PathLike) -> Iterator[None]:
    # The profiler knows no buckets, and is of no use any more once it could not write.
    with tempfile.TemporaryDirectory() as scratch:
        jax.profiler.start_trace(scratch)
        try:
            yield
        finally:
            jax.profiler.stop_trace()
            _copy(Path(scratch), workdir)


def _copy(folder: Path, workdir: str | os.PathLike) -> None:
    try:
        for file in (path for path in folder.rglob("*") if path.is_file()):
            target = os.path.join(workdir, file.relative_to(folder))
            if not paths.is_remote(target):
                os.makedirs(os.path.dirname(target), exist_ok=True)
            paths.write(target, file.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot write the profile to {workdir}: {error.strerror or error}"
        ) from error
