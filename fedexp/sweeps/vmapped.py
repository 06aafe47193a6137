"""Runs of a sweep in one program, in a process of its own: what `fedexp.main` is to one run.

Its argument is a file that says as JSON: `gin_files` and `gin_params` of all, the `workdir` for their
checkpoints, and `runs`, each with a `workdir` and `gin_params` of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
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
from fedexp.tasks import Task
from fedexp.together import Make, Trial, run_together

_TRAIN = "fedexp.trainer.train"
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
    numbers = _differing(gin_files, gin_params, runs)
    runtime.start()  # With the last one's bindings, before anything asks JAX for its devices.
    with contextlib.ExitStack() as stack:
        for one in runs:
            _load(gin_files, [*gin_params, *one["gin_params"]])
            stack.enter_context(trainer.using(one["workdir"]))
            config.prepare_workdir(one["workdir"])
            stack.enter_context(pulse.told_in(one["workdir"]))
        overrides = [*gin_params, *runs[0]["gin_params"]]
        _load(gin_files, overrides)
        for name in numbers[0]:
            if not is_vmapped(name):
                raise UserError(
                    f"{name} differs, and more than train.algorithm depends on it; {_REMEDY}"
                )
        setup = main.experiment()
        config.check_overrides_used(overrides)
        trials = [
            Trial(of_one, one["workdir"], _observers())
            for of_one, one in zip(numbers, runs, strict=True)
        ]
        outcomes, stopped_by = run_together(setup, _maker(setup.task), trials, workdir)
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
    gin_files: Sequence[str], gin_params: Sequence[str], runs: Sequence[Mapping[str, Any]]
) -> list[dict[str, float]]:
    """Of each run, the numbers by binding that are not the same in all.

    Raises:
      UserError: runs that differ in something else.
    """
    found = []
    for one in runs:
        _load(gin_files, [*gin_params, *one["gin_params"]])
        found.append({bindings.name_of(*key): s.value for key, s in in_force().items()})
    texts = [{name: bindings.text_of(value) for name, value in one.items()} for one in found]
    names = sorted({name for one in texts for name in one})
    differing = [name for name in names if len({one.get(name) for one in texts}) > 1]
    for name in differing:
        for one in found:
            if not _is_number(one.get(name)):
                raise UserError(f"{name} is no number in all of these trials; {_REMEDY}")
    return [{name: one[name] for name in differing} for one in found]


def is_vmapped(name: str) -> bool:
    """Whether a binding in force is a number that nothing but the algorithm depends on."""
    statements = in_force().values()
    own = next(s for s in statements if bindings.name_of(*s.key) == name)
    rest = Reach(s for s in statements if s.key != ("", _TRAIN, "algorithm"))
    return _is_number(own.value) and not rest.reads(own)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _maker(task: Task) -> Make:
    def make(numbers: Mapping[str, Any]) -> Algorithm:
        with gin.unlock_config():
            for name, value in numbers.items():
                gin.bind_parameter(name, value)
        return made(config.evaluate(_TRAIN, "algorithm"), task, "train.algorithm")

    return make


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
