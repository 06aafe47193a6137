"""Which environment makes a process join others, and which errors are about them."""

from __future__ import annotations

import os
import signal

import jax
import pytest

from fedexp import runtime
from fedexp.errors import UserError

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


@pytest.fixture
def settings(monkeypatch):
    """What JAX's settings are updated to; they stay as they are."""
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    return updates


@pytest.fixture
def joined(monkeypatch, settings):
    """Calls runtime.start in an environment; returns what JAX was told, or None."""
    told = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **arguments: told.append(arguments))
    for name in (*EXPLICIT, "FEDEXP_DISTRIBUTED", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)

    def start(env: dict[str, str]) -> dict | None:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        runtime.start()
        return told[-1] if told else None

    return start


@pytest.mark.parametrize(
    "env", [{}, {"SLURM_STEP_NUM_TASKS": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"}]
)
def test_a_single_process_joins_nobody(joined, env):
    assert joined(env) is None


def test_the_coordinator_can_be_named(joined):
    told = joined(EXPLICIT)
    assert told["coordinator_address"] == "host:1234"
    assert (told["num_processes"], told["process_id"]) == (4, 3)


@pytest.mark.parametrize(
    "env",
    [
        {"FEDEXP_DISTRIBUTED": "auto"},
        {"SLURM_STEP_NUM_TASKS": "2"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
    ],
)
def test_a_cluster_is_left_to_jax(joined, env):
    told = joined(env)
    assert told is not None and "coordinator_address" not in told


@pytest.mark.parametrize("env", [{"JAX_PROCESS_ID": "0"}, EXPLICIT | {"JAX_PROCESS_ID": "one"}])
def test_half_an_environment_is_refused(joined, env):
    with pytest.raises(UserError, match="needs JAX_COORDINATOR_ADDRESS"):
        joined(env)


@pytest.mark.parametrize("number", [0, "core"])
def test_no_virtual_devices_are_refused(number):
    with pytest.raises(UserError, match=f"of at least 1, 'cores' or None, got {number!r}"):
        runtime.start(num_cpu_devices=number)


@pytest.mark.parametrize("cores, devices", [(1, 1), (3, 3), (64, 8)])
def test_a_device_on_each_core(cores, devices, monkeypatch, settings):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    runtime.start(num_cpu_devices="cores")
    assert settings["jax_num_cpu_devices"] == devices


def test_compiled_programs_are_kept_in_the_cache_folder(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    runtime.start()
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "compiled")


@pytest.mark.parametrize(
    "keep, environment",
    [
        (False, {}),
        (True, {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}),
        (True, {"FEDEXP_CACHE": "/dev/null/cannot"}),
    ],
)
def test_compiled_programs_are_not_kept_if_told_so_or_impossible(
    monkeypatch, settings, keep, environment
):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    runtime.start(keep_compiled=keep)
    assert not settings


OUT_OF_MEMORY = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."
)
OUT_OF_MEMORY_IN_NCCL = jax.errors.JaxRuntimeError(
    "INTERNAL: NCCL operation ncclCommInitRank failed: unhandled cuda error: out of memory"
)
LOST = [
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] "
    "Connection closed by peer [127.0.0.1]:47211",
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats): "
    "/job:jax_worker/replica:0/task:1",
    "DEADLINE_EXCEEDED: Barrier timed out. Id: Checkpointer:save. This usually happens because a task "
    "triggered the barrier too early or too slowly.",
    "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error.",
]


def end(error: Exception, monkeypatch, capsys) -> tuple[int, str]:
    """Exit code and stderr of one of two processes that meets an error."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit) as ended, runtime.leaving_a_broken_group(lambda: "start afresh"):
        raise error
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, OUT_OF_MEMORY_IN_NCCL, ValueError("boom")])
def test_what_is_no_fault_of_others_is_told_with_its_traceback(error, monkeypatch, capsys):
    assert not runtime.is_about_others(error)
    code, errors = end(error, monkeypatch, capsys)
    assert code == 1
    assert errors.startswith("Traceback") and str(error) in errors
    assert "another process is lost" not in errors


@pytest.mark.parametrize("message", LOST)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_lost_process_is_told_in_one_line(message, wrapped, monkeypatch, capsys):
    error = jax.errors.JaxRuntimeError(message)
    if wrapped:
        outer = UserError("Cannot write checkpoints")
        outer.__cause__ = error
        error = outer
    assert runtime.is_about_others(error)
    code, errors = end(error, monkeypatch, capsys)
    assert code == 75
    assert errors.startswith("error: another process is lost") and "Traceback" not in errors


def test_what_all_processes_meet_is_passed_on(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with (
        pytest.raises(UserError, match="diverged"),
        runtime.leaving_a_broken_group(lambda: "start afresh"),
    ):
        raise UserError("the run diverged")


def test_a_single_process_meets_its_errors_itself():
    with (
        pytest.raises(jax.errors.JaxRuntimeError),
        runtime.leaving_a_broken_group(lambda: "start afresh"),
    ):
        raise jax.errors.JaxRuntimeError(LOST[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_unwinds_so_that_everything_is_flushed(number):
    before, said = signal.getsignal(number), []
    ended = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}[number]
    with pytest.raises(ended), runtime.stop_signals(said.append) as stop:
        assert stop() is None
        signal.raise_signal(number)
        assert stop() == number and said == [f"{number.name}: stopping after this round"]
        signal.raise_signal(number)
    assert signal.getsignal(number) == before
