"""Rounds of the EMNIST CNN against devices of described topologies, for cohorts of 10 to 10 000 clients."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import fedjax_announcement as announcement
from benchmarks.tpu.costs import Program, Trips
from benchmarks.tpu.programs import chip_of, compiled_round, memory_of, session_of, total
from fedexp.contracts import TRAIN
from fedexp.engine import PreparedRound
from fedexp.session import Session

IMAGE = Path(__file__).parents[2] / "docs" / "images" / "tpu_scaling.png"
COHORTS = {10: 20, 100: 20, 1000: 5, 10_000: 2}  # Clients -> rounds that the mean is taken over.
COPIES = 4  # Of the 3400 writers, so that 10 000 of them can take part.
# Bytes a second that a chip can send, and receive as many; cloud.google.com/tpu/docs/v5e.
LINKS = {"v5e": 200e9}


def measure(topology: str, strategy: str) -> dict[str, Any]:
    """Compiles the round of the largest cohort; a row of the report, with the estimates of all cohorts."""
    program, row, rounds = None, {}, {}
    for cohort, count in sorted(COHORTS.items(), reverse=True):
        bindings = [f"hollow.copies = {COPIES}", f"uniform.cohort_size = {cohort}"]
        session = session_of("emnist", topology, strategy, 1, bindings)
        engine = session.engine
        prepared = [engine.prepare(number, session.sample(number)) for number in range(count)]
        if program is None:
            compiled = compiled_round(engine, session.params, prepared[0])
            program = Program(compiled.as_text(), chip_of(topology))
            memory = memory_of(compiled) | {"chip": int(chip_of(topology).memory)}
            row = {
                "topology": topology,
                "strategy": strategy,
                "devices": engine.placement.num_devices,
                "hosts": engine.placement.num_processes,
                "memory": memory,
                "collectives": program.collectives(),
                "all_reduce_seconds_at_least": all_reduce(
                    topology, engine.placement.num_devices, engine.model_bytes
                ),
            }
        seconds = [
            max(total(program.cost(one)).seconds for one in busy_devices(session, one_round))
            for one_round in prepared
        ]
        rounds[cohort] = statistics.fmean(seconds)
    return row | {"rounds": {str(cohort): rounds[cohort] for cohort in COHORTS}}


def busy_devices(session: Session, prepared: PreparedRound) -> list[Trips]:
    """Trips of the devices, of all hosts, that have clients; with one lane, a segment is a client."""
    (_,) = session.engine.preparer.batch_sizes(TRAIN)
    batching, sizes = session.setup.batching, session.splits[TRAIN].client_sizes
    steps = batching.num_steps(batching.limited(np.asarray(sizes)[prepared.clients]))
    devices = prepared.slots // prepared.num_slots
    clients, steps = np.bincount(devices), np.bincount(devices, weights=steps)
    busy = zip(clients, steps, strict=True)
    return [Trips(ends, count, [1.0], ends) for ends, count in busy if ends]


def all_reduce(topology: str, devices: int, model_bytes: int) -> float | None:
    """Seconds that a sum of models takes at least: a device sends 2 (D - 1) / D of one; None if unknown."""
    bandwidth = LINKS.get(topology.partition(":")[0])
    return bandwidth and 2 * (devices - 1) / devices * model_bytes / bandwidth


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table, and draws it."""
    header = [
        "chips, strategy",
        "devices",
        "hosts",
        "memory, GiB",
        "collectives",
        "all-reduce, at least",
    ]
    header += [f"{cohort:,} clients" for cohort in COHORTS]
    cells = []
    for row in sorted(rows, key=lambda row: (row["topology"][:2], row["devices"])):
        links = row["all_reduce_seconds_at_least"]
        out, inside = (len(row["collectives"][where]) for where in ("outside", "inside"))
        cells.append(
            [
                f"{row['topology']}, {row['strategy']}",
                str(row["devices"]),
                str(row["hosts"]),
                f"{row['memory']['all'] / 2**30:.2f}",
                f"{out} outside, {inside} in loops",
                "unknown" if links is None else f"{1e6 * links:.0f} us",
                *(f"{1e3 * seconds:,.1f} ms" for seconds in row["rounds"].values()),
            ]
        )
    title = "A round of the EMNIST CNN: the compiler's estimates, without links; nothing was run"
    table = announcement.Table(title, header, cells)
    print(table.title, table.markdown(), sep="\n\n")
    draw(rows).savefig(IMAGE, dpi=110)
    print(f"drawn to {IMAGE}")


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Speed against devices, a curve for every cohort size, a panel for every chip."""
    counts = Counter(row["topology"].partition(":")[0] for row in rows)
    chips = sorted(chip for chip, count in counts.items() if count > 1) or sorted(counts)
    figure = Figure(figsize=(5.5 * len(chips), 4.2), layout="constrained")
    for axes, chip in zip(np.ravel(figure.subplots(1, len(chips))), chips, strict=True):
        of_chip = sorted(
            (row for row in rows if row["topology"].startswith(f"{chip}:")),
            key=lambda row: row["devices"],
        )
        devices = [row["devices"] for row in of_chip]
        for cohort in COHORTS:
            seconds = [row["rounds"][str(cohort)] for row in of_chip]
            speed = [seconds[0] / one for one in seconds]
            axes.plot(devices, speed, marker="o", label=f"{cohort:,} clients")
        axes.plot(devices, devices, color="grey", linestyle=":", label="as many times as devices")
        axes.set(
            xscale="log", yscale="log", title=f"TPU {chip}: the compiler's estimates, without links"
        )
        axes.set(xlabel="devices", ylabel="times as fast as one device", xticks=devices)
        axes.set_xticks(devices, [str(number) for number in devices])
        axes.legend()
    return figure
