"""Packed data sets: a folder of .npy files that opens in milliseconds, memory-mapped.

What is slow to read or to generate is built once and packed into the cache:

    splits = packed.load_or_build("glyphs", {"version": 1, "num_clients": 100}, build)
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from absl import logging

from fedexp.data import download
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.errors import UserError

_FORMAT = 1
_INDEX = "index.json"


def write(directory: Path, splits: FederatedSplits) -> None:
    """Writes `splits` to a new folder, which appears complete or not at all.

    Args:
      directory: must not exist yet; its parent is created.
      splits: features of any fixed-size dtype (not object).

    Raises:
      UserError: the folder exists, cannot be written, or a feature holds Python objects.
    """
    if directory.exists():
        raise UserError(f"{directory} exists already; delete it to write it anew")
    for split, dataset in splits._asdict().items():
        for name, array in dataset.features.items():
            if array.dtype.hasobject:
                raise UserError(f"feature {name!r} of {split!r} holds Python objects; encode it")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".packing-", dir=directory.parent) as scratch:
            folder = Path(scratch) / directory.name
            folder.mkdir()
            _write_files(folder, splits)
            os.replace(folder, directory)
    except OSError as error:
        raise UserError(
            f"cannot write {directory}: {error}; free disk space, or set the environment variable "
            "FEDEXP_CACHE to another folder"
        ) from error


def read(directory: Path) -> FederatedSplits:
    """Opens a folder written by `write`, its features memory-mapped read-only.

    Raises:
      UserError: the folder is missing, incomplete or damaged.
    """
    try:
        index = json.loads((directory / _INDEX).read_text())
        if index["format"] != _FORMAT:
            raise ValueError(f"format {index['format']}, expected {_FORMAT}")
        return FederatedSplits(
            **{
                split: FederatedDataset(
                    features={
                        name: np.load(directory / split / f"feature_{i}.npy", mmap_mode="r")
                        for i, name in enumerate(names)
                    },
                    offsets=np.load(directory / split / "offsets.npy"),
                    client_ids=np.load(directory / split / "client_ids.npy"),
                )
                for split, names in index["features"].items()
            }
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(
            f"{directory} is not a complete packed data set ({error}); delete the folder, then "
            "it is built again"
        ) from error


def load_or_build(
    name: str, key: Mapping[str, object], build: Callable[[], FederatedSplits]
) -> FederatedSplits:
    """Opens the packed data set of this name and key from the cache, building it at first.

    Of several processes that ask for it one builds and the others wait.

    Args:
      name: a short name for the folder, as "fed_emnist".
      key: JSON values that determine the content: arguments, sources' `fingerprint`, and a version
        that is raised whenever the code of `build` changes what it returns.
      build: makes the data set; called at most once.

    Returns:
      The splits, memory-mapped: the same in the building process and in later ones.

    Raises:
      UserError: from `build`, `write` or `read`.
    """
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    directory = download.cache_dir() / "packed" / f"{name}-{digest}"
    if not directory.exists():
        with download.lock(directory):
            if not directory.exists():
                logging.info("preparing %s once, into %s", name, directory)
                write(directory, build())
    return read(directory)


def fingerprint(path: Path) -> dict[str, object]:
    """What tells a source file from another or from an edited one, for `load_or_build`'s key."""
    stat = path.stat()
    return {"path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _write_files(folder: Path, splits: FederatedSplits) -> None:
    for split, dataset in splits._asdict().items():
        (folder / split).mkdir()
        for i, array in enumerate(dataset.features.values()):
            np.save(folder / split / f"feature_{i}.npy", array)
        np.save(folder / split / "offsets.npy", dataset.offsets)
        np.save(folder / split / "client_ids.npy", dataset.client_ids)
    names = {split: list(dataset.features) for split, dataset in splits._asdict().items()}
    index = {"format": _FORMAT, "features": names}
    (folder / _INDEX).write_text(json.dumps(index, indent=1))
