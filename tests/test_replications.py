"""The replications' files parse and bind, their tables are of what was measured, and small ones run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import gin
import numpy as np
import pytest

import fedexp.trainer  # noqa: F401  Registers what the files name.
from fedexp import config
from replications import __main__ as replications
from replications.data import mnist, similarity, two_labels

NAMES = sorted(path.parent.name for path in replications.HERE.glob("*/replication.toml"))
ROWS = [(name, row) for name in NAMES for row in replications.described(name)["rows"]]


@pytest.fixture(autouse=True)
def fresh_gin():
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{n}: {row['label']}" for n, row in ROWS])
def test_a_row_binds_what_there_is(name, row, tmp_path):
    plan = replications.described(name)
    files = replications.gin_files(name, plan, row)
    for run in replications.runs_of(plan, row, tmp_path):
        gin.clear_config()
        params = replications.gin_params(plan, row, "/data")
        config.load(files, [*params, *run.bindings])
    assert gin.query_parameter("train.num_rounds") > 0
    names = {column["name"] for column in plan["columns"]}
    assert set(row.get("published", {})) <= names


def test_every_gin_file_is_in_a_table():
    used = {
        file
        for name, row in ROWS
        for file in replications.gin_files(name, replications.described(name), row)
    }
    included = {"scaffold/scaffold.gin", "mcmahan/2nn.gin"}
    for path in replications.HERE.glob("*/*.gin"):
        assert str(path) in used or str(path.relative_to(replications.HERE)) in included


def test_tables_are_of_the_results(tmp_path):
    for name in NAMES:
        path = replications.HERE / name / "results.json"
        text = replications.table(
            replications.described(name),
            json.loads(path.read_text())["rows"] if path.exists() else {},
        )
        assert text in (path.parent / "README.md").read_text()


def test_the_table_has_means_deviations_and_first_rounds(tmp_path):
    plan = {
        "seeds": [0, 1],
        "columns": [
            {"name": "accuracy, %", "metric": "test/accuracy", "times": 100, "format": ".1f"},
            {"name": "rounds", "metric": "test/accuracy", "target": 0.6},
        ],
        "rows": [
            {"label": "a", "published": {"accuracy, %": "71"}},
            {
                "label": "b",
                "tune": {"binding": "x.y", "values": [0.1, 1.0]},
                "seeds": [0],
            },
            {"label": "c"},
        ],
    }

    def finish(row: int, name: str, accuracies: list[float]) -> None:
        workdir = replications.folder_of(tmp_path, plan["rows"][row]) / name
        workdir.mkdir(parents=True)
        (workdir / "seconds.txt").write_text("30\n")
        history = [{"round": r + 1, "test/accuracy": a} for r, a in enumerate(accuracies)]
        perf = {"mean_round_seconds": 0.5}
        final = {"rounds": len(accuracies), "history": history, "perf": perf}
        (workdir / "final.json").write_text(json.dumps(final))

    finish(0, "0", [0.5, 0.7])
    finish(0, "1", [0.65, 0.72])
    finish(1, "0_0.1", [0.2, 0.3])
    finish(1, "0_1.0", [0.2, 0.5])
    text = replications.table(plan, replications.measured(plan, tmp_path))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0][2:5] == ["accuracy, %, published", "accuracy, %, here", "rounds, here"]
    assert lines[2] == ["a", "", "71", "71.0 ± 1.4", "2 ± 1", "2", "2", "30"]
    assert lines[3] == ["b", "1.0", "", "50.0", "not in 2", "1", "2", "30"]
    assert lines[4] == ["c", "", "", "not run", "not run", "", "", ""]


def test_a_run_that_was_stopped_took_all_its_seconds(tmp_path, monkeypatch):
    clock, codes = iter([0.0, 30.0, 100.0, 112.0]), iter([1, 0])
    monkeypatch.setattr(replications.time, "monotonic", lambda: next(clock))

    def run(command, check):
        Path(command[3].removeprefix("--workdir=")).mkdir(parents=True, exist_ok=True)
        subprocess.CompletedProcess(command, next(codes)).check_returncode()

    monkeypatch.setattr(replications.subprocess, "run", run)
    only = "2NN, 2 shards, 0.1, 1, 10; rate 0.0464"
    with pytest.raises(subprocess.CalledProcessError):
        replications.train("mcmahan", only, "/data", tmp_path, [])
    assert not list(tmp_path.rglob("seconds.txt"))
    replications.train("mcmahan", only, "/data", tmp_path, [])
    (seconds,) = tmp_path.rglob("seconds.txt")
    assert float(seconds.read_text()) == 42


def digits(path, size: int = 1000) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", size), ("test", size // 5)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        arrays[f"y_{part}"] = np.arange(n, dtype=np.uint8) % 10
    np.savez(path, **arrays)


def test_two_labels_gives_each_client_two(tmp_path):
    digits(tmp_path / "mnist.npz")
    splits = mnist(str(tmp_path / "mnist.npz"), two_labels(20), test_fraction=0.1)
    for part in (splits.train, splits.test):
        for client, examples in part.clients():
            assert set(examples["y"]) <= {int(client) % 10, (int(client) + 1) % 10}
    sizes = splits.train.client_sizes
    assert sizes.min() >= 9  # Five of each label, less a tenth.
    assert sizes.max() > 5 * sizes.min()


def test_similarity_is_from_one_label_to_all():
    labels = {"y": np.repeat(np.arange(10), 60)}
    for share, most in ((0.0, 2), (1.0, 10)):
        rows = similarity(20, share)(labels)
        assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(600))
        counts = [len(np.unique(labels["y"][mine])) for mine in rows]
        assert max(counts) <= most
        assert min(counts) >= (7 if share else 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "only", "extra"),
    [
        ("flute", "FLUTE", ["two_labels.num_clients = 20"]),
        (
            "scaffold",
            "FedAvg, 1, 0%",
            ["similarity.num_clients = 30", "LinearModel.num_outputs = 10"],
        ),
    ],
)
def test_a_small_one_runs(name, only, extra, tmp_path):
    digits(tmp_path / "mnist_by_writer_full")
    (tmp_path / "mnist_by_writer_full.npz").rename(tmp_path / "mnist_by_writer_full")
    small = ["train.num_rounds = 2", "evaluate.every = 1", "train.observers = []", *extra]
    replications.train(name, only, str(tmp_path), tmp_path / "runs", small)
    found = replications.measured(replications.described(name), tmp_path / "runs")
    (row,) = found.values()
    assert row["rounds"][0] == 2
    assert all(0 <= value <= 1 for value in [*row["values"].values()][-1])
