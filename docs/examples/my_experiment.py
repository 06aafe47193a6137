"""A data set, a model and an algorithm of one's own, for my_experiment.gin beside this file."""

from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fedexp.algorithms import Algorithm, ClientWork, RoundOutput
from fedexp.data import FederatedDataset, FederatedSplits
from fedexp.tasks import Task, mean_loss


@gin.configurable
def rings(num_clients: int = 40, seed: int = 0) -> FederatedSplits:
    """Points on three rings; every client sees them from an angle of its own."""

    def part(seed: int) -> FederatedDataset:
        rng = np.random.default_rng(seed)
        clients = {}
        for number in range(num_clients):
            y = rng.integers(0, 3, size=rng.integers(20, 80))
            angle = rng.normal(number, 1.0, size=len(y))
            radius = (y + rng.normal(1, 0.2, size=len(y)))[:, None]
            x = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
            clients[f"client {number}"] = {"x": x.astype(np.float32), "y": y}
        return FederatedDataset.from_clients(clients)

    return FederatedSplits(train=part(2 * seed), test=part(2 * seed + 1))


@gin.configurable
class RingNet(nn.Module):
    """A small multilayer perceptron."""

    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(nn.relu(nn.Dense(self.width)(x)))


class ServerState(NamedTuple):
    """Plain gradient descent keeps nothing but the parameters."""

    params: Any


@gin.configurable
def gradient_descent(task: Task, learning_rate: float = 0.1) -> Algorithm:
    """One server step along the gradient of the cohort's examples; fedexp ships it as `fedsgd`."""

    def client_init(params, client):
        return jax.tree.map(jnp.zeros_like, params), 0

    def step(params, carry, batch, key):
        total, count = carry
        grads, _ = jax.grad(mean_loss, argnums=1, has_aux=True)(task, params, *batch, key)
        examples = batch.mask.sum()
        return jax.tree.map(lambda t, g: t + examples * g, total, grads), count + examples

    def finish(params, carry, client):
        return carry, ()

    work = ClientWork(client_init, step, finish)

    def init(params, key):
        return ServerState(params)

    def round_(state, cohort, for_each_client):
        (total, count), _ = for_each_client(work, state.params, cohort)
        step_size = learning_rate / jnp.maximum(count, 1)  # A Poisson cohort may be empty.
        params = jax.tree.map(lambda p, t: p - step_size * t, state.params, total)
        return RoundOutput(ServerState(params), {"train/examples": count})

    return Algorithm(init, round_)
