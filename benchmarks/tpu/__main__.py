"""Compiles the rounds of shipped experiments for TPUs that are not there, and says what the compiler expects.

    pip install -e '.[tpu]'
    python -m benchmarks.tpu --topology=v2:2x2 --workload=emnist,stackoverflow --strategy=jit,mesh
    python -m benchmarks.tpu --topology=v2:2x2,v5e:2x2,v6e:2x2 --convolutions --lanes=1,4,10,32
    python -m benchmarks.tpu --topology=v5e:2x2,v5e:2x4,v5e:4x4,v5e:8x8,v2:2x2 --strategy=jit,mesh --scaling

The programs are those that training and evaluation run, server included, compiled by libtpu for the devices
of a described topology. Nothing is run: all figures are the compiler's ESTIMATES. Loops count by the trips
of real schedules. docs/accelerators.md has the tables, and says what they are worth.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import operator
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Else JAX looks for the TPU that libtpu speaks of.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
from flax import linen as nn

from benchmarks import fedjax_announcement as announcement
from benchmarks.peers.protocol import versions
from benchmarks.tpu import scaling
from benchmarks.tpu.costs import ONCE, Chip, Cost, Program, Trips
from benchmarks.tpu.programs import (
    PLACEMENTS,
    WORKLOADS,
    as_on_tpu,
    chip_of,
    compiled_round,
    memory_of,
    needed_flops,
    session_of,
    total,
    trips,
)
from fedexp.contracts import TRAIN
from fedexp.errors import UserError
from fedexp.evaluators import Evaluator
from fedexp.models import emnist, layers
from fedexp.session import Session

RESULTS = Path(__file__).parent.parent / "results"
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
EVALUATED = 256  # Examples at once, as evaluations take them on accelerators.


# ---- what comes out ----


def against_xla(program: Program, compiled: jax.stages.Compiled) -> dict[str, float]:
    """Our counts over XLA's own, with every loop counted once."""
    cost, xla = total(program.cost(ONCE)), compiled.cost_analysis()
    return {"flops": cost.flops / xla["flops"], "bytes": cost.bytes / xla["bytes accessed"]}


def measure(
    workload: str, topology: str, strategy: str, lanes: int | Literal["auto"], cohorts: int
) -> dict[str, Any]:
    """Compiles a workload's round and evaluation; returns a row of the report."""
    session, chip = session_of(workload, topology, strategy, lanes), chip_of(topology)
    engine = session.engine
    rounds = [engine.prepare(number, session.sample(number)) for number in range(cohorts)]
    begin = time.perf_counter()
    compiled = compiled_round(engine, session.params, rounds[0])
    seconds_to_compile = time.perf_counter() - begin
    program = Program(compiled.as_text(), chip)
    batch_sizes = engine.preparer.batch_sizes(TRAIN)
    slowest, schedules = [], []
    for prepared in rounds:
        of_devices = [(program.cost(one), one) for one in trips(prepared, batch_sizes)]
        parts, schedule = max(of_devices, key=lambda device: total(device[0]).seconds)
        slowest.append(parts)
        schedules.append(schedule)
    mean = Cost(*map(statistics.fmean, zip(*map(total, slowest), strict=True)))
    of_sizes = needed_flops(session)
    needed = engine.preparer.lanes * statistics.fmean(
        one.steps * sum(map(operator.mul, one.shares, of_sizes)) for one in schedules
    )
    floor = max(needed / chip.flops, mean.bytes / chip.bandwidth)
    steps = [program.of_steps(one) for one in schedules]
    evaluation = evaluated(session, chip)
    num_rounds = session.setup.num_rounds
    return {
        "topology": topology,
        "strategy": strategy,
        "devices": engine.placement.num_devices,
        "lanes": engine.preparer.lanes,
        "batch_sizes": batch_sizes,
        "cohorts": cohorts,
        "seconds_to_compile": round(seconds_to_compile, 1),
        "memory": memory_of(compiled) | {"chip": int(chip.memory)},
        "round": mean._asdict()
        | {"needed_flops": needed, "floor_seconds": floor, "floor_share": floor / mean.seconds},
        "parts": {
            name: statistics.fmean(parts[name].seconds for parts in slowest) for name in slowest[0]
        },
        "steps": {
            kind: Cost(
                *map(statistics.fmean, zip(*(one[kind] for one in steps), strict=True))
            )._asdict()
            for kind in steps[0]
        },
        "utilisation": statistics.fmean(prepared.utilisation for prepared in rounds),
        "collectives": program.collectives(),
        "against_xla": against_xla(program, compiled),
        "evaluation": evaluation,
        "whole": {
            "rounds": num_rounds,
            "seconds": num_rounds * mean.seconds + evaluation["seconds"],
        },
    }


def evaluated(session: Session, chip: Chip) -> dict[str, Any]:
    """A full evaluation of the server's parameters on the test split."""
    test, placement = session.splits["test"], session.engine.placement
    evaluator = Evaluator(session.setup.task, test, EVALUATED, placement)
    compiled = evaluator.compiled(session.first.state.params)
    chunk = total(Program(compiled.as_text(), chip).cost(ONCE))
    return {
        "examples": test.num_examples,
        "seconds": evaluator.num_chunks * chunk.seconds,
        "memory": memory_of(compiled)["all"],
    }


# ---- ways to write the CNN's layers ----


def patches(x, kernel, *, strides, padding):
    del padding  # The CNN has none.
    return layers._convolve_patches(x, kernel, strides)


def plain(x, kernel, *, strides, padding):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


FLAX_POOL = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
WAYS = {
    "patches": (patches, layers._max_pool_sharing),
    "lax.conv": (plain, layers._max_pool_sharing),
    "lax.conv, nn.max_pool": (plain, FLAX_POOL),
    "pairs of columns": (layers.convolve, layers.max_pool_2x2),
}


def step_of(way: str, topology: str, lanes: int | Literal["auto"]) -> dict[str, Any]:
    """A local step of the EMNIST CNN, written in one of the ways; a row of the report."""
    convolve, pool = WAYS[way]
    with (
        mock.patch.object(layers, "convolve", convolve),
        mock.patch.object(emnist, "max_pool_2x2", pool),
    ):
        session = session_of("emnist", topology, "jit", lanes)
        prepared = session.engine.prepare(0, session.sample(0))
        compiled = compiled_round(session.engine, session.params, prepared)
    sizes, lanes = session.engine.preparer.batch_sizes(TRAIN), session.engine.preparer.lanes
    full = Trips(1, 1, [size == sizes[-1] for size in sizes])
    step = Program(compiled.as_text(), chip_of(topology)).cost(full)["steps"]
    return {
        "topology": topology,
        "lanes": lanes,
        "way": way,
        "step": step._asdict(),
        "microseconds_an_example": 1e6 * step.seconds / (lanes * sizes[-1]),
        "temporaries": memory_of(compiled)["temporaries"],
    }


# ---- the command ----


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def lanes_of(text: str) -> list[int | str]:
    return [word if word == "auto" else int(word) for word in words(text)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--topology", type=words, default=["v2:2x2"], help="as v2:2x2,v5e:2x2")
    add("--workload", type=words, default=["emnist"], help=", ".join(WORKLOADS))
    add("--strategy", type=words, default=["jit"], help=", ".join(PLACEMENTS))
    add("--lanes", type=lanes_of, default=["auto"], help="numbers, or auto")
    add("--cohorts", type=int, default=20, help="over whose schedules the mean is taken")
    add("--convolutions", action="store_true", help="compare ways to write the EMNIST CNN's layers")
    add("--scaling", action="store_true", help="estimate rounds of EMNIST against devices")
    add("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args(argv)
    for option, known in (("workload", WORKLOADS), ("strategy", PLACEMENTS)):
        if unknown := [word for word in getattr(arguments, option) if word not in known]:
            parser.error(f"--{option} takes {', '.join(known)}; got {unknown[0]!r}")
    try:
        with as_on_tpu():
            if arguments.convolutions:
                for settings in itertools.product(WAYS, arguments.topology, arguments.lanes):
                    rows = keep(arguments.output, "convolutions", step_of(*settings))
                show_convolutions(rows)
                return 0
            if arguments.scaling:
                for settings in itertools.product(arguments.topology, arguments.strategy):
                    rows = keep(arguments.output, "scaling", scaling.measure(*settings))
                scaling.show(rows)
                return 0
            for workload in arguments.workload:
                where = arguments.topology, arguments.strategy, arguments.lanes
                for settings in itertools.product(*where):
                    row = measure(workload, *settings, arguments.cohorts)
                    rows = keep(arguments.output, workload, row)
                show(workload, rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


KEY = ("topology", "strategy", "lanes", "way")


def keep(folder: Path, name: str, new: dict[str, Any]) -> list[dict[str, Any]]:
    """Puts a row into a file of results, instead of one of the same settings; returns all."""
    path = folder / f"tpu_{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if any(row.get(key) != new.get(key) for key in KEY)] + [new]
    rows.sort(key=lambda row: [row.get(key, "") for key in KEY])
    note = "estimates of the compiler for a described topology; nothing was run"
    report = {"note": note, "versions": versions(PACKAGES), "rows": rows}
    path.write_text(json.dumps(report, indent=2) + "\n")
    return rows


def show(workload: str, rows: list[dict[str, Any]]) -> None:
    """Prints a workload's table."""
    header = ["chips, strategy", "lanes", "memory, GiB", "GFLOP", "GB", "round", "floor"]
    header += ["collectives", "evaluation", "whole experiment"]
    cells = []
    for row in rows:
        round_, memory = row["round"], row["memory"]
        out, inside = (len(row["collectives"][where]) for where in ("outside", "inside"))
        cells.append(
            [
                f"{row['topology']}, {row['strategy']} on {row['devices']}",
                str(row["lanes"]),
                f"{memory['all'] / 2**30:.2f} of {memory['chip'] / 2**30:.1f}",
                f"{round_['flops'] / 1e9:.0f}",
                f"{round_['bytes'] / 1e9:.1f}",
                f"{1e3 * round_['seconds']:.0f} ms",
                f"{100 * round_['floor_share']:.1f} %",
                f"{out} outside, {inside} in loops",
                f"{row['evaluation']['seconds']:.1f} s",
                announcement.duration(row["whole"]["seconds"]),
            ]
        )
    title = f"{workload}: the compiler's estimates, a device; nothing was run"
    table = announcement.Table(title, header, cells)
    print(table.title, table.markdown(), sep="\n\n")
    if workload in announcement.WORKLOADS:
        print(f"Announced for FedJAX in 2021: {announcement.WORKLOADS[workload].announced}.")


def show_convolutions(rows: list[dict[str, Any]]) -> None:
    """Prints a step's time an example, and the temporaries of a round."""
    cells: dict[str, list[str]] = {}
    for row in rows:
        place = cells.setdefault(f"{row['topology']}, {row['lanes']}", [""] * len(WAYS))
        place[list(WAYS).index(row["way"])] = (
            f"{row['microseconds_an_example']:.1f} ({row['temporaries'] / 1e6:.0f})"
        )
    title = "A step, us an example (MB of temporaries): the compiler's estimates; nothing was run"
    body = [[place, *columns] for place, columns in cells.items()]
    table = announcement.Table(title, ["chips, lanes", *WAYS], body)
    print(table.title, table.markdown(), sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())
