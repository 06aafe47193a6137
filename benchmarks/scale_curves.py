"""Measures round time and memory against cohort, population, devices and model size, and draws curves.

    python -m benchmarks.scale_curves [--curves=cohort,population,devices,model]

Every point is FedAvg in a fresh process, its rounds prepared in the background as the trainer does. Peak
memory is of the process, compilation included. Populations are packed folders whose pixels are holes in
the file: they read as zeros, and what a round gathers has its true size. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import machine
from benchmarks.peers.protocol import peak_bytes

if TYPE_CHECKING:
    from flax import linen as nn
    from matplotlib.figure import Figure

    from fedexp.data import FederatedDataset

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
CLASSES, SIDE = 62, 28
STACKOVERFLOW_CLIENTS = 342_477
MIB = 1 << 20
DEFAULT_RESIDENT_MIB = 4096
SEED = 0

Row = dict[str, Any]
Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A point to measure.

    Attributes:
      model: 'cnn', 'logistic', or the width of a dense model's two hidden layers.
      cohort: clients a round.
      population: clients.
      examples: of each client.
      batch_size: examples of a local step.
      rounds: after the first, which compiles.
      strategy: 'jit' or 'mesh'.
      lanes: of each device; 'auto' or a number.
      devices: virtual CPU devices.
      max_resident_bytes: what may stay on the device; None for the default.
      sparse: read the examples from a packed folder instead of memory.
    """

    model: str | int = "cnn"
    cohort: int = 10
    population: int = 1000
    examples: int = 10
    batch_size: int = 10
    rounds: int = 5
    strategy: str = "jit"
    lanes: str | int = "auto"
    devices: int = 1
    max_resident_bytes: int | None = None
    sparse: bool = False


class Curve(NamedTuple):
    """Points of one or more lines.

    Attributes:
      title: of the drawing.
      label: of its horizontal axis.
      lines: name -> (x, setting) of every point.
      sentence: says from the measured figures what bounds them.
    """

    title: str
    label: str
    lines: dict[str, list[tuple[int, Setting]]]
    sentence: Callable[[Report], str]


# ---- what bounds each curve; every number comes from the measured rows ----


def about_cohort(report: Report) -> str:
    first, *_, last = report["lines"]["jit"]
    together = last["x"] * last["model_mib"]
    return (
        f"Arithmetic bounds the time: a client costs {ms_each(first):.1f} ms in a cohort of {first['x']} "
        f"and {ms_each(last):.1f} ms in one of {last['x']}. Memory does not depend on the cohort, because "
        f"updates are summed as they come: the peak is {first['peak_mib']:.0f} MiB and "
        f"{last['peak_mib']:.0f} MiB; {last['x']} updates side by side would take {together:,.0f} MiB."
    )


def about_population(report: Report) -> str:
    first, *_, last = report["lines"]["gathered"]
    # The largest population whose pixels and labels stay on the device.
    most = [row for row in report["lines"]["default"] if data_mib(row) <= DEFAULT_RESIDENT_MIB][-1]
    return (
        f"The cohort bounds a round, not the population: gathering examples for it, {milliseconds(first)} "
        f"ms with {first['x']:,} clients and {milliseconds(last)} ms with {last['x']:,}. The peak grows by "
        f"{last['peak_mib'] - first['peak_mib']:.0f} MiB, for clients' names and borders. By default, data "
        "of up to 4 GiB are kept on the device, which for one CPU device is the mapped file itself: "
        f"{milliseconds(most)} ms and {most['peak_mib']:.0f} MiB for the {data_mib(most):,.0f} MiB of "
        f"{most['x']:,} clients."
    )


def data_mib(row: Row) -> float:
    """All pixels and labels of a population."""
    return row["setting"]["population"] * row["setting"]["examples"] * (SIDE**2 + 4) / MIB


def about_devices(report: Report) -> str:
    first, *_, last = rows = report["lines"]["mesh"]
    best = min(rows, key=lambda row: row["seconds"]["median"])
    each = (last["peak_mib"] - first["peak_mib"]) / (last["x"] - first["x"])
    return (
        f"Virtual devices share {report['machine']['cores']} cores, and these bound the time: "
        f"{first['seconds']['median']:.2f} s a round on one device, {best['seconds']['median']:.2f} s on "
        f"{best['x']} at best, {last['seconds']['median']:.2f} s on {last['x']}. A device more takes "
        f"{each:.0f} MiB: its own parameters, data and temporaries."
    )


def about_model(report: Report) -> str:
    first, *_, last = report["lines"]["dense"]
    more = last["parameters"] / first["parameters"]
    longer = last["seconds"]["median"] / first["seconds"]["median"]
    copies = (last["peak_mib"] - first["peak_mib"]) / (last["model_mib"] - first["model_mib"])
    return (
        f"From {first['parameters']:,} to {last['parameters']:,} parameters, {more:.0f} times as many, a "
        f"round takes {longer:.0f} times as long: matrix products and passes over the parameters bound it "
        f"more and more, a step's fixed cost less. The peak grows by {copies:.1f} copies of the "
        "parameters."
    )


def ms_each(row: Row) -> float:
    return 1000 * row["seconds"]["median"] / row["x"]


def milliseconds(row: Row) -> str:
    return f"{1000 * row['seconds']['median']:.1f}"


def _cohort(size: int) -> Setting:
    # A thousand updates at least: what a process holds grows a little with their number.
    return Setting(cohort=size, rounds=max(5, 1000 // size))


def _population(size: int, **options: Any) -> Setting:
    return Setting(
        "logistic", 50, size, examples=20, batch_size=20, rounds=20, sparse=True, **options
    )


POPULATIONS = (100, 1000, 10_000, 100_000, STACKOVERFLOW_CLIENTS)
CURVES = {
    "cohort": Curve(
        "EmnistCNN, a batch of ten from every client",
        "clients a round",
        {"jit": [(size, _cohort(size)) for size in (10, 30, 100, 300, 1000)]},
        about_cohort,
    ),
    "population": Curve(
        "logistic regression, 50 clients a round, 20 examples each",
        "clients in the population",
        {
            "gathered": [(size, _population(size, max_resident_bytes=0)) for size in POPULATIONS],
            "default": [(size, _population(size)) for size in POPULATIONS],
        },
        about_population,
    ),
    "devices": Curve(
        "EmnistCNN, 64 clients a round, a batch of ten each",
        "virtual CPU devices",
        {
            "mesh": [
                (count, Setting(cohort=64, strategy="mesh", devices=count))
                for count in (1, 2, 4, 8)
            ]
        },
        about_devices,
    ),
    "model": Curve(
        "two hidden layers, 20 clients a round, two batches of ten each",
        "parameters",
        {
            "dense": [
                (width, Setting(width, cohort=20, examples=20)) for width in (50, 200, 800, 3200)
            ]
        },
        about_model,
    ),
}


# ---- measuring ----


def measure(setting: Setting, folder: str | None) -> Row:
    """Runs in a process of its own: JAX is imported here, so that the parent stays small."""
    import jax
    import optax

    from fedexp import runtime
    from fedexp.algorithms import fedavg
    from fedexp.data import ClientBatching, uniform
    from fedexp.engine import Engine, Packing, jit, mesh
    from fedexp.tasks import classification

    runtime.start(num_cpu_devices=setting.devices, keep_compiled=False)
    begin = time.perf_counter()
    dataset = opened(folder) if folder else in_memory(setting)
    open_seconds = time.perf_counter() - begin
    task = classification(build_model(setting.model), num_classes=CLASSES)
    params = task.init(jax.random.key(SEED), dataset.slice(0, 1))
    strategy = {"jit": jit, "mesh": mesh}[setting.strategy]
    packing = Packing(setting.lanes, max_resident_bytes=setting.max_resident_bytes)
    engine = Engine(
        strategy(packing),
        fedavg(task, optax.sgd(0.01), optax.sgd(1.0)),
        dataset,
        ClientBatching(setting.batch_size),
        params=params,
        cohort_size=setting.cohort,
        seed=SEED,
    )
    state = jax.block_until_ready(engine.start(params))
    set_up = resident_bytes()
    sampler = uniform(setting.cohort)

    def prepare(round_: int):
        return engine.prepare(round_, sampler.sample(dataset.client_ids, SEED, round_))

    seconds = []
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(prepare, 0)
        clock = time.perf_counter()
        for round_ in range(1 + setting.rounds):
            prepared = upcoming.result()
            upcoming = pool.submit(prepare, round_ + 1)
            state = jax.block_until_ready(engine.run(state, prepared).state)
            seconds.append(time.perf_counter() - clock)
            clock = time.perf_counter()
    highest = peak_bytes()
    program = engine.runner.compiled(state, prepared)
    return {
        "seconds": machine.spread(seconds[1:] or seconds),
        "first_seconds": seconds[0],
        "open_ms": 1000 * open_seconds,
        "set_up_mib": set_up / MIB,
        "peak_mib": highest / MIB,
        "growth_mib": (highest - set_up) / MIB,
        "xla_temporaries_mib": program.memory_analysis().temp_size_in_bytes / MIB,
        "model_mib": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / MIB,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "devices": machine.devices(),
    }


def build_model(name: str | int) -> nn.Module:
    from flax import linen as nn

    from fedexp import models

    if name == "cnn":
        return models.EmnistCNN(num_classes=CLASSES)
    if name == "logistic":
        return models.EmnistLogistic(num_classes=CLASSES)
    hidden = [layer for _ in range(2) for layer in (nn.Dense(int(name)), nn.relu)]
    return nn.Sequential([lambda x: x.reshape(len(x), -1), *hidden, nn.Dense(CLASSES)])


def in_memory(setting: Setting) -> FederatedDataset:
    """Random pixels and labels."""
    import numpy as np

    from fedexp.data import FederatedDataset

    rng = np.random.default_rng(SEED)
    rows = setting.population * setting.examples
    features = {
        "x": rng.integers(0, 256, (rows, SIDE, SIDE), np.uint8),
        "y": rng.integers(0, CLASSES, rows, np.int32),
    }
    offsets = np.arange(0, rows + 1, setting.examples)
    return FederatedDataset(features, offsets, client_ids(setting.population))


def opened(folder: str) -> FederatedDataset:
    from fedexp.data import packed

    return packed.read_dataset(Path(folder))


def client_ids(count: int):
    import numpy as np

    return np.char.zfill(np.arange(count).astype("U8"), 8)


def write_sparse(folder: Path, clients: int, examples: int) -> None:
    """Writes a packed folder of so many clients; its pixels and labels are a hole, and read as zeros."""
    import numpy as np

    from fedexp.data import packed

    rows = clients * examples
    folder.mkdir(parents=True)
    for index, (shape, dtype) in enumerate((((rows, SIDE, SIDE), "|u1"), ((rows,), "<i4"))):
        with (folder / f"feature_{index}.npy").open("wb") as file:
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + np.prod(shape) * np.dtype(dtype).itemsize)
    packed.seal(folder, ["x", "y"], np.arange(0, rows + 1, examples), client_ids(clients))


def resident_bytes() -> int:
    """Bytes that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def in_fresh_process(setting: Setting, scratch: Path | None = None) -> Row:
    """Measures a setting; packed folders are kept in `scratch` for others that need them."""
    request: dict[str, Any] = {"setting": dataclasses.asdict(setting), "folder": None}
    if setting.sparse:
        folder = scratch / f"{setting.population}x{setting.examples}"
        if not folder.exists():
            write_sparse(folder, setting.population, setting.examples)
        request["folder"] = str(folder)
    command = [sys.executable, "-m", "benchmarks.scale_curves", "--measure", json.dumps(request)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    output = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", default=",".join(CURVES), help="separated by commas")
    parser.add_argument("--max_x", type=int, help="leave out what is beyond it, for a trial")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for the images")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        request = json.loads(arguments.measure)
        print(json.dumps(measure(Setting(**request["setting"]), request["folder"])))
        return
    names = [name for name in arguments.curves.split(",") if name]
    if unknown := sorted(set(names) - set(CURVES)):
        parser.error(f"--curves takes {', '.join(CURVES)}; got {', '.join(unknown)}")
    for name in names:
        about = machine.machine()
        with tempfile.TemporaryDirectory() as scratch:
            lines = {
                line: [
                    measured(name, line, x, setting, Path(scratch))
                    for x, setting in points
                    if arguments.max_x is None or x <= arguments.max_x
                ]
                for line, points in CURVES[name].lines.items()
            }
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": about,
            "seed": SEED,
            "lines": lines,
        }
        arguments.results.mkdir(parents=True, exist_ok=True)
        path = arguments.results / f"scale_{name}.json"
        path.write_text(json.dumps(report, indent=2) + "\n")
        draw(name, report).savefig(arguments.images / f"scale_{name}.png", dpi=110)
        print(CURVES[name].sentence(report))


def measured(curve: str, line: str, x: int, setting: Setting, scratch: Path) -> Row:
    row = {"x": x, "setting": dataclasses.asdict(setting), **in_fresh_process(setting, scratch)}
    print(
        f"{curve}, {line}, {x:,}: {row['seconds']['median']:.4f} s a round, "
        f"peak {row['peak_mib']:.0f} MiB",
        flush=True,
    )
    return row


def draw(name: str, report: Report) -> Figure:
    """Round time and peak memory side by side."""
    from matplotlib.figure import Figure

    curve = CURVES[name]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for line, rows in report["lines"].items():
        x = [row["parameters"] if curve.label == "parameters" else row["x"] for row in rows]
        middle = [row["seconds"]["median"] for row in rows]
        ends = [
            [row["seconds"]["median"] - row["seconds"]["min"] for row in rows],
            [row["seconds"]["max"] - row["seconds"]["median"] for row in rows],
        ]
        times.errorbar(x, middle, ends, marker="o", capsize=3, label=line)
        memory.plot(x, [row["peak_mib"] for row in rows], marker="o", label=line)
    times.set(yscale="log", ylabel="seconds a round")
    memory.set(ylabel="peak memory, MiB", ylim=(0, 1.1 * memory.get_ylim()[1]))
    for axes in (times, memory):
        axes.set(xscale="log", xlabel=curve.label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    if len(report["lines"]) > 1:
        memory.legend(frameon=False)
    figure.suptitle(f"{curve.title}; {report['machine']['cores']} cores", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
