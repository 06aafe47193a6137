"""Trains every algorithm that fedexp ships on real digits, and measures what its rounds cost.

    python -m benchmarks.algorithms accuracy --split=writers   # Or labels, with skewed labels.
    python -m benchmarks.algorithms cost                       # A round's time over FedAvg's, in turns.
    python -m benchmarks.algorithms table                      # What has been measured, as Markdown.

The digits are those of `$FEDEXP_TEST_DATA/mnist_by_writer_full`, in the layout of TensorFlow Federated: 836
writers, or dealt out anew to 100 clients with labels drawn from Dirichlet(0.3). Each algorithm is what its
shipped config says, with a few bindings on top. Runs that the result file already has are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import gin
import numpy as np
from absl import logging

import fedexp.trainer  # noqa: F401  Registers what the files name.
from benchmarks.machine import machine
from fedexp import config
from fedexp.data import FederatedDataset, FederatedSplits
from fedexp.data.emnist import emnist
from fedexp.data.partition import dirichlet, from_arrays
from fedexp.main import experiment

RESULTS = Path(__file__).parent / "results" / "algorithms.json"
DIGITS = "mnist_by_writer_full"
REFERENCE = "fedavg"

# Name -> shipped config, without .gin.
CONFIGS = {
    "fedavg": "emnist_fedavg",
    "fedavgm": "emnist_fedavgm",
    "fedadagrad": "emnist_fedadagrad",
    "fedadam": "emnist_fedadam",
    "fedyogi": "emnist_fedyogi",
    "fedsgd": "emnist_fedsgd",
    "fedprox": "emnist_fedprox",
    "fedprox, adaptive": "emnist_fedprox_adaptive",
    "scaffold": "emnist_scaffold",
    "mime": "emnist_mime",
    "mimelite": "emnist_mimelite",
    "fednova": "emnist_fednova",
    "feddyn": "emnist_feddyn",
    "q_fedavg": "emnist_q_fedavg",
    "agnostic": "emnist_agnostic",
    "fine_tuning": "emnist_fine_tuned",
    "reptile": "emnist_reptile",
    "per_fedavg": "emnist_per_fedavg",
    "pfedme": "emnist_pfedme",
    "ditto": "emnist_ditto",
    "apfl": "emnist_apfl",
    "hypcluster": "emnist_hypcluster",
    "fedper": "emnist_fedper",
    "lg_fedavg": "emnist_lg_fedavg",
    "fedrep": "emnist_fedrep",
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
        f"train.num_rounds = {rounds}",
        f"train.seed = {seed}",
        f"uniform.cohort_size = {COHORTS[split]}",
        f"classification.model = @{MODELS[model]}()",
        f"{MODELS[model]}.num_classes = 10",
        "classification.num_classes = 10",
        "classification.class_names = '0123456789'",
        *DIGITS_NEED.get(name, ()),
        *(DENSE_NEEDS.get(name, ()) if model == "dense" else ()),
    ]


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
    content = _content()
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
            _save(content)


def measure_cost(args: argparse.Namespace) -> None:
    """Times rounds of each algorithm, FedAvg's just before: the ratios' median over turns."""
    content = _content()
    costs = content.setdefault("cost", {}).setdefault(args.model, {})
    for name in args.names:
        reference = _Rounds(load(REFERENCE, "writers", args.model, 10**6, 0))
        measured = _Rounds(load(name, "writers", args.model, 10**6, 0))
        ratios = []
        for _ in range(args.turns):
            before, own, after = (
                r.seconds(args.per_turn) for r in (reference, measured, reference)
            )
            ratios.append(own / ((before + after) / 2))
        costs[name] = {"ratio": statistics.median(ratios), "ratios": ratios}
        print(name, f"{costs[name]['ratio']:.2f}")
        _save(content)


class _Rounds:
    """An experiment's rounds, timed some at a time; those that compile are not."""

    def __init__(self, setup: Any):
        self._rounds = setup.rounds()
        self.seconds(6)

    def seconds(self, count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            round_ = next(self._rounds)
        round_.metrics  # noqa: B018  Waits for it.
        return time.perf_counter() - begin


def print_table(args: argparse.Namespace) -> None:
    """One row an algorithm: accuracy in percent, mean and standard deviation over seeds."""
    content = _content()
    costs = content.get("cost", {}).get(args.model, {})
    splits = [split for split in COHORTS if split in content["accuracy"]]
    print("| algorithm |", *(f"{s} | {s}, personal | {s}, p10 |" for s in splits), "round |")
    print("| --- |", " --- |" * (3 * len(splits) + 1))
    for name in CONFIGS:
        cells = [name]
        for split in splits:
            runs = content["accuracy"][split].get(name, {}).values()
            own = [run["test_personal"] for run in runs if "test_personal" in run]
            cells += [
                _mean([run["test"]["accuracy"] for run in runs]),
                _mean([run["accuracy"] for run in own]),
                _mean([run["p10"] for run in own or [run["test"] for run in runs]]),
            ]
        cells.append(f"{costs[name]['ratio']:.2f}" if name in costs else "")
        print("|", " | ".join(cells), "|")


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    mean, deviation = 100 * statistics.mean(values), 100 * statistics.pstdev(values)
    return f"{mean:.1f} ± {deviation:.1f}"


def _content() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def _save(content: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps({**content, "machine": machine()}, indent=1) + "\n")


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
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    {"accuracy": measure_accuracy, "cost": measure_cost, "table": print_table}[args.what](args)


if __name__ == "__main__":
    main()
