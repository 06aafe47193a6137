"""Federated averaging with any server optimizer (McMahan et al. 2017; Reddi et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import gin
import optax

from fedexp.aggregators import Aggregators, as_aggregator
from fedexp.algorithms.aggregation import aggregate, init_client
from fedexp.algorithms.local import (
    PyTree,
    Shared,
    WeighBy,
    local_training,
    round_metrics,
    server_step,
)
from fedexp.contracts import Algorithm, ClientWork, RoundOutput
from fedexp.tasks import Task, carrying_statistics


class ServerState(NamedTuple):
    """Parameters, and the states of the server optimizer and of the aggregator."""

    params: PyTree
    opt_state: PyTree
    aggregator: PyTree


@gin.configurable
def fedavg(
    task: Task,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    aggregator: Aggregators = None,
    weigh_by: WeighBy = "examples",
) -> Algorithm:
    """Algorithm 1 of Adaptive Federated Optimization (Reddi et al. 2021, arXiv:2003.00295).

    Every client trains from the server's parameters x to y_i with the client optimizer; the server takes
    the aggregate of the client updates y_i - x, negated, as its gradient. FedAvg is server SGD(1.0);
    FedAvgM, FedAdagrad, FedAdam and FedYogi are its other server optimizers.

    Args:
      task: the model and its loss.
      client_optimizer: starts afresh on every client in every round: a schedule in it counts local steps, one
        of rounds is `scheduled`'s.
      server_optimizer: keeps its state between rounds.
      aggregator: `mean()` if None; several are a chain.
      weigh_by: what a client counts for: 'examples', 'tokens' or 'uniform'; see `local_training`.

    Raises:
      UserError: an unknown weigh_by.
    """
    work = local_training(task, client_optimizer, weigh_by)
    return averaging(task, work, server_optimizer, aggregator)


def averaging(
    task: Task,
    work: ClientWork,
    server_optimizer: optax.GradientTransformation,
    aggregator: Aggregators = None,
    own: Callable[[PyTree], PyTree] | None = None,
) -> Algorithm:
    """FedAvg's server around clients that do other work.

    Its `round` takes the `extra` of the clients' `Shared` for a fourth argument, if there is any.

    Args:
      task: and so on: see `fedavg`.
      work: its `finish` returns (Update, Trained), as `local_training`'s does.
      server_optimizer: see `fedavg`.
      aggregator: see `fedavg`.
      own: params -> a client's first state; None if the work keeps none.
    """
    aggregator = as_aggregator(aggregator)

    def init(params, key):
        opt_state = carrying_statistics(server_optimizer).init(params)
        return ServerState(params, opt_state, aggregator.init(params))

    def round_(state, cohort, for_each_client, extra=None):
        shared = Shared(state.params, extra)
        sent = aggregate(for_each_client, aggregator, state.aggregator, work, shared, cohort)
        params, opt_state = server_step(
            server_optimizer, sent.update, state.opt_state, state.params
        )
        state = ServerState(params, opt_state, sent.state)
        return RoundOutput(state, *round_metrics(task, sent), sent.states(sent.each.own))

    return Algorithm(init, round_, init_client(aggregator, own))
