"""What a sweep says: a live table in a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedexp.sweeps.results import Results, Row
from fedexp.sweeps.space import in_words
from fedexp.sweeps.trials import Run

_REFRESH = 1.0


class Reporter:
    """Tells on stderr how a sweep goes.

    Args:
      total: trials that there will be.
      runs: of each.
    """

    def __init__(self, total: int, runs: int):
        self._total = total
        self._runs = runs
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False)
        self._begun = self._shown = time.monotonic()
        self._done_before: int | None = None

    def __enter__(self) -> Reporter:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()

    def say(self, message: str) -> None:
        """One line, above the table if there is one."""
        self._console.print(message, markup=False)

    def ended(self, run: Run, how: str, results: Results) -> None:
        """A run has ended."""
        done = len(results.of("finished")) + len(results.of("pruned"))
        failed = f", {len(results.of('failed'))} failed" if results.of("failed") else ""
        counts = "" if self._console.is_terminal else f"  ({done} of {self._total} done{failed})"
        self.say(f"{run.folder}  {how}{counts}")

    def show(self, results: Results, running: Sequence[Run]) -> None:
        """Brings the table up to date, at most every second."""
        now = time.monotonic()
        if self._done_before is None:
            self._done_before = self._ended(results)
        if self._console.is_terminal and now - self._shown >= _REFRESH:
            self._shown = now
            self._live.update(self._table(results, running, now), refresh=True)

    def _ended(self, results: Results) -> int:
        """Runs that have."""
        return sum(
            row.state == "pruned" or one.state != "open"
            for row in results.rows
            for one in row.outcomes
        )

    def _table(self, results: Results, running: Sequence[Run], now: float) -> Table:
        table = Table(box=SIMPLE_HEAD, show_header=False)
        done, failed, pruned = (len(results.of(s)) for s in ("finished", "failed", "pruned"))
        table.add_row("done", f"{done} of {self._total}")
        if pruned:
            table.add_row("pruned", str(pruned))
        if failed:
            table.add_row("failed", f"[red]{failed}[/red]")
        bound = {row.trial.number: row.trial.bindings for row in results.rows}
        for run in running:
            seed = "" if run.seed is None else f"; seed {run.seed}"
            table.add_row("running", f"{run.trial:03d}: {in_words(bound[run.trial])}{seed}")
        if results.best is not None:
            best = results.best
            table.add_row("best", f"{_measured(results, best)} by {in_words(best.trial.bindings)}")
        new = self._ended(results) - (self._done_before or 0)
        if new:
            left = self._total * self._runs - self._ended(results)
            seconds = left * (now - self._begun) / new
            shown = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
            table.add_row("left", f"about {shown}")
        return table


def _measured(results: Results, row: Row) -> str:
    std = "" if row.spread.std is None else f" ± {row.spread.std:.2g}"
    return f"{results.sweep.metric} {row.spread.mean:.4g}{std}"


def print_results(results: Results) -> None:
    """Prints the trials on stdout, the best first, and the best one's bindings as a command takes them."""
    names = list(dict.fromkeys(name for row in results.rows for name in row.trial.bindings))
    metric = str(results.sweep.metric)
    several = any(len(row.trial.runs) > 1 for row in results.rows)
    table = Table(title=f"Trials by {metric}", box=SIMPLE_HEAD)
    table.add_column("trial")
    for name in (*names, "mean" if several else metric):
        table.add_column(name, justify="right", overflow="fold")
    if several:
        for name in ("std", "95 % interval", "seeds"):
            table.add_column(name, justify="right")
    states = any(row.state != "finished" for row in results.rows)
    if states:
        table.add_column("state")
    for row in results.ranked:
        n, mean, std, low, high = row.spread
        cells = [f"{row.trial.number:03d}", *(row.trial.bindings.get(name, "") for name in names)]
        cells.append("" if mean is None else f"{mean:.4f}")
        if several:
            interval = "" if low is None else f"{low:.4f} to {high:.4f}"
            cells += ["" if std is None else f"{std:.4f}", interval, str(n)]
        if states:
            cells.append(row.state)
        table.add_row(*cells)
    Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 160).print(
        table
    )
    if results.best is not None:
        print(
            f"best: trial {results.best.trial.number:03d}, {in_words(results.best.trial.bindings)}"
        )
