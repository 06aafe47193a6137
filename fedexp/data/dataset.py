"""Federated data sets: flat feature arrays, cut into clients by offsets."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from fedexp import shown
from fedexp.data import values
from fedexp.errors import UserError

Examples = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class FederatedDataset:
    """An immutable data set partitioned by client, in CSR style.

    Client `i` owns the rows `offsets[i]:offsets[i + 1]` of every feature, so a client is a slice
    and opening a data set costs nothing per client. Features may be memory-mapped.

    Attributes:
      features: name -> array (num_examples, ...), in its storage dtype (uint8 images, int32
        labels).
      offsets: (num_clients + 1,) int64, ascending from 0 to num_examples.
      client_ids: (num_clients,) str.
      checked: whether `check` has gone through the values; data from the cache have been checked when
        they were packed.

    Raises:
      UserError: features and offsets that disagree, duplicate client ids, or a client without
        examples.
    """

    features: Mapping[str, np.ndarray]
    offsets: np.ndarray
    client_ids: np.ndarray
    checked: bool = False

    def __post_init__(self) -> None:
        features = {name: _read_only(array) for name, array in self.features.items()}
        offsets = _read_only(np.asarray(self.offsets, np.int64))
        client_ids = _read_only(np.asarray(self.client_ids, np.str_))
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "client_ids", client_ids)
        self._validate()

    def __repr__(self) -> str:
        sizes, features = self.client_sizes, self.features.items()
        layout = ", ".join(f"{name} {a.dtype.name} {a.shape[1:]}" for name, a in features)
        return (
            f"FederatedDataset({self.num_clients} clients, {self.num_examples} examples, "
            f"{sizes.min()} to {sizes.max()} a client: {shown.cut(layout)})"
        )

    def _validate(self) -> None:
        if not self.features:
            raise UserError("a federated data set needs at least one feature, got none")
        if len(self.offsets) != len(self.client_ids) + 1 or len(self.client_ids) == 0:
            raise UserError(
                f"{len(self.client_ids)} client ids need {len(self.client_ids) + 1} offsets and at "
                f"least one client, got {len(self.offsets)} offsets"
            )
        if self.offsets[0] != 0:
            raise UserError(f"offsets must start at 0, got {self.offsets[0]}")
        for name, array in self.features.items():
            if array.shape[:1] != (self.offsets[-1],):
                raise UserError(
                    f"feature {name!r} has the shape {array.shape}, the offsets end at row "
                    f"{self.offsets[-1]}"
                )
        _check_not_empty(self.client_ids, self.client_sizes)
        if not (self.client_ids[1:] > self.client_ids[:-1]).all():  # Sorted ids need no sorting.
            ids, counts = np.unique(self.client_ids, return_counts=True)
            if counts.max() > 1:
                raise UserError(f"client id {str(ids[np.argmax(counts)])!r} occurs more than once")

    @classmethod
    def from_clients(
        cls, clients: Mapping[str, Mapping[str, np.ndarray]], *, drop_empty: bool = False
    ) -> FederatedDataset:
        """Builds a data set from {client id: {feature: array (num_examples_i, ...)}}.

        Args:
          clients: every client has the same features, shapes (but for the first axis) and dtypes.
          drop_empty: leave clients without examples out instead of raising.

        Raises:
          UserError: no clients, an empty client, or a client whose features do not fit the first
            one's.
        """
        arrays = {
            client_id: {name: np.asarray(array) for name, array in examples.items()}
            for client_id, examples in clients.items()
        }
        for client_id, examples in arrays.items():
            shapes = {name: array.shape for name, array in examples.items()}
            if len({shape[:1] for shape in shapes.values()}) > 1 or () in shapes.values():
                raise UserError(
                    f"client {client_id!r} has features of different lengths, or of none: their "
                    f"shapes are {shapes}"
                )
        sizes = {cid: len(next(iter(examples.values()), ())) for cid, examples in arrays.items()}
        if drop_empty:
            arrays = {cid: examples for cid, examples in arrays.items() if sizes[cid]}
        if not arrays:
            raise UserError("a federated data set needs at least one client, got none")
        sizes = {client_id: sizes[client_id] for client_id in arrays}
        _check_not_empty(list(sizes), np.array(list(sizes.values())))
        first_id, first = next(iter(arrays.items()))
        layout = {name: (array.shape[1:], array.dtype) for name, array in first.items()}
        for client_id, examples in arrays.items():
            found = {name: (array.shape[1:], array.dtype) for name, array in examples.items()}
            if found != layout:
                raise UserError(
                    f"client {client_id!r} has features {found}, but client {first_id!r} has "
                    f"{layout}"
                )
        return cls(
            features={
                name: np.concatenate([examples[name] for examples in arrays.values()])
                for name in layout
            },
            offsets=_offsets(list(sizes.values())),
            client_ids=np.array(list(arrays), np.str_),
        )

    def check(self, where: str = "") -> None:
        """Goes through all values, once in this object's life.

        Args:
          where: how an error's message begins.

        Raises:
          UserError: NaN, infinity, a number that does not fit 32 bits, or a feature that is no number.
            The message names client and feature.
        """
        if self.checked:
            return
        for name, array in self.features.items():
            if (unfit := values.first_unfit(array)) is not None:
                row, reason = unfit
                client_id = str(self.client_ids[self.clients_of(np.array(row))])
                raise UserError(f"{where}client {client_id!r}, feature {name!r}: {reason}")
        object.__setattr__(self, "checked", True)

    @property
    def num_clients(self) -> int:
        return len(self.client_ids)

    @property
    def num_examples(self) -> int:
        return int(self.offsets[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all features together."""
        return sum(array.nbytes for array in self.features.values())

    @functools.cached_property
    def client_sizes(self) -> np.ndarray:
        """Examples per client, (num_clients,) int64."""
        return _read_only(np.diff(self.offsets))

    @functools.cached_property
    def client_of_example(self) -> np.ndarray:
        """Index of the client that owns each example, (num_examples,) int32."""
        return _read_only(np.repeat(np.arange(self.num_clients, dtype=np.int32), self.client_sizes))

    def clients_of(self, rows: np.ndarray) -> np.ndarray:
        """Index of the client that owns each of the given rows, int32 in the shape of `rows`."""
        return (np.searchsorted(self.offsets, rows, side="right") - 1).astype(np.int32)

    def rows_of(self, client_ids: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the clients of another data set, or of a list, have their rows in this one.

        Args:
          client_ids: (n,) str, in any order.

        Returns:
          (first row, number of rows), each (n,) int64; (0, 0) for a client that is not here.
        """
        wanted = np.asarray(client_ids, np.str_)
        if np.array_equal(wanted, self.client_ids):
            return self.offsets[:-1], self.client_sizes
        place = np.searchsorted(self.client_ids, wanted, sorter=self._ascending)
        index = self._ascending[np.minimum(place, self.num_clients - 1)]
        here = self.client_ids[index] == wanted
        return np.where(here, self.offsets[index], 0), np.where(here, self.client_sizes[index], 0)

    @functools.cached_property
    def _ascending(self) -> np.ndarray:
        """Indices of the clients in ascending order of their ids, (num_clients,) int64."""
        return np.argsort(self.client_ids, kind="stable")

    def fingerprint(self) -> str:
        """Tells this data set from others: 32 hexadecimal digits, the same in every process.

        They depend on who the clients are, how many examples each has, and the features' names, dtypes
        and shapes; not on the values, which it does not read.
        """
        layout = [[name, a.dtype.str, a.shape[1:]] for name, a in self.features.items()]
        digest = hashlib.blake2b(json.dumps(layout).encode(), digest_size=16)
        digest.update(self.offsets.astype("<i8").tobytes())
        # A selection of clients may have them in wider strings than they need.
        width = np.strings.str_len(self.client_ids).max()
        digest.update(self.client_ids.astype(f"<U{width}").tobytes())
        return digest.hexdigest()

    def client(self, index: int) -> Examples:
        """The examples of client `index`, as views of the features."""
        index = range(self.num_clients)[index]
        return self.slice(self.offsets[index], self.offsets[index + 1])

    def slice(self, start: int, stop: int) -> Examples:
        """Rows start:stop of every feature, as views."""
        return {name: array[start:stop] for name, array in self.features.items()}

    def gather(self, rows: np.ndarray) -> Examples:
        """Copies the given rows of every feature."""
        return {name: array[rows] for name, array in self.features.items()}

    def prefetch(self, clients: Sequence[int] | np.ndarray) -> None:
        """Has the operating system read these clients' rows, where features are memory-mapped.

        It returns at once. Rows that are touched without it are read one client after another, each
        with as many megabytes around it as the disk's read-ahead is set to.
        """
        for array in self.features.values():
            if (mapped := _memory_map(array)) is None:
                continue
            start = array.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
            row_bytes = array.nbytes // max(len(array), 1)
            for client in clients:
                begin, end = (start + row_bytes * int(i) for i in self.offsets[client : client + 2])
                page = begin - begin % mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, page, end - page)

    def clients(self) -> Iterator[tuple[str, Examples]]:
        """Iterates over (client id, examples), in order."""
        for index, client_id in enumerate(self.client_ids):
            yield str(client_id), self.client(index)

    def select_clients(self, indices: Sequence[int] | np.ndarray) -> FederatedDataset:
        """A data set of the given clients: views where they are consecutive, copies elsewhere.

        Args:
          indices: client indices, or a boolean mask of shape (num_clients,).
        """
        indices = np.asarray(indices)
        if indices.dtype == bool:
            if indices.shape != (self.num_clients,):
                raise UserError(
                    f"a mask of {self.num_clients} clients has the wrong shape {indices.shape}"
                )
            indices = np.flatnonzero(indices)
        if not len(indices):
            raise UserError("a federated data set needs at least one client, none was selected")
        if indices.min() < -self.num_clients or indices.max() >= self.num_clients:
            raise UserError(
                f"client indices must be in [-{self.num_clients}, {self.num_clients}), got "
                f"{indices.min()} to {indices.max()}"
            )
        indices = indices % self.num_clients
        first, last = int(indices[0]), int(indices[-1])
        if np.array_equal(indices, np.arange(first, first + len(indices))):
            features = self.slice(self.offsets[first], self.offsets[last + 1])
        else:
            self.prefetch(indices)
            features = self.gather(
                np.concatenate([np.arange(*self.offsets[i : i + 2].tolist()) for i in indices])
            )
        return FederatedDataset(
            features,
            _offsets(self.client_sizes[indices]),
            self.client_ids[indices],
            checked=self.checked,
        )

    def split_examples(
        self, fraction: float, *, seed: int = 0
    ) -> tuple[FederatedDataset, FederatedDataset]:
        """Splits every client's examples at random into (fraction, the rest).

        Clients with a single example appear in the first part only.
        """
        _check_fraction(fraction)
        rng = np.random.default_rng(seed)
        firsts, seconds = [], []
        for start, size in zip(self.offsets[:-1], self.client_sizes, strict=True):
            count = 1 if size == 1 else int(np.clip(round(fraction * size), 1, size - 1))
            order = start + rng.permutation(size)
            firsts.append(np.sort(order[:count]))
            seconds.append(np.sort(order[count:]))
        if not any(len(rows) for rows in seconds):
            raise UserError("splitting examples needs a client with at least two, all have one")
        return self._with_rows(firsts), self._with_rows(seconds)

    def _with_rows(self, rows_per_client: list[np.ndarray]) -> FederatedDataset:
        sizes = np.array([len(rows) for rows in rows_per_client])
        features = self.gather(np.concatenate(rows_per_client))
        return FederatedDataset(
            features, _offsets(sizes[sizes > 0]), self.client_ids[sizes > 0], checked=self.checked
        )

    def label_histogram(self, num_classes: int, *, label: str = "y") -> np.ndarray:
        """Examples per client and class, (num_clients, num_classes) int64.

        Raises:
          UserError: a label outside [0, num_classes), labels that are not one integer an example,
            or no such feature.
        """
        if label not in self.features:
            raise UserError(f"no feature {label!r}; there are {sorted(self.features)}")
        labels = self.features[label]
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(
                f"labels must be one integer an example, feature {label!r} has the shape "
                f"{labels.shape} and the dtype {labels.dtype}"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UserError(
                f"labels must be in [0, {num_classes}), got {labels.min()} to {labels.max()}"
            )
        cells = self.client_of_example.astype(np.int64) * num_classes + labels.astype(np.int64)
        counts = np.bincount(cells, minlength=self.num_clients * num_classes)
        return counts.reshape(self.num_clients, num_classes)


class Batch(NamedTuple):
    """A batch of fixed size.

    Attributes:
      examples: name -> (batch_size, ...), of NumPy or JAX; the content of padded rows is arbitrary.
      mask: (batch_size,) bool, False on padded rows.
    """

    examples: Mapping[str, Any]
    mask: Any
    __repr__ = shown.fields


class _Splits(NamedTuple):
    train: FederatedDataset
    test: FederatedDataset
    validation: FederatedDataset | None = None


class FederatedSplits(_Splits):
    """What a data set function returns: its partitions, which may have different clients.

    Attributes:
      train: what clients train on.
      test: what results are measured on.
      validation: what choices are made on, such as that of the best checkpoint; see
        `fedexp.data.split_validation`.

    Raises:
      UserError: partitions that differ in names, dtypes or numbers of axes of their features, or values
        that `FederatedDataset.check` refuses.
    """

    __slots__ = ()
    __repr__ = shown.fields

    def __new__(
        cls,
        train: FederatedDataset,
        test: FederatedDataset,
        validation: FederatedDataset | None = None,
    ) -> Self:
        splits = super().__new__(cls, train, test, validation)
        for name, split in splits._asdict().items():
            if split is None and name in cls._field_defaults:
                continue
            if not isinstance(split, FederatedDataset):
                raise UserError(
                    f"the partition {name!r} must be a FederatedDataset, got {type(split).__name__}"
                )
            if (found := _layout(split)) != (expected := _layout(train)):
                raise UserError(
                    f"the partition {name!r} has the features {_listed(found)}, but 'train' has "
                    f"{_listed(expected)}; give both the same names, dtypes and numbers of axes"
                )
        for name, split in splits.present().items():
            split.check(f"{name!r}, ")
        return splits

    @classmethod
    def _make(cls, iterable: Iterable[FederatedDataset | None]) -> Self:
        """As a named tuple has it for `_replace`, but checked."""
        return cls(*iterable)  # pyright: ignore[reportArgumentType]

    def present(self) -> dict[str, FederatedDataset]:
        """The partitions that there are, by name."""
        return {name: split for name, split in self._asdict().items() if split is not None}


def _layout(dataset: FederatedDataset) -> dict[str, tuple[str, int]]:
    """Name -> dtype on a device and number of axes. Sentences, for one, may be longer in a test."""
    return {
        name: (np.dtype(values.NARROW.get(array.dtype.name, array.dtype)).name, array.ndim)
        for name, array in sorted(dataset.features.items())
    }


def _listed(layout: Mapping[str, tuple[str, int]]) -> str:
    return ", ".join(
        f"{name!r} ({dtype}, {ndim - 1} axes an example)" for name, (dtype, ndim) in layout.items()
    )


def _offsets(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _read_only(array: np.ndarray) -> np.ndarray:
    view = np.asanyarray(array).view()
    view.flags.writeable = False
    return view


def _memory_map(array: np.ndarray) -> mmap.mmap | None:
    """What `array` is a contiguous part of, if it is and the system takes advice."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    advisable = hasattr(mmap, "MADV_WILLNEED") and array.flags.c_contiguous
    return base if isinstance(base, mmap.mmap) and advisable else None


def _check_not_empty(client_ids: Sequence[str] | np.ndarray, sizes: np.ndarray) -> None:
    if sizes.min() <= 0:
        culprit = str(client_ids[int(np.argmin(sizes))])
        raise UserError(
            f"client {culprit!r} has no examples ({int((sizes <= 0).sum())} of {len(sizes)} "
            "clients are empty); remove the empty clients, or build with drop_empty=True"
        )


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"a split's fraction must be between 0 and 1, got {fraction}")
