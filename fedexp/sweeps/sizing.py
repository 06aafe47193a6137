"""How many trials one program should have on this machine, found by trying."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import jax

from fedexp.inspection import cost
from fedexp.session import Session
from fedexp.together import Make, Trial, sessions_of
from fedexp.trainer import Experiment

# Twice as many trials have to make a trial's round shorter by this factor.
_PAYS = 0.95
_MOST = 128


def seconds_of_a_round(session: Session) -> float:
    """How long an average round takes, once all is compiled."""
    examples, runner = cost.load(session).examples.mean(), session.engine.runner
    rounds = cost.rounds(session)
    with contextlib.closing(rounds):
        timing, _ = cost.training(rounds, float(examples), lambda: runner.compilations)
    return timing.later


def seconds_by_count(
    setup: Experiment, make: Make, numbers: Mapping[str, float], most: int
) -> dict[int, float]:
    """Of 1, 2, 4, ... trials together, the time of a round over their number, as long as that gets less.

    Args:
      setup: of the trials.
      make: makes a trial's algorithm.
      numbers: of one of them, which all are given here.
      most: trials that there are.
    """
    found = {1: seconds_of_a_round(Session(setup))}
    count = 2
    while count <= min(most, _MOST):
        try:
            (session,) = sessions_of(setup, make, [Trial(numbers)] * count)
            found[count] = seconds_of_a_round(session) / count
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            break
        if found[count] > _PAYS * found[count // 2]:
            break
        count *= 2
    return found


def best(found: Mapping[int, float]) -> int:
    """The number of trials whose rounds are the shortest."""
    return min(found, key=lambda count: found[count])


def in_words(found: Mapping[int, float]) -> str:
    """What was found, in a line."""
    times = ", ".join(f"{1e3 * seconds:.3g} ms of {count}" for count, seconds in found.items())
    return f"{best(found)} trials in a program; a trial's round takes {times}"
