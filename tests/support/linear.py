"""Least squares on a handful of clients: a problem that NumPy can follow step by step."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
import numpy as np

from fedexp.data import FederatedDataset, FederatedSplits
from fedexp.tasks import Measure, Task

SIZES = (3, 9, 5, 14, 7, 2, 11)
DIMENSION = 3


def dataset(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> FederatedDataset:
    rng = np.random.default_rng(seed)
    true = np.array([1.0, -2.0, 0.5])
    clients = {}
    for number, size in enumerate(sizes):
        x = rng.normal(size=(size, DIMENSION)).astype(np.float32)
        y = (x @ true + rng.normal(scale=0.1, size=size)).astype(np.float32)
        clients[f"client{number}"] = {"x": x, "y": y}
    return FederatedDataset.from_clients(clients)


@gin.configurable("linear_splits")
def splits() -> FederatedSplits:
    return FederatedSplits(dataset(), dataset(seed=1))


@gin.configurable("linear_task")
def task(noise: float = 0.0, init_scale: float = 1.0) -> Task:
    """Linear regression; `noise` > 0 perturbs the inputs with the step's key, as dropout would."""

    def apply(params, batch, key):
        x = batch["x"]
        if noise and key is not None:
            x = x + noise * jax.random.normal(key, x.shape)
        return x @ params["w"] + params["b"]

    def init(key, batch):
        del batch
        w = init_scale * jax.random.normal(key, (DIMENSION,))
        return {"w": w, "b": jnp.zeros(())}

    def squared_error(outputs, batch):
        return Measure((outputs - batch["y"]) ** 2, jnp.ones_like(outputs))

    def absolute_error(outputs, batch):
        return Measure(jnp.abs(outputs - batch["y"]), jnp.ones_like(outputs))

    return Task(init=init, apply=apply, loss=squared_error, metrics={"mae": absolute_error})
