"""What may become of a ResNet's batch statistics: averaged, kept local, or left as they are."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from fedexp.algorithms import fedavg, fedper
from fedexp.data import ClientBatching, FederatedDataset
from fedexp.engine import Engine, Packing, jit, mesh
from fedexp.models import ResNet18BatchNorm
from fedexp.tasks import classification

ROUNDS, EVERYONE = 8, np.arange(3)
STRATEGIES = {
    "jit": lambda: jit(Packing(lanes=1, batch_sizes=1)),
    "mesh": lambda: mesh(Packing(lanes=2, batch_sizes=1)),
}


def stripes() -> FederatedDataset:
    """Images of horizontal or vertical stripes, darker or lighter by the client."""
    rng, clients = np.random.default_rng(0), {}
    rows = np.indices((6, 6)) // 2 % 2
    for number, size in enumerate((8, 12, 8)):
        y = rng.integers(0, 2, size).astype(np.int32)
        x = (40 * number + 100 * rows[y] + rng.integers(0, 30, (size, 6, 6)))[..., None]
        clients[str(number)] = {"x": x.astype(np.uint8), "y": y}
    return FederatedDataset.from_clients(clients)


def network(**options):
    return classification(
        ResNet18BatchNorm(2, stages=(1,), strides=(2,), width=4, momentum=0.5, **options), 2
    )


def train(task, algorithm, strategy):
    dataset = stripes()
    params = task.init(jax.random.key(0), dataset.slice(0, 1))
    engine = Engine(
        STRATEGIES[strategy](),
        algorithm,
        dataset,
        ClientBatching(4),
        params=params,
        cohort_size=3,
        seed=0,
    )
    state, losses = engine.start(params), []
    for number in range(ROUNDS):
        output = engine.run(state, engine.prepare(number, EVERYONE))
        state = output.state
        values, weights = output.metrics["train/loss"]
        losses.append(float(values / weights))
    own = engine.client_states and engine.client_states.gather(EVERYONE, EVERYONE, (3,)).own
    return params, jax.device_get(state.params), own, losses


WAYS = {
    "averaged": (lambda task: fedavg(task, optax.sgd(0.3), optax.sgd(1.0)), {}),
    "local": (
        lambda task: fedper(task, optax.sgd(0.3), optax.sgd(1.0), local="BatchNorm"),
        {},
    ),
    "frozen": (
        lambda task: fedper(task, optax.sgd(0.3), optax.sgd(1.0), frozen="BatchNorm"),
        {"use_running_average": True},
    ),
}


@pytest.mark.parametrize(
    ("way", "strategy"),
    [("averaged", "mesh"), ("local", "jit"), ("frozen", "jit")],
)
def test_it_learns_and_its_statistics_go_where_they_should(way, strategy):
    make, options = WAYS[way]
    task = network(**options)
    first, params, own, losses = train(task, make(task), strategy)
    assert losses[-1] < 0.97 * losses[0]
    before, after = first["batch_stats"], params["batch_stats"]
    if way == "averaged":
        assert own is None
        assert np.abs(after["BatchNorm_0"]["mean"] - before["BatchNorm_0"]["mean"]).max() > 0.01
        return
    jax.tree.map(np.testing.assert_array_equal, after, before)
    if way == "local":
        means = np.asarray(own["batch_stats"]["BatchNorm_0"]["mean"])
        assert np.abs(means[0] - means[2]).max() > 0.05
        assert jax.tree.leaves(own["params"]["BasicBlock_0"]["BatchNorm_0"]) != []
        assert jax.tree.leaves(own["params"]["BasicBlock_0"]["Conv_0"]) == []
    else:
        assert own is None
        jax.tree.map(
            np.testing.assert_array_equal,
            params["params"]["BatchNorm_0"],
            first["params"]["BatchNorm_0"],
        )
