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
# # 6 · Sweep, compare, plot
#
# A result is more than one run: several learning rates, several seeds, and a picture with error bars.
# This notebook sweeps two learning rates of FedAdam on generated handwriting, compares the runs, and
# draws what a paper would show.

# %%
import csv
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

folder = Path(tempfile.mkdtemp())


def fedexp(*arguments: str) -> str:
    """What the command `fedexp` prints in our folder, by the Python that runs this notebook."""
    command = [sys.executable, "-m", "fedexp", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# %% [markdown]
# ## An experiment, and what varies in it
#
# The experiment is a gin file that starts from a shipped one. The sweep is a second gin file, of
# axes: a binding each, and its values. All combinations are tried, each with as many seeds as you
# say.

# %%
(folder / "experiment.gin").write_text("""
include 'glyphs_logistic.gin'
glyphs.num_writers = 60
train.num_rounds = 20
evaluate.every = 5
fedavg.server_optimizer = @server/adam()
server/adam.eps = 1e-3
CheckpointPlan.every = 0
""")
_ = (folder / "sweep.gin").write_text("""
sweep.axes = [@client/axis(), @server/axis()]
sweep.metric = 'test/accuracy'
sweep.direction = 'maximize'
sweep.seeds = 2

client/axis.binding = 'client/sgd.learning_rate'
client/axis.values = [0.01, 0.1]

server/axis.binding = 'server/adam.learning_rate'
server/axis.values = [0.001, 0.03]
""")

# %% [markdown]
# Two times two points with two seeds are eight runs. They differ in numbers only, so
# `--vmap_trials=8` can put them into one compiled program, each with the result that it has alone.
# (`--workers=2` would run two at a time instead, whatever they differ in.) In a terminal this is
#
#     fedexp sweep --gin_file=experiment.gin --sweep=sweep.gin --workdir=runs/sweep --vmap_trials=8

# %%
sweep = "sweep --gin_file=experiment.gin --sweep=sweep.gin --workdir=runs/sweep --vmap_trials=8"
print(fedexp(*sweep.split()))
runs = folder / "runs" / "sweep"

# %% [markdown]
# A line is a point, with the mean over seeds and its 95 % interval, which two seeds make very wide;
# take three to five. Killed and started again, a sweep does what is left. Its results are in
# `sweep.csv`, and each trial's folder is an ordinary workdir:

# %%
with open(runs / "sweep.csv") as file:
    trials = list(csv.DictReader(file))
print(list(trials[0]))
means = {}
for trial in trials:
    rates = (
        float(trial["client/sgd.learning_rate"]),
        float(trial["server/adam.learning_rate"]),
    )
    means[rates] = float(trial["mean"])
assert len(means) == 4
best = max(means, key=means.get)
print("best", best, f"{means[best]:.3f}")

# %% [markdown]
# With Adam on the server its rate is what matters: a client's updates are rescaled, and the small
# rate takes twenty steps that are too short.

# %%
assert best[1] == 0.03
assert means[best] > max(means[client, 0.001] for client in (0.01, 0.1)) + 0.05

# %% [markdown]
# ## Comparing
#
# `fedexp compare` takes any workdirs, or folders of them, finds the bindings in which they differ,
# and groups what differs in the seed alone.

# %%
wanted = "--metrics=test/accuracy,test/loss --sort=test/accuracy --csv=runs.csv"
print(fedexp("compare", "runs/sweep/trials", *wanted.split()))
with open(folder / "runs.csv") as file:
    table = list(csv.DictReader(file))
assert len(table) == 8
in_order = [float(row["test/accuracy"]) for row in table]
assert in_order == sorted(in_order, reverse=True)

# %% [markdown]
# With `--html=report.html` (and `pip install 'fedexp[report]'`) it writes a page of curves, heat maps
# and tables to look around in.
#
# ## Plots
#
# For a picture in a minute there is `fedexp plots runs/sweep/trials --out=plot.pdf`, a curve for each
# setting with a band over its seeds, also against bits, simulated seconds or epsilon. In Python:

# %%
from fedexp import plots

curves = plots.curves([str(runs / "trials")], "bits_up", "test/accuracy")
_, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
axes.imshow(plt.imread(io.BytesIO(plots.draw(curves, "bits_up", "test/accuracy"))))
axes.set_axis_off()
assert len(curves) == 4

# %% [markdown]
# For a paper you will want your own. `fedexp.runs` reads workdirs, and puts runs together that differ
# in their seeds alone: a *setting* has curves of the mean, the least and the greatest.

# %%
from fedexp import runs as finished

read = [finished.read(path) for path in finished.found_in(str(runs / "trials"))]
settings = finished.settings(read)
assert len(read) == 8 and len(settings) == 4

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for setting in settings:
    curve = setting.curve("round", "test/accuracy")
    (line,) = axes.plot(curve.x, curve.mean, marker=".", label=setting.label)
    axes.fill_between(curve.x, curve.low, curve.high, alpha=0.2, color=line.get_color())
axes.set(xlabel="rounds", ylabel="test accuracy")
axes.legend(fontsize=8)
figure.savefig(folder / "figure.pdf")

# %% [markdown]
# And the grid of two rates, as in Reddi et al. (2021), which shows how far from the best one may be:

# %%
clients, servers = (sorted({rates[i] for rates in means}) for i in (0, 1))
grid = np.array([[means[c, s] for s in servers] for c in clients])
figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
image = axes.imshow(grid, cmap="viridis", origin="lower")
axes.set_xticks(range(len(servers)), [f"{s:g}" for s in servers])
axes.set_yticks(range(len(clients)), [f"{c:g}" for c in clients])
axes.set(xlabel="server's rate", ylabel="clients' rate")
figure.colorbar(image, label="test accuracy, mean of two seeds")
assert grid.shape == (2, 2) and np.isclose(grid.max(), means[best])

# %% [markdown]
# ## What you have learnt, and where next
#
# - A sweep is a gin file of axes; it is resumed as a run is, and its trials are ordinary workdirs.
# - `compare`, `plots` and `fedexp.runs` read any of them.
#
# You have seen all of it: data, model, algorithm, loop, sweep. From here: [sweeps](../sweeps.md) with
# studies of Optuna and clusters, [results](../results.md) with TensorBoard, Weights & Biases and
# MLflow, and the [questions](../faq.md). To begin again: [a first experiment](1_first_experiment.py).
