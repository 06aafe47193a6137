"""Observers that tell services which keep track of experiments: Weights & Biases, MLflow."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import gin
from absl import logging as absl_logging

from fedexp import hyperparameters, paths
from fedexp.errors import UserError
from fedexp.reporting import EvaluationReport, Observer, RoundReport
from fedexp.session import Session

# Seconds between what is sent, between tries while that fails, and for which a checkpoint waits.
_PAUSE, _RETRY, _PATIENCE = 1.0, 30.0, 10.0


class Row(NamedTuple):
    """What is told of a round, or of the evaluations after it.

    Attributes:
      round: finished rounds.
      time: seconds since 1970.
      values: name -> number.
    """

    round: int
    time: float
    values: dict[str, float]


class Tracker(Observer):
    """Tells a service of every round and evaluation, by the names that JSON lines have.

    A thread does it, so that no round waits for a network. What cannot be sent is said once and tried again
    until the run ends, and training goes on. A run that goes on is the same one there, by its id in a file of
    the workdir, and is not told again of rounds that the service has.

    Attributes:
      name: of the configurable, the library, the extra that installs it, and the file.
      way_out: what to do where no run can be begun.

    Raises:
      UserError: the library is not installed; from `begin`, no run can be begun, or gone on with.
    """

    name: ClassVar[str]
    way_out: ClassVar[str]

    def __init__(self) -> None:
        try:
            self._library: Any = importlib.import_module(self.name)
            _ = self._library.__version__  # A folder called `wandb` can be imported as well.
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"train.observers: @{self.name}() needs a library: pip install 'fedexp[{self.name}]'"
            ) from error
        self._thread = None

    def open(
        self, run: str | None, workdir: str | None, found: Mapping[str, hyperparameters.Value]
    ) -> tuple[str, int]:
        """Begins a run, or goes on with one.

        Args:
          run: id of the one that goes on; None for a new one.
          workdir: the name of a new one.
          found: its hyperparameters.

        Returns:
          The id, and the last round that the service has.
        """
        raise NotImplementedError

    def send(self, rows: Sequence[Row]) -> None:
        """Tells the service; in a thread, and once more where it raises."""
        raise NotImplementedError

    def end(self, failed: bool) -> None:
        """Ends the run."""
        raise NotImplementedError

    def begin(self, session: Session, workdir: str | os.PathLike | None, done: int) -> None:
        setup, folder = session.setup, None if workdir is None else os.fspath(workdir)
        found = hyperparameters.of_run(setup.num_rounds, setup.seed, setup.batching)
        file = folder and os.path.join(folder, f"{self.name}_run.txt")
        before = paths.read_text(file).strip() if file and paths.exists(file) else None
        try:
            run, self._told = self.open(before, folder, found)
        except Exception as error:  # Every service has its own.
            what, way_out = "begin a run", self.way_out
            if before:
                what = f"go on with the run {before}"
                way_out += f"; without {file} a new run begins"
            raise UserError(
                f"train.observers: @{self.name}() cannot {what}: {_one_line(error)}; {way_out}"
            ) from error
        if file and before is None:
            paths.write(file, f"{run}\n")
        self._rows: list[Row] = []
        self._fails = False
        self._due, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_sending, name=self.name, daemon=True)
        self._thread.start()

    def round(self, report: RoundReport) -> None:
        if report.number > self._told:
            self._tell(report.number, {**report.metrics, **report.perf})

    def evaluation(self, report: EvaluationReport) -> None:
        if report.number < self._told:
            return
        known = {"round", *(report.last_round.metrics if report.last_round else ())}
        found = {name: value for name, value in report.row.items() if name not in known}
        self._tell(report.number, {**found, "perf/evaluation_seconds": report.seconds})

    def flush(self) -> None:
        self._due.set()
        end = time.monotonic() + _PATIENCE
        while self._rows and not self._fails and time.monotonic() < end:
            time.sleep(0.01)

    def close(self) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._due.set()
        self._thread.join()
        self._thread = None
        if self._rows:
            rounds = self._rows[0].round
            absl_logging.warning("@%s() was not told of all from round %d on", self.name, rounds)
        try:
            # Observers are closed while the error that ends a run is on its way up.
            self.end(failed=sys.exc_info()[0] is not None)
        except Exception as error:
            absl_logging.warning("@%s() cannot end its run: %s", self.name, _one_line(error))

    def _tell(self, number: int, values: dict[str, float]) -> None:
        self._rows.append(Row(number, time.time(), values))

    def _keep_sending(self) -> None:
        while True:
            self._due.wait(_RETRY if self._fails else _PAUSE)
            self._due.clear()
            over = self._over.is_set()
            if rows := self._rows[:]:
                try:
                    self.send(rows)
                    del self._rows[: len(rows)]
                    self._fails = False
                except Exception as error:
                    if not self._fails:
                        text = "@%s() cannot be told, is tried again, and training goes on: %s"
                        absl_logging.warning(text, self.name, _one_line(error))
                    self._fails = True
            if over:
                return


@gin.configurable("wandb")
class WandB(Tracker):
    """Weights & Biases, as its environment variables say; WANDB_MODE=offline writes to this machine.

    Args:
      project: that the run belongs to.
    """

    name = "wandb"
    way_out = "log in by `wandb login`, or keep runs on this machine with WANDB_MODE=offline"

    def __init__(self, project: str = "fedexp"):
        super().__init__()
        self._project = project

    def open(
        self, run: str | None, workdir: str | None, found: Mapping[str, hyperparameters.Value]
    ) -> tuple[str, int]:
        run = run or uuid.uuid4().hex
        self._run = self._library.init(
            project=self._project,
            id=run,
            name=workdir,
            dir=None if workdir is None or paths.is_remote(workdir) else workdir,
            resume="allow",
            reinit="create_new",  # Trials that are trained together have a run each.
        )
        self._run.config.update(dict(found), allow_val_change=True)
        # W&B's own step would refuse evaluations of a round that it has.
        self._run.define_metric("*", step_metric="round")
        return run, self._run.summary.get("round", 0)

    def send(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({"round": row.round, **row.values})

    def end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


@gin.configurable("mlflow")
class MLflow(Tracker):
    """MLflow, where MLFLOW_TRACKING_URI says; by default in the file mlflow.db of the current folder.

    Args:
      experiment: that the run belongs to; made if there is none.
    """

    name = "mlflow"
    way_out = "MLFLOW_TRACKING_URI names the server, or a file as sqlite:///mlflow.db"

    def __init__(self, experiment: str = "fedexp"):
        # Its own eight tries take four minutes before anything is said, but for a warning of each.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        super().__init__()
        self._experiment = experiment

    def open(
        self, run: str | None, workdir: str | None, found: Mapping[str, hyperparameters.Value]
    ) -> tuple[str, int]:
        self._client = client = self._library.MlflowClient()
        if run is None:
            experiment = self._library.set_experiment(self._experiment).experiment_id
            self._run: str = client.create_run(experiment, run_name=workdir).info.run_id
            told = []
        else:
            self._run = run
            client.update_run(run, status="RUNNING")
            told = client.get_metric_history(run, "perf/round_seconds")
        # It refuses another value of a parameter that it has, as of more rounds.
        known = client.get_run(self._run).data.params
        params = [(name, str(value)) for name, value in found.items() if name not in known]
        for some in _parts(params, 100):
            client.log_batch(self._run, params=[self._library.entities.Param(*p) for p in some])
        return self._run, max((metric.step for metric in told), default=0)

    def send(self, rows: Sequence[Row]) -> None:
        metrics = [
            self._library.entities.Metric(name, value, int(1000 * row.time), row.round)
            for row in rows
            for name, value in row.values.items()
        ]
        for some in _parts(metrics, 1000):
            self._client.log_batch(self._run, metrics=some)

    def end(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """No more at a time than MLflow takes."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
