"""FedAsync: a server that mixes in every client's parameters as they arrive (Xie et al. 2019)."""

from __future__ import annotations

import gin
import jax
import optax

from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import WeighBy, local_training, with_own_extra
from fedexp.algorithms.versions import (
    StalenessWeight,
    fetched,
    keeping_versions,
    polynomial_weight,
    weighed_by_staleness,
)
from fedexp.contracts import Algorithm
from fedexp.errors import check
from fedexp.tasks import Task


@gin.configurable
def fedasync(
    task: Task,
    alpha: float = gin.REQUIRED,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    rho: float = 0.0,
    staleness_weight: StalenessWeight | None = None,
    max_staleness: int = 50,
    weigh_by: WeighBy = "uniform",
) -> Algorithm:
    """Algorithm 1 of Asynchronous Federated Optimization (Xie et al. 2019, arXiv:1903.03934).

    A client descends f_i(y) + rho/2 |y - x_tau|^2 from the parameters x_tau that it has fetched; the server
    then takes (1 - alpha_t) x + alpha_t y, with alpha_t = alpha s(staleness). A round is a server's step, of
    one arrival in the paper (`asynchronous.arrivals` = 1); of several, the mean is mixed in.

    Args:
      task: the model and its loss.
      alpha: how much of a client's parameters is mixed in, in (0, 1].
      client_optimizer: starts afresh on every client in every round.
      rho: of the proximal term; 0 for none.
      staleness_weight: s, of staleness 0 for a client that has fetched the server's newest parameters;
        `polynomial_weight()` if None.
      max_staleness: an update staler than this is discarded, as if it had never come. The server keeps
        max_staleness + 1 versions of its parameters.
      weigh_by: what a client counts for among several arrivals.

    Raises:
      UserError: a number out of range; of the run, a sampler that says nothing of staleness.
    """
    check(0 < alpha <= 1, f"fedasync.alpha must be in (0, 1], got {alpha}")
    check(rho >= 0, f"fedasync.rho must not be negative, got {rho}")
    weight = staleness_weight or polynomial_weight()

    def direction(shared, params, grads, batch, key):
        return jax.tree.map(lambda g, y, x: g + rho * (y - x), grads, params, shared.extra)

    # What it sends is y - x, x being the server's newest parameters: FedAvg's server mixes it in.
    training = local_training(task, client_optimizer, weigh_by, direction, start=fetched)
    work = weighed_by_staleness(
        with_own_extra(training, fetched), lambda staleness: alpha * weight(staleness)
    )
    algorithm = averaging(task, work, optax.sgd(1.0))
    return keeping_versions("fedasync", algorithm, max_staleness)
