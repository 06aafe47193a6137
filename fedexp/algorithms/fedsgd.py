"""FedSGD: one gradient of each client a round (McMahan et al. 2017)."""

from __future__ import annotations

import dataclasses

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import Trained, WeighBy, full_gradient, weight_of
from fedexp.contracts import Algorithm, Update
from fedexp.tasks import Task


@gin.configurable
def fedsgd(
    task: Task,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    aggregator: Aggregators = None,
    weigh_by: WeighBy = "examples",
) -> Algorithm:
    """FedSGD of Communication-Efficient Learning (McMahan et al. 2017, arXiv:1602.05629, Section 2).

    A client sends the gradient g_k of its mean loss at the server's parameters; the server steps along the
    sum of n_k / n g_k. FedAvg's Algorithm 1 with B = infinity and E = 1.

    The gradient is summed over the batches of one local epoch, so that their size, `train.batching`'s, is a
    matter of memory and speed only.

    Args:
      task: the model and its loss.
      server_optimizer: SGD in the paper.
      aggregator: of the negated gradients; `mean()` if None.
      weigh_by: what a client counts for; see `local_training`.

    Raises:
      UserError: an unknown weigh_by, or a task that minimises sums over batches.
    """
    weight, work = weight_of(weigh_by), full_gradient(task)

    def finish(shared, carry, client):
        _, mean = work.finish(shared, carry, client)
        value, (_, sums) = jax.tree.map(jnp.negative, mean), carry
        return Update(value, weight(client, sums)), Trained(sums, optax.tree.norm(value))

    algorithm = averaging(task, work._replace(finish=finish), server_optimizer, aggregator)
    return dataclasses.replace(algorithm, heeds_rate=False)
