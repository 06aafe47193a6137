"""Whether a sweep's trials can be: told in a process of its own, before the first of them is run.

Its devices are free again when it ends. It knows nothing of sweeps but bindings, so that their Gin names and
those of experiments do not meet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fedexp import children
from fedexp.errors import UserError

# Numbers of an evaluation's row that no evaluation gives by itself.
_OTHERS = ("privacy/", "traffic/", "simulated/")


class Told(NamedTuple):
    """What a check has found.

    Attributes:
      experiment: the experiment's bindings as text, without those of axes.
      observers: its `train.observers` with JSON lines among them, if they have to be added.
      lines: the file's name that these have.
      apart: bindings of points by which trials cannot be in one program, if that was asked.
      most: trials that one program should have.
      said: about that, in a line; empty if there is nothing to say.
    """

    experiment: str
    observers: str | None
    lines: str
    apart: Sequence[str] = ()
    most: int = 1
    said: str = ""


def ask(
    gin_files: Sequence[str],
    gin_params: Sequence[str],
    points: Sequence[Mapping[str, str]],
    metric: str,
    prunes: bool,
    build: bool,
    most: int | Literal["auto"] = 1,
) -> Told:
    """Checks trials in another process.

    Args:
      gin_files: of the experiment.
      gin_params: of the experiment.
      points: bindings of each trial. All are read; the first one's experiment is built, too.
      metric: that its evaluations must give.
      prunes: whether they must give it before the end.
      build: False only reads.
      most: trials of one program; 'auto' tries how many pay here.

    Raises:
      UserError: what `fedexp.main` would say of a trial, in one line, or what else makes one impossible.
    """
    asked = {
        "gin_files": gin_files,
        "gin_params": gin_params,
        "points": [[f"{name} = {value}" for name, value in p.items()] for p in points],
        "metric": metric,
        "prunes": prunes,
        "build": build,
        "most": most,
    }
    done = subprocess.run(
        children.settled([sys.executable, "-m", "fedexp.sweeps.checking"]),
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    lines = done.stderr.strip().splitlines()
    if done.returncode == 2 and any(line.startswith("error: ") for line in lines):
        first = next(i for i, line in enumerate(lines) if line.startswith("error: "))
        raise UserError("\n".join(lines[first:]).removeprefix("error: "))
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        raise UserError("the first trial cannot be built; the lines above say why")
    return Told(**json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Answers on stdout what is asked on stdin."""
    try:
        print(json.dumps(_check(**json.load(sys.stdin))._asdict()))
    except UserError as error:
        from fedexp.main import without_gin_frames

        print(f"error: {without_gin_frames(str(error))}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _check(
    gin_files: Sequence[str],
    gin_params: Sequence[str],
    points: Sequence[Sequence[str]],
    metric: str,
    prunes: bool,
    build: bool,
    most: int | Literal["auto"],
) -> Told:
    import gin

    # What registers names comes before what reads them.
    from fedexp import bindings, config, main, runtime, session, trainer  # noqa: F401
    from fedexp.seeds import check_seeds
    from fedexp.sweeps import sizing, vmapped
    from fedexp.together import check_together

    config.load(gin_files, gin_params)
    text, observers = config.as_text(), None
    if prunes:
        observers = _with_lines()
    lines = config.bindings().get("json_lines.name", "'rounds.jsonl'").strip("'\"")
    names = [binding.split(" = ", 1)[0] for binding in points[0]]
    for point in reversed(points):
        gin.clear_config()
        overrides = [*gin_params, *point]
        config.load(gin_files, overrides)
        bindings.check_required()
    if build:
        runtime.start()
        built = session.Session(experiment := main.experiment())
        config.check_overrides_used(overrides)
        built.check_evaluations()
        _check_metric(built, metric, prunes)
    if most == 1:
        return Told(text, observers, lines)
    numbers = {name: value for name in names if (value := vmapped.number(name)) is not None}
    apart, found = [name for name in names if name not in (*numbers, "train.seed")], {}
    if build:
        check_together(experiment)
        try:
            check_seeds(built)
        except UserError:
            apart.append("train.seed")
        if most == "auto":
            make = vmapped.maker(experiment.task)
            found = sizing.seconds_by_count(experiment, make, numbers, len(points))
    if found:
        return Told(text, observers, lines, apart, sizing.best(found), sizing.in_words(found))
    return Told(text, observers, lines, apart, 2 if most == "auto" else most)


def _with_lines() -> str | None:
    """`train.observers` with JSON lines, unless they are there.

    Raises:
      UserError: it is no list.
    """
    from gin import config as gin_config

    from fedexp import bindings
    from fedexp.bindings.statements import references_in

    bound = gin_config._CONFIG.get(("", "fedexp.trainer.train"), {}).get("observers")
    names = {r.configurable.name for r in references_in(bound)} if bound else set()
    if "json_lines" in names:
        return None
    if bound is None:
        return "[@tensorboard(), @progress(), @json_lines()]"
    if not isinstance(bound, list | tuple):
        raise UserError(
            "a study's pruner reads @json_lines(); bind train.observers to a list with it in it"
        )
    return bindings.text_of([*bound, gin_config.ConfigurableReference("json_lines", True)])


def _check_metric(session: Any, metric: str, prunes: bool) -> None:
    """Refuses a metric that trials do not give, or give too late to stop one."""
    from fedexp.bindings import near

    plans = session.setup.evaluations
    by_plan = {
        f"{plan.name}/{name}": plan
        for plan in plans
        for name in plan.metric_names(session.setup.task)
    }
    trained = [f"train/{name.removeprefix(f'{plan.name}/')}" for name, plan in by_plan.items()]
    report = session.algorithm.report
    said = report(session.first.state, 0) if report else {}
    if metric not in (*by_plan, *trained, *said) and not metric.startswith(_OTHERS):
        known = ", ".join(by_plan)
        raise UserError(
            f"sweep.metric = {metric!r}: no evaluation gives it.{near(metric, by_plan)} There are {known}"
        )
    which = [by_plan[metric]] if metric in by_plan else plans
    rounds = session.setup.num_rounds
    if prunes and not any(plan.every and plan.every < rounds for plan in which):
        raise UserError(
            f"study.pruner needs {metric!r} before a trial's last round, {rounds}; lower evaluate.every"
        )


if __name__ == "__main__":
    sys.exit(main())
