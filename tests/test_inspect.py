"""What is said of an experiment before it is run."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gin
import numpy as np
import optax
import pytest

from fedexp import inspect, inspection
from fedexp.algorithms import fedavg
from fedexp.data import ClientBatching, FederatedDataset, uniform
from fedexp.engine import Packing, jit
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.inspection import Evaluating, Timing, splits
from fedexp.session import Session, Setup
from tests.support import linear

REPOSITORY = Path(__file__).parents[1]
LABELS = {"a": [0, 0, 1], "b": [3], "c": [1, 1, 1, 3, 0, 0], "d": [3, 3]}


def labelled(labels=LABELS) -> FederatedDataset:
    rng = np.random.default_rng(0)
    return FederatedDataset.from_clients(
        {
            name: {"x": rng.normal(size=(len(y), 2)).astype(np.float32), "y": np.array(y, np.int32)}
            for name, y in labels.items()
        }
    )


def test_a_census_counts_what_there_is():
    dataset = labelled()
    found = inspection.census(dataset)
    assert found.sizes.tolist() == [3, 1, 6, 2] and found.looked_at.tolist() == [0, 1, 2, 3]
    assert found.label == "y" and found.nbytes == 12 * (8 + 4)
    assert found.counts is not None
    expected = [[y.count(k) for k in range(4)] for y in LABELS.values()]
    assert found.counts.tolist() == expected
    x, y = found.features
    assert (x.name, x.shape, x.dtype, y.shape, y.low, y.high) == ("x", (2,), np.float32, (), 0, 3)
    values = dataset.features["x"]
    assert (x.low, x.high) == (values.min(), values.max())
    more = inspection.census(dataset, num_classes=6).counts
    assert more is not None and more.shape == (4, 6) and more[:, 4:].sum() == 0


def test_of_many_clients_some_are_looked_at(monkeypatch):
    monkeypatch.setattr(splits, "_MOST_CLIENTS", 3)
    found = inspection.census(labelled())
    assert len(found.looked_at) == 3 and found.sizes.tolist() == [3, 1, 6, 2]
    assert found.counts is not None
    assert found.counts.sum(1).tolist() == found.sizes[found.looked_at].tolist()


@pytest.mark.parametrize("label", ["x", "z"])
def test_what_is_no_label_is_refused(label):
    with pytest.raises(UserError, match=f"--label={label} must name a feature of one integer"):
        inspection.census(labelled(), label)
    assert inspection.census(linear.dataset()).counts is None


def test_heterogeneity_against_its_definition():
    counts = np.array([[2, 1, 0], [0, 0, 1], [2, 3, 1]])
    pooled = [4 / 10, 4 / 10, 2 / 10]
    distances = [
        sum(abs(count / sum(client) - p) for count, p in zip(client, pooled, strict=True)) / 2
        for client in counts.tolist()
    ]
    assert inspection.heterogeneity(counts) == pytest.approx(sum(distances) / 3)
    by_chance = [
        sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k) * abs(k / n - p)
            for p in pooled
            for k in range(n + 1)
        )
        / 2
        for n in (3, 1, 6)
    ]
    assert inspection.heterogeneity_by_chance(counts) == pytest.approx(sum(by_chance) / 3)
    alike = np.random.default_rng(0).multinomial(20, [0.5, 0.3, 0.2], size=2000)
    found = inspection.heterogeneity(alike)
    assert found == pytest.approx(inspection.heterogeneity_by_chance(alike), rel=0.02)
    same = np.array([[5, 0], [2, 0]])  # There is but one class.
    assert inspection.heterogeneity(same) == inspection.heterogeneity_by_chance(same) == 0


def test_the_picture_is_of_clients_by_size():
    rng = np.random.default_rng(0)
    labels = {str(i): rng.integers(0, 3, 1 + i).tolist() for i in rng.permutation(120)}
    found = inspection.census(labelled(labels))
    rows = inspection.shown(found)
    assert found.counts is not None and len(rows) == 50
    sizes = found.counts[rows].sum(1)
    assert sizes[0] == 120 and sizes[-1] == 1 and (np.diff(sizes) < 0).all()
    for row in rows:
        name = str(found.client_ids[found.looked_at[row]])
        assert found.counts[row].tolist() == [labels[name].count(k) for k in range(3)]
    assert set(inspection.shown(inspection.census(labelled()))) == {0, 1, 2, 3}


@pytest.mark.parametrize("dataset", [labelled(), linear.dataset()])
def test_the_picture_is_a_png(dataset):
    assert inspection.draw(inspection.census(dataset)).startswith(b"\x89PNG\r\n")


def test_parameters_by_module():
    params = {
        "params": {
            "Dense_0": {"bias": np.zeros(5, np.float32), "kernel": np.zeros((3, 5), np.float32)},
            "scale": np.zeros((), np.float16),
        }
    }
    dense, rest = inspection.modules(params)
    assert dense.path == "params/Dense_0" and dense.size == 5 + 3 * 5
    assert dense.arrays["kernel"].shape == (3, 5)
    assert rest.path == "params" and rest.size == 1 and rest.arrays["scale"].dtype == np.float16


def session(**options) -> Session:
    task = linear.task()
    algorithm = fedavg(task, optax.sgd(0.05), optax.sgd(1.0))
    return Session(
        Setup(
            linear.splits(),
            task,
            algorithm,
            strategy=jit(Packing(lanes=1, batch_sizes=1)),
            **options,
        )
    )


def test_the_load_of_rounds():
    batching = ClientBatching(batch_size=4, local_epochs=2)
    one = session(batching=batching, sampler=uniform(3), num_rounds=5)
    found = inspection.load(one)
    cohorts = [np.array(linear.SIZES)[one.sample(r).clients] for r in range(5)]
    steps = np.array([2 * sum(math.ceil(n / 4) for n in sizes) for sizes in cohorts])
    examples = np.array([2 * sizes.sum() for sizes in cohorts])
    assert found.clients.tolist() == [3] * 5
    assert found.steps.tolist() == steps.tolist()
    assert found.examples.tolist() == examples.tolist()
    assert found.padding == pytest.approx(1 - examples.sum() / (4 * steps.sum()))


class Rounds:
    """Rounds of so many seconds by a clock of their own, the first and third of which compile."""

    def __init__(self, seconds: float, examples: int = 10):
        self.seconds, self.examples, self.now, self.compiled = seconds, examples, 0.0, 0

    def __iter__(self) -> Iterator[Any]:
        for number in itertools.count():
            self.compiled += number in (0, 2)
            self.now += 5.0 if number in (0, 2) else self.seconds
            yield SimpleNamespace(metrics={}, prepared=SimpleNamespace(num_examples=self.examples))


def test_a_round_is_timed_without_what_is_compiled():
    ran = Rounds(0.1)
    timing, _ = inspection.training(iter(ran), 10, lambda: ran.compiled, lambda: ran.now)
    assert timing.first == 5.0 and timing.later == pytest.approx(0.1)
    assert timing.once == pytest.approx(4.9) and ran.now < 12.0


def test_slow_rounds_are_timed_once_and_taken_for_average_ones():
    ran = Rounds(60.0, examples=15)
    timing, _ = inspection.training(iter(ran), 10, lambda: ran.compiled, lambda: ran.now)
    assert timing.first == 5.0 and timing.later == pytest.approx(40.0) and ran.now == 65.0


@pytest.mark.parametrize(("tick", "last", "is_measured"), [(1.0, 1.0, True), (4.0, 14.0, False)])
def test_long_evaluations_follow_from_shorter_ones(tick, last, is_measured):
    one = session(evaluations=[Evaluate(every=3, clients=2, at_start=True)], sampler=uniform(3))
    times = itertools.count(0.0, tick)
    (found,) = inspection.evaluating(one, one.first, lambda: next(times))
    assert (found.name, found.every, found.on_the_way) == ("test", 3, (tick, tick))
    assert found.last.later == last and found.is_measured == is_measured and found.at_start


def test_what_an_experiment_takes():
    costs = [
        Evaluating("a", 4, Timing(3.0, 1.0), Timing(8.0, 7.0), True),
        Evaluating("b", 0, Timing(2.0, 2.0), Timing(2.0, 2.0), False),
        Evaluating("c", 5, Timing(0.5, 0.5), Timing(0.5, 0.5), True, at_start=True),
    ]
    found = inspection.expected(12, 10.0, Timing(6.0, 0.5), costs)
    evaluations = 0.0
    for done in range(13):
        for one in costs:
            if done == 0:
                evaluations += one.on_the_way.later if one.at_start else 0.0
            elif done == 12:
                evaluations += one.last.later
            elif one.every and done % one.every == 0:
                evaluations += one.on_the_way.later
    assert found == (10.0 + 5.5 + 2.0 + 1.0, 12 * 0.5, evaluations)
    assert found.total == sum(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin_file=no.gin"], "no.gin"),
        (["--gin_param=train.num_round = 3"], "Did you mean 'num_rounds'?"),
        (["--data_only", "--gin_param=train.num_rounds = 3"], "train.dataset is not bound"),
        (["--data_only", "--gin_param=train.dataset = @leaf()"], "missing"),
        ([], "--gin_file is missing"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert inspect.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and message in shown.err
    assert shown.out == ""


def test_the_data_alone(capsys):
    given = [f"--gin_file={REPOSITORY}/tests/support/linear.gin", "--data_only"]
    assert inspect.main(given) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert ["clients", "7", "7"] in rows and ["examples", "51", "51"] in rows
    assert ["median", "7", "7"] in rows and ["most", "14", "14"] in rows
    assert ["x", "float32", "3"] in [row[:3] for row in rows]
    assert "there are no classes" in shown and "Model" not in shown
    gin.clear_config()
    assert inspect.main([*given, "--picture=/dev/null/x.png"]) == 2
    assert "cannot write /dev/null/x.png" in capsys.readouterr().err


def test_a_whole_look_writes_nothing_but_the_picture(tmp_path):
    command = [
        *(sys.executable, "-m", "fedexp.inspect", "--picture=clients.png"),
        f"--gin_file={REPOSITORY}/tests/support/linear.gin",
    ]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr and [file.name for file in tmp_path.iterdir()] == [
        "clients.png"
    ]
    for expected in (
        "float32, 16 B            4",  # Parameters: three weights and an intercept.
        "├── task = @linear_task()  noise = 0.1, init_scale = 1.0",
        "│   ├── client_optimizer = @client/sgd()  learning_rate = 0.05",
        "CheckpointPlan  every = 3",
        "all 12 rounds",
        "XLA's plan for a round",
        "512 bits, 64 B",  # To four clients, four numbers of 32 bits.
        "the whole experiment",
    ):
        assert expected in done.stdout
