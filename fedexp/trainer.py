"""The round loop: samples, runs, evaluates, reports, checkpoints. Knows no algorithm, data set or device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import gin
import jax
import numpy as np
from jax.experimental import multihost_utils

from fedexp import checkpointing, config, models, paths, profiling, runtime  # noqa: F401  Models register with Gin.
from fedexp.algorithms.base import Algorithm
from fedexp.data import ClientBatching, FederatedSplits, Sampler, uniform
from fedexp.errors import UserError
from fedexp.evaluation import Evaluation, EvaluationPlan, Evaluator
from fedexp.progress import Reporter
from fedexp.strategies import PreparedRound, Runner, Strategy, auto
from fedexp.summaries import Writer, confusion_image, image_grid
from fedexp.tasks import Task

PyTree = Any


@gin.configurable
@dataclasses.dataclass(frozen=True)
class CheckpointPlan:
    """When a run saves, and what it keeps.

    Attributes:
      every: rounds between checkpoints; 0 saves at the end and on a stop only.
      keep: checkpoints kept besides the best one.
      best_metric: the evaluation metric that tells the best checkpoint; an evaluation that improves it is
        followed by a checkpoint. None keeps the latest only.
      best_mode: 'max' or 'min'.

    Raises:
      UserError: a value out of range.
    """

    every: int = 50
    keep: int = 2
    best_metric: str | None = "test/loss"
    best_mode: str = "min"

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1 or self.best_mode not in ("max", "min"):
            raise UserError(
                f"CheckpointPlan needs every >= 0, keep >= 1 and best_mode 'max' or 'min', got {self}"
            )

    def check(self, names: Sequence[str]) -> None:
        """Raises UserError if the evaluation, which gives the metrics `names`, lacks the best one."""
        if self.best_metric not in (None, *names):
            raise UserError(
                f"CheckpointPlan.best_metric is {self.best_metric!r}, but evaluation gives {list(names)}"
            )

    def improves(self, row: Mapping[str, float], best: float | None) -> bool:
        """Whether an evaluation beats the best so far."""
        if self.best_metric not in row:
            return False
        value = row[self.best_metric]
        return best is None or (value > best if self.best_mode == "max" else value < best)


class TrainResult(NamedTuple):
    """What a run leaves.

    Attributes:
      params: the model's final parameters.
      metrics: the last evaluation, name -> value.
      history: one row per evaluation: 'round' and the metrics.
      rounds: finished rounds.
      stopped_by: the signal that stopped the run early, or None.
    """

    params: PyTree
    metrics: dict[str, float]
    history: list[dict[str, float]]
    rounds: int
    stopped_by: int | None


@gin.configurable(denylist=["workdir", "overrides", "quiet"])
def train(
    dataset: FederatedSplits = gin.REQUIRED,
    task: Task = gin.REQUIRED,
    algorithm: Algorithm = gin.REQUIRED,
    num_rounds: int = 100,
    sampler: Sampler | None = None,
    batching: ClientBatching | None = None,
    strategy: Strategy | None = None,
    evaluation: EvaluationPlan | None = None,
    checkpoints: CheckpointPlan | None = None,
    profile: profiling.ProfilePlan | None = None,
    seed: int = 0,
    *,
    workdir: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> TrainResult:
    """Trains for `num_rounds` rounds, going on from the latest checkpoint in `workdir` if there is one.

    Everything random follows from `seed`, the round, the client and the step, so a run that was killed and
    started again ends like one that was not.

    Args:
      dataset: training and test partition.
      task: model, loss and metrics.
      algorithm: what clients and server do.
      num_rounds: rounds in total, those before a resume included.
      sampler: draws each round's cohort; 10 clients uniformly if None.
      batching: the clients' local batches.
      strategy: where cohorts run; `auto()` if None.
      evaluation: when to evaluate, and on what.
      checkpoints: when to save, and what to keep.
      profile: rounds that TensorBoard's profiler records; none if None.
      seed: of the initial parameters, cohorts, batches and dropout.
      workdir: folder for checkpoints, TensorBoard summaries and `final.json`, of this machine or a URL as
        s3://bucket/run; nothing is kept if None.
      overrides: gin bindings that must have had an effect by now.
      quiet: print no progress.

    Raises:
      UserError: input that cannot be trained on, or metrics that are not finite.
    """
    if num_rounds < 1:
        raise UserError(f"train.num_rounds must be at least 1, got {num_rounds}")
    sampler = sampler or uniform()
    batching = batching or ClientBatching()
    evaluation = evaluation or EvaluationPlan()
    checkpoints = checkpoints or CheckpointPlan()
    if workdir is not None:
        checkpointing.import_ahead()
    if profile is not None:
        profile.check(num_rounds, workdir)
    for part in dataset:
        task.check(part)
    checkpoints.check([f"test/{name}" for name in ("loss", *task.metrics, *task.derived)])

    def prepare(round_: int) -> PreparedRound:
        return runner.prepare(round_, sampler.sample(dataset.train.client_ids, seed, round_))

    sampler.sample(dataset.train.client_ids, seed, 0)
    params = task.init(jax.random.key(seed), dataset.train.slice(0, 1))
    runner = Runner(
        strategy or auto(),
        algorithm,
        dataset.train,
        batching,
        params=params,
        cohort_size=math.ceil(sampler.cohort_size),
        seed=seed,
    )
    state = runner.start(params)
    evaluate_fully = Evaluator(task, dataset.test, evaluation.batch_size, runner.placement)
    sampled = evaluation.sample(dataset.test, seed)
    evaluate = evaluate_fully
    if sampled is not dataset.test:
        evaluate = Evaluator(task, sampled, evaluation.batch_size, runner.placement)
    done, history, best, stopped_by = 0, [], None, None
    config.check_used(overrides)

    with contextlib.ExitStack() as stack:
        reporter = Reporter(num_rounds, quiet=quiet or not runtime.is_first())
        stack.enter_context(reporter)
        saver = _Saver(workdir, checkpoints, runner)
        stack.callback(saver.close)
        if saver.latest() is not None:
            done, state, history, best = saver.restore(state)
            reporter.say(f"going on after round {done}, from {workdir}")
        log = stack.enter_context(_Log(workdir, reporter, runner, resume_at=done + 1))
        log.describe(task, dataset, params)
        stop = stack.enter_context(_stop_signals(reporter))
        stack.enter_context(runtime.leaving_a_broken_group())
        rounds = _one_ahead(prepare, range(done, num_rounds))
        if profile is not None and runtime.is_first():
            rounds = profiling.recorded(rounds, profile, workdir, done=done, settle=log.settle)
            stack.enter_context(contextlib.closing(rounds))
        for prepared, waited in rounds:
            if len(prepared.clients):  # A Poisson cohort may be empty; its round changes nothing.
                output = runner.run(state, prepared)
                log.settle()  # The round before, while this one runs.
                log.started(prepared, output.metrics, waited)
                state = output.server_state
            done += 1
            last = done == num_rounds
            save = last or (checkpoints.every and done % checkpoints.every == 0)
            if last or (evaluation.every and done % evaluation.every == 0):
                log.settle()
                result = (evaluate_fully if last else evaluate)(state.params)
                history.append(log.evaluated(done, result, task))
                if checkpoints.improves(history[-1], best):
                    best = history[-1][checkpoints.best_metric]
                    save = True
            stopped_by = _agreed(stop())
            if save or stopped_by:
                log.settle()
                saver.save(done, state, history, best)
            if stopped_by:
                reporter.say(f"stopped after round {done}; the same command goes on from there")
                break
        saver.wait()
        if stopped_by is None and workdir is not None and runtime.is_first():
            path = os.path.join(workdir, "final.json")
            if log.has_news() or not paths.exists(path):
                final = {"rounds": done, "metrics": history[-1], "history": history}
                _write(path, json.dumps(final | {"perf": log.perf()}, indent=2) + "\n")
    metrics = history[-1] if history else {}
    return TrainResult(state.params, metrics, history, done, stopped_by)


class _Saver:
    """Checkpoints of everything a run needs to go on; does nothing without a workdir."""

    def __init__(self, workdir: str | os.PathLike | None, plan: CheckpointPlan, runner: Runner):
        self._client_states = runner.client_states
        self._checkpointer = workdir and checkpointing.Checkpointer(
            os.path.join(workdir, "checkpoints"),
            keep=plan.keep,
            best_metric=plan.best_metric,
            best_mode=plan.best_mode,
        )
        self._saved = self.latest()

    def latest(self) -> int | None:
        return self._checkpointer.latest() if self._checkpointer else None

    def save(self, done: int, state: PyTree, history: list, best: float | None) -> None:
        if not self._checkpointer or self._saved == done:
            return
        clients = self._client_states.save() if self._client_states else {}
        self._checkpointer.save(
            done,
            {"server": state, "clients": clients},
            metadata={"history": history, "best": best},
            metrics=history[-1] if history and history[-1]["round"] == done else None,
        )
        self._saved = done

    def restore(self, state: PyTree) -> tuple[int, PyTree, list, float | None]:
        clients = self._client_states.template() if self._client_states else {}
        saved, metadata = self._checkpointer.restore(
            self._saved, {"server": state, "clients": clients}
        )
        if self._client_states:
            self._client_states.load(saved["clients"])
        return self._saved, saved["server"], metadata["history"], metadata["best"]

    def wait(self) -> None:
        if self._checkpointer:
            self._checkpointer.wait()

    def close(self) -> None:
        if self._checkpointer:
            self._checkpointer.close()


class _Log:
    """Turns rounds and evaluations into summaries, progress and timings."""

    def __init__(
        self,
        workdir: str | os.PathLike | None,
        reporter: Reporter,
        runner: Runner,
        resume_at: int,
    ):
        self._writer = None
        if workdir is not None and runtime.is_first():
            self._writer = Writer(workdir, resume_at=resume_at)
        self._workdir = workdir
        self._reporter = reporter
        self._runner = runner
        self._pending = None
        self._last_metrics: dict[str, np.ndarray] = {}
        self._started = self._clock = time.perf_counter()
        self._round_seconds: list[float] = []
        self._evaluation_seconds: list[float] = []
        self._utilisation: list[float] = []

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *exc_info) -> None:
        if self._writer:
            self._writer.close()

    def describe(self, task: Task, dataset: FederatedSplits, params: PyTree) -> None:
        """Writes down what is being run, once everything is built."""
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        self._reporter.say(
            f"{size:,} parameters; "
            + "; ".join(
                f"{name}: {part.num_clients:,} clients, {part.num_examples:,} examples"
                for name, part in dataset._asdict().items()
            )
        )
        if self._writer:
            operative = gin.operative_config_str()
            _write(os.path.join(self._workdir, config.OPERATIVE), operative)
            self._writer.text(0, "config/operative", gin.markdown(operative))
            images = task.images and task.images(dataset.train.slice(0, 64))
            if images is not None:
                self._writer.image(0, "train/examples", image_grid(images))

    def started(
        self, prepared: PreparedRound, metrics: Mapping[str, jax.Array], waited: float
    ) -> None:
        """Notes a round that is on its way."""
        self._pending = (prepared, metrics, waited)

    def settle(self) -> None:
        """Waits for the round on its way and reports it.

        Raises:
          UserError: one of its metrics is not finite.
        """
        if self._pending is None:
            return
        prepared, metrics, waited = self._pending
        self._pending = None
        values = {name: np.asarray(value) for name, value in jax.device_get(dict(metrics)).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        done, slots = prepared.round + 1, prepared.slots
        values = {name: value[slots] if value.ndim else value for name, value in values.items()}
        _check_finite(done, values, self._workdir)
        self._last_metrics = values
        self._round_seconds.append(seconds)
        self._utilisation.append(prepared.utilisation)
        scalars = {name: float(value) for name, value in values.items() if not value.ndim}
        self._reporter.round(done, {**scalars, "s/round": seconds})
        if self._writer:
            spread = {name: value for name, value in values.items() if value.ndim}
            perf = {
                "perf/round_seconds": seconds,
                "perf/examples_per_second": prepared.num_examples / seconds,
                "perf/host_wait_seconds": waited,
                "perf/compilations": self._runner.compilations,
                "perf/utilisation": prepared.utilisation,
            }
            self._writer.scalars(done, {**scalars, **_spread(spread), **perf})

    def evaluated(self, done: int, result: Evaluation, task: Task) -> dict[str, float]:
        """Reports an evaluation; returns its row of the history."""
        now = time.perf_counter()
        self._evaluation_seconds.append(now - self._clock)
        self._clock = now
        test = {f"test/{name}": value for name, value in result.metrics.items()}
        _check_finite(done, test, self._workdir)
        names = [f"train/{name}" for name in result.metrics]
        cohort = {
            name: float(self._last_metrics[name]) for name in names if name in self._last_metrics
        }
        row = {"round": done, **cohort, **test}
        self._reporter.evaluation(done, {name: row[name] for name in row if name != "round"})
        if self._writer:
            clients = {f"clients/test_{name}": value for name, value in result.per_client.items()}
            spread = {name: value for name, value in self._last_metrics.items() if value.ndim}
            self._writer.scalars(done, {**test, **_spread(clients)})
            self._writer.scalars(done, {"perf/evaluation_seconds": self._evaluation_seconds[-1]})
            for name, values in {**clients, **spread}.items():
                self._writer.histogram(done, name, values[np.isfinite(values)])
            if result.confusion is not None:
                names = task.class_names or [str(i) for i in range(len(result.confusion))]
                image = confusion_image(result.confusion, names)
                self._writer.image(done, "test/confusion", image)
        self._clock = time.perf_counter()
        return row

    def has_news(self) -> bool:
        """Whether this process ran a round; a finished run that is started again has none."""
        return bool(self._round_seconds)

    def perf(self) -> dict[str, float]:
        """Timings of this process's part of the run."""
        steady = self._round_seconds[1:] or self._round_seconds
        return {
            "first_round_seconds": self._round_seconds[0] if self._round_seconds else 0.0,
            "mean_round_seconds": float(np.mean(steady)) if steady else 0.0,
            "mean_evaluation_seconds": float(np.mean(self._evaluation_seconds or [0.0])),
            "total_seconds": time.perf_counter() - self._started,
            "mean_utilisation": float(np.mean(self._utilisation or [0.0])),
            "compilations": self._runner.compilations,
        }


def _check_finite(
    done: int, values: Mapping[str, np.ndarray | float], workdir: str | os.PathLike | None
) -> None:
    for name, value in values.items():
        if not np.isfinite(value).all():
            culprit = np.asarray(value)[~np.isfinite(value)].flat[0]
            raise UserError(
                f"round {done}: {name} is {culprit}. The run diverged: lower a learning rate or clip "
                "the client updates; the strategy @debug() names the client and the step."
                + (f" The checkpoints in {workdir} are from before." if workdir else "")
            )


def _spread(per_client: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean, 10th and 90th percentile over clients."""
    scalars = {}
    for name, values in per_client.items():
        finite = np.sort(values[np.isfinite(values)])
        if finite.size:
            # As np.percentile, in less time: every round has spreads.
            places = np.array([0.1, 0.9]) * (finite.size - 1)
            low, high = np.interp(places, np.arange(finite.size), finite).tolist()
            scalars[f"{name}/mean"] = float(finite.mean())
            scalars[f"{name}/p10"], scalars[f"{name}/p90"] = low, high
    return scalars


def _one_ahead(
    prepare: Callable[[int], PreparedRound], rounds: range
) -> Iterator[tuple[PreparedRound, float]]:
    """Yields (prepared round, seconds waited for it); the next one is prepared in the background."""
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        future = pool.submit(prepare, rounds.start) if rounds else None
        for round_ in rounds:
            begin = time.perf_counter()
            prepared = future.result()
            waited = time.perf_counter() - begin
            if round_ + 1 in rounds:
                future = pool.submit(prepare, round_ + 1)
            yield prepared, waited


@contextlib.contextmanager
def _stop_signals(reporter: Reporter) -> Iterator[Callable[[], int | None]]:
    """Yields a function that tells which of SIGINT and SIGTERM has asked the run to stop, if any.

    A second signal acts at once, as if nobody listened.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, frame) -> None:
        del frame
        received.append(number)
        signal.signal(number, before[number])
        reporter.say(f"{signal.Signals(number).name}: stopping after this round")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agreed(number: int | None) -> int | None:
    """A signal that any process has received; all processes stop after the same round."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number or 0)).max()) or None


def _write(path: str, text: str) -> None:
    try:
        paths.write(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space there") from error
