"""Comma-separated values."""

from __future__ import annotations

import contextlib
import csv as csv_lib
import itertools
from collections.abc import Iterator, Mapping

import gin
import numpy as np

from fedexp.data import features as features_lib
from fedexp.data.dataset import FederatedSplits
from fedexp.data.partition import Partitioner
from fedexp.data.tables import Binding, Columns, Table
from fedexp.errors import UserError, check

# Rows whose text is in memory at once.
_BLOCK = 1 << 14


@gin.configurable
def csv(
    path: str,
    features: Columns,
    client: str | None = None,
    partition: Partitioner | None = None,
    test_path: str | None = None,
    validation_path: str | None = None,
    split: str | None = None,
    test_fraction: float = 0.1,
    unseen_clients: bool = False,
    seed: int = 0,
    delimiter: str = ",",
) -> FederatedSplits:
    """A federated data set from CSV files, whose first line names the columns.

    Which rows are for the test says `test_path`, or else `split`, or else `test_fraction`. Every run reads
    the files; the result is in memory. Clients are in ascending order of their ids, their rows as in a file.

    Args:
      path: the file, UTF-8; of the training partition, or of all.
      features: name -> a column, a list of columns that are put side by side, or '*' for all that nothing
        else names, or (these, shape, dtype), or (these, shape, dtype, convert) as in `fedexp.data.features`.
        Without a dtype columns side by side are float32, a single one is int32 or float32, after its values.
        Text has the dtype 'object' and a `convert`, as @label_ids().
      client: the column that says whose a row is. Give this or a `partition`.
      partition: a partitioner, as @dirichlet(), which gives rows to clients; of each file on its own.
      test_path: the file of the test partition.
      validation_path: the file of a validation partition.
      split: a column of `path` that says of which partition a row is: 'train', 'test' or 'validation'.
      test_fraction: of each client's rows; a client of a single one is in the training partition only.
      unseen_clients: let clients be in other partitions without being in the training's.
      seed: of which rows `test_fraction` takes.
      delimiter: what is between fields.

    Raises:
      UserError: no such file or column, a line with too many fields or too few, no number where one is
        needed, a value that no device holds, a client or partition without rows. The message names file, line
        and column.
    """
    check(len(delimiter) == 1, f"csv.delimiter must be one character, got {delimiter!r}")
    paths = {"train": path, "test": test_path, "validation": validation_path}
    sources = {name: _File(path, delimiter) for name, path in paths.items() if path is not None}
    return Binding(
        "csv", features, client, partition, split, test_fraction, unseen_clients, seed
    ).splits(sources)


class _File:
    """A `fedexp.data.tables.Source`."""

    def __init__(self, path: str, delimiter: str) -> None:
        self.path, self.delimiter = features_lib.existing(path), delimiter
        self.where = str(self.path)
        _, self.names = next(self._lines(), (0, []))
        check(bool(self.names), f"{self.where} is empty; its first line must name the columns")
        twice = [name for name in self.names if self.names.count(name) > 1]
        check(not twice, f"{self.where} has several columns {twice[:1]}; rename all but one")

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """Number and fields of every line that is not blank; a field may go over several lines."""
        number = 0
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv_lib.reader(
                    file, delimiter=self.delimiter, skipinitialspace=True, strict=True
                )
                for fields in reader:
                    number = reader.line_num
                    if fields:
                        yield number, fields
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where} is not in UTF-8 ({error}); save it as that") from error
        except csv_lib.Error as error:
            raise UserError(f"{self.where}, after line {number}: {error}; mend the file") from error

    def read(self, columns: Mapping[str, bool]) -> Table:
        lines, place = self._lines(), {name: self.names.index(name) for name in columns}
        next(lines)
        numbers: list[int] = []
        blocks: dict[str, list[np.ndarray]] = {name: [] for name in columns}
        table = Table(self.where, {}, lambda row: f"line {numbers[row]}")
        while block := list(itertools.islice(lines, _BLOCK)):
            for number, fields in block:
                if len(fields) != len(self.names):
                    raise UserError(
                        f"{self.where}, line {number}: there are {len(fields)} fields, the first line has "
                        f"{len(self.names)}; mend it, or quote fields that hold {self.delimiter!r}"
                    )
            start = len(numbers)
            numbers += [number for number, _ in block]
            for name, is_text in columns.items():
                cells = [fields[place[name]] for _, fields in block]
                blocks[name].append(
                    np.array(cells, object) if is_text else _numbers(table, name, cells, start)
                )
        check(bool(numbers), f"{self.where} has no rows; add examples")
        return table._replace(
            columns={name: np.concatenate(parts) for name, parts in blocks.items()}
        )


def _numbers(table: Table, column: str, cells: list[str], start: int) -> np.ndarray:
    """Cells from row `start` on as int64 if all of them are whole numbers, else as float64."""
    with contextlib.suppress(ValueError, OverflowError):
        return np.array(list(map(int, cells)), np.int64)
    with contextlib.suppress(ValueError):
        return np.array(list(map(float, cells)))
    row = next(row for row, cell in enumerate(cells) if not _is_number(cell))
    found = "is empty" if not cells[row] else f"holds {cells[row]!r}, which is no number"
    raise UserError(
        f"{table.cell(start + row, column)} {found}; correct it, leave the row or column out, or read "
        "text with the dtype 'object' and a `convert`, of labels @label_ids()"
    )


def _is_number(cell: str) -> bool:
    with contextlib.suppress(ValueError):
        float(cell)
        return True
    return False
