"""What a run has run on: versions, commits, devices and the command, kept in its workdir."""

from __future__ import annotations

import collections
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fedexp
from fedexp import paths
from fedexp.errors import UserError

NAME = "environment.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_PATIENCE = 10.0  # Seconds that git is given, as on a slow file system.


def note(workdir: str | os.PathLike) -> None:
    """Adds this start to the list in a workdir's `environment.json`. JAX must have been started.

    Args:
      workdir: exists; one process of a run notes it.

    Raises:
      UserError: the workdir cannot be written to.
    """
    entries = [*_entries(workdir), of_this_process()]
    try:
        paths.write(os.path.join(workdir, NAME), json.dumps(entries, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error


def last(workdir: str | os.PathLike) -> dict[str, Any]:
    """What `environment.json` has of the latest start; empty if there is none, or it is somebody else's."""
    found = (_entries(workdir) or [{}])[-1]
    is_ours = isinstance(found, dict) and {"host", "devices", "versions", "commits"} <= found.keys()
    return found if is_ours else {}


def texts(entry: Mapping[str, Any]) -> dict[str, str]:
    """What of a start may matter to its numbers and its speed: devices, versions and commits, by name."""
    if not entry:
        return {}
    devices = ", ".join(f"{count} {kind}" for kind, count in entry["devices"].items())
    found = {"devices": devices, **entry["versions"]}
    for name, commit_ in entry["commits"].items():
        if commit_:
            found[name] = f"{found.get(name, '')} at {commit_[:10]}{commit_[40:]}".strip()
    return found


def line(entry: Mapping[str, Any]) -> str:
    """The same in one line, with the host; '' of nothing."""
    found = texts(entry)
    if not found:
        return ""
    devices = found.pop("devices")
    return ", ".join([f"{entry['host']}: {devices}", *(f"{a} {b}" for a, b in found.items())])


def of_this_process() -> dict[str, Any]:
    """What `environment.json` has of a start, see docs/results.md."""
    import jax  # Not for those who only read.

    package = Path(fedexp.__file__).parent
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.orig_argv,
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "processes": jax.process_count(),
        "devices": dict(collections.Counter(device.device_kind for device in jax.devices())),
        "versions": {
            "python": platform.python_version(),
            "fedexp": fedexp.__version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "commits": {
            # Installed, it may lie in a checkout of something else.
            "fedexp": commit(package) if _git(package, "ls-files", "__init__.py") else None,
            "folder": commit(Path.cwd()),
        },
    }


def _entries(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    try:
        found = json.loads(paths.read_text(os.path.join(workdir, NAME)))
    except (OSError, ValueError):  # Somebody else's, or damaged; a run is not to end for it.
        return []
    return found if isinstance(found, list) else []


def commit(folder: Path) -> str | None:
    """The commit of a git checkout, with '-dirty' if tracked files have changed; None if it is none."""
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where there is no git, no checkout, or no answer."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
