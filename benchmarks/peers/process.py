"""The harness's side of a peer: starts it in its interpreter, asks it, and tells why it failed."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
LAST_LINES = 3
COMPILATION_CACHE = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


class Library(NamedTuple):
    """A library to compare, and how to run it.

    Attributes:
      name: for tables.
      script: the peer's, in this folder.
      python: its interpreter; None if the user gave none.
      source: a checkout to import it from; None for the installed package.
      option: prefix of the command-line options for the two.
      algorithm: what it trains.
      lacks: whether it has no such algorithm.
    """

    name: str
    script: str
    python: str | None
    source: str | None
    option: str
    algorithm: str = "fedavg"
    lacks: bool = False

    @property
    def missing(self) -> str | None:
        """Why it cannot run, or None."""
        if self.lacks:
            return f"has no {self.algorithm}"
        if self.python is None:
            return (
                f"--{self.option}_python is not given; benchmarks/README.md tells how to set it up"
            )
        return None

    def commit(self) -> str | None:
        """The commit of its checkout."""
        if self.source is None:
            return None
        command = ["git", "-C", self.source, "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None


class PeerError(Exception):
    """A peer ended or did not do the same work."""


class Peer:
    """A running peer; a context manager that ends it."""

    def __init__(self, library: Library, cache: str | None = None):
        """Launches it.

        Args:
          library: whose peer.
          cache: a folder for what the library keeps for its next launch, as compiled programs; without one
            none may keep any.
        """
        self._library = library
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  Closed on exit.
        self._process = subprocess.Popen(
            [library.python, str(FOLDER / library.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(os.environ, library, cache),
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc_info) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its reply.

        Raises:
          PeerError: the peer has ended; the message has the last lines it printed.
        """
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply:
            return json.loads(reply)
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()][-LAST_LINES:]
        raise PeerError(f"it ended with code {code}: {' | '.join(lines)}")


def _environment(
    environment: Mapping[str, str], library: Library, cache: str | None
) -> dict[str, str]:
    """The user's own, without what would favour one library or mix their packages."""
    shared = {
        name: value
        for name, value in environment.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", *COMPILATION_CACHE)
    }
    shared.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Peers share a GPU's memory.
    if cache is None:
        shared["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # fedexp would keep one.
    else:
        shared["FEDEXP_CACHE"] = cache
    return shared | ({"PYTHONPATH": library.source} if library.source else {})
