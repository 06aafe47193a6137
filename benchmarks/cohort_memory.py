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
import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

POPULATION, EXAMPLES, BATCH_SIZE = 1000, 20, 10
UPDATES, DEVICES = 1000, 8
# Strategy, lanes, devices.
STRATEGIES = {
    "jit(lanes=1)": ("jit", 1, 1),
    "jit(lanes=4)": ("jit", 4, 1),
    f"mesh(lanes=1) on {DEVICES} devices": ("mesh", 1, DEVICES),
}
RESULTS = Path(__file__).parent / "results" / "cohort_memory.json"
MIB = 1 << 20


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, cohort_size: int) -> dict[str, float]:
    """Runs in a process of its own: JAX is imported here, so that the parent stays small."""
    import jax
    import numpy as np
    import optax

    from fedexp import runtime
    from fedexp.algorithms import fedavg
    from fedexp.data import ClientBatching, FederatedDataset, uniform
    from fedexp.models.emnist import EmnistCNN
    from fedexp.strategies import Runner, jit, mesh
    from fedexp.tasks import classification

    kind, lanes, devices = STRATEGIES[name]
    runtime.start(num_cpu_devices=devices)
    rng = np.random.default_rng(0)
    rows = POPULATION * EXAMPLES
    dataset = FederatedDataset(
        {
            "x": rng.integers(0, 256, (rows, 28, 28), np.uint8),
            "y": rng.integers(0, 62, rows, np.int32),
        },
        np.arange(0, rows + 1, EXAMPLES),
        np.array([f"client{i}" for i in range(POPULATION)]),
    )
    task = classification(EmnistCNN())
    params = task.init(jax.random.key(0), dataset.slice(0, 1))
    algorithm = fedavg(task, optax.sgd(0.01), optax.sgd(1.0))
    runner = Runner(
        {"jit": jit, "mesh": mesh}[kind](lanes),
        algorithm,
        dataset,
        ClientBatching(BATCH_SIZE),
        params=params,
        cohort_size=cohort_size,
        seed=0,
    )
    state = jax.block_until_ready(runner.start(params))
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    set_up = resident()
    for round_ in range(math.ceil(UPDATES / cohort_size)):
        cohort = uniform(cohort_size).sample(dataset.client_ids, 0, round_)
        prepared = runner.prepare(round_, cohort)
        state = jax.block_until_ready(runner.run(state, prepared).server_state)
    highest = peak()
    program = runner._round.lower(state, prepared.inputs, prepared.examples, None).compile()
    return {
        "set_up_mib": set_up / MIB,
        "peak_mib": highest / MIB,
        "growth_mib": (highest - set_up) / MIB,
        "xla_temporaries_mib": program.memory_analysis().temp_size_in_bytes / MIB,
        "model_mib": model / MIB,
    }


def in_fresh_process(name: str, cohort_size: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cohort_memory", "--measure", name]
    command += ["--cohorts", str(cohort_size)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def machine() -> dict[str, str | int | float]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpus": os.cpu_count(),
        "memory_gib": round(memory / 1024**3, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--measure", choices=STRATEGIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.cohorts[0])))
        return
    columns = ("set_up_mib", "peak_mib", "growth_mib", "xla_temporaries_mib")
    print(f"{'strategy':28s}{'cohort':>8s}" + "".join(f"{name:>21s}" for name in columns))
    rows = []
    for name in STRATEGIES:
        for cohort_size in arguments.cohorts:
            row = in_fresh_process(name, cohort_size)
            rows.append({"strategy": name, "cohort": cohort_size, **row})
            cells = "".join(f"{row[column]:21.1f}" for column in columns)
            print(f"{name:28s}{cohort_size:8d}{cells}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
