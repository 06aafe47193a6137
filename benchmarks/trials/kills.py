"""Kills small real runs at random moments and starts them again, until they are done.

A run of SCAFFOLD on the tests' linear problem, or of a shipped file on a few generated writers, is what
`python -m fedexp.main` makes of a command line, in a process of its own, forked from one that has imported
everything: so a trial costs seconds. What comes out is compared with an uninterrupted run: parameters bit for
bit, client states in files by their checksums, `final.json`, and what TensorBoard makes of the events, every
round once.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.trials import RESULTS, save
from fedexp.engine import state_store

_LINEAR = (
    "train.algorithm = @scaffold",
    "scaffold.client_learning_rate = 0.05",
    "evaluate.every = 4",
)
_SMALL = (
    "train.dataset = @glyphs()",
    "glyphs.num_writers = 12",
    "classification.model = @EmnistLogistic()",
    "EmnistLogistic.num_classes = 62",
    "evaluate.every = 20",
)
# Of every twenty interruptions; the others are SIGKILL.
_GENTLE = ("SIGINT", "SIGTERM", "SIGINT twice")
_TIMEOUT = 120.0
# What differs anyway, and what every start before the first checkpoint shows again.
_ONCE_A_START = ("training/perf/", "config/", "training/example_images")
_BEGUN = "begun"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Says how long, and where."""
    parser.add_argument("--minutes", type=float, default=10.0, help="until no new run is begun")
    parser.add_argument("--rounds", type=int, default=600, help="of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--bucket", action="store_true", help="runs in s3://, of a local server")
    parser.add_argument(
        "--most-seconds", type=float, default=1.5, help="from start to interruption"
    )
    parser.add_argument("--config", help="a shipped file; SCAFFOLD on a linear problem without")
    parser.add_argument("--param", action="append", default=[], help="a binding of it")
    parser.add_argument("--output", type=Path, default=RESULTS / "trials_kills.json")


def run(args: argparse.Namespace) -> None:
    """Does the trials, prints a table of outcomes, and writes them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedexp.trainer", "fedexp.progress", "orbax.checkpoint"])
    rng = random.Random(args.seed)
    outcomes: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    with _place(args.bucket) as (here, root):
        bindings = [*(_SMALL if args.config else _LINEAR), *args.param, "CheckpointPlan.every = 6"]
        flags = [
            f"--gin_file={args.config or 'tests/support/linear.gin'}",
            *(f"--gin_param={binding}" for binding in bindings),
            f"--gin_param=train.num_rounds = {args.rounds}",
        ]
        trials = _Trials(context, here, flags, rng, args.most_seconds)
        expected = trials.uninterrupted(f"{root}/whole")
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            workdir = f"{root}/run{outcomes['runs']}"
            outcomes["runs"] += 1
            try:
                trials.interrupted(workdir, end, outcomes)
                found = _outcome(workdir, here)
            except _Failure as failure:
                failures.append(f"{workdir}: {failure}")
                continue
            for part in expected:
                same = _same(found[part], expected[part])
                outcomes[f"{part}: {'as uninterrupted' if same else 'differs'}"] += 1
                if not same:
                    failures.append(f"{workdir}: {part} differs")
    _tell(args, outcomes, failures)


class _Failure(Exception):
    """A run that ended as it should not."""


class _Trials:
    """Starts, interrupts and ends runs.

    Args:
      context: how processes are forked.
      here: folder of this machine for what runs print.
      flags: of a run.
      rng: of moments and kinds.
      most_seconds: from a start to its interruption.
    """

    def __init__(
        self, context: Any, here: Path, flags: list[str], rng: random.Random, most_seconds: float
    ):
        self._context = context
        self._here = here
        self._flags = flags
        self._rng = rng
        self._most_seconds = most_seconds

    def uninterrupted(self, workdir: str) -> dict[str, Any]:
        """What a run leaves that nobody interrupts."""
        process, said = self._start(workdir)
        process.join(_TIMEOUT)
        if process.exitcode != 0:
            raise SystemExit(f"the uninterrupted run ended with {process.exitcode}:\n{said()}")
        return _outcome(workdir, self._here)

    def interrupted(self, workdir: str, end: float, done: collections.Counter[str]) -> None:
        """Runs to the end, with interruptions until the clock says `end`; counts those of each kind."""
        while True:
            process, said = self._start(workdir)
            kind = self._rng.choice(_GENTLE) if self._rng.random() < 0.1 else "SIGKILL"
            seconds = self._rng.uniform(0.0, self._most_seconds)
            while kind != "SIGKILL" and not said() and process.exitcode is None:
                time.sleep(0.001)  # Until it is in fedexp's hands.
            process.join(seconds if time.monotonic() < end else _TIMEOUT)
            if process.exitcode is not None or time.monotonic() >= end + _TIMEOUT:
                break
            self._send(process, kind)
            process.join(_TIMEOUT)
            self._check(process, kind, said())
            done[kind] += process.exitcode != 0
            if process.exitcode == 0:
                break
        if process.exitcode != 0:
            process.kill()
            raise _Failure(f"ended with {process.exitcode}: {said()}")

    def _start(self, workdir: str) -> tuple[Any, Any]:
        output = self._here / "output"
        arguments = [*self._flags, f"--workdir={workdir}"]
        output.write_text("")
        process = self._context.Process(target=_main, args=(arguments, str(output)))
        process.start()
        return process, output.read_text

    def _send(self, process: Any, kind: str) -> None:
        number = signal.Signals[kind.split()[0]]
        os.kill(process.pid, number)
        if kind.endswith("twice"):
            time.sleep(self._rng.uniform(0.0, 0.1))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def _check(self, process: Any, kind: str, said: str) -> None:
        """A signal ends a run with its number and without a traceback; one that was done ends with 0."""
        number = signal.Signals[kind.split()[0]]
        wanted = (-number,) if kind == "SIGKILL" else (128 + number, -number)
        if process.exitcode not in (*wanted, 0) or "Traceback" in said:
            raise _Failure(f"after {kind} it ended with {process.exitcode}: {said}")


def _main(arguments: list[str], output: str) -> None:
    """What `python -m fedexp.main` does, with its output in a file."""
    with contextlib.suppress(KeyboardInterrupt), open(output, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        print(_BEGUN, flush=True)
    sys.argv = ["fedexp.main", *arguments]
    runpy.run_module("fedexp.main", run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def _place(bucket: bool) -> Iterator[tuple[Path, str]]:
    """Yields a folder of this machine, and one for workdirs, there or in a bucket."""
    with tempfile.TemporaryDirectory(prefix="fedexp-kills-") as folder:
        if not bucket:
            yield Path(folder), folder
            return
        import moto.server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = moto.server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        fsspec.filesystem("s3").mkdir("kills")
        try:
            yield Path(folder), "s3://kills"
        finally:
            server.stop()


def _outcome(workdir: str, here: Path) -> dict[str, Any]:
    """What a finished run has left."""
    with tempfile.TemporaryDirectory(dir=here) as folder:
        if workdir.startswith("s3://"):
            files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
            files.get(workdir, folder + "/run", recursive=True)
            workdir = folder + "/run"
        final = json.loads((Path(workdir) / "final.json").read_text())
        return {
            "final.json": {name: value for name, value in final.items() if name != "perf"},
            "parameters and states": _parameters(Path(workdir)),
            "TensorBoard": _shown(Path(workdir)),
        }


def _parameters(workdir: Path) -> dict[str, Any]:
    """The arrays of the last checkpoint, and the checksum of every client's row in its store of states."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir / "checkpoints", item_names=("state", "about")) as manager:
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(), about=ocp.args.JsonRestore())
        last = manager.latest_step()
        found: Any = manager.restore(last, args=args)
    arrays = {name: np.asarray(array) for name, array in found.state.items()}
    store = found.about["metadata"].get("client_states")
    return {**arrays, "rows of clients": store and _checksums(workdir, store, last)}


def _checksums(workdir: Path, store: str, round_: int) -> dict[int, int]:
    file = state_store._File(workdir / "client_states" / store / "0.index", os.O_RDONLY)
    moves = np.concatenate([moved for _, moved, _ in state_store._moves(file, round_)])
    return {client: checksum for client, _, checksum in moves.tolist()}


def _shown(workdir: Path) -> dict[tuple[str, str], list[tuple[int, bytes]]]:
    """(folder, tag) -> every (step, value) that TensorBoard keeps, but those of a start."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    from tests.support import tensorboard  # noqa: F401  So that no TensorFlow is imported.

    shown = {}
    for folder in sorted({path.parent for path in workdir.rglob("events.*")}):
        accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
        accumulator.Reload()
        for tag in accumulator.Tags()["tensors"]:
            if not tag.startswith(_ONCE_A_START):
                events = accumulator.Tensors(tag)
                values = [(event.step, event.tensor_proto.SerializeToString()) for event in events]
                shown[str(folder.relative_to(workdir)), tag] = values
    return shown


def _same(found: Any, expected: Any) -> bool:
    try:
        np.testing.assert_equal(found, expected)
    except AssertionError:
        return False
    return True


def _tell(
    args: argparse.Namespace, outcomes: collections.Counter[str], failures: list[str]
) -> None:
    table = Table("outcome", "times", title=f"Killed runs of {args.rounds} rounds")
    for name, times in outcomes.items():
        table.add_row(name, str(times))
    table.add_row("failures", str(len(failures)))
    Console().print(table)
    for failure in failures:
        print(failure)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    where = "s3" if args.bucket else "local"
    results[f"{where}, {args.config}" if args.config else where] = {
        **({"params": args.param} if args.config else {}),
        "rounds": args.rounds,
        "minutes": args.minutes,
        "seed": args.seed,
        "machine": machine(),
        "outcomes": dict(outcomes),
        "failures": failures,
    }
    save(args.output, results)
