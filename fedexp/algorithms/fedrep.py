"""FedRep: a shared representation under heads of the clients' own (Collins et al. 2021)."""

from __future__ import annotations

import dataclasses
from typing import Any

import gin
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import Shared, WeighBy, local_training, with_own_extra
from fedexp.algorithms.parts import merge, partial
from fedexp.contracts import Algorithm, Pass
from fedexp.data import ClientBatching
from fedexp.tasks import Task, reparametrised


@gin.configurable
def fedrep(
    task: Task,
    head: str = gin.REQUIRED,
    head_optimizer: optax.GradientTransformation = gin.REQUIRED,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    head_batching: ClientBatching | None = None,
    aggregator: Aggregators = None,
    weigh_by: WeighBy = "uniform",
) -> Algorithm:
    """Algorithm 1 of Exploiting Shared Representations for Personalized FL (arXiv:2102.07078).

    A client first trains its own head on the server's representation, then the representation under its
    new head, and sends the latter alone. Personalised evaluations measure clients with their heads.

    Args:
      task: the model and its loss.
      head: regular expression on paths as 'Dense_1/kernel', of the parameters that stay with the client.
      head_optimizer: starts afresh on every client in every round.
      client_optimizer: of the representation, likewise.
      server_optimizer: SGD(1.0) in the paper.
      head_batching: of the head's steps, tau in the paper; `ClientBatching()` as Gin binds it if None. Those
        of the representation, one in the paper, are `train.batching`'s.
      aggregator: of the representation's changes; `mean()` if None.
      weigh_by: what a client counts for.

    Raises:
      UserError: from `init`, a pattern that matches no parameter, or all.
    """

    def of_head(shared):
        return reparametrised(task, lambda head: merge(shared.params, head))

    def of_body(shared):
        return reparametrised(task, lambda body: merge(body, shared.extra))

    def own(shared, client):
        return client.state.own

    heads = local_training(task, head_optimizer, start=own, within=of_head)
    heads = heads._replace(finish=lambda shared, carry, client: ((), carry.params))
    body = local_training(task, client_optimizer, weigh_by, within=of_body)
    body = with_own_extra(body, own)

    def finish(shared, carry, client):
        update, kept = body.finish(shared, carry, client)
        return update, kept._replace(own=client.state.own)

    work = body._replace(finish=finish)
    algorithm = averaging(task, work, server_optimizer, aggregator)
    run: Any = algorithm.round

    def round_(state, cohort, for_each_client, frozen):
        _, trained = for_each_client(heads, Shared(state.params), cohort, "head")
        kept = cohort.clients.state._replace(own=trained)
        clients = dataclasses.replace(cohort.clients, state=kept)
        return run(state, dataclasses.replace(cohort, clients=clients), for_each_client)

    passes = {"head": Pass(head_batching or ClientBatching())}
    return partial(dataclasses.replace(algorithm, round=round_, passes=passes), head, None)
