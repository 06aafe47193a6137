"""Converts data sets of any size into the packed form, in bounded memory.

    dataset = conversion.load_or_convert("stackoverflow", key, lambda: Source(path, ...))

Worker processes read and encode some clients at a time; their rows are appended to the packed files in
the order of the clients, and a line of a journal then says that they are there. A conversion that was
interrupted in whatever way goes on after the last line whose rows are on the disk, unharmed.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from absl import logging

from fedexp import paths
from fedexp.data import packed, workers
from fedexp.data.dataset import Examples, FederatedDataset
from fedexp.errors import UserError

_JOURNAL = "journal.jsonl"


class Source(Protocol):
    """Clients to convert; it is pickled once for every worker."""

    def client_ids(self) -> list[str]:
        """All ids, in the order that the data set shall have."""
        ...

    def read(self, client_ids: Sequence[str]) -> Iterator[Examples]:
        """Yields the encoded features of each of these clients; one without rows is left out."""
        ...


def load_or_convert(
    name: str,
    key: Mapping[str, object],
    make_source: Callable[[], Source],
    *,
    num_workers: int | None = None,
) -> FederatedDataset:
    """Opens the packed data set of this name and key from the cache, converting it at first.

    Args:
      name: a short name for the folder, as "stackoverflow_nwp_train".
      key: JSON values that determine the content; see `packed.load_or_build`.
      make_source: called at most once.
      num_workers: see `convert`.

    Raises:
      UserError: from the source, `convert` or `packed.read_dataset`.
    """
    directory = packed.location(name, key)
    packed.make_once(directory, lambda: convert(make_source(), directory, num_workers=num_workers))
    return packed.read_dataset(directory)


def convert(
    source: Source,
    directory: Path,
    *,
    num_workers: int | None = None,
    clients_per_chunk: int = 128,
) -> None:
    """Converts `source` into the new folder `directory`, which appears complete or not at all.

    What is done is kept in a hidden folder next to it: the same call after an interruption goes on from
    there, once it has compared what is there with its checksums. The result does not depend on
    interruptions, `num_workers` or `clients_per_chunk`. In a terminal a bar shows the progress.

    Memory holds the client ids and at most 2 x num_workers + 1 chunks, besides what `source` needs.

    Args:
      source: clients to convert.
      directory: must not exist yet; its parent is created.
      num_workers: processes that read and encode; None for as many as there are CPUs, 0 to do all in
        this process.
      clients_per_chunk: clients that a worker reads at a time.

    Raises:
      UserError: the folder exists or cannot be written, no client has examples, clients' features do
        not fit each other, a worker was killed, or what the source refuses.
    """
    if directory.exists():
        raise UserError(f"{directory} exists already; delete it to convert it anew")
    if num_workers is not None and num_workers < 0:
        raise UserError(f"num_workers must not be negative, got {num_workers}")
    folder = directory.with_name(f".{directory.name}.part")
    with packed.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    what = f"converting {directory.name}"
    # A damaged file may crash the library that reads it, so this is no work for the main process either.
    client_ids = workers.run(what, source.client_ids) if num_workers != 0 else source.client_ids()
    with contextlib.closing(_Part(folder)) as part:
        rest = client_ids[part.num_clients :]
        chunks = [rest[i : i + clients_per_chunk] for i in range(0, len(rest), clients_per_chunk)]
        if part.num_clients:
            logging.info("%d of %d clients are converted", part.num_clients, len(client_ids))
        if num_workers is None:
            num_workers = _num_cpus()
        with (
            _progress_bar(directory.name, part.num_clients, len(client_ids)) as report,
            _reader(what, source, min(num_workers, len(chunks))) as read,
        ):
            for chunk in read(chunks):
                part.append(chunk)
                report(part.num_clients)
        part.seal(directory)


class _Chunk(NamedTuple):
    """What became of consecutive clients.

    Attributes:
      num_clients: how many they are, including those without rows.
      sizes: client id -> rows, of the others.
      features: name -> rows of them all; empty if there are none.
    """

    num_clients: int
    sizes: dict[str, int]
    features: Examples


def _read_chunk(source: Source, client_ids: Sequence[str]) -> _Chunk:
    clients = {
        client_id: features
        for client_id, features in zip(client_ids, source.read(client_ids), strict=True)
        if len(next(iter(features.values())))
    }
    if not clients:
        return _Chunk(len(client_ids), {}, {})
    dataset = FederatedDataset.from_clients(clients)
    dataset.check()
    sizes = dict(zip(clients, dataset.client_sizes.tolist(), strict=True))
    return _Chunk(len(client_ids), sizes, dict(dataset.features))


class _Part:
    """An unfinished data set on the disk, opened behind its last whole chunk."""

    def __init__(self, folder: Path):
        self.num_clients = 0
        self._folder = folder
        self._sizes: dict[str, int] = {}
        self._layout: dict[str, list] = {}
        self._files: list[BinaryIO] = []
        self._digest = hashlib.sha256()  # Of all lines so far, which every line begins with.
        with packed.writing(folder):
            self._journal = _open(folder / _JOURNAL)
            end = 0
            while self._resume(self._journal.readline()):
                end = self._journal.tell()
            self._journal.seek(end)
            self._journal.truncate()

    def append(self, chunk: _Chunk) -> None:
        record = {
            "num_clients": chunk.num_clients,
            "sizes": chunk.sizes,
            "layout": {name: [a.dtype.str, a.shape[1:]] for name, a in chunk.features.items()},
            "sha256": [
                hashlib.sha256(_bytes(rows)).hexdigest() for rows in chunk.features.values()
            ],
        }
        record = json.loads(json.dumps(record))
        with packed.writing(self._folder):
            for file, rows in zip(self._open_files(record), chunk.features.values(), strict=True):
                file.write(_bytes(rows))
                _flush(file)
            text = json.dumps(record).encode()
            digest = self._digest_with(text)
            self._journal.write(digest.hexdigest().encode() + b" " + text + b"\n")
            _flush(self._journal)
        self._count(record, digest)

    def seal(self, directory: Path) -> None:
        """Completes the files and gives the folder its name."""
        if not self._sizes:
            raise UserError(f"no client has examples; {directory} would be empty")
        offsets = np.concatenate([[0], np.cumsum(list(self._sizes.values()))])
        with packed.writing(self._folder):
            for file, (dtype, shape) in zip(self._files, self._layout.values(), strict=True):
                file.truncate()
                end = file.tell()
                file.seek(0)
                _write_header(file, dtype, [int(offsets[-1]), *shape])
                file.seek(end)
                _flush(file)
            packed.seal(self._folder, list(self._layout), offsets, np.array(list(self._sizes)))
            paths.replace(self._folder, directory)
            (directory / _JOURNAL).unlink()

    def close(self) -> None:
        for file in (self._journal, *self._files):
            file.close()

    def _resume(self, line: bytes) -> bool:
        """Takes over a line of the journal, if it is whole and the rows it tells of are there."""
        if not line.endswith(b"\n"):
            return False
        written, _, text = line[:-1].partition(b" ")
        digest = self._digest_with(text)
        if written != digest.hexdigest().encode():
            return False
        record = json.loads(text)
        files = self._open_files(record)
        num_rows = sum(record["sizes"].values())
        starts = [file.tell() for file in files]
        found = [
            hashlib.sha256(file.read(num_rows * _row_bytes(*layout))).hexdigest()
            for file, layout in zip(files, record["layout"].values(), strict=True)
        ]
        if found != record["sha256"]:
            for file, start in zip(files, starts, strict=True):
                file.seek(start)
            return False
        self._count(record, digest)
        return True

    def _digest_with(self, line: bytes) -> hashlib._Hash:
        digest = self._digest.copy()
        digest.update(line)
        return digest

    def _open_files(self, record: dict) -> list[BinaryIO]:
        """The files of this record's features, the first record having created them."""
        layout = record["layout"]
        if layout and not self._layout:
            self._layout = layout
            for i, (dtype, shape) in enumerate(layout.values()):
                file = _open(self._folder / packed.feature_file(i))
                self._files.append(file)
                _write_header(file, dtype, [0, *shape])
        if layout not in ({}, self._layout):
            raise UserError(
                f"clients {', '.join(record['sizes'])} have features {layout}, but those before them "
                f"{self._layout}"
            )
        return self._files if layout else []

    def _count(self, record: dict, digest: hashlib._Hash) -> None:
        self._digest = digest
        self.num_clients += record["num_clients"]
        self._sizes |= record["sizes"]


def _open(path: Path) -> BinaryIO:
    """Opens for reading and writing, at the start; creates what is not there."""
    path.touch()
    return path.open("r+b")


def _write_header(file: BinaryIO, dtype: str, shape: Sequence[int]) -> None:
    # numpy pads the header so that it keeps its length when the first axis grows.
    header = {"descr": dtype, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _row_bytes(dtype: str, shape: Sequence[int]) -> int:
    return np.dtype(dtype).itemsize * math.prod(shape)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _reader(
    what: str, source: Source, num_workers: int
) -> Iterator[Callable[[Iterable[list[str]]], Iterator[_Chunk]]]:
    """Yields a function that reads lists of client ids, in their order."""
    if not num_workers:
        yield functools.partial(map, functools.partial(_read_chunk, source))
        return
    with workers.pool(what, num_workers, _begin_worker, source) as submit:

        def read(chunks: Iterable[list[str]]) -> Iterator[_Chunk]:
            under_way: collections.deque[concurrent.futures.Future] = collections.deque()
            for client_ids in chunks:
                under_way.append(submit(_read_in_worker, client_ids))
                if len(under_way) > 2 * num_workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()

        yield read


def _begin_worker(source: Source) -> None:
    global _source_of_worker
    _source_of_worker = source


def _read_in_worker(client_ids: list[str]) -> _Chunk:
    try:
        return _read_chunk(_source_of_worker, client_ids)
    except UserError:
        raise
    except Exception as error:
        error.add_note("in a worker process of the conversion")
        raise


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _progress_bar(name: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """Yields report(clients done), which draws a bar in a terminal only."""
    from rich import console, progress

    terminal = console.Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("clients"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda done: bar.update(task, completed=done)
