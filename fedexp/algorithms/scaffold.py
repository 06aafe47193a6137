"""SCAFFOLD: control variates against client drift (Karimireddy et al. 2020)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators import Aggregators, as_aggregator
from fedexp.algorithms.aggregation import aggregate, init_client
from fedexp.algorithms.local import (
    PyTree,
    Shared,
    full_gradient,
    local_training,
    rate_of,
    round_metrics,
    server_step,
    with_own_extra,
)
from fedexp.algorithms.optimizers import sgd_at
from fedexp.contracts import Algorithm, Cohort, RoundOutput, full_pass
from fedexp.errors import UserError, check
from fedexp.rates import Rate
from fedexp.tasks import Task, carrying_statistics, join_statistics, split_statistics


class Control(NamedTuple):
    """A client's control variate, and what option 1 renews it with in this round."""

    old: PyTree
    renewed: PyTree = None


class ServerState(NamedTuple):
    """x and c, and the states of the server optimizer and of the aggregator."""

    params: PyTree
    control: PyTree
    opt_state: PyTree
    aggregator: PyTree


class Sent(NamedTuple):
    """What a client sends: by how much its parameters and its control variate have changed."""

    params: PyTree
    control: PyTree


@gin.configurable
def scaffold(
    task: Task,
    client_learning_rate: float = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation | None = None,
    aggregator: Aggregators = None,
    option: int = 2,
    full_batch_size: int = 128,
) -> Algorithm:
    """Algorithm 1 of SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378).

    A client steps along g_i(y) - c_i + c, and keeps its control variate c_i between rounds. The server
    moves by the plain mean of the client updates and keeps c, the mean of all clients' c_i.

    Args:
      task: the model and its loss.
      client_learning_rate: eta_l.
      server_optimizer: takes the negated mean update as its gradient; SGD(1.0), the paper's eta_g = 1, if
        None.
      aggregator: of both that a client sends, parameters and control variate together; `mean()` if None.
      option: how c_i is renewed. 1: the client's full gradient at the server's parameters, which costs a
        pass of its own; 2: c_i - c + (x - y_i) / (K eta_l), from what the local steps computed anyway.
      full_batch_size: examples a step of option 1's pass.

    Raises:
      UserError: an option other than 1 or 2, or a learning rate that is not positive.
    """
    if option not in (1, 2):
        raise UserError(f"scaffold.option must be 1 or 2, got {option}")
    check(
        client_learning_rate > 0,
        f"scaffold.client_learning_rate must be positive, got {client_learning_rate}",
    )
    server_optimizer = server_optimizer or optax.sgd(1.0)
    aggregator = as_aggregator(aggregator)

    def direction(shared, params, grads, batch, key):
        return jax.tree.map(jnp.add, split_statistics(grads)[0], shared.extra)

    rate = Rate(client_learning_rate)
    training = local_training(task, sgd_at(rate), "uniform", direction)

    def correction(shared, client):
        return jax.tree.map(jnp.subtract, shared.extra, client.state.own.old)

    training = with_own_extra(training, correction)

    def finish(shared, carry, client):
        update, trained = training.finish(shared, carry, client)
        params, statistics = split_statistics(update.value)
        control, renewed = client.state.own
        if option == 2:
            scale = 1 / (rate() * rate_of(client) * client.num_steps)
            # c_i+ = c_i - c - (y_i - x) / (K eta_l)
            renewed = jax.tree.map(lambda u, d: -scale * u - d, params, correction(shared, client))
        sent = Sent(params, jax.tree.map(jnp.subtract, renewed, control))
        value = join_statistics(sent, statistics)
        return update._replace(value=value), trained._replace(own=Control(renewed))

    work = training._replace(finish=finish)

    def first_control(params):
        return optax.tree.zeros_like(split_statistics(params)[0])

    def first_sent(params):
        trained, statistics = split_statistics(params)
        return join_statistics(Sent(trained, trained), statistics)

    def init(params, key):
        opt_state = carrying_statistics(server_optimizer).init(params)
        aggregator_state = aggregator.init(first_sent(params))
        return ServerState(params, first_control(params), opt_state, aggregator_state)

    def round_(state, cohort, for_each_client):
        if option == 1:
            full = full_gradient(task)
            # The gradient stays with its client.
            alone = full._replace(finish=lambda *given: ((), full.finish(*given)[1]))
            _, gradients = for_each_client(alone, state, cohort, "full")
            cohort = _renewing(cohort, split_statistics(gradients)[0])
        shared = Shared(state.params, extra=state.control)
        sent = aggregate(for_each_client, aggregator, state.aggregator, work, shared, cohort)
        received, statistics = split_statistics(sent.update)
        share = sent.size / cohort.population
        control = jax.tree.map(lambda c, d: c + share * d, state.control, received.control)
        update = join_statistics(received.params, statistics)
        params, opt_state = server_step(server_optimizer, update, state.opt_state, state.params)
        metrics = round_metrics(task, sent._replace(update=update))
        state = ServerState(params, control, opt_state, sent.state)
        return RoundOutput(state, *metrics, sent.states(sent.each.own))

    return Algorithm(
        init,
        round_,
        init_client(
            aggregator,
            own=lambda params: Control(first_control(params)),
            sent=first_sent,
        ),
        passes={"full": full_pass(full_batch_size)} if option == 1 else {},
    )


def _renewing(cohort: Cohort, gradients: PyTree) -> Cohort:
    """The cohort, its clients' control variates side by side with those that replace them."""
    state = cohort.clients.state
    state = state._replace(own=state.own._replace(renewed=gradients))
    return dataclasses.replace(cohort, clients=dataclasses.replace(cohort.clients, state=state))
