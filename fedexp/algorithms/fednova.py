"""FedNova: normalised averaging of clients that take unequal numbers of steps (Wang et al. 2020)."""

from __future__ import annotations

import dataclasses
from typing import Any

import gin
import jax.numpy as jnp
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import local_training
from fedexp.algorithms.optimizers import sgd_at
from fedexp.contracts import Algorithm, Release
from fedexp.errors import check
from fedexp.rates import Rate
from fedexp.tasks import Task, of_trained


@gin.configurable
def fednova(
    task: Task,
    client_learning_rate: float = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    momentum: float | None = None,
    aggregator: Aggregators = None,
) -> Algorithm:
    """Tackling the Objective Inconsistency Problem (Wang et al. 2020, arXiv:2007.07481).

    A client's update is multiplied by tau_eff / |a_i|_1. |a_i|_1 is what its tau_i steps of SGD with momentum
    weigh together, tau_i without momentum; tau_eff is its mean, weighted by examples (Sections 4.1 and 4.2).

    Args:
      task: the model and its loss.
      client_learning_rate: of local SGD.
      server_optimizer: SGD(1.0) in the paper.
      momentum: of local SGD, rho in the paper.
      aggregator: of what clients send; `mean()` if None.

    Raises:
      UserError: a momentum outside [0, 1).
    """
    rho = 0.0 if momentum is None else momentum
    check((rho >= 0) & (rho < 1), f"fednova.momentum must be in [0, 1), got {momentum}")
    training = local_training(task, sgd_at(Rate(client_learning_rate), momentum))

    def norm(num_steps):
        tau = jnp.maximum(num_steps, 1).astype(jnp.float32)
        return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)

    def finish(shared, carry, client):
        update, kept = training.finish(shared, carry, client)
        factor = shared.extra / norm(client.num_steps)
        scaled = of_trained(lambda value: optax.tree.scale(factor, value))
        return update._replace(value=scaled(update.value)), kept

    work = training._replace(finish=finish)
    algorithm = averaging(task, work, server_optimizer, aggregator)
    run: Any = algorithm.round

    def round_(state, cohort, for_each_client):
        for_each_client.releases.append(Release("how many steps the clients make"))
        weights = jnp.where(cohort.real, cohort.clients.num_examples, 0)
        total = (weights * norm(cohort.clients.num_steps)).sum()
        effective = total / jnp.maximum(weights.sum(), 1)
        return run(state, cohort, for_each_client, effective)

    return dataclasses.replace(algorithm, round=round_)
