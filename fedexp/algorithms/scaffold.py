"""SCAFFOLD: control variates against client drift (Karimireddy et al. 2020)."""

from __future__ import annotations

from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.algorithms.base import Algorithm, ClientWork, RoundOutput
from fedexp.algorithms.local import round_metrics, zero_sums
from fedexp.errors import UserError
from fedexp.tasks import Task, mean_loss

PyTree = Any


class ServerState(NamedTuple):
    """Parameters x, the server's control variate c, and the server optimizer's state."""

    params: PyTree
    control: PyTree
    opt_state: PyTree


@gin.configurable
def scaffold(
    task: Task,
    client_learning_rate: float = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation | None = None,
    option: int = 2,
) -> Algorithm:
    """Algorithm 1 of SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378).

    A client steps along g_i(y) - c_i + c, and keeps its control variate c_i between rounds. The server
    moves by the plain mean of the client updates and keeps c, the mean of all clients' c_i.

    Args:
      task: the model and its loss.
      client_learning_rate: eta_l.
      server_optimizer: takes the negated mean update as its gradient; SGD(1.0), the paper's eta_g = 1, if
        None.
      option: how c_i is renewed. 1: the client's mean gradient at the server's parameters, which costs a
        second pass; 2: c_i - c + (x - y_i) / (K eta_l), from what the local steps computed anyway.

    Raises:
      UserError: an option other than 1 or 2, or a learning rate that is not positive.
    """
    if option not in (1, 2):
        raise UserError(f"scaffold.option must be 1 or 2, got {option}")
    if not client_learning_rate > 0:
        raise UserError(
            f"scaffold.client_learning_rate must be positive, got {client_learning_rate}"
        )
    server_optimizer = server_optimizer or optax.sgd(1.0)
    gradient = jax.grad(mean_loss, argnums=1, has_aux=True)

    def init(params):
        return ServerState(params, optax.tree.zeros_like(params), server_optimizer.init(params))

    def gradient_init(shared, client):
        params, _ = shared
        return optax.tree.zeros_like(params), jnp.zeros(())

    def gradient_step(shared, carry, batch, key):
        params, _ = shared
        total, count = carry
        grads, _ = gradient(task, params, *batch, key)
        examples = batch.mask.sum()
        return jax.tree.map(lambda sum_, g: sum_ + examples * g, total, grads), count + examples

    def gradient_finish(shared, carry, client):
        total, count = carry
        control = jax.tree.map(lambda sum_: sum_ / count, total)
        return jax.tree.map(jnp.subtract, control, client.state), control

    def train_init(shared, client):
        params, control = shared
        correction = jax.tree.map(jnp.subtract, control, client.state)
        return params, correction, zero_sums(task)

    def train_step(shared, carry, batch, key):
        params, correction, sums = carry
        grads, batch_sums = gradient(task, params, *batch, key)
        params = jax.tree.map(
            lambda y, g, d: y - client_learning_rate * (g + d), params, grads, correction
        )
        return params, correction, jax.tree.map(jnp.add, sums, batch_sums)

    def train_finish(shared, carry, client):
        server_params, _ = shared
        params, correction, sums = carry
        update = jax.tree.map(jnp.subtract, params, server_params)
        scale = 1 / (client_learning_rate * client.num_steps)
        # c_i+ - c_i = -c - update / (K eta_l), and correction = c - c_i.
        control = jax.tree.map(lambda u, d: -scale * u - d, update, correction)
        change = jax.tree.map(jnp.subtract, control, client.state)
        return (update, change), (control, sums, optax.tree.norm(update))

    gradient_work = ClientWork(gradient_init, gradient_step, gradient_finish)
    train_work = ClientWork(train_init, train_step, train_finish)

    def round_(state, cohort, for_each_client):
        shared = (state.params, state.control)
        (total, change), (controls, sums, norms) = for_each_client(train_work, shared, cohort)
        if option == 1:
            change, controls = for_each_client(gradient_work, shared, cohort)
        control = jax.tree.map(lambda c, d: c + d / cohort.population, state.control, change)
        update = jax.tree.map(lambda sum_: sum_ / cohort.size, total)
        grads = jax.tree.map(jnp.negative, update)
        updates, opt_state = server_optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return RoundOutput(
            ServerState(params, control, opt_state),
            round_metrics(task, sums, norms, update),
            controls,
        )

    return Algorithm(init, round_, init_client_state=optax.tree.zeros_like)
