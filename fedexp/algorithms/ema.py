"""An exponential moving average of what the server has trained, for evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp

from fedexp.algorithms.wrapping import GivenAlgorithm, made
from fedexp.contracts import Algorithm, Personalisation, with_frozen
from fedexp.errors import check
from fedexp.tasks import Task


class ServerState(NamedTuple):
    """The algorithm's own state, which training goes on from, its average, and what of it is frozen."""

    trained: Any
    average: Any
    frozen: Any = None

    @property
    def params(self) -> Any:
        """The averaged parameters."""
        return self.averaged.params

    @property
    def averaged(self) -> Any:
        """The average as a state of the algorithm."""
        return with_frozen(self.average, self.frozen)


@gin.configurable
def ema(
    task: Task, algorithm: GivenAlgorithm = gin.REQUIRED, decay: float = gin.REQUIRED
) -> Algorithm:
    """Evaluates an average over rounds of what the algorithm trains (Polyak & Juditsky 1992).

    After round t that is sum_i decay^(t-i) x_i over sum_i decay^(t-i), i from 1 to t: an exponential moving
    average without the weight of the start. Training knows nothing of it. All floats of the server's state
    are averaged, because any may be evaluated, as clusters are; that takes the memory of one state more.

    Args:
      task: the model and its loss.
      algorithm: what trains.
      decay: 0 evaluates the latest parameters.

    Raises:
      UserError: a decay outside [0, 1).
    """
    check((decay >= 0) & (decay < 1), f"ema.decay must be in [0, 1), got {decay}")
    inner = made(algorithm, task)
    report = inner.report

    def init(params, key):
        state = inner.init(params, key)
        bare = with_frozen(state)
        return ServerState(bare, bare, getattr(state, "frozen", None))

    def round_(state, cohort, for_each_client):
        output = inner.round(with_frozen(state.trained, state.frozen), cohort, for_each_client)
        trained = with_frozen(output.state)
        weight = (1 - decay) / (1 - decay ** (cohort.round + 1.0))

        def moved(mean, latest):
            if not jnp.issubdtype(latest.dtype, jnp.inexact):
                return latest
            return (mean + weight * (latest - mean)).astype(mean.dtype)

        average = jax.tree.map(moved, state.average, trained)
        return output._replace(state=ServerState(trained, average, state.frozen))

    return dataclasses.replace(
        inner,
        init=init,
        round=round_,
        personalise=inner.personalise and _of_average(inner.personalise),
        report=report and (lambda state, rounds: report(state.trained, rounds)),
        evaluates=f"{inner.evaluates}, averaged (EMA {decay})",
    )


def _of_average(personal: Personalisation) -> Personalisation:
    """Personal parameters that begin with the averaged state."""
    init, step, finish = personal.work
    work = personal.work._replace(
        init=lambda state, client: init(state.averaged, client),
        step=lambda state, *of_step: step(state.averaged, *of_step),
        finish=lambda state, *of_client: finish(state.averaged, *of_client),
    )
    return personal._replace(work=work)
