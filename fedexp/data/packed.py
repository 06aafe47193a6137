"""Packed data sets: folders of .npy files that open in milliseconds, memory-mapped.

What is slow to read or to generate is built once and packed into the cache:

    splits = packed.load_or_build("glyphs", {"version": 1, "num_clients": 100}, build)

What does not fit in memory is packed by `fedexp.data.conversion`, in the same form: a folder with an .npy
file for each feature, offsets.npy, client_ids.npy, checksums.npy with the SHA-256 of every 256 KiB of
these, and index.json, which names the features and has every file's size. Splits are a folder of two such
folders, or of three where there is a validation partition.

Opening compares the checksums of offsets and ids, and of 16 MiB of every feature, chosen anew each time: a
feature that is no larger is compared as a whole. Values have been checked (`FederatedDataset.check`)
before they were packed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from fedexp import cache, paths
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.errors import UserError

_FORMAT = 3
_INDEX = "index.json"
_CHECKSUMS = "checksums.npy"
_BLOCK = 1 << 18
# Blocks of a feature that are compared when it is opened.
_SAMPLE = 64


def write(directory: Path, splits: FederatedSplits) -> None:
    """Writes `splits` to a new folder, which appears complete or not at all.

    Args:
      directory: must not exist yet; its parent is created.
      splits: what to write.

    Raises:
      UserError: the folder exists or cannot be written.
    """
    if directory.exists():
        raise UserError(f"{directory} exists already; delete it to write it anew")
    with writing(directory), cache.scratch(directory.parent, ".packing-") as scratch:
        folder = scratch / directory.name
        for split, dataset in splits.present().items():
            (folder / split).mkdir(parents=True)
            for i, array in enumerate(dataset.features.values()):
                np.save(folder / split / feature_file(i), array)
            seal(folder / split, list(dataset.features), dataset.offsets, dataset.client_ids)
        paths.replace(folder, directory)


def read(directory: Path) -> FederatedSplits:
    """Opens a folder written by `write`, its features memory-mapped read-only.

    Raises:
      UserError: the folder is missing, incomplete or damaged.
    """
    with _complete(directory):
        return FederatedSplits(**{split: _open(directory / split) for split in _parts(directory)})


def read_dataset(directory: Path) -> FederatedDataset:
    """Opens the folder of a single data set, its features memory-mapped read-only.

    Raises:
      UserError: the folder is missing, incomplete or damaged.
    """
    with _complete(directory):
        return _open(directory)


def verify(directory: Path) -> None:
    """Compares every file of a packed folder, of splits or of one data set, with its checksums.

    It reads everything; opening a folder compares a sample.

    Raises:
      UserError: a missing or damaged file. The message names it.
    """
    with _complete(directory):
        folders = [directory]
        if not (directory / _INDEX).exists():
            folders = [directory / split for split in _parts(directory)]
        for folder in folders:
            _checked_index(folder, sample=None)


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
    directory = location(name, key)
    make_once(directory, lambda: write(directory, build()))
    return read(directory)


def location(name: str, key: Mapping[str, object]) -> Path:
    """The folder in the cache for this name and key; see `load_or_build`."""
    text = json.dumps([_FORMAT, key], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return cache.folder(to_write=False) / "packed" / f"{name}-{digest}"


def make_once(directory: Path, make: Callable[[], None]) -> None:
    """Calls `make` unless `directory` exists; other processes that ask for it wait meanwhile."""
    if not directory.exists():
        cache.folder()  # Refuses one that cannot be written.
        with cache.lock(directory):
            if not directory.exists():
                logging.info("preparing %s once", directory)
                make()


def fingerprint(path: Path) -> dict[str, object]:
    """What tells a source file from another or from an edited one, for `load_or_build`'s key."""
    stat = path.stat()
    return {"path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def feature_file(i: int) -> str:
    """The name of the file of feature number `i`."""
    return f"feature_{i}.npy"


def seal(
    folder: Path, features: Sequence[str], offsets: np.ndarray, client_ids: np.ndarray
) -> None:
    """Completes a data set's folder that has the files of its features."""
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "client_ids.npy", client_ids)
    names = [*map(feature_file, range(len(features))), "offsets.npy", "client_ids.npy"]
    checksums = np.concatenate([_checksums(folder / name) for name in names])
    np.save(folder / _CHECKSUMS, checksums)
    index = {
        "format": _FORMAT,
        "features": list(features),
        "bytes": {name: (folder / name).stat().st_size for name in names},
        "checksums": hashlib.sha256(checksums.tobytes()).hexdigest(),
    }
    sealed = {**index, "sha256": _digest(index)}
    (folder / _INDEX).write_text(json.dumps(sealed, indent=1))


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns the operating system's refusals into a UserError with the way out."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {directory}: {error}; free disk space, or set the environment variable "
            "FEDEXP_CACHE to another folder"
        ) from error


@contextlib.contextmanager
def _complete(directory: Path) -> Iterator[None]:
    """Says of whatever goes wrong in reading which folder it is, and what to do."""
    try:
        yield
    except Exception as error:  # Damaged files make NumPy raise nearly anything.
        raise UserError(
            f"{directory} is not a complete packed data set ({error}); delete the folder, then "
            "it is built again"
        ) from error


def _parts(directory: Path) -> list[str]:
    """The partitions of splits; whether there is one for validation, its folder tells."""
    return [
        split
        for split in FederatedSplits._fields
        if split not in FederatedSplits._field_defaults or (directory / split).exists()
    ]


def _checked_index(folder: Path, sample: int | None) -> dict:
    """What index.json says, once features agree with it in `sample` blocks, or in all if it is None."""
    index = json.loads((folder / _INDEX).read_bytes())
    if index["format"] != _FORMAT:
        raise ValueError(f"format {index['format']}, expected {_FORMAT}")
    if index.pop("sha256") != _digest(index):
        raise ValueError(f"{folder / _INDEX} is damaged")
    for name, size in index["bytes"].items():
        if (found := (folder / name).stat().st_size) != size:
            raise ValueError(f"{folder / name} has {found} bytes, expected {size}")
    checksums = np.load(folder / _CHECKSUMS)
    if hashlib.sha256(checksums.tobytes()).hexdigest() != index["checksums"]:
        raise ValueError(f"{folder / _CHECKSUMS} is damaged")
    end = 0
    for number, (name, size) in enumerate(index["bytes"].items()):
        start, end = end, end + -(-size // _BLOCK)
        blocks = range(end - start)
        if sample is not None and number < len(index["features"]) and len(blocks) > sample:
            blocks = sorted(random.sample(blocks, sample))
        if not np.array_equal(_checksums(folder / name, blocks), checksums[start:end][blocks]):
            raise ValueError(f"{folder / name} is damaged: it does not agree with its checksums")
    return index


def _open(folder: Path) -> FederatedDataset:
    names = _checked_index(folder, _SAMPLE)["features"]
    return FederatedDataset(
        features={
            name: np.load(folder / feature_file(i), mmap_mode="r") for i, name in enumerate(names)
        },
        offsets=np.load(folder / "offsets.npy"),
        client_ids=np.load(folder / "client_ids.npy"),
        checked=True,
    )


def _digest(index: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def _checksums(path: Path, blocks: Sequence[int] | None = None) -> np.ndarray:
    """The SHA-256 of the file's blocks, (n, 32) uint8; of all blocks if they are None."""
    digests = []
    with path.open("rb") as file:
        if blocks is None:
            blocks = range(-(-path.stat().st_size // _BLOCK))
        for block in blocks:
            file.seek(block * _BLOCK)
            digests.append(hashlib.sha256(file.read(_BLOCK)).digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
