"""Trains every task of the literature, made small, under some strategies, and saves the parameters.

python -m tests.support.tasks OUTPUT [STRATEGY:DEVICES:LANES ...]
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
import optax

from fedexp import runtime
from fedexp.algorithms import fedavg
from fedexp.contracts import Algorithm
from fedexp.data import ClientBatching, FederatedDataset
from fedexp.engine import Engine
from fedexp.models import (
    EmnistAutoencoder,
    LSTMLanguageModel,
    ResNet18GroupNorm,
    TagLogistic,
    TransformerLanguageModel,
)
from fedexp.tasks import (
    classification,
    crop_and_flip,
    handwriting,
    next_token,
    reconstruction,
    standardize,
    tag_prediction,
)
from tests.support.measured import numbers
from tests.support.strategies import strategy

SIZES = (3, 8, 4, 8)  # One short batch: too few to compile a size for.
TASKS = {
    "words": next_token(LSTMLanguageModel(30, 4, 8, projection_size=4)),
    "characters": next_token(LSTMLanguageModel(30, 4, 8, num_layers=2)),
    "transformer": next_token(TransformerLanguageModel(30, 4, 8, 1, 2, 8, dropout_rate=0.2)),
    "tags": tag_prediction(TagLogistic(20, 6)),
    "cifar100": classification(
        ResNet18GroupNorm(5, stages=(1,), strides=(1,), width=4),
        num_classes=5,
        augment=crop_and_flip(24),
        preprocess=standardize,
    ),
    "autoencoder": reconstruction(EmnistAutoencoder(3), handwriting, sum_loss=True),
}


def features(name: str, rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if name in ("words", "characters", "transformer"):
        tokens = rng.integers(1, 30, (rows, 8))
        tokens[np.arange(8) > rng.integers(2, 9, (rows, 1))] = 0
        return {"tokens": tokens.astype(np.uint16)}
    if name == "tags":
        return {
            "words": rng.integers(0, 21, (rows, 5)).astype(np.uint16),
            "num_words": np.full(rows, 7, np.uint16),
            "tags": rng.integers(-1, 6, (rows, 2)).astype(np.int16),
        }
    shape = (32, 32, 3) if name == "cifar100" else (28, 28)
    images = rng.integers(0, 256, (rows, *shape)).astype(np.uint8)
    return {"x": images, "y": rng.integers(0, 5, rows).astype(np.int32)}


def problem(name: str) -> tuple[Algorithm, FederatedDataset, Any]:
    """FedAvg of a task, checked data of some clients, and the first parameters."""
    task, offsets = TASKS[name], np.cumsum([0, *SIZES])
    ids = np.array([f"client{i}" for i in range(len(SIZES))])
    dataset = FederatedDataset(features(name, offsets[-1]), offsets, ids)
    task.check(dataset)
    params = task.init(jax.random.key(0), dataset.slice(0, 1))
    return fedavg(task, optax.sgd(0.05), optax.sgd(1.0)), dataset, params


def main(output: str, *specs: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    runtime.start()
    results = {}
    for name in TASKS:
        algorithm, dataset, params = problem(name)
        for spec in specs:
            kind, devices, lanes = spec.split(":")
            engine = Engine(
                strategy(kind, int(devices), int(lanes), streamed=False),
                algorithm,
                dataset,
                ClientBatching(4),
                params=params,
                cohort_size=4,
                seed=0,
            )
            prepared = engine.prepare(0, np.arange(4))
            result = engine.run(engine.start(params), prepared)
            flat = jax.tree.map(np.ravel, jax.device_get(result.state.params))
            results[f"{spec} {name}"] = np.concatenate(jax.tree.leaves(flat))
            results[f"{spec} {name} loss"] = numbers(result, prepared)["train/loss"]
        results[f"first {name}"] = np.concatenate([np.ravel(p) for p in jax.tree.leaves(params)])
    np.savez(output, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
