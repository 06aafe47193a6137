"""The cache folder, which every process of this machine shares, and locks on what is in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
from absl import logging

from fedexp.errors import UserError


def folder(*, to_write: bool = True) -> Path:
    """The folder of downloads, packed data sets and compiled programs, created if need be.

    It is the environment variable FEDEXP_CACHE, or else ~/.cache/fedexp.

    Args:
      to_write: False where a folder that can only be read will do.

    Raises:
      UserError: the folder cannot be created, or not be written to.
    """
    name = os.environ.get("FEDEXP_CACHE") or "~/.cache/fedexp"
    way_out = "set the environment variable FEDEXP_CACHE to a folder that can be written"
    try:
        path = Path(name).expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot create the cache folder {name}: {error}; {way_out}") from error
    if to_write and not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"the cache folder {path} is read-only; {way_out}")
    return path


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds `path` against other processes that lock it too, waiting for them if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file_lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        file_lock.acquire(timeout=0)
    except filelock.Timeout:
        logging.info("waiting for another process that is preparing %s", path)
        file_lock.acquire()
    try:
        yield
    finally:
        file_lock.release()


@contextlib.contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, gone on exit; those that killed processes left behind go first.

    A lock in each tells whether its process lives.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{prefix}*"):
        with contextlib.suppress(filelock.Timeout, OSError), _held(leftover):
            logging.info("deleting what a killed process left in %s", leftover)
            shutil.rmtree(leftover)
    with contextlib.ExitStack() as stack:
        while True:
            created = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            # Another process may take a folder without a lock for a leftover.
            with contextlib.suppress(filelock.Timeout):
                stack.enter_context(_held(created))
                if (created / ".lock").exists():
                    break
        stack.callback(shutil.rmtree, created, ignore_errors=True)
        yield created


def _held(folder: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(folder / ".lock", blocking=False)
