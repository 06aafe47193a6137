"""Sweeps of a stand-in for fedexp.main: failures, signals, SIGKILL, several at once."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedexp.sweeps.trials import error_line
from tests.sweeps import stub

REPOSITORY = Path(__file__).parent.parent.parent
PATIENCE = 60
SWEEP = """
sweep.axes = [@axis()]
sweep.metric = 'test/score'
sweep.direction = 'maximize'
sweep.seeds = 2
axis.binding = 'task.x'
axis.values = [1, 2, 3]
"""


@pytest.fixture
def run(capfd):
    """Does a sweep of the stand-in in this process; returns its exit code, stdout and stderr."""

    def done(folder: Path, *arguments: str, text: str = SWEEP) -> tuple[int, str, str]:
        return stub.sweep(given(folder, *arguments, text=text)), *capfd.readouterr()

    return done


def given(folder: Path, *arguments: str, text: str = SWEEP) -> list[str]:
    file = folder.with_suffix(".gin")
    file.write_text(text)
    return ["--gin_file=none.gin", f"--sweep={file}", f"--workdir={folder}", *arguments]


def start(folder: Path, *arguments: str, text: str = SWEEP) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sweeps.stub", "sweep", *given(folder, *arguments, text=text)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(sweep: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = sweep.communicate(timeout=PATIENCE)
    return sweep.returncode, out, err


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sweep.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def begun(folder: Path) -> list[str]:
    """Folder and first round of every attempt."""
    path = folder / "trials" / "begun.txt"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def await_attempts(folder: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(begun(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_point_has_its_seeds_and_the_best_mean_comes_first(run, tmp_path):
    status, out, err = run(tmp_path / "runs", "--workers=2")
    assert status == 0, err
    rows = table(tmp_path / "runs")
    assert [row["task.x"] for row in rows] == ["1", "2", "3"]
    # The metric is 4 x + seed / 10: its mean over seeds 0 and 1 is 4 x + 0.05.
    assert [float(row["mean"]) for row in rows] == pytest.approx([4.05, 8.05, 12.05])
    assert {row["n"] for row in rows} == {"2"} and {row["state"] for row in rows} == {"finished"}
    assert [float(row["std"]) for row in rows] == pytest.approx([0.1 / 2**0.5] * 3)
    found = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    assert found["best"] == 2 and found["trials"][2]["bindings"] == {"task.x": "3"}
    assert [run["value"] for run in found["trials"][0]["runs"]] == [4.0, 4.1]
    assert out.index("12.05") < out.index("8.05") < out.index("4.05")
    assert "best: trial 002, task.x = 3" in out
    assert f"{tmp_path}/runs/trials/001/seed_1  test/score 8.1" in err


def test_a_failed_trial_is_told_in_a_line_and_tried_again(run, tmp_path):
    for mode, line in (
        ("refused", "task.x must not be 2"),
        ("raises", "KeyError: 'no such client'"),
    ):
        folder = tmp_path / mode
        status, out, err = run(folder, f"--gin_param=task.mode = '{mode}'")
        assert status == 1
        assert [row["state"] for row in table(folder)] == ["finished", "failed", "finished"]
        assert table(folder)[1]["error"] == line and "best: trial 002" in out
        assert f"failed: {folder}/trials/001/seed_0: {line}\n" in err
        assert "Traceback" not in err
    status, _, _ = run(folder, f"--gin_param=task.mode = '{mode}'")
    again = ["seed_0 0", "seed_1 0"]
    assert status == 1 and begun(folder) == sorted(3 * ["seed_0 0", "seed_1 0"] + again)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_where_it_was(run, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    slow = "--gin_param=task.pause = 0.1"
    assert run(whole, slow, "--workers=2")[0] == 0
    sweep = start(cut, slow, "--workers=2")
    await_attempts(cut, 3)
    time.sleep(0.25)
    sweep.kill()
    sweep.communicate()
    time.sleep(0.5)
    told = {path: path.read_text() for path in cut.rglob("rounds.jsonl")}
    time.sleep(0.5)
    assert {path: path.read_text() for path in told} == told  # Its children are dead, too.
    assert run(cut, slow, "--workers=2")[0] == 0
    assert (cut / "sweep.csv").read_text() == (whole / "sweep.csv").read_text()
    found = (cut / "sweep.json").read_text().replace(str(cut), str(whole))
    assert found == (whole / "sweep.json").read_text()
    # Some went on from a checkpoint, and nothing that was finished was begun again.
    assert any(not line.endswith(" 0") for line in begun(cut))
    assert not any(line.endswith(f" {stub.ROUNDS}") for line in begun(cut))


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_is_passed_on_and_the_same_command_goes_on(run, tmp_path, number):
    folder, slow = tmp_path / "runs", "--gin_param=task.pause = 0.2"
    sweep = start(folder, slow, "--workers=2")
    await_attempts(folder, 2)
    sweep.send_signal(number)
    status, _, err = finish(sweep)
    assert status == 128 + number
    assert f"{number.name} passed on to 2 runs" in err and "the same command goes on" in err
    assert {row["state"] for row in table(folder)} == {"open"}
    assert run(folder, slow, "--workers=2")[0] == 0
    assert {row["state"] for row in table(folder)} == {"finished"}


def test_a_second_signal_kills(tmp_path):
    folder = tmp_path / "runs"
    text = SWEEP.replace("[1, 2, 3]", "[2]").replace("sweep.seeds = 2\n", "")
    sweep = start(folder, "--gin_param=task.pause = 30", text=text)
    await_attempts(folder, 1)
    sweep.terminate()
    assert any("SIGTERM passed on" in line for line in sweep.stderr)
    sweep.terminate()
    assert finish(sweep)[0] == 128 + signal.SIGTERM


def test_several_at_once_share_the_trials(tmp_path):
    folder, slow = tmp_path / "runs", "--gin_param=task.pause = 0.1"
    sweeps = [start(folder, slow) for _ in range(2)]
    ended = [finish(sweep) for sweep in sweeps]
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert begun(folder) == sorted(3 * ["seed_0 0", "seed_1 0"])  # Each once.
    assert [row["state"] for row in table(folder)] == 3 * ["finished"]


def test_a_dry_run_lists_commands_and_does_nothing(run, tmp_path):
    status, out, _ = run(tmp_path / "runs", "--dry_run")
    assert status == 0 and not (tmp_path / "runs").exists()
    assert out.count("# trial ") == 3 and out.count("'--gin_param=train.seed = 1'") == 3
    assert f"'--gin_param=task.x = 2' '--gin_param=train.seed = 0' --workdir={tmp_path}/runs" in out


def test_one_run_a_point_has_no_folder_for_its_seed(run, tmp_path):
    text = SWEEP.replace("sweep.seeds = 2\n", "")
    status, out, err = run(tmp_path / "runs", text=text)
    assert status == 0, err
    assert sorted(path.parent.name for path in tmp_path.rglob("final.json")) == [
        "000",
        "001",
        "002",
    ]
    assert "interval" not in out and [row["std"] for row in table(tmp_path / "runs")] == [
        "",
        "",
        "",
    ]


def test_the_line_of_an_error_is_found(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("error: of an earlier attempt\n")
    size = log.stat().st_size
    assert error_line(log, size, log.parent, "nothing") == "nothing"
    with open(log, "a") as file:
        file.write("Traceback (most recent call last):\n  File x\nKeyError: 'a'\n\nDuring\n\n")
        file.write("Traceback (most recent call last):\n  File y\njax.errors.X: big\nA note\n")
    assert error_line(log, size, log.parent, "nothing") == "jax.errors.X: big"
    assert error_line(log, 0, log.parent, "nothing") == "of an earlier attempt"
