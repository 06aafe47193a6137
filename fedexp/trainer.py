"""Experiments: what is run, and the loop that runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import gin
import jax

from fedexp import algorithms, config, models, profiling, runtime  # noqa: F401  For Gin's names.
from fedexp.checkpointing import CheckpointPlan, Saved, Saver, import_ahead
from fedexp.evaluation import Evaluation
from fedexp.reporting import Observer, Progress, Reports, TensorBoard
from fedexp.session import Round, Session, Setup, row
from fedexp.sole_use import sole_use

PyTree = Any


class TrainResult(NamedTuple):
    """What a run leaves.

    Attributes:
      params: the model's final parameters.
      metrics: the last evaluations, name -> value.
      history: one row per round with evaluations: 'round' and the metrics.
      rounds: finished rounds.
      stopped_by: the signal that stopped the run early, or None.
    """

    params: PyTree
    metrics: dict[str, float]
    history: list[dict[str, float]]
    rounds: int
    stopped_by: int | None


def using(workdir: str | os.PathLike) -> contextlib.AbstractContextManager[None]:
    """Keeps other runs out of a workdir; of several processes the first one does."""
    return sole_use(workdir) if runtime.is_first() else contextlib.nullcontext()


@gin.configurable("train")
@dataclasses.dataclass(frozen=True)
class Experiment(Setup):
    """A federated training run, `train` in a gin file.

    A run that was killed and started again ends like one that was not.

    Attributes:
      dataset: and so on to `seed`: see `Setup`.
      checkpoints: when to save, and what to keep.
      observers: who is told how it goes.
      profile: rounds that TensorBoard's profiler records; none if None.

    Raises:
      UserError: fewer than one round. `run` and `rounds` raise it for input that cannot be trained on, and
        `run` for metrics that are not finite.
    """

    checkpoints: CheckpointPlan = dataclasses.field(default_factory=lambda: CheckpointPlan())
    observers: Sequence[Observer] = dataclasses.field(
        default_factory=lambda: [TensorBoard(), Progress()]
    )
    profile: profiling.ProfilePlan | None = None

    def rounds(self, after: Round | None = None) -> Generator[Round]:
        """Runs rounds for a loop of one's own: no summaries, no checkpoints, evaluations when asked for.

        Args:
          after: a round of this or of a similar experiment, to go on from with its parameters, server
            state and client states; the start if None.

        Yields:
          Every round as soon as it is on its way. A round's `state` may be changed before the next.
        """
        session = after.session if after and after.session.setup is self else Session(self)
        return session.rounds(after or session.first)

    def run(
        self, workdir: str | os.PathLike | None = None, overrides: Sequence[str] = ()
    ) -> TrainResult:
        """Trains to the end, going on from the latest checkpoint in `workdir` if there is one.

        Args:
          workdir: folder for checkpoints, summaries and `final.json`, of this machine or a URL as
            s3://bucket/run; nothing is kept if None.
          overrides: gin bindings that must have had an effect by now.
        """
        if workdir is not None:
            import_ahead()
        if self.profile is not None:
            self.profile.check(self.num_rounds, workdir)
        session = Session(self)
        plan = self._checkpoint_plan(session)
        config.check_overrides_used(overrides)
        session.check_evaluations()
        with contextlib.ExitStack() as stack:
            if workdir is not None:
                stack.enter_context(using(workdir))
            fingerprints = {name: part.fingerprint() for name, part in session.splits.items()}
            saver = Saver(workdir, plan, session.engine.client_states, fingerprints)
            stack.callback(saver.close)
            start = saver.restore(session.first.state) or Saved(0, session.first.state, [], None)
            round_ = Round(session, start.done, start.state)
            history, best = start.history, start.best
            # Of a round that was saved before its evaluations, everything is told anew.
            told = start.done - (start.report is not None)
            reports = Reports(session, self.observers, workdir, told, lambda: saver.latest)
            stack.enter_context(reports)
            stop = stack.enter_context(runtime.stop_signals(reports.say))
            stack.enter_context(runtime.leaving_a_broken_group(saver.way_on))
            rounds = session.rounds(
                round_, lambda: stop() or 0, self._recorder(reports, workdir, start.done)
            )
            stack.enter_context(contextlib.closing(rounds))
            if start.report is not None:
                reports.tell_again(start.report)
            again = [] if start.report is None else [round_]
            stopped_by = None
            for round_ in itertools.chain(again, rounds):
                reports.catch_up()  # With the round before, while this one runs.
                if round_.prepared is not None:
                    reports.expect(round_)
                done = round_.number
                last = done == self.num_rounds
                save = last or bool(plan.every and done % plan.every == 0)
                measured = None
                which = [i for i, e in enumerate(self.evaluations) if last or e.is_due(done)]
                if save and which:  # Evaluations may take long, and fail.
                    reports.catch_up()
                    reports.before_checkpoint(round_)
                    saver.save(Saved(done, round_.state, history, best, reports.last_saved()))
                if which:
                    reports.catch_up()
                    results, measured = self._measure(session, round_, which, last, plan)
                    history.append(reports.evaluated(round_, results))
                    if plan.improves(measured, best):
                        best, save = measured, True
                stopped_by = (stop() if jax.process_count() == 1 else reports.note) or None
                if save or stopped_by:
                    reports.catch_up()
                    reports.before_checkpoint(round_)
                    saver.save(Saved(done, round_.state, history, best), measured)
                if stopped_by:
                    way_on = "the same command goes on from there"
                    if workdir is None:
                        way_on = "nothing is kept without a workdir"
                    reports.say(f"stopped after round {done}; {way_on}")
                    break
            saver.wait()
            if stopped_by is None:
                reports.finish(history)
        metrics = history[-1] if history else {}
        return TrainResult(round_.params, metrics, history, round_.number, stopped_by)

    def _checkpoint_plan(self, session: Session) -> CheckpointPlan:
        validation = [e.name for e in self.evaluations if e.split == "validation"]
        return self.checkpoints.bound_to(session.metric_names(), next(iter(validation), None))

    def _recorder(
        self, reports: Reports, workdir: Any, done: int
    ) -> Callable[[Iterator], Iterator]:
        """Wraps the rounds so that the profiler records those that are planned."""
        plan = self.profile
        if plan is None or not runtime.is_first():
            return lambda rounds: rounds
        return lambda rounds: profiling.recorded(
            rounds, plan, workdir, done=done, wait=reports.catch_up
        )

    def _measure(
        self,
        session: Session,
        round_: Round,
        which: Sequence[int],
        last: bool,
        plan: CheckpointPlan,
    ) -> tuple[dict[str, Evaluation], float | None]:
        """Evaluates; returns the results and the best metric, always of the same clients."""
        results = session.evaluate(round_, which, full=last)
        values = row(results)
        group = str(plan.best_metric).rpartition("/")[0]
        for i in which if last else ():
            evaluation = self.evaluations[i]
            if isinstance(evaluation.clients, int) and evaluation.name == group:
                values |= row(session.evaluate(round_, [i], full=False))
        return results, values.get(str(plan.best_metric))
