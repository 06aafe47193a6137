"""Arrow tables: Parquet files, and what other readers have in this form."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import gin
import numpy as np

from fedexp.data import download
from fedexp.data import features as features_lib
from fedexp.data.dataset import FederatedSplits
from fedexp.data.partition import Partitioner
from fedexp.data.tables import Binding, Columns, Table
from fedexp.errors import UserError, check

if TYPE_CHECKING:
    import pyarrow as pa

_CONVERT = "leave the column out, or read it with the dtype 'object' and a `convert`, of labels @label_ids()"
_ALIKE = "make them alike, or read the column with the dtype 'object' and a `convert`"


@gin.configurable
def parquet(
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
) -> FederatedSplits:
    """A federated data set from Parquet files, by pyarrow (`pip install 'fedexp[parquet]'`).

    All is as in `csv`, but for what columns may hold: numbers, lists of numbers of one length, lists of such
    lists, and images as Hugging Face stores them, {bytes, path} of PNG or JPEG, which become uint8 (height,
    width) or (height, width, 3). With the dtype 'object' a `convert` gets values as they are: text, bytes,
    lists, dicts.

    Args:
      path: a file, or a folder of *.parquet that are read one after another.
      features: see `csv`, here and below.
      client: the column that says whose a row is.
      partition: a partitioner in its place.
      test_path: file or folder of the test partition.
      validation_path: of a validation partition.
      split: a column that says of which partition a row is.
      test_fraction: of each client's rows.
      unseen_clients: let clients be in other partitions than the training's alone.
      seed: of which rows `test_fraction` takes.

    Raises:
      UserError: see `csv`; rows count from 0.
    """
    paths = {"train": path, "test": test_path, "validation": validation_path}
    sources = {name: _parquet(path) for name, path in paths.items() if path is not None}
    return Binding(
        "parquet", features, client, partition, split, test_fraction, unseen_clients, seed
    ).splits(sources)


class ArrowSource:
    """A `fedexp.data.tables.Source`.

    Attributes:
      where: a name for messages.
      names: of all columns.
      load: column names -> a table of them.
    """

    def __init__(self, where: str, names: list[str], load: Callable[[list[str]], pa.Table]) -> None:
        self.where, self.names, self.load = where, names, load

    def read(self, columns: Mapping[str, bool]) -> Table:
        with reading(self.where):
            loaded = self.load(list(columns))
        check(loaded.num_rows > 0, f"{self.where} has no rows; add examples")
        table = Table(self.where, {}, lambda row: f"row {row}")
        for name, is_object in columns.items():
            chunks, start = [], 0
            for chunk in loaded.column(name).chunks:
                cells = _Cells(table, name, chunk, start)
                chunks += [cells.objects() if is_object else cells.numbers()] if len(chunk) else []
                if chunks and chunks[-1].shape[1:] != chunks[0].shape[1:]:
                    cells.refuse(
                        0, f"has the shape {chunks[-1].shape[1:]}, row 0 has {chunks[0].shape[1:]}"
                    )
                start += len(chunk)
            table.columns[name] = np.concatenate(chunks)
        return table


class _Cells(NamedTuple):
    """Part of a column, from row `start` on."""

    table: Table
    column: str
    array: pa.Array
    start: int

    def refuse(self, row: int | np.integer, found: str, remedy: str = _ALIKE) -> NoReturn:
        raise UserError(f"{self.table.cell(self.start + row, self.column)} {found}; {remedy}")

    def objects(self) -> np.ndarray:
        """Values as they are, (rows,) objects."""
        self._refuse_missing(self.array, 1)
        result = np.empty(len(self.array), object)
        for row, value in enumerate(self.array.to_pylist()):
            result[row] = value
        return result

    def numbers(self) -> np.ndarray:
        """Numbers, or lists of numbers, (rows, ...)."""
        import pyarrow as pa

        array, shape = self.array, (len(self.array),)
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        while pa.types.is_nested(array.type) and not pa.types.is_struct(array.type):
            self._refuse_missing(array, math.prod(shape[1:]))
            lengths = np.asarray(array.value_lengths())
            if not lengths[0]:
                self.refuse(0, "is an empty list")
            if (odd := np.flatnonzero(lengths != lengths[0])).size:
                found = f"has a list of {lengths[odd[0]]}, and row {self.start} one of {lengths[0]}"
                self.refuse(odd[0] // math.prod(shape[1:]), found)
            array, shape = array.flatten(), (*shape, int(lengths[0]))
        self._refuse_missing(array, math.prod(shape[1:]))
        if pa.types.is_struct(array.type) and shape[1:] == ():
            return self._images()
        if not (pa.types.is_primitive(array.type) and not pa.types.is_temporal(array.type)):
            self.refuse(0, f"is of the type {array.type}, which is no number", _CONVERT)
        return array.to_numpy(zero_copy_only=False).reshape(shape)

    def _images(self) -> np.ndarray:
        """PNG or JPEG in structs {bytes, path}, as uint8 (rows, height, width[, 3])."""
        from PIL import Image

        images = []
        for row, value in enumerate(self.array.to_pylist()):
            content, path = value.get("bytes"), value.get("path")
            if not content and not path:
                self.refuse(row, "is no number and holds no image", _CONVERT)
            try:
                image = Image.open(io.BytesIO(content) if content else path)
                image = image if image.mode in ("L", "RGB") else image.convert("RGB")
                images.append(np.asarray(image))
            except Exception as error:  # Damaged images make Pillow raise nearly anything.
                self.refuse(row, f"is no image ({type(error).__name__}: {error})", "mend it")
            shape, first = images[-1].shape, images[0].shape
            if shape != first:
                self.refuse(row, f"is an image {shape}, and row {self.start} is {first}")
        return np.stack(images)

    def _refuse_missing(self, array: pa.Array, values_per_row: int) -> None:
        if array.null_count:
            (missing, *_) = np.flatnonzero(array.is_null())
            self.refuse(missing // values_per_row, "is missing", "fill it, or leave the row out")


def pyarrow() -> ModuleType:
    """The library.

    Raises:
      UserError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Parquet files are read with pyarrow, which is not installed: pip install 'fedexp[parquet]'"
        ) from error
    return pyarrow


def _parquet(path: str) -> ArrowSource:
    """The columns of a file, or of a folder of files."""
    parquet = pyarrow().parquet
    if Path(path).suffix:
        where = features_lib.existing(path)
    else:
        where = download.local_folder(path, "*.parquet")
        check(any(where.glob("*.parquet")), f"no *.parquet files in {where}; correct the path")
    with reading(where):
        names = parquet.ParquetDataset(where).schema.names
    return ArrowSource(
        str(where), names, lambda columns: parquet.read_table(where, columns=columns)
    )


@contextlib.contextmanager
def reading(where: object) -> Iterator[None]:
    """Says of whatever goes wrong in reading a file which file it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Damaged files make Arrow raise nearly anything.
        raise UserError(
            f"{where} cannot be read, or is damaged ({type(error).__name__}: {error})"
        ) from error
