"""pFedMe: personal models as Moreau envelopes around the global one (T. Dinh et al. 2020)."""

from __future__ import annotations

import dataclasses

import gin
import jax
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.fine_tuning import personal_training
from fedexp.algorithms.local import WeighBy, local_training
from fedexp.contracts import Algorithm, ClientWork
from fedexp.data import ClientBatching
from fedexp.errors import check
from fedexp.rates import Rate
from fedexp.tasks import Task, of_trained


@gin.configurable
def pfedme(
    task: Task,
    lambda_: float = gin.REQUIRED,
    personal_optimizer: optax.GradientTransformation = gin.REQUIRED,
    client_learning_rate: float = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    num_steps: int = 5,
    aggregator: Aggregators = None,
    weigh_by: WeighBy = "uniform",
    personal_batching: ClientBatching | None = None,
) -> Algorithm:
    """Algorithm 1 of Personalized Federated Learning with Moreau Envelopes (arXiv:2006.08848).

    For every batch a client takes K steps of its personal model theta on f_i(theta) + lambda/2 |theta - w|^2,
    and one of its w, by -eta lambda (w - theta), which is the gradient of the envelope. It sends w. theta
    starts at the server's parameters and goes on from batch to batch, as in the authors' code.

    Nothing is kept: theta is a function of the server's parameters and the client's examples. Personalised
    evaluations measure clients with what theta is after the local round that they would do next.

    Args:
      task: the model and its loss.
      lambda_: how near theta stays to w; 15 in most of the paper.
      personal_optimizer: of theta; starts afresh on every client in every round.
      client_learning_rate: eta, of w.
      server_optimizer: SGD(beta) in the paper.
      num_steps: K.
      aggregator: of the changes of w; `mean()` if None.
      weigh_by: what a client counts for.
      personal_batching: of that local round in evaluations; `ClientBatching()` as Gin binds it if None. theta
        fits the last batch above all, which therefore should not be a small remainder.

    Raises:
      UserError: a number that is not positive.
    """
    check(lambda_ > 0, f"pfedme.lambda_ must be positive, got {lambda_}")
    check(
        client_learning_rate > 0,
        f"pfedme.client_learning_rate must be positive, got {client_learning_rate}",
    )
    check(num_steps >= 1, f"pfedme.num_steps must be at least 1, got {num_steps}")

    def direction(shared, theta, grads, batch, key):
        return jax.tree.map(lambda g, t, w: g + lambda_ * (t - w), grads, theta, shared.params)

    personal = local_training(task, personal_optimizer, weigh_by, direction)
    rate = Rate(client_learning_rate)
    towards = of_trained(lambda theta, w: optax.incremental_update(theta, w, rate() * lambda_))

    def init(shared, client):
        return shared.params, personal.init(shared, client)

    def step(shared, carry, batch, key):
        w, theta = carry
        around = shared._replace(params=w)

        def closer(k, theta):
            return personal.step(around, theta, batch, jax.random.fold_in(key, k))

        theta = jax.lax.fori_loop(0, num_steps, closer, theta)
        return towards(theta.params, w), theta

    def finish(shared, carry, client):
        w, theta = carry
        return personal.finish(shared, theta._replace(params=w), client)

    work = ClientWork(init, step, finish)
    algorithm = averaging(task, work, server_optimizer, aggregator)
    own = personal_training(work, lambda carry: carry[1].params, personal_batching)
    return dataclasses.replace(algorithm, personalise=own)
