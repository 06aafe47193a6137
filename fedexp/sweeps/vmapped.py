"""Runs of a sweep in one program, in a process of its own: what `fedexp.main` is to one run.

Its argument is a file that says as JSON: `gin_files` and `gin_params` of all, the `workdir` for their
checkpoints, and `runs`, each with a `workdir` and `gin_params` of its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
from absl import logging as absl_logging

from fedexp import bindings, config, main, pulse, runtime, trainer
from fedexp.algorithms.wrapping import made
from fedexp.bindings.reach import Reach
from fedexp.bindings.statements import in_force
from fedexp.contracts import Algorithm
from fedexp.errors import UserError
from fedexp.sweeps.trials import PRUNED
from fedexp.tasks import Task
from fedexp.together import Make, Trial, run_together

_TRAIN = "fedexp.trainer.train"
_SEED = "train.seed"
_REMEDY = "run them one by one, or in programs of their own"


def run(
    gin_files: Sequence[str],
    gin_params: Sequence[str],
    workdir: str,
    runs: Sequence[Mapping[str, Any]],
) -> int:
    """Trains runs that differ in numbers of their algorithm only.

    Returns:
      The exit code: 0, 1 if one was given up, or 128 + the signal that stopped them.

    Raises:
      UserError: a mistake in the bindings, or runs that differ in something else.
    """
    found: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        for one in runs:
            _load(gin_files, [*gin_params, *one["gin_params"]])
            if not found:
                runtime.start()  # With bindings, and before anything asks JAX for its devices.
            found.append({bindings.name_of(*key): s.value for key, s in in_force().items()})
            stack.enter_context(trainer.using(one["workdir"]))
            config.prepare_workdir(one["workdir"])
            stack.enter_context(pulse.told_in(one["workdir"]))
        numbers, seeds = _differing(found)
        for name in numbers[0]:
            if number(name) is None:
                raise UserError(
                    f"{name} differs, and more than train.algorithm depends on it; {_REMEDY}"
                )
        setup = main.experiment()
        config.check_overrides_used([*gin_params, *runs[-1]["gin_params"]])
        trials = [
            Trial(
                of_one,
                one["workdir"],
                _observers(),
                seed,
                functools.partial(os.path.exists, os.path.join(one["workdir"], PRUNED)),
            )
            for of_one, seed, one in zip(numbers, seeds, runs, strict=True)
        ]
        make = maker(setup.task)
        outcomes, stopped_by = run_together(setup, make, trials, workdir, _bind)
    for one, outcome in zip(runs, outcomes, strict=True):
        if outcome.error is not None:
            print(f"error: {one['workdir']}: {outcome.error}", file=sys.stderr)
    if stopped_by is not None:
        return 128 + stopped_by
    return int(any(outcome.error for outcome in outcomes))


def _load(gin_files: Sequence[str], gin_params: Sequence[str]) -> None:
    gin.clear_config()
    config.load(gin_files, gin_params)


def _observers() -> list[Any]:
    """What each run tells, and to whom; a terminal has no place for all of them."""
    built = trainer.Experiment(None).observers  # type: ignore[arg-type]  As in `main.experiment`.
    return [one for one in built if not isinstance(one, trainer.Progress)]


def _differing(
    found: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, float]], list[int | None]]:
    """Of each run's bindings, the numbers by name that are not the same in all; and its seed, or None.

    Raises:
      UserError: runs that differ in something else.
    """
    texts = [{name: bindings.text_of(value) for name, value in one.items()} for one in found]
    names = sorted({name for one in texts for name in one})
    differing = [name for name in names if len({one.get(name) for one in texts}) > 1]
    for name in differing:
        if not all(_is_number(one.get(name)) for one in found):
            raise UserError(f"{name} is no number in all of these trials; {_REMEDY}")
    numbers = [{n: one[n] for n in differing if n != _SEED} for one in found]
    return numbers, [one.get(_SEED) for one in found]


def number(name: str) -> float | None:
    """What is bound, if it is a number that nothing but the algorithm depends on."""
    statements = in_force().values()
    own = next(s for s in statements if bindings.name_of(*s.key) == name)
    rest = Reach(s for s in statements if s.key != ("", _TRAIN, "algorithm"))
    return own.value if _is_number(own.value) and not rest.reads(own) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def maker(task: Task) -> Make:
    """What makes a trial's algorithm of its numbers, as Gin has it bound."""

    def make(numbers: Mapping[str, Any]) -> Algorithm:
        _set(numbers)
        return made(config.evaluate(_TRAIN, "algorithm"), task, "train.algorithm")

    return make


def _bind(trial: Trial) -> None:
    """Has Gin say of a trial what it would say if that ran alone."""
    _set(trial.numbers if trial.seed is None else {**trial.numbers, _SEED: trial.seed})
    config.evaluate(_TRAIN, "algorithm")
    if trial.seed is not None:
        config.evaluate(_TRAIN, "seed")


def _set(numbers: Mapping[str, Any]) -> None:
    with gin.unlock_config():
        for name, value in numbers.items():
            gin.bind_parameter(name, value)


def answer(file: str) -> int:
    """Does what a file says; an error is one line, and exit code 2."""
    logging.getLogger().setLevel(logging.WARNING)
    absl_logging.use_absl_handler()
    try:
        return run(**json.loads(Path(file).read_text()))
    except UserError as error:
        print(f"error: {main.without_gin_frames(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(answer(*sys.argv[1:]))
