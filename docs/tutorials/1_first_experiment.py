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
# # 1 · A first experiment
#
# You know what federated averaging is, and want to see it run. This notebook trains a model on the
# handwriting of 60 writers, first from a gin file, as most experiments are run, then from Python.
# Nothing is downloaded: the data set `glyphs` is drawn by fedexp itself.

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optax

# A folder for what the runs leave; in your own work it would be something like Path("runs").
runs = Path(tempfile.mkdtemp())

# %% [markdown]
# ## From a gin file
#
# A gin file is one experiment: it *binds* a data set, a model, an algorithm and their numbers. fedexp
# ships about a hundred of them, and any binding can be overridden on the command line. In a terminal
# the next cell is
#
#     fedexp --gin_file=glyphs_logistic.gin --workdir=runs/first \
#         --gin_param='glyphs.num_writers = 60' --gin_param='train.num_rounds = 40' ...
#
# that is: logistic regression, but for 60 writers and 40 rounds, evaluated every 10.


# %%
def fedexp(*arguments: str) -> subprocess.CompletedProcess:
    """The command `fedexp`, by the Python that runs this notebook."""
    command = [sys.executable, "-m", "fedexp.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


first = runs / "first"
bindings = [
    "glyphs.num_writers = 60",
    "train.num_rounds = 40",
    "evaluate.every = 10",
    "train.observers = [@tensorboard(), @progress(), @json_lines()]",
]
given = [f"--gin_param={binding}" for binding in bindings]
done = fedexp("--gin_file=glyphs_logistic.gin", f"--workdir={first}", *given)
assert done.returncode == 0, done.stderr
print(done.stdout)

# %% [markdown]
# The table has a row for every evaluation. With 62 classes, chance is below 2 %, so the model has
# learnt a lot, although each round saw only ten writers.
#
# A mistake costs no time: before anything is built, all names are looked at.

# %%
mistaken = fedexp("--gin_file=glyphs_logistic.gin", "--gin_param=client/sgd.learing_rate = 0.1")
print(mistaken.stderr)
assert mistaken.returncode == 2
assert "Did you mean 'learning_rate'?" in mistaken.stderr

# %% [markdown]
# ## What a workdir has

# %%
for path in sorted(first.iterdir()):
    print(path.name)
assert {"config.gin", "operative_config.gin", "final.json", "rounds.jsonl"} <= set(
    path.name for path in first.iterdir()
)

# %% [markdown]
# - `config.gin` are your bindings, and `operative_config.gin` is everything that was in force:
#   whoever has that file has the experiment.
# - `final.json` are the evaluations; `rounds.jsonl`, because we asked for `@json_lines()`, has a line
#   a round.
# - The `events` file is for `tensorboard --logdir runs`, `checkpoints` for going on: the same command
#   on the same workdir continues a run that was stopped or killed, bit for bit, and tells you the
#   result if it was finished.

# %%
print((first / "operative_config.gin").read_text()[:800], "...")

# %% [markdown]
# ## Its metrics
#
# Names are `<where>/<what>`: `test/...` is an evaluation of the test split, `train/...` what the
# cohort measured while it trained, `traffic/...` the bits that were sent.

# %%
final = json.loads((first / "final.json").read_text())
last = final["history"][-1]
for name, value in last.items():
    print(f"{name:32} {value:.4g}")
assert 0.25 < last["test/accuracy"] < 0.7

# %% [markdown]
# Every client sends and is told a float32 for each of the model's 28 · 28 · 62 + 62 parameters, ten
# clients a round:

# %%
parameters = 28 * 28 * 62 + 62
assert np.isclose(last["traffic/total_bits_up"], 40 * 10 * 32 * parameters)

# %% [markdown]
# And a plot, of the cohorts' loss in every round and the test loss where it was measured:

# %%
lines = [json.loads(line) for line in (first / "rounds.jsonl").read_text().splitlines()]
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name in ("train/loss", "test/loss"):
    points = sorted({line["round"]: line[name] for line in lines if name in line}.items())
    axes.plot(*zip(*points, strict=True), marker="." if name == "test/loss" else None, label=name)
axes.set(xlabel="round", ylabel="cross-entropy")
axes.legend()
plt.show()

# %%
losses = list({line["round"]: line["train/loss"] for line in lines}.values())
assert len(losses) == 40
assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])

# %% [markdown]
# (`fedexp.plots` draws such pictures of many runs from the command line; part 6 does.)
#
# ## The same from Python
#
# All that Gin builds you can build yourself. An `Experiment` is a data set, a task, an algorithm, and
# how clients are sampled and batched:

# %%
from fedexp.algorithms import fedavg
from fedexp.data import ClientBatching, glyphs, uniform
from fedexp.evaluation import Evaluate
from fedexp.models import EmnistLogistic
from fedexp.tasks import classification, handwriting
from fedexp.trainer import Experiment

task = classification(EmnistLogistic(62), 62, preprocess=handwriting)
experiment = Experiment(
    glyphs(num_writers=60),
    task,
    fedavg(task, client_optimizer=optax.sgd(0.1), server_optimizer=optax.sgd(1.0)),
    num_rounds=40,
    sampler=uniform(10),
    batching=ClientBatching(batch_size=20),
    evaluations=[Evaluate(every=10)],
    observers=[],  # Nobody is told: no bar, no TensorBoard.
)
result = experiment.run()
for row in result.history:
    print(f"round {row['round']:3.0f}  test accuracy {row['test/accuracy']:.3f}")

# %% [markdown]
# If these numbers look familiar: it is the same experiment, with the same seed, so the same writers
# are sampled, in the same order, and the model starts from the same parameters.

# %%
assert abs(result.metrics["test/accuracy"] - last["test/accuracy"]) < 0.01

# %% [markdown]
# ## What you have learnt, and where next
#
# - One gin file is one experiment; `--gin_param` changes anything in it, and mistakes are told before
#   work begins.
# - A workdir has all that is needed to look at a run, repeat it, and go on with it.
# - An `Experiment` in Python is the same thing.
#
# Next: [your own data](2_own_data.py). All gin files are in the table of
# [experiments](../experiments.md).
