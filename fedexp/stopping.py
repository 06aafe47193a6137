"""The metric that a run is judged by: when it was best, and whether that is too long ago to go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gin

from fedexp.checkpointing import CheckpointPlan, Saved
from fedexp.errors import UserError
from fedexp.evaluation import Evaluation
from fedexp.session import Round, Session, row


@gin.configurable("early_stopping")
@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """When a run ends before its last round, as `train.stop`.

    It ends after an evaluation by which `CheckpointPlan.best_metric` has not improved for some time, or is
    good enough, as a run that has done all its rounds does: everything is evaluated, of all clients, and a
    checkpoint made.

    Attributes:
      patience: evaluations in a row without improvement after which it ends; None for any number.
      min_delta: what counts as an improvement is greater than this.
      target: what is good enough, for rounds to an accuracy; nothing is if None.

    Raises:
      UserError: a patience below 1, a negative or infinite min_delta, or neither patience nor target.
    """

    patience: int | None = 10
    min_delta: float = 0.0
    target: float | None = None

    def __post_init__(self) -> None:
        if self.patience is None and self.target is None:
            raise UserError("early_stopping needs a patience or a target")
        if self.patience is not None and not (
            isinstance(self.patience, int) and self.patience >= 1
        ):
            raise UserError(
                f"early_stopping.patience must be a whole number, at least 1, got {self.patience!r}"
            )
        if not 0 <= self.min_delta < float("inf"):
            raise UserError(
                f"early_stopping.min_delta must be at least 0 and finite, got {self.min_delta}"
            )


class Stall(NamedTuple):
    """How long the metric has not improved.

    Attributes:
      best: the value that had to be improved on; None before the first.
      round: of it.
      evaluations: since.
    """

    best: float | None = None
    round: int = 0
    evaluations: int = 0


class Judge:
    """Follows the best metric of a run, always measured on the same clients.

    With several processes all measure the same, and agree.

    Args:
      session: the run.
      checkpoints: knows the metric.
      stop: when to end early; never if None.

    Attributes:
      plan: `checkpoints` for this run's evaluations.
      over: why the run ends before its last round, in words; None if it does not.

    Raises:
      UserError: no evaluation gives the metric, or none before the end.
    """

    def __init__(self, session: Session, checkpoints: CheckpointPlan, stop: EarlyStopping | None):
        self._session, self._stop = session, stop
        self._evaluations = evaluations = session.setup.evaluations
        validation = [e.name for e in evaluations if e.split == "validation"]
        self.plan = checkpoints.bound_to(session.metric_names(), next(iter(validation), None))
        self._metric = metric = str(self.plan.best_metric)
        if stop and self.plan.best_metric is None:
            raise UserError("train.stop watches CheckpointPlan.best_metric, and there is none")
        if stop and not any(e.every for e in evaluations if metric.startswith(f"{e.name}/")):
            raise UserError(
                f"train.stop watches {metric}, which is measured at the end only; bind that evaluation's "
                "evaluate.every, or another CheckpointPlan.best_metric"
            )
        self._best: float | None = None
        self._stall = Stall()
        self.over: str | None = None

    def resume(self, saved: Saved) -> None:
        """Goes on from a checkpoint."""
        self._best, self._stall = saved.best, Stall(*saved.stall)
        self._decide(saved.done)

    def saved(
        self,
        round_: Round,
        history: list[dict[str, float]],
        totals: Mapping[str, float] | None,
        report: Any = None,
    ) -> Saved:
        """What a checkpoint after a round holds."""
        account = self._session.account
        spent = account.parts if account else ()
        saved = Saved(round_.number, round_.state, history, self._best, report, self._stall)
        return saved._replace(totals=totals, spent=spent)

    def measure(
        self, round_: Round, which: Sequence[int], last: bool
    ) -> tuple[dict[str, Evaluation], float | None, bool]:
        """Evaluates after a round; all there is if the run ends with it.

        Returns:
          The results by group, the best metric's value if it was measured, and whether it is the best so far.
        """
        results = self._session.evaluate(round_, which, full=last)
        values = row(results)
        sampled = {i for i, e in enumerate(self._evaluations) if isinstance(e.clients, int)}
        for i in sampled.intersection(which) if last else ():
            if self._metric.startswith(f"{self._evaluations[i].name}/"):
                values |= row(self._session.evaluate(round_, [i], full=False))
        value = values.get(self._metric)
        improves = self.plan.improves(value, self._best)
        self._best = value if improves else self._best
        if self._stop and value is not None:
            self._note(round_.number, value, self._stop.min_delta)
            self._decide(round_.number)
        if self.over and not last:
            rest = [i for i in range(len(self._evaluations)) if i in sampled or i not in which]
            results |= self._session.evaluate(round_, rest, full=True)
        return results, value, improves

    def _note(self, done: int, value: float, min_delta: float) -> None:
        best, since, evaluations = self._stall
        wanted = None if best is None else best + self.plan.sign * min_delta
        if self.plan.improves(value, wanted):
            self._stall = Stall(value, done)
        else:
            self._stall = Stall(best, since, evaluations + 1)

    def _decide(self, done: int) -> None:
        best, since, evaluations = self._stall
        if self._stop is None or done == self._session.setup.num_rounds:
            return
        target = self._stop.target
        if target is not None and not self.plan.improves(target, self._best):
            self.over = f"stopped early after round {done}: {self._metric} has reached {target:.6g}"
        elif self._stop.patience is not None and evaluations >= self._stop.patience:
            self.over = (
                f"stopped early after round {done}: {self._metric} has not improved on {best:.6g}, of round "
                f"{since}, for {evaluations} evaluations"
            )
