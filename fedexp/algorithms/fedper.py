"""FedPer: a model of which only a part travels (Arivazhagan et al. 2019)."""

from __future__ import annotations

import gin
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import WeighBy
from fedexp.algorithms.parts import partial, partial_training
from fedexp.contracts import Algorithm
from fedexp.tasks import Task


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
    work = partial_training(task, client_optimizer, weigh_by, local)
    algorithm = averaging(task, work, server_optimizer, aggregator)
    return partial(algorithm, local, frozen)
