"""Agnostic federated averaging: the best model for the worst mixture of domains (Ro et al. 2021)."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedexp.aggregators import Aggregators, as_aggregator
from fedexp.algorithms.aggregation import aggregate, init_client
from fedexp.algorithms.local import (
    PyTree,
    Shared,
    local_training,
    round_metrics,
    server_step,
    with_own_extra,
)
from fedexp.contracts import Algorithm, ClientWork, RoundOutput, full_pass
from fedexp.errors import UserError, check
from fedexp.rates import Rate
from fedexp.tasks import Measure, Task, carrying_statistics
from fedexp.tasks.checks import check_features, check_ids


class ServerState(NamedTuple):
    """Parameters, domain weights (K,), examples by domain in the rounds of the window (W, K), and states."""

    params: PyTree
    domain_weights: jax.Array
    counts: jax.Array
    opt_state: PyTree
    aggregator: PyTree


@gin.configurable
def agnostic(
    task: Task,
    num_domains: int = gin.REQUIRED,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    domain_learning_rate: float = gin.REQUIRED,
    domain: str = "domain",
    update: Literal["exponentiated", "projected", "none"] = "exponentiated",
    window: int = 1,
    aggregator: Aggregators = None,
    full_batch_size: int = 128,
) -> Algorithm:
    """AgnosticFedAvg of Communication-Efficient Agnostic Federated Averaging (arXiv:2104.02748, Algorithm 1).

    Domains weigh lambda_d, each of their examples alpha_d = lambda_d / N_d, with N_d the mean number of the
    domain's examples in the last rounds, in all of which it counts as one at least. The domains in which
    the server's parameters have the greater losses gain weight from round to round, for the minimax
    objective of Mohri et al. 2019 (arXiv:1902.00146).
    Every evaluation tells the weights as `domains/<number>`.

    Args:
      task: the model and its loss.
      num_domains: K; all weigh alike at first.
      client_optimizer: takes the sum of alpha_d times the loss over a batch, divided by that of alpha_d over
        all of the client's examples.
      server_optimizer: see `fedavg`.
      domain_learning_rate: of the domain weights.
      domain: the feature with an example's domain, (n,) integers from 0.
      update: of the domain weights, by exponentiated gradient, by gradient and projection onto the simplex,
        or not at all.
      window: rounds over which a domain's examples are counted.
      aggregator: of client updates; `mean()` if None. A client counts as its examples weigh together.
      full_batch_size: examples a step of the pass for the domains' losses.

    Raises:
      UserError: numbers out of range, an unknown update or, of the engine, data without domains, or with
        others.
    """
    check(num_domains >= 1, f"agnostic.num_domains must be at least 1, got {num_domains}")
    check(window >= 1, f"agnostic.window must be at least 1, got {window}")
    if update not in ("exponentiated", "projected", "none"):
        raise UserError(
            f"agnostic.update must be 'exponentiated', 'projected' or 'none', got {update!r}"
        )
    aggregator = as_aggregator(aggregator)

    def by_domain(batch):
        return jax.nn.one_hot(batch[domain], num_domains)

    def beta(shared, client):
        return jnp.maximum(shared.extra @ client.inputs["examples"], 1e-12)

    def weighted(shared):
        def loss(outputs, batch):
            factor = by_domain(batch) @ shared.extra
            return Measure(*(factor * part for part in task.loss(outputs, batch)))

        return dataclasses.replace(task, loss=loss, sum_loss=True)

    training = local_training(task, client_optimizer, within=weighted)
    training = with_own_extra(training, lambda shared, client: shared.extra / beta(shared, client))

    def finish(shared, carry, client):
        update, kept = training.finish(shared, carry, client)
        return update._replace(weight=beta(shared, client)), kept

    work = training._replace(finish=finish)

    def zeros(state, client):
        return jnp.zeros(num_domains), jnp.zeros(num_domains)

    def add(state, carry, batch, key):
        losses, examples = carry
        outputs = task.apply(state.params, batch.examples, None)
        values, weights = task.loss(outputs, batch.examples)
        here = by_domain(batch.examples) * batch.mask[:, None]
        return losses + values @ here, examples + weights @ here

    measuring = ClientWork(zeros, add, lambda state, carry, client: (carry, carry[1]))

    def init(params, key):
        opt_state = carrying_statistics(server_optimizer).init(params)
        equal, counts = jnp.full(num_domains, 1 / num_domains), jnp.ones((window, num_domains))
        return ServerState(params, equal, counts, opt_state, aggregator.init(params))

    rate = Rate(domain_learning_rate)

    def moved(weights, losses):
        if update == "projected":
            return optax.projections.projection_simplex(weights + rate() * losses)
        if update == "exponentiated":
            return jax.nn.softmax(jnp.log(weights) + rate() * losses)
        return weights

    def round_(state, cohort, for_each_client):
        (losses, examples), of_each = for_each_client(measuring, state, cohort, "full")
        cohort = cohort.with_inputs(examples=of_each)
        alpha = state.domain_weights / jnp.maximum(state.counts.mean(axis=0), 1 / window)
        shared = Shared(state.params, extra=alpha)
        sent = aggregate(for_each_client, aggregator, state.aggregator, work, shared, cohort)
        params, opt_state = server_step(
            server_optimizer, sent.update, state.opt_state, state.params
        )
        weights = moved(state.domain_weights, losses / jnp.maximum(examples, 1e-12))
        counts = jnp.concatenate([state.counts[1:], examples[None]])
        state = ServerState(params, weights, counts, opt_state, sent.state)
        return RoundOutput(state, *round_metrics(task, sent), sent.states())

    def report(state, rounds):
        return {f"domains/{d}": float(w) for d, w in enumerate(np.asarray(state.domain_weights))}

    def check_domains(train):
        check_features("agnostic", train, {domain: 1})
        check_ids(domain, train.features[domain], 0, num_domains, "set agnostic.num_domains to fit")

    passes, first = {"full": full_pass(full_batch_size)}, init_client(aggregator)
    return Algorithm(init, round_, first, passes, report=report, check=check_domains)
