"""Federated averaging with any server optimizer (McMahan et al. 2017; Reddi et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators import Aggregator, mean
from fedexp.algorithms.base import Algorithm, ClientWork, RoundOutput
from fedexp.algorithms.local import round_metrics, zero_sums
from fedexp.errors import UserError
from fedexp.tasks import Task, mean_loss

PyTree = Any


class ServerState(NamedTuple):
    """Parameters and the server optimizer's state."""

    params: PyTree
    opt_state: PyTree


@gin.configurable
def fedavg(
    task: Task,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    aggregator: Aggregator | None = None,
    client_schedule: Callable[[jax.Array], jax.Array] | None = None,
    proximal: float = 0.0,
    weigh_by: Literal["examples", "tokens"] = "examples",
) -> Algorithm:
    """Algorithm 1 of Adaptive Federated Optimization (Reddi et al. 2021, arXiv:2003.00295).

    Every client trains from the server's parameters x to y_i with the client optimizer; the server takes
    the aggregate of the client updates y_i - x, negated, as its gradient. FedAvg is server SGD(1.0);
    FedAvgM, FedAdagrad, FedAdam and FedYogi are its other server optimizers.

    Args:
      task: the model and its loss.
      client_optimizer: starts afresh on every client in every round.
      server_optimizer: keeps its state between rounds.
      aggregator: `mean()` weighted by examples if None.
      client_schedule: round -> factor on the client's learning rate (an Optax schedule); 1 if None.
      proximal: mu of FedProx's term mu/2 |y - x|^2 (Li et al. 2020, arXiv:1812.06127).
      weigh_by: what `mean` weighs a client by: its examples, or the predictions in its loss, which are
        the tokens of a language model (so do Reddi et al., for theirs).

    Raises:
      UserError: a negative proximal term, or an unknown weigh_by.
    """
    if proximal < 0:
        raise UserError(f"fedavg.proximal must not be negative, got {proximal}")
    if weigh_by not in ("examples", "tokens"):
        raise UserError(f"fedavg.weigh_by must be 'examples' or 'tokens', got {weigh_by!r}")
    aggregator = aggregator or mean()

    def init(params):
        return ServerState(params, server_optimizer.init(params))

    def client_init(shared, client):
        params, _ = shared
        return params, client_optimizer.init(params), zero_sums(task)

    def client_step(shared, carry, batch, key):
        server_params, factor = shared
        params, opt_state, sums = carry
        grads, batch_sums = jax.grad(mean_loss, argnums=1, has_aux=True)(task, params, *batch, key)
        if proximal:
            grads = jax.tree.map(
                lambda g, y, x: g + proximal * (y - x), grads, params, server_params
            )
        updates, opt_state = client_optimizer.update(grads, opt_state, params)
        updates = jax.tree.map(lambda u: factor * u, updates) if client_schedule else updates
        return (
            optax.apply_updates(params, updates),
            opt_state,
            jax.tree.map(jnp.add, sums, batch_sums),
        )

    def client_finish(shared, carry, client):
        server_params, _ = shared
        params, _, sums = carry
        update = jax.tree.map(jnp.subtract, params, server_params)
        weight = client.num_examples if weigh_by == "examples" else sums["loss"].weights
        total = aggregator.client(update, weight, client.key)
        return total, (sums, optax.tree.norm(update))

    work = ClientWork(client_init, client_step, client_finish)

    def round_(state, cohort, for_each_client):
        factor = client_schedule(cohort.round) if client_schedule else None
        total, (sums, norms) = for_each_client(work, (state.params, factor), cohort)
        update = aggregator.server(total, cohort.key)
        grads = jax.tree.map(jnp.negative, update)
        updates, opt_state = server_optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = round_metrics(task, sums, norms, update)
        return RoundOutput(ServerState(params, opt_state), metrics)

    return Algorithm(init, round_)
