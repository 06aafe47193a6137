"""BatchNorm's statistics go past every aggregator, against NumPy."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.aggregators import (
    clip_by_norm,
    coordinate_median,
    gaussian_noise,
    mean,
    quantize,
    top_k,
)
from fedexp.algorithms import fedavg, fedper, scaffold
from fedexp.data import ClientBatching
from fedexp.engine import Engine, Packing, jit
from fedexp.errors import UserError
from fedexp.tasks import classification
from tests.support.normalised import Normalised, clients_of_other_scales

DATASET = clients_of_other_scales()
TASK = classification(Normalised(), num_classes=3)
PARAMS = TASK.init(jax.random.key(0), DATASET.slice(0, 1))
AGGREGATORS = {
    "mean": mean(),
    "compressed": [clip_by_norm(1e-3), top_k(0.1), quantize(4), mean()],
    "median": coordinate_median(),
}


def one_round(algorithm, lanes: int):
    """The state after one step of four clients."""
    engine = Engine(
        jit(Packing(lanes=lanes)),
        algorithm,
        DATASET,
        ClientBatching(16),
        params=PARAMS,
        cohort_size=4,
        seed=0,
    )
    return engine.run(engine.start(PARAMS), engine.prepare(0, np.arange(4))).state


def expected() -> tuple[np.ndarray, np.ndarray]:
    """The clients' mean of running mean and variance, momentum 0.5, after their one batch each."""
    layer, found = PARAMS["params"]["Dense_0"], []
    for client in range(4):
        hidden = DATASET.client(client)["x"].astype(float) @ layer["kernel"] + layer["bias"]
        found.append((hidden.mean(0) / 2, (1 + hidden.var(0)) / 2))
    return tuple(np.mean(found, axis=0))


@pytest.mark.parametrize(
    ("algorithm", "name"), [*((fedavg, name) for name in AGGREGATORS), (scaffold, "compressed")]
)
def test_statistics_are_the_clients_mean(algorithm, name):
    if algorithm is scaffold:
        bound = scaffold(TASK, 0.1, aggregator=AGGREGATORS[name])
    else:
        bound = fedavg(TASK, optax.sgd(0.1), optax.adam(0.1), aggregator=AGGREGATORS[name])
    statistics = one_round(bound, lanes=3).params["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose((statistics["mean"], statistics["var"]), expected(), rtol=1e-4)


def test_noise_refuses_statistics_that_it_would_not_hide():
    private = [clip_by_norm(1.0), gaussian_noise(1.0, 1.0), mean()]
    with pytest.raises(UserError, match=r"batch_stats would be sent without noise.*GroupNorm"):
        one_round(fedavg(TASK, optax.sgd(0.1), optax.sgd(1.0), private), 1)
    local = fedper(TASK, optax.sgd(0.1), optax.sgd(1.0), "BatchNorm", aggregator=private)
    state = one_round(local, 1)
    kept = state.params["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, kept, PARAMS["batch_stats"])
