"""APFL: personal models as mixtures of a local and the global one (Deng et al. 2020)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import PyTree, WeighBy, local_training
from fedexp.contracts import Algorithm, ClientWork, unstepped
from fedexp.errors import check
from fedexp.tasks import (
    Task,
    carrying_statistics,
    gradient,
    join_statistics,
    split_statistics,
)


class Personal(NamedTuple):
    """What a client keeps: its local model v, and () alpha, by how much it counts in the mixture."""

    v: PyTree
    alpha: jax.Array

    def mixed_with(self, w: PyTree) -> PyTree:
        """alpha v + (1 - alpha) w."""
        return jax.tree.map(lambda v, w: self.alpha * v + (1 - self.alpha) * w, self.v, w)


@gin.configurable
def apfl(
    task: Task,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    alpha: float = 0.5,
    alpha_learning_rate: float = 0.01,
    aggregator: Aggregators = None,
    weigh_by: WeighBy = "examples",
) -> Algorithm:
    """Algorithm 1 of Adaptive Personalized Federated Learning (Deng et al. 2020, arXiv:2003.13461).

    Besides FedAvg's w a client trains its own v for the mixture alpha v + (1 - alpha) w, and in every step
    learns alpha, in [0, 1], by gradient descent (the paper's Equation 10). The mixture with the server's w
    is what a client is measured with where an evaluation is personalised.

    Args:
      task: the model and its loss.
      client_optimizer: of w, and of v; see `fedavg`.
      server_optimizer: SGD(1.0) in the paper.
      alpha: where every client starts.
      alpha_learning_rate: 0 keeps alpha.
      aggregator: of the changes of w; `mean()` if None.
      weigh_by: what a client counts for.

    Raises:
      UserError: an alpha outside [0, 1], or a negative alpha_learning_rate.
    """
    check((alpha >= 0) & (alpha <= 1), f"apfl.alpha must be in [0, 1], got {alpha}")
    check(
        alpha_learning_rate >= 0,
        f"apfl.alpha_learning_rate must not be negative, got {alpha_learning_rate}",
    )
    training = local_training(task, client_optimizer, weigh_by)
    optimizer = carrying_statistics(client_optimizer)

    def client_init(shared, client):
        personal = client.state.own
        return training.init(shared, client), personal, optimizer.init(personal.v)

    def client_step(shared, carry, batch, key):
        trained, personal, opt_state = carry
        grads, _ = gradient(task, personal.mixed_with(trained.params), batch, key)
        grads, statistics = split_statistics(grads)
        apart, _ = split_statistics(jax.tree.map(jnp.subtract, personal.v, trained.params))
        slope = optax.tree.vdot(apart, grads)
        grads = join_statistics(jax.tree.map(lambda g: personal.alpha * g, grads), statistics)
        updates, opt_state = optimizer.update(grads, opt_state, personal.v)
        personal = Personal(
            optax.apply_updates(personal.v, updates),
            jnp.clip(personal.alpha - alpha_learning_rate * slope, 0, 1),
        )
        return training.step(shared, trained, batch, key), personal, opt_state

    def client_finish(shared, carry, client):
        trained, personal, _ = carry
        update, kept = training.finish(shared, trained, client)
        return update, kept._replace(own=personal)

    work = ClientWork(client_init, client_step, client_finish)
    first = lambda params: Personal(params, jnp.float32(alpha))  # noqa: E731
    personal = unstepped(lambda state, client: client.state.own.mixed_with(state.params))
    algorithm = averaging(task, work, server_optimizer, aggregator, own=first)
    return dataclasses.replace(algorithm, personalise=personal)
