"""A small file in the workdir that says how a run goes: what `python -m fedexp.status` reads."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedexp import paths
from fedexp.errors import UserError

NAME = "status.json"
# Seconds between looks for news, and between signs of life where there are none.
_PAUSE = 1.0
BEAT = 30.0


class Pulse:
    """Keeps `status.json` of a workdir while a run is under way, and says how it ended.

    A thread writes it, at most every second; a round costs the trainer two assignments. What cannot be
    written is not, for no run should fail of it. In a bucket it is written every half minute.

    Args:
      workdir: of the run; nothing is written if None.
      num_rounds: in total.
    """

    def __init__(self, workdir: str | os.PathLike | None, num_rounds: int):
        self._workdir = workdir
        self._told = {"rounds": num_rounds, "metrics": {}}
        self._round, self._first = 0, (0, 0.0)
        self._moved = time.time()
        self._end = ("finished", "")
        self._over = threading.Event()

    def begin(self, done: int) -> None:
        """A run begins, or goes on after `done` rounds."""
        self._round = done

    def round(self, number: int) -> None:
        """A round is done."""
        self._round = number
        if not self._first[0]:  # Which has waited for compilers.
            self._first = (number, time.perf_counter())

    def evaluation(self, row: Mapping[str, float]) -> None:
        """Evaluations are done."""
        self._told["metrics"] = row

    def ends(self, state: str, why: str) -> None:
        """Says how the run ends, if that is not after its last round."""
        self._end = (state, why)

    def __enter__(self) -> Pulse:
        if self._workdir is not None:
            before = read(self._workdir)
            self._round = before.get("round", 0)
            self._told["metrics"] = before.get("metrics", {})
            self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._workdir is not None:
            self._over.set()
            self._thread.join()
            state, why = _end_of(error) if error else self._end
            _write(self._workdir, self._now(state, why))

    def _beat(self) -> None:
        assert self._workdir is not None
        pause = BEAT if paths.is_remote(self._workdir) else _PAUSE
        told, last = None, 0.0
        while True:
            news = (self._round, self._told["metrics"])
            if news != told:
                self._moved = time.time()
            if news != told or time.monotonic() - last >= BEAT:
                told, last = news, time.monotonic()
                _write(self._workdir, self._now("running"))
            if self._over.wait(pause):
                return

    def _now(self, state: str, why: str = "") -> dict[str, Any]:
        number, since = self._first
        rounds, seconds = self._round - number, time.perf_counter() - since
        speed = rounds / seconds if number and rounds else None
        moved = {"round": self._round, "moved": self._moved, "rounds_per_second": speed}
        return _about(state, why) | self._told | moved


@contextlib.contextmanager
def told_in(workdir: str | os.PathLike | None) -> Iterator[None]:
    """Says in a workdir that a run is being built in the body, and with what error that ends, if with one."""
    if workdir is None:
        yield
        return
    _write(workdir, read(workdir) | _about("starting"))
    try:
        yield
    except BaseException as error:
        _write(workdir, read(workdir) | _about(*_end_of(error)))
        raise


def read(workdir: str | os.PathLike) -> dict[str, Any]:
    """What `status.json` of a workdir says; empty if there is none, or nothing legible."""
    try:
        found = json.loads(paths.read_text(os.path.join(workdir, NAME)))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _about(state: str, why: str = "") -> dict[str, Any]:
    return {"state": state, "why": why, "updated": time.time()}


def _end_of(error: BaseException) -> tuple[str, str]:
    """The state in which a run has ended, and the one line that tells why."""
    if not isinstance(error, Exception):
        return "stopped", "at once"
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, UserError):
        return "failed", line
    return "failed", f"{type(error).__name__}: {line}".removesuffix(": ")


def _write(workdir: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Not for good, as `paths.write`: nothing waits for the disk here."""
    path, text = os.path.join(workdir, NAME), json.dumps(content, indent=1) + "\n"
    with contextlib.suppress(OSError, UserError):
        if paths.is_remote(workdir):
            paths.write(path, text)
            return
        partial = Path(f"{path}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
