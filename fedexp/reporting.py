"""What a run tells while it goes, and to whom: observers, chosen by binding `train.observers`."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np

from fedexp import config, environment, hyperparameters, paths, progress, runtime
from fedexp.data import SECONDS
from fedexp.errors import UserError
from fedexp.evaluation import Evaluation
from fedexp.pulse import Pulse
from fedexp.session import Round, Session, row
from fedexp.summaries import Writer, confusion_image, image_grid
from fedexp.waiting import saying

PyTree = Any
_NOBODY = contextlib.nullcontext()


class RoundReport(NamedTuple):
    """A round that is done.

    Attributes:
      number: finished rounds.
      metrics: name -> number.
      arrays: name -> array of the round.
      per_client: name -> (cohort size,) number of each client, NaN where it has none.
      perf: 'perf/<name>' -> number, how long it took and the like.
    """

    number: int
    metrics: dict[str, float]
    arrays: dict[str, np.ndarray]
    per_client: dict[str, np.ndarray]
    perf: dict[str, float]

    def saved(self) -> dict[str, Any]:
        """What JSON can hold of it, bit for bit."""
        arrays = {name: _as_text(getattr(self, name)) for name in ("arrays", "per_client")}
        return {**self._asdict(), **arrays}

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> RoundReport:
        """The report that has been `saved`."""
        arrays = {name: _as_arrays(saved[name]) for name in ("arrays", "per_client")}
        return cls(**{**saved, **arrays})


def _as_text(arrays: dict[str, np.ndarray]) -> str:
    file = io.BytesIO()
    np.savez(file, *arrays.values())
    return json.dumps([list(arrays), base64.b64encode(file.getvalue()).decode()])


def _as_arrays(text: str) -> dict[str, np.ndarray]:
    names, encoded = json.loads(text)
    arrays = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    return {name: arrays[f"arr_{i}"] for i, name in enumerate(names)}


class EvaluationReport(NamedTuple):
    """The evaluations after a round.

    Attributes:
      number: finished rounds.
      row: the round, its training metrics and all results: what the history keeps.
      results: group -> result.
      last_round: the report of the round.
      seconds: that they took.
    """

    number: int
    row: dict[str, float]
    results: dict[str, Evaluation]
    last_round: RoundReport | None
    seconds: float


class Observer:
    """Someone who is told how a run goes. Every method may be left as it is, which does nothing.

    Of several processes, only the first one has observers. One object may observe several runs, one after
    another: what it needs for one it makes in `begin`.
    """

    def begin(self, session: Session, workdir: str | os.PathLike | None, done: int) -> None:
        """A run begins, or goes on after `done` rounds; everything is built.

        Where `done` is 0, all is told that there is, a first evaluation of round 0 among it.
        """

    def say(self, message: str) -> None:
        """Something in words."""

    def round(self, report: RoundReport) -> None:
        """A round is done."""

    def evaluation(self, report: EvaluationReport) -> None:
        """Evaluations are done."""

    def flush(self) -> None:
        """A checkpoint is about to be made: nothing that was told may be lost from here on."""

    def close(self) -> None:
        """The run ends, in whatever way."""


# What a run leaves in its workdir once it is over.
FINAL = "final.json"

# Metric of a round -> the name of its sum over all rounds so far.
TOTALS = {f"traffic/bits_{way}": f"traffic/total_bits_{way}" for way in ("up", "down")}

# Of the group `training`, what the page Custom Scalars shows.
_FIRST_OF_TRAINING = ("update_norm", "perf/round_seconds", "perf/utilisation")
# TensorBoard's runs, sub-folders of the workdir, besides one for every evaluation and the workdir itself.
_TRAIN, _P10, _P90 = "train", "p10", "p90"
_SIMULATED = "simulated"
_TAKEN = (_TRAIN, _P10, _P90, _SIMULATED, "checkpoints", "plugins")


@gin.configurable("tensorboard")
class TensorBoard(Observer):
    """Summaries for TensorBoard in the workdir; nothing without one.

    What is measured on examples is a group of charts by its name, with training and every evaluation in one
    chart, as runs. All else is in the group `training`, which comes after them. With a simulated clock there
    are runs besides whose steps are its seconds: docs/tensorboard.md.
    """

    def __init__(self) -> None:
        self._writer: Writer | None = None

    def begin(self, session: Session, workdir: str | os.PathLike | None, done: int) -> None:
        if workdir is None:
            return
        groups = [plan.name for plan in session.setup.evaluations]
        for group in groups:
            parts = group.split("/")
            if parts[0] in _TAKEN or not all(part.strip(".") for part in parts):
                raise UserError(
                    f"evaluate.prefix = {group!r} cannot be a run's name in TensorBoard: it must be the name "
                    f"of a folder, and none of {', '.join(_TAKEN)}"
                )
        self._task = task = session.setup.task
        self._measured = {"loss", *task.metrics, *task.derived}
        self._measured.update(*session.metric_names().values())
        first_step = done + 1 if done else 0
        resume_at = dict.fromkeys(("", _TRAIN, *groups, _P10, _P90), first_step)
        seconds = session.sample(max(done - 1, 0)).infos.get(SECONDS)
        if seconds is not None:
            after = int(seconds) + 1 if done else 0
            resume_at |= {f"{_SIMULATED}/{group}": after for group in (_TRAIN, *groups)}
        self._writer = writer = Writer(os.fspath(workdir), runs=[*resume_at], resume_at=resume_at)
        writer.text(0, "config/operative", gin.markdown(gin.operative_config_str()))
        images = task.images and task.images(session.splits["train"].slice(0, 64))
        if images is not None:
            writer.image(0, "training/example_images", image_grid(images))
        setup = session.setup
        found = hyperparameters.of_run(setup.num_rounds, setup.seed, setup.batching)
        for group in groups or [_TRAIN]:
            writer.hyperparameters({**found, "evaluation": group}, group)
        writer.layout(self._layout([*groups, _TRAIN], seconds is not None))

    def round(self, report: RoundReport) -> None:
        if self._writer is None:
            return
        measured, others = {}, {self._tag(name): value for name, value in report.perf.items()}
        for name, value in report.metrics.items():
            tag = self._tag(name)
            (measured if tag in self._measured else others)[tag] = value
        self._writer.scalars(report.number, others)
        self._write_of_clients(report.number, _TRAIN, report.per_client, measured)
        self._write_simulated(report.metrics, _TRAIN, measured)

    def evaluation(self, report: EvaluationReport) -> None:
        if self._writer is None:
            return
        of_groups = row(report.results)
        others = {
            self._tag(name): value
            for name, value in report.row.items()
            if not _is_of_round(name) and name not in of_groups
        }
        others[self._tag("perf/evaluation_seconds")] = report.seconds
        self._writer.scalars(report.number, others)
        for group, result in report.results.items():
            self._write_of_clients(report.number, group, result.per_client, result.metrics)
            self._write_simulated(report.row, group, result.metrics)
            self._write_histograms(report.number, group, result.per_client)
            if result.confusion is not None:
                names = self._task.class_names or [str(i) for i in range(len(result.confusion))]
                image = confusion_image(result.confusion, names)
                self._writer.image(report.number, f"{group}/confusion", image, group)
        if report.last_round is not None:
            self._write_histograms(report.number, _TRAIN, report.last_round.per_client)
            for name, values in report.last_round.arrays.items():
                self._writer.histogram(report.number, self._tag(name), values)

    def flush(self) -> None:
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def _tag(self, name: str, group: str | None = None) -> str:
        """A metric's tag in TensorBoard; that of its values on the clients of a group, if there is one."""
        tag = name.removeprefix("train/").removeprefix("clients/")
        tag = tag if tag in self._measured else f"training/{tag}"
        return f"{tag}/{group}_clients" if group else tag

    def _layout(self, groups: Sequence[str], simulated: bool) -> dict[str, dict[str, list[str]]]:
        """What the page Custom Scalars shows, the most important first: category -> chart -> tags."""
        names = [*self._task.metrics, *self._task.derived, "loss"]
        clients = {n: [f"{n}/{group}_clients" for group in groups] for n in names}
        clock = {n: [f"{n}/simulated_seconds"] for n in names}
        return {
            "over examples": {n: [n] for n in names},
            **({"against simulated seconds": clock} if simulated else {}),
            "over clients: mean, p10, p90": clients,
            "training": {n: [f"training/{n}"] for n in _FIRST_OF_TRAINING},
        }

    def _write_of_clients(
        self,
        done: int,
        group: str,
        per_client: Mapping[str, np.ndarray],
        metrics: Mapping[str, float],
    ) -> None:
        """Writes a group's metrics, and their mean and percentiles over clients."""
        assert self._writer is not None
        values = {group: dict(metrics), _P10: {}, _P90: {}}
        for name, of_clients in per_client.items():
            if spread := _spread(of_clients):
                for scalars, value in zip(values.values(), spread, strict=True):
                    scalars[self._tag(name, group)] = value
        for run, scalars in values.items():
            if scalars:
                self._writer.scalars(done, scalars, run)

    def _write_simulated(
        self, infos: Mapping[str, float], group: str, metrics: Mapping[str, float]
    ) -> None:
        """Writes a group's metrics against the simulated clock, if there is one."""
        if SECONDS in infos:
            assert self._writer is not None
            scalars = {f"{name}/simulated_seconds": value for name, value in metrics.items()}
            self._writer.scalars(int(infos[SECONDS]), scalars, f"{_SIMULATED}/{group}")

    def _write_histograms(
        self, done: int, group: str, per_client: Mapping[str, np.ndarray]
    ) -> None:
        assert self._writer is not None
        for name, values in per_client.items():
            self._writer.histogram(done, f"{self._tag(name, group)}/histogram", values, group)


@gin.configurable("progress")
class Progress(Observer):
    """A bar and lines on stderr: a bar in a terminal, lines alone elsewhere."""

    def begin(self, session: Session, workdir: str | os.PathLike | None, done: int) -> None:
        self._groups = [plan.name for plan in session.setup.evaluations]
        self._terminal = progress.Reporter(session.setup.num_rounds)
        self._terminal.start()
        if done == session.setup.num_rounds:
            self.say(f"all {done} rounds are done already, in {workdir}")
        elif done:
            self.say(f"going on after round {done}, from {workdir}")
        size = sum(leaf.size for leaf in jax.tree.leaves(session.params))
        self.say(
            f"{size:,} parameters; "
            + "; ".join(
                f"{name}: {part.num_clients:,} clients, {part.num_examples:,} examples"
                for name, part in session.splits.items()
            )
        )

    def say(self, message: str) -> None:
        self._terminal.say(message)

    def round(self, report: RoundReport) -> None:
        seconds = report.perf["perf/round_seconds"]
        self._terminal.round(report.number, {**report.metrics, "s/round": seconds})

    def evaluation(self, report: EvaluationReport) -> None:
        whole = progress.without_parts(report.row, self._groups)
        shown = progress.without_traffic(whole)
        numbers = {name: value for name, value in shown.items() if name != "round"}
        self._terminal.evaluation(report.number, numbers)

    def close(self) -> None:
        self._terminal.stop()


@gin.configurable("json_lines")
class JsonLines(Observer):
    """One JSON object a line in the workdir, a round each and its evaluations, for pandas and the like.

    After a resume the lines of rounds that are run again are dropped. A workdir in a bucket has none,
    because buckets cannot append.

    Args:
      name: of the file.
    """

    def __init__(self, name: str = "rounds.jsonl"):
        self._name = name
        self._file = None

    def begin(self, session: Session, workdir: str | os.PathLike | None, done: int) -> None:
        if workdir is None or paths.is_remote(workdir):
            return
        path = os.path.join(workdir, self._name)
        kept = []
        if done and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["round"] <= done]
        paths.write(path, "".join(kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  Closed by `close`.

    def round(self, report: RoundReport) -> None:
        self._write({"round": report.number, **report.metrics, **report.perf})

    def evaluation(self, report: EvaluationReport) -> None:
        self._write({**report.row, "perf/evaluation_seconds": report.seconds})

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _write(self, values: Mapping[str, float]) -> None:
        if self._file:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()


class Reports:
    """Follows a run's rounds, refuses numbers that are not finite, times everything, and tells observers.

    Attributes:
      note: the highest `Round.note` so far.
      totals: name -> sum over all rounds so far, those before a resume included; None if they are not known.
    """

    def __init__(
        self,
        session: Session,
        observers: Sequence[Observer],
        workdir: str | os.PathLike | None,
        done: int,
        latest_checkpoint: Callable[[], int | None] = lambda: None,
        totals: Mapping[str, float] | None = None,
        pulse: Pulse | None = None,
    ):
        self.note = 0
        self._pulse = pulse or Pulse(None, session.setup.num_rounds)
        self.totals = None if totals is None else dict(totals)
        self._session = session
        self._workdir = workdir
        self._done = done
        self._latest_checkpoint = latest_checkpoint
        self._observers = observers if runtime.is_first() else ()
        self._expected: Round | None = None
        self._last: RoundReport | None = None
        self._round_seconds: list[float] = []
        self._evaluation_seconds: list[float] = []
        self._utilisation: list[float] = []

    def __enter__(self) -> Reports:
        self._pulse.begin(self._done)
        with contextlib.ExitStack() as stack:
            for observer in self._observers:
                stack.callback(observer.close)
                observer.begin(self._session, self._workdir, self._done)
            self._closing = stack.pop_all()
        if self._workdir is not None and runtime.is_first():
            environment.note(self._workdir)
            operative = os.path.join(self._workdir, config.OPERATIVE)
            _write(operative, gin.operative_config_str())
        if self._session.account:
            self.say(self._session.account.saying(self._session.setup.num_rounds))
        self._started = self._clock = time.perf_counter()
        return self

    def __exit__(self, *exc_info) -> None:
        self._closing.close()

    def say(self, message: str) -> None:
        """Tells the observers in words."""
        for observer in self._observers:
            observer.say(message)

    def last_saved(self) -> dict[str, Any]:
        """The report of the last round that has been caught up with, for a checkpoint."""
        assert self._last is not None
        return self._last.saved()

    def expect(self, round_: Round) -> None:
        """Notes a round that is on its way; with the first one, a run of fewer rounds is no longer over."""
        if self._workdir is not None and runtime.is_first() and not self._round_seconds:
            _delete(os.path.join(self._workdir, FINAL))
        self._expected = round_

    def tell_again(self, saved: Mapping[str, Any]) -> None:
        """Tells of a round that was done before, but not evaluated."""
        self._last = RoundReport.restored(saved)
        for observer in self._observers:
            observer.round(self._last)

    def catch_up(self) -> None:
        """Waits for the round on its way, if there is one, and reports it.

        Raises:
          UserError: one of its metrics is not finite.
        """
        round_, self._expected = self._expected, None
        if round_ is None:
            return
        is_first = not self._round_seconds
        with saying("running the first round", self.say) if is_first else _NOBODY:
            self.note = max(self.note, round_.note)
            metrics, per_client = round_.metrics, round_.per_client
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if not round_.is_finite():
            for name, value in round_.measured().items():
                _check_finite(round_.number, name, value, self._kept())
        if self.totals is not None:
            for name in TOTALS.keys() & metrics.keys():
                before = self.totals.get(TOTALS[name], 0.0)
                self.totals[TOTALS[name]] = before + float(metrics[name])
        self._round_seconds.append(seconds)
        prepared = round_.prepared
        assert prepared is not None  # Only rounds that have been sent are expected.
        self._utilisation.append(prepared.utilisation)
        self._last = RoundReport(
            round_.number,
            {name: value for name, value in metrics.items() if isinstance(value, float)},
            {name: value for name, value in metrics.items() if isinstance(value, np.ndarray)},
            per_client,
            {
                "perf/round_seconds": seconds,
                "perf/examples_per_second": prepared.num_examples / seconds,
                "perf/host_wait_seconds": round_.waited,
                "perf/compilations": self._session.engine.runner.compilations,
                "perf/utilisation": prepared.utilisation,
            },
        )
        self._pulse.round(round_.number)
        for observer in self._observers:
            observer.round(self._last)

    def restart_clock(self) -> None:
        """Leaves what was done since the last report out of the next one's seconds."""
        self._clock = time.perf_counter()

    def evaluated(self, round_: Round, results: dict[str, Evaluation]) -> dict[str, float]:
        """Reports evaluations after a round that has been caught up with; returns their row of the history.

        Raises:
          UserError: one of the results is not finite.
        """
        seconds = time.perf_counter() - self._clock
        self._evaluation_seconds.append(seconds)
        values = row(results)
        for name, value in values.items():
            _check_finite(round_.number, name, value, self._kept())
        trained = self._last.metrics if self._last else {}
        names = {f"train/{name}": None for result in results.values() for name in result.metrics}
        names |= {SECONDS: None}
        algorithm = self._session.algorithm
        said = algorithm.report(round_.state, round_.number) if algorithm.report else {}
        account = self._session.account
        spent = account.report(round_.number) if account else {}
        numbers = {
            "round": round_.number,
            **{name: trained[name] for name in names if name in trained},
            **values,
            **{name: float(value) for name, value in said.items()},
            **(self.totals or {} if round_.number else {}),
            **spent,
        }
        self._pulse.evaluation(numbers)
        report = EvaluationReport(round_.number, numbers, results, self._last, seconds)
        for observer in self._observers:
            observer.evaluation(report)
        self._clock = time.perf_counter()
        return numbers

    def before_checkpoint(self, round_: Round) -> None:
        """Gets everything ready for a checkpoint of a round that has been caught up with.

        Raises:
          UserError: a parameter is not finite, and would be saved.
        """
        for path, finite in jax.tree_util.tree_leaves_with_path(_finite(round_.params)):
            if not finite:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise _diverged(round_.number, f"the parameter {name}", "not finite", self._kept())
        for observer in self._observers:
            observer.flush()

    def finish(
        self,
        round_: Round,
        history: Sequence[Mapping[str, float]],
        stopped_early: str | None = None,
    ) -> None:
        """Writes `final.json` after a run's last round, if there is news, and says why that came early."""
        if stopped_early:
            self.say(stopped_early)
        if self._workdir is None or not runtime.is_first():
            return
        path, account = os.path.join(self._workdir, FINAL), self._session.account
        if not self._round_seconds + self._evaluation_seconds and _tells(path, history):
            return
        final = {
            "rounds": round_.number,
            **({"stopped_early": stopped_early} if stopped_early else {}),
            "metrics": history[-1] if history else {},
            "evaluations": [about._asdict() for about in self._session.about(round_)],
            "history": history,
            **({"privacy": account.about(round_.number)} if account else {}),
            "perf": self._perf(),
        }
        _write(path, json.dumps(final, indent=2) + "\n")

    def _kept(self) -> str:
        """Says what there is to go on from."""
        latest = self._latest_checkpoint()
        if self._workdir is None or latest is None:
            return ""
        return f" The latest checkpoint in {self._workdir} is of round {latest}."

    def _perf(self) -> dict[str, float]:
        """Timings of this process's part of the run."""
        steady = self._round_seconds[1:] or self._round_seconds
        return {
            "first_round_seconds": self._round_seconds[0] if self._round_seconds else 0.0,
            "mean_round_seconds": float(np.mean(steady)) if steady else 0.0,
            "mean_evaluation_seconds": float(np.mean(self._evaluation_seconds or [0.0])),
            "total_seconds": time.perf_counter() - self._started,
            "mean_utilisation": float(np.mean(self._utilisation or [0.0])),
            "compilations": self._session.engine.runner.compilations,
        }


def _is_of_round(name: str) -> bool:
    return name in ("round", SECONDS) or name.startswith("train/")


def _tells(path: str, history: Sequence[Mapping[str, float]]) -> bool:
    """Whether a `final.json` is there, and of this run."""
    try:
        return json.loads(paths.read_text(path))["history"] == list(history)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _check_finite(done: int, name: str, value: float | np.ndarray, kept: str) -> None:
    culprit = np.asarray(value)[~np.isfinite(value)]
    if len(culprit.flat):
        raise _diverged(done, name, str(culprit.flat[0]), kept)


def _diverged(done: int, name: str, what: str, kept: str) -> UserError:
    return UserError(
        f"round {done}: {name} is {what}. The run diverged: lower a learning rate or clip the client "
        "updates; the strategy @debug() names the client and the step." + kept
    )


@jax.jit
def _finite(params: PyTree) -> PyTree:
    """Of every array, whether all of it is finite."""
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)


def _spread(values: np.ndarray) -> tuple[float, float, float] | None:
    """Mean, 10th and 90th percentile over the clients that have a number; None if no one has."""
    finite = np.sort(values[np.isfinite(values)])
    last = finite.size - 1
    if last < 0:
        return None

    def percentile(
        share: float,
    ) -> float:  # As NumPy's, in a fraction of its time: every round has these.
        place = share * last
        below = int(place)
        low, high = float(finite[below]), float(finite[min(below + 1, last)])
        return low + (place - below) * (high - low)

    return float(finite.sum()) / finite.size, percentile(0.1), percentile(0.9)


def _write(path: str, text: str) -> None:
    try:
        paths.write(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space there") from error


def _delete(path: str) -> None:
    try:
        paths.delete(path)
    except OSError as error:
        raise UserError(f"cannot delete {path}: {error.strerror}") from error
