"""Folders that one run has for itself."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import pytest

from fedexp import paths
from fedexp import sole_use as module
from fedexp.errors import UserError
from fedexp.sole_use import sole_use

HOLD = """
import socket
import sys
from fedexp import sole_use

folder, locks, host = sys.argv[1:]
sole_use._RENEWAL, sole_use._TERM, sole_use._LOOK = 0.3, 2.0, 0.1
socket.gethostname = lambda: host
if locks == "no locks":
    def acquire(*args, **kwargs):
        raise OSError(37, "No locks available")

    sole_use.filelock.FileLock.acquire = acquire
try:
    with sole_use.sole_use(folder), sole_use.sole_use(folder):
        print("holds it", flush=True)
        sys.stdin.read()
except sole_use.UserError as error:
    print(error, flush=True)
"""


def start(folder, locks: str, host: str = "here") -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(folder), locks, host]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("locks", ["locks", "no locks"])
@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_folder_is_one_runs_alone_until_it_is_dead(tmp_path, locks, host):
    first = start(tmp_path, locks)
    assert first.stdout is not None and first.stdout.readline() == "holds it\n"
    said, _ = start(tmp_path, locks, host).communicate(timeout=60)
    assert f"under way in {tmp_path}, by process {first.pid} on here;" in said
    first.kill()
    first.communicate()
    for _ in range(2):  # Then after one that has ended as it should.
        assert start(tmp_path, locks, host).communicate(timeout=60)[0] == "holds it\n"


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in (("_RENEWAL", 0.05), ("_TERM", 1.0), ("_LOOK", 0.02)):
        monkeypatch.setattr(module, name, seconds)


def test_a_bucket_is_leased(quick):
    folder = "memory://leased/run"
    with sole_use(folder), sole_use(folder), pytest.MonkeyPatch.context() as another:
        another.setattr(module, "_leases", set())  # As in another process.
        with pytest.raises(UserError, match=f"way in {folder}, by process"), sole_use(folder):
            pass
    paths.write(f"{folder}/.lock.owner", "1\nelsewhere\nsomebody\n")
    with sole_use(folder):
        assert socket.gethostname() in paths.read_text(f"{folder}/.lock.owner")
    assert not paths.exists(f"{folder}/.lock.owner")


def test_who_has_lost_a_lease_ends(quick, monkeypatch, capfd):
    """As after an hour in which the machine was asleep."""
    ended = threading.Event()

    def leave(code: int) -> None:
        assert code == 2
        ended.set()
        raise OSError  # As `os._exit`, which does not return, but for the thread.

    monkeypatch.setattr(module.os, "_exit", leave)
    folder = "memory://lost/run"
    with sole_use(folder):
        paths.write(f"{folder}/.lock.owner", "7\nelsewhere\nsomebody\n")
        assert ended.wait(20)
    line = f"error: {folder} was not renewed in time, and is in use, by process 7 on elsewhere"
    assert capfd.readouterr().err.splitlines()[0] == line
    assert paths.read_text(f"{folder}/.lock.owner") == "7\nelsewhere\nsomebody\n"


def test_only_one_creates_a_file(tmp_path):
    for path in (str(tmp_path / "a"), "memory://created/a"):
        assert paths.create(path, "first") and not paths.create(path, "second")
        assert paths.read_text(path) == "first"
        paths.delete(path)
        paths.delete(path)
        assert not paths.exists(path)
