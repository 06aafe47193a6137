"""Services that keep track of experiments are told every round once, whatever befalls run and service."""

from __future__ import annotations

import json
import logging
import sys
import time
import types

import optax
import pytest

from fedexp import config, hyperparameters, trackers
from fedexp.algorithms import fedavg
from fedexp.checkpointing import CheckpointPlan
from fedexp.data import uniform
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.reporting import JsonLines, Observer
from fedexp.trackers import MLflow, Tracker, WandB
from fedexp.trainer import Experiment
from tests.support import linear


class Service(Tracker):
    """One in memory, that may be away."""

    name, way_out = "numpy", "wait for it"  # Of some library that is there.

    def __init__(self):
        super().__init__()
        self.runs, self.found, self.ends, self.away = {}, {}, [], False

    def open(self, run, workdir, found):
        self.run = run or f"run {len(self.runs)}"
        rows = self.runs.setdefault(self.run, []) if run is None else self.runs[run]
        self.found = dict(found)
        told = [row.round for row in rows if "perf/round_seconds" in row.values]
        return self.run, max(told, default=0)

    def send(self, rows):
        if self.away:
            raise OSError("no route\nto it")
        self.runs[self.run] += rows

    def end(self, failed):
        self.ends.append(failed)


class Acting(Observer):
    """Does something after a round, or before its evaluations are told."""

    def __init__(self, round=lambda number: None, evaluation=lambda number: None):
        self._round, self._evaluation = round, evaluation

    def round(self, report):
        self._round(report.number)

    def evaluation(self, report):
        self._evaluation(report.number)


def dying_at(number):
    def act(now):
        if now == number:
            raise SystemExit

    return act


def run(workdir=None, num_rounds=6, **options):
    task = linear.task()
    algorithm = fedavg(task, optax.sgd(0.05), optax.sgd(1.0))
    options = {"evaluations": [Evaluate(every=2)], "checkpoints": CheckpointPlan(every=2)} | options
    experiment = Experiment(linear.splits(), task, algorithm, num_rounds, uniform(3), **options)
    return experiment.run(workdir)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "rounds.jsonl").read_text().splitlines()]


def series(rows):
    """Name -> [(round, value)], of (round, values)."""
    found = {}
    for number, values in rows:
        for name, value in values.items():
            found.setdefault(name, []).append((number, value))
    return found


def expected(workdir):
    """The same of JSON lines, whose evaluations repeat what is known of their round."""
    found = series((line.pop("round"), line) for line in lines(workdir))
    return {name: list(dict.fromkeys(points)) for name, points in found.items()}


def without_timings(found):
    return {
        name: [number for number, _ in points] if name.startswith("perf/") else points
        for name, points in found.items()
    }


@pytest.mark.parametrize("acting", [{"round": dying_at(5)}, {"evaluation": dying_at(4)}])
def test_what_is_run_again_is_told_once(tmp_path, acting):
    """A run that dies between checkpoints, and in an evaluation, before which its round is saved."""
    service = Service()
    with pytest.raises(SystemExit):
        run(tmp_path, observers=[JsonLines(), Acting(**acting), service])
    assert service.ends == [True]
    run(tmp_path, observers=[JsonLines(), service])
    assert service.ends == [True, False]
    assert list(service.runs) == ["run 0"]
    assert (tmp_path / "numpy_run.txt").read_text() == "run 0\n"
    found = series((row.round, row.values) for row in service.runs["run 0"])
    assert without_timings(found) == without_timings(expected(tmp_path))
    assert [number for number, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [number for number, _ in found["test/loss"]] == [2, 4, 6]
    assert service.found["train.num_rounds"] == 6


def test_a_service_that_is_away_for_a_while_is_told_all_of_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "_PAUSE", 0.001)
    monkeypatch.setattr(trackers, "_RETRY", 0.001)
    service = Service()

    def act(number):
        if number == 2:
            service.away = True
        if number == 5:
            until = time.monotonic() + 10
            while not caplog.records and time.monotonic() < until:
                time.sleep(0.001)
            service.away = False

    with caplog.at_level(logging.WARNING, "absl"):
        run(tmp_path, observers=[JsonLines(), service, Acting(act)])
    found = series((row.round, row.values) for row in service.runs["run 0"])
    assert found == expected(tmp_path)
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("@numpy() cannot be told") and said.endswith(": no route to it")


def test_a_service_that_stays_away_does_not_end_the_run(caplog):
    service = Service()
    service.away = True
    with caplog.at_level(logging.WARNING, "absl"):
        result = run(observers=[service])
    assert result.rounds == 6 and service.ends == [False]
    assert [record.getMessage() for record in caplog.records][1:] == [
        "@numpy() was not told of all from round 1 on"
    ]


def test_a_run_that_the_service_has_lost_is_said_before_training(tmp_path):
    told = []
    run(tmp_path, 2, observers=[Service()])
    lost = (
        r"@numpy\(\) cannot go on with the run run 0: .*; without .*numpy_run.txt a new run begins"
    )
    with pytest.raises(UserError, match=lost):
        run(tmp_path, 4, observers=[Service(), Acting(told.append)])
    assert not told


def test_a_bucket_keeps_the_id():
    service = Service()
    for num_rounds in (2, 4):
        run("memory://trackers/run", num_rounds, observers=[service])
    assert [row.round for row in service.runs["run 0"]] == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.parametrize("there", [None, types.ModuleType("a folder of that name")])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, name, there):
    monkeypatch.setitem(sys.modules, name, there)
    config.load(["tests/support/linear.gin"], [f"train.observers = [@{name}()]"])
    with pytest.raises(UserError, match=rf"@{name}\(\) .*: pip install 'fedexp\[{name}\]'"):
        Experiment()


def test_wandb_is_told_by_its_own_names(tmp_path, monkeypatch):
    """W&B is not installed here: what its observer calls, with and without a folder for its files."""
    calls = []

    class Run(types.SimpleNamespace):
        def __getattr__(self, name):
            return lambda *given, **named: calls.append((name, *given, named))

    def init(**given):
        calls.append(("init", given))
        return Run(config={}, summary={"round": 2} if len(calls) > 1 else {})

    fake = types.SimpleNamespace(init=init, __version__="0")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    observer = WandB("mine")
    run(tmp_path, 2, observers=[observer])
    run(tmp_path, 3, observers=[observer])
    run(None, 1, observers=[observer])
    begun = [given for name, given, *_ in calls if name == "init"]
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"]
    assert [given["dir"] for given in begun] == [str(tmp_path), str(tmp_path), None]
    assert {given["project"] for given in begun} == {"mine"}
    rows = [row for name, row, *_ in calls if name == "log"]
    assert [row["round"] for row in rows][:5] == [1, 2, 2, 3, 3]
    assert "train/loss" in rows[0] and "test/loss" in rows[2]


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    library = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return library


@pytest.mark.slow
def test_mlflow_has_what_json_lines_have_also_after_a_resume(tmp_path, monkeypatch, mlflow):
    client, workdir = mlflow.MlflowClient(), tmp_path / "run"

    def experiment(num_rounds):
        config.gin.clear_config()
        chosen = "train.observers = [@json_lines(), @mlflow()]"
        bound = [chosen, "mlflow.experiment = 'mine'", f"train.num_rounds = {num_rounds}"]
        config.load(["tests/support/linear.gin"], bound)
        return Experiment()

    def found():
        [one] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
        return one

    def die(self, report):
        Tracker.round(self, report)
        dying_at(8)(report.number)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(MLflow, "round", die)
        experiment(12).run(workdir)
    first = found()
    assert first.info.status == "FAILED" and first.info.run_name == str(workdir)
    again = experiment(13)
    again.run(workdir)
    one = found()
    assert one.info.run_id == first.info.run_id and one.info.status == "FINISHED"
    assert (workdir / "mlflow_run.txt").read_text() == f"{one.info.run_id}\n"
    histories = {
        name: client.get_metric_history(one.info.run_id, name) for name in one.data.metrics
    }
    points = {
        name: sorted((metric.step, metric.value) for metric in history)
        for name, history in histories.items()
    }
    assert without_timings(points) == without_timings(expected(workdir))
    assert [step for step, _ in points["test/mae"]] == [4, 8, 12, 13]
    bound = hyperparameters.of_run(12, again.seed, again.batching)
    assert bound["client/sgd.learning_rate"] == 0.05
    first_values = {"train.num_rounds": "12.0"}
    assert one.data.params == {name: str(value) for name, value in bound.items()} | first_values


def test_an_mlflow_server_that_cannot_be_reached_ends_the_run_before_training(monkeypatch, mlflow):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    told = []
    with pytest.raises(
        UserError, match=r"@mlflow\(\) cannot begin a run: .*refused.*URI"
    ) as raised:
        run(observers=[MLflow(), Acting(told.append)])
    assert not told and "\n" not in str(raised.value)
