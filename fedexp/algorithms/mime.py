"""Mime and MimeLite: clients that mimic the server's optimizer (Karimireddy et al. 2021)."""

from __future__ import annotations

import gin
import optax

from fedexp.aggregators import Aggregators, as_aggregator, mean
from fedexp.algorithms.aggregation import aggregate, init_client
from fedexp.algorithms.fedavg import ServerState
from fedexp.algorithms.local import Shared, full_gradient, local_training, round_metrics
from fedexp.contracts import Algorithm, RoundOutput, full_pass
from fedexp.tasks import Task, carrying_statistics, gradient


@gin.configurable
def mime(
    task: Task,
    optimizer: optax.GradientTransformation = gin.REQUIRED,
    lite: bool = False,
    aggregator: Aggregators = None,
    full_batch_size: int = 128,
) -> Algorithm:
    """Algorithm 1 of Breaking the centralized barrier (Karimireddy et al. 2021, arXiv:2008.03606).

    Clients step with the base optimizer, its statistics s fixed, along g_i(y) - g_i(x) + c, with `lite` along
    g_i(y); the server averages their parameters and updates s with c, the cohort's mean full gradient at x.

    Args:
      task: the model and its loss.
      optimizer: the base optimizer, its learning rate being the clients'.
      lite: MimeLite.
      aggregator: of the client updates; `mean()` if None. Every client counts alike.
      full_batch_size: examples a step of the pass for c.
    """
    aggregator, base = as_aggregator(aggregator), carrying_statistics(optimizer)

    def fixed(grads, state, params=None, **extra):
        return optimizer.update(grads, state, params, **extra)[0], state

    def direction(shared, params, grads, batch, key):
        at_server, _ = gradient(task, shared.params, batch, key)
        return optax.tree.add(optax.tree.sub(grads, at_server), shared.extra)

    mimicking = optimizer._replace(update=fixed)
    work = local_training(task, mimicking, "uniform", None if lite else direction)

    def init(params, key):
        return ServerState(params, base.init(params), aggregator.init(params))

    def round_(state, cohort, for_each_client):
        full = aggregate(for_each_client, mean(), (), full_gradient(task), state, cohort, "full")
        shared = Shared(state.params, extra=full.update, opt_state=state.opt_state)
        sent = aggregate(for_each_client, aggregator, state.aggregator, work, shared, cohort)
        _, opt_state = base.update(full.update, state.opt_state, state.params)
        state = ServerState(optax.apply_updates(state.params, sent.update), opt_state, sent.state)
        return RoundOutput(state, *round_metrics(task, sent), sent.states())

    return Algorithm(init, round_, init_client(aggregator), {"full": full_pass(full_batch_size)})
