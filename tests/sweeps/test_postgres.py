"""A study in PostgreSQL, where there is a server to start."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.sweeps.test_running import begun, finish, start, table
from tests.sweeps.test_study import STUDY, UNIFORM

optuna = pytest.importorskip("optuna")
pytest.importorskip("psycopg")


@pytest.fixture
def storage():
    """URL of a server of our own, which listens on a socket in a folder only."""
    if not (shutil.which("initdb") and shutil.which("pg_ctl")):
        pytest.skip("there is no PostgreSQL here")
    if os.name != "posix" or (os.getuid() == 0 and not _has_user("postgres")):
        pytest.skip("PostgreSQL does not run as root")
    # It refuses to run as root, and sockets' paths must be short.
    user = {"user": "postgres"} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    if user:
        shutil.chown(folder, "postgres")
    data, log = folder / "data", folder / "log"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder, **user}
    try:
        made = ["initdb", "-D", str(data), "-U", "fedexp", "--auth=trust", "--no-sync"]
        subprocess.run(made, **quiet)
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        subprocess.run(["pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start"], **quiet)
        try:
            yield f"postgresql+psycopg://fedexp@/postgres?host={folder}"
        finally:
            subprocess.run(["pg_ctl", "-D", data, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _has_user(name: str) -> bool:
    import pwd

    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


@pytest.mark.slow
def test_two_launchers_share_a_study_in_postgresql(tmp_path, storage):
    folder = tmp_path / "runs"
    more = f"{UNIFORM}\nstudy.storage = '{storage}'\nstudy.name = 'ours'\n"
    text = STUDY.format(count=4, values="@random_uniform()", more=more)
    slow = "--gin_param=task.pause = 0.1"
    ended = [finish(sweep) for sweep in [start(folder, slow, text=text) for _ in range(2)]]
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert begun(folder) == sorted(4 * ["seed_0 0", "seed_1 0"])  # Each once.
    told = optuna.load_study(study_name="ours", storage=storage).trials
    assert len(told) == 4 and len({trial.params["task.x"] for trial in told}) == 4
    for row, trial in zip(table(folder), told, strict=True):
        assert float(row["mean"]) == pytest.approx(trial.value)
        assert trial.value == pytest.approx(4 * trial.params["task.x"] + 0.05, rel=1e-6)
    assert not (folder / "study.db").exists()
