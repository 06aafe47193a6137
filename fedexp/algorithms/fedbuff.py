"""FedBuff: asynchronous clients, and a server that steps when its buffer is full (Nguyen et al. 2022)."""

from __future__ import annotations

import gin
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import WeighBy, local_training
from fedexp.algorithms.versions import (
    StalenessWeight,
    fetched,
    keeping_versions,
    polynomial_weight,
    weighed_by_staleness,
)
from fedexp.contracts import Algorithm
from fedexp.tasks import Task


@gin.configurable
def fedbuff(
    task: Task,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    staleness_weight: StalenessWeight | None = None,
    max_staleness: int = 50,
    aggregator: Aggregators = None,
    weigh_by: WeighBy = "uniform",
) -> Algorithm:
    """Algorithm 1 of Federated Learning with Buffered Asynchronous Aggregation (arXiv:2106.06639).

    Each client trains from the parameters that it has fetched. Once K updates have come in, the server takes
    their mean, each multiplied by s(staleness), negated for its gradient. A round is a server's step, and K
    is `asynchronous.arrivals`.

    Args:
      task: the model and its loss.
      client_optimizer: starts afresh on every client in every round.
      server_optimizer: SGD in the paper, with and without momentum.
      staleness_weight: s; 1 / sqrt(1 + staleness), the paper's, if None.
      max_staleness: an update staler than this is discarded, as if it had never come. The server keeps
        max_staleness + 1 versions of its parameters.
      aggregator: `mean()` if None.
      weigh_by: what a client counts for; in the paper, 'uniform'.

    Raises:
      UserError: a negative max_staleness; of the run, a sampler that says nothing of staleness.
    """
    training = local_training(task, client_optimizer, weigh_by, start=fetched)

    def finish(shared, carry, client):
        return training.finish(shared._replace(params=fetched(shared, client)), carry, client)

    work = weighed_by_staleness(
        training._replace(finish=finish), staleness_weight or polynomial_weight()
    )
    algorithm = averaging(task, work, server_optimizer, aggregator)
    return keeping_versions("fedbuff", algorithm, max_staleness)
