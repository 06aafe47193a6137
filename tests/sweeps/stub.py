"""A stand-in for fedexp.main, and sweeps of it: as quick as Python starts.

`task.x` and the seed say the metric after each round; `task.mode` how it ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROUNDS = 4


def run(arguments: Sequence[str]) -> int:
    params = [a.removeprefix("--gin_param=") for a in arguments if a.startswith("--gin_param=")]
    given = dict(param.split(" = ", 1) for param in params)
    folder = Path(next(a for a in arguments if a.startswith("--workdir=")).partition("=")[2])
    x, seed = float(given["task.x"]), int(given.get("train.seed", "0"))
    mode = given.get("task.mode", "").strip("'")
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    checkpoint = folder / "checkpoint"
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    trials = next(parent for parent in folder.parents if parent.name == "trials")
    with open(trials / "begun.txt", "a") as file:
        file.write(f"{folder.name} {done}\n")
    if mode == "refused" and x == 2:
        print("error: task.x must not be 2\nsomething else", file=sys.stderr)
        return 2
    if mode == "raises" and x == 2:
        raise KeyError("no such client")
    for number in range(done + 1, ROUNDS + 1):
        time.sleep(float(given.get("task.pause", "0")))
        with open(folder / "rounds.jsonl", "a") as file:
            file.write(json.dumps({"round": number, "test/score": x * number + seed / 10}) + "\n")
        write(checkpoint, str(number))
        if stopped:
            return 128 + stopped[0]
        while mode == "hangs" and x == 2 and not stopped:
            time.sleep(0.01)
    last = {"round": ROUNDS, "test/score": x * ROUNDS + seed / 10}
    write(folder / "final.json", json.dumps({"metrics": last, "history": [last]}))
    return 0


def write(path: Path, text: str) -> None:
    """All of it or nothing, whenever it is killed."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def sweep(arguments: Sequence[str]) -> int:
    """`fedexp.sweep`, whose trials are this file's."""
    from fedexp import sweep
    from fedexp.sweeps import checking, trials

    with (
        mock.patch.object(trials.Run, "command", property(command)),
        mock.patch.object(
            checking, "ask", lambda *_, **__: checking.Told("", None, "rounds.jsonl")
        ),
    ):
        return sweep.main(arguments)


def command(run: Any) -> list[str]:
    return [sys.executable, __file__, *run.arguments, f"--workdir={run.folder}"]


if __name__ == "__main__":
    sys.exit(sweep(sys.argv[2:]) if sys.argv[1] == "sweep" else run(sys.argv[1:]))
