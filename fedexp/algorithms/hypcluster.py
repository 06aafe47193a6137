"""HypCluster: several models, each for the clients that it fits best (Mansour et al. 2020)."""

from __future__ import annotations

from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax

from fedexp.aggregators import Aggregators, as_aggregator
from fedexp.algorithms.aggregation import aggregate, init_client
from fedexp.algorithms.local import PyTree, Shared, local_training, round_metrics, server_step
from fedexp.contracts import Algorithm, ClientWork, Personalisation, RoundOutput, full_pass
from fedexp.errors import check
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
    aggregator: Aggregators = None,
    full_batch_size: int = 128,
) -> Algorithm:
    """HypCluster of Three Approaches for Personalization (Mansour et al. 2020, arXiv:2002.10619).

    Also known as IFCA (Ghosh et al. 2020, arXiv:2006.04088, Algorithm 1). In every round a client trains the
    one of K models that has the least loss on its training examples, and FedAvg takes the mean by cluster.
    Personalised evaluations measure a client with the model that it would train.

    Args:
      task: the model and its loss.
      num_clusters: K. All but the first model start with the first parameters' entries shuffled within each
        array, which is another draw of independent initial values.
      client_optimizer: see `fedavg`.
      server_optimizer: one state for each cluster; a cluster without clients stays as it is.
      aggregator: of a model's change for each cluster, zero for all but one; `mean()` if None.
      full_batch_size: examples a step of the pass for the losses.

    Raises:
      UserError: fewer than one cluster.
    """
    check(num_clusters >= 1, f"hypcluster.num_clusters must be at least 1, got {num_clusters}")
    aggregator, numbers = as_aggregator(aggregator), jnp.arange(num_clusters)

    def start(shared, client):
        return _chosen(shared.params, client.inputs["cluster"])

    training = local_training(task, client_optimizer, start=start)

    def finish(shared, carry, client):
        own = shared._replace(params=start(shared, client))
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
        _, losses = for_each_client(_losses(task, num_clusters), state, cohort, "full")
        choices = jnp.argmin(losses, axis=1).astype(jnp.int32)
        cohort = cohort.with_inputs(cluster=choices)
        shared = Shared(state.models)
        sent = aggregate(for_each_client, aggregator, state.aggregator, work, shared, cohort)
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
    return Algorithm(init, round_, first, passes, personalise)


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
