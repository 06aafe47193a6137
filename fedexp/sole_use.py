"""A folder for one run alone: by the kernel's lock where there is one, by a lease elsewhere."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
from absl import logging

from fedexp import paths
from fedexp.errors import UserError

# Seconds between the renewals of a lease, without one after which it is over, and between looks at it.
_RENEWAL = 10.0
_TERM = 60.0
_LOOK = 1.0
# Seconds for which somebody who only looks may have the kernel's lock.
_PATIENCE = 0.2

_leases: set[str] = set()


@contextlib.contextmanager
def sole_use(folder: paths.PathLike) -> Iterator[None]:
    """Holds a folder against other processes; this one may hold it several times over.

    A folder of this machine is locked: the kernel, or a shared file system's server, frees it when its holder
    is dead. In a bucket, or where a file system knows no locks, the holder renews a file. It is
    taken for dead after a minute without, and at once if it was a process of this host that is no more.

    Raises:
      UserError: another process holds it, or it cannot be written to.
    """
    path = os.path.join(folder, ".lock")
    with contextlib.ExitStack() as stack:
        try:
            if not paths.is_remote(folder):
                os.makedirs(folder, exist_ok=True)
            if paths.is_remote(folder) or not _locked(stack, folder, path):
                stack.enter_context(_lease(folder, f"{path}.owner"))
        except OSError as error:
            raise UserError(f"cannot write to --workdir={folder}: {error.strerror}") from error
        yield


def is_held(folder: paths.PathLike) -> bool:
    """Whether a process, of this or another machine, seems to hold a folder.

    Of a lease nobody can tell at once: a holder on another machine may be dead that has left one.
    """
    path = os.path.join(folder, ".lock")
    if not paths.is_remote(folder):
        with contextlib.suppress(OSError, ImportError), open(path, "rb") as file:
            import fcntl  # Not on Windows.

            try:  # For a moment, and beside others who look; runs wait for longer than that.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    owner = _read(f"{path}.owner")
    return bool(owner) and not _is_dead(owner)


def _locked(stack: contextlib.ExitStack, folder: paths.PathLike, path: str) -> bool:
    """Whether the kernel has locked a file until the stack ends; it may know no locks."""
    lock = filelock.FileLock(path, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire(timeout=_PATIENCE)
    except filelock.Timeout as error:
        raise _in_use(folder, _read(path)) from error
    except (OSError, NotImplementedError):
        return False
    stack.callback(lock.release)
    with contextlib.suppress(OSError):
        Path(path).write_text(f"{os.getpid()}\n{socket.gethostname()}\n")
    return True


@contextlib.contextmanager
def _lease(folder: paths.PathLike, path: str) -> Iterator[None]:
    if path in _leases:
        yield
        return
    me = f"{os.getpid()}\n{socket.gethostname()}\n{uuid.uuid4().hex}\n"
    _take(folder, path, me)
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(folder, path, me, over), daemon=True)
    renewing.start()
    _leases.add(path)
    try:
        yield
    finally:
        _leases.remove(path)
        over.set()
        renewing.join()
        with contextlib.suppress(OSError):
            if _read(path).startswith(me):
                paths.delete(path)


def _take(folder: paths.PathLike, path: str, me: str) -> None:
    """Writes the file, once nobody else renews it."""
    seen, since = "", time.monotonic()
    while not paths.create(path, me):
        found = _read(path)
        if seen and found not in ("", seen):
            raise _in_use(folder, found)
        if _is_dead(found) or time.monotonic() - since > _TERM:
            paths.delete(path)
            continue
        if not seen:
            logging.info("waiting to see whether the run in %s%s lives", folder, _by(found))
        seen = found
        time.sleep(_LOOK)


def _renew(folder: paths.PathLike, path: str, me: str, over: threading.Event) -> None:
    for count in itertools.count(1):
        if over.wait(_RENEWAL):
            return
        with contextlib.suppress(OSError):  # The store may be back before the term is over.
            found = _read(path)
            if found and not found.startswith(me):
                line = f"error: {folder} was not renewed in time, and is in use{_by(found)}\n"
                os.write(2, line.encode())
                os._exit(2)
            paths.write(path, f"{me}{count}\n")


def _is_dead(holder: str) -> bool:
    """Whether it was a process of this host that is no more."""
    pid, host, *_ = [*holder.splitlines(), "", ""]
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _in_use(folder: paths.PathLike, holder: str) -> UserError:
    return UserError(
        f"another run is under way in {folder}{_by(holder)}; wait for its end, or choose another folder"
    )


def _by(holder: str) -> str:
    pid, host, *_ = [*holder.splitlines(), "", ""]
    return f", by process {pid} on {host}" if host else ""


def _read(path: str) -> str:
    """Who holds a folder; empty if its file is gone, or not written yet."""
    try:
        return paths.read_text(path)
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
