"""Survival: Cox's proportional hazards."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp

from fedexp.data.dataset import FederatedDataset
from fedexp.tasks.base import Features, Measure, Task
from fedexp.tasks.checks import check_features, check_ids
from fedexp.tasks.flax_task import flax_task
from fedexp.tasks.nnx_functions import Model


@gin.configurable
def cox(model: Model) -> Task:
    """The task of ranking subjects by their risk: Cox's proportional hazards model (Cox 1972).

    Features: x (B, ...); event (B,), 1 where the event was observed and 0 where the subject was censored;
    time (B,), of the one or the other, in any unit.

    The loss is the negative partial log-likelihood of a batch, whose risk sets are of the batch as well, over
    its examples: the mean of event_i (log sum_{j: t_j >= t_i} exp(score_j) - score_i), ties as Breslow has
    them. So does FLamby (arXiv:2210.04620) train, but that it leaves those out of a risk set who are tied and
    sorted later.

    Metric: c_index, Harrell's concordance index, the share of comparable pairs in which who had the event
    earlier has the higher score; equal scores count one half, and a subject that was censored at the time of
    an event outlived it. Pairs are of one batch: measure all examples in one, by `evaluate.batch_size`.

    Args:
      model: maps (x) to scores (B, 1), the log hazard; see `flax_task`.

    Raises:
      UserError: the task's `init` raises for a model whose scores do not fit; its `check` for a data set
        without these features, or with events other than 0 and 1.
    """

    def check(dataset: FederatedDataset) -> None:
        check_features("cox", dataset, {"x": None, "event": 1, "time": None})
        check_ids("event", dataset.features["event"], 0, 2, "1 is observed, 0 censored")

    return flax_task(
        "cox",
        model,
        inputs=lambda batch, key: (jnp.asarray(batch["x"]),),
        output_shape=lambda x: (x.shape[0], 1),
        remedy="give it one output, as LinearModel has",
        loss=_partial_likelihood,
        metrics={"c_index": _concordance},
        check=check,
    )


def _partial_likelihood(
    scores: jax.Array, batch: Features, mask: jax.Array | None = None
) -> Measure:
    score, event, time = scores[:, 0], batch["event"], batch["time"]
    at_risk = time[None, :] >= time[:, None]
    if mask is not None:  # With itself in its risk set, a row of padding is finite.
        at_risk &= mask[None, :] | jnp.eye(len(score), dtype=bool)
    hazard = jax.nn.logsumexp(jnp.where(at_risk, score[None, :], -jnp.inf), axis=1)
    return Measure(event * (hazard - score), jnp.ones_like(score))


def _concordance(scores: jax.Array, batch: Features, mask: jax.Array | None = None) -> Measure:
    score, event, time = scores[:, 0], batch["event"] > 0, batch["time"]
    earlier, tied = time[:, None] < time[None, :], time[:, None] == time[None, :]
    comparable = event[:, None] & (earlier | (tied & ~event[None, :]))
    if mask is not None:
        comparable &= mask[None, :]
    concordant = 0.5 * (1 + jnp.sign(score[:, None] - score[None, :]))
    return Measure(
        jnp.where(comparable, concordant, 0).sum(1), comparable.sum(1).astype(score.dtype)
    )
