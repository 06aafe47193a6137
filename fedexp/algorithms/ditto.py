"""Ditto: personal models that stay near the global one (Li et al. 2021)."""

from __future__ import annotations

import dataclasses

import gin
import jax
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import WeighBy, local_training, training_own
from fedexp.contracts import Algorithm, unstepped
from fedexp.errors import check
from fedexp.tasks import Task


@gin.configurable
def ditto(
    task: Task,
    lambda_: float = gin.REQUIRED,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    aggregator: Aggregators = None,
    weigh_by: WeighBy = "examples",
) -> Algorithm:
    """Algorithm 1 of Ditto: Fair and Robust Federated Learning Through Personalization (arXiv:2012.04221).

    Besides FedAvg's w a client trains a model v of its own on the same batches, which descends
    f_i(v) + lambda/2 |v - w|^2, w being the server's. Personalised evaluations measure clients with v.

    Args:
      task: the model and its loss.
      lambda_: of the proximal term; 0 is local training, large values are FedAvg.
      client_optimizer: of w, and of v; see `fedavg`.
      server_optimizer: SGD(1.0) in the paper.
      aggregator: of the changes of w; `mean()` if None.
      weigh_by: what a client counts for.

    Raises:
      UserError: a negative lambda_.
    """
    check(lambda_ >= 0, f"ditto.lambda_ must not be negative, got {lambda_}")

    def direction(shared, v, grads, batch, key):
        return jax.tree.map(lambda g, v, w: g + lambda_ * (v - w), grads, v, shared.params)

    sent = local_training(task, client_optimizer, weigh_by)
    work = training_own(task, sent, client_optimizer, direction=direction)
    algorithm = averaging(task, work, server_optimizer, aggregator, own=lambda params: params)
    personal = unstepped(lambda state, client: client.state.own)
    return dataclasses.replace(algorithm, personalise=personal)
