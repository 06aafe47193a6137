"""Federated data sets from ordinary ones: arrays, and a partitioner that gives examples to clients.

    train.dataset = @arrays()
    arrays.path = 'cifar10.npz'
    arrays.partition = @dirichlet()
    dirichlet.num_clients = 100
    dirichlet.alpha = 0.3

A partitioner is a function of the features: it returns the rows of every client. It is deterministic
in its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import gin
import numpy as np

from fedexp.data import features as features_lib
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.errors import UserError

# (features: name -> (num_examples, ...)) -> for every client its rows, (n_i,) of integers.
Partitioner = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
# Of draws that leave some client with too few examples.
_ATTEMPTS = 1000


def from_arrays(features: Mapping[str, np.ndarray], partition: Partitioner) -> FederatedDataset:
    """Gives the rows of `features` to clients "0", "1", ...

    Args:
      features: name -> (num_examples, ...), in storage dtype.
      partition: which rows a client has. Rows that it gives to nobody are left out.

    Raises:
      UserError: features of different lengths, a row that two clients would have, a client without
        rows, or what `partition` refuses.
    """
    arrays_ = {name: np.asarray(array) for name, array in features.items()}
    shapes = {name: array.shape for name, array in arrays_.items()}
    if len({shape[:1] for shape in shapes.values()}) != 1 or () in shapes.values():
        raise UserError(f"features must have one row an example each, their shapes are {shapes}")
    rows_of = partition(arrays_)
    rows = np.concatenate(rows_of) if rows_of else np.zeros(0, np.int64)
    if len(np.unique(rows)) != len(rows):
        raise UserError("the partition gives an example to a client twice, or to two clients")
    return FederatedDataset(
        {name: array[rows] for name, array in arrays_.items()},
        np.cumsum([0, *map(len, rows_of)]),
        np.arange(len(rows_of)).astype(np.str_),
    )


def by_client(features: Mapping[str, np.ndarray], clients: np.ndarray) -> FederatedDataset:
    """Gives every row to the client that `clients` names, in ascending order of their ids.

    Args:
      features: name -> (num_examples, ...), in storage dtype.
      clients: (num_examples,) str, or what becomes str, as integers do.

    Raises:
      UserError: no rows, or features and clients of different lengths.
    """
    ids, client_of, sizes = np.unique(
        np.asarray(clients).astype(np.str_), return_inverse=True, return_counts=True
    )
    for name, array in features.items():
        if len(array) != len(client_of):
            raise UserError(
                f"feature {name!r} has {len(array)} rows for {len(client_of)} clients' names"
            )
    order = np.argsort(client_of, kind="stable")
    return FederatedDataset(
        {name: np.asarray(array)[order] for name, array in features.items()},
        np.cumsum([0, *sizes]),
        ids,
    )


@gin.configurable
def arrays(
    path: str,
    partition: Partitioner | None = None,
    test_path: str | None = None,
    test_partition: Partitioner | None = None,
    test_fraction: float = 0.1,
    client: str | None = None,
) -> FederatedSplits:
    """A federated data set from .npz files: every array in a file is a feature.

    Give a partition, or the name of the array that says whose each example is.

    Args:
      path: .npz file, its arrays having one row an example each.
      partition: a partitioner, as @iid() or @dirichlet().
      test_path: .npz file of the test partition. None takes a part of every client's examples, so
        that a client has the same distribution in both; a client of a single example then is in the
        training partition only.
      test_partition: partitioner of `test_path`; None is `partition`.
      test_fraction: the part, where there is no `test_path`.
      client: the array with clients' names, (num_examples,) of text or integers, which is no feature.

    Raises:
      UserError: no such file, not an .npz file of numbers, or what `from_arrays` refuses.
    """
    if (client is None) == (partition is None):
        raise UserError(
            "arrays needs one of `client`, the array that says whose an example is, and `partition`, which "
            "gives examples to clients, as @dirichlet()"
        )
    train = _federated(path, client, partition)
    if test_path is None:
        return FederatedSplits(*train.split_examples(1 - test_fraction))
    return FederatedSplits(train, _federated(test_path, client, test_partition or partition))


def _federated(path: str, client: str | None, partition: Partitioner | None) -> FederatedDataset:
    features = _load(path)
    if partition is not None:
        return from_arrays(features, partition)
    if client not in features or features[client].ndim != 1:
        raise UserError(
            f"arrays.client: {path} has no array {client!r} of one name an example; there are "
            f"{sorted(features)}"
        )
    return by_client(features, features.pop(client))


def _load(path: str) -> dict[str, np.ndarray]:
    file = features_lib.existing(path)
    try:
        with np.load(file) as content:
            return dict(content)
    except Exception as error:  # Damaged files make NumPy and zipfile raise nearly anything.
        raise UserError(
            f"{file} is not an .npz file of numbers, or is damaged ({type(error).__name__}: {error})"
        ) from error


@gin.configurable
def iid(num_clients: int, seed: int = 0) -> Partitioner:
    """Deals all examples out at random; sizes differ by one at most.

    Args:
      num_clients: at most as many as there are examples.
      seed: of the order.
    """
    _check_counts(num_clients=num_clients)

    def partition(features: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        num_examples = len(next(iter(features.values())))
        _check_enough(num_examples, num_clients)
        order = np.random.default_rng(seed).permutation(num_examples)
        return np.array_split(order, num_clients)

    return partition


@gin.configurable
def power_law(
    num_clients: int, sigma: float = 2.0, min_examples: int = 1, seed: int = 0
) -> Partitioner:
    """Quantity skew: examples at random, and clients' sizes as heavy-tailed as FedProx has them.

    Beyond `min_examples`, which every client is given, sizes are proportional to exp(sigma z_k) with normal
    z_k: so does the code of FedProx (Li et al. 2020, arXiv:1812.06127) draw its power law. All examples are
    used.

    Args:
      num_clients: how many clients.
      sigma: standard deviation of the sizes' logarithms, 2 in FedProx; 0 is `iid`.
      min_examples: what every client has at least.
      seed: of sizes and of who is given what.
    """
    _check_counts(num_clients=num_clients, min_examples=min_examples)
    if not 0 <= sigma < np.inf:
        raise UserError(f"power_law.sigma must be 0 or above, and finite, got {sigma}")

    def partition(features: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        num_examples, rng = len(next(iter(features.values()))), np.random.default_rng(seed)
        spare = num_examples - num_clients * min_examples
        _check_enough(num_examples, num_examples - spare, "examples")
        logarithms = sigma * rng.normal(size=num_clients)
        weights = np.exp(logarithms - logarithms.max())
        ends = np.rint(spare * weights.cumsum() / weights.sum()).astype(int)
        ends += min_examples * np.arange(1, num_clients + 1)
        return np.split(rng.permutation(num_examples), ends[:-1])

    return partition


@gin.configurable
def quantiles(num_clients: int, feature: str = "x", entry: int = 0, seed: int = 0) -> Partitioner:
    """Feature skew: examples in the order of a number, cut into clients of equal size.

    The first client has the least values, as the youngest patients, the last the greatest. All examples are
    used; sizes differ by one at most.

    Args:
      num_clients: how many clients.
      feature: the feature to sort by.
      entry: which of its numbers, counted through all its axes, where an example has several.
      seed: of the order among equal values.
    """
    _check_counts(num_clients=num_clients)

    def partition(features: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        values = _feature(features, feature).reshape(len(features[feature]), -1)
        _check_enough(len(values), num_clients)
        if not 0 <= entry < values.shape[1]:
            raise UserError(
                f"quantiles.entry is {entry}, but feature {feature!r} has {values.shape[1]} numbers a row"
            )
        order = np.random.default_rng(seed).permutation(len(values))
        order = order[np.argsort(values[order, entry], kind="stable")]
        return np.array_split(order, num_clients)

    return partition


@gin.configurable
def shards(
    num_clients: int, shards_per_client: int = 2, label: str = "y", seed: int = 0
) -> Partitioner:
    """The pathological partition of McMahan et al. 2017 (arXiv:1602.05629, section 3).

    Examples, sorted by label, are cut into num_clients x shards_per_client shards, and every client
    is given shards at random. With 2 most clients have two labels. All examples are used; shards'
    sizes differ by one at most.

    Args:
      num_clients: how many clients.
      shards_per_client: how many shards each is given.
      label: the feature to sort by, one integer an example.
      seed: of the order within a label, and of who is given what.
    """
    _check_counts(num_clients=num_clients, shards_per_client=shards_per_client)

    def partition(features: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        labels, rng = _labels(features, label), np.random.default_rng(seed)
        num_shards = num_clients * shards_per_client
        _check_enough(len(labels), num_shards, "shards")
        order = rng.permutation(len(labels))
        shards_ = np.array_split(order[np.argsort(labels[order], kind="stable")], num_shards)
        return [
            np.concatenate([shards_[i] for i in given])
            for given in rng.permutation(num_shards).reshape(num_clients, shards_per_client)
        ]

    return partition


@gin.configurable
def dirichlet(num_clients: int, alpha: float, label: str = "y", seed: int = 0) -> Partitioner:
    """Clients of equal size and Dirichlet distributed labels (Hsu et al. 2019, arXiv:1909.06335).

    Client k draws q_k ~ Dir(alpha p), p being the frequencies of the labels in the data, and then its
    examples' labels from q_k, without replacement: a label that is used up is left out of q_k, which
    is renormalised. q_k has the mean p and the variance p (1 - p) / (alpha + 1): alpha -> infinity is
    IID, alpha -> 0 a single label a client. All examples are used, so the last clients take what is
    left. Sizes differ by one at most, so no client is empty.

    Args:
      num_clients: how many clients.
      alpha: concentration, above 0.
      label: the feature to partition by, one integer an example.
      seed: of all draws.
    """
    _check_counts(num_clients=num_clients)
    _check_concentrations(alpha=alpha)

    def partition(features: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        labels, rng = _labels(features, label), np.random.default_rng(seed)
        _check_enough(len(labels), num_clients)
        stock = _Stock(labels, rng)
        prior = stock.left / len(labels)
        return [
            stock.take(_draw(rng, size, rng.dirichlet(alpha * prior), stock.left))
            for size in _sizes(len(labels), num_clients)
        ]

    return partition


@gin.configurable
def label_dirichlet(
    num_clients: int,
    alpha: float,
    min_examples: int = 10,
    self_balancing: bool = True,
    label: str = "y",
    seed: int = 0,
) -> Partitioner:
    """Every label shared out by a Dirichlet of its own (Yurochkin et al. 2019, arXiv:1905.12022).

    For each label in turn, shares p ~ Dir(alpha, ..., alpha) of its examples go to the clients, so that these
    differ in their labels and in their sizes. As in the authors' code, NIID-Bench's (arXiv:2102.02079) and
    PFLlib's after it, all is drawn anew until no client has fewer than `min_examples`. All examples are used.

    Args:
      num_clients: how many clients.
      alpha: concentration, above 0: the smaller, the fewer clients have most of a label.
      min_examples: what every client has at least.
      self_balancing: a client that has the mean size gets nothing of later labels, as in these codes; False
        for the paper's text.
      label: the feature to partition by, one integer an example.
      seed: of all draws.
    """
    _check_counts(num_clients=num_clients, min_examples=min_examples)
    _check_concentrations(alpha=alpha)

    def partition(features: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        labels, rng = _labels(features, label), np.random.default_rng(seed)
        _check_enough(len(labels), num_clients * min_examples, "examples")
        stock = _Stock(labels, rng)
        for _ in range(_ATTEMPTS):
            counts = _shared_out(rng, stock.left, num_clients, alpha, self_balancing)
            if counts.sum(1).min() >= min_examples:
                return [stock.take(mine) for mine in counts]
        raise UserError(
            f"label_dirichlet: in each of {_ATTEMPTS} draws a client had fewer than {min_examples} examples; "
            "raise alpha, or lower min_examples or num_clients"
        )

    return partition


@gin.configurable
def pachinko(
    num_clients: int,
    examples_per_client: int | None = None,
    root_alpha: float = 0.1,
    leaf_alpha: float = 10.0,
    label: str = "y",
    coarse_label: str = "coarse",
    seed: int = 0,
) -> Partitioner:
    """The Pachinko Allocation Method (Reddi et al. 2021, arXiv:2003.00295, appendix F).

    A client draws a distribution over the coarse labels from a symmetric Dirichlet with root_alpha,
    and for every coarse label one over its fine labels with leaf_alpha. An example's coarse label
    follows the first, its fine label the second, and the example is any with this label, without
    replacement. A label that is used up is left out, and the distribution it was in renormalised.
    Federated CIFAR-100 has 500 clients of 100 training examples, and 100 clients of 100 test examples.

    Args:
      num_clients: how many clients.
      examples_per_client: the size of every client, further examples being left out; None uses all
        examples, with sizes that differ by one at most.
      root_alpha: concentration over coarse labels, above 0.
      leaf_alpha: concentration over the fine labels of a coarse one, above 0.
      label: the feature with the fine label, one integer an example.
      coarse_label: the feature with the coarse label; a fine label has one.
      seed: of all draws.
    """
    _check_counts(num_clients=num_clients)
    _check_concentrations(root_alpha=root_alpha, leaf_alpha=leaf_alpha)
    if examples_per_client is not None:
        _check_counts(examples_per_client=examples_per_client)

    def partition(features: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        labels, rng = _labels(features, label), np.random.default_rng(seed)
        coarse = _labels(features, coarse_label)
        _check_enough(len(labels), num_clients * (examples_per_client or 1), "examples")
        stock = _Stock(labels, rng)
        leaves = _leaves(labels, coarse)
        if examples_per_client is None:
            sizes = _sizes(len(labels), num_clients)
        else:
            sizes = [examples_per_client] * num_clients

        def client(size: int) -> np.ndarray:
            at_root = np.array([stock.left[fine].sum() for fine in leaves])
            root = rng.dirichlet(np.full(len(leaves), root_alpha))
            counts = np.zeros_like(stock.left)
            for fine, count in zip(leaves, _draw(rng, size, root, at_root), strict=True):
                leaf = rng.dirichlet(np.full(len(fine), leaf_alpha))
                counts[fine] = _draw(rng, count, leaf, stock.left[fine])
            return stock.take(counts)

        return [client(size) for size in sizes]

    return partition


class _Stock:
    """Examples that nobody has yet, in random order within each label.

    Attributes:
      left: examples left of each of the labels that occur, in ascending order, (num_labels,).
    """

    def __init__(self, labels: np.ndarray, rng: np.random.Generator) -> None:
        order = rng.permutation(len(labels))
        _, self.left = np.unique(labels, return_counts=True)
        by_label = order[np.argsort(labels[order], kind="stable")]
        self._rows = np.split(by_label, np.cumsum(self.left)[:-1])

    def take(self, counts: np.ndarray) -> np.ndarray:
        """Takes counts[i] examples of label i out; returns their rows."""
        rows = [
            rows[left - n : left]
            for rows, left, n in zip(self._rows, self.left, counts, strict=True)
        ]
        self.left = self.left - counts
        return np.concatenate(rows)


def _draw(rng: np.random.Generator, size: int, q: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Counts of `size` draws from q, where outcome i can be drawn left[i] times.

    Draws of what is used up are rejected and drawn again, which is what renormalising q amounts to.
    """
    counts = np.zeros_like(left)
    while missing := size - counts.sum():
        weights = np.where(counts < left, q, 0)
        if not weights.sum():
            # What is left of q underflowed. Its limit is a single outcome.
            weights = np.eye(len(q))[rng.choice(len(q), p=(left - counts) / (left - counts).sum())]
        counts = np.minimum(counts + rng.multinomial(missing, weights / weights.sum()), left)
    return counts


def _shared_out(
    rng: np.random.Generator, left: np.ndarray, num_clients: int, alpha: float, balanced: bool
) -> np.ndarray:
    """How many examples of each label every client is given, (num_clients, num_labels)."""
    counts = np.zeros((num_clients, len(left)), int)
    for i, number in enumerate(left):
        shares = rng.dirichlet(np.full(num_clients, alpha))
        if balanced:
            takes = counts.sum(1) < left.sum() / num_clients
            # Where all that is left has underflowed, its limit is a single client.
            shares = (
                takes * shares
                if shares[takes].any()
                else np.eye(num_clients)[rng.choice(takes.nonzero()[0])]
            )
        ends = shares.cumsum()
        counts[:, i] = np.diff(np.rint(number * ends / ends[-1]), prepend=0)
    return counts


def _leaves(labels: np.ndarray, coarse: np.ndarray) -> list[np.ndarray]:
    """For every coarse label the indices of its fine labels among those that occur."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    parent = coarse[first]
    if (wrong := np.flatnonzero(parent[inverse] != coarse)).size:
        label = labels[wrong[0]]
        raise UserError(
            f"the fine label {label} has several coarse labels, as {coarse[wrong[0]]} and "
            f"{parent[inverse[wrong[0]]]}; it must have one"
        )
    return [np.flatnonzero(parent == c) for c in np.unique(parent)]


def _feature(features: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in features:
        raise UserError(f"no feature {name!r} to partition by; there are {sorted(features)}")
    return features[name]


def _labels(features: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    labels = _feature(features, name)
    if labels.ndim != 1 or labels.dtype.kind not in "biu":
        raise UserError(
            f"to partition by feature {name!r} it must be one integer an example; its shape is "
            f"{labels.shape} and its dtype {labels.dtype}"
        )
    return labels


def _sizes(num_examples: int, num_clients: int) -> list[int]:
    return [len(rows) for rows in np.array_split(np.empty(num_examples, bool), num_clients)]


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise UserError(f"{name} must be a whole number above 0, got {count!r}")


def _check_concentrations(**alphas: float) -> None:
    for name, alpha in alphas.items():
        if not 0 < alpha < np.inf:
            raise UserError(f"{name} must be above 0 and finite, got {alpha}")


def _check_enough(num_examples: int, needed: int, what: str = "clients") -> None:
    if num_examples < needed:
        raise UserError(
            f"{num_examples} examples are too few for {needed} {what}; lower the number of clients"
        )
