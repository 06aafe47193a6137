"""A round's metrics as numbers."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from fedexp.contracts import RoundOutput
from fedexp.engine import PreparedRound
from fedexp.tasks import Measure


def numbers(output: RoundOutput, prepared: PreparedRound) -> dict[str, np.ndarray]:
    """Metrics of the round, and (cohort size,) of its clients; NaN where nothing has weight."""
    metrics, per_client = jax.device_get((dict(output.metrics), dict(output.per_client)))
    of_clients = jax.tree.map(lambda leaf: leaf[prepared.slots], per_client)
    return {name: _mean(value) for name, value in {**metrics, **of_clients}.items()}


def _mean(value: Any) -> np.ndarray:
    if not isinstance(value, Measure):
        return np.asarray(value)
    values, weights = map(np.asarray, value)
    return np.divide(values, weights, out=np.full_like(values, np.nan), where=weights > 0)
