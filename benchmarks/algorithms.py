"""Trains every algorithm that fedexp ships on real digits, and measures what its rounds cost.

    python -m benchmarks.algorithms accuracy --split=writers   # Or labels, with skewed labels.
    python -m benchmarks.algorithms cost                       # A round's time over FedAvg's, in turns.
    python -m benchmarks.algorithms table --write              # What has been measured, in the docs.

The digits are those of `$FEDEXP_TEST_DATA/mnist_by_writer_full`, in the layout of TensorFlow Federated: 836
writers, or dealt out anew to 100 clients with labels drawn from Dirichlet(0.3). Each algorithm is what its
shipped config says, with a few bindings on top. Runs that the result file already has are not repeated.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import statistics
import time
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gin
import numpy as np
from absl import logging

import fedexp.trainer  # noqa: F401  Registers what the files name.
from benchmarks.machine import machine, processor
from benchmarks.rounds import Rounds
from fedexp import config
from fedexp.data import FederatedDataset, FederatedSplits
from fedexp.data.emnist import emnist
from fedexp.data.partition import dirichlet, from_arrays
from fedexp.main import experiment

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "algorithms.json"
COSTS = RESULTS.with_name("algorithms_cost.json")  # Apart: both may be measured at once.
DOCUMENT = ROOT / "docs" / "algorithms.md"
BEGIN, END = "<!-- begin: python -m benchmarks.algorithms table --write -->", "<!-- end -->"
DIGITS = "mnist_by_writer_full"
REFERENCE = "fedavg"


class Shipped(NamedTuple):
    """What fedexp has of an algorithm.

    Attributes:
      config: the shipped file, without .gin.
      module: its file in fedexp/algorithms, without .py.
      paper: its arXiv number.
      state: what server and clients keep from round to round besides the server's parameters.
    """

    config: str
    module: str
    paper: str
    state: str


NONE, MOMENTS = "none", "server: the optimizer's"
ALGORITHMS = {
    "fedavg": Shipped("emnist_fedavg", "fedavg", "1602.05629", NONE),
    "fedavgm": Shipped("emnist_fedavgm", "fedavg", "1909.06335", MOMENTS),
    "fedadagrad": Shipped("emnist_fedadagrad", "fedavg", "2003.00295", MOMENTS),
    "fedadam": Shipped("emnist_fedadam", "fedavg", "2003.00295", MOMENTS),
    "fedyogi": Shipped("emnist_fedyogi", "fedavg", "2003.00295", MOMENTS),
    "fedsgd": Shipped("emnist_fedsgd", "fedsgd", "1602.05629", NONE),
    "fedprox": Shipped("emnist_fedprox", "fedprox", "1812.06127", NONE),
    "fedprox, adaptive": Shipped(
        "emnist_fedprox_adaptive", "fedprox", "1812.06127", "server: mu, a loss, a count"
    ),
    "scaffold": Shipped(
        "emnist_scaffold", "scaffold", "1910.06378", "server and client: a control variate"
    ),
    "mime": Shipped("emnist_mime", "mime", "2008.03606", MOMENTS),
    "mimelite": Shipped("emnist_mimelite", "mime", "2008.03606", MOMENTS),
    "fednova": Shipped("emnist_fednova", "fednova", "2007.07481", NONE),
    "feddyn": Shipped("emnist_feddyn", "feddyn", "2111.04263", "server and client: a gradient"),
    "q_fedavg": Shipped("emnist_q_fedavg", "q_fedavg", "1905.10497", NONE),
    "agnostic": Shipped(
        "emnist_agnostic", "agnostic", "2104.02748", "server: domain weights and counts"
    ),
    "fine_tuning": Shipped("emnist_fine_tuned", "fine_tuning", "2002.04758", NONE),
    "reptile": Shipped("emnist_reptile", "fedavg", "1803.02999", "server: its schedule's count"),
    "per_fedavg": Shipped("emnist_per_fedavg", "per_fedavg", "2002.07948", NONE),
    "pfedme": Shipped("emnist_pfedme", "pfedme", "2006.08848", NONE),
    "ditto": Shipped("emnist_ditto", "ditto", "2012.04221", "client: a model"),
    "apfl": Shipped("emnist_apfl", "apfl", "2003.13461", "client: a model and alpha"),
    "hypcluster": Shipped("emnist_hypcluster", "hypcluster", "2002.10619", "server: K models"),
    "fedper": Shipped("emnist_fedper", "fedper", "1912.00818", "client: its head"),
    "lg_fedavg": Shipped("emnist_lg_fedavg", "fedper", "2001.01523", "client: its lower layers"),
    "fedrep": Shipped("emnist_fedrep", "fedrep", "2102.07078", "client: its head"),
    "fedbuff": Shipped("emnist_fedbuff", "fedbuff", "2106.06639", "server: its last models"),
    "fedasync": Shipped("emnist_fedasync", "fedasync", "1903.03934", "server: its last models"),
}
CONFIGS = {name: shipped.config for name, shipped in ALGORITHMS.items()}


class Claim(NamedTuple):
    """That a measure of an algorithm is greater than another's one."""

    name: str
    measure: str
    reference: str
    other: str = "accuracy"

    def __str__(self) -> str:
        return f"{self.name}'s {self.measure} over {self.reference}'s {self.other}"


# In the papers, after as many rounds.
CLAIMS = (
    Claim("fedavg", "accuracy", "fedsgd"),
    *(
        Claim(name, "accuracy", "fedavg")
        for name in ("fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedprox", "fedprox, adaptive")
    ),
    *(
        Claim(name, "accuracy", "fedavg")
        for name in ("scaffold", "mime", "mimelite", "fednova", "feddyn")
    ),
    *(Claim(name, "p10", "fedavg", "p10") for name in ("q_fedavg", "agnostic")),
    *(
        Claim(name, "personal", "fedavg")
        for name in (
            "fine_tuning",
            "pfedme",
            "ditto",
            "apfl",
            "hypcluster",
            "fedper",
            "lg_fedavg",
            "fedrep",
        )
    ),
    *(Claim(name, "personal", "fine_tuning", "personal") for name in ("reptile", "per_fedavg")),
)
MEASURES: dict[str, Callable[[dict], float | None]] = {
    "accuracy": lambda run: run["test"]["accuracy"],
    "p10": lambda run: run["test"]["p10"],
    "personal": lambda run: run.get("test_personal", {}).get("accuracy"),
    "personal p10": lambda run: run.get("test_personal", {}).get("p10"),
}
# What ten classes need, and the names of the dense net's layers.
DIGITS_NEED = {"agnostic": ("agnostic.num_domains = 10",)}
DENSE_NEEDS = {
    "fedper": ("fedper.local = 'Dense_2'",),
    "lg_fedavg": ("fedper.local = 'Dense_[01]'",),
    "fedrep": ("fedrep.head = 'Dense_2'",),
}
# Clients a round, of 836 writers or of 100 clients: each trains about as often.
COHORTS = {"writers": 42, "labels": 5}
MODELS = {"dense": "EmnistDense", "cnn": "EmnistCNN"}


def bindings(name: str, split: str, model: str, rounds: int, seed: int) -> list[str]:
    """What makes a shipped config of Federated EMNIST one of the digits at hand."""
    return [
        "train.dataset = @digits()",
        f"digits.split = {split!r}",
        f"train.num_rounds = {rounds * rounds_per_cohort(name, split)}",
        f"train.seed = {seed}",
        *cohort(name, COHORTS[split]),
        f"classification.model = @{MODELS[model]}()",
        f"{MODELS[model]}.num_classes = 10",
        "classification.num_classes = 10",
        "classification.class_names = '0123456789'",
        *DIGITS_NEED.get(name, ()),
        *(DENSE_NEEDS.get(name, ()) if model == "dense" else ()),
    ]


def cohort(name: str, size: int) -> tuple[str, ...]:
    """Bindings: as many clients a round; four times as many at work for FedBuff; FedAsync as shipped."""
    if name == "fedbuff":
        return f"asynchronous.concurrency = {4 * size}", f"asynchronous.arrivals = {size}"
    return () if name == "fedasync" else (f"uniform.cohort_size = {size}",)


def rounds_per_cohort(name: str, split: str) -> int:
    """Rounds in which as many clients train as in one of the others."""
    return COHORTS[split] if name == "fedasync" else 1


@gin.configurable(module="benchmarks")
def digits(split: str) -> FederatedSplits:
    """The real digits: by writer, or with skewed labels."""
    by_writer = emnist(only_digits=True, data_dir=os.environ["FEDEXP_TEST_DATA"] + f"/{DIGITS}")
    if split == "writers":
        return by_writer
    pooled = {
        name: np.concatenate([part.features[name] for part in by_writer.present().values()])
        for name in by_writer.train.features
    }
    skewed: FederatedDataset = from_arrays(pooled, dirichlet(num_clients=100, alpha=0.3))
    return FederatedSplits(*skewed.split_examples(0.8))


def load(name: str, split: str, model: str, rounds: int, seed: int) -> Any:
    """An algorithm's experiment."""
    gin.clear_config()
    config.load([f"{CONFIGS[name]}.gin"], bindings(name, split, model, rounds, seed))
    return experiment()


def train(name: str, split: str, model: str, rounds: int, seed: int) -> dict[str, Any]:
    """Accuracy over all test examples, and of clients, with the server's and with their own parameters."""
    setup = load(name, split, model, rounds, seed)
    for round_ in setup.rounds():
        round_.metrics  # noqa: B018  Waits, and so bounds what is under way.
    results = round_.session.evaluate(round_, range(len(setup.evaluations)), full=True)
    found = {}
    for group, result in results.items():
        clients = result.per_client["accuracy"]
        found[group] = {
            "accuracy": result.metrics["accuracy"],
            "p10": float(np.nanpercentile(clients, 10)),
            "std": float(np.nanstd(clients)),
        }
    return found


def measure_accuracy(args: argparse.Namespace) -> None:
    """Trains those that have not been yet, and writes each as soon as it is done."""
    content = _content(RESULTS)
    settings = {"model": args.model, "rounds": args.rounds}
    runs = content.setdefault("accuracy", {}).setdefault(args.split, {"settings": settings})
    if runs["settings"] != settings:
        raise SystemExit(f"{RESULTS} holds runs of {runs['settings']}; delete these first")
    for seed in range(args.seeds):
        for name in args.names:
            if str(seed) in runs.setdefault(name, {}):
                continue
            begin = time.perf_counter()
            runs[name][str(seed)] = train(name, args.split, args.model, args.rounds, seed)
            print(name, seed, runs[name][str(seed)], f"{time.perf_counter() - begin:.0f} s")
            _save(content, RESULTS)


def measure_cost(args: argparse.Namespace) -> None:
    """Times rounds of each algorithm, FedAvg's just before and after: the ratios' median over turns."""
    content = _content(COSTS)
    costs = content.setdefault(args.model, {})
    reference = Rounds(load(REFERENCE, "writers", args.model, 10**6, 0).rounds(), 6)
    for name in args.names:
        setup = load(name, "writers", args.model, 10**6, 0)
        measured = Rounds(setup.rounds(), 6, rounds_per_cohort(name, "writers"))
        ratios, cpu_ratios = [], []
        for _ in range(args.turns):
            (before, cpu_before), (own, cpu_own), (after, cpu_after) = (
                rounds.seconds(args.per_turn) for rounds in (reference, measured, reference)
            )
            ratios.append(own / ((before + after) / 2))
            cpu_ratios.append(cpu_own / ((cpu_before + cpu_after) / 2))
        costs[name] = {
            "ratio": statistics.median(ratios),
            "cpu_ratio": statistics.median(cpu_ratios),
            "ratios": ratios,
            "cpu_ratios": cpu_ratios,
        }
        print(name, f"{costs[name]['ratio']:.2f}", f"{costs[name]['cpu_ratio']:.2f}", flush=True)
        _save(content, COSTS)


def print_table(args: argparse.Namespace) -> None:
    """Everything measured, as Markdown; with `--write`, between the marks in the docs."""
    content, costs = _content(RESULTS), _content(COSTS)
    text = "\n\n".join(
        (
            explained(content, costs, args.model),
            "\n".join(table(content["accuracy"], costs.get(args.model, {}))),
            "Whether the papers' claims show: the difference in points, mean over seeds (least to greatest). "
            "A claim shows here if the difference is positive in every seed; **bold** ones do not.",
            "\n".join(claims(content["accuracy"])),
        )
    )
    if not args.write:
        print(text)
        return
    write_between(DOCUMENT, BEGIN, text)


def write_between(document: Path, begin: str, text: str) -> None:
    """Puts a text between a document's marks."""
    before, _, rest = document.read_text().partition(begin)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{document} has no {begin} followed by {END}")
    document.write_text(f"{before}{begin}\n\n{text}\n\n{mark}{after}")


def explained(content: dict[str, Any], costs: dict[str, Any], model: str) -> str:
    """What the table's columns are, and what they were measured with."""
    splits = []
    for split, runs in content["accuracy"].items():
        seeds = sorted({len(found) for name, found in runs.items() if name in ALGORITHMS})
        count = " to ".join(str(number) for number in dict.fromkeys((seeds[0], seeds[-1])))
        settings = runs["settings"]
        splits.append(
            f"{split}: {COHORTS[split]} clients a round, {settings['rounds']} rounds, "
            f"model {settings['model']}, {count} seeds"
        )
    about = costs.get("machine")
    where = (
        f" ({processor(about)}, {about['cores']} cores, load {about['load_before']})"
        if about
        else ""
    )
    return (
        "Lines: of the file, and of those the ones with code, neither blank, comment nor docstring. State: "
        "what is kept from round to round besides the server's parameters. Round: time of a round over "
        f"FedAvg's, by the clock and in CPU seconds, medians over turns, model {model}{where}. Accuracy in "
        "percent over all test examples, and of the client below which a tenth of them are (p10), mean and "
        "standard deviation over seeds, with the server's parameters and with clients' own (personal); "
        f"{'; '.join(splits)}."
    )


def table(accuracy: dict[str, Any], costs: dict[str, Any]) -> list[str]:
    """One row an algorithm."""
    splits = [split for split in COHORTS if split in accuracy]
    left = ["algorithm", "arXiv", "file", "lines", "config", "state kept"]
    right = ["round", "CPU", *(f"{split}, {key}" for split in splits for key in MEASURES)]
    lines = [_row([*left, *right]), _row(["---"] * len(left) + ["---:"] * len(right))]
    for name, shipped in ALGORITHMS.items():
        all_lines, code = count_lines(ROOT / "fedexp" / "algorithms" / f"{shipped.module}.py")
        cells = [name, shipped.paper, f"`{shipped.module}.py`", f"{all_lines}, {code}"]
        cells += [f"`{shipped.config.removeprefix('emnist_')}`", shipped.state]
        cost = costs.get(name)
        cells += [f"{cost[key]:.2f}" if cost else "" for key in ("ratio", "cpu_ratio")]
        for split in splits:
            runs = accuracy[split].get(name, {}).values()
            cells += [_mean([of(run) for run in runs]) for of in MEASURES.values()]
        lines.append(_row(cells))
    return lines


def claims(accuracy: dict[str, Any]) -> list[str]:
    """One row a claim."""
    splits = [split for split in COHORTS if split in accuracy]
    lines = [_row(["claim", *splits]), _row(["---", *["---:"] * len(splits)])]
    for claim in CLAIMS:
        cells = [str(claim)]
        for split in splits:
            own, other = (accuracy[split].get(n, {}) for n in (claim.name, claim.reference))
            pairs = [
                (MEASURES[claim.measure](own[seed]), MEASURES[claim.other](other[seed]))
                for seed in own.keys() & other.keys()
            ]
            gains = [100 * (a - b) for a, b in pairs if a is not None and b is not None]
            cells.append(_gain(gains))
        lines.append(_row(cells))
    return lines


def count_lines(path: Path) -> tuple[int, int]:
    """All lines of a Python file, and those with code: neither blank, comment nor docstring."""
    text = path.read_text()
    code: set[int] = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.string.strip() and token.type not in (tokenize.COMMENT, tokenize.ENCODING):
                code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(text.splitlines()), len(code)


def _row(cells: list[str]) -> str:
    return re.sub(" +", " ", f"| {' | '.join(cells)} |")


def _mean(values: list[float | None]) -> str:
    found = [100 * value for value in values if value is not None]
    if len(found) < 2:
        return "".join(f"{value:.1f}" for value in found)
    return f"{statistics.mean(found):.1f} ± {statistics.pstdev(found):.1f}"


def _gain(gains: list[float]) -> str:
    if not gains:
        return ""
    text = f"{statistics.mean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})"
    return text if min(gains) > 0 else f"**{text}**"


def _content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _save(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps({**content, "machine": machine()}, indent=1) + "\n")


def main() -> None:
    """Measures, or prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("accuracy", "cost", "table"))
    parser.add_argument("--names", type=lambda text: text.split(","), default=list(CONFIGS))
    parser.add_argument("--split", choices=COHORTS, default="writers")
    parser.add_argument("--model", choices=MODELS, default="dense")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--per_turn", type=int, default=4, help="rounds")
    parser.add_argument("--write", action="store_true", help="the table into the docs")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    {"accuracy": measure_accuracy, "cost": measure_cost, "table": print_table}[args.what](args)


if __name__ == "__main__":
    main()
