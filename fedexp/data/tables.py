"""Federated data sets from tables: a row is an example, and a column may say whose it is.

What `csv`, `parquet` and `huggingface` share. A gin file says of which columns features are made:

    csv.features = {
        'x': '*',                                    # All columns that nothing else names, side by side.
        'w': ['age', 'weight'],                      # These, side by side.
        'y': 'target',                               # One, in a shape of its own.
        'pixels': ('*', (28, 28), 'uint8'),          # With shape and dtype.
        'tokens': ('text', (), 'object', @to_ids),   # By a function that makes numbers of text.
    }
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedexp.data import features as features_lib
from fedexp.data import values as values_lib
from fedexp.data.dataset import Examples, FederatedDataset, FederatedSplits
from fedexp.data.features import Feature
from fedexp.data.partition import Partitioner, by_client, from_arrays
from fedexp.errors import UserError, check

# name -> columns, or (columns, shape, dtype), or (columns, shape, dtype, convert).
Columns = Mapping[str, Any]
_ALL = "*"
_CORRECT = "correct `features`"


class Table(NamedTuple):
    """What was read of a file.

    Attributes:
      where: the file, for messages.
      columns: name -> (rows, ...), numbers, or objects such as text.
      row: what a row is called there, as "line 3".
    """

    where: str
    columns: dict[str, np.ndarray]
    row: Callable[[int], str]

    def cell(self, row: int | np.integer, column: str) -> str:
        """Where a value is, for messages."""
        return f"{self.where}, {self.row(int(row))}, column {column!r}"


class Source(Protocol):
    """A file that has columns.

    Attributes:
      where: its name, for messages.
      names: of all its columns.
    """

    where: str
    names: list[str]

    def read(self, columns: Mapping[str, bool]) -> Table:
        """Reads columns, {name: whether as objects, such as text}; others must be numbers."""
        ...


@dataclasses.dataclass(frozen=True)
class Binding:
    """How the rows of tables become examples of clients; the arguments that the readers share.

    Attributes:
      reader: its name, for messages.
      features: see the module.
      client: the column that says whose a row is.
      partition: or a partitioner that gives rows to clients.
      split: a column that says of which partition a row is: 'train', 'test' or 'validation'.
      test_fraction: of every client's examples, where nothing else says which are for the test.
      unseen_clients: whether clients may be in other partitions than the training's alone.
      seed: of the examples that `test_fraction` takes.
    """

    reader: str
    features: Columns
    client: str | None
    partition: Partitioner | None
    split: str | None
    test_fraction: float
    unseen_clients: bool
    seed: int

    def splits(self, sources: Mapping[str, Source]) -> FederatedSplits:
        """Reads the partitions from one table each, or all from that of 'train'.

        Raises:
          UserError: see `csv`.
        """
        check(
            (self.client is None) != (self.partition is None),
            f"{self.reader} needs one of `client`, the column that says whose a row is, and `partition`, "
            "which gives rows to clients, as @dirichlet()",
        )
        check(bool(self.features), f"there is nothing to read: {self.reader}.features is empty")
        check(
            self.split is None or len(sources) == 1,
            f"{self.reader}.split is for a file with several partitions; leave it out, or the other paths",
        )
        parts = {}
        for name, source in sources.items():
            examples, marks = self._read(source, fit=name == "train")
            if self.split is None:
                parts[name] = self._federated(examples, marks)
                continue
            part_of = marks[self.split]
            for part in dict.fromkeys(part_of):
                parts[part] = self._federated(
                    *(_chosen(part_of == part, of) for of in (examples, marks))
                )
            check(
                {"train", "test"} <= parts.keys(),
                f"{source.where}, column {self.split!r}: all rows are of {_listed(parts)}; mark some as "
                f"'train' and some as 'test', or bind {self.reader}.test_fraction in place of the column",
            )
        if "test" not in parts:
            train, test = parts["train"].split_examples(1 - self.test_fraction, seed=self.seed)
            parts |= {"train": train, "test": test}
        if self.client is not None and not self.unseen_clients:
            self._check_seen(parts)
        return FederatedSplits(**parts)

    def _federated(self, examples: Examples, marks: Mapping[str, np.ndarray]) -> FederatedDataset:
        if self.partition is not None:
            return from_arrays(examples, self.partition)
        return by_client(examples, marks[str(self.client)])

    def _check_seen(self, parts: Mapping[str, FederatedDataset]) -> None:
        for name, part in parts.items():
            unseen = np.setdiff1d(part.client_ids, parts["train"].client_ids)
            check(
                not unseen.size,
                f"client {str(next(iter(unseen), ''))!r} has no examples in 'train', but has in {name!r} "
                f"({unseen.size} of {part.num_clients} clients); correct the data, or bind "
                f"{self.reader}.unseen_clients = True",
            )

    def _read(self, source: Source, fit: bool) -> tuple[Examples, dict[str, np.ndarray]]:
        """The features of every row, and its columns `client` and `split`; `fit` for the training's table."""
        marks = [name for name in (self.client, self.split) if name is not None]
        specs = {name: _Spec.parse(name, spec) for name, spec in self.features.items()}
        named = {*marks, *(column for spec in specs.values() for column in spec.columns)}
        rest = [name for name in source.names if name not in named]
        specs = {name: spec.among(rest) for name, spec in specs.items()}
        wanted = dict.fromkeys(marks, True)
        for spec in specs.values():
            wanted |= dict.fromkeys(spec.columns, spec.is_text)
        for name in wanted:
            check(
                name in source.names,
                f"{self.reader}: no column {name!r} in {source.where}; there are {_listed(source.names)}",
            )
        table = source.read(wanted)
        for name in marks:
            empty = np.flatnonzero(table.columns[name] == "")
            if empty.size:
                raise UserError(
                    f"{table.cell(empty[0], name)} is empty; fill it, or leave the row out"
                )
        if self.split is not None:
            splits = table.columns[self.split]
            odd = np.flatnonzero(~np.isin(splits, FederatedSplits._fields))
            if odd.size:
                raise UserError(
                    f"{table.cell(odd[0], self.split)}: {splits[odd[0]]!r} is no partition; write 'train', "
                    "'test' or 'validation'"
                )
        training = None
        if fit:
            training = np.s_[:] if self.split is None else table.columns[self.split] == "train"
        examples = {name: spec.array(name, table, training) for name, spec in specs.items()}
        return examples, {name: table.columns[name] for name in marks}


@dataclasses.dataclass(frozen=True)
class _Spec:
    """How a feature is made.

    Attributes:
      columns: what of; none for all that nothing names.
      joined: whether they are side by side.
      feature: shape, dtype and `convert`, if given.
    """

    columns: Sequence[str]
    joined: bool
    feature: Feature | None

    @classmethod
    def parse(cls, name: str, spec: Any) -> _Spec:
        columns, *form = spec if isinstance(spec, tuple) else (spec,)
        if not isinstance(columns, str | list) or not columns:
            raise UserError(
                f"feature {name!r} must be a column, a list of columns or '*', or (these, shape, dtype), as "
                f"('*', (28, 28), 'uint8'), got {spec!r}"
            )
        feature = features_lib.parse({name: (columns, *form)})[name] if form else None
        if isinstance(columns, list):
            return cls(columns, True, feature)
        return cls((), True, feature) if columns == _ALL else cls((columns,), False, feature)

    @property
    def is_text(self) -> bool:
        return self.feature is not None and self.feature.dtype is object

    def among(self, rest: Sequence[str]) -> _Spec:
        """With `rest`, the columns that nothing names, where all are asked for."""
        return self if self.columns else dataclasses.replace(self, columns=rest)

    def array(self, name: str, table: Table, training: slice | np.ndarray | None) -> np.ndarray:
        """The feature, (rows, ...), once its `convert` has seen the rows `training`, if any."""
        check(bool(self.columns), f"feature {name!r}: no columns are left for '*'; {_CORRECT}")
        arrays = [table.columns[column] for column in self.columns]
        feature = self.feature
        if not self.is_text:
            dtype = feature.dtype if feature else np.float32 if self.joined else None
            arrays = [
                _cast(table, column, array, dtype)
                for column, array in zip(self.columns, arrays, strict=True)
            ]
        if self.joined:
            arrays = [np.concatenate([a.reshape(len(a), -1) for a in arrays], axis=1)]
        (array,) = arrays
        if feature is None:
            return array
        try:
            array = array.reshape(len(array), *feature.shape)
        except ValueError as error:
            raise UserError(
                f"feature {name!r} has the shape {array.shape[1:]} an example, which cannot be "
                f"{feature.shape}; {_CORRECT}"
            ) from error
        if training is not None:
            features_lib.fit(
                {name: feature}, lambda f: features_lib.rows(table.where, f[name], array[training])
            )
        return features_lib.rows(table.where, feature, array)


def _cast(table: Table, column: str, array: np.ndarray, dtype: type | None) -> np.ndarray:
    """Numbers in a dtype, that of devices if it is None; integers keep their value, floats may be rounded."""
    if (unfit := values_lib.first_unfit(array)) is not None:
        raise UserError(f"{table.cell(unfit[0], column)}: {unfit[1]}")
    dtype = values_lib.NARROW.get(array.dtype.name, array.dtype.type) if dtype is None else dtype
    with np.errstate(invalid="ignore", over="ignore"):
        cast = array.astype(dtype)
    wrong = np.isinf(cast) if cast.dtype.kind == "f" else cast != array
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0])
        raise UserError(
            f"{table.cell(place[0], column)}: the value {array[place]} is no {cast.dtype}; {_CORRECT}"
        )
    return cast


def _chosen(rows: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in columns.items()}


def _listed(names: Collection[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, list(names)[:most])) + more
