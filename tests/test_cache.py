"""The cache folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from fedexp import cache
from fedexp.errors import UserError


def test_cache_folder_defaults_to_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDEXP_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "fedexp"
    assert cache.folder().is_dir()


def test_a_cache_folder_that_cannot_be_made_or_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot create .*file/cache.*FEDEXP_CACHE"):
        cache.folder()
    monkeypatch.setenv("FEDEXP_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # As root, modes do not bind.
    with pytest.raises(UserError, match=r"read-only.*FEDEXP_CACHE"):
        cache.folder()


HOLD = """
import sys
from fedexp import cache

if sys.argv[2] == "no locks":
    def acquire(*args, **kwargs):
        raise OSError(37, "No locks available")

    cache.filelock.FileLock.acquire = acquire
try:
    with cache.sole_use(sys.argv[1]):
        print("holds it", flush=True)
        sys.stdin.read()
except cache.UserError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_a_folder_is_one_runs_alone_until_it_is_dead(tmp_path, locks):
    def start():
        command = [sys.executable, "-c", HOLD, str(tmp_path), locks]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    first = start()
    assert first.stdout.readline() == "holds it\n"
    said, _ = start().communicate(timeout=60)
    assert f"under way in {tmp_path}, by process {first.pid} on {socket.gethostname()};" in said
    assert f"delete {tmp_path}/.lock" in said
    first.kill()
    first.communicate()
    assert start().communicate(timeout=60)[0] == "holds it\n"
    (tmp_path / ".lock.owner").write_text("1\nelsewhere\n")
    said, _ = start().communicate(timeout=60)
    assert said == "holds it\n" if locks == "locks" else "by process 1 on elsewhere" in said
