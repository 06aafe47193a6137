"""What is written to the disk for good, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | str]]:
    """What is synced from now on, by its inode, and what is renamed, by its new name."""
    done = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (fsync(file), done.append(("fsync", os.fstat(file).st_ino)))
    )
    monkeypatch.setattr(
        os, "replace", lambda old, new: (replace(old, new), done.append(("replace", new.name)))
    )
    return done


def assert_safe(done: list[tuple[str, int | str]], path: Path) -> None:
    """Asserts that all of `path` was on the disk before it got its name, and the name soon after."""
    renamed = done.index(("replace", path.name))
    synced = {inode for what, inode in done[:renamed] if what == "fsync"}
    assert {os.stat(below).st_ino for below in (path, *path.rglob("*"))} <= synced
    assert done[renamed + 1] == ("fsync", os.stat(path.parent).st_ino)
