"""FedProx: local training that stays near the server's parameters (Li et al. 2020)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import WeighBy, local_training
from fedexp.contracts import Algorithm, Release, RoundOutput
from fedexp.errors import check
from fedexp.tasks import Task


class ServerState(NamedTuple):
    """FedAvg's state, mu, the last cohort's loss, and for how many rounds in a row it has fallen."""

    averaging: Any
    mu: jax.Array
    loss: jax.Array
    fallen: jax.Array

    @property
    def params(self) -> Any:
        return self.averaging.params


@gin.configurable
def fedprox(
    task: Task,
    mu: float = gin.REQUIRED,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    aggregator: Aggregators = None,
    weigh_by: WeighBy = "examples",
    mu_step: float = 0.0,
    mu_patience: int = 5,
) -> Algorithm:
    """Algorithm 2 of Federated Optimization in Heterogeneous Networks (Li et al. 2020, arXiv:1812.06127).

    FedAvg whose clients descend f_i(y) + mu/2 |y - x|^2, x being the server's parameters. With a `mu_step` mu
    adapts itself (Section 5.3) to the cohort's loss in training: it rises by a step after a round of greater
    loss than the one before, and falls by one, not below 0, each time it fell `mu_patience` times in a row.

    Args:
      task: the model and its loss.
      mu: of the proximal term, at first; 0 is FedAvg.
      client_optimizer: and so on: see `fedavg`.
      server_optimizer: SGD(1.0) in the paper.
      aggregator: `mean()` if None.
      weigh_by: what a client counts for; in the paper, 'uniform'.
      mu_step: 0.1 in the paper; 0 keeps mu as it is.
      mu_patience: 5 in the paper.

    Raises:
      UserError: a negative mu or step, or a patience below 1.
    """
    check(mu >= 0, f"fedprox.mu must not be negative, got {mu}")
    check(mu_step >= 0, f"fedprox.mu_step must not be negative, got {mu_step}")
    check(mu_patience >= 1, f"fedprox.mu_patience must be at least 1, got {mu_patience}")

    def direction(shared, params, grads, batch, key):
        return jax.tree.map(
            lambda g, y, x: g + shared.extra * (y - x), grads, params, shared.params
        )

    work = local_training(task, client_optimizer, weigh_by, direction)
    algorithm = averaging(task, work, server_optimizer, aggregator)
    run: Any = algorithm.round

    def init(params, key):
        # The first loss is no fall: there is none before it.
        none, before = jnp.float32(jnp.inf), jnp.int32(-1)
        return ServerState(algorithm.init(params, key), jnp.float32(mu), none, before)

    def round_(state, cohort, for_each_client):
        output: RoundOutput = run(state.averaging, cohort, for_each_client, state.mu)
        if not isinstance(mu_step, float | int) or mu_step:
            for_each_client.releases.append(Release("the loss that mu follows"))
        values, weights = output.metrics["train/loss"]
        loss = jnp.where(weights > 0, values / jnp.maximum(weights, 1e-12), state.loss)
        rose, fell = loss > state.loss, loss < state.loss
        fallen = jnp.where(fell, state.fallen + 1, jnp.where(rose, 0, state.fallen))
        enough = fallen == mu_patience
        changed = state.mu + mu_step * jnp.where(rose, 1.0, jnp.where(enough, -1.0, 0.0))
        fallen = jnp.where(enough, 0, fallen)
        new = ServerState(output.state, jnp.maximum(changed, 0), loss, fallen)
        return output._replace(state=new, metrics={**output.metrics, "train/mu": state.mu})

    return dataclasses.replace(algorithm, init=init, round=round_)
