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
# # 3 · Your own model and task
#
# A model is a Flax module that knows nothing of clients; linen and NNX are equally welcome. A *task*
# puts a loss and metrics around it. This notebook writes the same classifier in both, then a
# regression, and at last a task that fedexp does not have.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from fedexp.algorithms import fedavg
from fedexp.data import FederatedDataset, FederatedSplits, uniform
from fedexp.tasks import Measure, Task, accuracy, classification, flax_task, regression
from fedexp.trainer import Experiment

# %% [markdown]
# ## Data to try them on
#
# Forty clients see the plane from angles of their own. A label says on which of three rings a point
# is, and a number how far from the centre.


# %%
def rings(seed: int) -> FederatedDataset:
    rng = np.random.default_rng(seed)
    clients = {}
    for number in range(40):
        y = rng.integers(0, 3, size=rng.integers(20, 80)).astype(np.int32)
        angle = rng.normal(number, 1.0, size=len(y))
        radius = y + rng.normal(1, 0.2, size=len(y))
        x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        clients[f"client {number:02}"] = {
            "x": x.astype(np.float32),
            "y": y,
            "radius": radius.astype(np.float32),
        }
    return FederatedDataset.from_clients(clients)


splits = FederatedSplits(rings(seed=0), rings(seed=1))

figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
axes.scatter(*splits.train.features["x"].T, c=splits.train.features["y"], s=4)
axes.set_aspect("equal")


# %% [markdown]
# ## A linen model
#
# `__call__` maps a batch to logits. If it takes `train`, it is told whether it trains, and dropout
# finds its rng.


# %%
class Linen(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Dense(self.width, name="first")(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(3, name="last")(x)


# %% [markdown]
# ## The same in NNX
#
# Nothing is special here either. Give the task the *class*: it is called with `rngs=`, so that the
# run's seed decides on the first parameters, as it does for linen. (An instance is fine, too; it then
# starts from the parameters that it has, whatever the seed.) Training and evaluation are the module's
# `train()` and `eval()`, which dropout listens to.


# %%
class Nnx(nnx.Module):
    def __init__(self, width: int = 32, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(2, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.first(x))))


# %% [markdown]
# Both are parameters by name, the same names even, because we chose them so. Hence with the same
# numbers they are the same function:

# %%
tasks = {"linen": classification(Linen(), 3), "nnx": classification(Nnx, 3)}
batch = splits.train.client(0)
params = {name: task.init(jax.random.key(0), batch) for name, task in tasks.items()}
for name, tree in params.items():
    print(name, jax.tree.map(jnp.shape, tree))

outputs = [task.apply(params["linen"], batch, None) for task in tasks.values()]
np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)

# %% [markdown]
# A width of 64 would be `Linen(width=64)`, and `functools.partial(Nnx, 64)`. In a gin file, with
# `@gin.configurable` above the classes, it is
#
#     classification.model = @Linen()          classification.model = @Nnx
#     Linen.width = 64                         Nnx.width = 64
#
# with parentheses for linen and without them for NNX.

# %%
wide = classification(functools.partial(Nnx, 64), 3)
assert wide.init(jax.random.key(0), batch)["first"]["kernel"].shape == (2, 64)


# %% [markdown]
# ## A metric of one's own
#
# A metric maps outputs and batch to a `Measure`: values and weights for each example. These are
# summed over batches and clients, and the metric is the sum of values by the sum of weights. That is
# why it comes out the same however the examples are dealt out. How sure is the model?


# %%
def confidence(logits, batch):
    highest = jax.nn.softmax(logits).max(-1)
    return Measure(highest, jnp.ones_like(highest))


metrics = {"accuracy": accuracy(), "confidence": confidence}
tasks["linen"] = classification(Linen(), 3, metrics)


# %% [markdown]
# ## They train alike
#
# The two draw other first parameters and another dropout, so their numbers are close, and not the
# same.


# %%
def run(
    task: Task, splits: FederatedSplits, rate: float = 0.1, rounds: int = 60
) -> dict[str, float]:
    """FedAdam with ten clients a round, each at this rate; what the test says in the end."""
    algorithm = fedavg(task, client_optimizer=optax.sgd(rate), server_optimizer=optax.adam(0.03))
    experiment = Experiment(
        splits, task, algorithm, num_rounds=rounds, sampler=uniform(10), observers=[]
    )
    return experiment.run().metrics


for name, task in tasks.items():
    metrics = run(task, splits)
    print(name, {metric: value for metric, value in metrics.items() if metric.startswith("test/")})
    assert metrics["test/accuracy"] > 0.85
    assert ("test/confidence" in metrics) == (name == "linen")


# %% [markdown]
# ## Regression
#
# `regression` predicts the numbers in feature `y` by least squares, and reports the mean absolute
# error and the root of the mean squared one besides. The model has one output for each target. Our
# target is the radius, so we rename features. Squared errors have steeper slopes than
# cross-entropies, so clients take smaller steps, and more rounds:


# %%
def with_radius(dataset: FederatedDataset) -> FederatedDataset:
    examples = {"x": dataset.features["x"], "y": dataset.features["radius"]}
    return FederatedDataset(examples, dataset.offsets, dataset.client_ids)


class Radius(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(2, 64, rngs=rngs)
        self.out = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


radii = FederatedSplits(with_radius(splits.train), with_radius(splits.test))
metrics = run(regression(Radius), radii, rate=0.02, rounds=150)
spread = radii.test.features["y"].std()
print(
    f"rmse {metrics['test/rmse']:.3f}, mae {metrics['test/mae']:.3f}, of a spread of {spread:.3f}"
)
assert metrics["test/rmse"] < 0.2 * spread
assert np.isclose(metrics["test/rmse"] ** 2, metrics["test/loss"], rtol=1e-3)


# %% [markdown]
# ## A task of one's own
#
# `flax_task` makes a task of a model: what the model is given, which shape it must return, a loss,
# metrics. Suppose each example has a *count*, as clicks have. Then the model should predict the
# logarithm of a rate, and the loss is Poisson's negative log-likelihood, rate − count · log rate, but
# for a constant.


# %%
def poisson(model) -> Task:
    """Counts `y` from `x`."""

    def loss(log_rate, batch):
        rate = log_rate[:, 0]
        return Measure(jnp.exp(rate) - batch["y"] * rate, jnp.ones_like(rate))

    def mean_rate(log_rate, batch):
        return Measure(jnp.exp(log_rate[:, 0]), jnp.ones(len(log_rate)))

    return flax_task(
        "poisson",
        model,
        inputs=lambda batch, key: (batch["x"],),
        output_shape=lambda x: (len(x), 1),
        remedy="give the model one output",
        loss=loss,
        metrics={"mean_rate": mean_rate},
    )


# %% [markdown]
# Counts whose logarithm of the rate is 0.5 + 0.4 x₀ − 0.2 x₁. A linear model should find these three
# numbers, from clients that each see a part of the plane.

# %%
truth = np.array([0.4, -0.2]), 0.5


def with_counts(dataset: FederatedDataset, seed: int) -> FederatedDataset:
    x = dataset.features["x"]
    counts = np.random.default_rng(seed).poisson(np.exp(x @ truth[0] + truth[1]))
    examples = {"x": x, "y": counts.astype(np.float32)}
    return FederatedDataset(examples, dataset.offsets, dataset.client_ids)


counts = FederatedSplits(with_counts(splits.train, 0), with_counts(splits.test, 1))
task = poisson(nn.Dense(1))
algorithm = fedavg(task, client_optimizer=optax.sgd(0.01), server_optimizer=optax.sgd(1.0))
result = Experiment(
    counts, task, algorithm, num_rounds=150, sampler=uniform(20), observers=[]
).run()
print("kernel", np.ravel(result.params["kernel"]), "bias", result.params["bias"])
np.testing.assert_allclose(np.ravel(result.params["kernel"]), truth[0], atol=0.1)
np.testing.assert_allclose(result.params["bias"], truth[1], atol=0.15)
assert np.isclose(result.metrics["test/mean_rate"], counts.test.features["y"].mean(), rtol=0.2)

# %% [markdown]
# ## What you have learnt, and where next
#
# - A model is any Flax module: a linen module, or an NNX class that takes `rngs`.
# - `classification` and `regression` take either; metrics are sums of values and of weights.
# - `flax_task` makes a task of any loss.
#
# Next: [your own algorithm and aggregator](4_own_algorithm.py). Reference: [tasks and
# models](../tasks.md).
