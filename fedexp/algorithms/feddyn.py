"""FedDyn: dynamic regularisation of local objectives (Acar et al. 2021)."""

from __future__ import annotations

from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators import Aggregators, as_aggregator
from fedexp.algorithms.aggregation import aggregate, init_client
from fedexp.algorithms.local import PyTree, Shared, local_training, round_metrics, with_own_extra
from fedexp.contracts import Algorithm, RoundOutput
from fedexp.errors import check
from fedexp.tasks import Task, of_trained, split_statistics


class ServerState(NamedTuple):
    """theta, h, and the aggregator's state."""

    params: PyTree
    h: PyTree
    aggregator: PyTree


@gin.configurable
def feddyn(
    task: Task,
    alpha: float = gin.REQUIRED,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    aggregator: Aggregators = None,
) -> Algorithm:
    """Algorithm 1 of Federated Learning Based on Dynamic Regularization (Acar et al. 2021, arXiv:2111.04263).

    A client descends f_i(y) - <g_i, y> + alpha/2 |y - x|^2 and keeps g_i - alpha (y_i - x). The server keeps
    h, which moves by -alpha times the clients' changes over the population, and takes mean(y_i) - h / alpha.

    Args:
      task: the model and its loss.
      alpha: of the regularisation.
      client_optimizer: starts afresh on every client in every round.
      aggregator: of the clients' changes; `mean()` if None. Every client counts alike.

    Raises:
      UserError: an alpha that is not positive.
    """
    check(alpha > 0, f"feddyn.alpha must be positive, got {alpha}")
    aggregator = as_aggregator(aggregator)

    def zeros(params):
        return optax.tree.zeros_like(split_statistics(params)[0])

    def direction(shared, params, grads, batch, key):
        trained, x, own = (
            split_statistics(params)[0],
            split_statistics(shared.params)[0],
            shared.extra,
        )
        grads = split_statistics(grads)[0]
        return jax.tree.map(lambda g, gi, y, x: g - gi + alpha * (y - x), grads, own, trained, x)

    training = local_training(task, client_optimizer, "uniform", direction)
    training = with_own_extra(training, lambda shared, client: client.state.own)

    def finish(shared, carry, client):
        update, kept = training.finish(shared, carry, client)
        change, _ = split_statistics(update.value)
        own = jax.tree.map(lambda gi, d: gi - alpha * d, client.state.own, change)
        return update, kept._replace(own=own)

    work = training._replace(finish=finish)

    def init(params, key):
        return ServerState(params, zeros(params), aggregator.init(params))

    def round_(state, cohort, for_each_client):
        shared = Shared(state.params)
        sent = aggregate(for_each_client, aggregator, state.aggregator, work, shared, cohort)
        share = alpha * sent.size / cohort.population
        change, _ = split_statistics(sent.update)
        h = jax.tree.map(lambda h, d: h - share * d, state.h, change)
        factor = jnp.where(sent.size > 0, 1 / alpha, 0)  # Nobody changes nothing.
        moved = optax.apply_updates(state.params, sent.update)
        params = of_trained(lambda p, h: jax.tree.map(lambda p, h: p - factor * h, p, h))(moved, h)
        state = ServerState(params, h, sent.state)
        return RoundOutput(state, *round_metrics(task, sent), sent.states(sent.each.own))

    return Algorithm(init, round_, init_client(aggregator, own=zeros))
