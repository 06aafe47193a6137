"""Mime and MimeLite: clients that mimic the server's optimizer (Karimireddy et al. 2021)."""

from __future__ import annotations

import gin
import jax
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

    Clients step with the base optimizer, its statistics s fixed, along g_i(y) - g_i(x) + c; the server
    averages their parameters and updates s with c, the mean of the cohort's full gradients at x.

    Args:
      task: the model and its loss.
      optimizer: the base optimizer, its learning rate being the clients'.
      lite: MimeLite, whose clients step along g_i(y).
      aggregator: of the client updates; `mean()` if None. Every client counts alike.
      full_batch_size: examples a step of the pass for c.
    """
    aggregator = as_aggregator(aggregator)
    base = carrying_statistics(optimizer)

    def direction(shared, params, grads, batch, key):
        if lite:
            return grads
        _, control = shared.extra
        at_server, _ = gradient(task, shared.params, batch, key)
        return jax.tree.map(lambda g, at_x, c: g - at_x + c, grads, at_server, control)

    def fixed(updates, state, params=None):
        return optimizer.update(updates, state, params)[0], state

    mimicking = optax.GradientTransformation(optimizer.init, fixed)
    training = local_training(task, mimicking, "uniform", direction)

    def client_init(shared, client):
        statistics, _ = shared.extra
        return training.init(shared, client)._replace(opt_state=statistics)

    work = training._replace(init=client_init)

    def init(params, key):
        return ServerState(params, base.init(params), aggregator.init(params))

    def round_(state, cohort, for_each_client):
        full = full_gradient(task)
        control = aggregate(for_each_client, mean(), (), full, state, cohort, "full").update
        shared = Shared(state.params, extra=(state.opt_state, control))
        sent = aggregate(for_each_client, aggregator, state.aggregator, work, shared, cohort)
        _, opt_state = base.update(control, state.opt_state, state.params)
        params = optax.apply_updates(state.params, sent.update)
        state = ServerState(params, opt_state, sent.state)
        return RoundOutput(state, *round_metrics(task, sent), sent.states())

    passes = {"full": full_pass(full_batch_size)}
    return Algorithm(init, round_, init_client(aggregator), passes)
