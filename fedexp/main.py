"""Runs the experiment that a Gin file describes.

python -m fedexp.main --gin_file=emnist_fedadam.gin --workdir=runs/fedadam --gin_param=train.seed=1

There are also fedexp list, describe, inspect, launch, sweep, status, evaluate, compare and plots, each with
a --help of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags
from absl import logging as absl_logging

if TYPE_CHECKING:
    from fedexp import trainer

_GIN_FILES = flags.DEFINE_multi_string(
    "gin_file",
    [],
    "Gin file of the experiment: a path or URL, or the name of one that fedexp ships.",
)
_GIN_PARAMS = flags.DEFINE_multi_string(
    "gin_param", [], "Gin binding that overrides the files, such as train.seed=1."
)
flags.DEFINE_alias("gin_bindings", "gin_param")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run's results, checkpoints and summaries, also s3:// or gs://; none are kept without.",
)


def main(_: Sequence[str]) -> int:
    """Builds the experiment, trains it, and prints its evaluations."""
    # Gin and JAX have much to say at INFO; what fedexp says goes through absl's own logger.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.INFO)
    # Imported here, so that --help and a mistyped flag answer at once.
    from fedexp.waiting import saying

    with saying("loading JAX"):
        from fedexp import bindings, config, paths, progress, pulse, runtime, trainer
        from fedexp.errors import UserError

    try:
        if not _GIN_FILES.value and not _GIN_PARAMS.value:
            raise UserError(f"--gin_file is missing; fedexp ships {config.shipped_names()}")
        config.load(_GIN_FILES.value, _GIN_PARAMS.value)
        saying("starting JAX")(runtime.start)()
        with contextlib.ExitStack() as stack:
            if _WORKDIR.value:
                stack.enter_context(trainer.using(_WORKDIR.value))
                config.prepare_workdir(_WORKDIR.value, write=runtime.is_first())
                stack.enter_context(pulse.told_in(_WORKDIR.value if runtime.is_first() else None))
            result = experiment().run(_WORKDIR.value, overrides=_GIN_PARAMS.value)
    except UserError as error:
        runtime.exit_process(f"error: {without_gin_frames(str(error))}", code=2)
    except Exception as error:
        if called := bindings.caller_of(error):
            error.add_note(called)
        raise
    if runtime.is_first():
        for line in bindings.had_no_effect():
            absl_logging.warning("gin: %s", line)
        about = [one._asdict() for one in result.about]
        groups = [one.name for one in result.about]
        progress.print_table([progress.without_parts(row, groups) for row in result.history])
        if result.stopped_by is None:
            progress.print_evaluations(result.rounds, about, result.metrics)
        if _WORKDIR.value and paths.is_remote(_WORKDIR.value):
            print(f"results are in {_WORKDIR.value}")
        elif _WORKDIR.value:
            print(f"{_tensorboard()} --logdir {_WORKDIR.value}")
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def experiment() -> trainer.Experiment:
    """The experiment that is bound. Its data come last: mistakes elsewhere are told before these are made.

    Raises:
      UserError: a mistake in the bindings.
    """
    from fedexp import bindings, config, trainer
    from fedexp.waiting import saying

    bindings.check_required()
    rest = trainer.Experiment(None)  # type: ignore[arg-type]  # By place: Gin would build one of its name.
    bindings.check_fields(rest, but="dataset")
    for make in (rest.algorithm, *(plan.personalise for plan in rest.evaluations)):
        if callable(make):
            make(rest.task)
    bindings.check_read(built=False)
    # Not by `replace`, for which Gin would build all the rest anew.
    with saying("reading the data"):
        dataset = config.evaluate("fedexp.trainer.train", "dataset")
    object.__setattr__(rest, "dataset", dataset)
    bindings.check_fields(rest)
    return rest


def read_flags(arguments: Sequence[str]) -> Sequence[str]:
    """Reads the command line; a mistake in it is one line, and exit code 2."""
    try:
        rest = flags.FLAGS(arguments)
    except flags.Error as error:
        sys.exit(_refused(" ".join(str(error).split())))
    if rest[1:]:
        sys.exit(
            _refused(f"unexpected argument {rest[1]!r}; bindings are given as --gin_param=...")
        )
    return rest


def _refused(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


def leave(*_: object) -> NoReturn:
    """Ends after Ctrl-C in one line; what is on the disk is whole at any moment."""
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


def _tensorboard() -> str:
    """The command as the user's shell finds it, also where no virtual environment is active."""
    if shutil.which("tensorboard"):
        return "tensorboard"
    return os.path.relpath(os.path.join(os.path.dirname(sys.executable), "tensorboard"))


def without_gin_frames(message: str) -> str:
    """Takes off the lines in which Gin says what it was calling."""
    lines = message.splitlines()
    return "\n".join(line for line in lines if not line.startswith("  In call to configurable"))


if __name__ == "__main__":
    # No KeyboardInterrupt: a callback, as of the garbage collector, would swallow it.
    signal.signal(signal.SIGINT, leave)
    try:
        app.run(main, flags_parser=read_flags)
    except KeyboardInterrupt:  # From a second one during training, once all is flushed.
        leave()
