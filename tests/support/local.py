"""Local steps of a task without an engine."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedexp.data.dataset import Batch, FederatedDataset
from fedexp.streams import Stream, derive
from fedexp.tasks import Task, carrying_statistics, gradient


def in_lanes_and_alone(
    task: Task, dataset: FederatedDataset, optimizer: optax.GradientTransformation, num_steps: int
) -> tuple[Any, np.ndarray]:
    """Trains each client on all of its examples at once, padded in a lane of its own, and alone.

    Returns the parameters (C, ...) and the losses (C, num_steps), which it checks to be the same.
    """
    task.check(dataset)
    clients = [dataset.client(index) for index in range(dataset.num_clients)]
    params = task.init(jax.random.key(0), clients[0])
    optimizer = carrying_statistics(optimizer)

    def train(batch, key):
        def step(carry, index):
            params, state = carry
            grads, sums = gradient(task, params, batch, derive(key, Stream.STEP, index))
            updates, state = optimizer.update(grads, state, params)
            values, weights = sums["loss"]
            return (optax.apply_updates(params, updates), state), values / weights

        carry = params, optimizer.init(params)
        (final, _), losses = jax.lax.scan(step, carry, jnp.arange(num_steps))
        return final, losses

    def padded(array):
        return np.concatenate([array, np.repeat(array[:1], largest - len(array), axis=0)])

    largest = max(dataset.client_sizes)
    examples = {name: np.stack([padded(c[name]) for c in clients]) for name in dataset.features}
    masks = np.arange(largest) < np.asarray(dataset.client_sizes)[:, None]
    keys = jax.random.split(jax.random.key(1), len(clients))
    lanes = jax.jit(jax.vmap(train))(Batch(examples, masks), keys)
    alone = [
        jax.jit(train)(Batch(client, np.ones(size, bool)), key)
        for client, size, key in zip(clients, dataset.client_sizes, keys, strict=True)
    ]
    alone = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), lanes, alone)
    return jax.device_get(lanes)
