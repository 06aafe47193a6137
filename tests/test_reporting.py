"""Observers: who is told what, in which order, and what is left after a resume."""

from __future__ import annotations

import itertools
import json

import gin
import jax
import numpy as np
import optax
import pytest

from fedexp import config, hyperparameters, runtime, summaries
from fedexp.algorithms import fedavg
from fedexp.checkpointing import Checkpointer, CheckpointPlan
from fedexp.data import SECONDS, ClientBatching, Sample, Sampler, uniform
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.reporting import JsonLines, Observer, Progress, TensorBoard
from fedexp.trainer import Experiment
from tests.support import linear
from tests.support.tensorboard import eventually, serve, tensors


class Diary(Observer):
    """Writes down what it is told."""

    def __init__(self):
        self.entries = []

    def begin(self, session, workdir, done):
        self.entries.append(("begin", done))

    def say(self, message):
        self.entries.append(("say", message))

    def round(self, report):
        self.entries.append(("round", report.number))

    def evaluation(self, report):
        self.entries.append(("evaluation", report.number))

    def close(self):
        self.entries.append(("close",))


def run(workdir=None, num_rounds=4, rate=0.05, **options):
    task = linear.task()
    algorithm = fedavg(task, optax.sgd(rate), optax.sgd(1.0))
    options = {"sampler": uniform(3), "evaluations": [Evaluate(every=2)]} | options
    experiment = Experiment(linear.splits(), task, algorithm, num_rounds, **options)
    return experiment.run(workdir)


def test_an_observer_is_told_everything_in_order(tmp_path):
    diary = Diary()
    run(tmp_path, observers=[diary])
    assert diary.entries == [
        ("begin", 0),
        *[("round", 1), ("round", 2), ("evaluation", 2)],
        *[("round", 3), ("round", 4), ("evaluation", 4)],
        ("close",),
    ]
    diary.entries.clear()
    run(tmp_path, 5, observers=[diary])
    assert diary.entries == [("begin", 4), ("round", 5), ("evaluation", 5), ("close",)]


def test_observers_are_closed_when_the_run_fails():
    diary = Diary()
    with pytest.raises(UserError, match="diverged"):
        run(rate=1e30, observers=[Observer(), diary])
    assert diary.entries[0] == ("begin", 0) and diary.entries[-1] == ("close",)
    assert diary.entries.count(("close",)) == 1


def test_processes_but_the_first_have_no_observers(monkeypatch):
    monkeypatch.setattr(runtime, "is_first", lambda: False)
    diary = Diary()
    run(observers=[diary])
    assert not diary.entries


def test_lines_of_rounds_that_are_run_again_are_dropped(tmp_path):
    observer = JsonLines("log.jsonl")
    run(tmp_path, 2, observers=[observer])
    with (tmp_path / "log.jsonl").open("a") as file:  # As a run that was killed before it saved.
        file.write('{"round": 3, "train/loss": 0.5}\n{"round": 4, "tra')
    result = run(tmp_path, 4, observers=[observer])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 2, 3, 4, 4]
    evaluations = [line for line in lines if "test/loss" in line]
    for line in evaluations:
        assert line.pop("perf/evaluation_seconds") > 0
    assert evaluations == result.history
    assert all("train/loss" in line and "perf/round_seconds" in line for line in lines[3:5])


def test_lines_are_flat_with_a_kind_of_value_by_name(tmp_path):
    run(tmp_path, observers=[JsonLines()])
    kinds = {}
    for line in (tmp_path / "rounds.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            kinds.setdefault(name, set()).add(type(value))
    counts = {name for name, found in kinds.items() if found == {int}}
    assert counts == {"round", "perf/compilations"}
    assert all(kinds[name] == {float} for name in kinds.keys() - counts)


def test_pandas_reads_lines_in_one_call(tmp_path):
    pandas = pytest.importorskip("pandas")
    result = run(tmp_path, observers=[JsonLines()])
    by_round = pandas.read_json(tmp_path / "rounds.jsonl", lines=True).groupby("round").last()
    assert list(by_round.index) == [1, 2, 3, 4]
    assert by_round["train/loss"].notna().all()
    measured = by_round["test/loss"].dropna()
    assert dict(measured) == pytest.approx(
        {row["round"]: row["test/loss"] for row in result.history}
    )


def test_what_a_sampler_says_of_a_round_is_told(tmp_path):
    def sample(client_ids, seed, round):
        infos = {"simulated/seconds": np.float32(round), "simulated/late": np.int64(2)}
        return Sample(np.arange(3), infos=infos)

    run(tmp_path, 2, sampler=Sampler(3, sample), observers=[JsonLines(), TensorBoard()])
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["simulated/seconds"] for line in lines[:2]] == [0, 1]
    assert tensors(tmp_path)["training/simulated/late"] == {1: 2, 2: 2}


def test_simulated_seconds_are_an_axis(tmp_path):
    def sample(client_ids, seed, round):
        return Sample(np.arange(3), infos={SECONDS: 10.5 * (round + 1)})

    chosen = {"sampler": Sampler(3, sample), "observers": [TensorBoard()]}
    run(tmp_path, 2, **chosen)
    with summaries.Writer(tmp_path / "simulated" / "train") as killed:  # Before it saved again.
        killed.scalars(22, {"loss/simulated_seconds": -1.0})
    result = run(tmp_path, 4, **chosen)
    found = {group: tensors(tmp_path / "simulated" / group) for group in ("train", "test")}
    by_round = tensors(tmp_path / "train")["loss"]
    assert found["train"]["loss/simulated_seconds"] == {
        int(10.5 * round): loss for round, loss in by_round.items()
    }
    expected = {21: result.history[0]["test/mae"], 42: result.history[1]["test/mae"]}
    assert found["test"]["mae/simulated_seconds"] == pytest.approx(expected)
    final = json.loads((tmp_path / "final.json").read_text())
    assert [row[SECONDS] for row in final["history"]] == [21.0, 42.0]
    assert final["metrics"][SECONDS] == 42.0
    run(tmp_path / "plain", observers=[TensorBoard()])
    assert not (tmp_path / "plain" / "simulated").exists()


def test_one_observer_may_observe_several_runs(tmp_path):
    observer = JsonLines()
    for name in ("first", "second"):
        run(tmp_path / name, observers=[observer])
    for name in ("first", "second"):
        assert len((tmp_path / name / "rounds.jsonl").read_text().splitlines()) == 6


def test_without_a_workdir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(observers=[JsonLines()])
    assert not list(tmp_path.iterdir())


def test_progress_says_what_is_trained_and_how_it_goes(capsys):
    run(observers=[Progress()])
    errors = capsys.readouterr().err
    assert "4 parameters; train: 7 clients, 51 examples; test: 7 clients, 51 examples" in errors
    assert "round 4/4" in errors and "test/loss" in errors


def test_a_run_need_not_evaluate(tmp_path):
    result = run(tmp_path, evaluations=[], observers=[])
    assert (result.history, result.metrics, result.rounds) == ([], {}, 4)
    final = json.loads((tmp_path / "final.json").read_text())
    assert (final["history"], final["metrics"], final["rounds"]) == ([], {}, 4)


def test_a_gin_file_chooses_the_observers(tmp_path):
    chosen = "train.observers = [@tensorboard(), @json_lines()]"
    config.load(["tests/support/linear.gin"], [chosen, "json_lines.name = 'log.jsonl'"])
    result = Experiment().run(tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 12 + len(result.history)
    assert sorted(tensors(tmp_path / "test")["loss"]) == [row["round"] for row in result.history]


def test_what_a_checkpoint_covers_is_flushed_before_it(tmp_path, monkeypatch):
    """TensorBoard has every round up to a checkpoint whose run dies right after it."""

    class Dying(Observer):
        def round(self, report):
            if report.number == 7:
                raise SystemExit

        def evaluation(self, report):
            assert report.number < 7

    class Late(TensorBoard):
        """What it was told and has not written when the run ends is lost."""

        def begin(self, session, workdir, done):
            monkeypatch.setattr(summaries, "_FLUSH_SECS", 3600.0)
            super().begin(session, workdir, done)

        def close(self):
            self._writer._pending.clear()
            super().close()

    checkpoints = CheckpointPlan(every=3)
    with pytest.raises(SystemExit):
        run(tmp_path, 10, observers=[Late(), Dying()], checkpoints=checkpoints)
    assert sorted(tensors(tmp_path / "train")["loss"]) == [1, 2, 3, 4, 5, 6]


def test_tensorboard_has_a_group_by_metric_and_all_else_after_them(tmp_path):
    """What is measured shares a chart: training with evaluations, the mean with percentiles."""
    evaluations = [
        Evaluate(every=2, percentiles=(50,)),
        Evaluate("train", clients=2, prefix="some/few"),
    ]
    runs = ("train", "test", "some/few", "p10", "p90")
    for num_rounds in (2, 4):
        result = run(tmp_path, num_rounds, evaluations=evaluations, observers=[TensorBoard()])
    assert {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("events*")} == {
        ".",
        *runs,
    }
    shown = {name: tensors(tmp_path / name) for name in (".", *runs)}
    for name in ("loss", "mae"):
        assert [run for run in shown if name in shown[run]] == ["train", "test", "some/few"]
        assert [run for run in shown if f"{name}/p50" in shown[run]] == ["test"]
        for group in ("train", "test", "some/few"):
            tag = f"{name}/{group}_clients"
            assert [run for run in shown if tag in shown[run]] == [group, "p10", "p90"]
            assert [run for run in shown if f"{tag}/histogram" in shown[run]] == [group]
    assert [row["round"] for row in result.history] == [2, 4]
    for row in result.history:
        for group, name in itertools.product(("train", "test"), ("loss", "mae")):
            found = shown[group][name][int(row["round"])]
            assert found == np.float32(row[f"{group}/{name}"])
    others = {"config/operative", "_hparams_/session_start_info", "custom_scalars__config__"}
    tags = sorted({tag for of_run in shown.values() for tag in of_run} - others)
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in tags))
    assert groups == ["loss", "mae", "training"]
    others = {"update_norm", "perf/round_seconds", "perf/utilisation", "perf/evaluation_seconds"}
    assert shown["."].keys() >= {f"training/{name}" for name in others}


@pytest.mark.parametrize("prefix", ["checkpoints", "train", "p90", "../up", "", "a/", "/a"])
def test_an_evaluation_that_cannot_be_a_folder_is_refused(tmp_path, prefix):
    with pytest.raises(UserError, match=rf"evaluate.prefix = '{prefix}' cannot be a run's name"):
        run(tmp_path / "run", evaluations=[Evaluate(prefix=prefix)], observers=[TensorBoard()])


@pytest.mark.slow
def test_runs_are_sessions_of_tensorboard_with_a_layout_also_after_a_resume(tmp_path, monkeypatch):
    def run_of(name, rate):
        gin.clear_config()
        bound = ("train.observers = [@tensorboard()]", f"client/sgd.learning_rate = {rate}")
        often = ("train.num_rounds = 4", "evaluate.every = 2", "CheckpointPlan.every = 1")
        config.load(["tests/support/linear.gin"], [*bound, *often])
        return Experiment().run(tmp_path / name)

    def die(_, report):
        if report.number == 3:
            raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(TensorBoard, "round", die)
        run_of("a", 0.05)
    run_of("a", 0.05)
    result = run_of("b", 0.01)
    with serve(tmp_path) as board:

        def sessions():
            asked = {
                "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"],
                "colParams": [{"hparam": "client/sgd.learning_rate"}],
                "aggregationType": "AGGREGATION_AVG",
                "startIndex": 0,
                "sliceSize": 9,
            }
            groups = board.get("hparams/session_groups", request=json.dumps(asked)) or {}
            found = groups.get("sessionGroups", [])
            return len(found) == 2 and all(g.get("metricValues") for g in found) and found

        found = {group["name"]: group for group in eventually(sessions)}
        experiment = board.get("hparams/experiment", request="{}")
        layout = board.get("custom_scalars/layout")
    assert sorted(found) == ["a/test", "b/test"]
    of_b = found["b/test"]
    assert of_b["hparams"]["client/sgd.learning_rate"] == 0.01
    assert of_b["hparams"]["server/adam.b1"] == 0.9  # Which nobody has bound.
    assert of_b["hparams"]["ClientBatching.batch_size"] == 20
    assert of_b["hparams"]["train.algorithm"] == "@fedavg"
    assert of_b["hparams"]["CheckpointPlan.best_metric"] == "mae"
    measured = {one["name"]["tag"]: one["value"] for one in of_b["metricValues"]}
    assert measured["mae"] == pytest.approx(result.metrics["test/mae"], rel=1e-6)
    assert set(measured) == {"loss", "mae", "loss/test_clients", "mae/test_clients"}
    steps = {one["trainingStep"] for group in found.values() for one in group["metricValues"]}
    assert steps == {4}
    differ = [one["name"] for one in experiment["hparamInfos"] if one.get("differs")]
    assert differ == ["client/sgd.learning_rate"]
    charts = [[chart["title"] for chart in one["chart"]] for one in layout["category"]]
    assert charts[0] == ["mae", "loss"] and charts[-1][0] == "update_norm"
    assert layout["category"][0]["chart"][0]["multiline"]["tag"] == ["^mae$"]


def test_hyperparameters_without_gin_are_rounds_seed_and_batches():
    batching = ClientBatching(batch_size=7)
    found = hyperparameters.of_run(9, 3, batching)
    assert found["train.num_rounds"] == 9 and found["train.seed"] == 3
    assert found["ClientBatching.batch_size"] == 7 and found["ClientBatching.shuffle"] is True
    assert "ClientBatching.local_steps" not in found  # Which is None.


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """Their loss is still finite: it was measured before the step that broke them."""

    overflow = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (jax.tree.map(lambda u: u * np.inf, updates), state),
    )
    algorithm = fedavg(linear.task(), optax.sgd(0.05), overflow)
    experiment = Experiment(
        linear.splits(),
        linear.task(),
        algorithm,
        1,
        uniform(3),
        evaluations=[],
        observers=[],
        checkpoints=CheckpointPlan(every=1, best_metric=None),
    )
    with pytest.raises(UserError, match=r"round 1: the parameter [bw] is not finite"):
        experiment.run(tmp_path)
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    assert checkpointer.latest() is None
    checkpointer.close()


def test_an_emptied_result_is_written_again(tmp_path):
    first = run(tmp_path, observers=[])
    (tmp_path / "final.json").write_text("")
    run(tmp_path, observers=[])
    assert json.loads((tmp_path / "final.json").read_text())["history"] == first.history
