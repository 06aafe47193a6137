"""Data sets of Hugging Face's library `datasets`, on this machine."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import gin
import numpy as np

from fedexp.data import download
from fedexp.data.arrow import ArrowSource, reading
from fedexp.data.dataset import FederatedSplits
from fedexp.data.tables import Binding, Columns
from fedexp.errors import UserError, check

if TYPE_CHECKING:
    import datasets

_CLIENT = "partition of a row"


@gin.configurable
def huggingface(
    dataset: Any,
    features: Columns,
    client: str | None = None,
    partition: Any = None,
    train_split: str = "train",
    test_split: str | None = "test",
    validation_split: str | None = None,
    split: str | None = None,
    test_fraction: float = 0.1,
    unseen_clients: bool = False,
    seed: int = 0,
) -> FederatedSplits:
    """A federated data set from one of Hugging Face's (`pip install 'fedexp[huggingface]'`).

    Columns are as in `parquet`, and so are images. The result is in memory.

    Args:
      dataset: a folder on this machine, as `save_to_disk` writes it or `load_dataset` reads it (of Parquet,
        CSV, JSON or images); or a `Dataset` or `DatasetDict`, in a gin file what a function of yours returns.
      features: see `csv`, here and below.
      client: the column that says whose a row is.
      partition: in its place a partitioner, as @dirichlet(), or one of flwr-datasets, for each split anew.
      train_split: name of the split to train on. A plain `Dataset` is that.
      test_split: of the test partition; None takes `test_fraction` of each client's rows.
      validation_split: of a validation partition.
      split: a column of the training split that says of which partition a row is; bind test_split = None.
      test_fraction: of each client's rows.
      unseen_clients: let clients be in other partitions than the training's alone.
      seed: of which rows `test_fraction` takes.

    Raises:
      UserError: no such folder or split, what a partitioner refuses, and see `csv`; rows count from 0.
    """
    where, loaded = _loaded(dataset)
    names = {"train": train_split, "test": test_split, "validation": validation_split}
    parts = {}
    for part, name in names.items():
        if name is not None and name not in loaded:
            raise UserError(
                f"huggingface.{part}_split: no split {name!r} in {where}; there are {sorted(loaded)}"
                + " (None takes a part of every client's rows)" * (part == "test")
            )
        if name is not None:
            parts[part] = loaded[name]
    if hasattr(partition, "load_partition"):
        check(
            client is None,
            "huggingface.client and a partition exclude each other; bind one of them",
        )
        parts = {part: _partitioned(rows, partition) for part, rows in parts.items()}
        client, partition = _CLIENT, None
    sources = {
        part: _source(f"{where}, split {names[part]!r}", rows) for part, rows in parts.items()
    }
    return Binding(
        "huggingface", features, client, partition, split, test_fraction, unseen_clients, seed
    ).splits(sources)


def _loaded(dataset: Any) -> tuple[str, dict[str, datasets.Dataset]]:
    """A name for messages, and the splits by theirs."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "huggingface needs the library datasets, which is not installed: pip install "
            "'fedexp[huggingface]'"
        ) from error
    where = f"the {type(dataset).__name__}"
    if isinstance(dataset, str):
        folder = download.local_folder(dataset, "*")
        where = str(folder)
        check(folder.is_dir(), f"no folder {folder}; correct huggingface.dataset")
        saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
        with reading(where):
            dataset = (datasets.load_from_disk if saved else datasets.load_dataset)(str(folder))
    if isinstance(dataset, datasets.Dataset):
        dataset = {"train": dataset}
    if not isinstance(dataset, dict) or not all(
        isinstance(rows, datasets.Dataset) for rows in dataset.values()
    ):
        raise UserError(
            "huggingface.dataset must be a folder, a Dataset or a DatasetDict, got "
            f"{type(dataset).__name__}; load streamed data first"
        )
    return where, dict(dataset)


def _partitioned(rows: datasets.Dataset, partitioner: Any) -> datasets.Dataset:
    """The rows that one of flwr-datasets' partitioners gives to somebody, with a column that says to whom."""
    partitioner, column = copy.deepcopy(partitioner), "number of a row"
    try:
        partitioner.dataset = rows.add_column(column, np.arange(len(rows)).tolist())  # pyright: ignore
        given = [
            np.asarray(partitioner.load_partition(i)[column], np.int64)
            for i in range(partitioner.num_partitions)
        ]
    except Exception as error:  # It says in many ways what does not suit it.
        raise UserError(f"huggingface.partition: {type(partitioner).__name__}: {error}") from error
    client = np.repeat(np.arange(len(given)), [len(part) for part in given])
    order = np.argsort(number := np.concatenate(given))
    return rows.select(number[order]).add_column(_CLIENT, client[order].astype(str).tolist())  # pyright: ignore


def _source(where: str, rows: datasets.Dataset) -> ArrowSource:
    return ArrowSource(
        where,
        rows.column_names,
        lambda columns: rows.select_columns(columns).with_format("arrow")[:],  # pyright: ignore
    )
