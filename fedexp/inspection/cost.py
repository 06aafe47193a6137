"""What an experiment costs on this machine: its rounds by number, memory and time."""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedexp.contracts import TRAIN
from fedexp.session import Round, Session

Clock = Callable[[], float]

_COHORTS = 20
# Seconds: a measurement lasts as long at least, and no more is measured after so many.
_SHORT, _LONG = 0.25, 10.0
_MEASUREMENTS = 3


class Load(NamedTuple):
    """What sampled rounds are like: (rounds,) arrays.

    Attributes:
      clients: of each.
      steps: that all of its clients take in local training.
      examples: that it goes through, all passes counted.
      computed: the same with padding.
    """

    clients: np.ndarray
    steps: np.ndarray
    examples: np.ndarray
    computed: np.ndarray

    @property
    def padding(self) -> float:
        """The part of the computed examples that is padding."""
        return float(1 - self.examples.sum() / max(self.computed.sum(), 1))


class Memory(NamedTuple):
    """Bytes that XLA plans for a round on each device.

    Attributes:
      arguments: what the program is given.
      examples: of these, the examples: a whole split that stays there, or the cohort's.
      temporaries: what it needs while it runs.
      results: what it leaves that does not take an argument's place.
    """

    arguments: int
    examples: int
    temporaries: int
    results: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.results


class Timing(NamedTuple):
    """How long something takes.

    Attributes:
      first: seconds, the first time, compiling included.
      later: seconds, from then on.
    """

    first: float
    later: float

    @property
    def once(self) -> float:
        """What only the first time costs."""
        return max(self.first - self.later, 0.0)


class Evaluating(NamedTuple):
    """What an evaluation costs.

    Attributes:
      name: of the evaluation.
      every: rounds between two of them; 0 if there is but the last.
      on_the_way: how long one of them takes.
      last: the same of the one after the last round, of all clients.
      is_measured: whether the last one was, or follows from the number of its clients.
      at_start: whether one comes before the first round.
    """

    name: str
    every: int
    on_the_way: Timing
    last: Timing
    is_measured: bool
    at_start: bool = False


class Expected(NamedTuple):
    """Seconds of a whole experiment.

    Attributes:
      start: before the first round, and what is compiled on the way.
      rounds: all of them.
      evaluations: all of them.
    """

    start: float
    rounds: float
    evaluations: float

    @property
    def total(self) -> float:
        return sum(self)


def load(session: Session) -> Load:
    """Prepares the first 20 rounds, or as many as there are, on the host."""
    found = []
    for number in range(min(_COHORTS, session.setup.num_rounds)):
        prepared = session.engine.prepare(number, session.sample(number))
        steps = prepared.by_device.unpack().passes[TRAIN].num_steps
        computed = (
            round(prepared.num_examples / prepared.utilisation) if prepared.num_examples else 0
        )
        found.append((len(prepared.clients), int(steps.sum()), prepared.num_examples, computed))
    return Load(*np.array(found).T)


def rounds(session: Session) -> Generator[Round]:
    """The session's rounds, without an end."""
    session.open_account(0)
    state = session.first.state
    for prepared, waited in session.prepared(range(sys.maxsize)):
        output, noted = session.engine.runner.run(state, prepared)
        state, reported = output.state, (output.metrics, output.per_client, noted)
        yield Round(session, prepared.round + 1, state, prepared, reported, waited)


def training(
    rounds: Iterator[Round],
    examples: float,
    compilations: Callable[[], int],
    clock: Clock = time.perf_counter,
) -> tuple[Timing, Round]:
    """Runs rounds to see how long one takes: the median of three measurements that compile nothing.

    Each is of as many rounds as take a quarter of a second. Rounds of many seconds are measured once.

    Args:
      rounds: without an end.
      examples: of a round, on average; measured rounds may have more or fewer.
      compilations: how many programs they have had compiled so far.
      clock: says the time in seconds.

    Returns:
      How long a round takes, and the last one that was run.
    """

    def run(count: int) -> tuple[float, float, Round]:
        """By the clock, of an average round, and the last one."""
        begin, ran = clock(), list(itertools.islice(rounds, count))
        ran[-1].metrics  # noqa: B018  Waits for it.
        taken = clock() - begin
        seen = sum(round_.prepared.num_examples for round_ in ran if round_.prepared)
        return taken, taken * examples / max(seen, 1), ran[-1]

    first, *_ = run(1)
    count, spent, each = 1, 0.0, []
    while True:
        before = compilations()
        taken, of_one, last = run(count)
        spent += taken
        if taken >= _SHORT and compilations() == before:
            each.append(of_one)
        if len(each) == _MEASUREMENTS or spent > _LONG:
            return Timing(first, statistics.median(each or [of_one])), last
        if taken < _SHORT:
            count = math.ceil(1.1 * count * _SHORT / taken)


def evaluating(
    session: Session, round_: Round, clock: Clock = time.perf_counter
) -> list[Evaluating]:
    """Measures the session's evaluations: those on the way, and the last one unless that took very long."""

    def measured(number: int, full: bool) -> tuple[Timing, int]:
        seconds = []
        while len(seconds) < 2 and sum(seconds) < _LONG:
            begin = clock()
            (result,) = session.evaluate(round_, [number], full).values()
            seconds.append(clock() - begin)
        return Timing(seconds[0], seconds[-1]), len(result.per_client["loss"])

    found = []
    for number, about in enumerate(session.about(round_)):
        way, clients = measured(number, full=False)
        seconds = way.later * about.num_clients / clients
        last, is_measured = Timing(seconds, seconds), about.num_clients == clients
        if not is_measured and seconds <= _LONG:
            (last, _), is_measured = measured(number, full=True), True
        plan = session.setup.evaluations[number]
        found.append(
            Evaluating(about.name, plan.every, way, last, is_measured, plan.is_due_at_start)
        )
    return found


def expected(
    num_rounds: int, built: float, training: Timing, evaluations: Sequence[Evaluating]
) -> Expected:
    """How long an experiment takes: what it does once, its rounds, and its evaluations.

    Args:
      num_rounds: of the experiment.
      built: seconds until its first round could begin.
      training: of a round.
      evaluations: what they cost.
    """
    once = training.once + sum(one.on_the_way.once + one.last.once for one in evaluations)
    of_evaluations = 0.0
    for one in evaluations:
        on_the_way = one.at_start + ((num_rounds - 1) // one.every if one.every else 0)
        of_evaluations += on_the_way * one.on_the_way.later + one.last.later
    return Expected(built + once, num_rounds * training.later, of_evaluations)


def memory(session: Session, round_: Round) -> Memory | None:
    """What XLA plans for a round like one that was run; None where it plans none, or does not tell."""
    if not session.engine.strategy.compiled or round_.prepared is None:
        return None
    plan = session.engine.runner.compiled(round_.state, round_.prepared).memory_analysis()
    if plan is None:
        return None
    examples = sum(array.nbytes for array in jax.tree.leaves(round_.prepared.examples))
    return Memory(
        arguments=plan.argument_size_in_bytes,
        examples=examples // session.engine.placement.num_devices,
        temporaries=plan.temp_size_in_bytes,
        results=plan.output_size_in_bytes - plan.alias_size_in_bytes,
    )


def peak_bytes() -> dict[str, int]:
    """The most memory that was in use so far: of this process, and of a device that keeps count."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"this process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        found[device.device_kind] = stats["peak_bytes_in_use"]
    return found
