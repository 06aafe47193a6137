"""Says what an experiment is before it is run: its data, what is built, and what it costs on this machine.

    python -m fedexp.inspect --gin_file=quickstart.gin --picture=clients.png
    python -m fedexp.inspect --gin_param='train.dataset = @glyphs()' --data_only

With --data_only nothing but the data set is made, and only `train.dataset` needs to be bound. Without it some
rounds and evaluations are run, and forgotten. Nothing is written but the picture.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from fedexp import inspection
    from fedexp.data import FederatedSplits
    from fedexp.session import Session
    from fedexp.tasks import Task
    from fedexp.trainer import Experiment

_WIDTH = 110  # Where there is no terminal.
_LONGEST = 40  # Of a binding's value.
_TRAIN = "train"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what there is to say; an error is one line, and exit code 2."""
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m fedexp.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, words in (
        ("--gin_file", "Gin file, as of fedexp.main; may be repeated"),
        ("--gin_param", "Gin binding that overrides the files; may be repeated"),
    ):
        parser.add_argument(name, action="append", default=[], help=words)
    parser.add_argument("--data_only", action="store_true", help="look at the data set alone")
    parser.add_argument("--label", help="the feature that holds classes; default: y, if it does")
    parser.add_argument("--picture", help="a PNG file to draw the training split's clients to")
    given = parser.parse_args(arguments)
    # Imported here, so that --help and a mistyped flag answer at once.
    import jax

    from fedexp import config, runtime, trainer  # noqa: F401  For Gin's names.
    from fedexp.errors import UserError, check
    from fedexp.main import experiment, without_gin_frames

    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    try:
        if not given.gin_file and not given.gin_param:
            raise UserError(f"--gin_file is missing; fedexp ships {config.shipped_names()}")
        config.load(given.gin_file, given.gin_param)
        runtime.start()
        check(jax.process_count() == 1, "fedexp.inspect is for one process; start it alone")
        if given.data_only:
            look_at_data(console, _dataset(), given.label, given.picture)
        else:
            setup = experiment()
            made = time.perf_counter() - begin
            look_at_data(console, setup.dataset, given.label, given.picture, setup.task)
            look_at_experiment(console, setup, given.gin_param, made)
    except UserError as error:
        print(f"error: {without_gin_frames(str(error))}", file=sys.stderr)
        return 2
    return 0


def look_at_data(
    console: Console,
    splits: FederatedSplits,
    label: str | None,
    picture: str | None,
    task: Task | None = None,
) -> None:
    """Prints who the clients are and what they have, and draws those of the training split.

    Raises:
      UserError: no such label, or a picture that cannot be written.
    """
    from fedexp import inspection, paths
    from fedexp.errors import UserError

    classes, names = (task.num_classes, task.class_names) if task and not label else (None, None)
    parts = {
        name: inspection.census(split, label, classes) for name, split in splits.present().items()
    }
    _section(console, "Data")
    console.print(_of_splits(parts))
    console.print(_of_features(parts))
    for name, one in parts.items():
        if len(one.looked_at) < len(one.sizes):
            console.print(
                f"The values of {name} are those of {len(one.looked_at):,} clients drawn at random.\n"
            )
    if any(one.counts is not None for one in parts.values()):
        _print_classes(console, parts, names)
    else:
        console.print(
            "No feature y has one small integer an example, so there are no classes to count.\n"
        )
    if picture is not None:
        try:
            paths.write(picture, inspection.draw(parts[_TRAIN], names))
        except OSError as error:
            raise UserError(f"cannot write {picture}: {error.strerror or error}") from error
        console.print(f"{picture} shows the clients of {_TRAIN}.\n")


def look_at_experiment(
    console: Console, setup: Experiment, overrides: Sequence[str], made: float
) -> None:
    """Builds an experiment, prints what it is made of, and measures what it costs.

    Args:
      console: where to print.
      setup: the experiment.
      overrides: gin bindings that must have an effect.
      made: seconds that it took to make `setup`.

    Raises:
      UserError: what `Experiment.run` would raise before its first round, workdirs aside.
    """
    from fedexp import config, inspection
    from fedexp.session import Session
    from fedexp.stopping import Judge

    begin = time.perf_counter()
    session = Session(setup)
    Judge(session, setup.checkpoints, setup.stop)  # For what it refuses.
    config.check_overrides_used(overrides)
    session.check_evaluations()
    built = made + time.perf_counter() - begin
    _section(console, "What is built")
    for one in inspection.built():
        console.print(_tree(one))
    _section(console, "Model")
    console.print(_of_model(session.params))
    _section(console, "A round")
    load = inspection.load(session)
    with Console(stderr=True).status("measuring rounds and evaluations"):
        rounds = inspection.rounds(session)
        runner = session.engine.runner
        examples = statistics.fmean(load.examples)
        training, last = inspection.training(rounds, examples, lambda: runner.compilations)
        evaluations = inspection.evaluating(session, last)
        rounds.close()
        peak = inspection.peak_bytes()  # Before a round is compiled again for what follows.
        memory = inspection.memory(session, last)
    console.print(_of_rounds(session, load, last.metrics))
    _section(console, "Memory")
    console.print(_of_memory(memory, peak))
    _section(console, "Time on this machine")
    expected = inspection.expected(setup.num_rounds, built, training, evaluations)
    console.print(_of_time(setup.num_rounds, training, load, evaluations, expected))


def _dataset() -> FederatedSplits:
    """The bound data set, and nothing else."""
    from fedexp import config
    from fedexp.data import FederatedSplits
    from fedexp.errors import UserError

    if "train.dataset" not in config.bindings():
        raise UserError("train.dataset is not bound, so there are no data to look at")
    try:
        dataset = config.evaluate("fedexp.trainer.train", "dataset")
    except TypeError as error:
        if "No values supplied by Gin" not in str(error):
            raise
        raise UserError(f"gin: {str(error).splitlines()[0]}; bind what is missing") from error
    if not isinstance(dataset, FederatedSplits):
        raise UserError(f"train.dataset must be FederatedSplits, got {dataset!r}")
    return dataset


def _of_splits(parts: Mapping[str, inspection.Census]) -> Table:
    from fedexp import inspection

    table = _table("", *parts)

    def row(name: str, cell: Any, end_section: bool = False) -> None:
        table.add_row(name, *(cell(one) for one in parts.values()), end_section=end_section)

    row("clients", lambda one: f"{len(one.sizes):,}")
    row("examples", lambda one: f"{one.sizes.sum():,}")
    row("size", lambda one: _bytes(one.nbytes), end_section=True)
    row("examples of a client: mean", lambda one: f"{one.sizes.mean():,.1f}")
    for name, percent in (("least", 0), ("25 %", 25), ("median", 50), ("75 %", 75), ("most", 100)):
        row(name, lambda one, p=percent: f"{np.percentile(one.sizes, p):,.6g}")
    if any(one.counts is not None for one in parts.values()):
        labels: dict[str, Any] = {
            "classes of the label": lambda counts: counts.shape[1],
            "classes that a client has: median": lambda c: f"{np.median((c > 0).sum(1)):g}",
            "heterogeneity": lambda counts: f"{inspection.heterogeneity(counts):.3f}",
            "by chance": lambda counts: f"{inspection.heterogeneity_by_chance(counts):.3f}",
        }
        table.add_section()
        for name, cell in labels.items():
            row(name, lambda one, c=cell: "" if one.counts is None else str(c(one.counts)))
    return table


def _of_features(parts: Mapping[str, inspection.Census]) -> Table:
    table = _table("feature", "an example is", *(f"values in {name}" for name in parts))
    for of_parts in zip(*(one.features for one in parts.values()), strict=True):
        kinds = dict.fromkeys(
            f"{one.dtype} {'x'.join(map(str, one.shape)) or 'scalar'}" for one in of_parts
        )
        ranges = (f"{_value(one.low)} to {_value(one.high)}" for one in of_parts)
        table.add_row(of_parts[0].name, ", ".join(kinds), *ranges)
    return table


def _print_classes(
    console: Console, parts: Mapping[str, inspection.Census], names: Sequence[str] | None
) -> None:
    """How many examples each class has, in as many columns as there is room for."""
    labelled = {name: one for name, one in parts.items() if one.counts is not None}
    totals = [one.counts.sum(0) for one in labelled.values() if one.counts is not None]
    classes = max(map(len, totals))
    totals = [np.pad(total, (0, classes - len(total))).tolist() for total in totals]
    console.print(f"Examples of each class in {' / '.join(labelled)}:")
    cells = [
        f"[bold]{name}[/] {' / '.join(f'{count:,}' for count in counts)}"
        for name, counts in zip(names or range(classes), zip(*totals, strict=True), strict=True)
    ]
    console.print(Columns(cells, equal=True, padding=(0, 3)))
    console.print()


def _tree(built: inspection.Built) -> Tree:
    def line(one: inspection.Built) -> Text:
        values = ", ".join(f"{name} = {_short(value)}" for name, value in one.values.items())
        return Text.assemble((one.name, "bold"), f"  {values}" if values else "")

    tree = Tree(line(built))
    for part in built.parts:
        tree.add(_tree(part))
    return tree


def _of_model(params: Any) -> Table:
    from fedexp import inspection

    modules = inspection.modules(params)
    arrays = [array for one in modules for array in one.arrays.values()]
    table = _table("module", "arrays", "parameters", left=2)
    for one in modules:
        shapes = (f"{name} {'x'.join(map(str, a.shape)) or '1'}" for name, a in one.arrays.items())
        table.add_row(one.path, ", ".join(shapes), f"{one.size:,}")
    table.add_section()
    dtypes = ", ".join(dict.fromkeys(str(array.dtype) for array in arrays))
    size = sum(array.size * array.dtype.itemsize for array in arrays)
    table.add_row("all", f"{dtypes}, {_bytes(size)}", f"{sum(one.size for one in modules):,}")
    return table


def _of_rounds(
    session: Session, load: inspection.Load, metrics: Mapping[str, float | np.ndarray]
) -> Table:
    engine, placement = session.engine, session.engine.placement
    device = placement.mesh.devices[0]
    resident = engine.data.split(_TRAIN).resident is not None
    sizes = engine.preparer.batch_sizes(_TRAIN)
    rows = {
        "clients": _spread(load.clients),
        "local steps of all": _spread(load.steps),
        "examples of all": _spread(load.examples),
        "padding": f"{load.padding:.1%} of the computed examples",
        "batches": f"of {' or '.join(map(str, sizes))} examples",
        "devices": f"{placement.num_devices} x {device.device_kind}, lanes on each: {engine.preparer.lanes}",
        "examples are": "on the devices" if resident else "sent to the devices for every round",
    }
    for way in ("up", "down"):
        if f"traffic/bits_{way}" in metrics:
            bits = float(metrics[f"traffic/bits_{way}"])
            rows[f"{way}, all clients"] = f"{bits:,.0f} bits, {_bytes(bits / 8)}"
    if session.account is not None:
        epsilon = session.account.epsilon(session.setup.num_rounds)
        rows["epsilon of all rounds"] = f"{epsilon:.4g} at delta {session.account.delta:.3g}"
    return _pairs(rows)


def _of_memory(memory: inspection.Memory | None, peak: Mapping[str, int]) -> Table:
    rows = {f"most that was in use, {where}": _bytes(size) for where, size in peak.items()}
    if memory is not None:
        rows |= {
            "XLA's plan for a round, on each device": _bytes(memory.total),
            "  arguments": f"{_bytes(memory.arguments)}, of which examples {_bytes(memory.examples)}",
            "  temporaries": _bytes(memory.temporaries),
            "  results": _bytes(memory.results),
        }
    return _pairs(rows)


def _of_time(
    num_rounds: int,
    training: inspection.Timing,
    load: inspection.Load,
    evaluations: Sequence[inspection.Evaluating],
    expected: inspection.Expected,
) -> Table:
    speed = statistics.fmean(load.examples) / training.later
    rows = {
        "a round": f"{_seconds(training.later)}, {speed:,.0f} examples/s",
        "the first one": f"{_seconds(training.first)}, compiling included",
    }
    for one in evaluations:
        last = f"{'' if one.is_measured else 'about '}{_seconds(one.last.later)} at the end"
        when = ["at the start"] * one.at_start + [f"every {one.every} rounds"] * bool(one.every)
        often = f"{_seconds(one.on_the_way.later)} {' and '.join(when)}, " if when else ""
        rows[f"evaluation {one.name}"] = often + last
    rows |= {
        f"all {num_rounds:,} rounds": _seconds(expected.rounds),
        "all evaluations": _seconds(expected.evaluations),
        "start and compiling": _seconds(expected.start),
        "the whole experiment": _seconds(expected.total),
    }
    return _pairs(rows)


def _section(console: Console, title: str) -> None:
    console.rule(Text(title, "bold"), align="left")


def _table(*names: str, left: int = 1) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < left else "right")
    return table


def _pairs(rows: Mapping[str, str]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for row in rows.items():
        table.add_row(*row)
    return table


def _spread(values: np.ndarray) -> str:
    """A mean, and what it lies between."""
    if values.min() == values.max():
        return f"{values[0]:,}"
    return f"{values.mean():,.1f} on average, {values.min():,} to {values.max():,}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def _value(value: Any) -> str:
    return "" if value is None else f"{value.item():.6g}"


def _bytes(size: float) -> str:
    """'1.5 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} TiB"


def _seconds(seconds: float) -> str:
    """'1.2 ms', '3.4 s', '12 min' or '3.4 h'."""
    for unit, most, of_unit in (("ms", 1, 1e-3), ("s", 120, 1), ("min", 7200, 60)):
        if seconds < most:
            return f"{seconds / of_unit:.3g} {unit}"
    return f"{seconds / 3600:,.3g} h"


if __name__ == "__main__":
    from fedexp.main import leave

    signal.signal(signal.SIGINT, leave)
    sys.exit(main())
