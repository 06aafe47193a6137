"""Measures the memory of a process that trains cohorts of 10, 100 and 1000 clients.

    python -m benchmarks.cohort_memory [--cohorts 10 100 1000]

FedAvg on EmnistCNN, two batches of ten per client, from a population of 1000 whatever the cohort. Every
figure is of a fresh process: its resident memory once everything is set up, and its peak after as many
rounds as make 1000 client updates, compilation included: peaks also rise with the number of updates,
so runs of the same number of rounds would not compare. XLA's figure is what it plans for the
temporaries of a round, on one device. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.scale_curves import Setting, in_fresh_process

UPDATES, DEVICES = 1000, 8
STRATEGIES = {
    "jit(lanes=1)": Setting(examples=20, lanes=1),
    "jit(lanes=4)": Setting(examples=20, lanes=4),
    f"mesh(lanes=1) on {DEVICES} devices": Setting(
        examples=20, lanes=1, strategy="mesh", devices=DEVICES
    ),
}
COLUMNS = ("set_up_mib", "peak_mib", "growth_mib", "xla_temporaries_mib", "model_mib")
RESULTS = Path(__file__).parent / "results" / "cohort_memory.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", type=int, nargs="+", default=[10, 100, 1000])
    arguments = parser.parse_args()
    about, rows = machine(), []
    print(f"{'strategy':28s}{'cohort':>8s}" + "".join(f"{name:>21s}" for name in COLUMNS))
    for name, setting in STRATEGIES.items():
        for size in arguments.cohorts:
            rounds = math.ceil(UPDATES / size) - 1  # The first is not counted.
            row = in_fresh_process(dataclasses.replace(setting, cohort=size, rounds=rounds))
            rows.append({"strategy": name, "cohort": size, **{key: row[key] for key in COLUMNS}})
            cells = "".join(f"{row[column]:21.1f}" for column in COLUMNS)
            print(f"{name:28s}{size:8d}{cells}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
