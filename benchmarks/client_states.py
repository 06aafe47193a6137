"""Measures what client states cost: memory, bytes of a checkpoint, and a round's time against FedAvg.

    python -m benchmarks.client_states [--cases cnn ...] [--before ../fedexp-before] [--folder /tmp]

SCAFFOLD keeps a control variate of the model's size for each client. A process gives states to the clients
that have been trained already, and then trains in a workdir on the disk and saves after every turn of
rounds. FedAvg takes turns with it, and with `--before` an earlier fedexp, where states fit into memory twice;
on a machine that others use, CPU seconds tell more than the clock.
A checkpoint's bytes are those of its folder, and of the rows and the index that are new; `disk_bytes` is what
the kernel counts as sent to the disk in a turn. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import machine, spread

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "client_states.json"
COHORT, EXAMPLES, SEED = 10, 20, 0


class Case(NamedTuple):
    """What is trained.

    Attributes:
      model: of `fedexp.models`.
      side: of the square images, in pixels.
      clients: in all.
      seen: clients that have a state.
      rounds: a turn has.
      fits_twice: whether the states fit into memory twice, as an earlier fedexp needs them to.
    """

    model: str
    side: int
    clients: int
    seen: int
    rounds: int
    fits_twice: bool = True


CASES = {
    "cnn_few": Case("EmnistCNN", 28, 3400, 100, 5),
    "cnn": Case("EmnistCNN", 28, 3400, 3400, 5, fits_twice=False),
    "logistic_few": Case("EmnistLogistic", 14, 342_477, 3400, 50),
    "logistic": Case("EmnistLogistic", 14, 342_477, 342_477, 50),
}
FEDAVG, AFTER, BEFORE = "fedavg", "scaffold", "scaffold before"


class Run:
    """A run whose turns are asked for one by one."""

    def __init__(self, case: Case, algorithm: str, workdir: Path):
        import jax
        import numpy as np
        import optax

        from fedexp import algorithms, models
        from fedexp.checkpointing import CheckpointPlan, Saver
        from fedexp.data import ClientBatching, FederatedDataset, FederatedSplits, uniform
        from fedexp.session import Session, Setup
        from fedexp.tasks import classification

        rng, shape = np.random.default_rng(SEED), (case.side, case.side)
        examples = EXAMPLES if case.clients < 10_000 else 4
        x = rng.integers(0, 256, (case.clients * examples, *shape), np.uint8)
        data = FederatedDataset(
            {"x": x, "y": rng.integers(0, 10, len(x), np.int32)},
            np.arange(case.clients + 1) * examples,
            np.arange(case.clients).astype("U6"),
        )
        task = classification(getattr(models, case.model)(num_classes=10), num_classes=10)
        if algorithm == "scaffold":
            trained = algorithms.scaffold(task, 0.01)
        else:
            trained = algorithms.fedavg(task, optax.sgd(0.01), optax.sgd(1.0))
        self._case, self._workdir = case, workdir
        self.session = Session(
            Setup(
                FederatedSplits(data, data),
                task,
                trained,
                num_rounds=10**6,
                sampler=uniform(COHORT),
                batching=ClientBatching(10),
                evaluations=[],
                seed=SEED,
            )
        )
        states = self.session.engine.client_states
        plan = CheckpointPlan(best_metric=None)
        self._saver = Saver(workdir, plan, states, {})
        self._saver.restore(self.session.first.state)
        if states is not None:
            self._fill(states)
        self._rounds = self.session.rounds(self.session.first)
        jax.block_until_ready(self._advance(case.rounds).state)
        self._save()

    def _fill(self, states: Any) -> None:
        import jax
        import numpy as np

        chosen = np.random.default_rng(1).permutation(self._case.clients)[: self._case.seen]
        nobody = states.gather(np.zeros(0, int), np.zeros(0, int), (32,))
        rng = np.random.default_rng(2)
        for begin in range(0, len(chosen), 32):
            part = chosen[begin : begin + 32]
            # Numbers that no checkpoint could compress.
            table = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32) - 0.5, nobody)
            states.scatter(part, np.arange(len(part)), table)

    def _advance(self, count: int) -> Any:
        self._cohorts = []
        for _ in range(count):
            self.round = next(self._rounds)
            assert self.round.prepared is not None
            self._cohorts.append(self.round.prepared.clients)
        return self.round

    def _save(self) -> None:
        from fedexp.checkpointing import Saved

        self._saver.save(Saved(self.round.number, self.round.state, [], None))

    def turn(self) -> dict[str, float]:
        """Rounds and a checkpoint: what they take, and what is on the disk then."""
        import jax

        self._saver.wait()
        stored, sent = self._stored(), _status("io")["write_bytes"]
        begin, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(self._advance(self._case.rounds).state)
        trained, cpu = time.perf_counter(), time.process_time() - cpu
        self._save()
        saved = time.perf_counter()
        self._saver.wait()
        complete = time.perf_counter()
        os.sync()
        status, folder = _status("status"), self._workdir / "checkpoints" / str(self.round.number)
        return {
            "round_seconds": (trained - begin) / self._case.rounds,
            "round_cpu_seconds": cpu / self._case.rounds,
            "save_seconds": saved - trained,
            "background_seconds": complete - saved,
            "checkpoint_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
            "index_bytes": self._stored() - stored,
            "changed_bytes": self._changed(),
            "disk_bytes": _status("io")["write_bytes"] - sent,
            "resident_bytes": status["VmRSS"] * 1024,
            "peak_bytes": status["VmHWM"] * 1024,
        }

    def _stored(self) -> int:
        return sum(f.stat().st_size for f in self._workdir.glob("client_states/*/*.index"))

    def _changed(self) -> int:
        """Of the rows that this turn's rounds have written, each once."""
        import numpy as np

        states = self.session.engine.client_states
        if states is None:
            return 0
        row = sum(leaf.nbytes for leaf in states._first)
        return len(np.unique(np.concatenate(self._cohorts))) * row


def _status(name: str) -> dict[str, int]:
    content = Path(f"/proc/self/{name}").read_text()
    return {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+)", content, re.M)}


def work(case: str, algorithm: str, workdir: str) -> None:
    """A fresh process: a line of JSON for every line that it reads."""
    from fedexp import runtime

    runtime.start()
    run = Run(CASES[case], algorithm, Path(workdir))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(run.turn()), flush=True)


def measure(case: str, before: Path | None, turns: int, scratch: Path) -> dict[str, Any]:
    """Medians over turns of what each process finds, and ratios of its rounds' time to others'."""
    sources = {FEDAVG: ROOT, AFTER: ROOT}
    if before is not None and CASES[case].fits_twice:
        sources[BEFORE] = before.resolve()
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(_process(case, name, source, scratch))
            for name, source in sources.items()
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
        for turn in range(turns):
            # In any order, for what is still on its way to the disk slows the next one down.
            for name in random.Random(turn).sample(sorted(processes), len(processes)):
                found[name].append(_turn(processes[name]))
    measured: dict[str, Any] = {
        name: {key: statistics.median(turn[key] for turn in own) for key in own[0]}
        for name, own in found.items()
    }
    for name, other in itertools.permutations(found, 2):
        pairs = list(zip(found[name], found[other], strict=True))
        for key in ("round_seconds", "round_cpu_seconds"):
            ratios = measured[name].setdefault(f"{key}_to", {})
            ratios[other] = spread([own[key] / others[key] for own, others in pairs])
    return measured


@contextlib.contextmanager
def _process(case: str, name: str, source: Path, scratch: Path) -> Iterator[subprocess.Popen[str]]:
    workdir = scratch / name.replace(" ", "_")
    workdir.mkdir()
    process = subprocess.Popen(
        [sys.executable, __file__, "--work", case, name.split()[0], str(workdir)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{source}:{ROOT}"},
        cwd=source,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(workdir)


def _turn(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--before", type=Path, help="the checkout of an earlier fedexp")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where there is room for the largest case")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work)
        return
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in arguments.cases:
        about = machine()
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            found = measure(case, arguments.before, arguments.turns, Path(scratch))
        content[case] = {"machine": about, "case": CASES[case]._asdict(), **found}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        for name, row in found.items():
            cells = [f"{case} {name}"]
            for key in ("round_seconds_to", "round_cpu_seconds_to"):
                cells += [f"{key} {o}: {r['median']:.2f}" for o, r in row[key].items()]
            cells += [f"{key} {row[key] / 2**20:.1f} MiB" for key in row if key.endswith("bytes")]
            cells += [f"{key} {row[key]:.3f}" for key in row if key.endswith("seconds")]
            print(", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
