"""Data that replications share: MNIST, its partition by FedProx, and clients that are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gin
import numpy as np

from fedexp.data import FederatedDataset, FederatedSplits
from fedexp.data.emnist import emnist
from fedexp.data.partition import Partitioner, from_arrays
from fedexp.errors import check

Digits = dict[str, np.ndarray]


@gin.configurable
def mnist(path: str, partition: Partitioner, test_fraction: float | None = None) -> FederatedSplits:
    """MNIST's 60,000 training digits given to clients, and its 10,000 test digits as one client.

    Features: x (28, 28) uint8, 0 is the background; y int32.

    Args:
      path: Keras's mnist.npz, with x_train, y_train, x_test and y_test; or a folder of all 70,000 digits by
        their writers in TFF's HDF5 layout, the writers' ids beginning with 'train60k' or 'test10k'.
      partition: a partitioner.
      test_fraction: give all 70,000 to the clients, and take this of every client's for the test.

    Raises:
      UserError: no such file.
    """
    train, test = _by_writer(path) if Path(path).is_dir() else _from_npz(path)
    if test_fraction is not None:
        both = {name: np.concatenate([train[name], test[name]]) for name in train}
        return FederatedSplits(*from_arrays(both, partition).split_examples(1 - test_fraction))
    whole = FederatedDataset(test, np.array([0, len(test["y"])]), np.array(["test"]))
    return FederatedSplits(from_arrays(train, partition), whole)


def _from_npz(path: str) -> tuple[Digits, Digits]:
    check(Path(path).is_file(), f"mnist.path: no file {path}; it must be Keras's mnist.npz")
    with np.load(path) as file:
        train, test = (
            {"x": file[f"x_{part}"], "y": file[f"y_{part}"].astype(np.int32)}
            for part in ("train", "test")
        )
    return train, test


def _by_writer(path: str) -> tuple[Digits, Digits]:
    parts = emnist(only_digits=True, data_dir=path).present().values()
    is_train = np.concatenate(
        [np.char.startswith(part.client_ids, "train60k")[part.client_of_example] for part in parts]
    )
    x = 255 - np.concatenate([part.features["x"] for part in parts])
    y = np.concatenate([part.features["y"] for part in parts])
    return {"x": x[is_train], "y": y[is_train]}, {"x": x[~is_train], "y": y[~is_train]}


@gin.configurable
def two_labels(
    num_clients: int = 1000, sigma: float = 2.0, least: int = 5, seed: int = 0
) -> Partitioner:
    """Clients of two labels each, k mod 10 and the next, in heavy-tailed numbers.

    So does FedProx's code (Li et al. 2020, arXiv:1812.06127) give MNIST to 1000 clients: `least` examples of
    each of the two labels, and of what is left a share that is proportional to exp(sigma z).

    Args:
      num_clients: how many clients, a multiple of ten.
      sigma: standard deviation of the shares' logarithms.
      least: examples of either label that a client has at least.
      seed: of all draws.
    """

    def partition(features: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        rng, given = np.random.default_rng(seed), [[] for _ in range(num_clients)]
        for label in range(10):
            owners = [k for k in range(num_clients) if label in (k % 10, (k + 1) % 10)]
            rows = rng.permutation(np.flatnonzero(features["y"] == label))
            weights = rng.lognormal(0, sigma, len(owners))
            spare = len(rows) - least * len(owners)
            sizes = least + (spare * weights / weights.sum()).astype(int)
            for owner, mine in zip(owners, np.split(rows, sizes.cumsum())[:-1], strict=True):
                given[owner].append(mine)
        return [np.concatenate(parts) for parts in given]

    return partition


@gin.configurable
def similarity(num_clients: int = 100, share: float = 0.0, seed: int = 0) -> Partitioner:
    """Label skew by degrees, as SCAFFOLD's experiments have it (Karimireddy et al. 2020, arXiv:1910.06378).

    Of every client's examples `share` are any, the others those that follow when the rest is sorted by label.

    Args:
      num_clients: how many clients, of the same size but for one example.
      share: from 0, most clients having one label, to 1, IID.
      seed: of all draws.
    """

    def partition(features: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        order = np.random.default_rng(seed).permutation(len(features["y"]))
        anyone, rest = np.split(order, [round(share * len(order))])
        by_label = rest[np.argsort(features["y"][rest], kind="stable")]
        halves = (np.array_split(anyone, num_clients), np.array_split(by_label, num_clients)[::-1])
        return [np.concatenate(parts) for parts in zip(*halves, strict=True)]

    return partition


@gin.configurable
def merged(splits: FederatedSplits, clients: Sequence[str] | None = None) -> FederatedSplits:
    """The training examples of several clients as those of one, for training without a federation.

    The test stays as it is.

    Args:
      splits: the data set.
      clients: whose examples; all if None.
    """
    train = splits.train
    if clients is not None:
        train = train.select_clients(np.flatnonzero(np.isin(train.client_ids, clients)))
    one = FederatedDataset(train.features, np.array([0, train.num_examples]), np.array(["merged"]))
    return splits._replace(train=one)
