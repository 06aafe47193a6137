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
# # 2 · Your own data
#
# A federated data set is a set of examples, and who has which. This notebook makes one from arrays,
# from a CSV file with a column of users, from an HDF5 file as TensorFlow Federated writes them, and
# from a Hugging Face `Dataset`; partitions examples that belong to nobody; and looks at how different
# the clients are, which is the first thing to know about a federated data set.

# %%
import csv
import io
import tempfile
from pathlib import Path

import datasets
import h5py
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn

from fedexp import data
from fedexp.data import FederatedDataset, FederatedSplits

datasets.disable_progress_bars()
folder = Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)

# %% [markdown]
# ## Arrays, client by client
#
# In memory it is a dict of dicts: client, feature, array. The first axis is that of the examples;
# classification wants features `x` and `y`. Here are twelve users of a sensor, each with a preferred
# activity out of four:

# %%
centres = rng.normal(size=(4, 6))


def measure(labels: np.ndarray) -> np.ndarray:
    """Six readings of a sensor during each of these activities, (n, 6)."""
    return rng.normal(centres[labels], 0.7).astype(np.float32)


clients = {}
for number in range(12):
    odds = np.where(np.arange(4) == number % 4, 0.7, 0.1)
    labels = rng.choice(4, size=rng.integers(40, 120), p=odds).astype(np.int32)
    clients[f"user {number}"] = {"x": measure(labels), "y": labels}

users = FederatedDataset.from_clients(clients)
print(users.num_clients, "clients,", users.num_examples, "examples, sizes", users.client_sizes)
assert users.num_clients == 12

# %% [markdown]
# Training needs two splits. `split_examples` takes a part of every client's examples:

# %%
splits = FederatedSplits(*users.split_examples(0.8))
assert abs(splits.test.num_examples / users.num_examples - 0.2) < 0.02
assert list(splits.train.client_ids) == list(splits.test.client_ids)

# %% [markdown]
# ## How different are the clients?
#
# `fedexp inspect --gin_file=... --picture=clients.png` draws this picture for any experiment before
# it is run. Here we call what it calls:

# %%
from fedexp.inspection.picture import draw
from fedexp.inspection.splits import census, heterogeneity, heterogeneity_by_chance


def show(dataset: FederatedDataset) -> None:
    """The picture of `fedexp inspect`."""
    _, axes = plt.subplots(figsize=(13, 6), layout="constrained")
    axes.imshow(plt.imread(io.BytesIO(draw(census(dataset)))))
    axes.set_axis_off()


show(splits.train)

# %% [markdown]
# Each column is a client. *Heterogeneity*, in the title, is the part of a client's examples that
# would have to change their label for it to be like the whole, on average over clients. Small clients
# differ by chance alone, so there is a second number: what it would be if all clients drew from the
# same labels. Ours is well above.

# %%
counts = census(splits.train).counts
print(f"{heterogeneity(counts):.3f}, by chance {heterogeneity_by_chance(counts):.3f}")
assert heterogeneity(counts) > 3 * heterogeneity_by_chance(counts)

# %% [markdown]
# ## Examples that belong to nobody
#
# Benchmarks such as CIFAR have no clients. A *partitioner* gives rows to clients; `iid` at random,
# `dirichlet` with label skew, that is stronger the smaller alpha is (Hsu et al. 2019). There are
# [more](../data.md#partitioners).

# %%
y = rng.integers(0, 4, size=4000).astype(np.int32)
pooled = {"x": measure(y), "y": y}
found = {}
for name, partition in {
    "iid": data.iid(20),
    "dirichlet, alpha 10": data.dirichlet(20, alpha=10.0),
    "dirichlet, alpha 1": data.dirichlet(20, alpha=1.0),
    "two shards each": data.shards(20, 2),
}.items():
    dataset = data.from_arrays(pooled, partition)
    found[name] = heterogeneity(census(dataset).counts)
    print(f"{name:22} heterogeneity {found[name]:.2f}, sizes {set(dataset.client_sizes.tolist())}")

assert found["iid"] < 0.1 < found["dirichlet, alpha 10"] < found["dirichlet, alpha 1"]
show(data.from_arrays(pooled, data.dirichlet(20, alpha=1.0)))

# %% [markdown]
# A partitioner is a function from the features to a list of rows, one array a client, so your own is
# a few lines. This one sorts by the first sensor, so that it is the features that differ:


# %%
def by_first_reading(features):
    return np.array_split(np.argsort(features["x"][:, 0]), 20)


skewed = data.from_arrays(pooled, by_first_reading)
means = [examples["x"][:, 0].mean() for _, examples in skewed.clients()]
assert (np.diff(means) > 0).all()

# %% [markdown]
# ## A CSV file with a column of users
#
# This needs no code at all in a gin file:
#
#     train.dataset = @csv()
#     csv.path = 'sensor.csv'
#     csv.client = 'user'
#     csv.features = {'x': '*', 'y': 'activity'}
#
# `'*'` are all columns that nothing else names. In Python it is the same function:

# %%
with open(folder / "sensor.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["user", *(f"reading {i}" for i in range(6)), "activity"])
    for user, examples in users.clients():
        for x, label in zip(examples["x"], examples["y"], strict=True):
            writer.writerow([user, *x.tolist(), label])

columns = {"x": "*", "y": "activity"}
from_csv = data.csv(str(folder / "sensor.csv"), columns, client="user", test_fraction=0.2)
assert from_csv.train.num_examples + from_csv.test.num_examples == users.num_examples
assert set(from_csv.train.client_ids) == set(clients)

# %% [markdown]
# What does not fit is one line that says where:

# %%
from fedexp.errors import UserError

try:
    data.csv(str(folder / "sensor.csv"), {"x": "*", "y": "activty"}, client="user")
except UserError as error:
    print(str(error).splitlines()[0])
else:
    raise AssertionError("there is no column of this name")

# %% [markdown]
# ## HDF5, as TensorFlow Federated has it
#
# In TFF's layout an array is at `examples/<client>/<feature>`. Say what to read: source, shape of one
# example, dtype, and, if it is to be stored otherwise, a function. Pixels that TFF keeps as float32
# are best kept as uint8, a quarter of the size.

# %%
from fedexp.data import tff_hdf5
from fedexp.data.features import Feature

for part in ("train", "test"):
    with h5py.File(folder / f"{part}.h5", "w") as file:
        for client in ("ada", "bob", "cem"):
            group = file.create_group(f"examples/{client}")
            group["pixels"] = rng.uniform(size=(9, 28, 28)).astype(np.float32)
            group["label"] = rng.integers(0, 10, size=9)

wanted = {
    "x": Feature("pixels", (28, 28), np.float32, lambda p: np.rint(255 * p).astype(np.uint8)),
    "y": Feature("label", (), np.integer, lambda labels: labels.astype(np.int32)),
}
from_hdf5 = FederatedSplits(*(tff_hdf5.read(folder / f"{p}.h5", wanted) for p in ("train", "test")))
assert list(from_hdf5.train.client_ids) == ["ada", "bob", "cem"]
assert from_hdf5.train.features["x"].dtype == np.uint8

# %% [markdown]
# (For TFF's published files there are readers ready made: `emnist`, `cifar100`, `shakespeare`,
# `stackoverflow_nwp`. `leaf` reads LEAF's JSON, `parquet`, `tfrecord` and others what their names
# say.)
#
# ## A Hugging Face data set
#
# Give `huggingface` a folder on the disk, or a `Dataset` that you have. With a column of clients:

# %%
rows = [
    {"user": user, "x": x, "y": int(label)}
    for user, examples in users.clients()
    for x, label in zip(examples["x"].tolist(), examples["y"], strict=True)
]
hub = datasets.Dataset.from_list(rows)
columns = {"x": ("x", (6,), "float32"), "y": "y"}
from_hub = data.huggingface(hub, columns, client="user", test_split=None, test_fraction=0.2)
assert set(from_hub.train.client_ids) == set(clients)

# %% [markdown]
# Or without, and a partitioner in its place; here from a folder that `save_to_disk` has written,
# which is what a gin file would name. A partitioner divides every split on its own, so that client 0
# of a separate test split (`test_split`, or `test_path` of a CSV file) has other labels than client 0
# of the training, and numbers of each client or of personal models mean nothing there; with
# `test_fraction` they do:

# %%
hub.save_to_disk(str(folder / "hub"))
partitioned = data.huggingface(
    str(folder / "hub"), columns, partition=data.dirichlet(10, alpha=0.3), test_split=None
)
assert partitioned.train.num_clients == 10

# %% [markdown]
# ## They all train
#
# Whatever it came from, a data set is the same to what follows:

# %%
from fedexp.algorithms import fedavg
from fedexp.tasks import classification
from fedexp.trainer import Experiment

task = classification(nn.Dense(4), 4)
experiment = Experiment(
    from_csv,
    task,
    fedavg(task, client_optimizer=optax.sgd(0.1), server_optimizer=optax.sgd(1.0)),
    num_rounds=20,
    sampler=data.uniform(5),
    observers=[],
)
accuracy = experiment.run().metrics["test/accuracy"]
print(f"test accuracy {accuracy:.1%}")
assert accuracy > 0.7

# %% [markdown]
# ## What you have learnt, and where next
#
# - A federated data set is `{client: {feature: array}}`; CSV, HDF5, Hugging Face and others are read
#   into the same thing.
# - Partitioners make clients of examples that have none.
# - Look at the picture, and compare heterogeneity with what chance gives, before you train.
#
# Next: [your own model and task](3_own_model.py). Everything on data is in [data](../data.md), the
# picture in [inspect](../inspect.md).
