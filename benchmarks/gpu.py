"""Measures the bars and curves of docs/benchmarks.md on the accelerator that is there, into one file.

    make bench-gpu

They are those of `benchmarks.fedjax_announcement`, on generated data: EMNIST and Stack Overflow on one
device, on all of them, and on one in bfloat16. What the time does not suffice for is left out, and listed
so; whole experiments are run where they fit, and extrapolated, and marked so, where they do not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import fedjax_announcement as announcement
from benchmarks import machine
from fedexp.errors import UserError, check

PACKAGES = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit")
LEAST_SECONDS = 10.0  # A process that has less is not begun.


class Part(NamedTuple):
    """What one process measures.

    Attributes:
      name: in the file.
      workload: of the announcement.
      strategy: 'jit' takes one device, 'mesh' all of them.
      options: further ones of `benchmarks.fedjax_announcement`.
    """

    name: str
    workload: str
    strategy: str
    options: tuple[str, ...] = ()


# Only the cohorts that the experiments have.
_BFLOAT16 = {
    "emnist": "--gin_param=classification.compute_dtype = 'bfloat16'",
    "stackoverflow": "--gin_param=next_token.compute_dtype = 'bfloat16'",
}
# The same code in a few seconds, on a CPU too.
_SMOKE = {
    "emnist": (
        "--gin_param=glyphs.num_writers = 5",
        "--gin_param=uniform.cohort_size = 2",
        "--gin_param=train.num_rounds = 8",
        "--gin_param=classification.model = @EmnistLogistic()",
    ),
    "stackoverflow": (
        "--gin_param=stackoverflow_synthetic.num_clients = 5",
        "--gin_param=uniform.cohort_size = 2",
        "--gin_param=train.num_rounds = 8",
        "--gin_param=ClientBatching.max_examples = 20",
        "--gin_param=LSTMLanguageModel.hidden_size = 8",
    ),
}


def parts_for(num_devices: int) -> list[Part]:
    """What to measure, the most telling first."""
    strategies = ["jit"] if num_devices == 1 else ["jit", "mesh"]
    parts = [Part(name, name, kind) for kind in strategies for name in announcement.WORKLOADS]
    return parts + [
        Part(f"{name}_bfloat16", name, "jit", ("--clients_per_round=", _BFLOAT16[name]))
        for name in announcement.WORKLOADS
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--budget_s", type=float, default=600, help="seconds for everything, data included")
    add("--output", type=Path, default=Path("bench_gpu.json"), help="where the figures go")
    add("--allow_cpu", action="store_true", help="measure a CPU where there is no accelerator")
    add("--smoke", action="store_true", help="tiny data and models, to try the command itself")
    add("--only", default="", help="names of what to measure, separated by commas, as emnist")
    add("--devices", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.devices:
        print(json.dumps(found_devices()))
        return 0
    end = time.monotonic() + arguments.budget_s
    try:
        report = measure(arguments, end)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, experiment in report["experiments"].items():
        print(f"\n{name}")
        announcement.show(report | experiment)
    for name, reason in report["left_out"].items():
        print(f"- left out: {name}: {reason}")
    print(f"written to {arguments.output}")
    return 0 if report["experiments"] else 1


def measure(arguments: argparse.Namespace, end: float) -> dict[str, Any]:
    """Measures until the time `end`, and writes the file after every part."""
    accelerator = look_for_devices()
    check(
        accelerator["platform"] != "cpu" or arguments.allow_cpu,
        "JAX finds no accelerator here, only CPUs; install its plugin (docs/gpu.md), or measure them with "
        "--allow_cpu",
    )
    begin = time.monotonic()
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.machine((*machine.PACKAGES, *filter(is_installed, PACKAGES))),
        "accelerator": accelerator | {"nvidia_smi": nvidia_smi()},
        "budget_s": arguments.budget_s,
        "smoke": arguments.smoke,
        "experiments": {},
        "left_out": {},
    }
    parts = parts_for(accelerator["count"])
    names = {part.name for part in parts}
    only = {name for name in arguments.only.split(",") if name}
    check(only <= names, f"--only takes {', '.join(sorted(names))}, got {arguments.only}")
    parts = [part for part in parts if not only or part.name in only]
    for index, part in enumerate(parts):
        left = end - time.monotonic()
        try:
            check(left > LEAST_SECONDS, f"{max(left, 0):.0f} s were left for it")
            add(report, part, arguments.smoke, left / (len(parts) - index), left)
        except UserError as error:
            report["left_out"][f"{part.name}, {part.strategy}"] = str(error)
        report["seconds"] = time.monotonic() - begin
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def add(report: dict[str, Any], part: Part, smoke: bool, share: float, left: float) -> None:
    """Measures a part within its share of the time, if it can, and ends it when none is left."""
    options = [f"--workload={part.workload}", "--whole", *part.options]
    if smoke:
        options += ["--evaluation_examples=50", *_SMOKE[part.workload]]
    settings = announcement.settings(announcement.parse(options))
    figures = announcement.in_a_process(part.strategy, [*options, f"--seconds={share}"], left)
    experiment = report["experiments"].setdefault(
        part.name,
        {
            "workload": part.workload,
            "seed": 0,
            "settings": settings,
            "data": figures.pop("data"),
            "strategies": {},
        },
    )
    experiment["strategies"][part.strategy] = figures


# ---- what it was measured on ----


def look_for_devices() -> dict[str, Any]:
    """What JAX finds, asked in a process of its own: one that has asked keeps the devices' memory.

    Raises:
      UserError: JAX fails, as with a driver that is too old; its last line says why.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "--devices"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    why = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    check(done.returncode == 0, f"JAX finds no devices: {why[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def found_devices() -> dict[str, Any]:
    import jax

    first = jax.devices()[0]
    stats = first.memory_stats() or {}
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "bytes_limit": stats.get("bytes_limit"),
        "runtime": first.client.platform_version,
    }


def nvidia_smi() -> list[str] | None:
    """Name, driver, memory and power limit of every NVIDIA GPU; None where the tool is not."""
    command = [*NVIDIA_SMI, "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip().splitlines()
    return None


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
