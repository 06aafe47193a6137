"""Rounds, compiled for devices that are only described."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks.tpu.programs import Described, compiled_round
from fedexp.contracts import Algorithm
from fedexp.data import ClientBatching, FederatedDataset
from fedexp.engine import Engine, Packing, Strategy


def round_on(
    placement: Described,
    algorithm: Algorithm,
    dataset: FederatedDataset,
    params: Any,
    lanes: int,
    sample: np.ndarray,
) -> jax.stages.Compiled:
    """The round of a cohort of at most five clients, in batches of four."""
    engine = Engine(
        Strategy(placement, Packing(lanes=lanes)),
        algorithm,
        {"train": dataset, "test": dataset},
        ClientBatching(4),
        params=params,
        cohort_size=5,
        seed=0,
    )
    return compiled_round(engine, params, engine.prepare(0, sample))
