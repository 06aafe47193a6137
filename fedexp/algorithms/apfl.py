"""APFL: personal models as mixtures of a local and the global one (Deng et al. 2020)."""

from __future__ import annotations

import dataclasses

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.local import WeighBy, local_training, training_own
from fedexp.algorithms.optimizers import sgd_at
from fedexp.contracts import Algorithm, unstepped
from fedexp.errors import check
from fedexp.rates import Rate
from fedexp.tasks import Task, of_trained


@gin.configurable
def apfl(
    task: Task,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    alpha: float = 0.5,
    alpha_rate: float = 0.01,
    per_layer: bool = False,
    aggregator: Aggregators = None,
    weigh_by: WeighBy = "examples",
) -> Algorithm:
    """Algorithm 1 of Adaptive Personalized Federated Learning (Deng et al. 2020, arXiv:2003.13461).

    Besides FedAvg's w a client trains its own v for the mixture alpha v + (1 - alpha) w, and alpha by
    gradient descent (Equation 10). Personalised evaluations measure clients with their mixtures.

    Args:
      task: the model and its loss.
      client_optimizer: of w, and of v; see `fedavg`.
      server_optimizer: SGD(1.0) in the paper.
      alpha: in [0, 1], where every client starts.
      alpha_rate: learning rate of alpha; 0 keeps it.
      per_layer: whether every array of parameters has an alpha of its own, as in FedJAX.
      aggregator: of the changes of w; `mean()` if None.
      weigh_by: what a client counts for.

    Raises:
      UserError: an alpha outside [0, 1], or a negative rate.
    """
    check((alpha >= 0) & (alpha <= 1), f"apfl.alpha must be in [0, 1], got {alpha}")
    check(alpha_rate >= 0, f"apfl.alpha_rate must not be negative, got {alpha_rate}")

    @of_trained
    def first(params):
        alphas = jax.tree.map(lambda leaf: jnp.float32(alpha), params)
        return {"v": params, "alpha": alphas if per_layer else jnp.float32(alpha)}

    @of_trained
    def mixture(own, w):
        v, alphas = own["v"], own["alpha"]
        if not per_layer:
            alphas = jax.tree.map(lambda leaf: alphas, v)
        return jax.tree.map(lambda a, v, w: a * v + (1 - a) * w, alphas, v, w)

    def projected(updates, alpha):
        return optax.tree.sub(optax.tree.clip(optax.tree.add(alpha, updates), 0, 1), alpha)

    of_alpha = optax.chain(sgd_at(Rate(alpha_rate)), optax.stateless(projected))
    optimizer = optax.partition({"v": client_optimizer, "a": of_alpha}, {"v": "v", "alpha": "a"})
    work = training_own(task, local_training(task, client_optimizer, weigh_by), optimizer, mixture)
    algorithm = averaging(task, work, server_optimizer, aggregator, own=first)
    personal = unstepped(lambda state, client: mixture(client.state.own, state.params))
    return dataclasses.replace(algorithm, personalise=personal)
