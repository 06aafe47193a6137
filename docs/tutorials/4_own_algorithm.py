# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4 · Your own algorithm and aggregator
#
# In fedexp an algorithm says what *one* client does, and what the server does with the sum of what
# clients return. Where clients run, in which order and on how many devices, is the engine's affair.
# An aggregator is what happens to client updates in between. This notebook writes two of the former
# and two of the latter, and holds them against those that fedexp ships.

# %%
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn

from fedexp import aggregators, algorithms, data
from fedexp.algorithms import Algorithm, ClientWork, RoundOutput
from fedexp.tasks import Task, classification, mean_loss
from fedexp.trainer import Experiment

rng = np.random.default_rng(0)
y = rng.integers(0, 4, size=3000).astype(np.int32)
x = rng.normal(rng.normal(size=(4, 10))[y], 1.5).astype(np.float32)
dataset = data.from_arrays({"x": x, "y": y}, data.dirichlet(20, alpha=0.3))
splits = data.FederatedSplits(*dataset.split_examples(0.8))
task = classification(nn.Dense(4), 4)


def run(algorithm: Algorithm, rounds: int = 20, splits: data.FederatedSplits = splits):
    """Ten clients a round, in one epoch of batches of 20."""
    return Experiment(
        splits,
        task,
        algorithm,
        num_rounds=rounds,
        sampler=data.uniform(10),
        batching=data.ClientBatching(batch_size=20),
        observers=[],
    ).run()


# %% [markdown]
# ## An algorithm from scratch
#
# Gradient descent: each client returns the gradient of its examples, and the server takes a step.
# `ClientWork` is three pure functions:
#
# - `init(shared, client)` makes a carry, before the first batch. `shared` is what the server tells
#   everybody, here the parameters.
# - `step(shared, carry, batch, key)` is called for each batch. Batches have a fixed size;
#   `batch.mask` says which rows are real.
# - `finish(shared, carry, client)` returns what is *summed* over the cohort, and what is kept for
#   each client, here nothing.
#
# An `Algorithm` has `init`, which makes the server's state, a pytree with an attribute `params`, and
# `round`.


# %%
class ServerState(NamedTuple):
    params: Any


def gradient_descent(task: Task, learning_rate: float = 0.5) -> Algorithm:
    """One server step along the gradient of the cohort's examples."""

    def client_init(params, client):
        return jax.tree.map(jnp.zeros_like, params), 0

    def step(params, carry, batch, key):
        total, count = carry
        grads, _ = jax.grad(mean_loss, argnums=1, has_aux=True)(task, params, *batch, key)
        examples = batch.mask.sum()
        return jax.tree.map(lambda t, g: t + examples * g, total, grads), count + examples

    def finish(params, carry, client):
        return carry, ()

    work = ClientWork(client_init, step, finish)

    def init(params, key):
        return ServerState(params)

    def round_(state, cohort, for_each_client):
        (total, count), _ = for_each_client(work, state.params, cohort)
        rate = learning_rate / jnp.maximum(count, 1)
        params = jax.tree.map(lambda p, t: p - rate * t, state.params, total)
        return RoundOutput(ServerState(params), {"train/examples": count})

    return Algorithm(init, round_)


own = run(gradient_descent(task))
print(f"test accuracy {own.metrics['test/accuracy']:.1%}")

# %% [markdown]
# That is what fedexp ships as `fedsgd`, and the numbers are the same:


# %%
def assert_same(one, other, tolerance: float = 1e-4) -> None:
    """Of two results' parameters."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        one.params,
        other.params,
    )


assert_same(own, run(algorithms.fedsgd(task, optax.sgd(0.5))))

# %% [markdown]
# In a gin file, with `@gin.configurable` above the function, it is `train.algorithm =
# @gradient_descent` (without parentheses: the trainer calls it with the task) and
# `gradient_descent.learning_rate = 0.5`. Because `finish` returns sums, a cohort of ten thousand
# clients needs no more memory than one of ten.
#
# ## An algorithm that is nearly FedAvg
#
# Most papers change FedAvg in one place. `local_training` makes a client's work, and takes a function
# for the *direction* of a step; `averaging` is FedAvg's server around it. This is all of FedProx,
# whose clients are held back to where they started:


# %%
def own_fedprox(task: Task, mu: float, client_optimizer, server_optimizer) -> Algorithm:
    """Steps along the gradient plus mu times the way that the client has gone."""

    def direction(shared, params, grads, batch, key):
        return jax.tree.map(lambda g, y, x: g + mu * (y - x), grads, params, shared.params)

    work = algorithms.local_training(task, client_optimizer, direction=direction)
    return algorithms.averaging(task, work, server_optimizer)


optimizers = optax.sgd(0.1), optax.sgd(1.0)
held_back = run(own_fedprox(task, 2.0, *optimizers))
assert_same(held_back, run(algorithms.fedprox(task, 2.0, *optimizers)))

# %% [markdown]
# Clients that are held back go less far, and so does the model, as the norm of its parameters tells:

# %%
plain = run(algorithms.fedavg(task, *optimizers))
for name, result in {"FedAvg": plain, "FedProx": held_back}.items():
    norm, accuracy = optax.tree.norm(result.params), result.metrics["test/accuracy"]
    print(f"{name}: norm {norm:.2f}, test accuracy {accuracy:.1%}")
assert optax.tree.norm(held_back.params) < optax.tree.norm(plain.params)

# %% [markdown]
# ## An aggregator: a link of a chain
#
# An aggregator has two halves. `client` sees one client's `Update` and returns what is `Sent`;
# `server` gets the sum of `total`s and what the later links made of the updates. This link sends only
# large entries, counts them, and says by `Code` in how many bits that can be written.

# %%
from fedexp.contracts import Aggregated, Aggregator, Code, Sent


def above(share: float) -> Aggregator:
    """Sends the entries that are larger than a share of the largest one."""

    def client(state, update, client_state, key):
        largest = [jnp.abs(leaf).max() for leaf in jax.tree.leaves(update.value)]
        limit = share * jnp.stack(largest).max()
        sent = jax.tree.map(lambda leaf: jnp.abs(leaf) > limit, update.value)
        value = jax.tree.map(jnp.multiply, update.value, sent)
        count = sum(is_sent.sum() for is_sent in jax.tree.leaves(sent))
        code = Code(sent=count, indices=32 * count, support=sent)
        return Sent(update._replace(value=value, code=code), total=count)

    def server(state, total, each, later, cohort, key):
        return Aggregated(later, state, {"entries": total})

    return Aggregator(client, server)


chain = [above(0.5), aggregators.mean()]
sparse = run(algorithms.fedavg(task, *optimizers, aggregator=chain))
for name, result in {"plain": plain, "above": sparse}.items():
    bits = result.metrics["traffic/total_bits_up"]
    print(f"{name}: {bits:.3g} bits up, test accuracy {result.metrics['test/accuracy']:.1%}")

# %% [markdown]
# An entry that is sent takes 64 bits, its index included, so it pays if fewer than half of them are.

# %%
assert sparse.metrics["traffic/total_bits_up"] < 0.8 * plain.metrics["traffic/total_bits_up"]
assert sparse.metrics["test/accuracy"] > plain.metrics["test/accuracy"] - 0.15


# %% [markdown]
# ## An aggregator: a rule that makes one update of many
#
# The last link of a chain reduces. If a rule needs every update, it takes them through `each`, an
# array with a row for each slot of the cohort; `cohort.real` says which slots are clients. The median
# of every entry:


# %%
def median() -> Aggregator:
    """The median of every entry over the cohort's clients."""

    def client(state, update, client_state, key):
        return Sent(each=update.value)

    def server(state, total, each, later, cohort, key):
        def of_leaf(leaf):
            real = cohort.real.reshape(-1, *(1,) * (leaf.ndim - 1))
            return jnp.nanmedian(jnp.where(real, leaf, jnp.nan), axis=0)

        return Aggregated(jax.tree.map(of_leaf, each), state)

    return Aggregator(client, server, reduces=True)


# %% [markdown]
# A median is for attackers. Let each client be one with a probability of a fifth, which with this
# seed makes three of the twenty; attackers send ten times their update with the sign turned, which
# `attacked` does to any rule. Here clients are alike (`iid`), as the theory of such rules wants them.

# %%
alike = data.from_arrays({"x": x, "y": y}, data.iid(20))
alike = data.FederatedSplits(*alike.split_examples(0.8))
accuracy = {}
for name, rule in {"mean": aggregators.mean(), "median": median()}.items():
    rule = aggregators.attacked(rule, aggregators.sign_flip(10.0), fraction=0.2, seed=5)
    result = run(algorithms.fedavg(task, *optimizers, aggregator=rule), splits=alike)
    accuracy[name] = result.metrics["test/accuracy"]
print(accuracy)

figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
axes.bar(list(accuracy), list(accuracy.values()))
axes.set(ylabel="test accuracy", title="three of twenty attack")
assert accuracy["median"] > accuracy["mean"] + 0.05

# %% [markdown]
# ## What you have learnt, and where next
#
# - An algorithm is what one client does, as three pure functions, and what the server does with sums.
# - What is nearly FedAvg is `local_training` and `averaging`, with another direction, start or end.
# - Aggregators are links of a chain, and work with every algorithm that averages.
#
# Next: [a loop of your own](5_own_loop.py). All that is shipped: [algorithms](../algorithms.md),
# [aggregators](../aggregators.md).
