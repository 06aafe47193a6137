"""What a sweep is, and the Gin file that describes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import gin

from fedexp import config, paths
from fedexp.bindings.reach import what_was_called
from fedexp.bindings.statements import in_force
from fedexp.errors import UserError, check
from fedexp.main import without_gin_frames
from fedexp.sweeps.space import Axis, check_axes
from fedexp.sweeps.study import HAS_OPTUNA, Study

_OURS = ("fedexp.sweeps.", "optuna.", "gin.")


@gin.configurable("sweep")
@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is varied, and what is looked at.

    Attributes:
      axes: what is varied. All combinations of their values are tried, and each with `num_points` draws of
        those that are random.
      metric: of the last evaluations, as 'test/accuracy'.
      direction: 'maximize' or 'minimize'.
      seeds: how many runs a point has, with `train.seed` = 0, 1 and so on, or a list of seeds. If None it is
        one, with the experiment's own seed.
      num_points: draws of the random axes; trials in all with a study.
      study: chooses points by what is known so far; the grid and random draws if None.
      seed: of the random draws.

    Raises:
      UserError: something is missing or contradicts something else.
    """

    axes: Sequence[Axis] = ()
    metric: str | None = None
    direction: Literal["maximize", "minimize"] | None = None
    seeds: int | Sequence[int] | None = None
    num_points: int | None = None
    study: Study | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.axes, "sweep.axes is not bound; it must be a list as [@a/axis(), @b/axis()]")
        check(self.metric, "sweep.metric is not bound; it must be a metric as 'test/accuracy'")
        check(self.direction, "sweep.direction is not bound; it must be 'maximize' or 'minimize'")
        check(
            self.num_points is None or self.num_points >= 1,
            f"sweep.num_points must be at least 1, got {self.num_points}",
        )
        check_axes(self.axes)
        seeds = self.seeds
        numbers = [seeds] if isinstance(seeds, int) else list(seeds if seeds is not None else [1])
        if not numbers or (isinstance(seeds, int) and seeds < 1) or min(numbers) < 0:
            raise UserError(f"sweep.seeds must be at least 1, or a list of seeds, got {seeds!r}")
        if twice := sorted({n for n in numbers if numbers.count(n) > 1}):
            raise UserError(f"sweep.seeds has {twice[0]} twice, which would be one folder")
        if self.study is not None and self.num_points is None:
            raise UserError("sweep.num_points is not bound: how many trials the study has")
        if self.seeds is not None and any("train.seed" in axis.names for axis in self.axes):
            raise UserError("an axis binds train.seed, and so does sweep.seeds; take one of them")

    @property
    def of_seeds(self) -> Sequence[int | None]:
        """The seed of each run of a point; None is the experiment's."""
        if self.seeds is None:
            return [None]
        return range(self.seeds) if isinstance(self.seeds, int) else list(self.seeds)


def load(name: str) -> tuple[Sweep, str]:
    """The sweep of a Gin file, and its bindings as text. No binding is in force afterwards.

    Args:
      name: a path, or the name of one that fedexp ships.

    Raises:
      UserError: a mistake in it.
    """
    shipped = config.shipped_configs() / "sweeps"
    path = name if paths.exists(name) else str(shipped / name)
    if not paths.exists(path):
        known = ", ".join(sorted(found.name for found in shipped.glob("*.gin")))
        raise UserError(f"there is no {name}, nor does fedexp ship a sweep of this name: {known}")
    gin.clear_config()
    try:
        config.load([path], [], names=__name__)
        for statement in in_force().values():
            if not statement.key[1].startswith(_OURS):
                raise UserError(
                    f"gin: {statement} is part of the experiment; give it to --gin_file or --gin_param"
                )
        sweep = Sweep()
        for statement in in_force().values():
            if not what_was_called().reads(statement):
                raise UserError(f"gin: {statement} has no effect: the sweep never uses it")
        return sweep, config.as_text()
    except UserError as error:
        message = without_gin_frames(str(error))
        if "No configurable matching" in message:
            message += f" A sweep's file names nothing of the experiment.{_optuna_missing()}"
        raise UserError(message) from error
    except (TypeError, ValueError, ImportError) as error:  # Of Optuna's constructors.
        first = without_gin_frames(str(error)).strip().splitlines()[0]
        raise UserError(f"{name}: {first}{_optuna_missing()}") from error
    finally:
        gin.clear_config()


def _optuna_missing() -> str:
    return "" if HAS_OPTUNA else " Studies need Optuna: pip install 'fedexp[sweeps]'"
