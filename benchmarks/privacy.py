"""Trains on real digits with privacy, and draws accuracy against epsilon.

    python -m benchmarks.privacy train   # Runs that the result file already has are not repeated.
    python -m benchmarks.privacy draw

The digits are those of `$FEDEXP_TEST_DATA/mnist_by_writer_full`: 836 writers. The noise is theirs, or that
of a deployment with a million clients of whom a thousand take part in a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import gin
from absl import logging

import benchmarks.algorithms  # noqa: F401  Registers the digits.
from benchmarks.machine import machine
from fedexp import config
from fedexp.main import experiment

RESULTS = Path(__file__).parent / "results" / "privacy.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "privacy.png"
ROUNDS, COHORT = 100, 84
EPSILONS = (0.25, 1.0, 4.0, 16.0)

CLIPPED = ("clip_by_norm.norm = 0.4", "train.sampler = @cyclic()", f"cyclic.cohort_size = {COHORT}")
POISSON = ("train.sampler = @poisson()", f"poisson.expected_cohort_size = {COHORT}")
MOMENTUM = ("server/sgd.learning_rate = 0.3162278", "server/sgd.momentum = 0.9")
# Name -> (what adds the noise, bindings).
MECHANISMS = {
    "DP-FedAvg, adaptive clipping": (
        "adaptive_clipping",
        ("fedavg.aggregator = [@adaptive_clipping(), @mean()]", *POISSON, *MOMENTUM),
    ),
    "DP-FTRL, tree": (
        "tree_noise",
        (
            "fedavg.aggregator = [@clip_by_norm(), @tree_noise(), @mean()]",
            "tree_noise.norm = 0.4",
            f"tree_noise.num_rounds = {ROUNDS}",
            *CLIPPED,
            *MOMENTUM,
        ),
    ),
    "DP-FTRL, 10 bands": (
        "banded_noise",
        (
            "fedavg.aggregator = [@clip_by_norm(), @banded_noise(), @mean()]",
            "banded_noise.norm = 0.4",
            f"banded_noise.num_rounds = {ROUNDS}",
            "banded_noise.bands = 10",
            *CLIPPED,
            *MOMENTUM,
        ),
    ),
}
WITHOUT = "without privacy"
POPULATIONS = {"a million clients": 1_000_000, "836 clients": None}


def bindings(name: str, population: int | None, epsilon: float, seed: int) -> list[str]:
    """What makes the shipped FedAvg one of the runs."""
    common = [
        "train.dataset = @digits()",
        "digits.split = 'writers'",
        f"train.num_rounds = {ROUNDS}",
        f"train.seed = {seed}",
        "classification.model = @EmnistDense()",
        "EmnistDense.num_classes = 10",
        "classification.num_classes = 10",
        "classification.class_names = '0123456789'",
        "train.observers = []",
        "evaluate.every = 0",
    ]
    if name == WITHOUT:
        return [*common, *POISSON, *MOMENTUM]
    mechanism, more = MECHANISMS[name]
    noise = [f"{mechanism}.noise_multiplier = None", f"privacy.epsilon = {epsilon}"]
    if population is not None:
        noise += [
            f"{mechanism}.noise_cohort_size = 1000",
            f"privacy.population = {population}",
            "privacy.delta = 1e-6",
        ]
    elif mechanism == "adaptive_clipping":
        noise.append("adaptive_clipping.count_noise = 20.0")  # A twentieth of so few is too little.
    return [*common, *more, *noise]


def train(name: str, population: int | None, epsilon: float, seed: int) -> dict[str, Any]:
    """Accuracy over all test examples, and what it cost."""
    gin.clear_config()
    config.load(["emnist_fedavg.gin"], bindings(name, population, epsilon, seed))
    setup = experiment()
    for round_ in setup.rounds():
        if not round_.is_finite():  # Waits, and so bounds what is under way.
            return {"accuracy": None, "diverged": round_.number}
    found = {"accuracy": round_.evaluate()["test/accuracy"], "epsilon": round_.epsilon}
    account = round_.session.account
    if account is not None:
        found |= {
            "delta": account.delta,
            "noise_multiplier": account.parts[0].mechanisms[0].noise_multiplier,
            "noise_std": round_.metrics["aggregate/noise_std"],
        }
    return found


def measure(args: argparse.Namespace) -> None:
    """Trains those that have not been yet, and writes each as soon as it is done."""
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    done = {(r["name"], r["population"], r["target"], r["seed"]) for r in content["runs"]}
    for seed in range(args.seeds):
        planned = [
            (name, population, epsilon)
            for population in POPULATIONS.values()
            for name in MECHANISMS
            for epsilon in EPSILONS
        ]
        for name, population, epsilon in [(WITHOUT, None, None), *planned]:
            if (name, population, epsilon, seed) in done:
                continue
            begin = time.perf_counter()
            run = {"name": name, "population": population, "target": epsilon, "seed": seed}
            run |= train(name, population, epsilon, seed)
            print(run, f"{time.perf_counter() - begin:.0f} s", flush=True)
            content["runs"].append(run)
            RESULTS.write_text(json.dumps({**content, "machine": machine()}, indent=1) + "\n")


def draw(args: argparse.Namespace) -> None:
    """Accuracy against epsilon, a panel for each population."""
    del args
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = json.loads(RESULTS.read_text())["runs"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    best = statistics.mean(100 * r["accuracy"] for r in runs if r["name"] == WITHOUT)
    for panel, (title, population) in zip(panels, POPULATIONS.items(), strict=True):
        panel.axhline(best, color="0.6", linestyle="--", label=WITHOUT)
        for name in MECHANISMS:
            points: dict[float, list[float]] = {}
            for run in runs:
                if (run["name"], run["population"]) == (name, population) and run["accuracy"]:
                    points.setdefault(run["target"], []).append(100 * run["accuracy"])
            panel.plot(
                sorted(points),
                [statistics.mean(points[e]) for e in sorted(points)],
                "o-",
                label=name,
            )
        panel.set(title=title, xscale="log", xlabel="epsilon")
        panel.set_xticks(EPSILONS, [f"{e:g}" for e in EPSILONS])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend()
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)


def main() -> None:
    """Trains or draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "draw"))
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    {"train": measure, "draw": draw}[args.what](args)


if __name__ == "__main__":
    main()
