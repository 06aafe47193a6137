"""What a sweep says while it goes, in a terminal."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from fedexp.sweeps import table
from fedexp.sweeps.description import Sweep
from fedexp.sweeps.results import Results, Row, spread
from fedexp.sweeps.space import Axis
from fedexp.sweeps.trials import Folders, Outcome


def results(*values: list[float | None]) -> Results:
    """Trials of a sweep over task.x with two seeds; None is a run that has failed, and none are open."""
    sweep = Sweep([Axis("task.x", [1, 2])], "test/score", "maximize", seeds=2)
    folders = Folders(Path("runs"), [], [], sweep.of_seeds)
    rows = []
    for number, of_seeds in enumerate(values):
        outcomes = [
            Outcome("failed", None, "no") if value is None else Outcome("finished", value)
            for value in of_seeds
        ] or [Outcome("open")] * 2
        state = "open" if not of_seeds else "failed" if None in of_seeds else "finished"
        known = [value for value in of_seeds if value is not None]
        trial = folders.trial(number, {"task.x": str(number)})
        rows.append(Row(trial, state, outcomes, spread(known)))
    ranked = sorted(rows, key=lambda row: (row.state != "finished", -(row.spread.mean or 0)))
    return Results(rows, ranked, sweep)


def test_a_terminal_has_one_table_of_all(monkeypatch):
    file, clock = io.StringIO(), iter([0.0, 10.0, 70.0])
    console = Console(file=file, force_terminal=True, width=100, height=40, color_system=None)
    monkeypatch.setattr(table, "Console", lambda **_: console)
    monkeypatch.setattr(table.time, "monotonic", lambda: next(clock))
    before = results([], [], [], [])
    after = results([1.0, 2.0], [None, 9.0], [], [])
    with table.Reporter(4, 2) as reporter:
        reporter.show(before, [])
        reporter.ended(before.rows[0].trial.runs[0], "test/score 1", after)
        reporter.show(after, [after.rows[2].trial.runs[1]])
    shown = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    for line in (
        "runs/trials/000/seed_0 test/score 1",
        "done 1 of 4",
        "failed 1",
        "running 002: task.x = 2; seed 1",
        "best test/score 1.5 ± 0.71 by task.x = 0",
        # Four runs in 70 seconds, and four are left.
        "left about 70 s",
    ):
        assert any(line in one for one in shown), (line, shown)


def test_results_are_told_by_state(capsys):
    table.print_results(results([1.0, 2.0], [3.0, 5.0], [None, 9.0]))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line[:3] in ("000", "001", "002")]
    # Student's t for one degree of freedom is 12.7062; std / sqrt(2) is half of the difference.
    assert rows == [
        "001 1 4.0000 1.4142 -8.7062 to 16.7062 2 finished",
        "000 0 1.5000 0.7071 -4.8531 to 7.8531 2 finished",
        "002 2 9.0000 1 failed",
    ]
    assert lines[-1] == "best: trial 001, task.x = 1"
