"""Compares fedexp with FedJAX and pfl-research: the same clients, models and batches, taking turns.

    python -m benchmarks.compare --fedjax_python=PATH --fedjax_source=PATH --pfl_python=PATH
    python -m benchmarks.compare --before=CHECKOUT
    python -m benchmarks.compare --algorithms=fedavg,scaffold,mime ...

Every library runs in a process of its own. In each turn every one of them trains the same rounds, one
after another while the others wait, so a busy machine slows all alike; who begins rotates. The ratio of
two libraries is taken within a turn. benchmarks/README.md tells how to set the other libraries up.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import machine, processor, spread
from benchmarks.peers import workloads
from benchmarks.peers.process import ROOT, Library, Peer, PeerError
from benchmarks.peers.protocol import FEDAVG, Job
from fedexp.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

RESULTS = Path(__file__).parent / "results"
OURS = "fedexp"
BEFORE = "fedexp before"
FEDJAX, PFL = "FedJAX", "pfl-research"
OUR_FEDAVG = "fedexp, FedAvg"  # Takes part where another algorithm is compared.
# Algorithm -> the other libraries that have one of their own.
ALGORITHMS = {
    FEDAVG: (FEDJAX, PFL),
    "fedprox": (FEDJAX, PFL),
    "fedprox_adaptive": (PFL,),
    "scaffold": (PFL,),
    "reptile": (PFL,),
    "mime": (FEDJAX,),
    "mimelite": (FEDJAX,),
    "agnostic": (FEDJAX,),
    "hypcluster": (FEDJAX,),
    "apfl": (FEDJAX,),
}
WARM_UP = 2  # Rounds; the first one compiles.
MAX_ROUNDS_A_TURN = 50
MIB = 1 << 20
TABLE_WIDTH = 150  # Characters, where the terminal does not tell.
PAUSE = 0.05  # Seconds; threads of the library before stop spinning.

Figures = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.show:
        report = json.loads(Path(arguments.show).read_text())
        show(report)
        print(markdown(report))
        return 0
    libraries = [
        Library(OURS, "fedexp_peer.py", sys.executable, str(ROOT), OURS),
        *earlier(arguments.before, arguments.before_python),
        Library(
            FEDJAX, "fedjax_peer.py", arguments.fedjax_python, arguments.fedjax_source, "fedjax"
        ),
        Library(PFL, "pfl_peer.py", arguments.pfl_python, arguments.pfl_source, "pfl"),
    ]
    if arguments.before:  # Who compares with that does not miss the others.
        libraries = [library for library in libraries if not library.missing]
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "seed": arguments.seed,
        "settings": settings(arguments),
        "libraries": {library.name: {"commit": library.commit()} for library in libraries},
        "workloads": {},
    }
    path = Path(arguments.output or RESULTS / f"compare_{report['date']}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for title, (name, data) in jobs(arguments.workloads, arguments.data).items():
            for algorithm in arguments.algorithms:
                full = title if algorithm == FEDAVG else f"{title}, {algorithm}"
                found = compare(
                    full,
                    name,
                    data,
                    of_algorithm(algorithm, libraries),
                    arguments,
                    report["libraries"],
                )
                report["workloads"][full] = {"algorithm": algorithm, **found}
                path.write_text(json.dumps(report, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(report)
    print(f"written to {path}")
    if arguments.plot:
        plot(report, Path(arguments.plot))
        print(f"drawn to {arguments.plot}")
    return int(bool(reasons(report, "failed")))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    known = ", ".join(workloads.WORKLOADS)
    add("--workloads", default=",".join(workloads.WORKLOADS), help=f"separated by commas: {known}")
    add("--algorithms", default=FEDAVG, help=f"separated by commas: {', '.join(ALGORITHMS)}")
    add("--measure", default="rounds,start", help="rounds, start or both, separated by a comma")
    add("--data", default="glyphs", help="of the EMNIST workloads: glyphs, digits or both")
    add("--clients", type=int, default=100, help="population of generated data")
    add("--cohort_size", type=int, default=10, help="clients a round")
    add("--turns", type=int, default=7, help="measured turns, at least 5")
    add(
        "--turn_seconds",
        type=float,
        default=0.5,
        help="least time the fastest library's turn takes",
    )
    add("--starts", type=int, default=3, help="fresh processes of each library")
    add("--whole_batches", action="store_true", help="cut clients to whole batches")
    add("--seed", type=int, default=0)
    for option, name in (("fedjax", "FedJAX"), ("pfl", "pfl-research")):
        add(f"--{option}_python", help=f"interpreter of {name}'s virtual environment")
        add(f"--{option}_source", help=f"a checkout of {name} to use instead of the package")
    add("--before", help="a checkout of an earlier fedexp, to compare with as another library")
    add("--before_python", default=sys.executable, help="its interpreter, as of another JAX")
    add("--show", help="a file of figures to show, also as Markdown; nothing is measured")
    add("--output", help="where the figures go as JSON")
    add("--plot", help="a PNG to draw")
    arguments = parser.parse_args(argv)
    for option, choices in (
        ("workloads", tuple(workloads.WORKLOADS)),
        ("algorithms", tuple(ALGORITHMS)),
        ("measure", ("rounds", "start")),
        ("data", ("glyphs", "digits")),
    ):
        chosen = [name for name in getattr(arguments, option).split(",") if name]
        unknown = [name for name in chosen if name not in choices]
        if unknown or not chosen:
            parser.error(
                f"--{option} takes {', '.join(choices)}; got {', '.join(unknown) or 'none'}"
            )
        setattr(arguments, option, chosen)
    for option, least in (("turns", 5), ("starts", 1), ("cohort_size", 1), ("clients", 1)):
        if getattr(arguments, option) < least:
            parser.error(f"--{option} must be at least {least}, got {getattr(arguments, option)}")
    texts = [name for name in arguments.workloads if workloads.WORKLOADS[name].length]
    if "agnostic" in arguments.algorithms and texts:
        parser.error(
            f"--algorithms: agnostic needs classes, and {', '.join(texts)} has none; leave one out"
        )
    for option in ("fedjax_python", "pfl_python", "before_python"):
        path = getattr(arguments, option)
        if path and not os.access(path, os.X_OK):
            parser.error(f"--{option}: {path} is not an interpreter")
    for option in ("fedjax_source", "pfl_source", "before"):
        path = getattr(arguments, option)
        if path and not os.path.isdir(path):
            parser.error(f"--{option}: there is no folder {path}")
    return arguments


def earlier(checkout: str | None, python: str) -> list[Library]:
    """An older fedexp with the peer of its time, in that interpreter; nothing without a checkout."""
    if checkout is None:
        return []
    folder = Path(checkout).resolve()
    script = folder / "benchmarks" / "peers" / "fedexp_peer.py"
    return [Library(BEFORE, str(script), python, str(folder), OURS)]


def of_algorithm(algorithm: str, libraries: Sequence[Library]) -> list[Library]:
    """The libraries, to train with it; and fedexp with FedAvg, if that is another one."""
    found = [
        library._replace(
            algorithm=algorithm,
            lacks=library.name in (FEDJAX, PFL) and library.name not in ALGORITHMS[algorithm],
        )
        for library in libraries
    ]
    reference = libraries[0]._replace(name=OUR_FEDAVG)
    return found if algorithm == FEDAVG else [found[0], reference, *found[1:]]


def jobs(names: Sequence[str], data: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Title -> workload and data; the texts are the same whatever the images are."""
    found = {}
    for name in names:
        for source in data if not workloads.WORKLOADS[name].length else data[:1]:
            found[name if source == data[0] else f"{name}, {source}"] = name, source
    return found


def settings(arguments: argparse.Namespace) -> Figures:
    """What a reader needs to repeat the run; paths are the machine's own business."""
    names = (
        "algorithms",
        "measure",
        "data",
        "clients",
        "cohort_size",
        "turns",
        "turn_seconds",
        "starts",
        "whole_batches",
    )
    return {name: getattr(arguments, name) for name in names}


def compare(
    title: str,
    name: str,
    data: str,
    libraries: Sequence[Library],
    arguments: argparse.Namespace,
    known: Figures,
) -> Figures:
    """Measures one workload; what is learned of the libraries goes to `known`."""
    job = workloads.build(
        name,
        data=data,
        num_clients=arguments.clients,
        cohort_size=arguments.cohort_size,
        num_rounds=WARM_UP + arguments.turns * MAX_ROUNDS_A_TURN,
        whole_batches=arguments.whole_batches,
        seed=arguments.seed,
    )
    figures = {
        "data": workloads.describe(job, data),
        "batch_size": job.batch_size,
        "cohort_size": arguments.cohort_size,
        "parameters": workloads.WORKLOADS[name].parameters[job.num_classes],
        "libraries": {library.name: {} for library in libraries},
    }
    rows = figures["libraries"]
    for library in libraries:
        if library.missing:
            rows[library.name]["missing"] = library.missing
    with tempfile.TemporaryDirectory() as folder:
        job.write(Path(folder))
        if "rounds" in arguments.measure:
            measure_rounds(title, job, folder, libraries, arguments, figures, known)
        if "start" in arguments.measure:
            measure_starts(title, folder, libraries, arguments.starts, figures)
    return figures


def measure_rounds(
    title: str,
    job: Job,
    folder: str,
    libraries: Sequence[Library],
    arguments: argparse.Namespace,
    figures: Figures,
    known: Figures,
) -> None:
    rows, done = figures["libraries"], 0
    with contextlib.ExitStack() as stack:
        peers: dict[str, Peer] = {}
        seconds: dict[str, list[float]] = {}
        cpu_seconds: dict[str, list[float]] = {}
        warm: dict[str, float] = {}
        for library in running(libraries, rows):
            row = rows[library.name]
            with noting_failure(library.name, rows):
                say(title, f"{library.name} sets up and compiles")
                peer = stack.enter_context(Peer(library))
                reply = peer.ask(do="set_up", folder=folder, algorithm=library.algorithm)
                check_parameters(reply["parameters"], figures["parameters"])
                check_algorithm(reply.get("algorithm", FEDAVG), library.algorithm)
                if library.name in known:
                    learn(known[library.name], reply)
                first = peer.ask(do="train", rounds=[0, 1])["seconds"]
                warm[library.name] = peer.ask(do="train", rounds=[1, WARM_UP])["seconds"]
                row["first_round_seconds"] = first
                seconds[library.name], cpu_seconds[library.name] = [], []
                peers[library.name] = peer
        if not peers:
            return
        count = rounds_a_turn(arguments.turn_seconds, min(warm.values()))
        done, work = WARM_UP, {name: 0 for name in peers}
        for turn in range(arguments.turns):
            say(title, f"turn {turn + 1} of {arguments.turns}, {count} rounds each")
            span = range(done, done + count)
            for name in rotated(list(peers), turn):
                with noting_failure(name, rows):
                    time.sleep(PAUSE)
                    reply = peers[name].ask(do="train", rounds=[span.start, span.stop])
                    check_work(reply["examples"], job, span)
                    seconds[name].append(reply["seconds"] / count)
                    cpu_seconds[name].append(reply["cpu_seconds"] / count)
                    work[name] += reply["examples"]
                    rows[name] |= {"norm": reply["norm"], "peak_mib": mib(reply["peak_bytes"])}
                if rows[name].get("failed"):
                    del peers[name]
            done += count
    figures["rounds_a_turn"] = count
    rounds = arguments.turns * count
    figures["examples_a_round"] = real_examples(job, range(WARM_UP, done)) / rounds
    for name in peers:
        row = rows[name]
        row["seconds_a_round"] = spread(seconds[name])
        row["cpu_seconds_a_round"] = spread(cpu_seconds[name])
        row["trained_examples_a_round"] = work[name] / rounds
        per_example = row["seconds_a_round"]["median"] / row["trained_examples_a_round"]
        row["ms_a_trained_example"] = 1000 * per_example
        if OURS in peers:
            row["ratio"] = spread(ratios(seconds[name], seconds[OURS]))
            row["cpu_ratio"] = spread(ratios(cpu_seconds[name], cpu_seconds[OURS]))
    for other, key in ((BEFORE, "over_before"), (OUR_FEDAVG, "over_fedavg")):
        if {OURS, other} <= peers.keys():
            rows[OURS][key] = spread(ratios(seconds[OURS], seconds[other]))
            rows[OURS][f"cpu_{key}"] = spread(ratios(cpu_seconds[OURS], cpu_seconds[other]))


def measure_starts(
    title: str, folder: str, libraries: Sequence[Library], repeats: int, figures: Figures
) -> None:
    """Times fresh processes from launch to the end of their first round.

    In pairs: the second one finds what its library has kept from the first.
    """
    rows = figures["libraries"]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for repeat in range(repeats):
        for library in rotated(running(libraries, rows), repeat):
            say(title, f"start {repeat + 1} of {repeats}, {library.name}")
            with (
                noting_failure(library.name, rows),
                tempfile.TemporaryDirectory() as cache,
            ):
                for launch in ("start", "restart"):
                    begin = time.perf_counter()
                    with Peer(library, cache) as peer:
                        peer.ask(do="set_up", folder=folder, algorithm=library.algorithm)
                        reply = peer.ask(do="train", rounds=[0, 1])
                        seconds = time.perf_counter() - begin
                    found[library.name][f"{launch}_seconds"].append(seconds)
                    found[library.name][f"{launch}_peak_mib"].append(mib(reply["peak_bytes"]))
    ours = found.get(OURS) if not rows[OURS].get("failed") else None
    for library in running(libraries, rows):
        row, own = rows[library.name], found[library.name]
        row |= {name: spread(values) for name, values in own.items()}
        for launch in ("start", "restart") if ours else ():
            name = f"{launch}_seconds"
            row[f"{launch}_ratio"] = spread(ratios(own[name], ours[name]))
    if ours and BEFORE in found and not rows[BEFORE].get("failed"):
        for name in ("start_seconds", "restart_seconds"):
            over = spread(ratios(ours[name], found[BEFORE][name]))
            rows[OURS][name.replace("seconds", "over_before")] = over


def running(libraries: Sequence[Library], rows: Figures) -> list[Library]:
    """The libraries that are there and have not failed."""
    return [
        library for library in libraries if not {"missing", "failed"} & rows[library.name].keys()
    ]


@contextlib.contextmanager
def noting_failure(library: str, rows: Figures) -> Iterator[None]:
    try:
        yield
    except PeerError as error:
        rows[library]["failed"] = str(error)
        say(library, f"failed: {error}")


# ---- pure parts ----


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times longer they take, turn by turn."""
    return [their / our for their, our in zip(theirs, ours, strict=True)]


def rotated(items: list, by: int) -> list:
    """The items in their order, from number `by` on and around."""
    by %= max(len(items), 1)
    return items[by:] + items[:by]


def rounds_a_turn(turn_seconds: float, fastest_round: float) -> int:
    """Rounds that keep the fastest library busy for `turn_seconds`, within bounds."""
    return min(max(math.ceil(turn_seconds / fastest_round), 1), MAX_ROUNDS_A_TURN)


def real_examples(job: Job, rounds: range, multiple: int = 1) -> int:
    """Examples of the cohorts of `rounds`, each client's rounded up to a multiple."""
    sizes = (
        int(job.offsets[client + 1] - job.offsets[client])
        for round_ in rounds
        for client in job.cohorts[round_]
    )
    return sum(-(-size // multiple) * multiple for size in sizes)


def check_parameters(found: int, expected: int) -> None:
    if found != expected:
        raise PeerError(f"its model has {found:,} parameters instead of {expected:,}")


def check_algorithm(found: str, expected: str) -> None:
    if found != expected:
        raise PeerError(f"it trains with {found} instead of {expected}")


def learn(about: Figures, reply: Figures) -> None:
    """Adds what a peer tells of itself; notes may come with an algorithm."""
    notes = [*about.get("notes", ()), *reply["notes"]]
    about |= {"versions": reply["versions"], "device": reply["device"]}
    about["notes"] = list(dict.fromkeys(notes))


def check_work(examples: int, job: Job, rounds: range) -> None:
    """Raises PeerError unless every example was trained on once, or as filled-up batches repeat it."""
    real, filled = real_examples(job, rounds), real_examples(job, rounds, job.batch_size)
    if examples not in (real, filled):
        raise PeerError(
            f"it trained on {examples} examples in rounds {rounds.start} to {rounds.stop - 1}; these "
            f"hold {real}, and {filled} with the last batches filled up"
        )


def mib(count: int) -> float:
    return round(count / MIB, 1)


# ---- output ----


def say(subject: str, text: str) -> None:
    print(f"{subject}: {text}", file=sys.stderr, flush=True)


def show(report: Figures) -> None:
    """Prints the tables, and what a reader should know."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    if "rounds" in report["settings"]["measure"]:
        columns = {
            "seconds a round": lambda row: shown(row["seconds_a_round"], 4),
            f"times {OURS}'s": lambda row: shown(row.get("ratio"), 2),
            "CPU seconds": lambda row: f"{row['cpu_seconds_a_round']['median']:.4f}",
            "times": lambda row: shown(row.get("cpu_ratio"), 2),
            "examples": lambda row: f"{row['trained_examples_a_round']:.0f}",
            "ms an example": lambda row: f"{row['ms_a_trained_example']:.3f}",
            "first round": lambda row: f"{row['first_round_seconds']:.1f} s",
            "peak": lambda row: f"{row['peak_mib']:.0f} MiB",
        }
        console.print(table("training rounds, median (minimum to maximum)", report, columns))
    if "start" in report["settings"]["measure"]:
        columns = {
            "seconds": lambda row: shown(row["start_seconds"], 1),
            f"times {OURS}'s": lambda row: shown(row.get("start_ratio"), 2),
            "peak": lambda row: shown(row["start_peak_mib"], 0) + " MiB",
            "second launch": lambda row: shown(row["restart_seconds"], 1),
            f"times {OURS}'s second": lambda row: shown(row.get("restart_ratio"), 2),
        }
        console.print(table("from launch to the end of the first round", report, columns))
    for other, key in ((BEFORE, "over_before"), (OUR_FEDAVG, "over_fedavg")):
        names = {
            key: "a round",
            f"cpu_{key}": "a round, CPU seconds",
            f"start_{key}": "from launch",
            f"restart_{key}": "from the second launch",
        }
        columns = {
            title: lambda row, name=name: shown(row.get(name), 3)
            for name, title in names.items()
            if any(name in figures["libraries"][OURS] for figures in report["workloads"].values())
        }
        if columns:
            console.print(table(f"{OURS}, times {other}", report, columns, only=OURS))
    for line in remarks(report):
        console.print(f"- {line}", markup=False, highlight=False)


def table(
    title: str,
    report: Figures,
    columns: Mapping[str, Callable[[Figures], str]],
    only: str | None = None,
) -> Table:
    """A row for every workload and library, or only one; one that is missing or has failed has it too."""
    from rich.table import Table

    result = Table(title=title)
    result.add_column("workload")
    result.add_column("library")
    for column in columns:
        result.add_column(column, justify="right")
    for name, figures in report["workloads"].items():
        for library, row in figures["libraries"].items():
            if only not in (None, library):
                continue
            problem = next((kind for kind in ("missing", "failed") if kind in row), None)
            texts = [problem] if problem else [text(row) for text in columns.values()]
            result.add_row(name, library, *texts, style="red" if problem else None)
        result.add_section()
    return result


def shown(spread: Figures | None, digits: int) -> str:
    if spread is None:
        return ""
    median, low, high = (f"{spread[part]:.{digits}f}" for part in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def markdown(report: Figures) -> str:
    """Ratios of algorithms as Markdown: to fedexp's FedAvg, and of the others to fedexp."""
    lines = [
        f"| model | algorithm | {OURS}, ms | its FedAvg's, times | CPU | "
        f"{FEDJAX}, times {OURS} | CPU | {PFL}, times {OURS} | CPU |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    for title, figures in report["workloads"].items():
        rows = figures["libraries"]
        ours = rows[OURS]
        cells = [title.partition(",")[0], figures.get("algorithm", FEDAVG)]
        cells += [f"{1000 * ours['seconds_a_round']['median']:.1f}" if "ratio" in ours else ""]
        cells += [briefly(ours, "over_fedavg"), briefly(ours, "cpu_over_fedavg")]
        for name in (FEDJAX, PFL):
            cells += [briefly(rows.get(name, {}), key) for key in ("ratio", "cpu_ratio")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def briefly(row: Figures, key: str) -> str:
    return f"{row[key]['median']:.2f}" if key in row else "" if "failed" not in row else "failed"


def remarks(report: Figures) -> list[str]:
    """What the table leaves out: data, versions, missing and failed libraries, agreement."""
    host = report["machine"]
    lines = [
        f"{processor(host)}, {host['cores']} cores, {host['memory_gib']} GiB, load "
        f"{host['load_before']}; seed {report['seed']}"
    ]
    if host["load_before"] > host["cores"] / 4:
        lines.append(
            "the machine was BUSY with other work: libraries suffer from that unequally, PyTorch most "
            "(its threads wait for each other spinning), so repeat this on an idle one"
        )
    for name, about in report["libraries"].items():
        if "versions" in about:
            found = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
            notes = "".join(f"; {note}" for note in about["notes"])
            lines.append(f"{name} on {about['device']} ({found}){notes}")
    for name, figures in report["workloads"].items():
        work = (
            f", {figures['examples_a_round']:.0f} a round" if "examples_a_round" in figures else ""
        )
        lines.append(
            f"{name}: {figures['data']}{work}; {figures['parameters']:,} parameters, batches of "
            f"{figures['batch_size']}, {figures['cohort_size']} clients a round"
        )
        lines += agreement(name, figures["libraries"])
    for kind in ("missing", "failed"):
        for library, texts in reasons(report, kind).items():
            lines += [f"{library} {kind}: {text}" for text in texts]
    return lines


def reasons(report: Figures, kind: str) -> Mapping[str, list[str]]:
    """Library -> why it is missing or failed, without repetition."""
    found: dict[str, dict[str, None]] = {}
    for figures in report["workloads"].values():
        for library, row in figures["libraries"].items():
            if kind in row:
                found.setdefault(library, {})[row[kind]] = None
    return {library: list(texts) for library, texts in found.items()}


def agreement(workload: str, rows: Figures) -> list[str]:
    """How far the libraries' parameters are apart where all start from zero and use no dropout."""
    random = workload.endswith("hypcluster") or not workload.startswith("emnist_logistic")
    if random or "norm" not in rows[OURS]:
        return []
    ours = rows[OURS]["norm"]
    apart = {name: abs(row["norm"] / ours - 1) for name, row in rows.items() if "norm" in row}
    texts = [
        f"{name} {value:.1e}" for name, value in apart.items() if name not in (OURS, OUR_FEDAVG)
    ]
    return [f"{workload}: relative difference of the parameters' norm: {', '.join(texts)}"] * bool(
        texts
    )


def plot(report: Figures, path: Path) -> None:
    """Draws the seconds a round of every workload as bars from a PNG's bottom up."""
    from matplotlib.figure import Figure

    measured = {
        name: {
            library: row["seconds_a_round"]
            for library, row in figures["libraries"].items()
            if "seconds_a_round" in row
        }
        for name, figures in report["workloads"].items()
    }
    figure = Figure(figsize=(2.6 * len(measured), 3.6), layout="constrained")
    for axes, (name, spreads) in zip(
        figure.subplots(1, len(measured), squeeze=False)[0], measured.items(), strict=True
    ):
        for index, (library, seconds) in enumerate(spreads.items()):
            middle = seconds["median"]
            below, above = middle - seconds["min"], seconds["max"] - middle
            bar = axes.bar(library, middle, yerr=[[below], [above]], color=f"C{index}", capsize=4)
            axes.bar_label(bar, [f"{middle:.3g} s"], padding=3)
        axes.set_title(name)
        axes.margins(y=0.15)
        axes.tick_params(axis="x", rotation=30)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("seconds a round")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # Ends the peers too.
    sys.exit(main())
