"""How runs go, as they say it in their workdirs."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import optax
import pytest

from fedexp import paths, pulse, sole_use, status
from fedexp.algorithms import fedavg
from fedexp.checkpointing import CheckpointPlan
from fedexp.data import uniform
from fedexp.errors import UserError
from fedexp.evaluation import Evaluate
from fedexp.reporting import Observer
from fedexp.stopping import EarlyStopping
from fedexp.trainer import Experiment
from tests.support import linear
from tests.support.tensorboard import eventually

REPOSITORY = Path(__file__).parents[1]


def run(workdir, num_rounds=4, rate=0.05, **options):
    task = linear.task()
    algorithm = fedavg(task, optax.sgd(rate), optax.sgd(1.0))
    options = {"sampler": uniform(3), "evaluations": [Evaluate(every=2)], "observers": []} | options
    return Experiment(linear.splits(), task, algorithm, num_rounds, **options).run(workdir)


def test_a_finished_run_and_one_that_goes_on(tmp_path):
    result = run(tmp_path / "a", 6)
    found = status.status(str(tmp_path / "a"))
    assert found[:4] == (str(tmp_path / "a"), "finished", 6, 6)
    assert found.speed is not None and found.speed > 0 and found.left is None
    assert found.metrics == result.metrics and found.why == ""
    told = json.loads((tmp_path / "a" / "status.json").read_text())
    assert abs(told["updated"] - time.time()) < 60
    run(tmp_path / "a", 6)  # Nothing is left to do, and nothing is forgotten.
    assert status.status(str(tmp_path / "a"))[1:4] == ("finished", 6, 6)
    run(tmp_path / "a", 8)
    assert status.status(str(tmp_path / "a"))[1:4] == ("finished", 8, 8)


def test_it_is_said_while_a_run_is_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(pulse, "_PAUSE", 0.01)
    seen = []

    class Slow(Observer):
        def round(self, report):
            time.sleep(0.1)
            seen.append((report.number, status.status(str(tmp_path))))

    run(tmp_path, 6, observers=[Slow()])
    for number, found in seen[1:]:
        assert found.state == "running" and found.rounds == 6
        assert number - 1 <= found.round <= number
    last = seen[-1][1]
    assert 2 < last.speed < 15 and last.left < 3 and last.metrics["round"] == 4
    assert status.status(str(tmp_path)).state == "finished"


def test_an_error_is_kept_with_the_round(tmp_path):
    with pytest.raises(UserError, match="diverged"):
        run(tmp_path, 50, rate=1e10)
    found = status.status(str(tmp_path))
    assert found.state == "failed" and 0 <= found.round < 50 and "diverged" in found.why

    class Broken(Observer):
        def round(self, report):
            raise RuntimeError("no\nway")

    with pytest.raises(RuntimeError):
        run(tmp_path / "b", observers=[Broken()])
    assert status.status(str(tmp_path / "b"))[1:3] == ("failed", 1)
    assert status.status(str(tmp_path / "b")).why == "RuntimeError: no"


def test_a_run_that_ends_early_says_why(tmp_path):
    stop = EarlyStopping(patience=1, min_delta=1e9)
    checkpoints = CheckpointPlan(best_metric="loss", best_mode="min")
    result = run(tmp_path, 40, stop=stop, checkpoints=checkpoints)
    found = status.status(str(tmp_path))
    assert result.rounds < 40 and found[1:4] == ("finished", result.rounds, 40)
    assert "loss" in found.why


@pytest.mark.slow
def test_a_run_that_is_stopped_and_one_that_is_killed(tmp_path):
    command = [
        *(sys.executable, "-m", "fedexp.main", "--gin_file=tests/support/linear.gin"),
        *("--gin_param=train.num_rounds = 10000000", "--gin_param=evaluate.every = 1000000"),
        f"--workdir={tmp_path}",
    ]

    def state():
        return status.status(str(tmp_path)) if os.path.exists(tmp_path / pulse.NAME) else None

    for end, expected in ((signal.SIGTERM, "stopped"), (signal.SIGKILL, "died")):
        before = pulse.read(tmp_path).get("round", 0)
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
        try:

            def goes_on(before=before, process=process):
                assert process.poll() is None, process.stderr.read()
                return (now := state()) and now.round > before and now.state == "running" and now

            going = eventually(goes_on, timeout=60)
            assert going.rounds == 10_000_000
            process.send_signal(end)
            process.communicate(timeout=60)
        finally:
            process.kill()
        assert state().state == expected and state().round >= going.round
        assert state().left is None and state().why == (
            "by SIGTERM" if expected == "stopped" else ""
        )


def test_a_mistake_before_training_is_told_but_not_in_another_runs_folder(tmp_path):
    command = [sys.executable, "-m", "fedexp.main", "--gin_file=tests/support/linear.gin"]
    command += ["--gin_param=uniform.cohort_size = 9"]
    for name, config in (("new", ""), ("finished", "linear_task.noise = 0.2\n")):
        folder = write(tmp_path / name)
        if config:
            (tmp_path / name / "config.gin").write_text(config)
            (tmp_path / name / "operative_config.gin").write_text(config)
        done = subprocess.run(
            [*command, f"--workdir={folder}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        found = status.status(folder)
        if config:
            assert "holds a run of another config" in done.stderr
            assert (found.state, found.why) == ("finished", "")
        else:
            assert found.state == "failed" and found.why and f"error: {found.why}" in done.stderr


def test_who_holds_a_folder_is_seen_and_not_disturbed(tmp_path):
    assert not sole_use.is_held(tmp_path)
    with sole_use.sole_use(tmp_path):
        assert sole_use.is_held(tmp_path)
    assert not sole_use.is_held(tmp_path)
    with open(tmp_path / ".lock") as other:  # As somebody who looks at this moment.
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not sole_use.is_held(tmp_path)
        threading.Timer(0.05, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        with sole_use.sole_use(tmp_path):
            assert sole_use.is_held(tmp_path)
    (tmp_path / ".lock.owner").write_text("1\nelsewhere\nabc\n1\n")
    assert sole_use.is_held(tmp_path)


def write(folder: Path, **told) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"state": "finished", "why": "", "updated": time.time(), "round": 3, "rounds": 9}
    (folder / pulse.NAME).write_text(json.dumps(about | {"metrics": {}} | told))
    return str(folder)


def test_folders_of_runs_are_lines_in_a_pipe(tmp_path, capsys):
    metrics = {"round": 2, "train/loss": 3.0, "test/accuracy": 0.5, "test/accuracy/p10": 0.1}
    write(tmp_path / "sweep" / "trials" / "1", metrics=metrics)
    write(tmp_path / "sweep" / "trials" / "0", state="failed", why="round 4: diverged")
    write(tmp_path / "sweep", state="running", rounds_per_second=0.5)
    write(tmp_path / "sweep" / "trials" / "0" / "checkpoints" / "7")
    (tmp_path / "old").mkdir()
    final = {"rounds": 7, "metrics": {"test/loss": 1.25}}
    (tmp_path / "old" / "final.json").write_text(json.dumps(final))
    with sole_use.sole_use(tmp_path / "sweep"):
        assert status.main([str(tmp_path)]) == 0
    shown = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert shown == [
        [f"{tmp_path}/old", "finished", "7/7", "", "", "test/loss 1.25", ""],
        [f"{tmp_path}/sweep", "running", "3/9", "0.5/s", "0:12", "", ""],
        [f"{tmp_path}/sweep/trials/0", "failed", "3/9", "", "", "round 4: diverged", ""],
        [f"{tmp_path}/sweep/trials/1", "finished", "3/9", "", "", "test/accuracy 0.5", ""],
    ]
    assert status.main([str(tmp_path / "sweep")]) == 0  # Nobody holds it any more.
    assert f"{tmp_path}/sweep\tdied\t3/9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (["a/b/c"], ["c"]),
        (["/r/a", "/r/sweep/trials/0"], ["a", "sweep/trials/0"]),
        (["s3://b/r/1", "s3://b/r/2/3"], ["1", "2/3"]),
        (["a", "/r/a"], ["a", "/r/a"]),
        (["a", "a/0"], ["a", "a/0"]),
    ],
)
def test_a_table_has_short_names(runs, expected):
    assert status._below(runs) == expected


def test_a_run_from_python_says_where_it_is(tmp_path):
    run(tmp_path / "a")
    where = status.status(str(tmp_path / "a")).where
    jax_ = importlib.metadata.version("jax")
    assert where.startswith(f"{platform.node()}: {jax.device_count()} cpu, python ")
    assert f", jax {jax_}, " in where
    below = str(status.table([status.status(str(tmp_path / "a"))]).caption)
    assert below == where


def test_where_runs_are_is_said_once_for_all_and_by_name_where_it_differs(tmp_path):
    runs = [
        status.Status(f"r/{name}", "finished", 1, 1, None, None, {}, "", where)
        for name, where in (("a", "x: 1 cpu"), ("b", "y: 2 cpu"), ("c", "x: 1 cpu"), ("d", ""))
    ]
    assert status.table(runs).caption == "a, c: x: 1 cpu\nb: y: 2 cpu"
    assert status.table([runs[0], runs[2]]).caption == "x: 1 cpu"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(9, "0:09"), (3725, "1:02:05"), (90061, "1 d 01:01:01")]
)
def test_times(seconds, expected):
    assert status._time(seconds) == expected


def test_silence_is_said_here_and_is_death_in_a_bucket(tmp_path):
    now = time.time()
    for name, seconds, speed, said in (
        ("a", 100, 1.0, ""),
        ("b", 600, 1.0, "no news for 10:00"),
        ("c", 600, None, "no news for 10:00"),
        ("d", 600, 0.005, ""),  # For whose five rounds that is little.
    ):
        told = {"state": "running", "moved": now - seconds, "rounds_per_second": speed}
        folder = write(tmp_path / name, **told)
        with sole_use.sole_use(folder):
            found = status.status(folder)
        assert (found.state, found.why) == ("running", said)
    for name, silent, expected in (("b", 60, "running"), ("c", 600, "died")):
        url = f"memory://status/{name}"
        told = {"state": "running", "updated": time.time() - silent, "round": 1, "rounds": 2}
        paths.write(f"{url}/{pulse.NAME}", json.dumps(told))
        paths.write(f"{url}/.lock.owner", "1\nelsewhere\nabc\n1\n")
        assert status.status(url).state == expected
    assert status.found_in("memory://status") == ["memory://status/b", "memory://status/c"]


def test_a_run_in_a_bucket_says_it_there():
    run("memory://told/run", 4)
    (found,) = map(status.status, status.found_in("memory://told"))
    assert found[:4] == ("memory://told/run", "finished", 4, 4) and "test/loss" in found.metrics


def test_it_is_looked_at_again_until_ctrl_c(tmp_path, capsys, monkeypatch):
    folder = write(tmp_path / "a")
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert status.main([folder, "--watch", "--every=0.5"]) == 0
    assert pauses == [0.5] * 3 and capsys.readouterr().out.count(folder) == 3
    assert status.table([status.status(folder)]).row_count == 1


def test_mistakes_are_one_line(tmp_path, capsys):
    assert status.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: no run has begun in {tmp_path}, or below it\n"


def test_a_disk_that_is_full_stops_nobody(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pulse.os, "replace", full)
    with pulse.Pulse(tmp_path, 3) as told:
        told.round(1)
    assert not (tmp_path / pulse.NAME).exists()
