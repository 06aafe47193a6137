"""FedProx: local training that stays near the server's parameters (Li et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable

import gin
import jax
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import WeighBy, local_training
from fedexp.contracts import Algorithm
from fedexp.errors import check
from fedexp.tasks import Task


@gin.configurable
def fedprox(
    task: Task,
    mu: float = gin.REQUIRED,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    aggregator: Aggregators = None,
    client_schedule: Callable[[jax.Array], jax.Array] | None = None,
    weigh_by: WeighBy = "examples",
) -> Algorithm:
    """Algorithm 2 of Federated Optimization in Heterogeneous Networks (Li et al. 2020, arXiv:1812.06127).

    FedAvg whose clients descend f_i(y) + mu/2 |y - x|^2, x being the server's parameters.

    Args:
      task: the model and its loss.
      mu: of the proximal term; 0 is FedAvg.
      client_optimizer: and so on: see `fedavg`.
      server_optimizer: SGD(1.0) in the paper.
      aggregator: `mean()` if None.
      client_schedule: round -> factor on the client's learning rate.
      weigh_by: what a client counts for; in the paper, 'uniform'.

    Raises:
      UserError: a negative mu.
    """
    check(mu >= 0, f"fedprox.mu must not be negative, got {mu}")

    def direction(shared, params, grads, batch, key):
        return jax.tree.map(lambda g, y, x: g + mu * (y - x), grads, params, shared.params)

    work = local_training(task, client_optimizer, weigh_by, direction)
    return averaging(task, work, server_optimizer, aggregator, client_schedule)
