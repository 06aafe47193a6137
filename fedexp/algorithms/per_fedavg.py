"""Per-FedAvg: a model from which one local step leads far (Fallah et al. 2020)."""

from __future__ import annotations

import dataclasses

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators import Aggregators
from fedexp.algorithms.fedavg import averaging
from fedexp.algorithms.fine_tuning import fine_tuning
from fedexp.algorithms.local import WeighBy, local_training
from fedexp.algorithms.optimizers import sgd_at
from fedexp.contracts import Algorithm
from fedexp.data import Batch, ClientBatching
from fedexp.errors import check
from fedexp.rates import Rate
from fedexp.tasks import Task, gradient, of_trained, reparametrised


@gin.configurable
def per_fedavg(
    task: Task,
    adaptation_rate: float = gin.REQUIRED,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    first_order: bool = False,
    delta: float = 1e-3,
    aggregator: Aggregators = None,
    weigh_by: WeighBy = "uniform",
    adaptation: ClientBatching | None = None,
) -> Algorithm:
    """Algorithm 1 of Personalized Federated Learning: A Meta-Learning Approach (arXiv:2002.07948).

    Clients descend F_i(w) = f_i(w - alpha grad f_i(w)) along (I - alpha H) g: g is the gradient for D' at
    w - alpha grad f_i(w; D), and H the Hessian for D'' at w. HF takes for H g (grad f_i(w + delta g; D'') -
    grad f_i(w - delta g; D'')) / (2 delta), FO 0 (Section 4.1). D, D' and D'' are every third example of a
    batch, without D'' every second one: a batch has three times the paper's size, or twice.

    Personalised evaluations measure clients after a step of SGD(alpha). Training metrics are of D' after it.

    Args:
      task: the model and its loss.
      adaptation_rate: alpha.
      client_optimizer: SGD(beta) in the paper.
      server_optimizer: SGD(1.0) in the paper.
      first_order: FO instead of HF.
      delta: of HF.
      aggregator: of client updates; `mean()` if None.
      weigh_by: what a client counts for.
      adaptation: in evaluations; one batch of 20 examples, a small client's own repeated, if None.

    Raises:
      UserError: a number that is not positive.
    """
    check(
        adaptation_rate > 0, f"per_fedavg.adaptation_rate must be positive, got {adaptation_rate}"
    )
    check(delta > 0, f"per_fedavg.delta must be positive, got {delta}")
    parts, rate = 2 if first_order else 3, Rate(adaptation_rate)

    def along(step_size):
        return of_trained(lambda w, v: jax.tree.map(lambda w, v: w + step_size * v, w, v))

    def adapted(shared):
        grads, _, _ = shared.extra
        return reparametrised(task, lambda w: along(-rate())(w, grads))

    def direction(shared, w, grads, batch, key):
        _, curving, key = shared.extra
        ahead, behind = (
            gradient(task, along(shift)(w, grads), curving, key)[0] for shift in (delta, -delta)
        )
        factor = rate() / (2 * delta)
        return jax.tree.map(lambda g, a, b: g - factor * (a - b), grads, ahead, behind)

    training = local_training(
        task, client_optimizer, weigh_by, None if first_order else direction, within=adapted
    )

    def step(shared, carry, batch, key):
        adapting, descending, *curving = (_part(batch, number, parts) for number in range(parts))
        keys = jax.random.split(key, 3)
        grads, _ = gradient(task, carry.params, adapting, keys[0])
        extra = (grads, *(curving or [None]), keys[2])
        return training.step(shared._replace(extra=extra), carry, descending, keys[1])

    work = training._replace(step=step)
    algorithm = averaging(task, work, server_optimizer, aggregator)
    one_step = adaptation or ClientBatching(20, local_steps=1)
    own = fine_tuning(task, sgd_at(rate), one_step)
    return dataclasses.replace(algorithm, personalise=own)


def _part(batch: Batch, number: int, parts: int) -> Batch:
    """Every example that is the number-th of so many, counted from 0; padding if there is no row for it."""
    if number < len(batch.mask):
        return jax.tree.map(lambda leaf: leaf[number::parts], batch)
    return Batch({name: leaf[:1] for name, leaf in batch.examples.items()}, jnp.zeros(1, bool))
