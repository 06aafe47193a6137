"""Runs cohorts of the linear problem, and what NumPy makes of its clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fedexp.contracts import Algorithm, RoundOutput
from fedexp.data import ClientBatching
from fedexp.engine import Engine, Strategy, jit
from tests.support import linear

COHORTS = ((0, 2, 3, 5), (1, 3, 4, 6), (0, 1, 2, 6))


def run(
    algorithm: Algorithm,
    strategy: Strategy | None = None,
    cohorts: Sequence[Sequence[int]] = COHORTS,
    batching: ClientBatching | None = None,
    task: Any = None,
    seed: int = 0,
) -> tuple[Engine, RoundOutput]:
    """Runs one round a cohort; returns the engine and the last round's output."""
    params = (task or linear.task()).init(jax.random.key(0), None)
    engine = Engine(
        strategy or jit(),
        algorithm,
        linear.dataset(),
        batching or ClientBatching(4, shuffle=False),
        params=params,
        cohort_size=len(cohorts[0]),
        seed=seed,
    )
    state = engine.start(params)
    for number, cohort in enumerate(cohorts):
        prepared = engine.prepare(number, np.array(cohort, np.int64))
        output = engine.run(state, prepared)
        state = output.state
    return engine, output


def first() -> np.ndarray:
    """The parameters (w, b) that runs begin with, as one float64 vector."""
    return vector(linear.task().init(jax.random.key(0), None))


def vector(params: dict[str, Any]) -> np.ndarray:
    return np.append(np.asarray(params["w"], np.float64), np.float64(params["b"]))


def design(client: int) -> tuple[np.ndarray, np.ndarray]:
    """A client's inputs with a column of ones for b, and its outputs."""
    data = linear.dataset().client(client)
    x = np.column_stack([data["x"].astype(float), np.ones(len(data["y"]))])
    return x, data["y"].astype(float)


def gradient(x: np.ndarray, y: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return 2 * x.T @ (x @ theta - y) / len(y)


def batches(client: int, batch_size: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    x, y = design(client)
    return [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(y), batch_size)]


def client_states(engine: Engine) -> Any:
    """The states of all clients, those never sampled included."""
    everyone = np.arange(len(linear.SIZES))
    return engine.client_states.gather(everyone, everyone, (len(everyone),))
