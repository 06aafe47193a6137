"""What a run says while it goes: a progress bar in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_MOST_METRICS = 24  # Of an evaluation, in a table.


class Reporter:
    """Reports rounds and evaluations on stderr, so that stdout holds nothing but results.

    Args:
      num_rounds: of the whole run.
    """

    def __init__(self, num_rounds: int):
        self._num_rounds = num_rounds
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("rounds", total=num_rounds, note="")

    def start(self) -> None:
        """Shows the bar."""
        if self._bar:
            self._bar.start()

    def stop(self) -> None:
        """Leaves the bar as it is."""
        if self._bar:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Prints one line, above the bar if there is one."""
        self._console.print(message, markup=False)

    def round(self, done: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar; `done` counts finished rounds."""
        if self._bar:
            self._bar.update(self._task, completed=done, note=describe(metrics))

    def evaluation(self, done: int, metrics: Mapping[str, float]) -> None:
        """Prints an evaluation's line."""
        self.say(f"round {done}/{self._num_rounds}  {describe(metrics)}")


def describe(metrics: Mapping[str, float]) -> str:
    """'test/accuracy 0.912  test/loss 0.301'."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def without_parts(metrics: Mapping[str, float], groups: Sequence[str]) -> dict[str, float]:
    """Leaves out what evaluations tell of parts, as 'test/accuracy/p10'.

    Args:
      metrics: name -> value.
      groups: of the evaluations.
    """
    return {
        name: value
        for name, value in metrics.items()
        if name.rpartition("/")[0] in groups or not any(name.startswith(f"{g}/") for g in groups)
    }


def of_evaluations(names: Iterable[str]) -> list[str]:
    """Of metrics' names those that evaluations measured as a whole, as 'test/accuracy'."""
    others = ("train", "traffic", "privacy", "simulated", "perf")
    return [name for name in names if name.count("/") == 1 and name.split("/")[0] not in others]


def without_traffic(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics without bits, whose large numbers are for plots."""
    return {name: value for name, value in metrics.items() if not name.startswith("traffic/")}


def print_table(history: list[dict[str, float]]) -> None:
    """Prints a run's evaluations on stdout: a row each, or a column each where the metrics are many.

    Rows are thinned to about a dozen, columns to half of that.
    """
    if not history:
        return
    names = list(dict.fromkeys(name for row in history for name in without_traffic(row)))
    console = Console(file=sys.stdout, highlight=False)
    lines = [names, *([_cell(row.get(name)) for name in names] for row in _thinned(history, 12))]
    unbounded = console.options.update(max_width=10_000)
    if Measurement.get(console, unbounded, _table(lines)).maximum > console.width:
        columns = [[_cell(row.get(name)) for name in names] for row in _thinned(history, 6)]
        lines = list(zip(names, *columns, strict=True))
    console.print(_table(lines))


def print_evaluations(
    rounds: int, about: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]
) -> None:
    """Prints on stdout what the last evaluations were of, and what they have found.

    Args:
      rounds: finished.
      about: of each evaluation its name, split, clients, num_clients, num_examples and parameters.
      metrics: 'group/metric' -> value.
    """
    if not about:
        return
    table = Table(title=f"What was measured after round {rounds}", box=SIMPLE_HEAD)
    for name in ("evaluation", "of", "parameters", "metric"):
        table.add_column(name)
    table.add_column("value", justify="right")
    for one in about:
        group = f"{one['name']}/"
        found = {
            name.removeprefix(group): value
            for name, value in metrics.items()
            if name.startswith(group)
        }
        shown = [*found.items()][:_MOST_METRICS]
        names, values = [name for name, _ in shown], [_cell(value) for _, value in shown]
        if more := len(found) - len(shown):
            names.append(f"and {more} more")
        table.add_row(
            one["name"],
            "{split}: {clients}\n{num_clients:,} clients\n{num_examples:,} examples".format(**one),
            one["parameters"],
            "\n".join(names),
            "\n".join(values),
            end_section=True,
        )
    Console(file=sys.stdout, highlight=False).print(table)


def _thinned(history: list[dict[str, float]], most: int) -> list[dict[str, float]]:
    """Evenly spaced evaluations, the last one among them."""
    return history[::-1][:: -(-len(history) // most)][::-1]


def _table(lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title="Evaluations")
    for name in lines[0]:
        table.add_column(name, justify="right")
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"
