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
# # 5 · A loop of your own
#
# `Experiment.run` trains, evaluates, saves and stops. Sometimes you want to decide yourself what
# happens after a round: measure something of your own, stop when it is good enough, change the
# server's state. Then an experiment is a generator of rounds, and the loop is yours.

# %%
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn

from fedexp import data
from fedexp.algorithms import fedavg
from fedexp.tasks import classification
from fedexp.trainer import Experiment

rng = np.random.default_rng(0)
y = rng.integers(0, 4, size=3000).astype(np.int32)
x = rng.normal(rng.normal(size=(4, 10))[y], 1.5).astype(np.float32)
dataset = data.from_arrays({"x": x, "y": y}, data.dirichlet(20, alpha=0.3))
splits = data.FederatedSplits(*dataset.split_examples(0.8))
task = classification(nn.Dense(4), 4)

experiment = Experiment(
    splits,
    task,
    fedavg(task, client_optimizer=optax.sgd(0.1), server_optimizer=optax.sgd(0.5)),
    num_rounds=30,
    sampler=data.uniform(10),
    observers=[],
)

# %% [markdown]
# ## Watching
#
# A round is handed over as soon as it is on its way; its `metrics` (numbers), `per_client` (an array
# over the cohort) and `evaluate()` wait for it.

# %%
losses, worst = [], []
for round in experiment.rounds():
    losses.append(round.metrics["train/loss"])
    worst.append(round.per_client["clients/loss"].max())

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(losses, label="the cohort's mean")
axes.plot(worst, label="its worst client")
axes.set(xlabel="round", ylabel="training loss")
axes.legend()

assert len(losses) == 30
assert np.mean(losses[-5:]) < np.mean(losses[:5])

# %% [markdown]
# A loop that changes nothing is `run` to the last bit, because every random choice follows from the
# seed and the round:

# %%
result = experiment.run()
same = jax.tree.map(np.array_equal, result.params, jax.device_get(round.params))
print(same)
assert all(jax.tree.leaves(same))

# %% [markdown]
# ## Your own evaluation
#
# `round.params` are the model's parameters, `task.apply` the model. So anything can be measured; for
# instance how accurate the model is on each client's test examples, and on the tenth of the clients
# that it serves worst.


# %%
@jax.jit
def correct(params, examples):
    return task.apply(params, examples, None).argmax(-1) == examples["y"]


def accuracy_by_client(params) -> np.ndarray:
    test = splits.test
    right = np.asarray(correct(params, dict(test.features)))
    return np.add.reduceat(right.astype(float), test.offsets[:-1]) / test.client_sizes


history = []
for round in experiment.rounds():
    if round.number % 5 == 0:
        of_clients = accuracy_by_client(round.params)
        history.append((round.number, of_clients.mean(), np.percentile(of_clients, 10)))

for number, mean, low in history:
    print(f"round {number:2}  mean over clients {mean:.3f}  10th percentile {low:.3f}")

# %% [markdown]
# The weighted mean of these is what fedexp calls `test/accuracy`:

# %%
weighted = np.average(of_clients, weights=splits.test.client_sizes)
assert np.isclose(weighted, round.evaluate()["test/accuracy"], atol=1e-6)
assert history[-1][2] <= history[-1][1]

# %% [markdown]
# ## Ending early, and going on
#
# Stop by `break`. `rounds(after=round)` goes on from there, in the same cell or any other; nothing is
# compiled again.

# %%
for round in experiment.rounds():
    if round.metrics["train/accuracy"] > 0.6:
        break
stopped = round.number
print("stopped after round", stopped)

numbers = [later.number for later in experiment.rounds(after=round)]
print("went on with rounds", numbers)
assert stopped < 30
assert numbers == list(range(stopped + 1, 31))

# %% [markdown]
# ## Changing the state
#
# `round.state` is all that the server keeps, a pytree; what you assign to it is what the next round
# starts from. With Optax's `inject_hyperparams` the server's learning rate is part of that state, so
# your loop can be a schedule. This one halves the rate whenever the loss has not improved over the
# last five rounds.

# %%
server = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
adaptive = dataclasses.replace(
    experiment, algorithm=fedavg(task, client_optimizer=optax.sgd(0.3), server_optimizer=server)
)
losses, rates = [], []
for round in adaptive.rounds():
    losses.append(round.metrics["train/loss"])
    rates.append(float(round.state.opt_state.hyperparams["learning_rate"]))
    if len(losses) % 5 == 0 and np.mean(losses[-5:]) > 0.95 * np.mean(losses[-10:-5] or np.inf):
        round.state.opt_state.hyperparams["learning_rate"] *= 0.5

print("rates", rates)
assert rates[0] == 1.0
assert all(b in (a, a / 2) for a, b in itertools.pairwise(rates))
assert min(rates) < 1.0

# %% [markdown]
# And this averages the parameters of the last ten rounds, as in stochastic weight averaging.
# `round.params` are good until the next round, which uses their memory, so we add them up as we go.

# %%
total, count = None, 0
for round in experiment.rounds():
    if round.number > 20:
        params = round.params
        total = params if total is None else jax.tree.map(jnp.add, total, params)
        total, count = jax.device_get(total), count + 1

averaged = jax.tree.map(lambda leaf: leaf / count, total)
both = {"last": round.params, "averaged": averaged}
for name, params in both.items():
    print(f"{name}: test accuracy {correct(params, dict(splits.test.features)).mean():.3f}")
assert count == 10
gap = correct(averaged, dict(splits.test.features)).mean() - round.evaluate()["test/accuracy"]
assert abs(gap) < 0.2

# %% [markdown]
# ## What you have learnt, and where next
#
# - `for round in experiment.rounds()` is training; `metrics`, `per_client`, `params`, `state` and
#   `evaluate()` are what you need to decide.
# - `break` ends it, `after=round` goes on.
# - What is assigned to the state is what comes next.
#
# What your loop does not have are summaries, checkpoints and exact resume; `Experiment.run` does.
# Next: [sweeps, comparison, plots](6_sweeps.py). Reference: [in plain Python](../own_loop.md).
