"""Pieces that algorithms with local training share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedexp.algorithms.aggregation import Aggregation
from fedexp.contracts import Clients, ClientWork, Metrics, Update
from fedexp.data import Batch
from fedexp.errors import UserError, check
from fedexp.promises import check_like
from fedexp.tasks import (
    Measure,
    Task,
    as_optimizer,
    carrying_statistics,
    gradient,
    join_statistics,
    mean_loss,
    reparametrised,
    split_statistics,
)

PyTree = Any
WeighBy = Literal["examples", "tokens", "uniform"]
# (shared, params, grads, batch, key) -> grads.
Direction = Callable[[Any, PyTree, PyTree, Batch, jax.Array], PyTree]


class Shared(NamedTuple):
    """What clients are given to train from.

    Attributes:
      params: the server's.
      extra: what else an algorithm's steps look at.
      opt_state: what the clients' optimizer starts from; if None, from what its own `init` returns.
    """

    params: PyTree
    extra: PyTree = None
    opt_state: PyTree = None


class Training(NamedTuple):
    """A client's carry: its parameters, its optimizer's state, its sums of loss and metrics, its rate."""

    params: PyTree
    opt_state: PyTree
    sums: dict[str, Measure]
    rate: jax.Array | None = None


class Trained(NamedTuple):
    """What is kept of a trained client.

    Attributes:
      sums: of its loss and metrics.
      norm: () the L2 norm of its update.
      own: the next state that the algorithm itself keeps of it, if any.
    """

    sums: dict[str, Measure]
    norm: jax.Array
    own: PyTree = None


def local_training(
    task: Task,
    optimizer: optax.GradientTransformation,
    weigh_by: WeighBy = "examples",
    direction: Direction | None = None,
    start: Callable[[Shared, Clients], PyTree] | None = None,
    within: Callable[[Shared], Task] | None = None,
) -> ClientWork:
    """A client's steps from the server's parameters; it sends how they have changed.

    Args:
      task: the model and its loss.
      optimizer: starts afresh on every client in every round, so that a schedule in it counts local steps.
        Its updates are multiplied by the client's input 'rate', if it has one; see `scheduled`.
      weigh_by: what a client counts for: its examples, the predictions in its loss, which are the tokens
        of a language model (so do Reddi et al. 2021, for theirs), or the same as any other.
      direction: what a step descends instead of the batch's gradient. It has no say over statistics
        that are not trained.
      start: (shared, client) -> where training starts; `shared.params` if None.
      within: shared -> the task of the parameters that are trained; `task` if None.

    Returns:
      Work whose `shared` is like `Shared`, and whose `finish` returns (Update, Trained).

    Raises:
      UserError: an unknown weigh_by.
    """
    weight = weight_of(weigh_by)
    optimizer = carrying_statistics(_with_rate(optimizer))

    def init(shared: Shared, client: Clients) -> Training:
        params = start(shared, client) if start else shared.params
        opt_state = optimizer.init(params) if shared.opt_state is None else shared.opt_state
        return Training(params, opt_state, zero_sums(task), client.inputs.get("rate"))

    def step(shared: Shared, carry: Training, batch: Batch, key: jax.Array) -> Training:
        params, opt_state, sums, rate = carry
        grads, batch_sums = gradient(within(shared) if within else task, params, batch, key)
        if direction:
            trained, _ = split_statistics(direction(shared, params, grads, batch, key))
            grads = join_statistics(trained, split_statistics(grads)[1])
        updates, opt_state = optimizer.update(grads, opt_state, params, rate=rate)
        params = optax.apply_updates(params, updates)
        return Training(params, opt_state, jax.tree.map(jnp.add, sums, batch_sums), rate)

    def finish(shared: Shared, carry: Training, client: Clients) -> tuple[Update, Trained]:
        update = jax.tree.map(jnp.subtract, carry.params, shared.params)
        kept = Trained(carry.sums, optax.tree.norm(update))
        return Update(update, weight(client, carry.sums)), kept

    return ClientWork(init, step, finish)


def weight_of(weigh_by: WeighBy) -> Callable[[Clients, dict[str, Measure]], jax.Array]:
    """(client, its sums of the loss) -> () what it counts for; see `local_training`.

    Raises:
      UserError: an unknown weigh_by.
    """
    weights: dict[str, Callable[[Clients, dict[str, Measure]], jax.Array]] = {
        "examples": lambda client, sums: client.num_examples,
        "tokens": lambda client, sums: sums["loss"].weights,
        "uniform": lambda client, sums: jnp.float32(1),
    }
    if weigh_by not in weights:
        raise UserError(f"weigh_by must be 'examples', 'tokens' or 'uniform', got {weigh_by!r}")
    return weights[weigh_by]


def with_own_extra(work: ClientWork, extra: Callable[[Shared, Clients], PyTree]) -> ClientWork:
    """Gives the steps of `local_training` a `shared.extra` that differs between clients.

    Args:
      work: as `local_training`'s.
      extra: (shared, client) -> what its steps find there.
    """

    def init(shared: Shared, client: Clients) -> tuple[PyTree, Training]:
        return extra(shared, client), work.init(shared, client)

    def step(shared: Shared, carry: tuple, batch: Batch, key: jax.Array) -> tuple:
        own, trained = carry
        return own, work.step(shared._replace(extra=own), trained, batch, key)

    def finish(shared: Shared, carry: tuple, client: Clients) -> tuple[Update, Trained]:
        return work.finish(shared, carry[1], client)

    return ClientWork(init, step, finish)


def training_own(
    task: Task,
    work: ClientWork,
    optimizer: optax.GradientTransformation,
    model: Callable[[PyTree, PyTree], PyTree] = lambda own, sent: own,
    direction: Direction | None = None,
) -> ClientWork:
    """Trains parameters that a client keeps for itself, on the same batches as those that it sends.

    Args:
      task: the model and its loss.
      work: `local_training` of what is sent, whose carry it looks at.
      optimizer: of the client's own parameters, its `ClientState.own`.
      model: (own, those that will be sent, before the step) -> parameters of the model.
      direction: see `local_training`.

    Returns:
      Work as `local_training`'s, which keeps the client's own parameters besides.
    """

    def start(shared: Shared, client: Clients) -> PyTree:
        return client.state.own

    def within(shared: Shared) -> Task:
        return reparametrised(task, lambda own: model(own, shared.extra))

    training = local_training(
        task, optimizer, direction=direction, start=start, within=within if model else None
    )

    def init(shared: Shared, client: Clients) -> tuple[Training, Training]:
        return work.init(shared, client), training.init(shared, client)

    def step(shared: Shared, carry: tuple, batch: Batch, key: jax.Array) -> tuple:
        sent, own = carry
        own = training.step(shared._replace(extra=sent.params), own, batch, key)
        return work.step(shared, sent, batch, key), own

    def finish(shared: Shared, carry: tuple, client: Clients) -> tuple[Update, Trained]:
        sent, own = carry
        update, kept = work.finish(shared, sent, client)
        return update, kept._replace(own=own.params)

    return ClientWork(init, step, finish)


def rate_of(client: Clients) -> jax.Array | float:
    """The factor () on a client's learning rate, for algorithms that look at that rate themselves."""
    return client.inputs.get("rate", 1.0)


def _with_rate(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with a factor `rate` on its updates."""
    optimizer = as_optimizer(optimizer)

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        rate: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.OptState]:
        updates, state = optimizer.update(updates, state, params, **extra)
        return updates if rate is None else jax.tree.map(lambda u: rate * u, updates), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def full_gradient(task: Task) -> ClientWork:
    """A client's mean gradient at the server's parameters, over a pass that meets every example once.

    Returns:
      Work whose `shared` has `params`, and whose `finish` returns (Update, the same gradient), weighted
      alike for all clients. Its carry is (sum of gradients, sums of loss and metrics).

    Raises:
      UserError: a task that minimises sums over batches; their gradients depend on the batch's size.
    """
    check(
        not task.sum_loss,
        "a full gradient is a mean, but this task's loss is a sum over a batch: there is no step "
        "that it would fit; use an algorithm without full gradients, or a task with a mean loss",
    )

    def init(shared: Any, client: Clients) -> tuple[PyTree, dict[str, Measure]]:
        return optax.tree.zeros_like(shared.params), zero_sums(task)

    def step(shared: Any, carry: tuple, batch: Batch, key: jax.Array) -> tuple:
        total, sums = carry
        grads, batch_sums = gradient(task, shared.params, batch, key)
        weight = batch_sums["loss"].weights
        total = jax.tree.map(lambda t, g: t + weight * g, total, grads)
        return total, jax.tree.map(jnp.add, sums, batch_sums)

    def finish(shared: Any, carry: tuple, client: Clients) -> tuple[Update, PyTree]:
        total, sums = carry
        count = jnp.maximum(sums["loss"].weights, 1e-12)
        mean = jax.tree.map(lambda t: t / count, total)
        return Update(mean, jnp.float32(1)), mean

    return ClientWork(init, step, finish)


def full_loss(task: Task) -> ClientWork:
    """A client's mean loss at the server's parameters, over a pass that meets every example once.

    Returns:
      Work whose `shared` has `params`, and whose `finish` returns ((), () float32).
    """

    def init(shared: Any, client: Clients) -> Measure:
        return Measure(jnp.zeros(()), jnp.zeros(()))

    def step(shared: Any, carry: Measure, batch: Batch, key: jax.Array) -> Measure:
        _, sums = mean_loss(task, shared.params, batch.examples, batch.mask, None)
        return jax.tree.map(jnp.add, carry, sums["loss"])

    def finish(shared: Any, carry: Measure, client: Clients) -> tuple[tuple, jax.Array]:
        return (), carry.values / jnp.maximum(carry.weights, 1e-12)

    return ClientWork(init, step, finish)


def server_step(
    optimizer: optax.GradientTransformation, update: PyTree, opt_state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """The server's step, which takes the negated aggregate for its gradient.

    Statistics that are not trained are replaced by the aggregate whatever the optimizer, whose `init` has to
    be that of `carrying_statistics(optimizer)`.

    Returns:
      (params, opt_state) after it.
    """
    check_like(update, params, "what clients send to the server must be like the parameters", False)
    grads = jax.tree.map(jnp.negative, update)
    updates, opt_state = carrying_statistics(optimizer).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def zero_sums(task: Task) -> dict[str, Measure]:
    """Where the training metrics of a client start: the sums that `gradient` returns add to them."""
    return {name: Measure(jnp.zeros(()), jnp.zeros(())) for name in ("loss", *task.metrics)}


def round_metrics(task: Task, aggregation: Aggregation) -> tuple[Metrics, Metrics]:
    """Metrics of a round of local training, for `RoundOutput`.

    Args:
      task: what was trained on.
      aggregation: of work that keeps `Trained`.

    Returns:
      train/* over the cohort's examples, and clients/* of each client; with the aggregator's.
    """
    trained: Trained = aggregation.each
    cohort = {name: Measure(*map(jnp.sum, sums)) for name, sums in trained.sums.items()}
    metrics = {
        **{f"train/{name}": value for name, value in _with_derived(task, cohort).items()},
        "train/update_norm": optax.tree.norm(aggregation.update),
        **aggregation.metrics,
    }
    took_part = trained.sums["loss"].weights > 0
    per_client = {
        **{f"clients/{name}": value for name, value in _with_derived(task, trained.sums).items()},
        "clients/update_norm": Measure(trained.norm, took_part.astype(jnp.float32)),
        **aggregation.per_client,
    }
    return metrics, per_client


def _with_derived(task: Task, sums: dict[str, Measure]) -> dict[str, Measure]:
    means = {name: m.values / jnp.maximum(m.weights, 1e-12) for name, m in sums.items()}
    weight = (sums["loss"].weights > 0).astype(jnp.float32)
    derived = {
        name: Measure(weight * derive(means), weight) for name, derive in task.derived.items()
    }
    return {**sums, **derived}
