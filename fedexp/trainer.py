"""Experiments: what is run, and the loop that runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal as signals
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import gin
import jax
from absl import logging

from fedexp import algorithms, config, models, profiling, runtime, shown, trackers  # noqa: F401  For Gin's names.
from fedexp.checkpointing import CheckpointPlan, Saved, Saver, import_ahead
from fedexp.evaluation import About
from fedexp.privacy import Part
from fedexp.pulse import Pulse
from fedexp.reporting import Observer, Progress, Reports, TensorBoard
from fedexp.session import Round, Session, Setup
from fedexp.sole_use import sole_use
from fedexp.stopping import EarlyStopping, Judge
from fedexp.waiting import saying, saying_first

PyTree = Any


class TrainResult(NamedTuple):
    """What a run leaves.

    Attributes:
      params: the model's final parameters.
      metrics: the last evaluations, name -> value.
      history: one row per round with evaluations: 'round' and the metrics.
      rounds: finished rounds.
      stopped_by: the signal that stopped the run early, or None.
      about: what each of the last evaluations measured.
    """

    params: PyTree
    metrics: dict[str, float]
    history: list[dict[str, float]]
    rounds: int
    stopped_by: int | None
    about: Sequence[About] = ()
    __repr__ = shown.fields


def using(workdir: str | os.PathLike) -> contextlib.AbstractContextManager[None]:
    """Keeps other runs out of a workdir; of several processes the first one does."""
    return sole_use(workdir) if runtime.is_first() else contextlib.nullcontext()


@gin.configurable("train")
@dataclasses.dataclass(frozen=True, repr=False)
class Experiment(Setup):
    """A federated training run, `train` in a gin file.

    A run that was killed and started again ends like one that was not.

    Attributes:
      dataset: and so on to `seed`: see `Setup`.
      checkpoints: when to save, and what to keep.
      observers: who is told how it goes.
      profile: rounds that TensorBoard's profiler records; none if None.
      stop: ends `run` before its last round, once the checkpoints' best metric does not improve any more.

    Raises:
      UserError: fewer than one round. `run` and `rounds` raise it for input that cannot be trained on, and
        `run` for metrics that are not finite.
    """

    checkpoints: CheckpointPlan = dataclasses.field(default_factory=lambda: CheckpointPlan())
    observers: Sequence[Observer] = dataclasses.field(
        default_factory=lambda: [TensorBoard(), Progress()]
    )
    profile: profiling.ProfilePlan | None = None
    stop: EarlyStopping | None = None

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
            s3://bucket/run; nothing is kept if None. Of a run in Python it cannot be told whether its
            checkpoints are of this very experiment, which is said.
          overrides: gin bindings that must have had an effect by now.
        """
        if workdir is not None:
            import_ahead()
        if self.profile is not None:
            self.profile.check(self.num_rounds, workdir)
        session = Session(self)
        judge = Judge(session, self.checkpoints, self.stop)
        config.check_overrides_used(overrides)
        saying("tracing the evaluations")(session.check_evaluations)()
        with contextlib.ExitStack() as stack:
            if workdir is not None:
                stack.enter_context(using(workdir))
            pulse = Pulse(workdir if runtime.is_first() else None, self.num_rounds)
            stack.enter_context(pulse)
            with saying("telling the data from others"):
                fingerprints = {name: part.fingerprint() for name, part in session.splits.items()}
            with saying("opening the checkpoints"):
                saver = Saver(workdir, judge.plan, session.engine.client_states, fingerprints)
                stack.callback(saver.close)
                start = saver.restore(session.first.state) or Saved(
                    0, session.first.state, [], None, totals={}
                )
            config.check_rounds(workdir, start.done, self.num_rounds)
            if start.done and runtime.is_first() and not config.is_recorded(workdir):
                logging.warning(
                    "%s has %d rounds of an experiment in Python, and nothing tells whether it was this one; "
                    "another one needs another workdir",
                    workdir,
                    start.done,
                )
            round_ = Round(session, start.done, start.state)
            history = start.history
            judge.resume(start)
            with saying("preparing the first round"):
                session.open_account(start.done, [Part.restored(part) for part in start.spent])
            # Of a round that was saved before its evaluations, everything is told anew.
            told = start.done - (start.report is not None)
            reports = Reports(
                session,
                self.observers,
                workdir,
                told,
                lambda: saver.latest,
                start.totals,
                pulse,
            )
            stack.enter_context(reports)
            signal = stack.enter_context(runtime.stop_signals(reports.say))
            stack.enter_context(runtime.leaving_a_broken_group(saver.way_on))
            rounds = session.rounds(
                round_, lambda: signal() or 0, self._recorder(reports, workdir, start.done)
            )
            stack.enter_context(contextlib.closing(rounds))
            rounds = saying_first(rounds, "compiling the first round", reports.say)
            at_start = [i for i, e in enumerate(self.evaluations) if e.is_due_at_start]
            if at_start and told == 0:
                with saying("evaluating the initial parameters", reports.say):
                    results = session.evaluate(session.first, at_start, full=False)
                first = reports.evaluated(session.first, results)
                history[:] = [first, *(row for row in history if row["round"])]
            if start.report is not None:
                reports.tell_again(start.report)
            again = [] if start.report is None else [round_]
            stopped_by = None
            for round_ in itertools.chain(again, () if judge.over else rounds):
                reports.catch_up()  # With the round before, while this one runs.
                if round_.prepared is not None:
                    reports.expect(round_)
                done = round_.number
                last = done == self.num_rounds
                save = last or bool(judge.plan.every and done % judge.plan.every == 0)
                measured = None
                which = [i for i, e in enumerate(self.evaluations) if last or e.is_due(done)]
                if save and which:  # Evaluations may take long, and fail.
                    reports.catch_up()
                    reports.before_checkpoint(round_)
                    saver.save(judge.saved(round_, history, reports.totals, reports.last_saved()))
                if which:
                    reports.catch_up()
                    results, measured, improves = judge.measure(round_, which, last)
                    history.append(reports.evaluated(round_, results))
                    save = save or improves or bool(judge.over)
                stopped_by = (signal() if jax.process_count() == 1 else reports.note) or None
                if save or stopped_by:
                    reports.catch_up()
                    reports.before_checkpoint(round_)
                    saver.save(judge.saved(round_, history, reports.totals), measured)
                if stopped_by:
                    way_on = "the same command goes on from there"
                    if workdir is None:
                        way_on = "nothing is kept without a workdir"
                    reports.say(f"stopped after round {done}; {way_on}")
                    pulse.ends("stopped", f"by {signals.Signals(stopped_by).name}")
                elif judge.over:
                    pulse.ends("finished", judge.over)
                if stopped_by or judge.over:
                    break
            saver.wait()
            if stopped_by is None:
                reports.finish(round_, history, judge.over)
        metrics = history[-1] if history else {}
        about = session.about(round_)
        return TrainResult(round_.params, metrics, history, round_.number, stopped_by, about)

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
