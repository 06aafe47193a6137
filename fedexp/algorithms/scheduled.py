"""Learning rates that change from round to round, for any algorithm with local training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import gin
import jax
import jax.numpy as jnp

from fedexp.algorithms.wrapping import GivenAlgorithm, made
from fedexp.contracts import Algorithm, Cohort, ForEachClient, RoundOutput
from fedexp.errors import check
from fedexp.tasks import Task


@gin.configurable
def scheduled(
    task: Task,
    algorithm: GivenAlgorithm = gin.REQUIRED,
    schedule: Callable[[jax.Array], jax.Array] = gin.REQUIRED,
) -> Algorithm:
    """Multiplies the clients' learning rates by a factor that depends on the round.

    The factor reaches clients as their input 'rate', which `local_training` heeds whatever its optimizer; a
    sampler may give every client one of its own instead. The server's optimizer makes a step a round, so
    that a schedule in it counts rounds already.

    Args:
      task: the model and its loss.
      algorithm: what is scheduled.
      schedule: round, from 0 -> factor; an Optax schedule.

    Raises:
      UserError: an algorithm whose clients have no learning rate.
    """
    inner = made(algorithm, task)
    check(
        inner.heeds_rate,
        "scheduled.algorithm has no local training, whose rates scheduled.schedule would change; bind the "
        "schedule to the learning rate of its server optimizer",
    )

    def round_(state, cohort: Cohort, for_each_client: ForEachClient) -> RoundOutput:
        factor = jnp.asarray(schedule(cohort.round), jnp.float32)
        rates = jnp.broadcast_to(factor, cohort.real.shape)
        return inner.round(state, cohort.with_inputs(rate=rates), for_each_client)

    needs = {name: why for name, why in inner.needs.items() if name != "rate"}
    return dataclasses.replace(inner, round=round_, needs=needs)
