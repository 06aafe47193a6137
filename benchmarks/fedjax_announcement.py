"""Prints and draws the figures of FedJAX's announcement for this machine, measured with fedexp.

    python -m benchmarks.fedjax_announcement --workload=emnist --strategies=jit,pmap,mesh

They are the mean time of a training round, of a full evaluation and of the whole experiment, and the mean
round against the clients in it. Every strategy runs in a process of its own, and what is timed is `train`
on the experiment's gin file, by the timings that it writes into TensorBoard for any run. Figures go to
benchmarks/results, images to docs/images, and to TensorBoard with --logdir.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks import machine
from fedexp.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedexp.data import FederatedDataset, FederatedSplits

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
STRATEGIES = ("jit", "pmap", "mesh")
COHORTS = (10, 20, 50, 100, 200, 500, 1000)
MODULE = "benchmarks.fedjax_announcement"
# Settings in which strategies of one report may differ.
OF_CURVES = ("clients_per_round", "num_cpu_devices", "seconds_a_point")

Report = dict[str, Any]


class Workload(NamedTuple):
    """An experiment of the announcement.

    Attributes:
      title: for tables.
      generated: gin file with generated data.
      real: gin file with the published data.
      data_dir: the binding that tells where they are.
      announced: what the announcement says of it.
      remark: what a reader should know of the generated data.
    """

    title: str
    generated: str
    real: str
    data_dir: str
    announced: str
    remark: str


WORKLOADS = {
    "emnist": Workload(
        "EMNIST",
        "glyphs_fedadam.gin",
        "emnist_fedadam.gin",
        "emnist.data_dir",
        "“a few minutes” for the whole experiment, on a V100 or one TPU core",
        "glyphs: generated characters with EMNIST-62's shape, classes and client sizes",
    ),
    "stackoverflow": Workload(
        "Stack Overflow",
        "stackoverflow_nwp_synthetic.gin",
        "stackoverflow_nwp_fedadam.gin",
        "stackoverflow_nwp.data_dir",
        "“about an hour” for the whole experiment, on eight TPU cores",
        "stackoverflow_synthetic: generated sentences; the sizes of the clients that are generated have the "
        "distribution of all 342,477, whose mean is the published one",
    ),
}
SOURCE = "https://research.google/blog/fedjax-federated-learning-simulation-with-jax/"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.measure:
            print(json.dumps(measure(arguments.measure, arguments)))
            return 0
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": machine.machine(),
            "workload": arguments.workload,
            "seed": arguments.seed,
            "settings": settings(arguments),
            "strategies": {},
        }
        path = Path(arguments.output or RESULTS / f"announcement_{arguments.workload}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        if arguments.add and path.exists():
            add_to(json.loads(path.read_text()), report, path)
        for strategy in arguments.strategies:
            figures = in_a_process(strategy, sys.argv[1:] if argv is None else argv)
            report["data"] = figures.pop("data")
            report["strategies"][strategy] = figures
            path.write_text(json.dumps(report, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(report)
    image = Path(arguments.plot or IMAGES / f"announcement_{arguments.workload}.png")
    figure = draw(report)
    figure.savefig(image, dpi=110)
    print(f"written to {path}, drawn to {image}")
    if arguments.logdir:
        write_summaries(report, figure, Path(arguments.logdir))
        print(f"tensorboard --logdir {arguments.logdir}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workload", choices=WORKLOADS, default="emnist")
    add("--strategies", default="jit,pmap,mesh", help="separated by commas")
    add(
        "--num_cpu_devices",
        type=int,
        help="virtual CPU devices for pmap and mesh, where the machine has no accelerator",
    )
    add("--rounds", type=int, default=5, help="measured rounds of every point, at least 5")
    add(
        "--clients_per_round",
        default=",".join(map(str, COHORTS)),
        help="of the curve, separated by commas; the experiment's own is measured anyway",
    )
    add("--data_dir", help="folder of the published files; data are generated without")
    add(
        "--evaluation_examples",
        type=int,
        default=20_000,
        help="test examples to time, and to extrapolate from; 0 for all",
    )
    add(
        "--seconds_a_point",
        type=float,
        default=600,
        help="larger cohorts that would take longer than this are left out, and listed so",
    )
    add("--whole", action="store_true", help="run the whole experiment instead of extrapolating")
    add(
        "--seconds",
        type=float,
        default=math.inf,
        help="leave out cohorts that would not be done so many seconds after a strategy's start, and "
        "the whole experiment if it would take more than half of what is left of them",
    )
    add("--gin_param", action="append", default=[], help="a binding that overrides the gin file's")
    add("--seed", type=int, default=0)
    add("--add", action="store_true", help="keep what --output has of other strategies")
    add("--output", help="where the figures go as JSON")
    add("--plot", help="where the image goes")
    add("--logdir", help="folder for TensorBoard's scalars and image")
    add("--measure", choices=STRATEGIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.strategies = [name for name in arguments.strategies.split(",") if name]
    unknown = [name for name in arguments.strategies if name not in STRATEGIES]
    if unknown or not arguments.strategies:
        parser.error(f"--strategies takes {', '.join(STRATEGIES)}; got {unknown or 'none'}")
    try:
        cohorts = {int(number) for number in arguments.clients_per_round.split(",") if number}
    except ValueError:
        parser.error(f"--clients_per_round takes numbers, got {arguments.clients_per_round!r}")
    arguments.clients_per_round = sorted(cohorts)
    for option, least in (("rounds", 5), ("evaluation_examples", 0), ("num_cpu_devices", 1)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            parser.error(f"--{option} must be at least {least}, got {value}")
    return arguments


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to repeat the run; paths are the machine's own business."""
    names = (
        "rounds",
        "clients_per_round",
        "num_cpu_devices",
        "evaluation_examples",
        "seconds_a_point",
        "gin_param",
    )
    return {name: getattr(arguments, name) for name in names} | {"real": bool(arguments.data_dir)}


def add_to(before: Report, report: Report, path: Path) -> None:
    """Takes the strategies of an earlier report into this one, with its date and the higher load.

    Raises:
      UserError: they were not measured alike.
    """
    others = []
    for about in (before, report):
        machine_ = {key: value for key, value in about["machine"].items() if key != "load_before"}
        settings_ = {key: value for key, value in about["settings"].items() if key not in OF_CURVES}
        others.append({"machine": machine_, "settings": settings_, "seed": about["seed"]})
    if other := [part for part in others[0] if others[0][part] != others[1][part]]:
        raise UserError(f"{path} has another {', '.join(other)}; leave out --add, or move the file")
    report["strategies"] = before["strategies"]
    report["date"] = ", ".join(sorted({*before["date"].split(", "), report["date"]}))
    loads = [about["machine"]["load_before"] for about in (before, report)]
    report["machine"]["load_before"] = max(loads)


def in_a_process(
    strategy: str, argv: Sequence[str], timeout: float | None = None
) -> dict[str, Any]:
    """Measures a strategy in a process of its own, for virtual devices are counted when JAX starts.

    Raises:
      UserError: it failed, or took longer than `timeout` seconds.
    """
    command = [sys.executable, "-m", MODULE, *argv, f"--measure={strategy}"]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{strategy} was not measured within {timeout:.0f} s") from None
    if done.returncode:
        raise UserError(f"{strategy} could not be measured; it says why above")
    return json.loads(done.stdout.splitlines()[-1])


# ---- measuring ----


def measure(strategy: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one strategy on all devices; of jit, on one."""
    import gin

    from fedexp import config, runtime, trainer  # noqa: F401  What gin files name registers.

    end = time.monotonic() + arguments.seconds
    workload = WORKLOADS[arguments.workload]
    bindings = [
        f"train.strategy = @{strategy}()",
        f"train.seed = {arguments.seed}",
        *arguments.gin_param,
    ]
    if arguments.data_dir:
        bindings.append(f"{workload.data_dir} = {arguments.data_dir!r}")
    config.load([workload.real if arguments.data_dir else workload.generated], bindings)
    # No compiled programs from earlier runs: the first round tells what compiling takes.
    runtime.start(
        num_cpu_devices=None if strategy == "jit" else arguments.num_cpu_devices,
        keep_compiled=False,
    )
    parts = gin.get_bindings("train")
    dataset, cohort_size = parts["dataset"], parts["sampler"].cohort_size
    experiment = functools.partial(_train, parts)

    def point(size: int, last: tuple[int, float] | None, left: float) -> dict[str, Any]:
        without = left_out(size, dataset.train.num_clients, last, arguments, left)
        if without is None:
            say(strategy, f"{size} clients a round")
        return without or time_rounds(experiment, dataset, size, arguments.rounds)

    own = point(cohort_size, None, math.inf)
    if "left_out" in own:
        raise UserError(f"cohorts of {cohort_size} clients: {own['left_out']}")
    say(strategy, "full evaluation")
    evaluation = time_evaluation(experiment, dataset, arguments)
    whole = extrapolated(own, evaluation, parts["num_rounds"])
    if arguments.whole and whole["seconds"]["mean"] < (end - time.monotonic()) / 2:
        say(strategy, "whole experiment")
        whole = time_whole(experiment)
    curve, last = {cohort_size: own}, (cohort_size, own["seconds"]["mean"])
    for size in sorted({*arguments.clients_per_round} - {cohort_size}):
        # Each is compiled anew, which takes about as long.
        left = end - time.monotonic() - own["first_seconds"]
        curve[size] = point(size, last, left)
        if "left_out" not in curve[size]:
            last = size, curve[size]["seconds"]["mean"]
    return {
        "devices": machine.devices(1 if strategy == "jit" else None),
        "cohort_size": cohort_size,
        "curve": dict(sorted(curve.items())),
        "evaluation": evaluation,
        "whole": whole,
        "data": {
            name: {"clients": part.num_clients, "examples": part.num_examples}
            for name, part in dataset.present().items()
        },
    }


def left_out(
    size: int,
    population: int,
    last: tuple[int, float] | None,
    arguments: argparse.Namespace,
    left: float = math.inf,
) -> dict[str, str] | None:
    """Why a cohort is not measured, with so many seconds left; None if it is."""
    if size > population:
        return {"left_out": f"the data have {population} clients"}
    if last is not None:
        predicted = last[1] * size / last[0]
        if predicted * (arguments.rounds + 1) > arguments.seconds_a_point:
            return {"left_out": f"a round would take about {predicted:.0f} s"}
        if predicted * (arguments.rounds + 1) > left:
            return {"left_out": "no time was left for it"}
    return None


def _train(parts: dict[str, Any], **changes: Any) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Runs the experiment with changes; returns its rounds' timings, name -> values, and their summary."""
    from fedexp.reporting import TensorBoard
    from fedexp.trainer import Experiment

    with tempfile.TemporaryDirectory() as folder:
        Experiment(**parts | {"observers": [TensorBoard()]} | changes).run(folder)
        final = json.loads(Path(folder, "final.json").read_text())
        return scalars(folder), final["perf"]


def time_rounds(experiment, dataset: FederatedSplits, size: int, rounds: int) -> dict[str, Any]:
    """Times `rounds` rounds after a first one, which compiles."""
    from fedexp.checkpointing import CheckpointPlan
    from fedexp.data import uniform
    from fedexp.evaluation import Evaluate

    values, perf = experiment(
        dataset=dataset._replace(test=dataset.test.select_clients([0])),
        sampler=uniform(size),
        num_rounds=1 + rounds,
        evaluations=[Evaluate(every=0)],
        checkpoints=CheckpointPlan(every=0, best_metric=None),
    )
    first, *seconds = values["perf/round_seconds"].tolist()
    examples = values["perf/examples_per_second"] * values["perf/round_seconds"]
    return {
        "seconds": machine.spread(seconds),
        "first_seconds": first,
        "examples": float(examples[1:].mean()),
        "compilations": perf["compilations"],
    }


def time_evaluation(
    experiment, dataset: FederatedSplits, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Times evaluations of the test clients, or of so many as have the examples to time."""
    from fedexp.checkpointing import CheckpointPlan
    from fedexp.data import uniform
    from fedexp.evaluation import Evaluate

    test = first_clients(dataset.test, arguments.evaluation_examples)
    values, _ = experiment(
        dataset=dataset._replace(test=test),
        sampler=uniform(1),
        num_rounds=1 + arguments.rounds,
        evaluations=[Evaluate(every=1)],
        checkpoints=CheckpointPlan(every=0, best_metric=None),
    )
    first, *seconds = values["perf/evaluation_seconds"].tolist()
    factor = dataset.test.num_examples / test.num_examples
    return {
        "seconds": machine.spread([factor * value for value in seconds]),
        "first_seconds": first,
        "measured_examples": test.num_examples,
        "examples": dataset.test.num_examples,
    }


def first_clients(dataset: FederatedDataset, examples: int) -> FederatedDataset:
    """So many clients from the first one on that they have `examples` examples; all if that is 0."""
    if not 0 < examples < dataset.num_examples:
        return dataset
    return dataset.select_clients(np.arange(np.searchsorted(dataset.offsets, examples)))


def extrapolated(
    own: dict[str, Any], evaluation: dict[str, Any], num_rounds: int
) -> dict[str, Any]:
    """The whole experiment from its rounds' mean: the first round, the others, and one evaluation."""
    seconds, measured = own["seconds"], len(own["seconds"]["all"])
    rounds = {
        name: own["first_seconds"] + (num_rounds - 1) * seconds[name]
        for name in ("mean", "median", "min", "max")
    }
    return {
        "seconds": {name: rounds[name] + evaluation["seconds"][name] for name in rounds},
        "rounds": num_rounds,
        "extrapolated_from": measured,
    }


def time_whole(experiment) -> dict[str, Any]:
    """Runs the experiment to its end: training with the file's checkpoints, and one full evaluation."""
    from fedexp.evaluation import Evaluate

    values, perf = experiment(evaluations=[Evaluate(every=0)])
    seconds = perf["total_seconds"]
    return {
        "seconds": dict.fromkeys(("mean", "median", "min", "max"), seconds),
        "rounds": len(values["perf/round_seconds"]),
        "extrapolated_from": None,
    }


def scalars(logdir: str) -> dict[str, np.ndarray]:
    """The timings that a run wrote for TensorBoard: fedexp's name -> values by step."""
    import types

    # With this TensorBoard reads files by itself, where it would import TensorFlow.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(logdir, size_guidance={"tensors": 0}).Reload()
    return {
        tag.removeprefix("training/"): np.array(
            [tensor_util.make_ndarray(event.tensor_proto) for event in events.Tensors(tag)]
        )
        for tag in events.Tags()["tensors"]
        if tag.startswith("training/perf/")
    }


def say(subject: str, text: str) -> None:
    print(f"{subject}: {text}", file=sys.stderr, flush=True)


# ---- output ----


@dataclasses.dataclass(frozen=True)
class Table:
    """A table for the terminal and for Markdown."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def print(self) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 150).print(table)


def tables(report: Report) -> list[Table]:
    """The announcement's bars, and its curve."""
    workload = WORKLOADS[report["workload"]]
    bars = Table(
        f"{workload.title}: seconds, mean (minimum to maximum)",
        ["strategy", "devices", "first round", "round", "full evaluation", "whole experiment"],
        [
            [
                name,
                row["devices"],
                f"{own(row)['first_seconds']:.1f}",
                shown(own(row)["seconds"]),
                shown(row["evaluation"]["seconds"]) + evaluated(row["evaluation"]),
                duration(row["whole"]["seconds"]["mean"]) + experimented(row["whole"]),
            ]
            for name, row in report["strategies"].items()
        ],
    )
    sizes = sorted({int(size) for row in report["strategies"].values() for size in row["curve"]})
    curve = Table(
        f"{workload.title}: seconds a round, mean (minimum to maximum), by clients a round",
        ["clients", *report["strategies"]],
        [
            [str(size), *(cell(point_of(row, size)) for row in report["strategies"].values())]
            for size in sizes
        ],
    )
    return [bars, curve]


def point_of(row: dict[str, Any], size: int) -> dict[str, Any] | None:
    """A point of a strategy's curve; its keys are strings once they have been in a file."""
    return row["curve"].get(str(size), row["curve"].get(size))


def own(row: dict[str, Any]) -> dict[str, Any]:
    """The point of the experiment's own cohort size."""
    return point_of(row, row["cohort_size"])


def cell(point: dict[str, Any] | None) -> str:
    if point is None:
        return ""
    return point["left_out"] if "left_out" in point else shown(point["seconds"])


def shown(seconds: dict[str, Any]) -> str:
    mean, low, high = (f"{seconds[part]:.3g}" for part in ("mean", "min", "max"))
    return f"{mean} ({low} to {high})"


def duration(seconds: float) -> str:
    """In the unit that suits a reader."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def evaluated(evaluation: dict[str, Any]) -> str:
    if evaluation["measured_examples"] == evaluation["examples"]:
        return ""
    return f", extrapolated from {evaluation['measured_examples']:,} examples"


def experimented(whole: dict[str, Any]) -> str:
    if whole["extrapolated_from"] is None:
        return f" ({whole['rounds']} rounds, measured)"
    return f" ({whole['rounds']} rounds, extrapolated from {whole['extrapolated_from']} rounds)"


def remarks(report: Report) -> list[str]:
    """What a reader of the tables should know."""
    workload, data = WORKLOADS[report["workload"]], report["data"]
    source = "the published files" if report["settings"]["real"] else workload.remark
    sizes = "; ".join(
        f"{name}: {part['clients']:,} clients, {part['examples']:,} examples"
        for name, part in data.items()
    )
    sizes_of_cohorts = {row["cohort_size"] for row in report["strategies"].values()}
    clients = ", ".join(map(str, sizes_of_cohorts))
    return [
        f"Announced for FedJAX in 2021 ({SOURCE}): {workload.announced}. Machines differ: those were "
        "accelerators.",
        f"Data: {source}. {sizes[:1].upper()}{sizes[1:]}.",
        f"{clients} clients a round in the first table; {report['settings']['rounds']} rounds for every "
        f"figure, after a first one, which compiles and is not in the mean; seed {report['seed']}. The "
        "whole experiment is training and one full evaluation; where it is extrapolated, its extremes take "
        "every round at the measured extreme.",
        f"Machine: {machine.sentence(report['machine'])}; {report['date']}.",
    ]


def show(report: Report) -> None:
    """Prints the tables, and what a reader should know."""
    for table in tables(report):
        table.print()
    for line in remarks(report):
        print(f"- {line}")


def draw(report: Report) -> Figure:
    """Three groups of bars, hatched where extrapolated, and the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    *bars, curve = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.6])
    for index, (name, row) in enumerate(report["strategies"].items()):
        label, style = f"{name}, {row['devices']}", {"color": f"C{index}", "capsize": 4}
        groups = (
            ("training round", own(row)["seconds"], False),
            ("full evaluation", row["evaluation"]["seconds"], bool(evaluated(row["evaluation"]))),
            (
                f"whole experiment, {row['whole']['rounds']} rounds",
                row["whole"]["seconds"],
                row["whole"]["extrapolated_from"] is not None,
            ),
        )
        for axes, (title, seconds, hatched) in zip(bars, groups, strict=True):
            mean = seconds["mean"]
            ends = [[mean - seconds["min"]], [seconds["max"] - mean]]
            bar = axes.bar(
                name, mean, yerr=ends, hatch="//" if hatched else None, alpha=0.8, **style
            )
            axes.bar_label(bar, [duration(mean) if mean >= 10 else f"{mean:.3g} s"], padding=3)
            axes.set(title=title, ylabel="seconds" if axes is bars[0] else None)
        points = {
            int(size): point["seconds"]
            for size, point in row["curve"].items()
            if "left_out" not in point
        }
        means = np.array([seconds["mean"] for seconds in points.values()])
        lows, highs = ([s[end] for s in points.values()] for end in ("min", "max"))
        curve.errorbar(
            list(points), means, [means - lows, highs - means], marker="o", label=label, **style
        )
    curve.set(xscale="log", yscale="log", xlabel="clients a round", title="training round")
    curve.set_ylabel("seconds")
    curve.legend(frameon=False)
    for axes in (*bars, curve):
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{WORKLOADS[report['workload']].title}, {report['machine']['cpu']} "
        f"({report['machine']['cores']} cores); hatched: extrapolated"
    )
    return figure


def write_summaries(report: Report, figure: Figure, logdir: Path) -> None:
    """Writes a run for every strategy; the curve's steps are clients a round."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from fedexp.summaries import Writer

    for name, row in report["strategies"].items():
        with Writer(logdir / name) as writer:
            for size, point in row["curve"].items():
                if "left_out" not in point:
                    seconds = {"round_seconds_by_clients": point["seconds"]["mean"]}
                    writer.scalars(int(size), seconds)
            values = {
                "round_seconds": own(row)["seconds"]["mean"],
                "full_evaluation_seconds": row["evaluation"]["seconds"]["mean"],
                "whole_experiment_seconds": row["whole"]["seconds"]["mean"],
            }
            writer.scalars(0, values)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    with Writer(logdir) as writer:
        writer.image(
            0, "announcement/bars_and_curve", np.asarray(canvas.buffer_rgba())[..., :3].copy()
        )
        writer.text(
            0, "announcement/tables", "\n\n".join(table.markdown() for table in tables(report))
        )


if __name__ == "__main__":
    sys.exit(main())
