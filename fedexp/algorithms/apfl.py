"""APFL: personal models as mixtures of a local and the global one (Deng et al. 2020)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import PyTree, WeighBy, local_training
from fedexp.contracts import Aggregator, Algorithm, ClientWork, unstepped
from fedexp.errors import check
from fedexp.tasks import Task, gradient


class Personal(NamedTuple):
    """What a client keeps: its local model v and () alpha, by how much it counts in the mixture."""

    params: PyTree
    alpha: jax.Array


def mixture(personal: Personal, params: PyTree) -> PyTree:
    """alpha v + (1 - alpha) w."""
    return optax.tree.add_scale(params, personal.alpha, optax.tree.sub(personal.params, params))


@gin.configurable
def apfl(
    task: Task,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    alpha: float = 0.5,
    alpha_learning_rate: float = 0.01,
    aggregator: Aggregator | Sequence[Aggregator] | None = None,
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
    check(0 <= alpha <= 1, f"apfl.alpha must be in [0, 1], got {alpha}")
    check(
        alpha_learning_rate >= 0,
        f"apfl.alpha_learning_rate must not be negative, got {alpha_learning_rate}",
    )
    training = local_training(task, client_optimizer, weigh_by)

    def client_init(shared, client):
        personal = client.state.own
        return training.init(shared, client), personal, client_optimizer.init(personal.params)

    def client_step(shared, carry, batch, key):
        trained, (v, alpha), opt_state = carry
        grads, _ = gradient(task, mixture(Personal(v, alpha), trained.params), batch, key)
        slope = optax.tree.vdot(optax.tree.sub(v, trained.params), grads)
        grads = jax.tree.map(lambda g: alpha * g, grads)
        updates, opt_state = client_optimizer.update(grads, opt_state, v)
        alpha = jnp.clip(alpha - alpha_learning_rate * slope, 0, 1)
        personal = Personal(optax.apply_updates(v, updates), alpha)
        return training.step(shared, trained, batch, key), personal, opt_state

    def client_finish(shared, carry, client):
        trained, personal, _ = carry
        update, kept = training.finish(shared, trained, client)
        return update, kept._replace(own=personal)

    def personal_init(state, client):
        return mixture(client.state.own, state.params)

    return dataclasses.replace(
        averaging(
            task,
            ClientWork(client_init, client_step, client_finish),
            server_optimizer,
            aggregator,
            own=lambda params: Personal(params, jnp.float32(alpha)),
        ),
        personalise=unstepped(personal_init),
    )
