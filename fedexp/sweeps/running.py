"""The loop of a sweep: fills the places with runs, hears how they go, and passes signals on."""

from __future__ import annotations

import collections
import contextlib
import os
import selectors
import signal
import socket
from collections.abc import Sequence
from typing import Any

from fedexp import children
from fedexp.sweeps.description import Sweep
from fedexp.sweeps.results import Results, gather, write
from fedexp.sweeps.table import Reporter
from fedexp.sweeps.trials import (
    Folders,
    Run,
    Source,
    Trial,
    error_line,
    evaluations,
    note_failure,
    number_of,
    outcome,
)
from fedexp.sweeps.workers import Batches, Place, Worker, cut_short, prune, start

_LOOK = 1.0  # Seconds between looks at what runs tell.


class Loop:
    """One process's part of a sweep.

    Args:
      sweep: what is looked at.
      source: of the trials.
      folders: where they are.
      places: where runs are done.
      lines: name of the JSON lines in which evaluations are heard of; None if nothing is stopped for them.
      batches: which runs are one program; each is its own if None.
    """

    def __init__(
        self,
        sweep: Sweep,
        source: Source,
        folders: Folders,
        places: Sequence[Place],
        lines: str | None,
        batches: Batches | None = None,
    ):
        assert sweep.metric is not None
        self._sweep, self._metric = sweep, sweep.metric
        self._source, self._folders, self._lines = source, folders, lines
        self._batches = batches or Batches()
        self._free = list(places)
        self._workers: list[Worker] = []
        self._queue: collections.deque[Run] = collections.deque()
        self._open: dict[int, Trial] = {}
        self._pruned: set[int] = set()
        self._heard: dict[int, int] = {}
        self._told: int | None = None
        self._killed = False

    def run(self) -> tuple[Results, int | None]:
        """Goes on until there is nothing to do or a signal comes.

        Returns:
          What is known then, and the signal.

        Raises:
          UserError: what has to be written cannot be. No run outlives this.
        """
        reporter = Reporter(self._source.total, len(self._folders.seeds))
        with (
            children.incoming_signals() as incoming,
            selectors.DefaultSelector() as selector,
            reporter,
        ):
            selector.register(incoming, selectors.EVENT_READ)
            try:
                results = gather(self._source, self._sweep)
                while True:
                    if self._fill():
                        results = gather(self._source, self._sweep)
                    reporter.show(results, [run for worker in self._workers for run in worker.runs])
                    if not self._workers:
                        break
                    if selector.select(_LOOK):
                        self._receive(incoming, reporter)
                    self._listen()
                    ended = self._reap()
                    if ended:
                        results = gather(self._source, self._sweep)
                        write(self._folders.workdir, results)
                    for run, how in ended:
                        reporter.ended(run, how, results)
            finally:
                self._kill()
                for worker in self._workers:
                    worker.child.wait()
        write(self._folders.workdir, results)
        return results, self._told

    def _fill(self) -> bool:
        """Starts runs on free places; returns whether any was."""
        begun = False
        while self._free and self._told is None and (runs := self._next()):
            self._workers.append(start(runs, self._free.pop(0), self._folders.workdir))
            begun = True
        return begun

    def _next(self) -> Sequence[Run]:
        """The runs of the next program; empty if there is nothing to do."""
        while not self._queue:
            if not self._take():
                return ()
        runs = [self._queue.popleft()]
        if self._batches.most > 1 and (cut := self._cut_short(runs[0])):
            return cut
        while len(runs) < self._batches.most:
            like = next((r for r in self._queue if self._kind(r) == self._kind(runs[0])), None)
            if like is not None:
                self._queue.remove(like)
                runs.append(like)
            elif not self._take():
                break
        more = self._batches.other_seeds(runs, self._queue)
        for run in more:
            self._queue.remove(run)
        return runs + more

    def _cut_short(self, first: Run) -> Sequence[Run]:
        """The runs of a program that was cut short, which can go on together; empty if they cannot."""
        _, folders = cut_short(self._folders.workdir, first)
        while missing := folders - {first.folder, *(run.folder for run in self._queue)}:
            # Trials come by number: one that should have come is another process's.
            if max(self._open) >= max(map(number_of, missing)) or not self._take():
                break
        if not folders or missing:
            return ()
        runs = [run for run in self._queue if run.folder in folders]
        self._queue = collections.deque(r for r in self._queue if r not in runs)
        return [first, *runs]

    def _take(self) -> bool:
        """Queues what the source's next trial has to do; False if there is none."""
        trial = self._source.next()
        if trial is None:
            return False
        self._open[trial.number] = trial
        self._queue.extend(r for r in trial.runs if self._state(r) == "open")
        self._close_if_done(trial)  # Of a study that was not told any more.
        return True

    def _kind(self, run: Run) -> tuple[Any, ...]:
        return self._batches.kind(run, self._open[run.trial])

    def _state(self, run: Run) -> str:
        return outcome(run, self._metric).state

    def _receive(self, incoming: socket.socket, reporter: Reporter) -> None:
        """Passes on a first signal; a second one kills."""
        with contextlib.suppress(BlockingIOError):
            for number in incoming.recv(64):
                if number not in children.STOPS:
                    continue
                if self._told is None:
                    self._told = number
                    name = signal.Signals(number).name
                    reporter.say(
                        f"{name} passed on to {len(self._workers)} runs; a second one kills"
                    )
                    for worker in self._workers:
                        children.signal_group(worker.child, number)
                else:
                    self._kill()

    def _listen(self) -> None:
        """Tells the source of evaluations of each trial's first seed; stops trials that it gives up."""
        if self._lines is None:
            return
        for number in self._under_way() - self._pruned:
            first = self._open[number].runs[0]
            size = _size(os.path.join(first.folder, self._lines))
            if size == self._heard.get(number):
                continue
            self._heard[number] = size
            told = list(evaluations(first, self._metric, self._lines))
            if self._source.heard(self._open[number], told):
                self._pruned.add(number)
                self._queue = collections.deque(r for r in self._queue if r.trial != number)
                for worker in self._workers:
                    prune(worker, number)

    def _reap(self) -> list[tuple[Run, str]]:
        """Takes out what has ended; returns the runs and how they did."""
        ended = []
        for worker in [w for w in self._workers if children.has_ended(w.child)]:
            self._workers.remove(worker)
            self._free.append(worker.place)
            code = children.reap(worker.child)
            ended += [(run, self._how(worker, run, code)) for run in worker.runs]
            for number in {run.trial for run in worker.runs}:
                self._close_if_done(self._open[number])
        return ended

    def _how(self, worker: Worker, run: Run, code: int) -> str:
        if run.trial in self._pruned:
            return "pruned"
        if self._told is not None and (self._killed or code == 128 + self._told):
            return "stopped"
        found = outcome(run, self._metric)
        several = len(worker.runs) > 1  # Of whom others may have failed.
        if (code == 0 or several) and found.state == "finished":
            return f"{self._metric} {found.value:.4g}"
        error = error_line(
            worker.log,
            worker.log_start,
            run.folder,
            f"it ended {children.how(code)}; see {worker.log}",
        )
        note_failure(run, error)
        return f"failed: {error}"

    def _close_if_done(self, trial: Trial) -> None:
        """Tells the source of a trial all runs of which have ended."""
        outcomes = [outcome(run, self._metric) for run in trial.runs]
        under_way = self._under_way() | {run.trial for run in self._queue}
        is_over = trial.number in self._pruned or all(one.state != "open" for one in outcomes)
        if is_over and trial.number not in under_way:
            self._source.done(self._open.pop(trial.number), outcomes)

    def _under_way(self) -> set[int]:
        return {run.trial for worker in self._workers for run in worker.runs}

    def _kill(self) -> None:
        self._killed = True
        for worker in self._workers:
            children.signal_group(worker.child, signal.SIGKILL)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0
