"""What a sweep has found: mean, standard deviation and confidence interval over seeds, as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

from fedexp import paths
from fedexp.errors import UserError
from fedexp.sweeps.description import Sweep
from fedexp.sweeps.trials import Outcome, Source, Trial, outcome

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Values over seeds.

    Attributes:
      n: how many.
      mean: of them; None if there are none.
      std: of a sample, with n - 1; None of fewer than two.
      low: end of the mean's confidence interval, by Student's t; None of fewer than two.
      high: its other end.
    """

    n: int
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and confidence interval: mean +- t(n - 1) std / sqrt(n)."""
    n = len(values)
    if n == 0:
        return Spread(0)
    mean = float(np.mean(values))
    if n == 1:
        return Spread(1, mean)
    std = float(np.std(values, ddof=1))
    half = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(n)
    return Spread(n, mean, std, mean - half, mean + half)


class Row(NamedTuple):
    """What is known of a trial.

    Attributes:
      trial: which.
      state: 'finished', 'failed', 'pruned' or 'open'.
      outcomes: of its runs.
      spread: of the values that there are.
    """

    trial: Trial
    state: str
    outcomes: Sequence[Outcome]
    spread: Spread


class Results(NamedTuple):
    """What is known of all trials.

    Attributes:
      rows: one a trial, by number.
      ranked: the same, the best first, those that are not finished last.
      sweep: whose they are.
    """

    rows: Sequence[Row]
    ranked: Sequence[Row]
    sweep: Sweep

    @property
    def best(self) -> Row | None:
        """The finished trial with the best mean."""
        return self.ranked[0] if self.ranked and self.ranked[0].state == "finished" else None

    def of(self, state: str) -> list[Row]:
        """Trials in a state."""
        return [row for row in self.rows if row.state == state]


def gather(source: Source, sweep: Sweep) -> Results:
    """Reads everything from the trials' folders."""
    assert sweep.metric is not None
    rows = []
    for trial, pruned in source.known():
        outcomes = [outcome(run, sweep.metric) for run in trial.runs]
        states = {one.state for one in outcomes}
        state = next(s for s in ("failed", "open", "finished") if s in states)
        values = [one.value for one in outcomes if one.value is not None]
        rows.append(Row(trial, "pruned" if pruned else state, outcomes, spread(values)))
    sign = -1 if sweep.direction == "maximize" else 1

    def key(row: Row) -> tuple:
        value = row.spread.mean
        return row.state != "finished", value is None, sign * (value or 0.0), row.trial.number

    return Results(rows, sorted(rows, key=key), sweep)


def write(workdir: Path, results: Results) -> None:
    """Writes `sweep.json` and `sweep.csv`.

    Raises:
      UserError: they cannot be written.
    """
    for name, text in (("sweep.json", _as_json(results)), ("sweep.csv", _as_csv(results))):
        try:
            paths.write(workdir / name, text)
        except OSError as error:
            reason = f"{error.strerror or error}; free space there"
            raise UserError(f"cannot write {workdir / name}: {reason}") from error


def _as_json(results: Results) -> str:
    best = results.best
    found = {
        "metric": results.sweep.metric,
        "direction": results.sweep.direction,
        "confidence": CONFIDENCE,
        "best": None if best is None else best.trial.number,
        "trials": [
            {
                "number": row.trial.number,
                "bindings": dict(row.trial.bindings),
                "state": row.state,
                **row.spread._asdict(),
                "runs": [
                    {
                        "folder": str(run.folder),
                        "seed": run.seed,
                        **one._asdict(),
                        "command": run.command,
                    }
                    for run, one in zip(row.trial.runs, row.outcomes, strict=True)
                ],
            }
            for row in results.rows
        ],
    }
    return json.dumps(found, indent=2) + "\n"


def _as_csv(results: Results) -> str:
    names = list(dict.fromkeys(name for row in results.rows for name in row.trial.bindings))
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["trial", *names, "state", *Spread._fields, "error"])
    for row in results.rows:
        errors = [one.error for one in row.outcomes if one.error]
        bound = [row.trial.bindings.get(name, "") for name in names]
        writer.writerow([row.trial.number, *bound, row.state, *row.spread, *errors[:1]])
    return file.getvalue()
