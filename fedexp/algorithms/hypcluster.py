"""HypCluster: several models, each for the clients that it fits best (Mansour et al. 2020)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from fedexp.aggregators import Aggregators, as_aggregator
from fedexp.algorithms.aggregation import aggregate, init_client
from fedexp.algorithms.local import (
    PyTree,
    Shared,
    full_loss,
    local_training,
    round_metrics,
    server_step,
)
from fedexp.contracts import (
    Algorithm,
    ClientWork,
    Cohort,
    ForEachClient,
    Personalisation,
    Release,
    RoundOutput,
    full_pass,
)
from fedexp.errors import UserError, check
from fedexp.streams import Stream, derive
from fedexp.tasks import Task, carrying_statistics, mean_loss, of_trained


class ServerState(NamedTuple):
    """K models (K, ...), their optimizers' states, and the aggregator's."""

    models: PyTree
    opt_states: PyTree
    aggregator: PyTree

    @property
    def params(self) -> PyTree:
        """The first model; only personalised evaluations measure each client with its own."""
        return _chosen(self.models, 0)


@gin.configurable
def hypcluster(
    task: Task,
    num_clusters: int = gin.REQUIRED,
    client_optimizer: optax.GradientTransformation = gin.REQUIRED,
    server_optimizer: optax.GradientTransformation = gin.REQUIRED,
    start: Literal["shuffled", "kmeans++"] = "shuffled",
    aggregator: Aggregators = None,
    full_batch_size: int = 128,
) -> Algorithm:
    """HypCluster of Three Approaches for Personalization (Mansour et al. 2020, arXiv:2002.10619).

    Also known as IFCA (Ghosh et al. 2020, arXiv:2006.04088, Algorithm 1). In every round a client trains the
    one of K models that has the least loss on its training examples, and FedAvg takes the mean by cluster.
    Personalised evaluations measure a client with the model that it would train.

    Args:
      task: the model and its loss.
      num_clusters: K.
      client_optimizer: see `fedavg`.
      server_optimizer: one state for each cluster; a cluster without clients stays as it is.
      start: 'shuffled': all but the first model start with the first parameters' entries shuffled within each
        array, which is another draw of independent initial values. 'kmeans++': with models of the first
        cohort's clients, trained alone: of one at random, and time and again of another one whose loss under
        the best model so far is the greatest, as in FedJAX (Arthur & Vassilvitskii 2007 draw it instead). The
        program of a round then takes memory for a model of every client in the cohort.
      aggregator: of a model's change for each cluster, zero for all but one; `mean()` if None.
      full_batch_size: examples a step of the pass for the losses.

    Raises:
      UserError: fewer than one cluster or, in the first round, more than there are clients; an unknown start.
    """
    check(num_clusters >= 1, f"hypcluster.num_clusters must be at least 1, got {num_clusters}")
    if start not in ("shuffled", "kmeans++"):
        raise UserError(f"hypcluster.start must be 'shuffled' or 'kmeans++', got {start!r}")
    aggregator, numbers = as_aggregator(aggregator), jnp.arange(num_clusters)

    def chosen(shared, client):
        return _chosen(shared.params, client.inputs["cluster"])

    training = local_training(task, client_optimizer, start=chosen)

    def finish(shared, carry, client):
        own = shared._replace(params=chosen(shared, client))
        update, kept = training.finish(own, carry, client)
        here = numbers == client.inputs["cluster"]
        value = jax.tree.map(lambda leaf: jnp.multiply.outer(here, leaf), update.value)
        return update._replace(value=value), kept

    work = training._replace(finish=finish)

    def first_models(params, key):
        keys = [derive(key, Stream.SERVER, number) for number in range(num_clusters)]
        models = [params, *(_shuffled(params, key) for key in keys[1:])]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)

    def init(params, key):
        models = first_models(params, key)
        opt_states = jax.vmap(carrying_statistics(server_optimizer).init)(models)
        return ServerState(models, opt_states, aggregator.init(models))

    def step(model, opt_state, update, share):
        """The server's for one cluster; `share` is its clients' part of the examples."""
        update = jax.tree.map(lambda leaf: leaf / jnp.maximum(share, 1e-12), update)
        new = server_step(server_optimizer, update, opt_state, model)
        return jax.tree.map(lambda n, o: jnp.where(share > 0, n, o), new, (model, opt_state))

    def round_(state, cohort, for_each_client):
        _check_enough(num_clusters, start, cohort)
        if start == "kmeans++":
            alone = local_training(task, client_optimizer)
            begin = functools.partial(_far_apart, task, alone, cohort, for_each_client)
            models = _in_first_round(cohort, for_each_client, begin, state.models)
            state = state._replace(models=models)
        _, losses = for_each_client(_losses(task, num_clusters), state, cohort, "full")
        choices = jnp.argmin(losses, axis=1).astype(jnp.int32)
        cohort = cohort.with_inputs(cluster=choices)
        shared = Shared(state.models)
        sent = aggregate(for_each_client, aggregator, state.aggregator, work, shared, cohort)
        for_each_client.releases.append(Release("how many examples each cluster's clients have"))
        examples = jnp.where(cohort.real, cohort.clients.num_examples, 0)
        members = jnp.where(numbers[:, None] == choices, examples, 0).sum(axis=1)
        shares = members / jnp.maximum(examples.sum(), 1)
        models, opt_states = jax.vmap(step)(state.models, state.opt_states, sent.update, shares)
        metrics, per_client = round_metrics(task, sent)
        found = {f"clusters/{number}": shares[number] for number in range(num_clusters)}
        state = ServerState(models, opt_states, sent.state)
        return RoundOutput(state, {**metrics, **found}, per_client, sent.states())

    def finish_personal(state, sums, client):
        return (), _chosen(state.models, jnp.argmin(sums))

    passes = {"full": full_pass(full_batch_size)}
    choosing = _losses(task, num_clusters)._replace(finish=finish_personal)
    personalise = Personalisation(choosing, passes["full"])
    first = init_client(aggregator, sent=lambda params: first_models(params, jax.random.key(0)))
    return Algorithm(
        init,
        round_,
        first,
        passes,
        personalise,
        check=lambda train: _check_few(num_clusters, train.num_clients),
    )


def _losses(task: Task, num_clusters: int) -> ClientWork:
    """A client's sums of the loss of every model."""

    def init(state, client):
        return jnp.zeros(num_clusters)

    def step(state, sums, batch, key):
        models = [_chosen(state.models, number) for number in range(num_clusters)]
        found = [mean_loss(task, model, batch.examples, batch.mask, None)[1] for model in models]
        return sums + jnp.stack([sums["loss"].values for sums in found])

    def finish(state, sums, client):
        return (), sums

    return ClientWork(init, step, finish)


def _check_few(num_clusters: int, num_clients: int) -> None:
    check(
        num_clusters <= num_clients,
        f"hypcluster.num_clusters is {num_clusters}, but there are {num_clients} clients to cluster; lower "
        "it",
    )


def _check_enough(num_clusters: int, start: str, cohort: Cohort) -> None:
    _check_few(num_clusters, cohort.population)  # Those that are held out are not counted.
    check(
        start != "kmeans++" or num_clusters <= cohort.expected_size,
        f"hypcluster.start is 'kmeans++', which takes {num_clusters} models from the clients of the first "
        f"cohort, but the sampler draws {cohort.expected_size:g}; raise its cohort_size, or lower "
        "hypcluster.num_clusters",
    )


def _far_apart(
    task: Task, work: ClientWork, cohort: Cohort, for_each_client: ForEachClient, models: PyTree
) -> PyTree:
    """K models (K, ...) of clients that trained from the first of the given ones alone.

    What goes to and fro for it is not counted: a round's bits are the same in all of them.
    """
    alone = work._replace(finish=lambda shared, carry, client: ((), carry.params))
    first = Shared(_chosen(models, 0))
    _, trained = for_each_client(alone, first, cohort, counted=False)
    for_each_client.releases.append(Release("the models that k-means++ chooses from"))
    taken = jnp.finfo(jnp.float32).min

    def add(number, carry):
        models, worst, losses = carry
        client = jnp.argmax(jnp.where(cohort.real, worst, -jnp.inf))
        model = _chosen(trained, client)
        _, found = for_each_client(full_loss(task), Shared(model), cohort, "full", counted=False)
        losses = jnp.minimum(losses, found).at[client].set(taken)
        models = jax.tree.map(lambda all_, one: all_.at[number].set(one), models, model)
        return models, losses, losses

    keys = jax.vmap(jax.random.fold_in, (None, 0))(cohort.key, cohort.clients.index)
    at_random = jax.vmap(jax.random.uniform)(keys)  # The same for a client in any slot.
    start = models, at_random, jnp.full(at_random.shape, jnp.inf)
    return jax.lax.fori_loop(0, len(jax.tree.leaves(models)[0]), add, start)[0]


def _in_first_round(
    cohort: Cohort,
    for_each_client: ForEachClient,
    begin: Callable[[PyTree], PyTree],
    models: PyTree,
) -> PyTree:
    """What `begin` makes of the models in a round 0 that has clients; the same models else."""
    first, calls = (cohort.round == 0) & (cohort.size > 0), for_each_client.calls
    eager = contextlib.nullcontext() if isinstance(first, Tracer) else jax.disable_jit()
    with eager:  # `debug` compiles nothing.
        models = jax.lax.cond(first, begin, lambda models: models, models)
    for_each_client.calls = calls  # Whether it took place or not, later calls draw the same.
    return models


def _chosen(models: PyTree, number: int | jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[number], models)


def _shuffled(params: PyTree, key: jax.Array) -> PyTree:
    def shuffle(trained):
        leaves, structure = jax.tree.flatten(trained)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten(
            jax.random.permutation(one, leaf.ravel()).reshape(leaf.shape)
            for one, leaf in zip(keys, leaves, strict=True)
        )

    return of_trained(shuffle)(params)
