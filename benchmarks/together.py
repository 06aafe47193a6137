"""Times rounds of many trials in one program over those of one trial, in turns.

    python -m benchmarks.together --models=logistic,dense,cnn --trials=4,16,64
    python -m benchmarks.together --show

The ratio is of the time of K trials together to K times that of one alone: below 1 it pays. FedAdam on 100
writers of the embedded glyphs, 10 clients a round, batches of 20; trials differ in both learning rates.
Neither summaries nor evaluations are timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import optax
from absl import logging

from benchmarks.machine import machine
from benchmarks.rounds import Rounds
from fedexp.algorithms import fedavg, optimizers
from fedexp.algorithms.trials import trials
from fedexp.data import ClientBatching, uniform
from fedexp.data.glyphs import glyphs
from fedexp.models import EmnistCNN, EmnistDense, EmnistLogistic
from fedexp.tasks import classification
from fedexp.trainer import Experiment

RESULTS = Path(__file__).parent / "results" / "together.json"
MODELS = {"logistic": EmnistLogistic, "dense": EmnistDense, "cnn": EmnistCNN}


def _rounds(splits: Any, task: Any, algorithm: Any) -> Rounds:
    return Rounds(
        Experiment(
            splits,
            task,
            algorithm,
            num_rounds=10**6,
            sampler=uniform(10),
            batching=ClientBatching(20),
            evaluations=[],
            observers=[],
            privacy=None,
        ).rounds(),
        warm_up=2,  # A round of 64 trials takes minutes.
    )


def measure(model: str, count: int, turns: int, least: float) -> dict[str, Any]:
    """Turns of as many rounds as take `least` seconds alone."""
    splits, task = glyphs(num_writers=100), classification(MODELS[model](), 62)

    def make(numbers: dict[str, Any]) -> Any:
        return fedavg(task, optax.sgd(numbers["client"]), optimizers.adam(numbers["server"]))

    values = {
        "client": np.geomspace(0.01, 0.1, count, dtype=np.float32),
        "server": np.geomspace(0.001, 0.01, count, dtype=np.float32),
    }
    alone = _rounds(splits, task, make({"client": 0.03, "server": 0.003}))
    together = _rounds(splits, task, trials(make, values))
    per_turn = max(1, round(least / (alone.seconds(3)[0] / 3)))
    times = [
        (
            alone.seconds(per_turn)[0] / per_turn,
            together.seconds(1)[0],
            alone.seconds(per_turn)[0] / per_turn,
        )
        for _ in range(turns)
    ]
    ratios = [own / (count * (before + after) / 2) for before, own, after in times]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "alone_ms": 1e3 * statistics.median(before for before, _, _ in times),
        "together_ms": 1e3 * statistics.median(own for _, own, _ in times),
    }


def main() -> None:
    """Measures, or prints what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--trials", default="4,16,64")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--turn_seconds", type=float, default=0.3)
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"measured": {}}
    for model in () if args.show else args.models.split(","):
        for count in map(int, args.trials.split(",")):
            found = measure(model, count, args.turns, args.turn_seconds)
            content["measured"].setdefault(model, {})[str(count)] = found
            content["machine"] = machine()
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(
        "| model | trials | one alone, ms | together, ms | ratio |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for model, of_model in content["measured"].items():
        for count, one in of_model.items():
            ratio = f"{one['ratio']:.2f} ({min(one['ratios']):.2f} to {max(one['ratios']):.2f})"
            print(
                f"| {model} | {count} | {one['alone_ms']:.1f} | {one['together_ms']:.1f} | {ratio} |"
            )


if __name__ == "__main__":
    main()
