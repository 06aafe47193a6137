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

from fedexp import config, runtime
from fedexp.algorithms.trials import trials
from fedexp.checkpointing import CheckpointPlan, Saved, Saver, import_ahead
from fedexp.contracts import Algorithm
from fedexp.engine import auto
from fedexp.engine.placement import for_trials
from fedexp.errors import UserError
from fedexp.pulse import Pulse
from fedexp.reporting import Observer, Reports
from fedexp.seeds import OfSeed, Seeds
from fedexp.session import Round, Session, Setup
from fedexp.trainer import Experiment, using
from fedexp.waiting import saying_first

PyTree = Any
# One trial's numbers by name -> its algorithm; the numbers may be tracers.
Make = Callable[[Mapping[str, Any]], Algorithm]


class Trial(NamedTuple):
    """An experiment among others.

    Attributes:
      numbers: name -> what it has of its own.
      workdir: for its summaries and `final.json`; nothing is kept if None.
      observers: who is told how it goes.
      seed: of the run; that of all if None.
      is_stopped: asked after every round whether it should end, as a pruner may have it.
    """

    numbers: Mapping[str, float]
    workdir: str | None = None
    observers: Sequence[Observer] = ()
    seed: int | None = None
    is_stopped: Callable[[], bool] = lambda: False


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
    bind: Callable[[Trial], None] = lambda trial: None,
) -> tuple[list[Outcome], int | None]:
    """Trains trials to the end, vmapped; those of one seed on the same cohorts, batches and random choices.

    Each has the numbers that it has alone, to float re-association, and in its workdir what a run leaves but
    for checkpoints. Those are in `workdir`, for all trials; the same call goes on from there. A trial that
    diverges is given up, and the others go on. Several devices have a share of the trials each.

    Args:
      setup: what they have in common. Its algorithm is not looked at, nor its observers, best checkpoint and
        profile.
      make: makes a trial's algorithm.
      planned: the trials. If there are several seeds, each with all numbers, one seed after another.
      workdir: for checkpoints; none are kept if None.
      bind: called with each before its summaries begin, for what they say of its bindings.

    Returns:
      What became of each, and the signal that stopped all of them early, or None.

    Raises:
      UserError: something that each would raise alone, or what cannot be done together: clients' own
        parameters in evaluations, early stopping, privacy; with several seeds, states of clients or data
        that do not stay on the devices.
    """
    check_together(setup)
    if jax.process_count() > 1:
        raise UserError(
            "trials in one program run in one process; give each process trials of its own"
        )
    if workdir is not None:
        import_ahead()
    sessions = sessions_of(setup, make, planned)
    seeds, first = Seeds(sessions), sessions[0]
    with contextlib.ExitStack() as stack:
        if workdir is not None:
            stack.enter_context(using(workdir))
        fingerprints = {name: part.fingerprint() for name, part in first.splits.items()}
        # By place, for Gin would give it the best metric that is bound.
        plan = CheckpointPlan(setup.checkpoints.every, setup.checkpoints.keep, None, "max")
        saver = Saver(workdir, plan, first.engine.client_states, fingerprints)
        stack.callback(saver.close)
        state = seeds.first_state()
        start = saver.restore(state) or Saved(0, state, [], None)
        config.check_rounds(workdir, start.done, setup.num_rounds)
        running = []
        for number, trial in enumerate(planned):
            bind(trial)
            place = divmod(number, len(planned) // len(sessions))
            alone = copy.copy(sessions[place[0]])
            alone.setup, alone.algorithm = _of_seed(setup, trial.seed), make(trial.numbers)
            one = _Running(alone, trial, place, start, lambda: saver.latest)
            stack.push(one.__exit__)
            running.append(one)
        signal = stack.enter_context(runtime.stop_signals(running[0].reports.say))
        round_, stopped_by = seeds.start(start.done, start.state), None
        at_start = [i for i, e in enumerate(setup.evaluations) if e.is_due_at_start]
        if at_start and not start.done:
            _each(running, lambda one: one.evaluate_first(round_, at_start))
        rounds = seeds.rounds(start.done, start.state)
        stack.enter_context(contextlib.closing(rounds))
        say = running[0].reports.say
        for round_ in saying_first(rounds, "compiling the first round", say):
            _each(running, lambda one: one.reports.catch_up())  # With the round before.
            _each(running, lambda one: one.stop_if_asked())
            _each(running, lambda one, round_=round_: one.expect(round_))
            done = round_[0].of_all.number
            last = done == setup.num_rounds
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
            if stopped_by or all(one.is_over for one in running):
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
    """Does something with all trials that are not over; a user's error gives one up."""
    for one in running:
        if not one.is_over:
            try:
                do(one)
            except UserError as error:
                one.give_up(error)


class _Running:
    """A trial while it runs.

    Args:
      session: what a run of its own would have, but for the engine, which is that of all.
      trial: what it is.
      place: of its seed, and of its numbers among those of a seed.
      start: what all go on from.
      latest: the round of the latest checkpoint.

    Attributes:
      session: the same.
      place: the same.
      is_over: whether it has ended before the others.
      error: why it was given up.
      history: one row per round with evaluations.
      reports: of its rounds.
      round: the last one.
    """

    def __init__(
        self,
        session: Session,
        trial: Trial,
        place: tuple[int, int],
        start: Saved,
        latest: Callable[[], int | None],
    ):
        self.session, self.place = session, place
        self.is_over, self.error = False, None
        self._is_stopped = trial.is_stopped
        rows: list[Any] = start.history  # Of all trials, as `_saved` has them.
        self.history: list[dict[str, float]] = [
            row["row"] for row in rows if row["trial"] == [*place]
        ]
        totals: Any = (start.totals or {}).get(_key(place), {})
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

    def stop_if_asked(self) -> None:
        """Ends it as a pruner has it, while the others go on."""
        if self._is_stopped():
            self.is_over = True
            self._pulse.ends("stopped", "by its sweep")
            self.__exit__(None, None, None)

    def expect(self, round_: Sequence[OfSeed]) -> None:
        """Notes a round that is on its way."""
        self.round = _RoundOfOne(self, round_)
        self.reports.expect(self.round)

    def evaluate_first(self, round_: Sequence[OfSeed], which: Sequence[int]) -> None:
        """Evaluates before the first round."""
        self.round = _RoundOfOne(self, round_)
        self.evaluate(which, last=False)

    def evaluate(self, which: Sequence[int], last: bool) -> None:
        """Evaluates after the last round that was caught up with."""
        self.reports.restart_clock()  # The others' evaluations come before and after.
        results = self.session.evaluate(self.round, which, full=last)
        self.history.append(self.reports.evaluated(self.round, results))

    def end(self, round_: Sequence[OfSeed], stopped_by: int | None) -> None:
        """Says how it ended, and writes `final.json` if that was not early.

        Raises:
          UserError: it was given up before the checkpoint that all went on from.
        """
        if stopped_by:
            self._pulse.ends("stopped", f"by {signals.Signals(stopped_by).name}")
            return
        evaluated = self.history[-1]["round"] if self.history else None
        if self.session.evaluations and evaluated != round_[0].of_all.number:
            raise UserError("it diverged before")
        self.reports.finish(_RoundOfOne(self, round_), self.history)

    def give_up(self, error: UserError) -> None:
        """Ends it, while the others go on."""
        self.is_over, self.error = True, str(error)
        self.__exit__(type(error), error, error.__traceback__)

    def outcome(self, round_: Sequence[OfSeed]) -> Outcome:
        """How it ended."""
        return Outcome(self.history, _RoundOfOne(self, round_).params, self.error)


class _RoundOfOne(Round):
    """A round as one of the trials sees it."""

    def __init__(self, trial: _Running, round_: Sequence[OfSeed]):
        seed, self._trial = trial.place
        self._of_seed = round_[seed]
        of_all = self._of_seed.of_all
        self.session, self.number = trial.session, of_all.number
        self.prepared, self.waited = self._of_seed.prepared, self._of_seed.waited
        self._output = (None, None, of_all._output[2])

    @property
    def state(self) -> PyTree:  # type: ignore[override]
        of_seed = self._of_seed
        return _of((*of_seed.state, self._trial), of_seed.of_all.state.states)

    @functools.cached_property
    def _fetched(self) -> tuple[Any, Any]:
        ending, place = f"/{self._trial}", self._of_seed.measured
        return tuple(
            {
                name.removesuffix(ending): jax.tree.map(lambda leaf: leaf[place], value)
                for name, value in values.items()
                if name.endswith(ending)
            }
            for values in self._of_seed.of_all._fetched
        )  # type: ignore[return-value]


@jax.jit
def _of(place: tuple[int, ...], states: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[place], states)


def sessions_of(setup: Experiment, make: Make, planned: Sequence[Trial]) -> list[Session]:
    """What `run_together` runs: a session for every seed, each of all trials as one algorithm."""
    seeds = list(dict.fromkeys(trial.seed for trial in planned))
    numbers = [trial.numbers for trial in planned[: len(planned) // len(seeds)]]
    if [(one.seed, one.numbers) for one in planned] != [(s, n) for s in seeds for n in numbers]:
        raise ValueError("trials of several seeds are all numbers with all seeds, seed after seed")
    strategy = setup.strategy or auto()
    devices = [*strategy.placement.mesh.devices.flat][: len(numbers)]
    vmap = jax.vmap
    if strategy.compiled and len(devices) > 1:
        strategy = dataclasses.replace(strategy, placement=for_trials(devices))
        vmap = strategy.placement.over_trials
        numbers += numbers[-1:] * (-len(numbers) % len(devices))
    # Of those that differ in the seed alone, the only number is one that nobody asks for.
    values = {
        name: np.array([one.get(name, 0) for one in numbers], np.float32)
        for name in numbers[0] or ("none",)
    }
    sessions: list[Session] = []
    for seed in seeds:
        own = _of_seed(setup, seed)
        fields = {field.name: getattr(own, field.name) for field in dataclasses.fields(Setup)}
        algorithm = trials(
            lambda of_one: make({n: of_one[n] for n in planned[0].numbers}), values, vmap
        )
        fields |= {"algorithm": algorithm, "strategy": strategy}
        sessions.append(Session(Setup(**fields), *sessions[:1]))
        sessions[-1].open_account(0)
        if sessions[-1].account is not None:
            raise UserError(
                "trials in one program cannot account for privacy; run them one by one, or bind "
                "train.privacy = None"
            )
        for one in sessions[-1].evaluations:
            one.check(_of((0,), sessions[-1].first.state.states))
    return sessions


def _of_seed(setup: Experiment, seed: int | None) -> Experiment:
    """The setup with a seed of its own; not by `replace`, for which Gin would build the rest anew."""
    own = copy.copy(setup)
    if seed is not None:
        object.__setattr__(own, "seed", seed)
    return own


def _key(place: tuple[int, int]) -> str:
    return "/".join(map(str, place))


def _saved(round_: Sequence[OfSeed], running: Sequence[_Running]) -> Saved:
    history = [{"trial": [*one.place], "row": row} for one in running for row in one.history]
    totals = {_key(one.place): one.reports.totals for one in running}
    of_all = round_[0].of_all
    return Saved(of_all.number, of_all.state, history, None, totals=totals)  # type: ignore[arg-type]
