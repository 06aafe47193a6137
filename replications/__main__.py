"""Runs a replication, and writes its table.

    python -m replications flute --data=/data

trains what is not trained yet in runs/replications/flute, writes results.json, and puts the table between the
marks of README.md. --table does the latter alone. Data are looked for in --data, or in the folder that the
environment's FEDEXP_TEST_DATA names; the replication's README tells which.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks import machine

HERE = Path(__file__).parent
MARKS = "<!-- table -->", "<!-- end -->"
SECONDS = "seconds.txt"  # What a run took, in its workdir once it is finished.
SPENT = "seconds_so_far.txt"  # And one that was stopped, a line each time.


def described(name: str) -> dict[str, Any]:
    """A replication as its replication.toml has it: `seeds`, `data`, and lists of `columns` and `rows`."""
    plan = tomllib.loads((HERE / name / "replication.toml").read_text())
    return {"data": {}, "gin": []} | plan


def gin_files(name: str, plan: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The Gin files of a row: paths in the replication's folder, or names of shipped ones."""
    given = row.get("gin", plan["gin"])
    return [str(HERE / name / file) if (HERE / name / file).exists() else file for file in given]


def gin_params(plan: dict[str, Any], row: dict[str, Any], data: str) -> list[str]:
    """The bindings of a row: where its data are, and what it changes."""
    given = row.get("data", plan["data"])
    found = [f"{name} = {os.path.join(data, path)!r}" for name, path in given.items()]
    return [*found, *row.get("params", [])]


def train(name: str, only: str, data: str, folder: Path, extra: Sequence[str]) -> None:
    """Trains the rows whose labels have `only` in them, but for runs that are finished.

    Raises:
      CalledProcessError: a run has failed; it has said why.
    """
    plan = described(name)
    for row in plan["rows"]:
        if only not in row["label"]:
            continue
        files, params = gin_files(name, plan, row), [*gin_params(plan, row, data), *extra]
        runs = [
            {"workdir": str(run.workdir), "gin_params": run.bindings}
            for run in runs_of(plan, row, folder)
            if not (run.workdir / SECONDS).exists()
        ]
        for some in [runs] if row.get("together") and runs else [[run] for run in runs]:
            begin = time.monotonic()
            try:
                subprocess.run(
                    _command(files, params, some, folder_of(folder, row) / "together"), check=True
                )
            finally:
                took = (time.monotonic() - begin) / len(some)
                folders = [Path(run["workdir"]) for run in some]
                for workdir in filter(Path.is_dir, folders):
                    with (workdir / SPENT).open("a") as file:
                        file.write(f"{took:.2f}\n")
            for workdir in folders:
                spent = sum(map(float, (workdir / SPENT).read_text().split()))
                (workdir / SECONDS).write_text(f"{spent:.2f}\n")


def _command(
    files: Sequence[str], params: Sequence[str], runs: Sequence[dict[str, Any]], together: Path
) -> list[str]:
    """What trains these runs: `fedexp.main`, or for several a sweep's program of them all."""
    if len(runs) == 1:
        command = [sys.executable, "-m", "fedexp.main", f"--workdir={runs[0]['workdir']}"]
        command += [f"--gin_file={file}" for file in files]
        return command + [f"--gin_param={param}" for param in [*params, *runs[0]["gin_params"]]]
    whole = {"gin_files": files, "gin_params": params, "workdir": str(together), "runs": runs}
    together.mkdir(parents=True, exist_ok=True)
    (together / "runs.json").write_text(json.dumps(whole))
    return [sys.executable, "-m", "fedexp.sweeps.vmapped", str(together / "runs.json")]


class Run(NamedTuple):
    """One of the runs of a row: its seed, the value that is tuned if one is, its workdir and own bindings."""

    seed: int
    value: float | None
    workdir: Path
    bindings: list[str]


def folder_of(folder: Path, row: dict[str, Any]) -> Path:
    """Where the runs of a row are."""
    return folder / re.sub(r"[^\w.=-]+", "_", row["label"])


def runs_of(plan: dict[str, Any], row: dict[str, Any], folder: Path) -> list[Run]:
    """The runs of a row: one for each seed, and for each value that is tried if the row has `tune`."""
    tune, runs = row.get("tune"), []
    for seed in row.get("seeds", plan["seeds"]):
        for value in tune["values"] if tune else [None]:
            name = f"{seed}" if tune is None else f"{seed}_{value}"
            own = [f"train.seed = {seed}", *([f"{tune['binding']} = {value}"] if tune else [])]
            runs.append(Run(seed, value, folder_of(folder, row) / name, own))
    return runs


def measured(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the finished runs of a folder gave, by the labels of their rows: the best where a row is tuned."""
    rows = {}
    for row in plan["rows"]:
        runs = [run for run in runs_of(plan, row, folder) if (run.workdir / SECONDS).exists()]
        found = [
            _of_runs(plan, [run for run in runs if run.value == value])
            for value in dict.fromkeys(run.value for run in runs)
        ]
        if found:
            rows[row["label"]] = max(found, key=lambda one: _merit(plan, one))
    return rows


def _of_runs(plan: dict[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """What runs that differ in their seeds gave."""
    finals = [json.loads((run.workdir / "final.json").read_text()) for run in runs]
    found = {} if runs[0].value is None else {"tuned": runs[0].value}
    return found | {
        "seeds": [run.seed for run in runs],
        "rounds": [final["rounds"] for final in finals],
        "seconds": [float((run.workdir / SECONDS).read_text()) for run in runs],
        "round_seconds": [round(final["perf"]["mean_round_seconds"], 4) for final in finals],
        "values": {
            column["name"]: [value_of(column, final["history"]) for final in finals]
            for column in plan["columns"]
        },
    }


def _merit(plan: dict[str, Any], found: dict[str, Any]) -> tuple[float, ...]:
    """By what the best value is chosen: columns in their order, few rounds or a high metric."""
    merits = []
    for column in plan["columns"]:
        values = found["values"][column["name"]]
        numbers = [math.inf if value is None else value for value in values]
        merits.append(-mean(numbers) if "target" in column else mean(numbers))
    return tuple(merits)


def value_of(column: dict[str, Any], history: Sequence[dict[str, float]]) -> float | None:
    """A column's number of a run: of the last evaluation, or the first round in which it was good enough."""
    points = [(row["round"], row[column["metric"]]) for row in history if column["metric"] in row]
    if "target" not in column:
        return points[-1][1] if points else None
    return next((number for number, value in points if value >= column["target"]), None)


def table(plan: dict[str, Any], results: dict[str, Any]) -> str:
    """The table in Markdown: published and measured side by side, means and deviations (n - 1) over seeds."""
    header, lines = [plan.get("rows_are", "")], []
    header += ["rate"] if any("tune" in row for row in plan["rows"]) else []
    for column in plan["columns"]:
        header += [f"{column['name']}, published"] if is_published(plan, column) else []
        header += [f"{column['name']}, here"]
    for row in plan["rows"]:
        found, cells = results.get(row["label"]), [row["label"]]
        if any("tune" in row for row in plan["rows"]):
            cells.append(f"{found.get('tuned', '')}" if found else "")
        for column in plan["columns"]:
            published = row.get("published", {}).get(column["name"], "")
            cells += [published] if is_published(plan, column) else []
            cells += [shown(column, found) if found else "not run"]
            missed = found and None in found["values"][column["name"]]
            if missed and is_published(plan, column) and not published:
                cells[-1] = ""  # It had another target.
        lines.append([*cells, *(_about(found) if found else ["", "", ""])])
    header += ["seeds", "rounds", "seconds a run"]
    rule = [" --- ", *[" ---: "] * (len(header) - 1)]
    rows = [f"|{'|'.join(rule)}|", *(f"| {' | '.join(line)} |" for line in lines)]
    return "\n".join([f"| {' | '.join(header)} |", *rows])


def _about(found: dict[str, Any]) -> list[str]:
    """Seeds, rounds and seconds of a row."""
    return [
        f"{len(found['seeds'])}",
        f"{mean(found['rounds']):.0f}",
        f"{mean(found['seconds']):.0f}",
    ]


def is_published(plan: dict[str, Any], column: dict[str, Any]) -> bool:
    """Whether there is a published number in a column."""
    return any(column["name"] in row.get("published", {}) for row in plan["rows"])


def shown(column: dict[str, Any], found: dict[str, Any]) -> str:
    """A cell of measured numbers."""
    values = found["values"][column["name"]]
    if None in values:
        missed = f"not in {max(found['rounds'])}"
        return missed if values == [None] else f"{missed}: {values.count(None)} of {len(values)}"
    form = column.get("format", ".0f" if "target" in column else ".3f")
    scaled = [value * column.get("times", 1) for value in values]
    spread = f" ± {stdev(scaled):{form}}" if len(scaled) > 1 else ""
    return f"{mean(scaled):{form}}{spread}"


def write(name: str, results: dict[str, Any]) -> None:
    """Puts the table of a replication into its README, and those numbers into results.json."""
    (HERE / name / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    page = HERE / name / "README.md"
    before, _, rest = page.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    text = table(described(name), results["rows"])
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")
    print(text)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m replications",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = sorted(path.parent.name for path in HERE.glob("*/replication.toml"))
    parser.add_argument("name", choices=names)
    parser.add_argument("--data", default=os.environ.get("FEDEXP_TEST_DATA", "."))
    parser.add_argument("--workdir", default="runs/replications")
    parser.add_argument("--only", default="", help="rows with this in their labels")
    parser.add_argument("--gin_param", action="append", default=[], help="for all runs")
    parser.add_argument("--table", action="store_true", help="trains nothing")
    given = parser.parse_args()
    folder = Path(given.workdir) / given.name
    if not given.table:
        try:
            train(given.name, given.only, os.path.abspath(given.data), folder, given.gin_param)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)
    plan, kept = described(given.name), HERE / given.name / "results.json"
    rows = json.loads(kept.read_text())["rows"] if kept.exists() else {}
    rows |= measured(plan, folder)
    labels = [row["label"] for row in plan["rows"] if row["label"] in rows]
    write(given.name, {"machine": machine.machine(), "rows": {name: rows[name] for name in labels}})


if __name__ == "__main__":
    main()
