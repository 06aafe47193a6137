"""Every algorithm gives the same numbers under every strategy, on any number of devices and lanes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import linear, strategies

REPOSITORY = Path(__file__).parent.parent.parent
ALGORITHMS = tuple(strategies.algorithms(linear.task()))
KEEP_MODELS = ("apfl", "fedper", "ditto", "fedrep")
PERSONAL = (*KEEP_MODELS, "hypcluster", "kmeans++", "pfedme", "per_fedavg")
KEEP_STATES = ("scaffold1", "scaffold2", "chain", "scaffold_chain", "feddyn", *KEEP_MODELS)
EVALUATIONS = {"own", "tuned", "test"}
# One device, fewer than clients and more, each with one lane or several.
ONE_PROCESS = [
    *("jit:1:1", "jit:1:3"),
    *("pmap:1:1", "pmap:2:3", "pmap:8:1"),
    *("mesh:1:3", "mesh:2:1", "mesh:2:3", "mesh:8:3"),
]
TWO_PROCESSES = ["mesh:1:1", "mesh:4:3"]


def results(
    output: Path, specs: list[str], processes: int = 1, worker: str = "strategies"
) -> dict[str, np.ndarray]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for number in range(processes):
        env = dict(os.environ)
        if processes > 1:
            env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
            env |= {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(number)}
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", f"tests.support.{worker}", str(output), *specs],
                cwd=REPOSITORY,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        logs = [process.communicate(timeout=1200)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(logs)
    with np.load(output) as saved:
        return dict(saved)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("equality")
    return results(folder / "one.npz", ["debug:1:1", *ONE_PROCESS])


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory) -> dict[str, np.ndarray]:
    return results(tmp_path_factory.mktemp("equality") / "two.npz", TWO_PROCESSES, processes=2)


def assert_equal(found: dict, expected: dict, spec: str, algorithm: str) -> None:
    reference = f"debug:1:1 {algorithm} "
    names = [key.removeprefix(reference) for key in expected if key.startswith(reference)]
    assert {"params/w", "params/b", "metrics/clients/update_norm"} <= set(names)
    measured = {"test/loss", "tuned/loss"} if algorithm in strategies.EVERYWHERE else set()
    assert measured == {"test/loss", "tuned/loss"} & set(names)
    assert ("client_states/0" in names) == (algorithm in KEEP_STATES)
    assert ("own/loss" in names) == (algorithm in PERSONAL)
    for name in names:
        group = name.partition("/")[0].removesuffix("_clients")
        if group in EVALUATIONS - strategies.evaluations(algorithm, spec):
            continue
        np.testing.assert_allclose(
            found[f"{spec} {algorithm} {name}"],
            expected[reference + name],
            rtol=1e-5,
            atol=2e-6,
            err_msg=name,
        )


def cases(specs: list[str]) -> list[tuple[str, str]]:
    return [
        (spec, algorithm)
        for spec in specs
        for algorithm in ALGORITHMS
        if strategies.runs(algorithm, spec)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "algorithm"), cases(ONE_PROCESS))
def test_one_process_equals_debug(everything, spec, algorithm):
    assert_equal(everything, everything, spec, algorithm)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "algorithm"), cases(TWO_PROCESSES))
def test_two_processes_equal_debug(everything, of_two_processes, spec, algorithm):
    assert_equal(of_two_processes, everything, spec, algorithm)


@pytest.mark.slow
def test_every_task_trains_alike_under_every_strategy(tmp_path):
    specs = ["jit:1:1", "mesh:2:3"]
    found = results(tmp_path / "tasks.npz", specs, worker="tasks")
    tasks = [key.removeprefix("first ") for key in found if key.startswith("first ")]
    assert len(tasks) == 6
    for task in tasks:
        expected = found[f"jit:1:1 {task}"]
        assert not np.allclose(expected, found[f"first {task}"], rtol=1e-3)
        for spec in specs[1:]:
            for name in (task, f"{task} loss"):
                np.testing.assert_allclose(
                    found[f"{spec} {name}"],
                    found[f"jit:1:1 {name}"],
                    rtol=1e-4,
                    atol=1e-6,
                    err_msg=f"{spec} {name}",
                )
