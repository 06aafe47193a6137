"""FedPer: a model of which only a part travels (Arivazhagan et al. 2019)."""

from __future__ import annotations

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
from fedexp.algorithms.parts import merge, split, without
from fedexp.contracts import Algorithm, RoundOutput, unstepped
from fedexp.tasks import Task, carrying_statistics


class ServerState(NamedTuple):
    """What travels, the first values of what stays with the clients, what is frozen, and other states."""

    travelling: PyTree
    local: PyTree
    frozen: PyTree
    opt_state: PyTree
    aggregator: PyTree

    @property
    def params(self) -> PyTree:
        """The whole model, of which evaluations that are not personalised make use."""
        return merge(self.travelling, self.local, self.frozen)


@gin.configurable
def fedper(
    task: Task,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    local: str | None = None,
    frozen: str | None = None,
    aggregator: Aggregators = None,
    weigh_by: WeighBy = "examples",
) -> Algorithm:
    """Algorithms 1 and 2 of Federated Learning with Personalization Layers (arXiv:1912.00818).

    FedAvg of the parameters that travel, while each client keeps and trains its own of the `local` ones:
    the last layers in FedPer, the first ones in LG-FedAvg (arXiv:2001.01523), normalisation's in FedBN
    (arXiv:2102.07623). `frozen` ones stay as they are; they are neither sent nor copied from round to round.

    Args:
      task: the model and its loss.
      client_optimizer: of local and travelling parameters together; see `fedavg`.
      server_optimizer: of the travelling ones.
      local: regular expression on paths as 'Dense_1/kernel'; None for no parameters.
      frozen: likewise.
      aggregator: of what travels; `mean()` if None.
      weigh_by: what a client counts for.

    Raises:
      UserError: from `init`, a pattern that matches no parameter, or nothing left to travel.
    """
    aggregator = as_aggregator(aggregator)

    def start(shared, client):
        return merge(shared.params, client.state.own) if local else shared.params

    training = local_training(
        task,
        client_optimizer,
        weigh_by,
        start=start,
        within=lambda shared: without(task, shared.extra),
    )

    def finish(shared, carry, client):
        travelling, own, _ = split(carry.params, local)
        update, kept = training.finish(shared, carry._replace(params=travelling), client)
        return update, kept._replace(own=own if local else None)

    work = training._replace(finish=finish)

    def init(params, key):
        travelling, own, rest = split(params, local, frozen)
        opt_state = carrying_statistics(server_optimizer).init(travelling)
        return ServerState(travelling, own, rest, opt_state, aggregator.init(travelling))

    def round_(state, cohort, for_each_client):
        shared = Shared(state.travelling, extra=state.frozen)
        sent = aggregate(for_each_client, aggregator, state.aggregator, work, shared, cohort)
        travelling, opt_state = server_step(
            server_optimizer, sent.update, state.opt_state, state.travelling
        )
        state = ServerState(travelling, state.local, state.frozen, opt_state, sent.state)
        return RoundOutput(state, *round_metrics(task, sent), sent.states(sent.each.own))

    def personal(state, client):
        return merge(state.travelling, client.state.own, state.frozen)

    return Algorithm(
        init,
        round_,
        init_client(
            aggregator,
            own=(lambda params: split(params, local, frozen).local) if local else None,
            sent=lambda params: split(params, local, frozen).travelling,
        ),
        personalise=unstepped(personal) if local else None,
    )
