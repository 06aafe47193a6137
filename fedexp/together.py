"""Experiments that differ in numbers only, run in one program, each with a workdir of its own."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import signal as signals
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedexp import runtime
from fedexp.algorithms.trials import trials
from fedexp.checkpointing import CheckpointPlan, Saved, Saver, import_ahead
from fedexp.contracts import Algorithm
from fedexp.errors import UserError
from fedexp.pulse import Pulse
from fedexp.reporting import Observer, Reports
from fedexp.session import Round, Session, Setup
from fedexp.trainer import Experiment, using

PyTree = Any
# One trial's numbers by name -> its algorithm; the numbers may be tracers.
Make = Callable[[Mapping[str, Any]], Algorithm]


class Trial(NamedTuple):
    """An experiment among others.

    Attributes:
      numbers: name -> what it has of its own.
      workdir: for its summaries and `final.json`; nothing is kept if None.
      observers: who is told how it goes.
    """

    numbers: Mapping[str, float]
    workdir: str | None = None
    observers: Sequence[Observer] = ()


class Outcome(NamedTuple):
    """How a trial ended.

    Attributes:
      history: one row per round with evaluations.
      params: the model's final parameters.
      error: in one line, why it was given up; None if it was not.
    """

    history: list[dict[str, float]]
    params: PyTree
    error: str | None


def run_together(
    setup: Experiment,
    make: Make,
    planned: Sequence[Trial],
    workdir: str | os.PathLike | None = None,
) -> tuple[list[Outcome], int | None]:
    """Trains trials to the end, vmapped: on the same cohorts, batches and random choices.

    Each has the numbers that it has alone, to float re-association, and in its workdir what a run leaves but
    for checkpoints. Those are in `workdir`, for all trials; the same call goes on from there. A trial that
    diverges is given up, and the others go on.

    Args:
      setup: what they have in common. Its algorithm is not looked at, nor its observers, best checkpoint and
        profile.
      make: makes a trial's algorithm; called again with what a trial has before its summaries begin.
      planned: the trials.
      workdir: for checkpoints; none are kept if None.

    Returns:
      What became of each, and the signal that stopped all of them early, or None.

    Raises:
      UserError: something that each would raise alone, or what cannot be done together: clients' own
        parameters in evaluations, early stopping, privacy.
    """
    check_together(setup)
    if jax.process_count() > 1:
        raise UserError(
            "trials in one program run in one process; give each process trials of its own"
        )
    if workdir is not None:
        import_ahead()
    session = _session(setup, make, planned)
    with contextlib.ExitStack() as stack:
        if workdir is not None:
            stack.enter_context(using(workdir))
        fingerprints = {name: part.fingerprint() for name, part in session.splits.items()}
        # By place, for Gin would give it the best metric that is bound.
        plan = CheckpointPlan(setup.checkpoints.every, setup.checkpoints.keep, None, "max")
        saver = Saver(workdir, plan, session.engine.client_states, fingerprints)
        stack.callback(saver.close)
        start = saver.restore(session.first.state) or Saved(0, session.first.state, [], None)
        round_ = Round(session, start.done, start.state)
        running = []
        for number, trial in enumerate(planned):
            alone = copy.copy(session)
            alone.setup, alone.algorithm = setup, make(trial.numbers)
            one = _Running(alone, trial, number, start, lambda: saver.latest)
            stack.push(one.__exit__)
            running.append(one)
        signal = stack.enter_context(runtime.stop_signals(running[0].reports.say))
        rounds = session.rounds(round_, lambda: signal() or 0)
        stack.enter_context(contextlib.closing(rounds))
        stopped_by = None
        for round_ in rounds:
            _each(running, lambda one: one.reports.catch_up())  # With the round before.
            _each(running, lambda one, round_=round_: one.expect(round_))
            done, last = round_.number, round_.number == setup.num_rounds
            which = [i for i, e in enumerate(setup.evaluations) if last or e.is_due(done)]
            stopped_by = signal() or None
            save = last or stopped_by or bool(plan.every and done % plan.every == 0)
            if which or save:
                _each(running, lambda one: one.reports.catch_up())
            if which:
                _each(running, lambda one, which=which, last=last: one.evaluate(which, last))
                _each(running, lambda one: one.reports.restart_clock())
            if save:
                _each(running, lambda one: one.reports.before_checkpoint(one.round))
                saver.save(_saved(round_, running))
            if stopped_by or all(one.error for one in running):
                break
        saver.wait()
        _each(running, lambda one: one.end(round_, stopped_by))
        return [one.outcome(round_) for one in running], stopped_by


def check_together(setup: Experiment) -> None:
    """Refuses experiments that are for one trial alone.

    Raises:
      UserError: early stopping, or evaluations with clients' own parameters.
    """
    if setup.stop is not None or any(plan.personalise for plan in setup.evaluations):
        raise UserError(
            "trials in one program cannot stop early, or be evaluated with clients' own parameters; run "
            "them one by one"
        )


def _each(running: Sequence[_Running], do: Callable[[_Running], Any]) -> None:
    """Does something with all trials but those that have been given up; a user's error gives one up."""
    for one in running:
        if one.error is None:
            try:
                do(one)
            except UserError as error:
                one.give_up(error)


class _Running:
    """A trial while it runs.

    Args:
      session: what a run of its own would have, but for the engine, which is that of all.
      trial: what it is.
      number: its place among the others.
      start: what all go on from.
      latest: the round of the latest checkpoint.

    Attributes:
      session: the same.
      error: why it was given up.
      history: one row per round with evaluations.
      reports: of its rounds.
      round: the last one.
    """

    def __init__(
        self,
        session: Session,
        trial: Trial,
        number: int,
        start: Saved,
        latest: Callable[[], int | None],
    ):
        self.session, self.number = session, number
        self.error: str | None = None
        rows: list[Any] = start.history  # Of all trials, as `_saved` has them.
        self.history: list[dict[str, float]] = [
            row["row"] for row in rows if row["trial"] == number
        ]
        totals: Any = (start.totals or {}).get(str(number), {})
        self._pulse = Pulse(trial.workdir, session.setup.num_rounds)
        self.reports = Reports(
            session, trial.observers, trial.workdir, start.done, latest, totals, self._pulse
        )
        with contextlib.ExitStack() as stack:
            if trial.workdir is not None:
                stack.enter_context(using(trial.workdir))
            stack.enter_context(self._pulse)
            stack.enter_context(self.reports)
            self._stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def expect(self, round_: Round) -> None:
        """Notes a round that is on its way."""
        self.round = _RoundOfOne(self, round_)
        self.reports.expect(self.round)

    def evaluate(self, which: Sequence[int], last: bool) -> None:
        """Evaluates after the last round that was caught up with."""
        self.reports.restart_clock()  # The others' evaluations come before and after.
        results = self.session.evaluate(self.round, which, full=last)
        self.history.append(self.reports.evaluated(self.round, results))

    def end(self, round_: Round, stopped_by: int | None) -> None:
        """Says how it ended, and writes `final.json` if that was not early.

        Raises:
          UserError: it was given up before the checkpoint that all went on from.
        """
        if stopped_by:
            self._pulse.ends("stopped", f"by {signals.Signals(stopped_by).name}")
            return
        evaluated = self.history[-1]["round"] if self.history else None
        if self.session.evaluations and evaluated != round_.number:
            raise UserError("it diverged before")
        self.reports.finish(_RoundOfOne(self, round_), self.history)

    def give_up(self, error: UserError) -> None:
        """Ends it, while the others go on."""
        self.error = str(error)
        self.__exit__(type(error), error, error.__traceback__)

    def outcome(self, round_: Round) -> Outcome:
        """How it ended."""
        return Outcome(self.history, _RoundOfOne(self, round_).params, self.error)


class _RoundOfOne(Round):
    """A round as one of the trials sees it."""

    def __init__(self, trial: _Running, of_all: Round):
        self.session, self.number = trial.session, of_all.number
        self.prepared, self.waited = of_all.prepared, of_all.waited
        self._of_all, self._trial = of_all, trial.number
        self._output = (None, None, of_all._output[2])

    @property
    def state(self) -> PyTree:  # type: ignore[override]
        return _of(self._trial, self._of_all.state.states)

    @functools.cached_property
    def _fetched(self) -> tuple[Any, Any]:
        ending = f"/{self._trial}"
        return tuple(
            {
                name.removesuffix(ending): value
                for name, value in values.items()
                if name.endswith(ending)
            }
            for values in self._of_all._fetched
        )  # type: ignore[return-value]


@jax.jit
def _of(number: int, states: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[number], states)


def _session(setup: Experiment, make: Make, planned: Sequence[Trial]) -> Session:
    """Of all trials, as one algorithm."""
    values = {
        name: np.array([one.numbers[name] for one in planned], np.float32)
        for name in planned[0].numbers
    }
    in_common = {field.name: getattr(setup, field.name) for field in dataclasses.fields(Setup)}
    session = Session(Setup(**{**in_common, "algorithm": trials(make, values)}))
    session.open_account(0)
    if session.account is not None:
        raise UserError(
            "trials in one program cannot account for privacy; run them one by one, or bind "
            "train.privacy = None"
        )
    for one in session.evaluations:
        one.check(_of(0, session.first.state.states))
    return session


def _saved(round_: Round, running: Sequence[_Running]) -> Saved:
    history = [{"trial": one.number, "row": row} for one in running for row in one.history]
    totals = {str(one.number): one.reports.totals for one in running}
    return Saved(round_.number, round_.state, history, None, totals=totals)  # type: ignore[arg-type]
