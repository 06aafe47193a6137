"""q-FedAvg: fair resource allocation among clients (Li et al. 2020)."""

from __future__ import annotations

import dataclasses

import gin
import jax.numpy as jnp
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import full_loss, local_training, rate_of
from fedexp.algorithms.optimizers import sgd_at
from fedexp.contracts import Algorithm, full_pass
from fedexp.errors import check
from fedexp.rates import Rate
from fedexp.tasks import Task, of_trained


@gin.configurable
def q_fedavg(
    task: Task,
    q: float = gin.REQUIRED,
    client_learning_rate: float = gin.REQUIRED,
    aggregator: Aggregators = None,
    full_batch_size: int = 128,
) -> Algorithm:
    """Algorithm 2 of Fair Resource Allocation in Federated Learning (Li et al. 2020, arXiv:1905.10497).

    Clients of greater loss F_i at the server's parameters weigh more: x moves by sum_i F_i^q L (y_i - x) over
    sum_i h_i, h_i = q F_i^(q-1) L^2 |y_i - x|^2 + L F_i^q, with L = 1 / client_learning_rate.

    Args:
      task: the model and its loss.
      q: 0 is FedAvg in which every client counts alike.
      client_learning_rate: of local SGD.
      aggregator: of what clients send, a weighted mean being the paper's; `mean()` if None.
      full_batch_size: examples a step of the pass for F_i.

    Raises:
      UserError: a negative q.
    """
    check(q >= 0, f"q_fedavg.q must not be negative, got {q}")
    rate = Rate(client_learning_rate)
    training = local_training(task, sgd_at(rate))

    def finish(shared, carry, client):
        update, kept = training.finish(shared, carry, client)
        loss = jnp.maximum(client.inputs["loss"], 1e-10)
        power, scale = loss**q, 1 / (rate() * rate_of(client))
        weight = q * power / loss * (scale * kept.norm) ** 2 + scale * power
        scaled = of_trained(lambda value: optax.tree.scale(power * scale / weight, value))
        return update._replace(value=scaled(update.value), weight=weight), kept

    algorithm = averaging(task, training._replace(finish=finish), optax.sgd(1.0), aggregator)

    def round_(state, cohort, for_each_client):
        _, losses = for_each_client(full_loss(task), state, cohort, "full")
        return algorithm.round(state, cohort.with_inputs(loss=losses), for_each_client)

    passes = {"full": full_pass(full_batch_size)}
    return dataclasses.replace(algorithm, round=round_, passes=passes)
