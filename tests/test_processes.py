"""Runs of two real processes on this machine: resuming, losing one, and being told to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parent.parent
SCAFFOLD = (
    "train.algorithm = @scaffold",
    "scaffold.client_learning_rate = 0.05",
)


# Counts what processes tell each other besides rounds and evaluations.
COUNTING = """
import sys
from jax.experimental import multihost_utils

calls = []
for name in ("process_allgather", "broadcast_one_to_all", "sync_global_devices", "assert_equal"):
    setattr(multihost_utils, name, lambda *args, name=name, **kwargs: calls.append(name))

from fedexp import runtime

runtime.start()

from tests.test_trainer import run

print(run(num_rounds=20).rounds, "rounds,", calls, "calls", file=sys.stderr)
"""

# Process 1 is told to stop while round 3 runs, the last one that process 0 records.
STOPPED_AT_A_PROFILES_END = """
import contextlib, sys

from fedexp import runtime

runtime.start()

import jax
from fedexp.profiling import ProfilePlan
from tests.test_trainer import run

asked = []


@contextlib.contextmanager
def stop_signals(say):
    yield lambda: asked.append(None) or (15 if jax.process_index() and len(asked) >= 3 else None)


runtime.stop_signals = stop_signals
result = run(sys.argv[1], num_rounds=20, profile=ProfilePlan((2, 3)))
print("stopped after", result.rounds, "by", result.stopped_by, file=sys.stderr)
"""


def start(workdir: Path, *params: str, processes: int = 2) -> list[subprocess.Popen]:
    command = ["-m", "fedexp.main", "--gin_file=tests/support/linear.gin"]
    command += [f"--workdir={workdir}", *(f"--gin_param={param}" for param in params)]
    return launch([*command, "--gin_param=runtime.lost_after_seconds = 10"], processes)


def launch(command: list[str], processes: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for number in range(processes):
        env = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(number),
        }
        running.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=REPOSITORY,
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return running


def finish(running: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str]]:
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, errors) for process, errors in zip(running, errors, strict=True)]


def wait_for_checkpoint(running: list[subprocess.Popen], workdir: Path, at_least: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        names = [folder.name for folder in (workdir / "checkpoints").glob("[0-9]*")]
        if any(name.isdigit() and int(name) >= at_least for name in names):
            return
        over = [process for process in running if process.poll() is not None]
        assert not over, [(process.returncode, process.communicate()[1]) for process in over]
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of round {at_least} in time")


def final(workdir: Path) -> dict:
    content = json.loads((workdir / "final.json").read_text())
    del content["perf"]
    return content


def assert_close(found: dict, expected: dict) -> None:
    assert found["rounds"] == expected["rounds"]
    for row, reference in zip(found["history"], expected["history"], strict=True):
        assert row.keys() == reference.keys()
        np.testing.assert_allclose(list(row.values()), list(reference.values()), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_run_and_one_process_finishes_it(tmp_path, victim):
    """With SCAFFOLD, so that client states of both processes have to survive as well."""
    params = ("train.num_rounds = 600", "CheckpointPlan.every = 10", *SCAFFOLD)
    whole = finish(start(tmp_path / "whole", *params, processes=1))
    assert whole[0][0] == 0, whole

    running = start(tmp_path / "lost", *params)
    wait_for_checkpoint(running, tmp_path / "lost", 30)
    os.kill(running[victim].pid, signal.SIGKILL)
    (code, errors) = finish(running, timeout=40)[1 - victim]
    assert code in (75, -signal.SIGABRT), errors  # Ours, or the abort of JAX's own runtime.
    assert "error: another process" in errors or "another task died" in errors
    assert not (tmp_path / "lost" / "final.json").exists()

    # Once more on two processes, stopped again, and then to the end on one.
    again = start(tmp_path / "lost", *params)
    wait_for_checkpoint(again, tmp_path / "lost", 120)
    again[victim].send_signal(signal.SIGTERM)
    assert [code for code, _ in finish(again)] == [128 + signal.SIGTERM] * 2
    assert finish(start(tmp_path / "lost", *params, processes=1))[0][0] == 0
    assert_close(final(tmp_path / "lost"), final(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_falls_silent_ends_the_other_in_one_line(tmp_path, victim):
    """Before JAX takes it for lost, which ends in an abort."""
    running = start(tmp_path, "train.num_rounds = 100000", "CheckpointPlan.every = 50")
    wait_for_checkpoint(running, tmp_path, 50)
    os.kill(running[victim].pid, signal.SIGSTOP)
    other = running[1 - victim]
    _, errors = other.communicate(timeout=40)
    os.kill(running[victim].pid, signal.SIGKILL)
    finish(running)
    assert other.returncode == 75, errors
    assert "error: another process has been silent for 10 s; on as many processes" in errors
    assert "Check failure" not in errors and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 50])
def test_a_signal_to_one_process_stops_both_after_the_same_round(tmp_path, every):
    params = ("train.num_rounds = 100000", "evaluate.every = 0", f"CheckpointPlan.every = {every}")
    running = start(tmp_path, *params)
    wait_for_checkpoint(running, tmp_path, 50)
    running[1].send_signal(signal.SIGTERM)
    ended = finish(running)
    assert [code for code, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    stopped = int(ended[0][1].split("stopped after round ")[1].split(";")[0])
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir()


@pytest.mark.slow
def test_processes_agree_to_go_on_within_the_round():
    ended = finish(launch(["-c", COUNTING], processes=2))
    for code, errors in ended:
        assert code == 0, errors
        assert "20 rounds, [] calls" in errors


@pytest.mark.slow
def test_a_stop_at_the_end_of_a_profile_stops_both(tmp_path):
    """The profile of the first process waits for rounds that the others have not waited for."""
    ended = finish(launch(["-c", STOPPED_AT_A_PROFILES_END, str(tmp_path)], processes=2))
    for code, errors in ended:
        assert code == 0, errors
        assert "stopped after 4 by 15" in errors


@pytest.mark.slow
def test_bad_input_ends_both_with_2(tmp_path):
    ended = finish(start(tmp_path, "uniform.cohort_size = 8"))
    for code, errors in ended:
        assert code == 2, errors
        assert "error: a cohort of 8 clients cannot be sampled from 7" in errors
