"""Who the clients of a split are, and what they have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binom

from fedexp.data import FederatedDataset
from fedexp.errors import UserError

# Of larger splits the values of so many clients are looked at: there may be millions, on a disk.
_MOST_CLIENTS = 4096
_MOST_CLASSES = 256
_LABEL = "y"


class Feature(NamedTuple):
    """A feature of examples: its name, shape and dtype, and the smallest and largest value seen."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    low: Any
    high: Any


class Census(NamedTuple):
    """A split, looked at.

    Attributes:
      client_ids: (num_clients,) str.
      sizes: (num_clients,) int64, examples of each client.
      looked_at: (n,) int64, the clients whose values have been read: all, or some drawn at random.
      features: of examples.
      nbytes: of all clients.
      label: the feature that holds classes, or None.
      counts: (n, num_classes) int64, examples of the clients looked at, by class; None without a label.
    """

    client_ids: np.ndarray
    sizes: np.ndarray
    looked_at: np.ndarray
    features: list[Feature]
    nbytes: int
    label: str | None
    counts: np.ndarray | None


def census(
    dataset: FederatedDataset, label: str | None = None, num_classes: int | None = None
) -> Census:
    """Looks at a split, of which no more is in memory at a time than a client.

    Args:
      dataset: the split.
      label: a feature (num_examples,) of integers from 0 to 255; if None, 'y' where that is one.
      num_classes: those that there are, if more than occur.

    Raises:
      UserError: the named feature is no such label.
    """
    clients = np.arange(dataset.num_clients)
    if len(clients) > _MOST_CLIENTS:
        rng = np.random.default_rng(0)
        clients = np.sort(rng.choice(len(clients), _MOST_CLIENTS, replace=False))
    dataset.prefetch(clients)
    features = []
    for name, array in dataset.features.items():
        filled = [values for values in _by_client(dataset, clients, name) if values.size]
        low = min((values.min() for values in filled), default=None)
        high = max((values.max() for values in filled), default=None)
        features.append(Feature(name, array.shape[1:], array.dtype, low, high))
    found = next((f for f in features if f.name == (label or _LABEL)), None)
    is_label = (
        found is not None
        and found.shape == ()
        and found.dtype.kind in "iub"
        and found.low >= 0
        and found.high < _MOST_CLASSES
    )
    if label is not None and not is_label:
        raise UserError(
            f"--label={label} must name a feature of one integer an example, from 0 to "
            f"{_MOST_CLASSES - 1}; there are {_listed(features)}"
        )
    counts = None
    if found is not None and is_label:
        classes = max(int(found.high) + 1, num_classes or 0)
        of_clients = _by_client(dataset, clients, found.name)
        counts = np.stack([np.bincount(y.astype(int), minlength=classes) for y in of_clients])
    return Census(
        client_ids=dataset.client_ids,
        sizes=dataset.client_sizes,
        looked_at=clients,
        features=features,
        nbytes=dataset.nbytes,
        label=found.name if found is not None and is_label else None,
        counts=counts,
    )


def heterogeneity(counts: np.ndarray) -> float:
    """How far clients' label distributions are from the pooled one: the mean of their total variations.

    A client's is half the sum over classes of |its share - the pooled share|: the part of its examples that
    would have to change class. 0 if all clients are alike; near 1 if each has a rare class of its own.

    Args:
      counts: (n, num_classes), examples of clients by class.
    """
    distances = np.abs(counts / counts.sum(1, keepdims=True) - _pooled(counts)).sum(1) / 2
    return float(distances.mean())


def heterogeneity_by_chance(counts: np.ndarray) -> float:
    """What `heterogeneity` is expected to be if these clients drew their labels from the pooled distribution.

    Small clients are far from it by chance alone. By de Moivre's mean absolute deviation of a binomial
    number, E|X - np| = 2 k (1 - p) P(X = k) with k = floor(np) + 1 (Diaconis and Zabell 1991).
    """
    n, p = counts.sum(1, keepdims=True), _pooled(counts)
    k = np.floor(n * p) + 1
    deviations = 2 * k * (1 - p) * binom.pmf(k, n, p)
    return float((deviations / n).sum(1).mean() / 2)


def _pooled(counts: np.ndarray) -> np.ndarray:
    return counts.sum(0) / counts.sum()


def _by_client(dataset: FederatedDataset, clients: np.ndarray, name: str) -> Iterator[np.ndarray]:
    array, offsets = dataset.features[name], dataset.offsets
    return (array[offsets[client] : offsets[client + 1]] for client in clients)


def _listed(features: list[Feature]) -> str:
    return ", ".join(
        f"{one.name} ({one.dtype}{list(one.shape)}, {one.low} to {one.high})" for one in features
    )
